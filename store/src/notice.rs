//! What a process that trains a run, or has it trained, tells whoever watches.

use crate::events::Record;
use crate::metrics::StepRecord;

/// What a person may want to see of a run.
#[derive(Clone, Debug)]
pub enum Notice {
    /// The model is ready and the first step begins: steps applied before it.
    Ready {
        /// Steps already applied.
        step: u64,
    },
    /// The first step of a stage begins.
    Stage {
        /// Index of the stage.
        index: usize,
    },
    /// A step is done.
    Step(StepRecord),
    /// A checkpoint is complete.
    Checkpoint {
        /// Steps applied.
        step: u64,
        /// Seconds that writing took, in the background.
        seconds: f64,
        /// Size of its parts, bytes.
        bytes: u64,
    },
    /// A checkpoint could not be written. Training goes on; it is tried again, or the next one is.
    CheckpointFailed {
        /// Steps applied.
        step: u64,
        /// The cause.
        cause: String,
    },
    /// A record was added to the event log.
    Logged(Record),
    /// Something that a worker said was not taken.
    Refused(Refused),
}

/// Why a worker's word was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refused {
    /// It does not fit to the others: another build or kind of device.
    Stranger,
    /// It cannot be read.
    Malformed,
    /// It says what cannot be: a step beyond the run, a generation that was never formed, a second hello.
    Impossible,
    /// It reports an event that is not a step's, or that this build does not know.
    Event,
}

impl Refused {
    /// All of them, with their names.
    pub const ALL: [(Self, &str); 4] = [
        (Self::Stranger, "stranger"),
        (Self::Malformed, "malformed"),
        (Self::Impossible, "impossible"),
        (Self::Event, "event"),
    ];
}

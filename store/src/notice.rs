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
}

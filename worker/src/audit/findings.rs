//! What an audit found: plain values, that serialise as they are.

use serde::Serialize;

use crate::bisect::{Difference, Told};

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Every step that was asked for comes out as it is on record.
    Confirmed,
    /// The record contradicts itself, the data, or what this machine computes.
    Refuted,
    /// Nothing contradicts, and not all could be checked.
    Incomplete,
}

/// What of a run a contradiction is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Subject {
    /// `config.toml`, against what the checkpoints say that they were trained with.
    Config,
    /// A source, against what it was when the run was trained.
    Data,
    /// A checkpoint, against its own digests, the log and the metrics.
    Checkpoint,
    /// The log, against checkpoints and metrics.
    Log,
}

/// Two parts of a record that do not fit together. Nothing had to be computed to see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Contradiction {
    /// What it is about.
    pub subject: Subject,
    /// Steps applied where it shows; absent where it is of the whole run.
    pub step: Option<u64>,
    /// What does not fit, with its place.
    pub fact: String,
}

/// How much of a record was compared with what was computed here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Compared {
    /// Steps that were computed again.
    pub steps: u64,
    /// Of these, the ones whose figures are on record.
    pub figures: u64,
    /// Of these, the ones with a digest of the weights on record.
    pub digests: u64,
    /// Checkpoints, by steps applied, of which every block of weights and moments, and every cursor, was compared.
    pub checkpoints: Vec<u64>,
}

impl Compared {
    pub(super) fn add(&mut self, more: Self) {
        let Self { steps, figures, digests, checkpoints } = more;
        self.steps += steps;
        self.figures += figures;
        self.digests += digests;
        self.checkpoints.extend(checkpoints);
    }
}

/// All that was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Findings {
    /// The answer.
    pub verdict: Verdict,
    /// What the folder tells.
    pub run: Told,
    /// The steps that were asked for: the first, and the one after the last.
    pub asked: [u64; 2],
    /// Steps applied in the state that was begun from.
    pub from: u64,
    /// Whether that was a checkpoint; else the initial weights were made anew.
    pub checkpoint: bool,
    /// What was compared.
    pub compared: Compared,
    /// What does not fit together on record.
    pub contradictions: Vec<Contradiction>,
    /// The first step that does not come out as it is on record: of each pair of values the first is the record's.
    pub difference: Option<Difference>,
    /// What could not be checked.
    pub unchecked: Vec<String>,
    /// What this machine is that computed: (kind of device, build).
    pub here: (String, String),
    /// Other things to know.
    pub notes: Vec<String>,
}

impl Findings {
    /// Whether the run was trained, all or in part, by another kind of device or another build than this one: bits hold
    /// for one of each alone.
    pub fn elsewhere(&self) -> bool {
        let (device, build) = &self.here;
        self.run.devices.iter().any(|known| known != device)
            || self.run.builds.iter().any(|known| known != build)
    }
}

//! What can go wrong with a store and a run folder, by what the caller can do about it.

/// An error of the store.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No store serves the place that was given: give another.
    #[error("{place}: {detail}")]
    Place {
        /// As the user gave it.
        place: String,
        /// Fact and remedy.
        detail: String,
    },
    /// There is no run at the place that was given: give another.
    #[error("{place} holds no run; give the folder of a run")]
    NoRun {
        /// As the user gave it.
        place: String,
    },
    /// An object could not be listed, read or written: retry when the cause is gone.
    #[error("{action} {place}: {source}{remedy}")]
    Object {
        /// What was tried: `reading`, `writing`, …
        action: &'static str,
        /// The object.
        place: String,
        /// What the store said.
        source: Box<object_store::Error>,
        /// What to do, after a `; `; empty where trying again is all there is.
        remedy: String,
    },
    /// A local resource (a folder, a thread) could not be had.
    #[error("{action} {place}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// For which store.
        place: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// An object of a run folder does not parse: restore it.
    #[error("{place} does not parse: {cause}; {remedy}")]
    Malformed {
        /// The object.
        place: String,
        /// What the parser said.
        cause: String,
        /// What to do.
        remedy: String,
    },
    /// An object has more bytes than any of its kind: restore it.
    #[error(
        "{place} has {bytes} bytes, and nothing of its kind has more than {}; restore it",
        crate::WHOLE_BYTES_MAX
    )]
    TooLarge {
        /// The object.
        place: String,
        /// Its size.
        bytes: u64,
    },
    /// A checkpoint, or a part of it, is not what its manifest says: go back to an earlier one.
    #[error("checkpoint {step}: {fact}; {remedy}")]
    Checkpoint {
        /// Step of the checkpoint.
        step: u64,
        /// What does not fit, with the part and block.
        fact: String,
        /// What to do.
        remedy: String,
    },
    /// Another process writes to the same run: leave.
    #[error("{place} was written by another process; only one may train a run: stop the other, then resume")]
    Fenced {
        /// The object that was already there.
        place: String,
    },
}

impl Error {
    /// The object at `place` does not parse, says `cause`.
    pub fn malformed(place: impl Into<String>, cause: impl ToString, remedy: impl Into<String>) -> Self {
        Self::Malformed { place: place.into(), cause: cause.to_string(), remedy: remedy.into() }
    }

    /// Whether the user named a place where there is nothing of the kind, so that naming another is the remedy.
    pub fn is_wrong_place(&self) -> bool {
        matches!(self, Self::Place { .. } | Self::NoRun { .. })
    }
}

/// A result of the store.
pub type Result<T, E = Error> = std::result::Result<T, E>;

//! What can go wrong in a worker, by what the caller can do about it.

/// An error of the worker.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The config asks for what this build or this run cannot do: change the config.
    #[error("{fact}; {remedy}")]
    Config {
        /// What does not fit.
        fact: String,
        /// What to do.
        remedy: String,
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
    #[error("{what} was written by another process; only one may train a run: stop the other, then resume")]
    Fenced {
        /// The object that was already there.
        what: String,
    },
    /// The run folder could not be read or written: retry when the cause is gone.
    #[error("{action} {what}: {source}")]
    Store {
        /// What was tried: `reading`, `writing`, …
        action: &'static str,
        /// The object.
        what: String,
        /// The cause.
        source: object_store::Error,
    },
    /// An object of the run folder does not parse.
    #[error("{what} does not parse: {cause}; {remedy}")]
    Malformed {
        /// The object.
        what: String,
        /// What the parser said.
        cause: String,
        /// What to do.
        remedy: String,
    },
    /// The data could not be read.
    #[error(transparent)]
    Data(#[from] anello_dataloader::Error),
    /// A local resource (thread, runtime) could not be had.
    #[error("{action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// The model thread ended without a word: a bug, or LibTorch ran out of memory.
    #[error("the model thread stopped: {cause}; resume the run, and report this if it comes back")]
    ModelThread {
        /// Its last words.
        cause: String,
    },
}

impl Error {
    pub(crate) fn config(fact: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Config { fact: fact.into(), remedy: remedy.into() }
    }

    pub(crate) fn malformed(
        what: impl Into<String>,
        cause: impl ToString,
        remedy: impl Into<String>,
    ) -> Self {
        Self::Malformed { what: what.into(), cause: cause.to_string(), remedy: remedy.into() }
    }
}

/// A result of the worker.
pub type Result<T> = std::result::Result<T, Error>;

/// An error with the causes that it does not tell itself, in one line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |e| e.source()).fold(error.to_string(), |text, cause| {
        let cause = cause.to_string();
        if text.contains(&cause) { text } else { format!("{text}: {cause}") }
    })
}

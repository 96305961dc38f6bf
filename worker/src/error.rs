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
    /// The device that the config asks for cannot be had: see `anello doctor`, or change `compute.device`.
    #[error("the device {wanted} cannot be had: {fact}; {remedy}")]
    Device {
        /// As in `compute.device`.
        wanted: String,
        /// What is missing, and where it was looked for.
        fact: String,
        /// What to do.
        remedy: String,
    },
    /// The run folder: what to do is in its variants.
    #[error(transparent)]
    Store(#[from] anello_store::Error),
    /// The data could not be read.
    #[error(transparent)]
    Data(#[from] anello_dataloader::Error),
    /// Certificates, an address that needs them, or a coordinator that does not accept ours.
    #[error(transparent)]
    Tls(#[from] anello_tls::Error),
    /// A file outside of the run folder.
    #[error("{action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: String,
        /// The cause.
        source: std::io::Error,
    },
    /// A thread could not be had.
    #[error("{action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// Members of a ring say what does not fit together: a bug, or a machine that computes wrongly.
    #[error("{fact}")]
    Ring {
        /// What does not fit.
        fact: String,
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

    pub(crate) fn file(action: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::File { action, path: path.display().to_string(), source }
    }

    /// Whether the machine lacks what the run needs, its data or device: whoever starts a worker again there soon finds the same.
    pub fn is_unfit(&self) -> bool {
        use anello_dataloader::Error as Data;
        match self {
            Self::Device { .. } => true,
            // A store that does not answer now, and a system without threads or files, are another matter.
            Self::Data(data) => !matches!(data, Data::Store(_) | Data::File { .. } | Data::Stopped),
            _ => false,
        }
    }

    /// Whether another process writes to the same run, so that this one must leave.
    pub fn is_fenced(&self) -> bool {
        matches!(self, Self::Store(anello_store::Error::Fenced { .. }))
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

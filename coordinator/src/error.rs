//! What can go wrong in a coordinator, by what the caller can do.

/// An error of a coordinator.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The run folder: see the source.
    #[error(transparent)]
    Store(#[from] anello_store::Error),
    /// The address cannot be served.
    #[error("cannot serve {address}: {cause}; give another address")]
    Serve {
        /// The address.
        address: String,
        /// What the system said.
        cause: String,
    },
    /// Certificates, or an address that needs them.
    #[error(transparent)]
    Tls(#[from] anello_tls::Error),
    /// A worker process cannot be started.
    #[error("cannot start a worker ({program}): {source}")]
    Launch {
        /// The program.
        program: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A thread or runtime cannot be started.
    #[error("{action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A result of a coordinator.
pub type Result<T> = std::result::Result<T, Error>;

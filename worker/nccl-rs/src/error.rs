//! What can go wrong, by what the caller can do about it.

use crate::Version;

/// An error of NCCL. After any but [`Error::Library`], [`Error::Version`] and [`Error::Usage`] the communicator is of no use:
/// abort it and form a new one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no NCCL, or it lacks what is used.
    #[error("{path}: {cause}; install nvidia-nccl-cu13, or name another")]
    Library {
        /// What was tried.
        path: String,
        /// The loader's words.
        cause: String,
    },
    /// A version that is too old, or known to hang.
    #[error("NCCL {version}: {fact}; use {remedy}")]
    Version {
        /// What is there.
        version: Version,
        /// Why not.
        fact: &'static str,
        /// Which one to take.
        remedy: &'static str,
    },
    /// A call that NCCL refuses at once.
    #[error("{call}: {text} ({code})")]
    Call {
        /// The function.
        call: &'static str,
        /// `ncclResult_t`.
        code: i32,
        /// What NCCL says of it, and of its last error.
        text: String,
    },
    /// The communicator broke on the way: a peer is gone, the network or the device failed.
    #[error("the communicator broke: {text} ({code})")]
    Broken {
        /// `ncclResult_t`.
        code: i32,
        /// What NCCL says.
        text: String,
    },
    /// It was aborted.
    #[error("aborted: {reason}")]
    Aborted {
        /// By whoever aborted it.
        reason: String,
    },
    /// Nothing came of it in time.
    #[error("{what} took longer than {ms} ms")]
    Deadline {
        /// What was waited for.
        what: &'static str,
        /// Time given.
        ms: u64,
    },
    /// A mistake of the caller. Nothing was done.
    #[error("{0}")]
    Usage(String),
}

/// A result of NCCL.
pub type Result<T> = std::result::Result<T, Error>;

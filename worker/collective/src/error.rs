//! What can go wrong in a ring, by what the caller can do about it.

use crate::{Generation, Rank, Step};

/// An error of the collective. After any of them but [`Error::Shape`] the collective is dead: survivors form a new
/// generation with a new one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// A worker is gone: its process died, it closed the connection, or it gave up and said why. Form a new
    /// generation without it.
    #[error("lost {rank}: {reason}; form a new generation")]
    Lost {
        /// Who.
        rank: Rank,
        /// What was seen, or what another rank told.
        reason: String,
    },
    /// Nothing was heard of a worker for as long as [`Options::silence`](crate::tcp::Options::silence) allows: it, or what lies
    /// between us, is cut off. It may be well, and so may we.
    #[error("{rank} cannot be reached: {reason}; form a new generation without one of us")]
    Unreachable {
        /// Who.
        rank: Rank,
        /// What was tried.
        reason: String,
    },
    /// [`AbortHandle::abort`](crate::AbortHandle::abort) was called.
    #[error("aborted: {reason}")]
    Aborted {
        /// The words of the caller.
        reason: String,
    },
    /// Bytes changed between a worker's memory and ours: a network card, a cable or a memory that is broken.
    #[error("{rank} sent {} of {step} with a wrong checksum in its {place}; look at both machines and the network between", what(*block))]
    Corrupt {
        /// The sender.
        rank: Rank,
        /// Step of the operation.
        step: Step,
        /// The block that was expected; none for a message, which is not cut into blocks.
        block: Option<u32>,
        /// `header` or `payload`.
        place: &'static str,
    },
    /// A worker does something else than we do: another step, another operation, another generation.
    #[error("{rank} is out of step in {generation}, {step}: {fact}")]
    Protocol {
        /// Who.
        rank: Rank,
        /// Our generation.
        generation: Generation,
        /// Our step.
        step: Step,
        /// What came instead of what.
        fact: String,
    },
    /// At the rendezvous: a member and we do not belong together. Both sides get this error.
    #[error(
        "{peer} and {own} do not fit: {differs}; start all workers of a generation with the same build and config"
    )]
    Refused {
        /// The other side.
        peer: String,
        /// Our side.
        own: String,
        /// All that differs, with both values.
        differs: String,
    },
    /// At the rendezvous: a member that we dial does not prove that it is a worker, or we do not to it.
    #[error("{reason}")]
    Untrusted {
        /// The member.
        rank: Rank,
        /// Who, what is wrong, and what to do.
        reason: String,
    },
    /// At the rendezvous: not all members came in time.
    #[error("{generation} is not complete after {deadline_ms} ms: {waiting}")]
    Deadline {
        /// Our generation.
        generation: Generation,
        /// Time given, in milliseconds.
        deadline_ms: u64,
        /// Who is missing, and what was seen of each.
        waiting: String,
    },
    /// The caller's buffers, ranges or options do not fit together: a mistake in the caller. Nothing was sent.
    #[error("{fact}")]
    Shape {
        /// What does not fit.
        fact: String,
    },
    /// An operation on a collective that an error ended.
    #[error("this collective ended before ({cause}); make a new one for the next generation")]
    Dead {
        /// The first error, in words.
        cause: String,
    },
    /// A local resource (socket, descriptor) could not be had.
    #[error("{action}: {cause}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        cause: String,
    },
}

fn what(block: Option<u32>) -> String {
    block.map_or("a message".to_owned(), |block| format!("block {block}"))
}

impl Error {
    pub(crate) fn shape(fact: impl Into<String>) -> Self {
        Self::Shape { fact: fact.into() }
    }

    pub(crate) fn system(action: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |cause| Self::System { action, cause: cause.to_string() }
    }
}

/// A result of the collective.
pub type Result<T> = std::result::Result<T, Error>;

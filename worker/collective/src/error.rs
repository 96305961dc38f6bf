//! What can go wrong in a ring, by what the caller can do about it.

use std::collections::BTreeSet;

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
    /// Nothing was heard of workers for as long as [`Options::silence`](crate::tcp::Options::silence) allows, or, when the ring
    /// has ended for another reason, for half of that: they, or what lies between us, are cut off. They may be well, and so may
    /// we.
    #[error(
        "{} cannot be reached: {reason}; form a new generation without them, or without us",
        names(ranks)
    )]
    Unreachable {
        /// All of whom that is known, ascending.
        ranks: Vec<Rank>,
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

fn names(ranks: &[Rank]) -> String {
    let names: Vec<String> = ranks.iter().take(NAMED).map(Rank::to_string).collect();
    let more = ranks.len().saturating_sub(NAMED);
    if more > 0 { format!("{} and {more} more", names.join(", ")) } else { names.join(", ") }
}

/// Ranks that are named to people.
const NAMED: usize = 8;

fn what(block: Option<u32>) -> String {
    block.map_or("a message".to_owned(), |block| format!("block {block}"))
}

impl Error {
    pub(crate) fn shape(fact: impl Into<String>) -> Self {
        Self::Shape { fact: fact.into() }
    }

    /// The same with `apart`, of whom nothing is heard either: whoever leaves for another's sake says so too, so that a network
    /// that is cut in two is known at once. What is wrong with a member's bytes is told as it is.
    pub(crate) fn with_unreachable(self, apart: impl IntoIterator<Item = Rank>) -> Self {
        let (known, reason) = match &self {
            Self::Unreachable { ranks, reason } => (ranks.clone(), reason.clone()),
            Self::Lost { .. } | Self::Aborted { .. } => (Vec::new(), format!("nothing comes back ({self})")),
            _ => return self,
        };
        let ranks: BTreeSet<Rank> = known.into_iter().chain(apart).collect();
        match ranks.is_empty() {
            true => self,
            false => Self::Unreachable { ranks: ranks.into_iter().collect(), reason },
        }
    }

    pub(crate) fn system(action: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |cause| Self::System { action, cause: cause.to_string() }
    }
}

/// A result of the collective.
pub type Result<T> = std::result::Result<T, Error>;

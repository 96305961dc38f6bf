//! The last words of a member, so that the others name the one who failed first and not the one who left for it.

use serde::{Deserialize, Serialize};

use crate::{Error, Rank};

/// Why a member closed its collective.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Farewell {
    /// It was dropped between operations.
    Left,
    /// It lost another member.
    Lost { rank: u32, reason: String },
    /// Anything else.
    Failed { reason: String },
}

/// Bytes of a reason at most, so that a farewell fits into a small frame.
const REASON_BYTES_MAX: usize = 512;

impl Farewell {
    pub fn of(error: &Error) -> Self {
        let cut = |text: &str| text[..text.floor_char_boundary(REASON_BYTES_MAX)].to_owned();
        match error {
            Error::Lost { rank, reason } => Self::Lost { rank: rank.0, reason: cut(reason) },
            other => Self::Failed { reason: cut(&other.to_string()) },
        }
    }

    /// True when the one who said it gave up in an operation: the same one of ours cannot end either, and need not wait
    /// for what else is missing. An operation before it can: who said it was through with that.
    pub fn is_failure(&self) -> bool {
        *self != Self::Left
    }

    /// What it means for us that `by` said so.
    pub fn told(&self, by: Rank, own: Rank) -> Error {
        match self {
            Self::Left => Error::Lost { rank: by, reason: "it left the ring".into() },
            Self::Lost { rank, reason } if *rank != own.0 => {
                // A reason that was passed on before says already where it comes from.
                let told =
                    if reason.contains(", as rank") { String::new() } else { format!(", as {by} says") };
                Error::Lost { rank: Rank(*rank), reason: format!("{reason}{told}") }
            }
            Self::Lost { reason, .. } => {
                Error::Lost { rank: by, reason: format!("it gave up, having lost us: {reason}") }
            }
            Self::Failed { reason } => Error::Lost { rank: by, reason: format!("it gave up: {reason}") },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blame_is_passed_on_once() {
        let first = Error::Lost { rank: Rank(3), reason: "connection closed".into() };
        let second = Farewell::of(&first).told(Rank(1), Rank(0));
        assert_eq!(
            second.to_string(),
            "lost rank 3: connection closed, as rank 1 says; form a new generation"
        );
        assert_eq!(Farewell::of(&second).told(Rank(0), Rank(2)), second);
    }

    #[test]
    fn who_is_blamed_blames_the_speaker() {
        let said = Farewell::Lost { rank: 0, reason: "reset".into() };
        assert!(matches!(said.told(Rank(1), Rank(0)), Error::Lost { rank: Rank(1), .. }));
        let aborted = Farewell::of(&Error::Aborted { reason: "lease".into() });
        assert_eq!(
            aborted.told(Rank(2), Rank(0)),
            Error::Lost { rank: Rank(2), reason: "it gave up: aborted: lease".into() }
        );
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let long = Error::Aborted { reason: "ä".repeat(2000) };
        let Farewell::Failed { reason } = Farewell::of(&long) else { panic!("not a failure") };
        assert!(reason.len() <= REASON_BYTES_MAX);
    }
}

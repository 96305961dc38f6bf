//! The words of users: what is asked of a coordinator's jobs, as values that are already checked.

use std::fmt;

/// Workers that a job may ask for: as many as a generation has members.
pub const WORKERS_MAX: u32 = 1 << 12;

/// Name of a job: 1 to 64 letters, digits, `-` and `_`, the first a letter or a digit. So it is a folder's name on any
/// store, and no name that the coordinator keeps for itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct JobName(String);

impl JobName {
    /// Bytes at most.
    pub const BYTES_MAX: usize = 64;

    /// The name, when it is one.
    pub fn new(name: impl Into<String>) -> Option<Self> {
        let name = name.into();
        let letters = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        (first && letters && name.len() <= Self::BYTES_MAX).then_some(Self(name))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JobName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a job is in its life.
///
/// ```text
///            slots are free        all members run             a member is lost
///   Queued ────────────────▶ Forming ───────────▶ Running ──────────────────────▶ Recovering
///     ▲                                           │  ▲ ▲                              │
///     │ resume                              pause │  │ └──────────────────────────────┘
///   Paused ◀──────────────────────── Pausing ◀────┘  │        all members run
///
///   from any of them: Completed, Failed, Cancelled; these never change again
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// It waits for its turn.
    Queued,
    /// Its first ring comes together.
    Forming,
    /// It trains.
    Running,
    /// On its way to a pause or a cancellation.
    Pausing,
    /// Everything that was trained is in a checkpoint.
    Paused,
    /// A ring comes together again after one broke.
    Recovering,
    /// All steps are applied and stored.
    Completed,
    /// It cannot go on.
    Failed,
    /// Stopped for good on request.
    Cancelled,
}

impl Phase {
    /// Whether it never changes again.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Queued => "queued",
            Self::Forming => "forming",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Recovering => "recovering",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        })
    }
}

/// A job that is submitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submission {
    /// The resolved config, TOML.
    pub config: String,
    /// Its name; absent: the config's.
    pub name: Option<JobName>,
    /// Fewest workers that train, at least 1.
    pub min: u32,
    /// Workers that are wanted, at least `min`.
    pub desired: u32,
    /// Path or URL of its run folder; absent: its name, in the coordinator's place.
    pub run: Option<String>,
}

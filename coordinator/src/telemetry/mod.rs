//! What a process tells Prometheus of the runs that it trains or has trained.
//!
//! ```text
//! Notice, Status ──▶ Board ──▶ Figures (pure)  ──▶ Samples ──▶ a registry of the caller's ──▶ /metrics
//!                              goodput, invariants   families: every name, with its labels and help
//! Notice ──▶ traces ──▶ a collector, where the environment names one
//! families ──▶ reference (docs/metrics.md) · rules (alerts) · dashboards (Grafana)
//! ```
//! A scrape is a function of what is known at that moment: nothing is registered by worker, so that whoever left leaves no
//! series behind. Nothing here is global, and nothing that trains waits for it.

mod board;
mod collect;
pub mod dashboards;
pub mod families;
mod figures;
mod goodput;
mod invariants;
pub mod reference;
pub mod rules;
mod traces;

pub use board::{Board, Recalled, Scrape};
pub use families::{FAMILIES, Family, Kind};
pub use figures::Figures;
pub use goodput::{Cause, Goodput, Shares};
pub use invariants::Invariant;
pub use traces::{TraceError, Traces};

#[cfg(test)]
mod tests;

/// Milliseconds since 1970.
pub(crate) fn unix_ms() -> u64 {
    #[expect(
        clippy::disallowed_methods,
        reason = "the age of things is for people; nothing is decided by it"
    )]
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_millis() as u64)
}

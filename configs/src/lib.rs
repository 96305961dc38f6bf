//! The run as one typed value.
//!
//! A run of Anello is a pure function of its config, its data and its seed. This crate holds the first and the last:
//! [`RunConfig`] with its presets, the [`Schedule`] that says what happens at a step, and the counter-based
//! generator family in [`random`] from which everything drawn in a run comes. It reads files, and nothing else.
//!
//! The way of a config: [`RunConfig::load`] lays presets, files, the environment and `--set` over one another, decodes
//! the whole and checks it, reporting every [`Problem`] at once with the place where the value was written.
//! [`RunConfig::to_toml`] writes the result down, [`RunConfig::digest`] names its mathematics, and [`Plan`] says what
//! it will cost.

mod check;
mod decode;
pub mod lanes;
mod load;
mod names;
mod plan;
mod problem;
mod quantity;
pub mod random;
mod resolved;
mod run;
mod schedule;
pub mod text;
mod timings;
mod tree;

pub use load::*;
pub use plan::{Cluster, Gpu, Memory, Parameters, Plan, StageEstimate, TokenFlops, UnknownGpu};
pub use problem::*;
pub use resolved::Difference;
pub use run::*;
pub use schedule::*;
pub use timings::Timings;

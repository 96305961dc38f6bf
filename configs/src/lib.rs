//! The run as one typed value.
//!
//! A run of Anello is a pure function of its config, its data and its seed. This crate holds the first and the last:
//! [`RunConfig`] with its presets, the [`Schedule`] that says what happens at a step, and the counter-based
//! generator family in [`random`] from which everything drawn in a run comes. It reads files, and nothing else.

pub mod random;
mod run;

pub use run::*;

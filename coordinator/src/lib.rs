//! Jobs and their rings: which workers train, from which step, and when a checkpoint exists.

pub mod core;

//! Checkpoints: parts cut by block, and the manifest whose creation makes a checkpoint exist.
//!
//! ```text
//! checkpoints/0000001200/part-00000-00000001.safetensors    weights, exp_avg, exp_avg_sq of blocks a..b, each [n] F32
//! checkpoints/0000001200/manifest.json                      created last, with put-if-absent
//!
//! pure    manifest   what a checkpoint says, and whether it can be believed
//! shells  part       the bytes of some blocks          catalog    which checkpoints there are: commit, delete, set aside
//!         retention  which of them may go
//! ```
//!
//! The first number in a part's name is its first block (older builds counted the parts; the manifest has the names, so
//! nobody minds). The second is its writer's: that of the event with which the writer took the run up, or of the
//! generation that several writers share. A process that slept while another took over can therefore never write over
//! a part of the other's, and writers that share a number have blocks of their own.
//!
//! Parts are cut by block, not by worker or tensor, so that any number of workers can write and load them. What is
//! not there: a schedule position (it is the step), generator states (they are counters that follow from the step
//! and the cursors), anything that depends on who trained.

mod catalog;
mod manifest;
mod part;
mod retention;

pub use catalog::{commit, delete, folder, read_manifest, set_aside, split_name, steps};
pub use manifest::{BlockDigests, FORMAT, Facts, Manifest, Part, Position, digest_of_blocks};
pub use part::{Parts, Written, read_part, verify, write_part};
pub use retention::{let_go, prune, superseded, tidy};

/// Elements of a block: the unit of the gradient norm, of digests, of ownership and of checkpoints.
pub const BLOCK: usize = 1 << 16;

/// Bytes of a block of fp32.
pub const BLOCK_BYTES: usize = BLOCK * 4;

/// The flat buffers of a checkpoint: what an index of a buffer means.
pub const BUFFERS: [&str; 3] = ["weights", "exp_avg", "exp_avg_sq"];

#[cfg(test)]
mod tests;

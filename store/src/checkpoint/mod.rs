//! Checkpoints: parts cut by block, and the manifest whose creation makes a checkpoint exist.
//!
//! ```text
//! checkpoints/0000001200/part-00000-00085-00000001.safetensors    weights, exp_avg, exp_avg_sq of blocks 0..85, each [n] F32;
//!                                                                  the weights alone where no block has moved (…-weights)
//! checkpoints/0000001200/manifest.json                            created when all parts are there, with put-if-absent
//! latest.json                                                     moved last; a hint for readers
//!
//! pure    manifest   what a checkpoint says, and whether it can be believed
//! shells  blocks     blocks of a state to parts        part       the bytes of some blocks
//!         catalog    which checkpoints there are: commit, set aside, the newest
//!         retention  which of them may go              copying    one of them to another place
//! ```
//!
//! In this order a checkpoint comes: its parts, each read back as it is written; a look at all of them; the manifest;
//! `latest.json`; and only then does an old checkpoint go. A kill between any two leaves the checkpoints before it, or it.
//!
//! A part whose blocks are still the same is not written again: the manifest then names that of an earlier checkpoint. It stays
//! as long as some manifest names it. So it is where blocks stand still, whose moments a stage has set to zero: the manifest says
//! that of such a part the weights alone count.
//!
//! The first two numbers in a part's name are its blocks (older builds named them otherwise; the manifest has the names, so
//! nobody minds). The third is its writer's: that of the event with which the writer took the run up, or of the
//! generation that several writers share. A process that slept while another took over can therefore never write over
//! a part of the other's, and writers that share a number and write the same name write the same bytes. A second copy of
//! another writer's blocks says in its name that it is one, since it may be other bytes where nobody compares replicas; a
//! manifest names it only where the owner wrote nothing.
//!
//! Parts are cut by block, not by worker or tensor, so that any number of workers can write and load them. What is
//! not there: a schedule position (it is the step), generator states (they are counters that follow from the step
//! and the cursors), anything that depends on who trained.

mod blocks;
mod catalog;
mod copying;
mod manifest;
mod parallel;
mod part;
mod retention;

pub use blocks::write_blocks;
pub use catalog::{
    LATEST, commit, folder, known_steps, point_at, read_manifest, refuse_leftovers, set_aside, split_name,
    steps,
};
pub use copying::{Copied, copy};
pub use manifest::{BlockDigests, FORMAT, Facts, Manifest, Part, Position, digest_of_blocks, same_data};
pub use part::{Parts, Stamp, Written, read_part, read_parts, verify};
pub use retention::{Pruning, Retention, delete, let_go, plan_pruning, prune, superseded};

/// Elements of a block: the unit of the gradient norm, of digests, of ownership and of checkpoints.
pub const BLOCK: usize = 1 << 16;

/// Bytes of a block of fp32.
pub const BLOCK_BYTES: usize = BLOCK * 4;

/// The flat buffers of a checkpoint: what an index of a buffer means.
pub const BUFFERS: [&str; 3] = ["weights", "exp_avg", "exp_avg_sq"];

#[cfg(test)]
mod tests;

//! Writing a checkpoint: a copy on the host, then its parts. Whoever has all parts commits their manifest.

use std::ops::Range;
use std::sync::Arc;

use anello_store::checkpoint::{Facts, Stamp, Written, write_blocks};
use anello_store::{Result, Store};

use crate::host::{self, Reading};
use crate::optimizer::State;

/// A copy on the host of what one writer adds to a checkpoint, of the state between two steps.
#[derive(Debug)]
pub struct Snapshot {
    /// What the checkpoint says besides the state.
    pub facts: Facts,
    /// The blocks that are copied.
    blocks: Range<usize>,
    /// Those of the state that have moments other than zero.
    moved: Range<usize>,
    /// Their weights, and the first and second moments that they have.
    reading: Arc<Reading>,
}

impl Snapshot {
    /// Copies `blocks` of `state` to the host; `facts` are those of this state. This is the only part of a checkpoint that
    /// training waits for, on a CPU: a GPU computes the next step meanwhile, up to its update. Panics when `state` has no such
    /// blocks, or their moments are elsewhere.
    pub fn take(state: &State, blocks: Range<usize>, facts: Facts) -> Self {
        assert!(blocks.start <= blocks.end && blocks.end <= state.layout.blocks(), "blocks {blocks:?}");
        let (reading, moved) = (state.read(blocks.clone()), state.moved.clone());
        Self { facts, blocks, moved, reading }
    }

    /// The blocks that it holds.
    pub fn blocks(&self) -> Range<usize> {
        self.blocks.clone()
    }
}

/// Digest of a block of numbers, as a manifest has it.
pub(crate) fn block_digest(values: &[f32]) -> String {
    blake3::hash(host::bytes(values)).to_hex().to_string()
}

/// Writes `snapshot` by [`write_blocks`], whose words these are.
pub fn write(
    store: &Store,
    snapshot: &Snapshot,
    part_bytes: u64,
    stamp: impl Into<Stamp>,
) -> Result<Vec<Written>> {
    let Snapshot { facts, blocks, moved, reading } = snapshot;
    let buffers = [0, 1, 2].map(|buffer| reading.bytes(buffer));
    write_blocks(store, facts.position.step, stamp, part_bytes, blocks.start, moved.clone(), &buffers)
}

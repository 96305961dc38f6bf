//! Writing a checkpoint: a copy on the host, then its parts. Whoever has all parts commits their manifest.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anello_store::checkpoint::{BLOCK, BLOCK_BYTES, BUFFERS, Facts, Written, write_part};
use anello_store::{Result, Store};

use crate::optimizer::State;

/// A copy on the host of what one writer adds to a checkpoint, made between two steps.
#[derive(Debug)]
pub struct Snapshot {
    /// What the checkpoint says besides the state.
    pub facts: Facts,
    /// The blocks that were copied.
    blocks: Range<usize>,
    /// Their bytes: weights, first and second moments, little-endian.
    pub buffers: [Vec<u8>; 3],
}

impl Snapshot {
    /// Copies `blocks` of `state` to the host; `facts` are those of this state. This is the only part of a checkpoint
    /// that training waits for. Panics when `state` has no such blocks.
    pub fn take(state: &State, blocks: Range<usize>, facts: Facts) -> Self {
        assert!(blocks.start <= blocks.end && blocks.end <= state.layout.blocks(), "blocks {blocks:?}");
        let (start, len) = (blocks.start * BLOCK, blocks.len() * BLOCK);
        let host = |flat: &tch::Tensor| {
            let mut bytes = vec![0u8; len * 4];
            flat.narrow(0, start as i64, len as i64).copy_data_u8(&mut bytes, len);
            bytes
        };
        Self { facts, blocks, buffers: [host(&state.weights), host(&state.exp_avg), host(&state.exp_avg_sq)] }
    }
}

impl Snapshot {
    /// The blocks that it holds.
    pub fn blocks(&self) -> Range<usize> {
        self.blocks.clone()
    }
}

/// Digest of a block of numbers, as a manifest has it.
pub(crate) fn block_digest(values: &[f32]) -> String {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    blake3::hash(&bytes).to_hex().to_string()
}

/// Writes `snapshot` in parts of about `part_bytes`, and returns them in the order of their blocks. `stamp` keeps
/// writers apart that write the same blocks: the number of the event with which this one took the run up, or that of
/// its ring's generation.
pub fn write(store: &Store, snapshot: &Snapshot, part_bytes: u64, stamp: u64) -> Result<Vec<Written>> {
    let Snapshot { facts, blocks, buffers } = snapshot;
    let blocks_a_part = (part_bytes as usize / (BLOCK_BYTES * BUFFERS.len())).clamp(1, blocks.len().max(1));
    let firsts: Vec<usize> = blocks.clone().step_by(blocks_a_part).collect();

    // Two at a time: one is hashed while another is written.
    let next = AtomicUsize::new(0);
    let written = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..firsts.len().min(2) {
            scope.spawn(|| {
                while let Some(&first) = firsts.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let end = (first + blocks_a_part).min(blocks.end);
                    let name = format!("part-{first:05}-{stamp:08}.safetensors");
                    let bytes = (first - blocks.start) * BLOCK_BYTES..(end - blocks.start) * BLOCK_BYTES;
                    let of_part = buffers.each_ref().map(|buffer| &buffer[bytes.clone()]);
                    let part = write_part(store, facts.position.step, name, first, of_part);
                    let failed = part.is_err();
                    written.lock().expect("no holder panics").push(part);
                    if failed {
                        next.store(firsts.len(), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let written = written.into_inner().expect("no holder panics");
    let mut written = written.into_iter().collect::<Result<Vec<Written>>>()?;
    written.sort_by_key(|written| written.part.first_block);
    Ok(written)
}

//! Writing a checkpoint: parts in parallel, then the manifest.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anello_store::checkpoint::{
    BLOCK_BYTES, BUFFERS, Facts, Manifest, Position, Written, commit, write_part,
};
use anello_store::{Cursor, Environment, Result, Store};

use crate::optimizer::State;

/// A copy on the host of everything that a checkpoint holds, made between two steps.
#[derive(Debug)]
pub struct Snapshot {
    /// What it says besides the state.
    pub facts: Facts,
    buffers: [Vec<u8>; 3],
}

impl Snapshot {
    /// Copies `state` to the host. This is the only part of a checkpoint that training waits for.
    pub fn take(
        state: &State,
        position: Position,
        cursors: Vec<Cursor>,
        config: String,
        data: BTreeMap<String, String>,
        environment: Environment,
    ) -> Self {
        let host = |flat: &tch::Tensor| {
            let mut bytes = vec![0u8; state.layout.len() * 4];
            flat.copy_data_u8(&mut bytes, state.layout.len());
            bytes
        };
        let (updates, layers) = (state.updates, state.layout.layers() as u32);
        let facts = Facts { position, updates, layers, cursors, config, data, environment };
        Self { facts, buffers: [host(&state.weights), host(&state.exp_avg), host(&state.exp_avg_sq)] }
    }
}

/// Writes `snapshot` in parts of about `part_bytes`, and then its manifest. `session` is the number of the writer
/// ([`anello_store::events::EventLog::session`]). What [`commit`] says of a manifest that is already there holds here.
pub fn save(store: &Store, snapshot: &Snapshot, part_bytes: u64, session: u64) -> Result<Manifest> {
    let blocks = snapshot.buffers[0].len() / BLOCK_BYTES;
    let blocks_a_part = (part_bytes as usize / (BLOCK_BYTES * BUFFERS.len())).clamp(1, blocks.max(1));
    let ranges: Vec<(usize, usize)> = (0..blocks)
        .step_by(blocks_a_part)
        .map(|first| (first, (first + blocks_a_part).min(blocks)))
        .collect();

    // Two at a time: one is hashed while another is written.
    let next = AtomicUsize::new(0);
    let written = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..ranges.len().min(2) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(&(first, end)) = ranges.get(index) else { break };
                    let name = format!("part-{index:05}-{session:08}.safetensors");
                    let bytes = first * BLOCK_BYTES..end * BLOCK_BYTES;
                    let buffers = snapshot.buffers.each_ref().map(|buffer| &buffer[bytes.clone()]);
                    let part = write_part(store, snapshot.facts.position.step, name, first, buffers);
                    let failed = part.is_err();
                    written.lock().expect("no holder panics").push(part);
                    if failed {
                        next.store(ranges.len(), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let written = written.into_inner().expect("no holder panics");
    let parts = written.into_iter().collect::<Result<Vec<Written>>>()?;
    commit(store, Manifest::new(snapshot.facts.clone(), parts))
}

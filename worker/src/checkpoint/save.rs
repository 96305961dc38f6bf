//! Writing a checkpoint: parts in parallel, then the manifest.

use std::collections::BTreeMap;

use safetensors::tensor::{Dtype, TensorView};

use super::{
    BLOCK_BYTES, BUFFERS, BlockDigests, FORMAT, Manifest, Part, digest_of_blocks, folder, manifest_path,
};
use crate::environment::Environment;
use crate::error::{Error, Result};
use crate::optimizer::State;
use crate::params::BLOCK;
use crate::store::RunStore;
use anello_dataloader::Cursor;

/// A copy on the host of everything that a checkpoint holds, made between two steps.
#[derive(Debug)]
pub struct Snapshot {
    /// Steps applied or skipped.
    pub step: u64,
    /// Stage of the last step.
    pub stage: String,
    /// Whether the last step ended its stage.
    pub stage_end: bool,
    /// Tokens trained on.
    pub tokens: u64,
    /// Where each lane is in its data.
    pub cursors: Vec<Cursor>,
    /// Digest of the config's mathematics.
    pub config: String,
    /// Digest of each source's index.
    pub data: BTreeMap<String, String>,
    /// Where it was taken.
    pub environment: Environment,
    updates: u64,
    layers: u32,
    buffers: [Vec<u8>; 3],
}

/// What a [`Snapshot`] takes besides the state.
#[derive(Debug)]
pub struct Position {
    /// Steps applied or skipped.
    pub step: u64,
    /// Stage of the last step.
    pub stage: String,
    /// Whether the last step ended its stage.
    pub stage_end: bool,
    /// Tokens trained on.
    pub tokens: u64,
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
        let Position { step, stage, stage_end, tokens } = position;
        let buffers = [host(&state.weights), host(&state.exp_avg), host(&state.exp_avg_sq)];
        let (updates, layers) = (state.updates, state.layout.layers() as u32);
        Self { step, stage, stage_end, tokens, cursors, config, data, environment, updates, layers, buffers }
    }
}

/// Writes `snapshot` in parts of about `part_bytes`, and then its manifest. `session` is the number of the writer
/// ([`crate::events::EventLog::session`]).
///
/// A manifest that is already there is left alone: with the same weights that is a success, with others it is
/// [`Error::Fenced`].
pub fn save(store: &RunStore, snapshot: &Snapshot, part_bytes: u64, session: u64) -> Result<Manifest> {
    let elements = snapshot.buffers[0].len() / 4;
    let blocks = elements / BLOCK;
    let blocks_a_part = (part_bytes as usize / (BLOCK_BYTES * BUFFERS.len())).clamp(1, blocks.max(1));
    let ranges: Vec<(usize, usize)> =
        (0..blocks).step_by(blocks_a_part).map(|first| (first, blocks_a_part.min(blocks - first))).collect();

    // Two at a time: one is hashed while another is written.
    let next = std::sync::atomic::AtomicUsize::new(0);
    let written = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..ranges.len().min(2) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let Some(&(first, count)) = ranges.get(index) else { break };
                    let name = format!("part-{index:05}-{session:08}.safetensors");
                    let part = write_part(store, snapshot, name, first, count);
                    let failed = part.is_err();
                    written.lock().expect("no holder panics").push(part);
                    if failed {
                        next.store(ranges.len(), std::sync::atomic::Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let mut parts = Vec::new();
    let mut digests: Vec<(u64, [Vec<String>; 3])> = Vec::new();
    for part in written.into_inner().expect("no holder panics") {
        let (part, of_blocks) = part?;
        digests.push((part.first_block, of_blocks));
        parts.push(part);
    }
    parts.sort_by_key(|part| part.first_block);
    digests.sort_by_key(|(first, _)| *first);
    let mut blocks = BlockDigests::default();
    for (_, of_part) in digests {
        of_part.into_iter().enumerate().for_each(|(buffer, mut of)| blocks.of_mut(buffer).append(&mut of));
    }

    let mut manifest = Manifest {
        format: FORMAT,
        step: snapshot.step,
        stage: snapshot.stage.clone(),
        stage_end: snapshot.stage_end,
        tokens: snapshot.tokens,
        updates: snapshot.updates,
        layers: snapshot.layers,
        block: BLOCK as u64,
        elements: elements as u64,
        config: snapshot.config.clone(),
        data: snapshot.data.clone(),
        cursors: snapshot.cursors.clone(),
        environment: snapshot.environment.clone(),
        parts,
        weights: digest_of_blocks(&blocks.weights),
        blocks,
        blake3: String::new(),
    };
    manifest.blake3 = manifest.digest();
    let path = manifest_path(snapshot.step);
    let bytes = serde_json::to_vec_pretty(&manifest).expect("every map of a manifest has string keys");
    if !store.create(&path, bytes)? {
        let there = super::read_manifest(store, snapshot.step)?;
        if there.weights != manifest.weights || there.blocks != manifest.blocks {
            return Err(Error::Fenced { what: format!("{}/{path}", store.place()) });
        }
        return Ok(there);
    }
    // A process that took the run over removes parts without a manifest (`tidy`). If it has seen ours like that, this
    // is no checkpoint.
    let there = store.list(&folder(snapshot.step))?;
    let is_there = |part: &Part| there.contains(&format!("{}/{}", folder(snapshot.step), part.name));
    if !manifest.parts.iter().all(is_there) {
        store.delete(&path)?;
        return Err(Error::Fenced { what: format!("{}/{path}", store.place()) });
    }
    Ok(manifest)
}

fn write_part(
    store: &RunStore,
    snapshot: &Snapshot,
    name: String,
    first: usize,
    count: usize,
) -> Result<(Part, [Vec<String>; 3])> {
    let slices = snapshot.buffers.each_ref().map(|b| &b[first * BLOCK_BYTES..(first + count) * BLOCK_BYTES]);
    let digests = slices.map(|slice| {
        slice.chunks(BLOCK_BYTES).map(|block| blake3::hash(block).to_hex().to_string()).collect::<Vec<_>>()
    });
    let views = BUFFERS.into_iter().zip(slices).map(|(name, slice)| {
        let view = TensorView::new(Dtype::F32, vec![slice.len() / 4], slice);
        (name, view.expect("the shape is the slice's own length"))
    });
    // One entry: safetensors would write several in the random order of a hash map, and the same part would not be
    // the same bytes when it is written again.
    let place = format!("step {}, blocks {first}..{}", snapshot.step, first + count);
    let metadata = [("anello".to_owned(), place)];
    let bytes = safetensors::serialize(views, Some(metadata.into_iter().collect()))
        .expect("three F32 slices always serialise");
    let part = Part {
        name,
        first_block: first as u64,
        blocks: count as u64,
        bytes: bytes.len() as u64,
        blake3: blake3::hash(&bytes).to_hex().to_string(),
    };
    store.put(&format!("{}/{}", folder(snapshot.step), part.name), bytes)?;
    Ok((part, digests))
}

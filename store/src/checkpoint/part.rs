//! The bytes of a part: blocks of the three flat buffers as one safetensors object.

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use super::manifest::damaged;
use super::{BLOCK_BYTES, BUFFERS, Facts, Manifest, Part, folder, read_manifest};
use crate::{Result, Store};

/// A part that was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// What it is.
    pub part: Part,
    /// BLAKE3 of its blocks, by buffer.
    pub digests: [Vec<String>; 3],
}

/// What one of several writers of a checkpoint tells whoever commits it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Parts {
    /// What the manifest says besides: the same of every writer ([`Facts::digest`]).
    pub facts: Facts,
    /// The writer's parts.
    pub written: Vec<Written>,
}

/// Writes the part `name` of the checkpoint after `step` steps: from `first_block` on, the blocks that `buffers` (the
/// little-endian bytes of weights, first and second moments, whole blocks of each) are. Panics when they are of other
/// sizes.
pub fn write_part(
    store: &Store,
    step: u64,
    name: String,
    first_block: usize,
    buffers: [&[u8]; 3],
) -> Result<Written> {
    let blocks = buffers[0].len() / BLOCK_BYTES;
    assert!(buffers.iter().all(|buffer| buffer.len() == blocks * BLOCK_BYTES), "whole blocks of each buffer");
    let digests = buffers.map(|buffer| {
        buffer.chunks(BLOCK_BYTES).map(|block| blake3::hash(block).to_hex().to_string()).collect::<Vec<_>>()
    });
    let views = BUFFERS.into_iter().zip(buffers).map(|(name, buffer)| {
        let view = TensorView::new(Dtype::F32, vec![buffer.len() / 4], buffer);
        (name, view.expect("the shape is the buffer's own length"))
    });
    // One entry: safetensors would write several in the random order of a hash map, and the same part would not be
    // the same bytes when it is written again.
    let place = format!("step {step}, blocks {first_block}..{}", first_block + blocks);
    let metadata = [("anello".to_owned(), place)];
    let bytes = safetensors::serialize(views, Some(metadata.into_iter().collect()))
        .expect("three F32 buffers always serialise");
    let part = Part {
        name,
        first_block: first_block as u64,
        blocks: blocks as u64,
        bytes: bytes.len() as u64,
        blake3: blake3::hash(&bytes).to_hex().to_string(),
    };
    store.put(&format!("{}/{}", folder(step), part.name), bytes)?;
    Ok(Written { part, digests })
}

/// Reads one part whole, checks every block against the manifest, and hands each buffer's bytes to `take`, by its
/// index in [`BUFFERS`]. `holds` names what a block holds, for the message when it has changed; it may be empty.
pub fn read_part(
    store: &Store,
    manifest: &Manifest,
    part: &Part,
    holds: impl Fn(usize) -> String,
    mut take: impl FnMut(usize, &[u8]),
) -> Result<()> {
    let step = manifest.step;
    let path = format!("{}/{}", folder(step), part.name);
    let position = manifest.parts.iter().position(|p| p == part).map_or(0, |at| at + 1);
    let name = format!("part {} ({position} of {})", part.name, manifest.parts.len());
    let Some(bytes) = store.get(&path)? else { return Err(damaged(step, format!("{name} is missing"))) };
    if bytes.len() as u64 != part.bytes {
        return Err(damaged(step, format!("{name} has {} bytes, not {}", bytes.len(), part.bytes)));
    }
    let tensors = SafeTensors::deserialize(&bytes)
        .map_err(|cause| damaged(step, format!("{name} is no safetensors: {cause}")))?;
    for (buffer, buffer_name) in BUFFERS.into_iter().enumerate() {
        let tensor = tensors
            .tensor(buffer_name)
            .map_err(|cause| damaged(step, format!("{name}, {buffer_name}: {cause}")))?;
        let data = tensor.data();
        if data.len() != part.range().len() * BLOCK_BYTES {
            return Err(damaged(step, format!("{name}, {buffer_name}: {} bytes", data.len())));
        }
        for (block, block_bytes) in part.range().zip(data.chunks(BLOCK_BYTES)) {
            if blake3::hash(block_bytes).to_hex().as_str() != manifest.blocks.of(buffer)[block] {
                let holds = holds(block);
                let holds = if holds.is_empty() { holds } else { format!(", which holds {holds}") };
                return Err(damaged(
                    step,
                    format!("{name}: block {block} of {buffer_name} has changed{holds}"),
                ));
            }
        }
        take(buffer, data);
    }
    if blake3::hash(&bytes).to_hex().as_str() != part.blake3 {
        return Err(damaged(step, format!("{name}: its header has changed")));
    }
    Ok(())
}

/// Reads and checks every part of the checkpoint after `step` steps without keeping it.
pub fn verify(store: &Store, step: u64) -> Result<Manifest> {
    let manifest = read_manifest(store, step)?;
    for part in &manifest.parts {
        read_part(store, &manifest, part, |_| String::new(), |_, _| ())?;
    }
    Ok(manifest)
}

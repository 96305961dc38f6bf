//! Reading checkpoints: nothing is used before its digest was checked.

use std::ops::Range;

use anello_collective::tree::balanced;
use anello_configs::Model;
use anello_store::checkpoint::{BLOCK, BLOCK_BYTES, Manifest, Part, read_manifest, read_parts};
use anello_store::{Error as StoreError, Store};
use tch::{Device, Kind, Tensor};

use crate::cover::Cover;
use crate::error::Result;
use crate::ffi;
use crate::host;
use crate::optimizer::State;
use crate::params::Layout;

/// A checkpoint that was read and found whole.
#[derive(Debug)]
pub struct Loaded {
    /// Its manifest.
    pub manifest: Manifest,
    /// Weights and moments.
    pub state: State,
}

/// Reads the checkpoint after `step` steps of a run of `model`, its parts by several threads straight into the tensors.
pub fn load(store: &Store, step: u64, model: &Model, device: Device) -> Result<Loaded> {
    load_shard(store, step, model, device, |layout| Cover::all(layout.blocks()))
}

/// [`load`] with the moments of some blocks alone; all of them are checked.
pub fn load_shard(
    store: &Store,
    step: u64,
    model: &Model,
    device: Device,
    cover: impl Fn(&Layout) -> Cover,
) -> Result<Loaded> {
    let (manifest, layout) = open(store, step, model)?;
    let (cover, moved) = (cover(&layout), manifest.moved());
    let room = cover.within(&moved);
    // The parts of a manifest hold every block, so that every number is written before the state is anyone's.
    let buffer = |elements: usize| Tensor::empty([elements as i64], (Kind::Float, Device::Cpu));
    let (mut weights, mut exp_avg, mut exp_avg_sq) =
        (buffer(layout.len()), buffer(room.elements()), buffer(room.elements()));
    let all = Cover::all(layout.blocks());
    let covers = [&all, &room, &room];
    let weights_by_part = by_part(&manifest.parts, &all, BLOCK, ffi::as_mut_slice(&mut weights));
    let exp_avg_by_part = by_part(&manifest.parts, &room, BLOCK, ffi::as_mut_slice(&mut exp_avg));
    let exp_avg_sq_by_part = by_part(&manifest.parts, &room, BLOCK, ffi::as_mut_slice(&mut exp_avg_sq));
    let targets = weights_by_part.into_iter().zip(exp_avg_by_part).zip(exp_avg_sq_by_part);
    let targets = targets.zip(&manifest.parts);
    let targets = targets
        .map(|(((weights, exp_avg), exp_avg_sq), part)| Target {
            buffers: [weights, exp_avg, exp_avg_sq],
            blocks: part.range(),
        })
        .collect();
    let take = |target: &mut Target<'_, f32>, buffer: usize, block: usize, bytes: &[u8]| {
        if let Some(to) = target.place(covers[buffer], buffer, block, BLOCK) {
            host::bytes_mut(to).copy_from_slice(bytes);
        }
    };
    read_parts(store, &manifest, &manifest.parts, targets, holds(&layout), take)?;
    let [weights, exp_avg, exp_avg_sq] = [weights, exp_avg, exp_avg_sq]
        .map(|flat| if device == Device::Cpu { flat } else { flat.to_device(device) });
    let (updates, losses) = (manifest.updates, manifest.losses.clone());
    let reading = Default::default();
    let state = State { layout, weights, exp_avg, exp_avg_sq, cover, moved, updates, losses, reading };
    Ok(Loaded { manifest, state })
}

/// Where the blocks of one part go: what is covered of them, by buffer.
struct Target<'a, T> {
    buffers: [&'a mut [T]; 3],
    blocks: Range<usize>,
}

impl<T> Target<'_, T> {
    /// Where a block goes in a buffer of the blocks of `cover`, so many elements each; absent when it is none of them.
    fn place(&mut self, cover: &Cover, buffer: usize, block: usize, of_block: usize) -> Option<&mut [T]> {
        let at = cover.within(&self.blocks).pieces(block..block + 1).first()?.at;
        Some(&mut self.buffers[buffer][at * of_block..][..of_block])
    }
}

/// Some blocks of a checkpoint, on the host.
#[derive(Debug)]
pub struct Share {
    /// Its manifest.
    pub manifest: Manifest,
    /// Of the state that it is of.
    pub layout: Layout,
    /// Those that were read.
    pub blocks: Range<usize>,
    /// Their weights, little-endian, and the moments of those of them that have any other than zero.
    pub buffers: [Vec<u8>; 3],
}

/// Reads what falls to one of `members` of the checkpoint after `step` steps of a run of `model`: every part falls to one.
pub fn load_share(store: &Store, step: u64, model: &Model, rank: usize, members: usize) -> Result<Share> {
    let (manifest, layout) = open(store, step, model)?;
    let parts = &manifest.parts[parts_of(&manifest, rank, members)];
    let blocks = match parts {
        [first, .., last] => first.range().start..last.range().end,
        [one] => one.range(),
        [] => 0..0,
    };
    let own = Cover::of([blocks.clone()], layout.blocks());
    let of_moments = own.within(&manifest.moved());
    let covers = [&own, &of_moments, &of_moments];
    let mut buffers = covers.map(|cover| vec![0u8; cover.len() * BLOCK_BYTES]);
    let [weights, exp_avg, exp_avg_sq] = &mut buffers;
    let weights = by_part(parts, &own, BLOCK_BYTES, weights);
    let exp_avg = by_part(parts, &of_moments, BLOCK_BYTES, exp_avg);
    let exp_avg_sq = by_part(parts, &of_moments, BLOCK_BYTES, exp_avg_sq);
    let targets = weights.into_iter().zip(exp_avg).zip(exp_avg_sq);
    let targets = targets.zip(parts).map(|(((weights, exp_avg), exp_avg_sq), part)| Target {
        buffers: [weights, exp_avg, exp_avg_sq],
        blocks: part.range(),
    });
    let take = |target: &mut Target<'_, u8>, buffer: usize, block: usize, bytes: &[u8]| {
        if let Some(to) = target.place(covers[buffer], buffer, block, BLOCK_BYTES) {
            to.copy_from_slice(bytes);
        }
    };
    let targets = targets.collect();
    read_parts(store, &manifest, parts, targets, holds(&layout), take)?;
    Ok(Share { manifest, layout, blocks, buffers })
}

/// The parts that the member of `rank` reads: those that begin in its share of the blocks. They are next to one another.
fn parts_of(manifest: &Manifest, rank: usize, members: usize) -> Range<usize> {
    let blocks = manifest.parts.last().map_or(0, |part| part.range().end);
    let share = balanced(blocks, members, rank);
    let first = |block: usize| manifest.parts.partition_point(|part| part.range().start < block);
    first(share.start)..first(share.end)
}

/// Reads and checks the checkpoint after `step` steps of a run of `model`, and keeps nothing of it.
pub fn check(store: &Store, step: u64, model: &Model) -> Result<Manifest> {
    let (manifest, layout) = open(store, step, model)?;
    let nowhere = vec![(); manifest.parts.len()];
    read_parts(store, &manifest, &manifest.parts, nowhere, holds(&layout), |(), _, _, _| ())?;
    Ok(manifest)
}

/// Reads the weights alone of the checkpoint after `step` steps of a run of `model`: the flat buffer, and its layout.
/// The moments are checked, and not kept.
pub fn load_weights(store: &Store, step: u64, model: &Model) -> Result<(Manifest, Layout, Vec<f32>)> {
    let (manifest, layout) = open(store, step, model)?;
    let mut weights = vec![0f32; layout.len()];
    let take = |target: &mut (&mut [f32], usize), buffer: usize, block: usize, bytes: &[u8]| {
        if buffer == 0 {
            host::bytes_mut(&mut target.0[(block - target.1) * BLOCK..][..BLOCK]).copy_from_slice(bytes);
        }
    };
    let targets = by_part(&manifest.parts, &Cover::all(layout.blocks()), BLOCK, &mut weights);
    let targets = targets.into_iter().zip(manifest.parts.iter().map(|part| part.range().start)).collect();
    read_parts(store, &manifest, &manifest.parts, targets, holds(&layout), take)?;
    Ok((manifest, layout, weights))
}

/// The manifest, and the layout of the state that it is of.
fn open(store: &Store, step: u64, model: &Model) -> Result<(Manifest, Layout)> {
    let manifest = read_manifest(store, step)?;
    let layout = Layout::new(model, manifest.layers);
    if layout.len() as u64 != manifest.elements {
        let fact =
            format!("it holds {} elements, the config's model has {}", manifest.elements, layout.len());
        let remedy = "use the config that it was trained with".to_owned();
        return Err(StoreError::Checkpoint { step, fact, remedy }.into());
    }
    Ok((manifest, layout))
}

fn holds(layout: &Layout) -> impl Fn(usize) -> String + Sync {
    |block| layout.names_in(block).collect::<Vec<_>>().join(", ")
}

/// The flat buffer of the blocks of `cover`, so many elements each, cut into what each of `parts` holds of it.
fn by_part<'a, T>(parts: &[Part], cover: &Cover, of_block: usize, mut flat: &'a mut [T]) -> Vec<&'a mut [T]> {
    let cut = parts.iter().map(|part| {
        let blocks = cover.within(&part.range()).len();
        let (of_part, rest) = std::mem::take(&mut flat).split_at_mut(blocks * of_block);
        flat = rest;
        of_part
    });
    cut.collect()
}

/// The numbers of these bytes, little-endian.
pub(crate) fn flat(bytes: &[u8], device: Device) -> Tensor {
    let mut flat = Tensor::empty([(bytes.len() / 4) as i64], (Kind::Float, Device::Cpu));
    host::bytes_mut(ffi::as_mut_slice(&mut flat)).copy_from_slice(bytes);
    flat.to_device(device)
}

//! Reading checkpoints: nothing is used before its digest was checked.

use std::ops::Range;

use anello_collective::tree::balanced;
use anello_configs::Model;
use anello_store::checkpoint::{BLOCK, BLOCK_BYTES, Manifest, read_manifest, read_parts};
use anello_store::{Error as StoreError, Store};
use tch::{Device, Kind, Tensor};

use crate::cover::Cover;
use crate::error::Result;
use crate::ffi;
use crate::host;
use crate::optimizer::{State, both};
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
    let weights_by_part = by_part(&manifest, &all, ffi::as_mut_slice(&mut weights));
    let exp_avg_by_part = by_part(&manifest, &room, ffi::as_mut_slice(&mut exp_avg));
    let exp_avg_sq_by_part = by_part(&manifest, &room, ffi::as_mut_slice(&mut exp_avg_sq));
    let targets = weights_by_part.into_iter().zip(exp_avg_by_part).zip(exp_avg_sq_by_part);
    let targets = targets.zip(&manifest.parts);
    let targets = targets
        .map(|(((weights, exp_avg), exp_avg_sq), part)| Target {
            buffers: [weights, exp_avg, exp_avg_sq],
            blocks: part.range(),
        })
        .collect();
    let take = |target: &mut Target<'_, f32>, buffer: usize, block: usize, bytes: &[u8]| {
        // Where it lies among those of its part that are covered.
        if let Some(piece) = covers[buffer].pieces(block..block + 1).first() {
            let first = covers[buffer].pieces(target.blocks.clone())[0].at;
            let to = &mut target.buffers[buffer][(piece.at - first) * BLOCK..][..BLOCK];
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
    let (all, moved) = (0..layout.blocks(), manifest.moved());
    // The blocks of some that are in a buffer.
    let held = |buffer: usize, blocks: Range<usize>| both(&blocks, if buffer == 0 { &all } else { &moved });
    let mut buffers = [0, 1, 2].map(|buffer| vec![0u8; held(buffer, blocks.clone()).len() * BLOCK_BYTES]);
    let mut buffer = 0..;
    let [weights, exp_avg, exp_avg_sq] = buffers.each_mut().map(|flat| {
        let (buffer, mut rest) = (buffer.next().unwrap_or(0), &mut flat[..]);
        let cut = parts.iter().map(|part| {
            let bytes = held(buffer, part.range()).len() * BLOCK_BYTES;
            let of_part;
            (of_part, rest) = std::mem::take(&mut rest).split_at_mut(bytes);
            of_part
        });
        cut.collect::<Vec<_>>()
    });
    let targets = weights.into_iter().zip(exp_avg).zip(exp_avg_sq);
    let targets = targets.zip(parts).map(|(((weights, exp_avg), exp_avg_sq), part)| Target {
        buffers: [weights, exp_avg, exp_avg_sq],
        blocks: part.range(),
    });
    let take = |target: &mut Target<'_, u8>, buffer: usize, block: usize, bytes: &[u8]| {
        let held = held(buffer, target.blocks.clone());
        if held.contains(&block) {
            let at = (block - held.start) * BLOCK_BYTES;
            target.buffers[buffer][at..at + BLOCK_BYTES].copy_from_slice(bytes);
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
    let targets = by_part(&manifest, &Cover::all(layout.blocks()), &mut weights);
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

/// The flat buffer of the blocks of `cover`, cut into what each part holds of it.
fn by_part<'a>(manifest: &Manifest, cover: &Cover, mut flat: &'a mut [f32]) -> Vec<&'a mut [f32]> {
    let cut = manifest.parts.iter().map(|part| {
        let blocks: usize = cover.pieces(part.range()).iter().map(|piece| piece.blocks.len()).sum();
        let (of_part, rest) = std::mem::take(&mut flat).split_at_mut(blocks * BLOCK);
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

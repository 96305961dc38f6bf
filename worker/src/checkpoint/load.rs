//! Reading checkpoints: nothing is used before its digest was checked.

use anello_configs::Model;
use anello_store::checkpoint::{Manifest, read_manifest, read_part};
use anello_store::{Error as StoreError, Store};
use tch::{Device, Tensor};

use crate::error::Result;
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

/// Reads the checkpoint after `step` steps of a run of `model`.
pub fn load(store: &Store, step: u64, model: &Model, device: Device) -> Result<Loaded> {
    let mut buffers = [const { Vec::new() }; 3];
    let (manifest, layout) =
        read(store, step, model, |buffer, bytes| buffers[buffer].extend_from_slice(bytes))?;
    let state = state_of(layout, &buffers, manifest.updates, device);
    Ok(Loaded { manifest, state })
}

/// Reads the weights alone of the checkpoint after `step` steps of a run of `model`: the flat buffer, and its layout.
/// The moments are checked, and not kept.
pub fn load_weights(store: &Store, step: u64, model: &Model) -> Result<(Manifest, Layout, Vec<f32>)> {
    let mut weights = Vec::new();
    let (manifest, layout) = read(store, step, model, |buffer, bytes| {
        if buffer == 0 {
            weights.extend(floats(bytes));
        }
    })?;
    Ok((manifest, layout, weights))
}

fn read(
    store: &Store,
    step: u64,
    model: &Model,
    mut take: impl FnMut(usize, &[u8]),
) -> Result<(Manifest, Layout)> {
    let manifest = read_manifest(store, step)?;
    let layout = Layout::new(model, manifest.layers);
    if layout.len() as u64 != manifest.elements {
        let fact =
            format!("it holds {} elements, the config's model has {}", manifest.elements, layout.len());
        let remedy = "use the config that it was trained with".to_owned();
        return Err(StoreError::Checkpoint { step, fact, remedy }.into());
    }
    let holds = |block| layout.names_in(block).collect::<Vec<_>>().join(", ");
    for part in &manifest.parts {
        read_part(store, &manifest, part, holds, &mut take)?;
    }
    Ok((manifest, layout))
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four))
}

/// The state whose three flat buffers are these bytes, little-endian.
pub(crate) fn state_of(layout: Layout, buffers: &[Vec<u8>; 3], updates: u64, device: Device) -> State {
    let [weights, exp_avg, exp_avg_sq] = buffers
        .each_ref()
        .map(|bytes| Tensor::from_slice(&floats(bytes).collect::<Vec<f32>>()).to_device(device));
    State { layout, weights, exp_avg, exp_avg_sq, updates }
}

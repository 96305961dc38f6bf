//! Reading checkpoints: nothing is used before its digest was checked.

use safetensors::SafeTensors;
use tch::{Device, Tensor};

use super::{BLOCK_BYTES, BUFFERS, FORMAT, Manifest, Part, digest_of_blocks, folder, manifest_path};
use crate::error::{Error, Result};
use crate::optimizer::State;
use crate::params::{BLOCK, Layout};
use crate::store::RunStore;

/// A checkpoint that was read and found whole.
#[derive(Debug)]
pub struct Loaded {
    /// Its manifest.
    pub manifest: Manifest,
    /// Weights and moments.
    pub state: State,
}

/// Steps of the checkpoints that exist (have a manifest), rising.
pub fn steps(store: &RunStore) -> Result<Vec<u64>> {
    let paths = store.list("checkpoints")?;
    let step_of = |path: &String| {
        path.strip_prefix("checkpoints/")?.strip_suffix("/manifest.json")?.parse::<u64>().ok()
    };
    Ok(paths.iter().filter_map(step_of).collect())
}

fn damaged(step: u64, fact: impl Into<String>) -> Error {
    Error::Checkpoint { step, fact: fact.into(), remedy: "use the checkpoint before it".to_owned() }
}

/// The manifest of the checkpoint after `step` steps, checked for being one that this build can use.
pub fn read_manifest(store: &RunStore, step: u64) -> Result<Manifest> {
    let path = manifest_path(step);
    let Some(bytes) = store.get(&path)? else {
        let known = steps(store)?.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        let known = if known.is_empty() { "none".to_owned() } else { known };
        let fact = format!("{} has no {path}", store.place());
        return Err(Error::Checkpoint { step, fact, remedy: format!("there are: {known}") });
    };
    // The version first: a newer manifest need not parse.
    #[derive(serde::Deserialize)]
    struct Version {
        format: u32,
    }
    let version: Version =
        serde_json::from_slice(&bytes).map_err(|cause| damaged(step, format!("manifest.json: {cause}")))?;
    if version.format > FORMAT {
        // Not damage: it must not be passed over.
        let cause = format!("it has format {}, this build reads up to {FORMAT}", version.format);
        let what = format!("{}/{path}", store.place());
        return Err(Error::malformed(what, cause, "use the build that wrote it or a newer one"));
    }
    let manifest: Manifest =
        serde_json::from_slice(&bytes).map_err(|cause| damaged(step, format!("manifest.json: {cause}")))?;
    if manifest.blake3 != manifest.digest() {
        return Err(damaged(step, "manifest.json has changed since it was written"));
    }
    check_manifest(&manifest, step)?;
    Ok(manifest)
}

fn check_manifest(manifest: &Manifest, step: u64) -> Result<()> {
    let blocks = manifest.elements / BLOCK as u64;
    let mut covered = 0;
    for part in &manifest.parts {
        if part.first_block != covered || part.name.contains('/') {
            return Err(damaged(step, format!("manifest.json: part {} is out of place", part.name)));
        }
        covered = covered.saturating_add(part.blocks);
    }
    let counts = [0, 1, 2].map(|buffer| manifest.blocks.of(buffer).len() as u64);
    let consistent = manifest.step == step
        && manifest.block == BLOCK as u64
        && manifest.elements.is_multiple_of(BLOCK as u64)
        && covered == blocks
        && counts == [blocks; 3]
        && manifest.weights == digest_of_blocks(&manifest.blocks.weights);
    if consistent { Ok(()) } else { Err(damaged(step, "manifest.json contradicts itself")) }
}

/// Reads one part whole, checks every block against the manifest, and hands the three buffers' bytes to `take`.
fn read_part(
    store: &RunStore,
    manifest: &Manifest,
    layout: Option<&Layout>,
    part: &Part,
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
                let holds =
                    layout.map(|l| l.names_in(block).collect::<Vec<_>>().join(", ")).unwrap_or_default();
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

/// Reads and checks every part without keeping it.
pub fn verify(store: &RunStore, step: u64) -> Result<Manifest> {
    let manifest = read_manifest(store, step)?;
    for part in &manifest.parts {
        read_part(store, &manifest, None, part, |_, _| ())?;
    }
    Ok(manifest)
}

/// Reads the checkpoint after `step` steps of a run of `model`.
pub fn load(store: &RunStore, step: u64, model: &anello_configs::Model, device: Device) -> Result<Loaded> {
    let manifest = read_manifest(store, step)?;
    let layout = Layout::new(model, manifest.layers);
    if layout.len() as u64 != manifest.elements {
        let fact =
            format!("it holds {} elements, the config's model has {}", manifest.elements, layout.len());
        return Err(Error::Checkpoint {
            step,
            fact,
            remedy: "use the config that it was trained with".to_owned(),
        });
    }
    let mut buffers = [0, 1, 2].map(|_| Vec::with_capacity(layout.len()));
    for part in &manifest.parts {
        read_part(store, &manifest, Some(&layout), part, |buffer, bytes| {
            let floats =
                bytes.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]));
            buffers[buffer].extend(floats);
        })?;
    }
    let [weights, exp_avg, exp_avg_sq] = buffers.map(|values| Tensor::from_slice(&values).to_device(device));
    let state = State { layout, weights, exp_avg, exp_avg_sq, updates: manifest.updates };
    Ok(Loaded { manifest, state })
}

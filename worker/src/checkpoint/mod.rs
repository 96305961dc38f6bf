//! Checkpoints: parts cut by block, and the manifest whose creation makes a checkpoint exist.
//!
//! ```text
//! checkpoints/0000001200/part-00000-00000001.safetensors    weights, exp_avg, exp_avg_sq of blocks a..b, each [n] F32
//! checkpoints/0000001200/manifest.json                      created last, with put-if-absent
//! ```
//!
//! The second number in a part's name is its writer's: that of the event with which the writer took the run up. A
//! process that slept while another took over can therefore never write over a part of the other's.
//!
//! Parts are cut by block, not by worker or tensor, so that any number of workers can write and load them. What is
//! not there: a schedule position (it is the step), generator states (they are counters that follow from the step
//! and the cursors), anything that depends on who trained.

mod compare;
mod load;
mod retention;
mod save;

pub use compare::{BlockDifference, Comparison, compare};
pub use load::{Loaded, load, read_manifest, steps, verify};
pub use retention::superseded;
pub use save::{Position, Snapshot, save};

use std::ops::Range;

use anello_dataloader::Cursor;
use serde::{Deserialize, Serialize};

use crate::environment::Environment;
use crate::error::Result;
use crate::params::BLOCK;
use crate::store::RunStore;

/// Version of the format that this build writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

/// The three flat buffers of a part, in this order.
pub(crate) const BUFFERS: [&str; 3] = ["weights", "exp_avg", "exp_avg_sq"];

/// What a checkpoint is: everything needed to go on, and the digests to know that it is whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format.
    pub format: u32,
    /// Steps applied or skipped: the number of the next step.
    pub step: u64,
    /// Name of the stage of the last step.
    pub stage: String,
    /// True when the last step was the last of its stage.
    pub stage_end: bool,
    /// Tokens trained on.
    pub tokens: u64,
    /// Updates applied since the moments were last zero.
    pub updates: u64,
    /// Layers in the stack.
    pub layers: u32,
    /// Elements of a block.
    pub block: u64,
    /// Elements of each flat buffer.
    pub elements: u64,
    /// Digest of the config's mathematics.
    pub config: String,
    /// Digest of the index of each source, by name.
    pub data: std::collections::BTreeMap<String, String>,
    /// Where each lane is in its data.
    pub cursors: Vec<Cursor>,
    /// Where it was written.
    pub environment: Environment,
    /// The parts, in the order of their blocks.
    pub parts: Vec<Part>,
    /// Digest of the weights: of the block digests below. Two runs are equal when these are.
    pub weights: String,
    /// BLAKE3 of each block of each buffer.
    pub blocks: BlockDigests,
    /// BLAKE3 of all of the above: of this manifest as compact JSON with this field empty.
    pub blake3: String,
}

impl Manifest {
    fn digest(&self) -> String {
        let bare = Self { blake3: String::new(), ..self.clone() };
        let bytes = serde_json::to_vec(&bare).expect("every map of a manifest has string keys");
        blake3::hash(&bytes).to_hex().to_string()
    }
}

/// One part of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Object name beside the manifest.
    pub name: String,
    /// First block.
    pub first_block: u64,
    /// Number of blocks.
    pub blocks: u64,
    /// Size of the object, bytes.
    pub bytes: u64,
    /// BLAKE3 of the object.
    pub blake3: String,
}

impl Part {
    fn range(&self) -> Range<usize> {
        self.first_block as usize..(self.first_block + self.blocks) as usize
    }
}

/// BLAKE3 of every block, hex.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDigests {
    /// Of the weights.
    pub weights: Vec<String>,
    /// Of the first moments.
    pub exp_avg: Vec<String>,
    /// Of the second moments.
    pub exp_avg_sq: Vec<String>,
}

impl BlockDigests {
    pub(crate) fn of(&self, buffer: usize) -> &[String] {
        [&self.weights, &self.exp_avg, &self.exp_avg_sq][buffer]
    }

    pub(crate) fn of_mut(&mut self, buffer: usize) -> &mut Vec<String> {
        [&mut self.weights, &mut self.exp_avg, &mut self.exp_avg_sq][buffer]
    }
}

/// Digest of a whole buffer: BLAKE3 of its block digests.
pub fn digest_of_blocks(blocks: &[String]) -> String {
    let mut hasher = blake3::Hasher::new();
    blocks.iter().for_each(|digest| {
        hasher.update(digest.as_bytes());
    });
    hasher.finalize().to_hex().to_string()
}

/// Folder of the checkpoint after `step` steps.
pub fn folder(step: u64) -> String {
    format!("checkpoints/{step:010}")
}

fn manifest_path(step: u64) -> String {
    format!("{}/manifest.json", folder(step))
}

/// Removes a checkpoint: its manifest first, so that it never exists without a part.
pub fn delete(store: &RunStore, step: u64) -> Result<()> {
    store.delete(&manifest_path(step))?;
    store.list(&folder(step))?.iter().try_for_each(|path| store.delete(path))
}

/// Removes the parts that no checkpoint names, up to `newest`, the newest checkpoint: what was written by a process
/// that was killed before its manifest, and what was left when one was killed in [`delete`]. Parts of a checkpoint that
/// was set aside stay until it is written again.
pub fn tidy(store: &RunStore, newest: u64) -> Result<()> {
    let mut named: std::collections::BTreeMap<u64, Option<Vec<String>>> = Default::default();
    for path in store.list("checkpoints")? {
        let Some((step, name)) = path.strip_prefix("checkpoints/").and_then(|rest| rest.split_once('/'))
        else {
            continue;
        };
        let Some(step) = step.parse::<u64>().ok().filter(|&step| step <= newest) else { continue };
        if !name.starts_with("part-") {
            continue;
        }
        if let std::collections::btree_map::Entry::Vacant(entry) = named.entry(step) {
            let whole = store.get(&manifest_path(step))?.is_some();
            let aside = store.get(&set_aside_path(step))?.is_some();
            entry.insert(match (whole, aside) {
                // One that cannot be read is left for `verify` to explain.
                (true, _) => load::read_manifest(store, step)
                    .ok()
                    .map(|m| m.parts.into_iter().map(|p| p.name).collect()),
                (false, true) => None,
                (false, false) => Some(Vec::new()),
            });
        }
        if named[&step].as_ref().is_some_and(|names| !names.iter().any(|other| other == name)) {
            store.delete(&path)?;
        }
    }
    Ok(())
}

fn set_aside_path(step: u64) -> String {
    format!("{}/manifest.set-aside.json", folder(step))
}

/// Makes a checkpoint that cannot be used no longer one, keeping its objects for whoever wants to look.
pub fn set_aside(store: &RunStore, step: u64) -> Result<()> {
    if let Some(bytes) = store.get(&manifest_path(step))? {
        store.put(&set_aside_path(step), bytes)?;
    }
    store.delete(&manifest_path(step))
}

/// Bytes of a block of fp32.
const BLOCK_BYTES: usize = BLOCK * 4;

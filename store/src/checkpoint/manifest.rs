//! What a checkpoint says of itself: a value, without I/O.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{BLOCK, Written};
use crate::{Cursor, Environment, Error, Result};

/// Version of the format that this build writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

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
    pub data: BTreeMap<String, String>,
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

/// How far a run is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

/// What a checkpoint says besides its parts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// How far the run is.
    pub position: Position,
    /// Updates applied since the moments were last zero.
    pub updates: u64,
    /// Layers in the stack.
    pub layers: u32,
    /// Where each lane is in its data.
    pub cursors: Vec<Cursor>,
    /// Digest of the config's mathematics.
    pub config: String,
    /// Digest of the index of each source, by name.
    pub data: BTreeMap<String, String>,
    /// Where it was taken.
    pub environment: Environment,
}

impl Facts {
    /// What several writers of one checkpoint must agree on: BLAKE3 of all of this as compact JSON, hex. Threads count
    /// as 0 in it, since no bit depends on them and machines differ in how many they have.
    pub fn digest(&self) -> String {
        let environment = Environment { threads: 0, ..self.environment.clone() };
        let agreed = Self { environment, ..self.clone() };
        let bytes = serde_json::to_vec(&agreed).expect("every map of the facts has string keys");
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
    /// Its blocks.
    pub fn range(&self) -> Range<usize> {
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
    /// Of one of [`super::BUFFERS`], by its index there.
    pub fn of(&self, buffer: usize) -> &[String] {
        [&self.weights, &self.exp_avg, &self.exp_avg_sq][buffer]
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

pub(super) fn damaged(step: u64, fact: impl Into<String>) -> Error {
    Error::Checkpoint { step, fact: fact.into(), remedy: "use the checkpoint before it".to_owned() }
}

impl Manifest {
    /// The manifest of `parts`, in any order, which together are all blocks of a checkpoint.
    pub fn new(facts: Facts, mut parts: Vec<Written>) -> Self {
        parts.sort_by_key(|written| written.part.first_block);
        let mut blocks = BlockDigests::default();
        let mut described = Vec::new();
        for Written { part, digests: [weights, exp_avg, exp_avg_sq] } in parts {
            described.push(part);
            blocks.weights.extend(weights);
            blocks.exp_avg.extend(exp_avg);
            blocks.exp_avg_sq.extend(exp_avg_sq);
        }
        let Facts { position, updates, layers, cursors, config, data, environment } = facts;
        let Position { step, stage, stage_end, tokens } = position;
        let mut manifest = Self {
            format: FORMAT,
            step,
            stage,
            stage_end,
            tokens,
            updates,
            layers,
            block: BLOCK as u64,
            elements: (blocks.weights.len() * BLOCK) as u64,
            config,
            data,
            cursors,
            environment,
            parts: described,
            weights: digest_of_blocks(&blocks.weights),
            blocks,
            blake3: String::new(),
        };
        manifest.blake3 = manifest.digest();
        manifest
    }

    /// The manifest that `bytes`, found at `place` for `step`, are, checked for being one that this build can use.
    ///
    /// [`Error::Checkpoint`]: it is damaged. [`Error::Malformed`]: a newer build wrote it, and it must not be passed
    /// over.
    pub fn parse(bytes: &[u8], step: u64, place: &str) -> Result<Self> {
        // The version first: a newer manifest need not parse.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let unreadable = |cause| damaged(step, format!("manifest.json: {cause}"));
        let version: Version = serde_json::from_slice(bytes).map_err(unreadable)?;
        if version.format > FORMAT {
            let cause = format!("it has format {}, this build reads up to {FORMAT}", version.format);
            return Err(Error::malformed(place, cause, "use the build that wrote it or a newer one"));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(unreadable)?;
        if manifest.blake3 != manifest.digest() {
            return Err(damaged(step, "manifest.json has changed since it was written"));
        }
        manifest.check(step)?;
        Ok(manifest)
    }

    /// Size of all parts, bytes.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    fn digest(&self) -> String {
        let bare = Self { blake3: String::new(), ..self.clone() };
        let bytes = serde_json::to_vec(&bare).expect("every map of a manifest has string keys");
        blake3::hash(&bytes).to_hex().to_string()
    }

    pub(super) fn check(&self, step: u64) -> Result<()> {
        let blocks = self.elements / BLOCK as u64;
        let mut covered = 0;
        for part in &self.parts {
            if part.first_block != covered || part.name.contains('/') {
                return Err(damaged(step, format!("manifest.json: part {} is out of place", part.name)));
            }
            covered = covered.saturating_add(part.blocks);
        }
        let counts = [0, 1, 2].map(|buffer| self.blocks.of(buffer).len() as u64);
        let consistent = self.step == step
            && self.block == BLOCK as u64
            && self.elements.is_multiple_of(BLOCK as u64)
            && covered == blocks
            && counts == [blocks; 3]
            && self.weights == digest_of_blocks(&self.blocks.weights);
        if consistent { Ok(()) } else { Err(damaged(step, "manifest.json contradicts itself")) }
    }
}

//! What a checkpoint says of itself: a value, without I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::blocks::digest_of_zeros;
use super::part::SECOND;
use super::{BLOCK, Written, folder};
use crate::{Cursor, Environment, Error, Result};

/// The newest version of the format that this build reads. It writes 1 where every part is in the checkpoint's own folder,
/// 2 where some are those of earlier checkpoints, and 3 where the weights alone count of some.
pub const FORMAT: u32 = 3;

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
    /// Digest of the data of each source, by name (see [`same_data`]).
    pub data: BTreeMap<String, String>,
    /// Where each lane is in its data.
    pub cursors: Vec<Cursor>,
    /// Losses of the last steps of the stage, nats a token, the oldest first: what a spike is measured by.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "exact")]
    pub losses: Vec<f64>,
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

/// Numbers as the shortest texts that read back to the same bits.
mod exact {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub fn serialize<S: Serializer>(values: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
        values.iter().map(|value| format!("{value:?}")).collect::<Vec<String>>().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
    }
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
    /// Losses of the last steps of the stage, nats a token, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "exact")]
    pub losses: Vec<f64>,
    /// Digest of the config's mathematics.
    pub config: String,
    /// Digest of the data of each source, by name (see [`same_data`]).
    pub data: BTreeMap<String, String>,
    /// Where it was taken.
    pub environment: Environment,
}

impl Facts {
    /// What several writers of one checkpoint must agree on: BLAKE3 of all of this as compact JSON, hex. Threads count
    /// as 0 in it, since no bit depends on them and machines differ in how many they have; nor does it matter whether one of
    /// them began before the data had checksums.
    pub fn digest(&self) -> String {
        let environment = Environment { threads: 0, ..self.environment.clone() };
        let order = |(name, digest): (&String, &String)| (name.clone(), parts_of(digest).0.to_owned());
        let agreed = Self { environment, data: self.data.iter().map(order).collect(), ..self.clone() };
        let bytes = serde_json::to_vec(&agreed).expect("every map of the facts has string keys");
        blake3::hash(&bytes).to_hex().to_string()
    }
}

/// Whether two digests of data, as manifests have them, are of the same as far as both tell: the order of documents, and
/// what is in them where both sides have checksums of it.
pub fn same_data(one: &str, other: &str) -> bool {
    let ((one, content), (other, other_content)) = (parts_of(one), parts_of(other));
    one == other && content.zip(other_content).is_none_or(|(content, other)| content == other)
}

/// The digest of the order, and that of the content if there is one.
fn parts_of(digest: &str) -> (&str, Option<&str>) {
    digest.split_once('+').map_or((digest, None), |(order, content)| (order, Some(content)))
}

/// One part of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Object name in the folder of the checkpoint that it was written for.
    pub name: String,
    /// Step of that checkpoint, an earlier one, whose blocks these still are; absent: it was written for this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// The moments of its blocks are zero, whatever else the object holds: of it the weights alone count.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub still: bool,
    /// First block.
    pub first_block: u64,
    /// Number of blocks.
    pub blocks: u64,
    /// Size of the object, bytes.
    pub bytes: u64,
    /// BLAKE3 of the object.
    pub blake3: String,
}

impl Manifest {
    /// Whether these are the bytes of a block of a buffer, by its index in [`BUFFERS`](super::BUFFERS). False for one that it does
    /// not know.
    pub fn has(&self, buffer: usize, block: usize, bytes: &[u8]) -> bool {
        let digest = self.blocks.of(buffer).get(block);
        digest.is_some_and(|digest| blake3::hash(bytes).to_hex().as_str() == digest.as_str())
    }

    /// The blocks from the first to the last that have moments other than zero.
    pub fn moved(&self) -> Range<usize> {
        let moves =
            |block: &usize| [1, 2].iter().any(|buffer| self.blocks.of(*buffer)[*block] != digest_of_zeros());
        let mut blocks = 0..self.blocks.weights.len();
        let Some(first) = blocks.clone().find(moves) else { return 0..0 };
        first..blocks.rfind(moves).map_or(first, |last| last + 1)
    }
}

impl Part {
    /// Its blocks.
    pub fn range(&self) -> Range<usize> {
        self.first_block as usize..self.first_block.saturating_add(self.blocks) as usize
    }

    /// Its path in the run folder, named by the manifest of the checkpoint after `step` steps.
    pub fn path(&self, step: u64) -> String {
        format!("{}/{}", folder(self.step.unwrap_or(step)), self.name)
    }

    /// Whether its name is one that parts have, and not a path to somewhere else.
    fn is_well_named(&self) -> bool {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        self.name.starts_with("part-") && self.name.bytes().all(plain)
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

/// Of parts that may be there twice or overlap, those that follow one another from block 0 to the last; all of them, by their
/// first block, where there is no such way. Of several ways it is the one of the longest parts.
fn one_after_the_other(mut parts: Vec<Written>, step: u64) -> Vec<Written> {
    // A part of this very checkpoint that was found there is no part of an earlier one.
    for written in &mut parts {
        written.part.step = written.part.step.filter(|of| *of != step);
    }
    let end_of = |written: &Written| written.part.first_block.saturating_add(written.part.blocks);
    parts.sort_by_key(|written| (written.part.first_block, std::cmp::Reverse(written.part.blocks)));
    let all = parts.iter().map(end_of).max().unwrap_or(0);
    // From the last block back: from which first blocks the rest can be had.
    let mut starts = BTreeSet::from([all]);
    for written in parts.iter().rev() {
        if written.part.blocks > 0 && starts.contains(&end_of(written)) {
            starts.insert(written.part.first_block);
        }
    }
    if !starts.contains(&0) {
        return parts;
    }
    let mut covered = 0;
    parts.retain(|written| {
        let next = written.part.first_block == covered
            && written.part.blocks > 0
            && starts.contains(&end_of(written));
        covered = if next { end_of(written) } else { covered };
        next
    });
    parts
}

pub(super) fn damaged(step: u64, fact: impl Into<String>) -> Error {
    Error::Checkpoint { step, fact: fact.into(), remedy: "use the checkpoint before it".to_owned() }
}

impl Manifest {
    /// The manifest of what several writers tell of, who agree on `facts`: where blocks were written by their owner and by
    /// whoever keeps a second copy of them, the owner's parts are named.
    pub fn of_writers(facts: Facts, mut parts: Vec<Written>) -> Self {
        let step = facts.position.step;
        // What an owner wrote, what is of an earlier checkpoint and may be of either, what is a second copy.
        let class = |part: &Part| match part.step {
            Some(of) if of != step => 1,
            _ => {
                if part.name.contains(SECOND) {
                    2
                } else {
                    0
                }
            }
        };
        for later in [1, 2] {
            let before = parts.iter().filter(|written| class(&written.part) < later);
            let there: BTreeSet<usize> = before.flat_map(|written| written.part.range()).collect();
            let is_there = |part: &Part| part.range().all(|block| there.contains(&block));
            parts.retain(|written| class(&written.part) < later || !is_there(&written.part));
        }
        Self::new(facts, parts)
    }

    /// The manifest of `parts`, in any order, which together are all blocks of a checkpoint. Blocks may be there more
    /// than once, when several have written them: they need not have cut them alike.
    pub fn new(facts: Facts, parts: Vec<Written>) -> Self {
        let parts = one_after_the_other(parts, facts.position.step);
        let mut blocks = BlockDigests::default();
        let mut described = Vec::new();
        for Written { part, digests: [weights, exp_avg, exp_avg_sq] } in parts {
            described.push(part);
            blocks.weights.extend(weights);
            blocks.exp_avg.extend(exp_avg);
            blocks.exp_avg_sq.extend(exp_avg_sq);
        }
        let Facts { position, updates, layers, cursors, losses, config, data, environment } = facts;
        let Position { step, stage, stage_end, tokens } = position;
        let any = |is: fn(&Part) -> bool| described.iter().any(is);
        let format = match (any(|part| part.still), any(|part| part.step.is_some())) {
            (true, _) => FORMAT,
            (false, true) => 2,
            (false, false) => 1,
        };
        let mut manifest = Self {
            format,
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
            losses,
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

    pub(super) fn digest(&self) -> String {
        let bare = Self { blake3: String::new(), ..self.clone() };
        let bytes = serde_json::to_vec(&bare).expect("every map of a manifest has string keys");
        blake3::hash(&bytes).to_hex().to_string()
    }

    pub(super) fn check(&self, step: u64) -> Result<()> {
        let blocks = self.elements / BLOCK as u64;
        let mut covered = 0;
        for part in &self.parts {
            let later = part.step.is_some_and(|of| of >= step);
            let zero = |buffer: usize| {
                let digests = self.blocks.of(buffer).get(part.range());
                digests.is_none_or(|digests| digests.iter().all(|digest| digest == digest_of_zeros()))
            };
            if part.still && !(zero(1) && zero(2)) {
                return Err(damaged(step, "manifest.json contradicts itself"));
            }
            if part.first_block != covered || part.blocks == 0 || later || !part.is_well_named() {
                return Err(damaged(step, format!("manifest.json: part {:?} is out of place", part.name)));
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

//! The bytes of a part: blocks of the three flat buffers, or of the weights alone, as one safetensors object.

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, View};
use serde::{Deserialize, Serialize};

use super::blocks::{Digests, ZEROS};
use super::manifest::damaged;
use super::parallel::each;
use super::{BLOCK_BYTES, BUFFERS, Facts, Manifest, Part, folder, read_manifest};
use crate::{Fetched, Result, Store};

/// What keeps writers apart that write the same blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The number of the event with which the writer took the run up, or that of its ring's generation.
    pub number: u64,
    /// The blocks are another writer's: this is a second copy of them.
    pub second: bool,
}

impl From<u64> for Stamp {
    fn from(number: u64) -> Self {
        Self { number, second: false }
    }
}

/// What the name of a part has that is a second copy.
pub(super) const SECOND: &str = "-second";

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

/// Bytes of parts that are read at a time, by all threads together; one part may be larger.
const READ_BYTES: u64 = 1 << 30;

/// Blocks that are read at a time where a part is read piece by piece: 4 MiB.
const BLOCKS_AT_ONCE: usize = 16;

/// What stands before the numbers in a part. The numbers of the view are not asked for: they follow from elsewhere.
struct Numbers([usize; 1]);

impl View for Numbers {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.0
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&[])
    }

    fn data_len(&self) -> usize {
        self.0[0] * 4
    }
}

/// The header of the part of `blocks` of the checkpoint after `step` steps, of these buffers: all of it but the numbers.
fn header(step: u64, blocks: &Range<usize>, buffers: &[usize]) -> Vec<u8> {
    let numbers = || Numbers([blocks.len() * BLOCK_BYTES / 4]);
    // One entry: safetensors would write several in the random order of a hash map, and the same part would not be
    // the same bytes when it is written again.
    let place = format!("step {step}, blocks {}..{}", blocks.start, blocks.end);
    let metadata = [("anello".to_owned(), place)];
    let views = buffers.iter().map(|buffer| (BUFFERS[*buffer], numbers()));
    safetensors::serialize(views, Some(metadata.into_iter().collect()))
        .expect("the header of F32 buffers always serialises")
}

/// Writes the part of the checkpoint after `step` steps that holds the blocks `own` of those that `digests` is of, whose first is
/// `first_block` of the state, all with moments or all without; reads it back and compares. What is not hashed yet is hashed as it is
/// written. The part's name says which blocks it holds and who wrote it (`stamp`), so that two that write the same name write the
/// same bytes.
pub(super) fn write_part(
    store: &Store,
    step: u64,
    stamp: Stamp,
    first_block: usize,
    digests: &Digests<'_>,
    own: Range<usize>,
) -> Result<Written> {
    let blocks = first_block + own.start..first_block + own.end;
    let still = own.clone().all(|block| digests.is_still(block));
    let buffers = in_file_order(still);
    let blocks_of = |buffer: &usize| own.clone().map(|block| (*buffer, block)).collect::<Vec<_>>();
    let in_order: Vec<(usize, usize)> = buffers.iter().flat_map(blocks_of).collect();
    let mut chunks = vec![Bytes::from(header(step, &blocks, buffers))];
    chunks.extend(in_order.iter().map(|(buffer, block)| digests.block(*buffer, *block)));
    let (number, second) = (stamp.number, if stamp.second { SECOND } else { "" });
    let what = if still { "-weights" } else { "" };
    let name = format!("part-{:05}-{:05}-{number:08}{what}{second}.safetensors", blocks.start, blocks.end);
    let mut hasher = blake3::Hasher::new();
    let see = |at: usize| {
        hasher.update(&chunks[at]);
        if let Some((buffer, block)) = at.checked_sub(1).map(|at| in_order[at]) {
            digests.of(buffer, block);
        }
    };
    store.put_proved(&format!("{}/{name}", folder(step)), &chunks, see)?;
    let part = Part {
        name,
        step: None,
        still,
        first_block: blocks.start as u64,
        blocks: blocks.len() as u64,
        bytes: chunks.iter().map(|chunk| chunk.len() as u64).sum(),
        blake3: hasher.finalize().to_hex().to_string(),
    };
    Ok(Written { part, digests: digests.all(own) })
}

/// The buffers of a part, in the order in which safetensors puts tensors of one type: that of their names.
fn in_file_order(still: bool) -> &'static [usize] {
    // exp_avg, exp_avg_sq, weights
    if still { &[0] } else { &[1, 2, 0] }
}

/// Reads one part whole, checks every block against the manifest, and hands each to `take`: the index of its buffer in
/// [`BUFFERS`], its number, its bytes. `holds` names what a block holds, for the message when it has changed; it may be empty.
///
/// A large part in a folder is read piece by piece, and never in memory whole.
pub fn read_part(
    store: &Store,
    manifest: &Manifest,
    part: &Part,
    holds: impl Fn(usize) -> String,
    mut take: impl FnMut(usize, usize, &[u8]),
) -> Result<()> {
    let step = manifest.step;
    let position = manifest.parts.iter().position(|p| p == part).map_or(0, |at| at + 1);
    let of = part.step.map(|of| format!(" of checkpoint {of}")).unwrap_or_default();
    let name = format!("part {}{of} ({position} of {})", part.name, manifest.parts.len());
    let mut take = |buffer: usize, block: usize, bytes: &[u8]| {
        if manifest.has(buffer, block, bytes) {
            take(buffer, block, bytes);
            return Ok(());
        }
        let holds = holds(block);
        let holds = if holds.is_empty() { holds } else { format!(", which holds {holds}") };
        Err(damaged(step, format!("{name}: block {block} of {} has changed{holds}", BUFFERS[buffer])))
    };
    let (path, of_buffer) = (part.path(step), part.blocks * BLOCK_BYTES as u64);
    // Of a part that stands still only the weights count. It is of them alone, or of before that.
    let wanted = |buffer: usize| buffer == 0 || !part.still;
    let layouts = [part.still, false].map(|still| {
        let buffers = in_file_order(still);
        (buffers, header(part.step.unwrap_or(step), &part.range(), buffers))
    });
    let is_laid = |(buffers, header): &&(&[usize], Vec<u8>)| {
        part.bytes == header.len() as u64 + buffers.len() as u64 * of_buffer
    };
    // Past the header there are the blocks alone, which are checked. Another build may have written another header.
    let known = layouts.iter().find(is_laid);
    for buffer in (1..BUFFERS.len()).filter(|buffer| !wanted(*buffer)) {
        for block in part.range() {
            take(buffer, block, &ZEROS)?;
        }
    }
    if let (Some((buffers, header)), Some(mut file)) = (known, store.file(&path, part.bytes))
        && store.read_piece(&path, &mut file, 0..header.len() as u64)? == *header
    {
        for (at, &buffer) in (0..).zip(*buffers).filter(|(_, buffer)| wanted(**buffer)) {
            let mut start = header.len() as u64 + at * of_buffer;
            for run in part.range().step_by(BLOCKS_AT_ONCE) {
                let blocks = run..part.range().end.min(run + BLOCKS_AT_ONCE);
                let end = start + (blocks.len() * BLOCK_BYTES) as u64;
                let bytes = store.read_piece(&path, &mut file, start..end)?;
                for (block, bytes) in blocks.zip(bytes.chunks(BLOCK_BYTES)) {
                    take(buffer, block, bytes)?;
                }
                start = end;
            }
        }
        return Ok(());
    }
    let bytes = match store.get_sized(&path, |size| size == part.bytes)? {
        Fetched::Bytes(bytes) => bytes,
        Fetched::Absent => return Err(damaged(step, format!("{name} is missing"))),
        Fetched::Other(size) => {
            return Err(damaged(step, format!("{name} has {size} bytes, not {}", part.bytes)));
        }
    };
    let tensors = SafeTensors::deserialize(&bytes)
        .map_err(|cause| damaged(step, format!("{name} is no safetensors: {cause}")))?;
    for (buffer, buffer_name) in BUFFERS.into_iter().enumerate().filter(|(buffer, _)| wanted(*buffer)) {
        let tensor = tensors
            .tensor(buffer_name)
            .map_err(|cause| damaged(step, format!("{name}, {buffer_name}: {cause}")))?;
        let data = tensor.data();
        if data.len() as u64 != of_buffer {
            return Err(damaged(step, format!("{name}, {buffer_name}: {} bytes", data.len())));
        }
        for (block, bytes) in part.range().zip(data.chunks(BLOCK_BYTES)) {
            take(buffer, block, bytes)?;
        }
    }
    let is_known = known.is_some_and(|(_, header)| bytes.starts_with(header));
    if !is_known && blake3::hash(&bytes).to_hex().as_str() != part.blake3 {
        return Err(damaged(step, format!("{name}: its header has changed")));
    }
    Ok(())
}

/// [`read_part`] of these parts of a checkpoint, on several threads. `targets` has one place for each part, which `take` fills:
/// it is given the place, and of a block the index of its buffer, its number and its bytes.
pub fn read_parts<T: Send>(
    store: &Store,
    manifest: &Manifest,
    parts: &[Part],
    targets: Vec<T>,
    holds: impl Fn(usize) -> String + Sync,
    take: impl Fn(&mut T, usize, usize, &[u8]) + Sync,
) -> Result<()> {
    assert_eq!(targets.len(), parts.len(), "a place for each part");
    // Of a folder no thread has a whole part.
    let in_memory = |part: &Part| if store.folder().is_some() { 1 } else { part.bytes };
    let largest = parts.iter().map(in_memory).max().unwrap_or(1).max(1);
    let most = (READ_BYTES / largest).clamp(1, 64) as usize;
    each(most, targets, |at, mut target| {
        let take = |buffer: usize, block: usize, bytes: &[u8]| take(&mut target, buffer, block, bytes);
        read_part(store, manifest, &parts[at], &holds, take)
    })
    .map(drop)
}

/// Reads and checks every part of the checkpoint after `step` steps without keeping it.
pub fn verify(store: &Store, step: u64) -> Result<Manifest> {
    let manifest = read_manifest(store, step)?;
    let nowhere = vec![(); manifest.parts.len()];
    read_parts(store, &manifest, &manifest.parts, nowhere, |_| String::new(), |(), _, _, _| ())?;
    Ok(manifest)
}

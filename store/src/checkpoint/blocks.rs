//! Writing blocks of a state: hashed, cut into parts, and left out where an earlier checkpoint has them.
//!
//! ```text
//! blocks of the writer     | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |      changed: 8
//! parts of the one before  |       A       |       B       | C |
//! parts of this one        |   A, as is    |   B, as is    | D |      only D is written
//! ```
//! Blocks that do not move have no moments: then a part is of their weights alone, and so is one of before they stood still, whatever
//! else it holds.

use std::ops::Range;
use std::sync::OnceLock;

use bytes::Bytes;

use super::catalog::{manifest_path, read_manifest, steps_in};
use super::parallel::each;
use super::part::{Stamp, write_part};
use super::{BLOCK_BYTES, BUFFERS, Manifest, Part, Written};
use crate::{Result, Store};

/// Writes the blocks from `first_block` on of the state after `step` steps in parts of about `part_bytes`, and returns the
/// parts in the order of their blocks. `buffers` are the little-endian bytes of weights, first and second moments, whole
/// blocks of each; of the moments those of the blocks `moved` of the state alone, since all others are zero. `stamp` keeps writers
/// apart that write the same blocks.
///
/// A part of the newest checkpoint whose blocks are all the same still (what is frozen does not change) is named and not
/// written again. Every part that is written is read back. Panics when the buffers are not of these blocks.
pub fn write_blocks(
    store: &Store,
    step: u64,
    stamp: impl Into<Stamp>,
    part_bytes: u64,
    first_block: usize,
    moved: Range<usize>,
    buffers: &[Bytes; 3],
) -> Result<Vec<Written>> {
    let stamp = stamp.into();
    let digests = Digests::new(first_block, moved, buffers);
    let blocks = first_block..first_block + digests.blocks();
    let of_part = (part_bytes as usize / (BLOCK_BYTES * BUFFERS.len())).max(1);
    let base = base(store, step);
    let still = |block: usize| digests.is_still(block - first_block);
    // What stands still has no moments any more, whatever it had then.
    let same = |block: usize| {
        let is = |buffer: usize| {
            let theirs = base.as_ref().and_then(|(base, _)| base.blocks.of(buffer).get(block));
            theirs.is_some_and(|theirs| theirs == digests.of(buffer, block - first_block))
        };
        (0..if still(block) { 1 } else { BUFFERS.len() }).all(is)
    };
    let there = base.iter().flat_map(|(base, there)| base.parts.iter().filter(|part| there.contains(part)));
    let parts: Vec<&Part> = there.collect();
    // What did not change is hashed here, by all threads, and what did as it is written.
    let within = |part: &&&Part| part.range().start >= blocks.start && part.range().end <= blocks.end;
    each(usize::MAX, parts.iter().filter(within).collect(), |_, part| {
        part.range().all(same);
        Ok(())
    })?;
    each(usize::MAX, cut(blocks.clone(), of_part, &parts, same, still), |_, piece| {
        let own = |range: Range<usize>| range.start - first_block..range.end - first_block;
        match piece {
            Piece::New(range) => write_part(store, step, stamp, first_block, &digests, own(range)),
            Piece::Kept { part, still } => {
                let of = part.step.or(base.as_ref().map(|(base, _)| base.step));
                let digests = digests.all(own(part.range()));
                Ok(Written { part: Part { step: of, still: part.still || still, ..part.clone() }, digests })
            }
        }
    })
}

/// The bytes of a block of zeros.
pub(super) static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// BLAKE3 of a block of zeros, hex.
pub(super) fn digest_of_zeros() -> &'static str {
    static DIGEST: OnceLock<String> = OnceLock::new();
    DIGEST.get_or_init(|| blake3::hash(&ZEROS).to_hex().to_string())
}

/// BLAKE3 of each block of three buffers, hex, found when it is first asked for.
pub(super) struct Digests<'a> {
    buffers: &'a [Bytes; 3],
    /// The blocks of the buffers of moments, as those of the weights are counted.
    moved: Range<usize>,
    known: [Vec<OnceLock<String>>; 3],
}

impl<'a> Digests<'a> {
    /// Of the blocks from `first` on of a state that has moments of the blocks `moved`. Panics when the buffers are not whole blocks,
    /// or of moments not of these.
    pub fn new(first: usize, moved: Range<usize>, buffers: &'a [Bytes; 3]) -> Self {
        let [weights, exp_avg, exp_avg_sq] = buffers.each_ref().map(Bytes::len);
        let blocks = weights / BLOCK_BYTES;
        let here = |block: usize| block.clamp(first, first + blocks) - first;
        let moved = here(moved.start)..here(moved.end);
        let of_moments = moved.len() * BLOCK_BYTES;
        assert_eq!(
            (weights, exp_avg, exp_avg_sq),
            (blocks * BLOCK_BYTES, of_moments, of_moments),
            "whole blocks"
        );
        Self { buffers, moved, known: [(); 3].map(|()| vec![OnceLock::new(); blocks]) }
    }

    /// Blocks of the weights.
    pub fn blocks(&self) -> usize {
        self.known[0].len()
    }

    /// Whether a block has no moments: they are zero.
    pub fn is_still(&self, block: usize) -> bool {
        !self.moved.contains(&block)
    }

    /// The bytes of a block.
    pub fn block(&self, buffer: usize, block: usize) -> Bytes {
        let at = match buffer {
            0 => block,
            _ if self.is_still(block) => return Bytes::from_static(&ZEROS),
            _ => block - self.moved.start,
        };
        self.buffers[buffer].slice(at * BLOCK_BYTES..(at + 1) * BLOCK_BYTES)
    }

    /// The digest of a block.
    pub fn of(&self, buffer: usize, block: usize) -> &str {
        if buffer > 0 && self.is_still(block) {
            return digest_of_zeros();
        }
        let hash = || blake3::hash(&self.block(buffer, block)).to_hex().to_string();
        self.known[buffer][block].get_or_init(hash)
    }

    /// Those of some blocks, by buffer.
    pub fn all(&self, blocks: Range<usize>) -> [Vec<String>; 3] {
        [0, 1, 2].map(|buffer| blocks.clone().map(|block| self.of(buffer, block).to_owned()).collect())
    }
}

/// The newest checkpoint, whose parts one after `step` steps may name, and those of its parts that are there and that the store has
/// not written anew since. Only what is newest: it stays, with all that it names, until a newer one is there.
fn base(store: &Store, step: u64) -> Option<(Manifest, Vec<Part>)> {
    // What cannot be read now is no reason not to write: everything then is.
    let entries = store.entries("checkpoints").ok()?;
    let newest =
        steps_in(entries.iter().map(|(object, _)| object)).last().filter(|newest| *newest <= step)?;
    let manifest = read_manifest(store, newest).ok()?;
    let entry = |path: &str| {
        let at = entries.binary_search_by(|(object, _)| object.path.as_str().cmp(path)).ok()?;
        Some((entries[at].0.bytes, entries[at].1))
    };
    let (_, created) = entry(&manifest_path(newest))?;
    let is_there = |part: &&Part| {
        let found = entry(&part.path(newest));
        found.is_some_and(|(bytes, written)| bytes == part.bytes && written <= created)
    };
    let there = manifest.parts.iter().filter(is_there).cloned().collect();
    Some((manifest, there))
}

/// What becomes of some blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece<'a> {
    /// They are written as a part: all of them have moments, or none.
    New(Range<usize>),
    /// They are a part that is there, or, when they stand `still`, its weights.
    Kept { part: &'a Part, still: bool },
}

/// `blocks` in pieces, in order: the `parts` that lie within and whose blocks are all the `same` and all `still` or none, and between
/// them new ones of at most `of_part` blocks. Blocks that are the same before the first and after the last that changed get parts of their own,
/// so that the next checkpoint can keep these.
fn cut<'a>(
    blocks: Range<usize>,
    of_part: usize,
    parts: &[&'a Part],
    same: impl Fn(usize) -> bool,
    still: impl Fn(usize) -> bool,
) -> Vec<Piece<'a>> {
    let mut pieces = Vec::new();
    let fill = |pieces: &mut Vec<Piece<'a>>, gap: Range<usize>| {
        let changed = |block: &usize| !same(*block);
        let runs = match (gap.clone().find(changed), gap.clone().rev().find(changed)) {
            (Some(first), Some(last)) => [gap.start..first, first..last + 1, last + 1..gap.end],
            _ => [gap, 0..0, 0..0],
        };
        for mut run in runs {
            while !run.is_empty() {
                let most = run.end.min(run.start + of_part);
                let end = (run.start..most).find(|block| still(*block) != still(run.start)).unwrap_or(most);
                pieces.push(Piece::New(run.start..end));
                run.start = end;
            }
        }
    };
    let mut at = blocks.start;
    for part in parts {
        let range = part.range();
        let is_within = range.start >= at && range.end <= blocks.end;
        let of_one_kind = || range.clone().all(|block| still(block) == still(range.start));
        if is_within && of_one_kind() && range.clone().all(&same) {
            fill(&mut pieces, at..range.start);
            pieces.push(Piece::Kept { part, still: still(range.start) });
            at = range.end;
        }
    }
    fill(&mut pieces, at..blocks.end);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(first: u64, blocks: u64) -> Part {
        let name = format!("part-{first:05}");
        Part { name, step: None, still: false, first_block: first, blocks, bytes: 0, blake3: String::new() }
    }

    /// Of a state in which the blocks `moved` have moments: new parts as `1..3`, and as `1..3 still` without moments; kept ones
    /// as `[1..3]`.
    fn told_of(
        blocks: Range<usize>,
        of_part: usize,
        parts: &[Part],
        moved: Range<usize>,
        changed: &[usize],
    ) -> String {
        let parts: Vec<&Part> = parts.iter().collect();
        let still = |block: usize| !moved.contains(&block);
        let said = |still: bool| if still { " still" } else { "" };
        let word = |piece: &Piece<'_>| match piece {
            Piece::New(range) => format!("{}..{}{}", range.start, range.end, said(still(range.start))),
            Piece::Kept { part, still } => {
                format!("[{}..{}{}]", part.range().start, part.range().end, said(*still))
            }
        };
        let pieces = cut(blocks, of_part, &parts, |block| !changed.contains(&block), still);
        pieces.iter().map(word).collect::<Vec<_>>().join(" ")
    }

    fn told(blocks: Range<usize>, of_part: usize, parts: &[Part], changed: &[usize]) -> String {
        told_of(blocks, of_part, parts, 0..usize::MAX, changed)
    }

    #[test]
    fn what_stands_still_is_the_weights_of_what_is_there() {
        let parts = [part(0, 4), part(4, 4), part(8, 2)];
        let told = |of_part: usize, parts: &[Part], moved: Range<usize>, changed: &[usize]| {
            told_of(0..10, of_part, parts, moved, changed)
        };
        assert_eq!(told(4, &parts, 9..10, &[9]), "[0..4 still] [4..8 still] 8..9 still 9..10");
        assert_eq!(told(4, &parts, 9..10, &[5, 9]), "[0..4 still] 4..5 still 5..9 still 9..10");
        assert_eq!(told(4, &parts, 8..10, &[]), "[0..4 still] [4..8 still] [8..10]");
        // A part of both is not kept, and no new one is of both.
        assert_eq!(told(4, &parts, 6..9, &[]), "[0..4 still] 4..6 still 6..9 9..10 still");
        let all: Vec<usize> = (0..10).collect();
        assert_eq!(told(4, &[], 9..10, &all), "0..4 still 4..8 still 8..9 still 9..10");
        assert_eq!(told(4, &parts, 0..0, &all), "0..4 still 4..8 still 8..10 still");
    }

    #[test]
    fn what_did_not_change_is_kept_and_what_did_is_cut_apart_from_it() {
        let parts = [part(0, 4), part(4, 4), part(8, 2)];
        let all: Vec<usize> = (0..10).collect();
        assert_eq!(told(0..10, 4, &[], &all), "0..4 4..8 8..10");
        assert_eq!(told(0..10, 4, &parts, &all), "0..4 4..8 8..10", "everything changed");
        assert_eq!(told(0..10, 4, &parts, &[]), "[0..4] [4..8] [8..10]");
        assert_eq!(told(0..10, 4, &parts, &[9]), "[0..4] [4..8] 8..9 9..10", "the last alone");
        assert_eq!(told(0..10, 4, &parts, &[5, 6]), "[0..4] 4..5 5..7 7..8 [8..10]");
        assert_eq!(told(0..10, 9, &parts, &[1, 8]), "0..1 1..2 2..4 [4..8] 8..9 9..10");
        // A writer of some blocks: parts that reach beyond them are not its to name.
        assert_eq!(told(2..9, 4, &parts, &[]), "2..4 [4..8] 8..9");
        assert_eq!(told(2..9, 4, &parts, &[2, 3, 8]), "2..4 [4..8] 8..9");
        assert_eq!(told(3..3, 4, &parts, &[]), "");
    }
}

//! Writing blocks of a state: hashed, cut into parts, and left out where an earlier checkpoint has them.
//!
//! ```text
//! blocks of the writer     | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |      changed: 8
//! parts of the one before  |       A       |       B       | C |
//! parts of this one        |   A, as is    |   B, as is    | D |      only D is written
//! ```

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
/// blocks of each. `stamp` keeps writers apart that write the same blocks.
///
/// A part of the newest checkpoint whose blocks are all the same still (what is frozen does not change) is named and not
/// written again. Every part that is written is read back.
pub fn write_blocks(
    store: &Store,
    step: u64,
    stamp: impl Into<Stamp>,
    part_bytes: u64,
    first_block: usize,
    buffers: &[Bytes; 3],
) -> Result<Vec<Written>> {
    let stamp = stamp.into();
    let digests = Digests::new(buffers);
    let blocks = first_block..first_block + digests.blocks();
    let of_part = (part_bytes as usize / (BLOCK_BYTES * BUFFERS.len())).max(1);
    let base = base(store, step);
    let pieces = match &base {
        Some((base, there)) => {
            let same = |block: usize| {
                let is = |buffer: usize| {
                    let theirs = base.blocks.of(buffer).get(block);
                    theirs.is_some_and(|theirs| theirs == digests.of(buffer, block - first_block))
                };
                (0..BUFFERS.len()).all(is)
            };
            let parts: Vec<&Part> = base.parts.iter().filter(|part| there.contains(part)).collect();
            // What did not change is hashed here, by all threads, and what did as it is written.
            let within = |part: &&&Part| part.range().start >= blocks.start && part.range().end <= blocks.end;
            each(usize::MAX, parts.iter().filter(within).collect(), |_, part| {
                part.range().all(same);
                Ok(())
            })?;
            cut(blocks.clone(), of_part, &parts, same)
        }
        None => cut(blocks.clone(), of_part, &[], |_| false),
    };
    each(usize::MAX, pieces, |_, piece| {
        let own = |range: Range<usize>| range.start - first_block..range.end - first_block;
        match piece {
            Piece::New(range) => write_part(store, step, stamp, first_block, &digests, own(range)),
            Piece::Kept(part) => {
                let of = part.step.or(base.as_ref().map(|(base, _)| base.step));
                let digests = digests.all(own(part.range()));
                Ok(Written { part: Part { step: of, ..part.clone() }, digests })
            }
        }
    })
}

/// BLAKE3 of each block of three buffers, hex, found when it is first asked for.
pub(super) struct Digests<'a> {
    buffers: &'a [Bytes; 3],
    known: [Vec<OnceLock<String>>; 3],
}

impl<'a> Digests<'a> {
    /// Panics when the buffers are not whole blocks, as many of each.
    pub fn new(buffers: &'a [Bytes; 3]) -> Self {
        let blocks = buffers[0].len() / BLOCK_BYTES;
        let whole = buffers.iter().all(|buffer| buffer.len() == blocks * BLOCK_BYTES);
        assert!(whole, "whole blocks, as many of each buffer");
        Self { buffers, known: [(); 3].map(|()| vec![OnceLock::new(); blocks]) }
    }

    /// Blocks of each buffer.
    pub fn blocks(&self) -> usize {
        self.known[0].len()
    }

    /// The bytes of a block.
    pub fn block(&self, buffer: usize, block: usize) -> Bytes {
        self.buffers[buffer].slice(block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES)
    }

    /// The digest of a block.
    pub fn of(&self, buffer: usize, block: usize) -> &str {
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
    /// They are written as a part.
    New(Range<usize>),
    /// They are a part that is there.
    Kept(&'a Part),
}

/// `blocks` in pieces, in order: the `parts` that lie within and whose blocks are all `same`, and between them new ones of at
/// most `of_part` blocks. Blocks that are the same before the first and after the last that changed get parts of their own,
/// so that the next checkpoint can keep these.
fn cut<'a>(
    blocks: Range<usize>,
    of_part: usize,
    parts: &[&'a Part],
    same: impl Fn(usize) -> bool,
) -> Vec<Piece<'a>> {
    let mut pieces = Vec::new();
    let fill = |pieces: &mut Vec<Piece<'a>>, gap: Range<usize>| {
        let first = gap.clone().find(|block| !same(*block));
        let runs = match (first, gap.clone().rev().find(|block| !same(*block))) {
            (Some(first), Some(last)) => [gap.start..first, first..last + 1, last + 1..gap.end],
            _ => [gap, 0..0, 0..0],
        };
        for run in runs {
            let starts = run.clone().step_by(of_part);
            pieces.extend(starts.map(|start| Piece::New(start..run.end.min(start + of_part))));
        }
    };
    let mut at = blocks.start;
    for part in parts {
        let range = part.range();
        if range.start >= at && range.end <= blocks.end && range.clone().all(&same) {
            fill(&mut pieces, at..range.start);
            pieces.push(Piece::Kept(part));
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
        Part { name, step: None, first_block: first, blocks, bytes: 0, blake3: String::new() }
    }

    fn told(blocks: Range<usize>, of_part: usize, parts: &[Part], changed: &[usize]) -> String {
        let parts: Vec<&Part> = parts.iter().collect();
        let pieces = cut(blocks, of_part, &parts, |block| !changed.contains(&block));
        let word = |piece: &Piece<'_>| match piece {
            Piece::New(range) => format!("{}..{}", range.start, range.end),
            Piece::Kept(part) => format!("[{}..{}]", part.range().start, part.range().end),
        };
        pieces.iter().map(word).collect::<Vec<_>>().join(" ")
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

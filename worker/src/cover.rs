//! Which blocks' moments a state has: all of them, or, where they are shared out over a ring, or a stage moves some alone, fewer.

use std::ops::Range;

use anello_proto::ring::{Shard, shares};

use crate::params::BLOCK;

/// Some of a state's blocks, whose moments lie one after the other in buffers of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cover {
    /// Ascending and apart.
    ranges: Vec<Range<usize>>,
    /// Blocks of the whole state.
    all: usize,
}

/// A run of blocks that are next to one another both in the state and in the buffers of its moments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// In the state.
    pub blocks: Range<usize>,
    /// Where the first lies in the moments' buffers, in blocks.
    pub at: usize,
}

/// The blocks of both.
pub(crate) fn both(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

impl Cover {
    /// All `blocks`.
    pub fn all(blocks: usize) -> Self {
        Self { ranges: std::iter::once(0..blocks).filter(|range| !range.is_empty()).collect(), all: blocks }
    }

    /// None of `blocks`.
    pub fn none(blocks: usize) -> Self {
        Self { ranges: Vec::new(), all: blocks }
    }

    /// What the member of `rank` has: its own blocks and those of the next member.
    pub fn of_rank(blocks: usize, members: usize, rank: usize) -> Self {
        let ranges = shares(blocks as u64, members, rank).into_iter();
        Self { ranges: ranges.map(|range| range.start as usize..range.end as usize).collect(), all: blocks }
    }

    /// These ranges of `all` blocks, in any order.
    pub fn of(ranges: impl IntoIterator<Item = Range<usize>>, all: usize) -> Self {
        let mut sorted: Vec<Range<usize>> = ranges.into_iter().filter(|range| !range.is_empty()).collect();
        sorted.sort_unstable_by_key(|range| range.start);
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for range in sorted {
            match ranges.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => ranges.push(range),
            }
        }
        assert!(ranges.last().is_none_or(|last| last.end <= all), "{ranges:?} of {all} blocks");
        Self { ranges, all }
    }

    /// The blocks, ascending and apart.
    pub fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// Blocks of the whole state.
    pub fn of_blocks(&self) -> usize {
        self.all
    }

    /// Whether no block is missing.
    pub fn is_all(&self) -> bool {
        self.len() == self.all
    }

    /// Number of blocks that are covered.
    pub fn len(&self) -> usize {
        self.ranges.iter().map(Range::len).sum()
    }

    /// Whether no block is covered.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Elements of a buffer of moments.
    pub fn elements(&self) -> usize {
        self.len() * BLOCK
    }

    /// The blocks of either.
    pub fn and(&self, other: &Self) -> Self {
        Self::of(self.ranges.iter().chain(&other.ranges).cloned(), self.all)
    }

    /// The blocks of this one that `other` lacks.
    pub fn without(&self, other: &Self) -> Self {
        let mut left = Vec::new();
        for range in &self.ranges {
            let mut from = range.start;
            for have in other.ranges.iter().filter(|have| have.start < range.end && have.end > range.start) {
                left.push(from..have.start.max(from));
                from = from.max(have.end);
            }
            left.push(from..range.end.max(from));
        }
        Self::of(left, self.all)
    }

    /// The blocks of this one that lie in `blocks`.
    pub fn within(&self, blocks: &Range<usize>) -> Self {
        let ranges = self.pieces(blocks.clone()).into_iter().map(|piece| piece.blocks);
        Self { ranges: ranges.collect(), all: self.all }
    }

    /// What of `blocks` is covered, and where it lies.
    pub fn pieces(&self, blocks: Range<usize>) -> Vec<Piece> {
        let (mut at, mut pieces) = (0, Vec::new());
        for range in &self.ranges {
            let both = both(range, &blocks);
            if !both.is_empty() {
                pieces.push(Piece { at: at + both.start - range.start, blocks: both });
            }
            at += range.len();
        }
        pieces
    }

    /// Where the moments of `blocks` lie in their buffers, in blocks; absent when some are missing.
    pub fn place(&self, blocks: Range<usize>) -> Option<Range<usize>> {
        if blocks.is_empty() {
            return Some(0..0);
        }
        let pieces = self.pieces(blocks.clone());
        let [Piece { blocks: found, at }] = &pieces[..] else { return None };
        (*found == blocks).then_some(*at..at + blocks.len())
    }

    /// How the ring speaks of it; `next` as [`Shard::next`].
    pub fn shard(&self, next: bool) -> Option<Shard> {
        let range = |range: &Range<usize>| range.start as u64..range.end as u64;
        let shard =
            || Shard { blocks: self.ranges.iter().map(range).collect(), all_blocks: self.all as u64, next };
        (next || !self.is_all()).then(shard)
    }
}

#[cfg(test)]
mod tests {
    use anello_collective::{Rank, Ring, Shape};
    use proptest::prelude::*;

    use super::*;

    fn cover() -> impl Strategy<Value = Cover> {
        prop::collection::vec((0usize..20, 0usize..20), 0..4)
            .prop_map(|ranges| Cover::of(ranges.into_iter().map(|(a, b)| a.min(b)..a.max(b)), 20))
    }

    fn blocks(cover: &Cover) -> Vec<usize> {
        cover.ranges().iter().cloned().flatten().collect()
    }

    proptest! {
        /// Whoever goes, every block is with two members, and with none but its owner and the one before: by the collective's
        /// own shares.
        #[test]
        fn a_block_is_with_its_owner_and_the_member_before(all in 1u32..40, members in 1usize..9) {
            let shape = Shape::balanced(16, members, all, 4);
            let ring = Ring::new(Rank(0), shape).unwrap();
            for rank in 0..members {
                let next = (rank + 1) % members;
                let mut both: Vec<usize> = ring.blocks(Rank(rank as u32)).collect();
                both.extend(ring.blocks(Rank(next as u32)));
                both.sort_unstable();
                both.dedup();
                prop_assert_eq!(blocks(&Cover::of_rank(all as usize, members, rank)), both);
            }
        }

        #[test]
        fn what_is_missing_and_what_is_there_are_all(a in cover(), b in cover()) {
            let lacks = a.without(&b);
            prop_assert!(blocks(&lacks).iter().all(|block| !blocks(&b).contains(block)));
            prop_assert_eq!(lacks.and(&b), a.and(&b));
            for range in b.ranges() {
                let both: Vec<usize> = blocks(&a).into_iter().filter(|block| range.contains(block)).collect();
                prop_assert_eq!(blocks(&a.within(range)), both);
            }
        }

        #[test]
        fn blocks_lie_one_after_the_other(cover in cover(), start in 0usize..20, end in 0usize..20) {
            let all = blocks(&cover);
            for Piece { blocks, at } in cover.pieces(start..end) {
                for (block, at) in blocks.zip(at..) {
                    prop_assert_eq!(all[at], block);
                }
            }
            if start < end {
                let there = (start..end).all(|block| all.contains(&block));
                prop_assert_eq!(cover.place(start..end).is_some(), there);
            }
        }
    }
}

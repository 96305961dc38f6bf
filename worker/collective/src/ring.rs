//! Who serves which lanes and owns which blocks in a generation: pure arithmetic.

use std::ops::Range;

use crate::tree::{LANES_MAX, Subtree, TreeSum, balanced, subtrees};
use crate::{Error, Partials, Rank, Result};

/// Members of a ring at most: each holds two connections to each other one.
pub const MEMBERS_MAX: usize = 1 << 12;

/// Elements of a block at most: 16 MiB, the largest payload of a frame.
pub const BLOCK_LEN_MAX: usize = 1 << 22;

/// What all members of a generation must agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The range of lanes that each rank serves. Together they tile `0..lanes`, lanes a power of two up to
    /// [`LANES_MAX`]; a range may be empty, and ranks need not be in the order of lanes.
    pub ranges: Vec<Range<u32>>,
    /// Blocks of the flat buffer; 0 is allowed.
    pub blocks: u32,
    /// Elements (fp32) of a block, 1..=[`BLOCK_LEN_MAX`].
    pub block_len: usize,
    /// The blocks that are summed and gathered, in the order in which they become final in a step, in which they are sent;
    /// empty: all, in ascending order.
    pub order: Vec<u32>,
    /// Members that own blocks: those of the first ranks, up to as many as there are; 0: all.
    pub owners: u32,
}

impl Shape {
    /// `lanes` dealt evenly to `members`, in order.
    ///
    /// # Panics
    /// When `members` is 0.
    pub fn balanced(lanes: u32, members: usize, blocks: u32, block_len: usize) -> Self {
        let range = |rank| {
            let range = balanced(lanes as usize, members, rank);
            range.start as u32..range.end as u32
        };
        Self { ranges: (0..members).map(range).collect(), blocks, block_len, order: Vec::new(), owners: 0 }
    }

    /// The blocks that the member of `rank` owns: none, or its share among those that own some.
    fn owned(&self, rank: usize) -> Range<usize> {
        let owners = if self.owners == 0 { self.ranges.len() } else { self.owners as usize };
        let blocks = self.blocks as usize;
        if rank < owners { balanced(blocks, owners, rank) } else { blocks..blocks }
    }
}

/// A leaf of the tree: part `part` of rank `rank`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Leaf {
    rank: Rank,
    part: usize,
}

/// A generation's ring as one of its members sees it.
#[derive(Clone, Debug)]
pub struct Ring {
    rank: Rank,
    shape: Shape,
    parts: Vec<Vec<Subtree>>,
    /// By owner: its blocks in the order in which they are sent.
    turns: Vec<Vec<usize>>,
    leaves: Vec<Leaf>,
    sum: TreeSum,
}

impl Ring {
    /// The ring of `shape` as `rank` sees it.
    ///
    /// # Errors
    /// [`Error::Shape`] when the ranges do not tile a power of two of lanes, the order is none of blocks, there are more owners
    /// than members, or a size is out of range.
    pub fn new(rank: Rank, shape: Shape) -> Result<Self> {
        let members = shape.ranges.len();
        if members > MEMBERS_MAX || rank.index() >= members {
            return Err(Error::shape(format!(
                "{rank} of {members} members; there are 1..={MEMBERS_MAX} members"
            )));
        }
        if !(1..=BLOCK_LEN_MAX).contains(&shape.block_len) {
            return Err(Error::shape(format!(
                "blocks of {} elements; allowed are 1..={BLOCK_LEN_MAX}",
                shape.block_len
            )));
        }
        if shape.owners as usize > members {
            return Err(Error::shape(format!(
                "{} owners of blocks; there are {members} members",
                shape.owners
            )));
        }
        let lanes = shape.ranges.iter().map(|range| range.end).max().unwrap_or(0);
        if !lanes.is_power_of_two() || lanes > LANES_MAX {
            return Err(Error::shape(format!(
                "{lanes} lanes; their number is a power of two up to {LANES_MAX}"
            )));
        }
        let mut in_order: Vec<&Range<u32>> = shape.ranges.iter().filter(|range| !range.is_empty()).collect();
        in_order.sort_unstable_by_key(|range| range.start);
        let mut next = 0;
        for range in in_order {
            if range.start != next {
                return Err(Error::shape(format!(
                    "a range of lanes starts at {} where {next} is next; ranges tile all lanes once",
                    range.start
                )));
            }
            next = range.end;
        }
        let turns = turns(&shape)?;
        let parts: Vec<Vec<Subtree>> = shape.ranges.iter().cloned().map(subtrees).collect();
        let mut leaves: Vec<(Subtree, Leaf)> = (0..)
            .map(Rank)
            .zip(&parts)
            .flat_map(|(rank, parts)| {
                parts.iter().enumerate().map(move |(part, node)| (*node, Leaf { rank, part }))
            })
            .collect();
        leaves.sort_unstable_by_key(|(node, _)| node.first);
        let sum = TreeSum::new(&leaves.iter().map(|(node, _)| *node).collect::<Vec<_>>());
        Ok(Self {
            rank,
            shape,
            parts,
            turns,
            leaves: leaves.into_iter().map(|(_, leaf)| leaf).collect(),
            sum,
        })
    }

    /// Our rank.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Number of members.
    pub fn members(&self) -> usize {
        self.shape.ranges.len()
    }

    /// What all members agree on.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The parts of `rank`: the maximal aligned subtrees of its lanes, in order. One partial sum for each.
    pub fn parts(&self, rank: Rank) -> &[Subtree] {
        &self.parts[rank.index()]
    }

    /// The blocks that `rank` owns: balanced over all ranks that own some, whatever lanes they serve.
    pub fn blocks(&self, rank: Rank) -> Range<usize> {
        self.shape.owned(rank.index())
    }

    /// The blocks that `rank` owns, in the order in which they are sent to it.
    pub(crate) fn turns(&self, rank: Rank) -> &[usize] {
        &self.turns[rank.index()]
    }

    /// Number of blocks that are summed.
    pub fn summed(&self) -> usize {
        self.turns.iter().map(Vec::len).sum()
    }

    /// Where an own block lies in the output of a reduction.
    pub(crate) fn in_own(&self, block: usize) -> Range<usize> {
        let elements = self.block(block);
        let first = self.elements(self.rank).start;
        elements.start - first..elements.end - first
    }

    /// The elements of the blocks that `rank` owns.
    pub fn elements(&self, rank: Rank) -> Range<usize> {
        let blocks = self.blocks(rank);
        blocks.start * self.shape.block_len..blocks.end * self.shape.block_len
    }

    /// The elements of one block.
    pub fn block(&self, block: usize) -> Range<usize> {
        block * self.shape.block_len..(block + 1) * self.shape.block_len
    }

    /// Elements of the flat buffer.
    pub fn len(&self) -> usize {
        self.shape.blocks as usize * self.shape.block_len
    }

    /// True when there are no blocks.
    pub fn is_empty(&self) -> bool {
        self.shape.blocks == 0
    }

    /// What [`Collective`](crate::Collective) makes of partial sums, over whatever can be added: for blocks that lie where no slice does.
    /// `part(rank, part)` is the partial sum of a part.
    pub fn fold<T>(&self, part: impl Fn(Rank, usize) -> T, add: impl Fn(T, T) -> T) -> T {
        self.sum.fold(|leaf| part(self.leaves[leaf].rank, self.leaves[leaf].part), add)
    }

    /// Adds a block along the tree into `out`; `part(rank, part)` is the partial sum of a part.
    pub(crate) fn add<'a>(
        &self,
        part: impl Fn(Rank, usize) -> &'a [f32],
        out: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let leaves: Vec<&[f32]> = self.leaves.iter().map(|leaf| part(leaf.rank, leaf.part)).collect();
        self.sum.sum(&leaves, out, scratch);
    }

    pub(crate) fn check_reduce(&self, partials: &dyn Partials, out: &[f32]) -> Result<()> {
        let (parts, lens) = (self.parts(self.rank).len(), partials.lens());
        if lens.len() != parts {
            return Err(Error::shape(format!(
                "{} partial sums; {} has {parts} parts",
                lens.len(),
                self.rank
            )));
        }
        if let Some(len) = lens.iter().find(|len| **len != self.len()) {
            return Err(Error::shape(format!(
                "a partial sum of {len} elements; the buffer has {}",
                self.len()
            )));
        }
        let own = self.elements(self.rank).len();
        if out.len() != own {
            return Err(Error::shape(format!(
                "an output of {} elements; {} owns {own}",
                out.len(),
                self.rank
            )));
        }
        Ok(())
    }

    pub(crate) fn check_gather(&self, buffer: &[f32]) -> Result<()> {
        if buffer.len() != self.len() {
            return Err(Error::shape(format!(
                "a buffer of {} elements; the ring's has {}",
                buffer.len(),
                self.len()
            )));
        }
        Ok(())
    }
}

/// By owner: its blocks in the order of `shape`.
fn turns(shape: &Shape) -> Result<Vec<Vec<usize>>> {
    let (blocks, members) = (shape.blocks as usize, shape.ranges.len());
    let owned = |rank| shape.owned(rank);
    if shape.order.is_empty() {
        return Ok((0..members).map(|rank| owned(rank).collect()).collect());
    }
    let mut seen = vec![false; blocks];
    for &block in &shape.order {
        match seen.get_mut(block as usize) {
            Some(seen) if !*seen => *seen = true,
            _ => {
                return Err(Error::shape(format!(
                    "block {block} is twice in the order of {blocks} blocks, or none of them"
                )));
            }
        }
    }
    let mut turns = vec![Vec::new(); members];
    let owners: Vec<usize> = (0..members).flat_map(|rank| owned(rank).map(move |_| rank)).collect();
    shape.order.iter().for_each(|&block| turns[owners[block as usize]].push(block as usize));
    Ok(turns)
}

/// The blocks whose partial sums the caller says will not change any more.
#[derive(Debug)]
pub(crate) struct Ready(Vec<bool>);

impl Ready {
    pub fn none(ring: &Ring) -> Self {
        Self(vec![false; ring.shape().blocks as usize])
    }

    pub fn add(&mut self, blocks: Range<usize>) -> Result<()> {
        let known = self.0.len();
        match self.0.get_mut(blocks.clone()) {
            Some(flags) => flags.fill(true),
            None => return Err(Error::shape(format!("blocks {blocks:?} are ready; there are {known}"))),
        }
        Ok(())
    }

    pub fn add_all(&mut self) {
        self.0.fill(true);
    }

    pub fn contains(&self, block: usize) -> bool {
        self.0[block]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(ranges: &[Range<u32>]) -> Result<Ring> {
        Ring::new(
            Rank(0),
            Shape { ranges: ranges.to_vec(), blocks: 5, block_len: 4, order: Vec::new(), owners: 0 },
        )
    }

    fn fact(ranges: &[Range<u32>]) -> String {
        ring(ranges).unwrap_err().to_string()
    }

    #[test]
    fn every_block_has_one_owner() {
        let ring = ring(&[0..1, 1..4, 4..4]).unwrap();
        let owned: Vec<_> = (0..3).map(|rank| ring.blocks(Rank(rank))).collect();
        assert_eq!(owned, [0..1, 1..3, 3..5]);
        assert_eq!(ring.elements(Rank(1)), 4..12);
        assert_eq!((ring.parts(Rank(1)).len(), ring.parts(Rank(2)).len()), (2, 0));
    }

    #[test]
    fn a_member_that_owns_nothing_is_one_of_the_last() {
        let ring = |owners| {
            let shape = Shape { owners, ..Shape::balanced(2, 3, 5, 4) };
            Ring::new(Rank(2), shape).map_err(|error| error.to_string())
        };
        let owned =
            |ring: &Ring| (0..3).map(|rank| ring.turns(Rank(rank)).to_vec()).collect::<Vec<Vec<usize>>>();
        let two = ring(2).unwrap();
        assert_eq!(owned(&two), [vec![0, 1], vec![2, 3, 4], vec![]]);
        assert_eq!((two.elements(Rank(2)), two.summed()), (20..20, 5));
        assert_eq!(owned(&ring(3).unwrap()), owned(&ring(0).unwrap()));
        assert_eq!(ring(4).unwrap_err(), "4 owners of blocks; there are 3 members");
    }

    #[test]
    fn blocks_go_to_their_owners_in_the_order_given() {
        let ring = |order: &[u32]| {
            let shape = Shape { order: order.to_vec(), ..Shape::balanced(2, 2, 5, 4) };
            Ring::new(Rank(1), shape).map_err(|error| error.to_string())
        };
        let given = ring(&[4, 1, 3, 0, 2]).unwrap();
        assert_eq!((given.turns(Rank(0)), given.turns(Rank(1))), (&[1, 0][..], &[4, 3, 2][..]));
        assert_eq!(given.in_own(3), 4..8);
        assert_eq!(ring(&[]).unwrap().turns(Rank(1)), [2, 3, 4]);
        let some = ring(&[3, 0, 2]).unwrap();
        assert_eq!((some.turns(Rank(0)), some.turns(Rank(1)), some.summed()), (&[0][..], &[3, 2][..], 3));
        for wrong in [&[0, 1, 2, 3, 3], &[0, 1, 2, 3, 5]] {
            let fact = format!("block {} is twice in the order of 5 blocks, or none of them", wrong[4]);
            assert_eq!(ring(wrong).unwrap_err(), fact);
        }
    }

    #[test]
    fn ranks_need_not_follow_the_lanes() {
        let ring = ring(&[2..4, 0..2]).unwrap();
        let (a, b) = ([1f32; 4], [2f32; 4]);
        let mut out = [0f32; 4];
        ring.add(|rank, _| if rank == Rank(0) { &a } else { &b }, &mut out, &mut Vec::new());
        assert_eq!(out, [3.0; 4]);
        assert_eq!(ring.leaves[0], Leaf { rank: Rank(1), part: 0 });
    }

    #[test]
    fn ranges_that_do_not_tile_are_refused() {
        assert_eq!(
            fact(&[0..2, 3..4]),
            "a range of lanes starts at 3 where 2 is next; ranges tile all lanes once"
        );
        assert_eq!(
            fact(&[0..3, 2..4]),
            "a range of lanes starts at 2 where 3 is next; ranges tile all lanes once"
        );
        assert_eq!(fact(&[0..1, 1..3]), "3 lanes; their number is a power of two up to 65536");
        assert_eq!(fact(&[0..0, 0..0]), "0 lanes; their number is a power of two up to 65536");
        assert_eq!(fact(&[]), "rank 0 of 0 members; there are 1..=4096 members");
    }
}

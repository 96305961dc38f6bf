//! The fixed binary tree over lanes, as the owner of a block follows it.
//!
//! ```text
//! lanes      0   1   2   3   4   5   6   7        leaves of the ranges 0..3, 3..8
//!            └─┬─┘   └─┬─┘   └─┬─┘   └─┬─┘        rank 0: 0..2, 2..3      rank 1: 3..4, 4..8
//!              └───┬───┘       └───┬───┘
//!                  └───────┬───────┘              ((p0 + (p1 + p2)) + p3)
//! ```
//! A worker folds its lanes into the sums of its maximal aligned subtrees (its *parts*), each inside along the same
//! tree. The owner adds the parts of all workers up to the root: at each node left + right, in fp32. Which node is
//! whose leaf depends on the ranges; which two numbers are added never does. So the sum has the same bits for any
//! ranges (the payload of a NaN apart, which IEEE 754 leaves open and nobody looks at).

use std::ops::Range;

/// Lanes of a run at most.
pub const LANES_MAX: u32 = 1 << 16;

/// Elements that one pass of [`TreeSum::sum`] carries up the tree: 8 KiB, so that the levels stay in the L1 cache.
const CHUNK: usize = 2048;

/// A node of the tree over lanes: `lanes` is a power of two and `first` a multiple of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subtree {
    /// First lane.
    pub first: u32,
    /// Number of lanes.
    pub lanes: u32,
}

impl Subtree {
    /// Its lanes.
    pub fn range(self) -> Range<u32> {
        self.first..self.first + self.lanes
    }
}

/// The maximal aligned subtrees of a range of lanes, from left to right: what a worker that serves the range folds its
/// lanes into. At most 2 log2(lanes) of them; none for an empty range.
pub fn subtrees(range: Range<u32>) -> Vec<Subtree> {
    let (mut found, mut first) = (Vec::new(), range.start);
    while first < range.end {
        let room = 1 << (range.end - first).ilog2();
        let lanes = if first == 0 { room } else { room.min(1 << first.trailing_zeros()) };
        found.push(Subtree { first, lanes });
        first += lanes;
    }
    found
}

/// The share of `rank` when `total` things are dealt to `members` in order: contiguous, sizes differ by at most one,
/// empty for some when there are more members than things.
///
/// # Panics
/// When `rank` is not below `members`.
pub fn balanced(total: usize, members: usize, rank: usize) -> Range<usize> {
    assert!(rank < members, "rank {rank} of {members} members");
    let cut = |rank: usize| (total as u128 * rank as u128 / members as u128) as usize;
    cut(rank)..cut(rank + 1)
}

/// One addition of the plan. Slot 0 is the output; slots above are scratch.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Add {
    /// slot = leaf: the tree of one leaf.
    Copy { slot: usize, leaf: usize },
    /// slot = left leaf + right leaf
    Leaves { slot: usize, left: usize, right: usize },
    /// slot = slot + leaf, or leaf + slot: the same bits, since fp32 addition commutes.
    Leaf { slot: usize, leaf: usize },
    /// slot = slot + the slot above
    Slots { slot: usize },
}

/// Where the value of a node is.
enum Place {
    Leaf(usize),
    Slot,
}

/// The additions from the leaves of a partition up to the root.
#[derive(Clone, Debug, PartialEq)]
pub struct TreeSum {
    leaves: usize,
    slots: usize,
    adds: Vec<Add>,
}

impl TreeSum {
    /// The plan for `leaves`, which tile the lanes from 0 on, in order.
    ///
    /// # Panics
    /// When they do not tile a power of two of lanes.
    pub fn new(leaves: &[Subtree]) -> Self {
        let lanes = leaves.last().map_or(0, |leaf| leaf.range().end);
        assert!(lanes.is_power_of_two(), "{lanes} lanes are no power of two");
        let mut next = 0;
        for leaf in leaves {
            assert_eq!(leaf.first, next, "the leaves tile the lanes in order");
            next = leaf.range().end;
        }
        let mut plan = Self { leaves: leaves.len(), slots: 0, adds: Vec::new() };
        let mut rest = 0;
        if let Place::Leaf(leaf) = plan.node(leaves, &mut rest, Subtree { first: 0, lanes }, 0) {
            plan.adds.push(Add::Copy { slot: 0, leaf });
        }
        plan
    }

    /// Plans the sum of `node` into `slot`; `rest` counts the leaves taken.
    fn node(&mut self, leaves: &[Subtree], rest: &mut usize, node: Subtree, slot: usize) -> Place {
        if leaves[*rest] == node {
            *rest += 1;
            return Place::Leaf(*rest - 1);
        }
        assert!(node.lanes > 1, "{node:?} is no leaf and holds none");
        let half = node.lanes / 2;
        let left = self.node(leaves, rest, Subtree { first: node.first, lanes: half }, slot);
        let above = slot + usize::from(matches!(left, Place::Slot));
        let right = self.node(leaves, rest, Subtree { first: node.first + half, lanes: half }, above);
        self.slots = self.slots.max(above);
        self.adds.push(match (left, right) {
            (Place::Leaf(left), Place::Leaf(right)) => Add::Leaves { slot, left, right },
            (Place::Slot, Place::Leaf(leaf)) | (Place::Leaf(leaf), Place::Slot) => Add::Leaf { slot, leaf },
            (Place::Slot, Place::Slot) => Add::Slots { slot },
        });
        Place::Slot
    }

    /// Number of leaves.
    pub fn leaves(&self) -> usize {
        self.leaves
    }

    /// The same additions over whatever can be added: `leaf(i)` is a leaf, `add(left, right)` a node. The two may be the other
    /// way round.
    pub fn fold<T>(&self, leaf: impl Fn(usize) -> T, add: impl Fn(T, T) -> T) -> T {
        let mut slots: Vec<Option<T>> = (0..=self.slots).map(|_| None).collect();
        for step in &self.adds {
            let (slot, sum) = match *step {
                Add::Copy { slot, leaf: only } => (slot, leaf(only)),
                Add::Leaves { slot, left, right } => (slot, add(leaf(left), leaf(right))),
                Add::Leaf { slot, leaf: right } => {
                    let left = slots[slot].take().expect("the plan fills a slot before it adds to it");
                    (slot, add(left, leaf(right)))
                }
                Add::Slots { slot } => {
                    let (left, right) = (slots[slot].take(), slots[slot + 1].take());
                    let (left, right) =
                        left.zip(right).expect("the plan fills both slots before it adds them");
                    (slot, add(left, right))
                }
            };
            slots[slot] = Some(sum);
        }
        slots[0].take().expect("the last addition of a plan is that of the root")
    }

    /// Adds `leaves` up the tree into `out`; all have the same length. `scratch` holds the levels between (8 KiB a
    /// level, at most log2(lanes) of them) and is kept by the caller from sum to sum.
    pub fn sum(&self, leaves: &[&[f32]], out: &mut [f32], scratch: &mut Vec<f32>) {
        assert_eq!(leaves.len(), self.leaves);
        scratch.resize(self.slots * CHUNK, 0.0);
        for (at, out) in out.chunks_mut(CHUNK).enumerate() {
            let len = out.len();
            let leaf = |leaf: usize| &leaves[leaf][at * CHUNK..at * CHUNK + len];
            for add in &self.adds {
                let (Add::Copy { slot, .. }
                | Add::Leaves { slot, .. }
                | Add::Leaf { slot, .. }
                | Add::Slots { slot }) = *add;
                let (below, above) = scratch.split_at_mut(slot * CHUNK);
                let target = if slot == 0 { &mut *out } else { &mut below[(slot - 1) * CHUNK..][..len] };
                match *add {
                    Add::Leaves { left, right, .. } => {
                        for ((sum, left), right) in target.iter_mut().zip(leaf(left)).zip(leaf(right)) {
                            *sum = left + right;
                        }
                    }
                    Add::Leaf { leaf: right, .. } => {
                        for (sum, right) in target.iter_mut().zip(leaf(right)) {
                            *sum += right;
                        }
                    }
                    Add::Slots { .. } => {
                        for (sum, right) in target.iter_mut().zip(&above[..len]) {
                            *sum += right;
                        }
                    }
                    Add::Copy { leaf: only, .. } => target.copy_from_slice(leaf(only)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sub(first: u32, lanes: u32) -> Subtree {
        Subtree { first, lanes }
    }

    #[test]
    fn a_range_is_cut_into_its_maximal_aligned_subtrees() {
        assert_eq!(subtrees(0..8), [sub(0, 8)]);
        assert_eq!(subtrees(1..7), [sub(1, 1), sub(2, 2), sub(4, 2), sub(6, 1)]);
        assert_eq!(subtrees(3..8), [sub(3, 1), sub(4, 4)]);
        assert_eq!(subtrees(5..5), []);
    }

    #[test]
    fn shares_are_contiguous_and_balanced() {
        let shares: Vec<_> = (0..4).map(|rank| balanced(2, 4, rank)).collect();
        assert_eq!(shares, [0..0, 0..1, 1..1, 1..2]);
        assert_eq!((0..3).map(|rank| balanced(7, 3, rank)).collect::<Vec<_>>(), [0..2, 2..4, 4..7]);
        assert_eq!(balanced(usize::MAX, 3, 2).end, usize::MAX);
    }

    #[test]
    fn the_plan_of_two_workers_is_one_addition() {
        assert_eq!(TreeSum::new(&[sub(0, 4), sub(4, 4)]).adds, [Add::Leaves { slot: 0, left: 0, right: 1 }]);
        assert_eq!(TreeSum::new(&[sub(0, 8)]).adds, [Add::Copy { slot: 0, leaf: 0 }]);
    }

    #[test]
    fn a_leaf_between_two_workers_is_added_where_the_tree_says() {
        let plan = TreeSum::new(&[sub(0, 2), sub(2, 1), sub(3, 1), sub(4, 4)]);
        assert_eq!(
            plan.adds,
            [
                Add::Leaves { slot: 0, left: 1, right: 2 },
                Add::Leaf { slot: 0, leaf: 0 },
                Add::Leaf { slot: 0, leaf: 3 },
            ]
        );
    }

    /// The tree written plainly: the definition that everything is compared with.
    fn plain(values: &[Vec<f32>]) -> Vec<f32> {
        match values {
            [one] => one.clone(),
            _ => {
                let (left, right) = values.split_at(values.len() / 2);
                plain(left).iter().zip(plain(right)).map(|(left, right)| left + right).collect()
            }
        }
    }

    /// Values whose sum depends on the order of addition.
    fn lane(lane: u32, len: usize) -> Vec<f32> {
        (0..len as u32)
            .map(|at| {
                let bits =
                    (lane.wrapping_mul(0x9E37_79B9) ^ at.wrapping_mul(0x85EB_CA6B)).wrapping_mul(0xC2B2_AE35);
                let magnitude = [1e-6f32, 1.0, 3e4, 1e8][(bits >> 30) as usize];
                ((bits & 0xFFFF) as f32 / 32768.0 - 1.0) * magnitude
            })
            .collect()
    }

    #[test]
    fn the_test_values_tell_orders_apart() {
        let values: Vec<_> = (0..8).map(|l| lane(l, 64)).collect();
        let mut in_a_row = vec![0f32; 64];
        for value in &values {
            in_a_row.iter_mut().zip(value).for_each(|(sum, v)| *sum += v);
        }
        let differing =
            plain(&values).iter().zip(&in_a_row).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        assert!(differing > 16, "{differing} of 64 differ");
    }

    proptest! {
        /// Whatever the ranges of the workers, the sum has the bits of one worker.
        #[test]
        fn any_partition_gives_the_bits_of_one_worker(
            log in 0u32..7, cuts in prop::collection::vec(0u32..128, 0..9), len in prop::sample::select(vec![1, 7, CHUNK, CHUNK + 3])
        ) {
            let lanes = 1 << log;
            let values: Vec<_> = (0..lanes).map(|l| lane(l, len)).collect();
            let mut bounds: Vec<u32> = cuts.into_iter().map(|c| c % (lanes + 1)).chain([0, lanes]).collect();
            bounds.sort_unstable();
            let leaves: Vec<Subtree> = bounds.windows(2).flat_map(|w| subtrees(w[0]..w[1])).collect();
            for leaf in &leaves {
                prop_assert!(leaf.lanes.is_power_of_two() && leaf.first % leaf.lanes == 0);
            }
            let sums: Vec<Vec<f32>> =
                leaves.iter().map(|l| plain(&values[l.first as usize..l.range().end as usize])).collect();
            let parts: Vec<&[f32]> = sums.iter().map(Vec::as_slice).collect();
            let (mut out, mut scratch) = (vec![f32::NAN; len], Vec::new());
            TreeSum::new(&leaves).sum(&parts, &mut out, &mut scratch);
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&out), bits(&plain(&values)));
            let added = TreeSum::new(&leaves).fold(
                |leaf| sums[leaf].clone(),
                |left, right| left.iter().zip(right).map(|(left, right)| left + right).collect(),
            );
            prop_assert_eq!(bits(&added), bits(&out));
        }

        #[test]
        fn shares_tile_the_whole(total in 0usize..100, members in 1usize..20) {
            let mut next = 0;
            for rank in 0..members {
                let share = balanced(total, members, rank);
                prop_assert_eq!(share.start, next);
                prop_assert!(share.len() == total / members || share.len() == total.div_ceil(members));
                next = share.end;
            }
            prop_assert_eq!(next, total);
        }
    }
}

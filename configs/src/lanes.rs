//! Lanes as workers have them: contiguous ranges, and the subtrees of the fixed binary tree over lanes that lie in one.

use std::ops::Range;

/// Lanes times sources at most: every step tells of each lane's place in each source, and one worker may have all lanes. 28 bytes a
/// place at most, 9.2 MiB with what a lane takes besides.
pub const LANE_PLACES_MAX: u64 = 1 << 18;

/// `lanes` lanes for `members` members, in order, sizes at most one apart.
pub fn balanced(lanes: u32, members: u32) -> Vec<Range<u32>> {
    let bound = |rank: u32| (u64::from(lanes) * u64::from(rank) / u64::from(members.max(1))) as u32;
    (0..members).map(|rank| bound(rank)..bound(rank + 1)).collect()
}

/// The maximal aligned subtrees of a range, from left to right: the lanes of each. A worker has one sum of gradients for each, which
/// cannot be taken apart.
pub fn subtrees(lanes: Range<u32>) -> impl Iterator<Item = Range<u32>> {
    let mut first = lanes.start;
    std::iter::from_fn(move || {
        let room = 1 << (lanes.end.checked_sub(first)?.checked_ilog2()?);
        let size = if first == 0 { room } else { room.min(1 << first.trailing_zeros()) };
        let subtree = first..first + size;
        first = subtree.end;
        Some(subtree)
    })
}

/// Gradients that a worker of these lanes holds at most at a time: that of the lane at work, and the sums of those before it, one for
/// each of their [`subtrees`]. 1 + log2(n) where the n lanes are one subtree, and up to about twice as many where they begin anywhere.
pub fn gradients_held(lanes: Range<u32>) -> u32 {
    let held = |lane: u32| subtrees(lanes.start..lane).count() as u32 + 1;
    lanes.clone().map(held).max().unwrap_or(0)
}

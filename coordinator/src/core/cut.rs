//! How the lanes are cut into contiguous ranges, one a member, in rank order.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use anello_configs::lanes::{balanced, subtrees};

/// A new cut is worth a re-formation when it takes so many thousandths off the predicted time. Noise of 4 % either way in the
/// measured times is at most 1 − 0.96/1.04 = 7.7 % of it: a ring is not re-formed for that.
const WORTH_PERMILLE: u128 = 100;

/// Members times members that have a lane more than others, up to which [`keeping`] looks for the best cut: 10 ms of it.
const LOOK: u64 = 1 << 17;

/// [`balanced`], for members that had these ranges of the ring before. Of the cuts with such sizes, that by which as little as can
/// be of a step that came to nothing has to be computed again: whoever has most to compute has least, and then all together.
pub(super) fn keeping(lanes: u32, before: &[Option<Range<u32>>]) -> Vec<Range<u32>> {
    let members = before.len() as u32;
    let (least, larger) = (lanes / members.max(1), lanes % members.max(1));
    if u64::from(members) * u64::from(larger) > LOOK || before.iter().all(Option::is_none) {
        return balanced(lanes, members);
    }
    let range = |rank: usize, larger_before: usize, is_larger: bool| {
        let start = rank as u32 * least + larger_before as u32;
        start..start + least + u32::from(is_larger)
    };
    // By how many of the members up to here have a lane more: (most lanes of one, lanes of all) to compute again; absent where
    // there is no such cut.
    let mut costs = vec![None; larger as usize + 1];
    costs[0] = Some((0u32, 0u32));
    let mut choices = Vec::with_capacity(before.len());
    for (rank, had) in before.iter().enumerate() {
        let cost = |costs: &[Option<(u32, u32)>], larger_before: usize, is_larger: bool| {
            let (most, all) = costs[larger_before]?;
            let range = range(rank, larger_before, is_larger);
            let again = range.len() as u32 - had.as_ref().map_or(0, |had| kept(had, &range));
            Some((most.max(again), all + again))
        };
        let mut is_larger = vec![false; costs.len()];
        // From the last on, since each follows from its own and the one before.
        for larger in (0..costs.len()).rev() {
            let as_small = cost(&costs, larger, false);
            let as_large = larger.checked_sub(1).and_then(|before| cost(&costs, before, true));
            is_larger[larger] = as_large.is_some_and(|large| as_small.is_none_or(|small| large <= small));
            costs[larger] = if is_larger[larger] { as_large } else { as_small };
        }
        choices.push(is_larger);
    }
    let mut larger = larger as usize;
    let mut cut: Vec<Range<u32>> = Vec::with_capacity(before.len());
    for (rank, is_larger) in choices.iter().enumerate().rev() {
        let is_larger = is_larger[larger];
        larger -= usize::from(is_larger);
        cut.push(range(rank, larger, is_larger));
    }
    cut.reverse();
    cut
}

/// Lanes of `range` whose sums a worker that has computed `had` need not compute again: it has one for each maximal aligned
/// subtree, which cannot be taken apart.
fn kept(had: &Range<u32>, range: &Range<u32>) -> u32 {
    let within = |subtree: &Range<u32>| range.start <= subtree.start && subtree.end <= range.end;
    subtrees(had.clone()).filter(within).map(|subtree| subtree.len() as u32).sum()
}

/// `lanes` lanes for members that take these times for one: the slowest member's time is the least that there is. Each has one
/// lane at least, as long as there are enough.
pub(super) fn by_speed(lanes: u32, lane_ns: &[u64]) -> Vec<Range<u32>> {
    let members = lane_ns.len() as u32;
    if members == 0 || members >= lanes {
        return balanced(lanes, members);
    }
    let mut counts = vec![1u32; lane_ns.len()];
    // The next lane goes to whoever would then be done first; of those, to the lowest rank.
    let after = |rank: usize, count: u32| Reverse((u128::from(lane_ns[rank]) * u128::from(count + 1), rank));
    let mut next: BinaryHeap<_> = (0..lane_ns.len()).map(|rank| after(rank, 1)).collect();
    for _ in members..lanes {
        let Reverse((_, rank)) = next.pop().expect("there is a member");
        counts[rank] += 1;
        next.push(after(rank, counts[rank]));
    }
    let mut start = 0;
    let range = |count: u32| {
        let range = start..start + count;
        start = range.end;
        range
    };
    counts.into_iter().map(range).collect()
}

/// When the slowest member is done with its lanes, nanoseconds.
fn predicted_ns(cut: &[Range<u32>], lane_ns: &[u64]) -> u128 {
    let times = cut.iter().zip(lane_ns).map(|(range, ns)| range.len() as u128 * u128::from(*ns));
    times.max().unwrap_or(0)
}

/// Whether another cut than the present one is so much faster that the ring should be formed anew.
pub(super) fn is_worth_it(present: &[Range<u32>], lanes: u32, lane_ns: &[u64]) -> bool {
    let (now, then) = (predicted_ns(present, lane_ns), predicted_ns(&by_speed(lanes, lane_ns), lane_ns));
    now.saturating_sub(then) * 1000 > now * WORTH_PERMILLE
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn sizes(cut: &[Range<u32>]) -> Vec<u32> {
        cut.iter().map(|range| range.len() as u32).collect()
    }

    #[test]
    fn shares_follow_speed() {
        assert_eq!(sizes(&by_speed(8, &[100, 100])), [4, 4]);
        assert_eq!(sizes(&by_speed(8, &[100, 300])), [6, 2]);
        assert_eq!(sizes(&by_speed(4, &[100, 9_000])), [3, 1], "one lane at least");
        assert_eq!(sizes(&by_speed(64, &[100, 200, 100])), [26, 13, 25]);
        assert_eq!(sizes(&by_speed(2, &[100, 100, 100])), sizes(&balanced(2, 3)), "more members than lanes");
        assert_eq!(by_speed(8, &[]), []);
        assert_eq!(balanced(8, 3), [0..2, 2..5, 5..8]);
        assert!(is_worth_it(&balanced(4, 2), 4, &[100, 400]));
        assert!(!is_worth_it(&balanced(4, 2), 4, &[100, 109]), "there is no better cut");
    }

    #[test]
    fn who_survives_keeps_its_lanes() {
        let four = [0..1, 1..2, 2..3, 3..4].map(Some);
        assert_eq!(keeping(4, &four[1..]), [0..2, 2..3, 3..4]);
        assert_eq!(keeping(4, &[four[0].clone(), four[1].clone(), four[3].clone()]), [0..1, 1..2, 2..4]);
        let eight = [0..2, 2..4, 4..6, 6..8].map(Some);
        assert_eq!(keeping(8, &[eight[0].clone(), eight[1].clone(), eight[3].clone()]), [0..2, 2..5, 5..8]);
        assert_eq!(keeping(8, &eight), balanced(8, 4));
        assert_eq!(keeping(8, &[None, None, None]), balanced(8, 3), "nothing is kept");
        assert_eq!(keeping(8, &[]), []);
        assert_eq!(kept(&(1..7), &(0..4)), 3, "1 and 2+3");
        assert_eq!(kept(&(1..7), &(3..8)), 3, "4+5 and 6: 3 is a part of 2+3");
        let many: Vec<_> = balanced(1 << 14, 10_001).into_iter().skip(1).map(Some).collect();
        assert_eq!(keeping(1 << 14, &many), balanced(1 << 14, 10_000), "it is not worth the look");
    }

    fn members() -> impl Strategy<Value = Vec<u64>> {
        vec(prop_oneof![8 => 1_000u64..100_000, 1 => 1u64..10, 1 => any::<u64>()], 1..20)
    }

    proptest! {
        /// All lanes, each once, in order; none idle while there are enough; never slower by its own prediction than the
        /// balanced cut; and from its own cut nothing is to be gained.
        #[test]
        fn a_cut_by_speed(lane_ns in members(), power in 0u32..9) {
            let lanes = 1 << power;
            let cut = by_speed(lanes, &lane_ns);
            let mut next = 0;
            for range in &cut {
                prop_assert_eq!(range.start, next);
                next = range.end;
            }
            prop_assert_eq!((next, cut.len()), (lanes, lane_ns.len()));
            prop_assert!(lane_ns.len() as u32 > lanes || cut.iter().all(|range| !range.is_empty()));
            let other = balanced(lanes, lane_ns.len() as u32);
            prop_assert!(predicted_ns(&cut, &lane_ns) <= predicted_ns(&other, &lane_ns));
            prop_assert!(!is_worth_it(&cut, lanes, &lane_ns));
        }

        /// Sizes of a balanced cut, and none of them has less to compute again, by looking at all of them. Who loses nobody keeps
        /// its lanes.
        #[test]
        fn a_cut_keeps_what_was_computed(power in 0u32..5, members in 1u32..9, lost in vec(any::<bool>(), 9)) {
            let lanes = 1 << power;
            let was = balanced(lanes, members.min(lanes));
            let survive = was.iter().zip(&lost).filter(|(_, lost)| !**lost);
            let before: Vec<Option<Range<u32>>> = survive.map(|(range, _)| Some(range.clone())).collect();
            prop_assume!(!before.is_empty());
            let cut = keeping(lanes, &before);
            let mut counts = sizes(&cut);
            let most = |cut: &[Range<u32>]| {
                let again = cut.iter().zip(&before).map(|(range, had)| range.len() as u32 - kept(had.as_ref().unwrap(), range));
                again.max().unwrap()
            };
            let others = (0u32..1 << before.len()).filter(|set| set.count_ones() == lanes % before.len() as u32);
            let best = others.map(|set| {
                let mut start = 0;
                let cut: Vec<Range<u32>> = (0..before.len() as u32).map(|rank| {
                    let range = start..start + lanes / before.len() as u32 + (set >> rank & 1);
                    start = range.end;
                    range
                }).collect();
                most(&cut)
            });
            prop_assert_eq!(Some(most(&cut)), best.min());
            prop_assert_eq!(cut.iter().map(|range| range.start).collect::<Vec<_>>()[1..].to_vec(),
                cut.iter().map(|range| range.end).collect::<Vec<_>>()[..cut.len() - 1].to_vec());
            prop_assert_eq!((cut[0].start, cut[cut.len() - 1].end), (0, lanes));
            counts.sort_unstable();
            prop_assert!(counts[counts.len() - 1] - counts[0] <= 1);
            if before.len() == was.len() {
                prop_assert_eq!(cut, was);
            }
        }

        /// Noise moves no lane.
        #[test]
        fn a_cut_stays(measured in vec((10_000u64..100_000, 960u64..=1040), 2..9), power in 4u32..9) {
            let lanes = 1 << power;
            let (before, after): (Vec<u64>, Vec<u64>) =
                measured.into_iter().map(|(ns, permille)| (ns, ns * permille / 1000)).unzip();
            prop_assert!(!is_worth_it(&by_speed(lanes, &before), lanes, &after));
        }
    }
}

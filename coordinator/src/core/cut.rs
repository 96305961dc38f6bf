//! How the lanes are cut into contiguous ranges, one a member, in rank order.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

/// A new cut is worth a re-formation when it takes so many thousandths off the predicted time. Noise of 4 % either way in the
/// measured times is at most 1 − 0.96/1.04 = 7.7 % of it: a ring is not re-formed for that.
const WORTH_PERMILLE: u128 = 100;

/// `lanes` lanes for `members` members, sizes at most one apart.
pub(super) fn balanced(lanes: u32, members: u32) -> Vec<Range<u32>> {
    let bound = |rank: u32| (u64::from(lanes) * u64::from(rank) / u64::from(members.max(1))) as u32;
    (0..members).map(|rank| bound(rank)..bound(rank + 1)).collect()
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

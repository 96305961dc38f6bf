//! The fixed binary tree over lanes, folded as lanes finish.
//!
//! Lane gradients are added along one tree, whoever computes them: `((0+1)+(2+3))+((4+5)+(6+7))`. A range of lanes
//! that arrives in order is folded like a binary counter: a stack of partial sums of aligned subtrees, the sizes
//! strictly falling. `n` lanes hold at most 1 + log2(n) values at a time.

use crate::objective::LossSums;

/// Partial sums over aligned subtrees of lanes.
#[derive(Debug)]
pub struct Fold<T> {
    /// (first lane, number of lanes, sum), sizes strictly falling.
    partials: Vec<(u32, u32, T)>,
}

impl<T> Default for Fold<T> {
    fn default() -> Self {
        Self { partials: Vec::new() }
    }
}

impl<T> Fold<T> {
    /// Takes in the value of the next lane. `add(left, right)` adds `right` into `left`.
    pub fn push(&mut self, lane: u32, value: T, add: impl FnMut(&mut T, T)) {
        self.push_subtree((lane, 1, value), add);
    }

    /// Takes in the sum of the next aligned subtree.
    fn push_subtree(&mut self, partial: (u32, u32, T), mut add: impl FnMut(&mut T, T)) {
        let (mut first, mut lanes, mut sum) = partial;
        assert!(lanes.is_power_of_two() && first % lanes == 0, "{lanes} lanes from {first} are no subtree");
        if let Some((left, size, _)) = self.partials.last() {
            assert_eq!(left + size, first, "lanes arrive in order");
        }
        // A node's left child starts at a multiple of twice the child's size.
        while self.partials.last().is_some_and(|(left, size, _)| *size == lanes && left % (2 * lanes) == 0) {
            let (left, size, mut left_sum) = self.partials.pop().expect("just seen");
            add(&mut left_sum, sum);
            (first, lanes, sum) = (left, size + lanes, left_sum);
        }
        self.partials.push((first, lanes, sum));
    }

    /// The partial sums, as [`into_partials`](Self::into_partials).
    pub fn partials(&self) -> &[(u32, u32, T)] {
        &self.partials
    }

    /// The same subtrees with something else of each.
    pub fn map<U>(&self, of: impl Fn(&T) -> U) -> Fold<U> {
        Fold { partials: self.partials.iter().map(|(first, lanes, sum)| (*first, *lanes, of(sum))).collect() }
    }

    /// The partial sums, one for each maximal aligned subtree: (first lane, number of lanes, sum).
    pub fn into_partials(self) -> Vec<(u32, u32, T)> {
        self.partials
    }

    /// The sum over all lanes `0..lanes` of a run that one worker serves.
    pub fn into_total(self, lanes: u32) -> T {
        let mut partials = self.partials;
        match partials.pop() {
            Some((0, size, sum)) if size == lanes && partials.is_empty() => sum,
            _ => unreachable!("all {lanes} lanes were pushed, and their number is a power of two"),
        }
    }
}

/// The sum over all lanes `0..lanes` of a run from the partial sums of aligned subtrees, in lane order: the same
/// additions in the same order as [`Fold`] makes over single lanes, wherever the workers' ranges were cut. Panics when
/// the partials are not all lanes, each once.
pub fn combine<T>(partials: Vec<(u32, u32, T)>, lanes: u32, mut add: impl FnMut(&mut T, T)) -> T {
    let mut fold = Fold::default();
    partials.into_iter().for_each(|partial| fold.push_subtree(partial, &mut add));
    fold.into_total(lanes)
}

/// [`combine`] of loss sums.
pub fn fold_sums(partials: Vec<(u32, u32, LossSums)>, lanes: u32) -> LossSums {
    combine(partials, lanes, |left, right| left.add(&right))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anello_configs::random::Stream;
    use proptest::prelude::*;

    fn fold(lanes: std::ops::Range<u32>) -> Vec<(u32, u32, String)> {
        let mut fold = Fold::default();
        for lane in lanes {
            fold.push(lane, lane.to_string(), |left, right| *left = format!("({left}+{right})"));
        }
        fold.into_partials()
    }

    #[test]
    fn eight_lanes_fold_along_the_tree() {
        assert_eq!(fold(0..8), [(0, 8, "(((0+1)+(2+3))+((4+5)+(6+7)))".to_owned())]);
    }

    #[test]
    fn a_range_folds_into_its_maximal_aligned_subtrees() {
        let sums: Vec<String> = fold(1..7).into_iter().map(|(_, _, sum)| sum).collect();
        assert_eq!(sums, ["1", "(2+3)", "(4+5)", "6"]);
    }

    /// The loss sums of a lane: figures whose sum depends on the order of addition.
    fn sums_of(lane: u32) -> LossSums {
        let stream = Stream::new(7, "sums", &[u64::from(lane)]);
        let figure = |at: u64| stream.below_at(at, 1 << 40) as f64 / 3.0 * f64::powi(10.0, (lane % 7) as i32);
        LossSums {
            counted: u64::from(lane) + 1,
            loss: figure(0),
            cross_entropy: vec![figure(1), figure(2)],
            exit: vec![figure(3), figure(4)],
            entropy: figure(5),
        }
    }

    /// Partial sums of several workers, whose ranges end at `bounds`.
    fn partials<T>(bounds: &[u32], of: impl Fn(u32) -> T, add: impl Fn(&mut T, T)) -> Vec<(u32, u32, T)> {
        let of_worker = |range: &[u32]| {
            let mut fold = Fold::default();
            (range[0]..range[1]).for_each(|lane| fold.push(lane, of(lane), &add));
            fold.into_partials()
        };
        bounds.windows(2).flat_map(of_worker).collect()
    }

    fn bounds(cuts: Vec<u32>, lanes: u32) -> Vec<u32> {
        let mut bounds: Vec<u32> = cuts.into_iter().map(|c| c % (lanes + 1)).chain([0, lanes]).collect();
        bounds.sort_unstable();
        bounds
    }

    #[test]
    #[should_panic(expected = "lanes arrive in order")]
    fn a_lane_that_is_missing_is_no_total() {
        combine(vec![(0, 1, ()), (2, 2, ())], 4, |_, ()| ());
    }

    proptest! {
        /// Whatever the cut, combining the partials along the tree gives the sum of one worker.
        #[test]
        fn any_partition_gives_the_same_tree(log in 0u32..6, cuts in prop::collection::vec(0u32..64, 0..5)) {
            let lanes = 1 << log;
            let join = |left: &mut String, right: String| *left = format!("({left}+{right})");
            let partials = partials(&bounds(cuts, lanes), |lane| lane.to_string(), join);
            let total = combine(partials, lanes, join);
            prop_assert_eq!(vec![(0, lanes, total)], fold(0..lanes));
        }

        #[test]
        fn any_partition_gives_the_loss_sums_of_one_worker(
            log in 0u32..6,
            cuts in prop::collection::vec(0u32..64, 0..5),
        ) {
            let lanes = 1 << log;
            let add = |left: &mut LossSums, right: LossSums| left.add(&right);
            let one = partials(&[0, lanes], sums_of, add);
            let several = fold_sums(partials(&bounds(cuts, lanes), sums_of, add), lanes);
            let [(0, _, one)] = &one[..] else { panic!("one worker has one sum: {one:?}") };
            let bits = |sums: &LossSums| {
                let LossSums { counted, loss, cross_entropy, exit, entropy } = sums;
                let figures = [loss, entropy].into_iter().chain(cross_entropy).chain(exit);
                (*counted, figures.map(|figure| figure.to_bits()).collect::<Vec<_>>())
            };
            prop_assert_eq!(bits(&several), bits(one));
        }

        #[test]
        fn a_fold_holds_at_most_one_and_log2_values(lanes in 1u32..200) {
            let mut fold = Fold::default();
            for lane in 0..lanes {
                fold.push(lane, (), |_, ()| ());
                prop_assert!(fold.partials.len() as u32 <= 1 + (lane + 1).ilog2());
            }
        }
    }
}

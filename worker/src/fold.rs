//! The fixed binary tree over lanes, folded as lanes finish.
//!
//! Lane gradients are added along one tree, whoever computes them: `((0+1)+(2+3))+((4+5)+(6+7))`. A range of lanes
//! that arrives in order is folded like a binary counter: a stack of partial sums of aligned subtrees.
//! [`gradients_held`] says how many values there are at most: 1 + log2(n) of `n` lanes that are one subtree.

use std::ops::Range;

use anello_configs::lanes::gradients_held;

use crate::objective::LossSums;

/// Partial sums over aligned subtrees of lanes.
#[derive(Debug)]
pub struct Fold<T> {
    /// (first lane, number of lanes, sum), in lane order.
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
    pub fn push_subtree(&mut self, partial: (u32, u32, T), mut add: impl FnMut(&mut T, T)) {
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

    /// Whether this lane is in.
    pub fn has(&self, lane: u32) -> bool {
        self.partials.iter().any(|(first, lanes, _)| (*first..first + lanes).contains(&lane))
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

/// Partial sums of a step that came to nothing: the ring that has it next, in which lanes may be cut in another way, need not
/// compute them again.
#[derive(Debug)]
pub struct Kept<T> {
    /// (first lane, number of lanes, sum), in lane order.
    partials: Vec<(u32, u32, T)>,
}

impl<T> Kept<T> {
    /// Those of `fold`.
    pub fn new(fold: Fold<T>) -> Self {
        Self { partials: fold.partials }
    }

    /// The sum of the subtree that begins with this lane.
    pub fn take(&mut self, first: u32) -> Option<(u32, u32, T)> {
        let at = self.partials.iter().position(|(of, _, _)| *of == first)?;
        Some(self.partials.remove(at))
    }

    /// Lets go of what a worker of these lanes has no use for, and of what it has no room for: it holds no more values at a time
    /// than one that computes them all. Returns what goes.
    pub fn cut_to(&mut self, lanes: &Range<u32>) -> Vec<T> {
        let within = |(first, size, _): &(u32, u32, T)| lanes.start <= *first && first + size <= lanes.end;
        let mut gone: Vec<T> =
            self.partials.extract_if(.., |partial| !within(partial)).map(|(_, _, sum)| sum).collect();
        while self.held_at_most(lanes) > gradients_held(lanes.clone()) as usize {
            let smallest = (0..self.partials.len()).min_by_key(|at| self.partials[*at].1);
            gone.push(self.partials.remove(smallest.expect("without any there is room")).2);
        }
        gone
    }

    /// Lets go of the sum that this lane is in.
    pub fn forget(&mut self, lane: u32) -> Option<T> {
        let at =
            self.partials.iter().position(|(first, lanes, _)| (*first..first + lanes).contains(&lane))?;
        Some(self.partials.remove(at).2)
    }

    /// All of them.
    pub fn into_values(self) -> impl Iterator<Item = T> {
        self.partials.into_iter().map(|(_, _, sum)| sum)
    }

    /// The most values that there are at a time while the rest of `lanes` is folded with these.
    fn held_at_most(&self, lanes: &Range<u32>) -> usize {
        let (mut fold, mut most, mut lane) = (Fold::default(), 0, lanes.start);
        let mut kept = self.partials.iter().map(|(first, size, _)| (*first, *size)).peekable();
        while lane < lanes.end {
            let next = kept.next_if(|(first, _)| *first == lane).unwrap_or((lane, 1));
            most = most.max(fold.partials.len() + 1 + kept.len());
            fold.push_subtree((next.0, next.1, ()), |(), ()| ());
            lane += next.1;
        }
        most
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

    fn fold_of(lanes: Range<u32>) -> Vec<(u32, u32, String)> {
        let mut fold = Fold::default();
        for lane in lanes {
            fold.push(lane, lane.to_string(), |left, right| *left = format!("({left}+{right})"));
        }
        fold.into_partials()
    }

    #[test]
    fn eight_lanes_fold_along_the_tree() {
        assert_eq!(fold_of(0..8), [(0, 8, "(((0+1)+(2+3))+((4+5)+(6+7)))".to_owned())]);
    }

    #[test]
    fn a_range_folds_into_its_maximal_aligned_subtrees() {
        let sums: Vec<String> = fold_of(1..7).into_iter().map(|(_, _, sum)| sum).collect();
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

    fn lanes_of_64() -> impl Strategy<Value = Range<u32>> {
        (0u32..64, 1u32..20).prop_map(|(start, len)| start..(start + len).min(64))
    }

    /// Of four workers with a lane each the second dies: the first has computed what it has, and computes what that one had.
    #[test]
    fn a_survivor_computes_what_the_dead_had() {
        let mut kept = Kept::new(Fold { partials: vec![(0, 1, "0")] });
        assert_eq!((kept.cut_to(&(0..2)), kept.partials.len()), (vec![], 1));
        assert_eq!(kept.cut_to(&(1..2)), ["0"], "another has it now");
        let mut kept =
            Kept::new(Fold { partials: vec![(1, 1, "1"), (2, 2, "2+3"), (4, 4, "4…7"), (8, 1, "8")] });
        assert_eq!(
            kept.cut_to(&(0..9)),
            ["1", "8"],
            "there is room for four, as at lane 7 of nine: 0, 1 on its way, and two that are kept"
        );
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
            prop_assert_eq!(vec![(0, lanes, total)], fold_of(0..lanes));
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

        /// Whatever a worker kept of a step, and whichever lanes it is given then: the sums are those of one that has computed
        /// them all, and no more values are held at a time.
        #[test]
        fn what_is_kept_of_a_step_is_its_part_of_the_next_cut(
            before in lanes_of_64(), then in lanes_of_64(), forgotten in 0u32..64,
        ) {
            let join = |left: &mut String, right: String| *left = format!("({left}+{right})");
            let mut fold = Fold::default();
            before.clone().for_each(|lane| fold.push(lane, lane.to_string(), join));
            let had: usize = fold.partials().len();
            let mut kept = Kept::new(fold);
            let gone = kept.forget(forgotten).into_iter().chain(kept.cut_to(&then)).count();
            prop_assert_eq!(gone + kept.partials.len(), had);
            let room = gradients_held(then.clone()) as usize;
            let (mut again, mut computed) = (Fold::default(), 0);
            for lane in then.clone() {
                if let Some(partial) = kept.take(lane) {
                    let partial_lanes = partial.0..partial.0 + partial.1;
                    again.push_subtree(partial, join);
                    prop_assert!(!partial_lanes.contains(&forgotten));
                } else if !again.has(lane) {
                    again.push(lane, lane.to_string(), join);
                    computed += 1;
                }
                prop_assert!(again.partials.len() + kept.partials.len() <= room);
            }
            prop_assert_eq!(kept.partials.len(), 0);
            prop_assert_eq!(again.into_partials(), fold_of(then.clone()));
            if then == before && !before.contains(&forgotten) {
                prop_assert_eq!(computed, 0, "the same lanes need nothing");
            }
        }

        /// What a plan counts on is what is held: at most, and at some time.
        #[test]
        fn a_fold_holds_what_is_planned(lanes in lanes_of_64()) {
            let (mut fold, mut most) = (Fold::default(), 0);
            for lane in lanes.clone() {
                most = most.max(fold.partials.len() + 1);
                fold.push(lane, (), |(), ()| ());
            }
            prop_assert!(fold.partials.len() <= most);
            prop_assert_eq!(most, gradients_held(lanes.clone()) as usize);
            let size = lanes.len() as u32;
            let is_subtree = size.is_power_of_two() && lanes.start % size == 0;
            let bound = if is_subtree { 1 + size.ilog2() } else { 2 + 2 * size.ilog2() };
            prop_assert!(most as u32 <= bound, "{most} of {lanes:?}");
        }
    }
}

//! The fixed binary tree over lanes, folded as lanes finish.
//!
//! Lane gradients are added along one tree, whoever computes them: `((0+1)+(2+3))+((4+5)+(6+7))`. A range of lanes
//! that arrives in order is folded like a binary counter: a stack of partial sums of aligned subtrees, the sizes
//! strictly falling. `n` lanes hold at most 1 + log2(n) values at a time.

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
    pub fn push(&mut self, lane: u32, value: T, mut add: impl FnMut(&mut T, T)) {
        if let Some((first, lanes, _)) = self.partials.last() {
            assert_eq!(first + lanes, lane, "lanes arrive in order");
        }
        let (mut first, mut lanes, mut sum) = (lane, 1, value);
        // A node's left child starts at a multiple of twice the child's size.
        while self.partials.last().is_some_and(|(left, size, _)| *size == lanes && left % (2 * lanes) == 0) {
            let (left, size, mut left_sum) = self.partials.pop().expect("just seen");
            add(&mut left_sum, sum);
            (first, lanes, sum) = (left, size + lanes, left_sum);
        }
        self.partials.push((first, lanes, sum));
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

#[cfg(test)]
mod tests {
    use super::*;
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

    proptest! {
        /// Whatever the cut, combining the partials along the tree gives the sum of one worker.
        #[test]
        fn any_partition_gives_the_same_tree(log in 0u32..6, cuts in prop::collection::vec(0u32..64, 0..5)) {
            let lanes = 1 << log;
            let mut bounds: Vec<u32> = cuts.into_iter().map(|c| c % (lanes + 1)).chain([0, lanes]).collect();
            bounds.sort_unstable();
            let mut partials: Vec<(u32, u32, String)> =
                bounds.windows(2).flat_map(|w| fold(w[0]..w[1])).collect();
            // The owner's side: combine siblings until one is left.
            while partials.len() > 1 {
                let at = (0..partials.len() - 1)
                    .find(|&i| {
                        let ((a, n, _), (_, m, _)) = (&partials[i], &partials[i + 1]);
                        n == m && a % (2 * n) == 0
                    })
                    .expect("two siblings stand side by side");
                let (_, m, right) = partials.remove(at + 1);
                let (a, n, left) = partials[at].clone();
                partials[at] = (a, n + m, format!("({left}+{right})"));
            }
            prop_assert_eq!(partials, fold(0..lanes));
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

//! The figures of steps, one row a step, as a worker keeps them until they are in the run folder, and when it tells them.
//!
//! ```text
//! rows     ─ in the run folder ─▏─ kept ────────────────▏
//! steps    0                 durable                 known = the state that the worker holds is after this step
//! ```
//! Rank 0 tells each row when its step is applied, and all that it has when it becomes rank 0 or a coordinator comes; anyone
//! else when it is asked. So that no row dies with whoever was asked for the state, **who holds the state after a step knows the
//! rows of all steps before it**: its own steps', and, with a state that comes from another worker, that one's.

use std::collections::BTreeMap;

/// Rows kept at most, for a coordinator that is away: some hours of a small run's steps, 30 MiB.
const ROWS_MAX: usize = 100_000;

/// The rows of a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptRows<R> {
    /// Rows of steps before this one are in the run folder.
    durable: u64,
    rows: BTreeMap<u64, R>,
    is_rank_zero: bool,
    /// The coordinator has said over this connection which steps it knows.
    welcomed: bool,
}

impl<R> Default for KeptRows<R> {
    fn default() -> Self {
        Self { durable: 0, rows: BTreeMap::new(), is_rank_zero: false, welcomed: false }
    }
}

impl<R> KeptRows<R> {
    /// There is a new connection: what was said over the one before may be lost.
    pub fn linked(&mut self) {
        self.welcomed = false;
    }

    /// The coordinator says that it knows the rows of `reported` steps. Rows to tell: a second time over one connection it asks
    /// for those that rank 0 does not have.
    pub fn welcomed(&mut self, reported: u64) -> impl Iterator<Item = &R> + use<'_, R> {
        let asked = std::mem::replace(&mut self.welcomed, true);
        self.to_tell(asked || self.is_rank_zero, reported)
    }

    /// A ring forms, in which this worker may be rank 0. Rows to tell.
    pub fn formed(&mut self, is_rank_zero: bool) -> impl Iterator<Item = &R> + use<'_, R> {
        self.is_rank_zero = is_rank_zero;
        self.to_tell(is_rank_zero, 0)
    }

    fn to_tell(&self, tells: bool, from: u64) -> impl Iterator<Item = &R> + use<'_, R> {
        self.rows.range(from..).map(|(_, row)| row).take(if tells { usize::MAX } else { 0 })
    }

    /// This worker has applied `step`. A row to tell, if it is the one that tells them.
    pub fn applied(&mut self, step: u64, row: R) -> Option<&R> {
        self.keep(std::iter::once((step, row)));
        let tells = self.is_rank_zero && self.welcomed;
        self.rows.get(&step).filter(|_| tells)
    }

    /// Another worker's rows come with the state that it hands out; those of steps before `durable` are in the run folder. Rows to
    /// tell.
    pub fn took(&mut self, durable: u64, rows: Vec<(u64, R)>) -> impl Iterator<Item = &R> + use<'_, R> {
        self.durable(durable);
        let from = self.known();
        self.keep(rows.into_iter());
        self.to_tell(self.is_rank_zero && self.welcomed, from)
    }

    /// Of two of one step the first one stays: what else happened in it is told once.
    fn keep(&mut self, rows: impl Iterator<Item = (u64, R)>) {
        for (step, row) in rows.filter(|(step, _)| *step >= self.durable) {
            self.rows.entry(step).or_insert(row);
        }
        while self.rows.len() > ROWS_MAX {
            let given_up = self.rows.pop_first().map(|(step, _)| step + 1);
            self.durable = self.durable.max(given_up.unwrap_or(0));
        }
    }

    /// The rows of steps before this one are in the run folder.
    pub fn durable(&mut self, step: u64) {
        if step > self.durable {
            self.durable = step;
            self.rows = self.rows.split_off(&step);
        }
    }

    /// The rows of all steps before this one are known.
    pub fn known(&self) -> u64 {
        let from_durable = (self.durable..).zip(self.rows.keys());
        self.durable + from_durable.take_while(|(at, step)| at == *step).count() as u64
    }

    /// What another worker lacks that knows the rows of steps before `first`, and takes the state after `end`: the step before
    /// which all are in the run folder, and rows. Absent: this worker is not there itself.
    pub fn between(&self, first: u64, end: u64) -> Option<(u64, impl Iterator<Item = &R> + use<'_, R>)> {
        let is_there = self.known() >= end;
        is_there.then(|| (self.durable, self.rows.range(first.min(end)..end).map(|(_, row)| row)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [u64; 0] = [];

    fn kept(rows: impl IntoIterator<Item = u64>) -> KeptRows<u64> {
        let mut kept = KeptRows::default();
        kept.keep(rows.into_iter().map(|step| (step, step)));
        kept
    }

    fn steps<'a>(rows: impl Iterator<Item = &'a u64>) -> Vec<u64> {
        rows.copied().collect()
    }

    #[test]
    fn rank_zero_tells_what_it_has_and_what_comes() {
        let mut rows = kept(0..3);
        assert_eq!(steps(rows.formed(true)), [0, 1, 2], "another may have told less");
        assert_eq!(rows.applied(3, 3), None, "the coordinator has not said what it knows");
        assert_eq!(steps(rows.welcomed(2)), [2, 3]);
        assert_eq!(rows.applied(4, 4), Some(&4));
        rows.linked();
        assert_eq!(rows.applied(5, 5), None);
        assert_eq!(steps(rows.welcomed(4)), [4, 5]);
    }

    #[test]
    fn others_tell_when_they_are_asked() {
        let mut rows = kept(0..3);
        assert_eq!(steps(rows.formed(false)), NONE);
        assert_eq!(steps(rows.welcomed(0)), NONE);
        assert_eq!(rows.applied(3, 3), None);
        assert_eq!(steps(rows.welcomed(1)), [1, 2, 3], "said a second time it asks");
        rows.linked();
        assert_eq!(steps(rows.welcomed(0)), NONE);
    }

    #[test]
    fn what_is_in_the_run_folder_is_let_go() {
        let mut rows = kept(0..5);
        rows.durable(3);
        rows.durable(2);
        assert_eq!((steps(rows.formed(true)), rows.known()), (vec![3, 4], 5));
        assert_eq!(rows.applied(2, 2), None, "a step of before is computed again after a fall back");
        rows.durable(9);
        assert_eq!((steps(rows.formed(true)), rows.known()), (NONE.to_vec(), 9));
    }

    #[test]
    fn a_state_comes_with_the_rows_that_its_holder_has() {
        let holder = kept(0..7);
        let (durable, lacking) = holder.between(3, 6).unwrap();
        let lacking = steps(lacking);
        assert_eq!((durable, &lacking[..]), (0, &[3, 4, 5][..]));
        assert!(holder.between(3, 8).is_none(), "it does not know step 7 yet");
        assert_eq!(steps(holder.between(9, 7).unwrap().1), NONE);
        let mut behind = kept(0..3);
        let came = || lacking.iter().map(|step| (*step, *step)).collect();
        assert_eq!(steps(behind.clone().took(durable, came())), NONE);
        assert_eq!((steps(behind.formed(true)), steps(behind.welcomed(9))), (vec![0, 1, 2], NONE.to_vec()));
        assert_eq!(steps(behind.took(durable, came())), [3, 4, 5], "rank 0 has told the others");
        assert_eq!(behind.known(), 6);
        // Of one whose first rows are in the run folder.
        let mut holder = kept(0..7);
        holder.durable(5);
        let mut new = KeptRows::default();
        let (durable, lacking) = holder.between(0, 7).unwrap();
        new.keep(lacking.map(|step| (*step, *step)));
        new.durable(durable);
        assert_eq!((new.known(), steps(new.formed(true))), (7, vec![5, 6]));
    }

    #[test]
    fn rows_with_a_gap_are_known_up_to_it_and_the_first_of_two_stays() {
        let mut rows = kept([0, 1, 4, 5]);
        assert_eq!(rows.known(), 2);
        rows.keep([(1, 11), (2, 2), (3, 3)].into_iter());
        assert_eq!((rows.known(), steps(rows.formed(true))), (6, vec![0, 1, 2, 3, 4, 5]));
    }

    #[test]
    fn no_more_are_kept_than_fit() {
        let mut rows = kept(0..ROWS_MAX as u64 + 3);
        assert_eq!((rows.rows.len(), rows.known()), (ROWS_MAX, ROWS_MAX as u64 + 3));
        assert_eq!(rows.applied(ROWS_MAX as u64 + 3, 1), None);
        assert_eq!((rows.rows.len(), rows.durable), (ROWS_MAX, 4));
    }
}

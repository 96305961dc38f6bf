//! Which steps' figures are here, the search for those that are not, and the checkpoints that wait for them.
//!
//! Rank 0 reports every step, in order. A coordinator that comes later, or a rank 0 that dies, leaves a hole: a step is
//! reported, or a checkpoint is whole, though figures of steps before it are not here. Any worker that was in the ring at the
//! time has them, and anyone that holds the state after them (see `anello_member::KeptRows`), so that one after the other is
//! asked. Rows that died with all who knew them come when their steps are trained again: so as long as nobody here holds the
//! state after them, they are waited for.

use std::collections::BTreeSet;
use std::ops::Range;

use anello_proto::ring::WorkerId;

use super::Millis;

/// Looks a lease. When nobody was left to be asked for a lease, the rows are not to be had: whoever is to be expected is here, and
/// whoever is dead is known to be.
const LOOKS: u32 = 8;

/// The steps whose figures are here, and whole checkpoints after steps whose are not: one is never committed before its steps are
/// in the metrics. `C` is what a caller needs to commit one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rows<C> {
    /// Steps whose rows are here, from the first.
    reported: u64,
    /// The earliest step that was reported though one before it was not.
    ahead: Option<u64>,
    search: Option<Search>,
    /// By the steps that they are after.
    waiting: Vec<(u64, C)>,
    /// Time between two looks.
    pace: Millis,
}

/// Who was asked, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Search {
    /// Since the last row came.
    asked: BTreeSet<WorkerId>,
    /// Looks since somebody was asked, one after the other as they are due, and the last one: a coordinator that slept has not
    /// waited.
    looks: u32,
    looked: Millis,
    /// Whether somebody holds the state after the missing steps, for as long.
    is_trained: bool,
}

/// What comes of a look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Look<C> {
    /// Who is to be asked for the rows from [`Rows::reported`] on.
    pub ask: Vec<WorkerId>,
    /// The rows of these steps are given up: somebody holds the state after them, and should have them.
    pub lost: Option<Range<u64>>,
    /// Checkpoints after so many steps that are not to be waited for: whoever trained these steps is gone, with the state after
    /// them. Rows and checkpoints come when they are trained again.
    pub withdrawn: Vec<u64>,
    /// Checkpoints that are to be committed, and after how many steps.
    pub ready: Vec<(u64, C)>,
}

/// Why nobody has the rows that are missing, as [`Look`] says it.
enum Missing {
    Lost(Range<u64>),
    Untrained,
}

impl<C> Rows<C> {
    /// The rows of `reported` steps are here; a worker that is silent for `lease` is dead.
    pub fn new(reported: u64, lease: Millis) -> Self {
        Self { reported, ahead: None, search: None, waiting: Vec::new(), pace: lease / u64::from(LOOKS) }
    }

    /// Steps whose rows are here.
    pub fn reported(&self) -> u64 {
        self.reported
    }

    /// A row of `step` comes. Whether it is the next: one that is known is the same bits again, and one that comes before its
    /// time is told again once those before it are here.
    pub fn take(&mut self, step: u64) -> bool {
        if step > self.reported {
            self.ahead = Some(self.ahead.map_or(step, |ahead| ahead.min(step)));
        }
        if step != self.reported {
            return false;
        }
        if let Some(search) = &mut self.search {
            (search.looks, search.asked) = (0, BTreeSet::new());
        }
        self.reported = step + 1;
        true
    }

    /// A checkpoint after `step` steps is whole. Of two, from two generations, one is enough.
    pub fn whole(&mut self, step: u64, checkpoint: C) {
        if self.waiting.iter().all(|(waits, _)| *waits != step) {
            self.waiting.push((step, checkpoint));
        }
    }

    /// A worker has connected: what it said over an older connection may be lost.
    pub fn connected(&mut self, worker: WorkerId) {
        if let Some(search) = &mut self.search {
            search.asked.remove(&worker);
        }
    }

    /// When the next look is due; absent: nothing is searched for.
    pub fn deadline(&self) -> Option<Millis> {
        self.search.as_ref().map(|search| search.looked + self.pace)
    }

    /// Looks for rows that are missing before one that is here, or before a checkpoint that is whole. `connected` are those that can
    /// be asked, and one of them holds the state after `held` steps, and none of more: that is looked for only when a look is due,
    /// since this is called with every word that anyone says.
    pub fn look(
        &mut self,
        now: Millis,
        connected: impl ExactSizeIterator<Item = WorkerId>,
        held: impl FnOnce() -> u64,
    ) -> Look<C> {
        let (ask, missing) = self.search(now, connected, held);
        let (lost, withdrawn) = match missing {
            Some(Missing::Lost(steps)) => (Some(steps), Vec::new()),
            Some(Missing::Untrained) => (None, self.waiting.drain(..).map(|(step, _)| step).collect()),
            None => (None, Vec::new()),
        };
        let reported = self.reported;
        let ready = self.waiting.extract_if(.., |(step, _)| *step <= reported).collect();
        Look { ask, lost, withdrawn, ready }
    }

    fn search(
        &mut self,
        now: Millis,
        connected: impl ExactSizeIterator<Item = WorkerId>,
        held: impl FnOnce() -> u64,
    ) -> (Vec<WorkerId>, Option<Missing>) {
        let reported = self.reported;
        self.ahead = self.ahead.filter(|ahead| *ahead > reported);
        let waiting = self.waiting.iter().map(|(step, _)| *step).filter(|step| *step > reported);
        let Some(hole_end) = self.ahead.into_iter().chain(waiting).min() else {
            self.search = None;
            return Default::default();
        };
        let pace = self.pace;
        let search = self.search.get_or_insert(Search {
            asked: BTreeSet::new(),
            looks: 0,
            looked: now,
            is_trained: false,
        });
        if now < search.looked + pace {
            return Default::default();
        }
        let is_trained = held() >= hole_end;
        let goes_on = search.is_trained == is_trained && now < search.looked + pace + pace;
        search.looks = if goes_on { search.looks + 1 } else { 1 };
        (search.looked, search.is_trained) = (now, is_trained);
        let share = connected.len().div_ceil(LOOKS as usize);
        let ask: Vec<WorkerId> = connected.filter(|id| !search.asked.contains(id)).take(share).collect();
        if !ask.is_empty() {
            search.asked.extend(&ask);
            search.looks = 0;
        }
        let missing = match (search.looks > LOOKS, is_trained) {
            (false, _) => None,
            (true, false) => Some(Missing::Untrained),
            (true, true) => {
                (self.reported, self.search) = (hole_end, None);
                Some(Missing::Lost(reported..hole_end))
            }
        };
        (ask, missing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Millis = Millis(800);

    fn ids(ids: &[u64]) -> impl ExactSizeIterator<Item = WorkerId> {
        ids.iter().copied().map(WorkerId)
    }

    fn asks(of: &[u64]) -> Look<()> {
        Look { ask: ids(of).collect(), lost: None, withdrawn: Vec::new(), ready: Vec::new() }
    }

    /// Looks every 100 ms from `from` on, `count` times, where somebody holds the state after all that is trained; returns what
    /// came of the looks that were not idle.
    fn looks(
        rows: &mut Rows<()>,
        from: u64,
        count: u64,
        wanted: Option<u64>,
        connected: &[u64],
    ) -> Vec<(u64, Look<()>)> {
        looks_at(rows, from..from + 100 * count, wanted, connected, u64::MAX)
    }

    fn looks_at(
        rows: &mut Rows<()>,
        times: Range<u64>,
        wanted: Option<u64>,
        connected: &[u64],
        held: u64,
    ) -> Vec<(u64, Look<()>)> {
        wanted.into_iter().for_each(|step| rows.whole(step, ()));
        let look = |at: u64| (at, rows.look(Millis(at), ids(connected), || held));
        times.step_by(100).map(look).filter(|(_, look)| *look != asks(&[])).collect()
    }

    #[test]
    fn rows_are_taken_in_order_and_once() {
        let mut rows = Rows::new(3, LEASE);
        assert!(!rows.take(2) && !rows.take(4) && rows.take(3) && !rows.take(3) && rows.take(4));
        assert_eq!((rows.reported(), rows.deadline()), (5, None));
        assert_eq!(looks(&mut rows, 0, 9, None, &[1]), [], "nothing is missing any more");
    }

    #[test]
    fn a_checkpoint_is_ready_once_its_steps_are_here() {
        let mut rows = Rows::new(3, LEASE);
        ["first", "of another generation"].into_iter().for_each(|checkpoint| rows.whole(5, checkpoint));
        rows.whole(7, "second");
        let ready = |rows: &mut Rows<&'static str>| rows.look(Millis(0), ids(&[]), || 9).ready;
        assert!(rows.take(3) && ready(&mut rows).is_empty());
        assert!(rows.take(4));
        assert_eq!((ready(&mut rows), ready(&mut rows)), (vec![(5, "first")], vec![]));
        assert!(rows.take(5) && rows.take(6));
        assert_eq!(ready(&mut rows), [(7, "second")]);
    }

    #[test]
    fn one_after_the_other_is_asked_until_the_hole_is_closed() {
        let mut rows = Rows::new(3, LEASE);
        rows.take(5);
        // The row may be on its way: the first is asked after a look's time.
        assert_eq!(rows.look(Millis(0), ids(&[1, 2]), || 9), asks(&[]));
        assert_eq!(rows.deadline(), Some(Millis(100)));
        assert_eq!(rows.look(Millis(99), ids(&[1, 2]), || 9), asks(&[]));
        assert_eq!(looks(&mut rows, 100, 3, None, &[1, 2]), [(100, asks(&[1])), (200, asks(&[2]))]);
        // Whoever has a row may have the next one too, and whoever had none of this may have that.
        assert!(rows.take(3));
        assert_eq!(looks(&mut rows, 400, 1, None, &[1, 2]), [(400, asks(&[1]))]);
        assert!(rows.take(4));
        assert_eq!((looks(&mut rows, 500, 20, None, &[1, 2]), rows.deadline()), (vec![], None));
    }

    #[test]
    fn who_connects_again_is_asked_again_and_of_many_some_at_a_time() {
        let mut rows = Rows::new(3, LEASE);
        assert_eq!(looks(&mut rows, 0, 3, Some(9), &[1]), [(100, asks(&[1]))]);
        rows.connected(WorkerId(1));
        assert_eq!(looks(&mut rows, 300, 2, Some(9), &[1]), [(300, asks(&[1]))]);
        let mut rows = Rows::new(3, LEASE);
        let many: Vec<u64> = (1..=17).collect();
        let asked = looks(&mut rows, 0, 9, Some(9), &many);
        assert_eq!(asked.iter().map(|(_, look)| look.ask.len()).collect::<Vec<_>>(), [3, 3, 3, 3, 3, 2]);
    }

    #[test]
    fn rows_that_nobody_has_are_given_up_after_looks_and_not_after_time() {
        let mut rows = Rows::new(3, LEASE);
        rows.take(9);
        rows.whole(6, ());
        // It sleeps for an hour between two looks: nobody had the time to answer.
        let asked = [rows.look(Millis(0), ids(&[]), || 9), rows.look(Millis(3_600_000), ids(&[]), || 9)];
        assert_eq!(asked, [asks(&[]), asks(&[])]);
        let lost = Look { lost: Some(3..6), ready: vec![(6, ())], ..asks(&[]) };
        assert_eq!(looks(&mut rows, 3_600_100, 8, Some(6), &[]), [(3_600_800, lost)]);
        assert_eq!(rows.reported(), 6);
        // The next hole begins anew, and someone who comes is asked before it is given up.
        assert_eq!(looks(&mut rows, 3_602_100, 9, None, &[7]), [(3_602_200, asks(&[7]))]);
    }

    #[test]
    fn rows_that_are_to_be_trained_again_are_not_given_up() {
        let mut rows = Rows::new(3, LEASE);
        let untrained = Look { withdrawn: vec![6], ..asks(&[]) };
        // Whoever knew them is dead, and those that come hold an older state.
        let looked = looks_at(&mut rows, 0..1100, Some(6), &[1], 5);
        assert_eq!(looked, [(100, asks(&[1])), (1000, untrained)]);
        assert!(rows.take(3) && rows.take(4));
        assert_eq!(looks_at(&mut rows, 1100..1900, Some(6), &[1], 5), [(1100, asks(&[1]))]);
        // The last one should be here, and somebody has lost it.
        let lost = Look { lost: Some(5..6), ready: vec![(6, ())], ..asks(&[]) };
        assert_eq!(looks_at(&mut rows, 1900..4000, Some(6), &[1], 6), [(2700, lost)]);
    }
}

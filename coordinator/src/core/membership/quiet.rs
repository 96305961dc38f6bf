//! The short way: events from which nothing follows for anyone. They are all but a few of those that a large ring sets off, and each
//! costs a look-up, however many workers there are.
//!
//! The long way looks at every worker: who is silent, what is owed to whom, what the ring waits for. It would find nothing to do after
//! these; the tests walk it after every event of theirs, and it must lead to the same state and the same effects. Only the deadline
//! may differ: it may be early, never late. Where something waits for time that has come, no event is quiet.

use super::*;

/// What follows from where all workers stand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    /// Members of the living generation that run.
    pub running: usize,
    /// Members of the breaking generation that may still take part in one of its steps.
    pub missing: usize,
    /// Whom members that left the generation name as lost.
    pub named: BTreeSet<WorkerId>,
}

impl Membership {
    /// Looks at all workers.
    pub(super) fn count(&self) -> Counted {
        let runs = |generation| {
            let runs = Activity::Running { generation };
            self.workers.values().filter(|worker| worker.stance.activity == runs).count()
        };
        let (running, missing) = match &self.ring {
            Ring::Alive { formation, .. } => (runs(formation.generation), 0),
            Ring::Breaking { formation, .. } => (0, self.still_in(formation).count()),
            _ => (0, 0),
        };
        Counted { running, missing, named: self.named() }
    }

    /// Whether an event changes nothing but what is known of one worker, at the cost of one look-up however many there
    /// are: it stands where it stood, at most some steps further, or it is one of many members that begin to run, or of many that
    /// leave a ring that breaks. What comes of words about time is for people, and changes nothing either, unless lanes are to be
    /// shared out anew.
    pub(super) fn is_quiet(&mut self, event: &Event, out: &mut Vec<Effect>) -> bool {
        let (worker, stance) = match event {
            Event::Stands { worker, stance } => (worker, stance),
            Event::Reported { step } => {
                self.reached = self.reached.max(*step);
                return !self.is_due();
            }
            Event::Paced { worker, pace } => {
                self.paced(*worker, *pace, out);
                return !self.is_cut_due() && !self.is_due();
            }
            _ => return false,
        };
        if self.is_due() || self.nonsense(stance).is_some() {
            return false;
        }
        let Some(known) = self.workers.get(worker).filter(|known| known.linked) else { return false };
        if stance.leaving != known.stance.leaving
            || stance.written != known.stance.written
            || stance.unwritten != known.stance.unwritten
            || stance.shard != known.stance.shard && stance.activity == known.stance.activity
        {
            return false;
        }
        let is_all = match stance.activity == known.stance.activity {
            true => {
                let running = matches!(stance.activity, Activity::Running { .. });
                // That a learner holds the state is news.
                known.stance.holds == stance.holds || running && known.stance.holds.is_some()
            }
            false => self.is_one_of_many(*worker, known, &stance.activity),
        };
        if is_all {
            self.count_in(*worker, &stance.activity);
            self.note_held(stance.holds);
            let known = self.workers.get_mut(worker).expect("just seen");
            known.heard = self.now;
            known.stance.holds = stance.holds;
            known.stance.shard = stance.shard.clone();
            known.stance.activity = stance.activity.clone();
        }
        is_all
    }

    /// Whether a member does what many do and what many others still have to do, so that nothing follows: it forms or runs, when
    /// told to, or it leaves a ring that breaks.
    fn is_one_of_many(&self, id: WorkerId, known: &Worker, activity: &Activity) -> bool {
        match (&self.ring, activity) {
            // Whoever comes into a ring that is asked to hold is told so.
            (Ring::Alive { formation, changing: None }, _) => {
                let told = known.told.as_ref();
                let told =
                    told.is_some_and(|order| matches!(order, Order::Form(f) if Arc::ptr_eq(f, formation)));
                // One that runs and says that it does not yet is in no right mind.
                let runs = Activity::Running { generation: formation.generation };
                let is_last = *activity == runs && self.counted.running + 1 >= formation.members.len();
                told && known.stance.activity != runs && !is_last && activity.is_in(formation.generation)
            }
            (Ring::Breaking { formation, abort, .. }, Activity::Holding { generation, cause }) => {
                #[cfg(test)]
                if self.planted.is_some() {
                    return false;
                }
                let is_member = *generation == formation.generation && self.seats.contains_key(&id);
                // The first that does not leave by agreement has all others told, and whom it names may be dead by that.
                let is_no_news = abort.is_some() || alive::leaves_together(cause);
                let names = |lost: &WorkerId| self.workers.get(lost).is_some_and(|worker| !worker.linked);
                let buries = matches!(cause, Cause::Broken { lost: Some(lost), .. } if names(lost));
                let is_last = self.counted.missing <= 1;
                is_member && known.may_step_in(*generation) && is_no_news && !buries && !is_last
            }
            _ => false,
        }
    }

    /// Keeps up what was counted when a member, which is connected, comes to do this and nothing else follows.
    fn count_in(&mut self, id: WorkerId, activity: &Activity) {
        let known = &self.workers[&id];
        let Counted { running, missing, named } = &mut self.counted;
        match (&self.ring, activity) {
            (Ring::Alive { .. }, Activity::Running { .. }) if known.stance.activity != *activity => {
                *running += 1
            }
            (Ring::Breaking { .. }, Activity::Holding { generation, cause })
                if known.may_step_in(*generation) =>
            {
                *missing -= 1;
                if let Cause::Broken { lost: Some(lost), .. } = cause {
                    named.insert(*lost);
                }
            }
            _ => {}
        }
    }

    /// Whether something waits for time that has come.
    fn is_due(&self) -> bool {
        self.deadline.is_some_and(|at| self.now >= at)
    }

    /// Whether a hello changes nothing but that one more is known, at the cost of one look-up however many there are: a newcomer
    /// with no state, while there is no ring and too few for one. All that a ring is before it is formed.
    pub(super) fn is_one_of_too_few(&mut self, id: WorkerId, stance: &Stance) -> bool {
        let is_new = !self.workers.contains_key(&id) && *stance == Stance::new(None, Activity::Outside);
        if self.too_few == 0 || self.is_due() || !is_new {
            return false;
        }
        self.too_few -= 1;
        let silent = self.now + self.options.lease;
        self.deadline = Some(self.deadline.map_or(silent, |at| at.min(silent)));
        true
    }

    /// Whether a hello changes nothing but that a member is connected again, at the cost of one look-up however many there are: it
    /// trains, or it has left the ring that breaks, and is not the last to say so; and it has no parts of a checkpoint to speak of. All
    /// that is said to a coordinator that takes a ring up.
    pub(super) fn is_back(&mut self, id: WorkerId, stance: &Stance) -> bool {
        let Stance { activity, written, unwritten, leaving, .. } = stance;
        let Some(known) = self.workers.get(&id).filter(|_| self.seats.contains_key(&id)) else {
            return false;
        };
        let tells_more = *leaving || known.stance.leaving || !written.is_empty() || !unwritten.is_empty();
        if self.is_due() || tells_more || self.nonsense(stance).is_some() {
            return false;
        }
        let is_all = match &self.ring {
            Ring::Alive { formation, changing: None } => {
                let runs = Activity::Running { generation: formation.generation };
                let is_last = self.counted.running + 1 >= formation.members.len();
                *activity == runs
                    && match known.stance.activity == runs {
                        // That a learner holds the state is news.
                        true => known.stance.holds.is_some() == stance.holds.is_some(),
                        false => !is_last,
                    }
            }
            _ => self.is_one_of_many(id, known, activity),
        };
        if is_all {
            self.count_in(id, activity);
        }
        is_all
    }

    /// A connection is closed. Whether that is all: it is that of a member, which may be back soon, and which nobody names as lost.
    pub(super) fn unlinked(&mut self, id: WorkerId) -> bool {
        let is_due = self.is_due();
        let Some(known) = self.workers.get_mut(&id) else { return !is_due };
        let missing = match &self.ring {
            Ring::Breaking { formation, .. } => !known.may_step_in(formation.generation),
            _ => false,
        };
        known.linked = false;
        known.told = None;
        known.told_committed.clear();
        known.asked.clear();
        let is_one = self.seats.contains_key(&id) && !self.counted.named.contains(&id);
        if is_due || !is_one || !matches!(self.ring, Ring::Alive { .. } | Ring::Breaking { .. }) {
            return false;
        }
        self.counted.missing += usize::from(missing);
        true
    }
}

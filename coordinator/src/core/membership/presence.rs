//! Who is here: arrivals, words, and silence.

use super::*;

/// Checkpoints that are remembered as told of: more than workers speak of at a time, which are the newest of each.
const UNWRITTEN_MAX: usize = 64;

/// What a worker cannot say in its right mind.
enum Nonsense {
    /// A step beyond the run's last.
    Step(Step),
    /// A generation that was never formed, as far as is known here.
    Generation(Generation),
}

impl Membership {
    /// Whether an event changes nothing but what is known of one worker, at the cost of one look-up however many there
    /// are: it stands where it stood, at most some steps further, or it is one of many members that begin to run. All
    /// that a ring in good health ever says. The deadline may then be early, never late. What comes of words about time is
    /// for people, and changes nothing either, unless lanes are to be shared out anew. Where something waits for time that has come,
    /// no event is quiet.
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

    /// Somebody is heard to hold this step.
    fn note_held(&mut self, holds: Option<Step>) {
        self.reached = self.reached.max(holds.unwrap_or_default());
        if self.faults.count > 0 && holds > Some(self.faults.at) {
            self.faults = Faults::default();
        }
    }

    /// Whether something waits for time that has come.
    fn is_due(&self) -> bool {
        self.deadline.is_some_and(|at| self.now >= at)
    }

    /// Whether a hello changes nothing but that one more is known, at the cost of one look-up however many there are: a newcomer
    /// with no state, while there is no ring and too few for one. All that a ring is before it is formed. The deadline stays
    /// what it is: it may be early, never late.
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
    /// that is said to a coordinator that takes a ring up. The deadline may then be early, never late.
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

    /// A member says where its time went: one that is slow, or is not any more, is told of.
    fn paced(&mut self, id: WorkerId, pace: Pace, out: &mut Vec<Effect>) {
        let Ring::Alive { formation, .. } = &self.ring else { return };
        for verdict in self.paces.told(formation, id, pace) {
            let (Verdict::Slow(worker, _) | Verdict::InStep(worker)) = verdict;
            let Some(known) = self.workers.get(&worker) else { continue };
            let step = known.stance.holds.unwrap_or(formation.start);
            out.push(Effect::Record(match verdict {
                Verdict::Slow(_, percent) => {
                    Entry::Slow { worker, machine: known.machine.clone(), step, percent }
                }
                Verdict::InStep(_) => Entry::InStep { worker, step },
            }));
        }
    }

    /// A process that slept through its deadline must not take its own silence for that of others: what they said
    /// meanwhile has half a lease to be read. Once a lease, or a machine that is always late would find nobody dead.
    pub(super) fn pass_time(&mut self, now: Millis) {
        let (late, lease) =
            (self.deadline.map_or(Millis(0), |deadline| now.since(deadline)), self.options.lease);
        if late > lease / 8 && self.forgave.is_none_or(|before| now.since(before) > lease) {
            self.forgave = Some(now);
            let heard = Millis(now.0.saturating_sub(lease.0 / 2));
            self.workers.values_mut().for_each(|worker| worker.heard = worker.heard.max(heard));
        }
        self.now = self.now.max(now);
    }

    pub(super) fn linked(
        &mut self,
        id: WorkerId,
        endpoints: Endpoints,
        machine: String,
        stance: Stance,
        out: &mut Vec<Effect>,
    ) {
        if let Some(nonsense) = self.nonsense(&stance) {
            return self.turn_away(id, nonsense, out);
        }
        if self.evicted.contains(&id) && !self.quarantined.contains(&machine) {
            // It was away when the others named it: where it runs is known only now.
            let reason = "its state differed from that of most others".to_owned();
            self.quarantined.insert(machine.clone());
            let (machine, step) = (machine.clone(), stance.holds);
            out.push(Effect::Record(Entry::Evicted { worker: id, machine, step, reason }));
        }
        // A machine's name may be that of many, whose state was compared and found right: they stay when their links come back.
        if self.quarantined.contains(&machine) && !self.knows(id) {
            let reason =
                format!("machine {machine} is quarantined: a worker's state there differed from all others'");
            let order = Order::Leave { why: Leave::Evicted { reason } };
            out.push(Effect::Send { worker: id, epoch: self.epoch, order });
            return;
        }
        let arrival = self.workers.get(&id).map_or(self.arrivals, |known| known.arrival);
        if !self.workers.contains_key(&id) {
            self.arrivals += 1;
            out.push(Effect::Record(Entry::Joined { worker: id, machine: machine.clone() }));
        }
        let heard = self.now;
        let worker = Worker {
            endpoints,
            machine,
            linked: true,
            heard,
            arrival,
            stance,
            told: None,
            told_committed: BTreeSet::new(),
            asked: BTreeSet::new(),
        };
        let stance = worker.stance.clone();
        self.workers.insert(id, worker);
        self.stands(id, stance, out);
    }

    /// What of a stance cannot be, however late it comes and whatever was lost on the way.
    fn nonsense(&self, stance: &Stance) -> Option<Nonsense> {
        let total = self.options.total;
        let written = stance.written.iter();
        let unwritten = stance.unwritten.iter();
        let steps = written.clone().map(|written| written.step);
        let steps = steps.chain(unwritten.clone().map(|unwritten| unwritten.step));
        let step = stance.holds.into_iter().chain(steps).max();
        if let Some(step) = step.filter(|step| *step > total) {
            return Some(Nonsense::Step(step));
        }
        let spoken_of = stance.activity.generation().into_iter();
        let mut generations = spoken_of
            .chain(written.map(|written| written.generation))
            .chain(unwritten.map(|unwritten| unwritten.generation));
        // Nobody has heard of one that is not in the log yet.
        let unheard = u64::from(matches!(self.ring, Ring::Recording(_)));
        let known = Generation(1)..=Generation(self.generation.0 - unheard);
        generations.find(|generation| !known.contains(generation)).map(Nonsense::Generation)
    }

    /// Has nothing to do with a worker that says what cannot be. What was known of it goes with its lease.
    fn turn_away(&mut self, id: WorkerId, nonsense: Nonsense, out: &mut Vec<Effect>) {
        if let Some(known) = self.workers.get_mut(&id) {
            known.linked = false;
        }
        let reason = match nonsense {
            Nonsense::Step(step) => {
                let total = self.options.total;
                format!("it speaks of step {step}, and the run has {total}; start workers of this run")
            }
            // It may be this coordinator that knows too little. The worker tries again, and finds the one that does.
            Nonsense::Generation(generation) => {
                let newest = self.generation;
                format!(
                    "it speaks of generation {generation}, of which nobody was told; the newest here is {newest}"
                )
            }
        };
        if matches!(nonsense, Nonsense::Step(_)) {
            let order = Order::Leave { why: Leave::Refused { reason: reason.clone() } };
            out.push(Effect::Send { worker: id, epoch: self.epoch, order });
        }
        out.push(Effect::Drop { worker: id, reason });
    }

    pub(super) fn stands(&mut self, id: WorkerId, stance: Stance, out: &mut Vec<Effect>) {
        if self.workers.get(&id).is_none_or(|worker| !worker.linked) {
            return;
        }
        if let Some(nonsense) = self.nonsense(&stance) {
            return self.turn_away(id, nonsense, out);
        }
        // The ring that found it out may be gone, with all others of it.
        if let Activity::Holding { generation, cause: Cause::Diverged { workers, reason } } = &stance.activity
            && workers.contains(&id)
            && self.formation().is_none_or(|formation| formation.generation != *generation)
        {
            return self.send_away(id, reason, out);
        }
        let worker = self.workers.get_mut(&id).expect("just seen");
        worker.heard = self.now;
        self.note_held(stance.holds);
        for written in &stance.written {
            if let Some(commit) = self.checkpoints.written(id, written) {
                out.push(commit);
            }
        }
        self.note_unwritten(id, &stance, out);
        let worker = self.workers.get_mut(&id).expect("just seen");
        worker.stance = stance;
    }

    /// A worker could not write its parts of a checkpoint: the first that says so of one is put on record.
    fn note_unwritten(&mut self, id: WorkerId, stance: &Stance, out: &mut Vec<Effect>) {
        for Unwritten { step, generation, reason } in &stance.unwritten {
            if self.checkpoints.has(*step) || !self.unwritten.insert((*step, *generation)) {
                continue;
            }
            let machine = &self.workers[&id].machine;
            let reason = format!("worker {id} on {machine} could not write its parts: {reason}");
            out.push(Effect::Record(Entry::CheckpointFailed { step: *step, reason }));
            while self.unwritten.len() > UNWRITTEN_MAX {
                self.unwritten.pop_first();
            }
        }
    }

    /// A worker ends by itself: nobody waits for its connection to close, and the log has why.
    pub(super) fn failed(&mut self, id: WorkerId, reason: &str, out: &mut Vec<Effect>) {
        let Some(worker) = self.workers.remove(&id) else { return };
        self.remember(id, &worker);
        if !matches!(self.ring, Ring::Over(_)) {
            let reason = format!("it failed: {reason}");
            out.push(Effect::Record(Entry::Lost { worker: id, step: worker.stance.holds, reason }));
        }
    }

    /// Whom members that left the generation name as lost.
    pub(super) fn named(&self) -> BTreeSet<WorkerId> {
        let Some(formation) = self.formation() else { return BTreeSet::new() };
        let lost = |worker: &Worker| match worker.stance.activity {
            Activity::Holding { cause: Cause::Broken { lost, .. }, generation }
                if generation == formation.generation =>
            {
                lost
            }
            _ => None,
        };
        self.workers.values().filter_map(lost).collect()
    }

    /// Removes those that were silent for a lease, and those that left no trace worth waiting for.
    pub(super) fn expire(&mut self, out: &mut Vec<Effect>) {
        let (now, lease) = (self.now, self.options.lease);
        let generation = self.formation().map(|formation| formation.generation);
        // Between two rings too, what the others lack may be with one whose connection is cut.
        let in_ring = |id| {
            let shares = || self.workers.get(id).is_some_and(|worker| worker.stance.shard.is_some());
            self.seats.contains_key(id) && (generation.is_some() || shares())
        };
        // A member whose connection is closed and whom a peer names as lost is dead: no time-out is needed.
        let named = self.named();
        let mut gone = Vec::new();
        for (id, worker) in &self.workers {
            let silent = now.since(worker.heard) >= lease;
            let reason = match (worker.linked, silent, in_ring(id)) {
                (_, true, _) => format!("silent for {lease}"),
                (false, false, false) => "it closed its connection".to_owned(),
                (false, false, true) if named.contains(id) => {
                    "it closed its connections to the coordinator and to its peers".to_owned()
                }
                _ => continue,
            };
            gone.push((*id, reason));
        }
        for (id, reason) in gone {
            let worker = self.workers.remove(&id).expect("just seen");
            self.remember(id, &worker);
            if worker.linked {
                out.push(Effect::Drop { worker: id, reason: reason.clone() });
            }
            if !matches!(self.ring, Ring::Over(_)) {
                out.push(Effect::Record(Entry::Lost { worker: id, step: worker.stance.holds, reason }));
            }
        }
    }
}

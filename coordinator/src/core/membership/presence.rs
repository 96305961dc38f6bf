//! Who is here: arrivals, words, and silence.

use super::*;

/// Checkpoints that are remembered as told of: more than workers speak of at a time, which are the newest of each.
const UNWRITTEN_MAX: usize = 64;

/// What a worker cannot say in its right mind.
pub(super) enum Nonsense {
    /// A step beyond the run's last.
    Step(Step),
    /// A generation that was never formed, as far as is known here.
    Generation(Generation),
}

impl Membership {
    /// A member says where its time went: one that is slow, or is not any more, is told of.
    pub(super) fn paced(&mut self, id: WorkerId, pace: Pace, out: &mut Vec<Effect>) {
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
    pub(super) fn nonsense(&self, stance: &Stance) -> Option<Nonsense> {
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

    /// Somebody is heard to hold this step.
    pub(super) fn note_held(&mut self, holds: Option<Step>) {
        self.reached = self.reached.max(holds.unwrap_or_default());
        if self.faults.count > 0 && holds > Some(self.faults.at) {
            self.faults = Faults::default();
        }
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

//! A generation that lives, and one that ends.

use super::*;

/// How a member begins to say that it left because it was told to.
const ABORTED: &str = "aborted: ";

impl Membership {
    /// A living generation: does it break, or is a change due?
    pub(super) fn watch(&self, formation: &Arc<Formation>, changing: Option<&Change>) -> Option<Ring> {
        let generation = formation.generation;
        let stance = |member: &Member| self.workers.get(&member.worker).map(|worker| &worker.stance);
        let held = |member: &Member| match stance(member).map(|stance| &stance.activity) {
            Some(Activity::Holding { generation: of, cause }) if *of == generation => Some(cause.clone()),
            _ => None,
        };
        let gone: Vec<WorkerId> =
            formation.members.iter().map(|m| m.worker).filter(|id| !self.workers.contains_key(id)).collect();
        let causes: Vec<Cause> = formation.members.iter().filter_map(held).collect();
        // A member that has not taken it up holds more than this generation starts from: it must start later.
        let ahead = causes.is_empty()
            && matches!(formation.source, Source::Peers { .. })
            && formation
                .members
                .iter()
                .filter_map(stance)
                .any(|stance| !stance.activity.is_in(generation) && stance.holds > Some(formation.start));
        if gone.is_empty() && causes.is_empty() && !ahead && self.goal != Goal::Cancel {
            let all_run = formation
                .members
                .iter()
                .all(|m| stance(m).is_some_and(|s| s.activity == Activity::Running { generation }));
            let change = self.change(formation).filter(|change| all_run && changing != Some(change))?;
            // Once asked for, a checkpoint stays asked for.
            let save = change.save || changing.is_some_and(|before| before.save);
            let change = Change { save, ..change };
            let change = Some(change).filter(|change| changing != Some(change))?;
            return Some(Ring::Alive { formation: formation.clone(), changing: Some(change) });
        }
        let told = |member| stance(member).is_some_and(|s| s.activity.generation() >= Some(generation));
        let planned = gone.is_empty()
            && !ahead
            && self.goal != Goal::Cancel
            && formation.members.iter().all(told)
            && causes.iter().all(leaves_together);
        let reason = match (gone.first(), &self.goal) {
            (Some(worker), _) => format!("worker {worker} is lost"),
            (None, Goal::Cancel) => "the job is cancelled".to_owned(),
            (None, _) => "a member has left the ring".to_owned(),
        };
        let abort = (!planned).then_some(reason);
        Some(Ring::Breaking { formation: formation.clone(), abort, blameless: !gone.is_empty() })
    }

    /// Members of a generation that may still take part in one of its steps, as far as this coordinator knows.
    pub(super) fn still_in(&self, formation: &Formation) -> impl Iterator<Item = WorkerId> {
        let generation = formation.generation;
        let members = formation.members.iter().map(|member| member.worker);
        members.filter(move |id| self.workers.get(id).is_some_and(|worker| worker.may_step_in(generation)))
    }

    /// A generation that is over: is a word still missing?
    pub(super) fn settle(
        &self,
        formation: &Arc<Formation>,
        abort: Option<&String>,
        blameless: bool,
    ) -> Option<Ring> {
        let generation = formation.generation;
        let missing = self.still_in(formation).count();
        #[cfg(test)]
        let missing = if self.planted == Some(Bug::LostVote) { missing.saturating_sub(1) } else { missing };
        if missing == 0 {
            return Some(Ring::Gathering { since: self.now, listing: Listing::Old });
        }
        // A hold that was planned and broke after all: the others must be told.
        let broke = self.held(generation).any(|(_, _, cause)| !leaves_together(cause));
        let lost = self.has_lost_one(formation);
        let abort =
            abort.cloned().or_else(|| (broke || lost).then(|| "a member has left the ring".to_owned()));
        let now = Ring::Breaking { formation: formation.clone(), abort, blameless: blameless || lost };
        (now != self.ring).then_some(now)
    }

    /// Who has said that it holds after this generation: with the steps that it has, and why.
    fn held(&self, generation: Generation) -> impl Iterator<Item = (WorkerId, Option<Step>, &Cause)> {
        self.workers.iter().filter_map(move |(id, worker)| match &worker.stance.activity {
            Activity::Holding { generation: of, cause } if *of == generation => {
                Some((*id, worker.stance.holds, cause))
            }
            _ => None,
        })
    }

    fn has_lost_one(&self, formation: &Formation) -> bool {
        formation.members.iter().any(|member| !self.workers.contains_key(&member.worker))
    }

    /// A ring that ended though nobody died, was at fault or is out of reach, as when one of two networks fails: the log says why.
    fn note_break(&self, formation: &Formation, out: &mut Vec<Effect>) {
        let generation = formation.generation;
        if self.has_lost_one(formation) {
            return;
        }
        let mut broke = None;
        for (worker, step, cause) in self.held(generation) {
            match cause {
                Cause::Broken { reason, .. } if reason.starts_with(ABORTED) => {}
                Cause::Broken { reason, .. } => {
                    broke.get_or_insert((worker, step, reason.clone()));
                }
                Cause::Ordered | Cause::Ended => {}
                // That is what the log says.
                Cause::Unreachable { .. }
                | Cause::NoState { .. }
                | Cause::Diverged { .. }
                | Cause::Fault { .. } => {
                    return;
                }
            }
        }
        if let Some((worker, step, reason)) = broke {
            out.push(Effect::Record(Entry::Broke { worker, generation, step, reason }));
        }
    }

    /// After a generation's end: a failure that no death explains is counted, and the second distrusts held state.
    pub(super) fn judge(&mut self, formation: &Formation, blameless: bool, out: &mut Vec<Effect>) {
        self.judge_replicas(formation, out);
        self.note_rifts(formation, out);
        let generation = formation.generation;
        let fault = self.held(generation).find_map(|(worker, holds, cause)| match cause {
            Cause::NoState { reason } | Cause::Fault { reason } => Some((worker, holds, reason.clone())),
            _ => None,
        });
        // The word that came last may be of the fault, or of a death.
        let blameless = blameless || self.has_lost_one(formation);
        let Some((worker, holds, reason)) = fault.filter(|_| !blameless) else {
            return self.note_break(formation, out);
        };
        if let Source::Checkpoint { step } = formation.source
            && self.held(generation).any(|(_, _, cause)| matches!(cause, Cause::NoState { .. }))
        {
            // It is the checkpoint's fault, and the one before it comes next.
            self.checkpoints.distrust(step);
            out.push(Effect::Record(Entry::PassedOver { step, reason }));
            return;
        }
        let at = self.newest_held().unwrap_or(formation.start);
        let count = if self.faults.at == at { self.faults.count + 1 } else { 1 };
        let differ = self.faults.at == at && self.faults.differ;
        self.faults = Faults { at, count, distrust: count >= 2 || differ, differ };
        if count > self.options.faults_max {
            let reason = format!("step {at} has failed {count} times: {reason}");
            self.over(Outcome::Failed { reason }, out);
        } else {
            out.push(Effect::Record(Entry::Broke { worker, generation, step: holds, reason }));
        }
    }

    /// Replicas that differed: whoever the members name is sent away for good. They all have the same hashes to judge by,
    /// so one verdict is enough, and two that differ are none. Where nobody can tell who is right, what workers hold is
    /// not used.
    fn judge_replicas(&mut self, formation: &Formation, out: &mut Vec<Effect>) {
        let (mut verdicts, mut told) = (BTreeSet::new(), None);
        for worker in self.workers.values() {
            if let Activity::Holding { generation, cause: Cause::Diverged { workers, reason } } =
                &worker.stance.activity
                && *generation == formation.generation
            {
                told = Some(reason.clone());
                verdicts.insert(workers.clone());
            }
        }
        let Some(reason) = told else { return };
        let named = if verdicts.len() == 1 { verdicts.pop_first().unwrap_or_default() } else { Vec::new() };
        if named.is_empty() {
            let at = self.newest_held().unwrap_or(formation.start);
            let count = if self.faults.at == at { self.faults.count + 1 } else { 1 };
            self.faults = Faults { at, count, distrust: true, differ: true };
            if count > self.options.faults_max {
                self.over(Outcome::Failed { reason: format!("after step {at}: {reason}") }, out);
            } else {
                out.push(Effect::Record(Entry::FellBack { step: at, reason }));
            }
            return;
        }
        #[cfg(test)]
        if self.planted == Some(Bug::KeptReplica) {
            return;
        }
        for id in named.into_iter().filter(|id| formation.member(*id).is_some()) {
            self.send_away(id, &reason, out);
        }
    }

    /// A worker whose state differs from all others' goes, for good. One that is away is told when it comes, and where it runs is
    /// known then, or never.
    pub(super) fn send_away(&mut self, id: WorkerId, reason: &str, out: &mut Vec<Effect>) {
        if !self.evicted.insert(id) {
            return;
        }
        let (mut machine, mut step) = (String::new(), None);
        if let Some(worker) = self.workers.remove(&id) {
            self.remember(id, &worker);
            let why = Leave::Evicted { reason: reason.to_owned() };
            out.push(Effect::Send { worker: id, epoch: self.epoch, order: Order::Leave { why } });
            (machine, step) = (worker.machine, worker.stance.holds);
        }
        if !machine.is_empty() {
            self.quarantined.insert(machine.clone());
        }
        out.push(Effect::Record(Entry::Evicted { worker: id, machine, step, reason: reason.to_owned() }));
    }

    /// What a ring that runs well should hold for.
    pub(super) fn change(&self, formation: &Formation) -> Option<Change> {
        let leaves =
            |member: &&Member| self.workers.get(&member.worker).is_some_and(|worker| worker.stance.leaving);
        let room = self.options.desired.min(self.options.lanes) as usize;
        let trainers = formation.trainers();
        let (learners, holds) = (&formation.members[trainers..], |member: &Member| {
            self.workers.get(&member.worker).is_some_and(|worker| worker.stance.holds.is_some())
        });
        // A boundary before they hold the state would have them begin anew.
        let learning = !learners.iter().all(holds);
        let joiners = self.candidates().iter().filter(|id| !self.seats.contains_key(id)).count();
        let members = formation.members.len();
        // Who is the last to hold the state hands it over before it goes.
        let hands_over = learning && formation.members[..trainers].iter().all(|member| leaves(&member));
        let leaving = formation.members.iter().find(leaves).filter(|_| !hands_over);
        let staying = members - formation.members.iter().filter(leaves).count();
        // Who holds with a checkpoint has written its parts: those that are all there are only to be committed.
        let wanted = self.wanted.is_some_and(|step| !self.checkpoints.is_complete_from(step));
        let (save, why) = if self.goal == Goal::Pause {
            (true, "take a checkpoint and pause".to_owned())
        } else if let Some(member) = leaving {
            (false, format!("let worker {} go", member.worker))
        } else if joiners > 0 && members < room && !learning {
            (false, format!("take in {} more", joiners.min(room - members)))
        } else if staying > room {
            (false, format!("scale down to {room}"))
        } else if wanted {
            (true, "take a checkpoint".to_owned())
        } else if !learners.is_empty() && !learning {
            (false, format!("give lanes to {} more", learners.len()))
        } else if self.is_cut_due() && !learning {
            (false, "share the lanes out by speed".to_owned())
        } else {
            return None;
        };
        Some(Change { save: save || wanted, why })
    }
}

impl Worker {
    /// Whether a member of a generation may still take part in one of its steps. One that is not connected may be in it whatever it
    /// last said, and to one that has not answered yet the order to form may be on its way.
    pub(super) fn may_step_in(&self, generation: Generation) -> bool {
        let activity = &self.stance.activity;
        !self.linked || activity.generation() < Some(generation) || activity.is_in(generation)
    }
}

/// Causes for which all members leave by themselves at the same boundary, so that nobody has to be told.
pub(super) fn leaves_together(cause: &Cause) -> bool {
    matches!(cause, Cause::Ordered | Cause::Ended | Cause::Diverged { .. })
}

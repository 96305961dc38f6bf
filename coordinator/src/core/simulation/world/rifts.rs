//! Two workers between whom nothing gets through, though both reach the coordinator.

use super::*;

/// What is between two workers: nothing gets through from its beginning to its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rift {
    pub(super) since: u64,
    pub(super) until: u64,
}

impl World {
    /// What is between them now, if anything.
    fn rift(&self, one: WorkerId, other: WorkerId) -> Option<&Rift> {
        self.rifts.get(&(one.min(other), one.max(other))).filter(|rift| rift.until > self.now)
    }

    /// Whether nothing gets through between them now.
    pub(super) fn are_apart(&self, one: WorkerId, other: WorkerId) -> bool {
        self.rift(one, other).is_some()
    }

    /// Members that a worker does not reach now.
    fn apart_from(&self, worker: WorkerId, formation: &Formation) -> Vec<WorkerId> {
        let peers = formation.members.iter().map(|member| member.worker);
        peers.filter(|peer| self.workers.contains_key(peer) && self.are_apart(worker, *peer)).collect()
    }

    /// Whether a member of a ring does not reach another: nothing that takes all of them gets on.
    pub(super) fn is_torn(&self, generation: Generation) -> bool {
        let formation = &self.rings[&generation].formation;
        formation.members.iter().any(|member| !self.apart_from(member.worker, formation).is_empty())
    }

    /// From now on nothing gets through between two workers: for a while, or, where one of them is enough, for good.
    pub(super) fn tear(&mut self, one: WorkerId, other: WorkerId) {
        self.report.rifts += 1;
        let length = 200 + self.below(4000);
        let until = match self.options.min == 1 && self.chance(4) {
            true => u64::MAX,
            false => self.now + length,
        };
        self.tear_until(one, other, until);
        for worker in [one, other] {
            self.await_answers(worker);
        }
    }

    fn tear_until(&mut self, one: WorkerId, other: WorkerId, until: u64) {
        let since = self.rift(one, other).map_or(self.now, |rift| rift.since);
        self.rifts.insert((one.min(other), one.max(other)), Rift { since, until });
    }

    /// The network is cut in two: from now on nothing gets through between those of one half and those of the other.
    pub(super) fn halve(&mut self) {
        self.report.halves += 1;
        let ids: Vec<WorkerId> = self.workers.keys().copied().collect();
        let (here, there): (Vec<WorkerId>, Vec<WorkerId>) = ids.iter().copied().partition(|_| self.chance(2));
        let until = match self.options.min == 1 && self.chance(4) {
            true => u64::MAX,
            false => self.now + 500 + self.below(6000),
        };
        here.iter().for_each(|one| there.iter().for_each(|other| self.tear_until(*one, *other, until)));
        ids.into_iter().for_each(|worker| self.await_answers(worker));
    }

    /// Members of which a worker has heard nothing for half of what it takes to give one up.
    pub(super) fn unheard(&self, worker: WorkerId, formation: &Formation) -> Vec<WorkerId> {
        let formed = self.workers[&worker].ring_since;
        let is_old = |peer: &WorkerId| {
            let since = self.rift(worker, *peer).map_or(self.now, |rift| rift.since);
            self.now >= since.max(formed) + SILENCE / 2
        };
        self.apart_from(worker, formation).into_iter().filter(is_old).collect()
    }

    /// A worker is in a ring: of members that it does not reach it says so, in a while.
    pub(super) fn await_answers(&mut self, worker: WorkerId) {
        let Some(generation) = self.workers[&worker].ring else { return };
        let formation = self.rings[&generation].formation.clone();
        for peer in self.apart_from(worker, &formation) {
            let delay = SILENCE + self.below(1000);
            self.after(delay, Happening::Unanswered { worker, generation, peer });
        }
    }

    pub(super) fn unanswered(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        peer: WorkerId,
    ) -> Result<(), String> {
        let known = &self.workers[&worker];
        if known.ring != Some(generation) || !self.are_apart(worker, peer) {
            return Ok(());
        }
        if known.applying {
            self.after(2, Happening::Unanswered { worker, generation, peer });
            return Ok(());
        }
        let peers = std::iter::once(peer).collect();
        self.leave_ring(worker, Cause::Unreachable { peers, reason: "no answer".to_owned() })
    }
}

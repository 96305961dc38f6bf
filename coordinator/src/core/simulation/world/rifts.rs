//! Two workers between whom nothing gets through, though both reach the coordinator.

use super::*;

impl World {
    /// Whether nothing gets through between them now.
    pub(super) fn are_apart(&self, one: WorkerId, other: WorkerId) -> bool {
        self.rifts.get(&(one.min(other), one.max(other))).is_some_and(|until| *until > self.now)
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
        self.rifts.insert((one.min(other), one.max(other)), until);
        for worker in [one, other] {
            self.await_answers(worker);
        }
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
        self.leave_ring(worker, Cause::Unreachable { peer, reason: "no answer".to_owned() })
    }
}

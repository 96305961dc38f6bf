//! Second copies of a checkpoint's blocks: who is asked to write what it keeps, and what a run's end waits for.
//!
//! A member that is gone may have left blocks unwritten, or told nobody that it wrote them; one that is here may have given
//! them up. Whoever keeps a copy writes it when asked, in a ring or out of it, and is not sent away before. So a checkpoint
//! that is due is left out only when all copies of one of its blocks are gone.

use super::*;

impl Membership {
    /// Whether all steps are applied, and the checkpoint after the last is committed.
    pub(super) fn is_trained(&self) -> bool {
        self.checkpoints.newest() == Some(self.options.total)
    }

    /// Whether nothing is left to be trained: what is missing of a checkpoint then is missing for good, though its owner
    /// may live.
    fn comes_to_its_end(&self) -> bool {
        let saved = self.newest_held() <= self.checkpoints.newest();
        matches!(self.ring, Ring::Gathering { .. })
            && (self.is_trained() || self.goal == Goal::Pause && saved)
    }

    /// Second copies, kept by workers that are connected, of blocks that a checkpoint lacks and that nobody else is going to
    /// write.
    fn needed_copies(&self) -> impl Iterator<Item = (WorkerId, Step, Generation)> {
        let ends = self.comes_to_its_end();
        let linked = self.workers.iter().filter(|(_, worker)| worker.linked);
        linked.flat_map(move |(id, worker)| {
            let needed = move |written: &&Written| {
                let gave_up = |owner: &Worker| {
                    let of = |other: &Unwritten| (other.step, other.generation);
                    owner.stance.unwritten.iter().any(|other| of(other) == (written.step, written.generation))
                };
                written.kept.as_ref().is_some_and(|kept| {
                    (ends || self.workers.get(&kept.owner).is_none_or(gave_up))
                        && self.checkpoints.lacks(written.step, written.generation, &kept.blocks)
                })
            };
            worker.stance.written.iter().filter(needed).map(|written| (*id, written.step, written.generation))
        })
    }

    /// Asks for the copies that are needed, once over a connection.
    pub(super) fn ask_for_copies(&mut self, out: &mut Vec<Effect>) {
        if matches!(self.ring, Ring::Over(_)) {
            return;
        }
        let needed: Vec<_> = self.needed_copies().collect();
        for (id, step, generation) in needed {
            let worker = self.workers.get_mut(&id).expect("just seen");
            if worker.asked.insert((step, generation)) {
                let order = Order::WriteKept { step, generation };
                out.push(Effect::Send { worker: id, epoch: self.epoch, order });
            }
        }
    }

    /// The checkpoint that the run's end waits for, since `since`: its manifest is on its way, someone who is here writes a
    /// copy, or someone who keeps one may still come. The last is waited for as the first workers are.
    pub(super) fn late_checkpoint(&self, since: Millis) -> Option<Step> {
        #[cfg(test)]
        if self.planted == Some(Bug::AbandonedCheckpoint) {
            return None;
        }
        let on_its_way = self.checkpoints.unfinished().find(|step| self.checkpoints.is_complete(*step));
        let being_written = || self.needed_copies().map(|(_, step, _)| step).next();
        let patient = self.now < since + self.options.gather;
        let hoped_for = || self.checkpoints.unfinished().next().filter(|_| patient);
        on_its_way.or_else(being_written).or_else(hoped_for)
    }
}

impl Worker {
    /// Whether it was asked for a copy that it still keeps.
    pub(super) fn owes_a_copy(&self) -> bool {
        self.stance
            .written
            .iter()
            .any(|written| written.kept.is_some() && self.asked.contains(&(written.step, written.generation)))
    }
}

//! The figures of the steps: from whoever applied them, or took the state, by a coordinator, into the store.

use super::*;

impl World {
    /// A worker has the figures of a step that it has applied.
    pub(super) fn has_figures(&mut self, worker: WorkerId, step: Step) {
        let known = self.workers.get_mut(&worker).expect("known");
        let to_tell = known.rows.applied(step.0, step.0).copied();
        self.tell_rows(worker, to_tell.into_iter().collect());
    }

    /// It says them, as far as its connection has room.
    pub(super) fn tell_rows(&mut self, worker: WorkerId, mut steps: Vec<u64>) {
        if self.chaos() && steps.len() > 1 && self.chance(4) {
            steps.truncate(1);
        }
        let delay = self.latency();
        let known = self.workers.get_mut(&worker).expect("known");
        let Some((coordinator, link)) = known.link.filter(|_| !steps.is_empty()) else { return };
        if known.mute_until <= self.now {
            known.sent_up = known.sent_up.max(self.now + delay);
            let (at, message) = (known.sent_up, Happening::Rows { coordinator, link, worker, steps });
            if self.says_twice() {
                self.at(at, message.clone());
            }
            self.at(at, message);
        }
    }

    /// Whoever takes the state after `end` from members of its ring takes their figures with it. False: nobody is there any more to
    /// take them from.
    pub(super) fn takes_rows(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        end: Step,
    ) -> Result<bool, String> {
        let first = self.workers[&worker].rows.known();
        let holders = self.workers.iter().filter(|(id, peer)| {
            **id != worker && peer.ring == Some(generation) && peer.state.is_some_and(|(at, _)| at >= end)
        });
        let mut taken = None;
        for (holder, peer) in holders {
            let had =
                peer.rows.between(first, end.0).map(|(durable, rows)| (durable, rows.copied().collect()));
            let had: (u64, Vec<u64>) = had.ok_or_else(|| {
                format!(
                    "worker {holder} holds the state after step {end}, and lacks figures of steps before it"
                )
            })?;
            taken = Some(had);
        }
        let Some((durable, rows)) = taken else { return Ok(false) };
        self.report.taken += rows.len() as u64;
        let known = self.workers.get_mut(&worker).expect("known");
        let to_tell = known.rows.took(durable, rows.into_iter().map(|step| (step, step)).collect());
        let to_tell = to_tell.copied().collect();
        self.tell_rows(worker, to_tell);
        Ok(true)
    }

    /// The figures that a coordinator finds in the store.
    pub(super) fn found_rows(&self) -> Rows<Generation> {
        let rows = self.metrics.last().map_or(0, |last| last + 1);
        let checkpoint = self.manifests.last_key_value().map_or(0, |(step, _)| step.0);
        Rows::new(rows.max(checkpoint), self.options.lease)
    }

    /// Tells a worker which figures a coordinator has: a second time over one connection, that asks for others.
    pub(super) fn welcome(&mut self, coordinator: usize, worker: WorkerId) {
        let reported = self.coordinators[coordinator].rows.reported();
        self.send_down(coordinator, worker, |link| Happening::Welcome { worker, link, reported });
    }

    pub(super) fn welcomed(&mut self, worker: WorkerId, link: u64, reported: u64) {
        let known = self.workers.get_mut(&worker).expect("known");
        if known.link.is_some_and(|(_, id)| id == link) {
            let to_tell = known.rows.welcomed(reported).copied().collect();
            self.tell_rows(worker, to_tell);
        }
    }

    pub(super) fn told_rows(&mut self, coordinator: usize, steps: Vec<u64>) -> Result<(), String> {
        for step in steps {
            if self.coordinators[coordinator].rows.take(step) {
                self.coordinators[coordinator].unwritten.insert(step);
                self.tell_core(coordinator, Event::Reported { step: Step(step + 1) })?;
            }
        }
        // Some of them are written now and then, without a checkpoint.
        if self.coordinators[coordinator].epoch == self.epoch && self.chance(16) {
            self.write_rows(coordinator);
        }
        Ok(())
    }

    pub(super) fn write_rows(&mut self, coordinator: usize) {
        self.metrics.append(&mut self.coordinators[coordinator].unwritten);
    }

    /// Asks for figures that are missing, and commits the checkpoints that lack none.
    pub(super) fn look_for_rows(&mut self, coordinator: usize) -> Result<(), String> {
        let now = Millis(self.now);
        let known = &mut self.coordinators[coordinator];
        if !known.alive {
            return Ok(());
        }
        let held = || known.core.held_here().unwrap_or_default().0;
        let Look { ask, lost, withdrawn, ready } = known.rows.look(now, known.links.keys().copied(), held);
        if let Some(steps) = lost {
            figures_are_somewhere(steps, &self.metrics)?;
        }
        for step in withdrawn {
            self.tell_core(coordinator, Event::Withdrawn { step: Step(step) })?;
        }
        for worker in ask {
            self.report.asked += 1;
            self.welcome(coordinator, worker);
        }
        for (step, generation) in ready {
            let delay = 1 + self.below(30);
            self.after(delay, Happening::Commit { coordinator, step: Step(step), generation });
        }
        Ok(())
    }
}

//! Chaos, and the launcher that mends.

use super::*;

impl World {
    /// Keeps as many processes as are wanted.
    pub(super) fn launch(&mut self) {
        let wanted = u64::from(self.options.desired);
        if (self.workers.len() as u64) < wanted {
            self.next_worker += 1;
            let worker = WorkerId(self.next_worker);
            self.workers.insert(
                worker,
                Worker {
                    machine: Machine::new(None),
                    state: None,
                    moments: BTreeSet::new(),
                    pending: None,
                    rows: KeptRows::default(),
                    link: None,
                    sent_up: 0,
                    sent_down: 0,
                    frozen_until: 0,
                    mute_until: 0,
                    ring: None,
                    ring_since: 0,
                    hold: 0,
                    applying: false,
                    kept: Vec::new(),
                    writes_until: 0,
                    told: Told::default(),
                },
            );
            let delay = self.below(30);
            self.after(delay, Happening::Connect { worker });
            self.after(HEARTBEAT, Happening::Heartbeat { worker });
        }
        let delay = 20 + self.below(80);
        self.after(delay, Happening::Launch);
    }

    pub(super) fn wreak(&mut self) -> Result<(), String> {
        if !self.chaos() {
            // The last fault is over: there is a coordinator, and one that hears.
            if !self.coordinators.iter().any(|coordinator| coordinator.alive) {
                self.after(50, Happening::StartCoordinator);
            }
            return Ok(());
        }
        let delay = 20 + self.below(180);
        self.after(delay, Happening::Chaos);
        let ids: Vec<WorkerId> = self.workers.keys().copied().collect();
        let Some(&victim) = ids.get(self.below(ids.len().max(1) as u64) as usize) else { return Ok(()) };
        if self.flips_left > 0 && self.flips.is_none() && mix(self.now, victim.0).is_multiple_of(8) {
            self.flips_left -= 1;
            self.flips = Some(victim);
        }
        match self.below(15) {
            0 | 1 => self.kill(victim),
            // Not while it is frozen: what waits for its thaw comes in its order.
            2 if self.workers[&victim].frozen_until <= self.now => {
                self.report.freezes += 1;
                let length = 50 + self.below(2500);
                self.workers.get_mut(&victim).expect("known").frozen_until = self.now + length;
            }
            3 => {
                self.report.cuts += 1;
                self.cut(victim);
            }
            4 => {
                // Nothing gets through, for longer than the lease at times; then the link turns out to be dead.
                self.report.mutes += 1;
                let length = 100 + self.below(1800);
                let known = self.workers.get_mut(&victim).expect("known");
                known.mute_until = self.now + length;
                if let Some((coordinator, link)) = known.link {
                    self.after(length, Happening::ClosedAtCoordinator { coordinator, link, worker: victim });
                    self.after(length, Happening::ClosedAtWorker { worker: victim, link });
                }
            }
            5 => {
                self.report.preemptions += 1;
                self.after(0, Happening::Terminate { worker: victim });
            }
            6 => {
                if let Some(index) = self.coordinators.iter().rposition(|coordinator| coordinator.alive) {
                    self.report.coordinator_crashes += 1;
                    self.stop_coordinator(index);
                    let delay = 50 + self.below(1500);
                    self.after(delay, Happening::StartCoordinator);
                }
            }
            7 => {
                self.report.stale_coordinators += 1;
                self.after(0, Happening::StartCoordinator);
            }
            8 => {
                // Two peers lose their connection; both are well.
                if let Some(generation) = self.workers[&victim].ring {
                    self.tell_peers(generation, victim);
                    self.after(1, Happening::PeerLost { worker: victim, generation, lost: ids[0] });
                }
            }
            9 if self.faults_left > 0 && self.workers[&victim].ring.is_some() => {
                let running =
                    matches!(self.workers[&victim].machine.stance().activity, Activity::Running { .. });
                if running && self.workers[&victim].frozen_until <= self.now {
                    self.faults_left -= 1;
                    self.report.faults += 1;
                    let cause = Cause::Fault { reason: "the replicas differ".to_owned() };
                    return self.leave_ring(victim, cause);
                }
            }
            10 => {
                let readable: Vec<Step> =
                    self.manifests.keys().filter(|step| !self.unreadable.contains(step)).copied().collect();
                if readable.len() > 1 {
                    self.report.unreadable += 1;
                    self.unreadable.insert(readable[readable.len() - 1]);
                }
            }
            11 => {
                if let Some(index) = self.coordinators.iter().rposition(|coordinator| coordinator.alive) {
                    let event = match self.chance(3) {
                        true => Event::Goal(Goal::Pause),
                        false => {
                            let before = self.options.desired;
                            self.options.desired = (1 + self.below(5) as u32).max(self.options.min);
                            // As many as before would be nothing new.
                            if self.options.desired == before {
                                self.report.wanted += 1;
                                Event::CheckpointWanted
                            } else {
                                Event::Desired(self.options.desired)
                            }
                        }
                    };
                    return self.tell_core(index, event);
                }
            }
            12 => {
                let others: Vec<WorkerId> = ids.into_iter().filter(|id| *id != victim).collect();
                if !others.is_empty() {
                    let other = others[self.below(others.len() as u64) as usize];
                    self.tear(victim, other);
                }
            }
            13 => {
                // Not while it sleeps: what came meanwhile stays in its order.
                let awake = |coordinator: &Coordinator| coordinator.asleep_until <= self.now;
                if let Some(index) = self.coordinators.iter().rposition(|coordinator| coordinator.alive)
                    && awake(&self.coordinators[index])
                {
                    self.report.sleeps += 1;
                    let length = 100 + self.below(4000);
                    self.coordinators[index].asleep_until = self.now + length;
                }
            }
            14 => self.halve(),
            _ => {}
        }
        Ok(())
    }

    /// Whether a message arrives twice: a link keeps order and loses its tail alone, but what was said is said again.
    pub(super) fn says_twice(&mut self) -> bool {
        let twice = self.chaos() && self.chance(25);
        self.report.repeated += u64::from(twice);
        twice
    }

    /// A member of a ring that forms is asked to go, or dies, as long as there are such rings to come.
    pub(super) fn hunt(&mut self, formation: &Formation) {
        let Some(left) = self.hunted.checked_sub(1) else { return };
        self.hunted = left;
        let victim = self.below(formation.members.len() as u64) as usize;
        let (worker, delay) = (formation.members[victim].worker, self.below(80));
        let asked = self.chance(2);
        self.report.preemptions += u64::from(asked);
        let happening = if asked { Happening::Terminate { worker } } else { Happening::Kill { worker } };
        self.after(delay, happening);
    }

    /// Kill -9, at times in the midst of handing out a step's result: then some peers have it and some have not.
    pub(super) fn kill(&mut self, victim: WorkerId) {
        self.report.kills += 1;
        if let Some(generation) = self.workers[&victim].ring
            && self.rings[&generation].stepping
            && !self.rings[&generation].broken
            && self.is_ready_everywhere(generation)
            && self.chance(3)
        {
            self.hand_out_to_some(generation, victim);
        }
        self.bury(victim);
    }

    /// A death right when all members have made a step ready is rare, and what follows has rules of its own: it happens more often
    /// than [`World::kill`] would have it.
    pub(super) fn strike_while_spreading(&mut self, generation: Generation) {
        if !self.chaos() || !self.chance(6) {
            return;
        }
        let members = self.rings[&generation].formation.members.len() as u64;
        let victim = self.below(members) as usize;
        let victim = self.rings[&generation].formation.members[victim].worker;
        self.report.kills += 1;
        self.hand_out_to_some(generation, victim);
        self.bury(victim);
    }

    fn hand_out_to_some(&mut self, generation: Generation, victim: WorkerId) {
        let members: Vec<WorkerId> =
            self.rings[&generation].formation.members.iter().map(|member| member.worker).collect();
        let word = members.iter().map(|id| self.workers[id].hold).max().unwrap_or(0);
        let step = self.hands_out(generation);
        for worker in members {
            if worker != victim && self.chance(2) {
                self.deliver(worker, generation, step, word, false);
            }
        }
    }
}

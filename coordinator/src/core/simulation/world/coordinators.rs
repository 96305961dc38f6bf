//! Coordinators and the store.

use super::*;

pub(super) struct Coordinator {
    pub(super) alive: bool,
    pub(super) core: Membership,
    pub(super) epoch: Epoch,
    pub(super) next_record: u64,
    pub(super) links: BTreeMap<WorkerId, u64>,
    /// Workers that it has told to go.
    pub(super) sent_away: BTreeSet<WorkerId>,
    /// Those whose state it takes for wrong: nobody counts on what they have.
    pub(super) evicted: BTreeSet<WorkerId>,
    /// Which figures are here, those of them that are not in the store yet, and the checkpoints that wait for others.
    pub(super) rows: Rows<Generation>,
    pub(super) unwritten: BTreeSet<u64>,
    pub(super) tick_at: Option<u64>,
    pub(super) appended_at: u64,
    /// Suspended with its machine: until then it does nothing, and then it finds all that came meanwhile.
    pub(super) asleep_until: u64,
}

impl World {
    pub(super) fn start_coordinator(&mut self) {
        if self.completed {
            return;
        }
        self.epoch = Epoch(self.epoch.0 + 1);
        self.records += 1;
        let found = Found {
            formation: self.formations.last_key_value().map(|(_, formation)| Formation::clone(formation)),
            checkpoints: self.manifests.keys().copied().collect(),
            floor: Generation(0),
            quarantined: self.quarantined.iter().cloned().collect(),
            evicted: self.evicted.iter().copied().collect(),
        };
        let mut core = Membership::new(self.options.clone(), self.epoch, found, Millis(self.now));
        core.plant(self.bug);
        let (epoch, next_record) = (self.epoch, self.records);
        self.coordinators.push(Coordinator {
            alive: true,
            core,
            epoch,
            next_record,
            links: BTreeMap::new(),
            sent_away: BTreeSet::new(),
            evicted: self.evicted.clone(),
            rows: self.found_rows(),
            unwritten: BTreeSet::new(),
            tick_at: None,
            appended_at: self.now,
            asleep_until: 0,
        });
        let coordinator = self.coordinators.len() - 1;
        self.after(700, Happening::CheckFence { coordinator });
        self.after(0, Happening::Tick { coordinator });
        self.coordinators[coordinator].tick_at = Some(self.now);
    }

    pub(super) fn fence(&mut self, coordinator: usize) -> Result<(), String> {
        self.report.fenced += 1;
        self.tell_core(coordinator, Event::Fenced { by: format!("epoch {}", self.epoch) })?;
        self.stop_coordinator(coordinator);
        Ok(())
    }

    pub(super) fn stop_coordinator(&mut self, coordinator: usize) {
        self.coordinators[coordinator].alive = false;
        let links = std::mem::take(&mut self.coordinators[coordinator].links);
        for worker in self.workers.keys().copied().collect::<Vec<_>>() {
            if let Some((of, link)) = self.workers[&worker].link
                && of == coordinator
            {
                let delay = self.latency();
                self.after(delay, Happening::ClosedAtWorker { worker, link });
            }
        }
        drop(links);
    }

    pub(super) fn tell_core(&mut self, coordinator: usize, event: Event) -> Result<(), String> {
        if !self.coordinators[coordinator].alive {
            return Ok(());
        }
        let mut out = Vec::new();
        let now = Millis(self.now);
        self.coordinators[coordinator].core.handle(now, event, &mut out);
        if self.verbose {
            out.iter().for_each(|effect| println!("       coordinator {coordinator}: {effect:?}"));
        }
        for effect in out {
            self.perform(coordinator, effect)?;
        }
        self.look_for_rows(coordinator)?;
        let known = &self.coordinators[coordinator];
        let deadline = known.core.deadline().into_iter().chain(known.rows.deadline()).min().map(|at| at.0);
        if let Some(at) = deadline.filter(|_| self.coordinators[coordinator].alive) {
            let known = &mut self.coordinators[coordinator];
            if known.tick_at.is_none_or(|before| at < before || before < self.now) {
                known.tick_at = Some(at);
                self.at(at, Happening::Tick { coordinator });
            }
        }
        Ok(())
    }

    pub(super) fn perform(&mut self, coordinator: usize, effect: Effect) -> Result<(), String> {
        match effect {
            Effect::Send { worker, epoch, order } => {
                if let Order::Leave { .. } = &order {
                    self.check_sent_away(coordinator, worker)?;
                    self.coordinators[coordinator].sent_away.insert(worker);
                }
                self.send_down(coordinator, worker, |link| Happening::ToWorker {
                    worker,
                    link,
                    epoch,
                    order,
                });
            }
            Effect::Drop { worker, .. } => {
                if let Some(link) = self.coordinators[coordinator].links.remove(&worker) {
                    let delay = self.latency();
                    self.after(delay, Happening::ClosedAtWorker { worker, link });
                }
            }
            Effect::Record(entry) => {
                // One that was replaced while it slept decides by what it knew; the log will refuse it.
                if let Entry::Evicted { worker, .. } = &entry {
                    self.coordinators[coordinator].evicted.insert(*worker);
                }
                let may_count = self.coordinators[coordinator].epoch == self.epoch;
                match &entry {
                    Entry::Formed(_) | Entry::FellBack { .. } | Entry::Ended { .. } if !may_count => {}
                    Entry::Formed(formation) => {
                        self.check_formation(coordinator, formation)?;
                        self.check_healed(coordinator, formation)?;
                        let lanes = || formation.members.iter().map(|member| member.lanes.len());
                        self.report.recuts += u64::from(lanes().max() > lanes().min().map(|least| least + 1));
                    }
                    Entry::LeftOut { .. } => self.report.left_out += 1,
                    Entry::Slow { .. } => self.report.slow += 1,
                    Entry::FellBack { step, .. } => {
                        self.report.fell_back += 1;
                        self.check_lost(coordinator, *step)?;
                    }
                    Entry::Ended { outcome: Outcome::Completed } => self.check_checkpoints(coordinator)?,
                    _ => {}
                }
                let delay = match self.chaos() && self.chance(10) {
                    true => 100 + self.below(600),
                    false => 1 + self.below(10),
                };
                let at = (self.now + delay).max(self.coordinators[coordinator].appended_at);
                self.coordinators[coordinator].appended_at = at;
                self.at(at, Happening::Appended { coordinator, entry });
            }
            Effect::List => {
                let delay = 1 + self.below(20);
                self.after(delay, Happening::Listed { coordinator });
            }
            Effect::Commit { step, generation, .. } => {
                self.coordinators[coordinator].rows.whole(step.0, generation);
            }
        }
        Ok(())
    }

    pub(super) fn send_down(
        &mut self,
        coordinator: usize,
        worker: WorkerId,
        what: impl FnOnce(u64) -> Happening,
    ) {
        let delay = self.latency();
        let Some(&link) = self.coordinators[coordinator].links.get(&worker) else { return };
        let Some(known) = self.workers.get_mut(&worker) else { return };
        if known.link == Some((coordinator, link)) && known.mute_until <= self.now {
            known.sent_down = known.sent_down.max(self.now + delay);
            let (at, message) = (known.sent_down, what(link));
            if self.says_twice() {
                self.at(at, message.clone());
            }
            self.at(at, message);
        }
    }

    pub(super) fn check_formation(&self, coordinator: usize, formation: &Formation) -> Result<(), String> {
        let members = formation.members.iter().map(|member| (member.worker, member.lanes.clone()));
        lanes_are_covered_once(members, self.options.lanes)?;
        who_was_sent_away_stays_away(formation, &self.coordinators[coordinator].evicted)?;
        let attendants = self.coordinators[coordinator].core.status().attendants;
        let told = |id| attendants.iter().find(|known| known.worker == id)?.stance.holds;
        nobody_counts_on_learners(formation, told)?;
        members_reach_one_another(formation, &self.left_out(coordinator))?;
        if let Source::Peers { .. } = formation.source {
            // One that has died meanwhile may have had it.
            let has = |id: WorkerId, block| {
                self.workers.get(&id).is_none_or(|worker| {
                    worker.moments_at(formation.start).is_some_and(|moments| moments.contains(&block))
                })
            };
            moments_are_somewhere(formation, self.blocks, has)?;
        }
        let known = &self.coordinators[coordinator];
        let Some(before) = self.formations.get(&Generation(formation.generation.0.saturating_sub(1))) else {
            return Ok(());
        };
        former_members_hold(
            before,
            |id| self.workers.get(&id).is_some_and(|worker| worker.ring == Some(before.generation)),
            |id| {
                known.links.get(&id).is_some_and(|link| {
                    self.workers.get(&id).is_some_and(|worker| worker.link == Some((coordinator, *link)))
                })
            },
        )
    }

    /// Where nothing else happens, a cut of which members have told is healed by the generation after theirs.
    fn check_healed(&mut self, coordinator: usize, formation: &Formation) -> Result<(), String> {
        let before = self.formations.get(&Generation(formation.generation.0.saturating_sub(1)));
        let Some(before) = before.filter(|_| self.calm) else { return Ok(()) };
        let left = |activity: &Activity| {
            matches!(activity, Activity::Holding { generation, cause: Cause::Unreachable { .. } }
                if *generation == before.generation)
        };
        let attendants = self.coordinators[coordinator].core.status().attendants;
        if attendants.iter().any(|attendant| left(&attendant.stance.activity)) {
            a_cut_heals_in_one_generation(before, formation, |one, other| self.are_apart(one, other))?;
            self.report.healed += 1;
        }
        Ok(())
    }

    /// Whom a coordinator leaves out now.
    fn left_out(&self, coordinator: usize) -> BTreeSet<WorkerId> {
        let attendants = self.coordinators[coordinator].core.status().attendants.into_iter();
        attendants.filter(|attendant| attendant.apart.is_some()).map(|attendant| attendant.worker).collect()
    }

    /// State is given up: by what those have that its coordinator hears.
    fn check_lost(&self, coordinator: usize, step: Step) -> Result<(), String> {
        let (links, left_out) = (&self.coordinators[coordinator].links, self.left_out(coordinator));
        let heard = || {
            let here = |(id, worker): &(&WorkerId, &Worker)| {
                let away = left_out.contains(id) || self.coordinators[coordinator].sent_away.contains(id);
                let speaks = worker.ring.is_none() && worker.mute_until <= self.now && !away;
                let link = worker.link.filter(|_| speaks);
                link.is_some_and(|(of, link)| of == coordinator && links.get(id) == Some(&link))
            };
            self.workers.iter().filter(here).map(|(_, worker)| worker)
        };
        let has =
            |block| heard().filter_map(|worker| worker.spoken_of_at(step)).any(|at| at.contains(&block));
        what_is_given_up_is_lost(step, self.blocks, has)
    }

    /// A worker is told to go while a ring is gathered: by what its coordinator was told.
    fn check_sent_away(&self, coordinator: usize, worker: WorkerId) -> Result<(), String> {
        let known = &self.coordinators[coordinator];
        let status = known.core.status();
        if status.formation.is_some() || status.outcome.is_some() {
            return Ok(());
        }
        let here = |attendant: &&Attendant| {
            attendant.linked && attendant.apart.is_none() && !known.sent_away.contains(&attendant.worker)
        };
        let here: Vec<&Attendant> = status.attendants.iter().filter(here).collect();
        let Some(leaver) = here.iter().find(|attendant| attendant.worker == worker) else { return Ok(()) };
        let others = || here.iter().filter(|other| other.worker != worker).map(|other| &other.stance);
        who_is_sent_away_is_not_missed(worker, &leaver.stance, others, status.committed)
    }

    /// A record reaches the log, or another coordinator's is in its place.
    pub(super) fn appended(&mut self, coordinator: usize, entry: Entry) -> Result<(), String> {
        let known = &self.coordinators[coordinator];
        if !known.alive && self.chance(2) {
            return Ok(());
        }
        let known = &mut self.coordinators[coordinator];
        if known.next_record != self.records {
            return if known.alive { self.fence(coordinator) } else { Ok(()) };
        }
        known.next_record += 1;
        self.records += 1;
        match entry {
            Entry::Formed(formation) => {
                let generation = formation.generation;
                let before = self.formations.last_key_value().map(|(generation, _)| generation.0);
                generations_rise(before, generation.0)?;
                self.report.generations += 1;
                self.hunt(&formation);
                self.formations.insert(generation, formation);
                self.tell_core(coordinator, Event::Recorded { generation })
            }
            Entry::Ended { outcome } => {
                if self.verbose {
                    println!("       ended: {outcome:?}");
                }
                match outcome {
                    Outcome::Completed => {
                        let total = self.options.total;
                        self.completed = self.manifests.contains_key(&total);
                        match self.completed {
                            true => steps_are_logged(total, &self.metrics),
                            false => Err("completed without a last checkpoint".to_owned()),
                        }
                    }
                    Outcome::Paused => {
                        self.report.pauses += 1;
                        self.after(300, Happening::StartCoordinator);
                        Ok(())
                    }
                    other => Err(format!("the run ended as {other:?}")),
                }
            }
            Entry::Evicted { worker, machine, .. } => {
                self.evicted.insert(worker);
                self.quarantined.extend(Some(machine).filter(|machine| !machine.is_empty()));
                Ok(())
            }
            Entry::PassedOver { step, .. } => {
                self.manifests.remove(&step);
                self.unreadable.remove(&step);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A job ends: by what those say that its coordinator hears.
    fn check_checkpoints(&self, coordinator: usize) -> Result<(), String> {
        let links = &self.coordinators[coordinator].links;
        let heard = self.workers.iter().filter(|(id, worker)| {
            // Copies of a ring that still runs, which nobody has reached, are on their way at any moment.
            let link = worker.link.filter(|_| worker.ring.is_none() && worker.mute_until <= self.now);
            let away = self.coordinators[coordinator].evicted.contains(id);
            !away && link.is_some_and(|(of, link)| of == coordinator && links.get(id) == Some(&link))
        });
        let stances = heard.map(|(_, worker)| worker.machine.stance());
        no_checkpoint_is_abandoned(stances, |step| self.ever_committed.contains(&step))
    }

    pub(super) fn commit(
        &mut self,
        coordinator: usize,
        step: Step,
        generation: Generation,
    ) -> Result<(), String> {
        if !self.coordinators[coordinator].alive && self.chance(2) {
            return Ok(());
        }
        if self.chaos() && self.chance(8) {
            let reason = "the store answers 500".to_owned();
            return self.tell_core(coordinator, Event::CommitFailed { step, reason });
        }
        // The figures first. One that was replaced when it had begun with that still commits.
        self.write_rows(coordinator);
        checkpoint_after_its_steps(Some(self.coordinators[coordinator].rows.reported()), step.0)?;
        steps_are_logged(step, &self.metrics)?;
        manifest_is_whole(step, &self.formations[&generation], &self.parts, &self.reference)?;
        self.manifests.entry(step).or_insert(generation);
        self.ever_committed.insert(step);
        self.tell_core(coordinator, Event::Committed { step })
    }
}

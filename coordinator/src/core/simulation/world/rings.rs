//! Rings: state for the members, steps, and how they end.

use super::*;

pub(super) struct Ring {
    pub(super) formation: Arc<Formation>,
    pub(super) ready: BTreeSet<WorkerId>,
    pub(super) broken: bool,
    /// Word and number of the step under way; a token that is over is ignored.
    pub(super) token: u64,
    pub(super) stepping: bool,
    /// Members that have made the step under way ready.
    pub(super) prepared: BTreeSet<WorkerId>,
    /// What the step that was handed out last is applied to.
    pub(super) handed: Option<(Step, u64)>,
}

impl World {
    /// The sockets of a worker in this ring are closed: its peers see that.
    pub(super) fn tell_peers(&mut self, generation: Generation, lost: WorkerId) {
        let Some(ring) = self.rings.get_mut(&generation) else { return };
        ring.broken = true;
        ring.token += 1;
        let members: Vec<WorkerId> = ring.formation.members.iter().map(|member| member.worker).collect();
        for worker in members {
            if self.workers.get(&worker).is_some_and(|known| known.ring == Some(generation)) {
                let delay = 1 + self.below(6);
                // What is closed is not heard across a rift before that is over.
                let rift = self.rifts.get(&(worker.min(lost), worker.max(lost))).map_or(0, |rift| rift.until);
                if rift < u64::MAX {
                    self.at(rift.max(self.now) + delay, Happening::PeerLost { worker, generation, lost });
                }
            }
        }
    }

    pub(super) fn leave_ring(&mut self, worker: WorkerId, cause: Cause) -> Result<(), String> {
        let cause = self.with_unheard(worker, cause);
        let known = self.workers.get_mut(&worker).expect("known");
        let Some(generation) = known.ring.take() else { return Ok(()) };
        known.applying = false;
        let holds = known.state.map(|(step, _)| step);
        let shard = known.shard(self.blocks);
        if self.bug == Some(Bug::DroppedShard) {
            known.pending = None;
        }
        let planned = matches!(cause, Cause::Ordered | Cause::Ended | Cause::Diverged { .. });
        if !planned {
            self.tell_peers(generation, worker);
        }
        self.tell_worker(worker, Happens::Left { generation, holds, shard, cause })
    }

    /// Whoever leaves a ring that breaks names all members that it does not reach.
    fn with_unheard(&self, worker: WorkerId, cause: Cause) -> Cause {
        let (known, reason) = match &cause {
            Cause::Unreachable { peers, reason } => (peers.clone(), reason.clone()),
            Cause::Broken { reason, .. } => (Vec::new(), reason.clone()),
            _ => return cause,
        };
        let Some(generation) = self.workers[&worker].ring else { return cause };
        let unheard = self.unheard(worker, &self.rings[&generation].formation);
        let peers: BTreeSet<WorkerId> = known.into_iter().chain(unheard).collect();
        match peers.is_empty() {
            true => cause,
            false => Cause::Unreachable { peers: peers.into_iter().collect(), reason },
        }
    }

    pub(super) fn form(&mut self, worker: WorkerId, formation: Arc<Formation>) -> Result<(), String> {
        let generation = formation.generation;
        let known = self.workers.get_mut(&worker).expect("known");
        if known.ring.is_some() {
            return Err(format!("worker {worker} is told to form while it is in a ring"));
        }
        (known.ring, known.hold, known.applying) = (Some(generation), 0, false);
        known.ring_since = self.now;
        let to_tell = known.rows.formed(formation.rank(worker) == Some(0)).copied().collect();
        self.tell_rows(worker, to_tell);
        self.rings.entry(generation).or_insert_with(|| Ring {
            formation,
            ready: BTreeSet::new(),
            broken: false,
            token: 0,
            stepping: false,
            prepared: BTreeSet::new(),
            handed: None,
        });
        let delay = 2 + self.below(40);
        self.after(delay, Happening::Formed { worker, generation });
        self.await_answers(worker);
        Ok(())
    }

    /// A worker gets the state that the generation starts from.
    pub(super) fn formed(&mut self, worker: WorkerId, generation: Generation) -> Result<(), String> {
        if self.workers[&worker].ring != Some(generation) {
            return Ok(());
        }
        let ring = &self.rings[&generation];
        // It neither gets state from all nor meets them.
        if !ring.broken && self.is_torn(generation) {
            self.after(20, Happening::Formed { worker, generation });
            return Ok(());
        }
        let (start, source) = (ring.formation.start, ring.formation.source.clone());
        let holds = self.workers[&worker].state;
        let needs = self.needs(worker, &ring.formation);
        let of_peers = matches!(source, Source::Peers { .. });
        // Some stages begin with something that a learner cannot be sent meanwhile: it takes part as the others do.
        let meanwhile = !mix(generation.0, 11).is_multiple_of(8);
        let learns = meanwhile && self.learns(worker, &ring.formation);
        if learns && holds.is_none_or(|(step, _)| step != start) {
            let known = self.workers.get_mut(&worker).expect("known");
            (known.state, known.pending) = (None, None);
            known.moments.clear();
            self.meets(worker, generation);
            return Ok(());
        }
        let state = match (&source, holds) {
            (_, Some((step, state))) if step == start => Some(state),
            (Source::Seed, _) => Some(self.reference[0]),
            (Source::Checkpoint { step }, _) => {
                if self.unreadable.contains(step) || !self.manifests.contains_key(step) {
                    let cause = Cause::NoState { reason: format!("checkpoint {step} is damaged") };
                    self.workers.get_mut(&worker).expect("known").state = None;
                    return self.leave_ring(worker, cause);
                }
                let generation = self.manifests[step];
                let part = self.parts.iter().find(|((s, g, _), _)| s == step && *g == generation);
                Some(*part.expect("a manifest has parts").1)
            }
            (Source::Peers { holders }, _) => holders.iter().find_map(|holder| {
                let peer = self.workers.get(holder)?;
                let (step, state) = peer.state?;
                (peer.ring == Some(generation) && step == start && peer.frozen_until <= self.now)
                    .then_some(state)
            }),
        };
        let own = self.workers[&worker].moments_at(start).cloned().unwrap_or_default();
        let peers = || ring.formation.members.iter().filter_map(|member| self.workers.get(&member.worker));
        let hands_out = |peer: &Worker, block: &u64| {
            peer.ring == Some(generation)
                && peer.frozen_until <= self.now
                && peer.moments_at(start).is_some_and(|moments| moments.contains(block))
        };
        let lacks: Vec<u64> = needs.difference(&own).copied().collect();
        let all_there = lacks.iter().all(|block| peers().any(|peer| hands_out(peer, block)));
        let Some(state) = state.filter(|_| !of_peers || all_there) else {
            if ring.broken {
                let cause = Cause::Broken { lost: None, reason: "the ring broke while forming".to_owned() };
                return self.leave_ring(worker, cause);
            }
            self.after(20, Happening::Formed { worker, generation });
            return Ok(());
        };
        match source {
            Source::Peers { .. } => {
                self.report.moved += lacks.len() as u64;
                if holds.is_none_or(|(step, _)| step != start) && self.bug != Some(Bug::ForgottenRows) {
                    self.takes_rows(worker, generation, start)?;
                }
            }
            Source::Checkpoint { step } => {
                self.workers.get_mut(&worker).expect("known").rows.durable(step.0);
            }
            Source::Seed => {}
        }
        let known = self.workers.get_mut(&worker).expect("known");
        if known.state.is_none_or(|(step, _)| step != start) {
            // It is there now, and nowhere else.
            self.report.promoted += u64::from(known.pending.take().is_some() && !own.is_empty());
        }
        known.state = Some((start, state));
        let kept = matches!(source, Source::Seed) && own.is_superset(&needs);
        if of_peers {
            known.moments = own.union(&needs).copied().collect();
        } else if !kept {
            // Read anew.
            (known.moments, known.pending) = (needs, None);
        }
        self.check_state(worker)?;
        self.meets(worker, generation);
        Ok(())
    }

    /// A worker waits for the other members; the last one that comes lets all of them begin.
    fn meets(&mut self, worker: WorkerId, generation: Generation) {
        let ring = self.rings.get_mut(&generation).expect("known");
        ring.ready.insert(worker);
        if ring.ready.len() == ring.formation.members.len() && !ring.broken {
            let members: Vec<WorkerId> = ring.formation.members.iter().map(|member| member.worker).collect();
            for worker in members {
                let delay = 1 + self.below(5);
                self.after(delay, Happening::Ready { worker, generation });
            }
        }
    }

    pub(super) fn ready(&mut self, worker: WorkerId, generation: Generation) -> Result<(), String> {
        if self.workers[&worker].ring != Some(generation) {
            return Ok(());
        }
        let (start, save_first) = {
            let formation = &self.rings[&generation].formation;
            (formation.start, formation.save_first)
        };
        // All have met: what is no part of its share can go, and so can a step that is not to be.
        let needs = self.needs(worker, &self.rings[&generation].formation);
        let blocks = self.blocks;
        let known = self.workers.get_mut(&worker).expect("known");
        known.pending = None;
        known.moments.retain(|block| needs.contains(block));
        let holds = known.state.map(|(step, _)| step);
        let no_moments = Shard { blocks: Vec::new(), all_blocks: blocks, next: false };
        let shard = if holds.is_none() && needs.is_empty() { Some(no_moments) } else { known.shard(blocks) };
        self.tell_worker(worker, Happens::Ready { generation, holds, shard })?;
        let due = start.0.is_multiple_of(self.every) || start == self.options.total;
        if self.learns(worker, &self.rings[&generation].formation) {
            if start == self.options.total {
                // Others write what is missing of the last checkpoint.
                return self.leave_ring(worker, Cause::Ended);
            }
        } else if save_first && due {
            self.save(worker, generation, (start == self.options.total).then_some(Cause::Ended));
        }
        self.begin_step(generation);
        Ok(())
    }

    /// Begins the next step when all members are at the same one.
    pub(super) fn begin_step(&mut self, generation: Generation) {
        let Some(ring) = self.rings.get(&generation) else { return };
        if ring.broken || ring.stepping {
            return;
        }
        let mut at = BTreeSet::new();
        let mut word = 0;
        for member in &ring.formation.members {
            let Some(known) = self.workers.get(&member.worker) else { return };
            let runs = known.machine.stance().activity == Activity::Running { generation };
            if known.ring != Some(generation) || known.applying || !runs {
                return;
            }
            at.extend(known.state.map(|(step, _)| step));
            word = word.max(known.hold);
        }
        if at.len() != 1 || at.first() >= Some(&self.options.total) {
            return;
        }
        let delay = 5 + self.below(20);
        let ring = self.rings.get_mut(&generation).expect("known");
        ring.stepping = true;
        ring.token += 1;
        let token = ring.token;
        let _ = word;
        self.after(delay, Happening::StepEnd { generation, token });
    }

    /// The reduction is complete: everyone has, or will have, all that it needs to apply the step.
    pub(super) fn step_end(&mut self, generation: Generation, token: u64) {
        let ring = &self.rings[&generation];
        if ring.broken || ring.token != token {
            return;
        }
        let members: Vec<WorkerId> = ring.formation.members.iter().map(|member| member.worker).collect();
        let thaws = members.iter().map(|id| self.workers[id].frozen_until).max().unwrap_or(0);
        if thaws > self.now {
            self.at(thaws, Happening::StepEnd { generation, token });
            return;
        }
        if self.is_torn(generation) {
            self.after(20, Happening::StepEnd { generation, token });
            return;
        }
        if self.shares(&self.rings[&generation].formation) {
            self.rings.get_mut(&generation).expect("known").prepared.clear();
            for worker in members {
                let delay = self.below(6);
                self.after(delay, Happening::Prepare { worker, generation, token });
            }
            return;
        }
        self.hand_out(generation, &members);
    }

    /// A member makes its share of the step ready; when all have, what they made is spread.
    pub(super) fn prepare(&mut self, worker: WorkerId, generation: Generation, token: u64) {
        let ring = self.rings.get_mut(&generation).expect("known");
        let known = self.workers.get_mut(&worker).expect("known");
        if ring.broken || ring.token != token || known.ring != Some(generation) {
            return;
        }
        known.pending = Some(known.moments.clone());
        ring.prepared.insert(worker);
        if ring.prepared.len() == ring.formation.members.len() {
            let delay = 1 + self.below(8);
            self.after(delay, Happening::Spread { generation, token });
            self.strike_while_spreading(generation);
        }
    }

    /// The new weights are everywhere.
    pub(super) fn spread(&mut self, generation: Generation, token: u64) {
        let ring = &self.rings[&generation];
        if ring.broken || ring.token != token {
            return;
        }
        if self.is_torn(generation) {
            self.after(20, Happening::Spread { generation, token });
            return;
        }
        let ring = &self.rings[&generation];
        let members: Vec<WorkerId> = ring.formation.members.iter().map(|member| member.worker).collect();
        self.hand_out(generation, &members);
    }

    /// Whether a member may have all of the step under way, so that it can be applied by some and not by others.
    pub(super) fn is_ready_everywhere(&self, generation: Generation) -> bool {
        let ring = &self.rings[&generation];
        !self.shares(&ring.formation) || ring.prepared.len() == ring.formation.members.len()
    }

    /// Everyone has, or will have, all that it needs to apply the step.
    fn hand_out(&mut self, generation: Generation, members: &[WorkerId]) {
        if self.compares(generation) {
            return;
        }
        let ring = self.rings.get_mut(&generation).expect("known");
        ring.stepping = false;
        ring.prepared.clear();
        let word = members.iter().map(|id| self.workers[id].hold).max().unwrap_or(0);
        let step = self.hands_out(generation);
        let twisted = self.bug == Some(Bug::StaleGradient) && self.stale_gradient(generation, step);
        for &worker in members {
            self.deliver(worker, generation, step, word, twisted);
        }
    }

    /// Replicas are compared at this boundary, and one differs from the others, of which there are enough to tell.
    fn compares(&mut self, generation: Generation) -> bool {
        let ring = self.rings.get_mut(&generation).expect("known");
        let formation = ring.formation.clone();
        let Some(flipped) = self.flips.filter(|id| formation.member(*id).is_some()) else { return false };
        if self.shares(&formation) || formation.trainers() < formation.members.len().max(3) {
            return false;
        }
        let ring = self.rings.get_mut(&generation).expect("known");
        (ring.stepping, ring.broken) = (false, true);
        ring.token += 1;
        self.flips = None;
        self.report.flips += 1;
        for member in &formation.members {
            let worker = member.worker;
            let delay = mix(generation.0, worker.0) % 4;
            self.after(delay, Happening::Differ { worker, generation, flipped });
        }
        true
    }

    /// A member leaves a ring of which one replica differs: all know which.
    pub(super) fn differ(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        flipped: WorkerId,
    ) -> Result<(), String> {
        let known = self.workers.get_mut(&worker).expect("known");
        if known.ring != Some(generation) {
            return Ok(());
        }
        if worker == flipped {
            known.state = known.state.map(|(step, state)| (step, state ^ 1));
        }
        self.leave_ring(worker, Cause::Diverged { workers: vec![flipped], reason: "a bit".to_owned() })
    }

    /// The step that is handed out: of the first member, which trains.
    pub(super) fn hands_out(&mut self, generation: Generation) -> Step {
        let ring = self.rings.get_mut(&generation).expect("known");
        let (step, state) = self.workers[&ring.formation.members[0].worker].state.expect("it trains");
        ring.handed = Some((step, state));
        step
    }

    /// Whether a worker of an older generation is still at this step.
    pub(super) fn stale_gradient(&self, generation: Generation, step: Step) -> bool {
        self.workers.values().any(|other| {
            other.ring.is_some_and(|of| of < generation) && other.state.is_some_and(|(at, _)| at == step)
        })
    }

    pub(super) fn deliver(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        step: Step,
        word: u8,
        twisted: bool,
    ) {
        self.workers.get_mut(&worker).expect("known").applying = true;
        let delay = self.below(4);
        self.after(delay, Happening::Apply { worker, generation, step, word, twisted });
    }

    pub(super) fn apply(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        step: Step,
        word: u8,
        twisted: bool,
    ) -> Result<(), String> {
        let lanes = self.options.lanes;
        let (needs, shared) = {
            let formation = &self.rings[&generation].formation;
            (self.needs(worker, formation), self.shares(formation))
        };
        let known = self.workers.get_mut(&worker).expect("known");
        if known.ring != Some(generation) || !known.applying {
            return Ok(());
        }
        if known.state.is_none() && !self.learn(worker, generation, step)? {
            // It has taken part, and holds nothing yet.
            return self.go_on_after(worker, generation, Step(step.0 + 1), word);
        }
        let known = self.workers.get_mut(&worker).expect("known");
        let used = if shared { known.pending.as_ref() } else { Some(&known.moments) };
        moments_of_the_step_before(worker, &needs, used)?;
        known.applying = false;
        let (at, state) = known.state.expect("it trains");
        if at != step {
            return Err(format!("worker {worker} applies step {step} to the state after {at}"));
        }
        let twice = if twisted { lanes } else { 0 };
        let holds = Step(step.0 + 1);
        known.state = Some((holds, advance_state(state, step, (0..lanes).chain(0..twice))));
        known.moments_follow();
        // What it will need when the learners have lanes comes meanwhile.
        if shared && self.chance(3) {
            let share = self.share_to_be(worker, &self.rings[&generation].formation);
            let known = self.workers.get_mut(&worker).expect("known");
            self.report.grown += u64::from(!known.moments.is_superset(&share));
            known.moments.extend(share);
        }
        self.report.steps += 1;
        if holds <= self.reached {
            self.report.replayed_steps +=
                u64::from(self.rings[&generation].formation.members[0].worker == worker);
        }
        self.check_state(worker)?;
        self.has_figures(worker, step);
        self.tell_worker(worker, Happens::Applied { holds })?;
        self.reached = self.reached.max(holds);
        self.go_on_after(worker, generation, holds, word)
    }

    /// A learner has some more of the state after `step`, by what peers have that did not apply the next one yet, and it may be
    /// the last of it: then it takes part in applying that.
    /// Where moments are shared out the weights are spread with every step, and what comes are the moments of its share to be.
    fn learn(&mut self, worker: WorkerId, generation: Generation, step: Step) -> Result<bool, String> {
        let ring = &self.rings[&generation];
        if self.shares(&ring.formation) {
            let spread = ring.handed.filter(|(at, _)| *at == step);
            let share = self.share_to_be(worker, &ring.formation);
            if !self.chance(2) || !self.takes_rows(worker, generation, step)? {
                return Ok(false);
            }
            let known = self.workers.get_mut(&worker).expect("known");
            (known.state, known.pending) = (spread, Some(share));
            self.report.spread += 1;
            return Ok(true);
        }
        let peers = self.workers.values().filter(|peer| peer.ring == Some(generation));
        let there = peers.filter_map(|peer| peer.state).find(|(at, _)| *at == step);
        let Some(state) = there.filter(|_| self.chance(2)) else { return Ok(false) };
        let blocks = self.blocks;
        let known = self.workers.get_mut(&worker).expect("known");
        (known.state, known.moments) = (Some(state), (0..blocks).collect());
        self.report.learned += 1;
        self.takes_rows(worker, generation, step)?;
        self.check_state(worker)?;
        Ok(true)
    }

    /// After a step a member leaves, or takes part in the next one.
    fn go_on_after(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        holds: Step,
        word: u8,
    ) -> Result<(), String> {
        let learns = self.learns(worker, &self.rings[&generation].formation);
        self.workers.get_mut(&worker).expect("known").applying = false;
        let ended = holds == self.options.total;
        let leave = match word {
            _ if ended => Some(Cause::Ended),
            0 => None,
            _ => Some(Cause::Ordered),
        };
        if learns {
            // It writes nothing.
            if let Some(cause) = leave {
                return self.leave_ring(worker, cause);
            }
        } else if ended || word == 2 {
            // It leaves once its parts are durable.
            self.save(worker, generation, leave);
            return Ok(());
        } else {
            if holds.0.is_multiple_of(self.every) {
                self.save(worker, generation, None);
            }
            if let Some(cause) = leave {
                return self.leave_ring(worker, cause);
            }
        }
        self.begin_step(generation);
        Ok(())
    }
}

//! Worker processes: their links, their half of the membership, and the parts that they write.

use super::*;

pub(super) struct Worker {
    pub(super) machine: Machine,
    pub(super) told: Told,
    pub(super) state: Option<(Step, u64)>,
    /// The blocks whose moments it has of that state.
    pub(super) moments: BTreeSet<u64>,
    /// Those that it can bring to the step after.
    pub(super) pending: Option<BTreeSet<u64>>,
    /// The figures of steps.
    pub(super) rows: KeptRows<u64>,
    pub(super) link: Option<(usize, u64)>,
    /// Last delivery on the present link, each way: links keep order.
    pub(super) sent_up: u64,
    pub(super) sent_down: u64,
    pub(super) frozen_until: u64,
    /// Nothing gets through its link, and nobody notices yet.
    pub(super) mute_until: u64,
    pub(super) ring: Option<Generation>,
    /// When it began to form the ring that it was in last.
    pub(super) ring_since: u64,
    pub(super) hold: u8,
    /// All data of this step are here; it will be applied.
    pub(super) applying: bool,
    /// Copies of states that are not known to be in a committed checkpoint.
    pub(super) kept: Vec<Copied>,
    /// Until then it writes what it was given to write.
    pub(super) writes_until: u64,
}

/// What a member copied for a checkpoint: its own block, and that of the next member.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copied {
    pub(super) step: Step,
    pub(super) generation: Generation,
    pub(super) state: u64,
    pub(super) rank: u64,
    pub(super) all: u64,
    pub(super) buddy: WorkerId,
}

impl Worker {
    /// What it says of its moments, of so many blocks.
    pub(super) fn shard(&self, all_blocks: u64) -> Option<Shard> {
        let of = |blocks: &BTreeSet<u64>, next| Shard {
            blocks: blocks.iter().map(|block| *block..block + 1).collect(),
            all_blocks,
            next,
        };
        self.state?;
        match &self.pending {
            Some(pending) => Some(of(pending, true)),
            None => (self.moments.len() as u64 != all_blocks).then(|| of(&self.moments, false)),
        }
    }

    /// The moments that it has, or can have, after a step.
    pub(super) fn moments_at(&self, step: Step) -> Option<&BTreeSet<u64>> {
        let (holds, _) = self.state?;
        match &self.pending {
            _ if holds == step => Some(&self.moments),
            Some(pending) if holds.0 + 1 == step.0 => Some(pending),
            _ => None,
        }
    }

    /// What it speaks of after a step: beside one that is ready, moments that came for a ring that did not form are not told.
    pub(super) fn spoken_of_at(&self, step: Step) -> Option<&BTreeSet<u64>> {
        let at = self.moments_at(step)?;
        Some(self.pending.as_ref().unwrap_or(at))
    }

    /// The step is applied: the moments are brought there too.
    pub(super) fn moments_follow(&mut self) {
        if let Some(pending) = self.pending.take() {
            self.moments = pending;
        }
    }
}

impl World {
    /// Whether the moments are shared out in a generation, or some members have none of them.
    pub(super) fn shares(&self, formation: &Formation) -> bool {
        let trainers = formation.trainers();
        self.shared && (trainers > 2 || trainers < formation.members.len())
    }

    /// Whether a member gets the state while the others train.
    pub(super) fn learns(&self, worker: WorkerId, formation: &Formation) -> bool {
        formation.rank(worker) >= Some(formation.trainers())
    }

    /// The blocks whose moments a member needs.
    pub(super) fn needs(&self, worker: WorkerId, formation: &Formation) -> BTreeSet<u64> {
        let trainers = formation.trainers();
        match formation.rank(worker).filter(|_| self.shares(formation)) {
            Some(rank) if rank < trainers => {
                shares(self.blocks, trainers, rank).into_iter().flatten().collect()
            }
            Some(_) => BTreeSet::new(),
            None => (0..self.blocks).collect(),
        }
    }

    /// The blocks whose moments a member of a generation with learners will need once these have lanes.
    pub(super) fn share_to_be(&self, worker: WorkerId, formation: &Formation) -> BTreeSet<u64> {
        let members = formation.members.len();
        let rank = formation.rank(worker).expect("a member");
        match formation.trainers() < members {
            true => shares(self.blocks, members, rank).into_iter().flatten().collect(),
            false => BTreeSet::new(),
        }
    }

    pub(super) fn connect(&mut self, worker: WorkerId) {
        if self.workers[&worker].link.is_some() {
            return;
        }
        // What is lost on a link is never followed by what is not: a muted worker cannot open a new one either.
        let muted = self.workers[&worker].mute_until;
        if muted > self.now {
            self.at(muted + 1, Happening::Connect { worker });
            return;
        }
        let alive: Vec<usize> =
            (0..self.coordinators.len()).filter(|&c| self.coordinators[c].alive).collect();
        let Some(&newest) = alive.last() else {
            self.after(100, Happening::Connect { worker });
            return;
        };
        let stray = self.chaos() && self.chance(4);
        let coordinator = if stray { alive[self.below(alive.len() as u64) as usize] } else { newest };
        self.next_link += 1;
        let link = self.next_link;
        let known = self.workers.get_mut(&worker).expect("known");
        known.link = Some((coordinator, link));
        (known.sent_up, known.sent_down) = (self.now, self.now);
        let mut out = Vec::new();
        known.machine.handle(Happens::Linked, &mut out);
        known.rows.linked();
        let stance = known.machine.stance().clone();
        self.send_up(worker, true, stance);
    }

    pub(super) fn send_up(&mut self, worker: WorkerId, hello: bool, stance: Stance) {
        let delay = self.latency();
        let known = self.workers.get_mut(&worker).expect("known");
        let Some((coordinator, link)) = known.link else { return };
        if known.mute_until > self.now {
            return;
        }
        known.sent_up = known.sent_up.max(self.now + delay);
        let at = known.sent_up;
        let message = Happening::ToCoordinator { coordinator, link, worker, hello, stance };
        if !hello && self.says_twice() {
            self.at(at, message.clone());
        }
        self.at(at, message);
    }

    pub(super) fn say(&mut self, worker: WorkerId, stance: Stance) {
        self.send_up(worker, false, stance);
    }

    /// With a heartbeat, where the time of its steps went: some are slow, and none is twice as fast as another time.
    pub(super) fn say_pace(&mut self, worker: WorkerId) {
        let known = &self.workers[&worker];
        let (Some((coordinator, link)), Some(generation)) = (known.link, known.ring) else { return };
        let lanes = self.rings[&generation].formation.member(worker).map_or(0, |member| member.lanes.len());
        if lanes == 0 || known.mute_until > self.now {
            return;
        }
        let lane_us = (100 + self.below(60)) * (1 + mix(worker.0, 3) % 3);
        let spent = Spent { compute_us: lane_us * lanes as u64, ..Spent::default() };
        let pace = Pace { generation, lanes: lanes as u32, steps: 1, spent };
        let delay = self.latency();
        self.after(delay, Happening::Paced { coordinator, link, worker, pace });
    }

    /// Closes a worker's link: both ends learn of it, at their own time.
    pub(super) fn cut(&mut self, worker: WorkerId) {
        let Some((coordinator, link)) = self.workers.get(&worker).and_then(|known| known.link) else {
            return;
        };
        let (one, other) = (self.latency(), self.latency());
        self.after(one, Happening::ClosedAtCoordinator { coordinator, link, worker });
        self.after(other, Happening::ClosedAtWorker { worker, link });
    }

    pub(super) fn tell_worker(&mut self, worker: WorkerId, event: Happens) -> Result<(), String> {
        let Some(known) = self.workers.get_mut(&worker) else { return Ok(()) };
        if let Happens::Ordered { order: Order::Committed { step }, .. } = &event {
            known.kept.retain(|copy| copy.step != *step);
            known.rows.durable(step.0);
        }
        known.told.hears(&event);
        let mut out = Vec::new();
        known.machine.handle(event, &mut out);
        for effect in &out {
            who_is_told_nothing_does_nothing_new(worker, &mut known.told, effect)?;
        }
        for effect in out {
            match effect {
                Do::Say(stance) => self.say(worker, stance),
                Do::Form(formation) => self.form(worker, formation)?,
                Do::Hold { save } => {
                    let known = self.workers.get_mut(&worker).expect("known");
                    known.hold = known.hold.max(1 + u8::from(save));
                }
                Do::Abort { reason } => {
                    let known = self.workers.get(&worker).expect("known");
                    if known.ring.is_some() {
                        let keeps = known.applying && known.state.is_some() && self.chance(2);
                        let known = self.workers.get_mut(&worker).expect("known");
                        known.applying = false;
                        if keeps {
                            // The data are here and the update runs to its end.
                            let (step, state) = known.state.expect("it trains");
                            let lanes = self.options.lanes;
                            known.state = Some((Step(step.0 + 1), advance_state(state, step, 0..lanes)));
                            known.moments_follow();
                            self.check_state(worker)?;
                            self.has_figures(worker, step);
                        }
                        self.leave_ring(worker, Cause::Broken { lost: None, reason })?;
                    }
                }
                Do::WriteKept { step, generation } => self.write_kept(worker, step, generation)?,
                Do::Exit(_) => self.bury(worker),
            }
        }
        Ok(())
    }

    /// The process is gone; its links and sockets close.
    pub(super) fn bury(&mut self, worker: WorkerId) {
        let generation = self.workers[&worker].ring;
        if let Some((coordinator, link)) = self.workers[&worker].link {
            let delay = self.latency();
            self.after(delay, Happening::ClosedAtCoordinator { coordinator, link, worker });
        }
        self.workers.remove(&worker);
        if let Some(generation) = generation {
            self.tell_peers(generation, worker);
        }
    }

    /// Copies the state and writes this worker's parts, in the background. Of second copies two are kept, and the oldest is
    /// written.
    pub(super) fn save(&mut self, worker: WorkerId, generation: Generation, leave: Option<Cause>) {
        let Some((step, state)) = self.workers[&worker].state else { return };
        let formation = &self.rings[&generation].formation;
        let writers = formation.trainers();
        let (rank, all) = (formation.rank(worker).expect("a member") as u64, writers as u64);
        let buddy = formation.members[((rank + 1) % all) as usize].worker;
        let copy = Copied { step, generation, state, rank, all, buddy };
        self.write(worker, &copy, false, leave);
        if all > 1 {
            let known = self.workers.get_mut(&worker).expect("known");
            known.kept.push(copy);
            if known.kept.len() > 2 {
                let oldest = known.kept.remove(0);
                self.write(worker, &oldest, true, None);
            }
        }
    }

    /// The coordinator asks for a second copy.
    fn write_kept(&mut self, worker: WorkerId, step: Step, generation: Generation) -> Result<(), String> {
        let kept = &mut self.workers.get_mut(&worker).expect("known").kept;
        let asked = |copy: &Copied| (copy.step, copy.generation) == (step, generation);
        let Some(at) = kept.iter().position(asked) else {
            // It may be the copy that is being written: the thread that writes says so after that.
            let until = self.workers[&worker].writes_until.max(self.now);
            self.at(until, Happening::LetGo { worker, step, generation });
            return Ok(());
        };
        let copy = kept.remove(at);
        self.report.copies += 1;
        self.write(worker, &copy, true, None);
        Ok(())
    }

    /// Writes a member's own block of a checkpoint, and that of the member after it when `both`.
    fn write(&mut self, worker: WorkerId, copy: &Copied, both: bool, leave: Option<Cause>) {
        let Copied { step, generation, state, rank, all, buddy } = *copy;
        let next = (rank + 1) % all;
        let mut blocks: Vec<_> = std::iter::once(rank..rank + 1).collect();
        blocks.extend(both.then_some(next..next + 1));
        let kept = (!both && all > 1).then_some(Kept { owner: buddy, blocks: next..next + 1 });
        let (parts, facts) = (String::new(), format!("{state:016x}"));
        let written = Written { step, generation, parts, facts, blocks, all_blocks: all, kept };
        // One thread writes one thing after the other.
        let delay = 5 + self.below(60);
        let known = self.workers.get_mut(&worker).expect("known");
        known.writes_until = known.writes_until.max(self.now) + delay;
        let at = known.writes_until;
        self.at(at, Happening::Wrote { worker, written, state, leave });
    }

    /// A worker's parts are durable.
    pub(super) fn wrote(&mut self, worker: WorkerId, written: Written, state: u64) -> Result<(), String> {
        for block in written.blocks.iter().flat_map(Clone::clone) {
            self.parts.insert((written.step, written.generation, block), state);
        }
        self.tell_worker(worker, Happens::Wrote(written))
    }

    /// The store refuses a worker's parts, however often they are tried: its own, of which it keeps no second copy then, or
    /// the second copy.
    pub(super) fn fail_to_write(&mut self, worker: WorkerId, mut written: Written) -> Result<(), String> {
        self.report.unwritten += 1;
        let Written { step, generation, .. } = written;
        let own = (step, generation, written.blocks[0].start);
        match written.blocks.len() {
            1 => {
                if let Some(known) = self.workers.get_mut(&worker) {
                    known.kept.retain(|copy| (copy.step, copy.generation) != (step, generation));
                }
            }
            _ if !self.parts.contains_key(&own) => {}
            _ => {
                written.blocks.truncate(1);
                self.tell_worker(worker, Happens::Wrote(written))?;
            }
        }
        let reason = "no space left on device".to_owned();
        self.tell_worker(worker, Happens::Unwritten(Unwritten { step, generation, reason }))
    }

    pub(super) fn check_state(&self, worker: WorkerId) -> Result<(), String> {
        match self.workers[&worker].state {
            Some((step, state)) => state_is_the_reference(step, state, &self.reference)
                .map_err(|e| format!("worker {worker}: {e}")),
            None => Ok(()),
        }
    }
}

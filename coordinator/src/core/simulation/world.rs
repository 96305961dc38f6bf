//! The world around the cores: workers, their rings, links, coordinators, the store, and chaos.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anello_configs::random::Stream;
use anello_member::{Effect as Do, Event as Happens, Member as Machine};
use anello_proto::ring::*;

use super::super::{Effect, Entry, Event, Found, Goal, Membership, Millis, Options, Outcome};
use super::invariants::*;

/// A mistake that is put in by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// The next generation is formed without the word of one survivor.
    LostVote,
    /// A gradient of an older generation is added to a step.
    StaleGradient,
    /// A manifest is written when the first part is there.
    EarlyManifest,
}

/// What a schedule saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub trace: u64,
    pub generations: u64,
    pub steps: u64,
    pub kills: u64,
    pub freezes: u64,
    pub cuts: u64,
    pub mutes: u64,
    pub preemptions: u64,
    pub coordinator_crashes: u64,
    pub stale_coordinators: u64,
    pub fenced: u64,
    pub faults: u64,
    pub unreadable: u64,
    pub pauses: u64,
    pub replayed_steps: u64,
}

impl Report {
    pub fn counts(&self) -> [(&'static str, u64); 14] {
        [
            ("a generation", self.generations),
            ("a step", self.steps),
            ("a kill", self.kills),
            ("a freeze", self.freezes),
            ("a cut", self.cuts),
            ("a silent cut", self.mutes),
            ("a preemption", self.preemptions),
            ("a coordinator's crash", self.coordinator_crashes),
            ("a stale coordinator", self.stale_coordinators),
            ("a fenced coordinator", self.fenced),
            ("a failing step", self.faults),
            ("an unreadable checkpoint", self.unreadable),
            ("a pause", self.pauses),
            ("a step done again", self.replayed_steps),
        ]
    }

    pub fn add(&mut self, other: &Self) {
        let mut sum = self.counts().map(|(_, count)| count);
        for (sum, (_, count)) in sum.iter_mut().zip(other.counts()) {
            *sum += count;
        }
        let [
            generations,
            steps,
            kills,
            freezes,
            cuts,
            mutes,
            preemptions,
            crashes,
            stale,
            fenced,
            faults,
            unreadable,
            pauses,
            again,
        ] = sum;
        *self = Self {
            trace: mix(self.trace, other.trace),
            generations,
            steps,
            kills,
            freezes,
            cuts,
            mutes,
            preemptions,
            coordinator_crashes: crashes,
            stale_coordinators: stale,
            fenced,
            faults,
            unreadable,
            pauses,
            replayed_steps: again,
        };
    }
}

fn mix(a: u64, b: u64) -> u64 {
    let mut x = (a ^ b.rotate_left(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^= x >> 32;
    x.wrapping_mul(0xd6e8_feb8_6659_fd93)
}

/// The state after `step + 1` from that after `step`, when `lanes` of the global batch were added up.
fn advance_state(state: u64, step: Step, lanes: impl Iterator<Item = u32>) -> u64 {
    let batch = lanes.fold(0u64, |sum, lane| sum.wrapping_add(mix(step.0, u64::from(lane))));
    mix(state, batch)
}

#[derive(Clone, Debug)]
enum Happening {
    Connect { worker: WorkerId },
    Heartbeat { worker: WorkerId },
    ToCoordinator { coordinator: usize, link: u64, worker: WorkerId, hello: bool, stance: Stance },
    ClosedAtCoordinator { coordinator: usize, link: u64, worker: WorkerId },
    ToWorker { worker: WorkerId, link: u64, epoch: Epoch, order: Order },
    ClosedAtWorker { worker: WorkerId, link: u64 },
    Formed { worker: WorkerId, generation: Generation },
    Ready { worker: WorkerId, generation: Generation },
    StepEnd { generation: Generation, token: u64 },
    Apply { worker: WorkerId, generation: Generation, step: Step, word: u8, twisted: bool },
    PeerLost { worker: WorkerId, generation: Generation, lost: WorkerId },
    Wrote { worker: WorkerId, written: Written, state: u64, leave: Option<Cause> },
    Appended { coordinator: usize, entry: Entry },
    Commit { coordinator: usize, step: Step, generation: Generation },
    Listed { coordinator: usize },
    Tick { coordinator: usize },
    CheckFence { coordinator: usize },
    StartCoordinator,
    Terminate { worker: WorkerId },
    Launch,
    Chaos,
}

struct Worker {
    machine: Machine,
    state: Option<(Step, u64)>,
    link: Option<(usize, u64)>,
    /// Last delivery on the present link, each way: links keep order.
    sent_up: u64,
    sent_down: u64,
    frozen_until: u64,
    /// Nothing gets through its link, and nobody notices yet.
    mute_until: u64,
    ring: Option<Generation>,
    hold: u8,
    /// All data of this step are here; it will be applied.
    applying: bool,
    /// Members of the ring that it was told of last.
    last_members: Vec<WorkerId>,
    /// Copies of states that are not known to be in a committed checkpoint.
    kept: Vec<Kept>,
}

/// What a member copied for a checkpoint: its own block, and that of the next member.
#[derive(Clone, Copy, Debug)]
struct Kept {
    step: Step,
    generation: Generation,
    state: u64,
    rank: u64,
    all: u64,
    buddy: WorkerId,
}

struct Ring {
    formation: Arc<Formation>,
    ready: BTreeSet<WorkerId>,
    broken: bool,
    /// Word and number of the step under way; a token that is over is ignored.
    token: u64,
    stepping: bool,
}

struct Coordinator {
    alive: bool,
    core: Membership,
    epoch: Epoch,
    next_record: u64,
    links: BTreeMap<WorkerId, u64>,
    tick_at: Option<u64>,
    appended_at: u64,
}

pub struct World {
    stream: Stream,
    drawn: u64,
    now: u64,
    sequence: u64,
    queue: BTreeMap<(u64, u64), Happening>,
    bug: Option<Bug>,
    verbose: bool,
    options: Options,
    every: u64,
    reference: Vec<u64>,
    chaos_until: u64,
    faults_left: u32,
    next_worker: u64,
    next_link: u64,
    records: u64,
    epoch: Epoch,
    formations: BTreeMap<Generation, Arc<Formation>>,
    manifests: BTreeMap<Step, Generation>,
    unreadable: BTreeSet<Step>,
    parts: BTreeMap<(Step, Generation, u64), u64>,
    coordinators: Vec<Coordinator>,
    workers: BTreeMap<WorkerId, Worker>,
    rings: BTreeMap<Generation, Ring>,
    reached: Step,
    completed: bool,
    report: Report,
}

/// Simulated milliseconds after the last fault within which a run must finish.
const PATIENCE: u64 = 60_000;
const HEARTBEAT: u64 = 200;

impl World {
    pub fn new(seed: u64, bug: Option<Bug>, verbose: bool) -> Self {
        let stream = Stream::new(seed, "simulation", &[]);
        let options = Options {
            lanes: 8,
            total: Step(0),
            min: 1,
            desired: 3,
            lease: Millis(1000),
            gather: Millis(500),
            faults_max: 5,
        };
        let mut world = Self {
            stream,
            drawn: 0,
            now: 0,
            sequence: 0,
            queue: BTreeMap::new(),
            bug,
            verbose,
            options,
            every: 5,
            reference: Vec::new(),
            chaos_until: 0,
            faults_left: 2,
            next_worker: 0,
            next_link: 0,
            records: 0,
            epoch: Epoch(0),
            formations: BTreeMap::new(),
            manifests: BTreeMap::new(),
            unreadable: BTreeSet::new(),
            parts: BTreeMap::new(),
            coordinators: Vec::new(),
            workers: BTreeMap::new(),
            rings: BTreeMap::new(),
            reached: Step(0),
            completed: false,
            report: Report::default(),
        };
        let total = 8 + world.below(24);
        world.options.total = Step(total);
        world.options.desired = 1 + world.below(5) as u32;
        world.options.min = 1 + world.below(u64::from(world.options.desired).min(2)) as u32;
        world.options.lanes = 1 << (1 + world.below(3));
        world.every = 2 + world.below(6);
        world.chaos_until = 500 + world.below(2500);
        let mut state = mix(seed, 7);
        world.reference.push(state);
        for step in 0..total {
            state = advance_state(state, Step(step), 0..world.options.lanes);
            world.reference.push(state);
        }
        world.after(0, Happening::StartCoordinator);
        world.after(0, Happening::Launch);
        world.after(50, Happening::Chaos);
        world
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.drawn += 1;
        self.stream.below_at(self.drawn, bound)
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    fn chaos(&self) -> bool {
        self.now < self.chaos_until
    }

    fn at(&mut self, time: u64, happening: Happening) {
        self.sequence += 1;
        self.queue.insert((time.max(self.now), self.sequence), happening);
    }

    fn after(&mut self, delay: u64, happening: Happening) {
        self.at(self.now + delay, happening);
    }

    /// A message's time on the way: mostly short.
    fn latency(&mut self) -> u64 {
        match self.below(20) {
            0 if self.chaos() => 20 + self.below(300),
            _ => 1 + self.below(8),
        }
    }

    pub fn run(mut self) -> Result<Report, String> {
        while let Some((key, happening)) = self.queue.pop_first() {
            self.now = key.0;
            self.report.trace = mix(self.report.trace, mix(self.now, kind(&happening)));
            if self.verbose {
                println!("{:>6} {happening:?}", self.now);
            }
            self.happen(happening)?;
            if self.completed {
                return Ok(self.report);
            }
            if self.now > self.chaos_until + PATIENCE {
                let status = self.coordinators.last().map(|coordinator| coordinator.core.status());
                return Err(format!(
                    "the run has not finished {PATIENCE} ms after the last fault: {status:?}"
                ));
            }
        }
        Err("nothing happens any more".to_owned())
    }

    fn happen(&mut self, happening: Happening) -> Result<(), String> {
        // What is meant for a frozen worker waits until it thaws.
        if let Some(worker) = target(&happening) {
            let Some(known) = self.workers.get(&worker) else { return Ok(()) };
            if known.frozen_until > self.now {
                let until = known.frozen_until;
                self.at(until, happening);
                return Ok(());
            }
        }
        match happening {
            Happening::Connect { worker } => self.connect(worker),
            Happening::Heartbeat { worker } => {
                let stance = self.workers[&worker].machine.stance().clone();
                self.say(worker, stance);
                self.after(HEARTBEAT, Happening::Heartbeat { worker });
            }
            Happening::ToCoordinator { coordinator, link, worker, hello, stance } => {
                let known = &mut self.coordinators[coordinator];
                if !known.alive {
                    return Ok(());
                }
                if hello {
                    // A worker numbers its connections: one that was opened earlier and comes later is closed.
                    if known.links.get(&worker).is_some_and(|newer| *newer > link) {
                        return Ok(());
                    }
                    known.links.insert(worker, link);
                    let (endpoints, machine) = (Endpoints::default(), "machine".to_owned());
                    return self.tell_core(coordinator, Event::Linked { worker, endpoints, machine, stance });
                }
                if known.links.get(&worker) == Some(&link) {
                    return self.tell_core(coordinator, Event::Stands { worker, stance });
                }
            }
            Happening::ClosedAtCoordinator { coordinator, link, worker } => {
                let known = &mut self.coordinators[coordinator];
                if known.alive && known.links.get(&worker) == Some(&link) {
                    known.links.remove(&worker);
                    return self.tell_core(coordinator, Event::Unlinked { worker });
                }
            }
            Happening::ToWorker { worker, link, epoch, order } => {
                if self.workers[&worker].link.is_some_and(|(_, id)| id == link) {
                    return self.tell_worker(worker, Happens::Ordered { epoch, order });
                }
            }
            Happening::ClosedAtWorker { worker, link } => {
                if self.workers[&worker].link.is_some_and(|(_, id)| id == link) {
                    self.workers.get_mut(&worker).expect("known").link = None;
                    let delay = 10 + self.below(200);
                    self.after(delay, Happening::Connect { worker });
                    return self.tell_worker(worker, Happens::Unlinked);
                }
            }
            Happening::Formed { worker, generation } => return self.formed(worker, generation),
            Happening::Ready { worker, generation } => return self.ready(worker, generation),
            Happening::StepEnd { generation, token } => self.step_end(generation, token),
            Happening::Apply { worker, generation, step, word, twisted } => {
                return self.apply(worker, generation, step, word, twisted);
            }
            Happening::PeerLost { worker, generation, lost } => {
                let known = &self.workers[&worker];
                if known.ring != Some(generation) {
                    return Ok(());
                }
                if known.applying {
                    self.after(2, Happening::PeerLost { worker, generation, lost });
                    return Ok(());
                }
                let cause = Cause::Broken { lost: Some(lost), reason: "connection reset".to_owned() };
                return self.leave_ring(worker, cause);
            }
            Happening::Wrote { worker, written, state, leave } => {
                let generation = written.generation;
                for block in written.blocks.iter().flat_map(Clone::clone) {
                    self.parts.insert((written.step, generation, block), state);
                }
                self.tell_worker(worker, Happens::Wrote(written))?;
                if let Some(cause) = leave
                    && self.workers.get(&worker).is_some_and(|known| known.ring == Some(generation))
                {
                    return self.leave_ring(worker, cause);
                }
            }
            Happening::Appended { coordinator, entry } => return self.appended(coordinator, entry),
            Happening::Listed { coordinator } => {
                let steps = self.manifests.keys().copied().collect();
                return self.tell_core(coordinator, Event::Listed { steps });
            }
            Happening::Commit { coordinator, step, generation } => {
                return self.commit(coordinator, step, generation);
            }
            Happening::Tick { coordinator } => {
                if self.coordinators[coordinator].tick_at.is_some_and(|at| at <= self.now) {
                    self.coordinators[coordinator].tick_at = None;
                    return self.tell_core(coordinator, Event::Tick);
                }
            }
            Happening::CheckFence { coordinator } => {
                // A coordinator that writes nothing looks whether it still has the job.
                if self.coordinators[coordinator].alive {
                    if self.coordinators[coordinator].epoch < self.epoch {
                        return self.fence(coordinator);
                    }
                    self.after(700, Happening::CheckFence { coordinator });
                }
            }
            Happening::StartCoordinator => self.start_coordinator(),
            Happening::Terminate { worker } => return self.tell_worker(worker, Happens::Terminate),
            Happening::Launch => self.launch(),
            Happening::Chaos => return self.wreak(),
        }
        Ok(())
    }

    // Links.

    fn connect(&mut self, worker: WorkerId) {
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
        let stance = known.machine.stance().clone();
        self.send_up(worker, true, stance);
    }

    fn send_up(&mut self, worker: WorkerId, hello: bool, stance: Stance) {
        let delay = self.latency();
        let known = self.workers.get_mut(&worker).expect("known");
        let Some((coordinator, link)) = known.link else { return };
        if known.mute_until > self.now {
            return;
        }
        known.sent_up = known.sent_up.max(self.now + delay);
        let at = known.sent_up;
        self.at(at, Happening::ToCoordinator { coordinator, link, worker, hello, stance });
    }

    fn say(&mut self, worker: WorkerId, stance: Stance) {
        self.send_up(worker, false, stance);
    }

    /// Closes a worker's link: both ends learn of it, at their own time.
    fn cut(&mut self, worker: WorkerId) {
        let Some((coordinator, link)) = self.workers.get(&worker).and_then(|known| known.link) else {
            return;
        };
        let (one, other) = (self.latency(), self.latency());
        self.after(one, Happening::ClosedAtCoordinator { coordinator, link, worker });
        self.after(other, Happening::ClosedAtWorker { worker, link });
    }

    // Workers.

    fn tell_worker(&mut self, worker: WorkerId, event: Happens) -> Result<(), String> {
        let Some(known) = self.workers.get_mut(&worker) else { return Ok(()) };
        let mut out = Vec::new();
        known.machine.handle(event, &mut out);
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
                        let keeps = known.applying && self.chance(2);
                        let known = self.workers.get_mut(&worker).expect("known");
                        known.applying = false;
                        if keeps {
                            // The data are here and the update runs to its end.
                            let (generation, (step, state)) = (known.ring, known.state.expect("it trains"));
                            let lanes = self.options.lanes;
                            known.state = Some((Step(step.0 + 1), advance_state(state, step, 0..lanes)));
                            let _ = generation;
                            self.check_state(worker)?;
                        }
                        self.leave_ring(worker, Cause::Broken { lost: None, reason })?;
                    }
                }
                Do::Exit(_) => self.bury(worker),
            }
        }
        Ok(())
    }

    /// The process is gone; its links and sockets close.
    fn bury(&mut self, worker: WorkerId) {
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

    /// The sockets of a worker in this ring are closed: its peers see that.
    fn tell_peers(&mut self, generation: Generation, lost: WorkerId) {
        let Some(ring) = self.rings.get_mut(&generation) else { return };
        ring.broken = true;
        ring.token += 1;
        let members: Vec<WorkerId> = ring.formation.members.iter().map(|member| member.worker).collect();
        for worker in members {
            if self.workers.get(&worker).is_some_and(|known| known.ring == Some(generation)) {
                let delay = 1 + self.below(6);
                self.after(delay, Happening::PeerLost { worker, generation, lost });
            }
        }
    }

    fn leave_ring(&mut self, worker: WorkerId, cause: Cause) -> Result<(), String> {
        let known = self.workers.get_mut(&worker).expect("known");
        let Some(generation) = known.ring.take() else { return Ok(()) };
        known.applying = false;
        let holds = known.state.map(|(step, _)| step);
        let planned = matches!(cause, Cause::Ordered | Cause::Ended);
        if !planned {
            self.tell_peers(generation, worker);
        }
        self.tell_worker(worker, Happens::Left { generation, holds, cause })
    }

    fn form(&mut self, worker: WorkerId, formation: Arc<Formation>) -> Result<(), String> {
        let generation = formation.generation;
        let known = self.workers.get_mut(&worker).expect("known");
        if known.ring.is_some() {
            return Err(format!("worker {worker} is told to form while it is in a ring"));
        }
        (known.ring, known.hold, known.applying) = (Some(generation), 0, false);
        known.last_members = formation.members.iter().map(|member| member.worker).collect();
        // Blocks of members that are gone are written by those who kept a second copy.
        let manifests = &self.manifests;
        known.kept.retain(|kept| !manifests.contains_key(&kept.step));
        for kept in known.kept.clone() {
            let known = &self.workers[&worker];
            if !known.last_members.contains(&kept.buddy) {
                self.write(worker, &kept, None);
            }
        }
        self.rings.entry(generation).or_insert_with(|| Ring {
            formation,
            ready: BTreeSet::new(),
            broken: false,
            token: 0,
            stepping: false,
        });
        let delay = 2 + self.below(40);
        self.after(delay, Happening::Formed { worker, generation });
        Ok(())
    }

    /// A worker gets the state that the generation starts from.
    fn formed(&mut self, worker: WorkerId, generation: Generation) -> Result<(), String> {
        if self.workers[&worker].ring != Some(generation) {
            return Ok(());
        }
        let ring = &self.rings[&generation];
        let (start, source) = (ring.formation.start, ring.formation.source.clone());
        let holds = self.workers[&worker].state;
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
        let Some(state) = state else {
            if ring.broken {
                let cause = Cause::Broken { lost: None, reason: "the ring broke while forming".to_owned() };
                return self.leave_ring(worker, cause);
            }
            self.after(20, Happening::Formed { worker, generation });
            return Ok(());
        };
        self.workers.get_mut(&worker).expect("known").state = Some((start, state));
        self.check_state(worker)?;
        let ring = self.rings.get_mut(&generation).expect("known");
        ring.ready.insert(worker);
        if ring.ready.len() == ring.formation.members.len() && !ring.broken {
            let members: Vec<WorkerId> = ring.formation.members.iter().map(|member| member.worker).collect();
            for worker in members {
                let delay = 1 + self.below(5);
                self.after(delay, Happening::Ready { worker, generation });
            }
        }
        Ok(())
    }

    fn ready(&mut self, worker: WorkerId, generation: Generation) -> Result<(), String> {
        if self.workers[&worker].ring != Some(generation) {
            return Ok(());
        }
        let (start, save_first) = {
            let formation = &self.rings[&generation].formation;
            (formation.start, formation.save_first)
        };
        self.tell_worker(worker, Happens::Ready { generation, holds: start })?;
        let due = start.0.is_multiple_of(self.every) || start == self.options.total;
        if save_first && due {
            self.save(worker, generation, (start == self.options.total).then_some(Cause::Ended));
        }
        self.begin_step(generation);
        Ok(())
    }

    /// Begins the next step when all members are at the same one.
    fn begin_step(&mut self, generation: Generation) {
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
    fn step_end(&mut self, generation: Generation, token: u64) {
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
        self.rings.get_mut(&generation).expect("known").stepping = false;
        let word = members.iter().map(|id| self.workers[id].hold).max().unwrap_or(0);
        let step = self.workers[&members[0]].state.expect("it trains").0;
        let twisted = self.bug == Some(Bug::StaleGradient) && self.stale_gradient(generation, step);
        for worker in members {
            self.deliver(worker, generation, step, word, twisted);
        }
    }

    /// Whether a worker of an older generation is still at this step.
    fn stale_gradient(&self, generation: Generation, step: Step) -> bool {
        self.workers.values().any(|other| {
            other.ring.is_some_and(|of| of < generation) && other.state.is_some_and(|(at, _)| at == step)
        })
    }

    fn deliver(&mut self, worker: WorkerId, generation: Generation, step: Step, word: u8, twisted: bool) {
        self.workers.get_mut(&worker).expect("known").applying = true;
        let delay = self.below(4);
        self.after(delay, Happening::Apply { worker, generation, step, word, twisted });
    }

    fn apply(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        step: Step,
        word: u8,
        twisted: bool,
    ) -> Result<(), String> {
        let lanes = self.options.lanes;
        let known = self.workers.get_mut(&worker).expect("known");
        if known.ring != Some(generation) || !known.applying {
            return Ok(());
        }
        known.applying = false;
        let (at, state) = known.state.expect("it trains");
        if at != step {
            return Err(format!("worker {worker} applies step {step} to the state after {at}"));
        }
        let twice = if twisted { lanes } else { 0 };
        let holds = Step(step.0 + 1);
        known.state = Some((holds, advance_state(state, step, (0..lanes).chain(0..twice))));
        self.report.steps += 1;
        if holds <= self.reached {
            self.report.replayed_steps +=
                u64::from(self.rings[&generation].formation.members[0].worker == worker);
        }
        self.check_state(worker)?;
        self.tell_worker(worker, Happens::Applied { holds })?;
        let ended = holds == self.options.total;
        let leave = match word {
            _ if ended => Some(Cause::Ended),
            0 => None,
            _ => Some(Cause::Ordered),
        };
        self.reached = self.reached.max(holds);
        if ended || word == 2 {
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

    /// Copies the state and writes this worker's parts, in the background.
    fn save(&mut self, worker: WorkerId, generation: Generation, leave: Option<Cause>) {
        let Some((step, state)) = self.workers[&worker].state else { return };
        let formation = &self.rings[&generation].formation;
        let (rank, all) = (formation.rank(worker).expect("a member") as u64, formation.members.len() as u64);
        let buddy = (rank + 1) % all;
        let kept =
            Kept { step, generation, state, rank, all, buddy: formation.members[buddy as usize].worker };
        self.write(worker, &kept, leave);
        let known = self.workers.get_mut(&worker).expect("known");
        known.kept.push(kept);
        if known.kept.len() > 2 {
            known.kept.remove(0);
        }
    }

    /// Writes a member's own block of a checkpoint, and those of the member after it once that is gone.
    fn write(&mut self, worker: WorkerId, kept: &Kept, leave: Option<Cause>) {
        let Kept { step, generation, state, rank, all, buddy } = *kept;
        let mut blocks: Vec<_> = std::iter::once(rank..rank + 1).collect();
        let gone = self.workers[&worker].last_members.iter().all(|member| *member != buddy);
        if gone && all > 1 {
            let next = (rank + 1) % all;
            blocks.push(next..next + 1);
        }
        let facts = format!("{state:016x}");
        let written = Written { step, generation, parts: String::new(), facts, blocks, all_blocks: all };
        let delay = 5 + self.below(60);
        self.after(delay, Happening::Wrote { worker, written, state, leave });
    }

    fn check_state(&self, worker: WorkerId) -> Result<(), String> {
        match self.workers[&worker].state {
            Some((step, state)) => state_is_the_reference(step, state, &self.reference)
                .map_err(|e| format!("worker {worker}: {e}")),
            None => Ok(()),
        }
    }

    // Coordinators and the store.

    fn start_coordinator(&mut self) {
        if self.completed {
            return;
        }
        self.epoch = Epoch(self.epoch.0 + 1);
        self.records += 1;
        let found = Found {
            formation: self.formations.last_key_value().map(|(_, formation)| Formation::clone(formation)),
            checkpoints: self.manifests.keys().copied().collect(),
            floor: Generation(0),
            quarantined: Vec::new(),
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
            tick_at: None,
            appended_at: self.now,
        });
        let coordinator = self.coordinators.len() - 1;
        self.after(700, Happening::CheckFence { coordinator });
        self.after(0, Happening::Tick { coordinator });
        self.coordinators[coordinator].tick_at = Some(self.now);
    }

    fn fence(&mut self, coordinator: usize) -> Result<(), String> {
        self.report.fenced += 1;
        self.tell_core(coordinator, Event::Fenced { by: format!("epoch {}", self.epoch) })?;
        self.stop_coordinator(coordinator);
        Ok(())
    }

    fn stop_coordinator(&mut self, coordinator: usize) {
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

    fn tell_core(&mut self, coordinator: usize, event: Event) -> Result<(), String> {
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
        let deadline = self.coordinators[coordinator].core.deadline().map(|at| at.0);
        if let Some(at) = deadline.filter(|_| self.coordinators[coordinator].alive) {
            let known = &mut self.coordinators[coordinator];
            if known.tick_at.is_none_or(|before| at < before || before < self.now) {
                known.tick_at = Some(at);
                self.at(at, Happening::Tick { coordinator });
            }
        }
        Ok(())
    }

    fn perform(&mut self, coordinator: usize, effect: Effect) -> Result<(), String> {
        match effect {
            Effect::Send { worker, epoch, order } => {
                let delay = self.latency();
                let Some(&link) = self.coordinators[coordinator].links.get(&worker) else { return Ok(()) };
                let Some(known) = self.workers.get_mut(&worker) else { return Ok(()) };
                if known.link == Some((coordinator, link)) && known.mute_until <= self.now {
                    known.sent_down = known.sent_down.max(self.now + delay);
                    let at = known.sent_down;
                    self.at(at, Happening::ToWorker { worker, link, epoch, order });
                }
            }
            Effect::Drop { worker, .. } => {
                if let Some(link) = self.coordinators[coordinator].links.remove(&worker) {
                    let delay = self.latency();
                    self.after(delay, Happening::ClosedAtWorker { worker, link });
                }
            }
            Effect::Record(entry) => {
                if let Entry::Formed(formation) = &entry {
                    self.check_formation(coordinator, formation)?;
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
                let delay = 1 + self.below(30);
                self.after(delay, Happening::Commit { coordinator, step, generation });
            }
        }
        Ok(())
    }

    fn check_formation(&self, coordinator: usize, formation: &Formation) -> Result<(), String> {
        lanes_are_covered_once(formation, self.options.lanes)?;
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

    /// A record reaches the log, or another coordinator's is in its place.
    fn appended(&mut self, coordinator: usize, entry: Entry) -> Result<(), String> {
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
                let before = self.formations.last_key_value().map(|(generation, _)| *generation);
                generations_rise(before, generation)?;
                self.report.generations += 1;
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
                            true => Ok(()),
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
            Entry::PassedOver { step, .. } => {
                self.manifests.remove(&step);
                self.unreadable.remove(&step);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn commit(&mut self, coordinator: usize, step: Step, generation: Generation) -> Result<(), String> {
        if !self.coordinators[coordinator].alive && self.chance(2) {
            return Ok(());
        }
        if self.chaos() && self.chance(8) {
            let reason = "the store answers 500".to_owned();
            return self.tell_core(coordinator, Event::CommitFailed { step, reason });
        }
        manifest_is_whole(step, &self.formations[&generation], &self.parts, &self.reference)?;
        self.manifests.entry(step).or_insert(generation);
        self.tell_core(coordinator, Event::Committed { step })
    }

    // Chaos.

    /// Keeps as many processes as are wanted.
    fn launch(&mut self) {
        let wanted = u64::from(self.options.desired);
        if (self.workers.len() as u64) < wanted {
            self.next_worker += 1;
            let worker = WorkerId(self.next_worker);
            self.workers.insert(
                worker,
                Worker {
                    machine: Machine::new(None),
                    state: None,
                    link: None,
                    sent_up: 0,
                    sent_down: 0,
                    frozen_until: 0,
                    mute_until: 0,
                    ring: None,
                    hold: 0,
                    applying: false,
                    last_members: Vec::new(),
                    kept: Vec::new(),
                },
            );
            let delay = self.below(30);
            self.after(delay, Happening::Connect { worker });
            self.after(HEARTBEAT, Happening::Heartbeat { worker });
        }
        let delay = 20 + self.below(80);
        self.after(delay, Happening::Launch);
    }

    fn wreak(&mut self) -> Result<(), String> {
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
        match self.below(12) {
            0 | 1 => self.kill(victim),
            2 => {
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
                            self.options.desired = (1 + self.below(5) as u32).max(self.options.min);
                            Event::Desired(self.options.desired)
                        }
                    };
                    return self.tell_core(index, event);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Kill -9, at times in the midst of handing out a step's result: then some peers have it and some have not.
    fn kill(&mut self, victim: WorkerId) {
        self.report.kills += 1;
        if let Some(generation) = self.workers[&victim].ring
            && self.rings[&generation].stepping
            && !self.rings[&generation].broken
            && self.chance(3)
        {
            let members: Vec<WorkerId> =
                self.rings[&generation].formation.members.iter().map(|member| member.worker).collect();
            let word = members.iter().map(|id| self.workers[id].hold).max().unwrap_or(0);
            let step = self.workers[&victim].state.expect("it trains").0;
            for worker in members {
                if worker != victim && self.chance(2) {
                    self.deliver(worker, generation, step, word, false);
                }
            }
        }
        self.bury(victim);
    }
}

/// Whom a happening is for, if for a worker's process.
fn target(happening: &Happening) -> Option<WorkerId> {
    match happening {
        Happening::Connect { worker }
        | Happening::Heartbeat { worker }
        | Happening::ToWorker { worker, .. }
        | Happening::ClosedAtWorker { worker, .. }
        | Happening::Formed { worker, .. }
        | Happening::Ready { worker, .. }
        | Happening::Apply { worker, .. }
        | Happening::PeerLost { worker, .. }
        | Happening::Wrote { worker, .. }
        | Happening::Terminate { worker } => Some(*worker),
        Happening::ToCoordinator { .. }
        | Happening::ClosedAtCoordinator { .. }
        | Happening::StepEnd { .. }
        | Happening::Appended { .. }
        | Happening::Commit { .. }
        | Happening::Listed { .. }
        | Happening::Tick { .. }
        | Happening::CheckFence { .. }
        | Happening::StartCoordinator
        | Happening::Launch
        | Happening::Chaos => None,
    }
}

fn kind(happening: &Happening) -> u64 {
    let kind = match happening {
        Happening::Connect { .. } => 1,
        Happening::Heartbeat { .. } => 2,
        Happening::ToCoordinator { .. } => 3,
        Happening::ClosedAtCoordinator { .. } => 4,
        Happening::ToWorker { .. } => 5,
        Happening::ClosedAtWorker { .. } => 6,
        Happening::Formed { .. } => 7,
        Happening::Ready { .. } => 8,
        Happening::StepEnd { .. } => 9,
        Happening::Apply { .. } => 10,
        Happening::PeerLost { .. } => 11,
        Happening::Wrote { .. } => 12,
        Happening::Appended { .. } => 13,
        Happening::Commit { .. } => 14,
        Happening::Tick { .. } => 15,
        Happening::CheckFence { .. } => 16,
        Happening::StartCoordinator => 17,
        Happening::Terminate { .. } => 18,
        Happening::Launch => 19,
        Happening::Chaos => 20,
        Happening::Listed { .. } => 21,
    };
    kind * 1_000_003 + target(happening).map_or(0, |worker| worker.0)
}

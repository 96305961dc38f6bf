//! The world around the cores: its state and the loop that lets one thing happen after the other.
//!
//! `workers` are processes, their links and what they write; `rings` is what they do together, `rifts` what keeps two from it; `coordinators` has the
//! cores and the store; `rows` are the figures of the steps, on their way from workers to the store; `chaos` does harm.

mod chaos;
mod coordinators;
mod happening;
mod report;
mod rifts;
mod rings;
mod rows;
mod workers;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anello_configs::random::Stream;
use anello_member::{Effect as Do, Event as Happens, KeptRows, Member as Machine};
use anello_proto::ring::*;

use super::super::{
    Attendant, Effect, Entry, Event, Found, Goal, Look, Membership, Millis, Options, Outcome, Rows,
    Straggling,
};
use super::invariants::*;
use coordinators::Coordinator;
use happening::{Happening, addressee, kind, target};
pub use report::Report;
use rifts::Rift;
use rings::Ring;
use workers::Worker;

/// A mistake that is put in by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// The next generation is formed without the word of one survivor.
    LostVote,
    /// A gradient of an older generation is added to a step.
    StaleGradient,
    /// A manifest is written when the first part is there.
    EarlyManifest,
    /// The job ends though a checkpoint lacks blocks that a worker keeps a copy of.
    AbandonedCheckpoint,
    /// A member forgets the step that it made ready when its ring breaks, and says that it has it.
    DroppedShard,
    /// Whoever takes the state from another worker does not take the figures of its steps.
    ForgottenRows,
    /// A replica that differs from all others stays.
    KeptReplica,
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

/// Where a worker runs: some have a machine in common, or at least its name.
fn machine_of(worker: WorkerId) -> String {
    format!("machine {}", worker.0 % 4)
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
    /// Blocks of the moments, and whether they are shared out over rings of more than two.
    blocks: u64,
    shared: bool,
    reference: Vec<u64>,
    chaos_until: u64,
    faults_left: u32,
    /// A bit of this worker's state flips with the next step, and the replicas are compared; so many times yet.
    flips: Option<WorkerId>,
    flips_left: u32,
    /// What the log has of such workers: who, and where.
    evicted: BTreeSet<WorkerId>,
    quarantined: BTreeSet<String>,
    next_worker: u64,
    next_link: u64,
    records: u64,
    epoch: Epoch,
    formations: BTreeMap<Generation, Arc<Formation>>,
    manifests: BTreeMap<Step, Generation>,
    ever_committed: BTreeSet<Step>,
    unreadable: BTreeSet<Step>,
    parts: BTreeMap<(Step, Generation, u64), u64>,
    /// The metrics: steps whose figures are in the store.
    metrics: BTreeSet<u64>,
    coordinators: Vec<Coordinator>,
    workers: BTreeMap<WorkerId, Worker>,
    rings: BTreeMap<Generation, Ring>,
    /// Between these two nothing gets through, until then.
    rifts: BTreeMap<(WorkerId, WorkerId), Rift>,
    /// Nothing happens but that the network is cut in two.
    calm: bool,
    /// So many rings to come lose a member while they form.
    hunted: u32,
    reached: Step,
    completed: bool,
    report: Report,
}

/// Simulated milliseconds after the last fault within which a run must finish.
const PATIENCE: u64 = 60_000;
const HEARTBEAT: u64 = 200;
/// After which a worker says that it does not reach a peer.
const SILENCE: u64 = 1000;

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
            straggling: Straggling { factor_permille: 1500, window_steps: 1 },
            by_speed: false,
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
            blocks: 1,
            shared: false,
            reference: Vec::new(),
            chaos_until: 0,
            faults_left: 2,
            flips: None,
            flips_left: 2,
            evicted: BTreeSet::new(),
            quarantined: BTreeSet::new(),
            next_worker: 0,
            next_link: 0,
            records: 0,
            epoch: Epoch(0),
            formations: BTreeMap::new(),
            manifests: BTreeMap::new(),
            ever_committed: BTreeSet::new(),
            unreadable: BTreeSet::new(),
            parts: BTreeMap::new(),
            metrics: BTreeSet::new(),
            coordinators: Vec::new(),
            workers: BTreeMap::new(),
            rings: BTreeMap::new(),
            rifts: BTreeMap::new(),
            calm: false,
            hunted: 0,
            reached: Step(0),
            completed: false,
            report: Report::default(),
        };
        let total = 8 + world.below(24);
        world.options.total = Step(total);
        world.options.desired = 1 + world.below(5) as u32;
        world.options.min = 1 + world.below(u64::from(world.options.desired).min(2)) as u32;
        world.options.lanes = 1 << (1 + world.below(3));
        world.options.by_speed = world.chance(2);
        world.every = 2 + world.below(6);
        world.blocks = 1 + world.below(8);
        world.shared = world.chance(2);
        world.chaos_until = 500 + world.below(2500);
        world.begin(seed);
        world.after(50, Happening::Chaos);
        world
    }

    /// A long run to which nothing happens but that the network is cut in two, once in the midst of it.
    pub fn halved(seed: u64, verbose: bool) -> Self {
        let mut world = Self::new(seed, None, verbose);
        world.queue.clear();
        (world.calm, world.chaos_until) = (true, 0);
        world.options.desired = 2 + world.below(7) as u32;
        world.options.min = 1;
        world.options.lanes = 8;
        world.options.total = Step(300);
        world.reference.clear();
        world.begin(seed);
        let at = 200 + world.below(1500);
        world.at(at, Happening::Halve);
        world
    }

    /// A run to which nothing happens but that of the first rings each loses a member while it forms: one that is asked to go, or dies.
    pub fn hunted(seed: u64, verbose: bool) -> Self {
        let mut world = Self::new(seed, None, verbose);
        world.queue.clear();
        (world.hunted, world.chaos_until) = (12, 0);
        world.options.desired = 2 + world.below(4) as u32;
        world.options.total = Step(40);
        world.reference.clear();
        world.begin(seed);
        world
    }

    /// What an undisturbed run comes to, and the first processes.
    fn begin(&mut self, seed: u64) {
        let mut state = mix(seed, 7);
        self.reference.push(state);
        for step in 0..self.options.total.0 {
            state = advance_state(state, Step(step), 0..self.options.lanes);
            self.reference.push(state);
        }
        self.after(0, Happening::StartCoordinator);
        self.after(0, Happening::Launch);
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
        // So does what is for a coordinator that sleeps.
        if let Some(coordinator) = addressee(&happening) {
            let until = self.coordinators[coordinator].asleep_until;
            if until > self.now {
                self.at(until, happening);
                return Ok(());
            }
        }
        match happening {
            Happening::Connect { worker } => self.connect(worker),
            Happening::Heartbeat { worker } => {
                let stance = self.workers[&worker].machine.stance().clone();
                self.say(worker, stance);
                self.say_pace(worker);
                self.after(HEARTBEAT, Happening::Heartbeat { worker });
            }
            Happening::Paced { coordinator, link, worker, pace } => {
                if self.coordinators[coordinator].links.get(&worker) == Some(&link) {
                    return self.tell_core(coordinator, Event::Paced { worker, pace });
                }
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
                    known.sent_away.remove(&worker);
                    known.rows.connected(worker);
                    self.welcome(coordinator, worker);
                    let (endpoints, machine) = (Endpoints::default(), machine_of(worker));
                    return self.tell_core(coordinator, Event::Linked { worker, endpoints, machine, stance });
                }
                if known.links.get(&worker) == Some(&link) {
                    return self.tell_core(coordinator, Event::Stands { worker, stance });
                }
            }
            Happening::Rows { coordinator, link, worker, steps } => {
                if self.coordinators[coordinator].links.get(&worker) == Some(&link) {
                    return self.told_rows(coordinator, steps);
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
            Happening::Welcome { worker, link, reported } => self.welcomed(worker, link, reported),
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
            Happening::Prepare { worker, generation, token } => self.prepare(worker, generation, token),
            Happening::Spread { generation, token } => self.spread(generation, token),
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
            Happening::Unanswered { worker, generation, peer } => {
                return self.unanswered(worker, generation, peer);
            }
            Happening::Wrote { worker, written, state, leave } => {
                let generation = written.generation;
                if self.chaos() && self.chance(20) {
                    self.fail_to_write(worker, written)?;
                } else {
                    self.wrote(worker, written, state)?;
                }
                if let Some(cause) = leave
                    && self.workers.get(&worker).is_some_and(|known| known.ring == Some(generation))
                {
                    return self.leave_ring(worker, cause);
                }
            }
            Happening::LetGo { worker, step, generation } => {
                return self.tell_worker(worker, Happens::LetGo { step, generation });
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
            Happening::Kill { worker } => self.kill(worker),
            Happening::Terminate { worker } => return self.tell_worker(worker, Happens::Terminate),
            Happening::Launch => self.launch(),
            Happening::Chaos => return self.wreak(),
            Happening::Halve => self.halve(),
            Happening::Differ { worker, generation, flipped } => {
                return self.differ(worker, generation, flipped);
            }
        }
        Ok(())
    }
}

//! The model thread: gets state, meets the peers, and trains until the ring ends.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anello_collective::{
    AbortHandle, Collective, Error as RingError, Generation as RingGeneration, Rank, Shape, Step as RingStep,
    tcp,
};
use anello_configs::{Fault, RunConfig, Schedule, StepPlan, Trains};
use anello_dataloader::{LaneStep, Loader, LoaderOptions};
use anello_member::Event;
use anello_proto::ring::{Cause, Formation, Generation, Source, Step, WorkerId};
use anello_proto::v1;
use anello_store::events::Event as Logged;
use anello_store::metrics::{Seconds, StepRecord};
use anello_store::{Cursor, ENVIRONMENT, Error as StoreError, Store, read_config};
use anello_tls::Tls;
use tch::{Device, Tensor};
use tokio::sync::mpsc::UnboundedSender;

use super::WorkerOptions;
use super::parts::{self, Copy, PartsWriter};
use super::peers::{HostState, Shelf, gather};
use super::replicas;
use super::spot::{self, Spot};
use super::sum::add_up;
use super::word::{Agreed, Word, agree};
use crate::account::{Epochs, Stamp, position_after, skip_event};
use crate::checkpoint::{self, Snapshot, state_of};
use crate::engine::{Engine, Growing};
use crate::error::{Error, Result};
use crate::ffi;
use crate::init::initial_state;
use crate::params::{BLOCK, Layout};

/// What the model thread is told.
pub(super) enum Command {
    Form { formation: Arc<Formation>, worker: WorkerId, abort: AbortHandle, hold: Arc<AtomicU8> },
}

/// What it tells.
pub(super) enum Told {
    Event(Event),
    Step(v1::StepReport),
    /// It cannot serve this run at all.
    Failed(Error),
}

/// What connects the model thread to the rest of the process.
pub(super) struct Outside {
    /// Where peers meet this worker.
    pub listener: tcp::Listener,
    /// Where state for peers that lack it is laid.
    pub shelf: Shelf,
    /// On the way to peers that have state.
    pub tls: Option<Tls>,
    /// What drives the connections to peers that have state.
    pub runtime: tokio::runtime::Handle,
    /// Who hears what happens.
    pub tell: UnboundedSender<Told>,
}

/// A hand on the model thread.
pub(super) struct Model {
    commands: Sender<Command>,
    parts: Sender<parts::Told>,
}

impl Model {
    /// Starts it for the run in `store`.
    pub fn start(store: Store, options: &WorkerOptions, outside: Outside) -> Result<Self> {
        let (commands, inbox) = channel();
        let (threads, job) = (options.threads, options.job.clone());
        let parts = parts::inbox();
        let to_parts = parts.0.clone();
        std::thread::Builder::new()
            .name("model".to_owned())
            .spawn(move || {
                let failed = outside.tell.clone();
                match Thread::new(store, job, threads, parts, outside) {
                    Ok(thread) => thread.run(&inbox),
                    Err(error) => drop(failed.send(Told::Failed(error))),
                }
            })
            .map_err(|source| Error::System { action: "starting the model thread", source })?;
        Ok(Self { commands, parts: to_parts })
    }

    /// The checkpoint of this step is committed.
    pub fn committed(&self, step: Step) {
        let _ = self.parts.send(parts::Told::Committed(step));
    }

    /// The second copy that is kept for this checkpoint is to be written.
    pub fn write_kept(&self, step: Step, generation: Generation) {
        let _ = self.parts.send(parts::Told::WriteKept(step, generation));
    }

    pub fn command(&self, command: Command) {
        // A thread that is gone has told why.
        let _ = self.commands.send(command);
    }
}

/// Longest wait for peers: the coordinator's abort is what ends a wait for one that is dead.
const MEET: Duration = Duration::from_secs(24 * 3600);
/// Pause between two attempts to read a checkpoint from a store that does not answer.
const RETRY: Duration = Duration::from_secs(2);

/// A part of serving a generation; the error is why it ended.
type Served<T> = std::result::Result<T, Cause>;

/// What this worker holds.
struct Held {
    engine: Engine,
    step: Step,
    /// Of all lanes of the run.
    cursors: Vec<Cursor>,
}

struct Thread {
    store: Store,
    job: String,
    config: RunConfig,
    schedule: Schedule,
    data: LoaderOptions,
    stamp: Stamp,
    /// Epochs that this worker's own lanes were in, and those that the log was told of; absent before the first ring.
    epochs: Epochs,
    told: Option<Epochs>,
    listener: tcp::Listener,
    shelf: Shelf,
    tls: Option<Tls>,
    runtime: tokio::runtime::Handle,
    tell: UnboundedSender<Told>,
    held: Option<Held>,
    /// The buffer that gradients are gathered in.
    total: Option<Tensor>,
    writer: PartsWriter,
}

/// One generation, as a member serves it.
struct Serving<'a> {
    formation: &'a Formation,
    rank: usize,
    lanes: Range<u32>,
    hold: &'a AtomicU8,
}

impl Thread {
    fn new(
        store: Store,
        job: String,
        threads: Option<u32>,
        parts: (Sender<parts::Told>, Receiver<parts::Told>),
        outside: Outside,
    ) -> Result<Self> {
        let Outside { listener, shelf, tls, runtime, tell } = outside;
        let mut config = read_config(&store)?;
        config.compute.threads = threads.or(config.compute.threads);
        if let Some(threads) = config.compute.threads {
            tch::set_num_threads(threads as i32);
        }
        let data = LoaderOptions::of(&config)?;
        let stamp = Stamp::new(&config, &data);
        // Where the run was started: by the first worker that came.
        store.create(ENVIRONMENT, stamp.environment.to_json())?;
        let told = tell.clone();
        let writer = PartsWriter::start(store.clone(), config.checkpoint.part_bytes, parts, move |event| {
            let _ = told.send(Told::Event(event));
        })?;
        let schedule = Schedule::new(&config);
        Ok(Self {
            store,
            job,
            config,
            schedule,
            data,
            stamp,
            epochs: Epochs::default(),
            told: None,
            listener,
            shelf,
            tls,
            runtime,
            tell,
            held: None,
            total: None,
            writer,
        })
    }

    fn run(mut self, inbox: &Receiver<Command>) {
        while let Ok(Command::Form { formation, worker, abort, hold }) = inbox.recv() {
            let cause = self.serve(&formation, worker, &abort, &hold).unwrap_or_else(|cause| cause);
            *self.shelf.write().expect("no holder panics") = None;
            if let Some(held) = &mut self.held {
                held.engine.abandon();
            }
            let (generation, holds) = (formation.generation, self.held.as_ref().map(|held| held.step));
            tracing::info!(%generation, ?holds, ?cause, "left the ring");
            self.event(Event::Left { generation, holds, cause });
        }
    }

    fn event(&self, event: Event) {
        let _ = self.tell.send(Told::Event(event));
    }

    /// Serves one generation from its start to its end; both `Ok` and `Err` are why it ended.
    fn serve(
        &mut self,
        formation: &Formation,
        worker: WorkerId,
        abort: &AbortHandle,
        hold: &AtomicU8,
    ) -> Served<Cause> {
        let generation = formation.generation;
        let rank =
            formation.rank(worker).ok_or_else(|| fault("this worker is no member of the generation"))?;
        let serving = Serving { formation, rank, lanes: formation.members[rank].lanes.clone(), hold };
        if self.told.is_none() {
            self.told = Some(Epochs::told_before(&self.store, formation.start.0));
        }
        self.take_state(&serving, abort)?;
        let mut ring = self.meet(&serving, abort)?;
        *self.shelf.write().expect("no holder panics") = None;
        let start = formation.start;
        self.event(Event::Ready { generation, holds: start });
        if formation.save_first && self.is_due(start.0) {
            self.snapshot(&ring, formation);
        }
        let schedule = self.schedule.clone();
        let mut loader = None;
        let mut at = start.0;
        loop {
            let Some(plan) = schedule.at(at) else {
                self.writer.wait();
                return Ok(Cause::Ended);
            };
            // A stack that grows, or parameters that freeze, change what the ring adds up: the next generation begins with that.
            let before = at.checked_sub(1).and_then(|before| schedule.at(before));
            let freezes = before.is_some_and(|before| before.stage.trains != plan.stage.trains);
            if (plan.upcycle.is_some() || freezes) && at > start.0 {
                return Ok(Cause::Ordered);
            }
            if loader.is_none() && !serving.lanes.is_empty() {
                loader = Some(self.loader(&serving.lanes, at)?);
            }
            let (control, mut report) = self.step(&plan, &serving, &mut ring, loader.as_mut())?;
            at += 1;
            self.inject_fault(at, rank);
            let due = self.is_due(at) || control == 2;
            let compared = self.compare_replicas(&mut ring, at, due, formation);
            if due && compared.is_ok() {
                let stalled = Instant::now();
                self.snapshot(&ring, formation);
                add_checkpoint_seconds(&mut report, stalled.elapsed().as_secs_f64());
            }
            // Whatever comes after it, the step is applied.
            let _ = self.tell.send(Told::Step(report));
            compared?;
            tracing::debug!(generation = formation.generation.0, step = at, "applied a step");
            self.event(Event::Applied { holds: Step(at) });
            if control > 0 && at < schedule.total_steps() {
                if control == 2 {
                    self.writer.wait();
                }
                return Ok(Cause::Ordered);
            }
        }
    }

    /// Makes this worker hold the state after the generation's start, and offers it to members that lack it.
    fn take_state(&mut self, serving: &Serving<'_>, abort: &AbortHandle) -> Served<()> {
        let Formation { generation, start, source, members, .. } = serving.formation;
        let holds = self.held.as_ref().is_some_and(|held| held.step == *start);
        match source {
            Source::Peers { holders } => {
                if !holds {
                    let addresses = members
                        .iter()
                        .filter(|member| holders.contains(&member.worker))
                        .map(|member| member.endpoints.peers.clone())
                        .collect();
                    let tls = self.tls.as_ref();
                    let gathered = self.runtime.block_on(gather(addresses, tls, *generation, *start, abort));
                    let state = gathered.map_err(|reason| broken(None, reason))?;
                    self.hold_host_state(state);
                } else if holders.len() < members.len() {
                    // Some holders may have begun this step in a ring that broke: what a stage does before its first step
                    // is then done to the state of all, once more where it was.
                    if let (Some(plan), Some(held)) = (self.schedule.at(start.0), &mut self.held) {
                        held.engine.enter(&plan);
                    }
                    self.offer(*generation);
                }
            }
            Source::Seed if !holds => {
                let state =
                    initial_state(&self.config, Device::Cpu).map_err(|error| fault(error.to_string()))?;
                let engine = Engine::with_state(&self.config, state);
                let cursors = vec![Cursor::default(); self.config.lanes as usize];
                self.held = Some(Held { engine, step: Step(0), cursors });
            }
            Source::Seed => {}
            Source::Checkpoint { step } => self.load(*step, abort)?,
        }
        Ok(())
    }

    fn load(&mut self, step: Step, abort: &AbortHandle) -> Served<()> {
        loop {
            match checkpoint::load(&self.store, step.0, &self.config.model, Device::Cpu) {
                Ok(loaded) => {
                    let cursors = loaded.manifest.cursors;
                    let engine = Engine::with_state(&self.config, loaded.state);
                    self.held = Some(Held { engine, step, cursors });
                    return Ok(());
                }
                Err(damaged @ Error::Store(StoreError::Checkpoint { .. })) => {
                    return Err(Cause::NoState { reason: damaged.to_string() });
                }
                Err(cause) => {
                    tracing::warn!(%cause, %step, "a checkpoint cannot be read now");
                    let until = Instant::now() + RETRY;
                    while Instant::now() < until {
                        if let Some(reason) = abort.reason() {
                            return Err(broken(None, reason.to_owned()));
                        }
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
            }
        }
    }

    fn hold_host_state(&mut self, state: HostState) {
        let layout = Layout::new(&self.config.model, state.layers);
        let moments = state_of(layout, &state.buffers, state.updates, Device::Cpu);
        let engine = Engine::with_state(&self.config, moments);
        self.held = Some(Held { engine, step: state.step, cursors: state.cursors });
    }

    fn offer(&self, generation: Generation) {
        let held = self.held.as_ref().expect("only a holder offers");
        let Snapshot { facts, buffers, .. } = self.copy(0..held.engine.state().layout.blocks());
        let (updates, layers, cursors) = (facts.updates, facts.layers, facts.cursors);
        let state = HostState { generation, step: held.step, updates, layers, cursors, buffers };
        *self.shelf.write().expect("no holder panics") = Some(Arc::new(state));
    }

    fn meet(&mut self, serving: &Serving<'_>, abort: &AbortHandle) -> Served<tcp::Tcp> {
        let Formation { generation, start, members, .. } = serving.formation;
        let held = self.held.as_ref().expect("state was taken");
        let plan = self.schedule.at(start.0);
        let upcycle = plan.as_ref().and_then(|plan| plan.upcycle);
        let trains = plan.map_or(Trains::All, |plan| plan.stage.trains);
        let layers = upcycle.map_or(held.engine.state().layout.layers() as u32, |upcycle| upcycle.layers);
        let layout = Layout::new(&self.config.model, layers);
        let addresses = members.iter().map(|member| {
            member.endpoints.ring.iter().map(|text| text.parse()).collect::<std::result::Result<Vec<_>, _>>()
        });
        let addresses: std::result::Result<Vec<_>, _> = addresses.collect();
        let options = tcp::Options {
            rank: Rank(serving.rank as u32),
            members: addresses.map_err(|cause| fault(format!("a member's address is none: {cause}")))?,
            shape: Shape {
                ranges: members.iter().map(|member| member.lanes.clone()).collect(),
                blocks: layout.blocks() as u32,
                block_len: BLOCK,
                order: layout
                    .backward_blocks(trains)
                    .into_iter()
                    .flatten()
                    .map(|block| block as u32)
                    .collect(),
            },
            generation: RingGeneration(generation.0),
            job: self.job.clone(),
            config_digest: self.stamp.config.clone(),
            build: self.stamp.environment.build(),
            deadline: MEET,
            socket_buffer_bytes: None,
            abort: abort.clone(),
        };
        tcp::connect(&mut self.listener, &options).map_err(|error| cause_of(&error, serving.formation))
    }

    fn loader(&self, lanes: &Range<u32>, step: u64) -> Served<Loader> {
        let held = self.held.as_ref().expect("state was taken");
        let cursors = held.cursors[lanes.start as usize..lanes.end as usize].to_vec();
        let (serve, cursors) = (lanes.clone(), Some(cursors));
        let options = LoaderOptions { serve, start_step: step, cursors, ..self.data.clone() };
        Loader::open(options).map_err(|error| fault(error.to_string()))
    }

    /// One step: own lanes, the sum of all, the update. Returns the control word that all agreed on, and what there is to
    /// report.
    fn step(
        &mut self,
        plan: &StepPlan<'_>,
        serving: &Serving<'_>,
        ring: &mut tcp::Tcp,
        mut loader: Option<&mut Loader>,
    ) -> Served<(u8, v1::StepReport)> {
        let _step = tracing::trace_span!("step", step = plan.step, rank = serving.rank).entered();
        let began = Instant::now();
        let mut seconds = Seconds::default();
        let every = self.config.ring.spot_check_every_steps;
        let spot = Spot::at(self.config.seed, every, plan.step, serving.formation);
        let own_spot = spot.as_ref().is_some_and(|spot| spot.owner == serving.rank);
        let faulty = own_spot && self.take_gradient_fault(plan.step, serving.rank);
        let mut own_hash = Vec::new();
        let mut check_lane = |lane: u32, gradient: &mut Tensor| {
            if spot.as_ref().is_some_and(|spot| spot.lane == lane) {
                if faulty {
                    flip_a_bit(gradient);
                }
                own_hash = spot::hash(gradient);
            }
        };
        let Held { engine, .. } = self.held.as_mut().expect("state was taken");
        engine.enter(plan);
        let mut word = Word { control: 0, sums: Vec::new(), cursors: Vec::new(), events: Vec::new() };
        let mut total = match self.total.take() {
            Some(total) if total.numel() == engine.state().layout.len() => total,
            _ => engine.state().layout.zeros(Device::Cpu),
        };
        let mut last = None;
        for lane in serving.lanes.clone() {
            let waited = Instant::now();
            let loader = loader.as_mut().expect("a worker with lanes has a loader");
            let data = tracing::trace_span!("data", lane).entered();
            let lane_step = next_lane_step(loader, plan.step, lane)?;
            drop(data);
            seconds.data += waited.elapsed().as_secs_f64();
            word.events.extend(self.epochs.data_events(&lane_step));
            word.cursors.push(lane_step.cursor);
            if lane + 1 == serving.lanes.end {
                last = Some(lane_step.micro_batches);
                break;
            }
            let computed = Instant::now();
            let _lane = tracing::trace_span!("lane", lane).entered();
            let (mut gradient, sums) = engine.lane_gradient(plan.stage, &lane_step.micro_batches);
            check_lane(lane, &mut gradient);
            engine.fold_lane(lane, gradient, sums);
            seconds.compute += computed.elapsed().as_secs_f64();
        }
        let (mut computed, began_last) = (Duration::ZERO, Instant::now());
        let hold = serving.hold;
        let word = |sums| {
            word.sums = sums;
            word.control = hold.load(Ordering::Relaxed);
            word.encode()
        };
        let ((), words) = add_up(ring, RingStep(plan.step), &mut total, word, |tell| {
            let Some(micro_batches) = last else { return };
            let lane = serving.lanes.end - 1;
            let _lane = tracing::trace_span!("lane", lane).entered();
            engine.last_lane(plan.stage, lane, &micro_batches, &mut |mut growing| {
                if let Growing::Lane(gradient) = &mut growing {
                    check_lane(lane, gradient);
                }
                tell(growing);
            });
            computed = began_last.elapsed();
        });
        seconds.compute += computed.as_secs_f64();
        seconds.reduce = (began_last.elapsed() - computed).as_secs_f64();
        engine.abandon();
        self.total = Some(total);
        let words = words.map_err(|error| cause_of(&error, serving.formation))?;
        if let Some(spot) = spot {
            self.spot_check(plan, serving, ring, &spot, own_hash)?;
        }
        let Self { held, total, .. } = self;
        let (Some(Held { engine, cursors, .. }), Some(total)) = (held, total) else {
            unreachable!("both were there at the beginning of the step");
        };
        let lanes: Vec<Range<u32>> =
            serving.formation.members.iter().map(|member| member.lanes.clone()).collect();
        let mut moved = cursors.clone();
        let Agreed { control, sums, events } =
            agree(&words, &lanes, &mut moved).map_err(|error| fault(error.to_string()))?;

        let updated = Instant::now();
        let outcome = engine.finish_with(plan, total, sums);
        *cursors = moved;
        let held = self.held.as_mut().expect("state was taken");
        held.step = Step(plan.step + 1);
        seconds.update = updated.elapsed().as_secs_f64();
        seconds.step = began.elapsed().as_secs_f64();
        let mut events = self.told.get_or_insert_default().not_told(events);
        events.extend(
            plan.first_of_stage.then(|| Logged::Stage { step: plan.step, stage: plan.stage.name.clone() }),
        );
        events.extend(skip_event(plan, &outcome));
        Ok((control, report(outcome.record(plan, seconds), &events)))
    }

    /// Whether a checkpoint is due after `at` steps.
    fn is_due(&self, at: u64) -> bool {
        let last = at.checked_sub(1).and_then(|step| self.schedule.at(step));
        last.is_some_and(|last| last.last_of_stage || at.is_multiple_of(self.config.checkpoint.every_steps))
    }

    /// Ends the ring when the replicas differ after `at` steps.
    fn compare_replicas(&self, ring: &mut tcp::Tcp, at: u64, due: bool, formation: &Formation) -> Served<()> {
        let every = self.config.ring.digest_every_steps;
        if every == 0 || formation.members.len() < 2 || !(due || at.is_multiple_of(every)) {
            return Ok(());
        }
        let _span = tracing::trace_span!("compare replicas").entered();
        let held = self.held.as_ref().expect("state was taken");
        match replicas::compare(ring, at, held.engine.state(), formation) {
            Ok(None) => Ok(()),
            Ok(Some(diverged)) => Err(diverged),
            Err(error) => Err(cause_of(&error, formation)),
        }
    }

    /// For tests: flips the lowest bit of one number, once, when the config says so.
    fn inject_fault(&mut self, at: u64, rank: usize) {
        let fault =
            self.config.ring.fault.take_if(|fault| {
                (fault.step, fault.rank as usize) == (at, rank) && fault.buffer != "gradient"
            });
        if let (Some(fault), Some(held)) = (fault, &self.held) {
            let state = held.engine.state();
            let buffer = match fault.buffer.as_str() {
                "exp_avg" => &state.exp_avg,
                "exp_avg_sq" => &state.exp_avg_sq,
                _ => &state.weights,
            };
            let mut same_memory = buffer.shallow_clone();
            flip_a_bit(&mut same_memory);
            tracing::warn!(step = at, buffer = fault.buffer, "flipped a bit, as the config says");
        }
    }

    /// For tests: whether this worker is to compute the lane that is checked at `step` wrongly, once.
    fn take_gradient_fault(&mut self, step: u64, rank: usize) -> bool {
        let due = |fault: &mut Fault| {
            fault.buffer == "gradient" && fault.step <= step && fault.rank as usize == rank
        };
        self.config.ring.fault.take_if(due).is_some()
    }

    /// Has one lane's gradient computed by a second member, and by a third when the two differ, before anything of the step
    /// is applied.
    fn spot_check(
        &mut self,
        plan: &StepPlan<'_>,
        serving: &Serving<'_>,
        ring: &mut tcp::Tcp,
        spot: &Spot,
        own_hash: Vec<u8>,
    ) -> Served<()> {
        let _span = tracing::trace_span!("spot check").entered();
        let ended = |error: RingError| cause_of(&error, serving.formation);
        let rank = serving.rank;
        let said = if rank == spot.witness { self.recompute(plan, spot.lane)? } else { own_hash };
        let first = ring.exchange(RingStep(plan.step), &said).map_err(ended)?;
        if spot.agrees(&first) {
            return Ok(());
        }
        let said = if Some(rank) == spot.judge { self.recompute(plan, spot.lane)? } else { Vec::new() };
        let second = ring.exchange(RingStep(plan.step), &said).map_err(ended)?;
        Err(spot.verdict(plan.step, &first, &second, serving.formation))
    }

    /// Hash of the gradient of a lane that another member serves.
    fn recompute(&mut self, plan: &StepPlan<'_>, lane: u32) -> Served<Vec<u8>> {
        let mut loader = self.loader(&(lane..lane + 1), plan.step)?;
        let lane_step = next_lane_step(&mut loader, plan.step, lane)?;
        let engine = &mut self.held.as_mut().expect("state was taken").engine;
        let (gradient, _) = engine.lane_gradient(plan.stage, &lane_step.micro_batches);
        let hash = spot::hash(&gradient);
        engine.recycle(gradient);
        Ok(hash)
    }

    /// Copies this worker's blocks, and a second time those of the next member, and hands them to the writer.
    fn snapshot(&mut self, ring: &tcp::Tcp, formation: &Formation) {
        let _span = tracing::trace_span!("checkpoint").entered();
        self.writer.wait();
        let (ring, count) = (ring.ring(), formation.members.len());
        let next = (ring.rank().index() + 1) % count;
        let second =
            (count > 1).then(|| (formation.members[next].worker, self.copy(ring.blocks(Rank(next as u32)))));
        self.writer.write(Copy {
            generation: formation.generation,
            all_blocks: u64::from(ring.shape().blocks),
            own: self.copy(ring.blocks(ring.rank())),
            next: second,
        });
    }

    /// A copy on the host of some blocks.
    fn copy(&self, blocks: Range<usize>) -> Snapshot {
        let held = self.held.as_ref().expect("state was taken");
        let position = position_after(&self.schedule, held.step.0);
        let facts = self.stamp.facts(held.engine.state(), position, held.cursors.clone());
        Snapshot::take(held.engine.state(), blocks, facts)
    }
}

/// What `lane` is to compute at `step`: the loader serves lanes in this very order.
fn next_lane_step(loader: &mut Loader, step: u64, lane: u32) -> Served<LaneStep> {
    let lane_step = loader.next().ok_or_else(|| fault("the loader ends before the run"))?;
    let lane_step = lane_step.map_err(|error| fault(error.to_string()))?;
    // A batch belongs to a step and a lane, never to an iterator's place.
    assert_eq!((lane_step.step, lane_step.lane), (step, lane), "the loader serves another step");
    Ok(lane_step)
}

/// For tests.
fn flip_a_bit(buffer: &mut Tensor) {
    let value = &mut ffi::as_mut_slice(buffer)[7];
    *value = f32::from_bits(value.to_bits() ^ 1);
}

fn fault(reason: impl Into<String>) -> Cause {
    Cause::Fault { reason: reason.into() }
}

fn broken(lost: Option<WorkerId>, reason: String) -> Cause {
    Cause::Broken { lost, reason }
}

/// Why the ring is left, by what ended the collective.
fn cause_of(error: &RingError, formation: &Formation) -> Cause {
    let reason = error.to_string();
    match error {
        RingError::Lost { rank, .. } => {
            broken(formation.members.get(rank.index()).map(|member| member.worker), reason)
        }
        RingError::Aborted { .. }
        | RingError::Deadline { .. }
        | RingError::Dead { .. }
        | RingError::System { .. } => broken(None, reason),
        RingError::Corrupt { .. }
        | RingError::Protocol { .. }
        | RingError::Refused { .. }
        | RingError::Untrusted { .. }
        | RingError::Shape { .. } => fault(reason),
    }
}

/// A checkpoint's copy was waited for after the step, as a part of it.
fn add_checkpoint_seconds(report: &mut v1::StepReport, seconds: f64) {
    report.seconds[0] += seconds;
    report.seconds[5] += seconds;
}

fn report(record: StepRecord, events: &[Logged]) -> v1::StepReport {
    let Seconds { step, data, compute, reduce, update, checkpoint } = record.seconds;
    v1::StepReport {
        step: record.step,
        stage: record.stage,
        tokens: record.tokens,
        batch_tokens: record.batch_tokens,
        counted: record.counted,
        lr: record.lr,
        loss: record.loss,
        loop_loss: record.loop_loss,
        exit: record.exit,
        entropy: record.entropy,
        grad_norm: record.grad_norm,
        applied: record.applied,
        seconds: vec![step, data, compute, reduce, update, checkpoint],
        events: events
            .iter()
            .map(|event| {
                serde_json::to_string(event).expect("an event has no map with keys that are not strings")
            })
            .collect(),
    }
}

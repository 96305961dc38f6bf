//! The model thread: gets state, meets the peers, and trains until the ring ends.
//!
//! Here are the thread and its loop over steps; `state` takes state where a generation says, offers and copies it,
//! `loading` reads a checkpoint together with the others, `learning` is a state that is sent while the others train, `step` is
//! one step of the ring, `rollback` undoes a loss spike, `faults` does the harm that tests ask for.

mod faults;
mod learning;
mod loading;
mod rollback;
mod state;
mod step;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anello_collective::{
    AbortHandle, Collective, Error as RingError, Generation as RingGeneration, Rank, Shape, Step as RingStep,
    tcp,
};
use anello_configs::{ComputeDevice, RunConfig, Schedule, StateCopies, StepPlan, Trains, Transport};
use anello_dataloader::{Loader, LoaderOptions};
use anello_member::Event;
use anello_proto::ring::{Cause, Formation, Generation, Member, Shard, Source, Step, WorkerId};
use anello_proto::v1;
use anello_store::{Cursor, ENVIRONMENT, Store, read_config};
use anello_tls::Tls;
use tch::{Device, Kind, Tensor};
use tokio::sync::mpsc::UnboundedSender;

use self::learning::{Learning, Share, ToLearn};
use super::circle::Rows;
use super::gpus::{Gpus, Nccl};
use super::live::Live;
use super::parts::{self, PartsWriter};
use super::peers::{self, Shelf};
use super::sum::Total;
use super::{Load, WorkerOptions};
use crate::account::{Epochs, Stamp};
use crate::cover::Cover;
use crate::device;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::kernels::{self, Kernels};
use crate::optimizer::{Prepared, State};
use crate::params::{BLOCK, Layout};
use crate::validate::HeldOut;

/// What the model thread is told.
pub(super) enum Command {
    Form {
        formation: Arc<Formation>,
        worker: WorkerId,
        abort: AbortHandle,
        hold: Arc<AtomicU8>,
        /// Of a peer, after which it cannot be reached.
        silence: Duration,
    },
}

/// What it tells.
pub(super) enum Told {
    Event(Event),
    /// A step is applied: its figures, and how the worker is after it.
    Step(v1::StepReport, Load),
    /// The figures of the steps before, that came with a state.
    Took(Rows),
    /// It cannot serve this run at all.
    Failed(Error),
}

/// What connects the model thread to the rest of the process.
pub(super) struct Outside {
    /// Where peers meet this worker.
    pub listener: tcp::Listener,
    /// Where state for peers that lack it is laid.
    pub shelf: Shelf,
    /// The figures of steps, which the shell keeps.
    pub rows: peers::SharedRows,
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
        let (threads, device, job) = (options.threads, options.device, options.job.clone());
        let parts = parts::inbox();
        let to_parts = parts.0.clone();
        std::thread::Builder::new()
            .name("model".to_owned())
            .spawn(move || {
                let failed = outside.tell.clone();
                match Thread::new(store, job, (threads, device), parts, outside) {
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

/// A part of serving a generation; the error is why it ended.
type Served<T> = std::result::Result<T, Cause>;

/// What this worker holds.
struct Held {
    engine: Engine,
    step: Step,
    /// Of all lanes of the run.
    cursors: Vec<Cursor>,
    /// The step after, as far as it was made ready; absent: nothing of it.
    pending: Option<Pending>,
    /// What it was before a stage grew the stack, until the first step of that stage is applied.
    before: Option<State>,
    /// Blocks for whose moments there is room, and which did not come.
    missing: Cover,
}

/// What it takes to bring shared-out moments to the step after.
struct Pending {
    prepared: Prepared,
    /// Where all lanes are then.
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
    rows: peers::SharedRows,
    tls: Option<Tls>,
    /// Of a peer, after which it cannot be reached.
    silence: Duration,
    runtime: tokio::runtime::Handle,
    tell: UnboundedSender<Told>,
    device: Device,
    /// Those of `compute.fused`.
    kernels: Option<Kernels>,
    /// Where gradients travel by it.
    nccl: Option<Nccl>,
    held: Option<Held>,
    /// What is held, for others to read from or to fill in between two updates, while the ring has learners.
    live: Option<Arc<Live>>,
    /// The state is on its way: what is held of it is not to be counted on.
    learning: Option<Learning>,
    /// What is to be learned, until all have met.
    to_learn: Option<ToLearn>,
    /// Moments on their way that this worker will need when the learners are given lanes.
    share: Option<Share>,
    /// Steps that were applied when the mathematics of the run last changed, as the log said in this generation.
    changed: Option<(Generation, Option<u64>)>,
    held_out: Option<HeldOut>,
    /// The buffer that gradients are gathered in.
    total: Option<Total>,
    writer: PartsWriter,
}

/// What a step came to.
struct Stepped {
    /// The control word that all agreed on.
    control: u8,
    /// What there is to report.
    report: v1::StepReport,
    /// Whether all of the state was here to report from.
    is_whole: bool,
    /// Whether it was a spike, and the state is that of some steps before.
    undone: bool,
}

/// One generation, as a member serves it.
struct Serving<'a> {
    formation: &'a Formation,
    rank: usize,
    lanes: Range<u32>,
    hold: &'a AtomicU8,
    /// The moments are shared out over those that train, and every step spreads its weights.
    shared: bool,
    /// Members that have the state; those of later ranks are learners.
    trainers: usize,
    /// Learners get the state while the others train.
    meanwhile: bool,
    abort: &'a AbortHandle,
}

impl Thread {
    fn new(
        store: Store,
        job: String,
        (threads, device): (Option<u32>, Option<ComputeDevice>),
        parts: (Sender<parts::Told>, Receiver<parts::Told>),
        outside: Outside,
    ) -> Result<Self> {
        let Outside { listener, shelf, rows, tls, runtime, tell } = outside;
        let mut config = read_config(&store)?;
        config.compute.threads = threads.or(config.compute.threads);
        config.compute.device = device.unwrap_or(config.compute.device);
        let store = store.limited(config.store.bandwidth);
        if let Some(threads) = config.compute.threads {
            tch::set_num_threads(threads as i32);
        }
        let data = LoaderOptions::of(&config)?;
        let held_out = HeldOut::open(&config)?;
        let device = device::open(config.compute.device)?;
        let kernels = kernels::of(&config.compute, device)?;
        let nccl = match config.ring.transport {
            Transport::Tcp => None,
            Transport::Nccl => Some(load_nccl(device)?),
        };
        let stamp = Stamp::new(&config, &data, device);
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
            rows,
            tls,
            silence: Duration::ZERO,
            runtime,
            tell,
            device,
            kernels,
            nccl,
            held: None,
            live: None,
            learning: None,
            to_learn: None,
            share: None,
            changed: None,
            held_out,
            total: None,
            writer,
        })
    }

    fn run(mut self, inbox: &Receiver<Command>) {
        while let Ok(Command::Form { formation, worker, abort, hold, silence }) = inbox.recv() {
            self.silence = silence;
            let cause = self.serve(&formation, worker, &abort, &hold).unwrap_or_else(|cause| cause);
            self.lend_no_more();
            if let Some(held) = &mut self.held {
                held.engine.abandon();
                // What was made ready of a step may be what another member needs to go on from it.
                if held.pending.is_none() {
                    held.step_back();
                }
            }
            let (generation, holds) = (formation.generation, self.held.as_ref().map(|held| held.step));
            let shard = self.held.as_ref().and_then(Held::shard);
            tracing::info!(%generation, ?holds, ?shard, ?cause, "left the ring");
            self.event(Event::Left { generation, holds, shard, cause });
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
        let lanes = formation.members[rank].lanes.clone();
        let (trainers, members) = (formation.trainers(), formation.members.len());
        // Of two that train, each has what it owns and what the other does: all.
        let shared = match self.config.ring.state_copies {
            StateCopies::All => false,
            StateCopies::Two => trainers > 2 || trainers < members,
        };
        let meanwhile = self.can_learn_from(formation.start, shared);
        let serving = Serving { formation, rank, lanes, hold, shared, trainers, meanwhile, abort };
        if self.told.is_none() {
            self.told = Some(Epochs::told_before(&self.store, formation.start.0));
        }
        self.take_state(&serving, abort)?;
        let mut ring = self.meet(&serving, abort)?;
        let mut gpus = self.meet_gpus(&serving, &mut ring)?;
        self.shelf.clear();
        let (start, schedule) = (formation.start, self.schedule.clone());
        let save = formation.save_first && self.is_due(start.0) && !serving.learns();
        let grows = schedule.at(start.0).is_some_and(|plan| plan.upcycle.is_some());
        if save && grows {
            self.snapshot(&serving);
        }
        let holds = Some(start).filter(|_| self.to_learn.is_none());
        self.lend(&serving);
        self.take_share(&serving);
        let shard = self.held.as_ref().and_then(Held::shard);
        self.grow_share(&serving);
        self.event(Event::Ready { generation, holds, shard });
        if save && !grows {
            self.snapshot(&serving);
        }
        let mut loader = None;
        let mut at = start.0;
        loop {
            let Some(plan) = schedule.at(at) else {
                self.writer.wait();
                return Ok(Cause::Ended);
            };
            // A stack that grows, or parameters that freeze, change what the ring adds up, and moments that go what may be lent: the
            // next generation begins with that.
            let before = at.checked_sub(1).and_then(|before| schedule.at(before));
            let freezes = before.is_some_and(|before| before.stage.trains != plan.stage.trains);
            if (plan.upcycle.is_some() || freezes || lets_go(&plan)) && at > start.0 {
                return Ok(Cause::Ordered);
            }
            if loader.is_none() && !serving.lanes.is_empty() {
                loader = Some(self.loader(&serving.lanes, at)?);
            }
            self.keep_up(&serving)?;
            let sent_before = sent_bytes(&ring, gpus.as_ref());
            let Stepped { control, mut report, is_whole, undone } =
                self.step(&plan, &serving, &mut ring, gpus.as_mut(), loader.as_mut())?;
            at += 1;
            self.inject_fault(at, rank);
            // After a spike that was undone too, so that what was computed again need not be once more.
            let due = self.is_due(at) || control == 2 || undone;
            let compared = self.compare_replicas(&mut ring, at, due, &serving);
            if due && compared.is_ok() && !serving.learns() {
                let stalled = Instant::now();
                self.snapshot(&serving);
                step::add_seconds(&mut report, 5, stalled.elapsed().as_secs_f64());
            }
            // Who holds other weights than most measures and reports none of them.
            let odd = matches!(&compared, Err(Cause::Diverged { workers, .. })
                if workers.is_empty() || workers.contains(&worker));
            let measured = match odd {
                true => Ok(()),
                false => self.validate(&plan, &serving, is_whole, &mut ring, &mut report),
            };
            // Whatever comes after it, the step is applied.
            if !odd && is_whole {
                let queued_bytes = loader.as_ref().map_or(0, Loader::queued_bytes);
                let sent_bytes = sent_bytes(&ring, gpus.as_ref()) - sent_before;
                let _ = self.tell.send(Told::Step(report, Load { queued_bytes, sent_bytes }));
            }
            compared.and(measured)?;
            tracing::debug!(generation = formation.generation.0, step = at, "applied a step");
            if self.holds_all() {
                self.event(Event::Applied { holds: Step(at) });
            }
            if control > 0 && at < schedule.total_steps() {
                if control == 2 {
                    self.writer.wait();
                }
                return Ok(Cause::Ordered);
            }
        }
    }

    fn meet(&mut self, serving: &Serving<'_>, abort: &AbortHandle) -> Served<tcp::Tcp> {
        let Formation { generation, start, members, .. } = serving.formation;
        let (layout, order) = self.layout_from(start.0);
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
                order: order.into_iter().flatten().map(|block| block as u32).collect(),
                // New weights are made where the moments are.
                owners: if serving.shared { serving.trainers as u32 } else { 0 },
            },
            generation: RingGeneration(generation.0),
            job: self.job.clone(),
            config_digest: self.stamp.config.clone(),
            build: self.build(),
            deadline: MEET,
            socket_buffer_bytes: None,
            silence: self.silence,
            abort: abort.clone(),
        };
        // All of a member's addresses were tried.
        tcp::connect(&mut self.listener, &options).map_err(|error| match &error {
            RingError::Unreachable { ranks, .. } => unreachable(ranks, error.to_string(), serving.formation),
            _ => cause_of(&error, serving.formation),
        })
    }

    /// Where parameters lie in a generation that begins with this step, and the order in which its blocks become whole in a
    /// step.
    fn layout_from(&self, start: u64) -> (Layout, Vec<Range<usize>>) {
        let layers = match &self.to_learn {
            Some(to_learn) => to_learn.layers(),
            None => self.held.as_ref().expect("state was taken").engine.state().layout.layers() as u32,
        };
        let plan = self.schedule.at(start);
        let upcycle = plan.as_ref().and_then(|plan| plan.upcycle);
        let layers = upcycle.map_or(layers, |upcycle| upcycle.layers);
        let layout = Layout::new(&self.config.model, layers);
        let order = layout.backward_blocks(plan.map_or(Trains::All, |plan| plan.stage.trains));
        (layout, order)
    }

    /// The GPUs of a generation, where gradients travel by NCCL.
    fn meet_gpus(&self, serving: &Serving<'_>, ring: &mut tcp::Tcp) -> Served<Option<Gpus>> {
        let Some(nccl) = &self.nccl else {
            return Ok(None);
        };
        let start = serving.formation.start.0;
        let (_, order) = self.layout_from(start);
        let met = nccl.meet(ring, RingStep(start), order, self.device);
        met.map(Some).map_err(|error| cause_of(&error, serving.formation))
    }

    /// What decides the arithmetic, which is the same for all members: a GPU's kind too, since its bits are its own; and what
    /// members must share to understand one another.
    fn build(&self) -> String {
        let environment = &self.stamp.environment;
        let device = (self.device != Device::Cpu).then(|| environment.device.clone());
        let parts = [Some(environment.build()), device, self.nccl.as_ref().map(Nccl::version)];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }

    /// What trains on from `state`.
    fn engine(&self, state: State) -> Engine {
        Engine::with_kernels(&self.config, state, self.kernels.clone())
    }

    fn loader(&self, lanes: &Range<u32>, step: u64) -> Served<Loader> {
        let held = self.held.as_ref().expect("state was taken");
        let cursors = held.cursors[lanes.start as usize..lanes.end as usize].to_vec();
        let (serve, cursors) = (lanes.clone(), Some(cursors));
        let options = LoaderOptions { serve, start_step: step, cursors, ..self.data.clone() };
        Loader::open(options).map_err(|error| fault(error.to_string()))
    }

    /// Whether a checkpoint is due after `at` steps.
    fn is_due(&self, at: u64) -> bool {
        let last = at.checked_sub(1).and_then(|step| self.schedule.at(step));
        last.is_some_and(|last| last.last_of_stage || at.is_multiple_of(self.config.checkpoint.every_steps))
    }
}

/// Whether the moments of what is frozen go with the step of `plan`.
fn lets_go(plan: &StepPlan<'_>) -> bool {
    plan.reset_optimizer && !plan.stage.moves_all()
}

/// NCCL for a worker that computes on `device`.
pub(super) fn load_nccl(device: Device) -> Result<Nccl> {
    let wanted = "ring.transport = \"nccl\"";
    if device == Device::Cpu {
        return Err(Error::config(
            format!("{wanted} sends from GPU to GPU, and this worker computes on its CPU"),
            "take a GPU with compute.device = \"cuda\", or ring.transport = \"tcp\"",
        ));
    }
    let loaded = device::nccl().and_then(|path| Nccl::load(&path).map_err(|error| error.to_string()));
    loaded.map_err(|fact| {
        let remedy =
            format!("name another libnccl.so.2 in {}, or take ring.transport = \"tcp\"", device::NCCL);
        Error::config(format!("{wanted} has no NCCL: {fact}"), remedy)
    })
}

/// Bytes that went to the other members in this generation so far.
fn sent_bytes(ring: &tcp::Tcp, gpus: Option<&Gpus>) -> u64 {
    ring.sent_bytes() + gpus.map_or(0, Gpus::sent_bytes)
}

fn fault(reason: impl Into<String>) -> Cause {
    Cause::Fault { reason: reason.into() }
}

fn broken(lost: Option<WorkerId>, reason: String) -> Cause {
    Cause::Broken { lost, reason }
}

fn unreachable(ranks: &[Rank], reason: String, formation: &Formation) -> Cause {
    let members = ranks.iter().filter_map(|rank| formation.members.get(rank.index()));
    let peers: Vec<WorkerId> = members.map(|member| member.worker).collect();
    if peers.is_empty() { broken(None, reason) } else { Cause::Unreachable { peers, reason } }
}

fn has_more_addresses(rank: Rank, formation: &Formation) -> bool {
    formation.members.get(rank.index()).is_some_and(|member| member.endpoints.ring.len() > 1)
}

/// Why the ring is left, by what ended the collective.
fn cause_of(error: &RingError, formation: &Formation) -> Cause {
    let reason = error.to_string();
    match error {
        RingError::Lost { rank, .. } => {
            broken(formation.members.get(rank.index()).map(|member| member.worker), reason)
        }
        // It was tried at one of its addresses: the next ring tries the others.
        RingError::Unreachable { ranks, .. }
            if ranks.iter().all(|rank| has_more_addresses(*rank, formation)) =>
        {
            broken(None, reason)
        }
        RingError::Unreachable { ranks, .. } => unreachable(ranks, reason, formation),
        // Certificates are exchanged on one machine after the other: until all have theirs, some do not believe others.
        RingError::Untrusted { rank, .. } => unreachable(&[*rank], reason, formation),
        RingError::Aborted { .. }
        | RingError::Deadline { .. }
        | RingError::Dead { .. }
        | RingError::System { .. } => broken(None, reason),
        RingError::Corrupt { rank, .. } => {
            let sender = formation.members.get(rank.index()).map(|member| member.worker.to_string());
            fault(format!("{reason} ({rank} is worker {})", sender.unwrap_or_default()))
        }
        RingError::Protocol { .. } | RingError::Refused { .. } | RingError::Shape { .. } => fault(reason),
    }
}

//! One job: the shell around its [`Membership`]. One task owns everything; what blocks is done by the [`Desk`].
//!
//! ```text
//! connections ── Input ──▶ ┌──────────┐ ── orders ──▶ connections
//! user ───────── Input ──▶ │ the loop │ ── Task ────▶ desk (log, metrics, manifests) ──┐
//! desk ───────── Input ──▶ └──────────┘ ── Notice ──▶ whoever watches                  │
//!      ▲                                                                               │
//!      └───────────────────────────────────────────────────────────────────────────────┘
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::Sender as NoticeSender;
use std::time::{Duration, Instant};

use anello_configs::{LaneShares, RunConfig, Schedule, Timings};
use anello_proto::ring::{Epoch, Generation, Hello, Leave, Order, Pace, Stance, Step, WorkerId};
use anello_proto::v1;
use anello_store::events::{self, Event as Logged, EventLog, Record};
use anello_store::metrics;
use anello_store::{CONFIG, Notice, Store, checkpoint, read_config};
use tokio::sync::{mpsc, oneshot};

use crate::core::{
    Effect, Entry, Event, Found, Goal, Membership, Millis, Options, Outcome, Rows, Status, Straggling,
};
use crate::desk::{Desk, Done, Task};
use crate::error::{Error, Result};
use crate::news::{Herald, News};
use crate::records::{event_of, formation_of, goal_name, record_of};

/// What a job asks for, besides its run.
#[derive(Clone, Debug)]
pub struct JobOptions {
    /// Its name: workers say it when they connect.
    pub name: String,
    /// Fewest workers that train.
    pub min: u32,
    /// Workers that are wanted.
    pub desired: u32,
    /// The ring's times.
    pub timings: Timings,
}

/// Orders that may wait for a connection. A worker that does not read so many is as good as silent.
const ORDERS_MAX: usize = 64;
/// Inputs that may wait for the loop: heartbeats of some thousands of workers.
const INPUTS_MAX: usize = 16 << 10;
/// Failures of one step that no death explains.
const FAULTS_MAX: u32 = 3;

/// What comes to a job.
#[derive(Debug)]
pub(crate) enum Input {
    /// A worker's hello, and where orders for it go.
    Hello { hello: Box<v1::Hello>, orders: mpsc::Sender<v1::ToWorker> },
    /// It says something more.
    Word { worker: WorkerId, connection: u64, word: v1::from_worker::Word },
    /// Its connection is closed.
    Closed { worker: WorkerId, connection: u64 },
    /// The desk is done with something.
    Done(Done),
    /// The user wants something, of this process alone.
    Goal(Goal),
    /// The user wants something, and so many workers, of whoever has the job: the log has it first. Told when it has.
    Amend { goal: Goal, workers: u32, recorded: oneshot::Sender<()> },
    /// Nobody is left to train.
    GiveUp { reason: String },
    /// The user wants another number of workers.
    Desired(u32),
    /// Somebody wants to know how it is.
    Status(oneshot::Sender<Status>),
}

/// A hand on a job.
#[derive(Clone, Debug)]
pub struct Job {
    name: String,
    inputs: mpsc::Sender<Input>,
}

/// A job that was taken up and does not run yet.
#[derive(Debug)]
pub struct Opened {
    options: JobOptions,
    store: Store,
    config: RunConfig,
    log: EventLog,
    /// Its first record.
    taken: Record,
    found: Found,
    /// Steps whose rows are durable.
    reported: u64,
}

impl Opened {
    /// Takes up the job whose run lives in `store`: its first record of the log fences every coordinator before this one.
    ///
    /// # Errors
    /// [`anello_store::Error::NoRun`] when there is no run in the folder; `Fenced` when another coordinator takes it
    /// up at this moment; those of the store.
    pub fn take_up(store: Store, options: JobOptions) -> Result<Self> {
        let config = read_config(&store)?;
        let mut log = EventLog::open(&store)?;
        let checkpoints = checkpoint::steps(&store)?;
        let records = events::read(&store)?;
        let quarantined = records.iter().filter_map(|record| match &record.event {
            Logged::Evicted { machine, .. } => Some(machine.clone()),
            _ => None,
        });
        let quarantined = quarantined.collect();
        // A ring that ended by agreement has no members any more: nobody is waited for.
        let formation = records
            .into_iter()
            .rev()
            .map(|record| record.event)
            .take_while(|event| !matches!(event, Logged::Ended { .. }))
            .find_map(formation_of);
        let taken = log.append(Logged::TakenUp { step: checkpoints.last().copied() })?;
        // No row before a checkpoint is still to come.
        let rows = metrics::read_last(&store, 1)?.last().map_or(0, |row| row.step + 1);
        let reported = rows.max(checkpoints.last().copied().unwrap_or(0));
        let found = Found {
            formation,
            checkpoints: checkpoints.into_iter().map(Step).collect(),
            floor: Generation(taken.number),
            quarantined,
        };
        Ok(Self { options, store, config, log, taken, found, reported })
    }

    /// The record that took it up.
    pub fn taken(&self) -> &Record {
        &self.taken
    }

    /// The run's config.
    pub fn config(&self) -> &RunConfig {
        &self.config
    }

    /// Starts the job on the current runtime. The handle's task ends with the job's outcome; `notices` hears of every
    /// step, checkpoint and record, and `news` when there is one, or when the job's status is another but for heartbeats.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub fn start(
        self,
        notices: NoticeSender<Notice>,
        news: News,
    ) -> Result<(Job, tokio::task::JoinHandle<Outcome>)> {
        let Self { options, store, config, log, taken: _, found, reported } = self;
        let (inputs, inbox) = mpsc::channel(INPUTS_MAX);
        let epoch = Epoch(log.session());
        let back = inputs.clone();
        // The desk's own thread may wait for the loop: it is never on the runtime.
        let tell = move |done| drop(back.blocking_send(Input::Done(done)));
        let (policy, timings) = (config.checkpoint.clone(), options.timings);
        let desk = Desk::start(store.clone(), log, policy, timings.watch, tell)
            .map_err(|source| Error::System { action: "starting the run folder's thread", source })?;
        let schedule = Schedule::new(&config);
        let core = Options {
            lanes: config.lanes,
            total: Step(schedule.total_steps()),
            min: options.min.max(1),
            desired: options.desired.max(1),
            lease: millis(timings.lease),
            gather: millis(timings.gather),
            faults_max: FAULTS_MAX,
            straggling: Straggling {
                factor_permille: (config.ring.straggler_factor * 1000.0).round() as u32,
                window_steps: config.ring.straggler_window_steps,
            },
            by_speed: config.ring.lanes == LaneShares::BySpeed,
        };
        let job = Job { name: options.name.clone(), inputs };
        let core = Membership::new(core, epoch, found, Millis(0));
        let running = Running {
            epoch,
            run: store.place().to_owned(),
            timings,
            core,
            began: Instant::now(),
            desk,
            notices,
            news: Herald(news),
            links: BTreeMap::new(),
            first: None,
            total: schedule.total_steps(),
            rows: Rows::new(reported, millis(timings.lease)),
            waiting: Vec::new(),
            amending: VecDeque::new(),
            last_wait: None,
            stages: config.stages.iter().map(|stage| stage.name.as_str().to_owned()).collect(),
            stage: None,
            ready: false,
        };
        Ok((job, tokio::spawn(running.run(inbox))))
    }
}

impl Job {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Trains to the end, pauses with a checkpoint, or stops.
    pub async fn set_goal(&self, goal: Goal) {
        let _ = self.inputs.send(Input::Goal(goal)).await;
    }

    /// Asks for another number of workers.
    pub async fn scale(&self, desired: u32) {
        let _ = self.inputs.send(Input::Desired(desired)).await;
    }

    /// Records what the user wants and how many workers, then acts on the first; the other is for [`Job::scale`].
    /// `recorded` is told when it is durable, and dropped when the job ends before.
    pub async fn amend(&self, goal: Goal, workers: u32, recorded: oneshot::Sender<()>) {
        let _ = self.inputs.send(Input::Amend { goal, workers, recorded }).await;
    }

    /// Ends the job as failed: nobody is left to train it.
    pub async fn give_up(&self, reason: String) {
        let _ = self.inputs.send(Input::GiveUp { reason }).await;
    }

    /// How it is; absent when it is over.
    pub async fn status(&self) -> Option<Status> {
        let (answer, status) = oneshot::channel();
        self.inputs.send(Input::Status(answer)).await.ok()?;
        status.await.ok()
    }

    pub(crate) async fn give(&self, input: Input) -> bool {
        self.inputs.send(input).await.is_ok()
    }

    pub(crate) fn orders() -> (mpsc::Sender<v1::ToWorker>, mpsc::Receiver<v1::ToWorker>) {
        mpsc::channel(ORDERS_MAX)
    }
}

/// A worker's connection.
struct Link {
    connection: u64,
    orders: mpsc::Sender<v1::ToWorker>,
}

/// What the first worker is: all others must be the same.
struct Kind {
    build: String,
    device: String,
}

/// A checkpoint whose parts are all there, and whose steps are not all reported.
struct Waiting {
    step: Step,
    parts: Vec<String>,
}

struct Running {
    epoch: Epoch,
    run: String,
    timings: Timings,
    core: Membership,
    began: Instant,
    desk: Desk,
    notices: NoticeSender<Notice>,
    news: Herald,
    links: BTreeMap<WorkerId, Link>,
    first: Option<Kind>,
    /// Steps of the whole run.
    total: u64,
    rows: Rows,
    waiting: Vec<Waiting>,
    /// What the user wants and the log does not hold yet, in the order in which the desk was asked.
    amending: VecDeque<(Goal, oneshot::Sender<()>)>,
    last_wait: Option<String>,
    /// Names of the run's stages, and which one the last step was of.
    stages: Vec<String>,
    stage: Option<usize>,
    /// A generation was formed by this coordinator.
    ready: bool,
}

fn millis(duration: Duration) -> Millis {
    Millis(duration.as_millis() as u64)
}

impl Running {
    async fn run(mut self, mut inbox: mpsc::Receiver<Input>) -> Outcome {
        self.core_event(Event::Tick);
        loop {
            let next = self.core.deadline().into_iter().chain(self.rows.deadline()).min();
            let input = match next.map(|at| self.began + Duration::from_millis(at.0)) {
                Some(at) => tokio::time::timeout_at(at.into(), inbox.recv()).await,
                None => Ok(inbox.recv().await),
            };
            match input {
                Ok(Some(input)) => self.take(input),
                Ok(None) => return Outcome::Cancelled,
                Err(_) => self.core_event(Event::Tick),
            }
            self.look_for_rows();
            self.commit_waiting();
            self.say_what_it_waits_for();
            if let Some(outcome) = self.core.outcome().cloned() {
                self.news.0.tell();
                self.see_off(&outcome, &mut inbox).await;
                drop(inbox);
                let desk = self.desk;
                let _ = tokio::task::spawn_blocking(move || desk.finish()).await;
                return outcome;
            }
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Hello { hello, orders } => self.hello(*hello, orders),
            Input::Word { worker, connection, word } => {
                if self.links.get(&worker).is_some_and(|link| link.connection == connection) {
                    self.word(worker, word);
                }
            }
            Input::Closed { worker, connection } => {
                if self.links.get(&worker).is_some_and(|link| link.connection == connection) {
                    self.links.remove(&worker);
                    self.news.0.tell();
                    self.core_event(Event::Unlinked { worker });
                }
            }
            Input::Done(done) => self.done(done),
            Input::Goal(goal) => self.core_event(Event::Goal(goal)),
            Input::Amend { goal, workers, recorded } => {
                self.amending.push_back((goal, recorded));
                let event = Logged::Goal { goal: goal_name(goal).to_owned(), workers };
                self.desk.ask(Task::Append { event, formed: None });
            }
            Input::GiveUp { reason } => self.core_event(Event::GivenUp { reason }),
            Input::Desired(desired) => self.core_event(Event::Desired(desired)),
            Input::Status(answer) => drop(answer.send(self.core.status())),
        }
    }

    fn hello(&mut self, hello: v1::Hello, orders: mpsc::Sender<v1::ToWorker>) {
        let worker = WorkerId(hello.worker);
        if self.links.get(&worker).is_some_and(|link| link.connection >= hello.connection) {
            return;
        }
        let machine = hello.machine.clone();
        let refuse = |reason: String| {
            tracing::warn!(%worker, machine, reason, "refused a worker");
            let order = Order::Leave { why: Leave::Refused { reason } };
            let _ = orders.try_send(v1::ToWorker { epoch: self.epoch.0, order: Some((&order).into()) });
        };
        let hello = match Hello::try_from(hello) {
            Ok(hello) => hello,
            Err(malformed) => return refuse(malformed.to_string()),
        };
        if let Some(Kind { build, device }) = &self.first {
            let differs: Vec<String> = [("build", build, &hello.build), ("device", device, &hello.device)]
                .into_iter()
                .filter(|(_, ours, theirs)| ours != theirs)
                .map(|(what, ours, theirs)| format!("its {what} is {theirs}, the job's {ours}"))
                .collect();
            if !differs.is_empty() {
                return refuse(format!(
                    "{}; start workers of one build on one kind of device",
                    differs.join(" and ")
                ));
            }
        }
        self.first.get_or_insert(Kind { build: hello.build.clone(), device: hello.device.clone() });
        self.links.insert(worker, Link { connection: hello.connection, orders });
        self.news.0.tell();
        self.rows.connected(worker);
        self.welcome(worker);
        let Hello { endpoints, machine, stance, .. } = hello;
        self.core_event(Event::Linked { worker, endpoints, machine, stance });
    }

    fn word(&mut self, worker: WorkerId, word: v1::from_worker::Word) {
        match word {
            v1::from_worker::Word::Hello(_) => self.drop_link(worker, "it said hello twice"),
            v1::from_worker::Word::Stance(stance) => match Stance::try_from(stance) {
                Ok(stance) => self.core_event(Event::Stands { worker, stance }),
                Err(malformed) => self.drop_link(worker, &malformed.to_string()),
            },
            v1::from_worker::Word::Pace(pace) => match Pace::try_from(pace) {
                Ok(pace) => self.core_event(Event::Paced { worker, pace }),
                Err(malformed) => self.drop_link(worker, &malformed.to_string()),
            },
            v1::from_worker::Word::Step(report) if report.step >= self.total => {
                let reason = format!("it reports step {}, and the run has {}", report.step, self.total);
                self.drop_link(worker, &reason);
            }
            v1::from_worker::Word::Step(report) => self.step(report),
        }
    }

    /// A step's figures, from whoever is rank 0, or was asked.
    fn step(&mut self, mut report: v1::StepReport) {
        if !self.rows.take(report.step) {
            return;
        }
        let events = std::mem::take(&mut report.events);
        for text in events {
            match serde_json::from_str(&text) {
                // Only what a step can bring about: the rest of the log is the coordinator's.
                Ok(
                    event @ (Logged::Stage { .. }
                    | Logged::Skipped { .. }
                    | Logged::Epoch { .. }
                    | Logged::SkippedData { .. }),
                ) => self.desk.ask(Task::Append { event, formed: None }),
                Ok(event) => tracing::warn!(?event, "a worker reports an event that is not a step's"),
                Err(cause) => {
                    tracing::warn!(%cause, text, "a worker reports an event that this build does not know")
                }
            }
        }
        let record = record_of(report);
        if let Some(index) = self.stages.iter().position(|name| *name == record.stage)
            && self.stage != Some(index)
        {
            self.stage = Some(index);
            self.notify(Notice::Stage { index });
        }
        self.core_event(Event::Reported { step: Step(record.step + 1) });
        self.desk.ask(Task::Row(record.clone()));
        self.notify(Notice::Step(record));
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Appended { record, formed } => {
                let amended = matches!(record.event, Logged::Goal { .. });
                self.notify(Notice::Logged(record));
                if let Some((goal, recorded)) = amended.then(|| self.amending.pop_front()).flatten() {
                    let _ = recorded.send(());
                    self.core_event(Event::Goal(goal));
                }
                if let Some(generation) = formed {
                    if let (false, Some(formation)) = (self.ready, self.core.formation()) {
                        self.ready = true;
                        self.notify(Notice::Ready { step: formation.start.0 });
                    }
                    self.core_event(Event::Recorded { generation });
                }
            }
            Done::Committed { step, seconds } => {
                self.notify(Notice::Checkpoint { step: step.0, seconds });
                self.core_event(Event::Committed { step });
            }
            Done::CommitFailed { step, reason } => {
                self.notify(Notice::CheckpointFailed { step: step.0, cause: reason.clone() });
                self.core_event(Event::CommitFailed { step, reason });
            }
            Done::Listed { steps } => self.core_event(Event::Listed { steps }),
            Done::Fenced { by } => self.core_event(Event::Fenced { by }),
        }
    }

    fn notify(&self, notice: Notice) {
        let _ = self.notices.send(notice);
        self.news.0.tell();
    }

    fn now(&self) -> Millis {
        millis(self.began.elapsed())
    }

    fn core_event(&mut self, event: Event) {
        let mut out = Vec::new();
        self.core.handle(self.now(), event, &mut out);
        out.into_iter().for_each(|effect| self.perform(effect));
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Send { worker, epoch, order } => {
                let Some(link) = self.links.get(&worker) else { return };
                let message = v1::ToWorker { epoch: epoch.0, order: Some((&order).into()) };
                if link.orders.try_send(message).is_err() {
                    // It does not read: its connection is closed, and the lease decides.
                    self.drop_link(worker, "it does not take orders");
                }
            }
            Effect::Drop { worker, reason } => self.drop_link(worker, &reason),
            Effect::Record(entry) => {
                if let Entry::PassedOver { step, .. } = &entry {
                    self.desk.ask(Task::SetAside { step: *step });
                }
                let formed = match &entry {
                    Entry::Formed(formation) => Some(formation.generation),
                    _ => None,
                };
                self.desk.ask(Task::Append { event: event_of(entry), formed });
            }
            Effect::Commit { step, parts, .. } => {
                let parts = parts.into_iter().map(|written| written.parts).collect();
                // Of two that are whole, from two generations, one is enough.
                if self.waiting.iter().all(|waiting| waiting.step != step) {
                    self.waiting.push(Waiting { step, parts });
                }
            }
            Effect::List => self.desk.ask(Task::List),
        }
    }

    /// Commits what has its steps reported: a checkpoint never stands after steps that are not in the metrics.
    fn commit_waiting(&mut self) {
        let reported = self.rows.reported();
        let (ready, waiting) =
            std::mem::take(&mut self.waiting).into_iter().partition(|w: &Waiting| w.step.0 <= reported);
        self.waiting = waiting;
        for Waiting { step, parts } in ready {
            self.desk.ask(Task::Commit { step, parts });
        }
    }

    /// Asks for figures that are missing before others, or before a checkpoint.
    fn look_for_rows(&mut self) {
        let waiting = self.waiting.iter().map(|waiting| waiting.step.0);
        let look = self.rows.look(millis(self.began.elapsed()), waiting, self.links.keys().copied());
        if let Some(std::ops::Range { start: from, end: to }) = look.lost {
            tracing::error!(from, to, "the figures of these steps are lost with all who knew them");
        }
        look.ask.into_iter().for_each(|worker| self.welcome(worker));
    }

    /// Says where the run is. Said a second time over one connection, it asks for rows.
    fn welcome(&mut self, worker: WorkerId) {
        let welcome = v1::Welcome {
            run: self.run.clone(),
            heartbeat_ms: millis(self.timings.heartbeat).0,
            reported: self.rows.reported(),
        };
        if let Some(link) = self.links.get(&worker) {
            let order = Some(v1::to_worker::Order::Welcome(welcome));
            let _ = link.orders.try_send(v1::ToWorker { epoch: self.epoch.0, order });
        }
    }

    fn drop_link(&mut self, worker: WorkerId, reason: &str) {
        if self.links.remove(&worker).is_some() {
            self.news.0.tell();
            tracing::info!(%worker, reason, "closed a worker's connection");
            self.core_event(Event::Unlinked { worker });
        }
    }

    fn say_what_it_waits_for(&mut self) {
        let waits_for = self.core.waits_for();
        if waits_for != self.last_wait {
            self.news.0.tell();
            if let Some(what) = &waits_for {
                tracing::debug!(what, "the ring waits");
            }
            self.last_wait = waits_for;
        }
    }

    /// Waits until the workers are gone and the log has the end, for as long as they may take.
    async fn see_off(&mut self, outcome: &Outcome, inbox: &mut mpsc::Receiver<Input>) {
        if matches!(outcome, Outcome::Fenced { .. }) {
            self.links.clear();
            return;
        }
        let until = tokio::time::Instant::now() + self.timings.grace;
        while !self.links.is_empty() {
            match tokio::time::timeout_at(until, inbox.recv()).await {
                Ok(Some(input)) => self.take(input),
                Ok(None) | Err(_) => return,
            }
        }
        self.desk.ask(Task::Tidy);
    }
}

/// A new run of `config` in `store`, for workers to train: the config, written once.
///
/// # Errors
/// A folder that holds a run already; those of the store.
pub fn create(store: &Store, config: &RunConfig) -> Result<()> {
    if !store.create(CONFIG, config.to_toml())? {
        return Err(anello_store::Error::Fenced { place: store.place_of(CONFIG) }.into());
    }
    Ok(())
}

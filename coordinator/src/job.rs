//! One job: the shell around its [`Membership`]. One task owns everything; what blocks is done by the [`Desk`]. `open` makes
//! a run folder, or takes it up; `talk` is what workers say.
//!
//! ```text
//! connections ── Input ──▶ ┌──────────┐ ── orders ──▶ connections
//! user ───────── Input ──▶ │ the loop │ ── Task ────▶ desk (log, metrics, manifests) ──┐
//! desk ───────── Input ──▶ └──────────┘ ── Notice ──▶ whoever watches                  │
//!      ▲                                                                               │
//!      └───────────────────────────────────────────────────────────────────────────────┘
//! ```

mod open;
mod talk;

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::mpsc::Sender as NoticeSender;
use std::time::{Duration, Instant};

use anello_configs::Timings;
use anello_proto::ring::{Epoch, Step, WorkerId};
use anello_proto::v1;
use anello_store::events::{Event as Logged, Record};
use anello_store::{Notice, Refused};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::core::{self, Effect, Entry, Event, Goal, Look, Membership, Millis, Outcome, Rows};
use crate::desk::{Desk, Done, Task};
use crate::news::{Herald, News};
use crate::records::{event_of, goal_name};
pub use open::{Opened, create};

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

/// What goes to a connection: orders, and last why it ends.
pub(crate) type Orders = mpsc::Sender<Result<v1::ToWorker, Status>>;

/// What comes to a job.
#[derive(Debug)]
pub(crate) enum Input {
    /// A worker's hello, and where orders for it go.
    Hello { hello: Box<v1::Hello>, orders: Orders },
    /// It says something more.
    Word { worker: WorkerId, connection: u64, word: v1::from_worker::Word },
    /// Its connection is closed; or nothing that comes over it can be read any more, for this reason.
    Closed { worker: WorkerId, connection: u64, unread: Option<Status> },
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
    /// The user wants a checkpoint of what is trained now. Told which step it holds at least.
    Checkpoint(oneshot::Sender<Step>),
    /// Another coordinator is to go on with it, while it trains. Told when all that is known is written.
    HandOver(oneshot::Sender<()>),
    /// Somebody wants to know how it is.
    Status(oneshot::Sender<core::Status>),
}

/// A hand on a job.
#[derive(Clone, Debug)]
pub struct Job {
    name: String,
    inputs: mpsc::Sender<Input>,
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

    /// Asks for a checkpoint of all that is trained now; the answer is the step that it holds at least. Absent when the job
    /// is over.
    pub async fn checkpoint(&self) -> Option<Step> {
        let (answer, step) = oneshot::channel();
        self.inputs.send(Input::Checkpoint(answer)).await.ok()?;
        step.await.ok()
    }

    /// Ends the job as failed: nobody is left to train it.
    pub async fn give_up(&self, reason: String) {
        let _ = self.inputs.send(Input::GiveUp { reason }).await;
    }

    /// Leaves the job, while its workers train, to the coordinator that takes it up next. The answer comes when all that is
    /// known of it is written.
    pub async fn hand_over(&self) -> oneshot::Receiver<()> {
        let (left, written) = oneshot::channel();
        let _ = self.inputs.send(Input::HandOver(left)).await;
        written
    }

    /// How it is; absent when it is over.
    pub async fn status(&self) -> Option<core::Status> {
        let (answer, status) = oneshot::channel();
        self.inputs.send(Input::Status(answer)).await.ok()?;
        status.await.ok()
    }

    pub(crate) async fn give(&self, input: Input) -> bool {
        self.inputs.send(input).await.is_ok()
    }

    pub(crate) fn orders() -> (Orders, mpsc::Receiver<Result<v1::ToWorker, Status>>) {
        mpsc::channel(ORDERS_MAX)
    }
}

/// A worker's connection.
struct Link {
    connection: u64,
    orders: Orders,
}

/// What the workers are that the core knows: whoever comes to them must be the same.
struct Kind {
    build: String,
    device: String,
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
    /// Absent: nobody has said it to this coordinator.
    kind: Option<Kind>,
    /// Those that came before any member of the ring that was taken up: what they must be, a member says, or all members are
    /// given up.
    early: Vec<(v1::Hello, Orders)>,
    /// Steps of the whole run.
    total: u64,
    /// And the parts of checkpoints that wait for some.
    rows: Rows<Vec<String>>,
    /// What the user wants and the log does not hold yet, in the order in which the desk was asked.
    amending: VecDeque<(Goal, oneshot::Sender<()>)>,
    wait: Wait,
    /// Names of the run's stages, and which one the last step was of.
    stages: Vec<String>,
    stage: Option<usize>,
    /// A generation was formed by this coordinator.
    ready: bool,
}

/// What the ring waits for, as it was told last.
#[derive(Debug, Default)]
struct Wait {
    what: Option<String>,
    /// When it was looked for last.
    looked: Option<Millis>,
    /// Something has happened since.
    is_old: bool,
}

/// Between two looks at what the ring waits for: each takes all workers in view, and of ten thousand that speak at once each is an
/// input.
const LOOK: Millis = Millis(50);

impl Wait {
    /// When it is looked for again.
    fn again(&self) -> Option<Millis> {
        self.looked.map(|looked| looked + LOOK).filter(|_| self.is_old)
    }
}

fn millis(duration: Duration) -> Millis {
    Millis(duration.as_millis() as u64)
}

impl Running {
    async fn run(mut self, mut inbox: mpsc::Receiver<Input>) -> Outcome {
        self.core_event(Event::Tick);
        loop {
            let next = self.deadline().into_iter().chain(self.wait.again()).min();
            let input = match next.map(|at| self.at(at)) {
                Some(at) => tokio::time::timeout_at(at, inbox.recv()).await,
                None => Ok(inbox.recv().await),
            };
            match input {
                Ok(Some(Input::HandOver(left))) => {
                    self.leave(inbox).await;
                    let _ = left.send(());
                    return Outcome::Cancelled;
                }
                Ok(Some(input)) => self.take(input),
                Ok(None) => return Outcome::Cancelled,
                Err(_) if self.deadline().is_some_and(|at| at <= self.now()) => self.core_event(Event::Tick),
                Err(_) => {}
            }
            self.admit();
            self.look_for_rows();
            self.say_what_it_waits_for();
            if let Some(outcome) = self.core.outcome().cloned() {
                self.news.0.tell();
                self.see_off(&outcome, &mut inbox).await;
                self.leave(inbox).await;
                return outcome;
            }
        }
    }

    fn deadline(&self) -> Option<Millis> {
        self.core.deadline().into_iter().chain(self.rows.deadline()).min()
    }

    /// When it is `at` for the core.
    fn at(&self, at: Millis) -> tokio::time::Instant {
        (self.began + Duration::from_millis(at.0)).into()
    }

    /// Lets go of everybody and waits until all is written.
    async fn leave(self, inbox: mpsc::Receiver<Input>) {
        let Self { desk, links, early, .. } = self;
        drop((inbox, links, early));
        let _ = tokio::task::spawn_blocking(move || desk.finish()).await;
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Hello { hello, orders } => self.hello(*hello, orders),
            Input::Word { worker, connection, word } => {
                if self.links.get(&worker).is_some_and(|link| link.connection == connection) {
                    self.word(worker, word);
                }
            }
            Input::Closed { worker, connection, unread } => {
                self.early.retain(|(hello, _)| (hello.worker, hello.connection) != (worker.0, connection));
                if self.links.get(&worker).is_some_and(|link| link.connection == connection) {
                    match unread {
                        Some(why) => self.refuse(worker, Refused::Malformed, why),
                        None => self.drop_link(worker, Status::cancelled("it closed its connection")),
                    }
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
            Input::Checkpoint(answer) => {
                self.core_event(Event::CheckpointWanted);
                let there = || self.core.status().committed.unwrap_or_default();
                let _ = answer.send(self.core.wanted().unwrap_or_else(there));
            }
            // Taken by the loop, and while all are seen off there is nothing to hand over.
            Input::HandOver(_) => {}
            Input::Status(answer) => drop(answer.send(self.core.status())),
        }
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
            Done::Committed { step, seconds, bytes } => {
                self.notify(Notice::Checkpoint { step: step.0, seconds, bytes });
                self.core_event(Event::Committed { step });
            }
            Done::CommitFailed { step, reason } => {
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
                if link.orders.try_send(Ok(message)).is_err() {
                    // It does not read: its connection is closed, and the lease decides.
                    self.drop_link(worker, Status::resource_exhausted("it does not take orders"));
                }
            }
            Effect::Drop { worker, reason } => self.drop_link(worker, Status::aborted(reason)),
            Effect::Record(entry) => {
                match &entry {
                    Entry::PassedOver { step, .. } => self.desk.ask(Task::SetAside { step: *step }),
                    Entry::CheckpointFailed { step, reason } => {
                        self.notify(Notice::CheckpointFailed { step: step.0, cause: reason.clone() });
                    }
                    _ => {}
                }
                let formed = match &entry {
                    Entry::Formed(formation) => Some(formation.generation),
                    _ => None,
                };
                self.desk.ask(Task::Append { event: event_of(entry), formed });
            }
            Effect::Commit { step, parts, .. } => {
                self.rows.whole(step.0, parts.into_iter().map(|written| written.parts).collect());
            }
            Effect::List => self.desk.ask(Task::List),
        }
    }

    /// Asks for figures that are missing before others, or before a checkpoint, and commits the checkpoints that lack none.
    fn look_for_rows(&mut self) {
        let held = || self.core.held_here().unwrap_or_default().0;
        let Look { ask, lost, withdrawn, ready } =
            self.rows.look(self.now(), self.links.keys().copied(), held);
        if let Some(Range { start: from, end: to }) = lost {
            tracing::error!(from, to, "the figures of these steps are lost with all who knew them");
        }
        withdrawn.into_iter().for_each(|step| self.core_event(Event::Withdrawn { step: Step(step) }));
        ask.into_iter().for_each(|worker| self.welcome(worker));
        for (step, parts) in ready {
            self.desk.ask(Task::Commit { step: Step(step), parts });
        }
    }

    fn say_what_it_waits_for(&mut self) {
        let now = self.now();
        if self.wait.looked.is_some_and(|looked| now < looked + LOOK) {
            self.wait.is_old = true;
            return;
        }
        (self.wait.looked, self.wait.is_old) = (Some(now), false);
        let what = self.core.waits_for();
        if what != self.wait.what {
            self.news.0.tell();
            if let Some(what) = &what {
                tracing::debug!(what, "the ring waits");
            }
            self.wait.what = what;
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
            let next = self.core.deadline().map_or(until, |at| until.min(self.at(at)));
            match tokio::time::timeout_at(next, inbox.recv()).await {
                Ok(Some(input)) => self.take(input),
                Err(_) if next < until => self.core_event(Event::Tick),
                Ok(None) | Err(_) => return,
            }
        }
        self.desk.ask(Task::Tidy);
    }
}

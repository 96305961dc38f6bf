//! One job of the registry: what its log says, and its ring while one is kept.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anello_configs::{RunConfig, Schedule, Timings};
use anello_proto::jobs::Phase;
use anello_store::events::{self, Event, EventLog, Record};
use anello_store::metrics::{self, StepRecord};
use anello_store::{Error as StoreError, Notice, Store, read_config};
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};

use super::phase::{Standing, phase};
use super::place::Spec;
use super::{Recorded, Refusal};
use crate::core::{Goal, Outcome, Status};
use crate::error::Result;
use crate::job::{Job, JobOptions, Opened};
use crate::launch::{Crew, Launcher};
use crate::news::News;
use crate::records::goal_name;
use crate::telemetry::Board;
use crate::waits::Waits;

/// Pause before what failed for now is tried again.
const AGAIN: Duration = Duration::from_secs(3);
/// Steps and records that are kept to be shown.
pub(super) const RECENT: usize = 16;

/// A job.
pub(super) struct Entry<L: Launcher> {
    pub spec: Spec,
    /// Its run folder.
    pub run: String,
    pub config: RunConfig,
    pub total_steps: u64,
    pub standing: Standing,
    /// The last steps, for people.
    pub steps: VecDeque<StepRecord>,
    /// The last records, for people: those of checkpoints are left out, since they would push out all others.
    pub events: VecDeque<Record>,
    /// Its ring, while this coordinator keeps one.
    pub ring: Option<Ring>,
    pub crew: Option<Crew<L>>,
    /// Workers that the queue gave it; absent: it waits for its turn.
    pub given: Option<u32>,
    /// Why no ring can be kept for it, although it wants one.
    pub trouble: Option<String>,
    /// When that is tried again; absent with `trouble`: when the user asks to.
    pub again_at: Option<Instant>,
    /// The phase that was said last.
    pub shown: Option<Phase>,
    /// What it waits for, as far as that was said.
    pub waits: Waits,
    /// Where it is told how it is.
    pub board: Board,
}

/// A job's ring.
pub(super) struct Ring {
    pub job: Job,
    task: tokio::task::JoinHandle<Outcome>,
    notices: Receiver<Notice>,
    pub status: Option<Status>,
    news: News,
    /// It says nothing more: its task is about to end.
    pub ends: bool,
    /// Workers that it was last told to want.
    pub told: u32,
}

fn keep<T>(recent: &mut VecDeque<T>, item: T) {
    recent.push_back(item);
    if recent.len() > RECENT {
        recent.pop_front();
    }
}

/// Keeps a record among the last ones, if it is one that users are shown.
fn show(recent: &mut VecDeque<Record>, record: Record) {
    if !matches!(record.event, Event::Checkpoint { .. }) {
        keep(recent, record);
    }
}

impl<L: Launcher> Entry<L> {
    /// Reads a job's folder.
    pub fn load(spec: Spec, run: String, board: Board) -> std::result::Result<Self, StoreError> {
        let store = Store::open(&run)?;
        let config = read_config(&store)?;
        let mut recalled = board.recall(&spec.name, &config, &store)?;
        let (mut standing, mut recent) = (Standing::new(spec.desired), VecDeque::new());
        events::each(&store, |record| {
            standing.observe(&record);
            recalled.record(&record);
            show(&mut recent, record);
        })?;
        recalled.take_up();
        let rows = metrics::read_last(&store, RECENT)?;
        Ok(Self {
            total_steps: Schedule::new(&config).total_steps(),
            steps: rows.into(),
            events: recent,
            spec,
            run,
            config,
            standing,
            ring: None,
            crew: None,
            given: None,
            trouble: None,
            again_at: None,
            shown: None,
            waits: Waits::default(),
            board,
        })
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        phase(&self.standing, self.ring.as_ref().and_then(|ring| ring.status.as_ref()))
    }

    /// Why it failed, or is in trouble.
    pub fn reason(&self) -> Option<String> {
        match &self.standing.outcome {
            Some(Outcome::Failed { reason }) => Some(reason.clone()),
            _ => self.trouble.clone(),
        }
    }

    /// Whether what kept it from running may be gone.
    pub fn trouble_is_over(&self) -> bool {
        self.trouble.is_none() || self.again_at.is_some()
    }

    /// Takes in the news of its ring, if there is some.
    pub fn listen(&mut self, runtime: &Handle) {
        if self.ring.as_ref().is_some_and(|ring| ring.news.take()) {
            self.refresh(runtime);
        }
    }

    /// Takes in what its ring has said, and asks how it is.
    pub fn refresh(&mut self, runtime: &Handle) {
        let Some(ring) = &mut self.ring else { return };
        let mut heard = Vec::new();
        heard.extend(ring.notices.try_iter());
        match runtime.block_on(ring.job.status()) {
            Some(status) => {
                ring.ends = status.outcome.is_some();
                self.board.set_status(&self.spec.name, Some(status.clone()));
                ring.status = Some(status);
            }
            None => ring.ends = true,
        }
        heard.extend(ring.notices.try_iter());
        for notice in heard {
            self.board.observe(&self.spec.name, &notice);
            match notice {
                Notice::Step(record) => keep(&mut self.steps, record),
                Notice::Logged(record) => self.note(record),
                Notice::Ready { .. }
                | Notice::Stage { .. }
                | Notice::Checkpoint { .. }
                | Notice::CheckpointFailed { .. }
                | Notice::Refused(_) => {}
            }
        }
    }

    fn note(&mut self, record: Record) {
        self.standing.observe(&record);
        show(&mut self.events, record);
    }

    /// Takes the job up and starts its ring.
    pub fn start(
        &mut self,
        runtime: &Handle,
        timings: Timings,
        workers: u32,
        wake: Arc<Notify>,
    ) -> Result<()> {
        let start = || {
            let (name, min) = (self.spec.name.clone(), self.spec.min);
            let options = JobOptions { name, min, desired: workers.max(1), timings };
            let store = Store::durable(&self.run)?;
            self.board.with(&self.spec.name, |figures| figures.use_store(Some(store.clone())));
            let opened = Opened::take_up(store, options)?;
            let taken = opened.taken().clone();
            let (sender, notices) = channel();
            let _runtime = runtime.enter();
            let news = News::none(wake);
            let (job, task) = opened.start(sender, news.clone())?;
            let told = workers.max(1);
            Ok((taken, Ring { job, task, notices, status: None, news, ends: false, told }))
        };
        match start() {
            Ok((taken, ring)) => {
                (self.trouble, self.again_at) = (None, None);
                self.board.observe(&self.spec.name, &Notice::Logged(taken.clone()));
                self.note(taken);
                if self.standing.goal != Goal::Run {
                    runtime.block_on(ring.job.set_goal(self.standing.goal));
                }
                self.ring = Some(ring);
                Ok(())
            }
            Err(error) => {
                self.trouble = Some(crate::error::Error::to_string(&error));
                self.again_at = Some(Instant::now() + AGAIN);
                Err(error)
            }
        }
    }

    /// Writes down what the user wants: by its ring's hand when there is one.
    pub fn amend(
        &mut self,
        runtime: &Handle,
        goal: Goal,
        workers: u32,
    ) -> std::result::Result<Recorded, Refusal> {
        if let Some(ring) = &self.ring {
            let (recorded, answer) = oneshot::channel();
            runtime.block_on(ring.job.amend(goal, workers, recorded));
            return Ok(Some(answer));
        }
        let mut log = EventLog::open(&Store::durable(&self.run)?)?;
        let record = log.append(Event::Goal { goal: goal_name(goal).to_owned(), workers })?;
        self.note(record);
        Ok(None)
    }

    /// Lets go of a ring that is over, and reads what the log says of it.
    pub fn end(&mut self, runtime: &Handle) -> Option<Outcome> {
        let ring = self.ring.take_if(|ring| ring.task.is_finished())?;
        let outcome = runtime.block_on(ring.task).unwrap_or_else(|cause| Outcome::Fenced {
            by: format!("its ring ended without a word ({cause}); report this as a bug"),
        });
        self.given = None;
        for notice in ring.notices.try_iter() {
            self.board.observe(&self.spec.name, &notice);
        }
        self.board.set_status(&self.spec.name, None);
        self.board.with(&self.spec.name, |figures| figures.use_store(None));
        let (mut standing, mut recent) = (Standing::new(self.spec.desired), VecDeque::new());
        let read = |store: Store| {
            events::each(&store, |record| {
                standing.observe(&record);
                self.board.catch_up(&self.spec.name, &record);
                show(&mut recent, record);
            })?;
            metrics::read_last(&store, RECENT)
        };
        match Store::open(&self.run).and_then(read) {
            Ok(rows) => (self.standing, self.events, self.steps) = (standing, recent, rows.into()),
            Err(error) => {
                tracing::warn!(%error, job = self.spec.name, "the log of a job that ended cannot be read now");
                self.standing.outcome = Some(outcome.clone());
            }
        }
        if let Outcome::Fenced { by } = &outcome {
            self.trouble = Some(format!("{by} (or `anello resume {}` here)", self.spec.name));
        }
        Some(outcome)
    }
}

//! The thread that works on the run folder for a job, in the order in which it is asked: the log, metrics, manifests.
//!
//! Store calls block, so they live here and not on the runtime. What fails for now is tried again with a growing pause;
//! only another coordinator's record ends it.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anello_proto::ring::{Generation, Step};
use anello_store::checkpoint::{
    Manifest, Parts, Pruning, Retention, commit, let_go, point_at, prune, set_aside, steps,
};
use anello_store::events::{Event, EventLog, Record};
use anello_store::metrics::{self, StepRecord};
use anello_store::{Error as StoreError, Store};

/// Something to do.
#[derive(Debug)]
pub(crate) enum Task {
    /// Append to the log.
    Append { event: Event, formed: Option<Generation> },
    /// Keep this row, and write it with the next commit or when there are many or old ones.
    Row(StepRecord),
    /// Write the manifest of parts that are all durable.
    Commit { step: Step, parts: Vec<String> },
    /// List the checkpoints.
    List,
    /// All workers are gone: remove what they left unfinished.
    Tidy,
    /// Make a checkpoint that cannot be read no longer one.
    SetAside { step: Step },
}

/// What came of it.
#[derive(Debug)]
pub(crate) enum Done {
    /// The log holds it.
    Appended { record: Record, formed: Option<Generation> },
    /// The checkpoint exists.
    Committed { step: Step, seconds: f64, bytes: u64 },
    /// It does not.
    CommitFailed { step: Step, reason: String },
    /// These exist.
    Listed { steps: Vec<Step> },
    /// Another coordinator has the job.
    Fenced { by: String },
}

/// Rows that wait at most.
const ROWS_MAX: usize = 200;
/// Pauses between two attempts, from the first to the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// The job's end.
#[derive(Debug)]
pub(crate) struct Desk {
    tasks: Sender<Task>,
    thread: JoinHandle<()>,
}

impl Desk {
    /// Starts the thread. `tell` is called for everything that comes of a task.
    pub fn start(
        store: Store,
        log: EventLog,
        retention: Retention,
        watch: Duration,
        tell: impl Fn(Done) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (tasks, inbox) = channel();
        let mut work = Work { store, log, retention, rows: Vec::new(), tell };
        let thread = std::thread::Builder::new()
            .name("run-folder".to_owned())
            .spawn(move || work.run(&inbox, watch))?;
        Ok(Self { tasks, thread })
    }

    /// Hands over a task. One that comes after a fence is dropped: nothing may be written any more.
    pub fn ask(&self, task: Task) {
        let _ = self.tasks.send(task);
    }

    /// Waits until everything is written. What it would tell must be listened to, or its listener be gone.
    pub fn finish(self) {
        drop(self.tasks);
        let _ = self.thread.join();
    }
}

struct Work<F> {
    store: Store,
    log: EventLog,
    retention: Retention,
    rows: Vec<StepRecord>,
    tell: F,
}

impl<F: Fn(Done)> Work<F> {
    fn run(&mut self, inbox: &Receiver<Task>, watch: Duration) {
        loop {
            let result = match inbox.recv_timeout(watch) {
                Ok(task) => self.perform(task),
                // Workers may be connected to a coordinator that was replaced and has nothing to write.
                Err(RecvTimeoutError::Timeout) => match self.log.check() {
                    Err(fenced @ StoreError::Fenced { .. }) => Err(fenced),
                    _ => self.again(Self::flush),
                },
                Err(RecvTimeoutError::Disconnected) => {
                    let _ = self.again(Self::flush);
                    return;
                }
            };
            if let Err(fence) = result {
                (self.tell)(Done::Fenced { by: fence.to_string() });
                return;
            }
        }
    }

    /// Only a fence is an error.
    fn perform(&mut self, task: Task) -> Result<(), StoreError> {
        match task {
            Task::Append { event, formed } => {
                let record = self.again(|work| work.log.append(event.clone()))?;
                (self.tell)(Done::Appended { record, formed });
            }
            Task::Row(row) => {
                self.rows.push(row);
                if self.rows.len() >= ROWS_MAX {
                    self.again(Self::flush)?;
                }
            }
            Task::Commit { step, parts } => self.commit(step, &parts)?,
            Task::Tidy => {
                self.log.check()?;
                self.store.sweep();
                match prune(&self.store, &self.retention) {
                    Ok(pruning) => warn_of(&pruning),
                    Err(cause) => tracing::warn!(%cause, "what workers left unfinished could not be removed"),
                }
            }
            Task::SetAside { step } => self.again(|work| set_aside(&work.store, step.0))?,
            Task::List => {
                let steps = self.again(|work| steps(&work.store))?;
                (self.tell)(Done::Listed { steps: steps.into_iter().map(Step).collect() });
            }
        }
        Ok(())
    }

    /// Repeats what the store refuses for now. Gives up on anything that is not a matter of time.
    fn again<T>(
        &mut self,
        mut attempt: impl FnMut(&mut Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut pause = PAUSE.0;
        loop {
            match attempt(self) {
                Err(error @ (StoreError::Object { .. } | StoreError::System { .. })) => {
                    tracing::warn!(%error, pause_ms = pause.as_millis() as u64, "the run folder cannot be used now");
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(PAUSE.1);
                }
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        if self.rows.is_empty() {
            return Ok(());
        }
        self.log.check()?;
        metrics::write(&self.store, &self.rows)?;
        self.rows.clear();
        Ok(())
    }

    /// Metrics first, so that a checkpoint never stands after steps that were not logged; then the manifest; then
    /// `latest.json` points at it; only then is an old checkpoint let go.
    fn commit(&mut self, step: Step, parts: &[String]) -> Result<(), StoreError> {
        let began = std::time::Instant::now();
        let saved = self.again(Self::flush).and_then(|()| self.log.check()).and_then(|()| {
            let parts: Vec<Parts> =
                parts.iter().map(|text| serde_json::from_str(text)).collect::<Result<_, _>>().map_err(
                    |cause| StoreError::malformed("a worker's list of parts", cause, "use one build"),
                )?;
            let facts = parts.first().map(|parts| parts.facts.clone()).ok_or_else(|| {
                StoreError::malformed("a checkpoint", "it has no writer", "report this as a bug")
            })?;
            // The same blocks may have two writers: their owner, and whoever took that one for dead.
            let written = parts.into_iter().flat_map(|parts| parts.written).collect();
            commit(&self.store, Manifest::of_writers(facts, written))
        });
        match saved {
            Ok(manifest) => {
                let bytes = manifest.bytes();
                let weights = manifest.weights.clone();
                let record = self.again(|work| {
                    work.log.append(Event::Checkpoint { step: step.0, weights: weights.clone() })
                })?;
                (self.tell)(Done::Appended { record, formed: None });
                (self.tell)(Done::Committed { step, seconds: began.elapsed().as_secs_f64(), bytes });
                if let Err(cause) = point_at(&self.store, &manifest) {
                    tracing::warn!(%cause, "latest.json cannot be written now; the next checkpoint moves it");
                }
                match let_go(&self.store, &self.retention) {
                    Ok(pruning) => warn_of(&pruning),
                    Err(cause) => {
                        tracing::warn!(%cause, "old checkpoints could not be removed; it is tried again");
                    }
                }
                Ok(())
            }
            Err(fenced @ StoreError::Fenced { .. }) if self.log.check().is_err() => Err(fenced),
            Err(cause) => {
                (self.tell)(Done::CommitFailed { step, reason: cause.to_string() });
                Ok(())
            }
        }
    }
}

fn warn_of(pruning: &Pruning) {
    for (step, flaw) in &pruning.flawed {
        tracing::warn!(step, flaw, "a checkpoint is damaged; it stays, and an older one in its place");
    }
}

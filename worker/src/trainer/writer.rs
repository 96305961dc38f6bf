//! The thread that writes to the run folder, in the order in which it is told.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anello_store::checkpoint::{Manifest, Pruning, Retention, commit, point_at, prune};
use anello_store::events::{Event, EventLog};
use anello_store::metrics::{self, StepRecord};
use anello_store::{Error as StoreError, Notice, Store};

use super::{LAST_ATTEMPTS, Run};
use crate::checkpoint::{self, Snapshot};
use crate::error::{Error, Result, with_causes};

/// Jobs that may wait. Metrics of so many steps are a few hundred KiB; past it training waits for the store.
const JOBS_MAX: usize = 1024;
/// Rows that wait at most before they are written, besides at every checkpoint.
const ROWS_MAX: usize = 200;
/// Time that rows wait at most.
const ROWS_AGE_MAX: Duration = Duration::from_secs(10);

/// Something to write.
pub(super) enum Job {
    Event(Event),
    Metrics(StepRecord),
    Checkpoint(Box<Snapshot>),
}

/// The model thread's end.
pub(super) struct Writer {
    jobs: Option<SyncSender<Job>>,
    /// One answer for each checkpoint: the digest of its weights, or why it failed.
    results: Receiver<Result<String>>,
    writing: bool,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Writer {
    /// A writer of `run`, which `log` has claimed.
    pub fn start(run: &Run, log: EventLog, notices: Sender<Notice>) -> Result<Self> {
        let (jobs, inbox) = sync_channel(JOBS_MAX);
        let (answers, results) = channel();
        let desk = Desk {
            store: run.store.clone(),
            retention: Retention::of(&run.config),
            retry: run.retry,
            notices,
            log,
            answers,
            events: Vec::new(),
            rows: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name("run-writer".to_owned())
            .spawn(move || desk.run(inbox))
            .map_err(|source| Error::System { action: "starting the writer thread", source })?;
        Ok(Self { jobs: Some(jobs), results, writing: false, thread: Some(thread) })
    }

    /// Hands over a job. An error is the one that ended the writer.
    pub fn send(&self, job: Job) -> Result<()> {
        let jobs = self.jobs.as_ref().expect("nothing is sent after finish()");
        // A writer that is gone was fenced: finish() has the details, this is enough to stop the step loop.
        jobs.send(job).map_err(|_| StoreError::Fenced { place: "the event log".to_owned() }.into())
    }

    /// Hands over a checkpoint. The one before must have been waited for.
    pub fn checkpoint(&mut self, snapshot: Snapshot) -> Result<()> {
        assert!(!self.writing, "one checkpoint at a time");
        self.send(Job::Checkpoint(Box::new(snapshot)))?;
        self.writing = true;
        Ok(())
    }

    /// The answer to the checkpoint that was handed over, if there is one by now.
    pub fn poll(&mut self) -> Option<Result<String>> {
        match self.results.try_recv() {
            Ok(result) => {
                self.writing = false;
                Some(result)
            }
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => None,
        }
    }

    /// Waits for the answer to the checkpoint that was handed over; `None` when there is none under way.
    pub fn wait(&mut self) -> Option<Result<String>> {
        if !std::mem::take(&mut self.writing) {
            return None;
        }
        self.results.recv().ok()
    }

    /// Waits until everything is written.
    pub fn finish(&mut self) -> Result<()> {
        self.jobs = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(Error::ModelThread { cause: "the writer panicked".to_owned() }),
            None => Ok(()),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.finish();
    }
}

/// The writer thread's state: what could not be written yet is kept, in order.
struct Desk {
    store: Store,
    retention: Retention,
    retry: Duration,
    notices: Sender<Notice>,
    log: EventLog,
    answers: Sender<Result<String>>,
    events: Vec<Event>,
    rows: Vec<StepRecord>,
}

impl Desk {
    fn run(mut self, inbox: Receiver<Job>) -> Result<()> {
        let mut flushed = Instant::now();
        loop {
            match inbox.recv_timeout(ROWS_AGE_MAX) {
                Ok(Job::Event(event)) => {
                    self.events.push(event);
                    let flushed = self.flush_events();
                    tolerate(flushed, "the event log")?;
                }
                Ok(Job::Metrics(row)) => self.rows.push(row),
                Ok(Job::Checkpoint(snapshot)) => self.checkpoint(&snapshot)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if self.rows.len() >= ROWS_MAX || flushed.elapsed() >= ROWS_AGE_MAX {
                flushed = Instant::now();
                let (events, rows) = (self.flush_events(), self.flush_rows());
                tolerate(events, "the event log")?;
                tolerate(rows, "the metrics")?;
            }
        }
        self.flush_last()?;
        // Once more, for a process that found the run finished: the one before it may have been killed before this.
        if self.log.check().is_ok() {
            self.prune();
        }
        Ok(())
    }

    /// Writes the events that wait, up to the first that cannot be written.
    fn flush_events(&mut self) -> Result<()> {
        while let Some(event) = self.events.first() {
            let record = self.log.append(event.clone())?;
            self.events.remove(0);
            let _ = self.notices.send(Notice::Logged(record));
        }
        Ok(())
    }

    /// Writes what still waits when there is no later time for it.
    fn flush_last(&mut self) -> Result<()> {
        for _ in 1..LAST_ATTEMPTS {
            match self.flush_rows().and_then(|()| self.flush_events()) {
                Err(Error::Store(StoreError::Object { .. })) => std::thread::sleep(self.retry),
                result => return result,
            }
        }
        self.flush_rows().and_then(|()| self.flush_events())
    }

    fn flush_rows(&mut self) -> Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        self.log.check()?;
        metrics::write(&self.store, &self.rows)?;
        self.rows.clear();
        Ok(())
    }

    /// Metrics first, so that a checkpoint never stands after steps that were not logged; then parts and manifest; then
    /// `latest.json` points at it; only then is an old checkpoint let go. Only a fence ends the writer.
    fn checkpoint(&mut self, snapshot: &Snapshot) -> Result<()> {
        let began = Instant::now();
        let step = snapshot.facts.position.step;
        let mut newest = None;
        match self.save(snapshot) {
            Ok(manifest) => {
                newest = Some(manifest.clone());
                self.events.push(Event::Checkpoint { step, weights: manifest.weights.clone() });
                let seconds = began.elapsed().as_secs_f64();
                let _ = self.notices.send(Notice::Checkpoint { step, seconds, bytes: manifest.bytes() });
                let _ = self.answers.send(Ok(manifest.weights));
            }
            Err(Error::Store(StoreError::Fenced { place })) => {
                let _ = self.answers.send(Err(StoreError::Fenced { place: place.clone() }.into()));
                return Err(StoreError::Fenced { place }.into());
            }
            Err(cause) => {
                let text = with_causes(&cause);
                self.events.push(Event::CheckpointFailed { step, cause: text.clone() });
                let _ = self.notices.send(Notice::CheckpointFailed { step, cause: text });
                let _ = self.answers.send(Err(cause));
            }
        }
        let flushed = self.flush_events();
        // Nothing is let go before the log has said that the run is still ours.
        let ours = flushed.is_ok();
        tolerate(flushed, "the event log")?;
        if ours {
            if let Some(Err(cause)) = newest.map(|manifest| point_at(&self.store, &manifest)) {
                tracing::warn!(%cause, "latest.json cannot be written now; the next checkpoint moves it");
            }
            self.prune();
        }
        Ok(())
    }

    fn save(&mut self, snapshot: &Snapshot) -> Result<Manifest> {
        self.flush_rows()?;
        self.log.check()?;
        let written =
            checkpoint::write(&self.store, snapshot, self.retention.policy.part_bytes, self.log.session())?;
        Ok(commit(&self.store, Manifest::new(snapshot.facts.clone(), written))?)
    }

    fn prune(&self) {
        match prune(&self.store, &self.retention) {
            Ok(Pruning { flawed, .. }) => flawed.iter().for_each(|(step, flaw)| {
                tracing::warn!(
                    step,
                    flaw,
                    "a checkpoint is damaged; it stays, and an older one in its place"
                );
            }),
            Err(cause) => tracing::warn!(%cause, "old checkpoints could not be removed; it is tried again"),
        }
    }
}

/// What was not written is kept and tried again. Only a fence is an error.
fn tolerate(result: Result<()>, what: &'static str) -> Result<()> {
    match result {
        Err(fenced) if fenced.is_fenced() => Err(fenced),
        Err(cause) => {
            tracing::warn!(what, %cause, "cannot be written now; it is tried again");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

//! What a process knows of its jobs, where whoever asks can read it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anello_configs::RunConfig;
use anello_proto::jobs::Phase;
use anello_store::events::Record;
use anello_store::{Notice, Store, checkpoint, metrics};
use prometheus::{Registry, TextEncoder};

use super::collect::Collected;
use super::figures::Figures;
use super::goodput::Times;
use super::traces::Traces;
use super::unix_ms;
use crate::core::{Outcome, Status};

/// The jobs of a process, by name. Clones are the same board. What is told here waits for nobody.
#[derive(Clone, Debug, Default)]
pub struct Board {
    jobs: Arc<Mutex<BTreeMap<String, Figures>>>,
    peak_flops: Option<f64>,
    traces: Option<Traces>,
}

impl Board {
    /// An empty one. `peak_flops`: peak FLOP/s of one worker's device; absent: the utilisation is not told.
    pub fn new(peak_flops: Option<f64>) -> Self {
        Self { jobs: Arc::default(), peak_flops, traces: None }
    }

    /// One that also sends traces of what happens from now on.
    pub fn tracing(self, traces: Option<Traces>) -> Self {
        Self { traces, ..self }
    }

    /// Whether it sends traces.
    pub fn is_tracing(&self) -> bool {
        self.traces.is_some()
    }

    /// Sends what traces are left, at the end of the process.
    pub fn finish(&self) {
        self.traces.iter().for_each(Traces::finish);
    }

    /// Peak FLOP/s of one worker's device.
    pub fn peak_flops(&self) -> Option<f64> {
        self.peak_flops
    }

    fn jobs(&self) -> MutexGuard<'_, BTreeMap<String, Figures>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A job is taken up, whose log has `records`. What was told of it before stays, since counters only rise.
    ///
    /// # Errors
    /// Those of the store, from which its newest checkpoint and row are read.
    pub fn take_up(
        &self,
        name: &str,
        config: &RunConfig,
        store: &Store,
        records: &[Record],
    ) -> anello_store::Result<()> {
        let mut recalled = self.recall(name, config, store)?;
        records.iter().for_each(|record| recalled.record(record));
        recalled.take_up();
        Ok(())
    }

    /// [`Board::take_up`] of a job whose log is told record by record, so that nobody has all of it.
    ///
    /// # Errors
    /// Those of the store, from which its newest checkpoint and row are read.
    pub fn recall(&self, name: &str, config: &RunConfig, store: &Store) -> anello_store::Result<Recalled> {
        let mut recalled = Recalled {
            board: self.clone(),
            name: name.to_owned(),
            store: store.clone(),
            figures: None,
            last: None,
        };
        if !self.jobs().contains_key(name) {
            let newest = checkpoint::steps(store)?.last().copied();
            let row = metrics::read_last(store, 1)?.pop();
            recalled.last = row.as_ref().map(|row| row.step);
            recalled.figures = Some(Figures::new(config, store.place(), newest, row, unix_ms()));
        }
        Ok(recalled)
    }

    /// Reads what the steps up to `last` took, on a thread of its own: a long run has many, and nobody waits for them.
    fn recall_times(&self, name: String, store: Store, last: u64) {
        let board = self.clone();
        let reading = std::thread::Builder::new().name("rows".to_owned()).spawn(move || {
            let mut times = Times::default();
            let read = metrics::read_after(&store, None, |row| {
                if row.step <= last {
                    times.step(&row);
                }
            });
            match read {
                Ok(()) => drop(board.with(&name, |figures| figures.recall_times(times))),
                Err(error) => tracing::warn!(name, %error, "what became of a job's time is not told: its rows cannot be read"),
            }
        });
        if let Err(error) = reading {
            tracing::warn!(%error, "what became of a job's time is not told: there is no thread to read its rows");
        }
    }

    /// Something happened in a job.
    pub fn observe(&self, name: &str, notice: &Notice) {
        let now_ms = unix_ms();
        self.traces.iter().for_each(|traces| traces.observe(name, notice, now_ms));
        self.with(name, |figures| figures.observe(notice, now_ms));
    }

    /// A record of a job's log, told unless it was: the last ones of a ring come when nobody listens to it any more.
    pub fn catch_up(&self, name: &str, record: &Record) {
        let known = self.with(name, |figures| figures.events.back().map(|record| record.number)).flatten();
        if Some(record.number) > known {
            self.observe(name, &Notice::Logged(record.clone()));
        }
    }

    /// How the ring of a job is that no registry keeps: its phase follows.
    pub fn set_ring(&self, name: &str, status: Status, wanted: u32) {
        let phase = phase_of_ring(&status);
        self.with(name, |figures| {
            (figures.status, figures.phase, figures.wanted) = (Some(status), Some(phase), Some(wanted));
        });
    }

    /// How a job's ring is; absent: it has none now.
    pub fn set_status(&self, name: &str, status: Option<Status>) {
        self.with(name, |figures| figures.status = status);
    }

    /// Where a job is in its life, and the workers that its user wants.
    pub fn set_phase(&self, name: &str, phase: Phase, wanted: u32) {
        self.with(name, |figures| (figures.phase, figures.wanted) = (Some(phase), Some(wanted)));
    }

    /// Does something with what is known of a job, while nothing more is told of any.
    pub fn with<T>(&self, name: &str, act: impl FnOnce(&mut Figures) -> T) -> Option<T> {
        self.jobs().get_mut(name).map(act)
    }

    /// Puts what the board knows into a registry: read each time that the registry is.
    ///
    /// # Errors
    /// A registry that has metrics of these names already.
    pub fn register(&self, registry: &Registry) -> prometheus::Result<()> {
        registry.register(Box::new(Collected::new(self.clone())))
    }

    pub(crate) fn each(&self, mut act: impl FnMut(&str, &Figures)) {
        self.jobs().iter().for_each(|(name, figures)| act(name, figures));
    }
}

/// A job that is about to be taken up, while its log is told.
#[derive(Debug)]
pub struct Recalled {
    board: Board,
    name: String,
    store: Store,
    /// Absent: the job is known already.
    figures: Option<Figures>,
    /// The step of its last row.
    last: Option<u64>,
}

impl Recalled {
    /// A record of its log, in its order.
    pub fn record(&mut self, record: &Record) {
        self.figures.iter_mut().for_each(|figures| figures.recall(record));
    }

    /// All of the log was told: the job is on the board.
    pub fn take_up(self) {
        let Self { board, name, store, figures, last } = self;
        let Some(figures) = figures else { return };
        board.jobs().entry(name.clone()).or_insert(figures);
        if let Some(last) = last {
            board.recall_times(name, store, last);
        }
    }
}

fn phase_of_ring(status: &Status) -> Phase {
    match &status.outcome {
        Some(Outcome::Completed) => Phase::Completed,
        Some(Outcome::Cancelled) => Phase::Cancelled,
        Some(Outcome::Failed { .. }) => Phase::Failed,
        Some(Outcome::Paused | Outcome::Fenced { .. }) => Phase::Paused,
        None if status.trains => Phase::Running,
        None if status.has_trained => Phase::Recovering,
        None => Phase::Forming,
    }
}

/// A registry as the text that Prometheus scrapes.
#[derive(Clone, Debug)]
pub struct Scrape {
    registry: Registry,
}

impl Scrape {
    /// The content type of the text.
    pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

    /// Of a board, in a registry of its own.
    ///
    /// # Errors
    /// None with a board of ours; those of [`Board::register`].
    pub fn of(board: &Board) -> prometheus::Result<Self> {
        let registry = Registry::new();
        board.register(&registry)?;
        Ok(Self { registry })
    }

    /// The text now.
    ///
    /// # Errors
    /// None with metrics of ours: those of the encoder.
    pub fn text(&self) -> prometheus::Result<String> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

//! Training a run: the shell around [`crate::Engine`].
//!
//! ```text
//!  caller ── Control (stop) ──▶ model thread ── records, snapshots, events ──▶ writer thread ──▶ run folder
//!     ▲                          engine, loader                                 metrics, checkpoints, log
//!     └───────────────── Notice (what a person may want to see) ◀──────────────────┘
//! ```
//!
//! The model lives on one thread. It waits for the store only when a checkpoint is due while the one before is still
//! being written. What cannot be written (a full disk) is kept and tried again; training goes on meanwhile.

mod open;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anello_configs::{RunConfig, Schedule, StepPlan};
use anello_dataloader::{LaneStep, Loader, LoaderOptions};
use anello_store::checkpoint::{read_manifest, steps};
use anello_store::events::{Event, EventLog};
use anello_store::metrics::{Seconds, StepRecord};
use anello_store::{Cursor, Error as StoreError, Notice, Store};

use crate::account::{Epochs, Stamp, outcome_event, position_after, weights_digest};
use crate::checkpoint::Snapshot;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::rollback::Rollback;
use crate::validate::HeldOut;

pub use open::{Resume, Run};
use writer::{Job, Writer};

/// The caller's hand on a run.
#[derive(Clone, Debug, Default)]
pub struct Control {
    stop: Arc<AtomicBool>,
}

impl Control {
    /// Asks to finish the step under way, take a checkpoint and end. Safe from a signal handler.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn stops(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Steps applied or skipped.
    pub step: u64,
    /// Whether that is all of them.
    pub finished: bool,
    /// Digest of the weights.
    pub weights: String,
}

/// A run under way.
#[derive(Debug)]
pub struct Training {
    /// What happens, in order; ends when the run does.
    pub notices: Receiver<Notice>,
    thread: JoinHandle<Result<Ended>>,
}

impl Training {
    /// Starts to train `run` until its end, until `control` says stop, or until `until` steps are done.
    pub fn start(run: Run, control: Control, until: Option<u64>) -> Result<Self> {
        let (sender, notices) = channel();
        let thread = std::thread::Builder::new()
            .name("model".to_owned())
            .spawn(move || Trainer::new(run, control, until, sender)?.run())
            .map_err(|source| Error::System { action: "starting the model thread", source })?;
        Ok(Self { notices, thread })
    }

    /// Waits for the end.
    pub fn join(self) -> Result<Ended> {
        drop(self.notices);
        self.thread.join().unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let cause = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            Err(Error::ModelThread { cause: cause.unwrap_or_else(|| "no words".to_owned()) })
        })
    }
}

/// Attempts at what a process writes last before it gives up.
const LAST_ATTEMPTS: u32 = 6;

struct Trainer {
    config: RunConfig,
    store: Store,
    retry: Duration,
    schedule: Schedule,
    engine: Engine,
    data: LoaderOptions,
    loader: Loader,
    held_out: Option<HeldOut>,
    /// Where each lane is after the last step.
    cursors: Vec<Cursor>,
    stamp: Stamp,
    epochs: Epochs,
    next_step: u64,
    last_step: u64,
    control: Control,
    notices: Sender<Notice>,
    writer: Writer,
    /// Since when the checkpoint that is due has been wanted again after a failure.
    retry_at: Option<Instant>,
}

impl Trainer {
    fn new(run: Run, control: Control, until: Option<u64>, notices: Sender<Notice>) -> Result<Self> {
        if let Some(threads) = run.config.compute.threads {
            tch::set_num_threads(threads as i32);
        }
        let schedule = Schedule::new(&run.config);
        let last_step = until.map_or(schedule.total_steps(), |until| until.min(schedule.total_steps()));
        let mut log = EventLog::open(&run.store)?;
        let open::Started { engine, loader, cursors, step, stamp, epochs, records } = run.start(&mut log)?;
        for record in records {
            let _ = notices.send(Notice::Logged(record));
        }
        let writer = Writer::start(&run, log, notices.clone())?;
        Ok(Self {
            config: run.config,
            store: run.store,
            retry: run.retry,
            schedule,
            engine,
            data: run.data,
            loader,
            held_out: run.held_out,
            cursors,
            stamp,
            epochs,
            next_step: step,
            last_step,
            control,
            notices,
            writer,
            retry_at: None,
        })
    }

    fn run(mut self) -> Result<Ended> {
        let schedule = self.schedule.clone();
        // A caller that no longer listens is no reason to stop.
        let _ = self.notices.send(Notice::Ready { step: self.next_step });
        let (mut saved, mut began) = (false, true);
        while self.next_step < self.last_step && !self.control.stops() {
            let plan = schedule.at(self.next_step).expect("a step below the total has a plan");
            if plan.first_of_stage {
                self.writer
                    .send(Job::Event(Event::Stage { step: plan.step, stage: plan.stage.name.clone() }))?;
            }
            if plan.first_of_stage || began {
                let _ = self.notices.send(Notice::Stage { index: plan.stage_index });
            }
            began = false;
            saved = self.step(&plan)?;
        }
        let weights = self.save_last(saved)?;
        let (step, finished) = (self.next_step, self.next_step >= self.schedule.total_steps());
        let event = match finished {
            true => Event::Finished { step, weights: weights.clone() },
            false => Event::Stopped { step },
        };
        self.writer.send(Job::Event(event))?;
        self.writer.finish()?;
        Ok(Ended { step, finished, weights })
    }

    /// One step, and a checkpoint after it when one is due. Returns whether one was taken.
    fn step(&mut self, plan: &StepPlan<'_>) -> Result<bool> {
        let _step = tracing::trace_span!("step", step = plan.step).entered();
        let began = Instant::now();
        let mut seconds = Seconds::default();
        self.engine.enter(plan);
        for lane in 0..self.config.lanes {
            let waited = Instant::now();
            let data = tracing::trace_span!("data", lane).entered();
            let lane_step = self.next_lane_step(plan, lane)?;
            drop(data);
            seconds.data += waited.elapsed().as_secs_f64();
            let computed = Instant::now();
            tracing::trace_span!("lane", lane)
                .in_scope(|| self.engine.lane(plan.stage, lane, &lane_step.micro_batches));
            seconds.compute += computed.elapsed().as_secs_f64();
            let events = self.epochs.data_events(&lane_step);
            self.tell(events)?;
            self.cursors[lane as usize] = lane_step.cursor;
        }
        let updated = Instant::now();
        let outcome = self.engine.finish(plan);
        if let Some(to) = outcome.back_to {
            self.go_back(to)?;
        }
        self.next_step = plan.step + 1;
        let on_record = self.config.record.has_weights(self.next_step);
        let weights = on_record.then(|| weights_digest(self.engine.state()));
        seconds.update = updated.elapsed().as_secs_f64();
        let Seconds { compute, forward, update, .. } = &mut seconds;
        self.engine.take_spent().account(compute, forward, update);
        self.tell(outcome_event(plan, &outcome))?;
        let mut evals = Vec::new();
        if let Some(held_out) = self.held_out.as_mut().filter(|held_out| held_out.is_due(plan)) {
            let measured = Instant::now();
            evals = held_out.measure(&self.engine, plan)?;
            seconds.eval = measured.elapsed().as_secs_f64();
        }

        self.note_failure()?;
        // After a spike that was undone too, so that what was computed again need not be once more.
        let due = self.next_step.is_multiple_of(self.config.checkpoint.every_steps)
            || plan.last_of_stage
            || outcome.back_to.is_some();
        let again = self.retry_at.is_some_and(|at| at <= Instant::now());
        let mut snapshot = None;
        if due || again {
            let stalled = Instant::now();
            let _span = tracing::trace_span!("checkpoint").entered();
            self.wait_for_checkpoint()?;
            self.retry_at = None;
            snapshot = Some(self.snapshot());
            seconds.checkpoint = stalled.elapsed().as_secs_f64();
        }
        seconds.step = began.elapsed().as_secs_f64();
        let record = StepRecord { weights, evals, ..outcome.record(plan, seconds) };
        self.writer.send(Job::Metrics(record.clone()))?;
        let _ = self.notices.send(Notice::Step(record));
        let taken = snapshot.is_some();
        if let Some(snapshot) = snapshot {
            self.writer.checkpoint(snapshot)?;
        }
        Ok(taken)
    }

    /// Makes the state that after `to` steps.
    fn go_back(&mut self, to: u64) -> Result<()> {
        // The one that is being written may be the one to begin from.
        self.wait_for_checkpoint()?;
        let Self { config, store, schedule, data, engine, retry, .. } = self;
        let rollback = Rollback { store, config, schedule, data, known: None };
        for _ in 1..LAST_ATTEMPTS {
            match rollback.undo(engine, to) {
                Err(Error::Store(StoreError::Object { .. })) => std::thread::sleep(*retry),
                result => return result,
            }
        }
        rollback.undo(engine, to)
    }

    fn next_lane_step(&mut self, plan: &StepPlan<'_>, lane: u32) -> Result<LaneStep> {
        let lane_step = self.loader.next().expect("the loader has the same schedule as the trainer")?;
        // A batch belongs to a step and a lane, never to an iterator's place.
        assert_eq!((lane_step.step, lane_step.lane), (plan.step, lane), "the loader serves another step");
        Ok(lane_step)
    }

    fn tell(&self, events: impl IntoIterator<Item = Event>) -> Result<()> {
        events.into_iter().try_for_each(|event| self.writer.send(Job::Event(event)))
    }

    fn snapshot(&self) -> Snapshot {
        let state = self.engine.state();
        let position = position_after(&self.schedule, self.next_step);
        let facts = self.stamp.facts(state, position, self.cursors.clone());
        Snapshot::take(state, 0..state.layout.blocks(), facts)
    }

    /// Waits until no checkpoint is being written.
    fn wait_for_checkpoint(&mut self) -> Result<()> {
        if let Some(result) = self.writer.wait() {
            self.retry_at = self.after(result)?;
        }
        Ok(())
    }

    /// Looks whether the checkpoint that was being written has failed.
    fn note_failure(&mut self) -> Result<()> {
        if let Some(result) = self.writer.poll() {
            self.retry_at = self.after(result)?;
        }
        Ok(())
    }

    fn after(&self, result: Result<String>) -> Result<Option<Instant>> {
        match result {
            Ok(_) => Ok(None),
            Err(fenced) if fenced.is_fenced() => Err(fenced),
            Err(_) => Ok(Some(Instant::now() + self.retry)),
        }
    }

    /// Makes sure that the last state is in a checkpoint; returns the digest of the weights.
    fn save_last(&mut self, saved: bool) -> Result<String> {
        let mut result = if saved { self.writer.wait() } else { None };
        if result.is_none() {
            self.wait_for_checkpoint()?;
            if let Some(manifest) = self.already_saved()? {
                return Ok(manifest);
            }
        }
        for attempt in 0..LAST_ATTEMPTS {
            match result.take() {
                Some(Ok(weights)) => return Ok(weights),
                Some(Err(fenced)) if fenced.is_fenced() => return Err(fenced),
                Some(Err(_)) if attempt > 0 => std::thread::sleep(self.retry),
                Some(Err(_)) | None => {}
            }
            self.writer.checkpoint(self.snapshot())?;
            result = self.writer.wait();
        }
        result.unwrap_or_else(|| Err(Error::ModelThread { cause: "the writer gave no answer".to_owned() }))
    }

    /// The digest of the checkpoint at this very step, when it exists: nothing was trained since.
    fn already_saved(&self) -> Result<Option<String>> {
        if !steps(&self.store)?.contains(&self.next_step) {
            return Ok(None);
        }
        Ok(Some(read_manifest(&self.store, self.next_step)?.weights))
    }
}

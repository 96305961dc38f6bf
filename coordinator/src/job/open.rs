//! A job before it runs: its run folder made, or taken up where another coordinator left it.

use std::collections::BTreeSet;

use anello_configs::{LaneShares, RunConfig, Schedule};
use anello_proto::ring::Generation;
use anello_store::events::{self, EventLog};
use anello_store::{CONFIG, Store, checkpoint, metrics, read_config};

use super::*;
use crate::core::{Found, Options, Straggling};
use crate::error::{Error, Result};
use crate::records::{formation_of, worker_of};

/// Inputs that may wait for the loop: heartbeats of some thousands of workers.
const INPUTS_MAX: usize = 16 << 10;
/// Failures of one step that no death explains.
const FAULTS_MAX: u32 = 3;

/// A new run of `config` in `store`, for workers to train: the config, written once.
///
/// # Errors
/// A folder that holds a run already, or what is left of one; those of the store.
pub fn create(store: &Store, config: &RunConfig) -> Result<()> {
    checkpoint::refuse_leftovers(store)?;
    if !store.create(CONFIG, config.to_toml())? {
        return Err(anello_store::Error::Fenced { place: store.place_of(CONFIG) }.into());
    }
    Ok(())
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
        let checkpoints = checkpoint::known_steps(&store)?;
        let (mut quarantined, mut evicted, mut formation) = (BTreeSet::new(), BTreeSet::new(), None);
        events::each(&store, |record| match record.event {
            Logged::Evicted { worker, machine, .. } => {
                evicted.extend(worker_of(&worker));
                quarantined.extend(Some(machine).filter(|machine| !machine.is_empty()));
            }
            // A ring that ended by agreement has no members any more: nobody is waited for.
            Logged::Ended { .. } => formation = None,
            event => formation = formation_of(event).or(formation.take()),
        })?;
        let taken = log.append(Logged::TakenUp { step: checkpoints.last().copied() })?;
        // No row before a checkpoint is still to come.
        let rows = metrics::read_last(&store, 1)?.last().map_or(0, |row| row.step + 1);
        let reported = rows.max(checkpoints.last().copied().unwrap_or(0));
        let found = Found {
            formation,
            checkpoints: checkpoints.into_iter().map(Step).collect(),
            floor: Generation(taken.number),
            quarantined: quarantined.into_iter().collect(),
            evicted: evicted.into_iter().collect(),
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
        let (retention, timings) = (checkpoint::Retention::of(&config), options.timings);
        let desk = Desk::start(store.clone(), log, retention, timings.watch, tell)
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
            kind: None,
            early: Vec::new(),
            total: schedule.total_steps(),
            rows: Rows::new(reported, millis(timings.lease)),
            amending: VecDeque::new(),
            wait: Wait::default(),
            stages: config.stages.iter().map(|stage| stage.name.as_str().to_owned()).collect(),
            stage: None,
            ready: false,
        };
        Ok((job, tokio::spawn(running.run(inbox))))
    }
}

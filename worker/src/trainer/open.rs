//! Opening a run: a new one, or where an old one stands.

use std::collections::BTreeMap;
use std::time::Duration;

use anello_configs::RunConfig;
use anello_dataloader::{Loader, LoaderOptions};
use anello_store::checkpoint::{known_steps, refuse_leftovers, same_data, set_aside};
use anello_store::events::{self, Event, EventLog, Record};
use anello_store::{CONFIG, Cursor, ENVIRONMENT, Error as StoreError, Store, metrics, read_config};
use tch::Device;

use crate::account::{Epochs, Stamp};
use crate::checkpoint::{self, Loaded};
use crate::device;
use crate::engine::Engine;
use crate::environment;
use crate::error::{Error, Result};
use crate::init::initial_state;
use crate::kernels;
use crate::validate::HeldOut;

/// A run that is ready to be trained.
pub struct Run {
    /// What it trains.
    pub config: RunConfig,
    /// Where it lives.
    pub store: Store,
    /// Time between two attempts at what could not be written.
    pub retry: Duration,
    pub(super) data: LoaderOptions,
    pub(super) held_out: Option<HeldOut>,
    resumed: bool,
    allow: bool,
    /// Whether the run folder has another config still.
    new_config: bool,
    /// Keys that differ from the config it was begun with: (key, before, now).
    changed: Vec<(String, String, String)>,
}

/// What resuming may do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resume {
    /// A config to go on with; absent: the one in the run folder.
    pub config: Option<RunConfig>,
    /// Accept a config or data that changes the mathematics.
    pub allow: bool,
}

/// Everything that a trainer starts with.
pub(super) struct Started {
    pub engine: Engine,
    pub loader: Loader,
    pub cursors: Vec<Cursor>,
    pub step: u64,
    pub stamp: Stamp,
    pub epochs: Epochs,
    /// What was logged: the claim.
    pub records: Vec<Record>,
}

/// Time between two attempts at what could not be written.
const RETRY: Duration = Duration::from_secs(5);

impl Run {
    /// A new run of `config` in `store`, which must hold none yet; a folder is to be a [`Store::durable`] one.
    pub fn create(store: Store, config: RunConfig) -> Result<Self> {
        // Before there is a folder: a device that is not there is no run.
        let device = kernels::ready(&config.compute)?;
        if store.get(CONFIG)?.is_some() {
            let fact = format!("{} holds a run already", store.place());
            return Err(Error::config(fact, "resume it, or give another folder"));
        }
        refuse_leftovers(&store)?;
        let (data, held_out) = (LoaderOptions::of(&config)?, HeldOut::open(&config)?);
        if !store.create(CONFIG, config.to_toml())? {
            return Err(StoreError::Fenced { place: store.place_of(CONFIG) }.into());
        }
        store.put(ENVIRONMENT, environment::of(device, config.compute.threads).to_json())?;
        let store = store.limited(config.store.bandwidth);
        Ok(Self {
            config,
            store,
            retry: RETRY,
            data,
            held_out,
            resumed: false,
            allow: false,
            new_config: false,
            changed: Vec::new(),
        })
    }

    /// The run in `store` (as for [`Run::create`]), to go on from its newest usable checkpoint.
    pub fn resume(store: Store, resume: Resume) -> Result<Self> {
        let begun_with = read_config(&store)?;
        let config = resume.config.unwrap_or_else(|| begun_with.clone());
        let shown = |value: Option<String>| value.unwrap_or_else(|| events::ABSENT.to_owned());
        let changed: Vec<(String, String, String)> = begun_with
            .diff_mathematics(&config)
            .into_iter()
            .map(|d| (d.key, shown(d.ours), shown(d.theirs)))
            .collect();
        if !changed.is_empty() && !resume.allow {
            let keys = changed.iter().map(|(key, before, now)| format!("\n  {key}: {before} -> {now}"));
            let fact = format!(
                "the config changes the mathematics of {}:{}",
                store.place(),
                keys.collect::<String>()
            );
            return Err(Error::config(
                fact,
                "resume without it, or accept that the run changes with --allow",
            ));
        }
        if begun_with.model != config.model {
            let fact = format!("the model of {} has other sizes than the config's", store.place());
            return Err(Error::config(fact, "begin a new run; sizes cannot change, also not with --allow"));
        }
        if begun_with.lanes != config.lanes {
            let fact =
                format!("{} has {} lanes, the config {}", store.place(), begun_with.lanes, config.lanes);
            return Err(Error::config(fact, "begin a new run; lanes are fixed for the life of one"));
        }
        let (data, held_out) = (LoaderOptions::of(&config)?, HeldOut::open(&config)?);
        let (new_config, allow) = (config != begun_with, resume.allow);
        let store = store.limited(config.store.bandwidth);
        Ok(Self { config, store, retry: RETRY, data, held_out, resumed: true, allow, new_config, changed })
    }

    /// Builds engine and loader at the first step to train, and claims the run: of two processes one gets through
    /// the first record here, the other is fenced. Before that nothing in the run folder is changed.
    pub(super) fn start(&self, log: &mut EventLog) -> Result<Started> {
        let device = device::open(self.config.compute.device)?;
        let kernels = kernels::of(&self.config.compute, device)?;
        let stamp = Stamp::new(&self.config, &self.data, device);
        let mut passed_over = Vec::new();
        let loaded = if self.resumed { self.newest_usable(device, &mut passed_over)? } else { None };
        let step = loaded.as_ref().map_or(0, |loaded| loaded.manifest.step);
        let mut other_data = Vec::new();
        if let Some(loaded) = &loaded {
            let known = events::read(&self.store)?;
            let before = events::data_since(&known, step, loaded.manifest.data.clone());
            other_data = self.check_data(&before, &stamp.data)?;
            let there = &loaded.manifest.environment;
            for (what, before, now) in there.differences(&stamp.environment) {
                tracing::warn!(
                    what,
                    before,
                    now,
                    "this is not where the checkpoint was written; the bits may differ"
                );
            }
        }
        let epochs = if self.resumed { Epochs::told_before(&self.store, step) } else { Epochs::default() };
        let mut records = Vec::new();
        for (step, reason) in &passed_over {
            records.push(log.append(Event::PassedOver { step: *step, reason: reason.clone() })?);
        }
        let (here, changed) = (stamp.environment.clone(), self.changed.clone());
        records.push(log.append(Event::Started { step, environment: here, changed, data: other_data })?);
        passed_over.iter().try_for_each(|(step, _)| set_aside(&self.store, *step))?;
        if self.new_config {
            self.store.put(CONFIG, self.config.to_toml())?;
        }
        if self.resumed {
            self.store.sweep();
            metrics::truncate(&self.store, step)?;
        }

        let (engine, cursors) = match loaded {
            Some(Loaded { manifest, state }) => {
                let mut engine = Engine::with_kernels(&self.config, state, kernels);
                if events::changed_at(&self.store)? == Some(step) {
                    // Losses of another config are no measure, and a spike must not lead back behind the change.
                    engine.forget_losses();
                }
                (engine, Some(manifest.cursors))
            }
            None => {
                let state = initial_state(&self.config, device)?;
                (Engine::with_kernels(&self.config, state, kernels), None)
            }
        };
        let loader =
            Loader::open(LoaderOptions { start_step: step, cursors: cursors.clone(), ..self.data.clone() })?;
        let cursors = cursors.unwrap_or_else(|| vec![Cursor::default(); self.config.lanes as usize]);
        Ok(Started { engine, loader, cursors, step, stamp, epochs, records })
    }

    /// The newest checkpoint that is whole. The newer ones that are not (step and reason) go into `passed_over`: they
    /// are to be set aside so that the run can write those steps again.
    fn newest_usable(&self, device: Device, passed_over: &mut Vec<(u64, String)>) -> Result<Option<Loaded>> {
        let steps = known_steps(&self.store)?;
        for &step in steps.iter().rev() {
            match checkpoint::load(&self.store, step, &self.config.model, device) {
                Ok(loaded) => return Ok(Some(loaded)),
                Err(damaged @ Error::Store(StoreError::Checkpoint { .. })) => {
                    let reason = damaged.to_string();
                    tracing::warn!(step, reason, "a checkpoint cannot be used; trying the one before it");
                    passed_over.push((step, reason));
                }
                Err(other) => return Err(other),
            }
        }
        if steps.is_empty() {
            return Ok(None);
        }
        let fact = format!("none of the {} checkpoints of {} is whole", steps.len(), self.store.place());
        Err(Error::config(fact, "`anello checkpoint verify` says what is wrong with each; begin a new run"))
    }

    /// Sources whose data is not what the run was trained on (name, digest before, now): an error unless that is allowed.
    fn check_data(
        &self,
        before: &BTreeMap<String, String>,
        now: &BTreeMap<String, String>,
    ) -> Result<Vec<(String, String, String)>> {
        let other = |(name, digest): (&String, &String)| match now.get(name) {
            Some(now) if same_data(digest, now) => None,
            now => {
                Some((name.clone(), digest.clone(), now.map_or(events::ABSENT, String::as_str).to_owned()))
            }
        };
        let other: Vec<(String, String, String)> = before.iter().filter_map(other).collect();
        if other.is_empty() || self.allow {
            return Ok(other);
        }
        let names: Vec<&str> = other.iter().map(|(name, ..)| name.as_str()).collect();
        let fact = format!("the data of {} has changed since the run began", names.join(", "));
        Err(Error::config(fact, "bring the old data back, or accept that the run changes with --allow"))
    }
}

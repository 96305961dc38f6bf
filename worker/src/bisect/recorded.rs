//! What a run folder tells of its run.

use std::collections::{BTreeMap, BTreeSet};

use anello_configs::{ComputeDevice, RunConfig, Schedule, StepPlan};
use anello_dataloader::Dataset;
use anello_store::checkpoint::{self, Manifest, same_data};
use anello_store::events::{self, ABSENT, Event, Record};
use anello_store::metrics::{self, StepRecord};
use anello_store::words::other_data;
use anello_store::{ENVIRONMENT, Environment, Error as StoreError, Store, read_config};

use super::findings::Told;
use crate::error::{Error, Result};

/// A run as its folder tells it.
#[derive(Debug)]
pub(crate) struct Recorded {
    pub store: Store,
    /// Its configs and data in order, each with the first step that it holds for; the first is of step 0.
    pub epochs: Vec<Epoch>,
    /// What its log tells, in order.
    pub events: Vec<Event>,
    /// What was logged, by step.
    pub records: BTreeMap<u64, StepRecord>,
    /// Checkpoints by steps applied.
    pub manifests: BTreeMap<u64, Manifest>,
    pub environments: Vec<Environment>,
    /// What could not be read.
    pub unread: Vec<String>,
    /// What is odd about it.
    pub notes: Vec<String>,
}

/// Config and data from a step on.
#[derive(Clone, Debug)]
pub(crate) struct Epoch {
    pub from: u64,
    pub config: RunConfig,
    /// Digest of the index of each source, by name.
    pub data: BTreeMap<String, String>,
    schedule: Schedule,
}

impl Recorded {
    /// Reads all but the parts of checkpoints. What is damaged is left out and told of in `unread`; a folder without a
    /// config, or a store that does not answer, is an error.
    pub fn read(store: &Store) -> Result<Self> {
        let config = read_config(store)?;
        let mut unread = Vec::new();
        let told = readable(events::read(store), &mut unread)?.unwrap_or_default();
        let records = readable(metrics::read(store), &mut unread)?.unwrap_or_default();
        let mut manifests = BTreeMap::new();
        for step in checkpoint::steps(store)? {
            match readable(checkpoint::read_manifest(store, step), &mut unread)? {
                Some(manifest) => drop(manifests.insert(step, manifest)),
                // A run that goes on lets old checkpoints go.
                None if !checkpoint::steps(store)?.contains(&step) => drop(unread.pop()),
                None => {}
            }
        }
        let newest = manifests.values().next_back();
        let data = newest.map(|manifest: &Manifest| manifest.data.clone()).unwrap_or_default();
        let epochs = epochs(config, data, &told)?;
        let environments = environments(store, &told, &manifests)?;
        let events = told.into_iter().map(|record| record.event).collect();
        let records = records.into_iter().map(|record| (record.step, record)).collect();
        let notes = Vec::new();
        let store = store.clone();
        let mut run = Self { store, epochs, events, records, manifests, environments, unread, notes };
        run.note_gaps();
        run.note_changed_config();
        Ok(run)
    }

    /// Reads the data of a source, or of a held-out set of the name where no source has it, at another `url` than the configs say.
    ///
    /// Errors: a name that the run does not know; data that cannot be opened, or that is not the source's of any of its steps.
    pub fn move_data(&mut self, name: &str, url: &str) -> Result<()> {
        let is_source = self.epochs.iter().any(|epoch| epoch.config.data.sources.contains_key(name));
        if is_source {
            self.check_moved(name, url)?;
        }
        let mut moved = 0;
        for RunConfig { data, eval, .. } in self.epochs.iter_mut().map(|epoch| &mut epoch.config) {
            let known = if is_source { &mut data.sources } else { &mut eval.sets };
            if let Some(source) = known.get_mut(name) {
                url.clone_into(&mut source.url);
                moved += 1;
            }
        }
        if moved > 0 {
            return Ok(());
        }
        let last = &self.epochs.last().expect("there is always one of step 0").config;
        let names: Vec<&str> =
            last.data.sources.keys().chain(last.eval.sets.keys()).map(String::as_str).collect();
        let fact = format!("{} knows no data called {name}", self.store.place());
        Err(Error::config(fact, format!("it has {}", names.join(", "))))
    }

    /// An error unless the data at `url` is that of the source at some step, as far as the record tells.
    fn check_moved(&self, name: &str, url: &str) -> Result<()> {
        let ours = Dataset::open(url)?.index().digest();
        let theirs: BTreeSet<&String> = self.epochs.iter().filter_map(|epoch| epoch.data.get(name)).collect();
        if theirs.is_empty() || theirs.iter().any(|theirs| same_data(theirs, &ours)) {
            return Ok(());
        }
        let theirs: Vec<&str> = theirs.into_iter().map(String::as_str).collect();
        let place = self.store.place();
        let fact = format!(
            "source {name} at {url} is the data {ours}, {place} was trained on {}",
            theirs.join(" and ")
        );
        Err(Error::config(fact, "give the place where that data lies now"))
    }

    fn note_gaps(&mut self) {
        let Some(last) = self.records.keys().next_back() else { return };
        let missing = last + 1 - self.records.len() as u64;
        if missing > 0 {
            let first = (0..*last).find(|step| !self.records.contains_key(step)).unwrap_or(0);
            let place = self.store.place_of("metrics");
            self.unread.push(format!("{place} misses {missing} steps, the first is {first}; restore them"));
        }
    }

    /// The first checkpoint that says that it was trained with another config than the folder tells of.
    pub fn changed_config(&self) -> Option<&Manifest> {
        let differs = |manifest: &&Manifest| {
            self.config_at(manifest.step.saturating_sub(1)).digest() != manifest.config
        };
        self.manifests.values().find(differs)
    }

    fn note_changed_config(&mut self) {
        if let Some(Manifest { step, .. }) = self.changed_config() {
            let place = self.store.place();
            self.notes.push(format!(
                "checkpoint {step} of {place} was trained with another config than its folder tells of; \
                 config.toml was changed by hand"
            ));
        }
    }

    fn epoch(&self, step: u64) -> &Epoch {
        let after = self.epochs.partition_point(|epoch| epoch.from <= step);
        &self.epochs[after - 1]
    }

    /// The config that `step` was trained with.
    pub fn config_at(&self, step: u64) -> &RunConfig {
        &self.epoch(step).config
    }

    /// The first step of the config and the data that `step` was trained with.
    pub fn unchanged_from(&self, step: u64) -> u64 {
        self.epoch(step).from
    }

    /// The plan of `step`; absent past the end.
    pub fn plan_at(&self, step: u64) -> Option<StepPlan<'_>> {
        self.epoch(step).schedule.at(step)
    }

    /// What its config says that it is computed on.
    pub fn device(&self) -> ComputeDevice {
        self.epochs.last().expect("there is always one of step 0").config.compute.device
    }

    /// Steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.epochs.last().map_or(0, |epoch| epoch.schedule.total_steps())
    }

    /// Digest of the index of each source, by name, as `step` was trained on it; as far as checkpoints and log tell.
    pub fn data_at(&self, step: u64) -> &BTreeMap<String, String> {
        &self.epoch(step).data
    }

    /// What of the data was changed on the way, in words.
    pub fn data_changes(&self) -> Vec<String> {
        let changes = self.epochs.windows(2).flat_map(|two| {
            let [before, now] = two else { unreachable!("windows of two") };
            before.data.iter().filter_map(|(source, was)| {
                let is = now.data.get(source).map_or(ABSENT, String::as_str);
                (is != was).then(|| {
                    let (place, from) = (self.store.place(), now.from);
                    format!(
                        "from step {from} on {place} was trained on other data, as its log tells: source {source}, {}",
                        other_data(was, is)
                    )
                })
            })
        });
        changes.collect()
    }

    pub fn told(&self) -> Told {
        let distinct = |of: fn(&Environment) -> String| {
            self.environments.iter().map(of).collect::<BTreeSet<_>>().into_iter().collect()
        };
        Told {
            place: self.store.place().to_owned(),
            logged: self.records.len() as u64,
            checkpoints: self.manifests.keys().copied().collect(),
            devices: distinct(|environment| environment.device.clone()),
            builds: distinct(Environment::build),
        }
    }
}

/// The value, or `None` and a line in `unread` when what is in the folder is damaged.
fn readable<T>(read: anello_store::Result<T>, unread: &mut Vec<String>) -> Result<Option<T>> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(damaged @ (StoreError::Malformed { .. } | StoreError::Checkpoint { .. })) => {
            unread.push(damaged.to_string());
            Ok(None)
        }
        Err(other) => Err(other.into()),
    }
}

/// The configs and the data of a run that ends with `config` and has `data` in its newest checkpoint, from what its log says was
/// changed on the way.
fn epochs(config: RunConfig, mut data: BTreeMap<String, String>, told: &[Record]) -> Result<Vec<Epoch>> {
    type Changes = [(String, String, String)];
    let starts: Vec<(u64, &Changes, &Changes)> = told
        .iter()
        .filter_map(|record| match &record.event {
            Event::Started { step, changed, data, .. } => Some((*step, &changed[..], &data[..])),
            // A ring may fall back behind a change: the steps from there on are trained anew.
            Event::Formed { start, .. } => Some((*start, &[][..], &[][..])),
            _ => None,
        })
        .collect();
    let (mut current, mut rising) = (config, Vec::new());
    for (step, changed, other_data) in starts.iter().rev() {
        rising.push(current.clone());
        let back: Vec<(&str, Option<&str>)> = changed
            .iter()
            .map(|(key, before, _)| (key.as_str(), Some(before.as_str()).filter(|value| *value != ABSENT)))
            .collect();
        if !back.is_empty() {
            current = current.with(&back).map_err(|cause| {
                Error::config(
                    format!("the config of before step {step} cannot be had from the log: {cause}"),
                    "use the build that trained the run",
                )
            })?;
        }
        // What stays is what the run began with.
        data.extend(other_data.iter().map(|(source, before, _)| (source.clone(), before.clone())));
    }
    let epoch = |from, config: RunConfig, data: &BTreeMap<String, String>| Epoch {
        from,
        schedule: Schedule::new(&config),
        config,
        data: data.clone(),
    };
    let mut epochs = vec![epoch(0, current, &data)];
    for ((from, _, other_data), config) in starts.into_iter().zip(rising.into_iter().rev()) {
        for (source, _, now) in other_data {
            match now.as_str() {
                ABSENT => drop(data.remove(source)),
                now => drop(data.insert(source.clone(), now.to_owned())),
            }
        }
        // A run that fell back trains the steps from there on anew.
        epochs.retain(|known| known.from < from || known.from == 0);
        match epochs.last_mut() {
            Some(last) if last.from == from => *last = epoch(from, config, &data),
            Some(last) if last.config.digest() == config.digest() && last.data == data => {
                last.config = config;
            }
            _ => epochs.push(epoch(from, config, &data)),
        }
    }
    Ok(epochs)
}

/// Where a run was trained, as far as its folder tells.
fn environments(
    store: &Store,
    told: &[Record],
    manifests: &BTreeMap<u64, Manifest>,
) -> Result<Vec<Environment>> {
    let begun = store.get(ENVIRONMENT)?.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let started = told.iter().filter_map(|record| match &record.event {
        Event::Started { environment, .. } => Some(environment.clone()),
        _ => None,
    });
    Ok(begun
        .into_iter()
        .chain(started)
        .chain(manifests.values().map(|manifest| manifest.environment.clone()))
        .collect())
}

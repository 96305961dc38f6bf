//! A record against itself and against the data that is there: what can be seen without computing a step.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use anello_dataloader::{Dataset, LoaderOptions};
use anello_store::Error as StoreError;
use anello_store::checkpoint::{Manifest, same_data};
use anello_store::events::Event;

use super::findings::{Contradiction, Subject};
use crate::bisect::recorded::{Epoch, Recorded};
use crate::checkpoint::check;
use crate::error::{Error, Result};
use crate::validate::HeldOut;

/// What was found in `run` up to `to` steps applied.
#[derive(Debug, Default)]
pub(super) struct Read {
    pub contradictions: Vec<Contradiction>,
    /// Checkpoints, by steps applied, that are whole and that nothing contradicts.
    pub sound: BTreeSet<u64>,
    /// Steps that cannot be computed again, for the data that is there is that of other steps of the run; rising, and apart.
    pub lost: Vec<Range<u64>>,
    /// What could not be looked at.
    pub unchecked: Vec<String>,
    /// What is to be known of it.
    pub notes: Vec<String>,
}

impl Read {
    fn contradiction(&mut self, subject: Subject, step: Option<u64>, fact: impl Into<String>) {
        self.contradictions.push(Contradiction { subject, step, fact: fact.into() });
    }
}

/// Reads all checkpoints of `run` that one of the steps `asked` could begin from or end with, part by part.
pub(super) fn read(run: &Recorded, asked: Range<u64>, progress: &mut dyn FnMut(u64, u64)) -> Result<Read> {
    let mut read = Read::default();
    config(run, &mut read);
    data(run, &asked, &mut read);
    if run.records.values().any(|record| !record.evals.is_empty()) {
        let last = run.records.keys().next_back().copied().unwrap_or(0);
        if let Err(cause) = HeldOut::open(run.config_at(last)) {
            read.unchecked.push(format!("the figures on held-out data: {cause}"));
        }
    }
    let told = told_weights(run);
    let manifests: Vec<&Manifest> =
        run.manifests.values().filter(|manifest| manifest.step <= asked.end).collect();
    for (done, manifest) in manifests.iter().enumerate() {
        progress(done as u64, manifests.len() as u64);
        let before = read.contradictions.len();
        parts(run, manifest, &mut read)?;
        digests(run, manifest, &told, &mut read);
        if read.contradictions.len() == before {
            read.sound.insert(manifest.step);
        }
    }
    for (&step, weights) in &told {
        let logged = step.checked_sub(1).and_then(|last| run.records.get(&last)?.weights.as_ref());
        let manifest = run.manifests.contains_key(&step);
        if let Some(logged) = logged
            && logged != weights
            && !manifest
        {
            let fact = format!(
                "the log says {weights} of the weights after step {}, the metrics {logged}",
                step - 1
            );
            read.contradiction(Subject::Log, Some(step), fact);
        }
    }
    Ok(read)
}

/// Digests of weights that the log tells of, by steps applied. A run that fell back tells of a step again: the last word
/// counts.
fn told_weights(run: &Recorded) -> BTreeMap<u64, &str> {
    let told = run.events.iter().filter_map(|event| match event {
        Event::Checkpoint { step, weights } | Event::Finished { step, weights } => {
            Some((*step, weights.as_str()))
        }
        _ => None,
    });
    told.collect()
}

fn config(run: &Recorded, read: &mut Read) {
    if let Some(Manifest { step, config, .. }) = run.changed_config() {
        let ours = run.config_at(step.saturating_sub(1)).digest();
        let place = run.store.place_of(anello_store::CONFIG);
        read.contradiction(
            Subject::Config,
            Some(*step),
            format!("{place} is the config {ours}, checkpoint {step} was trained with {config}"),
        );
    }
}

/// The sources of the last config, against what the run was trained on in the steps `asked`.
fn data(run: &Recorded, asked: &Range<u64>, read: &mut Read) {
    read.notes.extend(run.data_changes());
    let last = run.records.keys().next_back().copied().unwrap_or(0);
    match LoaderOptions::of(run.config_at(last)) {
        Ok(options) => {
            let here = |(name, dataset): (&String, &Arc<Dataset>)| (name.clone(), dataset.index().digest());
            let here: BTreeMap<String, String> = options.sources.iter().map(here).collect();
            lost(run, asked, &here, read);
            let trained_on = run.data_at(asked.end - 1);
            for (name, dataset) in &options.sources {
                let (ours, place) = (&here[name], dataset.store().place());
                let is_ours =
                    |epoch: &Epoch| epoch.data.get(name).is_some_and(|theirs| same_data(theirs, ours));
                if let Some(theirs) = trained_on.get(name).filter(|theirs| !same_data(theirs, ours))
                    && !run.epochs.iter().any(is_ours)
                {
                    let fact = format!(
                        "source {name} at {place} is the data {ours}, the run was trained on {theirs}"
                    );
                    read.contradiction(Subject::Data, None, fact);
                }
                if dataset.index().row_groups().any(|group| group.blake3.is_none()) {
                    let fact = format!(
                        "source {name} has no checksums: other tokens in files of the same size show in the losses \
                         alone (`anello data index {place}` makes checksums)"
                    );
                    read.notes.push(fact);
                }
            }
        }
        Err(anello_dataloader::Error::Store(cause)) => read.unchecked.push(cause.to_string()),
        Err(cause) => read.contradiction(Subject::Data, None, cause.to_string()),
    }
}

/// Steps whose data was replaced before or after them (`--allow`), and is not the one that is `here`.
fn lost(run: &Recorded, asked: &Range<u64>, here: &BTreeMap<String, String>, read: &mut Read) {
    let ends = run.epochs.iter().skip(1).map(|epoch| epoch.from).chain([u64::MAX]);
    let spans = run.epochs.iter().zip(ends).map(|(epoch, end)| (epoch, epoch.from..end));
    // What was never replaced is the whole run's: that it is not here is a contradiction.
    let replaced = |name: &str| {
        let mut known = run.epochs.iter().map(|epoch| epoch.data.get(name));
        let first = known.next().flatten();
        known.any(|other| other != first)
    };
    for (epoch, steps) in spans {
        let is_other = |(name, theirs): &(&String, &String)| {
            replaced(name) && here.get(*name).is_none_or(|ours| !same_data(theirs, ours))
        };
        let others: Vec<(&String, &String)> = epoch.data.iter().filter(is_other).collect();
        if others.is_empty() {
            continue;
        }
        let (first, end) = (steps.start.max(asked.start), steps.end.min(asked.end));
        if first < end {
            let told: Vec<String> =
                others.iter().map(|(name, theirs)| format!("{name} was {theirs}")).collect();
            read.unchecked.push(format!(
                "the steps {first} to {}: their data was replaced (--allow), {}; put it in its place again, and audit them \
                 with --steps {first}..{end}",
                end - 1,
                told.join(", ")
            ));
        }
        match read.lost.last_mut() {
            Some(before) if before.end == steps.start => before.end = steps.end,
            _ => read.lost.push(steps),
        }
    }
}

fn parts(run: &Recorded, manifest: &Manifest, read: &mut Read) -> Result<()> {
    let model = &run.config_at(manifest.step.saturating_sub(1)).model;
    match check(&run.store, manifest.step, model) {
        Ok(_) => {}
        Err(Error::Store(StoreError::Checkpoint { step, fact, .. })) => {
            let place = run.store.place();
            read.contradiction(
                Subject::Checkpoint,
                Some(step),
                format!("checkpoint {step} of {place}: {fact}"),
            );
        }
        Err(other) => return Err(other),
    }
    Ok(())
}

/// What log and metrics say of the weights of a checkpoint.
fn digests(run: &Recorded, manifest: &Manifest, told: &BTreeMap<u64, &str>, read: &mut Read) {
    let Manifest { step, weights, .. } = manifest;
    let logged = step.checked_sub(1).and_then(|last| run.records.get(&last)?.weights.as_deref());
    for (who, theirs) in [("the log", told.get(step).copied()), ("the metrics", logged)] {
        if let Some(theirs) = theirs.filter(|theirs| theirs != weights) {
            let fact = format!("checkpoint {step} has the weights {weights}, {who} says {theirs}");
            read.contradiction(Subject::Checkpoint, Some(*step), fact);
        }
    }
}

//! What a run says of itself beside its figures: the stamp on its checkpoints, and what the log is told of its data.

use std::collections::BTreeMap;

use anello_configs::{RunConfig, Schedule, StepPlan};
use anello_dataloader::{LaneStep, LoaderOptions};
use anello_store::checkpoint::{Facts, Position, digest_of_blocks};
use anello_store::events::{self, Event};
use anello_store::{Cursor, Environment, Store};
use tch::Device;

use crate::digest;
use crate::engine::Outcome;
use crate::environment;
use crate::guard::Spike;
use crate::optimizer::State;

/// What is stamped on every checkpoint that a process writes.
#[derive(Clone, Debug)]
pub struct Stamp {
    /// Digest of the config's mathematics.
    pub config: String,
    /// Digest of the index of each source, by name.
    pub data: BTreeMap<String, String>,
    /// Where the process runs.
    pub environment: Environment,
}

impl Stamp {
    /// The stamp of this process for a run of `config` on `data`, computed on `device`.
    pub fn new(config: &RunConfig, data: &LoaderOptions, device: Device) -> Self {
        let digests = data.sources.iter().map(|(name, dataset)| (name.clone(), dataset.index().digest()));
        Self {
            config: config.digest(),
            data: digests.collect(),
            environment: environment::of(device, config.compute.threads),
        }
    }

    /// The facts of a checkpoint of `state` at `position`.
    pub fn facts(&self, state: &State, position: Position, cursors: Vec<Cursor>) -> Facts {
        let Self { config, data, environment } = self.clone();
        let (updates, layers) = (state.updates, state.layout.layers() as u32);
        let losses = state.losses.clone();
        Facts { position, updates, layers, cursors, losses, config, data, environment }
    }
}

/// Digest of the weights, as a manifest has it: of the digests of their blocks, in order.
pub fn weights_digest(state: &State) -> String {
    let _span = tracing::trace_span!("digest of the weights").entered();
    let digests = digest::of_blocks(&state.weights);
    digest_of_blocks(&digests.iter().map(|digest| digest.to_hex().to_string()).collect::<Vec<_>>())
}

/// How far a run is once `step` steps are done. Panics past the last step of `schedule`.
pub fn position_after(schedule: &Schedule, step: u64) -> Position {
    let last = schedule.at(step.saturating_sub(1)).expect("a step that was done has a plan");
    Position {
        step,
        stage: last.stage.name.clone(),
        stage_end: last.last_of_stage && step > 0,
        tokens: if step == 0 { 0 } else { last.tokens_before + last.batch_tokens },
    }
}

/// What the log is told of a step that was not applied, or whose loss is a spike.
pub fn outcome_event(plan: &StepPlan<'_>, outcome: &Outcome) -> Option<Event> {
    let step = plan.step;
    let exact = |value: f64| format!("{value:?}");
    match outcome.spike {
        Some(Spike { loss, median, limit }) => {
            let [loss, median, limit] = [loss, median, limit].map(exact);
            Some(Event::Spike {
                step,
                loss,
                median,
                limit,
                skipped: !outcome.update.applied,
                back_to: outcome.back_to,
            })
        }
        None if !outcome.update.applied => Some(Event::Skipped { step, loss: outcome.loss().to_string() }),
        None => None,
    }
}

/// The epochs that the log has told of, by source, so that each is told once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Epochs(BTreeMap<String, u64>);

impl Epochs {
    /// Those that the log of `store` has told of before `step`. A log that cannot be read tells of none: they are told
    /// again.
    pub fn told_before(store: &Store, step: u64) -> Self {
        let mut epochs = Self::default();
        for record in events::read(store).unwrap_or_default() {
            if let Event::Epoch { step: at, source, epoch } = record.event
                && at < step
            {
                epochs.note(&source, epoch);
            }
        }
        epochs
    }

    /// What of `events` is to be told: epochs only once.
    pub fn not_told(&mut self, mut events: Vec<Event>) -> Vec<Event> {
        events.retain(|event| match event {
            Event::Epoch { source, epoch, .. } => self.note(source, *epoch),
            _ => true,
        });
        events
    }

    /// Whether this is the first time that `source` is in `epoch`, which is not its first.
    fn note(&mut self, source: &str, epoch: u64) -> bool {
        let known = self.0.entry(source.to_owned()).or_insert(0);
        let risen = epoch > *known;
        *known = epoch.max(*known);
        risen
    }

    /// What the log is told of a lane's data at a step: row groups that were left out, epochs that began.
    pub fn data_events(&mut self, lane_step: &LaneStep) -> Vec<Event> {
        let LaneStep { step, lane, .. } = *lane_step;
        let skipped = lane_step.skipped_row_groups.iter().map(|skipped| Event::SkippedData {
            step,
            lane,
            source: skipped.source.clone(),
            row_group: skipped.row_group,
            reason: skipped.reason.clone(),
        });
        let risen = lane_step.epochs_by_source.iter().filter(|&(source, &epoch)| self.note(source, epoch));
        let begun = risen.map(|(source, &epoch)| Event::Epoch { step, source: source.clone(), epoch });
        skipped.chain(begun).collect()
    }
}

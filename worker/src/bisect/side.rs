//! One run, computed again from its record.

use std::collections::BTreeMap;
use std::sync::Arc;

use anello_configs::{OnSpike, RunConfig, Schedule, StepPlan};
use anello_dataloader::{Dataset, LaneStep, Loader, LoaderOptions, MicroBatch, SkippedRowGroup};
use anello_store::Cursor;
use anello_store::checkpoint::{Manifest, same_data};
use anello_store::events::Event;
use anello_store::metrics::{Seconds, StepRecord};
use tch::{Device, Tensor};

use super::compare;
use super::findings::{Difference, Figure, Phase};
use super::recorded::Recorded;
use crate::account::{outcome_event, weights_digest};
use crate::checkpoint::load;
use crate::engine::{Engine, Outcome};
use crate::error::{Error, Result};
use crate::init::initial_state;
use crate::kernels;
use crate::objective::LossSums;
use crate::rollback::{Known, Rollback};
use crate::validate::HeldOut;

/// Where a run begins to be computed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    /// Steps applied.
    pub step: u64,
    /// Whether a checkpoint of it is loaded; else the initial weights are made.
    pub checkpoint: bool,
}

/// A run at some step, as this machine computes it.
pub(crate) struct Side<'a> {
    pub run: &'a Recorded,
    pub engine: Engine,
    pub sources: BTreeMap<String, Arc<Dataset>>,
    /// Where each lane is.
    pub cursors: Vec<Cursor>,
    loader: Loader,
    held_out: Option<HeldOut>,
    /// The first step of the config and the data that engine and loader are for.
    unchanged_from: u64,
    /// What the run's data is, for steps that are computed once more.
    data: LoaderOptions,
    /// The state after the last spike that was undone, or a change of config or data: no step before it is needed again.
    undone: Option<Known>,
}

/// What one lane came to.
pub(crate) struct Ran {
    pub micro_batches: Vec<MicroBatch>,
    pub gradient: Tensor,
    pub sums: LossSums,
}

/// A whole step, computed again.
pub(crate) struct Stepped {
    /// What is logged of it.
    pub record: StepRecord,
    /// Row groups that could not be read and were left out, with the lane.
    pub skipped: Vec<(u32, SkippedRowGroup)>,
    /// What the log is told of its outcome: a spike, or that it was not applied.
    pub told: Option<Event>,
}

impl<'a> Side<'a> {
    /// `run` at `start`, computed on `device`; when its own checkpoint cannot be read and `other` has an equal one, that is taken.
    pub fn open(
        run: &'a Recorded,
        start: Start,
        device: Device,
        other: Option<&Recorded>,
        notes: &mut Vec<String>,
    ) -> Result<Self> {
        let (step, config) = (start.step, run.config_at(start.step));
        let kernels = kernels::of(&config.compute, device)?;
        let (engine, cursors) = if start.checkpoint {
            let model = &config.model;
            let loaded = load(&run.store, step, model, device).or_else(|cause| {
                let Some(other) = other else { return Err(cause) };
                let loaded = load(&other.store, step, model, device)?;
                let place = other.store.place();
                notes.push(format!("{cause}: that of {place}, which is equal, was taken"));
                Ok::<_, Error>(loaded)
            })?;
            let mut engine = Engine::with_kernels(config, loaded.state, kernels);
            if step > 0 && run.unchanged_from(step) == step {
                engine.forget_losses();
            }
            (engine, loaded.manifest.cursors)
        } else {
            let state = initial_state(config, device)?;
            (Engine::with_kernels(config, state, kernels), vec![Cursor::default(); config.lanes as usize])
        };
        let data = LoaderOptions::of(config)?;
        note_other_data(run, step, &data, notes);
        let sources = data.sources.clone();
        let loader =
            Loader::open(LoaderOptions { start_step: step, cursors: Some(cursors.clone()), ..data.clone() })?;
        let held_out = held_out(run, config, notes);
        let unchanged_from = run.unchanged_from(step);
        Ok(Self { run, engine, sources, cursors, loader, held_out, unchanged_from, data, undone: None })
    }

    /// Goes over to the config and the data of `step`, when the run was given others there.
    pub fn follow_config(&mut self, step: u64) -> Result<()> {
        let from = self.run.unchanged_from(step);
        if from == self.unchanged_from {
            return Ok(());
        }
        let config = self.run.config_at(step);
        let kernels = kernels::of(&config.compute, self.engine.state().weights.device())?;
        let data = LoaderOptions::of(config)?;
        let cursors = Some(self.cursors.clone());
        self.loader = Loader::open(LoaderOptions { start_step: step, cursors, ..data.clone() })?;
        self.data = data;
        self.engine = Engine::with_kernels(config, self.engine.state().copy(), kernels);
        self.engine.forget_losses();
        if config.guard.on_spike == OnSpike::Rollback {
            // What a spike leads back to is computed from here at the earliest, and there may be no checkpoint.
            let (state, cursors) = (self.engine.state().copy(), self.cursors.clone());
            self.undone = Some(Known { step, state, cursors });
        }
        self.held_out = held_out(self.run, config, &mut Vec::new());
        self.unchanged_from = from;
        Ok(())
    }

    pub fn plan(&self, step: u64) -> Result<StepPlan<'a>> {
        self.run.plan_at(step).ok_or_else(|| {
            let fact = format!("the config of {} ends before step {step}", self.run.store.place());
            Error::config(fact, "its config.toml was changed by hand; bring the old one back")
        })
    }

    pub fn run_lane(&mut self, plan: &StepPlan<'_>, lane: u32) -> Result<Ran> {
        let LaneStep { micro_batches, .. } = self.lane_step(plan.step, lane)?;
        let (gradient, sums) = self.engine.lane_gradient(plan.stage, &micro_batches);
        Ok(Ran { micro_batches, gradient, sums })
    }

    fn lane_step(&mut self, step: u64, lane: u32) -> Result<LaneStep> {
        let next = self.loader.next().expect("the loader has the same schedule as the plan")?;
        assert_eq!((next.step, next.lane), (step, lane), "the loader serves another step");
        self.cursors[lane as usize] = next.cursor.clone();
        Ok(next)
    }

    /// The tree's total: one worker has all lanes, which are a power of two.
    pub fn total(&mut self) -> (Tensor, LossSums) {
        let mut partials = self.engine.take_partials();
        let (_, _, gradient, sums) = partials.pop().expect("every lane was folded");
        assert!(partials.is_empty(), "all lanes are one subtree");
        (gradient, sums)
    }

    pub fn finish(&mut self, plan: &StepPlan<'_>, (gradient, sums): (Tensor, LossSums)) -> Result<Outcome> {
        let outcome = self.engine.finish_with(plan, &gradient, sums);
        self.engine.recycle(gradient);
        self.undo_spike(plan, &outcome)?;
        Ok(outcome)
    }

    /// Goes back as the run did, when the step of `plan` came to a spike.
    fn undo_spike(&mut self, plan: &StepPlan<'_>, outcome: &Outcome) -> Result<()> {
        let Some(to) = outcome.back_to else { return Ok(()) };
        let config = self.run.config_at(plan.step);
        let (store, schedule, known) = (&self.run.store, &Schedule::new(config), self.undone.as_ref());
        Rollback { store, config, schedule, data: &self.data, known }.undo(&mut self.engine, to)?;
        let (state, cursors) = (self.engine.state().copy(), self.cursors.clone());
        self.undone = Some(Known { step: plan.step + 1, state, cursors });
        Ok(())
    }

    /// What is logged of a step that came to `outcome`, with the digest of the weights and the figures on held-out data
    /// that the run has on record of it.
    pub fn record(&mut self, plan: &StepPlan<'_>, outcome: &Outcome) -> Result<StepRecord> {
        let logged = self.run.records.get(&plan.step);
        let weights = logged
            .is_some_and(|logged| logged.weights.is_some())
            .then(|| weights_digest(self.engine.state()));
        let measured = logged.is_some_and(|logged| !logged.evals.is_empty());
        let evals = match self.held_out.as_mut().filter(|_| measured) {
            Some(held_out) => held_out.measure(&self.engine, plan)?,
            None => Vec::new(),
        };
        Ok(StepRecord { weights, evals, ..outcome.record(plan, Seconds::default()) })
    }

    /// The whole of `step`.
    pub fn step(&mut self, step: u64) -> Result<Stepped> {
        self.follow_config(step)?;
        let plan = self.plan(step)?;
        self.engine.enter(&plan);
        let mut skipped = Vec::new();
        for lane in 0..self.cursors.len() as u32 {
            let lane_step = self.lane_step(step, lane)?;
            self.engine.lane(plan.stage, lane, &lane_step.micro_batches);
            skipped.extend(lane_step.skipped_row_groups.into_iter().map(|group| (lane, group)));
        }
        let outcome = self.engine.finish(&plan);
        self.undo_spike(&plan, &outcome)?;
        Ok(Stepped { record: self.record(&plan, &outcome)?, skipped, told: outcome_event(&plan, &outcome) })
    }

    /// Where the step that was computed last is not what the run has on record of it.
    pub fn off_record(&self, computed: &StepRecord) -> Option<Difference> {
        let run = self.run;
        let logged = run.records.get(&computed.step);
        let figures = logged.and_then(|logged| compare::figures(logged, computed));
        let manifest = run.manifests.get(&(computed.step + 1));
        let blocks = manifest.and_then(|manifest| {
            compare::from_checkpoint(run, manifest, self.engine.state())
                .or_else(|| self.off_cursors(manifest))
        });
        match (figures, blocks) {
            // The figures are of before the update: the earlier phase names the difference, the blocks are kept.
            (Some(figures), Some(of_checkpoint)) => {
                Some(Difference { blocks: of_checkpoint.blocks, ..figures })
            }
            (figures, of_checkpoint) => figures.or(of_checkpoint),
        }
    }

    /// Where a checkpoint says that a lane is elsewhere in its data.
    fn off_cursors(&self, manifest: &Manifest) -> Option<Difference> {
        let lane = manifest.cursors.iter().zip(&self.cursors).position(|(theirs, ours)| theirs != ours)?;
        let shown = |cursor: &Cursor| serde_json::to_string(cursor).expect("a cursor has string keys");
        let values = [shown(&manifest.cursors[lane]), shown(&self.cursors[lane])];
        Some(Difference {
            step: manifest.step.saturating_sub(1),
            phase: Phase::Batch,
            checkpoint: Some(manifest.step),
            lane: Some(lane as u32),
            figures: vec![Figure { name: "cursor".to_owned(), values }],
            blocks: None,
        })
    }
}

/// The held-out sets of a run whose figures are on record, if they can be had.
fn held_out(run: &Recorded, config: &RunConfig, notes: &mut Vec<String>) -> Option<HeldOut> {
    if run.records.values().all(|record| record.evals.is_empty()) {
        return None;
    }
    HeldOut::open(config).unwrap_or_else(|cause| {
        notes.push(format!("the figures on held-out data are not compared: {cause}"));
        None
    })
}

/// The data that is there now may not be that which `step` was trained on: then nothing that is computed tells of the run.
fn note_other_data(run: &Recorded, step: u64, data: &LoaderOptions, notes: &mut Vec<String>) {
    let trained_on = run.data_at(step);
    for (source, dataset) in &data.sources {
        if trained_on.get(source).is_some_and(|digest| !same_data(digest, &dataset.index().digest())) {
            let place = run.store.place();
            notes.push(format!(
                "source {source} is not the data any more that {place} was trained on at step {step}"
            ));
        }
    }
}

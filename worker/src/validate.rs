//! Validation: what the model is worth on held-out data while it trains.
//!
//! A set's first sequences are cut into micro-batches as those of the stage are; micro-batch j belongs to lane
//! j mod lanes. Each is measured alone, in a shape that no number of workers changes, and the sums are added lane by
//! lane: the figures are the same bits whoever serves which lane. Nothing here writes to weights, moments or cursors.

use std::ops::Range;

use anello_configs::{Eval, RunConfig, Stage, StepPlan};
use anello_dataloader::{Dataset, InOrder, MicroBatch};
use anello_store::metrics::Evaluated;

use crate::engine::Engine;
use crate::error::Result;
use crate::evaluate::Evaluation;

/// The held-out sets of a run.
#[derive(Debug)]
pub struct HeldOut {
    options: Eval,
    lanes: u32,
    vocab: u32,
    sets: Vec<(String, Dataset)>,
    /// What was read last, and for what.
    read: Option<(Served, Vec<Set>)>,
}

/// Index of the stage, and the lanes that are served here.
type Served = (usize, Range<u32>);

/// The micro-batches of the lanes that are served here.
#[derive(Debug)]
struct Set {
    name: String,
    batches: Vec<(u32, MicroBatch)>,
}

/// Sums of the lanes that are served here, for each set of the stage: the name, and one a lane.
pub(crate) type LaneSums = Vec<(String, Vec<Evaluation>)>;

impl HeldOut {
    /// Those of `config`, which are opened, so that what is missing is known before the first step. Absent: nothing is
    /// measured.
    pub fn open(config: &RunConfig) -> Result<Option<Self>> {
        let options = config.eval.clone();
        if options.every_steps == 0 || options.sets.is_empty() {
            return Ok(None);
        }
        let open =
            |(name, set): (&String, &anello_configs::Source)| Ok((name.clone(), Dataset::open(&set.url)?));
        let sets = options.sets.iter().map(open).collect::<Result<Vec<_>>>()?;
        let (lanes, vocab) = (config.lanes, config.model.vocab);
        Ok(Some(Self { options, lanes, vocab, sets, read: None }))
    }

    /// Whether the model is measured after the step of `plan`.
    pub fn is_due(&self, plan: &StepPlan<'_>) -> bool {
        plan.last_of_stage || (plan.step + 1).is_multiple_of(self.options.every_steps)
    }

    /// What the model is worth after the step of `plan`, all lanes measured here.
    pub fn measure(&mut self, engine: &Engine, plan: &StepPlan<'_>) -> Result<Vec<Evaluated>> {
        let all = 0..self.lanes;
        Ok(self.lanes(engine, plan, &all)?.into_iter().map(|(set, lanes)| of_lanes(set, &lanes)).collect())
    }

    /// The sums of the lanes `serve` alone.
    pub(crate) fn lanes(
        &mut self,
        engine: &Engine,
        plan: &StepPlan<'_>,
        serve: &Range<u32>,
    ) -> Result<LaneSums> {
        let _span = tracing::trace_span!("validation", step = plan.step).entered();
        let stage = plan.stage;
        let key = (plan.stage_index, serve.clone());
        if self.read.as_ref().is_none_or(|(known, _)| *known != key) {
            self.read = None;
            self.read = Some((key, self.read(stage, serve)?));
        }
        let sets = self.read.iter().flat_map(|(_, sets)| sets);
        let measured = sets.map(|set| {
            let mut sums: Vec<Evaluation> =
                serve.clone().map(|_| Evaluation::new(stage.loops, &[])).collect();
            for (lane, batch) in &set.batches {
                let _span = tracing::trace_span!("held-out", set = set.name, lane).entered();
                engine.evaluate(stage, batch, &mut sums[(lane - serve.start) as usize]);
            }
            (set.name.clone(), sums)
        });
        Ok(measured.collect())
    }

    /// The micro-batches of `stage` that belong to the lanes `serve`.
    fn read(&self, stage: &Stage, serve: &Range<u32>) -> Result<Vec<Set>> {
        let wanted = |name: &String| stage.eval.as_ref().is_none_or(|names| names.contains(name));
        let sets = self.sets.iter().filter(|(name, _)| wanted(name));
        let read = sets.map(|(name, set)| {
            let shape = InOrder::new(set, stage.micro_batch, stage.sequence, stage.mask, Some(self.vocab));
            let most = self.options.sequences.div_ceil(stage.micro_batch) as usize;
            let mut batches = Vec::new();
            for (lane, batch) in (0..self.lanes).cycle().zip(shape.take(most)) {
                let batch = batch?;
                if serve.contains(&lane) {
                    batches.push((lane, batch));
                }
            }
            Ok(Set { name: name.clone(), batches })
        });
        read.collect()
    }
}

/// What a set comes to: the sums of all lanes, added in their order.
pub(crate) fn of_lanes(set: String, lanes: &[Evaluation]) -> Evaluated {
    let mut lanes = lanes.iter();
    let mut all = lanes.next().cloned().unwrap_or_else(|| Evaluation::new(0, &[]));
    lanes.for_each(|lane| all.merge(lane));
    let mean = |sum: f64| sum / all.counted.max(1) as f64;
    Evaluated {
        set,
        counted: all.counted,
        loop_loss: all.steps.iter().map(|sums| mean(sums.loss)).collect(),
        accuracy: all.steps.iter().map(|sums| mean(sums.correct as f64)).collect(),
        exit: all.exit.iter().copied().map(mean).collect(),
    }
}

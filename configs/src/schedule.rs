//! What happens at a step: a pure function of the config.

use crate::run::{LrCurve, Ramp, RunConfig, Stage, Upcycle};

/// The plan of a run, step by step.
///
/// Tokens are exact: a stage takes whole batches until it has at least the tokens that it asks for, so it trains on
/// them rounded up to whole batches, and never on a part of one.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    stages: Vec<Stage>,
    spans: Vec<StageSpan>,
    /// Runs of steps with one batch size, in order: one a stage, and one a plateau of a ramp.
    plateaus: Vec<Plateau>,
    lanes: u32,
}

/// Where a stage lies in the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageSpan {
    /// Its place in the recipe, from 0.
    pub index: usize,
    /// Its first step, counted over the run from 0.
    pub first_step: u64,
    /// Its steps.
    pub steps: u64,
    /// The tokens that the config asks for.
    pub tokens_asked: u64,
    /// The tokens that it trains on: whole batches.
    pub tokens: u64,
    /// Tokens of the run before it.
    pub tokens_before: u64,
    /// Layers of the stack during it.
    pub layers: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plateau {
    stage: usize,
    first_step: u64,
    steps: u64,
    batch_tokens: u64,
    /// Tokens of the stage before it.
    stage_tokens_before: u64,
}

/// Everything that a step needs to know about itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepPlan<'a> {
    /// The step, counted over the run from 0.
    pub step: u64,
    /// The stage's place in the recipe, from 0.
    pub stage_index: usize,
    /// The stage.
    pub stage: &'a Stage,
    /// The step within its stage, from 0.
    pub stage_step: u64,
    /// Steps of the stage.
    pub stage_steps: u64,
    /// Tokens of this global batch.
    pub batch_tokens: u64,
    /// Sequences of this batch that each lane takes.
    pub sequences_per_lane: u64,
    /// Forwards and backwards of each lane, of `stage.micro_batch` sequences each.
    pub micro_batches_per_lane: u64,
    /// Learning rate of this update.
    pub lr: f64,
    /// Layers of the stack, after this step's upcycling if there is one.
    pub layers: u32,
    /// Whether this is the stage's first step.
    pub first_of_stage: bool,
    /// Whether this is the stage's last step.
    pub last_of_stage: bool,
    /// Tokens of the run before this step.
    pub tokens_before: u64,
    /// Tokens of the stage before this step.
    pub stage_tokens_before: u64,
    /// Set the moments and their step count to zero before this step. Only at a stage's first step.
    pub reset_optimizer: bool,
    /// Duplicate the layer stack before this step. Only at a stage's first step.
    pub upcycle: Option<Upcycle>,
}

impl Schedule {
    /// The schedule of a config that has been loaded or checked.
    ///
    /// # Panics
    /// When a stage's batch holds no whole micro-batch for every lane, which [`RunConfig::check`] reports.
    pub fn new(config: &RunConfig) -> Self {
        let (mut spans, mut plateaus): (Vec<StageSpan>, Vec<Plateau>) = (Vec::new(), Vec::new());
        let (mut first_step, mut tokens_before, mut layers) = (0, 0, config.model.layers);
        for (index, stage) in config.stages.iter().enumerate() {
            let quantum = crate::check::quantum(config, stage);
            let (mut steps, mut tokens) = (0, 0);
            for (batch_tokens, until) in rises(stage, quantum) {
                let missing: u64 = until.saturating_sub(tokens);
                let count = missing.div_ceil(batch_tokens);
                if count > 0 {
                    plateaus.push(Plateau {
                        stage: index,
                        first_step: first_step + steps,
                        steps: count,
                        batch_tokens,
                        stage_tokens_before: tokens,
                    });
                    steps += count;
                    tokens += count * batch_tokens;
                }
            }
            layers = stage.upcycle.map_or(layers, |upcycle| upcycle.layers);
            let tokens_asked = stage.tokens;
            spans.push(StageSpan { index, first_step, steps, tokens_asked, tokens, tokens_before, layers });
            first_step += steps;
            tokens_before += tokens;
        }
        Self { stages: config.stages.clone(), spans, plateaus, lanes: config.lanes }
    }

    /// The plan of a step, counted from 0; absent past the end of the run.
    pub fn at(&self, step: u64) -> Option<StepPlan<'_>> {
        let after = self.plateaus.partition_point(|plateau| plateau.first_step <= step);
        let plateau = self.plateaus[..after].last().filter(|p| step - p.first_step < p.steps)?;
        let (stage, span) = (&self.stages[plateau.stage], &self.spans[plateau.stage]);

        let batch_tokens = plateau.batch_tokens;
        let stage_tokens_before = plateau.stage_tokens_before + (step - plateau.first_step) * batch_tokens;
        let sequences_per_lane = batch_tokens / u64::from(self.lanes) / u64::from(stage.sequence);
        let stage_step = step - span.first_step;
        let first_of_stage = stage_step == 0;
        Some(StepPlan {
            step,
            stage_index: span.index,
            stage,
            stage_step,
            stage_steps: span.steps,
            batch_tokens,
            sequences_per_lane,
            micro_batches_per_lane: sequences_per_lane / u64::from(stage.micro_batch),
            lr: stage.lr.at(stage_tokens_before + batch_tokens, span.tokens),
            layers: span.layers,
            first_of_stage,
            last_of_stage: stage_step + 1 == span.steps,
            tokens_before: span.tokens_before + stage_tokens_before,
            stage_tokens_before,
            reset_optimizer: first_of_stage && stage.reset_optimizer,
            upcycle: stage.upcycle.filter(|_| first_of_stage),
        })
    }

    /// Steps of the run.
    pub fn total_steps(&self) -> u64 {
        self.spans.last().map_or(0, |span| span.first_step + span.steps)
    }

    /// Tokens of the run: whole batches.
    pub fn total_tokens(&self) -> u64 {
        self.spans.last().map_or(0, |span| span.tokens_before + span.tokens)
    }

    /// The stages and where they lie, in order.
    pub fn stages(&self) -> impl ExactSizeIterator<Item = (&Stage, StageSpan)> + Clone {
        self.stages.iter().zip(self.spans.iter().copied())
    }
}

/// The batch sizes of a stage, each with the tokens of the stage at which it ends (it ends with its batch).
fn rises(stage: &Stage, quantum: u64) -> impl Iterator<Item = (u64, u64)> {
    assert!(quantum > 0 && stage.batch.tokens >= quantum, "stage `{}` has an empty batch", stage.name);
    let full = stage.batch.tokens;
    let Ramp { from, over } = stage.batch.ramp.unwrap_or(Ramp { from: full, over: 0 });
    let plateaus = full.saturating_sub(from) / quantum;
    let rising = (0..plateaus).map(move |n| {
        let until = u128::from(over) * u128::from(n + 1) / u128::from(plateaus);
        (from + n * quantum, u64::try_from(until).unwrap_or(over))
    });
    let tokens = stage.tokens;
    rising.map(move |(batch, until)| (batch, until.min(tokens))).chain([(full, tokens)])
}

impl LrCurve {
    /// The learning rate of the update after which `done` of the stage's `total` tokens are done.
    ///
    /// The same bits on every machine: its one transcendental function is `libm`'s.
    pub fn at(&self, done: u64, total: u64) -> f64 {
        let f = done as f64 / total as f64;
        let last = done >= total;
        match *self {
            Self::Constant { lr } => lr,
            Self::Linear { to, .. } | Self::Cosine { to, .. } | Self::Wsd { to, .. } if last => to,
            Self::Linear { from, to } => from + (to - from) * f,
            Self::Cosine { from, to } => to + (from - to) * (1.0 + libm::cos(std::f64::consts::PI * f)) / 2.0,
            Self::Wsd { peak, warmup, .. } if f < warmup => peak * (f / warmup),
            Self::Wsd { peak, to, decay, .. } if f > 1.0 - decay => to + (peak - to) * ((1.0 - f) / decay),
            Self::Wsd { peak, .. } => peak,
        }
    }

    /// The learning rate at the start of the stage, before its first update.
    pub fn first(&self) -> f64 {
        match *self {
            Self::Constant { lr } => lr,
            Self::Linear { from, .. } | Self::Cosine { from, .. } => from,
            Self::Wsd { peak, warmup, .. } => {
                if warmup > 0.0 {
                    0.0
                } else {
                    peak
                }
            }
        }
    }

    /// The learning rate of the last update.
    pub fn last(&self) -> f64 {
        self.at(1, 1)
    }
}

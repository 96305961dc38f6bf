//! The step: lanes in, one update out. No I/O, no clock: what is called when is the trainer's business.
//!
//! 1. [`Engine::enter`] prepares for a step (upcycling, moment reset and rotary table at stage boundaries).
//! 2. [`Engine::lane`] runs one lane's micro-batches forward and backward into one fp32 gradient and folds it.
//! 3. [`Engine::finish`] takes the tree's total, divides once by the tokens that count, clips and updates.

use anello_configs::{Compute, RunConfig, Stage, StepPlan};
use anello_dataloader::MicroBatch;
use anello_store::metrics::{Seconds, StepRecord};
use tch::{Device, Tensor};

use crate::fold::Fold;
use crate::model::{Context, Model, Rotary};
use crate::objective::{self, LossSums};
use crate::optimizer::{State, Update};
use crate::params::Layout;
use crate::tape::Tape;

/// Model, state and the sums of the step under way, on one device and one thread.
#[derive(Debug)]
pub struct Engine {
    config: RunConfig,
    device: Device,
    state: State,
    model: Model,
    /// The table and what it was made from: (RoPE base, sequence length).
    rotary: Option<((f64, u32), Rotary)>,
    /// Gradient buffers that are free, zeroed when taken.
    spare: Vec<Tensor>,
    fold: Fold<(Tensor, LossSums)>,
}

/// What a forward and backward depends on besides model and tokens.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// Loop steps (T).
    pub loops: u32,
    /// Weight of the entropy (β).
    pub beta: f64,
    /// What is kept and the size of a loss chunk.
    pub compute: &'a Compute,
}

/// Forward and backward of one micro-batch: `ids_n` and `targets_n` are `[n]`. Adds the gradient of the loss's sum to
/// the flat `gradient` and returns the sums.
pub fn forward_backward(
    model: &Model,
    context: &Context,
    ids_n: &Tensor,
    targets_n: &Tensor,
    pass: Pass<'_>,
    gradient: &Tensor,
) -> LossSums {
    let embedded_nd = tch::no_grad(|| model.embed_nd(ids_n));
    let (hidden, tape) = Tape::forward(model, context, embedded_nd, pass.loops, pass.compute.recompute);
    let chunk = i64::from(pass.compute.loss_chunk_tokens);
    let (sums, of_hidden) = objective::backward(model, &hidden, targets_n, pass.beta, chunk, gradient);
    drop(hidden);
    let of_embedded_nd = tape.backward(of_hidden, gradient).to_kind(model.wide());
    let vocab = model.embed.value.size()[0];
    let of_table = Tensor::embedding_dense_backward(&of_embedded_nd, ids_n, vocab, -1, false);
    model.embed.accumulate(gradient, &of_table);
    sums
}

/// What a step came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Loss sums of the global batch.
    pub sums: LossSums,
    /// The update.
    pub update: Update,
}

impl Outcome {
    /// What is logged of the step of `plan`.
    pub fn record(&self, plan: &StepPlan<'_>, seconds: Seconds) -> StepRecord {
        let Self { sums, update } = self;
        let mean = |sum: f64| sum / sums.counted.max(1) as f64;
        StepRecord {
            step: plan.step,
            stage: plan.stage.name.clone(),
            tokens: plan.tokens_before + plan.batch_tokens,
            batch_tokens: plan.batch_tokens,
            counted: sums.counted,
            lr: plan.lr,
            loss: mean(sums.loss),
            loop_loss: sums.cross_entropy.iter().copied().map(mean).collect(),
            exit: sums.exit.iter().copied().map(mean).collect(),
            entropy: mean(sums.entropy),
            grad_norm: update.grad_norm,
            applied: update.applied,
            seconds,
        }
    }
}

impl Engine {
    /// An engine at the first step of `config`, with the initial weights of its seed.
    pub fn new(config: &RunConfig, device: Device) -> Self {
        let layout = Layout::new(&config.model, config.model.layers);
        let weights = layout.initial(config.seed, device);
        Self::with_state(config, State::new(layout, weights))
    }

    /// An engine that goes on from `state`.
    pub fn with_state(config: &RunConfig, state: State) -> Self {
        crate::ffi::keep_freed_memory();
        let device = state.weights.device();
        let model = Model::new(&config.model, config.compute.dtype, &state.layout, &state.weights);
        let (config, rotary, spare, fold) = (config.clone(), None, Vec::new(), Fold::default());
        Self { config, device, state, model, rotary, spare, fold }
    }

    /// Weights and moments.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The model over the current weights.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Prepares for the step of `plan`. Called once before its first lane.
    pub fn enter(&mut self, plan: &StepPlan<'_>) {
        if let Some(upcycle) = plan.upcycle {
            let layout = Layout::new(&self.config.model, upcycle.layers);
            self.state = self.state.upcycled(layout);
            self.model = Model::new(
                &self.config.model,
                self.config.compute.dtype,
                &self.state.layout,
                &self.state.weights,
            );
            self.spare.clear();
        }
        if plan.reset_optimizer {
            self.state.reset_moments();
        }
        self.prepare_rotary(plan.stage);
    }

    fn prepare_rotary(&mut self, stage: &Stage) {
        let key = (stage.rope_base, stage.sequence);
        if self.rotary.as_ref().is_none_or(|(made_from, _)| *made_from != key) {
            let head_size = i64::from(self.config.model.hidden / self.config.model.heads);
            let table = Rotary::new(stage.rope_base, head_size, i64::from(stage.sequence), self.device);
            self.rotary = Some((key, table));
        }
    }

    /// Runs one lane: lanes come in order, each once a step.
    pub fn lane(&mut self, stage: &Stage, lane: u32, micro_batches: &[MicroBatch]) {
        let mut gradient = self.spare.pop().unwrap_or_else(|| self.state.layout.zeros(self.device));
        let _ = gradient.zero_();
        let mut sums = LossSums::zero(stage.loops as usize);
        for micro_batch in micro_batches {
            sums.add(&self.forward_backward(stage, micro_batch, &gradient));
        }
        let spare = &mut self.spare;
        self.fold.push(lane, (gradient, sums), |(gradient, sums), (right, right_sums)| {
            *gradient += &right;
            sums.add(&right_sums);
            spare.push(right);
        });
    }

    fn forward_backward(&self, stage: &Stage, batch: &MicroBatch, gradient: &Tensor) -> LossSums {
        let (context, ids_n, targets_n) = self.on_device(stage, batch);
        let pass = Pass { loops: stage.loops, beta: stage.beta, compute: &self.config.compute };
        forward_backward(&self.model, &context, &ids_n, &targets_n, pass, gradient)
    }

    fn on_device(&self, stage: &Stage, batch: &MicroBatch) -> (Context, Tensor, Tensor) {
        let (_, rotary) = self.rotary.as_ref().expect("enter() comes before lane()");
        let context = Context::new(batch, rotary, self.model.kind(), stage.mask);
        let to = |values: &[i64]| Tensor::from_slice(values).to_device(self.device);
        (context, to(&batch.input_ids), to(&batch.targets))
    }

    /// Ends the step once all lanes of the run are in: the update of `plan`.
    pub fn finish(&mut self, plan: &StepPlan<'_>) -> Outcome {
        let fold = std::mem::take(&mut self.fold);
        let (gradient, sums) = fold.into_total(self.config.lanes);
        let finite = sums.loss.is_finite();
        let update = self.state.update(&self.config.optimizer, plan.lr, &gradient, sums.counted, finite);
        self.spare.push(gradient);
        Outcome { sums, update }
    }
}

//! The step: lanes in, one update out. No I/O, and no clock but one that is read: what is called when is the trainer's business.
//!
//! 1. [`Engine::enter`] prepares for a step (upcycling, moment reset and rotary table at stage boundaries);
//!    [`Engine::approach`] leaves to the update what can wait for it.
//! 2. [`Engine::lane`] runs one lane's micro-batches forward and backward into one fp32 gradient and folds it;
//!    [`Engine::last_lane`] tells meanwhile which blocks are whole.
//! 3. [`Engine::finish`] takes the tree's total, divides once by the tokens that count, clips and updates.
//!
//! With several workers 3 is [`Engine::take_partials`], the exchange between them, and [`Engine::finish_with`]; a step
//! that comes to nothing ends with [`Engine::abandon`], or with [`Engine::set_aside`], and [`Engine::resume`] has its sums.

mod graphs;
mod growing;
mod pass;

use std::ops::Range;

use anello_configs::{Guard, OnSpike, RunConfig, Stage, StepPlan};
use anello_dataloader::MicroBatch;
use anello_store::metrics::{Seconds, StepRecord};
use tch::{Device, Tensor};

use self::graphs::Graphs;
pub use self::growing::Growing;
use self::growing::{Chain, tell_sums};
pub(crate) use self::pass::hidden;
pub use self::pass::{Inputs, Pass, forward_backward};
use self::pass::{Walked, walk};
use crate::cover::Cover;
use crate::error::Result;
use crate::evaluate::Evaluation;
use crate::fold::{Fold, Kept};
use crate::guard::{self, Spike};
use crate::kernels::{self, Kernels};
use crate::model::{Model, Rotary};
use crate::objective::{Figures, Goal, LossSums};
use crate::optimizer::{Prepared, State, Summed, Update, blocks_of};
use crate::params::Layout;
use crate::stopwatch::{Point, Spent, Stopwatch};

/// Model, state and the sums of the step under way, on one device and one thread.
#[derive(Debug)]
pub struct Engine {
    config: RunConfig,
    device: Device,
    state: State,
    model: Model,
    /// Those of `compute.fused`.
    kernels: Option<Kernels>,
    /// The table and what it was made from: (RoPE base, sequence length).
    rotary: Option<((f64, u32), Rotary)>,
    /// Those of `compute.graphs`.
    graphs: Option<Graphs>,
    /// Gradient buffers that are free, zeroed when taken.
    spare: Vec<Tensor>,
    fold: Fold<(Tensor, LossSums)>,
    /// A step that came to nothing, and its sums.
    kept: Option<(u64, Kept<(Tensor, LossSums)>)>,
    stopwatch: Stopwatch,
}

/// What a step came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Loss sums of the global batch.
    pub sums: LossSums,
    /// The update.
    pub update: Update,
    /// The loss is far above those before it.
    pub spike: Option<Spike>,
    /// The spike is to be undone: the state after this step is that after so many steps (see `rollback`), which
    /// whoever trains has to bring.
    pub back_to: Option<u64>,
}

impl Outcome {
    /// The objective, nats a token.
    pub fn loss(&self) -> f64 {
        mean_loss(&self.sums)
    }

    /// What is logged of the step of `plan`.
    pub fn record(&self, plan: &StepPlan<'_>, seconds: Seconds) -> StepRecord {
        let Self { sums, update, .. } = self;
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
            weights: None,
            evals: Vec::new(),
            seconds,
        }
    }
}

/// The objective, nats a token.
fn mean_loss(sums: &LossSums) -> f64 {
    sums.loss / sums.counted.max(1) as f64
}

/// The sum of the step of `plan`, and whether its loss is a spike after `losses`. Its update is wanted unless that is to be left
/// out, or the loss is no number.
fn judged<'a>(
    guard: &Guard,
    losses: &[f64],
    plan: &StepPlan<'_>,
    gradient: &'a Tensor,
    sums: &LossSums,
    kernels: Option<&'a Kernels>,
) -> (Summed<'a>, Option<Spike>) {
    let spike = guard::spike(guard, losses, mean_loss(sums));
    let left_out = spike.is_some() && matches!(guard.on_spike, OnSpike::Skip | OnSpike::Rollback);
    let wanted = sums.loss.is_finite() && !left_out;
    let sum = Summed { gradient, counted: sums.counted, wanted, fresh: plan.reset_optimizer, kernels };
    (sum, spike)
}

/// Adds `right` into `left`; its buffer is free then.
fn add(spare: &mut Vec<Tensor>, left: &mut (Tensor, LossSums), (right, sums): (Tensor, LossSums)) {
    left.0 += &right;
    left.1.add(&sums);
    spare.push(right);
}

impl Engine {
    /// An engine at the first step of `config`, with the initial weights of its seed.
    ///
    /// # Errors
    /// Those of the kernels that the config asks for: [`crate::Error::Device`], [`crate::Error::Config`].
    pub fn new(config: &RunConfig, device: Device) -> Result<Self> {
        let kernels = kernels::of(&config.compute, device)?;
        Ok(Self::with_kernels(config, State::of_seed(config, device), kernels))
    }

    /// An engine that goes on from `state` with these kernels, or with LibTorch's.
    pub(crate) fn with_kernels(config: &RunConfig, state: State, kernels: Option<Kernels>) -> Self {
        crate::ffi::keep_freed_memory();
        let device = state.weights.device();
        let model = Self::model_of(config, &state, kernels.as_ref());
        let (config, rotary, spare, fold) = (config.clone(), None, Vec::new(), Fold::default());
        let (kept, stopwatch) = (None, Stopwatch::new(device));
        let graphs = (config.compute.graphs && device.is_cuda()).then(|| Graphs::new(device));
        Self { config, device, state, model, kernels, rotary, graphs, spare, fold, kept, stopwatch }
    }

    fn model_of(config: &RunConfig, state: &State, kernels: Option<&Kernels>) -> Model {
        let model = Model::new(&config.model, config.compute.dtype, &state.layout, &state.weights);
        model.with_kernels(kernels.cloned())
    }

    /// Weights and moments.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The model over the current weights.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Goes on from `state`, which is on the engine's device. A step under way is abandoned. Returns the state before.
    pub fn load_state(&mut self, state: State) -> State {
        assert_eq!(state.weights.device(), self.device, "the state is on another device");
        self.abandon();
        self.forget_kept();
        let Self { config, model, kernels, spare, graphs, .. } = self;
        graphs.iter_mut().for_each(Graphs::forget);
        *model = Self::model_of(config, &state, kernels.as_ref());
        spare.retain(|buffer| buffer.numel() == state.layout.len());
        std::mem::replace(&mut self.state, state)
    }

    /// Takes up weights that were written into the state.
    pub(crate) fn take_up_weights(&mut self) {
        self.forget_kept();
        self.model.refresh();
    }

    /// From here on losses are measured anew.
    pub(crate) fn forget_losses(&mut self) {
        self.state.losses.clear();
    }

    /// Prepares for the step of `plan`. Called before its first lane; a second time, for a step that was abandoned, it
    /// changes nothing more.
    pub fn enter(&mut self, plan: &StepPlan<'_>) {
        self.approach(plan);
        if plan.first_of_stage {
            // Another T, sequence length or mixture has another loss.
            self.state.losses.clear();
        }
        if plan.reset_optimizer {
            self.state.reset_moments(self.moved_blocks(plan));
        }
    }

    /// The blocks that the step of `plan` moves.
    fn moved_blocks(&self, plan: &StepPlan<'_>) -> Range<usize> {
        blocks_of(&self.state.layout.moved(plan.stage.trains, plan.stage.loss))
    }

    /// Makes room for the moments of what the step of `plan`, if there is one, moves, which is otherwise made by its update.
    pub fn make_room(&mut self, plan: Option<StepPlan<'_>>) {
        if let Some(plan) = plan {
            self.state.make_room(self.moved_blocks(&plan));
        }
    }

    /// The same as far as forward and backward need it: moments and the window of losses stay what they were until the step's
    /// update. So until then the state is that after the step before, unless the stack grows: then that one is returned.
    pub fn approach(&mut self, plan: &StepPlan<'_>) -> Option<State> {
        self.prepare_rotary(plan.stage);
        let upcycle = plan.upcycle.filter(|upcycle| self.state.layout.layers() as u32 != upcycle.layers)?;
        let layout = Layout::new(&self.config.model, upcycle.layers);
        Some(self.load_state(self.state.upcycled(layout)))
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
        let (gradient, sums) = self.lane_gradient(stage, micro_batches);
        self.fold_lane(lane, gradient, sums);
    }

    /// The flat gradient and the loss sums of one lane's micro-batches, which no other lane has a part in.
    pub fn lane_gradient(&mut self, stage: &Stage, micro_batches: &[MicroBatch]) -> (Tensor, LossSums) {
        let mut gradient = self.zeros();
        let place = self.place(&gradient);
        let sums = self.micro_batches(stage, micro_batches, place.as_ref().unwrap_or(&gradient));
        if let Some(place) = place {
            gradient.copy_(&place);
        }
        (gradient, sums)
    }

    /// Where graphs add up the lane of `gradient`, if there are any.
    fn place(&mut self, gradient: &Tensor) -> Option<Tensor> {
        self.graphs.as_mut().map(|graphs| graphs.lane(gradient))
    }

    /// Adds the gradient of some micro-batches to `gradient`; the sum of their loss sums.
    fn micro_batches(&mut self, stage: &Stage, micro_batches: &[MicroBatch], gradient: &Tensor) -> LossSums {
        let mut sums = LossSums::zero(stage.loops as usize);
        let mut made = Vec::new();
        for micro_batch in micro_batches {
            let (figures, points) = self.walk(stage, micro_batch, gradient, &mut |_, _| {});
            made.push(figures);
            self.stopwatch.add(points);
            // What waits on the host is not to be there of two of them.
            if self.config.compute.offload {
                made.drain(..).for_each(|figures| sums.add(&figures.read()));
            }
        }
        // Reading them waits for a GPU: once it has all that it is to do.
        made.iter().for_each(|figures| sums.add(&figures.read()));
        sums
    }

    fn zeros(&mut self) -> Tensor {
        let mut gradient = self.spare.pop().unwrap_or_else(|| self.state.layout.zeros(self.device));
        gradient.zero_()
    }

    /// [`Engine::lane`] for the last of this worker's lanes: the tree's additions are made block by block as soon as the
    /// lane's gradient is whole there, and `tell` hears of it, so that the sum over workers can begin meanwhile. Same
    /// additions, same bits.
    pub fn last_lane(
        &mut self,
        stage: &Stage,
        lane: u32,
        micro_batches: &[MicroBatch],
        tell: &mut dyn FnMut(Growing<'_>),
    ) {
        let mut gradient = self.zeros();
        let place = self.place(&gradient);
        let adds_to = place.as_ref().unwrap_or(&gradient);
        let (last, before) = micro_batches.split_last().expect("a lane has at least one micro-batch a step");
        let mut sums = self.micro_batches(stage, before, adds_to);
        let (mut grown, mut chain) = (Fold::default(), Chain::default());
        let (_, points) = self.walk(stage, last, adds_to, &mut |engine, walked| match walked {
            Walked::Hidden => {}
            Walked::Losses(of_last) => {
                sums.add(&of_last.read());
                grown = engine.fold.map(|(gradient, sums)| (gradient.shallow_clone(), sums.clone()));
                grown.push(lane, (gradient.shallow_clone(), sums.clone()), |(_, sums), (_, right)| {
                    sums.add(&right);
                });
                let blocks = engine.state.layout.backward_blocks(stage.trains);
                chain = Chain::new(place.as_ref(), &gradient, &engine.fold, &grown, blocks);
                tell_sums(&grown, tell);
                chain.next(tell);
            }
            Walked::Layer(layer) => {
                chain.next(tell);
                if layer == 0 {
                    // Norms and gate, which all layers have a part in.
                    chain.next(tell);
                }
            }
        });
        chain.take_over();
        tell(Growing::Lane(&mut gradient));
        chain.rest(tell);
        self.spare.extend(chain.into_free());
        self.fold = grown;
        self.stopwatch.add(points);
    }

    /// Puts a lane's gradient and sums into the tree: lanes come in order, each once a step.
    pub fn fold_lane(&mut self, lane: u32, gradient: Tensor, sums: LossSums) {
        let spare = &mut self.spare;
        self.fold.push(lane, (gradient, sums), |left, right| add(spare, left, right));
    }

    /// Forward and backward of one micro-batch, which calls `walked` as it goes.
    fn walk(
        &mut self,
        stage: &Stage,
        batch: &MicroBatch,
        gradient: &Tensor,
        walked: &mut dyn FnMut(&Self, Walked<&Figures>),
    ) -> (Figures, [Point; 3]) {
        let mut graphs = self.graphs.take();
        let begin = self.stopwatch.point();
        let (_, rotary) = self.rotary.as_ref().expect("enter() comes before lane()");
        let inputs = Inputs::new(batch, rotary, self.model.kind(), stage.mask);
        let goal = Goal { loss: stage.loss, beta: stage.beta, trains: stage.trains };
        let pass = Pass { loops: stage.loops, goal, compute: &self.config.compute };
        let mut hidden = Point::Nowhere;
        let mut walked = |at: Walked<&Figures>| {
            if let Walked::Hidden = at {
                hidden = self.stopwatch.point();
            }
            walked(self, at);
        };
        let figures = match &mut graphs {
            Some(graphs) => graphs.walk(&inputs, &self.model, pass, gradient, &mut walked),
            None => walk(&self.model, &inputs, pass, gradient, &mut walked),
        };
        self.graphs = graphs;
        (figures, [begin, hidden, self.stopwatch.point()])
    }

    /// Time that the device spent on the micro-batches since this was asked last. To be asked when the step is over.
    pub fn take_spent(&mut self) -> Spent {
        self.stopwatch.take()
    }

    /// Adds the tokens of `batch` to `sums`: what the model is worth on them as `stage` trains it. Nothing changes.
    pub fn evaluate(&self, stage: &Stage, batch: &MicroBatch, sums: &mut Evaluation) {
        let (_, rotary) = self.rotary.as_ref().expect("enter() comes before evaluate()");
        sums.add(&self.model, rotary, stage.mask, batch);
    }

    /// Ends the step once all lanes of the run are in: the update of `plan`.
    pub fn finish(&mut self, plan: &StepPlan<'_>) -> Outcome {
        let (gradient, sums) = std::mem::take(&mut self.fold).into_total(self.config.lanes);
        let outcome = self.finish_with(plan, &gradient, sums);
        self.recycle(gradient);
        outcome
    }

    /// The sums of the lanes that are in, one for each maximal aligned subtree in lane order: (first lane, number of
    /// lanes, gradient, loss sums). The gradients come back with [`Engine::recycle`].
    pub fn take_partials(&mut self) -> Vec<(u32, u32, Tensor, LossSums)> {
        let partials = std::mem::take(&mut self.fold).into_partials();
        partials.into_iter().map(|(first, lanes, (gradient, sums))| (first, lanes, gradient, sums)).collect()
    }

    /// Ends the step with the total of all lanes of the run: the flat `gradient`, which is overwritten, and the sums.
    pub fn finish_with(&mut self, plan: &StepPlan<'_>, gradient: &Tensor, sums: LossSums) -> Outcome {
        let _span = tracing::trace_span!("update").entered();
        let Self { config, state, model, kernels, .. } = self;
        let guard = &config.guard;
        if plan.first_of_stage {
            state.losses.clear();
        }
        let (sum, spike) = judged(guard, &state.losses, plan, gradient, &sums, kernels.as_ref());
        let moved = state.layout.moved(plan.stage.trains, plan.stage.loss);
        let update = state.update(&config.optimizer, plan.lr, sum, moved);
        guard::remember(guard, &mut state.losses, mean_loss(&sums));
        let back_to = guard::back_to(guard, spike, plan.step);
        if update.applied {
            model.refresh();
        }
        Outcome { sums, update, spike, back_to }
    }

    /// [`Engine::finish_with`] where the moments are shared out over a ring, first half ([`State::prepare`]): the new weights of
    /// the blocks of `own` take the place of their gradient. A buffer of a lane that is through keeps what must be kept.
    pub fn prepare(
        &mut self,
        plan: &StepPlan<'_>,
        gradient: &Tensor,
        sums: &LossSums,
        own: Range<usize>,
    ) -> (Prepared, Option<Spike>) {
        let _span = tracing::trace_span!("update").entered();
        let Self { config, state, kernels, spare, .. } = self;
        let losses: &[f64] = if plan.first_of_stage { &[] } else { &state.losses };
        let (sum, spike) = judged(&config.guard, losses, plan, gradient, sums, kernels.as_ref());
        let moved = state.layout.moved(plan.stage.trains, plan.stage.loss);
        let mut prepared = state.prepare(&config.optimizer, plan.lr, sum, moved, own, spare.pop());
        if plan.first_of_stage {
            prepared.losses.clear();
        }
        guard::remember(&config.guard, &mut prepared.losses, mean_loss(sums));
        (prepared, spike)
    }

    /// The second half, once `weights` has everyone's ([`State::complete`]).
    pub fn complete(&mut self, prepared: Prepared, weights: &Tensor) -> Update {
        let _span = tracing::trace_span!("update").entered();
        self.state.complete(&prepared, Some(weights));
        self.model.refresh();
        prepared.room.into_iter().for_each(|room| self.recycle(room));
        prepared.update
    }

    /// The same where others know that moments outside of the blocks `moved` are zero, as [`State::narrow`].
    pub fn narrow(&mut self, moved: &Range<usize>) {
        self.state.narrow(moved);
    }

    /// The same with the moments of `cover`, as [`State::with_cover`].
    pub fn set_cover(&mut self, cover: Cover, others: &[(usize, [Tensor; 2])]) {
        // The model's tensors are views of the weights, which stay where they are.
        self.state = self.state.share().with_cover(cover, others);
    }

    /// Takes back a gradient buffer that is no longer needed, for a later lane. One of a layout that is no longer in use
    /// is let go.
    pub fn recycle(&mut self, gradient: Tensor) {
        if gradient.numel() == self.state.layout.len() {
            self.spare.push(gradient);
        }
    }

    /// What was kept of `step` by [`Engine::set_aside`] and is of use for these lanes; the rest is let go. Comes after
    /// [`Engine::approach`], and before the first lane.
    pub fn resume(&mut self, step: u64, lanes: &Range<u32>) {
        match &mut self.kept {
            Some((of, kept)) if *of == step => {
                self.spare.extend(kept.cut_to(lanes).into_iter().map(|(gradient, _)| gradient));
            }
            _ => self.forget_kept(),
        }
    }

    /// Whether this lane need not be computed, since it is in a sum that was kept, which is put into the tree. Asked of each lane
    /// in the order of [`Engine::lane`].
    pub fn fold_kept(&mut self, lane: u32) -> bool {
        if let Some(partial) = self.kept.as_mut().and_then(|(_, kept)| kept.take(lane)) {
            let spare = &mut self.spare;
            self.fold.push_subtree(partial, |left, right| add(spare, left, right));
        }
        self.fold.has(lane)
    }

    /// This lane is to be computed, whatever was kept: before [`Engine::resume`].
    pub fn forget(&mut self, lane: u32) {
        let forgotten = self.kept.as_mut().and_then(|(_, kept)| kept.forget(lane));
        self.spare.extend(forgotten.map(|(gradient, _)| gradient));
    }

    fn forget_kept(&mut self) {
        let kept = self.kept.take().into_iter().flat_map(|(_, kept)| kept.into_values());
        self.spare.extend(kept.map(|(gradient, _)| gradient));
    }

    /// Tells what [`Engine::last_lane`] does where the last of this worker's lanes was kept: all is whole.
    pub fn tell_whole(&self, stage: &Stage, tell: &mut dyn FnMut(Growing<'_>)) {
        tell_sums(&self.fold, tell);
        let blocks = self.state.layout.backward_blocks(stage.trains);
        blocks
            .into_iter()
            .filter(|blocks| !blocks.is_empty())
            .for_each(|blocks| tell(Growing::Whole(blocks)));
    }

    /// The step under way came to nothing, for no fault of the sums: they are kept for the ring that has it next.
    pub fn set_aside(&mut self, step: u64) {
        self.forget_kept();
        self.kept = Some((step, Kept::new(std::mem::take(&mut self.fold))));
    }

    /// Drops the step under way: nothing but its sums is lost, and the next lane may be any.
    pub fn abandon(&mut self) {
        for (_, _, gradient, _) in self.take_partials() {
            self.recycle(gradient);
        }
    }
}

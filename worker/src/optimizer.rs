//! AdamW over the flat buffer, with the block-wise norm, the clip and the skip of a step that is not finite.
//!
//! ```text
//! g = sum / counted · min(1, clip / ‖g‖)
//! m = β1·m + (1−β1)·g          v = β2·v + (1−β2)·g²
//! w = w·(1 − lr·decay) − lr·(m / (1−β1^u)) / (√(v / (1−β2^u)) + ε)       u = updates so far, this one included
//! ```
//!
//! Every operation below is one operation an element (no fused multiply-add, whose use would differ between the vector body
//! and the scalar tail of a LibTorch kernel), so the result does not depend on how the buffer is cut, by threads or by
//! owners. All are as IEEE 754 rounds them, but for the root on a CPU: LibTorch takes it from MKL, one unit in the last place off
//! for one element in six, wherever the element stands.
//!
//! Where the moments are shared out over a ring, an update has two halves. [`State::prepare`] changes nothing of the state:
//! it makes the new weights of some blocks, for others to have, and keeps the gradient of all blocks whose moments are
//! here. [`State::complete`] brings those moments a step further, once all new weights are there. In between the state
//! can still go either way.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use anello_configs::{Optimizer, RunConfig};
use tch::{Device, Kind, Tensor};

use crate::cover::{Cover, Piece};
use crate::host::Reading;
use crate::kernels::Kernels;
use crate::params::{BLOCK, Layout};

/// Elements updated at a time, which no bit depends on: on a CPU the six operands stay in a core's cache, on a GPU a kernel is
/// long enough to hide its launch, and what one leaves for the next is 64 MiB.
fn slice_len(device: Device) -> usize {
    match device {
        Device::Cpu => BLOCK,
        _ => BLOCK * 256,
    }
}

/// `moved` in slices that end at multiples of `len`, and at `decayed`: a slice decays or does not.
fn slices(moved: &Range<usize>, decayed: usize, len: usize) -> impl Iterator<Item = Range<usize>> {
    let end = moved.end;
    let ends = move |start: usize| {
        let next = (start / len + 1) * len;
        if start < decayed { next.min(decayed) } else { next }
    };
    let starts = std::iter::successors(Some(moved.start), move |start| Some(ends(*start)));
    starts.take_while(move |start| *start < end).map(move |start| start..ends(start).min(end))
}

/// Elements of one row of the norm: a row's sum is one output of LibTorch's reduction, added on one thread.
const ROW: i64 = 1024;

/// Weights and moments: all that an update changes.
#[derive(Debug)]
pub struct State {
    /// Where the parameters lie.
    pub layout: Layout,
    /// Weights, fp32, flat.
    pub weights: Tensor,
    /// First moments, fp32: those of the blocks of `cover`, one after the other.
    pub exp_avg: Tensor,
    /// Second moments, as the first.
    pub exp_avg_sq: Tensor,
    /// The blocks whose moments are here: all, unless they are shared out over a ring.
    pub cover: Cover,
    /// Updates applied since the moments were last zero.
    pub updates: u64,
    /// Losses of the last steps of the stage, the oldest first: what a spike is measured by.
    pub losses: Vec<f64>,
    /// Who copies it beside the training, so that the next change waits.
    pub(crate) reading: RefCell<Vec<Arc<Reading>>>,
}

/// The sum of a global batch's gradient.
#[derive(Clone, Copy, Debug)]
pub struct Summed<'a> {
    /// Flat; an update overwrites it, and looks at it in the blocks that move alone.
    pub gradient: &'a Tensor,
    /// Tokens that count.
    pub counted: u64,
    /// Whether the update is wanted: its loss is a number, and no spike that is skipped.
    pub wanted: bool,
    /// Whether it finds all moments at zero, whatever they were: a stage begins with it that resets them.
    pub fresh: bool,
    /// What the update is computed with, where it is not LibTorch's.
    pub kernels: Option<&'a Kernels>,
}

/// What an update did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Global norm of the mean gradient, before the clip.
    pub grad_norm: f64,
    /// False when the norm was not finite: nothing was changed.
    pub applied: bool,
}

/// What the update of a step has in common for all elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scale {
    /// Of the gradient's sum: the mean over tokens, and the clip.
    pub gradient: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// 1 − β2^u.
    pub correction2: f64,
    /// 1 − lr·decay.
    pub decay: f64,
    /// lr / (1 − β1^u).
    pub rate: f64,
}

impl Scale {
    /// β1, 1 − β1, β2 and 1 − β2 as fp32.
    pub fn betas(&self) -> [f32; 4] {
        [self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2].map(|value| value as f32)
    }

    /// 1 − β2^u, ε, 1 − lr·decay and lr / (1 − β1^u) as fp32.
    pub fn of_weights(&self) -> [f32; 4] {
        [self.correction2, self.eps, self.decay, self.rate].map(|value| value as f32)
    }

    pub fn moments(&self, kernels: Option<&Kernels>, m: &mut Tensor, v: &mut Tensor, g: &Tensor) {
        if let Some(kernels) = kernels {
            return kernels.adamw_moments(self, [m, v], g);
        }
        *m *= self.beta1;
        *m += g * (1.0 - self.beta1);
        *v *= self.beta2;
        *v += g.square() * (1.0 - self.beta2);
    }

    pub fn weights(&self, kernels: Option<&Kernels>, w: &mut Tensor, m: &Tensor, v: &Tensor, decayed: bool) {
        if let Some(kernels) = kernels {
            let len = if decayed { w.numel() } else { 0 };
            return kernels.adamw_weights(self, w, [m, v], len);
        }
        let root = (v / self.correction2).sqrt() + self.eps;
        if decayed {
            *w *= self.decay;
        }
        *w -= m / root * self.rate;
    }
}

/// The first half of an update: what it takes to bring the moments that are here to the step after.
#[derive(Debug)]
pub struct Prepared {
    /// What the update does.
    pub update: Update,
    /// Absent when the step is skipped.
    scale: Option<Scale>,
    /// Elements that move.
    moved: Range<usize>,
    /// The blocks whose moments were here.
    pub cover: Cover,
    /// The window of losses of the state after: that of the one before, until the step's is taken up.
    pub losses: Vec<f64>,
    /// The moments are zero before it.
    fresh: bool,
    /// The scaled gradient of what moves, laid as those moments are.
    gradient: Tensor,
    /// The buffer that it lies in, when one was given for it.
    pub room: Option<Tensor>,
    kernels: Option<Kernels>,
}

/// The whole blocks that elements lie in.
fn blocks_of(elements: &Range<usize>) -> Range<usize> {
    elements.start / BLOCK..elements.end.div_ceil(BLOCK)
}

/// Some elements of a flat buffer.
fn part(flat: &Tensor, elements: Range<usize>) -> Tensor {
    flat.narrow(0, elements.start as i64, elements.len() as i64)
}

/// Sums of squares of a flat gradient by block, f64: rows of 1024 in fp32, then the rows of a block in order.
///
/// On a CPU a row's sum is LibTorch's. On a GPU, where its reduction is cut by the number of rows too, a row is halved ten
/// times, its second half added to the first: the order is then written here, and no shape has a part in it.
pub fn block_square_sums(gradient: &Tensor) -> Vec<f64> {
    square_sums(gradient, None)
}

/// The same by a kernel where there are such, whose order is that of GPUs.
fn square_sums(gradient: &Tensor, kernels: Option<&Kernels>) -> Vec<f64> {
    let rows = match (kernels, gradient.device()) {
        (Some(kernels), _) => kernels.square_rows(gradient),
        (None, Device::Cpu) => gradient.view([-1, ROW]).square().sum_dim_intlist(1i64, false, Kind::Float),
        (None, device) => {
            let parts = gradient.split(slice_len(device) as i64, 0);
            Tensor::cat(
                &parts.iter().map(|part| halved(&part.view([-1, ROW]).square())).collect::<Vec<_>>(),
                0,
            )
        }
    };
    let rows = Vec::<f32>::try_from(&rows).expect("a vector of f32");
    rows.chunks(BLOCK / ROW as usize).map(|block| block.iter().map(|&row| f64::from(row)).sum()).collect()
}

/// The sum of each row, `[rows, 2^k] -> [rows]`: its halves are added until one element is left.
pub(crate) fn halved(rows: &Tensor) -> Tensor {
    let width = rows.size()[1];
    if width == 1 {
        return rows.squeeze_dim(1);
    }
    halved(&(rows.narrow(1, 0, width / 2) + rows.narrow(1, width / 2, width / 2)))
}

impl State {
    /// Fresh weights, moments at zero.
    pub fn new(layout: Layout, weights: Tensor) -> Self {
        let zeros = || layout.zeros(weights.device());
        let (exp_avg, exp_avg_sq) = (zeros(), zeros());
        let cover = Cover::all(layout.blocks());
        let reading = RefCell::default();
        Self { layout, weights, exp_avg, exp_avg_sq, cover, updates: 0, losses: Vec::new(), reading }
    }

    /// Weights alone: all moments are elsewhere.
    pub fn without_moments(layout: Layout, weights: Tensor) -> Self {
        let nothing = || Tensor::zeros([0], (Kind::Float, weights.device()));
        let (exp_avg, exp_avg_sq) = (nothing(), nothing());
        let cover = Cover::none(layout.blocks());
        let reading = RefCell::default();
        Self { layout, weights, exp_avg, exp_avg_sq, cover, updates: 0, losses: Vec::new(), reading }
    }

    /// The initial weights of the seed of `config`.
    pub fn of_seed(config: &RunConfig, device: Device) -> Self {
        let layout = Layout::new(&config.model, config.model.layers);
        let weights = layout.initial(config.seed, device);
        Self::new(layout, weights)
    }

    /// The same in memory of its own.
    pub fn copy(&self) -> Self {
        let Self { layout, weights, exp_avg, exp_avg_sq, cover, updates, losses, reading: _ } = self;
        let (weights, exp_avg, exp_avg_sq) = (weights.copy(), exp_avg.copy(), exp_avg_sq.copy());
        let (layout, cover, losses, reading) =
            (layout.clone(), cover.clone(), losses.clone(), RefCell::default());
        Self { layout, weights, exp_avg, exp_avg_sq, cover, updates: *updates, losses, reading }
    }

    /// The same on `device`; in the same memory when it is there already.
    pub fn on(self, device: Device) -> Self {
        let to = |flat: Tensor| flat.to_device(device);
        let (weights, exp_avg, exp_avg_sq) = (to(self.weights), to(self.exp_avg), to(self.exp_avg_sq));
        Self { weights, exp_avg, exp_avg_sq, ..self }
    }

    /// The same in the same memory.
    pub fn share(&self) -> Self {
        let Self { layout, weights, exp_avg, exp_avg_sq, cover, updates, losses, reading } = self;
        Self {
            layout: layout.clone(),
            weights: weights.shallow_clone(),
            exp_avg: exp_avg.shallow_clone(),
            exp_avg_sq: exp_avg_sq.shallow_clone(),
            cover: cover.clone(),
            updates: *updates,
            losses: losses.clone(),
            reading: reading.clone(),
        }
    }

    /// Copies of weights and moments of `blocks` on the host, made beside what is computed until the state changes. Panics when
    /// their moments are elsewhere.
    pub(crate) fn read(&self, blocks: Range<usize>) -> Arc<Reading> {
        let weights = part(&self.weights, blocks.start * BLOCK..blocks.end * BLOCK);
        let [exp_avg, exp_avg_sq] = self.moments(blocks);
        let reading = Arc::new(Reading::start([weights, exp_avg, exp_avg_sq]));
        if let Reading::Beside(_) = *reading {
            self.reading.borrow_mut().push(Arc::clone(&reading));
        }
        reading
    }

    /// What is computed from now on may change the buffers.
    fn settle(&self) {
        self.reading.take().iter().for_each(|reading| reading.compute_after());
    }

    /// Sets moments and their count to zero.
    pub fn reset_moments(&mut self) {
        self.settle();
        let _ = self.exp_avg.zero_();
        let _ = self.exp_avg_sq.zero_();
        self.updates = 0;
    }

    /// The state over a stack of `layers` layers, weights and moments repeated (see [`Layout::upcycled`]). Panics when some
    /// moments are elsewhere.
    pub fn upcycled(&self, layout: Layout) -> Self {
        assert!(self.cover.is_all(), "a stack grows where all moments are");
        let spread = |flat: &Tensor| layout.upcycled(&self.layout, flat);
        let (weights, exp_avg, exp_avg_sq) =
            (spread(&self.weights), spread(&self.exp_avg), spread(&self.exp_avg_sq));
        let (cover, losses) = (Cover::all(layout.blocks()), self.losses.clone());
        let reading = RefCell::default();
        Self { layout, weights, exp_avg, exp_avg_sq, cover, updates: self.updates, losses, reading }
    }

    /// The moments of `blocks`, which are next to one another; panics when some are elsewhere.
    pub fn moments(&self, blocks: Range<usize>) -> [Tensor; 2] {
        let place = self.cover.place(blocks.clone());
        let place = place.unwrap_or_else(|| panic!("the moments of blocks {blocks:?} are elsewhere"));
        [&self.exp_avg, &self.exp_avg_sq].map(|flat| part(flat, place.start * BLOCK..place.end * BLOCK))
    }

    /// One update of the elements `moved`, where all moments are here.
    pub fn update(&mut self, options: &Optimizer, lr: f64, sum: Summed<'_>, moved: Range<usize>) -> Update {
        assert!(self.cover.is_all(), "all moments are here");
        if sum.fresh {
            self.reset_moments();
        }
        let (update, scale) = self.measure(options, lr, sum, &moved);
        let Some(scale) = scale else { return update };
        self.settle();
        self.updates += 1;
        let decayed = self.layout.decayed_len();
        if let Some(kernels) = sum.kernels {
            let flats = [&self.weights, &self.exp_avg, &self.exp_avg_sq, sum.gradient];
            let [w, m, v, g] = flats.map(|flat| part(flat, moved.clone()));
            let decayed = decayed.clamp(moved.start, moved.end) - moved.start;
            kernels.adamw_update(&scale, [&w, &m, &v], &g, decayed);
            return update;
        }
        for slice in slices(&moved, decayed, slice_len(self.weights.device())) {
            let here = |flat: &Tensor| part(flat, slice.clone());
            let (mut w, mut m, mut v) = (here(&self.weights), here(&self.exp_avg), here(&self.exp_avg_sq));
            let mut g = here(sum.gradient);
            g *= scale.gradient;
            scale.moments(None, &mut m, &mut v, &g);
            scale.weights(None, &mut w, &m, &v, slice.start < decayed);
        }
        update
    }

    /// What an update comes to, and what it does to all elements alike; absent: nothing.
    fn measure(
        &self,
        options: &Optimizer,
        lr: f64,
        sum: Summed<'_>,
        moved: &Range<usize>,
    ) -> (Update, Option<Scale>) {
        let Summed { gradient, counted, wanted, fresh, kernels } = sum;
        let blocks = blocks_of(moved);
        let squares: f64 =
            square_sums(&part(gradient, blocks.start * BLOCK..blocks.end * BLOCK), kernels).iter().sum();
        let grad_norm = squares.sqrt() / counted.max(1) as f64;
        if !(grad_norm.is_finite() && wanted) {
            return (Update { grad_norm, applied: false }, None);
        }
        let clip = if grad_norm > options.clip { options.clip / grad_norm } else { 1.0 };
        let updates = if fresh { 0 } else { self.updates };
        let power = |beta: f64| 1.0 - libm::pow(beta, (updates + 1) as f64);
        let scale = Scale {
            gradient: clip / counted.max(1) as f64,
            beta1: options.beta1,
            beta2: options.beta2,
            eps: options.eps,
            correction2: power(options.beta2),
            decay: 1.0 - lr * options.weight_decay,
            rate: lr / power(options.beta1),
        };
        (Update { grad_norm, applied: true }, Some(scale))
    }

    /// The first half of [`State::update`], of a gradient that is the same everywhere. The new weights of the blocks of `own`
    /// that move, whose moments are here, take the place of their gradient. What must be kept of it lies in `room`, a whole flat
    /// buffer that nobody needs meanwhile, or, without one, in memory of its own.
    pub fn prepare(
        &self,
        options: &Optimizer,
        lr: f64,
        sum: Summed<'_>,
        moved: Range<usize>,
        own: Range<usize>,
        room: Option<Tensor>,
    ) -> Prepared {
        let Summed { gradient, fresh, kernels, .. } = sum;
        let (update, scale) = self.measure(options, lr, sum, &moved);
        let blocks = blocks_of(&moved);
        let len = if scale.is_some() { self.cover.elements() } else { 0 };
        let kept = match &room {
            Some(room) => part(room, 0..len).zero_(),
            None => Tensor::zeros([len as i64], (Kind::Float, gradient.device())),
        };
        let slice = |block: usize| (block * BLOCK).max(moved.start)..((block + 1) * BLOCK).min(moved.end);
        if let Some(scale) = &scale {
            for (block, there) in self.places(blocks.clone()) {
                let slice = slice(block);
                let mut g = part(gradient, slice.clone());
                g *= scale.gradient;
                let from = there * BLOCK + slice.start - block * BLOCK;
                part(&kept, from..from + slice.len()).copy_(&g);
            }
        }
        for block in own.start.max(blocks.start)..own.end.min(blocks.end) {
            let whole = block * BLOCK..(block + 1) * BLOCK;
            part(gradient, whole.clone()).copy_(&part(&self.weights, whole));
            let Some(scale) = &scale else { continue };
            let slice = slice(block);
            let [m, v] = self.moments(block..block + 1);
            let within = slice.start - block * BLOCK..slice.end - block * BLOCK;
            let [mut m, mut v] = [m, v].map(|flat| {
                let here = part(&flat, within.clone());
                if fresh { here.zeros_like() } else { here.copy() }
            });
            let there = self.cover.place(block..block + 1).expect("own moments are here").start * BLOCK;
            let g = part(&kept, there + within.start..there + within.end);
            scale.moments(kernels, &mut m, &mut v, &g);
            let mut w = part(gradient, slice);
            scale.weights(kernels, &mut w, &m, &v, block * BLOCK < self.layout.decayed_len());
        }
        let (cover, losses) = (self.cover.clone(), self.losses.clone());
        let kernels = kernels.cloned();
        Prepared { update, scale, moved, cover, losses, fresh, gradient: kept, room, kernels }
    }

    /// The second half of [`State::update`]: the moments that were here in the first, and, from a buffer in which every moved
    /// block has its new weights, the weights. Moments that have come since are let go.
    pub fn complete(&mut self, prepared: &Prepared, weights: Option<&Tensor>) {
        let Prepared { update: _, scale, moved, cover, losses, fresh, gradient, room: _, kernels } = prepared;
        if self.cover != *cover {
            *self = self.share().with_cover(cover.clone(), &[]);
        }
        if *fresh {
            self.reset_moments();
        }
        self.settle();
        self.losses.clone_from(losses);
        let blocks = blocks_of(moved);
        if let Some(scale) = scale {
            self.updates += 1;
            for (block, there) in self.places(blocks.clone()) {
                let start = (block * BLOCK).max(moved.start) - block * BLOCK;
                let end = ((block + 1) * BLOCK).min(moved.end) - block * BLOCK;
                let here = |flat: &Tensor| part(flat, there * BLOCK + start..there * BLOCK + end);
                let (mut m, mut v) = (here(&self.exp_avg), here(&self.exp_avg_sq));
                scale.moments(kernels.as_ref(), &mut m, &mut v, &here(gradient));
            }
        }
        if let Some(weights) = weights {
            let elements = blocks.start * BLOCK..blocks.end * BLOCK;
            part(&self.weights, elements.clone()).copy_(&part(weights, elements));
        }
    }

    /// The blocks of `blocks` whose moments are here, and where these lie, in blocks.
    fn places(&self, blocks: Range<usize>) -> Vec<(usize, usize)> {
        let pieces = self.cover.pieces(blocks).into_iter();
        pieces.flat_map(|Piece { blocks, at }| blocks.zip(at..)).collect()
    }

    /// The same weights with the moments of `cover`: those that are here, and, where they are not, of `others`, each from a
    /// first block on. Panics when some are in neither.
    pub fn with_cover(self, cover: Cover, others: &[(usize, [Tensor; 2])]) -> Self {
        if cover == self.cover && others.is_empty() {
            return self;
        }
        let device = self.weights.device();
        let new = [0, 1].map(|_| Tensor::zeros([cover.elements() as i64], (Kind::Float, device)));
        let mut filled = Cover::none(cover.of_blocks());
        let mut fill = |blocks: Range<usize>, from: [Tensor; 2]| {
            for Piece { blocks: part_of, at } in cover.pieces(blocks.clone()) {
                let source = (part_of.start - blocks.start) * BLOCK..(part_of.end - blocks.start) * BLOCK;
                for (new, from) in new.iter().zip(&from) {
                    let place = at * BLOCK..(at + part_of.len()) * BLOCK;
                    part(new, place).copy_(&part(from, source.clone()));
                }
                filled = filled.and(&Cover::of([part_of], cover.of_blocks()));
            }
        };
        for (first, moments) in others {
            let blocks = moments[0].numel() / BLOCK;
            fill(*first..first + blocks, moments.each_ref().map(Tensor::shallow_clone));
        }
        if self.cover.of_blocks() == cover.of_blocks() {
            for range in self.cover.ranges() {
                fill(range.clone(), self.moments(range.clone()));
            }
        }
        assert_eq!(filled, cover, "moments are missing");
        let [exp_avg, exp_avg_sq] = new;
        Self { exp_avg, exp_avg_sq, cover, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anello_configs::Model;
    use tch::Device;

    fn options() -> Optimizer {
        Optimizer { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: 1.0 }
    }

    fn state() -> State {
        let sizes = Model {
            layers: 1,
            hidden: 32,
            heads: 2,
            kv_heads: 2,
            ffn: 64,
            vocab: 100,
            rms_eps: 1e-6,
            init_std: 0.02,
            embed_std: 0.02,
            post_norm: 1.0,
        };
        let layout = Layout::new(&sizes, 1);
        let weights = layout.initial(1, Device::Cpu);
        State::new(layout, weights)
    }

    fn gradient(state: &State, scale: f64, step: u64) -> Tensor {
        let stream = anello_configs::random::Stream::new(9, "gradient", &[step]);
        let values: Vec<f32> =
            (0..state.layout.len()).map(|i| ((stream.unit_at(i as u64) - 0.5) * scale) as f32).collect();
        Tensor::from_slice(&values)
    }

    fn summed(gradient: &Tensor, wanted: bool) -> Summed<'_> {
        Summed { gradient, counted: 10, wanted, fresh: false, kernels: None }
    }

    /// Against the formula of the module, in f64, element by element.
    #[test]
    fn updates_follow_the_formula() {
        let mut state = state();
        let start = Vec::<f32>::try_from(&state.weights).unwrap();
        let n = start.len();
        let (mut w, mut m, mut v) =
            (start.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), vec![0.0; n], vec![0.0; n]);
        for step in 1..=3u64 {
            let g = gradient(&state, 0.5, step);
            let host = Vec::<f32>::try_from(&g).unwrap();
            let counted = 10;
            let lr = 1e-2 / step as f64;
            let got = state.update(&options(), lr, summed(&g, true), 0..n);
            let norm = host.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt() / counted as f64;
            assert!((got.grad_norm - norm).abs() < 1e-5 * norm, "{} against {norm}", got.grad_norm);
            assert!(norm > 1.0, "the clip is exercised");
            for i in 0..n {
                let g = f64::from(host[i]) / counted as f64 / norm;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let update = m[i]
                    / (1.0 - 0.9f64.powi(step as i32))
                    / ((v[i] / (1.0 - 0.95f64.powi(step as i32))).sqrt() + 1e-8);
                let decay = if i < state.layout.decayed_len() { 0.1 } else { 0.0 };
                w[i] = w[i] * (1.0 - lr * decay) - lr * update;
            }
        }
        let got = Vec::<f32>::try_from(&state.weights).unwrap();
        let worst = (0..n).map(|i| (f64::from(got[i]) - w[i]).abs()).fold(0.0, f64::max);
        assert!(worst < 2e-6, "worst difference {worst}");
    }

    #[test]
    fn a_step_that_is_not_finite_changes_nothing() {
        for poison in [f64::NAN, f64::INFINITY] {
            let mut state = state();
            let before = state.weights.copy();
            let g = gradient(&state, 0.5, 1);
            let _ = g.narrow(0, 7, 1).fill_(poison);
            let all = 0..state.layout.len();
            let update = state.update(&options(), 1e-2, summed(&g, true), all);
            assert!(!update.applied && state.updates == 0);
            assert!(state.weights.equal(&before));
            assert_eq!(state.exp_avg.abs().max().double_value(&[]), 0.0);
        }
        let mut state = state();
        let g = gradient(&state, 0.5, 1);
        let all = 0..state.layout.len();
        assert!(!state.update(&options(), 1e-2, summed(&g, false), all).applied);
    }

    /// Two halves are one update, to the last bit, wherever the moments are and whatever moves; and before the second half
    /// nothing is lost.
    #[test]
    fn an_update_in_two_halves_over_a_ring_is_the_same() {
        let all = state().layout.len();
        let blocks = all / BLOCK;
        assert!(blocks >= 2, "a state of more than a block");
        let fused = Kernels::emulated();
        for (members, moved, kernels) in [
            (3, 0..all, None),
            (2, 0..all, None),
            (3, 0..all - BLOCK / 3, None),
            (3, all - BLOCK..all - 40, None),
            (3, 100..all - BLOCK / 3, Some(&fused)),
        ] {
            let mut whole = state();
            let part_of = |rank| state().with_cover(Cover::of_rank(blocks, members, rank), &[]);
            let mut shards: Vec<State> = (0..members).map(part_of).collect();
            for step in 1..=5u64 {
                let (lr, finite) = (1e-2 / step as f64, step != 2);
                let sum = gradient(&whole, 0.5, step);
                // A stage that resets the moments begins with the fourth.
                let fresh = step == 4;
                if fresh {
                    whole.reset_moments();
                }
                whole.update(&options(), lr, Summed { kernels, ..summed(&sum, finite) }, moved.clone());
                let gathered = gradient(&whole, 0.5, step);
                let prepared: Vec<Prepared> = (0..members)
                    .map(|rank| {
                        let shard = &shards[rank];
                        let (weights, cover) = (shard.weights.copy(), shard.cover.clone());
                        let own = blocks * rank / members..blocks * (rank + 1) / members;
                        let sum = gradient(&whole, 0.5, step);
                        let (moved, own_blocks) = (moved.clone(), own.clone());
                        // Some have a buffer to spare, in which anything may be.
                        let room = (rank % 2 == 0).then(|| gradient(&whole, 7.0, step));
                        let sum_of = Summed { fresh, kernels, ..summed(&sum, finite) };
                        let prepared = shard.prepare(&options(), lr, sum_of, moved, own_blocks, room);
                        assert!(shard.weights.equal(&weights) && shard.cover == cover);
                        let own = own.start * BLOCK..own.end * BLOCK;
                        part(&gathered, own.clone()).copy_(&part(&sum, own));
                        prepared
                    })
                    .collect();
                for (shard, prepared) in shards.iter_mut().zip(&prepared) {
                    shard.complete(prepared, Some(&gathered));
                }
                for shard in &shards {
                    assert!(shard.weights.equal(&whole.weights), "{members} members, step {step}");
                    assert_eq!(shard.updates, whole.updates);
                    for range in shard.cover.ranges() {
                        let (ours, theirs) = (shard.moments(range.clone()), whole.moments(range.clone()));
                        assert!(ours.iter().zip(&theirs).all(|(a, b)| a.equal(b)), "step {step}");
                    }
                }
            }
        }
    }

    /// A member's moments are those of its share alone: less with every worker.
    #[test]
    fn memory_of_moments_falls_with_workers() {
        let blocks = 64;
        let held = |members| (0..members).map(|r| Cover::of_rank(blocks, members, r).len()).max().unwrap();
        assert_eq!([1, 2, 4, 8, 16].map(held), [64, 64, 32, 16, 8]);
        let state = state().with_cover(Cover::of_rank(2, 2, 0), &[]);
        assert_eq!(state.exp_avg.numel(), state.cover.elements());
    }

    #[test]
    fn slices_cover_what_moves_and_none_decays_in_part() {
        for (moved, decayed, len) in
            [(0..30, 16, 4), (3..29, 16, 4), (3..29, 16, 100), (17..18, 16, 4), (5..5, 16, 4)]
        {
            let slices: Vec<Range<usize>> = slices(&moved, decayed, len).collect();
            let covered: Vec<usize> = slices.iter().cloned().flatten().collect();
            assert_eq!(covered, moved.clone().collect::<Vec<_>>(), "{slices:?}");
            assert!(
                slices
                    .iter()
                    .all(|slice| slice.len() <= len && (slice.end <= decayed || slice.start >= decayed))
            );
        }
        let update = |device_slices: usize| {
            let mut state = state();
            let (g, all) = (gradient(&state, 0.5, 1), state.layout.len());
            let (_, scale) = state.measure(&options(), 1e-2, summed(&g, true), &(0..all));
            for slice in super::slices(&(0..all), state.layout.decayed_len(), device_slices) {
                let decays = slice.start < state.layout.decayed_len();
                let here = |flat: &Tensor| part(flat, slice.clone());
                let mut gradient = here(&g);
                gradient *= scale.unwrap().gradient;
                scale.unwrap().moments(
                    None,
                    &mut here(&state.exp_avg),
                    &mut here(&state.exp_avg_sq),
                    &gradient,
                );
                scale.unwrap().weights(
                    None,
                    &mut here(&state.weights),
                    &here(&state.exp_avg),
                    &here(&state.exp_avg_sq),
                    decays,
                );
            }
            state.weights = state.weights.copy();
            Vec::<f32>::try_from(&state.weights).unwrap().iter().map(|w| w.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(update(BLOCK), update(BLOCK * 256), "a GPU's slices have the bits of the CPU's");
    }

    /// What a GPU adds, in the order that is written for it: the plain loop has the same bits.
    #[test]
    fn rows_are_halved_as_it_is_written() {
        let g = gradient(&state(), 0.5, 1);
        let rows = g.view([-1, ROW]).square();
        let found = Vec::<f32>::try_from(&halved(&rows)).unwrap();
        let values = Vec::<f32>::try_from(&rows.reshape([-1])).unwrap();
        for (row, found) in values.chunks(ROW as usize).zip(&found) {
            let mut row = row.to_vec();
            while row.len() > 1 {
                let (left, right) = row.split_at(row.len() / 2);
                row = left.iter().zip(right).map(|(left, right)| left + right).collect();
            }
            assert_eq!(row[0].to_bits(), found.to_bits());
        }
        let blocks = block_square_sums(&g);
        let halved: Vec<f64> = found
            .chunks(BLOCK / ROW as usize)
            .map(|block| block.iter().map(|&row| f64::from(row)).sum())
            .collect();
        for (a, b) in blocks.iter().zip(&halved) {
            assert!((a - b).abs() < 1e-5 * a, "{a} against {b}");
        }
    }

    #[test]
    fn the_norm_does_not_depend_on_threads() {
        let state = state();
        let g = gradient(&state, 0.5, 1);
        let of = |threads| {
            tch::set_num_threads(threads);
            block_square_sums(&g)
        };
        let one = of(1);
        assert_eq!(of(2), one);
        assert_eq!(of(3), one);
    }
}

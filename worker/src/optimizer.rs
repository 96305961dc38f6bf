//! AdamW over the flat buffer, with the block-wise norm, the clip and the skip of a step that is not finite.
//!
//! ```text
//! g = sum / counted · min(1, clip / ‖g‖)
//! m = β1·m + (1−β1)·g          v = β2·v + (1−β2)·g²
//! w = w·(1 − lr·decay) − lr·(m / (1−β1^u)) / (√(v / (1−β2^u)) + ε)       u = updates so far, this one included
//! ```
//!
//! Every operation below is one IEEE operation an element (no fused multiply-add, whose use would differ between
//! the vector body and the scalar tail of a LibTorch kernel), so the result does not depend on how the buffer is
//! cut, by threads or by owners.

use std::ops::Range;

use anello_configs::{Optimizer, RunConfig};
use tch::{Device, Kind, Tensor};

use crate::params::{BLOCK, Layout};

/// Elements updated at a time: its six operands stay in a core's cache on a CPU.
const SLICE: usize = BLOCK;
/// Elements of one row of the norm: a row's sum is one output of LibTorch's reduction, added on one thread.
const ROW: i64 = 1024;

/// Weights and moments: all that an update changes.
#[derive(Debug)]
pub struct State {
    /// Where the parameters lie.
    pub layout: Layout,
    /// Weights, fp32, flat.
    pub weights: Tensor,
    /// First moments, fp32, flat.
    pub exp_avg: Tensor,
    /// Second moments, fp32, flat.
    pub exp_avg_sq: Tensor,
    /// Updates applied since the moments were last zero.
    pub updates: u64,
    /// Losses of the last steps of the stage, the oldest first: what a spike is measured by.
    pub losses: Vec<f64>,
}

/// What an update did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Global norm of the mean gradient, before the clip.
    pub grad_norm: f64,
    /// False when the norm was not finite: nothing was changed.
    pub applied: bool,
}

/// Sums of squares of a flat gradient by block, f64: rows of 1024 by LibTorch in fp32, rows of a block in order.
pub fn block_square_sums(gradient: &Tensor) -> Vec<f64> {
    let rows = gradient.view([-1, ROW]).square().sum_dim_intlist(1i64, false, Kind::Float);
    let rows = Vec::<f32>::try_from(&rows).expect("a vector of f32");
    rows.chunks(BLOCK / ROW as usize).map(|block| block.iter().map(|&row| f64::from(row)).sum()).collect()
}

impl State {
    /// Fresh weights, moments at zero.
    pub fn new(layout: Layout, weights: Tensor) -> Self {
        let zeros = || layout.zeros(weights.device());
        let (exp_avg, exp_avg_sq) = (zeros(), zeros());
        Self { layout, weights, exp_avg, exp_avg_sq, updates: 0, losses: Vec::new() }
    }

    /// The initial weights of the seed of `config`.
    pub fn of_seed(config: &RunConfig, device: Device) -> Self {
        let layout = Layout::new(&config.model, config.model.layers);
        let weights = layout.initial(config.seed, device);
        Self::new(layout, weights)
    }

    /// The same in memory of its own.
    pub fn copy(&self) -> Self {
        let Self { layout, weights, exp_avg, exp_avg_sq, updates, losses } = self;
        let (weights, exp_avg, exp_avg_sq) = (weights.copy(), exp_avg.copy(), exp_avg_sq.copy());
        let (layout, losses) = (layout.clone(), losses.clone());
        Self { layout, weights, exp_avg, exp_avg_sq, updates: *updates, losses }
    }

    /// Sets moments and their count to zero.
    pub fn reset_moments(&mut self) {
        let _ = self.exp_avg.zero_();
        let _ = self.exp_avg_sq.zero_();
        self.updates = 0;
    }

    /// The state over a stack of `layers` layers, weights and moments repeated (see [`Layout::upcycled`]).
    pub fn upcycled(&self, layout: Layout) -> Self {
        let spread = |flat: &Tensor| layout.upcycled(&self.layout, flat);
        let (weights, exp_avg, exp_avg_sq) =
            (spread(&self.weights), spread(&self.exp_avg), spread(&self.exp_avg_sq));
        Self { layout, weights, exp_avg, exp_avg_sq, updates: self.updates, losses: self.losses.clone() }
    }

    /// One update of the elements `moved` from the gradient's sum over `counted` tokens, which is overwritten; outside of
    /// their blocks it is not looked at. `finite_loss` false skips it.
    pub fn update(
        &mut self,
        options: &Optimizer,
        lr: f64,
        gradient: &Tensor,
        counted: u64,
        finite_loss: bool,
        moved: Range<usize>,
    ) -> Update {
        let blocks = moved.start / BLOCK * BLOCK..moved.end.next_multiple_of(BLOCK);
        let squares: f64 =
            block_square_sums(&gradient.narrow(0, blocks.start as i64, blocks.len() as i64)).iter().sum();
        let grad_norm = squares.sqrt() / counted.max(1) as f64;
        if !(grad_norm.is_finite() && finite_loss) {
            return Update { grad_norm, applied: false };
        }
        self.updates += 1;
        let clip = if grad_norm > options.clip { options.clip / grad_norm } else { 1.0 };
        let scale = clip / counted.max(1) as f64;
        let power = |beta: f64| 1.0 - libm::pow(beta, self.updates as f64);
        let (correction1, correction2) = (power(options.beta1), power(options.beta2));
        for start in blocks.step_by(SLICE) {
            let slice = start.max(moved.start)..(start + SLICE).min(moved.end);
            let part = |flat: &Tensor| flat.narrow(0, slice.start as i64, slice.len() as i64);
            let (mut w, mut m, mut v) = (part(&self.weights), part(&self.exp_avg), part(&self.exp_avg_sq));
            let mut g = part(gradient);
            g *= scale;
            m *= options.beta1;
            m += &g * (1.0 - options.beta1);
            v *= options.beta2;
            v += g.square() * (1.0 - options.beta2);
            let root = (&v / correction2).sqrt() + options.eps;
            if start < self.layout.decayed_len() {
                w *= 1.0 - lr * options.weight_decay;
            }
            w -= &m / root * (lr / correction1);
        }
        Update { grad_norm, applied: true }
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
            let got = state.update(&options(), lr, &g, counted, true, 0..n);
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
            let update = state.update(&options(), 1e-2, &g, 10, true, all);
            assert!(!update.applied && state.updates == 0);
            assert!(state.weights.equal(&before));
            assert_eq!(state.exp_avg.abs().max().double_value(&[]), 0.0);
        }
        let mut state = state();
        let g = gradient(&state, 0.5, 1);
        let all = 0..state.layout.len();
        assert!(!state.update(&options(), 1e-2, &g, 10, false, all).applied);
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

//! An update of all that moves, where all moments are.

use std::ops::Range;

use anello_configs::Optimizer;
use tch::{Device, Tensor};

use super::norm::square_sums;
use super::{Scale, State, blocks_of, part};
use crate::kernels::Kernels;
use crate::params::BLOCK;

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

/// Elements updated at a time, which no bit depends on: on a CPU the six operands stay in a core's cache, on a GPU a kernel is
/// long enough to hide its launch, and what one leaves for the next is 64 MiB.
pub(super) fn slice_len(device: Device) -> usize {
    match device {
        Device::Cpu => BLOCK,
        _ => BLOCK * 256,
    }
}

/// `moved` in slices that end at multiples of `len`, and at `decayed`: a slice decays or does not.
pub(super) fn slices(moved: &Range<usize>, decayed: usize, len: usize) -> impl Iterator<Item = Range<usize>> {
    let end = moved.end;
    let ends = move |start: usize| {
        let next = (start / len + 1) * len;
        if start < decayed { next.min(decayed) } else { next }
    };
    let starts = std::iter::successors(Some(moved.start), move |start| Some(ends(*start)));
    starts.take_while(move |start| *start < end).map(move |start| start..ends(start).min(end))
}

impl State {
    /// One update of the elements `moved`, where all moments are here.
    pub fn update(&mut self, options: &Optimizer, lr: f64, sum: Summed<'_>, moved: Range<usize>) -> Update {
        assert!(self.cover.is_all(), "all moments are here");
        let blocks = blocks_of(&moved);
        match sum.fresh {
            true => self.reset_moments(blocks),
            false => self.make_room(blocks),
        }
        let (update, scale) = self.measure(options, lr, sum, &moved);
        let Some(scale) = scale else { return update };
        self.settle();
        self.updates += 1;
        let decayed = self.layout.decayed_len();
        // Where the moments of the first of all elements would lie.
        let before = self.moved.start * BLOCK;
        let moments = |slice: &Range<usize>| {
            let here = slice.start - before..slice.end - before;
            [&self.exp_avg, &self.exp_avg_sq].map(|flat| part(flat, here.clone()))
        };
        if let Some(kernels) = sum.kernels {
            let [w, g] = [&self.weights, sum.gradient].map(|flat| part(flat, moved.clone()));
            let [m, v] = moments(&moved);
            let decayed = decayed.clamp(moved.start, moved.end) - moved.start;
            kernels.adamw_update(&scale, [&w, &m, &v], &g, decayed);
            return update;
        }
        for slice in slices(&moved, decayed, slice_len(self.weights.device())) {
            let [mut w, mut g] = [&self.weights, sum.gradient].map(|flat| part(flat, slice.clone()));
            let [mut m, mut v] = moments(&slice);
            g *= scale.gradient;
            scale.moments(None, &mut m, &mut v, &g);
            scale.weights(None, &mut w, &m, &v, slice.start < decayed);
        }
        update
    }

    /// What an update comes to, and what it does to all elements alike; absent: nothing.
    pub(super) fn measure(
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
}

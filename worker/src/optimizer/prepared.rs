//! An update in two halves, where the moments are shared out.

use std::ops::Range;

use anello_configs::Optimizer;
use tch::{Kind, Tensor};

use super::{Scale, State, Summed, Update, blocks_of, part};
use crate::cover::Cover;
use crate::kernels::Kernels;
use crate::params::BLOCK;

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
    /// The scaled gradient of those of the blocks of `cover` that move, one after the other.
    gradient: Tensor,
    /// The buffer that it lies in, when one was given for it.
    pub room: Option<Tensor>,
    kernels: Option<Kernels>,
}

/// The elements of a block that move.
fn moved_of(block: usize, moved: &Range<usize>) -> Range<usize> {
    (block * BLOCK).max(moved.start)..((block + 1) * BLOCK).min(moved.end)
}

impl State {
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
        let laid = self.cover.within(&blocks);
        let len = if scale.is_some() { laid.elements() } else { 0 };
        let kept = match &room {
            Some(room) => part(room, 0..len).zero_(),
            None => Tensor::zeros([len as i64], (Kind::Float, gradient.device())),
        };
        if let Some(scale) = &scale {
            for (block, there) in laid.ranges().iter().cloned().flatten().zip(0..) {
                let slice = moved_of(block, &moved);
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
            let slice = moved_of(block, &moved);
            let within = slice.start - block * BLOCK..slice.end - block * BLOCK;
            let is_zero = fresh || !self.moved.contains(&block);
            let [mut m, mut v] = match is_zero {
                true => {
                    [0, 1].map(|_| Tensor::zeros([within.len() as i64], (Kind::Float, gradient.device())))
                }
                false => self.moments(block..block + 1).map(|flat| part(&flat, within.clone()).copy()),
            };
            let there = laid.place(block..block + 1).expect("own moments are here").start * BLOCK;
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
        let blocks = blocks_of(moved);
        match fresh {
            true => self.reset_moments(blocks.clone()),
            false => self.make_room(blocks.clone()),
        }
        self.settle();
        self.losses.clone_from(losses);
        if let Some(scale) = scale {
            self.updates += 1;
            let laid = cover.within(&blocks);
            for (block, there) in laid.ranges().iter().cloned().flatten().zip(0..) {
                let slice = moved_of(block, moved);
                let within = slice.start - block * BLOCK..slice.end - block * BLOCK;
                let [mut m, mut v] = self.moments(block..block + 1).map(|flat| part(&flat, within.clone()));
                let g = part(gradient, there * BLOCK + within.start..there * BLOCK + within.end);
                scale.moments(kernels.as_ref(), &mut m, &mut v, &g);
            }
        }
        if let Some(weights) = weights {
            let elements = blocks.start * BLOCK..blocks.end * BLOCK;
            part(&self.weights, elements.clone()).copy_(&part(weights, elements));
        }
    }
}

//! Forward through the loop, and backward segment by segment.
//!
//! A segment is one layer at one loop step. Each has a graph of its own, from a detached input to its output; the
//! backward walks the segments from the last to the first, handing the gradient of an input to the segment before.
//! What is kept between the two passes is the only difference between the modes, so their bits are the same:
//!
//! ```text
//! none   graph of every segment                                   no recomputation
//! layer  input of every segment (L·T hidden states)               one segment's graph at a time
//! loop   input of every loop step (T hidden states)               one loop step's graphs at a time
//! ```
//!
//! Inputs may wait in the host's memory meanwhile (`compute.offload`): each is called back one segment ahead.
//!
//! Gradients of the shared weights add up over loop steps in the flat fp32 buffer, last loop step first, whatever
//! the format of the matrices.

use anello_configs::{Compute, Recompute};
use tch::Tensor;

use crate::model::{Context, Model};
use crate::shelf::{Away, Moving, Shelf};

/// What the forward kept of a segment.
#[derive(Debug)]
enum Kept {
    Nothing,
    Input(Tensor),
    /// An input that is on the host.
    Away(Away),
    /// One that is on its way back.
    Coming(Moving),
    Graph(Segment),
}

/// A segment's graph: a leaf, and what follows from it.
#[derive(Debug)]
struct Segment {
    input: Tensor,
    output: Tensor,
}

/// The record of a forward pass, for one backward pass.
#[derive(Debug)]
pub struct Tape<'a> {
    model: &'a Model,
    context: &'a Context,
    /// Where inputs wait that are not kept where they are.
    shelf: Option<Shelf>,
    /// `[loop step][layer]`.
    kept: Vec<Vec<Kept>>,
}

impl<'a> Tape<'a> {
    /// Runs `loops` loop steps from `embedded` (`[n, d]`); returns h(1..=T), each `[n, d]` and detached.
    pub fn forward(
        model: &'a Model,
        context: &'a Context,
        embedded: Tensor,
        loops: u32,
        compute: &Compute,
    ) -> (Vec<Tensor>, Self) {
        let recompute = compute.recompute;
        let shelf = (compute.offload && recompute != Recompute::None).then(|| Shelf::new(embedded.device()));
        let mut tape = Self { model, context, shelf, kept: Vec::new() };
        let mut hidden = Vec::new();
        let mut h = embedded.detach();
        for _ in 0..loops {
            let mut kept = Vec::new();
            for layer in 0..model.layers.len() {
                match recompute {
                    Recompute::None => {
                        let segment = tape.run(layer, &h);
                        h = segment.output.detach();
                        kept.push(Kept::Graph(segment));
                    }
                    Recompute::Layer | Recompute::Loop => {
                        let output = tch::no_grad(|| model.layer_nd(layer, &h, context));
                        let keep = recompute == Recompute::Layer || layer == 0;
                        kept.push(match &mut tape.shelf {
                            _ if !keep => Kept::Nothing,
                            Some(shelf) => Kept::Away(shelf.put(h)),
                            None => Kept::Input(h),
                        });
                        h = output;
                    }
                }
            }
            tape.kept.push(kept);
            hidden.push(h.shallow_clone());
        }
        (hidden, tape)
    }

    fn run(&self, layer: usize, input: &Tensor) -> Segment {
        let input = input.detach().set_requires_grad(true);
        let output = self.model.layer_nd(layer, &input, self.context);
        Segment { input, output }
    }

    /// Backward from the gradients of h(1..=T): adds the gradient of the stack's weights to the flat `gradient` and
    /// returns that of `embedded`. Calls `walked` with each layer that it is through with: at the first loop step, which
    /// is the last to be walked, that layer's gradient is whole.
    pub fn backward(
        mut self,
        of_hidden: Vec<Tensor>,
        gradient: &Tensor,
        walked: &mut dyn FnMut(usize),
    ) -> Tensor {
        self.shelf.iter_mut().for_each(Shelf::settle);
        let mut upstream: Option<Tensor> = None;
        for of_h in of_hidden.into_iter().rev() {
            let mut g = match upstream {
                Some(upstream) => upstream + of_h,
                None => of_h,
            };
            let mut kept = self.kept.pop().expect("one record for each loop step");
            if matches!(kept.get(1), Some(Kept::Nothing)) {
                self.replay(&mut kept);
            }
            while let Some(next) = kept.pop() {
                let (loop_step, layer) = (self.kept.len() + 1, kept.len());
                let span = tracing::trace_span!("backward", loop_step, layer).entered();
                self.call_before(&mut kept);
                let segment = match next {
                    Kept::Graph(segment) => segment,
                    input => self.run(layer, &self.input(input)),
                };
                g = self.segment_backward(layer, segment, &g, gradient);
                drop(span);
                if self.kept.is_empty() {
                    walked(layer);
                }
            }
            upstream = Some(g);
        }
        upstream.expect("at least one loop step")
    }

    /// Starts to bring back what is needed after this segment, of which those before it in its loop step are left.
    fn call_before(&mut self, rest: &mut [Kept]) {
        let Some(shelf) = &self.shelf else { return };
        let earlier = self.kept.last_mut().into_iter().flatten().rev();
        let mut kept = rest.iter_mut().rev().take(1).chain(earlier);
        let Some(next) = kept.find(|kept| !matches!(kept, Kept::Nothing)) else { return };
        if let Kept::Away(_) = next {
            let Kept::Away(away) = std::mem::replace(next, Kept::Nothing) else { unreachable!("it is") };
            *next = Kept::Coming(shelf.call(away));
        }
    }

    /// A segment's input, from wherever it was kept.
    fn input(&self, kept: Kept) -> Tensor {
        match (kept, &self.shelf) {
            (Kept::Input(input), _) => input,
            (Kept::Coming(moving), _) => moving.here(),
            (Kept::Away(away), Some(shelf)) => shelf.call(away).here(),
            _ => unreachable!("a segment keeps its input, or is replayed before it is used"),
        }
    }

    /// Rebuilds the graphs of a loop step from its input.
    fn replay(&self, kept: &mut [Kept]) {
        let mut h = self.input(std::mem::replace(&mut kept[0], Kept::Nothing)).detach();
        for (layer, kept) in kept.iter_mut().enumerate() {
            let segment = self.run(layer, &h);
            h = segment.output.detach();
            *kept = Kept::Graph(segment);
        }
    }

    fn segment_backward(&self, layer: usize, segment: Segment, g: &Tensor, gradient: &Tensor) -> Tensor {
        let leaves = self.model.layers[layer].leaves();
        let last = (layer + 1 == self.model.layers.len()).then_some(&self.model.final_norm);
        let leaves: Vec<_> = leaves.into_iter().chain(last).collect();
        let inputs: Vec<&Tensor> =
            [&segment.input].into_iter().chain(leaves.iter().map(|leaf| leaf.used())).collect();
        // The derivative of Σ output·g by the output is g: a vector-Jacobian product with what tch offers.
        let product = (&segment.output * g).sum(self.model.wide());
        let mut gradients = Tensor::run_backward(&[product], &inputs, false, false);
        for (leaf, of_leaf) in leaves.iter().zip(gradients.drain(1..)) {
            leaf.accumulate(gradient, &of_leaf);
        }
        gradients.remove(0)
    }
}

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

use crate::ffi::torch;
use crate::model::{Context, Model, Products};
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
    products: Option<Products>,
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
        let mut products = self.model.products();
        let output = self.model.layer_with(layer, &input, self.context, &mut products);
        Segment { input, output, products }
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
        let of_layer = &self.model.layers[layer];
        let leaves = match segment.products {
            Some(_) => of_layer.norms().to_vec(),
            None => of_layer.leaves().to_vec(),
        };
        let last = (layer + 1 == self.model.layers.len()).then_some(&self.model.final_norm);
        let leaves: Vec<_> = leaves.into_iter().chain(last).collect();
        let outputs = segment.products.iter().flat_map(|products| &products.outputs);
        let inputs: Vec<&Tensor> = [&segment.input]
            .into_iter()
            .chain(leaves.iter().map(|leaf| leaf.used()))
            .chain(outputs)
            .collect();
        let mut gradients = torch::vjp(&segment.output, g, &inputs).expect("a segment has a graph");
        let of_outputs = gradients.split_off(1 + leaves.len());
        for (leaf, of_leaf) in leaves.iter().zip(gradients.drain(1..)) {
            leaf.accumulate(gradient, &of_leaf);
        }
        if let Some(products) = &segment.products {
            products.accumulate(of_layer, &of_outputs, gradient);
        }
        gradients.remove(0)
    }
}

#[cfg(test)]
mod tests {
    use anello_configs::{Dtype, Mask, RunConfig};
    use anello_dataloader::MicroBatch;
    use tch::{Device, Kind};

    use super::*;
    use crate::model::Rotary;
    use crate::params::Layout;

    /// The gradients of weights from the products that they are in are those of LibTorch's own walk.
    #[test]
    fn weights_have_their_gradients_from_products() {
        let text = "name = \"t\"\nseed = 1\nlanes = 1\nstages = [\"s\"]\n[model]\nlayers = 2\nhidden = 32\nheads = 4\n\
                    kv_heads = 2\nffn = 48\nvocab = 61\ninit_std = 0.2\n[data]\nsources.m.url = \"m\"\n[stage.s]\ntokens = 16\n\
                    sequence = 16\nbatch = 16\nlr = 1e-2\nloops = 2\nbeta = 0.1\n";
        let config = RunConfig::parse("t.toml", text).unwrap();
        let layout = Layout::new(&config.model, 2);
        let flat = layout.initial(5, Device::Cpu);
        let batch = MicroBatch {
            sequences: 1,
            length: 16,
            input_ids: (0..16).map(|at| at * 7 % 61).collect(),
            targets: (1..17).map(|at| at * 7 % 61).collect(),
            positions: (0..7).chain(0..9).collect(),
            segment_starts: Vec::from([0, 7]),
            counted: 16,
        };
        let context =
            Context::new(&batch, &Rotary::new(10_000.0, 8, 16, Device::Cpu), Kind::Float, Mask::Document);
        let gradients = |by_products: bool| {
            let mut model = Model::new(&config.model, Dtype::Fp32, &layout, &flat);
            model.by_products = by_products;
            let embedded = tch::no_grad(|| model.embed_nd(&Tensor::from_slice(&batch.input_ids)));
            let of_hidden = (1..=2).map(|t| (&embedded * f64::from(t)).sin()).collect();
            let (_, tape) = Tape::forward(&model, &context, embedded, 2, &config.compute);
            let gradient = layout.zeros(Device::Cpu);
            let of_embedded = tape.backward(of_hidden, &gradient, &mut |_| {});
            (gradient, of_embedded)
        };
        let (right, of_embedded) = gradients(false);
        let (found, of_embedded_found) = gradients(true);
        assert!(of_embedded.equal(&of_embedded_found), "the way back is the same");
        for entry in layout.entries() {
            let of = |flat: &Tensor| flat.narrow(0, entry.offset as i64, entry.len() as i64);
            let largest = of(&right).abs().max().double_value(&[]);
            let off = (of(&found) - of(&right)).abs().max().double_value(&[]);
            assert!(off <= 1e-5 * largest, "{}: {off} of {largest}", entry.name);
            let outside = entry.name.contains("embed")
                || entry.name.contains("lm_head")
                || entry.name.contains("gate.");
            assert_eq!(largest > 0.0, !outside, "{}", entry.name);
        }
    }
}

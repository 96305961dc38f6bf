//! Micro-batches whose work is captured once, as CUDA graphs, and replayed (`compute.graphs`): a call or two a layer, where the host
//! would otherwise make one a kernel, and be waited for by a GPU whose kernels are short.
//!
//! What is captured is of fixed shapes, fixed numbers of the host and fixed memory. So the first micro-batch of a form is computed
//! as it is without graphs, which sets up whatever is set up once; the second is captured; from there on inputs are copied
//! to where the graphs read them, and these are replayed, with a stop wherever the walk has one. Lanes are added up in a
//! buffer of the graphs' own, and what is whole of it is copied from there. The kernels are the same, and so are the bits.

use anello_configs::Trains;
use tch::{Device, Tensor};

use super::pass::{Inputs, Pass, Walked, walk};
use crate::ffi::graph::{Capturer, Graph};
use crate::model::Model;
use crate::objective::{Figures, Goal};

/// A GPU that fails is the end of the thread that uses it, as it is in every tensor operation; here there is something to be done.
const FAILED: &str = "the GPU captures work and replays it (leave compute.graphs out where it does not)";

/// What the work on a micro-batch depends on, beside the numbers in tensors.
#[derive(Debug, PartialEq)]
struct Form {
    loops: u32,
    goal: Goal,
    shapes: Vec<Vec<i64>>,
    documents: usize,
}

impl Form {
    fn of(inputs: &Inputs, model: &Model, pass: Pass<'_>) -> Option<Self> {
        let (tensors, documents) = inputs.fixed(model)?;
        let shapes = tensors.iter().map(|tensor| tensor.size()).collect();
        Some(Self { loops: pass.loops, goal: pass.goal, shapes, documents })
    }
}

/// The work on micro-batches of one form.
#[derive(Debug)]
struct Captured {
    form: Form,
    inputs: Inputs,
    /// Up to each stop, and what comes after the last one.
    graphs: Vec<Graph>,
    stops: Vec<Walked<()>>,
    figures: Figures,
}

impl Captured {
    fn new(
        capturer: &Capturer,
        form: Form,
        inputs: Inputs,
        model: &Model,
        pass: Pass<'_>,
        gradient: &Tensor,
    ) -> Self {
        let captured = capturer.capture(|capture| {
            let mut stops = Vec::new();
            let figures = walk(model, &inputs, pass, gradient, &mut |walked| {
                stops.push(walked.map(|_| ()));
                match (walked, pass.goal.trains) {
                    // Nothing comes after it.
                    (Walked::Losses(_), Trains::Gate) => capture.end(),
                    _ => capture.cut(),
                }
            });
            (stops, figures)
        });
        let (graphs, (stops, figures)) = captured.expect(FAILED);
        tracing::debug!(graphs = graphs.len(), "captured a micro-batch");
        Self { form, inputs, graphs, stops, figures }
    }

    /// Computes the micro-batch `inputs`.
    fn walk(&self, inputs: &Inputs, model: &Model, walked: &mut dyn FnMut(Walked<&Figures>)) -> Figures {
        let of = |inputs| Inputs::fixed(inputs, model).expect("inputs of this form have fixed shapes").0;
        for (to, from) in of(&self.inputs).into_iter().zip(of(inputs)) {
            to.shallow_clone().copy_(from);
        }
        let (mut figures, mut stops) = (None, self.stops.iter());
        for graph in &self.graphs {
            let span = tracing::trace_span!("replay").entered();
            graph.replay().expect(FAILED);
            drop(span);
            if let Some(stop) = stops.next() {
                // Copied, since the next replay writes over them.
                walked(stop.map(|()| &*figures.insert(self.figures.copy())));
            }
        }
        figures.expect("a walk comes to its losses")
    }
}

/// What an engine has captured.
#[derive(Debug)]
pub(super) struct Graphs {
    device: Device,
    capturer: Option<Capturer>,
    /// What the graphs add to.
    gradient: Option<Tensor>,
    /// The form of the last micro-batch, where that was not captured.
    seen: Option<Form>,
    captured: Option<Captured>,
}

impl Graphs {
    /// Nothing yet, of a GPU.
    pub fn new(device: Device) -> Self {
        Self { device, capturer: None, gradient: None, seen: None, captured: None }
    }

    /// Lets go of what was captured, since the model is another one.
    pub fn forget(&mut self) {
        (self.gradient, self.seen, self.captured) = (None, None, None);
    }

    /// What a lane is added up in, zeros: as large as `gradient`.
    pub fn lane(&mut self, gradient: &Tensor) -> Tensor {
        self.gradient.get_or_insert_with(|| gradient.empty_like()).zero_()
    }

    /// [`walk`], where the same work comes again and again by replays. `gradient` is that of [`Graphs::lane`].
    pub fn walk(
        &mut self,
        inputs: &Inputs,
        model: &Model,
        pass: Pass<'_>,
        gradient: &Tensor,
        walked: &mut dyn FnMut(Walked<&Figures>),
    ) -> Figures {
        let Some(form) = Form::of(inputs, model, pass) else {
            self.seen = None;
            return walk(model, inputs, pass, gradient, walked);
        };
        if let Some(captured) = self.captured.as_ref().filter(|captured| captured.form == form) {
            self.seen = None;
            return captured.walk(inputs, model, walked);
        }
        if self.seen.as_ref() != Some(&form) {
            self.seen = Some(form);
            return walk(model, inputs, pass, gradient, walked);
        }
        // Its memory first.
        self.captured = None;
        let capturer = match &mut self.capturer {
            Some(capturer) => capturer,
            none => none.insert(Capturer::of(self.device).expect(FAILED)),
        };
        let captured = Captured::new(capturer, form, inputs.copy(), model, pass, gradient);
        self.captured.insert(captured).walk(inputs, model, walked)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use anello_configs::random::Stream;
    use anello_configs::{Mask, RunConfig, Schedule};
    use anello_dataloader::MicroBatch;

    use super::*;
    use crate::account::weights_digest;
    use crate::engine::{Engine, Growing, Outcome};
    use crate::ffi::graph::host;
    use crate::kernels::Kernels;
    use crate::optimizer::State;
    use crate::params::BLOCK;

    /// Steps of a stage, of two lanes of two micro-batches each.
    const STEPS: u64 = 3;
    const WALKS: u64 = STEPS * 2 * 2;

    fn config(recompute: &str) -> RunConfig {
        let stage = |name: &str, more: &str| {
            format!(
                "[stage.{name}]\ntokens = {}\nsequence = 16\nbatch = 64\nmicro_batch = 1\nlr = 1e-2\nloops = 2\nbeta = 0.1\n{more}\n",
                64 * STEPS
            )
        };
        let text = [
            "name = \"t\"\nseed = 1\nlanes = 2\nstages = [\"document\", \"causal\", \"larger\", \"sft\", \"gate\"]\n[model]\nlayers = 2\n\
             hidden = 32\nheads = 4\nffn = 48\nvocab = 61\ninit_std = 0.2\n[data]\nsources.m.url = \"m\"\n[compute]\n\
             loss_chunk_tokens = 6\n",
            &format!("recompute = \"{recompute}\"\n"),
            &stage("document", ""),
            &stage("causal", "mask = \"causal\""),
            &stage("larger", "mask = \"causal\"\nupcycle.layers = 4"),
            &stage("sft", "mask = \"causal\"\nloss = \"sft\""),
            &stage("gate", "loss = \"gate\"\ntrains = \"gate\""),
        ];
        RunConfig::parse("t.toml", &text.concat()).unwrap()
    }

    /// Sixteen tokens, in documents whose lengths follow from `seed` too.
    fn batch(mask: Mask, seed: u64) -> MicroBatch {
        let stream = Stream::new(seed, "tokens", &[]);
        let ids: Vec<i64> = (0..17).map(|at| stream.below_at(at, 61) as i64).collect();
        let cut = match mask {
            Mask::Document => 1 + stream.below_at(17, 15) as i32,
            Mask::Causal => 16,
        };
        let is_last = |at: usize| at == 15 || at as i32 + 1 == cut;
        let targets: Vec<i64> = (0..16).map(|at| if is_last(at) { -100 } else { ids[at + 1] }).collect();
        MicroBatch {
            sequences: 1,
            length: 16,
            input_ids: ids[..16].to_vec(),
            counted: targets.iter().filter(|&&target| target >= 0).count() as u64,
            targets,
            positions: (0..cut).chain(0..16 - cut).collect(),
            segment_starts: [0, cut as u32].into_iter().filter(|&start| start < 16).collect(),
        }
    }

    /// What a run came to.
    #[derive(Debug, Default)]
    struct Trained {
        /// Of each step: its outcome, the digest of the weights after it, the gradient of its last lane, and the blocks that were told to
        /// be whole.
        steps: Vec<(Outcome, String, Vec<f32>, Vec<usize>)>,
        /// Graphs that were replayed in each stage.
        replays: Vec<u64>,
    }

    /// All steps of `config`, the last lane of each as a ring computes it.
    fn trained(config: &RunConfig, graphs: Option<Graphs>) -> Trained {
        let schedule = Schedule::new(config);
        let mut engine = Engine::with_kernels(config, State::of_seed(config, Device::Cpu), None::<Kernels>);
        engine.graphs = graphs;
        let mut trained = Trained::default();
        for step in 0..schedule.total_steps() {
            let plan = schedule.at(step).unwrap();
            let before = host::replays();
            engine.enter(&plan);
            let of = |lane: u64| [0, 1].map(|at| batch(plan.stage.mask, step * 4 + lane * 2 + at));
            engine.lane(plan.stage, 0, &of(0));
            let (mut partials, mut told, mut lane) = (Vec::new(), Vec::new(), Vec::new());
            let rows = |flat: &Tensor, blocks: &Range<usize>| {
                flat.view([-1, BLOCK as i64]).narrow(0, blocks.start as i64, blocks.len() as i64)
            };
            engine.last_lane(plan.stage, 1, &of(1), &mut |growing| match growing {
                Growing::Sums(_, buffers) => partials = buffers,
                Growing::Whole(blocks) => told.push((rows(&partials[0], &blocks).copy(), blocks)),
                Growing::Lane(gradient) => lane = Vec::try_from(&*gradient).unwrap(),
            });
            for (then, blocks) in &told {
                assert!(then.equal(&rows(&partials[0], blocks)), "a block changed after it was told");
            }
            let told = told.into_iter().flat_map(|(_, blocks)| blocks).collect();
            let outcome = engine.finish(&plan);
            trained.steps.push((outcome, weights_digest(engine.state()), lane, told));
            if plan.first_of_stage {
                trained.replays.push(0);
            }
            *trained.replays.last_mut().unwrap() += host::replays() - before;
        }
        trained
    }

    /// Weights, losses and what is told are those without, through stages that change the mask, the stack, the objective and what
    /// moves; all but the first micro-batch of each is replayed, with a graph up to each stop.
    #[test]
    fn training_by_graphs_has_the_bits_of_training_without() {
        for recompute in ["none", "layer", "loop"] {
            let config = config(recompute);
            let graphs = Graphs { capturer: Some(host::capturer()), ..Graphs::new(Device::Cpu) };
            let (with, without) = (trained(&config, Some(graphs)), trained(&config, None));
            assert_eq!(with.steps.len() as u64, 5 * STEPS);
            for (step, (with, without)) in with.steps.iter().zip(&without.steps).enumerate() {
                assert!(with == without, "{recompute}, step {step}: {:?} against {:?}", with.0, without.0);
            }
            let later = WALKS - 1;
            assert_eq!(with.replays, [later * 5, later * 5, later * 7, later * 7, later * 2]);
            assert_eq!(without.replays, [0; 5]);
        }
    }

    /// Documents of other lengths are other work where attention is called for each: nothing is captured, and nothing is wrong.
    #[test]
    fn work_that_is_never_twice_the_same_is_not_captured() {
        let config = config("layer");
        let mut engine = Engine::with_kernels(&config, State::of_seed(&config, Device::Cpu), None);
        engine.graphs = Some(Graphs { capturer: Some(host::capturer()), ..Graphs::new(Device::Cpu) });
        let schedule = Schedule::new(&config);
        // By the causal mask segments are not few and short, so that each has a call of its own.
        let plan = schedule.at(STEPS).unwrap();
        engine.enter(&plan);
        let before = host::replays();
        for seed in 0..4 {
            let (_, sums) = engine.lane_gradient(plan.stage, &[batch(Mask::Document, seed)]);
            assert!(sums.loss.is_finite());
        }
        assert_eq!(host::replays(), before);
    }
}

//! What a run will take: parameters, arithmetic, memory and time, before a single token is read (LOOPLM §8).
//!
//! D hidden size, F feed-forward size, L layers, V vocabulary, T loop steps, S sequence length; KV is D times the share
//! of key/value heads. A layer's matrices hold 2D² + 2·D·KV (attention) and 3·D·F (feed-forward) weights.

mod gpu;
mod render;
mod units;

pub use gpu::{Gpu, UnknownGpu};

use crate::lanes::{balanced, gradients_held};
use crate::run::*;
use crate::schedule::{Schedule, StageSpan};
use crate::timings::Timings;

/// The machines to plan for: one worker for each GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cluster {
    /// Their kind.
    pub gpu: Gpu,
    /// How many.
    pub count: u32,
    /// Share of the GPU's peak that the model's own arithmetic reaches, above 0 to 1 (MFU: what is recomputed does not
    /// count as reached).
    pub utilisation: f64,
}

/// What a run will take on a cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Name of the run.
    pub name: String,
    /// Where it is to run.
    pub cluster: Cluster,
    /// Format of the matrices.
    pub dtype: Dtype,
    /// What the forward keeps.
    pub recompute: Recompute,
    /// Whether what is kept waits on the host.
    pub offload: bool,
    /// The ring's times.
    pub timings: Timings,
    /// Lanes of the run.
    pub lanes: u32,
    /// Lanes of the worker that serves most of them.
    pub lanes_per_worker: u32,
    /// How many workers have the moments of a block.
    pub state_copies: StateCopies,
    /// The stages, in order.
    pub stages: Vec<StageEstimate>,
}

/// What a stage will take.
#[derive(Clone, Debug, PartialEq)]
pub struct StageEstimate {
    /// The stage.
    pub stage: Stage,
    /// Where it lies in the run.
    pub span: StageSpan,
    /// Parameters during it.
    pub parameters: Parameters,
    /// FLOPs of a token.
    pub flops: TokenFlops,
    /// Memory of a worker.
    pub memory: Memory,
    /// Wall clock, seconds.
    pub seconds: f64,
    /// GPU-hours of the whole cluster.
    pub gpu_hours: f64,
}

/// Parameters by part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// V·D.
    pub embedding: u64,
    /// L·(2D² + 2·D·KV).
    pub attention: u64,
    /// L·3·D·F.
    pub mlp: u64,
    /// (4L + 1)·D.
    pub norms: u64,
    /// D + 1.
    pub gate: u64,
    /// V·D, not tied to the embedding.
    pub lm_head: u64,
}

impl Parameters {
    /// Those of a model with `layers` layers.
    pub fn new(model: &Model, layers: u32) -> Self {
        let [l, d, f, v] = [layers, model.hidden, model.ffn, model.vocab].map(u64::from);
        let kv = key_value_size(model);
        Self {
            embedding: v * d,
            attention: l * (2 * d * d + 2 * d * kv),
            mlp: l * 3 * d * f,
            norms: (4 * l + 1) * d,
            gate: d + 1,
            lm_head: v * d,
        }
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        let Self { embedding, attention, mlp, norms, gate, lm_head } = *self;
        embedding + attention + mlp + norms + gate + lm_head
    }
}

/// FLOPs of one token, forward and backward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenFlops {
    /// Of the model: 6·(L·(2D² + 2·D·KV + 3DF) + V·D)·T + 6·L·T·D·S, where the last term is attention over the causal half
    /// of the sequence (masked documents need less). A stage that trains the gate alone runs forward only: a third of
    /// it. A stage with loss `sft` needs the logits of one loop step alone.
    pub model: f64,
    /// Of the stack's second forward, when activations are recomputed: a third of the stack's share of `model`.
    pub recomputed: f64,
}

impl TokenFlops {
    /// Those of a token of `stage` with `layers` layers.
    pub fn new(model: &Model, layers: u32, stage: &Stage, recompute: Recompute) -> Self {
        let parameters = Parameters::new(model, layers);
        let [l, d, s, t] = [layers, model.hidden, stage.sequence, stage.loops].map(f64::from);
        let matrices = (parameters.attention + parameters.mlp) as f64;
        let logits_loops = if stage.loss == Loss::Sft { 1.0 } else { t };
        // 2 for the forward (a multiplication and an addition), 4 more for the two products of the backward.
        let stack_forward = t * (2.0 * matrices + 2.0 * l * d * s);
        let logits_forward = logits_loops * 2.0 * parameters.lm_head as f64;
        let backward = stage.trains == Trains::All;
        let passes = if backward { 3.0 } else { 1.0 };
        let again = if backward && recompute != Recompute::None { 1.0 } else { 0.0 };
        Self { model: passes * (stack_forward + logits_forward), recomputed: again * stack_forward }
    }

    /// What the device computes.
    pub fn total(&self) -> f64 {
        self.model + self.recomputed
    }
}

/// Memory of a worker that serves most lanes, by part, bytes. Without the device's own context, NCCL's own
/// buffers and what the allocator wastes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// bf16 copies of the weights, 2 bytes a parameter; none in fp32.
    pub weights: u64,
    /// fp32 weights, 4 bytes a parameter.
    pub master: u64,
    /// Two fp32 moments, 8 bytes a parameter. With `ring.state_copies = 2` and more than two workers those of two workers'
    /// shares, 12 bytes: the gradient of these is kept too until all have the step. Those of what a stage freezes are let go with
    /// its first step, and not there at all when it is the run's first: then there are those of the gate alone, a block or two.
    pub moments: u64,
    /// fp32 gradient of the lane at work, 4 bytes a parameter; with `compute.graphs` another, which graphs add to.
    pub gradient: u64,
    /// Partial sums of the fold: more fp32 gradients ([`gradients_held`]).
    pub fold: u64,
    /// In a ring of several: the sum of all gradients, 4 bytes a parameter. By NCCL also what others have of the own share, a part
    /// of each, until it is added.
    pub sum: u64,
    /// Layer inputs (`layer`: L·T hidden states a token) or loop inputs (`loop`: T) that are kept for recomputation. With
    /// `compute.offload` three of them at most: two on their way to the host, or one back and the one in use.
    pub inputs: u64,
    /// Of `compute.offload`, in the host's pinned memory and no part of the total: all of them.
    pub on_host: u64,
    /// Activations inside layers that are held at a time: of one layer (`layer`), one loop step (`loop`), or all (`none`); and the
    /// gradients of those of one layer.
    pub activations: u64,
    /// h(T), and the gradients of h(1..T).
    pub hidden: u64,
    /// Logits of one chunk at one loop step and their log-softmax, which becomes the gradient in place: 8 bytes each,
    /// in bf16 as well (2 for the logits, 4 for the log-softmax, 2 for the gradient's copy). Other loop steps wait. With
    /// `compute.fused` the logits alone, 4 or 2 bytes each, which become the gradient.
    pub logits: u64,
}

impl Memory {
    /// That of one of `workers` workers, which holds so many gradients at most, in `stage` with `layers` layers.
    pub fn new(config: &RunConfig, layers: u32, stage: &Stage, gradients: u32, workers: u32) -> Self {
        let model = &config.model;
        let parameters = Parameters::new(model, layers).total();
        let element = match config.compute.dtype {
            Dtype::Fp32 => 4,
            Dtype::Bf16 => 2,
        };
        let tokens = u64::from(stage.sequence) * u64::from(stage.micro_batch);
        let [l, d, f, t] = [layers, model.hidden, model.ffn, stage.loops].map(u64::from);
        let hidden_state = product([tokens, d, element]);
        // Of one layer, a token. Attention keeps no S × S matrix.
        let kv = key_value_size(model);
        let of_token = if config.compute.fused {
            // What kernels are given and give: the input of each product, queries and keys before and after RoPE, values, the
            // output of attention and of both sub-layers, both sums (9 D, 3 KV), gate, up and their product (3 F).
            9 * d + 3 * kv + 3 * f
        } else {
            // Both sub-layers' inputs, norms, projections and sums (11 D), keys and values (2 KV), and gate, up, silu and
            // product (4 F). In bf16 each of the four norms keeps its input, and that over its root, in fp32 too (16 D).
            let wide = if element == 2 { 16 * d } else { 0 };
            11 * d + wide + 2 * kv + 4 * f
        };
        let in_layer = product([tokens, of_token, element]);
        // Gradients of one layer on its way back: of the outputs of its products (queries, keys, values, both sub-layers, gate, up:
        // 3 D, 2 KV, 2 F), of the product of gate and up (F), and of its output and input (2 D).
        let back = product([tokens, 5 * d + 2 * kv + 3 * f, element]);
        let (inputs, activations) = match (stage.trains, config.compute.recompute) {
            (Trains::Gate, _) => (0, in_layer),
            (Trains::All, Recompute::None) => (0, product([l, t, in_layer]).saturating_add(back)),
            (Trains::All, Recompute::Layer) => (product([l, t, hidden_state]), in_layer.saturating_add(back)),
            (Trains::All, Recompute::Loop) => {
                (product([t, hidden_state]), product([l, in_layer]).saturating_add(back))
            }
        };
        let (inputs, on_host) = match config.compute.offload {
            true => (inputs.min(product([3, hidden_state])), inputs),
            false => (inputs, 0),
        };
        let chunk = u64::from(config.compute.loss_chunk_tokens).min(tokens);
        let is_first = config.stages.first().is_some_and(|first| first.name == stage.name);
        let moved = if is_first && stage.trains == Trains::Gate { d + 1 } else { parameters };
        Self {
            weights: if config.compute.dtype == Dtype::Bf16 { 2 * parameters } else { 0 },
            master: 4 * parameters,
            moments: match config.ring.state_copies {
                StateCopies::Two if workers > 2 => product([12, 2, moved]).div_ceil(u64::from(workers)),
                StateCopies::Two | StateCopies::All => 8 * moved,
            },
            gradient: if config.compute.graphs { 8 * parameters } else { 4 * parameters },
            fold: product([4, parameters, gradients.saturating_sub(1).into()]),
            sum: match (workers, config.ring.transport) {
                (1, _) => 0,
                (_, Transport::Tcp) => 4 * parameters,
                (_, Transport::Nccl) => {
                    let received = product([4, parameters, (workers - 1).into()]).div_ceil(workers.into());
                    4 * parameters + received
                }
            },
            inputs,
            on_host,
            activations,
            hidden: product([1 + t, hidden_state]),
            logits: if config.compute.fused {
                product([element, chunk, model.vocab.into()])
            } else {
                product([2, logits_bytes(chunk, model.vocab)])
            },
        }
    }

    /// Weights, moments and the gradient: what a worker holds whatever it computes, 18 bytes a parameter in bf16 where all
    /// moments are everywhere.
    pub fn state(&self) -> u64 {
        self.weights + self.master + self.moments + self.gradient
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        let parts = [self.fold, self.sum, self.inputs, self.activations, self.hidden, self.logits];
        parts.into_iter().fold(self.state(), u64::saturating_add)
    }
}

/// Saturating: a size beyond 64 bits fits nowhere, which is all that a plan says of it.
fn product<const N: usize>(factors: [u64; N]) -> u64 {
    factors.into_iter().fold(1, u64::saturating_mul)
}

/// Bytes of the fp32 logits of `tokens` tokens at one loop step.
fn logits_bytes(tokens: u64, vocab: u32) -> u64 {
    4 * tokens * u64::from(vocab)
}

/// KV: the size of all key heads together.
fn key_value_size(model: &Model) -> u64 {
    u64::from(model.hidden / model.heads) * u64::from(model.kv_heads)
}

impl Plan {
    /// The plan of a config that has been loaded or checked.
    pub fn new(config: &RunConfig, cluster: Cluster) -> Self {
        let schedule = Schedule::new(config);
        let workers = cluster.count.clamp(1, config.lanes);
        let lanes_per_worker = config.lanes.div_ceil(workers);
        let gradients = balanced(config.lanes, workers).into_iter().map(gradients_held).max().unwrap_or(0);
        let stages = schedule.stages().map(|(stage, span)| {
            let flops = TokenFlops::new(&config.model, span.layers, stage, config.compute.recompute);
            // A step takes as long as the worker with most lanes.
            let share = f64::from(lanes_per_worker) / f64::from(config.lanes);
            let reached = cluster.gpu.peak(config.compute.dtype) * cluster.utilisation;
            let seconds = flops.model * span.tokens as f64 * share / reached;
            StageEstimate {
                stage: stage.clone(),
                span,
                parameters: Parameters::new(&config.model, span.layers),
                flops,
                memory: Memory::new(config, span.layers, stage, gradients, workers),
                seconds,
                gpu_hours: seconds * f64::from(cluster.count) / 3600.0,
            }
        });
        Self {
            name: config.name.clone(),
            cluster,
            dtype: config.compute.dtype,
            recompute: config.compute.recompute,
            offload: config.compute.offload,
            timings: Timings::of(config),
            lanes: config.lanes,
            lanes_per_worker,
            state_copies: config.ring.state_copies,
            stages: stages.collect(),
        }
    }

    /// Wall clock of the run, seconds.
    pub fn seconds(&self) -> f64 {
        self.stages.iter().map(|stage| stage.seconds).sum()
    }

    /// GPU-hours of the run.
    pub fn gpu_hours(&self) -> f64 {
        self.stages.iter().map(|stage| stage.gpu_hours).sum()
    }

    /// FLOPs of the run, of the model alone.
    pub fn flops(&self) -> f64 {
        self.stages.iter().map(|stage| stage.flops.model * stage.span.tokens as f64).sum()
    }

    /// The stage whose workers need the most memory.
    pub fn largest(&self) -> Option<&StageEstimate> {
        self.stages.iter().max_by_key(|stage| stage.memory.total())
    }

    /// Whether every stage fits in the memory of its GPUs.
    pub fn fits(&self) -> bool {
        self.largest().is_none_or(|stage| stage.memory.total() <= self.cluster.gpu.memory_bytes)
    }

    /// The plan as aligned text, for a terminal.
    pub fn render(&self) -> String {
        render::render(self)
    }
}

#[cfg(test)]
mod tests;

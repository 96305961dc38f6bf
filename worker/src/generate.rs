//! Greedy generation with early exit, one token at a time.
//!
//! Each token leaves the loop at the first step m with CDF(m) = Σ_{t≤m} p(t) ≥ q (LOOPLM §6, Q-exit), and its logits
//! are those of that step. The whole prefix is run anew for each token: right for a sample of a small model. A cache
//! of keys and values is not here yet.

use anello_configs::{Mask, RunConfig, Stage};
use anello_dataloader::MicroBatch;
use tch::{Kind, Tensor};

use crate::model::{Context, Model, Rotary};
use crate::objective::log_exit;
use crate::optimizer::State;

/// A generated token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// Token id.
    pub id: u32,
    /// Loop step at which it left, 1..=T.
    pub exit: u32,
    /// Probability of the token among all, at that loop step.
    pub probability: f64,
}

/// How to generate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Greedy {
    /// Tokens to generate at most.
    pub tokens: usize,
    /// Leave the loop once the exit distribution has this much mass, 0 ..= 1; 1 is always the last loop step.
    pub exit_mass: f64,
    /// A token that ends the text.
    pub end: Option<u32>,
}

/// Continues `prompt` with the weights of `state` and the loop steps and RoPE base of `stage`.
///
/// At most the stage's sequence length of tokens is looked back upon.
pub fn greedy(
    config: &RunConfig,
    stage: &Stage,
    state: &State,
    prompt: &[u32],
    options: Greedy,
) -> Vec<Sampled> {
    let model = Model::new(&config.model, config.compute.dtype, &state.layout, &state.weights);
    let (length, head_size) = (stage.sequence as usize, i64::from(config.model.hidden / config.model.heads));
    let rotary = Rotary::new(stage.rope_base, head_size, length as i64, state.weights.device());
    let mut ids: Vec<i64> = prompt.iter().map(|&id| i64::from(id)).collect();
    let mut sampled = Vec::new();
    while sampled.len() < options.tokens && !ids.is_empty() {
        let window = &ids[ids.len().saturating_sub(length)..];
        let token = tch::no_grad(|| next(&model, &rotary, window, stage.loops, options.exit_mass));
        sampled.push(token);
        if options.end == Some(token.id) {
            break;
        }
        ids.push(i64::from(token.id));
    }
    sampled
}

fn next(model: &Model, rotary: &Rotary, window: &[i64], loops: u32, exit_mass: f64) -> Sampled {
    let n = window.len();
    let batch = MicroBatch {
        sequences: 1,
        length: n as u32,
        input_ids: window.to_vec(),
        targets: Vec::new(),
        positions: (0..n as i32).collect(),
        segment_starts: vec![0],
        counted: 0,
    };
    let context = Context::new(&batch, rotary, model.kind(), Mask::Causal);
    let last = |h_nd: &Tensor| h_nd.narrow(0, n as i64 - 1, 1);
    let mut h = model.embed_nd(&Tensor::from_slice(window).to_device(model.lm_head.value.device()));
    let hidden: Vec<Tensor> = (0..loops)
        .map(|_| {
            h = (0..model.layers.len()).fold(h.shallow_clone(), |h, l| model.layer_nd(l, &h, &context));
            last(&h)
        })
        .collect();
    let mass =
        log_exit(&model.gate_logits(&Tensor::stack(&hidden, 0))).exp().cumsum(0, Kind::Double).reshape([-1]);
    let mass = Vec::<f64>::try_from(mass).expect("a vector of f64");
    // Rounding may leave the total a little below 1: the last loop step is always an exit.
    let exit = mass.iter().position(|&m| m >= exit_mass).unwrap_or(hidden.len() - 1);
    let probabilities = model.logits(&hidden[exit]).softmax(-1, Kind::Float).reshape([-1]);
    let id = probabilities.argmax(0, false).int64_value(&[]);
    Sampled { id: id as u32, exit: exit as u32 + 1, probability: probabilities.double_value(&[id]) }
}

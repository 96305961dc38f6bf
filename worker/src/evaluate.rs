//! What a model is worth at each loop step, and what leaving early costs: sums over held-out tokens.
//!
//! Of every token that counts: L(t), whether the most probable token is the target, and p(t) (LOOPLM §2); and for each q the
//! loop step at which Q-exit leaves (LOOPLM §6). Sums are f64, token after token: the same for any number of threads.

use anello_configs::Mask;
use anello_dataloader::MicroBatch;
use tch::{Kind, Tensor};

use crate::engine::hidden;
use crate::host;
use crate::model::{Context, Model, Rotary};
use crate::objective::log_exit;

/// The target of a token that does not count.
const IGNORE: i64 = -100;
/// Tokens that go through lm_head at a time.
const CHUNK: i64 = 1024;

/// Sums over tokens that count.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sums {
    /// Σ loss, nats.
    pub loss: f64,
    /// Tokens whose most probable token is the target.
    pub correct: u64,
    /// Σ of the loop step left at.
    pub depth: f64,
}

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Tokens that count; where questions were asked, these.
    pub counted: u64,
    /// At each loop step, for all tokens.
    pub steps: Vec<Sums>,
    /// Σ p(t).
    pub exit: Vec<f64>,
    /// For each q: leaving at the first step m with Σ_{t<=m} p(t) >= q.
    pub by_mass: Vec<(f64, Sums)>,
}

impl Evaluation {
    /// Of no tokens yet: `loops` loop steps, and the exit masses `qs`.
    pub fn new(loops: u32, qs: &[f64]) -> Self {
        let steps = vec![Sums::default(); loops as usize];
        Self {
            counted: 0,
            exit: vec![0.0; steps.len()],
            steps,
            by_mass: qs.iter().map(|q| (*q, Sums::default())).collect(),
        }
    }

    /// Adds what `other` found of as many loop steps and the same exit masses: the caller fixes the order.
    pub fn merge(&mut self, other: &Self) {
        fn add(left: &mut Sums, right: &Sums) {
            left.loss += right.loss;
            left.correct += right.correct;
            left.depth += right.depth;
        }
        self.counted += other.counted;
        self.steps.iter_mut().zip(&other.steps).for_each(|(left, right)| add(left, right));
        self.exit.iter_mut().zip(&other.exit).for_each(|(left, right)| *left += right);
        self.by_mass.iter_mut().zip(&other.by_mass).for_each(|((_, left), (_, right))| add(left, right));
    }

    /// Adds the tokens of `batch`.
    pub fn add(&mut self, model: &Model, rotary: &Rotary, mask: Mask, batch: &MicroBatch) {
        tch::no_grad(|| {
            let device = model.lm_head.value.device();
            let context = Context::new(batch, rotary, model.kind(), mask);
            let to = |values: &[i64]| host::upload(values, device);
            let (embedded_nd, targets_n) = (model.embed_nd(&to(&batch.input_ids)), to(&batch.targets));
            let hidden = hidden(model, &context, embedded_nd, self.steps.len() as u32);
            let tokens = targets_n.size()[0];
            for start in (0..tokens).step_by(CHUNK as usize) {
                let part = |x: &Tensor| x.narrow(0, start, CHUNK.min(tokens - start));
                let hidden: Vec<Tensor> = hidden.iter().map(part).collect();
                self.add_chunk(model, &hidden, &part(&targets_n));
            }
        });
    }

    /// Adds a question whose `choices` were found to be this as [`continuation`]s, of which `right` is right: it counts as one. The most
    /// probable choice is the answer; loss, depth and exit are means over the tokens of the right one.
    pub fn add_question(&mut self, choices: &[Self], right: usize) {
        let tokens = choices[right].counted as f64;
        let take = |sums: &mut Sums, of: &dyn Fn(&Self) -> &Sums| {
            let answer =
                (0..choices.len()).min_by(|&a, &b| of(&choices[a]).loss.total_cmp(&of(&choices[b]).loss));
            let of_right = of(&choices[right]);
            sums.loss += of_right.loss / tokens;
            sums.correct += u64::from(answer == Some(right));
            sums.depth += of_right.depth / tokens;
        };
        self.counted += 1;
        for (at, sums) in self.steps.iter_mut().enumerate() {
            take(sums, &|choice| &choice.steps[at]);
        }
        for (at, (_, sums)) in self.by_mass.iter_mut().enumerate() {
            take(sums, &|choice| &choice.by_mass[at].1);
        }
        self.exit.iter_mut().zip(&choices[right].exit).for_each(|(all, exit)| *all += exit / tokens);
    }

    /// The tokens of states `[c, d]` at each loop step, and their targets `[c]`.
    fn add_chunk(&mut self, model: &Model, hidden: &[Tensor], targets_c: &Tensor) {
        let places = targets_c.clamp_min(0).unsqueeze(1);
        let host =
            |x: Tensor| Vec::<f64>::try_from(x.to_kind(Kind::Double).reshape([-1])).expect("a vector of f64");
        let (losses, correct): (Vec<_>, Vec<_>) = hidden
            .iter()
            .map(|h| {
                let logits = model.logits(h);
                let right = logits.argmax(-1, false).eq_tensor(targets_c);
                (host(-logits.log_softmax(-1, Kind::Float).gather(1, &places, false)), host(right))
            })
            .unzip();
        let exit: Vec<Vec<f64>> = log_exit(&model.gate_logits(&Tensor::stack(hidden, 0)))
            .exp()
            .unbind(0)
            .into_iter()
            .map(host)
            .collect();
        let targets = Vec::<i64>::try_from(targets_c).expect("a vector of i64");
        for (at, _) in targets.iter().enumerate().filter(|(_, target)| **target != IGNORE) {
            self.counted += 1;
            let take = |sums: &mut Sums, step: usize| {
                sums.loss += losses[step][at];
                sums.correct += u64::from(correct[step][at] > 0.0);
                sums.depth += (step + 1) as f64;
            };
            for (step, (sums, mass)) in self.steps.iter_mut().zip(&mut self.exit).enumerate() {
                take(sums, step);
                *mass += exit[step][at];
            }
            for (q, sums) in &mut self.by_mass {
                let mut mass = 0.0;
                // Rounding may leave the total a little below 1: the last loop step is always an exit.
                let left = (0..hidden.len()).position(|step| {
                    mass += exit[step][at];
                    mass >= *q
                });
                take(sums, left.unwrap_or(hidden.len() - 1));
            }
        }
    }
}

/// What `continuation` is after `prompt`, one token at least each, whose tokens alone count: `loops` loop steps, and the exit
/// masses `qs`. The negative of a loss is ln of its probability, a sum over its tokens, nats.
pub fn continuation(
    model: &Model,
    rope_base: f64,
    (loops, qs): (u32, &[f64]),
    prompt: &[u32],
    continuation: &[u32],
) -> Evaluation {
    let ids: Vec<i64> = prompt.iter().chain(continuation).map(|id| i64::from(*id)).collect();
    let n = ids.len() - 1;
    let targets = (1..=n).map(|at| if at < prompt.len() { IGNORE } else { ids[at] });
    let batch = MicroBatch {
        sequences: 1,
        length: n as u32,
        input_ids: ids[..n].to_vec(),
        targets: targets.collect(),
        positions: (0..n as i32).collect(),
        segment_starts: vec![0],
        counted: continuation.len() as u64,
    };
    let rotary = Rotary::new(rope_base, model.head_size(), n as i64, model.lm_head.value.device());
    let mut found = Evaluation::new(loops, qs);
    found.add(model, &rotary, Mask::Causal, &batch);
    found
}

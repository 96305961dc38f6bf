//! The objectives and their backward, a chunk of tokens at a time: pretraining (LOOPLM §2), the gate alone (§3),
//! fine-tuning (§4).
//!
//! ```text
//! p(t) = λ(t)·S(t−1) for t < T,  p(T) = S(T−1),  S(t) = Π_{j<=t} (1 − λ(j)),  λ = sigmoid(gate(h(t)))
//! loss_i = Σ_t p_i(t)·L_i(t) − β·H(p_i),   H(p) = −Σ_t p(t)·ln p(t)
//! ```
//!
//! Sums over tokens, not means: the run divides once, by the tokens of the global batch that count. The loss is the
//! end of the graph, so a chunk is run forward and backward at once. Its only large part, the logits, has a gradient
//! that can be written down, which needs p(t) and no logits of other loop steps:
//!
//! ```text
//! ∂loss_i/∂logits_i(t) = p_i(t)·(softmax(logits_i(t)) − onehot(target_i))
//! ```
//!
//! so that `[c, v]`, the logits of one chunk at one loop step, are the only ones that ever exist; autograd does the
//! small rest. Shape suffixes as in [`crate::model`]; `c` is the tokens of a chunk.

use anello_configs::{Loss, Trains};
use tch::{Device, Kind, Reduction, Tensor};

use crate::model::Model;

/// The target of a token that does not count.
const IGNORE: i64 = -100;

/// Sums over the tokens that count, from which every logged figure of the loss follows.
#[derive(Clone, Debug, PartialEq)]
pub struct LossSums {
    /// Tokens that count.
    pub counted: u64,
    /// Σ loss, nats.
    pub loss: f64,
    /// Σ L(t) for each loop step, nats.
    pub cross_entropy: Vec<f64>,
    /// Σ p(t) for each loop step.
    pub exit: Vec<f64>,
    /// Σ H(p), nats.
    pub entropy: f64,
}

impl LossSums {
    /// No tokens yet, `loops` loop steps.
    pub fn zero(loops: usize) -> Self {
        Self { counted: 0, loss: 0.0, cross_entropy: vec![0.0; loops], exit: vec![0.0; loops], entropy: 0.0 }
    }

    /// Adds `right` to `self`: the caller fixes the order.
    pub fn add(&mut self, right: &Self) {
        let add_all = |left: &mut [f64], right: &[f64]| left.iter_mut().zip(right).for_each(|(a, b)| *a += b);
        self.counted += right.counted;
        self.loss += right.loss;
        self.entropy += right.entropy;
        add_all(&mut self.cross_entropy, &right.cross_entropy);
        add_all(&mut self.exit, &right.exit);
    }
}

/// ln p(t) of the exit distribution from the gate's logits, `[t, ..] -> [t, ..]`, fp32: sums of log-sigmoids, so
/// that no probability is ever formed as a product. The gate of the last loop step is not used.
pub fn log_exit(gate_logits: &Tensor) -> Tensor {
    let loops = gate_logits.size()[0];
    if loops == 1 {
        return gate_logits * 0.0;
    }
    let used = gate_logits.narrow(0, 0, loops - 1);
    let log_survival = running_sum(&(-&used).log_sigmoid());
    let before = Tensor::cat(&[Tensor::zeros_like(&log_survival.narrow(0, 0, 1)), log_survival], 0);
    let log_exit_now = Tensor::cat(&[used.log_sigmoid(), Tensor::zeros_like(&before.narrow(0, 0, 1))], 0);
    log_exit_now + before
}

/// Sums over the first 1, 2, … rows. LibTorch's kernel for that has no fixed bits on a GPU.
fn running_sum(x: &Tensor) -> Tensor {
    if x.device() == Device::Cpu { x.cumsum(0, x.kind()) } else { row_by_row(x) }
}

/// [`running_sum`] by one addition a row in double precision: what the CPU's kernel does.
fn row_by_row(x: &Tensor) -> Tensor {
    let mut sum: Option<Tensor> = None;
    let rows = x.unbind(0).into_iter().map(|row| {
        let row = row.to_kind(Kind::Double);
        let next = sum.take().map_or_else(|| row.shallow_clone(), |sum| sum + &row);
        sum = Some(next.shallow_clone());
        next.to_kind(x.kind())
    });
    Tensor::stack(&rows.collect::<Vec<_>>(), 0)
}

/// The figures of every token of a chunk.
#[derive(Debug)]
pub struct TokenLosses {
    /// L(t), `[t, c]`; 0 where there is no target.
    pub cross_entropy_tc: Tensor,
    /// p(t), `[t, c]`.
    pub exit_tc: Tensor,
    /// H(p), `[c]`.
    pub entropy_c: Tensor,
    /// Σ_t p(t)·L(t) − β·H(p), `[c]`.
    pub loss_c: Tensor,
    /// 1 where the token counts, `[c]`, fp32.
    pub counts_c: Tensor,
}

/// The plain objective on the hidden states of some tokens: what the chunked backward is checked and measured against.
pub fn token_losses(model: &Model, h_tcd: &Tensor, targets_c: &Tensor, beta: f64) -> TokenLosses {
    let [t, c, _] = h_tcd.size()[..] else { unreachable!("hidden states are [t, c, d]") };
    let logits = model.logits(h_tcd).view([t * c, -1]);
    let cross_entropy_tc = logits
        .cross_entropy_loss::<Tensor>(&targets_c.repeat([t]), None, Reduction::None, IGNORE, 0.0)
        .view([t, c]);
    combine(cross_entropy_tc, log_exit(&model.gate_logits(h_tcd)), targets_c, beta)
}

/// L(t) and ln p(t), both `[t, c]`, to the figures of every token.
fn combine(cross_entropy_tc: Tensor, log_exit_tc: Tensor, targets_c: &Tensor, beta: f64) -> TokenLosses {
    let wide = log_exit_tc.kind();
    let exit_tc = log_exit_tc.exp();
    let entropy_c = -(&exit_tc * log_exit_tc).sum_dim_intlist(0i64, false, wide);
    let expected_c = (&exit_tc * &cross_entropy_tc).sum_dim_intlist(0i64, false, wide);
    let loss_c = expected_c - &entropy_c * beta;
    let counts_c = targets_c.not_equal(IGNORE).to_kind(wide);
    TokenLosses { cross_entropy_tc, exit_tc, entropy_c, loss_c, counts_c }
}

/// The loss sums of a micro-batch, on the device that computed them: who reads them waits for it.
#[derive(Debug)]
pub(crate) struct Figures {
    /// What [`sums`] made of each chunk, one after the other.
    chunks: Tensor,
    loops: usize,
}

impl Figures {
    fn new(chunks: &[Tensor], loops: usize) -> Self {
        Self { chunks: Tensor::cat(chunks, 0), loops }
    }

    /// The same in memory of their own.
    pub fn copy(&self) -> Self {
        Self { chunks: self.chunks.copy(), loops: self.loops }
    }

    /// Those of the chunks added in order, on the host.
    pub fn read(&self) -> LossSums {
        let Self { chunks, loops } = self;
        let figures = Vec::<f64>::try_from(chunks).expect("a vector of f64, copied to the host");
        let mut total = LossSums::zero(*loops);
        for chunk in figures.chunks(3 + 2 * loops) {
            let (cross_entropy, exit) = chunk[3..].split_at(*loops);
            total.add(&LossSums {
                counted: chunk[0] as u64,
                loss: chunk[1],
                cross_entropy: cross_entropy.to_vec(),
                exit: exit.to_vec(),
                entropy: chunk[2],
            });
        }
        total
    }
}

/// Sums of the chunk, in f64, `[3 + 2·t]`: of what counts, loss, entropy, L(t), p(t). At most 8192 tokens a chunk: LibTorch
/// then adds each sum on one thread.
fn sums(losses: &TokenLosses) -> Tensor {
    let counts = losses.counts_c.to_kind(Kind::Double);
    let sum = |x: &Tensor| {
        (x.to_kind(Kind::Double) * &counts).sum_dim_intlist(-1i64, false, Kind::Double).reshape([-1])
    };
    let counted = counts.sum_dim_intlist(-1i64, false, Kind::Double).reshape([-1]);
    let TokenLosses { cross_entropy_tc, exit_tc, entropy_c, loss_c, .. } = losses;
    Tensor::cat(&[counted, sum(loss_c), sum(entropy_c), sum(cross_entropy_tc), sum(exit_tc)], 0)
}

/// What a stage minimises, and which parameters it moves for that.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goal {
    /// The objective.
    pub loss: Loss,
    /// Weight of the entropy (β), of [`Loss::Loop`] alone.
    pub beta: f64,
    /// What moves.
    pub trains: Trains,
}

/// Slope (k) and threshold (γ, nats) of the weight that an improvement has in the training of the gate (LOOPLM §3).
const GATE_SLOPE: f64 = 50.0;
const GATE_THRESHOLD: f64 = 0.005;

/// Loss sums, and their gradient: that of lm_head and gate is added to the flat `gradient`, that of the hidden states is
/// returned, `[n, d]` for each loop step, unless only the gate moves.
pub(crate) fn backward(
    model: &Model,
    hidden: &[Tensor],
    targets_n: &Tensor,
    goal: Goal,
    chunk: i64,
    gradient: &Tensor,
) -> (Figures, Option<Vec<Tensor>>) {
    let (mut chunks, mut of_hidden) = (Vec::new(), Vec::new());
    for_chunks(hidden, targets_n, chunk, |h_tcd, targets_c| {
        let (losses, of_h_tcd) = match (goal.trains, goal.loss) {
            (Trains::All, Loss::Loop) => loop_backward(model, h_tcd, &targets_c, goal.beta, gradient),
            (Trains::All, _) => last_backward(model, &h_tcd, &targets_c, gradient),
            (Trains::Gate, _) => (gate_backward(model, &h_tcd, &targets_c, goal, gradient), Tensor::new()),
        };
        chunks.push(tch::no_grad(|| sums(&losses)));
        of_hidden.push(of_h_tcd);
    });
    let of_hidden = (goal.trains == Trains::All).then(|| Tensor::cat(&of_hidden, 1).unbind(0));
    (tch::no_grad(|| Figures::new(&chunks, hidden.len())), of_hidden)
}

/// The objective of pretraining on some tokens.
fn loop_backward(
    model: &Model,
    h_tcd: Tensor,
    targets_c: &Tensor,
    beta: f64,
    gradient: &Tensor,
) -> (TokenLosses, Tensor) {
    let leaves = [&model.gate_weight, &model.gate_bias];
    let h_tcd = h_tcd.set_requires_grad(true);
    let log_exit_tc = log_exit(&model.gate_logits(&h_tcd));
    let (cross_entropy_tc, of_h_tcd) = tch::no_grad(|| {
        let exit_tc = log_exit_tc.exp();
        let (losses, gradients): (Vec<_>, Vec<_>) = (0..h_tcd.size()[0])
            .map(|t| cross_entropy(model, &h_tcd.get(t), targets_c, &exit_tc.get(t), gradient))
            .unzip();
        (Tensor::stack(&losses, 0), Tensor::stack(&gradients, 0))
    });
    let losses = combine(cross_entropy_tc, log_exit_tc, targets_c, beta);
    let loss = (&losses.loss_c * &losses.counts_c).sum(model.wide());
    let inputs: Vec<&Tensor> = [&h_tcd].into_iter().chain(leaves.map(|leaf| &leaf.value)).collect();
    let mut gradients = Tensor::run_backward(&[loss], &inputs, false, false);
    for (leaf, of_leaf) in leaves.iter().zip(gradients.drain(1..)) {
        leaf.accumulate(gradient, &of_leaf);
    }
    let of_h_tcd = gradients.remove(0) + of_h_tcd;
    (losses, of_h_tcd)
}

/// Fine-tuning (LOOPLM §4): L(T) alone. The gate has no part in it and no gradient.
fn last_backward(
    model: &Model,
    h_tcd: &Tensor,
    targets_c: &Tensor,
    gradient: &Tensor,
) -> (TokenLosses, Tensor) {
    tch::no_grad(|| {
        let log_exit_tc = log_exit(&model.gate_logits(h_tcd));
        let last = h_tcd.size()[0] - 1;
        let mut losses_tc: Vec<Tensor> =
            (0..last).map(|t| plain_cross_entropy(model, &h_tcd.get(t), targets_c)).collect();
        let ones_c = targets_c.ones_like().to_kind(model.wide());
        let (of_last, of_h_cd) = cross_entropy(model, &h_tcd.get(last), targets_c, &ones_c, gradient);
        losses_tc.push(of_last.shallow_clone());
        let of_h_tcd = h_tcd.zeros_like();
        of_h_tcd.get(last).copy_(&of_h_cd);
        let losses = combine(Tensor::stack(&losses_tc, 0), log_exit_tc, targets_c, 0.0);
        (TokenLosses { loss_c: of_last, ..losses }, of_h_tcd)
    })
}

/// With the language model frozen: the pretraining objective's gradient for the gate, or adaptive gate training (LOOPLM
/// §3), for t = 2..=T:
///
/// ```text
/// I(t) = max(0, L(t−1) − L(t));  w(t) = sigmoid(k·(I(t) − γ)),  k = 50, γ = 0.005
/// loss = 1/T · Σ_t [ −w(t)·ln(1−λ(t)) − (1−w(t))·ln λ(t) ]
/// ```
/// λ at the same t as the improvement is what is trained, as in the paper's text.
fn gate_backward(
    model: &Model,
    h_tcd: &Tensor,
    targets_c: &Tensor,
    goal: Goal,
    gradient: &Tensor,
) -> TokenLosses {
    let leaves = [&model.gate_weight, &model.gate_bias];
    let loops = h_tcd.size()[0];
    let cross_entropy_tc = tch::no_grad(|| {
        let of = |t| plain_cross_entropy(model, &h_tcd.get(t), targets_c);
        Tensor::stack(&(0..loops).map(of).collect::<Vec<_>>(), 0)
    });
    let gate_tc = model.gate_logits(h_tcd);
    let mut losses = combine(cross_entropy_tc, log_exit(&gate_tc), targets_c, goal.beta);
    if goal.loss == Loss::Gate {
        let (before, after) = (
            losses.cross_entropy_tc.narrow(0, 0, loops - 1),
            losses.cross_entropy_tc.narrow(0, 1, loops - 1),
        );
        let weight = ((before - after).clamp_min(0.0) - GATE_THRESHOLD) * GATE_SLOPE;
        let weight = tch::no_grad(|| weight.sigmoid());
        let gate = gate_tc.narrow(0, 1, loops - 1);
        let stays: Tensor = &weight * (-&gate).log_sigmoid();
        let goes: Tensor = (1.0 - &weight) * gate.log_sigmoid();
        let sum: Tensor = (stays + goes).sum_dim_intlist(0i64, false, model.wide());
        losses.loss_c = sum / -(loops as f64);
    }
    let loss = (&losses.loss_c * &losses.counts_c).sum(model.wide());
    let gradients = Tensor::run_backward(&[loss], &leaves.map(|leaf| &leaf.value), false, false);
    for (leaf, of_leaf) in leaves.iter().zip(gradients) {
        leaf.accumulate(gradient, &of_leaf);
    }
    losses
}

/// L(t) of some tokens at one loop step, `[c]`; 0 where there is no target.
fn plain_cross_entropy(model: &Model, h_cd: &Tensor, targets_c: &Tensor) -> Tensor {
    model.logits(h_cd).cross_entropy_loss::<Tensor>(targets_c, None, Reduction::None, IGNORE, 0.0)
}

/// L(t) of one chunk at one loop step, `[c]`, and the gradient of Σ p(t)·L(t) for the hidden states, `[c, d]`; that
/// for lm_head is added to the flat `gradient`.
fn cross_entropy(
    model: &Model,
    h_cd: &Tensor,
    targets_c: &Tensor,
    exit_c: &Tensor,
    gradient: &Tensor,
) -> (Tensor, Tensor) {
    if let Some(kernels) = model.kernels() {
        let counts_c = targets_c.not_equal(IGNORE).to_kind(model.wide());
        // The gradient takes the place of the logits.
        let logits_cv = h_cd.matmul(&model.lm_head.used().tr());
        let losses_c = kernels.cross_entropy(&logits_cv, targets_c, &(exit_c * counts_c));
        model.lm_head.accumulate_product(gradient, &logits_cv.tr(), h_cd);
        return (losses_c, logits_cv.matmul(model.lm_head.used()));
    }
    let targets_c1 = targets_c.clamp_min(0).unsqueeze(1);
    let counts_c1 = targets_c.not_equal(IGNORE).to_kind(model.wide()).unsqueeze(1);
    let weights_c1 = exit_c.unsqueeze(1) * &counts_c1;
    let mut log_softmax_cv = model.logits(h_cd).log_softmax(-1, model.wide());
    let losses_c = (-log_softmax_cv.gather(1, &targets_c1, false) * counts_c1).squeeze_dim(1);
    // In place from here on: p(t)·(softmax − onehot).
    let of_logits_cv = log_softmax_cv
        .exp_()
        .g_mul_(&weights_c1)
        .scatter_add_(1, &targets_c1, &-weights_c1)
        .to_kind(model.kind());
    model.lm_head.accumulate_product(gradient, &of_logits_cv.tr(), h_cd);
    (losses_c, of_logits_cv.matmul(model.lm_head.used()))
}

fn for_chunks(hidden: &[Tensor], targets_n: &Tensor, chunk: i64, mut body: impl FnMut(Tensor, Tensor)) {
    let tokens = targets_n.size()[0];
    let mut start = 0;
    while start < tokens {
        let len = chunk.min(tokens - start);
        let parts: Vec<Tensor> = hidden.iter().map(|h_nd| h_nd.narrow(0, start, len)).collect();
        body(Tensor::stack(&parts, 0), targets_n.narrow(0, start, len));
        start += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_sum_row_by_row_is_that_of_the_cpu() {
        let stream = anello_configs::random::Stream::new(3, "rows", &[]);
        let values: Vec<f32> = (0..7 * 50).map(|i| (stream.unit_at(i) - 0.7) as f32 * 10.0).collect();
        let leaf = || Tensor::from_slice(&values).view([7, 50]).set_requires_grad(true);
        let upstream = Tensor::from_slice(&values).view([7, 50]).sin();
        let run = |of: fn(&Tensor) -> Tensor| {
            let x = leaf();
            let sums = of(&x);
            let gradient = Tensor::run_backward(&[(&sums * &upstream).sum(Kind::Float)], &[&x], false, false);
            (sums.detach(), gradient[0].shallow_clone())
        };
        let ((a, of_a), (b, of_b)) = (run(running_sum), run(row_by_row));
        assert!(a.equal(&b), "the same bits");
        assert!((of_a - of_b).abs().max().double_value(&[]) < 1e-4);
    }
}

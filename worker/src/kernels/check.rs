//! Are the kernels right on a device, and what do they carry? Each against LibTorch's chain for the same.

use std::time::Instant;

use anello_configs::random::Stream as Draws;
use tch::{Device, Kind, Tensor};

use super::{Kernels, Spans};
use crate::ffi::torch::{Stream, flash_packed, vjp};
use crate::model::{Angles, Rotary, rms_norm, swiglu};
use crate::optimizer::{Scale, halved};
use crate::params::BLOCK;

/// What kernels are tried out on.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Tokens.
    pub tokens: i64,
    /// Hidden size (D).
    pub hidden: i64,
    /// Feed-forward size (F).
    pub ffn: i64,
    /// Query and key heads together.
    pub heads: i64,
    /// Head size, even.
    pub head_size: i64,
    /// Entries of the vocabulary.
    pub vocab: i64,
    /// Elements of flat buffers, a multiple of 1024; two thirds of them decay.
    pub flat: i64,
    /// Runs that a time is the mean of; 0: none is measured.
    pub runs: u32,
}

impl Sizes {
    /// Two sequences of 4096 tokens of ouro-1.4b, and 64 Mi parameters.
    pub const OURO: Self = Self {
        tokens: 8192,
        hidden: 2048,
        ffn: 5632,
        heads: 32,
        head_size: 128,
        vocab: 49_152,
        flat: 1 << 26,
        runs: 20,
    };
}

/// What was found of one kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked {
    /// What it computes, and in which format.
    pub name: String,
    /// The largest difference from what is right, as a part of what rounding may make: up to 1 is right. Where only the same bits
    /// are right it is the number of elements that have others, and 0 is right.
    pub off: f64,
    /// Whether only the same bits are right.
    pub exact: bool,
    /// Whether a second run had the same bits.
    pub repeatable: bool,
    /// Bytes that must be read and written for it.
    pub bytes: u64,
    /// Seconds of a run.
    pub seconds: Option<f64>,
    /// Seconds of LibTorch's chain, where it has one.
    pub chain_seconds: Option<f64>,
}

impl Checked {
    /// Whether the kernel does what it is to do.
    pub fn is_right(&self) -> bool {
        self.repeatable && self.off <= if self.exact { 0.0 } else { 1.0 }
    }
}

impl std::fmt::Display for Checked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, off, exact, repeatable, bytes, seconds, chain_seconds } = self;
        write!(f, "{name}: ")?;
        match (exact, off) {
            (true, 0.0) => write!(f, "the very bits")?,
            (true, off) => write!(f, "WRONG, {off} elements have other bits")?,
            (false, off) if *off <= 1.0 => {
                write!(f, "right, {:.0} % of what rounding may make", off * 100.0)?
            }
            (false, off) => write!(f, "WRONG, {off:.3} times what rounding may make")?,
        }
        if !repeatable {
            write!(f, ", NOT THE SAME BITS TWICE")?;
        }
        if let Some(seconds) = seconds {
            write!(f, ", {:.0} GB/s", *bytes as f64 / seconds / 1e9)?;
            if let Some(chain) = chain_seconds {
                write!(f, ", {:.2} times LibTorch's chain", chain / seconds)?;
            }
        }
        Ok(())
    }
}

/// Tries out all kernels on `device`, whose they are.
pub fn check(kernels: &Kernels, device: Device, sizes: Sizes) -> Vec<Checked> {
    let mut found = vec![
        update(kernels, device, sizes),
        squares(kernels, device, sizes),
        digests(kernels, device, sizes),
    ];
    for kind in [Kind::Float, Kind::BFloat16] {
        found.extend(norms(kernels, (device, kind), sizes));
        found.extend(gates(kernels, (device, kind), sizes));
        found.extend(rotations(kernels, (device, kind), sizes));
        found.extend(entropies(kernels, (device, kind), sizes));
    }
    let Sizes { heads, head_size, .. } = sizes;
    if kernels.attends(Kind::BFloat16, head_size, heads / 2, heads / 2) {
        found.extend(attentions(kernels, device, sizes));
    }
    found
}

/// Numbers around ±2 that follow from `seed` and the shape, repeated after a prime number of them.
fn drawn(seed: u64, shape: &[i64], kind: Kind, device: Device) -> Tensor {
    const PERIOD: u64 = 65_537;
    let stream = Draws::new(seed, "kernels", &[]);
    let count: i64 = shape.iter().product();
    let values: Vec<f64> = (0..PERIOD.min(count as u64)).map(|at| stream.unit_at(at) * 4.0 - 2.0).collect();
    let values = Tensor::from_slice(&values).to_kind(kind).to_device(device);
    let times = (count as u64).div_ceil(PERIOD).max(1);
    values.repeat([times as i64]).narrow(0, 0, count).view(shape)
}

/// Mean seconds of `run`, once it has run.
fn timed(device: Device, runs: u32, run: &mut dyn FnMut()) -> Option<f64> {
    let wait = || Stream::current(device).and_then(Stream::synchronize).expect(super::FAILED);
    run();
    wait();
    let began = Instant::now();
    (0..runs).for_each(|_| run());
    wait();
    (runs > 0).then(|| began.elapsed().as_secs_f64() / f64::from(runs))
}

/// The largest difference of `found` from `right`, which is f64, as a part of what may be: a rounding to the format of `found`,
/// and 64 of fp32 at the largest of its row.
fn off(found: &Tensor, right: &Tensor) -> f64 {
    let unit = match found.kind() {
        Kind::BFloat16 => (-8f64).exp2(),
        _ => (-24f64).exp2(),
    };
    let largest = right.abs().amax([-1i64].as_slice(), true);
    let allowed = right.abs() * unit + largest * (64.0 * (-24f64).exp2()) + f64::MIN_POSITIVE;
    let parts = (found.to_kind(Kind::Double) - right).abs() / allowed;
    match parts.isfinite().all().int64_value(&[]) {
        1 => parts.max().double_value(&[]),
        _ => f64::INFINITY,
    }
}

/// Elements of an fp32 tensor.
fn host(x: &Tensor) -> Vec<f32> {
    Vec::try_from(x.to_device(Device::Cpu).contiguous().view([-1])).expect("fp32 elements")
}

/// How many elements of `found` have other bits than those of `right`.
fn others(found: &[f32], right: &[f32]) -> f64 {
    assert_eq!(found.len(), right.len(), "as many elements");
    found.iter().zip(right).filter(|(found, right)| found.to_bits() != right.to_bits()).count() as f64
}

/// AdamW as the optimizer has it, one IEEE operation after the other.
fn ieee(scale: &Scale, [w, m, v, g]: &mut [Vec<f32>; 4], decayed: usize) {
    let [beta1, rest1, beta2, rest2] = scale.betas();
    let [correction2, eps, decay, rate] = scale.of_weights();
    for at in 0..w.len() {
        let gradient = g[at] * scale.gradient as f32;
        m[at] = m[at] * beta1 + gradient * rest1;
        v[at] = v[at] * beta2 + gradient * gradient * rest2;
        let root = (v[at] / correction2).sqrt() + eps;
        let weight = if at < decayed { w[at] * decay } else { w[at] };
        w[at] = weight - m[at] / root * rate;
    }
}

fn format_of(kind: Kind) -> &'static str {
    if kind == Kind::BFloat16 { "bf16" } else { "fp32" }
}

fn digests(kernels: &Kernels, device: Device, sizes: Sizes) -> Checked {
    let blocks = (sizes.flat as usize).div_ceil(BLOCK);
    let flat = drawn(5, &[(blocks * BLOCK) as i64], Kind::Float, device);
    let flat = flat.copy();
    let right: Vec<_> =
        host(&flat).chunks(BLOCK).map(|block| blake3::hash(crate::host::bytes(block))).collect();
    let [found, again] = [0, 1].map(|_| kernels.block_digests(&flat));
    Checked {
        name: "BLAKE3 of blocks".to_owned(),
        off: found.iter().zip(&right).filter(|(found, right)| found != right).count() as f64,
        exact: true,
        repeatable: found == again && found.len() == right.len(),
        bytes: (flat.numel() * size_of::<f32>()) as u64,
        seconds: timed(device, sizes.runs, &mut || drop(kernels.block_digests(&flat))),
        chain_seconds: None,
    }
}

fn update(kernels: &Kernels, device: Device, sizes: Sizes) -> Checked {
    let scale = Scale {
        gradient: 1.0 / 3.0,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        correction2: 1.0 - 0.95f64.powi(3),
        decay: 1.0 - 3e-4 * 0.1,
        rate: 3e-4 / (1.0 - 0.9f64.powi(3)),
    };
    let decayed = sizes.flat as usize * 2 / 3;
    let start = || {
        let [w, m, v, g] = [1, 2, 3, 4].map(|seed| drawn(seed, &[sizes.flat], Kind::Float, device).copy());
        [w, m, v.square(), g]
    };
    let of_kernel = || {
        let [w, m, v, g] = start();
        kernels.adamw_update(&scale, [&w, &m, &v], &g, decayed);
        [w, m, v]
    };
    let chain = |[w, m, v, g]: &mut [Tensor; 4]| {
        *g *= scale.gradient;
        scale.moments(None, m, v, g);
        for (first, len) in [(0, decayed as i64), (decayed as i64, sizes.flat - decayed as i64)] {
            let [mut w, m, v] = [&*w, m, v].map(|flat| flat.narrow(0, first, len));
            scale.weights(None, &mut w, &m, &v, first == 0);
        }
    };
    // Not by LibTorch, whose chain rounds otherwise here and there: its root on a CPU is not the nearest number to the root, and on a
    // GPU it divides by a number as it multiplies by the inverse.
    let mut right = start().map(|flat| host(&flat));
    ieee(&scale, &mut right, decayed);
    let (found, again) = (of_kernel(), of_kernel());
    let [w, m, v, g] = start();
    let seconds = timed(device, sizes.runs, &mut || kernels.adamw_update(&scale, [&w, &m, &v], &g, decayed));
    let mut flats = start();
    Checked {
        name: "AdamW".to_owned(),
        off: found.iter().zip(&right).map(|(found, right)| others(&host(found), right)).sum(),
        exact: true,
        repeatable: found.iter().zip(&again).all(|(a, b)| a.equal(b)),
        // Weights, moments and the gradient read, all but it written.
        bytes: 7 * 4 * sizes.flat as u64,
        seconds,
        chain_seconds: timed(device, sizes.runs, &mut || chain(&mut flats)),
    }
}

fn squares(kernels: &Kernels, device: Device, sizes: Sizes) -> Checked {
    let gradient = drawn(5, &[sizes.flat], Kind::Float, device);
    let chain = |gradient: &Tensor| halved(&gradient.view([-1, 1024]).square());
    let (found, again) = (kernels.square_rows(&gradient), kernels.square_rows(&gradient));
    Checked {
        name: "squares of the norm".to_owned(),
        off: others(&host(&found), &host(&chain(&gradient.to_device(Device::Cpu)))),
        exact: true,
        repeatable: found.equal(&again),
        bytes: 4 * sizes.flat as u64,
        seconds: timed(device, sizes.runs, &mut || drop(kernels.square_rows(&gradient))),
        chain_seconds: timed(device, sizes.runs, &mut || drop(chain(&gradient))),
    }
}

/// What a kernel with a backward computes: of one input that varies and others.
type Of<'a> = &'a dyn Fn(&[Tensor]) -> Tensor;

/// A kernel with its backward against its chain. The chain's results in f64 are what is right; both are timed as training runs
/// them, the backward by walking a graph that is kept, with a product by the gradient before it on both sides.
fn both_ways(
    name: &str,
    (device, runs): (Device, u32),
    inputs: &[Tensor],
    (kernel, chain): (Of<'_>, Of<'_>),
    (bytes_forward, bytes_backward): (u64, u64),
) -> Vec<Checked> {
    let leaves = |kind: Option<Kind>| -> Vec<Tensor> {
        let of = |x: &Tensor| kind.map_or_else(|| x.copy(), |kind| x.to_kind(kind));
        inputs.iter().map(|x| of(x).detach().set_requires_grad(true)).collect()
    };
    let kind = inputs[0].kind();
    let forward = |compute: Of<'_>, leaves: &[Tensor]| tch::no_grad(|| compute(leaves));
    let graph = |compute: Of<'_>, leaves: &[Tensor]| {
        let y = compute(leaves);
        let g = drawn(17, &y.size(), kind, device).to_kind(y.kind());
        (y * g).sum(if leaves[0].kind() == Kind::Double { Kind::Double } else { Kind::Float })
    };
    let walk = |product: &Tensor, leaves: &[Tensor]| Tensor::run_backward(&[product], leaves, true, false);
    let (ours, wide) = (leaves(None), leaves(Some(Kind::Double)));
    let of_ours = graph(kernel, &ours);
    let (found, again) = (forward(kernel, &ours), forward(kernel, &ours));
    let theirs = leaves(None);
    let there = Checked {
        name: format!("{name}, {}", format_of(kind)),
        off: off(&found, &forward(chain, &wide)),
        exact: false,
        repeatable: found.equal(&again),
        bytes: bytes_forward,
        seconds: timed(device, runs, &mut || drop(forward(kernel, &ours))),
        chain_seconds: timed(device, runs, &mut || drop(forward(chain, &theirs))),
    };
    let (found, again) = (walk(&of_ours, &ours), walk(&of_ours, &ours));
    let right = walk(&graph(chain, &wide), &wide);
    let of_theirs = graph(chain, &theirs);
    let back = Checked {
        name: format!("{name}, backward, {}", format_of(kind)),
        off: found.iter().zip(&right).map(|(found, right)| off(found, right)).fold(0.0, f64::max),
        repeatable: found.iter().zip(&again).all(|(a, b)| a.equal(b)),
        bytes: bytes_backward,
        seconds: timed(device, runs, &mut || drop(walk(&of_ours, &ours))),
        chain_seconds: timed(device, runs, &mut || drop(walk(&of_theirs, &theirs))),
        ..there.clone()
    };
    vec![there, back]
}

fn norms(kernels: &Kernels, (device, kind): (Device, Kind), sizes: Sizes) -> Vec<Checked> {
    const EPS: f64 = 1e-6;
    let Sizes { tokens: n, hidden: d, .. } = sizes;
    let x = drawn(6, &[n, d], kind, device);
    let weight = drawn(7, &[d], Kind::Float, device);
    let wide = |inputs: &[Tensor]| if inputs[0].kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let kernel = |inputs: &[Tensor]| kernels.rms_norm(&inputs[0], &inputs[1], None, EPS);
    let chain = |inputs: &[Tensor]| rms_norm(&inputs[0], &inputs[1], EPS, wide(inputs));
    let row = (n * d) as u64 * kind.elt_size_in_bytes() as u64;
    let mut found = both_ways(
        "RMSNorm",
        (device, sizes.runs),
        &[x.copy(), weight.copy()],
        (&kernel, &chain),
        (2 * row, 3 * row),
    );
    // The residual is added as it is without: to what was rounded.
    let residual = drawn(8, &[n, d], kind, device);
    let added = |_: ()| kernels.rms_norm(&x, &weight, Some(&residual), EPS);
    let apart = |_: ()| &residual + kernels.rms_norm(&x, &weight, None, EPS);
    let differ = added(()).ne_tensor(&apart(())).sum(Kind::Int64).double_value(&[]);
    found.push(Checked {
        name: format!("RMSNorm and residual, {}", format_of(kind)),
        off: differ,
        exact: true,
        repeatable: added(()).equal(&added(())),
        bytes: 3 * row,
        seconds: timed(device, sizes.runs, &mut || drop(added(()))),
        chain_seconds: timed(device, sizes.runs, &mut || {
            drop(&residual + rms_norm(&x, &weight, EPS, Kind::Float));
        }),
    });
    found
}

fn gates(kernels: &Kernels, (device, kind): (Device, Kind), sizes: Sizes) -> Vec<Checked> {
    let Sizes { tokens: n, ffn: f, .. } = sizes;
    let gate_up = drawn(9, &[n, 2 * f], kind, device) * 2.0;
    let kernel = |inputs: &[Tensor]| kernels.swiglu(&inputs[0]);
    let chain = |inputs: &[Tensor]| swiglu(&inputs[0]);
    let row = (n * f) as u64 * kind.elt_size_in_bytes() as u64;
    both_ways("SwiGLU", (device, sizes.runs), &[gate_up], (&kernel, &chain), (3 * row, 5 * row))
}

fn rotations(kernels: &Kernels, (device, kind): (Device, Kind), sizes: Sizes) -> Vec<Checked> {
    let Sizes { tokens: n, heads, head_size: k, .. } = sizes;
    // Values lie beside them, as in the model.
    let all = drawn(10, &[n, heads + heads / 2 + 1, k], kind, device);
    let table = Rotary::new(10_000.0, k, n, device);
    let positions = Tensor::arange(n, (Kind::Int64, device));
    let angles = Angles::at(&table, &positions, kind);
    let kernel = |inputs: &[Tensor]| angles.rotate_by(Some(kernels), &inputs[0].narrow(1, 0, heads));
    let chain =
        |inputs: &[Tensor]| angles.to_kind(inputs[0].kind()).rotate_by(None, &inputs[0].narrow(1, 0, heads));
    let row = (n * heads * k) as u64 * kind.elt_size_in_bytes() as u64;
    both_ways("RoPE", (device, sizes.runs), &[all], (&kernel, &chain), (2 * row, 2 * row))
}

/// An eighth of the tokens: as many as a chunk of the loss has.
fn entropies(kernels: &Kernels, (device, kind): (Device, Kind), sizes: Sizes) -> [Checked; 2] {
    let (n, v) = ((sizes.tokens + 7) / 8, sizes.vocab);
    let logits = drawn(11, &[n, v], kind, device) * 4.0;
    // Some do not count.
    let targets = (Tensor::arange(n, (Kind::Int64, device)) * 7).remainder(v + v / 8 + 1);
    let targets = targets.where_self(&targets.less(v), &Tensor::full_like(&targets, -100));
    let counts = targets.ge(0).to_kind(Kind::Float);
    let weights = drawn(12, &[n], Kind::Float, device).abs() * &counts;
    let of_kernel = || {
        let of_logits = logits.copy();
        let losses = kernels.cross_entropy(&of_logits, &targets, &weights);
        (losses, of_logits)
    };
    // As `objective` has it without the kernel.
    let chain = |logits: &Tensor, wide: Kind| {
        let (hit, weights) = (targets.clamp_min(0).unsqueeze(1), weights.to_kind(wide).unsqueeze(1));
        let mut log_softmax = logits.to_kind(wide).log_softmax(-1, wide);
        let losses = -log_softmax.gather(1, &hit, false).squeeze_dim(1) * counts.to_kind(wide);
        (losses, log_softmax.exp_().g_mul_(&weights).scatter_add_(1, &hit, &-weights).to_kind(logits.kind()))
    };
    let (losses, of_logits) = of_kernel();
    let again = of_kernel();
    let (right, of_right) = chain(&logits.to_kind(Kind::Double), Kind::Double);
    // A loss is a difference of numbers as large as logits.
    let most = logits.abs().max().to_kind(Kind::Double);
    let off_losses =
        (losses.to_kind(Kind::Double) - &right).abs() / (right.abs() + most) / (64.0 * (-24f64).exp2());
    // Running it twice in place is running it on other numbers: for the time alone.
    let place = logits.copy();
    let seconds = timed(device, sizes.runs, &mut || drop(kernels.cross_entropy(&place, &targets, &weights)));
    let gradient = Checked {
        name: format!("cross-entropy and its gradient, {}", format_of(kind)),
        off: off(&of_logits, &of_right),
        exact: false,
        repeatable: of_logits.equal(&again.1),
        bytes: 2 * (n * v) as u64 * kind.elt_size_in_bytes() as u64,
        seconds,
        chain_seconds: timed(device, sizes.runs, &mut || drop(chain(&logits, Kind::Float))),
    };
    let losses = Checked {
        name: format!("cross-entropy, its losses, {}", format_of(kind)),
        off: off_losses.max().double_value(&[]),
        repeatable: losses.equal(&again.0),
        seconds: None,
        ..gradient.clone()
    };
    [losses, gradient]
}

/// RoPE and attention of documents, forward and backward, against LibTorch's RoPE and its attention in f64 for few tokens, and its
/// flash attention for the time.
fn attentions(kernels: &Kernels, device: Device, sizes: Sizes) -> [Checked; 2] {
    let (h, k) = (sizes.heads / 2, sizes.head_size);
    let table = Rotary::new(10_000.0, k, sizes.tokens, device);
    let inputs = |documents: &[i64]| {
        let n: i64 = documents.iter().sum();
        let starts: Vec<u32> = documents
            .iter()
            .scan(0, |at, length| {
                *at += length;
                Some((*at - length) as u32)
            })
            .collect();
        let spans = Spans::new(&starts, n as usize, |values| Tensor::from_slice(values).to_device(device));
        let positions = Tensor::arange(n, (Kind::Int64, device)) - spans.starts.to_kind(Kind::Int64);
        let draw = |seed, heads| drawn(seed, &[n, heads, k], Kind::BFloat16, device);
        (spans, Angles::at(&table, &positions, Kind::BFloat16), draw(13, 3 * h), draw(14, h))
    };
    let ours = |qkv: &Tensor, angles: &Angles, spans: &Spans| {
        let [cos, sin] = angles.tables();
        kernels.attention(qkv, cos, sin, spans)
    };
    let parts = |qkv: &Tensor, angles: &Angles| {
        let rotated = angles.to_kind(qkv.kind()).rotate_by(None, &qkv.narrow(1, 0, 2 * h));
        [rotated.narrow(1, 0, h), rotated.narrow(1, h, h), qkv.narrow(1, 2 * h, h)]
    };
    let walk = |y: &Tensor, g: &Tensor, x: &Tensor| vjp(y, g, &[x]).expect(super::FAILED).remove(0);
    let leaf = |qkv: &Tensor| qkv.detach().set_requires_grad(true);

    // Documents that begin and end anywhere, and one that fills blocks.
    let (spans, angles, qkv, g) = inputs(&[1, 300, 211, 512]);
    let found = || {
        let x = leaf(&qkv);
        let y = ours(&x, &angles, &spans);
        (y.detach(), walk(&y, &g, &x))
    };
    let ((y, of_x), again) = (found(), found());
    let x = leaf(&qkv.to_kind(Kind::Double));
    let [q, key, v] = parts(&x, &angles).map(|part| part.transpose(0, 1));
    let rows = Tensor::arange(qkv.size()[0], (Kind::Int, device));
    let columns = rows.unsqueeze(0);
    let sees = columns.less_equal_tensor(&rows.unsqueeze(1));
    let sees = sees.logical_and(&columns.greater_equal_tensor(&spans.starts.unsqueeze(1)));
    let scores = q.matmul(&key.transpose(1, 2)) / (k as f64).sqrt();
    let scores = scores.masked_fill(&sees.logical_not(), f64::NEG_INFINITY);
    let right = scores.softmax(-1, Kind::Double).matmul(&v).transpose(0, 1);
    let of_right = walk(&right, &g.to_kind(Kind::Double), &x);
    // Scores, their exponents and gradients are rounded on the way.
    let off = |found: &Tensor, right: &Tensor| {
        let difference = (found.to_kind(Kind::Double) - right).norm() / right.norm();
        difference.double_value(&[]) / 1e-2
    };

    let half = sizes.tokens / 2;
    let (spans, angles, qkv, g) = inputs(&[half, half]);
    let ends = Tensor::from_slice(&[0, half as i32, 2 * half as i32]).to_device(device);
    let flash = |x: &Tensor| {
        let [q, key, v] = parts(x, &angles);
        flash_packed(&q, &key, &v, &ends, half).expect(super::FAILED)
    };
    let x = leaf(&qkv);
    let both = |forward: &dyn Fn(&Tensor) -> Tensor| {
        let there = timed(device, sizes.runs, &mut || drop(tch::no_grad(|| forward(&x))));
        let all = timed(device, sizes.runs, &mut || drop(walk(&forward(&x), &g, &x)));
        (there, all.zip(there).map(|(all, there)| all - there))
    };
    let (ours, theirs) = (both(&|x| ours(x, &angles, &spans)), both(&flash));
    let row = (sizes.tokens * h * k) as u64 * 2;
    let there = Checked {
        name: "RoPE and attention, bf16".to_owned(),
        off: off(&y, &right),
        exact: false,
        repeatable: y.equal(&again.0),
        bytes: 4 * row,
        seconds: ours.0,
        chain_seconds: theirs.0,
    };
    let back = Checked {
        name: "RoPE and attention, backward, bf16".to_owned(),
        off: off(&of_x, &of_right),
        repeatable: of_x.equal(&again.1),
        bytes: 8 * row,
        seconds: ours.1,
        chain_seconds: theirs.1,
        ..there.clone()
    };
    [there, back]
}

//! The looped language model (LOOPLM §1): one shared stack of layers applied T times.
//!
//! Shape suffixes: `b` sequences of the micro-batch, `s` sequence length, `n` = b·s tokens, `d` hidden, `h` heads,
//! `g` key/value heads, `k` head size, `f` feed-forward size, `v` vocabulary, `t` loop steps.
//!
//! The weights are leaves that share storage with the flat fp32 buffer of [`crate::params`]. Nothing here keeps a
//! graph for longer than one segment (one layer at one loop step): see [`crate::tape`].

use anello_configs::{Dtype, Mask, Model as Sizes};
use anello_dataloader::MicroBatch;
use tch::{Device, Kind, Tensor};

use crate::ffi::torch;
use crate::host;
use crate::kernels::{Kernels, Spans};
use crate::params::{Layout, NORMS};

/// A weight: a leaf of the graph over a range of the flat buffer.
#[derive(Debug)]
pub struct Leaf {
    /// The values, shaped; requires a gradient.
    pub value: Tensor,
    /// The same in the format of the matrices, where that is another: what products use, and what gets a gradient.
    narrow: Option<Tensor>,
    offset: i64,
    len: i64,
}

impl Leaf {
    /// A leaf over the entries `first ..= last` of the layout, which lie side by side, seen as `shape`.
    fn new(layout: &Layout, flat: &Tensor, first: &str, last: &str, shape: &[i64]) -> Self {
        let first = layout.find(first).expect("the layout has every part of the model");
        let last = layout.find(last).expect("the layout has every part of the model");
        let (offset, len) = (first.offset as i64, (last.range().end - first.offset) as i64);
        let value = flat.narrow(0, offset, len).view(shape).detach().set_requires_grad(true);
        Self { value, narrow: None, offset, len }
    }

    /// A matrix, which products use as it is in `narrow`, the flat buffer in their format, if there is one.
    fn matrix(mut self, narrow: Option<&Tensor>) -> Self {
        self.narrow = narrow.map(|flat| {
            let shape = self.value.size();
            flat.narrow(0, self.offset, self.len).view(shape.as_slice()).detach().set_requires_grad(true)
        });
        self
    }

    /// What products use.
    pub fn used(&self) -> &Tensor {
        self.narrow.as_ref().unwrap_or(&self.value)
    }

    /// Adds `gradient` to this weight's place in the flat gradient buffer.
    pub fn accumulate(&self, flat_gradient: &Tensor, gradient: &Tensor) {
        let _ = flat_gradient.narrow(0, self.offset, self.len).g_add_(&gradient.reshape([-1]));
    }

    /// Adds the product `a · b`, shaped like this weight, to its place in the flat gradient buffer.
    pub fn accumulate_product(&self, flat_gradient: &Tensor, a: &Tensor, b: &Tensor) {
        let place = || flat_gradient.narrow(0, self.offset, self.len).view(self.value.size().as_slice());
        if a.kind() == flat_gradient.kind() {
            let _ = place().addmm_(a, b);
        } else if a.device() != Device::Cpu {
            torch::add_product(&place(), a, b).expect(host::FAILED);
        } else {
            self.accumulate(flat_gradient, &a.matmul(b));
        }
    }
}

/// Products of a segment, of which its backward is to tell the gradients instead of those of their weights: [`Leaf::accumulate_product`]
/// then adds up the weights' gradients where they belong, in fp32 from the first product on.
#[derive(Debug, Default)]
pub struct Products {
    inputs: Vec<Tensor>,
    /// What came of each.
    pub outputs: Vec<Tensor>,
}

impl Products {
    /// Adds the gradients of the weights of `layer` to the flat gradient, from those of the outputs.
    pub fn accumulate(&self, layer: &Layer, of_outputs: &[Tensor], flat_gradient: &Tensor) {
        for ((leaf, x), of_y) in layer.matrices().into_iter().zip(&self.inputs).zip(of_outputs) {
            leaf.accumulate_product(flat_gradient, &of_y.tr(), x);
        }
    }
}

/// Weights of one layer.
#[derive(Debug)]
pub struct Layer {
    norms: [Leaf; 4],
    qkv: Leaf,
    out: Leaf,
    gate_up: Leaf,
    down: Leaf,
}

impl Layer {
    /// Every weight of the layer.
    pub fn leaves(&self) -> [&Leaf; 8] {
        let [n1, n2, n3, n4] = &self.norms;
        [n1, &self.qkv, &self.out, n2, n3, &self.gate_up, &self.down, n4]
    }

    /// Those of the norms.
    pub fn norms(&self) -> [&Leaf; 4] {
        self.norms.each_ref()
    }

    /// The matrices, as a forward comes to them.
    fn matrices(&self) -> [&Leaf; 4] {
        [&self.qkv, &self.out, &self.gate_up, &self.down]
    }
}

/// The model: views into a flat parameter buffer, and the forward of its parts.
#[derive(Debug)]
pub struct Model {
    sizes: Sizes,
    kind: Kind,
    wide: Kind,
    /// What norms, SwiGLU, RoPE and attention are computed with, where it is not LibTorch.
    kernels: Option<Kernels>,
    /// Whether a segment's backward takes the gradients of weights from its [`Products`]: of bf16 on a GPU, which adds them up in
    /// fp32 where LibTorch's own walk rounds each to bf16.
    pub(crate) by_products: bool,
    /// The matrices in fp32 and in `kind`, flat, where that is another format: what [`Model::refresh`] copies.
    narrow: Option<(Tensor, Tensor)>,
    /// `embed_tokens`, `[v, d]`.
    pub embed: Leaf,
    /// The shared stack.
    pub layers: Vec<Layer>,
    /// The norm at the end of every loop step, `[d]`.
    pub final_norm: Leaf,
    /// Weights of the exit gate, `[1, d]`.
    pub gate_weight: Leaf,
    /// Bias of the exit gate, `[1]`.
    pub gate_bias: Leaf,
    /// `lm_head`, `[v, d]`.
    pub lm_head: Leaf,
}

impl Model {
    /// The model of `sizes` over `flat`, which has `layout`; matrices multiply in `dtype`.
    ///
    /// `flat` is fp32. With an f64 buffer everything is f64: that is how gradients are checked against differences.
    pub fn new(sizes: &Sizes, dtype: Dtype, layout: &Layout, flat: &Tensor) -> Self {
        let (d, f, v) = (i64::from(sizes.hidden), i64::from(sizes.ffn), i64::from(sizes.vocab));
        let kv = d / i64::from(sizes.heads) * i64::from(sizes.kv_heads);
        let kind = if flat.kind() == Kind::Double { Kind::Double } else { kind_of(dtype) };
        let narrow = (kind != flat.kind()).then(|| {
            let matrices = flat.narrow(0, 0, layout.decayed_len() as i64);
            let narrow = tch::no_grad(|| matrices.to_kind(kind));
            (matrices, narrow)
        });
        let of_kind = narrow.as_ref().map(|(_, narrow)| narrow);
        let one = |name: &str, shape: &[i64]| Leaf::new(layout, flat, name, name, shape);
        let layers = (0..layout.layers())
            .map(|l| {
                let name = |part: &str| format!("model.layers.{l}.{part}.weight");
                let span = |first: &str, last: &str, shape: &[i64]| {
                    Leaf::new(layout, flat, &name(first), &name(last), shape)
                };
                Layer {
                    norms: NORMS.map(|norm| span(norm, norm, &[d])),
                    qkv: span("self_attn.q_proj", "self_attn.v_proj", &[d + 2 * kv, d]).matrix(of_kind),
                    out: span("self_attn.o_proj", "self_attn.o_proj", &[d, d]).matrix(of_kind),
                    gate_up: span("mlp.gate_proj", "mlp.up_proj", &[2 * f, d]).matrix(of_kind),
                    down: span("mlp.down_proj", "mlp.down_proj", &[d, f]).matrix(of_kind),
                }
            })
            .collect();
        Self {
            sizes: sizes.clone(),
            kind,
            wide: flat.kind(),
            kernels: None,
            by_products: narrow.is_some() && flat.device() != Device::Cpu,
            embed: one("model.embed_tokens.weight", &[v, d]),
            layers,
            final_norm: one("model.norm.weight", &[d]),
            gate_weight: one("model.early_exit_gate.weight", &[1, d]),
            gate_bias: one("model.early_exit_gate.bias", &[1]),
            lm_head: one("lm_head.weight", &[v, d]).matrix(of_kind),
            narrow,
        }
    }

    /// The same, computed with `kernels` where there are such: see `compute.fused`.
    pub(crate) fn with_kernels(self, kernels: Option<Kernels>) -> Self {
        Self { kernels, ..self }
    }

    /// Takes up the weights as they are now in the flat buffer: to be called after every change of them.
    pub fn refresh(&self) {
        if let Some((wide, narrow)) = &self.narrow {
            tch::no_grad(|| narrow.shallow_clone().copy_(wide));
        }
    }

    /// Size of an attention head (K).
    pub fn head_size(&self) -> i64 {
        i64::from(self.sizes.hidden / self.sizes.heads)
    }

    /// Format of the matrices.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Format of norms, losses and weights: fp32.
    pub fn wide(&self) -> Kind {
        self.wide
    }

    /// Hidden states before the first loop step, `[n, d]`.
    pub fn embed_nd(&self, ids_n: &Tensor) -> Tensor {
        self.embed.value.index_select(0, ids_n).to_kind(self.kind)
    }

    /// One layer at one loop step, `[n, d] -> [n, d]`; the last layer of the stack includes the final norm.
    pub fn layer_nd(&self, index: usize, h_nd: &Tensor, tokens: &dyn Tokens) -> Tensor {
        self.layer_with(index, h_nd, tokens, &mut None)
    }

    /// The same, and what products it makes where somebody asks.
    pub fn layer_with(
        &self,
        index: usize,
        h_nd: &Tensor,
        tokens: &dyn Tokens,
        products: &mut Option<Products>,
    ) -> Tensor {
        let layer = &self.layers[index];
        let [norm1, norm2, norm3, norm4] = &layer.norms;
        let attended_nd = self.attention_nd(index, &self.norm(h_nd, norm1), tokens, products);
        let h_nd = self.add_norm(h_nd, &attended_nd, norm2);
        let fed_nd = self.mlp_nd(layer, &self.norm(&h_nd, norm3), products);
        let h_nd = self.add_norm(&h_nd, &fed_nd, norm4);
        if index + 1 == self.layers.len() { self.norm(&h_nd, &self.final_norm) } else { h_nd }
    }

    fn norm(&self, x: &Tensor, weight: &Leaf) -> Tensor {
        if let Some(kernels) = &self.kernels {
            return kernels.rms_norm(x, &weight.value, None, self.sizes.rms_eps);
        }
        rms_norm(x, &weight.value, self.sizes.rms_eps, self.wide)
    }

    /// The norm of `x`, added to the residual stream.
    fn add_norm(&self, h_nd: &Tensor, x_nd: &Tensor, weight: &Leaf) -> Tensor {
        match &self.kernels {
            Some(kernels) => kernels.rms_norm(x_nd, &weight.value, Some(h_nd), self.sizes.rms_eps),
            None => h_nd + self.norm(x_nd, weight),
        }
    }

    /// Where the products of a segment are kept, if they are.
    pub fn products(&self) -> Option<Products> {
        self.by_products.then(Products::default)
    }

    fn attention_nd(
        &self,
        index: usize,
        x_nd: &Tensor,
        tokens: &dyn Tokens,
        products: &mut Option<Products>,
    ) -> Tensor {
        let layer = &self.layers[index];
        let (heads, kv_heads) = (i64::from(self.sizes.heads), i64::from(self.sizes.kv_heads));
        let k = i64::from(self.sizes.hidden) / heads;
        let n = x_nd.size()[0];
        // [n, d] x [d, (h + 2g)·k] -> [n, h + 2g, k]
        let qkv = product(x_nd, &layer.qkv, products).view([n, heads + 2 * kv_heads, k]);
        let mixed = self.whole_attention().and_then(|kernels| tokens.attend_whole(kernels, &qkv));
        let mixed = mixed.unwrap_or_else(|| {
            let parts = qkv.split_with_sizes([heads + kv_heads, kv_heads], 1);
            let rotated = tokens.angles().rotate_by(self.kernels.as_ref(), &parts[0]);
            let rotated = rotated.split_with_sizes([heads, kv_heads], 1);
            tokens.attend(index, &rotated[0], &rotated[1], &parts[1])
        });
        product(&mixed.reshape([n, heads * k]), &layer.out, products)
    }

    /// The kernels that have RoPE and attention in one, where it is such heads that they are for.
    fn whole_attention(&self) -> Option<&Kernels> {
        let (heads, kv_heads) = (i64::from(self.sizes.heads), i64::from(self.sizes.kv_heads));
        self.kernels.as_ref().filter(|kernels| kernels.attends(self.kind, self.head_size(), heads, kv_heads))
    }

    fn mlp_nd(&self, layer: &Layer, x_nd: &Tensor, products: &mut Option<Products>) -> Tensor {
        let gate_up = product(x_nd, &layer.gate_up, products);
        let gated_nf = match &self.kernels {
            Some(kernels) => kernels.swiglu(&gate_up),
            None => swiglu(&gate_up),
        };
        product(&gated_nf, &layer.down, products)
    }

    /// The kernels that it is computed with, where it is not LibTorch.
    pub(crate) fn kernels(&self) -> Option<&Kernels> {
        self.kernels.as_ref()
    }

    /// Logits of hidden states, `[.., d] -> [.., v]`, fp32.
    pub fn logits(&self, h: &Tensor) -> Tensor {
        h.matmul(&self.lm_head.used().tr()).to_kind(self.wide)
    }

    /// Logits of the exit gate, `[.., d] -> [..]`, fp32: λ is their sigmoid.
    pub fn gate_logits(&self, h: &Tensor) -> Tensor {
        h.to_kind(self.wide).matmul(&self.gate_weight.value.tr()).squeeze_dim(-1) + &self.gate_bias.value
    }
}

/// `x` by a weight, `[n, in] x [out, in] -> [n, out]`.
fn product(x: &Tensor, weight: &Leaf, products: &mut Option<Products>) -> Tensor {
    let Some(products) = products else { return x.matmul(&weight.used().tr()) };
    let y = x.matmul(&weight.used().detach().tr());
    products.inputs.push(x.detach());
    products.outputs.push(y.shallow_clone());
    y
}

/// RMSNorm with statistics in the format `wide`, from primitives: the native backward sums per thread.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, wide: Kind) -> Tensor {
    let x_wide = x.to_kind(wide);
    let mean_square = x_wide.square().mean_dim(-1i64, true, wide);
    (x_wide * (mean_square + eps).rsqrt() * weight).to_kind(x.kind())
}

/// SwiGLU of rows [gate | up], `[n, 2f] -> [n, f]`.
pub(crate) fn swiglu(gate_up: &Tensor) -> Tensor {
    let parts = gate_up.chunk(2, -1);
    silu(&parts[0]) * &parts[1]
}

/// SiLU whose bits do not depend on the number of CPU threads, `[n, f] -> [n, f]`.
///
/// LibTorch cuts an elementwise operation of more than 32768 elements at places that depend on the number of threads,
/// and for SiLU alone of those used here the scalar tail of a piece rounds otherwise than its vector body (measured;
/// exp, tanh and log-sigmoid, which go through a vector library with their tails, do not). Slices of fewer elements
/// are computed on one thread.
fn silu(x_nf: &Tensor) -> Tensor {
    const SERIAL_MAX: i64 = 32_768;
    let [n, f] = x_nf.size()[..] else { unreachable!("the feed-forward is [n, f]") };
    if x_nf.device() != Device::Cpu || n * f < SERIAL_MAX {
        return x_nf.silu();
    }
    let slices = x_nf.split(((SERIAL_MAX - 1) / f).max(1), 0);
    Tensor::cat(&slices.iter().map(Tensor::silu).collect::<Vec<_>>(), 0)
}

fn kind_of(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::Fp32 => Kind::Float,
        Dtype::Bf16 => Kind::BFloat16,
    }
}

/// cos and sin of the rotary angles by position, `[positions, k/2]`: a function of base, head size and length.
///
/// Angles are fp32 products; the functions are `libm`'s, so that the table is the same on every machine.
#[derive(Debug)]
pub struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    /// The table for positions `0..length`.
    pub fn new(base: f64, head_size: i64, length: i64, device: Device) -> Self {
        let half = head_size / 2;
        let frequencies: Vec<f32> =
            (0..half).map(|i| libm::pow(base, -2.0 * i as f64 / head_size as f64) as f32).collect();
        let angles = (0..length).flat_map(|p| frequencies.iter().map(move |f| f64::from(p as f32 * f)));
        let (sin, cos): (Vec<f32>, Vec<f32>) =
            angles.map(libm::sincos).map(|(s, c)| (s as f32, c as f32)).unzip();
        let shaped = |values: &[f32]| Tensor::from_slice(values).view([length, half]).to_device(device);
        Self { cos: shaped(&cos), sin: shaped(&sin) }
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        self.cos.device()
    }
}

/// How attention keeps documents apart. The bits of a result depend on which form is taken, and the form on the
/// micro-batch and the kind of device alone.
#[derive(Debug)]
enum Apart {
    /// One causal call for all segments: flash attention with `ends`, where each begins and the last ends, `[segments + 1]`
    /// of int32. On a GPU, in bf16: no mask, and no work across documents.
    Packed { ends: Tensor, longest: i64, spans: Spans },
    /// One causal call for each segment of these lengths: no work across documents.
    Segments(Vec<i64>),
    /// One call a micro-batch with a dense mask `[b, 1, s, s]`: many short documents.
    Dense { mask: Tensor, sequences: i64 },
}

/// The tokens of a pass: where each is, and what it attends to.
pub trait Tokens {
    /// By how much RoPE rotates each.
    fn angles(&self) -> &Angles;

    /// Attention in layer `index`: queries `[n, h, k]`, keys and values `[n, g, k]`, to `[n, h, k]`.
    fn attend(&self, index: usize, q_nhk: &Tensor, k_ngk: &Tensor, v_ngk: &Tensor) -> Tensor;

    /// RoPE and attention at once, of queries, keys and values beside one another (`[n, 3·h, k]`), by `Kernels::attention`, where
    /// these tokens are such as it is for.
    fn attend_whole(&self, _: &Kernels, _: &Tensor) -> Option<Tensor> {
        None
    }
}

/// Key/value heads for every query head, `[n, g, k] -> [n, heads, k]`.
pub(crate) fn spread(x_ngk: &Tensor, heads: i64) -> Tensor {
    match heads / x_ngk.size()[1] {
        1 => x_ngk.shallow_clone(),
        group => x_ngk.repeat_interleave_self_int(group, 1, heads),
    }
}

/// The angles of some positions, `[n, 1, k/2]` each.
#[derive(Debug)]
pub struct Angles {
    cos_n1k: Tensor,
    sin_n1k: Tensor,
}

impl Angles {
    /// Those of `positions_n` in the format of the matrices.
    pub(crate) fn at(rotary: &Rotary, positions_n: &Tensor, kind: Kind) -> Self {
        let pick = |table: &Tensor| table.index_select(0, positions_n).unsqueeze(1).to_kind(kind);
        Self { cos_n1k: pick(&rotary.cos), sin_n1k: pick(&rotary.sin) }
    }

    /// cos and sin.
    pub(crate) fn tables(&self) -> [&Tensor; 2] {
        [&self.cos_n1k, &self.sin_n1k]
    }

    /// The same angles in another format.
    pub(crate) fn to_kind(&self, kind: Kind) -> Self {
        Self { cos_n1k: self.cos_n1k.to_kind(kind), sin_n1k: self.sin_n1k.to_kind(kind) }
    }

    /// RoPE in the rotate-half form: `[n, heads, k] -> [n, heads, k]`.
    pub(crate) fn rotate_by(&self, kernels: Option<&Kernels>, x: &Tensor) -> Tensor {
        if let Some(kernels) = kernels {
            return kernels.rope(x, &self.cos_n1k, &self.sin_n1k);
        }
        let halves = x.chunk(2, -1);
        let (x1, x2) = (&halves[0], &halves[1]);
        let (cos, sin) = (&self.cos_n1k, &self.sin_n1k);
        Tensor::cat(&[x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
    }
}

/// What the layers need to know of a micro-batch.
#[derive(Debug)]
pub struct Context {
    angles: Angles,
    apart: Apart,
}

impl Context {
    /// Mean segment length, tokens, below which a dense mask is cheaper than a call for each segment.
    const SHORT_SEGMENT: usize = 48;
    /// Longest sequence for which a dense mask is made, tokens.
    const DENSE_LENGTH_MAX: u32 = 4096;

    /// The context of `batch`; `mask` says what its segments are.
    pub fn new(batch: &MicroBatch, rotary: &Rotary, kind: Kind, mask: Mask) -> Self {
        let device = rotary.device();
        let positions_n = host::upload(&batch.positions, device);
        let tokens = batch.tokens();
        let short = batch.segment_starts.len() * Self::SHORT_SEGMENT > tokens;
        let ends = || batch.segment_starts.iter().skip(1).copied().chain([tokens as u32]);
        let lengths = || batch.segment_starts.iter().zip(ends()).map(|(a, b)| i64::from(b - a));
        let apart = if device != Device::Cpu && kind == Kind::BFloat16 {
            let ends: Vec<i32> =
                batch.segment_starts.iter().copied().chain([tokens as u32]).map(|at| at as i32).collect();
            let longest = lengths().max().unwrap_or(0);
            let spans = Spans::new(&batch.segment_starts, tokens, |values| host::upload(values, device));
            Apart::Packed { ends: host::upload(&ends, device), longest, spans }
        } else if device == Device::Cpu
            && mask == Mask::Document
            && short
            && batch.length <= Self::DENSE_LENGTH_MAX
        {
            Apart::Dense { mask: dense_mask(batch, device), sequences: i64::from(batch.sequences) }
        } else {
            Apart::Segments(lengths().collect())
        };
        Self { angles: Angles::at(rotary, &positions_n, kind), apart }
    }

    /// What `model` reads of it, and how many documents it is told of, where the work is the same for all micro-batches of such
    /// shapes: LibTorch's attention is called otherwise for documents of other lengths.
    pub(crate) fn fixed(&self, model: &Model) -> Option<(Vec<&Tensor>, usize)> {
        let [cos, sin] = self.angles.tables();
        let alike = |lengths: &[i64]| lengths.windows(2).all(|pair| pair[0] == pair[1]);
        match &self.apart {
            Apart::Packed { spans, .. } if model.whole_attention().is_some() => {
                Some((Vec::from([cos, sin, &spans.starts, &spans.ends]), 0))
            }
            Apart::Packed { ends, longest, .. } => {
                let documents = ends.size()[0] - 1;
                (documents * longest == cos.size()[0])
                    .then(|| (Vec::from([cos, sin, ends]), documents as usize))
            }
            Apart::Segments(lengths) => alike(lengths).then(|| (Vec::from([cos, sin]), lengths.len())),
            Apart::Dense { mask, .. } => Some((Vec::from([cos, sin, mask]), 0)),
        }
    }

    /// The same in memory of its own.
    pub(crate) fn copy(&self) -> Self {
        let apart = match &self.apart {
            Apart::Packed { ends, longest, spans } => {
                let spans = Spans { starts: spans.starts.copy(), ends: spans.ends.copy() };
                Apart::Packed { ends: ends.copy(), longest: *longest, spans }
            }
            Apart::Segments(lengths) => Apart::Segments(lengths.clone()),
            Apart::Dense { mask, sequences } => Apart::Dense { mask: mask.copy(), sequences: *sequences },
        };
        let Angles { cos_n1k, sin_n1k } = &self.angles;
        Self { angles: Angles { cos_n1k: cos_n1k.copy(), sin_n1k: sin_n1k.copy() }, apart }
    }
}

impl Tokens for Context {
    fn angles(&self) -> &Angles {
        &self.angles
    }

    fn attend_whole(&self, kernels: &Kernels, qkv: &Tensor) -> Option<Tensor> {
        let Apart::Packed { spans, .. } = &self.apart else { return None };
        let [cos_n1k, sin_n1k] = self.angles.tables();
        Some(kernels.attention(qkv, cos_n1k, sin_n1k, spans))
    }

    /// Causal attention within segments.
    fn attend(&self, _: usize, q_nhk: &Tensor, k_ngk: &Tensor, v_ngk: &Tensor) -> Tensor {
        let heads = q_nhk.size()[1];
        if let Apart::Packed { ends, longest, .. } = &self.apart {
            // It serves fewer key/value heads by itself.
            return torch::flash_packed(q_nhk, k_ngk, v_ngk, ends, *longest)
                .expect("flash attention of bf16 on a GPU");
        }
        let (k_nhk, v_nhk) = (&spread(k_ngk, heads), &spread(v_ngk, heads));
        match &self.apart {
            Apart::Packed { .. } => unreachable!("served above"),
            Apart::Segments(lengths) => {
                // A split's backward is one concatenation; a slice's would be a full tensor of zeros each.
                let split =
                    |x: &Tensor| x.transpose(0, 1).unsqueeze(0).split_with_sizes(lengths.as_slice(), 2);
                let (qs, ks, vs) = (split(q_nhk), split(k_nhk), split(v_nhk));
                let mixed: Vec<Tensor> = qs
                    .iter()
                    .zip(ks.iter().zip(&vs))
                    .map(|(q, (k, v))| attention(q, k, v, None, true))
                    .collect();
                Tensor::cat(&mixed, 2).squeeze_dim(0).transpose(0, 1)
            }
            Apart::Dense { mask, sequences } => {
                let [n, h, k] = q_nhk.size()[..] else { unreachable!("queries are [n, h, k]") };
                let rows = |x: &Tensor| x.view([*sequences, n / sequences, h, k]).transpose(1, 2);
                let mixed = attention(&rows(q_nhk), &rows(k_nhk), &rows(v_nhk), Some(mask), false);
                mixed.transpose(1, 2).reshape([n, h, k])
            }
        }
    }
}

/// Softmax attention of `[b, h, n, k]` queries over keys and values of `[b, h, m, k]`.
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, causal: bool) -> Tensor {
    Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, causal, None::<f64>, false)
}

/// True where row may attend to column, `[b, 1, s, s]`: same segment, and not later.
fn dense_mask(batch: &MicroBatch, device: Device) -> Tensor {
    let mut segment = vec![0i32; batch.tokens()];
    for &start in batch.segment_starts.iter().filter(|&&start| start > 0) {
        segment[start as usize] = 1;
    }
    let (b, s) = (i64::from(batch.sequences), i64::from(batch.length));
    let segment_bs = host::upload(&segment, device).cumsum(0, Kind::Int).view([b, s]);
    let same = segment_bs.unsqueeze(2).eq_tensor(&segment_bs.unsqueeze(1));
    same.tril(0).unsqueeze(1)
}

//! Fused kernels of our own for GPUs, where LibTorch has a chain of kernels that each read and write all of memory.
//!
//! ```text
//! adamw.cu      AdamW over flat buffers, and the sums of squares of its norm
//! rms_norm.cu   RMSNorm, with the residual it is added to; forward and backward
//! swiglu.cu     SwiGLU; forward and backward              rope.cu  rotary embeddings; both ways
//! cross_entropy.cu   cross-entropy of logits and its gradient, in place
//! common.cuh    the two formats, several elements at once, and sums of written order
//! host.cpp      what runs the same text on a CPU, for tests
//! attention/    attention on Hopper, compiled beforehand
//! ```
//! The sources are part of this build. NVRTC compiles them when a run with `compute.fused` opens its GPU, for that GPU, once a
//! process: no toolkit, no header and no driver's own compiler has a part in it.
//!
//! The bits of a kernel follow from its inputs: the order of every sum is written and depends on shapes alone, nothing is added
//! with atomics, and what the compiler might take liberties with is fixed (`OPTIONS`). AdamW has those
//! of its formula, one IEEE operation after the other, on any device.
//!
//! The backward of a kernel is a node of LibTorch's graph (`ffi::node`), so that segments, recomputation and whatever
//! else stands on graphs is as it is without. Writing out a layer's backward would save the graph, and would have to be kept
//! equal to the forward by hand, for each way of attention.

mod attention;
mod check;
#[cfg(test)]
mod emulated;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anello_configs::{Compute, ComputeDevice};
use tch::{Device, Kind, Tensor};

pub(crate) use attention::Spans;
pub use check::{Checked, Sizes, check};

use crate::device;
use crate::error::{Error, Result};
use crate::ffi::argument::Argument::{self, Elements, F32, I32, I64, Null};
#[cfg(test)]
use crate::ffi::emulated::Emulated;
use crate::ffi::gpu::Module;
use crate::ffi::library;
use crate::ffi::node::with_backward;
use crate::ffi::nvrtc::Nvrtc;
use crate::optimizer::Scale;

/// Names the NVRTC that kernels are compiled with, a `libnvrtc.so.13`; not set: the one of the LibTorch in use.
pub const NVRTC: &str = "ANELLO_NVRTC";

/// The text that is compiled: one program.
const SOURCES: [&str; 6] = [
    include_str!("common.cuh"),
    include_str!("adamw.cu"),
    include_str!("rms_norm.cu"),
    include_str!("swiglu.cu"),
    include_str!("rope.cu"),
    include_str!("cross_entropy.cu"),
];

/// What the bits rest on: no contraction of a product and a sum, numbers below the normal ones kept, division and root rounded
/// correctly.
const OPTIONS: [&str; 5] =
    ["--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true"];

/// Threads of a block of kernels that have an element or a few a thread.
const BLOCK: u32 = 256;
/// Elements of a thread of those over flat buffers, as in the sources.
const OF_A_THREAD: usize = 4;
/// Rows whose part of a norm's weight gradient one block adds up: part of what bits follow from.
const ROWS_OF_A_BLOCK: usize = 8;
/// Bytes that a thread reads or writes at once, at a multiple of which rows begin.
const ONCE: usize = 16;
/// What a launch rests on beside its own arguments: the GPU works, as in every tensor operation.
const FAILED: &str = "the GPU takes a kernel";

/// Kernels that are compiled and loaded for a GPU. Clones are the same ones.
#[derive(Clone, Debug)]
pub struct Kernels(Arc<Target>);

#[derive(Debug)]
enum Target {
    Gpu(Module, Option<attention::Attention>),
    #[cfg(test)]
    Emulated(Emulated),
}

/// Opens the device of `compute`, and the kernels that it asks for ([`Kernels::open`]).
///
/// # Errors
/// [`Error::Device`], [`Error::Config`].
pub fn ready(compute: &Compute) -> Result<Device> {
    let device = device::open(compute.device)?;
    of(compute, device).map(|_| device)
}

/// The kernels that `compute` asks for on `device`, if it does; they are compiled once a process and GPU.
///
/// # Errors
/// As [`Kernels::open`].
pub(crate) fn of(compute: &Compute, device: Device) -> Result<Option<Kernels>> {
    static OPENED: Mutex<Vec<(Device, Kernels)>> = Mutex::new(Vec::new());
    if !compute.fused {
        return Ok(None);
    }
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, kernels)) = opened.iter().find(|(of, _)| *of == device) {
        return Ok(Some(kernels.clone()));
    }
    let kernels = Kernels::open(device)?;
    opened.push((device, kernels.clone()));
    Ok(Some(kernels))
}

/// The place of the NVRTC of this process; in words where it was looked for.
fn nvrtc() -> std::result::Result<PathBuf, String> {
    match std::env::var_os(NVRTC) {
        Some(path) => Ok(PathBuf::from(path)),
        None => {
            device::beside_torch("libnvrtc.so.13", &["../../nvidia/cu13/lib", "../../nvidia/cuda_nvrtc/lib"])
        }
    }
}

/// Compiles the sources for GPUs of this compute capability.
fn compile(nvrtc: &Nvrtc, (major, minor): (i32, i32)) -> std::result::Result<Vec<u8>, String> {
    let mut options = OPTIONS.map(str::to_owned).to_vec();
    options.push(format!("--gpu-architecture=sm_{major}{minor}"));
    nvrtc.compile(&SOURCES.concat(), &options)
}

/// What `anello doctor` says of NVRTC.
pub(crate) fn checkup() -> String {
    let found = nvrtc().and_then(|path| Nvrtc::load(&path).map(|nvrtc| (path, nvrtc.version)));
    match found {
        Ok((path, (major, minor))) => format!("NVRTC: {major}.{minor}, {}", path.display()),
        Err(cause) => format!("NVRTC: {cause}"),
    }
}

/// A format that kernels come in, as their names end.
fn suffixed(kind: Kind, f32: &'static str, bf16: &'static str) -> &'static str {
    match kind {
        Kind::Float => f32,
        Kind::BFloat16 => bf16,
        other => panic!("fused kernels are of fp32 and bf16, not of {other:?}"),
    }
}

/// A tensor that a kernel reads as one piece of memory, of this shape, from a multiple of what it reads at once.
fn dense(x: &Tensor, kind: Kind, shape: &[i64]) -> Tensor {
    assert_eq!((x.kind(), x.size().as_slice()), (kind, shape), "what a kernel is given");
    let x = x.contiguous();
    if is_aligned(&x) { x } else { x.copy() }
}

fn is_aligned(x: &Tensor) -> bool {
    (x.data_ptr() as usize).is_multiple_of(ONCE)
}

/// Elements of rows of `width` that a thread has at once, as in the sources.
fn at_once(kind: Kind, width: i64) -> i64 {
    let once = (ONCE / kind.elt_size_in_bytes()) as i64;
    if width % once == 0 { once } else { 1 }
}

/// A size as kernels have it.
fn int(size: i64) -> i32 {
    i32::try_from(size).expect("rows and widths of a micro-batch are below 2^31")
}

/// Threads of a block that has rows of `width`: whole warps, about eight elements a thread and at most sixteen (`ELEMENTS` in the
/// sources) up to a width of 12,288.
fn threads_of_a_row(width: i64) -> u32 {
    assert!(width <= 12_288, "rows of {width} are wider than a block");
    32 * (width as u32).div_ceil(256).clamp(1, 24)
}

impl Kernels {
    /// Compiles and loads the kernels for `device`.
    ///
    /// # Errors
    /// [`Error::Config`] on a CPU; [`Error::Device`]: no NVRTC, with where it was looked for, or what it says.
    pub fn open(device: Device) -> Result<Self> {
        let Device::Cuda(number) = device else {
            let fact = "compute.fused is true, and a CPU has no fused kernels";
            return Err(Error::config(fact, "compute on a GPU (--device cuda), or leave compute.fused out"));
        };
        let failed = |fact: String, remedy: &str| Error::Device {
            wanted: format!("{} with compute.fused", ComputeDevice::Cuda(Some(number as u32))),
            fact,
            remedy: remedy.to_owned(),
        };
        let path = nvrtc().map_err(|fact| {
            failed(fact, "`make cuda` fetches it; or name a libnvrtc.so.13 in ANELLO_NVRTC, or leave compute.fused out")
        })?;
        let loaded = Nvrtc::load(&path).and_then(|nvrtc| {
            let (_, gpus) = library::driver()?;
            let gpu = gpus.get(number).ok_or_else(|| format!("the driver has no GPU {number}"))?;
            let module = Module::load(device, &compile(&nvrtc, gpu.capability)?)?;
            Ok((module, attention::Attention::load(device, gpu.capability)?))
        });
        let (module, attention) = loaded.map_err(|fact| {
            failed(
                format!("{} compiles no kernels for it: {fact}", path.display()),
                "leave compute.fused out, or name an NVRTC that knows this GPU in ANELLO_NVRTC",
            )
        })?;
        Ok(Self(Arc::new(Target::Gpu(module, attention))))
    }

    fn launch(&self, name: &'static str, grid: usize, block: u32, arguments: &[Argument<'_>]) {
        // No launch is of no blocks.
        if grid == 0 {
            return;
        }
        let grid = u32::try_from(grid).ok().filter(|grid| i32::try_from(*grid).is_ok());
        let grid = grid.expect("a grid has fewer than 2^31 blocks");
        match &*self.0 {
            Target::Gpu(module, _) => module.launch(name, [grid, 1], block, 0, arguments),
            #[cfg(test)]
            Target::Emulated(emulated) => emulated.launch(name, grid, block, arguments),
        }
        .unwrap_or_else(|cause| panic!("{FAILED}: {cause}"));
    }

    /// A kernel that has a few elements of `len` a thread.
    fn launch_flat(&self, name: &'static str, len: usize, arguments: &[Argument<'_>]) {
        self.launch(name, len.div_ceil(OF_A_THREAD * BLOCK as usize), BLOCK, arguments);
    }

    /// One AdamW update in place of flat fp32 `weights` and moments, of which the first `decayed` decay, by the sum `gradient`.
    pub(crate) fn adamw_update(
        &self,
        scale: &Scale,
        [weights, exp_avg, exp_avg_sq]: [&Tensor; 3],
        gradient: &Tensor,
        decayed: usize,
    ) {
        let len = flat([weights, exp_avg, exp_avg_sq, gradient]);
        let [beta1, rest1, beta2, rest2] = scale.betas();
        let [correction2, eps, decay, rate] = scale.of_weights();
        self.launch_flat(
            "adamw_update",
            len,
            &[
                Elements(weights),
                Elements(exp_avg),
                Elements(exp_avg_sq),
                Elements(gradient),
                I64(len as i64),
                I64(decayed as i64),
                F32(scale.gradient as f32),
                F32(beta1),
                F32(rest1),
                F32(beta2),
                F32(rest2),
                F32(correction2),
                F32(eps),
                F32(decay),
                F32(rate),
            ],
        );
    }

    /// The moments' part of it, by a gradient that is scaled.
    pub(crate) fn adamw_moments(
        &self,
        scale: &Scale,
        [exp_avg, exp_avg_sq]: [&Tensor; 2],
        gradient: &Tensor,
    ) {
        let len = flat([exp_avg, exp_avg_sq, gradient]);
        let [beta1, rest1, beta2, rest2] = scale.betas();
        self.launch_flat(
            "adamw_moments",
            len,
            &[
                Elements(exp_avg),
                Elements(exp_avg_sq),
                Elements(gradient),
                I64(len as i64),
                F32(beta1),
                F32(rest1),
                F32(beta2),
                F32(rest2),
            ],
        );
    }

    /// The weights' part of it, by moments that are those of the step.
    pub(crate) fn adamw_weights(
        &self,
        scale: &Scale,
        weights: &Tensor,
        [exp_avg, exp_avg_sq]: [&Tensor; 2],
        decayed: usize,
    ) {
        let len = flat([weights, exp_avg, exp_avg_sq]);
        let [correction2, eps, decay, rate] = scale.of_weights();
        self.launch_flat(
            "adamw_weights",
            len,
            &[
                Elements(weights),
                Elements(exp_avg),
                Elements(exp_avg_sq),
                I64(len as i64),
                I64(decayed as i64),
                F32(correction2),
                F32(eps),
                F32(decay),
                F32(rate),
            ],
        );
    }

    /// The sum of squares of each row of 1024 of a flat fp32 gradient, each row halved ten times.
    pub(crate) fn square_rows(&self, gradient: &Tensor) -> Tensor {
        const ROW: usize = 1024;
        let len = flat([gradient]);
        assert!(len.is_multiple_of(ROW), "whole rows");
        let rows = len / ROW;
        let sums = Tensor::empty([rows as i64], (Kind::Float, gradient.device()));
        let warps = BLOCK as usize / 32;
        self.launch(
            "square_rows",
            rows.div_ceil(warps),
            BLOCK,
            &[Elements(&sums), Elements(gradient), I64(rows as i64)],
        );
        sums
    }

    /// RMSNorm of the rows of `x` (`[n, d]`, fp32 or bf16) with an fp32 `weight` (`[d]`), added to `residual` where there is one;
    /// with a graph when one is recorded.
    pub(crate) fn rms_norm(
        &self,
        x_nd: &Tensor,
        weight_d: &Tensor,
        residual_nd: Option<&Tensor>,
        eps: f64,
    ) -> Tensor {
        let [n, d] = x_nd.size()[..] else { panic!("a norm is of rows, not of {:?}", x_nd.size()) };
        let kind = x_nd.kind();
        let (y, inverse, x, weight) = tch::no_grad(|| {
            let (x, weight) = (dense(x_nd, kind, &[n, d]), dense(weight_d, Kind::Float, &[d]));
            let residual = residual_nd.map(|residual| dense(residual, kind, &[n, d]));
            let y = Tensor::empty([n, d], (kind, x.device()));
            let inverse = Tensor::empty([n], (Kind::Float, x.device()));
            let name = suffixed(kind, "rms_norm_forward_f32", "rms_norm_forward_bf16");
            self.launch(
                name,
                n as usize,
                threads_of_a_row(d),
                &[
                    Elements(&y),
                    Elements(&inverse),
                    Elements(&x),
                    Elements(&weight),
                    residual.as_ref().map_or(Null, Elements),
                    I32(int(d)),
                    F32(eps as f32),
                ],
            );
            (y, inverse, x, weight)
        });
        let inputs: Vec<&Tensor> = [x_nd, weight_d].into_iter().chain(residual_nd).collect();
        let (kernels, adds) = (self.clone(), residual_nd.is_some());
        let backward = move |g: &Tensor, saved: &[Tensor]| {
            let [x, weight, inverse] = saved else { unreachable!("three were saved") };
            let [of_x, of_weight] = kernels.rms_norm_backward(g, x, weight, inverse);
            let of_residual = adds.then(|| g.shallow_clone());
            [of_x, of_weight].into_iter().chain(of_residual).collect()
        };
        with_backward(&y, &inputs, &[&x, &weight, &inverse], Box::new(backward)).expect(FAILED)
    }

    /// Gradients of x and the weight.
    fn rms_norm_backward(
        &self,
        g_nd: &Tensor,
        x_nd: &Tensor,
        weight_d: &Tensor,
        inverse_n: &Tensor,
    ) -> [Tensor; 2] {
        let [n, d] = x_nd.size()[..] else { unreachable!("it was saved as rows") };
        let (kind, device) = (x_nd.kind(), x_nd.device());
        let g = dense(g_nd, kind, &[n, d]);
        let of_x = Tensor::empty([n, d], (kind, device));
        let blocks = (n as usize).div_ceil(ROWS_OF_A_BLOCK);
        let partials = Tensor::empty([blocks as i64, d], (Kind::Float, device));
        let name = suffixed(kind, "rms_norm_backward_f32", "rms_norm_backward_bf16");
        self.launch(
            name,
            blocks,
            threads_of_a_row(d),
            &[
                Elements(&of_x),
                Elements(&partials),
                Elements(&g),
                Elements(x_nd),
                Elements(weight_d),
                Elements(inverse_n),
                I32(int(n)),
                I32(int(d)),
                I32(ROWS_OF_A_BLOCK as i32),
            ],
        );
        let of_weight = Tensor::empty([d], (Kind::Float, device));
        self.launch(
            "rms_norm_weight",
            (d as usize).div_ceil(32),
            1024,
            &[Elements(&of_weight), Elements(&partials), I32(blocks as i32), I32(int(d))],
        );
        [of_x, of_weight]
    }

    /// SwiGLU of rows [gate | up], `[n, 2f] -> [n, f]`, fp32 or bf16; with a graph when one is recorded.
    pub(crate) fn swiglu(&self, gate_up: &Tensor) -> Tensor {
        let [n, f2] = gate_up.size()[..] else { panic!("SwiGLU is of rows, not of {:?}", gate_up.size()) };
        let (kind, f) = (gate_up.kind(), f2 / 2);
        let (y, x) = tch::no_grad(|| {
            let x = dense(gate_up, kind, &[n, 2 * f]);
            let y = Tensor::empty([n, f], (kind, x.device()));
            let name = suffixed(kind, "swiglu_forward_f32", "swiglu_forward_bf16");
            self.launch_gates(name, (n, f), kind, &[Elements(&y), Elements(&x), I32(int(n)), I32(int(f))]);
            (y, x)
        });
        let kernels = self.clone();
        let backward = move |g: &Tensor, saved: &[Tensor]| Vec::from([kernels.swiglu_backward(g, &saved[0])]);
        with_backward(&y, &[gate_up], &[&x], Box::new(backward)).expect(FAILED)
    }

    fn swiglu_backward(&self, g_nf: &Tensor, gate_up: &Tensor) -> Tensor {
        let [n, f2] = gate_up.size()[..] else { unreachable!("it was saved as rows") };
        let (kind, f) = (gate_up.kind(), f2 / 2);
        let g = dense(g_nf, kind, &[n, f]);
        let of_gate_up = gate_up.empty_like();
        let name = suffixed(kind, "swiglu_backward_f32", "swiglu_backward_bf16");
        let arguments = [Elements(&of_gate_up), Elements(&g), Elements(gate_up), I32(int(n)), I32(int(f))];
        self.launch_gates(name, (n, f), kind, &arguments);
        of_gate_up
    }

    /// A kernel whose threads have some elements of a row of `f` each.
    fn launch_gates(&self, name: &'static str, (n, f): (i64, i64), kind: Kind, arguments: &[Argument<'_>]) {
        let threads = n * (f / at_once(kind, f));
        assert!(u32::try_from(threads).is_ok(), "a micro-batch has fewer than 2^32 gates");
        self.launch(name, (threads as usize).div_ceil(BLOCK as usize), BLOCK, arguments);
    }

    /// Cross-entropy of the rows of `logits_nv` (fp32 or bf16) with `targets_n` (int64; below 0: it does not count), `[n]`, fp32.
    /// The logits become the gradient of the sum of these weighted by `weights_n` (fp32; 0 where it does not count).
    pub(crate) fn cross_entropy(&self, logits_nv: &Tensor, targets_n: &Tensor, weights_n: &Tensor) -> Tensor {
        let [n, v] = logits_nv.size()[..] else { panic!("logits are rows, not {:?}", logits_nv.size()) };
        let kind = logits_nv.kind();
        assert!(logits_nv.is_contiguous() && is_aligned(logits_nv), "logits become gradients in place");
        let targets = dense(targets_n, Kind::Int64, &[n]);
        let weights = dense(weights_n, Kind::Float, &[n]);
        let losses = Tensor::empty([n], (Kind::Float, logits_nv.device()));
        self.launch(
            suffixed(kind, "cross_entropy_f32", "cross_entropy_bf16"),
            n as usize,
            1024.min(32 * int(v).unsigned_abs().div_ceil(32)),
            &[Elements(&losses), Elements(logits_nv), Elements(&targets), Elements(&weights), I32(int(v))],
        );
        losses
    }

    /// RoPE in the rotate-half form of `x`, `[n, heads, k]`, by the angles whose cos and sin are `[n, 1, k/2]`, all of one format;
    /// with a graph when one is recorded. Tokens of `x` may be any distance apart.
    pub(crate) fn rope(&self, x: &Tensor, cos_n1k: &Tensor, sin_n1k: &Tensor) -> Tensor {
        let y = tch::no_grad(|| self.rotated(x, cos_n1k, sin_n1k));
        let kernels = self.clone();
        let backward = move |g: &Tensor, saved: &[Tensor]| {
            let of_x = Tensor::empty(g.size(), (g.kind(), g.device()));
            kernels.rotate(&of_x, g, [&saved[0], &saved[1]], -1.0);
            Vec::from([of_x])
        };
        with_backward(&y, &[x], &[cos_n1k, sin_n1k], Box::new(backward)).expect(FAILED)
    }

    fn rotated(&self, x: &Tensor, cos_n1k: &Tensor, sin_n1k: &Tensor) -> Tensor {
        let y = Tensor::empty(x.size(), (x.kind(), x.device()));
        self.rotate(&y, x, [cos_n1k, sin_n1k], 1.0);
        y
    }

    /// By the negative angles, in place, of heads that lie side by side in rows.
    fn rotate_back(&self, x: &Tensor, cos_n1k: &Tensor, sin_n1k: &Tensor) {
        assert!(x.stride()[1..] == [x.size()[2], 1] && is_aligned(x), "heads that lie side by side");
        self.rotate(x, x, [cos_n1k, sin_n1k], -1.0);
    }

    /// `x` into `y`, whose heads lie side by side in rows.
    fn rotate(&self, y: &Tensor, x: &Tensor, tables: [&Tensor; 2], sign: f32) {
        let [n, heads, k] = x.size()[..] else { panic!("RoPE is of [n, heads, k], not of {:?}", x.size()) };
        let kind = x.kind();
        let [cos, sin] = tables.map(|table| dense(table, kind, &[n, 1, k / 2]));
        let by_token = x.stride()[1..] == [k, 1] && is_aligned(x);
        let x = if by_token { x.shallow_clone() } else { dense(&x.contiguous(), kind, &[n, heads, k]) };
        self.launch(
            suffixed(kind, "rope_f32", "rope_bf16"),
            n as usize,
            BLOCK,
            &[
                Elements(y),
                Elements(&x),
                Elements(&cos),
                Elements(&sin),
                I32(int(heads)),
                I32(int(k / 2)),
                I64(y.stride()[0]),
                I64(x.stride()[0]),
                F32(sign),
            ],
        );
    }
}

/// Elements of flat fp32 buffers that are as long as one another.
fn flat<const N: usize>(buffers: [&Tensor; N]) -> usize {
    let len = buffers[0].numel();
    for buffer in buffers {
        let found = (buffer.kind(), buffer.numel(), buffer.is_contiguous());
        assert_eq!(found, (Kind::Float, len, true), "what a kernel is given");
    }
    len
}

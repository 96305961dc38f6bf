//! Fused kernels of our own for GPUs, where LibTorch has a chain of kernels that each read and write all of memory.
//!
//! ```text
//! adamw.cu      AdamW over flat buffers, and the sums of squares of its norm
//! rms_norm.cu   RMSNorm, with the residual it is added to; forward and backward
//! swiglu.cu     SwiGLU; forward and backward              rope.cu  rotary embeddings; both ways
//! cross_entropy.cu   cross-entropy of logits and its gradient, in place
//! blake3.cu     digests of blocks, in every run on a GPU
//! common.cuh    the two formats, several elements at once, and sums of written order
//! host.cpp      what runs the same text on a CPU, for tests
//! attention/    attention on Hopper, compiled beforehand
//! ```
//! Each `.cu` has the Rust that launches it beside it. The sources are part of this build. NVRTC compiles them when a run
//! opens its GPU, for that GPU, once a process: no toolkit, no header and no driver's own compiler has a part in it.
//!
//! The bits of a kernel follow from its inputs: the order of every sum is written and depends on shapes alone, nothing is added
//! with atomics, and what the compiler might take liberties with is fixed (`OPTIONS`). AdamW has those
//! of its formula, one IEEE operation after the other, on any device.
//!
//! The backward of a kernel is a node of LibTorch's graph (`ffi::node`), so that segments, recomputation and whatever
//! else stands on graphs is as it is without. Writing out a layer's backward would save the graph, and would have to be kept
//! equal to the forward by hand, for each way of attention.

mod adamw;
mod attention;
mod blake3;
mod check;
mod cross_entropy;
#[cfg(test)]
mod emulated;
mod rms_norm;
mod rope;
mod swiglu;
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
use crate::ffi::argument::Argument;
#[cfg(test)]
use crate::ffi::emulated::Emulated;
use crate::ffi::gpu::Module;
use crate::ffi::library;
use crate::ffi::nvrtc::Nvrtc;

/// Names the NVRTC that kernels are compiled with, a `libnvrtc.so.13`; not set: the one of the LibTorch in use.
pub const NVRTC: &str = "ANELLO_NVRTC";

/// The text that is compiled: one program.
const SOURCES: [&str; 7] = [
    include_str!("common.cuh"),
    include_str!("adamw.cu"),
    include_str!("rms_norm.cu"),
    include_str!("swiglu.cu"),
    include_str!("rope.cu"),
    include_str!("cross_entropy.cu"),
    include_str!("blake3.cu"),
];

/// What the bits rest on: no contraction of a product and a sum, numbers below the normal ones kept, division and root rounded
/// correctly.
const OPTIONS: [&str; 5] =
    ["--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true"];

/// Threads of a block of kernels that have an element or a few a thread.
const BLOCK: u32 = 256;
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
    if of(compute, device)?.is_none() && device.is_cuda() {
        // Compiled before the first step, and not within one.
        drop(if_there(device));
    }
    Ok(device)
}

/// Those of each GPU that were asked for; none where they cannot be had.
static OPENED: Mutex<Vec<(Device, Option<Kernels>)>> = Mutex::new(Vec::new());

/// The kernels that `compute` asks for on `device`, if it does; they are compiled once a process and GPU.
///
/// # Errors
/// As [`Kernels::open`].
pub(crate) fn of(compute: &Compute, device: Device) -> Result<Option<Kernels>> {
    if compute.fused { opened(device).map(Some) } else { Ok(None) }
}

/// The kernels of a GPU, for what can be had without them too.
pub(crate) fn if_there(device: Device) -> Option<Kernels> {
    let mut found = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, kernels)) = found.iter().find(|(of, _)| *of == device) {
        return kernels.clone();
    }
    let kernels = Kernels::open(device)
        .inspect_err(|cause| tracing::warn!(%cause, "digests are computed on the host, which takes seconds"))
        .ok();
    found.push((device, kernels.clone()));
    kernels
}

fn opened(device: Device) -> Result<Kernels> {
    let mut found = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(kernels) = found.iter().find(|(of, _)| *of == device).and_then(|(_, kernels)| kernels.clone())
    {
        return Ok(kernels);
    }
    let kernels = Kernels::open(device)?;
    found.retain(|(of, _)| *of != device);
    found.push((device, Some(kernels.clone())));
    Ok(kernels)
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

/// A size as kernels have it.
fn int(size: i64) -> i32 {
    i32::try_from(size).expect("rows and widths of a micro-batch are below 2^31")
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
}

//! The only unsafe code: what the C library offers and no crate of ours wraps, the memory of tensors as slices, and what
//! LibTorch offers in C++ alone (`torch`, over `shim.cpp`) or only once its CUDA half is loaded (`library`).
#![allow(unsafe_code)]

pub(crate) mod argument;
#[cfg(test)]
pub(crate) mod emulated;
pub(crate) mod gpu;
pub(crate) mod graph;
pub(crate) mod library;
pub(crate) mod node;
pub(crate) mod nvrtc;
pub(crate) mod torch;

use std::ops::Range;
use std::sync::Once;

use anello_collective::Partials;
use tch::{Device, Kind, Tensor};

/// The elements of a contiguous fp32 tensor on the CPU, in place. Panics on any other.
///
/// Tensors share memory (views, shallow clones) without Rust knowing: while the slice lives, no tensor over the same
/// memory may be written to.
pub fn as_slice(tensor: &Tensor) -> &[f32] {
    let (data, len) = elements(tensor);
    // SAFETY: `data` points at `len` initialised f32, as `elements` checked; the borrow of the tensor keeps its memory
    // alive and in place. Nobody writes to it meanwhile: the caller's part of the bargain, as this crate's tensors are
    // used by one thread, which holds the slice.
    unsafe { std::slice::from_raw_parts(data, len) }
}

/// [`as_slice`] to write to: while the slice lives, no tensor over the same memory may be used.
pub fn as_mut_slice(tensor: &mut Tensor) -> &mut [f32] {
    let (data, len) = elements(tensor);
    // SAFETY: as in `as_slice`; the tensor is borrowed for writing, and that nobody uses another over the same memory
    // is the caller's part of the bargain.
    unsafe { std::slice::from_raw_parts_mut(data, len) }
}

/// Flat buffers that one thread reads, where they are whole, while another writes to the rest of them.
#[derive(Debug)]
pub struct Shared {
    parts: Vec<(*const f32, usize)>,
    /// Keep the memory.
    _tensors: Vec<Tensor>,
}

// SAFETY: the pointers are to memory that the tensors keep alive and in place. It is only read through them, and only
// where the caller of `Partials::elements` knows that nobody writes any more. The tensors themselves are dropped, which
// LibTorch allows on any thread (their count is atomic), and otherwise not used.
unsafe impl Send for Shared {}
// SAFETY: as above; a shared reference gives nothing but reads of the memory.
unsafe impl Sync for Shared {}

impl Shared {
    /// Views of `tensors`: contiguous, fp32, on the CPU. Panics on any other.
    pub fn new(tensors: Vec<Tensor>) -> Self {
        let parts = tensors
            .iter()
            .map(|tensor| {
                let (data, len) = elements(tensor);
                (data.cast_const(), len)
            })
            .collect();
        Self { parts, _tensors: tensors }
    }
}

impl Partials for Shared {
    fn lens(&self) -> Vec<usize> {
        self.parts.iter().map(|(_, len)| *len).collect()
    }

    fn elements(&self, part: usize, range: Range<usize>) -> &[f32] {
        let (data, len) = self.parts[part];
        assert!(range.start <= range.end && range.end <= len, "elements {range:?} of {len}");
        // SAFETY: within the buffer, as just checked, whose memory lives as long as `self`; nobody writes to these
        // elements any more: they are asked for once their blocks were said to be whole, which the thread that wrote
        // them did after it wrote, over a channel.
        unsafe { std::slice::from_raw_parts(data.add(range.start), range.len()) }
    }
}

/// The memory of a contiguous fp32 tensor, to be sent or received into. Panics on any other. Whoever gives it to NCCL keeps
/// the memory, and lets nobody use it otherwise, until the stream is past the call or the communicator is aborted.
pub(crate) fn for_nccl(tensor: &Tensor) -> nccl_rs::Buffer {
    assert!(
        tensor.kind() == Kind::Float && tensor.is_contiguous(),
        "{:?}, or a tensor with gaps",
        tensor.kind()
    );
    // SAFETY: so many elements lie there; the rest is the caller's part of the bargain.
    unsafe { nccl_rs::Buffer::floats(tensor.data_ptr() as usize, tensor.numel()) }
}

fn elements(tensor: &Tensor) -> (*mut f32, usize) {
    let (kind, device) = (tensor.kind(), tensor.device());
    assert!(kind == Kind::Float && device == Device::Cpu, "a tensor of {kind:?} on {device:?}");
    assert!(tensor.is_contiguous(), "a tensor with gaps");
    match tensor.numel() {
        0 => (std::ptr::NonNull::dangling().as_ptr(), 0),
        len => (tensor.data_ptr().cast(), len),
    }
}

/// Keeps freed memory in the process for the next tensor, from the first call on.
///
/// A step allocates and frees the same large tensors over and over. By default glibc hands each back to the kernel,
/// which zeroes new pages for the next: a fifth of a small model's step on a CPU. What stays is what a step needed at
/// its most, so the peak does not move. Elsewhere than on glibc this does nothing.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use std::ffi::c_int;
        const M_TRIM_THRESHOLD: c_int = -1;
        const M_MMAP_THRESHOLD: c_int = -3;
        const LARGE: c_int = 1 << 30;
        unsafe extern "C" {
            fn mallopt(parameter: c_int, value: c_int) -> c_int;
        }
        static CALLED: Once = Once::new();
        CALLED.call_once(|| {
            // SAFETY: glibc's own function, declared as in malloc.h; it takes the allocator's lock. A value it does
            // not accept changes nothing and is reported by the result, which no one needs.
            unsafe {
                mallopt(M_TRIM_THRESHOLD, c_int::MAX);
                mallopt(M_MMAP_THRESHOLD, LARGE);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_is_read_and_written_in_place() {
        let mut flat = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]);
        assert_eq!(as_slice(&flat.narrow(0, 1, 2)), [2.0, 3.0]);
        as_mut_slice(&mut flat)[3] = 7.0;
        as_mut_slice(&mut flat.narrow(0, 0, 1))[0] = 5.0;
        assert_eq!(Vec::<f32>::try_from(&flat).unwrap(), [5.0, 2.0, 3.0, 7.0]);
        assert!(as_slice(&flat.narrow(0, 4, 0)).is_empty());
    }

    #[test]
    #[should_panic(expected = "a tensor of Double on Cpu")]
    fn another_kind_is_refused() {
        as_slice(&Tensor::from_slice(&[1f64]));
    }

    #[test]
    #[should_panic(expected = "a tensor with gaps")]
    fn gaps_are_refused() {
        as_slice(&Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]).view([2, 2]).narrow(1, 0, 1));
    }
}

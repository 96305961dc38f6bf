//! Flat buffers of a device, as memory of the host: in place on a CPU, a copy from a GPU.

use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anello_collective::Partials;
use bytes::Bytes;
use tch::kind::Element;
use tch::{Device, Tensor};
use zerocopy::IntoBytes;

use crate::ffi;
use crate::ffi::torch::{self, Event, Stream};
use crate::params::BLOCK;

/// A GPU that fails is the end of the thread that uses it, as it is in every tensor operation.
pub(crate) const FAILED: &str = "the GPU and its pinned memory work";

/// Blocks of a GPU's buffer that are on the host at a time: 256 MiB.
const PIECE: usize = 256 << 20 >> 2;
const _: () = assert!(PIECE.is_multiple_of(BLOCK), "a piece is of whole blocks");

/// Elements of an fp32 buffer, readable here.
#[derive(Debug)]
pub(crate) struct OnHost(Tensor);

impl OnHost {
    /// Those of `tensor`: itself on a CPU, where nobody may write to it meanwhile; else a copy.
    pub fn of(tensor: &Tensor) -> Self {
        match tensor.device() {
            Device::Cpu => Self(tensor.shallow_clone()),
            _ => Self(tensor.to_device(Device::Cpu)),
        }
    }
}

impl Deref for OnHost {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        ffi::as_slice(&self.0)
    }
}

/// A flat buffer in pieces of whole blocks, in order: all of it at once on a CPU.
pub(crate) fn pieces(flat: &Tensor) -> impl Iterator<Item = OnHost> {
    let len = flat.numel();
    let piece = if flat.device() == Device::Cpu { len.max(1) } else { PIECE };
    let flat = flat.shallow_clone();
    (0..len)
        .step_by(piece)
        .map(move |start| OnHost::of(&flat.narrow(0, start as i64, piece.min(len - start) as i64)))
}

/// The bytes of a buffer, little-endian, in memory of their own, which nobody has cleared first: half the time of a tensor's copy.
pub(crate) fn copied(flat: &Tensor) -> Vec<u8> {
    bytes(&OnHost::of(flat)).to_vec()
}

/// Room for a copy of `tensor` on the host, whatever is in it: memory that its GPU copies from and to without a detour.
pub(crate) fn room(tensor: &Tensor) -> Tensor {
    if tensor.device() == Device::Cpu {
        return tensor.empty_like();
    }
    let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
    let pinned = torch::pinned(bytes.div_ceil(size_of::<f32>())).expect(FAILED);
    pinned.view_dtype(tensor.kind()).narrow(0, 0, tensor.numel() as i64).view_as(tensor)
}

/// Some numbers on `device`, for what this thread computes from now on. A GPU takes them when it comes to it: nobody waits.
pub(crate) fn upload<T: Element>(values: &[T], device: Device) -> Tensor {
    let here = Tensor::from_slice(values);
    if device == Device::Cpu {
        return here;
    }
    let there = Tensor::empty(here.size(), (here.kind(), device));
    // LibTorch's allocator of pinned memory keeps what a copy reads until the copy is made.
    let pinned = room(&there);
    pinned.shallow_clone().copy_(&here);
    torch::copy_async(&there, &pinned).expect(FAILED);
    there
}

/// Copies from a GPU to the host and back, beside what it computes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beside {
    device: Device,
    copies: Stream,
}

impl Beside {
    /// Those of `device`. On a CPU, a copy is made when it is started.
    pub fn of(device: Device) -> Self {
        Self { device, copies: Stream::new(device).expect(FAILED) }
    }

    /// The device.
    pub fn device(self) -> Device {
        self.device
    }

    /// Starts copies of `from` into `to`, after what this thread computes so far. Until they are made nobody may free or use
    /// either, but who has made the stream in question wait for the event.
    pub fn start(self, copies: impl IntoIterator<Item = (Tensor, Tensor)>) -> Event {
        let computed = Stream::current(self.device).and_then(Stream::record).expect(FAILED);
        self.copies.wait(&computed).expect(FAILED);
        let copied =
            self.copies.scope(|| copies.into_iter().try_for_each(|(from, to)| torch::copy_async(&to, &from)));
        copied.and_then(|copied| copied).expect(FAILED);
        self.copies.record().expect(FAILED)
    }

    /// Waits until all copies that were started are made, or have failed.
    pub fn finish(self) {
        let _ = self.copies.synchronize();
    }

    /// Has what this thread computes from now on wait for `event`.
    pub fn compute_after(self, event: &Event) {
        // What fails here fails again, and is told, in the next operation.
        let _ = Stream::current(self.device).and_then(|compute| compute.wait(event));
    }
}

/// Copies of flat buffers on the host: made at once of a CPU's, of a GPU's beside what it computes.
#[derive(Debug)]
pub(crate) enum Reading {
    /// They are made.
    Made(Vec<Bytes>),
    /// They are, or were, on their way.
    Beside(Copies),
}

/// Copies into memory that a GPU writes to without a detour.
#[derive(Debug)]
pub(crate) struct Copies {
    beside: Beside,
    under_way: Mutex<UnderWay>,
    to: Arc<ffi::Shared>,
}

#[derive(Debug)]
struct UnderWay {
    done: Event,
    /// Kept in place until they are made.
    from: Vec<Tensor>,
}

/// The host looks so often whether copies are made: a state takes tenths of a second.
const LOOK: Duration = Duration::from_millis(1);

impl Reading {
    /// Copies of `from`, as these are once all that this thread has computed so far is done. Who changes them then calls
    /// [`Reading::compute_after`] first.
    pub fn start<const N: usize>(from: [Tensor; N]) -> Self {
        match from[0].device() {
            Device::Cpu => Self::Made(from.iter().map(|flat| copied(flat).into()).collect()),
            _ => Self::Beside(Copies::start(from)),
        }
    }

    /// Has what this thread computes from now on wait for the copies.
    pub fn compute_after(&self) {
        if let Self::Beside(Copies { beside, under_way, .. }) = self {
            let under_way = under_way.lock().unwrap_or_else(PoisonError::into_inner);
            beside.compute_after(&under_way.done);
        }
    }

    /// Waits for the copies; the bytes of the one of this index, little-endian.
    pub fn bytes(&self, index: usize) -> Bytes {
        match self {
            Self::Made(copies) => copies[index].clone(),
            Self::Beside(copies) => copies.bytes(index),
        }
    }
}

impl Copies {
    fn start<const N: usize>(from: [Tensor; N]) -> Self {
        let beside = Beside::of(from[0].device());
        let to = from.each_ref().map(room);
        let pairs = from.iter().zip(&to);
        let done = beside.start(pairs.map(|(from, to)| (from.shallow_clone(), to.shallow_clone())));
        let under_way = Mutex::new(UnderWay { done, from: from.into() });
        Self { beside, under_way, to: Arc::new(ffi::Shared::new(to.into())) }
    }

    fn wait(&self) {
        loop {
            let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
            if under_way.done.is_done().expect(FAILED) {
                under_way.from.clear();
                return;
            }
            drop(under_way);
            std::thread::sleep(LOOK);
        }
    }

    fn bytes(&self, index: usize) -> Bytes {
        struct Copied(Arc<ffi::Shared>, usize);
        impl AsRef<[u8]> for Copied {
            fn as_ref(&self) -> &[u8] {
                let Self(all, index) = self;
                bytes(all.elements(*index, 0..all.lens()[*index]))
            }
        }
        self.wait();
        Bytes::from_owner(Copied(Arc::clone(&self.to), index))
    }
}

/// What numbers are in files and on the wire: their bytes, little-endian, which is how they lie in memory.
pub(crate) fn bytes(values: &[f32]) -> &[u8] {
    values.as_bytes()
}

/// [`bytes()`] to write to.
pub(crate) fn bytes_mut(values: &mut [f32]) -> &mut [u8] {
    values.as_mut_bytes()
}

const _: () = assert!(cfg!(target_endian = "little"), "LibTorch is there for no other machines");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_what_was_there_when_it_was_started() {
        let starts: [fn([Tensor; 2]) -> Reading; 2] =
            [Reading::start, |from| Reading::Beside(Copies::start(from))];
        for start in starts {
            let mut flat = Tensor::from_slice(&[1f32, -2.5]);
            let reading = start([flat.shallow_clone(), &flat * 2.0]);
            reading.compute_after();
            let _ = flat.zero_();
            let expected = [[1f32, -2.5], [2.0, -5.0]].map(|two| two.map(f32::to_le_bytes).concat());
            let bytes = [0, 1].map(|index| reading.bytes(index));
            drop(reading);
            assert_eq!(bytes.map(|bytes| bytes.to_vec()), expected);
        }
    }
}

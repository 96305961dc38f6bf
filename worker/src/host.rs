//! Flat buffers of a device, as memory of the host: in place on a CPU, a copy from a GPU.

use std::ops::Deref;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
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
        self.start_after(&computed, copies)
    }

    /// The same, after `event` and no more of what this thread computes.
    fn start_after(self, event: &Event, copies: impl IntoIterator<Item = (Tensor, Tensor)>) -> Event {
        self.copies.wait(event).expect(FAILED);
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

/// Copies in ordinary memory of the host, which a thread makes by way of two pieces of pinned memory:
///
/// ```text
/// GPU        ─ own stream ─▶ pinned ┬ piece 0 ▶ ┬ piece 2 ▶ …
///                            pinned │           ├ piece 1 ▶ …
/// its memory       free to change ──┼───────────┼──────────── … ┘ once the last piece has left
/// ```
///
/// Pinned memory for all of it would be there for good, rounded up to a power of two, and takes longer to be had than a step: a GPU's
/// driver locks it page by page.
#[derive(Debug)]
pub(crate) struct Copies {
    read: Arc<Latch>,
    progress: Mutex<Progress>,
    to: Arc<ffi::Shared>,
}

#[derive(Debug)]
enum Progress {
    By(JoinHandle<()>),
    Made,
    /// What there is of them is not to be used.
    Failed,
}

/// Threads that copy from pinned memory: one alone is slower than a GPU's link.
const COPY_THREADS: usize = 8;

impl Reading {
    /// Copies of `from`, as these are once all that this thread has computed so far is done. Who changes them calls
    /// [`Reading::wait_until_read`] first.
    pub fn start<const N: usize>(from: [Tensor; N]) -> Self {
        match from[0].device() {
            Device::Cpu => Self::Made(from.iter().map(|flat| copied(flat).into()).collect()),
            _ => Self::Beside(Copies::start(from, COPY_PIECE)),
        }
    }

    /// Waits until the buffers may change.
    pub fn wait_until_read(&self) {
        if let Self::Beside(Copies { read, .. }) = self {
            read.wait();
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
    /// Starts them, so many elements at a time.
    fn start<const N: usize>(from: [Tensor; N], piece: usize) -> Self {
        let device = from[0].device();
        let computed = Stream::current(device).and_then(Stream::record).expect(FAILED);
        let to = from.each_ref().map(|flat| Tensor::empty(flat.size(), (flat.kind(), Device::Cpu)));
        let shared = Arc::new(ffi::Shared::new(to.each_ref().map(Tensor::shallow_clone).into()));
        let read = Arc::new(Latch::default());
        let reader = Reader(Arc::clone(&read));
        let copy = move || {
            if device != Device::Cpu {
                torch::use_device(device).expect(FAILED);
            }
            copy_in_pieces(&computed, from, to, reader, piece);
        };
        let thread = thread::Builder::new().name("copy to the host".to_owned()).spawn(copy);
        let progress = Progress::By(thread.expect("a thread can be started"));
        Self { read, progress: Mutex::new(progress), to: shared }
    }

    /// Waits until they are made. Panics when they have failed, as often as it is asked.
    fn wait(&self) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *progress, Progress::Failed) {
            Progress::By(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Progress::Made => {}
            Progress::Failed => panic!("{FAILED}"),
        }
        *progress = Progress::Made;
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

/// Copies what `from` is after `computed` into `to`; `reader` is let go once `from` is read.
fn copy_in_pieces<const N: usize>(
    computed: &Event,
    from: [Tensor; N],
    to: [Tensor; N],
    reader: Reader,
    piece: usize,
) {
    let beside = Beside::of(from[0].device());
    let largest = from.iter().max_by_key(|flat| flat.numel()).expect("one buffer at least");
    let largest = largest.narrow(0, 0, piece.min(largest.numel()) as i64);
    let mut pinned = [0, 1].map(|_| room(&largest));
    let mut on_its_way: Option<Leaving> = None;
    for (from, to) in from.iter().zip(&to) {
        for start in (0..from.numel()).step_by(piece) {
            let len = piece.min(from.numel() - start) as i64;
            let [from, to] = [from, to].map(|flat| flat.narrow(0, start as i64, len));
            let here = pinned[0].narrow(0, 0, len);
            let left = beside.start_after(computed, [(from, here.shallow_clone())]);
            if let Some(before) = on_its_way.replace(Leaving { left, here, to }) {
                before.arrive();
            }
            pinned.swap(0, 1);
        }
    }
    on_its_way.iter().for_each(Leaving::wait);
    drop((from, reader));
    on_its_way.into_iter().for_each(Leaving::arrive);
}

/// A piece on its way from a GPU to `here`, in pinned memory, and then to `to`.
struct Leaving {
    left: Event,
    here: Tensor,
    to: Tensor,
}

impl Leaving {
    /// Waits until it has left the GPU.
    fn wait(&self) {
        while !self.left.is_done().expect(FAILED) {
            thread::sleep(LOOK);
        }
    }

    fn arrive(mut self) {
        self.wait();
        copy_by_threads(&OnHost(self.here), ffi::as_mut_slice(&mut self.to));
    }
}

/// The host looks so often whether a piece has left: it takes milliseconds.
const LOOK: Duration = Duration::from_micros(100);

/// What is copied at a time: 128 MiB.
const COPY_PIECE: usize = 128 << 20 >> 2;

/// Copies numbers within the host's memory, by several threads.
fn copy_by_threads(from: &[f32], to: &mut [f32]) {
    let threads = thread::available_parallelism().map_or(1, |n| n.get()).min(COPY_THREADS);
    let share = from.len().div_ceil(threads).max(1);
    thread::scope(|scope| {
        for (from, to) in from.chunks(share).zip(to.chunks_mut(share)) {
            scope.spawn(|| to.copy_from_slice(from));
        }
    });
}

/// Opened once, and waited for.
#[derive(Debug, Default)]
struct Latch(Mutex<bool>, Condvar);

impl Latch {
    fn wait(&self) {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.1.wait_while(open, |open| !*open));
    }
}

/// Opens a latch when it is let go, also by a panic: who waited goes on, and learns of it in the next operation.
struct Reader(Arc<Latch>);

impl Drop for Reader {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.1.notify_all();
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
            [Reading::start, |from| Reading::Beside(Copies::start(from, 3))];
        for start in starts {
            // Of pieces of 3: three of one buffer, the last one cut short, and one of the other.
            let values: Vec<f32> = (0..8).map(|at| at as f32 - 2.5).collect();
            let (mut flat, two) = (Tensor::from_slice(&values), Tensor::from_slice(&values[..2]));
            let reading = start([two, flat.shallow_clone()]);
            reading.wait_until_read();
            let _ = flat.zero_();
            let found = [0, 1].map(|index| reading.bytes(index));
            drop(reading);
            assert_eq!(
                found.map(|found| found.to_vec()),
                [&values[..2], &values[..]].map(|of| bytes(of).to_vec())
            );
        }
    }

    /// Whoever waits for copies that fail is told each time, and nobody waits for ever.
    #[test]
    fn copies_that_fail_are_told() {
        let read = Arc::new(Latch::default());
        let reader = Reader(Arc::clone(&read));
        let fails = thread::spawn(move || {
            let _reader = reader;
            panic!("the GPU is gone");
        });
        let (progress, to) = (Mutex::new(Progress::By(fails)), Arc::new(ffi::Shared::new(Vec::new())));
        let reading = Reading::Beside(Copies { read, progress, to });
        reading.wait_until_read();
        for _ in 0..2 {
            let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| reading.bytes(0)));
            assert!(told.is_err());
        }
    }

    #[test]
    fn nothing_is_copied_too() {
        let nothing = || Tensor::from_slice::<f32>(&[]);
        let reading = Reading::Beside(Copies::start([nothing(), nothing()], 3));
        reading.wait_until_read();
        assert_eq!([0, 1].map(|index| reading.bytes(index).len()), [0, 0]);
    }
}

//! LibTorch's switches, streams, events and pinned memory, by `shim.cpp`.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::{NonNull, null_mut};
use std::time::Duration;

use tch::{Device, Tensor};

/// A tensor as C++ has it: what `Tensor::as_ptr` points to.
pub(super) type Raw = c_void;

unsafe extern "C" {
    fn anello_error() -> *const c_char;
    fn anello_set_numerics(deterministic: c_int) -> c_int;
    fn anello_is_deterministic() -> c_int;
    fn anello_pinned(elements: i64, out: *mut *mut Raw) -> c_int;
    fn anello_copy_async(to: *const Raw, from: *const Raw) -> c_int;
    fn anello_flash_packed(
        q: *const Raw,
        k: *const Raw,
        v: *const Raw,
        ends: *const Raw,
        longest: i64,
        out: *mut *mut Raw,
    ) -> c_int;
    fn anello_add_product(place: *const Raw, a: *const Raw, b: *const Raw) -> c_int;
    fn anello_vjp(
        output: *const Raw,
        of_output: *const Raw,
        inputs: *const *const Raw,
        n_inputs: i64,
        out: *mut *mut Raw,
    ) -> c_int;
    fn anello_stream_new(device: i32, id: *mut i64) -> c_int;
    fn anello_stream_current(device: i32, id: *mut i64) -> c_int;
    fn anello_stream_exchange(device: i32, id: i64, previous: *mut i64) -> c_int;
    fn anello_stream_native(device: i32, id: i64, out: *mut *mut c_void) -> c_int;
    fn anello_stream_synchronize(device: i32, id: i64) -> c_int;
    fn anello_device_exchange(device: i32) -> c_int;
    fn anello_event_new(device: i32, stream: i64, timed: c_int, out: *mut *mut c_void) -> c_int;
    fn anello_mark_until(begin: *mut c_void, end: *mut c_void, milliseconds: *mut f64) -> c_int;
    fn anello_event_wait(event: *mut c_void, device: i32, stream: i64) -> c_int;
    fn anello_event_query(event: *mut c_void, done: *mut c_int) -> c_int;
    fn anello_event_free(event: *mut c_void);
}

/// What C++ threw, in its words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("LibTorch: {0}")]
pub(crate) struct Thrown(String);

pub(super) fn checked(status: c_int) -> Result<(), Thrown> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: a string of this thread that ends with NUL and stays until the next call of the shim on this thread.
    let text = unsafe { CStr::from_ptr(anello_error()) }.to_string_lossy();
    // The C++ stack that follows is for who debugs LibTorch.
    Err(Thrown(text.lines().next().unwrap_or_default().to_owned()))
}

/// Sets the switches of the arithmetic for this process (see `shim.cpp`). On a CPU the bits do not follow from them.
pub(crate) fn set_numerics(deterministic: bool) -> Result<(), Thrown> {
    // SAFETY: a plain call; LibTorch's context guards its own members.
    checked(unsafe { anello_set_numerics(c_int::from(deterministic)) })
}

/// Whether the switches stand as `set_numerics(true)` puts them.
pub(crate) fn is_deterministic() -> bool {
    // SAFETY: a plain call.
    unsafe { anello_is_deterministic() != 0 }
}

/// A CPU tensor of `elements` fp32 numbers, whatever they are, that a GPU copies from and to without a detour.
pub(crate) fn pinned(elements: usize) -> Result<Tensor, Thrown> {
    let mut raw = null_mut();
    // SAFETY: `raw` is written only on success, with a tensor that is ours to free.
    checked(unsafe { anello_pinned(elements as i64, &raw mut raw) })?;
    // SAFETY: the tensor was made by `new at::Tensor`, as tch makes its own, which frees it.
    Ok(unsafe { Tensor::from_ptr(raw.cast()) })
}

/// Copies `from` into `to` on the current stream. Between a GPU and pinned memory it returns at once: until the stream is
/// past it, an [`Event`] tells when, neither may be freed or used by others.
pub(crate) fn copy_async(to: &Tensor, from: &Tensor) -> Result<(), Thrown> {
    // SAFETY: both point to live `at::Tensor`s for the call; the shim writes to the memory of `to`, which is the caller's to
    // write to.
    checked(unsafe { anello_copy_async(to.as_ptr().cast(), from.as_ptr().cast()) })
}

/// Causal flash attention of sequences laid end to end (see `shim.cpp`): `[n, h, k]`, with a graph when one is recorded.
pub(crate) fn flash_packed(
    q_nhk: &Tensor,
    k_ngk: &Tensor,
    v_ngk: &Tensor,
    ends: &Tensor,
    longest: i64,
) -> Result<Tensor, Thrown> {
    let [q, k, v, ends] = [q_nhk, k_ngk, v_ngk, ends].map(|tensor| tensor.as_ptr().cast());
    let mut raw = null_mut();
    // SAFETY: four live tensors, of which the shim makes a new one; shapes and kinds are checked there.
    checked(unsafe { anello_flash_packed(q, k, v, ends, longest, &raw mut raw) })?;
    // SAFETY: made by `new at::Tensor`, and ours to free.
    Ok(unsafe { Tensor::from_ptr(raw.cast()) })
}

/// Adds the product `a · b` of bf16 matrices to `place`, an fp32 matrix, on a GPU (see `shim.cpp`).
pub(crate) fn add_product(place: &Tensor, a: &Tensor, b: &Tensor) -> Result<(), Thrown> {
    // SAFETY: three live tensors; the memory of `place` is the caller's to write to.
    checked(unsafe { anello_add_product(place.as_ptr().cast(), a.as_ptr().cast(), b.as_ptr().cast()) })
}

/// The vector-Jacobian product: gradients of `output` for `inputs`, which it depends on, from `of_output`, the gradient for it. Its
/// graph is gone afterwards.
pub(crate) fn vjp(output: &Tensor, of_output: &Tensor, inputs: &[&Tensor]) -> Result<Vec<Tensor>, Thrown> {
    let pointers: Vec<*const Raw> = inputs.iter().map(|input| input.as_ptr().cast()).collect();
    let mut raw = vec![null_mut(); inputs.len()];
    // SAFETY: live tensors, so many as is said; `raw` has room for as many, and is written only on success.
    checked(unsafe {
        let (output, of_output) = (output.as_ptr().cast(), of_output.as_ptr().cast());
        anello_vjp(output, of_output, pointers.as_ptr(), inputs.len() as i64, raw.as_mut_ptr())
    })?;
    // SAFETY: made by `new at::Tensor`, and ours to free.
    Ok(raw.into_iter().map(|raw| unsafe { Tensor::from_ptr(raw.cast()) }).collect())
}

/// A queue of work of a GPU. That of a CPU is always empty: whatever is put into it is done when the call returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stream {
    /// Device and number; none of a CPU.
    gpu: Option<(i32, i64)>,
}

impl Stream {
    /// One of LibTorch's pool, which lives as long as the process.
    pub fn new(device: Device) -> Result<Self, Thrown> {
        Self::of(device, anello_stream_new)
    }

    /// The one that tensor operations of this thread go to.
    pub fn current(device: Device) -> Result<Self, Thrown> {
        Self::of(device, anello_stream_current)
    }

    fn of(device: Device, ask: unsafe extern "C" fn(i32, *mut i64) -> c_int) -> Result<Self, Thrown> {
        if device == Device::Cpu {
            return Ok(Self { gpu: None });
        }
        let (device, mut id) = (number(device), 0);
        // SAFETY: one of the two functions above, which write one number.
        checked(unsafe { ask(device, &raw mut id) })?;
        Ok(Self { gpu: Some((device, id)) })
    }

    /// As CUDA has it, a `cudaStream_t`; 0 of a CPU.
    pub fn native(self) -> Result<usize, Thrown> {
        let Some((device, id)) = self.gpu else { return Ok(0) };
        let mut native = null_mut();
        // SAFETY: a live stream; writes one pointer.
        checked(unsafe { anello_stream_native(device, id, &raw mut native) })?;
        Ok(native as usize)
    }

    /// Runs `work` with this as the current stream of the thread.
    pub fn scope<T>(self, work: impl FnOnce() -> T) -> Result<T, Thrown> {
        struct Back(i32, i64);
        impl Drop for Back {
            fn drop(&mut self) {
                let mut previous = 0;
                // SAFETY: the stream that was current before.
                unsafe { anello_stream_exchange(self.0, self.1, &raw mut previous) };
            }
        }
        let Some((device, id)) = self.gpu else { return Ok(work()) };
        let mut previous = 0;
        // SAFETY: a stream of the pool, or the one that was current.
        checked(unsafe { anello_stream_exchange(device, id, &raw mut previous) })?;
        let _back = Back(device, previous);
        Ok(work())
    }

    /// An event that has happened once all that was put into this stream so far is done.
    pub fn record(self) -> Result<Event, Thrown> {
        self.event(false)
    }

    /// The same with a time.
    pub fn mark(self) -> Result<Mark, Thrown> {
        self.event(true).map(Mark)
    }

    fn event(self, timed: bool) -> Result<Event, Thrown> {
        let Some((device, id)) = self.gpu else { return Ok(Event { raw: None }) };
        let mut raw = null_mut();
        // SAFETY: `raw` is written only on success, with an event that is ours to free.
        checked(unsafe { anello_event_new(device, id, timed.into(), &raw mut raw) })?;
        Ok(Event { raw: Some(NonNull::new(raw).expect("a new event has an address")) })
    }

    /// What is put into this stream from now on waits for `event`.
    pub fn wait(self, event: &Event) -> Result<(), Thrown> {
        let (Some((device, id)), Some(raw)) = (self.gpu, event.raw) else { return Ok(()) };
        // SAFETY: a live event and stream.
        checked(unsafe { anello_event_wait(raw.as_ptr(), device, id) })
    }

    /// Waits until all that was put into it is done.
    pub fn synchronize(self) -> Result<(), Thrown> {
        let Some((device, id)) = self.gpu else { return Ok(()) };
        // SAFETY: a live stream.
        checked(unsafe { anello_stream_synchronize(device, id) })
    }
}

/// Makes `device` the current one of this thread: threads begin with the first.
pub(crate) fn use_device(device: Device) -> Result<(), Thrown> {
    // SAFETY: a plain call.
    checked(unsafe { anello_device_exchange(number(device)) })
}

pub(super) fn number(device: Device) -> i32 {
    match device {
        Device::Cuda(number) => number as i32,
        other => unreachable!("{other:?} is no GPU"),
    }
}

/// A point in a stream.
#[derive(Debug)]
pub(crate) struct Event {
    /// None of a CPU's: it has happened.
    raw: Option<NonNull<c_void>>,
}

// SAFETY: CUDA's events may be asked and waited for on any thread; nobody else has this one.
unsafe impl Send for Event {}

impl Event {
    /// Whether the stream is past it. An error of the GPU counts as yes: who uses what came of it is told.
    pub fn is_done(&self) -> Result<bool, Thrown> {
        let Some(raw) = self.raw else { return Ok(true) };
        let mut done = 0;
        // SAFETY: a live event.
        checked(unsafe { anello_event_query(raw.as_ptr(), &raw mut done) })?;
        Ok(done != 0)
    }
}

/// A point in a stream whose time is known once the stream is past it.
#[derive(Debug)]
pub(crate) struct Mark(Event);

impl Mark {
    /// The time from here to `later`, which the stream is past; none of a CPU's.
    pub fn until(&self, later: &Self) -> Result<Duration, Thrown> {
        let (Some(begin), Some(end)) = (self.0.raw, later.0.raw) else { return Ok(Duration::ZERO) };
        let mut milliseconds = 0.0;
        // SAFETY: two live events with a time.
        checked(unsafe { anello_mark_until(begin.as_ptr(), end.as_ptr(), &raw mut milliseconds) })?;
        Ok(Duration::try_from_secs_f64(milliseconds / 1e3).unwrap_or_default())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Some(raw) = self.raw {
            // SAFETY: made by `anello_event_new`, and freed once.
            unsafe { anello_event_free(raw.as_ptr()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn the_switches_are_set_and_read_back() {
        // The default has attention by memory-efficient kernels too.
        set_numerics(false).unwrap();
        assert!(!is_deterministic());
        set_numerics(true).unwrap();
        assert!(is_deterministic());
        set_numerics(false).unwrap();
    }

    #[test]
    fn a_copy_is_made_whatever_the_memory() {
        let (to, from) =
            (Tensor::zeros([3], (Kind::Float, Device::Cpu)), Tensor::from_slice(&[1f32, 2.0, 3.0]));
        copy_async(&to, &from).unwrap();
        assert!(to.equal(&from));
    }

    #[test]
    fn without_a_gpu_what_needs_one_is_an_error_in_words() {
        if tch::Cuda::is_available() {
            eprintln!("SKIPPED: there is a GPU");
            return;
        }
        for error in [pinned(8).unwrap_err(), Stream::new(Device::Cuda(0)).unwrap_err()] {
            let text = error.to_string();
            assert!(text.starts_with("LibTorch: ") && text.len() > 20 && !text.contains('\n'), "{text}");
        }
    }
}

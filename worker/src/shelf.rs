//! Hidden states that wait in the host's memory between forward and backward (activation offloading).
//!
//! A stream of its own copies them, beside the stream that computes:
//!
//! ```text
//! compute   layer l       layer l+1    …    backward l+1          backward l
//! copies         ╰▶ put(input of l)         ╭ call(input of l) ▶╮
//!                   to pinned memory        back to the GPU     here()
//! ```
//!
//! The GPU keeps at most [`LEAVING`] that are on their way out, and one that is on its way back. Whatever is let go while a copy
//! is under way waits for it in the order of the GPU's work, so that nothing writes to memory that is another's by then.

use std::collections::VecDeque;

use tch::{Device, Tensor};

use crate::ffi::torch::{self, Event, Stream};

/// Hidden states that leave at once: one is copied while the next is computed, and copies may be late by one.
const LEAVING: usize = 2;

/// A GPU that fails is the end of the thread that uses it, as it is in every tensor operation.
const FAILED: &str = "the GPU and its pinned memory work";

/// Where hidden states of one micro-batch wait.
#[derive(Debug)]
pub(crate) struct Shelf {
    device: Device,
    copies: Stream,
    leaving: VecDeque<Moving>,
}

/// A hidden state on the host.
#[derive(Debug)]
pub(crate) struct Away(Tensor);

/// A hidden state on its way.
#[derive(Debug)]
pub(crate) struct Moving {
    to: Tensor,
    _from: Tensor,
    done: Event,
    device: Device,
}

impl Shelf {
    /// For hidden states of `device`. On a CPU everything works, and is a copy for nothing.
    pub fn new(device: Device) -> Self {
        Self { device, copies: Stream::new(device).expect(FAILED), leaving: VecDeque::new() }
    }

    /// Takes a hidden state, which nobody writes to any more.
    pub fn put(&mut self, hidden: Tensor) -> Away {
        let host = self.room(&hidden);
        let away = Away(host.shallow_clone());
        let moving = self.start(host, hidden);
        self.leaving.push_back(moving);
        while self.leaving.len() > LEAVING {
            self.leaving.pop_front();
        }
        away
    }

    /// Nothing more is put: what has left, or is about to, takes no memory of the GPU any more.
    pub fn settle(&mut self) {
        self.leaving.clear();
    }

    /// Starts to bring one back.
    pub fn call(&self, Away(host): Away) -> Moving {
        let to = Tensor::empty(host.size(), (host.kind(), self.device));
        self.start(to, host)
    }

    /// Memory of the host for a copy of `hidden`.
    fn room(&self, hidden: &Tensor) -> Tensor {
        if self.device == Device::Cpu {
            return hidden.empty_like();
        }
        let bytes = hidden.numel() * hidden.kind().elt_size_in_bytes();
        let pinned = torch::pinned(bytes.div_ceil(size_of::<f32>())).expect(FAILED);
        pinned.view_dtype(hidden.kind()).narrow(0, 0, hidden.numel() as i64).view_as(hidden)
    }

    /// Starts a copy, after what is computed so far.
    fn start(&self, to: Tensor, from: Tensor) -> Moving {
        let computed = Stream::current(self.device).and_then(Stream::record).expect(FAILED);
        self.copies.wait(&computed).expect(FAILED);
        self.copies.scope(|| torch::copy_async(&to, &from)).and_then(|copied| copied).expect(FAILED);
        let done = self.copies.record().expect(FAILED);
        Moving { to, _from: from, done, device: self.device }
    }
}

impl Moving {
    /// The hidden state, for what is computed from now on.
    pub fn here(self) -> Tensor {
        self.to.shallow_clone()
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        // What fails here fails again, and is told, in the next operation.
        let _ = Stream::current(self.device).and_then(|compute| compute.wait(&self.done));
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn what_was_put_comes_back_in_any_order() {
        let mut shelf = Shelf::new(Device::Cpu);
        let hidden =
            |seed: i64, kind| Tensor::arange_start(seed, seed + 15, (kind, Device::Cpu)).view([3, 5]);
        let put: Vec<_> = (0..6)
            .map(|seed| (seed, if seed % 2 == 0 { Kind::Float } else { Kind::BFloat16 }))
            .map(|(seed, kind)| (hidden(seed, kind), shelf.put(hidden(seed, kind))))
            .collect();
        assert_eq!(shelf.leaving.len(), LEAVING);
        for (expected, away) in put.into_iter().rev() {
            let found = shelf.call(away).here();
            assert_eq!((found.kind(), found.size()), (expected.kind(), expected.size()));
            assert!(found.equal(&expected));
        }
    }
}

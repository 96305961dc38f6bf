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

use crate::ffi::torch::Event;
use crate::host::{self, Beside};

/// Hidden states that leave at once: one is copied while the next is computed, and copies may be late by one.
const LEAVING: usize = 2;

/// Where hidden states of one micro-batch wait.
#[derive(Debug)]
pub(crate) struct Shelf {
    copies: Beside,
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
    copies: Beside,
}

impl Shelf {
    /// For hidden states of `device`. On a CPU everything works, and is a copy for nothing.
    pub fn new(device: Device) -> Self {
        Self { copies: Beside::of(device), leaving: VecDeque::new() }
    }

    /// Takes a hidden state, which nobody writes to any more.
    pub fn put(&mut self, hidden: Tensor) -> Away {
        let host = host::room(&hidden);
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
        let to = Tensor::empty(host.size(), (host.kind(), self.copies.device()));
        self.start(to, host)
    }

    fn start(&self, to: Tensor, from: Tensor) -> Moving {
        let done = self.copies.start([(from.shallow_clone(), to.shallow_clone())]);
        Moving { to, _from: from, done, copies: self.copies }
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
        self.copies.compute_after(&self.done);
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

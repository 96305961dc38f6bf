//! For tests: faults that the config asks for.

use anello_configs::Fault;

use super::*;
use crate::host::OnHost;

impl Thread {
    /// For tests: flips the lowest bit of one number when the config says so.
    pub(super) fn inject_fault(&mut self, at: u64, rank: usize) {
        let fault = self.take_fault(rank, |fault| {
            fault.step == at && !["gradient", "wire"].contains(&fault.buffer.as_str())
        });
        if let (Some(fault), Some(held)) = (fault, &self.held) {
            let state = held.engine.state();
            let buffer = match fault.buffer.as_str() {
                "exp_avg" => &state.exp_avg,
                "exp_avg_sq" => &state.exp_avg_sq,
                _ => &state.weights,
            };
            let mut same_memory = buffer.shallow_clone();
            if buffer.numel() > 0 {
                flip_a_bit(&mut same_memory);
            }
            tracing::warn!(step = at, buffer = fault.buffer, "flipped a bit, as the config says");
        }
    }

    /// For tests: whether something is to go wrong in `step`: `gradient`, the lane that is checked is computed wrongly; `wire`,
    /// a block changes on its way.
    pub(super) fn take_fault_of(&mut self, what: &str, step: u64, rank: usize) -> bool {
        self.take_fault(rank, |fault| fault.buffer == what && fault.step <= step).is_some()
    }

    /// The fault of this rank when it is due: once, unless it comes again.
    fn take_fault(&mut self, rank: usize, due: impl Fn(&Fault) -> bool) -> Option<Fault> {
        let fault = &mut self.config.ring.fault;
        let taken = fault.clone().filter(|fault| fault.rank as usize == rank && due(fault))?;
        if !taken.again {
            *fault = None;
        }
        Some(taken)
    }
}

/// For tests.
pub(super) fn flip_a_bit(buffer: &mut Tensor) {
    let mut place = buffer.narrow(0, 7, 1);
    let value = OnHost::of(&place)[0];
    place.copy_(&Tensor::from_slice(&[f32::from_bits(value.to_bits() ^ 1)]));
}

//! For tests: faults that the config asks for.

use anello_configs::Fault;

use super::*;
use crate::host::OnHost;

impl Thread {
    /// For tests: flips the lowest bit of one number, once, when the config says so.
    pub(super) fn inject_fault(&mut self, at: u64, rank: usize) {
        let fault = self.config.ring.fault.take_if(|fault| {
            let is_of_state = !["gradient", "wire"].contains(&fault.buffer.as_str());
            (fault.step, fault.rank as usize) == (at, rank) && is_of_state
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

    /// For tests: whether something is to go wrong in `step`, once: `gradient`, the lane that is checked is computed wrongly; `wire`,
    /// a block changes on its way.
    pub(super) fn take_fault_of(&mut self, what: &str, step: u64, rank: usize) -> bool {
        let due =
            |fault: &mut Fault| fault.buffer == what && fault.step <= step && fault.rank as usize == rank;
        self.config.ring.fault.take_if(due).is_some()
    }
}

/// For tests.
pub(super) fn flip_a_bit(buffer: &mut Tensor) {
    let mut place = buffer.narrow(0, 7, 1);
    let value = OnHost::of(&place)[0];
    place.copy_(&Tensor::from_slice(&[f32::from_bits(value.to_bits() ^ 1)]));
}

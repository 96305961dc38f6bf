//! AdamW over the flat buffer, with the block-wise norm, the clip and the skip of a step that is not finite.
//!
//! ```text
//! g = sum / counted · min(1, clip / ‖g‖)
//! m = β1·m + (1−β1)·g          v = β2·v + (1−β2)·g²
//! w = w·(1 − lr·decay) − lr·(m / (1−β1^u)) / (√(v / (1−β2^u)) + ε)       u = updates so far, this one included
//! ```
//!
//! Every operation of it is one operation an element (no fused multiply-add, whose use would differ between the vector body
//! and the scalar tail of a LibTorch kernel), so the result does not depend on how the buffer is cut, by threads or by
//! owners. All are as IEEE 754 rounds them, but for the root on a CPU: LibTorch takes it from MKL, one unit in the last place off
//! for one element in six, wherever the element stands.
//!
//! Where the moments are shared out over a ring, an update has two halves. [`State::prepare`] changes nothing of the state:
//! it makes the new weights of some blocks, for others to have, and keeps the gradient of all blocks whose moments are
//! here. [`State::complete`] brings those moments a step further, once all new weights are there. In between the state
//! can still go either way.

mod norm;
mod prepared;
mod scale;
mod state;
mod update;

#[cfg(test)]
mod tests;

use std::ops::Range;

use tch::Tensor;

use crate::params::BLOCK;

pub use norm::block_square_sums;
pub(crate) use norm::halved;
pub use prepared::Prepared;
pub(crate) use scale::Scale;
pub use state::State;
pub use update::{Summed, Update};

/// The whole blocks that elements lie in.
pub(crate) fn blocks_of(elements: &Range<usize>) -> Range<usize> {
    elements.start / BLOCK..elements.end.div_ceil(BLOCK)
}

/// Some elements of a flat buffer.
fn part(flat: &Tensor, elements: Range<usize>) -> Tensor {
    flat.narrow(0, elements.start as i64, elements.len() as i64)
}

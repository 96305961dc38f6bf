//! Checkpoints and tensors: what [`anello_store::checkpoint`] keeps as bytes, taken from a state and made one again.

mod compare;
mod load;
mod save;

pub use compare::{BlockDifference, Comparison, compare};
pub(crate) use load::state_of;
pub use load::{Loaded, load, load_weights};
pub(crate) use save::block_digest;
pub use save::{Snapshot, write};

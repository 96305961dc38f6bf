//! Checkpoints and tensors: what [`anello_store::checkpoint`] keeps as bytes, taken from a state and made one again.

mod compare;
mod load;
mod save;

pub use compare::{BlockDifference, Comparison, compare};
pub use load::{Loaded, Share, load, load_shard, load_share, load_weights};
pub(crate) use load::{check, flat};
pub(crate) use save::block_digest;
pub use save::{Snapshot, write};

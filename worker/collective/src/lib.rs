//! The ring's collective: sums in one fixed order, the same bits for any number of workers and any ranges of lanes.
//!
//! ```text
//! tree        the binary tree over lanes, parts and shares    ring       who serves and owns what     (pure)
//! collective  the seam: `Collective`, `Reduction`             abort      ending a call from outside
//! in_process  members as threads                              tcp        members as processes
//! ```
//!
//! # A step
//! ```text
//!            partial sums of our lanes, one flat buffer for each part
//!                 │ blocks as they become final                    ▲ a new generation
//! reduction ──▶ advance* ──▶ finish ──▶ own blocks of the sum      │ makes a new collective
//!      ╎ message ───────────────┴────▶ everyone's messages         │
//!      ▼                                                           │
//! [norms, clip, update of own blocks or of all]                    │
//!                 │                                                │
//!            all_gather ──▶ everyone's blocks in place             │
//!                 │                                                │
//!            next step          any error ──▶ dead ────────────────┘
//! ```
//! Every block has one owner. Partial sums go to it, it adds them along the tree (`((0+1)+(2+3))+…` over lanes, whoever
//! serves them), and [`Collective::all_gather`] spreads what it made of them. Bytes on the wire are those of a ring
//! all-reduce: (n-1)/n of the buffer out and in for each half, times the parts of a worker in the first.
//!
//! Blocks travel as fp32 in little-endian order, which is asserted to be the machine's.

mod abort;
mod collective;
mod error;
mod farewell;
mod ids;
mod in_process;
mod ring;
pub mod tcp;
pub mod tree;

pub use abort::AbortHandle;
pub use collective::{Collective, MESSAGE_BYTES_MAX, Partials, Reduction};
pub use error::{Error, Result};
pub use ids::{Generation, Rank, Step};
pub use in_process::InProcess;
pub use ring::{BLOCK_LEN_MAX, MEMBERS_MAX, Ring, Shape};

const _: () = assert!(cfg!(target_endian = "little"), "blocks are sent as they lie in memory: little-endian");

//! NCCL for programs that must outlive their peers.
//!
//! ```text
//! Library        one libnccl.so.2, loaded at run time; versions that are known to hang are refused by number
//! Communicator   never blocks: made, used and polled without a call that waits for a peer
//! Watchdog       a thread that aborts all communicators of the process together, from outside of any blocked call
//! Symbols        the seam to the C library: `Loaded`, or a fake that records, for tests without a GPU
//! ```
//!
//! # What NCCL makes hard, and what is done about it
//! - A collective whose peer is dead does not end. Every communicator is non-blocking, and whoever waits polls
//!   [`Communicator::state`] beside a stop of its own.
//! - Aborting communicators one by one hangs: the abort of the first waits for the device, on which a kernel of the second
//!   still runs ([nccl#1013]). A [`Watchdog`] aborts all that it knows within one group call, which NCCL has from 2.22 on.
//! - An abort may hang even so. The watchdog gives it a time; past it `on_stuck` is called, which by default ends the
//!   process: a worker that is started again costs less than one that holds a GPU for ever.
//! - `ncclCommDestroy` waits for peers. [`Communicator`]'s `Drop` never calls it: it hands the communicator to the watchdog's
//!   thread, which aborts it, and does not wait.
//! - Results of C are numbers here, not an enum: a code of a newer NCCL is no undefined behaviour.
//!
//! The functions, their arguments and results: [NCCL's user guide][guide].
//!
//! [nccl#1013]: https://github.com/NVIDIA/nccl/issues/1013
//! [guide]: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html

mod communicator;
mod error;
mod library;
pub mod symbols;
mod watchdog;

pub use communicator::{Buffer, Communicator, Group, InitOptions, State};
pub use error::{Error, Result};
pub use library::{Library, Version};
pub use symbols::UniqueId;
pub use watchdog::Watchdog;

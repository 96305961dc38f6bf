//! Object stores for plain threads, and the run folder kept in one. Builds without LibTorch.
//!
//! ```text
//! any prefix      store        objects at a path or URL, read and written from plain threads
//!                 traffic      what was asked of one, and what came of it    limit  bytes a second
//!                 remote       which server a URL means, whose credentials, how long anything may take
//!                 doctor       is a store fit for runs?
//! what is in it   foreign      decoders of others, on bytes that anyone may have written
//! the run folder  config       the config that a run was begun with
//!                 events       what happened: numbered records; who writes the next one owns the run
//!                 environment  where it ran
//!                 checkpoint   manifests and their parts, their commit, and which of them stay
//!                 metrics      one row a step
//!                 cursor       where a lane is in its data
//! ```
//! A run folder is one prefix and the whole truth of a run:
//! ```text
//! config.toml                              the resolved config, written once
//! environment.json                         where the run was started, written once
//! events/00000001.json …                   what happened, one numbered record each, created and never changed
//! metrics/0000000001-0000000050.parquet …  one row a step, for the steps in the name
//! checkpoints/0000001200/part-00000-00000001.safetensors …, manifest.json (last)
//! ```

pub mod checkpoint;
mod config;
mod cursor;
pub mod doctor;
mod environment;
mod error;
pub mod events;
pub mod foreign;
mod limit;
pub mod metrics;
mod notice;
mod remote;
mod store;
mod traffic;
pub mod words;

pub use config::{CONFIG, read_config};
pub use cursor::{Cursor, OpenDocument, SourceCursor};
pub use environment::{ENVIRONMENT, Environment};
pub use error::{Error, Result};
pub use notice::{Notice, Refused};
pub use store::{Attempts, Fetched, Object, Reader, Store, WHOLE_BYTES_MAX};
pub use traffic::{Counts, Operation, Traffic};

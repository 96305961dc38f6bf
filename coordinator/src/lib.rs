//! Jobs and their rings: which workers train, from which step, and when a checkpoint exists. Builds without LibTorch.
//!
//! ```text
//! decides  core      the membership of a job's ring, and when a checkpoint is complete: pure
//! acts     job       one task a job: connections and the desk in, orders and tasks out
//!          desk      the thread that works on the run folder: log, metrics, manifests
//!          service   gRPC: workers' connections, handed to jobs
//!          launch    worker processes: started, watched, started again
//! ```

pub mod core;
mod desk;
mod error;
mod job;
pub mod launch;
mod service;

pub use anello_configs::Timings;
pub use error::{Error, Result};
pub use job::{Job, JobOptions, Opened, create};
pub use service::{Jobs, Server};

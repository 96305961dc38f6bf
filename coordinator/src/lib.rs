//! Jobs and their rings: which workers train, from which step, and when a checkpoint exists. Builds without LibTorch.
//!
//! ```text
//! decides  core      the membership of a job's ring, and when a checkpoint is complete: pure
//! acts     registry  the jobs of one place: their queue, their phases, what users want; the queue and phases are pure
//!          job       one task a job: connections and the desk in, orders and tasks out
//!          news      whether there is any of a job, so that nobody polls it
//!          desk      the thread that works on the run folder: log, metrics, manifests
//!          records   between the core's words and the run folder's
//!          service   gRPC: workers' connections, handed to jobs
//!          api       gRPC: users' requests, handed to the registry
//!          http      HTTP: metrics, figures as JSON, the page
//!          telemetry what Prometheus is told: metrics, and alerts and dashboards on them
//!          launch    worker processes: started, watched, started again
//! ```

mod api;
pub mod client;
pub mod core;
mod desk;
mod error;
pub mod http;
mod job;
pub mod launch;
mod news;
mod rate;
mod records;
mod registry;
mod service;
pub mod telemetry;
mod waits;

pub use anello_configs::Timings;
pub use error::{Error, Result};
pub use job::{Job, JobOptions, Opened, create};
pub use news::News;
pub use rate::Rates;
pub use records::record_of;
pub use registry::{Refusal, Registry, RegistryOptions, Said};
pub use service::{Bound, Jobs, Server};
pub use waits::Waits;

/// Target of the log's lines about what users had done: who asked for what, and what came of it.
pub const AUDIT: &str = "anello::audit";

//! A worker in a ring: one process that serves some lanes of a run under a coordinator.
//!
//! ```text
//! coordinator ◀── link ──▶ shell ── Command ──▶ model thread ──▶ collective ──▶ peers
//!                 words    Member    Form          engine, loader
//!                 orders   (pure)  ◀── Told ──     steps, snapshots ──▶ writer ──▶ run folder (parts)
//!                                                  state ──▶ Peers service ──▶ peers that lack it
//! ```
//!
//! The model lives on one thread and takes commands. What to do on which order is decided by
//! [`anello_member::Member`], which has no I/O; the shell performs it.

mod circle;
mod cursors;
mod gpus;
mod learner;
mod link;
mod live;
mod model;
mod pace;
mod parts;
mod peers;
mod replicas;
mod shell;
mod spot;
mod sum;
mod validation;
mod word;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anello_configs::ComputeDevice;
use anello_proto::ring::Leave;
use anello_proto::v1;
use anello_store::Store;
use anello_tls::Protection;

pub use gpus::speed::{Speed, measure};
pub use sum::{Total, add_up};

use crate::error::Result;

/// How a worker takes part.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// The coordinator: `host:port`.
    pub coordinator: String,
    /// The job.
    pub job: String,
    /// Addresses of this machine that peers reach, best first, at least one; ports are free ones.
    pub addresses: Vec<IpAddr>,
    /// Of all connections: those of peers and that to the coordinator.
    pub protection: Protection,
    /// Where this runs, for people.
    pub machine: String,
    /// CPU threads of LibTorch; absent: the config's, or all cores.
    pub threads: Option<u32>,
    /// What to compute on; absent: the config's.
    pub device: Option<ComputeDevice>,
    /// Who is told of this worker's run and of its steps, if anyone. Nothing waits for it.
    pub watcher: Option<std::sync::mpsc::Sender<Watched>>,
}

/// What a worker tells whoever watches it.
#[derive(Clone, Debug)]
pub enum Watched {
    /// The coordinator has said where the run is: its folder, on which the worker trains.
    Run(Store),
    /// It has applied a step: its figures, and how the worker is after it.
    Step(v1::StepReport, Load),
}

/// How a worker is after a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Bytes of data that wait for the next steps.
    pub queued_bytes: u64,
    /// Bytes that it sent to the other members in this one.
    pub sent_bytes: u64,
}

/// Takes part until sent away. `terminate`, once true, asks to go at the next step boundary.
///
/// # Errors
/// Sockets or threads that cannot be had, an address that needs TLS, a coordinator that does not accept our certificate or
/// whose we do not accept, a run folder that cannot be read or whose run this build cannot train. A ring that breaks is
/// no error.
pub fn serve(options: WorkerOptions, terminate: Arc<AtomicBool>) -> Result<Leave> {
    shell::serve(options, terminate)
}

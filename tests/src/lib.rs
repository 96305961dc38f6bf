//! What the end-to-end tests share: the built command, its processes with their logs, and a small run.

mod browser;
mod cloud;
mod cluster;
mod collector;
mod command;
mod kubelet;
mod network;
mod proxy;
mod run;
mod s3;
mod server;
mod tool;

pub use browser::Browser;
pub use cloud::{Cloud, Kind};
pub use cluster::{Cluster, kube_definition, kube_tool};
pub use collector::Collector;
pub use command::{Done, Process, anello, binary, free_port, signal, wait_until};
pub use network::Network;
pub use proxy::{Asked, Fate, Proxy};
pub use run::{World, checkpoint_in_writing, newest_checkpoint, objects, without_seconds, world};
pub use s3::S3;
pub use server::Server;
pub use tool::{Prometheus, http, http_at, page};

/// A counter-based generator for the moments at which a test strikes (SplitMix64).
#[derive(Clone, Debug)]
pub struct Dice(pub u64);

impl Dice {
    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % bound
    }
}

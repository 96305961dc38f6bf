//! `anello worker`: one worker process of a ring.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anello_coordinator::launch::Local;
use anello_proto::ring::Leave;
use anello_worker::ring::{WorkerOptions, serve};

use crate::failure::{Exit, Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::trace;

/// Arguments of `anello worker`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The coordinator: host:port.
    #[arg(long, value_name = "ADDRESS")]
    coordinator: String,
    /// The job to work for.
    #[arg(long, value_name = "NAME")]
    job: String,
    /// Address of this machine that the other workers reach: a loopback one, since there is no TLS yet.
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    address: IpAddr,
    /// Name of this machine, for people (default: its host name).
    #[arg(long, value_name = "NAME")]
    machine: Option<String>,
    /// CPU threads of LibTorch (default: all cores). The result does not depend on it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// End when standard input ends: so a worker never outlives the process that started it.
    #[arg(long)]
    until_eof: bool,
}

/// `anello worker`
pub fn run(args: &Args) -> Outcome {
    if !args.address.is_loopback() {
        let address = args.address;
        return Err(Failure::Usage(format!(
            "{address} is not a loopback address, and this build has no TLS"
        )));
    }
    let interrupt = Interrupt::watch()?;
    if args.until_eof {
        std::thread::Builder::new().name("stdin".to_owned()).spawn(|| {
            // Whatever ends it, there is nobody left to work for.
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            std::process::exit(crate::failure::ORPHANED);
        })?;
    }
    let options = WorkerOptions {
        coordinator: args.coordinator.clone(),
        job: args.job.clone(),
        address: args.address,
        machine: args.machine.clone().unwrap_or_else(host_name),
        threads: args.threads,
    };
    match serve(options, interrupt.flag())? {
        Leave::Done => Ok(Exit::Done),
        Leave::Dismissed { reason } => {
            tracing::info!(reason, "dismissed");
            Ok(Exit::Done)
        }
        Leave::Refused { reason } => Err(Failure::Refused(reason)),
        Leave::Evicted { reason } => Err(Failure::Evicted(reason)),
        Leave::Failed { reason } => Err(Failure::Ring(reason)),
    }
}

/// This program as a worker of `job`, that ends with the process that starts it and appends to the same timeline.
pub fn local(
    program: &Path,
    coordinator: SocketAddr,
    job: &str,
    threads: u32,
    timeline: Option<&Path>,
) -> Local {
    let (coordinator, threads) = (coordinator.to_string(), threads.to_string());
    let arguments =
        ["worker", "--coordinator", &coordinator, "--job", job, "--threads", &threads, "--until-eof"];
    Local {
        program: program.to_owned(),
        machine: host_name(),
        arguments: arguments.into_iter().map(OsString::from).collect(),
        environment: timeline.map(|file| (trace::VARIABLE.into(), file.into())).into_iter().collect(),
    }
}

/// This program.
pub fn program() -> Result<PathBuf, Failure> {
    Ok(std::env::current_exe()?)
}

/// Threads of each of `workers` workers on this machine: its share of the cores, unless the config says.
pub fn threads_of(configured: Option<u32>, workers: u32) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
    configured.unwrap_or((cores / workers.max(1)).max(1))
}

/// What this machine calls itself.
pub fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "localhost".to_owned() } else { name.trim().to_owned() }
}

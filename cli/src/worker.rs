//! `anello worker`: one worker process of a ring.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};

use anello_configs::ComputeDevice;
use anello_coordinator::launch::Local;
use anello_coordinator::record_of;
use anello_coordinator::telemetry::Board;
use anello_proto::ring::Leave;
use anello_store::{Notice, read_config};
use anello_tls::Role;
use anello_worker::ring::{Watched, WorkerOptions, serve};

use crate::certs::{Handed, ListenArgs};
use crate::failure::{Exit, Failure, Outcome};
use crate::http::HttpArgs;
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
    /// Address of this machine that the other workers reach; of a machine on several networks once for each, best first. One
    /// that other machines reach needs --tls, or --insecure.
    #[arg(long = "address", value_name = "IP", default_value = "127.0.0.1", value_parser = reachable)]
    addresses: Vec<IpAddr>,
    /// Name of this machine, for people (default: its host name).
    #[arg(long, value_name = "NAME")]
    machine: Option<String>,
    /// CPU threads of LibTorch (default: all cores). The result does not depend on it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// What to compute on: cpu, cuda or cuda:N (default: `compute.device` of the run's config).
    #[arg(long, value_name = "DEVICE")]
    device: Option<ComputeDevice>,
    /// End when standard input ends: so a worker never outlives the process that started it.
    #[arg(long)]
    until_eof: bool,
    /// Exit code of a worker that leaves before the run is over, because it was asked to: for who restarts what has not
    /// ended well.
    #[arg(long, value_name = "CODE", default_value_t = 0)]
    left_code: u8,
    #[command(flatten)]
    http: HttpArgs,
    #[command(flatten)]
    protection: ListenArgs,
}

/// An address that others can be told.
fn reachable(text: &str) -> Result<IpAddr, String> {
    match text.parse::<IpAddr>() {
        Ok(address) if address.is_unspecified() => {
            Err("others do not reach a worker there: give the address of this machine on their network"
                .to_owned())
        }
        Ok(address) => Ok(address),
        Err(error) => Err(error.to_string()),
    }
}

/// `anello worker`
pub fn run(args: &Args) -> Outcome {
    let interrupt = Interrupt::watch()?;
    if args.until_eof {
        std::thread::Builder::new().name("stdin".to_owned()).spawn(|| {
            // Whatever ends it, there is nobody left to work for.
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            std::process::exit(crate::failure::ORPHANED);
        })?;
    }
    let protection = args.protection.protection(Role::Worker)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let board = args.http.board();
    let page = args.http.bind(runtime.handle(), &protection)?;
    let page = page.map(|door| door.open(runtime.handle(), &board, None)).transpose()?;
    let watcher = page.as_ref().map(|_| watch(args.job.clone(), board)).transpose()?;
    if let Some(page) = &page {
        tracing::info!(url = page.url, "metrics are served");
    }
    let options = WorkerOptions {
        coordinator: args.coordinator.clone(),
        job: args.job.clone(),
        addresses: args.addresses.clone(),
        protection,
        machine: args.machine.clone().unwrap_or_else(host_name),
        threads: args.threads,
        device: args.device,
        watcher,
    };
    let unfit = |error: anello_worker::Error| match error.is_unfit() {
        true => Failure::Unfit(error),
        false => error.into(),
    };
    match serve(options, interrupt.flag()).map_err(unfit)? {
        Leave::Done => Ok(Exit::Done),
        Leave::Dismissed { reason } => {
            tracing::info!(reason, "dismissed");
            Ok(Exit::Left(args.left_code))
        }
        Leave::Refused { reason } => Err(Failure::Refused(reason)),
        Leave::Evicted { reason } => Err(Failure::Evicted(reason)),
        Leave::Failed { reason } => Err(Failure::JobFailed(reason)),
    }
}

/// Puts what the worker tells on a board.
fn watch(job: String, board: Board) -> Result<Sender<Watched>, Failure> {
    let (watcher, watched) = channel();
    std::thread::Builder::new().name("metrics".to_owned()).spawn(move || {
        for told in watched {
            match told {
                Watched::Run(store) => {
                    let known =
                        read_config(&store).and_then(|config| board.take_up(&job, &config, &store, &[]));
                    if let Err(error) = known {
                        tracing::warn!(%error, "there are no metrics: the run cannot be read");
                    }
                    board.with(&job, |figures| figures.use_store(Some(store)));
                }
                Watched::Step(report, load) => {
                    board.with(&job, |figures| figures.bear(load.queued_bytes, load.sent_bytes));
                    board.observe(&job, &Notice::Step(record_of(report)));
                }
            }
        }
    })?;
    Ok(watcher)
}

/// This program as a worker of `job`, that ends with the process that starts it and appends to the same timeline.
pub fn local(
    program: &Path,
    coordinator: SocketAddr,
    handed: &Handed,
    job: &str,
    threads: u32,
    device: Option<ComputeDevice>,
    timeline: Option<&Path>,
) -> Local {
    let device = device.map(|device| device.to_string());
    let (address, port, threads) = (coordinator.ip(), coordinator.port(), threads.to_string());
    let reached = match address {
        // Wherever it listens, this machine is reached so.
        IpAddr::V4(address) if address.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(address) if address.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        address => address,
    };
    let (coordinator, address) = (SocketAddr::new(reached, port).to_string(), reached.to_string());
    let mut arguments =
        vec!["worker", "--coordinator", &coordinator, "--job", job, "--threads", &threads, "--until-eof"];
    if let Some(device) = &device {
        arguments.extend(["--device", device]);
    }
    if !reached.is_loopback() {
        // Workers of other machines may come too.
        arguments.extend(["--address", &address]);
        arguments.extend(handed.insecure.then_some("--insecure"));
    }
    let timeline = timeline.map(|file| (trace::VARIABLE.into(), file.into()));
    Local {
        program: program.to_owned(),
        machine: host_name(),
        arguments: arguments.into_iter().map(OsString::from).collect(),
        environment: std::iter::once(handed.environment()).chain(timeline).collect(),
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

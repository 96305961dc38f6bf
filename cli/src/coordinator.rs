//! `anello coordinator`: several jobs, as a service.

use std::mem::ManuallyDrop;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use anello_configs::RunConfig;
use anello_coordinator::http::Keeper;
use anello_coordinator::{Jobs, Rates, Refusal, Registry, RegistryOptions, Said, Server, Timings};
use anello_proto::jobs::{JobName, Submission};
use anello_store::{Store, doctor};
use anello_tls::Role;
use anello_worker::pin_init;

use crate::certs::{Handed, ListenArgs};
use crate::config::{check_ready, load};
use crate::failure::{Exit, Failure, Outcome};
use crate::http::HttpArgs;
use crate::interrupt::Interrupt;
use crate::jobs::{DEFAULT_ADDRESS, absolute};
use crate::screen::Screen;
use crate::text::read_time;
use crate::worker::{local, program, threads_of};

/// Arguments of `anello coordinator`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to listen for users and workers: an address and a port, 0 for any free one. One that other machines reach
    /// needs --tls, or --insecure.
    #[arg(long, value_name = "ADDRESS", default_value = DEFAULT_ADDRESS)]
    listen: SocketAddr,
    /// The folder, or URL, of the jobs: all that is known of them. A coordinator that is started on it goes on with them.
    #[arg(long, value_name = "PLACE")]
    jobs: String,
    /// Worker processes on this machine at most (default: one a core); 0: none are started, they come from elsewhere, as
    /// `anello worker --coordinator ADDRESS --job NAME`.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=4096))]
    slots: Option<u32>,
    /// How long a silent fault of a worker may go unseen, in the rings of all jobs (default: `ring.detection` of each job's
    /// own config).
    #[arg(long, value_name = "TIME", value_parser = read_time)]
    detection: Option<Duration>,
    /// Submit this config at the start, a preset or a TOML file, unless the place holds the job already. What is wrong
    /// with it ends the command, with exit code 2.
    #[arg(long, value_name = "CONFIG")]
    submit: Option<String>,
    /// Set a key over that config. May be given again.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "submit")]
    sets: Vec<String>,
    /// Name of that job (default: the config's).
    #[arg(long, value_name = "NAME", requires = "submit")]
    name: Option<String>,
    /// Fewest workers that train it.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "submit", value_parser = clap::value_parser!(u32).range(1..=4096))]
    min: u32,
    /// Requests a second that one address may make of each of the two servers, gRPC and HTTP: who asks more often is told
    /// when to come again. Five seconds' worth may come at once. Workers, and probes of health, are not counted.
    #[arg(long, value_name = "N", default_value_t = Rates::DEFAULT.requests)]
    requests_per_second: NonZeroU32,
    /// Those of them that change something, a second: submit, pause, scale and their like.
    #[arg(long, value_name = "N", default_value_t = Rates::DEFAULT.changes)]
    changes_per_second: NonZeroU32,
    #[command(flatten)]
    http: HttpArgs,
    #[command(flatten)]
    protection: ListenArgs,
}

const POLL: Duration = Duration::from_millis(100);

/// The job that is submitted at the start.
fn submission(args: &Args) -> Result<Option<Submission>, Failure> {
    let Some(config) = &args.submit else { return Ok(None) };
    let mut loaded = load(config, &args.sets)?;
    check_ready(&loaded)?;
    pin_init(&mut loaded.config)?;
    let name = args.name.clone().unwrap_or_else(|| loaded.config.name.clone());
    let name = JobName::new(name.as_str()).ok_or_else(|| {
        Failure::Usage(format!("`{name}` is no name of a job; give letters, digits, `-` and `_` with --name"))
    })?;
    let (min, config) = (args.min, loaded.config.to_toml());
    Ok(Some(Submission { config, name: Some(name), min, desired: min, run: None }))
}

/// `anello coordinator`
pub fn run(args: &Args, screen: &Screen) -> Outcome {
    let interrupt = Interrupt::watch()?;
    // What a person got wrong, before anything is taken over.
    let submission = submission(args)?;
    // It ends with the process: the registry's thread waits in it, and panics when it is gone.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let runtime = ManuallyDrop::new(runtime);
    let protection = args.protection.protection(Role::Coordinator)?;
    let with_tls = if protection.tls().is_some() { " (TLS)" } else { "" };
    // The address first: one that is in use must not fence the coordinator that uses it.
    let rates = Rates { requests: args.requests_per_second, changes: args.changes_per_second };
    let bound = runtime.block_on(Server::bind(args.listen, protection.clone()))?.limited(rates);
    let address = bound.address;
    let door = args.http.bind_limited(runtime.handle(), &protection, rates)?;
    let board = args.http.traced_board(runtime.handle())?;
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
    let slots = Some(args.slots.unwrap_or(cores)).filter(|slots| *slots > 0);
    let handed = match slots {
        Some(_) => args.protection.for_local_workers(&protection)?,
        None => Handed::default(),
    };
    let (place, jobs) = (absolute(&args.jobs)?, Jobs::default());
    doctor::check_ledger(&Store::durable(&place)?)?;
    let timings = args.detection.map(Timings::new);
    let options = RegistryOptions { place: place.clone(), slots, timings, board: board.clone() };
    let worker = program()?;
    let timeline = screen.timeline().map(Path::to_owned);
    let launcher = move |job: &str, config: &RunConfig, workers: u32| {
        let threads = threads_of(config.compute.threads, slots.unwrap_or(workers));
        local(&worker, address, &handed, job, threads, None, timeline.as_deref())
    };
    let (sender, said) = channel();
    let (registry, thread) =
        Registry::start(options, runtime.handle().clone(), jobs.clone(), sender, launcher)?;
    let server = runtime.block_on(bound.serve(jobs, Some(registry.clone())))?;
    let room = match slots {
        Some(1) => "1 slot".to_owned(),
        Some(slots) => format!("{slots} slots"),
        None => "workers from elsewhere".to_owned(),
    };
    screen.line(&format!("coordinator at {address}{with_tls}, jobs in {place}, {room}"))?;
    let page = door.map(|door| door.open(runtime.handle(), &board, Some(Keeper::Registry(registry.clone()))));
    let page = page.transpose()?;
    if let Some(page) = &page {
        screen.line(&format!("page at {}", page.url))?;
    }

    let ensured = submission.map(|submission| runtime.block_on(registry.ensure(submission)));
    let refused = ensured.and_then(Result::err).map(|refusal| match refusal {
        Refusal::Store(source) => Failure::Store(source),
        refusal => Failure::Usage(refusal.to_string()),
    });

    let (mut stopping, mut handed_over) = (false, false);
    let mut fenced = None;
    loop {
        match said.recv_timeout(POLL) {
            Ok(Said::Phase { job, phase, why }) => {
                let why = why.map(|why| format!(": {why}")).unwrap_or_default();
                screen.line(&format!("job {job} is {phase}{why}"))?;
            }
            Ok(Said::Job { job, text }) => screen.line(&format!("job {job}: {text}"))?,
            Ok(Said::Fenced { by }) => fenced = Some(by),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if (refused.is_some() || interrupt.raised()) && !stopping {
            stopping = true;
            // Whoever starts workers elsewhere moves this process as well, and they need not notice.
            if slots.is_none() && (refused.is_some() || interrupt.terminated()) {
                screen.line(
                    "leaving: workers train on, and the next coordinator of this place goes on with them",
                )?;
                runtime.block_on(registry.hand_over());
                handed_over = true;
            } else {
                screen.line("stopping: every job takes a checkpoint; Ctrl-C again leaves at once")?;
                runtime.block_on(registry.stop());
            }
        }
    }
    let _ = thread.join();
    runtime.block_on(server.stop());
    board.finish();
    if let Some(page) = page {
        runtime.block_on(page.stop());
    }
    if let Some(refused) = refused {
        return Err(refused);
    }
    match fenced {
        Some(by) => Err(Failure::Ring(format!(
            "another coordinator has taken over {place} ({by}): this one has ended its workers and leaves"
        ))),
        None if handed_over => Ok(Exit::Done),
        None if stopping => Ok(Exit::Interrupted),
        None => {
            Err(Failure::Ring("the registry's thread ended without a word; report this as a bug".to_owned()))
        }
    }
}

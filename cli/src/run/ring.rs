//! `anello run --workers N`: a coordinator in this process, and N worker processes under it.

use std::net::SocketAddr;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Instant;

use anello_configs::RunConfig;
use anello_coordinator::core::{Goal, Outcome as RingOutcome};
use anello_coordinator::http::Keeper;
use anello_coordinator::launch::Crew;
use anello_coordinator::{JobOptions, Jobs, News, Opened, Server, Timings, Waits, create};
use anello_proto::ring::Step;
use anello_store::{CONFIG, Notice, Store, checkpoint, doctor, metrics, read_config};
use anello_tls::{Protection, Role};
use anello_worker::{Ended, pin_init};

use super::tracker::Tracker;
use super::view::View;
use super::{Args, POLL, adopt_init, config_of, lines, no_config, samples, say_where_it_stands, summary};
use crate::certs::Handed;
use crate::failure::{Exit, Failure, Outcome};
use crate::http::Solo;
use crate::interrupt::Interrupt;
use crate::place::open_run;
use crate::screen::Screen;
use crate::worker::{local, program, threads_of};

/// Deaths that are replaced before a run is given up.
const BUDGET: u32 = 1000;

/// Trains with `workers` worker processes.
pub(super) fn run(args: &Args, workers: u32, screen: &Screen) -> Outcome {
    let interrupt = Interrupt::watch()?;
    let protection = match args.external {
        true => args.protection.protection(Role::Coordinator)?,
        false => Protection::Loopback,
    };
    // Before a run is made that nobody can serve.
    protection.check(args.address)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let door = args.http.bind(runtime.handle(), &protection)?;
    let (store, config) = open(args)?;
    doctor::check_ledger(&store)?;
    let mut tracker = Tracker::new(&config, None);
    let mut view = View::new(screen);
    view.line(&lines::heading(&config, tracker.schedule(), store.place()))?;

    let timings = args.detection.map_or_else(|| Timings::of(&config), Timings::new);
    // The address first: one that is in use must not fence the coordinator that uses it.
    let bound = runtime.block_on(Server::bind(SocketAddr::new(args.address, args.port), protection))?;
    let jobs = Jobs::default();
    let options = JobOptions { name: config.name.clone(), min: 1, desired: workers, timings };
    let (sender, notices) = channel();
    let board = args.http.traced_board(runtime.handle())?;
    let watched = door.is_some() || board.is_tracing();
    let solo = watched.then(|| Solo::new(board.clone(), &config, &store, workers)).transpose()?;
    let opened = Opened::take_up(store.clone(), options)?;
    solo.iter().for_each(|solo| solo.observe(&Notice::Logged(opened.taken().clone())));
    let (job, task) = runtime.block_on(async { opened.start(sender, News::default()) })?;
    // Before anyone can connect: a worker that is told of no such job goes.
    jobs.add(job.clone());
    let server = runtime.block_on(bound.serve(jobs.clone(), None))?;
    view.line(&format!("coordinator at {}, {workers} workers", server.address))?;
    let page = door.map(|door| door.open(runtime.handle(), &board, Some(Keeper::Board))).transpose()?;
    if let Some(page) = &page {
        view.line(&format!("page at {}", page.url))?;
    }
    let started = if args.external { 0 } else { workers };
    let threads = threads_of(args.threads.or(config.compute.threads), workers);
    let handed = Handed::default();
    let name = config.name.as_str();
    let launcher = local(&program()?, server.address, &handed, name, threads, args.device, screen.timeline());
    let mut crew = Crew::start(launcher, started, BUDGET)?;

    let mut stopping = false;
    let mut asked = Instant::now();
    let mut waits = Waits::default();
    loop {
        match notices.recv_timeout(POLL) {
            Ok(notice) => {
                solo.iter().for_each(|solo| solo.observe(&notice));
                tracker.observe(&notice);
                view.notice(&notice, &tracker)?;
            }
            Err(RecvTimeoutError::Timeout) => view.refresh(&tracker),
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if asked.elapsed() >= POLL
            && let Some(status) = runtime.block_on(job.status())
        {
            asked = Instant::now();
            if let Some(what) = waits.look(status.waits_for.clone(), asked) {
                view.line(&format!("it waits for {what}"))?;
            }
            solo.iter().for_each(|solo| solo.set_ring(status.clone()));
        }
        for said in crew.tend() {
            view.line(&said)?;
        }
        if started > 0
            && crew.is_over()
            && !task.is_finished()
            && !stopping
            && runtime.block_on(is_deserted(&job, tracker.schedule().total_steps()))
        {
            // Its end, and why, is for the log to tell.
            stopping = true;
            let why = crew.given_up().unwrap_or("all workers have ended, and none is started again");
            runtime.block_on(job.give_up(format!("no worker is left: {why}")));
        }
        if interrupt.raised() && !stopping {
            stopping = true;
            runtime.block_on(job.set_goal(Goal::Pause));
            view.line("stopping: this step is finished and a checkpoint taken; Ctrl-C again leaves at once")?;
        }
    }
    let outcome =
        runtime.block_on(task).map_err(|cause| Failure::Ring(format!("the coordinator ended: {cause}")))?;
    crew.dismiss(timings.grace);
    board.finish();
    view.close(&tracker)?;
    let ended = match outcome {
        RingOutcome::Completed | RingOutcome::Paused | RingOutcome::Cancelled => ended(&store, &config)?,
        RingOutcome::Failed { reason } => {
            say_where_it_stands(&store);
            return Err(Failure::Ring(reason));
        }
        RingOutcome::Fenced { by } => return Err(Failure::Ring(by)),
    };
    screen.print(&summary::table(&metrics::read(&store)?, &ended))?;
    if args.sample > 0 && !stopping {
        screen.print(&samples(&store, &config, &ended, args.sample))?;
    }
    screen.print(&summary::places(&ended, store.place(), &checkpoint::steps(&store)?))?;
    Ok(if stopping && !ended.finished { Exit::Interrupted } else { Exit::Done })
}

/// Whether no worker is connected, though there are steps to train.
async fn is_deserted(job: &anello_coordinator::Job, total: u64) -> bool {
    let trained = |committed: Option<Step>| committed.is_some_and(|step| step.0 == total);
    job.status().await.is_some_and(|status| status.workers == 0 && !trained(status.committed))
}

/// The run folder: a new one with the config in it, or the one to go on with.
fn open(args: &Args) -> Result<(Store, RunConfig), Failure> {
    let sets: Vec<String> = args.sets.iter().cloned().chain(args.device_set()).collect();
    let config = |name: &str| config_of(name, &sets);
    match (&args.resume, &args.config) {
        (Some(place), given) => {
            open_run(place)?;
            let store = Store::durable(place)?;
            let ours = read_config(&store)?;
            if let Some(name) = given {
                let mut theirs = config(name)?;
                adopt_init(&mut theirs, &ours);
                if let Some(differs) = ours.diff_mathematics(&theirs).first() {
                    return Err(Failure::Usage(format!(
                        "the config changes {} of {}; resume without it, or without --workers",
                        differs.key,
                        store.place_of(CONFIG)
                    )));
                }
            }
            Ok((store, ours))
        }
        (None, Some(name)) => {
            let mut config = config(name)?;
            pin_init(&mut config)?;
            let out = args.out.clone().unwrap_or_else(|| format!("runs/{}", config.name));
            let store = Store::durable(&out)?;
            if store.get(CONFIG)?.is_some() {
                return Err(Failure::Usage(format!(
                    "{out} holds a run already; resume it, or give another folder"
                )));
            }
            create(&store, &config)?;
            Ok((store, config))
        }
        (None, None) => Err(no_config()),
    }
}

/// Where the run stands, by its newest checkpoint.
fn ended(store: &Store, config: &RunConfig) -> Result<Ended, Failure> {
    let Some(step) = checkpoint::steps(store)?.last().copied() else {
        return Ok(Ended { step: 0, finished: false, weights: "none yet".to_owned() });
    };
    let weights = checkpoint::read_manifest(store, step)?.weights;
    let finished = step >= anello_configs::Schedule::new(config).total_steps();
    Ok(Ended { step, finished, weights })
}

//! `anello run`: opens a run, trains it, and shows how it goes.

mod lines;
mod ring;
mod sample;
mod summary;
mod tracker;
mod view;

use std::net::IpAddr;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use anello_configs::{ComputeDevice, RunConfig, Schedule};
use anello_coordinator::http::Keeper;
use anello_store::{CONFIG, Store, checkpoint, metrics, read_config};
use anello_tls::Protection;
use anello_worker::{Control, Ended, Resume, Run, Training, pin_init};

use crate::certs::ListenArgs;
use crate::config::{check_ready, load, load_text};
use crate::failure::{Exit, Failure, Outcome};
use crate::http::{HttpArgs, Solo};
use crate::interrupt::Interrupt;
use crate::place::open_run;
use crate::screen::Screen;
use crate::text::{grouped, read_time};
use crate::tokenizer::{read_tokenizer, tokenizer_file};
use tracker::Tracker;
use view::View;

/// Arguments of `anello run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A preset (tiny, mano, ouro-1.4b, …) or a TOML file. With --resume: the run's own config unless given.
    #[arg(required_unless_present = "resume")]
    config: Option<String>,
    /// The folder for the run (default: runs/NAME).
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    out: Option<String>,
    /// Go on with the run in this folder, from its newest checkpoint that is whole.
    #[arg(long, value_name = "RUN")]
    resume: Option<String>,
    /// Set a key over the config: `stage.stable.lr=1e-4`. May be given again.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Stop, with a checkpoint, when so many steps are done.
    #[arg(long, value_name = "STEP")]
    until: Option<u64>,
    /// CPU threads of LibTorch (default: all cores). The result does not depend on it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// What to compute on: cpu, cuda or cuda:N (default: `compute.device` of the config). With --workers, `cuda` gives each
    /// worker the next GPU of this machine.
    #[arg(long, value_name = "DEVICE")]
    device: Option<ComputeDevice>,
    /// Train with so many worker processes on this machine, which may come and go. The result does not depend on it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256), conflicts_with_all = ["until", "allow"])]
    workers: Option<u32>,
    /// With --workers: start none here; they come from elsewhere, as `anello worker --coordinator ADDRESS --job NAME`.
    #[arg(long, requires = "workers")]
    external: bool,
    /// With --workers: how long a silent fault of a worker may go unseen (default: `ring.detection` of the config).
    #[arg(long, value_name = "TIME", value_parser = read_time, requires = "workers")]
    detection: Option<Duration>,
    /// With --workers: the coordinator's port; 0 for any free one.
    #[arg(long, value_name = "PORT", default_value_t = 0, requires = "workers")]
    port: u16,
    /// With --external: where the coordinator listens. An address that other machines reach needs --tls, or --insecure.
    #[arg(long, value_name = "IP", default_value = "127.0.0.1", requires = "external")]
    address: IpAddr,
    /// Tokens of each sample of text at the end; 0 for none.
    #[arg(long, value_name = "TOKENS", default_value_t = 48)]
    sample: usize,
    /// Resume although the config or the data changes the mathematics of the run.
    #[arg(long, requires = "resume")]
    allow: bool,
    #[command(flatten)]
    http: HttpArgs,
    /// For workers from elsewhere.
    #[command(flatten)]
    protection: ListenArgs,
}

impl Args {
    /// `--device` as a key over the config.
    fn device_set(&self) -> Option<String> {
        self.device.map(|device| format!("compute.device={device}"))
    }
}

/// How often the loop looks for an interrupt when nothing happens.
const POLL: Duration = Duration::from_millis(100);

/// `anello run`
pub fn run(args: &Args, screen: &Screen) -> Outcome {
    if args.protection.are_given() && !args.external {
        return Err(Failure::Usage(
            "TLS is for workers from elsewhere (--external); those that are started here speak over loopback"
                .to_owned(),
        ));
    }
    if let Some(workers) = args.workers {
        return ring::run(args, workers, screen);
    }
    let interrupt = Interrupt::watch()?;
    // A thread for the page, when there is one: none of those that train waits for it.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let door = args.http.bind(runtime.handle(), &Protection::Loopback)?;
    let run = open(args)?;
    let (config, store) = (run.config.clone(), run.store.clone());
    let board = args.http.traced_board(runtime.handle())?;
    let watched = door.is_some() || board.is_tracing();
    let solo = watched.then(|| Solo::new(board.clone(), &config, &store, 1)).transpose()?;
    let page = door.map(|door| door.open(runtime.handle(), &board, Some(Keeper::Board))).transpose()?;
    let mut tracker = Tracker::new(&config, args.until);
    let mut view = View::new(screen);
    view.line(&lines::heading(&config, tracker.schedule(), store.place()))?;
    if let Some(page) = &page {
        view.line(&format!("page at {}", page.url))?;
    }

    let control = Control::default();
    let training = Training::start(run, control.clone(), args.until)?;
    let mut stopping = false;
    loop {
        match training.notices.recv_timeout(POLL) {
            Ok(notice) => {
                solo.iter().for_each(|solo| solo.observe(&notice));
                tracker.observe(&notice);
                view.notice(&notice, &tracker)?;
            }
            Err(RecvTimeoutError::Timeout) => view.refresh(&tracker),
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if interrupt.raised() && !stopping {
            stopping = true;
            control.stop();
            view.line("stopping: this step is finished and a checkpoint taken; Ctrl-C again leaves at once")?;
        }
    }
    let ended = training.join();
    board.finish();
    view.close(&tracker)?;
    let ended = ended.inspect_err(|_| say_where_it_stands(&store))?;
    solo.iter().for_each(|solo| solo.ended(ended.finished));
    screen.print(&summary::table(&metrics::read(&store)?, &ended))?;
    if args.sample > 0 && !stopping {
        screen.print(&samples(&store, &config, &ended, args.sample))?;
    }
    screen.print(&summary::places(&ended, store.place(), &checkpoint::steps(&store)?))?;
    Ok(if stopping && !ended.finished { Exit::Interrupted } else { Exit::Done })
}

/// The config called `name` with `sets` over it, whose sources are there.
fn config_of(name: &str, sets: &[String]) -> Result<RunConfig, Failure> {
    let loaded = load(name, sets)?;
    check_ready(&loaded)?;
    Ok(loaded.config)
}

fn no_config() -> Failure {
    Failure::Usage("there is no config; name a preset or a file, or --resume a run".to_owned())
}

/// A new run, or the one to resume.
fn open(args: &Args) -> Result<Run, Failure> {
    let threads = args.threads.map(|threads| format!("compute.threads={threads}"));
    let sets: Vec<String> = args.sets.iter().cloned().chain(threads).chain(args.device_set()).collect();
    let config = |name: &str| config_of(name, &sets);
    match (&args.resume, &args.config) {
        (Some(place), given) => {
            open_run(place)?;
            let store = Store::durable(place)?;
            // First by itself: a damaged config is the run's fault, not that of what is set over it.
            let begun_with = read_config(&store)?;
            let mut config = match given {
                Some(given) => config(given)?,
                None => {
                    let text = store.folder().is_none().then(|| begun_with.to_toml());
                    let loaded = load_text(&store.place_of(CONFIG), text, &sets)?;
                    check_ready(&loaded)?;
                    loaded.config
                }
            };
            adopt_init(&mut config, &begun_with);
            Ok(Run::resume(store, Resume { config: Some(config), allow: args.allow })?)
        }
        (None, Some(name)) => {
            let mut config = config(name)?;
            pin_init(&mut config)?;
            let out = args.out.clone().unwrap_or_else(|| format!("runs/{}", config.name));
            Ok(Run::create(Store::durable(&out)?, config)?)
        }
        (None, None) => Err(no_config()),
    }
}

/// A config that names the weights that the run began with, and not by digest, means those.
fn adopt_init(config: &mut RunConfig, begun_with: &RunConfig) {
    if let (Some(named), Some(known)) = (&config.init, &begun_with.init)
        && named.weights.is_none()
        && known.from.strip_prefix(&named.from).is_some_and(|step| step.is_empty() || step.starts_with('@'))
    {
        config.init = begun_with.init.clone();
    }
}

/// After a failure: what is safe.
fn say_where_it_stands(store: &Store) {
    if let Some(step) = checkpoint::steps(store).ok().and_then(|steps| steps.last().copied()) {
        let place = store.place();
        eprintln!(
            "the newest checkpoint is that of step {}; `anello run --resume {place}` goes on from it",
            grouped(step)
        );
    }
}

/// What the model writes. It trained well, so that whatever is wrong here is no failure of the run.
fn samples(store: &Store, config: &RunConfig, ended: &Ended, tokens: usize) -> String {
    let schedule = Schedule::new(config);
    let Some(last) = ended.step.checked_sub(1).and_then(|step| schedule.at(step)) else {
        return String::new();
    };
    let samples = match sample::take(store, config, last.stage, ended.step, tokens) {
        Ok(samples) => samples,
        Err(cause) => {
            tracing::warn!(cause = cause.text(), "there is no sample of text");
            return String::new();
        }
    };
    let tokenizer = tokenizer_file(config).and_then(|path| {
        let read = read_tokenizer(&path);
        read.inspect_err(|cause| tracing::warn!(cause = cause.text(), "samples are ids")).ok()
    });
    sample::render(&samples, tokenizer.as_ref())
}

//! The user's side of a coordinator: `anello submit`, `list`, `describe`, `logs`, `watch`, `top`, `pause`, `resume`, `scale`
//! and `cancel`.

mod client;
mod show;
mod watch;

use anello_proto::jobs::Phase;
use anello_proto::v1;
use anello_store::events::Record;
use anello_worker::pin_init;

use crate::certs::TlsArgs;
use crate::config::{ConfigArgs, check_ready, load};
use crate::failure::{Exit, Failure, Outcome};
use crate::kube::KubeArgs;
use crate::screen::Screen;
use client::Client;
pub use watch::{top, watch};

/// Where a coordinator listens unless it is told otherwise.
pub const DEFAULT_ADDRESS: &str = "127.0.0.1:7700";

/// Which coordinator.
#[derive(Clone, Debug, clap::Args)]
pub struct At {
    /// The coordinator: host:port.
    #[arg(long, value_name = "ADDRESS", env = "ANELLO_COORDINATOR", default_value = DEFAULT_ADDRESS)]
    coordinator: String,
    #[command(flatten)]
    tls: TlsArgs,
}

/// How many jobs the coordinator at `address` has.
pub fn count(address: &str, tls: &TlsArgs) -> Result<usize, Failure> {
    let at = At { coordinator: address.to_owned(), tls: tls.clone() };
    Ok(Client::connect(&at)?.list(v1::ListRequest {})?.jobs.len())
}

/// Arguments of the commands about one job.
#[derive(Clone, Debug, clap::Args)]
pub struct JobArgs {
    /// The job's name.
    job: String,
    #[command(flatten)]
    at: At,
}

impl JobArgs {
    /// The job's name.
    pub fn name(&self) -> &str {
        &self.job
    }

    fn request(&self) -> v1::JobRequest {
        v1::JobRequest { name: self.job.clone() }
    }
}

/// Arguments of `anello submit`.
#[derive(Debug, clap::Args)]
pub struct SubmitArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The job's name (default: the config's).
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Workers that are wanted (default: as many as --min). The result does not depend on it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub workers: Option<u32>,
    /// Fewest workers that train; with fewer the job waits.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub min: u32,
    /// The folder, or URL, for the run (default: NAME in the coordinator's place).
    #[arg(long, value_name = "DIR", conflicts_with = "kube")]
    out: Option<String>,
    #[command(flatten)]
    at: At,
    #[command(flatten)]
    pub kube: KubeArgs,
}

/// Arguments of `anello list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    #[command(flatten)]
    at: At,
}

/// Arguments of `anello logs`.
#[derive(Debug, clap::Args)]
pub struct LogsArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Go on with what comes, until the job is over.
    #[arg(long, short)]
    follow: bool,
}

/// Arguments of `anello scale`.
#[derive(Debug, clap::Args)]
pub struct ScaleArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Workers that are wanted. The result does not depend on it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    workers: u32,
}

/// A place that means the same from any directory.
pub fn absolute(place: &str) -> Result<String, Failure> {
    if place.contains("://") {
        return Ok(place.to_owned());
    }
    Ok(std::path::absolute(place)?.display().to_string())
}

/// `anello submit`
pub fn submit(args: &SubmitArgs, screen: &Screen) -> Outcome {
    if args.kube.kube {
        return crate::kube::submit(args, screen);
    }
    let mut loaded = load(&args.config.config, &args.config.sets)?;
    check_ready(&loaded)?;
    pin_init(&mut loaded.config)?;
    let request = v1::SubmitRequest {
        config: loaded.config.to_toml(),
        name: args.name.clone(),
        min: Some(args.min),
        desired: Some(args.workers.unwrap_or(args.min)),
        run: args.out.as_deref().map(absolute).transpose()?,
    };
    let job = Client::connect(&args.at)?.submit(request)?;
    screen.line(&format!("{}\n`anello watch {}` shows how it goes", show::sentence(&job)?, job.name))?;
    Ok(Exit::Done)
}

/// `anello list`
pub fn list(args: &ListArgs, screen: &Screen) -> Outcome {
    let jobs = Client::connect(&args.at)?.list(v1::ListRequest {})?.jobs;
    screen.print(&show::list(&jobs)?)?;
    Ok(Exit::Done)
}

/// `anello describe`
pub fn describe(args: &JobArgs, screen: &Screen) -> Outcome {
    let detail = Client::connect(&args.at)?.describe(args.request())?;
    screen.print(&show::describe(&detail)?)?;
    Ok(Exit::Done)
}

/// `anello logs`
pub fn logs(args: &LogsArgs, screen: &Screen) -> Outcome {
    let request = v1::LogsRequest { name: args.job.job.clone(), follow: args.follow, after: None };
    let mut client = Client::connect(&args.job.at)?;
    let mut records = client.logs(request)?;
    while let Some(record) = client.next(&mut records)? {
        screen.line(&show::record(&record))?;
    }
    Ok(Exit::Done)
}

/// `anello pause`
pub fn pause(args: &JobArgs, screen: &Screen) -> Outcome {
    told(&Client::connect(&args.at)?.pause(args.request())?, screen)
}

/// `anello resume`
pub fn resume(args: &JobArgs, screen: &Screen) -> Outcome {
    told(&Client::connect(&args.at)?.resume(args.request())?, screen)
}

/// `anello scale`
pub fn scale(args: &ScaleArgs, screen: &Screen) -> Outcome {
    let request = v1::ScaleRequest { name: args.job.job.clone(), workers: args.workers };
    told(&Client::connect(&args.job.at)?.scale(request)?, screen)
}

/// Asks for a checkpoint of all that is trained now: the connection, and the step that it holds at least.
pub fn ask_for_checkpoint(args: &JobArgs) -> Result<(Client, u64), Failure> {
    let mut client = Client::connect(&args.at)?;
    let step = client.checkpoint(args.request())?.step;
    Ok((client, step))
}

/// Waits until a checkpoint of `step` or later is committed, and says of which; absent when it is not told of any more.
pub fn wait_for_checkpoint(args: &JobArgs, client: &mut Client, step: u64) -> Result<Option<u64>, Failure> {
    let mut details = client.watch(args.request())?;
    while let Some(detail) = client.next(&mut details)? {
        if let Some(committed) = detail.committed.filter(|committed| *committed >= step) {
            return Ok(Some(committed));
        }
        // Of one that has no ring any more the newest is not told; what it trained is in it.
        let job = detail.job.unwrap_or_default();
        match phase_of(&job)? {
            Phase::Completed | Phase::Paused => return Ok(Some(job.step.unwrap_or(step))),
            Phase::Failed | Phase::Cancelled => return Ok(None),
            Phase::Queued | Phase::Forming | Phase::Running | Phase::Pausing | Phase::Recovering => {}
        }
    }
    Ok(None)
}

/// `anello cancel`
pub fn cancel(args: &JobArgs, screen: &Screen) -> Outcome {
    told(&Client::connect(&args.at)?.cancel(args.request())?, screen)
}

fn told(job: &v1::Job, screen: &Screen) -> Outcome {
    screen.line(&show::sentence(job)?)?;
    Ok(Exit::Done)
}

/// The phase, checked.
fn phase_of(job: &v1::Job) -> Result<Phase, Failure> {
    Phase::try_from(job.phase()).map_err(|malformed| Failure::Unreachable(malformed.to_string()))
}

/// The record; absent when this build does not know its kind.
fn record_of(record: &v1::LogRecord) -> Option<Record> {
    serde_json::from_str(&record.json).ok()
}

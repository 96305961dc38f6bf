//! `anello checkpoint now`.

use crate::failure::{Exit, Failure, Outcome};
use crate::jobs::{self, JobArgs};
use crate::screen::Screen;
use crate::text::grouped;

/// Arguments of `anello checkpoint now`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// Do not wait until it is there.
    #[arg(long)]
    no_wait: bool,
}

pub fn now(args: &Args, screen: &Screen) -> Outcome {
    let (mut client, wanted) = jobs::ask_for_checkpoint(&args.job)?;
    let name = args.job.name();
    if args.no_wait {
        let step = grouped(wanted);
        screen.line(&format!("job {name} takes a checkpoint that holds step {step} or a later one"))?;
        return Ok(Exit::Done);
    }
    match jobs::wait_for_checkpoint(&args.job, &mut client, wanted)? {
        Some(step) => {
            screen.line(&format!("job {name}: checkpoint {} is there", grouped(step)))?;
            Ok(Exit::Done)
        }
        None => Err(Failure::Unreachable(format!(
            "the coordinator, or the job, ended before the checkpoint was told of; `anello describe {name}` shows the newest"
        ))),
    }
}

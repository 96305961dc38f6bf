//! `anello report`: a run as one HTML page that needs nothing else.
//!
//! `series` turns the metrics into about two thousand points, `page` lays them and the rest out as HTML, and the script of
//! the coordinator's page draws them in the reader's browser.

mod page;
mod series;

use std::path::PathBuf;

use anello_configs::{RunConfig, Schedule};
use anello_store::events::{self, Record};
use anello_store::metrics::{self, StepRecord};
use anello_store::{ENVIRONMENT, Environment, Store, checkpoint, read_config};

use crate::failure::{Exit, Failure, Outcome};
use crate::place::open_run;
use crate::screen::Screen;
use crate::text::{bytes, grouped};

/// Arguments of `anello report`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder of the run.
    run: String,
    /// The page to write (default: report.html in the folder of the run).
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// All that a report tells of.
#[derive(Debug)]
struct Story {
    /// Where the run lives, for people.
    place: String,
    config: RunConfig,
    schedule: Schedule,
    records: Vec<StepRecord>,
    events: Vec<Record>,
    /// Steps of the checkpoints that exist.
    kept: Vec<u64>,
    /// Where it was first started; absent when that was never written down.
    environment: Option<Environment>,
}

impl Story {
    fn read(store: &Store) -> Result<Self, Failure> {
        let config = read_config(store)?;
        Ok(Self {
            place: store.place().to_owned(),
            schedule: Schedule::new(&config),
            config,
            records: metrics::read(store)?,
            events: events::read(store)?,
            kept: checkpoint::steps(store)?,
            environment: store.get(ENVIRONMENT)?.and_then(|text| serde_json::from_slice(&text).ok()),
        })
    }

    /// Tokens trained on after `step` steps.
    fn tokens_at(&self, step: u64) -> u64 {
        self.schedule.at(step).map_or(self.schedule.total_tokens(), |plan| plan.tokens_before)
    }
}

/// `anello report`
pub fn run(args: &Args, screen: &Screen) -> Outcome {
    let store = open_run(&args.run)?;
    let story = Story::read(&store)?;
    let path = match (&args.out, store.folder()) {
        (Some(path), _) => path.clone(),
        (None, Some(_)) => PathBuf::from(store.place_of("report.html")),
        (None, None) => {
            return Err(Failure::Usage(format!("{} is no folder; say where with --out FILE", store.place())));
        }
    };
    let text = page::render(&story);
    let failed = |source| Failure::File { action: "writing", path: path.clone(), source };
    std::fs::write(&path, &text).map_err(failed)?;
    let (steps, size) = (grouped(story.records.len() as u64), bytes(text.len() as u64));
    screen.line(&format!("{}: {steps} steps, {size}; open it in a browser", path.display()))?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests;

//! `anello watch`.

use std::time::{Duration, Instant};

use anello_proto::jobs::Phase;

use super::client::Client;
use super::{JobArgs, show};
use crate::failure::{Exit, Failure, Outcome};
use crate::screen::Screen;

/// Time between two lines of a job that changes nothing but its step.
const LINE_EVERY: Duration = Duration::from_secs(3);

/// `anello watch`: on a terminal a board that is drawn anew, else a line for what happens and one now and then.
pub fn watch(args: &JobArgs, screen: &Screen) -> Outcome {
    let mut client = Client::connect(&args.at)?;
    let mut details = client.watch(args.request())?;
    let board = screen.is_live().then(|| screen.add(1, "{msg}"));
    let mut told: Option<(Instant, Phase)> = None;
    let mut record = None;
    let mut last = None;
    while let Some(detail) = client.next(&mut details)? {
        let phase = show::phase(&detail)?;
        match &board {
            Some(board) => board.set_message(show::board(&detail)?),
            None => {
                let known = record;
                for event in detail.events.iter().filter(|event| known < Some(event.number)) {
                    screen.line(&show::record(event))?;
                    record = Some(event.number);
                }
                if told.is_none_or(|(at, before)| before != phase || at.elapsed() >= LINE_EVERY) {
                    told = Some((Instant::now(), phase));
                    screen.line(&show::line(&detail)?)?;
                }
            }
        }
        last = Some(detail);
    }
    screen.clear()?;
    let Some(detail) = last else {
        return Err(Failure::Unreachable("the coordinator tells nothing".to_owned()));
    };
    if board.is_some() {
        screen.print(&show::board(&detail)?)?;
    }
    match show::phase(&detail)? {
        Phase::Completed | Phase::Cancelled => Ok(Exit::Done),
        Phase::Failed => Ok(Exit::No),
        // Its coordinator went on its way.
        _ => Err(Failure::Unreachable(format!(
            "the coordinator ends; `anello watch {}` goes on when there is another",
            args.job
        ))),
    }
}

//! `anello watch` and `anello top`: a job that is looked at while it goes on.

use std::time::{Duration, Instant};

use anello_proto::jobs::Phase;
use anello_proto::v1;

use super::client::Client;
use super::{JobArgs, show};
use crate::failure::{Exit, Failure, Outcome};
use crate::screen::Screen;

/// Time between two lines of a job that changes nothing but its step.
const LINE_EVERY: Duration = Duration::from_secs(3);

/// `anello watch`: on a terminal a board that is drawn anew, else a line for what happens and one now and then.
pub fn watch(args: &JobArgs, screen: &Screen) -> Outcome {
    if screen.is_live() {
        return live(args, screen, show::board);
    }
    let mut told: Option<(Instant, Phase)> = None;
    let mut record = None;
    follow(args, screen, |detail| {
        let phase = show::phase(detail)?;
        let known = record;
        for event in detail.events.iter().filter(|event| known < Some(event.number)) {
            screen.line(&show::record(event))?;
            record = Some(event.number);
        }
        if told.is_none_or(|(at, before)| before != phase || at.elapsed() >= LINE_EVERY) {
            told = Some((Instant::now(), phase));
            screen.line(&show::line(detail)?)?;
        }
        Ok(())
    })
    .map(|(exit, _)| exit)
}

/// `anello top`: on a terminal a table that is drawn anew, else the table as it is now.
pub fn top(args: &JobArgs, screen: &Screen) -> Outcome {
    if screen.is_live() {
        return live(args, screen, show::top);
    }
    let detail = Client::connect(&args.at)?.describe(args.request())?;
    screen.print(&show::top(&detail)?)?;
    Ok(Exit::Done)
}

/// Draws a job anew at every change, and leaves the last picture behind.
fn live(args: &JobArgs, screen: &Screen, draw: fn(&v1::JobDetail) -> Result<String, Failure>) -> Outcome {
    let board = screen.add(1, "{msg}");
    let (exit, last) = follow(args, screen, |detail| {
        board.set_message(draw(detail)?);
        Ok(())
    })?;
    screen.print(&draw(&last)?)?;
    Ok(exit)
}

/// Shows every change of a job until it is over; returns what was seen last.
fn follow(
    args: &JobArgs,
    screen: &Screen,
    mut show: impl FnMut(&v1::JobDetail) -> Result<(), Failure>,
) -> Result<(Exit, v1::JobDetail), Failure> {
    let mut client = Client::connect(&args.at)?;
    let mut details = client.watch(args.request())?;
    let mut last = None;
    while let Some(detail) = client.next(&mut details)? {
        show(&detail)?;
        last = Some(detail);
    }
    screen.clear()?;
    let Some(detail) = last else {
        return Err(Failure::Unreachable("the coordinator tells nothing".to_owned()));
    };
    match show::phase(&detail)? {
        Phase::Completed | Phase::Cancelled => Ok((Exit::Done, detail)),
        Phase::Failed => Ok((Exit::No, detail)),
        // Its coordinator went on its way.
        _ => Err(Failure::Unreachable(format!(
            "the coordinator ends; `anello watch {}` goes on when there is another",
            args.job
        ))),
    }
}

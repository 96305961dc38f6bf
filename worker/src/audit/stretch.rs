//! The steps from one checkpoint of a run to a later one, computed again and compared with the record.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;

use anello_dataloader::Error as DataError;
use anello_store::events::Event;
use anello_store::words::describe;
use tch::Device;

use super::findings::{Compared, Contradiction, Subject};
use crate::bisect::Difference;
use crate::bisect::recorded::Recorded;
use crate::bisect::side::{Side, Start, Stepped};
use crate::error::{Error, Result, with_causes};

/// What a stretch came to.
#[derive(Debug, Default)]
pub(super) struct Stretch {
    pub compared: Compared,
    /// Why it ended before its end.
    pub found: Option<Found>,
    pub notes: Vec<String>,
}

/// Why a stretch ends early.
#[derive(Debug)]
pub(super) enum Found {
    /// A step does not come out as it is on record.
    Difference(Box<Difference>),
    /// The data is not what was trained on, or the log tells otherwise of a step.
    Contradiction(Contradiction),
    /// It cannot be computed here, or an earlier stretch has ended.
    Stopped(String),
}

/// Computes, on `device`, the steps of `run` from `start` on until `end` are applied, or to `limit` if another thread lowers it, and
/// tells of each. Errors are those that no other run would be spared: no thread, no memory.
pub(super) fn compute(
    run: &Recorded,
    (start, end): (Start, u64),
    device: Device,
    limit: &AtomicU64,
    tell: &Sender<()>,
) -> Result<Stretch> {
    let mut stretch = Stretch::default();
    let mut side = match Side::open(run, start, device, None, &mut stretch.notes) {
        Ok(side) => side,
        Err(cause) => {
            stretch.found = Some(stopped(cause, start.step)?);
            return Ok(stretch);
        }
    };
    for step in start.step..end {
        if limit.load(Ordering::Relaxed) < start.step {
            stretch.found =
                Some(Found::Stopped(format!("the steps from {step} on: an earlier one is wrong")));
            break;
        }
        let Stepped { record, skipped, told } = match side.step(step) {
            Ok(stepped) => stepped,
            Err(cause) => {
                stretch.found = Some(stopped(cause, step)?);
                break;
            }
        };
        let Compared { steps, figures, digests, checkpoints } = &mut stretch.compared;
        *steps += 1;
        if let Some(logged) = run.records.get(&step) {
            *figures += 1;
            *digests += u64::from(logged.weights.is_some());
        }
        checkpoints.extend(run.manifests.get(&(step + 1)).map(|manifest| manifest.step));
        let left_out = skipped.into_iter().find(|(lane, group)| {
            !run.events.iter().any(|event| {
                matches!(event, Event::SkippedData { step: at, lane: of, source, row_group, .. }
                    if (*at, *of, source, *row_group) == (step, *lane, &group.source, group.row_group))
            })
        });
        stretch.found = match (left_out, side.off_record(&record)) {
            (Some((lane, group)), _) => Some(Found::Contradiction(Contradiction {
                subject: Subject::Data,
                step: Some(step),
                fact: format!(
                    "row group {} of source {}, which lane {lane} was trained on at step {step}, cannot be read: {}",
                    group.row_group, group.source, group.reason
                ),
            })),
            (None, Some(difference)) => Some(Found::Difference(Box::new(difference))),
            (None, None) => off_log(run, step, told.as_ref()).map(Found::Contradiction),
        };
        let _ = tell.send(());
        if stretch.found.is_some() {
            break;
        }
    }
    Ok(stretch)
}

/// Where the log tells otherwise of how `step` came out than `told`: of spikes, of what they led back to, of steps that were not applied.
/// The log of a step whose figures are on record is whole, since it is told of first.
fn off_log(run: &Recorded, step: u64, told: Option<&Event>) -> Option<Contradiction> {
    let of_step = |event: &&Event| match event {
        Event::Spike { step: at, .. } | Event::Skipped { step: at, .. } => *at == step,
        _ => false,
    };
    let logged: Vec<&Event> = run.events.iter().filter(of_step).collect();
    let fact = match (told, &logged[..]) {
        (Some(told), logged) if logged.contains(&told) || !run.records.contains_key(&step) => return None,
        (Some(told), []) => format!("the log does not tell \"{}\", which it comes to", describe(told)),
        (Some(told), [.., last]) => {
            format!("the log tells \"{}\", where it comes to \"{}\"", describe(last), describe(told))
        }
        // A step that was trained again with another config may have come out otherwise before.
        (None, [.., last]) if run.epochs.len() == 1 => {
            format!("the log tells \"{}\", which it does not come to", describe(last))
        }
        (None, _) => return None,
    };
    Some(Contradiction { subject: Subject::Log, step: Some(step), fact: format!("at step {step}: {fact}") })
}

/// What an error at `step` says of the run; an error that says nothing of it is handed on.
fn stopped(cause: Error, step: u64) -> Result<Found> {
    match cause {
        // A store that cannot be reached is no word on the data.
        Error::Data(DataError::Store(_) | DataError::File { .. })
        | Error::Store(_)
        | Error::Config { .. } => {
            Ok(Found::Stopped(format!("the steps from {step} on: {}", with_causes(&cause))))
        }
        Error::Data(cause) => Ok(Found::Contradiction(Contradiction {
            subject: Subject::Data,
            step: Some(step),
            fact: format!("at step {step}: {cause}"),
        })),
        other => Err(other),
    }
}

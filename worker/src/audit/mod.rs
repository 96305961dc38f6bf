//! Is a run what its record says? The record against itself, then its steps computed again and compared with it.
//!
//! ```text
//! record     config, data, checkpoints, log and metrics against one another: nothing is computed
//! stretch    the steps from one checkpoint to a later one, computed again
//! findings   what was found, as plain values
//! ```
//! Several stretches are computed at once, each from a checkpoint of the run. That proves the whole: the state that a
//! stretch begins from is what the one before must end with, down to every block of weights and moments and every cursor.

mod findings;
mod record;
mod stretch;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};

use anello_configs::ComputeDevice;
use anello_store::Store;

use crate::bisect::recorded::Recorded;
use crate::bisect::side::Start;
use crate::device;
use crate::environment;
use crate::error::{Error, Result};

pub use findings::{Compared, Contradiction, Findings, Subject, Verdict};
use stretch::{Found, Stretch};

/// What is audited, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The first step, and the one after the last; absent: all that were logged.
    pub steps: Option<(u64, u64)>,
    /// Stretches between checkpoints that are computed at the same time, each with a state of its own; 0 counts as 1.
    pub workers: u32,
    /// CPU threads of LibTorch for each of them; absent: all cores, shared out evenly. No bit depends on it.
    pub threads: Option<u32>,
    /// What it is computed on; absent: what the run's config says.
    pub device: Option<ComputeDevice>,
    /// Where data lies now, by the name of its source or held-out set, if not where the run's config says.
    pub data: Vec<(String, String)>,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Checkpoints that were read and checked.
    Reading {
        /// So many.
        done: u64,
        /// Of so many.
        checkpoints: u64,
    },
    /// Steps that were computed again.
    Computing {
        /// So many.
        done: u64,
        /// Of so many at most.
        steps: u64,
    },
}

/// Audits the run in `store`, which may be going on. Nothing in its folder is changed.
///
/// Errors: a folder without a run, steps that were not logged, a device that cannot be had, a store that does not answer, `data` that is not
/// the run's. What is damaged in the
/// folder or in the data, and that the steps cannot be computed here, is among the findings.
pub fn audit(store: &Store, options: &Options, progress: &mut dyn FnMut(Progress)) -> Result<Findings> {
    let mut run = Recorded::read(store)?;
    options.data.iter().try_for_each(|(name, url)| run.move_data(name, url))?;
    let (first, end) = asked(&run, options.steps)?;
    let computes = Computes { device: options.device.unwrap_or(run.device()), threads: options.threads };
    let device = device::open(computes.device)?;
    let record::Read { contradictions, sound, lost, mut unchecked, notes } =
        record::read(&run, first..end, &mut |done, checkpoints| {
            progress(Progress::Reading { done, checkpoints });
        })?;
    let mut spans = Vec::new();
    for span in between(first..end, &lost) {
        let start = begin(&sound, &span, &mut unchecked);
        spans.extend(start.map(|start| (start, span.steps.end)));
    }
    let start = spans.first().map_or(Start { step: first, checkpoint: false }, |(start, _)| *start);
    let steps = spans.iter().map(|(start, end)| end - start.step).sum::<u64>();
    let here = environment::of(device, options.threads);
    let mut findings = Findings {
        verdict: Verdict::Incomplete,
        run: run.told(),
        asked: [first, end],
        from: start.step,
        checkpoint: start.checkpoint,
        compared: Compared::default(),
        contradictions,
        difference: None,
        unchecked: [run.unread.clone(), unchecked].concat(),
        here: (here.device.clone(), here.build()),
        // That the config was changed is among the contradictions.
        notes,
    };
    let mut done = 0;
    for (start, end) in spans {
        let inner = sound.range(start.step + 1..end).copied().collect::<Vec<u64>>();
        let starts = cut(start, &inner, end, u64::from(options.workers.max(1)));
        let stretches = compute(&run, &starts, end, computes, &mut |more| {
            progress(Progress::Computing { done: done + more, steps });
        })?;
        // What follows the first that does not come out is known of no state that is right.
        if !take_in(&mut findings, stretches) {
            break;
        }
        done += end - start.step;
    }
    findings.notes.dedup();
    let refuted = findings.difference.is_some() || !findings.contradictions.is_empty();
    let all = findings.compared.figures == steps && findings.unchecked.is_empty();
    findings.verdict = match (refuted, all) {
        (true, _) => Verdict::Refuted,
        (false, true) => Verdict::Confirmed,
        (false, false) => Verdict::Incomplete,
    };
    Ok(findings)
}

/// Takes in what stretches came to, in their order, up to the first that does not come out; whether all do.
fn take_in(findings: &mut Findings, stretches: Vec<Stretch>) -> bool {
    for Stretch { compared, found, notes } in stretches {
        findings.compared.add(compared);
        findings.notes.extend(notes);
        match found {
            None => continue,
            Some(Found::Difference(difference)) => findings.difference = Some(*difference),
            // Data that cannot even be opened was told of already.
            Some(Found::Contradiction(contradiction)) => {
                let told = |known: &Contradiction| contradiction.fact.ends_with(&known.fact);
                if !findings.contradictions.iter().any(told) {
                    findings.contradictions.push(contradiction);
                }
            }
            Some(Found::Stopped(reason)) => findings.unchecked.push(reason),
        }
        return false;
    }
    true
}

/// The steps that are to be audited.
fn asked(run: &Recorded, steps: Option<(u64, u64)>) -> Result<(u64, u64)> {
    let place = run.store.place();
    let Some(last) = run.records.keys().next_back() else {
        let fact = format!("{place} has logged no step yet");
        return Err(Error::config(fact, "let it train until its first checkpoint, then audit it"));
    };
    match steps {
        None => Ok((0, last + 1)),
        Some((first, end)) if first >= end => Err(Error::config(
            format!("steps {first}..{end} are none"),
            "give the first step and the one after the last",
        )),
        Some((_, end)) if end > last + 1 => {
            let fact = format!("{place} has logged the steps up to {last}, not {}", end - 1);
            Err(Error::config(fact, format!("give steps up to {}", last + 1)))
        }
        Some(steps) => Ok(steps),
    }
}

/// What computes.
#[derive(Clone, Copy)]
struct Computes {
    device: ComputeDevice,
    threads: Option<u32>,
}

/// Steps that were asked for, between those whose data is lost.
#[derive(Debug, PartialEq, Eq)]
struct Span {
    steps: Range<u64>,
    /// No state before this one leads to them.
    floor: u64,
}

/// What of `asked` is not `lost`, which rises.
fn between(asked: Range<u64>, lost: &[Range<u64>]) -> Vec<Span> {
    let (mut spans, mut floor) = (Vec::new(), 0);
    for lost in lost.iter().cloned().chain(std::iter::once(u64::MAX..u64::MAX)) {
        let steps = asked.start.max(floor)..asked.end.min(lost.start);
        if !steps.is_empty() {
            spans.push(Span { steps, floor });
        }
        floor = lost.end;
    }
    spans
}

/// The state to begin from, for the steps of a span, of the `sound` checkpoints; absent when there is none. Steps before it go
/// into `unchecked`.
fn begin(sound: &BTreeSet<u64>, Span { steps, floor }: &Span, unchecked: &mut Vec<String>) -> Option<Start> {
    let checkpoint = |step: &u64| Start { step: *step, checkpoint: true };
    let before = sound.range(floor..=&steps.start).next_back().map(checkpoint);
    if before.is_some() || *floor == 0 {
        return Some(before.unwrap_or(Start { step: 0, checkpoint: false }));
    }
    let after = sound.range(steps.start..steps.end).next().map(checkpoint);
    let end = after.map_or(steps.end, |start| start.step);
    unchecked.push(format!(
        "the steps {} to {}: there is no checkpoint to begin from since the data was replaced after {floor} steps",
        steps.start,
        end - 1
    ));
    after
}

/// Where `workers` stretches of about the same number of steps begin, the first at `start`, the others at checkpoints
/// among `inner`, and the last ends at `end`.
fn cut(start: Start, inner: &[u64], end: u64, workers: u64) -> Vec<Start> {
    let mut starts = vec![start];
    for at in 1..workers {
        let aim = start.step + (end - start.step) * at / workers;
        let last = starts[starts.len() - 1].step;
        let nearest = inner.iter().filter(|step| **step > last).min_by_key(|step| step.abs_diff(aim));
        starts.extend(nearest.map(|&step| Start { step, checkpoint: true }));
    }
    starts
}

/// Computes all stretches at once, in the order of `starts`. `progress` hears how many steps are done.
fn compute(
    run: &Recorded,
    starts: &[Start],
    end: u64,
    computes: Computes,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<Stretch>> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = computes.threads.map_or((cores / starts.len()).max(1) as i32, |threads| threads as i32);
    let ends = starts[1..].iter().map(|start| start.step).chain([end]);
    // No step after the first that does not come out is worth computing.
    let limit = AtomicU64::new(end);
    let (tell, told) = channel();
    std::thread::scope(|scope| {
        let handles: Vec<_> = starts
            .iter()
            .zip(ends)
            .map(|(&start, end)| {
                let (tell, limit) = (tell.clone(), &limit);
                let computes = move || {
                    tch::set_num_threads(threads);
                    // A thread computes on the GPU that it was made ready for.
                    let device = device::open(computes.device)?;
                    let stretch = stretch::compute(run, (start, end), device, limit, &tell);
                    if !stretch.as_ref().is_ok_and(|stretch| stretch.found.is_none()) {
                        limit.fetch_min(start.step, Ordering::Relaxed);
                    }
                    stretch
                };
                std::thread::Builder::new()
                    .name(format!("audit-{}", start.step))
                    .spawn_scoped(scope, computes)
                    .map_err(|source| Error::System { action: "starting a thread", source })
            })
            .collect();
        drop(tell);
        count(&told, progress);
        let joined = handles.into_iter().map(|handle| match handle?.join() {
            Ok(stretch) => stretch,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        joined.collect()
    })
}

fn count(told: &Receiver<()>, progress: &mut dyn FnMut(u64)) {
    progress(0);
    for (done, ()) in (1..).zip(told) {
        progress(done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(inner: &[u64], end: u64, workers: u64) -> Vec<u64> {
        let start = Start { step: 4, checkpoint: true };
        cut(start, inner, end, workers).into_iter().map(|start| start.step).collect()
    }

    #[test]
    fn stretches_begin_at_checkpoints_about_evenly() {
        let all: Vec<u64> = (5..20).collect();
        assert_eq!(steps(&all, 20, 1), [4]);
        assert_eq!(steps(&all, 20, 2), [4, 12]);
        assert_eq!(steps(&all, 20, 4), [4, 8, 12, 16]);
        assert_eq!(steps(&[6, 18], 20, 2), [4, 6]);
        assert_eq!(steps(&[6, 18], 20, 9), [4, 6, 18]);
        assert_eq!(steps(&[], 20, 9), [4]);
    }

    #[test]
    fn steps_whose_data_is_lost_are_left_out_and_none_begins_before_them() {
        let spans = |asked: Range<u64>, lost: &[(u64, u64)]| -> Vec<(u64, u64, u64)> {
            let lost: Vec<Range<u64>> = lost.iter().map(|(first, end)| *first..*end).collect();
            let spans = between(asked, &lost).into_iter();
            spans.map(|Span { steps, floor }| (floor, steps.start, steps.end)).collect()
        };
        assert_eq!(spans(3..9, &[]), [(0, 3, 9)]);
        assert_eq!(spans(0..30, &[(0, 10)]), [(10, 10, 30)]);
        assert_eq!(spans(0..30, &[(10, 20)]), [(0, 0, 10), (20, 20, 30)]);
        assert_eq!(spans(12..18, &[(10, 20)]), []);
        assert_eq!(spans(12..25, &[(10, 20), (22, u64::MAX)]), [(20, 20, 22)]);

        let begun = |sound: &[u64], floor, steps: Range<u64>| {
            let mut unchecked = Vec::new();
            let sound = sound.iter().copied().collect();
            let start = begin(&sound, &Span { steps, floor }, &mut unchecked);
            (start.map(|start| (start.step, start.checkpoint)), unchecked.len())
        };
        assert_eq!(begun(&[4, 8], 0, 6..9), (Some((4, true)), 0));
        assert_eq!(begun(&[], 0, 6..9), (Some((0, false)), 0));
        assert_eq!(begun(&[4, 8], 6, 6..9), (Some((8, true)), 1), "4 is of other data");
        assert_eq!(begun(&[4, 6, 8], 6, 7..9), (Some((6, true)), 0));
        assert_eq!(begun(&[4], 6, 7..9), (None, 1));
    }
}

//! Why are two runs not the same? Their records side by side, then both computed again to the first difference.
//!
//! ```text
//! recorded   a run folder: config (and what was changed on the way), figures, manifests, where it was trained
//! side       one run, computed again step by step from its record
//! compare    two of these: keys, figures, blocks of checkpoints             findings   what was found, as plain values
//! replay     both sides from the last state that is equal in both: batch, losses, gradient by lane, sum, norm, update
//! ```
//! Where both computations agree and a record says otherwise, the machine that made the record computed wrongly, or is
//! of another kind: the same config, data and seed have one and only one result.

mod compare;
mod findings;
pub(crate) mod recorded;
mod replay;
pub(crate) mod side;

use anello_configs::ComputeDevice;
use anello_store::Store;

pub use findings::*;
use recorded::Recorded;
use side::Start;

use crate::device;
use crate::error::{Error, Result};

/// What a bisection may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Only read what is there; compute nothing again.
    pub read_only: bool,
    /// What is computed on; absent: what the config of the first run says.
    pub device: Option<ComputeDevice>,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The run folders are being read.
    Reading,
    /// Both are computed again: `done` of at most `steps` steps.
    Replaying {
        /// Steps that were computed.
        done: u64,
        /// As many as it takes at most.
        steps: u64,
    },
}

/// Finds the first difference between the runs in `a` and `b`, which may be going on. Nothing in their folders is changed.
///
/// Errors: a folder without a run, a device that was asked for and cannot be had, a store that does not answer. What is damaged
/// in a folder, and that a run cannot be computed again, is among the findings.
pub fn bisect(
    a: &Store,
    b: &Store,
    options: Options,
    progress: &mut dyn FnMut(Progress),
) -> Result<Findings> {
    if let Some(device) = options.device.filter(|_| !options.read_only) {
        device::open(device)?;
    }
    progress(Progress::Reading);
    let (a, b) = (Recorded::read(a)?, Recorded::read(b)?);
    let changes = [a.data_changes(), b.data_changes()];
    let mut notes: Vec<String> = [&a.unread, &b.unread, &a.notes, &b.notes, &changes[0], &changes[1]]
        .into_iter()
        .flatten()
        .cloned()
        .collect();
    let config = compare::configs(&a, &b);
    let configs_part_at = compare::configs_part_at(&a, &b, &config);
    let data = compare::data(&a, &b);
    let records = compare::records(&a, &b);
    let replay = match records.first() {
        None => Replay::NotNeeded,
        Some(_) if options.read_only => Replay::NotWanted,
        Some(first) => {
            let (starts, until) = (starts_of(&records, first), first.step + 1);
            let mut told =
                |from: u64, to: u64| progress(Progress::Replaying { done: to - from, steps: until - from });
            let device = options.device.unwrap_or(a.device());
            match replay::replay((&a, &b), device, &starts, until, &mut notes, &mut told) {
                Ok(replayed) => Replay::Done(Box::new(replayed)),
                // What a run needs beside its folder may be gone: what is on record stands.
                Err(
                    cause @ (Error::Config { .. } | Error::Device { .. } | Error::Store(_) | Error::Data(_)),
                ) => Replay::Impossible { reason: crate::error::with_causes(&cause) },
                Err(other) => return Err(other),
            }
        }
    };
    let unread = !a.unread.is_empty() || !b.unread.is_empty();
    let verdict = verdict(&replay, &records, !config.is_empty() || !data.is_empty(), unread);
    let (a, b) = (a.told(), b.told());
    Ok(Findings { verdict, a, b, config, configs_part_at, data, records, replay, notes })
}

/// The states that both are known to have had before `first`, the latest first, the seeds last.
fn starts_of(records: &Records, first: &Difference) -> Vec<Start> {
    let before = records.equal_checkpoints.iter().rev().filter(|step| **step <= first.step);
    let checkpoints = before.map(|&step| Start { step, checkpoint: true });
    checkpoints.chain([Start { step: 0, checkpoint: false }]).collect()
}

fn verdict(replay: &Replay, records: &Records, other_inputs: bool, unread: bool) -> Verdict {
    let replayed = match replay {
        Replay::NotNeeded if other_inputs => return Verdict::EqualSoFar,
        Replay::NotNeeded if unread => return Verdict::Unknown,
        Replay::NotNeeded if records.steps == 0 && records.equal_checkpoints.is_empty() => {
            return Verdict::NothingToCompare;
        }
        Replay::NotNeeded => return Verdict::Equal,
        Replay::NotWanted | Replay::Impossible { .. } => return Verdict::Recorded,
        Replay::Done(replayed) => replayed,
    };
    match &replayed.off_record {
        _ if replayed.differs.is_some() => Verdict::Inputs,
        // Before the records part they agree with one another, and neither is what this machine computes.
        [Some(_), Some(_)] if records.part_at().is_some_and(|step| replayed.to <= step) => Verdict::Elsewhere,
        [Some(_), Some(_)] => Verdict::OffRecordBoth,
        [Some(_), None] => Verdict::OffRecordA,
        [None, Some(_)] => Verdict::OffRecordB,
        [None, None] => Verdict::Recorded,
    }
}

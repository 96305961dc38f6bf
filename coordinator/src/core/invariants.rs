//! What must always be true of a ring, as far as anyone can see it who reads its log and rows: one predicate each, by name. The same
//! functions check the simulator's histories and, in production, count what a job tells (`telemetry`). What only the simulator sees,
//! since it looks into all processes at once, is in `simulation::invariants`.

use std::collections::BTreeSet;
use std::ops::Range;

/// **Every step is applied with one global batch**: the lanes of a generation's members are all lanes, each once.
pub fn lanes_are_covered_once<W: Ord>(
    members: impl IntoIterator<Item = (W, Range<u32>)>,
    lanes: u32,
) -> Result<(), String> {
    let (mut next, mut names) = (0, BTreeSet::new());
    for (worker, served) in members {
        if served.start != next || served.end < next {
            return Err(format!("lanes {served:?} follow lane {next}"));
        }
        next = served.end;
        if !names.insert(worker) {
            return Err("a worker is in the generation twice".to_owned());
        }
    }
    match next == lanes {
        true => Ok(()),
        false => Err(format!("{next} of {lanes} lanes are served")),
    }
}

/// **Generations rise**: in the log each is later than the one before.
pub fn generations_rise(before: Option<u64>, formed: u64) -> Result<(), String> {
    match before.is_none_or(|before| before < formed) {
        true => Ok(()),
        false => Err(format!("generation {formed} follows generation {}", before.unwrap_or_default())),
    }
}

/// **A checkpoint never stands after steps that nobody has told of**: `told` is the newest step that was, as steps done.
pub fn checkpoint_after_its_steps(told: Option<u64>, checkpoint: u64) -> Result<(), String> {
    match told.filter(|told| checkpoint > *told) {
        None => Ok(()),
        Some(told) => Err(format!("checkpoint {checkpoint} stands, and {told} steps are told of")),
    }
}

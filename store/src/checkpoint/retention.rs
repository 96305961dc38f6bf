//! Which checkpoints may go, and what is left of those that did.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use anello_configs::Checkpoint;

use super::catalog::{manifest_path, set_aside_path};
use super::{delete, read_manifest, steps};
use crate::{Result, Store};

/// Steps of the checkpoints that `policy` no longer keeps. `kept` are all that exist, rising: (step, whether it is
/// the end of a stage). The newest `keep_last` stay, and at least two whatever the policy says.
pub fn superseded(policy: &Checkpoint, kept: &[(u64, bool)]) -> Vec<u64> {
    let newest = kept.len().saturating_sub(policy.keep_last.max(2) as usize);
    let stays = |step: u64, stage_end: bool| {
        (policy.keep_stage_ends && stage_end)
            || policy.keep_every_steps.is_some_and(|every| every > 0 && step.is_multiple_of(every))
    };
    kept[..newest].iter().filter(|&&(step, end)| !stays(step, end)).map(|&(step, _)| step).collect()
}

/// Removes the checkpoints that `policy` no longer keeps, and the parts that are no checkpoint's. For the one writer of a
/// run, which has no checkpoint under way.
pub fn prune(store: &Store, policy: &Checkpoint) -> Result<()> {
    let_go(store, policy)?.map_or(Ok(()), |newest| tidy(store, newest))
}

/// Removes the checkpoints that `policy` no longer keeps; returns the newest that is there. Parts without a manifest stay:
/// while several write, they may be those of a checkpoint that is not complete yet.
pub fn let_go(store: &Store, policy: &Checkpoint) -> Result<Option<u64>> {
    let mut kept = Vec::new();
    for step in steps(store)? {
        // One that cannot be read is left for `verify` to explain.
        if let Ok(manifest) = read_manifest(store, step) {
            kept.push((step, manifest.stage_end));
        }
    }
    superseded(policy, &kept).into_iter().try_for_each(|step| delete(store, step))?;
    Ok(kept.last().map(|&(newest, _)| newest))
}

/// Removes the parts that no checkpoint names, up to `newest`, the newest checkpoint: what was written by a process
/// that was killed before its manifest, and what was left when one was killed in [`delete`]. Parts of a checkpoint that
/// was set aside stay until it is written again.
pub fn tidy(store: &Store, newest: u64) -> Result<()> {
    let mut named: BTreeMap<u64, Option<Vec<String>>> = BTreeMap::new();
    for object in store.list("checkpoints")? {
        let rest = object.path.strip_prefix("checkpoints/");
        let Some((step, name)) = rest.and_then(|rest| rest.split_once('/')) else { continue };
        let Some(step) = step.parse::<u64>().ok().filter(|&step| step <= newest) else { continue };
        if !name.starts_with("part-") {
            continue;
        }
        if let Entry::Vacant(entry) = named.entry(step) {
            let whole = store.get(&manifest_path(step))?.is_some();
            let aside = store.get(&set_aside_path(step))?.is_some();
            entry.insert(match (whole, aside) {
                // One that cannot be read is left for `verify` to explain.
                (true, _) => read_manifest(store, step)
                    .ok()
                    .map(|manifest| manifest.parts.into_iter().map(|part| part.name).collect()),
                (false, true) => None,
                (false, false) => Some(Vec::new()),
            });
        }
        if named[&step].as_ref().is_some_and(|names| !names.iter().any(|other| other == name)) {
            store.delete(&object.path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_the_multiples_and_the_stage_ends_stay() {
        let policy = Checkpoint {
            every_steps: 10,
            keep_last: 2,
            keep_every_steps: Some(40),
            keep_stage_ends: true,
            part_bytes: 1,
        };
        let all: Vec<(u64, bool)> = (1..=9).map(|i| (i * 10, i == 3)).collect();
        assert_eq!(superseded(&policy, &all), [10, 20, 50, 60, 70]);
        assert_eq!(superseded(&Checkpoint { keep_last: 0, ..policy.clone() }, &all), [10, 20, 50, 60, 70]);
        let bare = Checkpoint { keep_every_steps: None, keep_stage_ends: false, keep_last: 3, ..policy };
        assert_eq!(superseded(&bare, &all), [10, 20, 30, 40, 50, 60]);
        assert_eq!(superseded(&bare, &all[..2]), [0u64; 0]);
    }
}

//! Which checkpoints may go, and what is left of those that did.

use std::collections::BTreeSet;

use anello_configs::{Checkpoint, RunConfig};

use super::catalog::{manifest_path, set_aside_path};
use super::{read_manifest, steps};
use crate::{Error, Object, Result, Store};

/// Which checkpoints of a run stay.
#[derive(Clone, Debug, PartialEq)]
pub struct Retention {
    /// What the config says of them.
    pub policy: Checkpoint,
    /// Steps that the run may go back from wherever it stands, and needs a checkpoint for that is as old.
    pub reach: u64,
}

impl Retention {
    /// That of a run of `config`.
    pub fn of(config: &RunConfig) -> Self {
        Self { policy: config.checkpoint.clone(), reach: config.guard.reach() }
    }
}

/// Steps of the checkpoints that `retention` no longer keeps. `kept` are all that exist, rising: (step, whether it is
/// the end of a stage). The newest `keep_last` stay, and at least two whatever the policy says; with a reach, also all from
/// the newest that is `reach` steps older than the last one.
pub fn superseded(retention: &Retention, kept: &[(u64, bool)]) -> Vec<u64> {
    let Retention { policy, reach } = retention;
    let newest = kept.len().saturating_sub(policy.keep_last.max(2) as usize);
    let oldest_reached = kept.last().map_or(0, |(last, _)| last.saturating_sub(*reach));
    let reached = kept.partition_point(|(step, _)| *step <= oldest_reached).saturating_sub(1);
    let newest = newest.min(reached);
    let stays = |step: u64, stage_end: bool| {
        (policy.keep_stage_ends && stage_end)
            || policy.keep_every_steps.is_some_and(|every| every > 0 && step.is_multiple_of(every))
    };
    kept[..newest].iter().filter(|&&(step, end)| !stays(step, end)).map(|&(step, _)| step).collect()
}

/// What is to be removed, and what stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruning {
    /// Steps of the checkpoints that go, rising.
    pub gone: Vec<u64>,
    /// Steps of those that stay, and can be read.
    pub kept: Vec<u64>,
    /// What is deleted, in this order: first the manifests of those that go, then the parts that nobody names any more.
    pub objects: Vec<Object>,
}

impl Pruning {
    /// Bytes that it frees.
    pub fn bytes(&self) -> u64 {
        self.objects.iter().map(|object| object.bytes).sum()
    }

    /// Does it. Whenever it is cut short, every checkpoint that is there is whole, and the next one removes the rest.
    pub fn carry_out(&self, store: &Store) -> Result<()> {
        self.objects.iter().try_for_each(|object| store.delete(&object.path))
    }
}

/// A checkpoint that is there.
struct Known {
    step: u64,
    /// Whether it ends a stage, and the paths of all parts that it names; absent when its manifest is damaged.
    says: Option<(bool, Vec<String>)>,
}

/// Every checkpoint that is there. An error of the store is one here: whatever is not read may name a part that seems to be
/// nobody's. So is a manifest of a newer build.
fn survey(store: &Store) -> Result<Vec<Known>> {
    let known = steps(store)?.into_iter().map(|step| match read_manifest(store, step) {
        Ok(manifest) => {
            let parts = manifest.parts.iter().map(|part| part.path(step)).collect();
            Ok(Known { step, says: Some((manifest.stage_end, parts)) })
        }
        // One that is damaged is left for `verify` to explain. One that is listed and not there may be there soon.
        Err(Error::Checkpoint { .. }) if store.size(&manifest_path(step))?.is_some() => {
            Ok(Known { step, says: None })
        }
        Err(other) => Err(other),
    });
    known.collect()
}

/// What goes when the checkpoints do that `gone` picks of those that can be read (step, and whether it ends a stage; rising).
/// With `leftovers` parts go too that no checkpoint names, up to the checkpoint that it picks: what was written by a process
/// that was killed before its manifest, and what was left when one was killed while it removed some. Parts of a checkpoint that
/// is damaged or was set aside stay until it is written again.
pub fn plan_pruning(
    store: &Store,
    gone: impl FnOnce(&[(u64, bool)]) -> Vec<u64>,
    leftovers: impl FnOnce(&[u64]) -> Option<u64>,
) -> Result<Pruning> {
    let known = survey(store)?;
    let readable: Vec<(u64, bool)> =
        known.iter().filter_map(|known| Some((known.step, known.says.as_ref()?.0))).collect();
    let gone = gone(&readable);
    let kept: Vec<u64> = readable.iter().map(|(step, _)| *step).filter(|step| !gone.contains(step)).collect();
    let leftovers = leftovers(&kept);
    let staying = known.iter().filter(|known| !gone.contains(&known.step));
    let named: BTreeSet<&str> = staying
        .filter_map(|known| known.says.as_ref())
        .flat_map(|(_, parts)| parts)
        .map(String::as_str)
        .collect();

    let objects = store.list("checkpoints")?;
    let is_there = |path: String| objects.iter().any(|object| object.path == path);
    let to_look_at = |step: u64| match known.iter().find(|known| known.step == step) {
        Some(known) => known.says.is_none(),
        None => is_there(set_aside_path(step)),
    };
    let goes = |object: &&Object| {
        let rest = object.path.strip_prefix("checkpoints/");
        let Some((step, name)) = rest.and_then(|rest| rest.split_once('/')) else { return false };
        let Ok(step) = step.parse::<u64>() else { return false };
        let left = leftovers.is_some_and(|until| step <= until)
            && name.starts_with("part-")
            && !named.contains(object.path.as_str())
            && !to_look_at(step);
        left || (gone.contains(&step) && !named.contains(object.path.as_str()))
    };
    let mut objects: Vec<Object> = objects.iter().filter(goes).cloned().collect();
    // A part may be named by several that go: no manifest may outlive it.
    objects.sort_by_key(|object| !gone.iter().any(|step| manifest_path(*step) == object.path));
    Ok(Pruning { gone, kept, objects })
}

/// Removes the checkpoints that `retention` no longer keeps, and the parts that are no checkpoint's. For the one writer of a
/// run, which has no checkpoint under way.
pub fn prune(store: &Store, retention: &Retention) -> Result<()> {
    plan_pruning(store, |kept| superseded(retention, kept), |kept| kept.last().copied())?.carry_out(store)
}

/// Removes the checkpoints that `retention` no longer keeps. Parts without a manifest stay: while several write, they may be
/// those of a checkpoint that is not complete yet.
pub fn let_go(store: &Store, retention: &Retention) -> Result<()> {
    plan_pruning(store, |kept| superseded(retention, kept), |_| None)?.carry_out(store)
}

/// Removes the checkpoint after `step` steps.
pub fn delete(store: &Store, step: u64) -> Result<()> {
    plan_pruning(store, |_| vec![step], |_| None)?.carry_out(store)
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
        let gone = |policy: &Checkpoint, reach, kept: &[(u64, bool)]| {
            superseded(&Retention { policy: policy.clone(), reach }, kept)
        };
        assert_eq!(gone(&policy, 0, &all), [10, 20, 50, 60, 70]);
        assert_eq!(gone(&Checkpoint { keep_last: 0, ..policy.clone() }, 0, &all), [10, 20, 50, 60, 70]);
        let bare = Checkpoint { keep_every_steps: None, keep_stage_ends: false, keep_last: 3, ..policy };
        assert_eq!(gone(&bare, 0, &all), [10, 20, 30, 40, 50, 60]);
        assert_eq!(gone(&bare, 0, &all[..2]), [0u64; 0]);
        // One that is so many steps older than the last stays, and what is between, which is the one in time.
        assert_eq!(gone(&bare, 5, &all), [10, 20, 30, 40, 50, 60]);
        assert_eq!(gone(&bare, 30, &all), [10, 20, 30, 40, 50]);
        assert_eq!(gone(&bare, 31, &all), [10, 20, 30, 40]);
        assert_eq!(gone(&bare, 85, &all), [0u64; 0]);
        assert_eq!(gone(&bare, 900, &all), [0u64; 0]);
    }
}

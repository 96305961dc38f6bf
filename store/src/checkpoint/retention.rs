//! Which checkpoints may go, and what is left of those that did.

use std::collections::{BTreeMap, BTreeSet};

use anello_configs::{Checkpoint, RunConfig};

use super::catalog::{manifest_path, set_aside_path};
use super::manifest::damaged;
use super::{Part, read_manifest, read_part, steps};
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
    /// Steps of those that stay, and are whole as far as is known.
    pub kept: Vec<u64>,
    /// Those that were found damaged, rising by their step, and what is wrong: they stay, and stand for no other.
    pub flawed: Vec<(u64, String)>,
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
    /// Whether it ends a stage, and all parts that it names; absent when its manifest is damaged.
    says: Option<(bool, Vec<Part>)>,
    /// What is wrong with it.
    flaw: Option<String>,
}

impl Known {
    fn parts(&self) -> impl Iterator<Item = (&Part, String)> {
        let parts = self.says.iter().flat_map(|(_, parts)| parts);
        parts.map(|part| (part, part.path(self.step)))
    }
}

/// The step of an object of a checkpoint, and its name there.
fn split(path: &str) -> Option<(u64, &str)> {
    let (step, name) = path.strip_prefix("checkpoints/")?.split_once('/')?;
    Some((step.parse().ok()?, name))
}

/// Every checkpoint that is there, and all objects of checkpoints.
struct Survey {
    known: Vec<Known>,
    /// By path: bytes, and when it was written.
    objects: BTreeMap<String, (u64, i64)>,
}

impl Survey {
    /// An error of the store is one here: whatever is not read may name a part that seems to be nobody's. So is a manifest of a
    /// newer build.
    fn of(store: &Store) -> Result<Self> {
        let read = |step| match read_manifest(store, step) {
            Ok(manifest) => Ok(Known { step, says: Some((manifest.stage_end, manifest.parts)), flaw: None }),
            // One that is damaged is left for `verify` to explain. One that is listed and not there may be there soon.
            Err(flaw @ Error::Checkpoint { .. }) if store.size(&manifest_path(step))?.is_some() => {
                Ok(Known { step, says: None, flaw: Some(flaw.to_string()) })
            }
            Err(other) => Err(other),
        };
        let mut known: Vec<Known> = steps(store)?.into_iter().map(read).collect::<Result<_>>()?;
        let entries = store.entries("checkpoints")?.into_iter();
        let objects: BTreeMap<_, _> =
            entries.map(|(object, written)| (object.path, (object.bytes, written))).collect();
        // A listing may be late: parts are nobody's where there is no manifest, and not where none is listed.
        let newest = known.last().map_or(0, |known| known.step);
        let folders: BTreeSet<u64> = objects.keys().filter_map(|path| Some(split(path)?.0)).collect();
        for step in folders.into_iter().filter(|step| *step < newest) {
            if let Err(at) = known.binary_search_by_key(&step, |known| known.step)
                && store.size(&manifest_path(step))?.is_some()
            {
                known.insert(at, read(step)?);
            }
        }
        let mut survey = Self { known, objects };
        for at in 0..survey.known.len() {
            if let Some(flaw) = survey.missing(store, &survey.known[at])? {
                survey.known[at].flaw = Some(flaw);
            }
        }
        Ok(survey)
    }

    /// What is said of the first part that is not there, as large as it must be.
    fn missing(&self, store: &Store, known: &Known) -> Result<Option<String>> {
        for (part, path) in known.parts() {
            let listed = self.objects.get(&path).is_some_and(|(bytes, _)| *bytes == part.bytes);
            // A listing may be late.
            let there = if listed { Some(part.bytes) } else { store.size(&path)? };
            let wrong = match there {
                Some(bytes) if bytes == part.bytes => continue,
                Some(bytes) => format!("{path} has {bytes} bytes, not {}", part.bytes),
                None => format!("{path} is missing"),
            };
            return Ok(Some(damaged(known.step, wrong).to_string()));
        }
        Ok(None)
    }

    /// Those that count: step, and whether it ends a stage; rising.
    fn whole(&self) -> Vec<(u64, bool)> {
        let whole = self.known.iter().filter(|known| known.flaw.is_none());
        whole.filter_map(|known| Some((known.step, known.says.as_ref()?.0))).collect()
    }

    /// Whether the parts of the checkpoint after `step` steps are what they were when they were read back, before the manifest was
    /// written. What the store has not written since then, by its own clock, is; other parts are read. Where one is not, all
    /// checkpoints that name it are damaged from here on.
    fn prove(&mut self, store: &Store, step: u64) -> Result<bool> {
        let written = |path: &str| self.objects.get(path).map(|(_, written)| *written);
        // A part is older than the first manifest that names it.
        let named = |path: &str| {
            let names = |known: &&Known| known.parts().any(|(_, other)| other == path);
            self.known.iter().filter(names).filter_map(|known| written(&manifest_path(known.step))).min()
        };
        let is_touched =
            |path: &str| !matches!((written(path), named(path)), (Some(part), Some(named)) if part <= named);
        let known = self.known.iter().filter(|known| known.step == step);
        let touched: Vec<(Part, String)> = known
            .flat_map(Known::parts)
            .filter(|(_, path)| is_touched(path))
            .map(|(part, path)| (part.clone(), path))
            .collect();
        if touched.is_empty() {
            return Ok(true);
        }
        let manifest = read_manifest(store, step)?;
        for (part, path) in touched {
            match read_part(store, &manifest, &part, |_| String::new(), |_, _, _| ()) {
                Ok(()) => {}
                Err(Error::Checkpoint { fact, .. }) => {
                    let named = |known: &&mut Known| known.parts().any(|(_, other)| other == path);
                    for known in self.known.iter_mut().filter(named) {
                        known.flaw = Some(damaged(known.step, fact.clone()).to_string());
                    }
                    return Ok(false);
                }
                Err(other) => return Err(other),
            }
        }
        Ok(true)
    }

    /// What goes when these checkpoints do, and the parts that no checkpoint names up to `leftovers`.
    fn without(&self, gone: Vec<u64>, leftovers: impl FnOnce(&[u64]) -> Option<u64>) -> Pruning {
        let whole = self.whole().into_iter().map(|(step, _)| step);
        let kept: Vec<u64> = whole.filter(|step| !gone.contains(step)).collect();
        let leftovers = leftovers(&kept);
        let staying = || self.known.iter().filter(|known| !gone.contains(&known.step));
        let named: BTreeSet<String> =
            staying().flat_map(|known| known.parts().map(|(_, path)| path)).collect();

        let to_look_at = |step: u64| match self.known.iter().find(|known| known.step == step) {
            Some(known) => known.says.is_none(),
            None => self.objects.contains_key(&set_aside_path(step)),
        };
        let goes = |path: &str| {
            let Some((step, name)) = split(path) else { return false };
            let left = leftovers.is_some_and(|until| step <= until)
                && name.starts_with("part-")
                && !named.contains(path)
                && !to_look_at(step);
            left || (gone.contains(&step) && !named.contains(path))
        };
        let objects = self.objects.iter().filter(|(path, _)| goes(path));
        let mut objects: Vec<Object> =
            objects.map(|(path, (bytes, _))| Object { path: path.clone(), bytes: *bytes }).collect();
        // A part may be named by several that go: no manifest may outlive it.
        objects.sort_by_key(|object| !gone.iter().any(|step| manifest_path(*step) == object.path));
        let flawed = staying().filter_map(|known| Some((known.step, known.flaw.clone()?))).collect();
        Pruning { gone, kept, flawed, objects }
    }
}

/// What goes when the checkpoints do that `gone` picks of those that are whole (step, and whether it ends a stage; rising).
/// Before any may go, one of those that stay and are older than the newest was proved to be what it was when it was written:
/// one that is not is no longer whole, and `gone` is asked again.
///
/// With `leftovers` parts go too that no checkpoint names, up to the checkpoint that it picks: what was written by a process
/// that was killed before its manifest, and what was left when one was killed while it removed some. Parts of a checkpoint that
/// is damaged or was set aside stay until it is written again.
pub fn plan_pruning(
    store: &Store,
    gone: impl Fn(&[(u64, bool)]) -> Vec<u64>,
    leftovers: impl FnOnce(&[u64]) -> Option<u64>,
) -> Result<Pruning> {
    let mut survey = Survey::of(store)?;
    let gone = loop {
        let whole = survey.whole();
        let gone = gone(&whole);
        let stays = |step: &u64| !gone.contains(step);
        let older = whole.split_last().map_or(&[][..], |(_, older)| older);
        let Some(older) = older.iter().map(|(step, _)| *step).rfind(stays) else { break Vec::new() };
        if gone.is_empty() {
            break gone;
        }
        if survey.prove(store, older)? {
            break gone;
        }
    };
    Ok(survey.without(gone, leftovers))
}

/// Removes the checkpoints that `retention` no longer keeps, and the parts that are no checkpoint's. For the one writer of a
/// run, which has no checkpoint under way.
pub fn prune(store: &Store, retention: &Retention) -> Result<Pruning> {
    let pruning = plan_pruning(store, |whole| superseded(retention, whole), |kept| kept.last().copied())?;
    pruning.carry_out(store)?;
    Ok(pruning)
}

/// Removes the checkpoints that `retention` no longer keeps. Parts without a manifest stay: while several write, they may be
/// those of a checkpoint that is not complete yet.
pub fn let_go(store: &Store, retention: &Retention) -> Result<Pruning> {
    let pruning = plan_pruning(store, |whole| superseded(retention, whole), |_| None)?;
    pruning.carry_out(store)?;
    Ok(pruning)
}

/// Removes the checkpoint after `step` steps.
pub fn delete(store: &Store, step: u64) -> Result<()> {
    Survey::of(store)?.without(vec![step], |_| None).carry_out(store)
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

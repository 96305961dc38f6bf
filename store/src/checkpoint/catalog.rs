//! Which checkpoints a run has, and how one comes and goes: each by the manifest alone.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::Manifest;
use super::manifest::damaged;
use crate::events::{self, Event};
use crate::{CONFIG, Error, Fetched, Object, Result, Store, WHOLE_BYTES_MAX};

/// What `RUN` or `RUN@STEP` means: splits at the last `@` when digits alone follow it; any other `@` belongs to the
/// folder's name.
pub fn split_name(text: &str) -> (&str, Option<u64>) {
    let digits = |step: &str| step.bytes().all(|b| b.is_ascii_digit());
    let split = text.rsplit_once('@').filter(|(run, step)| !run.is_empty() && digits(step));
    match split.and_then(|(run, step)| Some((run, step.parse().ok()?))) {
        Some((run, step)) => (run, Some(step)),
        None => (text, None),
    }
}

/// Folder of the checkpoint after `step` steps.
pub fn folder(step: u64) -> String {
    format!("checkpoints/{step:010}")
}

pub(super) fn manifest_path(step: u64) -> String {
    format!("{}/manifest.json", folder(step))
}

pub(super) fn set_aside_path(step: u64) -> String {
    format!("{}/manifest.set-aside.json", folder(step))
}

/// Steps of the checkpoints that exist (have a manifest), rising. One that a listing does not show yet and `latest.json`
/// names is among them.
pub fn steps(store: &Store) -> Result<Vec<u64>> {
    let mut steps: Vec<u64> = steps_in(&store.list("checkpoints")?).collect();
    let latest = latest(store)?.filter(|latest| !steps.contains(latest));
    if let Some(latest) = latest
        && store.size(&manifest_path(latest))?.is_some()
    {
        steps.push(latest);
        steps.sort_unstable();
    }
    Ok(steps)
}

/// Steps of the checkpoints whose manifests are among `objects`, in their order.
pub(super) fn steps_in<'a>(objects: impl IntoIterator<Item = &'a Object>) -> impl Iterator<Item = u64> {
    let step_of =
        |path: &str| path.strip_prefix("checkpoints/")?.strip_suffix("/manifest.json")?.parse::<u64>().ok();
    objects.into_iter().filter_map(move |object| step_of(&object.path))
}

/// [`steps`] of a run that is to go on. [`Error::Checkpoint`]: there is none, and the log tells of some. Nothing may be written
/// where history is lost: it would begin anew.
pub fn known_steps(store: &Store) -> Result<Vec<u64>> {
    let steps = steps(store)?;
    if !steps.is_empty() {
        return Ok(steps);
    }
    let told = events::read(store)?.into_iter().rev().find_map(|record| match record.event {
        Event::Checkpoint { step, .. } => Some(step),
        _ => None,
    });
    match told {
        None => Ok(steps),
        Some(step) => Err(Error::Checkpoint {
            step,
            fact: format!("the log of {} tells of it, and no checkpoint is there any more", store.place()),
            remedy: "bring the checkpoints back, or begin a new run in another place".to_owned(),
        }),
    }
}

/// [`Error::Place`] where a new run would come among what another has left: its log, checkpoints or metrics without a config.
pub fn refuse_leftovers(store: &Store) -> Result<()> {
    for folder in ["events", "checkpoints", "metrics"] {
        if let Some(first) = store.list(folder)?.first() {
            let detail = format!(
                "there is {} of a run whose {CONFIG} is missing; bring it back, or give another place",
                first.path
            );
            return Err(Error::Place { place: store.place().to_owned(), detail });
        }
    }
    Ok(())
}

/// The manifest of the checkpoint after `step` steps, checked for being one that this build can use; errors as those
/// of [`Manifest::parse`].
pub fn read_manifest(store: &Store, step: u64) -> Result<Manifest> {
    read_manifest_bytes(store, step).map(|(manifest, _)| manifest)
}

/// [`read_manifest`], and the bytes that it was made of.
pub(super) fn read_manifest_bytes(store: &Store, step: u64) -> Result<(Manifest, Bytes)> {
    let path = manifest_path(step);
    match store.get_sized(&path, |size| size <= WHOLE_BYTES_MAX)? {
        Fetched::Bytes(bytes) => Ok((Manifest::parse(&bytes, step, &store.place_of(&path))?, bytes)),
        Fetched::Other(size) => {
            Err(damaged(step, format!("manifest.json has {size} bytes, more than any has")))
        }
        Fetched::Absent => {
            let known = steps(store)?.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
            let known = if known.is_empty() { "none".to_owned() } else { known };
            let fact = format!("{} has no {path}", store.place());
            Err(Error::Checkpoint { step, fact, remedy: format!("there are: {known}") })
        }
    }
}

/// Makes the checkpoint of `manifest` exist, whose parts are all written. Returns the manifest that stands there.
///
/// One that is already there is left alone: with the same weights and moments that is a success, with others it is
/// [`Error::Fenced`]. [`Error::Checkpoint`]: the parts are not one after the other, from the first block on, or one is not
/// there, or has another size.
pub fn commit(store: &Store, manifest: Manifest) -> Result<Manifest> {
    manifest.check(manifest.step)?;
    let (step, path) = (manifest.step, manifest_path(manifest.step));
    let fenced = || Error::Fenced { place: store.place_of(&path) };
    match missing_part(store, &manifest)? {
        None => {
            let bytes =
                serde_json::to_vec_pretty(&manifest).expect("every map of a manifest has string keys");
            if store.create(&path, bytes)? {
                // A process that took the run over removes parts without a manifest. If it has seen ours like that, this
                // is no checkpoint.
                if missing_part(store, &manifest)?.is_some() {
                    store.delete(&path)?;
                    return Err(fenced());
                }
                return Ok(manifest);
            }
        }
        Some(part) if store.size(&path)?.is_none() => {
            let (fact, remedy) =
                (format!("{part} is not there as it was written"), "the next one is written whole");
            return Err(Error::Checkpoint { step, fact, remedy: remedy.to_owned() });
        }
        Some(_) => {}
    }
    let there = read_manifest(store, step)?;
    let same = there.weights == manifest.weights && there.blocks == manifest.blocks;
    if same { Ok(there) } else { Err(fenced()) }
}

/// Path of a part that `manifest` names and that is not there, as large as it says.
pub(super) fn missing_part(store: &Store, manifest: &Manifest) -> Result<Option<String>> {
    let folders: BTreeSet<u64> =
        manifest.parts.iter().map(|part| part.step.unwrap_or(manifest.step)).collect();
    let mut there = BTreeMap::new();
    for step in folders {
        there.extend(store.list(&folder(step))?.into_iter().map(|object| (object.path, object.bytes)));
    }
    for part in &manifest.parts {
        let path = part.path(manifest.step);
        // A listing may be late.
        if there.get(&path) != Some(&part.bytes) && store.size(&path)? != Some(part.bytes) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// The object that names the newest checkpoint, for people and programs that read a run folder. Nothing stands or falls with
/// it: it is written over, and a kill may leave it behind.
pub const LATEST: &str = "latest.json";

#[derive(Serialize, Deserialize)]
struct Latest {
    step: u64,
    manifest: String,
    weights: String,
}

/// Says in [`LATEST`] that `manifest` is the newest checkpoint: after it was committed, and before an old one goes.
pub fn point_at(store: &Store, manifest: &Manifest) -> Result<()> {
    let Manifest { step, weights, .. } = manifest;
    let latest = Latest { step: *step, manifest: manifest_path(*step), weights: weights.clone() };
    let mut bytes = serde_json::to_vec_pretty(&latest).expect("it has no maps");
    bytes.push(b'\n');
    store.put(LATEST, bytes)
}

/// The step that [`LATEST`] names; `None` where there is none, or none that can be read.
fn latest(store: &Store) -> Result<Option<u64>> {
    let Fetched::Bytes(bytes) = store.get_sized(LATEST, |size| size <= 4096)? else { return Ok(None) };
    Ok(serde_json::from_slice(&bytes).ok().map(|latest: Latest| latest.step))
}

/// Makes a checkpoint that cannot be used no longer one, keeping its objects for whoever wants to look.
pub fn set_aside(store: &Store, step: u64) -> Result<()> {
    // One that is listed and not there may be there soon, and whole.
    let Some(bytes) = store.get(&manifest_path(step))? else { return Ok(()) };
    store.put(&set_aside_path(step), bytes)?;
    store.delete(&manifest_path(step))
}

//! Which checkpoints a run has, and how one comes and goes: each by the manifest alone.

use super::{Manifest, Part};
use crate::{Error, Result, Store};

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

/// Steps of the checkpoints that exist (have a manifest), rising.
pub fn steps(store: &Store) -> Result<Vec<u64>> {
    let step_of =
        |path: &str| path.strip_prefix("checkpoints/")?.strip_suffix("/manifest.json")?.parse::<u64>().ok();
    Ok(store.list("checkpoints")?.iter().filter_map(|object| step_of(&object.path)).collect())
}

/// The manifest of the checkpoint after `step` steps, checked for being one that this build can use; errors as those
/// of [`Manifest::parse`].
pub fn read_manifest(store: &Store, step: u64) -> Result<Manifest> {
    let path = manifest_path(step);
    let Some(bytes) = store.get(&path)? else {
        let known = steps(store)?.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        let known = if known.is_empty() { "none".to_owned() } else { known };
        let fact = format!("{} has no {path}", store.place());
        return Err(Error::Checkpoint { step, fact, remedy: format!("there are: {known}") });
    };
    Manifest::parse(&bytes, step, &store.place_of(&path))
}

/// Makes the checkpoint of `manifest` exist, whose parts are all written. Returns the manifest that stands there.
///
/// One that is already there is left alone: with the same weights and moments that is a success, with others it is
/// [`Error::Fenced`]. [`Error::Checkpoint`]: the parts are not one after the other, from the first block on.
pub fn commit(store: &Store, manifest: Manifest) -> Result<Manifest> {
    manifest.check(manifest.step)?;
    let (step, path) = (manifest.step, manifest_path(manifest.step));
    let fenced = || Error::Fenced { place: store.place_of(&path) };
    let bytes = serde_json::to_vec_pretty(&manifest).expect("every map of a manifest has string keys");
    if !store.create(&path, bytes)? {
        let there = read_manifest(store, step)?;
        let same = there.weights == manifest.weights && there.blocks == manifest.blocks;
        return if same { Ok(there) } else { Err(fenced()) };
    }
    // A process that took the run over removes parts without a manifest (`tidy`). If it has seen ours like that, this
    // is no checkpoint.
    let there = store.list(&folder(step))?;
    let is_there = |part: &Part| {
        let path = format!("{}/{}", folder(step), part.name);
        there.iter().any(|object| object.path == path)
    };
    if !manifest.parts.iter().all(is_there) {
        store.delete(&path)?;
        return Err(fenced());
    }
    Ok(manifest)
}

/// Removes a checkpoint: its manifest first, so that it never exists without a part.
pub fn delete(store: &Store, step: u64) -> Result<()> {
    store.delete(&manifest_path(step))?;
    store.list(&folder(step))?.iter().try_for_each(|object| store.delete(&object.path))
}

/// Makes a checkpoint that cannot be used no longer one, keeping its objects for whoever wants to look.
pub fn set_aside(store: &Store, step: u64) -> Result<()> {
    if let Some(bytes) = store.get(&manifest_path(step))? {
        store.put(&set_aside_path(step), bytes)?;
    }
    store.delete(&manifest_path(step))
}

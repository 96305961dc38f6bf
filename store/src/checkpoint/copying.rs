//! A checkpoint copied to another place, of whatever kind.

use super::catalog::{manifest_path, missing_part, read_manifest_bytes};
use super::manifest::damaged;
use super::parallel::each;
use super::{Manifest, Part, point_at, read_manifest, same_data, steps};
use crate::{CONFIG, ENVIRONMENT, Error, Fetched, Result, Store};

/// Parts that are on their way at a time, each in memory once.
const PARTS: usize = 2;

/// What came of [`copy`].
#[derive(Clone, Debug, PartialEq)]
pub struct Copied {
    /// What was copied.
    pub manifest: Manifest,
    /// Parts that were sent, and their bytes.
    pub sent: (usize, u64),
    /// Parts that were there already.
    pub there: usize,
}

/// Copies the checkpoint after `step` steps of the run in `from` to `to`, so that `to` is a run that goes on from there: with
/// its config and environment, without its log and metrics. `sent` hears of each part as it is there.
///
/// A part is sent once it was read and has its digest, and is read back; one that is there with its digest is not sent again.
/// The manifest is created after them, the config last: until then `to` holds no run. So it may be cut short anywhere and begun
/// again.
///
/// [`Error::Place`]: `to` holds something else than a copy of this run. [`Error::Checkpoint`]: the checkpoint is damaged.
pub fn copy(from: &Store, step: u64, to: &Store, sent: impl Fn(&Part) + Sync) -> Result<Copied> {
    let no_run = || Error::NoRun { place: from.place().to_owned() };
    let config = from.get(CONFIG)?.ok_or_else(no_run)?;
    let (manifest, bytes) = read_manifest_bytes(from, step)?;
    let refused = |detail: String| Err(Error::Place { place: to.place().to_owned(), detail });
    if !to.list("events")?.is_empty() {
        return refused("it holds a run with a history of its own; copy to another place".to_owned());
    }
    let others = to.get(CONFIG)?.is_some_and(|there| there != config);
    let of_another = |step: u64| {
        let there = read_manifest(to, step)?;
        let same = there.data.len() == manifest.data.len()
            && there
                .data
                .iter()
                .all(|(name, digest)| manifest.data.get(name).is_some_and(|ours| same_data(ours, digest)));
        Ok(there.config != manifest.config || !same)
    };
    if others || steps(to)?.into_iter().map(of_another).collect::<Result<Vec<_>>>()?.contains(&true) {
        return refused("it holds checkpoints of another run; copy to another place".to_owned());
    }

    let outcomes = each(PARTS, manifest.parts.iter().collect(), |_, part: &Part| {
        let new = send_part(from, &manifest, part, to)?;
        sent(part);
        Ok((new, part.bytes))
    })?;
    if let Some(missing) = missing_part(to, &manifest)? {
        return Err(damaged(step, format!("{} was copied and is gone", to.place_of(&missing))));
    }
    let path = manifest_path(step);
    if !to.create(&path, bytes.clone())? && to.get(&path)?.as_ref() != Some(&bytes) {
        return refused(format!("it holds another checkpoint {step}; copy to another place"));
    }
    if steps(to)?.last() == Some(&step) {
        point_at(to, &manifest)?;
    }
    if let Some(environment) = from.get(ENVIRONMENT)? {
        to.put(ENVIRONMENT, environment)?;
    }
    to.create(CONFIG, config)?;
    let new: Vec<u64> = outcomes.iter().filter(|(new, _)| *new).map(|(_, bytes)| *bytes).collect();
    Ok(Copied { manifest, sent: (new.len(), new.iter().sum()), there: outcomes.len() - new.len() })
}

/// Whether the part had to be sent.
fn send_part(from: &Store, manifest: &Manifest, part: &Part, to: &Store) -> Result<bool> {
    let path = part.path(manifest.step);
    let is_it = |bytes: &[u8]| blake3::hash(bytes).to_hex().as_str() == part.blake3;
    if let Fetched::Bytes(there) = to.get_sized(&path, |size| size == part.bytes)?
        && is_it(&there)
    {
        return Ok(false);
    }
    let wrong = |fact: String| Err(damaged(manifest.step, format!("part {} {fact}", part.name)));
    match from.get_sized(&path, |size| size == part.bytes)? {
        Fetched::Bytes(bytes) if is_it(&bytes) => {
            to.put_proved(&path, &[bytes], |_| ())?;
            Ok(true)
        }
        Fetched::Bytes(_) => wrong("has changed since it was written".to_owned()),
        Fetched::Other(size) => wrong(format!("has {size} bytes, not {}", part.bytes)),
        Fetched::Absent => wrong("is missing".to_owned()),
    }
}

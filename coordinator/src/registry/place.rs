//! The place of a coordinator's jobs: one prefix that holds all there is to know.
//!
//! ```text
//! NAME/job.json                   what was submitted, created once and last: it makes the job exist
//! NAME/config.toml, events/, …    its run folder, unless the job names another
//! _coordinators/00000001.json …   who had the place, one numbered object each: the last one has it
//! ```

use anello_proto::jobs::JobName;
use anello_store::{Error as StoreError, Store};
use serde::{Deserialize, Serialize};

/// What was submitted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Spec {
    /// Its name.
    pub name: String,
    /// Fewest workers that train.
    pub min: u32,
    /// Workers that were wanted at first.
    pub desired: u32,
    /// When, milliseconds since 1970: the queue's order.
    pub created_unix_ms: u64,
    /// Its run folder; absent: the job's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
}

/// The place, as this coordinator has it.
#[derive(Debug)]
pub(super) struct Place {
    store: Store,
    /// Number of this coordinator's reign.
    reign: u64,
}

const REIGNS: &str = "_coordinators";

fn reign_path(number: u64) -> String {
    format!("{REIGNS}/{number:08}.json")
}

impl Place {
    /// Takes the place over: whoever had it is fenced from here on.
    pub fn take(place: &str) -> Result<Self, StoreError> {
        let store = Store::durable(place)?;
        loop {
            let number = |path: &str| path.rsplit('/').next()?.strip_suffix(".json")?.parse::<u64>().ok();
            let last = store.list(REIGNS)?.iter().filter_map(|object| number(&object.path)).max();
            let reign = last.unwrap_or(0) + 1;
            let said = serde_json::json!({ "process": std::process::id(), "unix_ms": unix_ms() });
            // Another that starts at this moment may be first; then we come after it.
            if store.create(&reign_path(reign), said.to_string())? {
                return Ok(Self { store, reign });
            }
        }
    }

    /// [`StoreError::Fenced`] when another coordinator has the place.
    pub fn check(&self) -> Result<(), StoreError> {
        let next = reign_path(self.reign + 1);
        match self.store.get(&next)? {
            Some(_) => Err(StoreError::Fenced { place: self.store.place_of(&next) }),
            None => Ok(()),
        }
    }

    /// Everything that was submitted, the oldest first. What cannot be read is left out, and said.
    pub fn specs(&self) -> Result<Vec<Spec>, StoreError> {
        let mut specs = Vec::new();
        for name in self.store.folders("")?.into_iter().filter(|name| JobName::new(name.as_str()).is_some()) {
            let path = spec_path(&name);
            let Some(bytes) = self.store.get(&path)? else { continue };
            match serde_json::from_slice::<Spec>(&bytes) {
                Ok(spec) if spec.name == name => specs.push(spec),
                Ok(spec) => tracing::warn!(path, says = spec.name, "a job of another name is left out"),
                Err(cause) => tracing::warn!(path, %cause, "a job that cannot be read is left out"),
            }
        }
        specs.sort_by(|a, b| (a.created_unix_ms, &a.name).cmp(&(b.created_unix_ms, &b.name)));
        Ok(specs)
    }

    /// Makes a job exist. `false`: one of its name does.
    pub fn submit(&self, spec: &Spec) -> Result<bool, StoreError> {
        self.check()?;
        let json = serde_json::to_vec_pretty(spec).expect("a spec has plain fields only");
        self.store.create(&spec_path(&spec.name), json)
    }

    /// Where a job's run folder is.
    pub fn run_of(&self, spec: &Spec) -> String {
        spec.run.clone().unwrap_or_else(|| self.store.below(&spec.name))
    }
}

fn spec_path(name: &str) -> String {
    format!("{name}/job.json")
}

/// The time of day, for people and for the order of the queue.
pub(super) fn unix_ms() -> u64 {
    #[expect(
        clippy::disallowed_methods,
        reason = "submissions are told apart by it, and nothing else is decided"
    )]
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, created_unix_ms: u64) -> Spec {
        Spec { name: name.into(), min: 1, desired: 2, created_unix_ms, run: None }
    }

    fn folder(name: &str) -> String {
        let folder = std::env::temp_dir().join(format!("anello-place-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        folder.display().to_string()
    }

    #[test]
    fn jobs_come_back_in_their_order_and_a_name_is_taken_once() {
        let at = folder("order");
        let place = Place::take(&at).unwrap();
        assert!(place.submit(&spec("b", 1)).unwrap() && place.submit(&spec("a", 2)).unwrap());
        assert!(!place.submit(&spec("b", 3)).unwrap(), "the name is taken");
        place.store.put("c/config.toml", "no job").unwrap();
        assert_eq!(place.specs().unwrap(), [spec("b", 1), spec("a", 2)]);
        assert_eq!(place.run_of(&spec("b", 1)), format!("{at}/b"));
        let _ = std::fs::remove_dir_all(at);
    }

    #[test]
    fn the_older_of_two_coordinators_is_fenced() {
        let at = folder("fence");
        let older = Place::take(&at).unwrap();
        older.check().unwrap();
        let newer = Place::take(&at).unwrap();
        assert!(matches!(older.check(), Err(StoreError::Fenced { .. })));
        assert!(matches!(older.submit(&spec("a", 1)), Err(StoreError::Fenced { .. })));
        newer.check().unwrap();
        let _ = std::fs::remove_dir_all(at);
    }
}

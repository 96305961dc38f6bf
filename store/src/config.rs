//! The config in a run folder.

use anello_configs::RunConfig;

use crate::{Error, Result, Store};

/// Name of the config in a run folder. Where it is, there is a run.
pub const CONFIG: &str = "config.toml";

/// The config of the run in `store`.
pub fn read_config(store: &Store) -> Result<RunConfig> {
    let place = store.place_of(CONFIG);
    let Some(bytes) = store.get(CONFIG)? else {
        return Err(Error::NoRun { place: store.place().to_owned() });
    };
    let remedy = "restore it from a copy";
    let text = std::str::from_utf8(&bytes).map_err(|cause| Error::malformed(&place, cause, remedy))?;
    RunConfig::parse(&place, text).map_err(|cause| Error::malformed(&place, cause, remedy))
}

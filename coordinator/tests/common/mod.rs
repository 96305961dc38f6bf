//! What tests of a coordinator share.

use anello_configs::RunConfig;
use anello_coordinator::launch::Local;

/// A launcher whose workers are gone as soon as they are started: nobody comes.
pub fn nobody(_: &str, _: &RunConfig, _: u32) -> Local {
    Local { program: "false".into(), machine: String::new(), arguments: Vec::new(), environment: Vec::new() }
}

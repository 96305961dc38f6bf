//! Where a run runs: recorded with every start and every checkpoint, since the same-bits contract holds for one
//! kind of device and one build.

use serde::{Deserialize, Serialize};

/// Device, build and threads of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// Version of Anello.
    pub anello: String,
    /// Git revision of the build; absent when it was built outside a checkout.
    pub revision: Option<String>,
    /// Version of LibTorch.
    pub libtorch: String,
    /// Kind of device: the model of the CPU or GPU.
    pub device: String,
    /// CPU threads of LibTorch. The bits do not depend on it; it is here for the day when they seem to.
    pub threads: u32,
    /// Operating system and architecture.
    pub system: String,
}

/// Where a run was started, in its folder: written once.
pub const ENVIRONMENT: &str = "environment.json";

impl Environment {
    /// As JSON, for people.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("plain strings and a number")
    }

    /// What decides the arithmetic besides the device: workers of one ring have the same.
    pub fn build(&self) -> String {
        let revision = self.revision.as_deref().unwrap_or("unknown");
        format!("anello {} ({revision}), libtorch {}, {}", self.anello, self.libtorch, self.system)
    }

    /// What differs between two environments in ways that can change bits: (what, there, here).
    pub fn differences<'a>(&'a self, here: &'a Self) -> Vec<(&'static str, &'a str, &'a str)> {
        let revision = |e: &'a Self| e.revision.as_deref().unwrap_or("unknown");
        [
            ("anello version", self.anello.as_str(), here.anello.as_str()),
            ("git revision", revision(self), revision(here)),
            ("libtorch", &self.libtorch, &here.libtorch),
            ("device", &self.device, &here.device),
            ("system", &self.system, &here.system),
        ]
        .into_iter()
        .filter(|(_, there, here)| there != here)
        .collect()
    }
}

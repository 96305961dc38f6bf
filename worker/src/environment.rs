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

impl Environment {
    /// That of this process on its CPU.
    pub fn of_cpu() -> Self {
        let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            anello: env!("CARGO_PKG_VERSION").to_owned(),
            revision: option_env!("ANELLO_REVISION").map(str::to_owned),
            libtorch: LIBTORCH.to_owned(),
            device: model.map_or("unknown CPU", |(_, name)| name.trim()).to_owned(),
            threads: tch::get_num_threads() as u32,
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        }
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

/// The version that this build is made for and linked against.
const LIBTORCH: &str = "2.11.0";

//! Where this process runs.

use anello_store::Environment;

/// The environment of this process on its CPU, whose model thread has `threads` threads of LibTorch, or as many as there are
/// now.
pub fn of_cpu(threads: Option<u32>) -> Environment {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    Environment {
        anello: env!("CARGO_PKG_VERSION").to_owned(),
        revision: option_env!("ANELLO_REVISION").map(str::to_owned),
        libtorch: LIBTORCH.to_owned(),
        device: model.map_or("unknown CPU", |(_, name)| name.trim()).to_owned(),
        threads: threads.unwrap_or_else(|| tch::get_num_threads() as u32),
        system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
    }
}

/// The version that this build is made for and linked against.
const LIBTORCH: &str = "2.11.0";

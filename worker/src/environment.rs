//! Where this process runs.

use anello_store::Environment;
use tch::Device;

use crate::device::{MKL, has_strict_products, kind_of};

/// The environment of this process on `device`, whose model thread has `threads` threads of LibTorch, or as many as there
/// are now.
pub fn of(device: Device, threads: Option<u32>) -> Environment {
    let kind = match device {
        Device::Cpu => {
            let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
            let model = model.map_or("unknown CPU", |(_, name)| name.trim());
            match std::env::var(MKL.0) {
                Ok(kernels) if kernels != MKL.1 => format!("{model}, {}={kernels}", MKL.0),
                _ => model.to_owned(),
            }
        }
        other => kind_of(other).unwrap_or_else(|| "unknown GPU".to_owned()),
    };
    let threads = threads.filter(|_| device != Device::Cpu || has_strict_products());
    let half = if device == Device::Cpu { "" } else { "+cuda" };
    Environment {
        anello: env!("CARGO_PKG_VERSION").to_owned(),
        revision: option_env!("ANELLO_REVISION").map(str::to_owned),
        libtorch: format!("{LIBTORCH}{half}"),
        device: kind,
        threads: threads.unwrap_or_else(|| tch::get_num_threads() as u32),
        system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
    }
}

/// The version that this build is made for and linked against.
pub(crate) const LIBTORCH: &str = "2.11.0";

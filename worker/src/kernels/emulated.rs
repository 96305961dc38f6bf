//! The kernels on a CPU: their own text, compiled as C++.

use std::sync::{Arc, OnceLock};

use super::{Kernels, SOURCES, Target};
use crate::ffi::emulated::{Emulated, compiled};

impl Kernels {
    /// Compiled once a process.
    pub fn emulated() -> Self {
        static ONCE: OnceLock<Kernels> = OnceLock::new();
        ONCE.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let sources = folder.path().join("anello.cu");
            std::fs::write(&sources, SOURCES.concat()).unwrap();
            let define = format!("-DKERNELS=\"{}\"", sources.display());
            // As NVRTC is told.
            let flags = ["-O2", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off", &define];
            let library = compiled("src/kernels/host.cpp", &flags.map(str::to_owned));
            Kernels(Arc::new(Target::Emulated(Emulated::new(library))))
        })
        .clone()
    }
}

//! The kernels on a CPU: their own text, compiled as C++.

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, OnceLock};

use super::{Kernels, SOURCES, Target};
use crate::ffi::emulated::Emulated;

impl Kernels {
    /// Compiled once a process, by the compiler that `shim.cpp` needs too.
    pub fn emulated() -> Self {
        static ONCE: OnceLock<Kernels> = OnceLock::new();
        ONCE.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let (sources, library) = (folder.path().join("anello.cu"), folder.path().join("libkernels.so"));
            std::fs::write(&sources, SOURCES.concat()).unwrap();
            let host = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels/host.cpp");
            let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
            let compiled = Command::new(&compiler)
                .args(["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"])
                // As NVRTC is told.
                .args(["-ffp-contract=off", "-fPIC", "-shared"])
                .arg(format!("-DKERNELS=\"{}\"", sources.display()))
                .args([host.as_os_str(), "-o".as_ref(), library.as_os_str()])
                .output()
                .unwrap_or_else(|cause| panic!("{compiler}: {cause}"));
            assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
            // The file may go once it is loaded.
            Kernels(Arc::new(Target::Emulated(Emulated::load(&library).unwrap())))
        })
        .clone()
    }
}

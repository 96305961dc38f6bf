//! What stands in for a GPU in tests: C++ that a test compiles, and kernels as such (`kernels/host.cpp`).

use std::ffi::{CString, c_char, c_int, c_uint};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::argument::{Argument, Packed};
use super::library::words;

/// A library compiled from `source`, a path in this package, by the compiler that `shim.cpp` needs too.
pub(crate) fn compiled(source: &str, flags: &[String]) -> Library {
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("library.so");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-Wall", "-Wextra", "-fPIC", "-shared"])
        .args(flags)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(source))
        .args(["-o".as_ref(), library.as_os_str()])
        .output()
        .unwrap_or_else(|cause| panic!("{compiler}: {cause}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // SAFETY: of this package's own files for tests, whose initialisers are of no consequence, or are for them alone. The file may go
    // once it is loaded.
    let library = unsafe { Library::open(Some(&library), RTLD_NOW | RTLD_LOCAL) };
    library.unwrap_or_else(|cause| panic!("{source}: {}", words(&cause)))
}

/// The library.
#[derive(Debug)]
pub(crate) struct Emulated(Mutex<Library>);

impl Emulated {
    /// Those of `library`, compiled from host.cpp.
    pub fn new(library: Library) -> Self {
        Self(Mutex::new(library))
    }

    /// As [`super::gpu::Module::launch`], and done when it returns.
    pub fn launch(
        &self,
        name: &'static str,
        grid: u32,
        block: u32,
        arguments: &[Argument<'_>],
    ) -> Result<(), String> {
        type Launch = unsafe extern "C" fn(*const c_char, c_uint, c_uint, *mut *mut u64) -> c_int;
        let symbol = CString::new(name).expect("names of kernels have no NUL");
        let mut arguments = Packed::new(arguments);
        // It runs one kernel at a time.
        let library = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: declared as in host.cpp; that the arguments are those of the kernel is the caller's part of the bargain.
        let status = unsafe {
            let launch = library.get::<Launch>(b"anello_host_launch\0").map_err(|cause| words(&cause))?;
            launch(symbol.as_ptr(), grid, block, arguments.places())
        };
        match status {
            0 => Ok(()),
            1 => Err(format!("there is no kernel {name} in host.cpp")),
            _ => Err(format!("threads of {name} part at a barrier")),
        }
    }
}

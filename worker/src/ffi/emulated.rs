//! What stands in for a GPU in tests: C++ that a test compiles, and kernels as such (`kernels/host.cpp`).

use std::ffi::{CString, c_char, c_int, c_uint};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::argument::{Argument, Packed};
use super::library::words;

/// A folder with `library.so`, compiled from `source`, a path in this package, by the compiler that `shim.cpp` needs too. It may go once
/// the library is loaded.
pub(crate) fn compiled(source: &str, flags: &[String]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-Wall", "-Wextra", "-fPIC", "-shared"])
        .args(flags)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(source))
        .args(["-o".as_ref(), folder.path().join("library.so").as_os_str()])
        .output()
        .unwrap_or_else(|cause| panic!("{compiler}: {cause}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    folder
}

/// The library.
#[derive(Debug)]
pub(crate) struct Emulated(Mutex<Library>);

impl Emulated {
    /// Loads `path`.
    pub fn load(path: &Path) -> Result<Self, String> {
        // SAFETY: compiled from host.cpp, which has no initialiser of consequence.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) };
        library.map(|library| Self(Mutex::new(library))).map_err(|cause| words(&cause))
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

//! Kernels on a CPU, for tests: their source as C++ (`kernels/host.cpp`), in a library that a test has compiled.

use std::ffi::{CString, c_char, c_int, c_uint};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::argument::{Argument, Packed};
use super::library::words;

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

//! Shared libraries that are loaded at run time: the CUDA half of LibTorch, and the driver's own.

use std::ffi::{CStr, c_char, c_int};
use std::path::Path;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY, RTLD_NOW};

/// What the loader says, which libloading has as the source of its own words.
pub(crate) fn words(cause: &libloading::Error) -> String {
    std::error::Error::source(cause).map_or_else(|| cause.to_string(), ToString::to_string)
}

/// Calls a C function of a library by its name and declaration: its status. Where there is none of that name the function that
/// this stands in returns the loader's words.
macro_rules! status {
    ($library:expr, $name:literal, ($($kind:ty),*), ($($argument:expr),*)) => {{
        // SAFETY: declared as in the library's header; outputs are places of ours that live for the call, and what else it is
        // given is the part of the bargain of who calls it here.
        unsafe {
            let symbol = concat!($name, "\0").as_bytes();
            let function = $library.get::<unsafe extern "C" fn($($kind),*) -> std::ffi::c_int>(symbol);
            function.map_err(|cause| $crate::ffi::library::words(&cause))?($($argument),*)
        }
    }};
}
pub(super) use status;

/// [`status`] of the driver's library: where it is not 0, the function that this stands in returns that in words.
macro_rules! driver_call {
    ($library:expr, $name:literal, $kinds:tt, $arguments:tt) => {{
        let status = $crate::ffi::library::status!($library, $name, $kinds, $arguments);
        if status != 0 {
            return Err(format!("the driver of NVIDIA: {} returns {status}", $name));
        }
    }};
}
pub(super) use driver_call;

/// The driver's own library.
///
/// # Errors
/// In words: there is none.
pub(super) fn open_driver() -> Result<Library, String> {
    // SAFETY: its initialisers are those of every program that is linked with it; of it nothing is registered here.
    let library = unsafe { Library::open(Some("libcuda.so.1"), RTLD_LAZY) };
    library.map_err(|cause| format!("there is no driver of NVIDIA ({})", words(&cause)))
}

/// Loads `path` for the rest of the process's life, its symbols for all that comes after.
///
/// # Errors
/// The loader's words: which file, which of what it needs is missing.
pub(crate) fn load_for_all(path: &Path) -> Result<(), String> {
    // SAFETY: the file is LibTorch's own, as its caller has checked by name and version; its initialisers register kernels
    // and devices, as they do in every program that is linked with it.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    // Never closed: what is registered stays.
    library.map(std::mem::forget).map_err(|cause| words(&cause))
}

/// Version of an NCCL library, as 23203 for 2.32.3; loads it beside what is there, under its own name only.
///
/// # Errors
/// The loader's words.
pub(crate) fn nccl_version(path: &Path) -> Result<i32, String> {
    // SAFETY: NCCL's own file: it has no initialiser of consequence.
    let library = unsafe { Library::open(Some(path), RTLD_LAZY) }.map_err(|cause| words(&cause))?;
    let mut version = 0;
    let status = status!(library, "ncclGetVersion", (*mut c_int), (&raw mut version));
    std::mem::forget(library);
    if status == 0 { Ok(version) } else { Err(format!("ncclGetVersion returns {status}")) }
}

/// A GPU, as the driver tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gpu {
    /// As "NVIDIA H100 80GB HBM3".
    pub name: String,
    /// Compute capability, as (9, 0).
    pub capability: (i32, i32),
    /// Of its memory.
    pub bytes: u64,
}

/// What the driver tells: the newest CUDA that it serves, as 13000 for 13.0, and the GPUs that this process may use.
///
/// # Errors
/// In words: no driver, no GPU, or one that does not answer.
pub(crate) fn driver() -> Result<(i32, Vec<Gpu>), String> {
    let library = open_driver()?;
    driver_call!(library, "cuInit", (u32), (0));
    let (mut version, mut count) = (0, 0);
    driver_call!(library, "cuDriverGetVersion", (*mut c_int), (&raw mut version));
    driver_call!(library, "cuDeviceGetCount", (*mut c_int), (&raw mut count));
    let mut gpus = Vec::new();
    for number in 0..count {
        const MAJOR: c_int = 75;
        const MINOR: c_int = 76;
        let (mut device, mut bytes, mut capability, mut name) = (0, 0, (0, 0), [0 as c_char; 256]);
        driver_call!(library, "cuDeviceGet", (*mut c_int, c_int), (&raw mut device, number));
        driver_call!(
            library,
            "cuDeviceGetName",
            (*mut c_char, c_int, c_int),
            (name.as_mut_ptr(), 255, device)
        );
        driver_call!(library, "cuDeviceTotalMem_v2", (*mut usize, c_int), (&raw mut bytes, device));
        for (attribute, value) in [(MAJOR, &raw mut capability.0), (MINOR, &raw mut capability.1)] {
            driver_call!(
                library,
                "cuDeviceGetAttribute",
                (*mut c_int, c_int, c_int),
                (value, attribute, device)
            );
        }
        // SAFETY: the driver ends it with NUL, within the 255 bytes that it was given of 256 zeros.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        gpus.push(Gpu { name, capability, bytes: bytes as u64 });
    }
    std::mem::forget(library);
    Ok((version, gpus))
}

//! Kernels on a GPU, by the driver's own library.

use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::{Mutex, PoisonError};

use libloading::os::unix::Library;
use tch::Device;

use super::argument::{Argument, Packed};
use super::library::{driver_call, open_driver};
use super::torch::Stream;

/// Kernels that a GPU has loaded.
#[derive(Debug)]
pub(crate) struct Module {
    driver: Library,
    device: Device,
    context: usize,
    module: usize,
    functions: Mutex<BTreeMap<&'static str, usize>>,
}

impl Module {
    /// Loads `code`, compiled for the GPU `device`, for the rest of the process's life.
    ///
    /// # Errors
    /// In words: no driver, or what it says of the code.
    pub fn load(device: Device, code: &[u8]) -> Result<Self, String> {
        let Device::Cuda(number) = device else { return Err(format!("{device:?} is no GPU")) };
        let driver = open_driver()?;
        let (mut handle, mut context, mut module) = (0, null_mut(), null_mut());
        driver_call!(driver, "cuInit", (c_uint), (0));
        driver_call!(driver, "cuDeviceGet", (*mut c_int, c_int), (&raw mut handle, number as c_int));
        // The context that LibTorch computes in.
        driver_call!(
            driver,
            "cuDevicePrimaryCtxRetain",
            (*mut *mut c_void, c_int),
            (&raw mut context, handle)
        );
        driver_call!(driver, "cuCtxSetCurrent", (*mut c_void), (context));
        driver_call!(
            driver,
            "cuModuleLoadData",
            (*mut *mut c_void, *const u8),
            (&raw mut module, code.as_ptr())
        );
        let (context, module) = (context as usize, module as usize);
        Ok(Self { driver, device, context, module, functions: Mutex::default() })
    }

    /// Puts a kernel onto the stream that tensor operations of this thread go to. That its arguments are those of the kernel, and
    /// their memory as large as it takes them to be, is the caller's part of the bargain.
    ///
    /// # Errors
    /// In words: there is no such kernel, or what the driver says.
    pub fn launch(
        &self,
        name: &'static str,
        grid: [u32; 2],
        block: u32,
        shared_bytes: u32,
        arguments: &[Argument<'_>],
    ) -> Result<(), String> {
        // LibTorch's threads may not have met this GPU yet.
        driver_call!(self.driver, "cuCtxSetCurrent", (*mut c_void), (self.context as *mut c_void));
        let function = self.function(name, shared_bytes)?;
        let stream =
            Stream::current(self.device).and_then(Stream::native).map_err(|cause| cause.to_string())?;
        let mut arguments = Packed::new(arguments);
        driver_call!(
            self.driver,
            "cuLaunchKernel",
            (
                *mut c_void,
                c_uint,
                c_uint,
                c_uint,
                c_uint,
                c_uint,
                c_uint,
                c_uint,
                *mut c_void,
                *mut *mut u64,
                *mut *mut c_void
            ),
            (
                function as *mut c_void,
                grid[0],
                grid[1],
                1,
                block,
                1,
                1,
                shared_bytes,
                stream as *mut c_void,
                arguments.places(),
                null_mut()
            )
        );
        Ok(())
    }

    /// The kernel `name`, which may have so much shared memory: of each, always as much.
    fn function(&self, name: &'static str, shared_bytes: u32) -> Result<usize, String> {
        /// What a kernel has without asking.
        const ALWAYS: u32 = 48 << 10;
        const MAX_DYNAMIC_SHARED_SIZE_BYTES: c_int = 8;
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&function) = functions.get(name) {
            return Ok(function);
        }
        let symbol = CString::new(name).expect("names of kernels have no NUL");
        let mut function = null_mut();
        driver_call!(
            self.driver,
            "cuModuleGetFunction",
            (*mut *mut c_void, *mut c_void, *const c_char),
            (&raw mut function, self.module as *mut c_void, symbol.as_ptr())
        );
        if shared_bytes > ALWAYS {
            driver_call!(
                self.driver,
                "cuFuncSetAttribute",
                (*mut c_void, c_int, c_int),
                (function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes as c_int)
            );
        }
        functions.insert(name, function as usize);
        Ok(function as usize)
    }
}

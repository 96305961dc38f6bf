//! NVRTC, the compiler of CUDA C++ that is a library: loaded at run time, and needing neither a GPU nor a driver.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::library::{load_for_all, status, words};

/// One `libnvrtc.so`.
#[derive(Debug)]
pub(crate) struct Nvrtc {
    library: Library,
    /// As (13, 0).
    pub version: (i32, i32),
}

/// A program under way, which is destroyed with this.
struct Program<'a>(&'a Nvrtc, *mut c_void);

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: declared as in nvrtc.h; a live program, destroyed once, after which nobody uses it.
        unsafe {
            if let Ok(destroy) = self
                .0
                .library
                .get::<unsafe extern "C" fn(*mut *mut c_void) -> c_int>(b"nvrtcDestroyProgram\0")
            {
                destroy(&raw mut self.1);
            }
        }
    }
}

impl Nvrtc {
    /// Loads `path`, and its built-ins, which it would look for in the loader's places alone, from beside it.
    ///
    /// # Errors
    /// The loader's words.
    pub fn load(path: &Path) -> Result<Self, String> {
        let beside = path.parent().and_then(|folder| std::fs::read_dir(folder).ok());
        let files = beside.into_iter().flatten().filter_map(|entry| entry.ok().map(|entry| entry.path()));
        let is_builtins = |file: &Path| {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            name.starts_with("libnvrtc-builtins.so.")
        };
        for builtins in files.filter(|file| is_builtins(file)) {
            load_for_all(&builtins)?;
        }
        // SAFETY: NVRTC's own file, as its caller chose it by name: its initialisers touch nothing but itself.
        let library =
            unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|cause| words(&cause))?;
        let mut version = (0, 0);
        let status = status!(
            library,
            "nvrtcVersion",
            (*mut c_int, *mut c_int),
            (&raw mut version.0, &raw mut version.1)
        );
        if status == 0 {
            Ok(Self { library, version })
        } else {
            Err(format!("nvrtcVersion returns {status}"))
        }
    }

    /// Compiles `source`: the code of the GPUs that `options` name (`--gpu-architecture=sm_NN`), as the driver loads it.
    ///
    /// # Errors
    /// The compiler's words.
    pub fn compile(&self, source: &str, options: &[String]) -> Result<Vec<u8>, String> {
        let c = |text: &str| CString::new(text).map_err(|_| "a source or option with NUL".to_owned());
        let (source, name) = (c(source)?, c("anello.cu")?);
        let options = options.iter().map(|option| c(option)).collect::<Result<Vec<_>, _>>()?;
        let mut raw = null_mut();
        let status = status!(
            self.library,
            "nvrtcCreateProgram",
            (
                *mut *mut c_void,
                *const c_char,
                *const c_char,
                c_int,
                *const *const c_char,
                *const *const c_char
            ),
            (&raw mut raw, source.as_ptr(), name.as_ptr(), 0, null(), null())
        );
        if status != 0 {
            return Err(self.text("nvrtcCreateProgram", status));
        }
        let program = Program(self, raw);
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let status = status!(
            self.library,
            "nvrtcCompileProgram",
            (*mut c_void, c_int, *const *const c_char),
            (program.1, pointers.len() as c_int, pointers.as_ptr())
        );
        if status != 0 {
            return Err(format!("{}: {}", self.text("nvrtcCompileProgram", status), self.log(&program)?));
        }
        let mut bytes = 0;
        let status = status!(
            self.library,
            "nvrtcGetCUBINSize",
            (*mut c_void, *mut usize),
            (program.1, &raw mut bytes)
        );
        let mut code = vec![0u8; bytes];
        if status != 0 || code.is_empty() {
            return Err(self.text("nvrtcGetCUBINSize", status));
        }
        let status =
            status!(self.library, "nvrtcGetCUBIN", (*mut c_void, *mut u8), (program.1, code.as_mut_ptr()));
        if status == 0 { Ok(code) } else { Err(self.text("nvrtcGetCUBIN", status)) }
    }

    /// What the compiler says of a program.
    fn log(&self, program: &Program<'_>) -> Result<String, String> {
        let mut bytes = 0usize;
        let _ = status!(
            self.library,
            "nvrtcGetProgramLogSize",
            (*mut c_void, *mut usize),
            (program.1, &raw mut bytes)
        );
        let mut log = vec![0u8; bytes.max(1)];
        if bytes > 0 {
            let _ = status!(
                self.library,
                "nvrtcGetProgramLog",
                (*mut c_void, *mut u8),
                (program.1, log.as_mut_ptr())
            );
        }
        Ok(String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned())
    }

    fn text(&self, call: &str, status: c_int) -> String {
        // SAFETY: declared as in nvrtc.h; a text that stays, for any number.
        let text = unsafe {
            let get =
                self.library.get::<unsafe extern "C" fn(c_int) -> *const c_char>(b"nvrtcGetErrorString\0");
            get.map(|get| CStr::from_ptr(get(status)).to_string_lossy().into_owned())
        };
        format!("{call} returns {status} ({})", text.unwrap_or_default())
    }
}

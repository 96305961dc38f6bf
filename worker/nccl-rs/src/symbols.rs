//! The seam to the C library: the functions that are used, as nccl.h has them.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

/// `ncclComm_t`. Nothing of it is known here; the number is the pointer, so that a fake needs no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Comm(pub usize);

/// `ncclUniqueId`: how the ranks of one communicator find each other. The first makes it, and all are given it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId(pub [u8; 128]);

impl std::fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("UniqueId(…)")
    }
}

/// `ncclResult_t`s that mean something here.
pub mod code {
    /// Done.
    pub const SUCCESS: i32 = 0;
    /// Begun, and not done: of a communicator that does not block.
    pub const IN_PROGRESS: i32 = 7;
}

/// `ncclDataType_t`s that are used.
pub mod kind {
    /// One byte.
    pub const UINT8: i32 = 1;
    /// Four bytes.
    pub const FLOAT32: i32 = 7;
}

/// `ncclSum`, for the one reduction of NCCL's own that is measured against.
pub const SUM: i32 = 0;

/// The functions of NCCL that are used. Each returns `ncclResult_t` where nccl.h does.
///
/// # Safety
/// Of the methods that are unsafe: communicators are live ones, device memory has the lengths that are given and stays until
/// the stream is past the call, and streams are live `cudaStream_t`s of the communicator's device.
#[allow(clippy::missing_safety_doc, reason = "the trait's own section is for all")]
pub trait Symbols: Send + Sync {
    /// `ncclGetVersion`
    fn version(&self) -> (i32, i32);
    /// `ncclGetErrorString`, and `ncclGetLastError` of a communicator.
    fn text(&self, code: i32, comm: Option<Comm>) -> String;
    /// `ncclGetUniqueId`
    fn unique_id(&self) -> (i32, UniqueId);
    /// `ncclCommInitRankConfig` with `blocking = 0`, for the calling thread's device.
    fn init_rank(&self, ranks: i32, id: &UniqueId, rank: i32) -> (i32, Comm);
    /// `ncclCommGetAsyncError`: (of the call, of the communicator).
    unsafe fn async_error(&self, comm: Comm) -> (i32, i32);
    /// `ncclCommAbort`
    unsafe fn abort(&self, comm: Comm) -> i32;
    /// `ncclGroupStart`
    fn group_start(&self) -> i32;
    /// `ncclGroupEnd`
    fn group_end(&self) -> i32;
    /// `ncclSend`
    unsafe fn send(&self, from: usize, count: usize, kind: i32, peer: i32, comm: Comm, stream: usize) -> i32;
    /// `ncclRecv`
    unsafe fn recv(&self, to: usize, count: usize, kind: i32, peer: i32, comm: Comm, stream: usize) -> i32;
    /// `ncclAllReduce` with [`SUM`]: what the ring's own sum is measured against, and never used for.
    unsafe fn all_reduce(
        &self,
        from: usize,
        to: usize,
        count: usize,
        kind: i32,
        comm: Comm,
        stream: usize,
    ) -> i32;
}

/// `ncclConfig_t` as of NCCL 2.18, which newer ones know by its size and version.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    const MAGIC: u32 = 0xcafe_beef;
    const UNDEFINED: c_int = c_int::MIN;

    fn non_blocking() -> Self {
        Self {
            size: size_of::<Self>(),
            magic: Self::MAGIC,
            version: 21_800,
            blocking: 0,
            cga_cluster_size: Self::UNDEFINED,
            min_ctas: Self::UNDEFINED,
            max_ctas: Self::UNDEFINED,
            net_name: std::ptr::null(),
            split_share: Self::UNDEFINED,
        }
    }
}

type Raw = *mut c_void;

/// `RTLD_DEEPBIND` of glibc: calls within the library stay in it, where another NCCL, LibTorch's own, is there for all.
const OWN_FIRST: c_int = if cfg!(target_env = "gnu") { 8 } else { 0 };

/// What the loader says, which libloading has as the source of its own words.
fn words(cause: libloading::Error) -> String {
    std::error::Error::source(&cause).map_or_else(|| cause.to_string(), ToString::to_string)
}

/// The C library itself.
pub struct Loaded {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    get_last_error: unsafe extern "C" fn(Raw) -> *const c_char,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank_config: unsafe extern "C" fn(*mut Raw, c_int, UniqueId, c_int, *mut Config) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(Raw, *mut c_int) -> c_int,
    comm_abort: unsafe extern "C" fn(Raw) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Raw, Raw) -> c_int,
    recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Raw, Raw) -> c_int,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Raw, Raw) -> c_int,
}

impl Loaded {
    /// Loads the file, and finds all functions in it.
    ///
    /// # Errors
    /// The loader's words.
    pub fn open(path: &Path) -> Result<Self, String> {
        // SAFETY: NCCL's own library, as the caller names it; its initialisers start nothing.
        let library =
            unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL | OWN_FIRST) }.map_err(words)?;
        macro_rules! symbol {
            ($name:literal) => {{
                // SAFETY: the type of the field that it goes to is that of the function in nccl.h.
                let found = unsafe { library.get(concat!($name, "\0").as_bytes()) };
                *found.map_err(words)?
            }};
        }
        let loaded = Self {
            get_version: symbol!("ncclGetVersion"),
            get_error_string: symbol!("ncclGetErrorString"),
            get_last_error: symbol!("ncclGetLastError"),
            get_unique_id: symbol!("ncclGetUniqueId"),
            comm_init_rank_config: symbol!("ncclCommInitRankConfig"),
            comm_get_async_error: symbol!("ncclCommGetAsyncError"),
            comm_abort: symbol!("ncclCommAbort"),
            group_start: symbol!("ncclGroupStart"),
            group_end: symbol!("ncclGroupEnd"),
            send: symbol!("ncclSend"),
            recv: symbol!("ncclRecv"),
            all_reduce: symbol!("ncclAllReduce"),
        };
        // Never closed: threads of its own may run as long as the process does.
        std::mem::forget(library);
        Ok(loaded)
    }
}

// SAFETY (of all blocks below): functions of nccl.h with arguments as it has them; outputs are places of ours that live for
// the call. What callers owe is said at the trait.
impl Symbols for Loaded {
    fn version(&self) -> (i32, i32) {
        let mut version = 0;
        // SAFETY: as above.
        (unsafe { (self.get_version)(&raw mut version) }, version)
    }

    fn text(&self, code: i32, comm: Option<Comm>) -> String {
        // SAFETY: both return static strings or ones that stay until the next error.
        let string = |text: *const c_char| match text.is_null() {
            true => String::new(),
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned(),
        };
        // SAFETY: as above.
        let of_code = string(unsafe { (self.get_error_string)(code) });
        // SAFETY: as above; NULL asks for the last error of any.
        let last =
            string(unsafe { (self.get_last_error)(comm.map_or(std::ptr::null_mut(), |comm| comm.0 as Raw)) });
        if last.is_empty() { of_code } else { format!("{of_code}: {last}") }
    }

    fn unique_id(&self) -> (i32, UniqueId) {
        let mut id = UniqueId([0; 128]);
        // SAFETY: as above.
        (unsafe { (self.get_unique_id)(&raw mut id) }, id)
    }

    fn init_rank(&self, ranks: i32, id: &UniqueId, rank: i32) -> (i32, Comm) {
        let (mut comm, mut config) = (std::ptr::null_mut(), Config::non_blocking());
        // SAFETY: as above; the config is copied during the call.
        let code = unsafe { (self.comm_init_rank_config)(&raw mut comm, ranks, *id, rank, &raw mut config) };
        (code, Comm(comm as usize))
    }

    unsafe fn async_error(&self, comm: Comm) -> (i32, i32) {
        let mut state = 0;
        // SAFETY: as above.
        (unsafe { (self.comm_get_async_error)(comm.0 as Raw, &raw mut state) }, state)
    }

    unsafe fn abort(&self, comm: Comm) -> i32 {
        // SAFETY: as above.
        unsafe { (self.comm_abort)(comm.0 as Raw) }
    }

    fn group_start(&self) -> i32 {
        // SAFETY: as above.
        unsafe { (self.group_start)() }
    }

    fn group_end(&self) -> i32 {
        // SAFETY: as above.
        unsafe { (self.group_end)() }
    }

    unsafe fn send(&self, from: usize, count: usize, kind: i32, peer: i32, comm: Comm, stream: usize) -> i32 {
        // SAFETY: as above.
        unsafe { (self.send)(from as *const c_void, count, kind, peer, comm.0 as Raw, stream as Raw) }
    }

    unsafe fn recv(&self, to: usize, count: usize, kind: i32, peer: i32, comm: Comm, stream: usize) -> i32 {
        // SAFETY: as above.
        unsafe { (self.recv)(to as *mut c_void, count, kind, peer, comm.0 as Raw, stream as Raw) }
    }

    unsafe fn all_reduce(
        &self,
        from: usize,
        to: usize,
        count: usize,
        kind: i32,
        comm: Comm,
        stream: usize,
    ) -> i32 {
        let (from, to) = (from as *const c_void, to as *mut c_void);
        // SAFETY: as above.
        unsafe { (self.all_reduce)(from, to, count, kind, SUM, comm.0 as Raw, stream as Raw) }
    }
}

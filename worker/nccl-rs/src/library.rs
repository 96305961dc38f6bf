//! One NCCL, and whether it is fit.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::symbols::{Loaded, Symbols, UniqueId, code};
use crate::{Error, Result};

/// Version of an NCCL, as `ncclGetVersion` tells it: 22809 is 2.28.9.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub i32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0 / 10_000, self.0 / 100 % 100, self.0 % 100)
    }
}

/// First version that several ranks may share a GPU with (`NCCL_MULTI_RANK_GPU_ENABLE=1`).
const SHARED_GPU: Version = Version(23_000);

impl Version {
    /// Whether it may be used.
    ///
    /// # Errors
    /// [`Error::Version`] for those that lack what is needed, or are known to hang.
    pub fn check(self) -> Result<()> {
        let refuse = |fact, remedy| Err(Error::Version { version: self, fact, remedy });
        match self.0 {
            // The abort of several communicators in one group is of 2.22 (nccl#1013, pytorch#150690); before 2.19.1 an abort
            // from another thread hangs besides (nccl#992).
            ..22_200 => {
                refuse("before 2.22 several communicators cannot be aborted together", "2.28 or newer")
            }
            // pytorch#149153: gone in 2.26.2.
            22_500..22_602 => refuse("in 2.25 and 2.26.0 ncclCommAbort hangs", "2.28 or newer"),
            30_000.. => refuse("another major version has another ABI", "2.28 or a later 2.x"),
            _ => Ok(()),
        }
    }

    /// Whether several ranks may share one GPU.
    pub fn shares_gpus(self) -> bool {
        self >= SHARED_GPU
    }
}

/// One NCCL. Clones are the same one.
#[derive(Clone)]
pub struct Library {
    pub(crate) symbols: Arc<dyn Symbols>,
    version: Version,
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library").field("version", &self.version).finish_non_exhaustive()
    }
}

impl Library {
    /// Loads `path`, a `libnccl.so.2`, and checks its version.
    ///
    /// # Errors
    /// [`Error::Library`], [`Error::Version`].
    pub fn load(path: &Path) -> Result<Self> {
        let loaded = Loaded::open(path);
        let loaded = loaded.map_err(|cause| Error::Library { path: path.display().to_string(), cause })?;
        Self::of(Arc::new(loaded))
    }

    /// What stands behind `symbols`.
    ///
    /// # Errors
    /// [`Error::Version`]; [`Error::Call`] when it does not tell its version.
    pub fn of(symbols: Arc<dyn Symbols>) -> Result<Self> {
        let (status, version) = symbols.version();
        let library = Self { symbols, version: Version(version) };
        library.checked("ncclGetVersion", status)?;
        library.version.check()?;
        Ok(library)
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// A new id: one rank makes it and gives it to all.
    ///
    /// # Errors
    /// [`Error::Call`], when no network interface can be had.
    pub fn unique_id(&self) -> Result<UniqueId> {
        let (status, id) = self.symbols.unique_id();
        self.checked("ncclGetUniqueId", status).map(|()| id)
    }

    /// A result of a call that may have begun what it does, and no more.
    pub(crate) fn checked(&self, call: &'static str, status: i32) -> Result<()> {
        match status {
            code::SUCCESS | code::IN_PROGRESS => Ok(()),
            code => Err(Error::Call { call, code, text: self.symbols.text(code, None) }),
        }
    }
}

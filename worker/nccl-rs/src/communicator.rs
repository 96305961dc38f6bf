//! A communicator that never blocks.
#![allow(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::symbols::{Comm, UniqueId, code, kind};
use crate::{Error, Library, Result, Watchdog};

/// Pause between two looks at a communicator that is at work.
const POLL: Duration = Duration::from_micros(50);

/// What the owner and the watchdog share.
pub(crate) struct Inner {
    pub library: Library,
    /// Taken by whoever aborts it.
    life: Mutex<Option<Comm>>,
    reason: OnceLock<String>,
}

impl Inner {
    pub fn life(&self) -> MutexGuard<'_, Option<Comm>> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on every use is refused for `reason`; the first one counts.
    pub fn mark(&self, reason: &str) {
        let _ = self.reason.set(reason.to_owned());
    }

    /// Runs `work` on the communicator, unless it is aborted. `work` does not wait.
    fn with<T>(&self, work: impl FnOnce(Comm) -> Result<T>) -> Result<T> {
        let life = self.life();
        match (self.reason.get(), *life) {
            (None, Some(comm)) => work(comm),
            (reason, _) => {
                Err(Error::Aborted { reason: reason.cloned().unwrap_or_else(|| "gone".to_owned()) })
            }
        }
    }

    fn state(&self) -> Result<State> {
        self.with(|comm| {
            // SAFETY: it lives: it is taken under the lock that is held.
            let (status, state) = unsafe { self.library.symbols.async_error(comm) };
            match (status, state) {
                (code::SUCCESS | code::IN_PROGRESS, code::SUCCESS) => Ok(State::Ready),
                (code::SUCCESS | code::IN_PROGRESS, code::IN_PROGRESS) => Ok(State::AtWork),
                (code::SUCCESS | code::IN_PROGRESS, code) | (code, _) => {
                    Err(Error::Broken { code, text: self.library.symbols.text(code, Some(comm)) })
                }
            }
        })
    }
}

/// How a communicator is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The last call is through. What it put into a stream may still run.
    Ready,
    /// The last call is not through: of those here all but [`Communicator::state`] wait for that.
    AtWork,
}

/// How to wait for peers while a communicator is made.
pub struct InitOptions<'a> {
    /// Time to meet.
    pub deadline: Duration,
    /// Asked again and again; a reason ends the wait.
    pub stop: &'a dyn Fn() -> Option<String>,
}

/// Device memory that is sent or received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    address: usize,
    kind: i32,
    elements: usize,
}

impl Buffer {
    /// `elements` fp32 at `address` of the communicator's device.
    ///
    /// # Safety
    /// The memory is there, and nobody else uses it, from the call that takes the buffer until the stream of that call is
    /// past it or the communicator is aborted.
    pub unsafe fn floats(address: usize, elements: usize) -> Self {
        Self { address, kind: kind::FLOAT32, elements }
    }

    /// `bytes` bytes at `address`.
    ///
    /// # Safety
    /// As [`Buffer::floats`].
    pub unsafe fn bytes(address: usize, bytes: usize) -> Self {
        Self { address, kind: kind::UINT8, elements: bytes }
    }
}

/// One rank of a communicator, on the device that was the calling thread's when it was made.
pub struct Communicator {
    inner: Arc<Inner>,
    watchdog: Watchdog,
    rank: u32,
    ranks: u32,
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let aborted = self.inner.reason.get();
        f.debug_struct("Communicator")
            .field("rank", &self.rank)
            .field("ranks", &self.ranks)
            .field("aborted", &aborted)
            .finish()
    }
}

impl Communicator {
    /// Meets the other `ranks` of `id` as `rank`. [`Watchdog::abort_all`] ends the wait too.
    ///
    /// # Errors
    /// [`Error::Deadline`] when not all came in time, [`Error::Aborted`], [`Error::Call`] and [`Error::Broken`] by what NCCL
    /// says.
    pub fn meet(
        library: &Library,
        watchdog: &Watchdog,
        id: &UniqueId,
        ranks: u32,
        rank: u32,
        options: &InitOptions<'_>,
    ) -> Result<Self> {
        if rank >= ranks {
            return Err(Error::Usage(format!("rank {rank} of {ranks} ranks")));
        }
        let began = Instant::now();
        let (status, comm) = library.symbols.init_rank(ranks as i32, id, rank as i32);
        library.checked("ncclCommInitRankConfig", status)?;
        let inner = Inner { library: library.clone(), life: Mutex::new(Some(comm)), reason: OnceLock::new() };
        let inner = Arc::new(inner);
        // Known before it waits; and dropped, so aborted, on every way out of here that is no success.
        watchdog.watch(&inner);
        let made = Self { inner, watchdog: watchdog.clone(), rank, ranks };
        loop {
            if made.state()? == State::Ready {
                return Ok(made);
            }
            if let Some(reason) = (options.stop)() {
                return Err(Error::Aborted { reason });
            }
            if began.elapsed() >= options.deadline {
                let ms = options.deadline.as_millis() as u64;
                return Err(Error::Deadline { what: "meeting all ranks", ms });
            }
            std::thread::sleep(POLL);
        }
    }

    /// Our rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Number of ranks.
    pub fn ranks(&self) -> u32 {
        self.ranks
    }

    /// How it is. Never waits.
    ///
    /// # Errors
    /// [`Error::Broken`], [`Error::Aborted`].
    pub fn state(&self) -> Result<State> {
        self.inner.state()
    }

    /// Puts the sends and receives that `calls` makes into `stream` (a `cudaStream_t`) as one operation: none waits for
    /// another, whatever their order. Returns once NCCL has taken them; a stop of `stop` ends a wait for that.
    ///
    /// # Errors
    /// Those of `calls`; [`Error::Call`], [`Error::Broken`], [`Error::Aborted`].
    ///
    /// # Panics
    /// When `calls` does; the group is ended then too.
    pub fn group(
        &self,
        stream: usize,
        stop: &dyn Fn() -> Option<String>,
        calls: impl FnOnce(&mut Group<'_>) -> Result<()>,
    ) -> Result<()> {
        struct Open<'a>(&'a Library);
        impl Drop for Open<'_> {
            fn drop(&mut self) {
                // On the way of a panic; what was called so far is begun, and the communicator of no use any more.
                self.0.symbols.group_end();
            }
        }
        let library = &self.inner.library;
        self.inner.with(|comm| {
            library.checked("ncclGroupStart", library.symbols.group_start())?;
            let open = Open(library);
            let called = calls(&mut Group { of: self, comm, stream });
            std::mem::forget(open);
            let ended = library.checked("ncclGroupEnd", library.symbols.group_end());
            called.and(ended)
        })?;
        self.wait_for_call(stop)
    }

    /// NCCL's own sum of `from` over all ranks into `to`, for measurements: its order of additions depends on the ranks.
    ///
    /// # Errors
    /// As [`Communicator::group`].
    pub fn all_reduce(
        &self,
        from: Buffer,
        to: Buffer,
        stream: usize,
        stop: &dyn Fn() -> Option<String>,
    ) -> Result<()> {
        if (from.kind, from.elements) != (to.kind, to.elements) {
            return Err(Error::Usage(format!("{} elements into {}", from.elements, to.elements)));
        }
        self.inner.with(|comm| {
            let library = &self.inner.library;
            // SAFETY: the buffers' makers have said so; the communicator lives.
            let status = unsafe {
                library.symbols.all_reduce(from.address, to.address, from.elements, from.kind, comm, stream)
            };
            library.checked("ncclAllReduce", status)
        })?;
        self.wait_for_call(stop)
    }

    /// A communicator that does not block must not be called again before the last call is through.
    fn wait_for_call(&self, stop: &dyn Fn() -> Option<String>) -> Result<()> {
        while self.state()? == State::AtWork {
            if let Some(reason) = stop() {
                return Err(Error::Aborted { reason });
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.inner.mark("dropped");
        self.watchdog.dropped(self.inner.clone());
    }
}

/// Calls that become one operation.
#[derive(Debug)]
pub struct Group<'a> {
    of: &'a Communicator,
    comm: Comm,
    stream: usize,
}

impl Group<'_> {
    fn peer(&self, peer: u32) -> Result<i32> {
        match peer < self.of.ranks {
            true => Ok(peer as i32),
            false => Err(Error::Usage(format!("rank {peer} of {} ranks", self.of.ranks))),
        }
    }

    /// Sends to `peer`, which receives as many of the same kind.
    ///
    /// # Errors
    /// [`Error::Usage`], [`Error::Call`].
    pub fn send(&mut self, from: Buffer, peer: u32) -> Result<()> {
        let (peer, library) = (self.peer(peer)?, &self.of.inner.library);
        // SAFETY: the buffer's maker has said so; the communicator lives, since `group` holds its lock.
        let status = unsafe {
            library.symbols.send(from.address, from.elements, from.kind, peer, self.comm, self.stream)
        };
        library.checked("ncclSend", status)
    }

    /// Receives from `peer`.
    ///
    /// # Errors
    /// [`Error::Usage`], [`Error::Call`].
    pub fn recv(&mut self, to: Buffer, peer: u32) -> Result<()> {
        let (peer, library) = (self.peer(peer)?, &self.of.inner.library);
        // SAFETY: as in `send`.
        let status =
            unsafe { library.symbols.recv(to.address, to.elements, to.kind, peer, self.comm, self.stream) };
        library.checked("ncclRecv", status)
    }
}

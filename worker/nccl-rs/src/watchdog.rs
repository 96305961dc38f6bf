//! The thread that aborts.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::communicator::Inner;
use crate::{Error, Result};

/// What the thread is told.
enum Told {
    /// A new communicator.
    Watch(Weak<Inner>),
    /// One is no longer used.
    Dropped(Arc<Inner>),
    /// All are to be aborted.
    AbortAll(String),
    /// What was told before is done.
    Settled(Sender<()>),
}

/// A thread that aborts communicators, all together. One a process is enough; its handle is cloned freely.
///
/// ```text
/// abort_all ─▶ marks all: who polls returns at once ─▶ watchdog ─▶ "nccl-abort": group(abort, abort, …)
/// drop of one ───────────────────────────────────────────▶ │         done within `grace`?  no ─▶ on_stuck
/// ```
#[derive(Clone)]
pub struct Watchdog {
    tell: Sender<Told>,
    known: Arc<std::sync::Mutex<Vec<Weak<Inner>>>>,
}

impl std::fmt::Debug for Watchdog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watchdog")
    }
}

impl Watchdog {
    /// Starts the thread. An abort that takes longer than `grace` calls `on_stuck` with what is stuck.
    ///
    /// # Errors
    /// [`Error::Usage`] when the system gives no thread.
    pub fn start(grace: Duration, on_stuck: impl Fn(&str) + Send + 'static) -> Result<Self> {
        let (tell, told) = channel();
        let thread = std::thread::Builder::new().name("nccl-watchdog".to_owned());
        thread
            .spawn(move || watch(&told, grace, &on_stuck))
            .map_err(|cause| Error::Usage(format!("no thread for the watchdog: {cause}")))?;
        Ok(Self { tell, known: Arc::default() })
    }

    /// The same where an abort that is stuck ends the process, with words on standard error.
    ///
    /// # Errors
    /// As [`Watchdog::start`].
    pub fn that_ends_the_process(grace: Duration) -> Result<Self> {
        Self::start(grace, |what| {
            eprintln!("error: {what}; the process ends, since its GPU cannot be had back otherwise");
            std::process::abort();
        })
    }

    /// Aborts all communicators that were made with this watchdog, for `reason`. Returns at once; whoever polls one of them
    /// gets [`Error::Aborted`] from now on, and the device is free a little later.
    pub fn abort_all(&self, reason: impl Into<String>) {
        let reason = reason.into();
        for inner in self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter() {
            if let Some(inner) = inner.upgrade() {
                inner.mark(&reason);
            }
        }
        let _ = self.tell.send(Told::AbortAll(reason));
    }

    /// Waits until all that was asked for so far is done; false when that takes longer than `patience`.
    pub fn settle(&self, patience: Duration) -> bool {
        let (done, wait) = channel();
        self.tell.send(Told::Settled(done)).is_ok() && wait.recv_timeout(patience).is_ok()
    }

    pub(crate) fn watch(&self, inner: &Arc<Inner>) {
        let mut known = self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        known.retain(|inner| inner.strong_count() > 0);
        known.push(Arc::downgrade(inner));
        let _ = self.tell.send(Told::Watch(Arc::downgrade(inner)));
    }

    pub(crate) fn dropped(&self, inner: Arc<Inner>) {
        // A watchdog that is gone leaves it to the end of the process: nothing is freed under a kernel that runs.
        let _ = self.tell.send(Told::Dropped(inner));
    }
}

fn watch(told: &Receiver<Told>, grace: Duration, on_stuck: &dyn Fn(&str)) {
    let mut known: Vec<Weak<Inner>> = Vec::new();
    for told in told {
        match told {
            Told::Watch(inner) => {
                known.retain(|inner| inner.strong_count() > 0);
                known.push(inner);
            }
            Told::Dropped(inner) => {
                inner.mark("dropped");
                abort(vec![inner], grace, on_stuck);
            }
            Told::AbortAll(reason) => {
                let all: Vec<Arc<Inner>> = known.drain(..).filter_map(|inner| inner.upgrade()).collect();
                all.iter().for_each(|inner| inner.mark(&reason));
                abort(all, grace, on_stuck);
            }
            Told::Settled(done) => drop(done.send(())),
        }
    }
}

/// Aborts those that are not yet, on a thread of its own, within one group.
fn abort(all: Vec<Arc<Inner>>, grace: Duration, on_stuck: &dyn Fn(&str)) {
    let Some(first) = all.first() else { return };
    let symbols = first.library.symbols.clone();
    let count = all.len();
    let (done, wait) = sync_channel(1);
    let work = move || {
        // Nobody calls into one whose lock is held, and nobody waits in a call while holding it.
        let mut lives: Vec<_> = all.iter().map(|inner| inner.life()).collect();
        if lives.iter().any(|life| life.is_some()) {
            symbols.group_start();
            for life in &mut lives {
                if let Some(comm) = life.take() {
                    // SAFETY: a live communicator, which its owner has no more: it is taken out under the lock.
                    #[allow(unsafe_code)]
                    unsafe {
                        symbols.abort(comm)
                    };
                }
            }
            symbols.group_end();
        }
        drop(lives);
        let _ = done.send(());
    };
    let started = std::thread::Builder::new().name("nccl-abort".to_owned()).spawn(work);
    let stuck = match started.map(|_| wait.recv_timeout(grace)) {
        Ok(Ok(())) => return,
        Ok(Err(RecvTimeoutError::Timeout)) => {
            format!("the abort of {count} communicators of NCCL takes longer than {} ms", grace.as_millis())
        }
        Ok(Err(RecvTimeoutError::Disconnected)) => {
            format!("the abort of {count} communicators of NCCL panicked")
        }
        Err(cause) => format!("there is no thread to abort {count} communicators of NCCL: {cause}"),
    };
    on_stuck(&stuck);
}

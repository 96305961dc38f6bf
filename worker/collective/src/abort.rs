//! Ending a blocked operation from another thread.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

type Waker = Box<dyn Fn() + Send + Sync>;

/// Makes every blocked and every later call of the collectives that hold it return [`Error::Aborted`].
///
/// Made by whoever may have to abort (the thread that hears the coordinator), cloned freely. It ends a rendezvous too,
/// and cannot be taken back: a new generation gets a new one.
///
/// [`Error::Aborted`]: crate::Error::Aborted
#[derive(Clone, Default)]
pub struct AbortHandle {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    reason: OnceLock<String>,
    wakers: Mutex<Vec<Waker>>,
}

impl AbortHandle {
    /// A handle that nobody has used yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Aborts for `reason`. Returns at once; only the first reason counts.
    pub fn abort(&self, reason: impl Into<String>) {
        if self.inner.reason.set(reason.into()).is_ok() {
            for wake in self.inner.wakers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                wake();
            }
        }
    }

    /// The reason given, when it was used.
    pub fn reason(&self) -> Option<&str> {
        self.inner.reason.get().map(String::as_str)
    }

    /// Calls `wake` when the handle is used; at once when it was. `wake` must not keep what it wakes alive.
    pub(crate) fn on_abort(&self, wake: impl Fn() + Send + Sync + 'static) {
        let mut wakers = self.inner.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        if self.reason().is_some() {
            wake();
        }
        wakers.push(Box::new(wake));
    }

    pub(crate) fn check(&self) -> crate::Result<()> {
        match self.reason() {
            Some(reason) => Err(crate::Error::Aborted { reason: reason.to_owned() }),
            None => Ok(()),
        }
    }
}

impl std::fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AbortHandle").field("reason", &self.reason()).finish_non_exhaustive()
    }
}

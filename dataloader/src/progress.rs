use std::ops::ControlFlow;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::{Error, Result};

/// How far a tool is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Units of work done (bytes of text, or shards: each tool says which).
    pub done: u64,
    /// All of them.
    pub total: u64,
    /// Tokens that went through.
    pub tokens: u64,
}

/// Called from the tool's threads, one call at a time; `Break` makes the tool stop with [`Error::Stopped`] soon.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) -> ControlFlow<()> + Sync);

/// Adds up progress over threads.
pub(crate) struct Meter<'a> {
    state: Mutex<Progress>,
    report: OnProgress<'a>,
}

impl<'a> Meter<'a> {
    pub(crate) fn new(total: u64, report: OnProgress<'a>) -> Self {
        Self { state: Mutex::new(Progress { total, ..Progress::default() }), report }
    }

    pub(crate) fn add(&self, done: u64, tokens: u64) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        state.done += done;
        state.tokens += tokens;
        match (self.report)(*state) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Stopped),
        }
    }
}

/// `work(0..count)` on `threads` threads: the results in order, or the error of the lowest index that failed.
///
/// Indices are handed out in order, and none after an error; those already begun are finished.
pub(crate) fn parallel<T: Send>(
    threads: usize,
    count: usize,
    work: impl Fn(usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(count)));
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, count.max(1)) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        return;
                    }
                    let result = work(index);
                    if result.is_err() {
                        next.store(count, Ordering::Relaxed);
                    }
                    results.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push((index, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

//! The same work on many things at a time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Result;

/// Threads that hash, write and read parts: more would wait for one another's disk or network.
const THREADS: usize = 4;

/// What `work` makes of each item (and its place), in order, on at most `most` threads, which take the items in order. After
/// an error no further item is begun; of several errors it is that of the first item.
pub(super) fn each<T: Send, R: Send>(
    most: usize,
    items: Vec<T>,
    work: impl Fn(usize, T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    // However few the cores: some wait for the store while others compute.
    let threads = THREADS.min(most).min(items.len());
    if threads <= 1 {
        return items.into_iter().enumerate().map(|(at, item)| work(at, item)).collect();
    }
    let waiting = Mutex::new(items.into_iter().enumerate());
    let (done, failed) = (Mutex::new(Vec::new()), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let next = waiting.lock().expect("no holder panics").next();
                    let Some((at, item)) = next else { break };
                    let result = work(at, item);
                    failed.fetch_or(result.is_err(), Ordering::Relaxed);
                    done.lock().expect("no holder panics").push((at, result));
                }
            });
        }
    });
    let mut done = done.into_inner().expect("no holder panics");
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

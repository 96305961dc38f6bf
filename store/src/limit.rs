//! A limit on the bytes a second that go to or come from a store.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What one direction may carry. Whoever wants to move bytes waits for its turn: turns are handed out in the order of
/// asking, each as long as its bytes take at the limit, so that over any time no more goes than that and one turn's bytes.
#[derive(Debug)]
pub(crate) struct Limit {
    bytes_per_s: u64,
    /// When the last turn that was handed out ends.
    free_at: Mutex<Option<Instant>>,
}

/// Both directions of a store.
#[derive(Debug)]
pub(crate) struct Limits {
    pub read: Limit,
    pub write: Limit,
}

impl Limits {
    /// So many bytes a second (at least 1) each way.
    pub fn new(bytes_per_s: u64) -> Self {
        let limit = || Limit { bytes_per_s: bytes_per_s.max(1), free_at: Mutex::default() };
        Self { read: limit(), write: limit() }
    }
}

impl Limit {
    /// Waits until `bytes` more may be moved. Cancelled, its turn is lost.
    pub async fn wait(&self, bytes: usize) {
        let now = Instant::now();
        let begins = self.turn(now, bytes as u64);
        tokio::time::sleep(begins.saturating_duration_since(now)).await;
    }

    /// When a turn for `bytes` begins that is asked for at `now`.
    fn turn(&self, now: Instant, bytes: u64) -> Instant {
        let mut free_at = self.free_at.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let begins = free_at.map_or(now, |free_at| free_at.max(now));
        *free_at = Some(begins + Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64));
        begins
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_follow_one_another_as_long_as_their_bytes_take() {
        let Limits { read, write } = Limits::new(1000);
        let now = Instant::now();
        let at = |seconds: f64| now + Duration::from_secs_f64(seconds);
        assert_eq!(read.turn(now, 500), now, "what was not used yet is there at once");
        assert_eq!(read.turn(now, 2000), at(0.5));
        assert_eq!(read.turn(at(1.0), 10), at(2.5));
        assert_eq!(write.turn(now, 1), now, "each way has its own");
        // What was not used is not saved up.
        assert_eq!(read.turn(at(9.0), 1000), at(9.0));
        assert_eq!(read.turn(at(9.0), 1), at(10.0));
    }
}

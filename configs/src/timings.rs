//! Every time-out of the ring, from one number: how long a silent fault may go unseen.

use std::time::Duration;

/// The ring's times. A closed connection needs none of them.
///
/// ```text
/// heartbeat = detection / 5    a worker speaks at least so often, so that four words may be late or lost
/// lease     = detection        a worker that was silent for so long is taken for dead
/// watch     = detection / 2    a coordinator looks so often whether another has the job
/// gather    = detection        the first generation waits so long for all the workers that are wanted
/// silence   = detection        a worker says of a peer that it cannot be reached when nothing came back for so long (1 s at least)
/// grace     = 2 · detection    a worker that is told to go has so long before it is killed: a step's rest and a hand-over
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timings {
    /// Longest time between two words of a worker.
    pub heartbeat: Duration,
    /// Silence after which a worker is taken for dead.
    pub lease: Duration,
    /// Time between two looks at the log by a coordinator that has nothing to write.
    pub watch: Duration,
    /// Time that the first generation waits for latecomers.
    pub gather: Duration,
    /// Silence between the machines of two workers after which they say that they cannot reach one another.
    pub silence: Duration,
    /// Time to go before being killed.
    pub grace: Duration,
}

impl Timings {
    /// All times for a fault that may go unseen for `detection`: at least 100 ms, for below that a busy machine is taken
    /// for a dead one.
    pub fn new(detection: Duration) -> Self {
        let detection = detection.max(Duration::from_millis(100));
        Self {
            heartbeat: detection / 5,
            lease: detection,
            watch: detection / 2,
            gather: detection,
            // The kernel, which measures it, counts in seconds.
            silence: detection.max(Duration::from_secs(1)),
            grace: detection * 2,
        }
    }
}

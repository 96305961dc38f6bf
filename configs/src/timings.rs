//! Every time-out of the ring, from one number: how long a silent fault may go unseen.

use std::time::Duration;

use crate::run::RunConfig;

/// The ring's times. A closed connection needs none of them.
///
/// ```text
/// heartbeat = detection / 5    a worker speaks at least so often, so that four words may be late or lost
/// lease     = detection        a worker that was silent for so long is taken for dead
/// watch     = detection / 2    a coordinator looks so often whether another has the job
/// gather    = detection        the first generation waits so long for all the workers that are wanted
/// silence   = detection        a worker says of a peer that it cannot be reached when nothing came back for so long (1 s at least)
/// poll      = silence / 8      a worker looks so often at what the kernel knows of its peers (1 s at most)
/// connect   = silence          one attempt of a worker to reach the coordinator takes no longer, and a connection is given up
///                              on which nothing is acknowledged for so long (5 s at most)
/// retry     = heartbeat        its pause before the next attempt, at most (2 s at most)
/// grace     = 2 · detection    a worker that is told to go has so long before it is killed: a step's rest and a hand-over
/// ```
///
/// What bounds a single call of somebody else is no part of it, since no fault of a worker waits for it: a TLS handshake and the first
/// word over a connection (5 s and 10 s), the calls of a user's command (5 s to connect, 60 s for an answer), requests of the
/// object store.
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
    /// Time between two looks of a worker at what is not acknowledged.
    pub poll: Duration,
    /// For one attempt of a worker to reach the coordinator, and for an acknowledgement by its machine.
    pub connect: Duration,
    /// Longest pause between two such attempts.
    pub retry: Duration,
    /// Time to go before being killed.
    pub grace: Duration,
}

impl Timings {
    /// All times for a fault that may go unseen for `detection`: at least 100 ms, for below that a busy machine is taken
    /// for a dead one.
    pub fn new(detection: Duration) -> Self {
        let detection = detection.max(Duration::from_millis(100));
        // The kernel, which measures it, counts in seconds.
        let silence = detection.max(Duration::from_secs(1));
        let heartbeat = detection / 5;
        Self {
            heartbeat,
            lease: detection,
            watch: detection / 2,
            gather: detection,
            silence,
            poll: (silence / 8).min(Duration::from_secs(1)),
            connect: Self::connect_within(silence),
            retry: Self::retry_within(heartbeat),
            grace: detection * 2,
        }
    }

    /// `connect` of a worker, which is told `silence`.
    pub fn connect_within(silence: Duration) -> Duration {
        silence.min(Duration::from_secs(5))
    }

    /// `retry` of a worker, which is told `heartbeat`.
    pub fn retry_within(heartbeat: Duration) -> Duration {
        heartbeat.min(Duration::from_secs(2))
    }

    /// Those that a config asks for: `ring.detection`.
    pub fn of(config: &RunConfig) -> Self {
        Self::new(Duration::from_millis(config.ring.detection_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_times_follow_from_one() {
        for detection_ms in [100, 1_000, 10_000, 60_000] {
            let detection = Duration::from_millis(detection_ms);
            let times = Timings::new(detection);
            let Timings { heartbeat, lease, watch, gather, silence, poll, connect, retry, grace } = times;
            let must = [
                ("a silent worker is found in time", lease <= detection),
                ("and not much sooner than it may be", lease * 2 > detection),
                ("four words may be late", heartbeat * 4 < lease),
                ("nobody speaks without need", heartbeat * 10 >= lease),
                (
                    "a coordinator that was replaced knows it before its workers are given up",
                    watch * 2 <= lease,
                ),
                ("it does not ask the store without need", watch * 4 >= lease),
                ("the first ring waits for whoever has spoken", gather >= heartbeat * 2),
                ("and starts in time", gather <= lease),
                ("the kernel can measure it", silence >= Duration::from_secs(1)),
                ("a peer is not given up sooner than a worker", silence >= lease),
                ("nor later, where the kernel can", silence <= detection.max(Duration::from_secs(1))),
                ("what the kernel knows is seen in time", poll * 8 <= silence),
                ("and looked at seldom", poll >= Duration::from_millis(100)),
                ("no attempt outlasts what it is for", connect <= silence),
                ("an attempt has time for a handshake", connect >= Duration::from_secs(1)),
                ("a worker is back within its lease", retry * 4 < lease),
                ("a step's rest and a hand-over fit in", grace >= lease + heartbeat * 2),
                ("a worker that hangs does not hold its slot for long", grace <= detection * 3),
            ];
            for (what, holds) in must {
                assert!(holds, "{detection_ms} ms: {what}: {times:?}");
            }
        }
        // None of those that the lease is made of is a constant.
        let (one, ten) = (Timings::new(Duration::from_secs(1)), Timings::new(Duration::from_secs(10)));
        let of = |times: Timings| {
            let Timings { heartbeat, lease, watch, gather, silence, grace, .. } = times;
            [heartbeat, lease, watch, gather, silence, grace]
        };
        assert_eq!(of(one).map(|time| time * 10), of(ten));
        let least = Duration::from_millis(100);
        assert_eq!(Timings::new(Duration::ZERO), Timings::new(least), "below that it is not heard");
    }
}

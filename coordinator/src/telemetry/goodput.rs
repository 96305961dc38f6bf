//! Which share of the time trained the run. Pure.
//!
//! Of the wall clock of a job, what was inside steps that the run keeps is known to the second from their rows; what a
//! change of the ring took is in the log. What neither explains (the first ring, loading, a coordinator that was away) is
//! `other`.
//!
//! All of it is in the run folder: who takes a run up reads the log and the rows of the steps, and counts as if it had been
//! there from the first record on.

use anello_store::events::{Event, Record};
use anello_store::metrics::StepRecord;

/// Why time trained nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Steps waited for data.
    Data,
    /// Steps waited for the copy of a checkpoint.
    Checkpoint,
    /// A ring was over and the next one did not train yet.
    Recovery,
    /// Steps that had been applied were computed again.
    Recomputed,
    /// The user had paused the job.
    Paused,
    /// The rest: the first ring, loading, and whatever nobody told of.
    Other,
}

impl Cause {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Data, Self::Checkpoint, Self::Recovery, Self::Recomputed, Self::Paused, Self::Other];

    /// Its name in labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Checkpoint => "checkpoint",
            Self::Recovery => "recovery",
            Self::Recomputed => "recomputed",
            Self::Paused => "paused",
            Self::Other => "other",
        }
    }
}

/// What steps took, in all: seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Times {
    steps: u64,
    step_s: f64,
    data_s: f64,
    checkpoint_s: f64,
}

impl Times {
    /// One step more.
    pub fn step(&mut self, row: &StepRecord) {
        let (step_s, data_s, checkpoint_s) = (row.seconds.step, row.seconds.data, row.seconds.checkpoint);
        if [step_s, data_s, checkpoint_s].iter().all(|seconds| seconds.is_finite()) {
            self.add(Self { steps: 1, step_s, data_s, checkpoint_s });
        }
    }

    fn add(&mut self, more: Self) {
        self.steps += more.steps;
        self.step_s += more.step_s;
        self.data_s += more.data_s;
        self.checkpoint_s += more.checkpoint_s;
    }
}

/// A sum over the life of a job. Seconds, but for the times of the log.
#[derive(Clone, Debug, PartialEq)]
pub struct Goodput {
    began_ms: u64,
    times: Times,
    recovery_s: f64,
    /// Steps that were computed again.
    again: u64,
    paused_s: f64,
    /// Since when it is paused, or over: the clock stands still.
    stands: Option<Stands>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Stands {
    since_ms: u64,
    paused: bool,
}

/// What became of the time.
#[derive(Clone, Debug, PartialEq)]
pub struct Shares {
    /// Seconds in all, pauses included.
    pub wall_s: f64,
    /// Seconds inside steps that the run keeps, without their waits for data and checkpoints.
    pub productive_s: f64,
    /// `productive_s` as a share of the time without pauses; 0 before there is any.
    pub goodput: f64,
    /// Seconds inside steps that the run keeps as a share of the same time.
    pub effective: f64,
    /// Seconds lost by cause, in the order of [`Cause::ALL`].
    pub lost: [(Cause, f64); 6],
}

impl Goodput {
    /// Counts from `began_ms` on, milliseconds since 1970.
    pub fn new(began_ms: u64) -> Self {
        Self { began_ms, times: Times::default(), recovery_s: 0.0, again: 0, paused_s: 0.0, stands: None }
    }

    /// A step that the run keeps. One is told once, however often it was computed, and in any order.
    pub fn step(&mut self, row: &StepRecord) {
        self.times.step(row);
    }

    /// The steps that `times` are of, as [`Self::step`] of each.
    pub fn steps(&mut self, times: Times) {
        self.times.add(times);
    }

    /// A record of the log, in its order.
    pub fn record(&mut self, record: &Record) {
        match &record.event {
            Event::Recovered { took_ms, again, .. } => {
                self.recovery_s += *took_ms as f64 / 1e3;
                self.again += again;
            }
            Event::Ended { outcome, .. } => self.stand(record.unix_ms, outcome == "paused"),
            Event::Stopped { .. } => self.stand(record.unix_ms, true),
            Event::Finished { .. } => self.stand(record.unix_ms, false),
            Event::Started { .. } | Event::TakenUp { .. } => {
                if let Some(Stands { since_ms, .. }) = self.stands.take() {
                    // Taken up again after an end that was not the user's is time that nobody trained, and `other`.
                    self.paused_s += seconds_between(since_ms, record.unix_ms);
                }
            }
            Event::PassedOver { .. }
            | Event::Broke { .. }
            | Event::Stage { .. }
            | Event::Skipped { .. }
            | Event::Spike { .. }
            | Event::Epoch { .. }
            | Event::SkippedData { .. }
            | Event::Checkpoint { .. }
            | Event::CheckpointFailed { .. }
            | Event::Goal { .. }
            | Event::Joined { .. }
            | Event::Lost { .. }
            | Event::Evicted { .. }
            | Event::Formed { .. }
            | Event::FellBack { .. }
            | Event::LeftOut { .. }
            | Event::Slow { .. }
            | Event::InStep { .. } => {}
        }
    }

    fn stand(&mut self, since_ms: u64, paused: bool) {
        // What ended stays ended: the first word counts.
        self.stands.get_or_insert(Stands { since_ms, paused });
    }

    /// How it is at `now_ms`.
    pub fn at(&self, now_ms: u64) -> Shares {
        let (end_ms, pause) = match self.stands {
            Some(Stands { since_ms, paused: true }) => {
                (now_ms.max(since_ms), seconds_between(since_ms, now_ms))
            }
            Some(Stands { since_ms, paused: false }) => (since_ms, 0.0),
            None => (now_ms, 0.0),
        };
        let paused = self.paused_s + pause;
        let wall_s = seconds_between(self.began_ms, end_ms);
        // A step that is computed again takes as long as one does.
        let recomputed_s = match self.times.steps {
            0 => 0.0,
            steps => self.again as f64 * self.times.step_s / steps as f64,
        };
        let productive_s = (self.times.step_s - self.times.data_s - self.times.checkpoint_s).max(0.0);
        let known = self.times.step_s + self.recovery_s + recomputed_s + paused;
        let other = (wall_s - known).max(0.0);
        // Clocks of several machines: more may be told of than has passed here.
        let whole = (wall_s - paused).max(known - paused);
        let share = |of: f64| if whole > 0.0 { of / whole } else { 0.0 };
        let lost = Cause::ALL.map(|cause| {
            let seconds = match cause {
                Cause::Data => self.times.data_s,
                Cause::Checkpoint => self.times.checkpoint_s,
                Cause::Recovery => self.recovery_s,
                Cause::Recomputed => recomputed_s,
                Cause::Paused => paused,
                Cause::Other => other,
            };
            (cause, seconds)
        });
        Shares {
            wall_s,
            productive_s,
            goodput: share(productive_s),
            effective: share(self.times.step_s),
            lost,
        }
    }
}

fn seconds_between(from_ms: u64, to_ms: u64) -> f64 {
    to_ms.saturating_sub(from_ms) as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use anello_store::metrics::Seconds;

    use super::*;
    use crate::telemetry::figures::tests::row;

    fn record(unix_ms: u64, event: Event) -> Record {
        Record { number: 1, unix_ms, event }
    }

    fn second(step: u64, data: f64, checkpoint: f64) -> StepRecord {
        StepRecord { seconds: Seconds { step: 1.0, data, checkpoint, ..Seconds::default() }, ..row(step) }
    }

    #[test]
    fn every_second_has_a_place() {
        let mut goodput = Goodput::new(1_000);
        assert_eq!(goodput.at(1_000).goodput, 0.0);
        // 2 s until the first step, then 10 steps of a second, a tenth waiting for data and a twentieth for a checkpoint.
        for step in 0..10 {
            goodput.step(&second(step, 0.1, 0.05));
        }
        let recovered =
            Event::Recovered { generation: 2, workers: 2, took_ms: 3_000, again: 2, checkpoint: None };
        goodput.record(&record(15_000, recovered));
        // Two steps again, then it is paused for 20 s.
        goodput.record(&record(18_000, Event::Ended { outcome: "paused".into(), reason: None }));
        let shares = goodput.at(38_000);
        assert_eq!(shares.wall_s, 37.0);
        let rounded = shares.lost.map(|(cause, seconds)| (cause.name(), (seconds * 100.0).round() / 100.0));
        let expected = [
            ("data", 1.0),
            ("checkpoint", 0.5),
            ("recovery", 3.0),
            ("recomputed", 2.0),
            ("paused", 20.0),
            ("other", 2.0),
        ];
        assert_eq!(rounded, expected);
        assert!((shares.productive_s - 8.5).abs() < 1e-9);
        assert!((shares.goodput - 8.5 / 17.0).abs() < 1e-9 && (shares.effective - 10.0 / 17.0).abs() < 1e-9);
        let parts: f64 = shares.lost.iter().map(|(_, seconds)| seconds).sum();
        assert!((parts + shares.productive_s - shares.wall_s).abs() < 1e-9);
        // It goes on; the pause stays what it was.
        goodput.record(&record(40_000, Event::TakenUp { step: Some(10) }));
        let later = goodput.at(41_000);
        assert_eq!((later.lost[4], later.wall_s), ((Cause::Paused, 22.0), 40.0));
    }

    /// Who takes a run up at any moment counts what one would have that was there all the time.
    #[test]
    fn it_does_not_matter_who_counts_nor_since_when() {
        let log = [
            (0, Event::TakenUp { step: None }),
            (
                9_000,
                Event::Recovered { generation: 2, workers: 1, took_ms: 1_500, again: 1, checkpoint: None },
            ),
            (12_000, Event::Ended { outcome: "paused".into(), reason: None }),
            (20_000, Event::TakenUp { step: Some(8) }),
            // This coordinator is killed; nobody writes down that it ended.
            (31_000, Event::TakenUp { step: Some(16) }),
            (
                33_000,
                Event::Recovered { generation: 5, workers: 2, took_ms: 500, again: 3, checkpoint: Some(16) },
            ),
            (40_000, Event::Ended { outcome: "completed".into(), reason: None }),
        ];
        let log = log.map(|(at, event)| record(at + 1_000, event));
        let rows: Vec<_> = (0..20).map(|step| second(step, 0.25, 0.125)).collect();
        let of_log = |log: &[Record]| {
            let mut goodput = Goodput::new(log[0].unix_ms);
            log.iter().for_each(|record| goodput.record(record));
            goodput
        };
        let mut all = of_log(&log);
        rows.iter().for_each(|row| all.step(row));
        for cut in 1..=log.len() {
            let mut later = of_log(&log[..cut]);
            let mut times = Times::default();
            rows[..cut].iter().for_each(|row| times.step(row));
            later.steps(times);
            log[cut..].iter().for_each(|record| later.record(record));
            rows[cut..].iter().for_each(|row| later.step(row));
            assert_eq!(later.at(90_000), all.at(90_000), "taken up after {cut} records");
        }
        let shares = all.at(90_000);
        assert_eq!((shares.wall_s, shares.effective), (40.0, 20.0 / 32.0));
        assert_eq!(shares.lost[4], (Cause::Paused, 8.0));
    }

    #[test]
    fn the_clock_of_what_is_over_stands_still() {
        let mut goodput = Goodput::new(0);
        goodput.step(&second(0, 0.0, 0.0));
        goodput.record(&record(2_000, Event::Ended { outcome: "completed".into(), reason: None }));
        assert_eq!(goodput.at(2_000), goodput.at(900_000));
        assert_eq!(goodput.at(900_000).goodput, 0.5);
    }
}

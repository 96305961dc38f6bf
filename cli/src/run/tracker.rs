//! Where a run is: a fold over its notices. Pure.

use std::collections::VecDeque;

use anello_configs::{RunConfig, Schedule};
use anello_store::Notice;
use anello_store::metrics::StepRecord;

/// Seconds of training over which the speed is averaged.
const SPEED_WINDOW_S: f64 = 20.0;

/// What is known of a run under way.
#[derive(Clone, Debug)]
pub struct Tracker {
    schedule: Schedule,
    /// Steps and tokens at which this process ends.
    until: (u64, u64),
    /// Whether the first step has begun.
    ready: bool,
    /// Steps done.
    pub step: u64,
    /// Index of the stage.
    pub stage: usize,
    /// The last step.
    pub last: Option<StepRecord>,
    /// How fast it is.
    pub speed: Speed,
}

impl Tracker {
    /// A run that has not begun, and ends after `until` steps or with its schedule.
    pub fn new(config: &RunConfig, until: Option<u64>) -> Self {
        let schedule = Schedule::new(config);
        let steps = until.map_or(schedule.total_steps(), |until| until.min(schedule.total_steps()));
        let tokens = schedule.at(steps).map_or(schedule.total_tokens(), |plan| plan.tokens_before);
        let until = (steps, tokens);
        Self { schedule, until, ready: false, step: 0, stage: 0, last: None, speed: Speed::default() }
    }

    /// Takes note.
    pub fn observe(&mut self, notice: &Notice) {
        match notice {
            Notice::Ready { step } => (self.ready, self.step) = (true, *step),
            Notice::Stage { index } => self.stage = *index,
            Notice::Step(record) => {
                self.step = record.step + 1;
                self.speed.push(record.batch_tokens, record.seconds.step);
                self.last = Some(record.clone());
            }
            Notice::Checkpoint { .. }
            | Notice::CheckpointFailed { .. }
            | Notice::Logged(_)
            | Notice::Refused(_) => {}
        }
    }

    /// Whether the first step has begun.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// The schedule.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The step at which this process ends.
    pub fn until_step(&self) -> u64 {
        self.until.0
    }

    /// Tokens done.
    pub fn tokens(&self) -> u64 {
        self.schedule.at(self.step).map_or(self.schedule.total_tokens(), |plan| plan.tokens_before)
    }

    /// Steps of the stage that are done, and all of them.
    pub fn stage_steps(&self) -> (u64, u64) {
        let span = self.schedule.stages().nth(self.stage).map(|(_, span)| span);
        span.map_or((0, 0), |span| (self.step.saturating_sub(span.first_step).min(span.steps), span.steps))
    }

    /// Name of the stage.
    pub fn stage_name(&self) -> &str {
        self.schedule.stages().nth(self.stage).map_or("", |(stage, _)| stage.name.as_str())
    }

    /// Seconds to the end of this process at the speed of late; absent before the first step.
    pub fn eta_s(&self) -> Option<f64> {
        let speed = self.speed.tokens_per_s()?;
        Some(self.until.1.saturating_sub(self.tokens()) as f64 / speed)
    }
}

/// A moving average of tokens a second, over the wall clock of the last steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Speed {
    steps: VecDeque<(u64, f64)>,
}

impl Speed {
    /// A step of so many tokens took so many seconds.
    pub fn push(&mut self, tokens: u64, seconds: f64) {
        self.steps.push_back((tokens, seconds));
        while self.steps.len() > 1 && self.seconds() - self.steps[0].1 >= SPEED_WINDOW_S {
            self.steps.pop_front();
        }
    }

    /// The speed, if there was a step.
    pub fn tokens_per_s(&self) -> Option<f64> {
        let tokens: u64 = self.steps.iter().map(|(tokens, _)| tokens).sum();
        (tokens > 0).then(|| tokens as f64 / self.seconds().max(1e-9))
    }

    fn seconds(&self) -> f64 {
        self.steps.iter().map(|(_, seconds)| seconds).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::{config_of, record_of};

    #[test]
    fn the_speed_forgets_what_is_long_ago() {
        let mut speed = Speed::default();
        assert_eq!(speed.tokens_per_s(), None);
        speed.push(100, 1.0);
        assert_eq!(speed.tokens_per_s(), Some(100.0));
        (0..100).for_each(|_| speed.push(1_000, 1.0));
        assert_eq!(speed.tokens_per_s(), Some(1_000.0));
        assert_eq!(speed.steps.len(), SPEED_WINDOW_S as usize);
        // One step longer than the window stands alone.
        speed.push(100, 50.0);
        assert_eq!(speed.tokens_per_s(), Some(2.0));
    }

    #[test]
    fn it_knows_where_the_run_is_and_when_it_ends() {
        let config = config_of();
        let mut tracker = Tracker::new(&config, Some(100));
        assert_eq!((tracker.eta_s(), tracker.until_step()), (None, 100));
        tracker.observe(&Notice::Ready { step: 40 });
        tracker.observe(&Notice::Stage { index: 1 });
        assert_eq!(
            (tracker.stage_name(), tracker.stage_steps(), tracker.tokens()),
            ("stable", (8, 384), 40 * 8192)
        );
        let mut record = record_of(49, "stable", 4);
        (record.batch_tokens, record.seconds.step) = (8192, 2.0);
        tracker.observe(&Notice::Step(record));
        assert_eq!((tracker.step, tracker.eta_s()), (50, Some(100.0)));
        assert_eq!(Tracker::new(&config, None).until_step(), 416);
        assert_eq!(Tracker::new(&config, Some(9_999)).until_step(), 416);
    }
}

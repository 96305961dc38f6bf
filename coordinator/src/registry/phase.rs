//! Where a job is in its life, from what its log says and how its ring is. Pure.

use anello_proto::jobs::Phase;
use anello_store::events::{Event, Record};

use crate::core::{Goal, Outcome, Status};
use crate::records::{goal_name, outcome_name};

/// What a job's log says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    /// What the user wants.
    pub goal: Goal,
    /// Workers that the user wants.
    pub desired: u32,
    /// How its last coordinator left it; absent: it did not say, or another has taken it up.
    pub outcome: Option<Outcome>,
}

impl Standing {
    /// A job that was just submitted.
    pub fn new(desired: u32) -> Self {
        Self { goal: Goal::Run, desired, outcome: None }
    }

    /// Takes note of a record. What is over stays over, whatever comes later.
    pub fn observe(&mut self, record: &Record) {
        if self.is_over() {
            return;
        }
        match &record.event {
            Event::Goal { goal, workers } => {
                let goals = [Goal::Run, Goal::Pause, Goal::Cancel];
                self.goal = goals.into_iter().find(|of| goal_name(*of) == goal).unwrap_or(self.goal);
                self.desired = *workers;
            }
            Event::TakenUp { .. } | Event::Started { .. } => self.outcome = None,
            Event::Ended { outcome, reason } => {
                let reason = reason.clone().unwrap_or_default();
                let outcomes =
                    [Outcome::Completed, Outcome::Paused, Outcome::Cancelled, Outcome::Failed { reason }];
                self.outcome = outcomes.into_iter().find(|of| outcome_name(of) == outcome);
            }
            Event::Finished { .. } => self.outcome = Some(Outcome::Completed),
            Event::PassedOver { .. }
            | Event::Broke { .. }
            | Event::Stage { .. }
            | Event::Skipped { .. }
            | Event::Spike { .. }
            | Event::Epoch { .. }
            | Event::SkippedData { .. }
            | Event::Checkpoint { .. }
            | Event::CheckpointFailed { .. }
            | Event::Joined { .. }
            | Event::Lost { .. }
            | Event::Evicted { .. }
            | Event::Formed { .. }
            | Event::Recovered { .. }
            | Event::FellBack { .. }
            | Event::LeftOut { .. }
            | Event::Slow { .. }
            | Event::InStep { .. }
            | Event::Stopped { .. } => {}
        }
    }

    /// Whether it never changes again.
    pub fn is_over(&self) -> bool {
        self.outcome.as_ref().and_then(terminal).is_some()
    }

    /// Whether a ring is to be kept for it: to train, or to come to the end that the user wants.
    pub fn wants_ring(&self) -> bool {
        match (&self.outcome, self.goal) {
            (Some(outcome), _) if terminal(outcome).is_some() => false,
            (Some(_), Goal::Pause) => false,
            (Some(_), Goal::Run | Goal::Cancel) | (None, _) => true,
        }
    }
}

fn terminal(outcome: &Outcome) -> Option<Phase> {
    match outcome {
        Outcome::Completed => Some(Phase::Completed),
        Outcome::Failed { .. } => Some(Phase::Failed),
        Outcome::Cancelled => Some(Phase::Cancelled),
        Outcome::Paused | Outcome::Fenced { .. } => None,
    }
}

/// The phase of a job; `ring`: how its ring is, when one is kept here.
pub(super) fn phase(standing: &Standing, ring: Option<&Status>) -> Phase {
    let outcome = ring.and_then(|status| status.outcome.as_ref()).or(standing.outcome.as_ref());
    match (outcome, standing.goal, ring) {
        (Some(outcome), goal, _) => match terminal(outcome) {
            Some(phase) => phase,
            None if goal == Goal::Pause => Phase::Paused,
            // Stopped with its coordinator, or asked to go on: it takes its turn.
            None if goal == Goal::Run => Phase::Queued,
            None => Phase::Pausing,
        },
        (None, Goal::Pause | Goal::Cancel, _) => Phase::Pausing,
        (None, Goal::Run, None) => Phase::Queued,
        (None, Goal::Run, Some(status)) if status.trains => Phase::Running,
        (None, Goal::Run, Some(status)) if status.has_trained => Phase::Recovering,
        (None, Goal::Run, Some(_)) => Phase::Forming,
    }
}

#[cfg(test)]
mod tests {
    use anello_proto::ring::Generation;

    use super::*;

    fn ring(trains: bool, has_trained: bool, outcome: Option<Outcome>) -> Option<Status> {
        Some(Status {
            generation: Generation(1),
            formation: None,
            trains,
            has_trained,
            workers: 0,
            attendants: Vec::new(),
            step: None,
            committed: None,
            waits_for: None,
            outcome,
            quarantined: Vec::new(),
        })
    }

    #[test]
    fn phases_follow_from_goal_ring_and_outcome() {
        use Goal::*;
        use Outcome::{Cancelled, Completed, Paused};
        let failed = || Outcome::Failed { reason: "disk".into() };
        let fenced = || Outcome::Fenced { by: "another".into() };
        let cases = [
            (Run, None, None, Phase::Queued),
            (Run, None, ring(false, false, None), Phase::Forming),
            (Run, None, ring(true, true, None), Phase::Running),
            (Run, None, ring(false, true, None), Phase::Recovering),
            (Pause, None, None, Phase::Pausing),
            (Pause, None, ring(true, true, None), Phase::Pausing),
            (Pause, None, ring(false, true, Some(Paused)), Phase::Paused),
            (Pause, None, ring(false, true, Some(Completed)), Phase::Completed),
            (Pause, Some(Paused), None, Phase::Paused),
            (Run, Some(Paused), None, Phase::Queued),
            (Run, None, ring(false, true, Some(Paused)), Phase::Queued),
            (Cancel, None, ring(true, true, None), Phase::Pausing),
            (Cancel, Some(Paused), None, Phase::Pausing),
            (Cancel, None, ring(false, true, Some(Cancelled)), Phase::Cancelled),
            (Cancel, Some(Cancelled), None, Phase::Cancelled),
            (Run, Some(Completed), None, Phase::Completed),
            (Run, Some(failed()), None, Phase::Failed),
            (Run, None, ring(false, true, Some(failed())), Phase::Failed),
            (Run, None, ring(true, true, Some(fenced())), Phase::Queued),
        ];
        for (goal, outcome, ring, expected) in cases {
            let standing = Standing { goal, desired: 1, outcome };
            assert_eq!(phase(&standing, ring.as_ref()), expected, "{standing:?} {ring:?}");
        }
    }

    #[test]
    fn the_log_says_what_is_wanted_and_what_is_over_stays_over() {
        let goal = |goal: &str, workers| Event::Goal { goal: goal.into(), workers };
        let ended = |outcome: &str| Event::Ended { outcome: outcome.into(), reason: None };
        let taken_up = || Event::TakenUp { step: None };
        let cases = [
            (vec![], (Goal::Run, 2, None), true),
            (vec![taken_up(), goal("pause", 2)], (Goal::Pause, 2, None), true),
            (vec![goal("pause", 2), ended("paused")], (Goal::Pause, 2, Some(Outcome::Paused)), false),
            (vec![ended("paused")], (Goal::Run, 2, Some(Outcome::Paused)), true),
            (
                vec![goal("pause", 2), ended("paused"), goal("run", 3)],
                (Goal::Run, 3, Some(Outcome::Paused)),
                true,
            ),
            (vec![ended("paused"), goal("run", 3), taken_up()], (Goal::Run, 3, None), true),
            (
                vec![goal("pause", 2), ended("paused"), goal("cancel", 2)],
                (Goal::Cancel, 2, Some(Outcome::Paused)),
                true,
            ),
            (
                vec![ended("cancelled"), goal("run", 9), taken_up()],
                (Goal::Run, 2, Some(Outcome::Cancelled)),
                false,
            ),
            (vec![ended("completed"), taken_up()], (Goal::Run, 2, Some(Outcome::Completed)), false),
        ];
        for (events, (goal, desired, outcome), wants_ring) in cases {
            let mut standing = Standing::new(2);
            for event in &events {
                standing.observe(&Record { number: 1, unix_ms: 0, event: event.clone() });
            }
            assert_eq!(standing, Standing { goal, desired, outcome }, "{events:?}");
            assert_eq!(standing.wants_ring(), wants_ring, "{events:?}");
        }
    }
}

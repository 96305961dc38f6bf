//! What must always be true of what a job tells, as predicates: whoever keeps a job counts each time that one is not. Those of
//! rings are the simulator's own ([`crate::core::invariants`]).

use anello_configs::Schedule;
use anello_store::metrics::StepRecord;

pub use crate::core::invariants::{checkpoint_after_its_steps, generations_rise, lanes_are_covered_once};

/// What must be true.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    /// A step is trained with the batch that the plan has for it: its tokens, and those of the run before it.
    BatchOfThePlan,
    /// The lanes of a generation's members are all lanes, each once.
    LanesCoveredOnce,
    /// Generations rise.
    GenerationsRise,
    /// A checkpoint does not stand after steps that nobody has told of.
    CheckpointAfterItsSteps,
}

impl Invariant {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::BatchOfThePlan, Self::LanesCoveredOnce, Self::GenerationsRise, Self::CheckpointAfterItsSteps];

    /// Its name in labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::BatchOfThePlan => "batch-of-the-plan",
            Self::LanesCoveredOnce => "lanes-covered-once",
            Self::GenerationsRise => "generations-rise",
            Self::CheckpointAfterItsSteps => "checkpoint-after-its-steps",
        }
    }
}

/// [`Invariant::BatchOfThePlan`].
pub fn batch_of_the_plan(schedule: &Schedule, row: &StepRecord) -> Result<(), String> {
    let is_so = schedule.at(row.step).is_some_and(|plan| {
        plan.batch_tokens == row.batch_tokens && plan.tokens_before + plan.batch_tokens == row.tokens
    });
    match is_so {
        true => Ok(()),
        false => Err(format!("step {} has {} tokens, {} with it", row.step, row.batch_tokens, row.tokens)),
    }
}

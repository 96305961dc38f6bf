//! What must always be true of what a job tells, as predicates: whoever keeps a job counts each time that one is not.

use anello_configs::Schedule;
use anello_store::metrics::StepRecord;

/// What must be true.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    /// A step is trained with the batch that the plan has for it: its tokens, and those of the run before it.
    BatchOfThePlan,
    /// Generations rise.
    GenerationsRise,
    /// A checkpoint does not stand after steps that nobody has told of.
    CheckpointAfterItsSteps,
}

impl Invariant {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::BatchOfThePlan, Self::GenerationsRise, Self::CheckpointAfterItsSteps];

    /// Its name in labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::BatchOfThePlan => "batch-of-the-plan",
            Self::GenerationsRise => "generations-rise",
            Self::CheckpointAfterItsSteps => "checkpoint-after-its-steps",
        }
    }
}

/// [`Invariant::BatchOfThePlan`].
pub fn batch_of_the_plan(schedule: &Schedule, row: &StepRecord) -> bool {
    schedule.at(row.step).is_some_and(|plan| {
        plan.batch_tokens == row.batch_tokens && plan.tokens_before + plan.batch_tokens == row.tokens
    })
}

/// [`Invariant::GenerationsRise`].
pub fn generations_rise(before: Option<u64>, formed: u64) -> bool {
    before.is_none_or(|before| before < formed)
}

/// [`Invariant::CheckpointAfterItsSteps`]: `told` is the newest step that was told of, as steps done.
pub fn checkpoint_after_its_steps(told: Option<u64>, checkpoint: u64) -> bool {
    told.is_none_or(|told| checkpoint <= told)
}

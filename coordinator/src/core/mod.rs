//! The decisions, as pure values: events in, effects out, time as an input.

mod checkpoints;
mod cut;
pub(crate) mod invariants;
mod membership;
mod paces;
mod rows;
#[cfg(test)]
mod simulation;

use std::fmt;
use std::ops::{Add, Div};
use std::sync::Arc;

use anello_proto::ring::{Endpoints, Formation, Generation, Order, Pace, Stance, Step, WorkerId, Written};

pub use membership::{Found, Membership};
pub use paces::Straggling;
pub(crate) use rows::{Look, Rows};

/// Milliseconds on the shell's monotonic clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub u64);

impl Millis {
    /// Time from `earlier` to here; 0 when it is later.
    pub fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
}

impl Add for Millis {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Div<u64> for Millis {
    type Output = Self;
    fn div(self, by: u64) -> Self {
        Self(self.0 / by)
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03} s", self.0 / 1000, self.0 % 1000)
    }
}

/// What a job asks of its ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Lanes of the run, a power of two.
    pub lanes: u32,
    /// Steps of the whole run.
    pub total: Step,
    /// Fewest workers that train; at least 1.
    pub min: u32,
    /// Workers that are wanted; those beyond it, and beyond `lanes`, stand by.
    pub desired: u32,
    /// A worker that is silent for so long is taken for dead.
    pub lease: Millis,
    /// How long the first generation waits for `desired` workers before it starts with `min`.
    pub gather: Millis,
    /// Failures of the same step that no death explains, before the job fails.
    pub faults_max: u32,
    /// When a member is slow.
    pub straggling: Straggling,
    /// Lanes are shared out by how fast members were, not evenly.
    pub by_speed: bool,
}

/// What the job's user wants of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Train to the end.
    Run,
    /// Take a checkpoint and stop.
    Pause,
    /// Stop now.
    Cancel,
}

/// How a job's ring ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are applied, and the checkpoint after the last is committed.
    Completed,
    /// Everything that was trained is in a checkpoint.
    Paused,
    /// Stopped on request.
    Cancelled,
    /// It cannot go on.
    Failed {
        /// Why, for people.
        reason: String,
    },
    /// Another coordinator has the job. This one says and writes nothing more.
    Fenced {
        /// What told it so.
        by: String,
    },
}

/// What happens to a membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time has passed.
    Tick,
    /// A worker has opened a connection: a new one, or one that was here before. Of two connections of one worker the one
    /// that it opened last counts; the shell drops the other.
    Linked {
        /// Who.
        worker: WorkerId,
        /// Where its peers reach it.
        endpoints: Endpoints,
        /// Where it runs.
        machine: String,
        /// Where it stands.
        stance: Stance,
    },
    /// Its connection is closed.
    Unlinked {
        /// Whose.
        worker: WorkerId,
    },
    /// A worker says where it stands; heartbeats are this too.
    Stands {
        /// Who.
        worker: WorkerId,
        /// Where.
        stance: Stance,
    },
    /// A worker cannot serve the run, and ends.
    Failed {
        /// Who.
        worker: WorkerId,
        /// Why, for people.
        reason: String,
    },
    /// A worker says where its time went.
    Paced {
        /// Who.
        worker: WorkerId,
        /// Where.
        pace: Pace,
    },
    /// A step's figures are here: whoever reports them has applied it.
    Reported {
        /// Steps applied.
        step: Step,
    },
    /// The job's log holds this generation now.
    Recorded {
        /// Which.
        generation: Generation,
    },
    /// A checkpoint's manifest is durable.
    Committed {
        /// Its step.
        step: Step,
    },
    /// A manifest could not be written.
    CommitFailed {
        /// Its step.
        step: Step,
        /// Why.
        reason: String,
    },
    /// A checkpoint whose parts are all there is not to be committed: the figures of steps before it are gone with all who knew
    /// them, and are to be trained again.
    Withdrawn {
        /// Its step.
        step: Step,
    },
    /// The checkpoints that exist.
    Listed {
        /// Their steps.
        steps: Vec<Step>,
    },
    /// The log refused this coordinator's record: another has taken the job. One that has nothing to write looks once a
    /// lease whether the log has grown without it, since workers may still be connected to it.
    Fenced {
        /// What told so.
        by: String,
    },
    /// Nobody is left to train, and nobody will come.
    GivenUp {
        /// Why, for people.
        reason: String,
    },
    /// The user wants something else.
    Goal(Goal),
    /// The user wants another number of workers.
    Desired(u32),
    /// The user wants all that is trained now in a checkpoint.
    CheckpointWanted,
}

/// What a membership wants done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Tell a worker.
    Send {
        /// Whom.
        worker: WorkerId,
        /// By this coordinator's right.
        epoch: anello_proto::ring::Epoch,
        /// What.
        order: Order,
    },
    /// Close a worker's connection.
    Drop {
        /// Whose.
        worker: WorkerId,
        /// Why, for people.
        reason: String,
    },
    /// Append to the job's log. For [`Entry::Formed`], [`Event::Recorded`] is owed.
    Record(Entry),
    /// List the checkpoints that exist: others may have written some. [`Event::Listed`] is owed.
    List,
    /// Write a checkpoint's manifest; [`Event::Committed`], [`Event::CommitFailed`] or [`Event::Withdrawn`] is owed.
    Commit {
        /// The checkpoint's step.
        step: Step,
        /// Its generation.
        generation: Generation,
        /// What every writer wrote, in rank order.
        parts: Vec<Written>,
    },
}

/// A record in the job's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A worker reported in for the first time.
    Joined {
        /// Who.
        worker: WorkerId,
        /// Where it runs.
        machine: String,
    },
    /// A worker is gone.
    Lost {
        /// Who.
        worker: WorkerId,
        /// The step after which it held state.
        step: Option<Step>,
        /// How that was seen.
        reason: String,
    },
    /// A worker whose state differed from all others'.
    Evicted {
        /// Who.
        worker: WorkerId,
        /// Where it ran: nobody new from there is taken in. Empty: it was away, and is sent away when it comes.
        machine: String,
        /// The step after which it held that state.
        step: Option<Step>,
        /// Which blocks differed.
        reason: String,
    },
    /// A generation, before anyone hears of it.
    Formed(Arc<Formation>),
    /// All members of a generation that follows another train.
    Recovered {
        /// Which.
        generation: Generation,
        /// Its members.
        workers: u32,
        /// From the moment at which the one before was seen to break, or to hold for a change, to this one.
        took: Millis,
        /// Steps that had been applied, as far as anyone said, and are computed again.
        again: u64,
        /// The checkpoint that its state is from; absent: nothing was read from the store.
        checkpoint: Option<Step>,
    },
    /// A member takes longer for a lane than the others.
    Slow {
        /// Who.
        worker: WorkerId,
        /// Where it runs.
        machine: String,
        /// Steps that it has applied.
        step: Step,
        /// Its time for a lane, in hundredths of the members' median.
        percent: u32,
    },
    /// It does not any more.
    InStep {
        /// Who.
        worker: WorkerId,
        /// Steps that it has applied.
        step: Step,
    },
    /// A worker that does not reach another is in no ring for a while, though both are here.
    LeftOut {
        /// Who.
        worker: WorkerId,
        /// Where it runs.
        machine: String,
        /// Whom it does not reach, or by whom it is not reached.
        from: WorkerId,
        /// The step after which it holds state.
        step: Option<Step>,
        /// For how long.
        rest: Millis,
        /// What was seen of it.
        reason: String,
    },
    /// A ring broke for a reason that is no death, and is formed anew.
    Broke {
        /// Who says why.
        worker: WorkerId,
        /// Which ring.
        generation: Generation,
        /// The step after which that worker holds state.
        step: Option<Step>,
        /// Why.
        reason: String,
    },
    /// The state that workers hold is not gone on from: the last checkpoint is, or the seed.
    FellBack {
        /// The step after which they hold it.
        step: Step,
        /// Why.
        reason: String,
    },
    /// A checkpoint that could not be used.
    PassedOver {
        /// Its step.
        step: Step,
        /// Why.
        reason: String,
    },
    /// A manifest could not be written, or a worker's parts: then it is told once a checkpoint.
    CheckpointFailed {
        /// Its step.
        step: Step,
        /// Why.
        reason: String,
    },
    /// The ring is over.
    Ended {
        /// How.
        outcome: Outcome,
    },
}

/// A membership as people see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The newest generation.
    pub generation: Generation,
    /// The one that is alive or breaking up.
    pub formation: Option<Formation>,
    /// All members of the newest generation train.
    pub trains: bool,
    /// A ring trained before the one that is to come: under this coordinator, or up to its reign.
    pub has_trained: bool,
    /// Workers that are connected.
    pub workers: u32,
    /// All that are known, members first and in rank order.
    pub attendants: Vec<Attendant>,
    /// The newest step that is held or stored.
    pub step: Option<Step>,
    /// The newest checkpoint.
    pub committed: Option<Step>,
    /// What it waits for, in words; absent while it trains.
    pub waits_for: Option<String>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// Machines that computed wrongly: nobody from there is taken in.
    pub quarantined: Vec<String>,
}

/// A worker as people see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attendant {
    /// Who.
    pub worker: WorkerId,
    /// Where it runs; empty when it has not reported in to this coordinator.
    pub machine: String,
    /// What it serves; absent: it is no member.
    pub lanes: Option<std::ops::Range<u32>>,
    /// Its connection is open.
    pub linked: bool,
    /// Where it stands.
    pub stance: Stance,
    /// Where the time of its last steps went; absent: it has told nothing of the newest generation.
    pub pace: Option<Pace>,
    /// Its time for a lane, in hundredths of the members' median, when it is slow.
    pub slow: Option<u32>,
    /// It is left out, since it and this worker do not reach one another.
    pub apart: Option<WorkerId>,
}

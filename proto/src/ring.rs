//! The words of the ring: what a coordinator and its workers say to one another, as values that are already checked.
//!
//! Both sides speak in levels, not edges. A worker says where it stands, whole, each time that changes; the coordinator
//! says what it wants now. A message that was lost, came twice or came late is mended by the next one.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Steps of the run that are applied: 0 before the first. State after the same step is the same bits, wherever it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Step(pub u64);

/// Number of a membership, from 1 and only ever rising within a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u64);

/// Number of a coordinator's reign over a job, from 1 and only ever rising: the fence between an old one and a new one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// One worker process, from its start to its end. Drawn at random by the process; another process is another worker.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u64);

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where a worker stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stance {
    /// The step after which it holds weights and moments; absent: it holds none.
    pub holds: Option<Step>,
    /// The moments that it has of that state; absent: all of them.
    pub shard: Option<Shard>,
    /// What it is doing.
    pub activity: Activity,
    /// It was asked to go (SIGTERM), and goes once it is in no ring.
    pub leaving: bool,
    /// Checkpoints that it has written parts of and that are not known to be committed.
    pub written: Vec<Written>,
    /// Checkpoints that it could not write its parts of, and has given up.
    pub unwritten: Vec<Unwritten>,
}

impl Stance {
    /// Of a worker that does this, holds the state after `holds` with all moments, and has nothing else to say.
    pub fn new(holds: Option<Step>, activity: Activity) -> Self {
        Self { holds, shard: None, activity, leaving: false, written: Vec::new(), unwritten: Vec::new() }
    }
}

/// The moments that a worker has where they are shared out over the ring. Weights are whole everywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Their blocks, ascending and apart.
    pub blocks: Vec<Range<u64>>,
    /// Blocks of the whole state.
    pub all_blocks: u64,
    /// It can bring these moments to the step after the one that it holds: whoever holds that has the weights.
    pub next: bool,
}

impl Shard {
    /// What the member of `rank` has: the blocks that it owns, and a second copy of those of the member after it.
    pub fn of(all_blocks: u64, members: usize, rank: usize) -> Self {
        Self { blocks: shares(all_blocks, members, rank), all_blocks, next: false }
    }

    /// Whether it has the moments of a block.
    pub fn contains(&self, block: u64) -> bool {
        self.blocks.iter().any(|range| range.contains(&block))
    }
}

/// The blocks that the member of `rank` and the one after it own, ascending and apart. Who owns what is the collective's
/// rule: contiguous shares whose sizes differ by at most one.
pub fn shares(all_blocks: u64, members: usize, rank: usize) -> Vec<Range<u64>> {
    let cut = |rank: usize| (u128::from(all_blocks) * rank as u128 / members as u128) as u64;
    let next = (rank + 1) % members;
    let mut both = vec![cut(rank)..cut(rank + 1), cut(next)..cut(next + 1)];
    both.retain(|range| !range.is_empty());
    both.sort_unstable_by_key(|range| range.start);
    both.dedup();
    if let [first, second] = &both[..]
        && first.end == second.start
    {
        both = std::iter::once(first.start..second.end).collect();
    }
    both
}

/// What a worker is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Activity {
    /// In no ring: it waits to be told.
    Outside,
    /// Getting state and connecting to the members of a generation.
    Forming {
        /// Which.
        generation: Generation,
    },
    /// Training.
    Running {
        /// In which generation.
        generation: Generation,
    },
    /// It has left its ring, applies nothing and waits to be told.
    Holding {
        /// The generation that it was in.
        generation: Generation,
        /// Why it left.
        cause: Cause,
    },
}

impl Activity {
    /// The generation that it speaks of.
    pub fn generation(&self) -> Option<Generation> {
        match self {
            Self::Outside => None,
            Self::Forming { generation }
            | Self::Running { generation }
            | Self::Holding { generation, .. } => Some(*generation),
        }
    }

    /// Whether it may still take part in a step of `generation`.
    pub fn is_in(&self, generation: Generation) -> bool {
        match self {
            Self::Forming { generation: of } | Self::Running { generation: of } => *of == generation,
            Self::Outside | Self::Holding { .. } => false,
        }
    }
}

/// Why a worker holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The ring agreed to, at a step boundary.
    Ordered,
    /// All steps of the run are applied.
    Ended,
    /// The ring broke: a peer was lost, or the coordinator said so.
    Broken {
        /// The peer that was lost, when it is known which.
        lost: Option<WorkerId>,
        /// What happened, for people.
        reason: String,
    },
    /// Nothing gets through between this worker and some peers, though none may be dead: a route, a cable, a firewall, or
    /// certificates that they do not believe.
    Unreachable {
        /// The peers: all of which it is known when the ring is left.
        peers: Vec<WorkerId>,
        /// What was tried, for people.
        reason: String,
    },
    /// State could not be had: from the peers, or from the checkpoint that was named.
    NoState {
        /// What happened, for people.
        reason: String,
    },
    /// Replicas of the same state differ: a machine computes wrongly, or its memory does not keep.
    Diverged {
        /// Those that differ from the majority; empty when there is none, and nobody can tell who is right.
        workers: Vec<WorkerId>,
        /// Which blocks differ, for people.
        reason: String,
    },
    /// Something that will happen again: data that cannot be read.
    Fault {
        /// What happened, for people.
        reason: String,
    },
}

/// What a worker wrote of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The checkpoint's step.
    pub step: Step,
    /// The generation in which the state was copied, which fixes who writes what.
    pub generation: Generation,
    /// What the manifest says of the parts (JSON), which the core only carries.
    pub parts: String,
    /// Digest of what every writer of the checkpoint must agree on.
    pub facts: String,
    /// The blocks that the parts hold; some may be those of a member that is gone.
    pub blocks: Vec<Range<u64>>,
    /// Blocks of the whole checkpoint.
    pub all_blocks: u64,
    /// A second copy that is in the worker's memory and in no part of its.
    pub kept: Option<Kept>,
}

/// A checkpoint that a worker could not write its parts of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unwritten {
    /// The checkpoint's step.
    pub step: Step,
    /// The generation in which the state was copied.
    pub generation: Generation,
    /// What the store said last, for people.
    pub reason: String,
}

/// Blocks of another worker, of which this one has a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Whose they are to write.
    pub owner: WorkerId,
    /// The blocks.
    pub blocks: Range<u64>,
}

/// A generation: who is in it, and from where it goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Formation {
    /// Its number.
    pub generation: Generation,
    /// Steps applied when it starts.
    pub start: Step,
    /// Where those that do not hold the state after `start` get it.
    pub source: Source,
    /// The members, in rank order.
    pub members: Vec<Member>,
    /// The state after `start` is in no checkpoint yet: if one is due there, it is taken before the first step.
    pub save_first: bool,
}

impl Formation {
    /// Rank of a worker.
    pub fn rank(&self, worker: WorkerId) -> Option<usize> {
        self.members.iter().position(|member| member.worker == worker)
    }

    /// The member that is a worker.
    pub fn member(&self, worker: WorkerId) -> Option<&Member> {
        self.members.iter().find(|member| member.worker == worker)
    }

    /// Members that hold the state from the start, or bring moments of it: those of the first ranks, of which the last serves
    /// lanes. The others are learners. They serve none and are sent the state while the first train; until one says that it holds
    /// it, nobody counts on what it has.
    pub fn trainers(&self) -> usize {
        let Source::Peers { holders } = &self.source else { return self.members.len() };
        let learns = |member: &Member| member.lanes.is_empty() && !holders.contains(&member.worker);
        self.members.len() - self.members.iter().rev().take_while(|member| learns(member)).count()
    }
}

/// Where peers reach a worker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// Addresses of the collective, best first: `ip:port`.
    pub ring: Vec<String>,
    /// Addresses of the service that hands out state, best first: `ip:port`.
    pub peers: Vec<String>,
}

/// A worker introduces itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The job's name.
    pub job: String,
    /// Who.
    pub worker: WorkerId,
    /// Number of this connection among those of the worker: of two, the later one counts.
    pub connection: u64,
    /// Where its peers reach it.
    pub endpoints: Endpoints,
    /// Where it runs, for people.
    pub machine: String,
    /// Version of the program.
    pub build: String,
    /// Kind of device.
    pub device: String,
    /// Where it stands.
    pub stance: Stance,
}

/// A member of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Who.
    pub worker: WorkerId,
    /// Where its peers reach it.
    pub endpoints: Endpoints,
    /// The lanes that it serves; may be empty.
    pub lanes: Range<u32>,
}

/// Where state comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The run's seed: `start` is 0 and nothing is stored.
    Seed,
    /// The checkpoint of this step.
    Checkpoint {
        /// Its step: that of `start`.
        step: Step,
    },
    /// Members that hold it, in rank order.
    Peers {
        /// Who.
        holders: Vec<WorkerId>,
    },
}

/// What the coordinator wants of a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Be a member of this generation.
    Form(Arc<Formation>),
    /// Put `hold` into the control word: the ring then holds after the step that carries it.
    Hold {
        /// For this generation only.
        generation: Generation,
        /// Take a checkpoint at that boundary.
        save: bool,
    },
    /// Break the ring of this generation now.
    Abort {
        /// Which; also any before it.
        generation: Generation,
        /// For people.
        reason: String,
    },
    /// A checkpoint that the worker has written parts of is committed.
    Committed {
        /// Its step.
        step: Step,
    },
    /// Write the second copy that is kept for a checkpoint: nobody else may have it.
    WriteKept {
        /// The checkpoint's step.
        step: Step,
        /// The generation in which the state was copied.
        generation: Generation,
    },
    /// Go, and do not come back unless started again.
    Leave {
        /// Why, which decides the exit code.
        why: Leave,
    },
}

/// Why a worker is sent away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leave {
    /// The run is complete.
    Done,
    /// The job is paused, scaled down or cancelled, or the worker asked to go.
    Dismissed {
        /// For people.
        reason: String,
    },
    /// Its state differs from that of all others, or it was silent for too long.
    Evicted {
        /// For people.
        reason: String,
    },
    /// It does not fit the job: another config, build or kind of device.
    Refused {
        /// What differs.
        reason: String,
    },
    /// The job has failed.
    Failed {
        /// For people.
        reason: String,
    },
}

/// Where a worker's time went in some steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// The generation in which they were applied.
    pub generation: Generation,
    /// Lanes that the worker serves in it; at least 1.
    pub lanes: u32,
    /// How many; at least 1.
    pub steps: u32,
    /// In all of them together.
    pub spent: Spent,
}

/// Microseconds of some steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// The whole steps.
    pub step_us: u64,
    /// Waiting for data.
    pub data_us: u64,
    /// Forward and backward of the worker's lanes.
    pub compute_us: u64,
    /// Of it, forward.
    pub forward_us: u64,
    /// In the collective, waiting for the others included.
    pub reduce_us: u64,
    /// Norm, clip and update.
    pub update_us: u64,
    /// Waiting for checkpoints' copies.
    pub checkpoint_us: u64,
}

impl std::ops::Add for Spent {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            step_us: self.step_us.saturating_add(other.step_us),
            data_us: self.data_us.saturating_add(other.data_us),
            compute_us: self.compute_us.saturating_add(other.compute_us),
            forward_us: self.forward_us.saturating_add(other.forward_us),
            reduce_us: self.reduce_us.saturating_add(other.reduce_us),
            update_us: self.update_us.saturating_add(other.update_us),
            checkpoint_us: self.checkpoint_us.saturating_add(other.checkpoint_us),
        }
    }
}

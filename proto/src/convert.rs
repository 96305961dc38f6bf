//! Between the words and the messages that carry them. What comes in is checked here and nowhere else.

mod jobs;

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;

use crate::ring::*;
use crate::v1;

/// A message that is not what its sender may say.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}; {remedy}")]
pub struct Malformed {
    /// What is wrong, and where.
    pub what: String,
    /// What to do about it.
    pub remedy: &'static str,
}

fn malformed(what: impl Into<String>) -> Malformed {
    Malformed { what: what.into(), remedy: "start all parts of a job from one build of Anello" }
}

/// Checkpoints that a stance may name: as many as a worker keeps.
const WRITTEN_MAX: usize = 16;
/// Checkpoints that a stance may name as not written.
const UNWRITTEN_MAX: usize = 4;
/// Ranges of blocks of a shard: two, and some more while shares move.
const RANGES_MAX: usize = 8;
/// Bytes of text that people read.
const REASON_BYTES_MAX: usize = 16 << 10;
/// Members of a generation.
const MEMBERS_MAX: usize = 1 << 12;
/// Addresses of one worker, and bytes of each: with [`MEMBERS_MAX`], a formation stays well below a message's 4 MiB as long
/// as workers have one or two.
const ADDRESSES_MAX: usize = 8;
/// Bytes of a name of a job, a machine, a build or a device.
const NAME_BYTES_MAX: usize = 1 << 10;

fn name(what: &str, text: String) -> Result<String, Malformed> {
    if text.len() > NAME_BYTES_MAX {
        return Err(malformed(format!("a {what} of {} bytes, of at most {NAME_BYTES_MAX}", text.len())));
    }
    Ok(text)
}

/// What is said for people is cut off, not refused, by who says it: an error may tell of any number of things.
fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(REASON_BYTES_MAX)].to_owned()
}

fn reason(text: String) -> Result<String, Malformed> {
    if text.len() > REASON_BYTES_MAX {
        return Err(malformed(format!("a reason of {} bytes, of at most {REASON_BYTES_MAX}", text.len())));
    }
    Ok(text)
}

impl From<&Stance> for v1::Stance {
    fn from(stance: &Stance) -> Self {
        use v1::stance::Activity as Word;
        let activity = match &stance.activity {
            Activity::Outside => Word::Outside(v1::Outside {}),
            Activity::Forming { generation } => Word::Forming(generation.0),
            Activity::Running { generation } => Word::Running(generation.0),
            Activity::Holding { generation, cause } => {
                Word::Holding(v1::Holding { generation: generation.0, cause: Some(cause.into()) })
            }
        };
        Self {
            holds: stance.holds.map(|step| step.0),
            shard: stance.shard.as_ref().map(Into::into),
            activity: Some(activity),
            leaving: stance.leaving,
            written: stance.written.iter().map(Into::into).collect(),
            unwritten: stance.unwritten.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::Stance> for Stance {
    type Error = Malformed;
    fn try_from(message: v1::Stance) -> Result<Self, Malformed> {
        use v1::stance::Activity as Word;
        let activity = match message.activity.ok_or_else(|| malformed("a stance says no activity"))? {
            Word::Outside(_) => Activity::Outside,
            Word::Forming(generation) => Activity::Forming { generation: Generation(generation) },
            Word::Running(generation) => Activity::Running { generation: Generation(generation) },
            Word::Holding(holding) => {
                let cause = holding.cause.ok_or_else(|| malformed("a worker holds for no cause"))?;
                Activity::Holding { generation: Generation(holding.generation), cause: cause.try_into()? }
            }
        };
        if message.written.len() > WRITTEN_MAX {
            let count = message.written.len();
            return Err(malformed(format!("{count} checkpoints in a stance, of at most {WRITTEN_MAX}")));
        }
        if message.unwritten.len() > UNWRITTEN_MAX {
            let count = message.unwritten.len();
            return Err(malformed(format!("{count} checkpoints not written, of at most {UNWRITTEN_MAX}")));
        }
        Ok(Self {
            holds: message.holds.map(Step),
            shard: message.shard.map(TryInto::try_into).transpose()?,
            activity,
            leaving: message.leaving,
            written: message.written.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            unwritten: message.unwritten.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
        })
    }
}

impl From<&Unwritten> for v1::Unwritten {
    fn from(unwritten: &Unwritten) -> Self {
        let Unwritten { step, generation, reason } = unwritten;
        Self { step: step.0, generation: generation.0, reason: cut(reason) }
    }
}

impl TryFrom<v1::Unwritten> for Unwritten {
    type Error = Malformed;
    fn try_from(message: v1::Unwritten) -> Result<Self, Malformed> {
        let v1::Unwritten { step, generation, reason: text } = message;
        Ok(Self { step: Step(step), generation: Generation(generation), reason: reason(text)? })
    }
}

impl From<&Shard> for v1::Shard {
    fn from(shard: &Shard) -> Self {
        let Shard { blocks, all_blocks, next } = shard;
        let range = |range: &Range<u64>| v1::BlockRange { first: range.start, end: range.end };
        Self { blocks: blocks.iter().map(range).collect(), all_blocks: *all_blocks, next: *next }
    }
}

impl TryFrom<v1::Shard> for Shard {
    type Error = Malformed;
    fn try_from(message: v1::Shard) -> Result<Self, Malformed> {
        let v1::Shard { blocks, all_blocks, next } = message;
        if blocks.len() > RANGES_MAX {
            let count = blocks.len();
            return Err(malformed(format!("moments in {count} ranges, of at most {RANGES_MAX}")));
        }
        let mut from = 0;
        for &v1::BlockRange { first, end } in &blocks {
            if first < from || first >= end || end > all_blocks {
                return Err(malformed(format!("moments of blocks {first} to {end}, of {all_blocks}")));
            }
            from = end;
        }
        let blocks = blocks.into_iter().map(|range| range.first..range.end).collect();
        Ok(Self { blocks, all_blocks, next })
    }
}

impl From<&Cause> for v1::holding::Cause {
    fn from(cause: &Cause) -> Self {
        match cause {
            Cause::Ordered => Self::Ordered(v1::Ordered {}),
            Cause::Ended => Self::Ended(v1::Ended {}),
            Cause::Broken { lost, reason } => {
                Self::Broken(v1::Broken { lost: lost.map(|worker| worker.0), reason: cut(reason) })
            }
            Cause::Unreachable { peers, reason } => Self::Unreachable(v1::Unreachable {
                peers: peers.iter().map(|peer| peer.0).collect(),
                reason: cut(reason),
            }),
            Cause::NoState { reason } => Self::NoState(cut(reason)),
            Cause::Fault { reason } => Self::Fault(cut(reason)),
            Cause::Diverged { workers, reason } => Self::Diverged(v1::Diverged {
                workers: workers.iter().map(|worker| worker.0).collect(),
                reason: cut(reason),
            }),
        }
    }
}

impl TryFrom<v1::holding::Cause> for Cause {
    type Error = Malformed;
    fn try_from(cause: v1::holding::Cause) -> Result<Self, Malformed> {
        use v1::holding::Cause as Word;
        Ok(match cause {
            Word::Ordered(_) => Self::Ordered,
            Word::Ended(_) => Self::Ended,
            Word::Broken(v1::Broken { lost, reason: text }) => {
                Self::Broken { lost: lost.map(WorkerId), reason: reason(text)? }
            }
            Word::Unreachable(v1::Unreachable { peers, reason: text }) => {
                if peers.is_empty() || peers.len() > MEMBERS_MAX {
                    let count = peers.len();
                    return Err(malformed(format!("{count} peers are not reached, of 1 to {MEMBERS_MAX}")));
                }
                let peers = peers.into_iter().map(WorkerId).collect();
                Self::Unreachable { peers, reason: reason(text)? }
            }
            Word::NoState(text) => Self::NoState { reason: reason(text)? },
            Word::Fault(text) => Self::Fault { reason: reason(text)? },
            Word::Diverged(v1::Diverged { workers, reason: text }) => {
                Self::Diverged { workers: workers.into_iter().map(WorkerId).collect(), reason: reason(text)? }
            }
        })
    }
}

impl From<&Written> for v1::Written {
    fn from(written: &Written) -> Self {
        let Written { step, generation, parts, facts, blocks, all_blocks, kept } = written.clone();
        let range = |range: Range<u64>| v1::BlockRange { first: range.start, end: range.end };
        Self {
            step: step.0,
            generation: generation.0,
            parts,
            facts,
            blocks: blocks.into_iter().map(range).collect(),
            all_blocks,
            kept: kept.map(|kept| v1::Kept { owner: kept.owner.0, blocks: Some(range(kept.blocks)) }),
        }
    }
}

impl TryFrom<v1::Written> for Written {
    type Error = Malformed;
    fn try_from(message: v1::Written) -> Result<Self, Malformed> {
        let v1::Written { step, generation, parts, facts, blocks, all_blocks, kept } = message;
        // A checkpoint of no blocks would be complete before anyone has written anything.
        if all_blocks == 0 {
            return Err(malformed(format!("parts of checkpoint {step}, which has no blocks")));
        }
        let block = |range: v1::BlockRange| {
            let v1::BlockRange { first, end } = range;
            if first > end || end > all_blocks {
                return Err(malformed(format!(
                    "blocks {first} to {end} of checkpoint {step}, of {all_blocks}"
                )));
            }
            Ok(first..end)
        };
        let blocks = blocks.into_iter().map(block).collect::<Result<_, _>>()?;
        let copy = |v1::Kept { owner, blocks }: v1::Kept| {
            let blocks =
                blocks.ok_or_else(|| malformed(format!("a copy of no blocks of checkpoint {step}")))?;
            Ok(Kept { owner: WorkerId(owner), blocks: block(blocks)? })
        };
        let kept = kept.map(copy).transpose()?;
        let (step, generation) = (Step(step), Generation(generation));
        Ok(Self { step, generation, parts, facts, blocks, all_blocks, kept })
    }
}

/// Microseconds that a worker may have spent on the steps between two of its words: some years.
const SPENT_US_MAX: u64 = 1 << 47;

impl From<&Pace> for v1::Pace {
    fn from(pace: &Pace) -> Self {
        let Pace { generation, lanes, steps, spent } = *pace;
        let Spent { step_us, data_us, compute_us, forward_us, reduce_us, update_us, checkpoint_us } = spent;
        Self {
            generation: generation.0,
            lanes,
            steps,
            step_us,
            data_us,
            compute_us,
            forward_us,
            reduce_us,
            update_us,
            checkpoint_us,
        }
    }
}

impl TryFrom<v1::Pace> for Pace {
    type Error = Malformed;
    fn try_from(message: v1::Pace) -> Result<Self, Malformed> {
        let v1::Pace { generation, lanes, steps, .. } = message;
        let v1::Pace { step_us, data_us, compute_us, forward_us, reduce_us, .. } = message;
        let v1::Pace { update_us, checkpoint_us, .. } = message;
        if lanes == 0 || steps == 0 {
            return Err(malformed(format!("the time of {steps} steps of {lanes} lanes")));
        }
        let all = [step_us, data_us, compute_us, forward_us, reduce_us, update_us, checkpoint_us];
        if let Some(long) = all.into_iter().find(|us| *us > SPENT_US_MAX) {
            return Err(malformed(format!("steps of {long} µs, of at most {SPENT_US_MAX}")));
        }
        let spent = Spent { step_us, data_us, compute_us, forward_us, reduce_us, update_us, checkpoint_us };
        Ok(Self { generation: Generation(generation), lanes, steps, spent })
    }
}

impl v1::Failed {
    /// That a worker ends, and why.
    pub fn of(reason: &str) -> Self {
        Self { reason: cut(reason) }
    }

    /// Why, when it is said in as many words as it may be.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn checked(self) -> Result<String, Malformed> {
        reason(self.reason)
    }
}

impl From<&Endpoints> for v1::Endpoints {
    fn from(endpoints: &Endpoints) -> Self {
        Self { ring: endpoints.ring.clone(), peers: endpoints.peers.clone() }
    }
}

impl TryFrom<v1::Endpoints> for Endpoints {
    type Error = Malformed;
    /// An address that is none is refused here: in a formation it would be a fault of all members.
    fn try_from(message: v1::Endpoints) -> Result<Self, Malformed> {
        let v1::Endpoints { ring, peers } = message;
        for count in [ring.len(), peers.len()] {
            if count == 0 || count > ADDRESSES_MAX {
                return Err(malformed(format!("{count} addresses of a worker, of 1 to {ADDRESSES_MAX}")));
            }
        }
        if let Some(none) = ring.iter().chain(&peers).find(|text| text.parse::<SocketAddr>().is_err()) {
            return Err(malformed(format!("{:?}, which is no ip:port", head(none))));
        }
        Ok(Self { ring, peers })
    }
}

/// Enough of a text to know it by.
fn head(text: &str) -> &str {
    &text[..text.floor_char_boundary(64)]
}

impl From<&Hello> for v1::Hello {
    fn from(hello: &Hello) -> Self {
        let Hello { job, worker, connection, endpoints, machine, build, device, stance } = hello;
        Self {
            job: job.clone(),
            worker: worker.0,
            connection: *connection,
            endpoints: Some(endpoints.into()),
            machine: machine.clone(),
            build: build.clone(),
            device: device.clone(),
            stance: Some(stance.into()),
        }
    }
}

impl TryFrom<v1::Hello> for Hello {
    type Error = Malformed;
    fn try_from(message: v1::Hello) -> Result<Self, Malformed> {
        let v1::Hello { job, worker, connection, endpoints, machine, build, device, stance } = message;
        Ok(Self {
            job: name("job", job)?,
            worker: WorkerId(worker),
            connection,
            endpoints: endpoints.ok_or_else(|| malformed("a hello without endpoints"))?.try_into()?,
            machine: name("machine", machine)?,
            build: name("build", build)?,
            device: name("device", device)?,
            stance: stance.ok_or_else(|| malformed("a hello without a stance"))?.try_into()?,
        })
    }
}

impl From<&Formation> for v1::Formation {
    fn from(formation: &Formation) -> Self {
        use v1::formation::Source as Word;
        let member = |member: &Member| v1::Member {
            worker: member.worker.0,
            endpoints: Some((&member.endpoints).into()),
            first_lane: member.lanes.start,
            end_lane: member.lanes.end,
        };
        let source = match &formation.source {
            Source::Seed => Word::Seed(v1::FromSeed {}),
            Source::Checkpoint { step } => Word::Checkpoint(step.0),
            Source::Peers { holders } => {
                Word::Holders(v1::Holders { workers: holders.iter().map(|worker| worker.0).collect() })
            }
        };
        Self {
            generation: formation.generation.0,
            start: formation.start.0,
            members: formation.members.iter().map(member).collect(),
            source: Some(source),
            save_first: formation.save_first,
        }
    }
}

impl TryFrom<v1::Formation> for Formation {
    type Error = Malformed;
    fn try_from(message: v1::Formation) -> Result<Self, Malformed> {
        use v1::formation::Source as Word;
        let count = message.members.len();
        if count == 0 || count > MEMBERS_MAX {
            return Err(malformed(format!("a generation of {count} members, of 1 to {MEMBERS_MAX}")));
        }
        let member = |member: v1::Member| {
            let endpoints = member.endpoints.ok_or_else(|| malformed("a member without endpoints"))?;
            if member.first_lane > member.end_lane {
                let (first, end) = (member.first_lane, member.end_lane);
                return Err(malformed(format!("a member serves lanes {first} to {end}")));
            }
            let lanes = member.first_lane..member.end_lane;
            Ok(Member { worker: WorkerId(member.worker), endpoints: endpoints.try_into()?, lanes })
        };
        let source =
            match message.source.ok_or_else(|| malformed("a generation without a source of state"))? {
                Word::Seed(_) => Source::Seed,
                Word::Checkpoint(step) => Source::Checkpoint { step: Step(step) },
                Word::Holders(v1::Holders { workers }) => {
                    Source::Peers { holders: workers.into_iter().map(WorkerId).collect() }
                }
            };
        Ok(Self {
            generation: Generation(message.generation),
            start: Step(message.start),
            source,
            members: message.members.into_iter().map(member).collect::<Result<_, _>>()?,
            save_first: message.save_first,
        })
    }
}

impl From<&Order> for v1::to_worker::Order {
    fn from(order: &Order) -> Self {
        match order {
            Order::Form(formation) => Self::Form((&**formation).into()),
            Order::Hold { generation, save } => {
                Self::Hold(v1::Hold { generation: generation.0, save: *save })
            }
            Order::Abort { generation, reason } => {
                Self::Abort(v1::Abort { generation: generation.0, reason: cut(reason) })
            }
            Order::Committed { step } => Self::Committed(step.0),
            Order::WriteKept { step, generation } => {
                Self::WriteKept(v1::WriteKept { step: step.0, generation: generation.0 })
            }
            Order::Leave { why } => {
                use v1::leave::Why;
                let (why, reason) = match why {
                    Leave::Done => (Why::Done, ""),
                    Leave::Dismissed { reason } => (Why::Dismissed, reason.as_str()),
                    Leave::Evicted { reason } => (Why::Evicted, reason.as_str()),
                    Leave::Refused { reason } => (Why::Refused, reason.as_str()),
                    Leave::Failed { reason } => (Why::Failed, reason.as_str()),
                };
                Self::Leave(v1::Leave { why: why.into(), reason: cut(reason) })
            }
        }
    }
}

/// What a coordinator says, as a worker takes it in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// The answer to the hello.
    Welcome(v1::Welcome),
    /// An order.
    Order(Order),
}

impl TryFrom<v1::ToWorker> for (Epoch, Word) {
    type Error = Malformed;
    fn try_from(message: v1::ToWorker) -> Result<Self, Malformed> {
        use v1::to_worker::Order as Said;
        let order = match message.order.ok_or_else(|| malformed("the coordinator says nothing"))? {
            Said::Welcome(welcome) => return Ok((Epoch(message.epoch), Word::Welcome(welcome))),
            Said::Form(formation) => Order::Form(Arc::new(formation.try_into()?)),
            Said::Hold(v1::Hold { generation, save }) => {
                Order::Hold { generation: Generation(generation), save }
            }
            Said::Abort(v1::Abort { generation, reason: text }) => {
                Order::Abort { generation: Generation(generation), reason: reason(text)? }
            }
            Said::Committed(step) => Order::Committed { step: Step(step) },
            Said::WriteKept(v1::WriteKept { step, generation }) => {
                Order::WriteKept { step: Step(step), generation: Generation(generation) }
            }
            Said::Leave(leave) => {
                use v1::leave::Why;
                let (why, reason) = (leave.why(), reason(leave.reason)?);
                Order::Leave {
                    why: match why {
                        Why::Done => Leave::Done,
                        Why::Dismissed => Leave::Dismissed { reason },
                        Why::Evicted => Leave::Evicted { reason },
                        Why::Refused => Leave::Refused { reason },
                        Why::Failed => Leave::Failed { reason },
                        Why::Unspecified => {
                            return Err(malformed("the worker is to leave, and not told why"));
                        }
                    },
                }
            }
        };
        Ok((Epoch(message.epoch), Word::Order(order)))
    }
}

#[cfg(test)]
mod tests;

//! Between the words of the core and of the wire, and those of the run folder.

use anello_proto::ring::{Endpoints, Formation, Generation, Member, Source, Step, WorkerId};
use anello_proto::v1;
use anello_store::events::{Event as Logged, RingMember};
use anello_store::metrics::{Evaluated, Seconds, StepRecord};

use crate::core::{Entry, Goal, Outcome};

/// What the log calls a goal.
pub(crate) fn goal_name(goal: Goal) -> &'static str {
    match goal {
        Goal::Run => "run",
        Goal::Pause => "pause",
        Goal::Cancel => "cancel",
    }
}

/// What the log calls an outcome.
pub(crate) fn outcome_name(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Completed => "completed",
        Outcome::Paused => "paused",
        Outcome::Cancelled => "cancelled",
        Outcome::Failed { .. } => "failed",
        Outcome::Fenced { .. } => "fenced",
    }
}

/// A record of the core, as the log has it.
pub(crate) fn event_of(entry: Entry) -> Logged {
    match entry {
        Entry::Joined { worker, machine } => Logged::Joined { worker: worker.to_string(), machine },
        Entry::Lost { worker, step, reason } => {
            Logged::Lost { worker: worker.to_string(), step: step.map(|step| step.0), reason }
        }
        Entry::Evicted { worker, machine, step, reason } => {
            Logged::Evicted { worker: worker.to_string(), machine, step: step.map(|step| step.0), reason }
        }
        Entry::Formed(formation) => {
            let (source, holders) = match &formation.source {
                Source::Seed => ("seed", Vec::new()),
                Source::Checkpoint { .. } => ("checkpoint", Vec::new()),
                Source::Peers { holders } => ("peers", holders.iter().map(WorkerId::to_string).collect()),
            };
            let member = |member: &Member| RingMember {
                worker: member.worker.to_string(),
                ring: member.endpoints.ring.clone(),
                peers: member.endpoints.peers.clone(),
                first_lane: member.lanes.start,
                end_lane: member.lanes.end,
            };
            Logged::Formed {
                generation: formation.generation.0,
                start: formation.start.0,
                source: source.to_owned(),
                holders,
                members: formation.members.iter().map(member).collect(),
                save_first: formation.save_first,
            }
        }
        Entry::Recovered { generation, workers, took, again, checkpoint } => Logged::Recovered {
            generation: generation.0,
            workers,
            took_ms: took.0,
            again,
            checkpoint: checkpoint.map(|step| step.0),
        },
        Entry::Slow { worker, machine, step, percent } => {
            Logged::Slow { worker: worker.to_string(), machine, step: step.0, percent }
        }
        Entry::InStep { worker, step } => Logged::InStep { worker: worker.to_string(), step: step.0 },
        Entry::LeftOut { worker, machine, from, step, rest, reason } => Logged::LeftOut {
            worker: worker.to_string(),
            machine,
            from: from.to_string(),
            step: step.map(|step| step.0),
            rest_ms: rest.0,
            reason,
        },
        Entry::Broke { worker, generation, step, reason } => Logged::Broke {
            worker: worker.to_string(),
            generation: generation.0,
            step: step.map(|step| step.0),
            reason,
        },
        Entry::FellBack { step, reason } => Logged::FellBack { step: step.0, reason },
        Entry::PassedOver { step, reason } => Logged::PassedOver { step: step.0, reason },
        Entry::CheckpointFailed { step, reason } => Logged::CheckpointFailed { step: step.0, cause: reason },
        Entry::Ended { outcome } => {
            let name = outcome_name(&outcome).to_owned();
            let reason = match outcome {
                Outcome::Completed | Outcome::Paused | Outcome::Cancelled => None,
                Outcome::Failed { reason } => Some(reason),
                Outcome::Fenced { by } => Some(by),
            };
            Logged::Ended { outcome: name, reason }
        }
    }
}

/// The worker that a record names; absent in one that no build of ours wrote.
pub(crate) fn worker_of(text: &str) -> Option<WorkerId> {
    u64::from_str_radix(text, 16).ok().map(WorkerId)
}

/// The formation that a record tells of; absent for any other record, and for one that no build of ours wrote.
pub(crate) fn formation_of(event: Logged) -> Option<Formation> {
    let Logged::Formed { generation, start, source, holders, members, save_first } = event else {
        return None;
    };
    let id = |text: &String| worker_of(text);
    let source = match source.as_str() {
        "seed" => Source::Seed,
        "checkpoint" => Source::Checkpoint { step: Step(start) },
        _ => Source::Peers { holders: holders.iter().filter_map(id).collect() },
    };
    let member = |member: RingMember| {
        Some(Member {
            worker: id(&member.worker)?,
            endpoints: Endpoints { ring: member.ring, peers: member.peers },
            lanes: member.first_lane..member.end_lane,
        })
    };
    let members = members.into_iter().map(member).collect::<Option<Vec<_>>>()?;
    Some(Formation { generation: Generation(generation), start: Step(start), source, members, save_first })
}

fn evaluated(eval: v1::Evaluated) -> Evaluated {
    let v1::Evaluated { set, counted, loop_loss, accuracy, exit } = eval;
    Evaluated { set, counted, loop_loss, accuracy, exit }
}

/// A worker's report, as the metrics have it.
pub fn record_of(report: v1::StepReport) -> StepRecord {
    let second = |at: usize| report.seconds.get(at).copied().unwrap_or(0.0);
    let seconds = Seconds {
        step: second(0),
        data: second(1),
        compute: second(2),
        reduce: second(3),
        update: second(4),
        checkpoint: second(5),
        eval: second(6),
        forward: second(7),
    };
    StepRecord {
        step: report.step,
        stage: report.stage,
        tokens: report.tokens,
        batch_tokens: report.batch_tokens,
        counted: report.counted,
        lr: report.lr,
        loss: report.loss,
        loop_loss: report.loop_loss,
        exit: report.exit,
        entropy: report.entropy,
        grad_norm: report.grad_norm,
        applied: report.applied,
        weights: report.weights,
        evals: report.evals.into_iter().map(evaluated).collect(),
        seconds,
    }
}

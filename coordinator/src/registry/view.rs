//! A job as users see it.

use anello_proto::jobs::Phase;
use anello_proto::ring::{Activity, Cause, Pace};
use anello_proto::v1;
use anello_store::events::Record;
use anello_store::metrics::StepRecord;

use super::entry::Entry;
use crate::core::{Attendant, Goal};
use crate::launch::{Crew, Launcher};

impl<L: Launcher> Entry<L> {
    /// In a list. `queue_position`: jobs that wait before it, when it waits.
    pub fn view(&self, queue_position: Option<u32>) -> v1::Job {
        let status = self.ring.as_ref().and_then(|ring| ring.status.as_ref());
        let phase = self.phase();
        let reported = self.steps.back().map(|row| row.step + 1);
        let seconds: f64 = self.steps.iter().map(|row| row.seconds.step).sum();
        let tokens: u64 = self.steps.iter().map(|row| row.batch_tokens).sum();
        v1::Job {
            name: self.spec.name.clone(),
            phase: v1::Phase::from(phase).into(),
            min: self.spec.min,
            desired: self.standing.desired,
            workers: status.map_or(0, |status| status.workers),
            created_unix_ms: self.spec.created_unix_ms,
            run: self.run.clone(),
            step: reported.max(status.and_then(|status| Some(status.step?.0))),
            total_steps: self.total_steps,
            loss: self.steps.back().map(|row| row.loss),
            tokens_per_s: (seconds > 0.0).then(|| tokens as f64 / seconds),
            waits_for: self.waits_for(phase, queue_position),
            queue_position,
            reason: (phase == Phase::Failed).then(|| self.reason()).flatten(),
            quarantined: status.map_or(0, |status| status.quarantined.len() as u32),
        }
    }

    fn waits_for(&self, phase: Phase, queue_position: Option<u32>) -> Option<String> {
        if phase.is_terminal() || phase == Phase::Paused {
            return None;
        }
        let ring = self.ring.as_ref().and_then(|ring| ring.status.as_ref()?.waits_for.clone());
        // Workers that end as soon as they are started are what a ring waits for in vain.
        let failing = self.crew.as_ref().and_then(Crew::failing);
        let ring = ring.map(|what| failing.map_or(what.clone(), |how| format!("{what}; {how}")));
        let queue = || match queue_position {
            Some(0) => Some("free slots".to_owned()),
            Some(1) => Some("its turn: 1 job is before it".to_owned()),
            Some(before) => Some(format!("its turn: {before} jobs are before it")),
            None => None,
        };
        let stop = || match self.standing.goal {
            Goal::Pause => Some("its last checkpoint".to_owned()),
            Goal::Cancel => Some("its workers to stop".to_owned()),
            Goal::Run => None,
        };
        self.trouble.clone().or(ring).or_else(queue).or_else(stop)
    }

    /// All that there is to see.
    pub fn detail(&self, queue_position: Option<u32>) -> v1::JobDetail {
        let status = self.ring.as_ref().and_then(|ring| ring.status.as_ref());
        v1::JobDetail {
            job: Some(self.view(queue_position)),
            generation: status.map(|status| status.generation.0),
            committed: status.and_then(|status| Some(status.committed?.0)),
            workers: status.map_or(Vec::new(), |status| status.attendants.iter().map(attendant).collect()),
            steps: self.steps.iter().map(figures).collect(),
            events: self.events.iter().map(log_record).collect(),
            lanes: self.config.lanes,
            quarantined: status.map_or(Vec::new(), |status| status.quarantined.clone()),
        }
    }
}

pub(crate) fn attendant(worker: &Attendant) -> v1::Attendant {
    let stance = &worker.stance;
    let activity = match &stance.activity {
        _ if !worker.linked => "not connected",
        _ if stance.leaving => "leaving",
        _ if worker.apart.is_some() => "left out: it and a member do not reach one another",
        Activity::Outside => "waiting",
        Activity::Forming { .. } => "getting ready",
        Activity::Running { .. } if stance.holds.is_none() => "is sent the state",
        Activity::Running { .. } => "training",
        Activity::Holding { cause: Cause::Ordered, .. } => "holding",
        Activity::Holding { cause: Cause::Ended, .. } => "done",
        Activity::Holding { cause: Cause::Broken { .. }, .. } => "holding: a peer was lost",
        Activity::Holding { cause: Cause::Unreachable { .. }, .. } => "holding: it cannot reach a peer",
        Activity::Holding { cause: Cause::NoState { .. }, .. } => "holding: it has no state",
        Activity::Holding { cause: Cause::Diverged { .. }, .. } => "holding: replicas differ",
        Activity::Holding { cause: Cause::Fault { .. }, .. } => "holding: a fault",
    };
    v1::Attendant {
        worker: worker.worker.0,
        machine: worker.machine.clone(),
        first_lane: worker.lanes.as_ref().map(|lanes| lanes.start),
        end_lane: worker.lanes.as_ref().map(|lanes| lanes.end),
        holds: stance.holds.map(|step| step.0),
        activity: activity.to_owned(),
        pace: worker.pace.map(pace),
        slow: worker.slow.map(|percent| f64::from(percent) / 100.0),
    }
}

fn pace(Pace { steps, spent, .. }: Pace) -> v1::PaceFigures {
    let mean = |us: u64| us as f64 / 1e6 / f64::from(steps);
    v1::PaceFigures {
        steps,
        whole_s: mean(spent.step_us),
        data_s: mean(spent.data_us),
        compute_s: mean(spent.compute_us),
        forward_s: mean(spent.forward_us),
        reduce_s: mean(spent.reduce_us),
        update_s: mean(spent.update_us),
        checkpoint_s: mean(spent.checkpoint_us),
    }
}

fn figures(row: &StepRecord) -> v1::StepFigures {
    v1::StepFigures {
        step: row.step,
        stage: row.stage.clone(),
        loss: row.loss,
        batch_tokens: row.batch_tokens,
        seconds: row.seconds.step,
    }
}

/// A record on its way to a user.
pub(crate) fn log_record(record: &Record) -> v1::LogRecord {
    let json = serde_json::to_string(record).expect("a record has no map with keys that are not strings");
    v1::LogRecord { number: record.number, unix_ms: record.unix_ms, json }
}

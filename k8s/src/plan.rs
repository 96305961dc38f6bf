//! What is to be done for a job, as a pure function of what it says and what there is.
//!
//! ```text
//! spec, status ─┐
//! Observed ─────┴▶ plan ─▶ objects to apply, what to ask of the coordinator, the new status, when to look again
//! ```
//! It remembers nothing but what the status holds, so a controller that is killed goes on where it was. Everything it
//! orders may be ordered twice.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::ResourceExt;

use anello_proto::jobs::Phase;

use crate::objects::{self, Crew, JobSet};
use crate::resource::{PretrainJob, PretrainJobStatus, WorkersKind};
use crate::status;

/// Keeps a job from being deleted before its checkpoint is taken.
pub const FINALIZER: &str = "anello.dev/checkpoint";
/// Seconds between two looks at a job that is under way: its coordinator tells of steps to who asks.
pub const LOOK_S: u64 = 10;
/// Seconds between two looks while something is on its way.
pub const SOON_S: u64 = 2;
/// Seconds that the deletion of a job waits for a last checkpoint.
pub const FAREWELL_S: i64 = 600;

/// What there is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Seconds since 1970.
    pub now: i64,
    /// The coordinator's pod.
    pub coordinator: Option<CoordinatorSeen>,
    /// The workers' Job or JobSet.
    pub crew: Option<CrewSeen>,
    /// The job wants a JobSet, and the cluster has no such resource.
    pub no_job_sets: bool,
    /// What the coordinator says of the run; absent: it does not answer.
    pub run: Option<RunSeen>,
}

/// The coordinator, as Kubernetes sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CoordinatorSeen {
    /// It listens.
    pub ready: bool,
    /// It ended with exit code 2, and with these words: no new start will mend that.
    pub hopeless: Option<String>,
    /// It ended otherwise, and is started again.
    pub failing: Option<String>,
}

/// The workers' Job or JobSet, as Kubernetes sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CrewSeen {
    /// Pods that there are to be.
    pub parallelism: i32,
    /// Pods that were asked for, of which Kueue may have admitted fewer.
    pub asked: i32,
    /// No pods are to be.
    pub suspended: bool,
    /// Pods that are pending or run.
    pub active: i32,
    /// Nodes that its pods stay away from.
    pub without: Vec<String>,
    /// What tells it from others ([`objects::crew_digest`]); absent: it does not say.
    pub template: Option<String>,
    /// Why it has fewer pods than there are to be.
    pub short: Option<String>,
    /// It was given up, and why.
    pub failed: Option<String>,
    /// It is deleted, and there still.
    pub going: bool,
}

/// A run, as its coordinator sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct RunSeen {
    /// Where it is in its life.
    pub phase: Phase,
    /// Workers that are wanted.
    pub desired: u32,
    /// Workers that are connected.
    pub workers: u32,
    /// Steps applied.
    pub step: Option<u64>,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Objective of the last step, nats a token.
    pub loss: Option<f64>,
    /// Tokens a second over the last steps.
    pub tokens_per_s: Option<f64>,
    /// What it waits for, or why it failed.
    pub message: Option<String>,
    /// Machines that computed wrongly.
    pub quarantined: Vec<String>,
}

/// Something to do, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Hold the job until its checkpoint is taken.
    AddFinalizer,
    /// Let the job go.
    RemoveFinalizer,
    /// Make this so.
    ConfigMap(Box<ConfigMap>),
    /// Make this so.
    Service(Box<Service>),
    /// Make this so.
    NetworkPolicy(Box<NetworkPolicy>),
    /// Make this so.
    Coordinator(Box<Deployment>),
    /// Make this so.
    Workers(Box<Job>),
    /// Make this so.
    JobSet(Box<JobSet>),
    /// Delete the workers' Job or JobSet and its pods.
    RemoveWorkers,
    /// Ask the coordinator for another number of workers.
    Scale(u32),
    /// Ask it to take a checkpoint and let its workers go.
    Pause,
    /// Ask it to go on.
    Resume,
    /// Tell people about it.
    Event {
        /// A word, as `Suspended`.
        reason: String,
        /// Whether it is a warning.
        warning: bool,
        /// A sentence.
        note: String,
    },
    /// Delete the PretrainJob.
    Delete,
}

/// What [`plan`] says.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What to do.
    pub changes: Vec<Change>,
    /// The status after it, as far as it is known now.
    pub status: PretrainJobStatus,
    /// When to look again, seconds; absent: when something changes.
    pub again_s: Option<u64>,
}

/// What is to be done for `job`, which is as `observed`.
pub fn plan(job: &PretrainJob, observed: &Observed) -> Plan {
    if job.metadata.deletion_timestamp.is_some() {
        return farewell(job, observed);
    }
    let before = job.status.clone().unwrap_or_default();
    let mut changes = Vec::new();
    if !job.finalizers().iter().any(|finalizer| finalizer == FINALIZER) {
        changes.push(Change::AddFinalizer);
    }
    let status = status::of(job, observed, &before);
    changes.extend(told(&before, &status));
    if status::is_over(&status) {
        return rest(job, observed, changes, status);
    }
    changes.extend(objects::config_map(job).map(|map| Change::ConfigMap(Box::new(map))));
    changes.push(Change::Service(Box::new(objects::coordinator_service(job))));
    if job.spec.workers.kind == WorkersKind::Job {
        changes.push(Change::Service(Box::new(objects::workers_service(job))));
    }
    changes.push(Change::NetworkPolicy(Box::new(objects::network_policy(job))));
    changes.push(Change::Coordinator(Box::new(objects::coordinator(job, 1))));
    let Steered { crew, suspended, other, asks } = steer(job, observed, &status.quarantined_nodes);
    changes.extend(crew_change(job, observed, &crew, suspended, other));
    changes.extend(asks);
    let moving = observed.run.as_ref().is_none_or(|run| run.phase != Phase::Running);
    Plan { changes, status, again_s: Some(if moving { SOON_S } else { LOOK_S }) }
}

/// What is to be done about the workers' Job or JobSet.
fn crew_change(
    job: &PretrainJob,
    observed: &Observed,
    crew: &Crew,
    suspended: bool,
    other: bool,
) -> Option<Change> {
    let (seen, queued) = (observed.crew.as_ref(), job.spec.queue_name.is_some());
    if observed.no_job_sets || seen.is_some_and(|crew| crew.going) {
        return None;
    }
    if other {
        // It has no pods, or none that have anything to lose. The next look makes it anew.
        let idle = suspended || seen.is_some_and(|crew| crew.suspended);
        return idle.then_some(Change::RemoveWorkers);
    }
    if queued && suspended {
        // Kueue would start what it has admitted, and would keep a place for what waits.
        return seen.map(|_| Change::RemoveWorkers);
    }
    if queued && seen.is_some() {
        return None;
    }
    Some(match job.spec.workers.kind {
        WorkersKind::Job => Change::Workers(Box::new(objects::workers(job, crew))),
        WorkersKind::JobSet => Change::JobSet(Box::new(objects::job_set(job, crew))),
    })
}

/// How the workers are to be.
struct Steered {
    /// Their Job.
    crew: Crew,
    /// They are to have no pods.
    suspended: bool,
    /// What is there cannot become what the spec asks for: another is to be made.
    other: bool,
    /// What is asked of the coordinator.
    asks: Vec<Change>,
}

/// How the workers' Job is to be, and what is asked of the coordinator.
fn steer(job: &PretrainJob, observed: &Observed, quarantined: &[String]) -> Steered {
    let spec = &job.spec;
    let (desired, queued) = (spec.workers.desired, spec.queue_name.is_some());
    let run = observed.run.as_ref();
    let phase = run.map(|run| run.phase);
    let seen = observed.crew.as_ref();
    let digest = objects::crew_digest(job, quarantined);
    let other = seen.and_then(|crew| crew.template.as_ref()).is_some_and(|of_theirs| *of_theirs != digest);
    // What a Job's pods are, and what they stay away from, can change only while it has none: so the run pauses for it.
    let moved = |crew: &CrewSeen| !objects::is_fixed(job) && crew.without != quarantined;
    let stale = seen.is_some_and(|crew| !crew.suspended && (other || moved(crew)));
    let halt = spec.suspend || stale;
    let trains = matches!(phase, Some(Phase::Forming | Phase::Running | Phase::Recovering | Phase::Queued));
    let mut asks = Vec::new();
    let suspended = if halt {
        if trains {
            asks.push(Change::Pause);
        }
        // Its pods stay until the checkpoint is taken; where nobody answers there is nobody to take it, but members that
        // train on. Only a Job that never ran, or whose run is paused, has nothing to lose.
        seen.is_none_or(|crew| crew.suspended) || phase == Some(Phase::Paused)
    } else {
        if phase == Some(Phase::Paused) {
            asks.push(Change::Resume);
        }
        false
    };
    let without = match seen {
        Some(crew) if !crew.suspended && !suspended => crew.without.clone(),
        _ => quarantined.to_vec(),
    };
    // Kueue says when, and how many of those that were asked for.
    let admitted = seen.filter(|crew| queued && crew.asked == desired);
    let crew = Crew {
        workers: admitted.map_or(desired, |crew| crew.parallelism),
        suspend: (!queued).then_some(suspended),
        without,
    };
    if let Some(run) = run
        && !halt
    {
        let wanted = crew.workers.max(spec.workers.min);
        let more = wanted > run.desired as i32;
        // Kubernetes says which pods go, so that their numbers stay dense; then the coordinator need not wait for them.
        let fewer = wanted < run.desired as i32 && seen.is_some_and(|crew| crew.active <= wanted);
        if more || fewer {
            asks.push(Change::Scale(wanted as u32));
        }
    }
    Steered { crew, suspended, other, asks }
}

/// A job that is over: nothing of it runs any more, and after a while it goes.
fn rest(
    job: &PretrainJob,
    observed: &Observed,
    mut changes: Vec<Change>,
    mut status: PretrainJobStatus,
) -> Plan {
    let finished = *status.finished_unix_seconds.get_or_insert(observed.now);
    status.workers = 0;
    if observed.coordinator.is_some() {
        changes.push(Change::Coordinator(Box::new(objects::coordinator(job, 0))));
    }
    if observed.crew.is_some() {
        changes.push(Change::RemoveWorkers);
    }
    let left = job.spec.ttl_seconds_after_finished.map(|ttl| finished + i64::from(ttl) - observed.now);
    if left.is_some_and(|left| left <= 0) {
        changes.push(Change::Delete);
    }
    Plan { changes, status, again_s: left.map(|left| left.max(1) as u64) }
}

/// A job that is deleted: its run is paused first, so that nothing that was trained is lost. Its objects follow it by
/// themselves, and its run folder stays: the same job made anew goes on with it.
fn farewell(job: &PretrainJob, observed: &Observed) -> Plan {
    let status = status::of(job, observed, &job.status.clone().unwrap_or_default());
    if !job.finalizers().iter().any(|finalizer| finalizer == FINALIZER) {
        return Plan { changes: Vec::new(), status, again_s: None };
    }
    let deleted = job.metadata.deletion_timestamp.as_ref().map_or(observed.now, |at| at.0.as_second());
    let late = observed.now - deleted >= FAREWELL_S;
    let phase = observed.run.as_ref().map(|run| run.phase);
    let silent = observed.coordinator.is_none() || observed.crew.is_none();
    let safe = status::is_over(&status)
        || phase == Some(Phase::Paused)
        || observed.coordinator.as_ref().is_some_and(|coordinator| coordinator.hopeless.is_some());
    if safe || silent || late {
        let note = format!(
            "the run folder {} has taken no last checkpoint within {FAREWELL_S} s; it is let go without",
            objects::run_of(job)
        );
        let warning = (late && !safe).then_some(Change::Event {
            reason: "NoLastCheckpoint".to_owned(),
            warning: true,
            note,
        });
        let changes = warning.into_iter().chain([Change::RemoveFinalizer]).collect();
        return Plan { changes, status, again_s: None };
    }
    let asks = phase.filter(|phase| *phase != Phase::Pausing).map(|_| Change::Pause);
    Plan { changes: asks.into_iter().collect(), status, again_s: Some(SOON_S) }
}

/// What people should hear of.
fn told(before: &PretrainJobStatus, now: &PretrainJobStatus) -> Option<Change> {
    let phase = now.phase.clone().filter(|phase| before.phase.as_ref() != Some(phase))?;
    let because = now.message.as_ref().map(|message| format!(": {message}")).unwrap_or_default();
    let note = format!("the run is {}{because}", phase.to_lowercase());
    Some(Change::Event { warning: phase == "Failed", reason: phase, note })
}

#[cfg(test)]
pub(crate) mod tests;

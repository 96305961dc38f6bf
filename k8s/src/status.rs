//! What is said of a job in its status. Pure.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use anello_proto::jobs::Phase;

use crate::objects::{PORT, coordinator_name, run_of, workers_selector};
use crate::plan::Observed;
use crate::resource::{PretrainJob, PretrainJobStatus};

/// A phase as Kubernetes writes such words.
fn word(phase: Phase) -> &'static str {
    match phase {
        Phase::Queued => "Queued",
        Phase::Forming => "Forming",
        Phase::Running => "Running",
        Phase::Pausing => "Pausing",
        Phase::Paused => "Paused",
        Phase::Recovering => "Recovering",
        Phase::Completed => "Completed",
        Phase::Failed => "Failed",
        Phase::Cancelled => "Cancelled",
    }
}

/// Whether a phase is for good.
pub fn is_over(status: &PretrainJobStatus) -> bool {
    [Phase::Completed, Phase::Failed, Phase::Cancelled]
        .map(word)
        .contains(&status.phase.as_deref().unwrap_or_default())
}

/// The status of `job` when it is as `observed`, after `before`. What is not seen now stays as it was.
pub fn of(job: &PretrainJob, observed: &Observed, before: &PretrainJobStatus) -> PretrainJobStatus {
    let (name, namespace) = (job.name_any(), job.namespace().unwrap_or_default());
    let mut status = PretrainJobStatus {
        selector: Some(workers_selector(&name)),
        coordinator: Some(format!("{}.{namespace}.svc:{PORT}", coordinator_name(&name))),
        run: Some(run_of(job)),
        observed_generation: job.metadata.generation,
        ..before.clone()
    };
    if !is_over(before) {
        take(&mut status, observed);
    }
    status.conditions = conditions(job, observed, &status, before);
    status
}

/// Takes in what is seen.
fn take(status: &mut PretrainJobStatus, observed: &Observed) {
    if let Some(run) = &observed.run {
        status.phase = Some(word(run.phase).to_owned());
        let short = observed.crew.as_ref().and_then(|crew| crew.short.as_ref());
        let short = short.map(|why| format!("some workers have no pods: {why}"));
        let said: Vec<String> = [run.message.clone(), short].into_iter().flatten().collect();
        status.message = Some(said.join("; ")).filter(|said| !said.is_empty());
        status.workers = run.workers as i32;
        status.step = run.step.map(|step| step as i64).or(status.step);
        status.total_steps = Some(run.total_steps as i64);
        status.loss = run.loss.map(|loss| format!("{loss:.3}")).or(status.loss.take());
        status.tokens_per_second =
            run.tokens_per_s.filter(|_| run.phase == Phase::Running).map(|speed| format!("{speed:.0}"));
        for machine in &run.quarantined {
            if !status.quarantined_nodes.contains(machine) {
                status.quarantined_nodes.push(machine.clone());
            }
        }
        status.quarantined_nodes.sort();
    }
    let hopeless = observed.coordinator.as_ref().and_then(|coordinator| coordinator.hopeless.clone());
    let given_up = observed.crew.as_ref().and_then(|crew| crew.failed.clone());
    let failing = observed.coordinator.as_ref().and_then(|coordinator| coordinator.failing.clone());
    if let Some(why) = hopeless {
        (status.phase, status.message) = (Some("Failed".to_owned()), Some(why));
    } else if let Some(why) = given_up
        && status.phase.as_deref() != Some("Completed")
    {
        let why = format!("Kubernetes gave the workers up: {why}");
        (status.phase, status.message) = (Some("Failed".to_owned()), Some(why));
    } else if observed.run.is_none() {
        status.message = Some(match failing {
            Some(why) => format!("the coordinator does not start: {why}"),
            None => "the coordinator does not answer yet; what trains goes on without it".to_owned(),
        });
    }
    if observed.no_job_sets && !is_over(status) {
        status.message = Some(
            "this cluster has no JobSets: install JobSet (https://jobset.sigs.k8s.io), or make the PretrainJob anew with \
             workers.kind Job"
                .to_owned(),
        );
    }
    if status.phase.is_none() {
        status.phase = Some("Pending".to_owned());
    }
}

fn conditions(
    job: &PretrainJob,
    observed: &Observed,
    status: &PretrainJobStatus,
    before: &PretrainJobStatus,
) -> Vec<Condition> {
    let phase = status.phase.clone().unwrap_or_default();
    let ready = observed.coordinator.as_ref().is_some_and(|coordinator| coordinator.ready);
    let suspended = phase == "Paused" && job.spec.suspend;
    let said = [
        ("CoordinatorReady", ready, if ready { "Listens" } else { "NotReady" }),
        ("Training", phase == "Running", phase.as_str()),
        ("Suspended", suspended, if suspended { "CheckpointTaken" } else { "NotSuspended" }),
        ("Complete", phase == "Completed", phase.as_str()),
        ("Failed", phase == "Failed" || phase == "Cancelled", phase.as_str()),
    ];
    let now = Time(Timestamp::from_second(observed.now).unwrap_or_default());
    said.into_iter()
        .map(|(kind, holds, reason)| {
            let holds = if holds { "True" } else { "False" };
            let old = before.conditions.iter().find(|old| old.type_ == kind && old.status == holds);
            let message = Some(status.message.clone().unwrap_or_default()).filter(|_| holds == "True");
            Condition {
                type_: kind.to_owned(),
                status: holds.to_owned(),
                reason: if reason.is_empty() { "Unknown".to_owned() } else { reason.to_owned() },
                message: message.unwrap_or_default(),
                last_transition_time: old.map_or_else(|| now.clone(), |old| old.last_transition_time.clone()),
                observed_generation: job.metadata.generation,
            }
        })
        .collect()
}

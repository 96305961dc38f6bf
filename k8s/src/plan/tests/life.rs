//! A job from its making to its end, and what people want of it meanwhile.

use super::*;

#[test]
fn a_job_is_made_trains_and_comes_to_its_end() {
    let mut cluster = Cluster::new(job());
    let first = cluster.look();
    assert_eq!(first.changes[0], Change::AddFinalizer);
    assert_eq!(cluster.status().phase.as_deref(), Some("Pending"));
    assert_eq!(cluster.status().coordinator.as_deref(), Some("llm-coordinator.research.svc:7700"));
    assert_eq!(cluster.status().run.as_deref(), Some("s3://bucket/runs/llm"));
    cluster.coordinator_answers(Phase::Forming);
    cluster.settle();
    assert_eq!(cluster.asked, ["scale to 4"], "it is submitted with the fewest, and then told");
    *cluster.run() = RunSeen {
        phase: Phase::Running,
        workers: 4,
        step: Some(7),
        loss: Some(3.24159),
        tokens_per_s: Some(1234.5),
        ..cluster.run().clone()
    };
    let plan = cluster.look();
    assert_eq!(plan.again_s, Some(LOOK_S));
    let status = cluster.status();
    assert_eq!((status.workers, status.step, status.total_steps), (4, Some(7), Some(464)));
    assert_eq!((status.loss.as_deref(), status.tokens_per_second.as_deref()), (Some("3.242"), Some("1234")));
    cluster.run().phase = Phase::Completed;
    cluster.look();
    cluster.look();
    assert!(cluster.observed.crew.is_none() && cluster.observed.coordinator.is_none());
    assert_eq!(cluster.status().phase.as_deref(), Some("Completed"));
    assert_eq!(cluster.status().finished_unix_seconds, Some(cluster.observed.now - 10));
    assert_eq!(cluster.events, ["Pending", "Forming", "Running", "Completed"]);
    assert_eq!(cluster.look().again_s, None, "it stays until it is deleted");
}

#[test]
fn conditions_say_since_when() {
    let mut cluster = Cluster::trains(job());
    let training = |cluster: &Cluster| {
        cluster.status().conditions.iter().find(|condition| condition.type_ == "Training").cloned().unwrap()
    };
    let before = training(&cluster);
    assert_eq!((before.status.as_str(), before.reason.as_str()), ("True", "Running"));
    cluster.look();
    assert_eq!(training(&cluster).last_transition_time, before.last_transition_time);
    cluster.run().phase = Phase::Recovering;
    cluster.look();
    let after = training(&cluster);
    assert_eq!((after.status.as_str(), after.reason.as_str()), ("False", "Recovering"));
    assert_eq!(after.last_transition_time, time(cluster.observed.now));
}

#[test]
fn more_are_asked_for_at_once_and_fewer_when_kubernetes_has_chosen_who_goes() {
    let mut cluster = Cluster::trains(job());
    cluster.job.spec.workers.desired = 6;
    cluster.look();
    assert_eq!((cluster.crew().parallelism, cluster.asked.as_slice()), (6, &["scale to 6".to_owned()][..]));
    cluster.job.spec.workers.desired = 2;
    let observed = cluster.observed.clone();
    let plan = plan(&cluster.job, &observed);
    assert!(
        !plan.changes.iter().any(|change| matches!(change, Change::Scale(_))),
        "six pods are there still"
    );
    cluster.settle();
    assert_eq!((cluster.crew().parallelism, cluster.asked.last().unwrap().as_str()), (2, "scale to 2"));
}

#[test]
fn a_suspended_job_keeps_its_pods_until_its_checkpoint_is_taken() {
    let mut cluster = Cluster::trains(job());
    cluster.job.spec.suspend = true;
    cluster.settle();
    assert_eq!(cluster.asked, ["pause"]);
    assert!(!cluster.crew().suspended, "the checkpoint is not taken yet");
    cluster.run().phase = Phase::Paused;
    cluster.settle();
    assert!(cluster.crew().suspended);
    let suspended = cluster.status().conditions.iter().find(|condition| condition.type_ == "Suspended");
    assert_eq!(suspended.unwrap().status, "True");
    cluster.job.spec.suspend = false;
    cluster.settle();
    assert_eq!(cluster.asked, ["pause", "resume"]);
    assert!(!cluster.crew().suspended);
}

#[test]
fn a_job_that_begins_suspended_has_no_pods() {
    let mut job = job();
    job.spec.suspend = true;
    let mut cluster = Cluster::new(job);
    cluster.look();
    assert!(cluster.crew().suspended);
    cluster.coordinator_answers(Phase::Forming);
    cluster.look();
    cluster.run().phase = Phase::Paused;
    cluster.settle();
    assert!(cluster.crew().suspended);
    assert_eq!(cluster.asked, ["pause"]);
}

#[test]
fn a_deleted_job_takes_a_checkpoint_first() {
    let mut cluster = Cluster::trains(job());
    cluster.job.metadata.deletion_timestamp = Some(time(cluster.observed.now));
    cluster.look();
    cluster.look();
    assert_eq!(cluster.asked, ["pause"]);
    assert!(!cluster.gone && cluster.observed.crew.is_some());
    cluster.run().phase = Phase::Paused;
    cluster.look();
    assert!(cluster.gone);
}

#[test]
fn a_deleted_job_whose_coordinator_stays_silent_goes_in_the_end() {
    let mut cluster = Cluster::trains(job());
    cluster.observed.run = None;
    cluster.job.metadata.deletion_timestamp = Some(time(cluster.observed.now));
    cluster.look();
    assert!(!cluster.gone, "it may be back at any moment");
    cluster.observed.now += FAREWELL_S;
    cluster.look();
    assert!(cluster.gone);
    assert_eq!(cluster.events.last().map(String::as_str), Some("NoLastCheckpoint"));
}

#[test]
fn a_job_that_is_over_goes_after_its_time() {
    let mut job = job();
    job.spec.ttl_seconds_after_finished = Some(60);
    let mut cluster = Cluster::trains(job);
    cluster.run().phase = Phase::Completed;
    assert_eq!(cluster.look().again_s, Some(60));
    for _ in 0..5 {
        cluster.look();
        assert!(cluster.job.metadata.deletion_timestamp.is_none());
    }
    cluster.look();
    assert!(cluster.job.metadata.deletion_timestamp.is_some());
    cluster.look();
    assert!(cluster.gone);
}

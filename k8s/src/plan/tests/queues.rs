//! Kueue, and JobSets.

use super::*;

#[test]
fn kueue_says_when_and_how_many() {
    let mut job = job();
    job.spec.queue_name = Some("gpus".into());
    let mut cluster = Cluster::new(job);
    let made = cluster.look();
    let crew = made.changes.iter().find_map(|change| match change {
        Change::Workers(job) => Some(job),
        _ => None,
    });
    assert_eq!(crew.unwrap().spec.as_ref().unwrap().suspend, None, "that is Kueue's");
    // Three of four are admitted.
    let seen = cluster.observed.crew.as_mut().unwrap();
    (seen.parallelism, seen.active) = (3, 3);
    cluster.coordinator_answers(Phase::Forming);
    cluster.settle();
    assert_eq!((cluster.crew().parallelism, cluster.asked.as_slice()), (3, &["scale to 3".to_owned()][..]));
    // A person wants another number: Kueue has to admit that anew, and lets nobody change what it has admitted.
    cluster.asked.clear();
    cluster.job.spec.workers.desired = 5;
    cluster.settle();
    assert_eq!((cluster.crew().parallelism, cluster.asked.as_slice()), (3, &["pause".to_owned()][..]));
    cluster.run().phase = Phase::Paused;
    cluster.look();
    assert!(cluster.observed.crew.is_none());
    cluster.settle();
    assert_eq!((cluster.crew().parallelism, cluster.crew().asked), (5, 5));
    assert_eq!(cluster.asked, ["pause", "resume", "scale to 5"]);
}

/// Else Kueue would start again what it has admitted, and would keep a place for what waits.
#[test]
fn what_is_suspended_leaves_the_queue() {
    let mut job = job();
    job.spec.queue_name = Some("gpus".into());
    let mut cluster = Cluster::trains(job);
    cluster.job.spec.suspend = true;
    cluster.settle();
    assert!(!cluster.crew().suspended, "the checkpoint is not taken yet");
    cluster.run().phase = Phase::Paused;
    cluster.settle();
    assert!(cluster.observed.crew.is_none());
    cluster.job.spec.suspend = false;
    cluster.settle();
    assert_eq!(cluster.crew().parallelism, 4);
    assert_eq!(cluster.asked, ["pause", "resume"]);
    // Evicted by Kueue: it says when they are back.
    cluster.observed.crew.as_mut().unwrap().suspended = true;
    let evicted = cluster.crew().clone();
    cluster.settle();
    assert_eq!((cluster.crew(), cluster.asked.len()), (&evicted, 2));
}

#[test]
fn a_queue_hears_of_fewer_workers_only_where_there_may_be_fewer() {
    let mut job = job();
    job.spec.queue_name = Some("gpus".into());
    let partial = |job: &PretrainJob| {
        let made = objects::workers(job, &Crew { workers: 4, ..Crew::default() });
        made.metadata.annotations.unwrap().get("kueue.x-k8s.io/job-min-parallelism").cloned()
    };
    assert_eq!(partial(&job).as_deref(), Some("2"));
    job.spec.workers.min = 4;
    assert_eq!(partial(&job), None, "Kueue refuses one that is not below the parallelism");
    (job.spec.workers.min, job.spec.workers.kind) = (2, WorkersKind::JobSet);
    assert_eq!(partial(&job), None, "Kueue admits JobSets whole");
}

#[test]
fn a_job_set_is_made_anew_for_all_but_a_pause() {
    let mut job = job();
    job.spec.workers.kind = WorkersKind::JobSet;
    let mut cluster = Cluster::trains(job);
    let own_service = cluster.look().changes.into_iter().any(|change| match change {
        Change::Service(service) => service.name_any() == "llm-workers",
        _ => false,
    });
    assert!(!own_service, "JobSet makes the workers' Service");
    // Suspended and resumed it is the same.
    let before = cluster.crew().clone();
    cluster.job.spec.suspend = true;
    cluster.settle();
    cluster.run().phase = Phase::Paused;
    cluster.settle();
    assert!(cluster.crew().suspended);
    cluster.job.spec.suspend = false;
    cluster.settle();
    assert_eq!(
        (cluster.crew(), cluster.asked.as_slice()),
        (&before, &["pause", "resume"].map(str::to_owned)[..])
    );
    // With another number of workers, or a node to stay away from, it is another.
    cluster.asked.clear();
    let changes: [fn(&mut Cluster); 2] = [
        |cluster| cluster.job.spec.workers.desired = 6,
        |cluster| cluster.run().quarantined = vec!["node-7".into()],
    ];
    for change in changes {
        cluster.run().phase = Phase::Running;
        change(&mut cluster);
        let before = cluster.crew().clone();
        cluster.settle();
        assert_eq!(cluster.crew(), &before, "its pods stay until the checkpoint is taken");
        cluster.run().phase = Phase::Paused;
        assert!(cluster.look().changes.contains(&Change::RemoveWorkers));
        // While it goes, nothing is made under its name.
        cluster.observed.crew = Some(CrewSeen { going: true, ..before.clone() });
        let made = plan(&cluster.job, &cluster.observed).changes;
        assert!(!made.iter().any(|change| matches!(change, Change::JobSet(_) | Change::RemoveWorkers)));
        cluster.observed.crew = None;
        cluster.settle();
        assert!(cluster.crew().template != before.template && !cluster.crew().suspended);
    }
    assert_eq!(cluster.asked, ["pause", "resume", "scale to 6", "pause", "resume"]);
    assert_eq!(
        (cluster.crew().parallelism, cluster.crew().without.as_slice()),
        (6, &["node-7".to_owned()][..])
    );
}

#[test]
fn where_there_are_no_job_sets_people_are_told() {
    let mut job = job();
    job.spec.workers.kind = WorkersKind::JobSet;
    let mut cluster = Cluster::new(job);
    cluster.observed.no_job_sets = true;
    cluster.look();
    assert!(cluster.observed.crew.is_none());
    assert!(
        cluster.status().message.as_deref().unwrap().contains("this cluster has no JobSets: install JobSet")
    );
    cluster.observed.no_job_sets = false;
    cluster.look();
    assert_eq!(cluster.crew().parallelism, 4);
}

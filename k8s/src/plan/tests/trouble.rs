//! What goes wrong in a cluster, and what people are told of it.

use super::*;

#[test]
fn a_quota_is_told_of() {
    let mut cluster = Cluster::trains(job());
    let short = |cluster: &mut Cluster| {
        cluster.observed.crew.as_mut().unwrap().short = Some("exceeded quota: research".into());
    };
    short(&mut cluster);
    cluster.look();
    let told = cluster.status().message.clone().unwrap();
    assert_eq!(told, "some workers have no pods: exceeded quota: research");
    cluster.run().message = Some("workers: 1 of 2 are here".into());
    short(&mut cluster);
    cluster.look();
    let told = cluster.status().message.clone().unwrap();
    assert_eq!(told, "workers: 1 of 2 are here; some workers have no pods: exceeded quota: research");
}

#[test]
fn what_no_start_will_mend_ends_the_job() {
    let mut cluster = Cluster::new(job());
    cluster.look();
    let words = "error: the config has 1 problem";
    let seen = CoordinatorSeen { hopeless: Some(words.into()), ..CoordinatorSeen::default() };
    cluster.observed.coordinator = Some(seen);
    cluster.look();
    assert_eq!(cluster.status().phase.as_deref(), Some("Failed"));
    assert_eq!(cluster.status().message.as_deref(), Some(words));
    assert!(cluster.observed.crew.is_none() && cluster.observed.coordinator.is_none());
    cluster.look();
    assert_eq!(cluster.status().message.as_deref(), Some(words), "it stays said");
}

#[test]
fn what_keeps_failing_is_said_and_tried_again() {
    let mut cluster = Cluster::new(job());
    cluster.look();
    let seen =
        CoordinatorSeen { failing: Some("ErrImagePull: no such image".into()), ..CoordinatorSeen::default() };
    cluster.observed.coordinator = Some(seen);
    let plan = cluster.look();
    assert_eq!(plan.again_s, Some(SOON_S));
    assert_eq!(
        cluster.status().message.as_deref(),
        Some("the coordinator does not start: ErrImagePull: no such image")
    );
    cluster.coordinator_answers(Phase::Running);
    cluster.look();
    assert_eq!(cluster.status().message, None);
}

#[test]
fn a_coordinator_that_is_away_stops_nothing() {
    let mut cluster = Cluster::trains(job());
    cluster.observed.run = None;
    cluster.observed.coordinator = Some(CoordinatorSeen::default());
    let step = cluster.status().step;
    let plan = cluster.look();
    assert_eq!(cluster.crew().active, 4);
    assert_eq!((cluster.status().phase.as_deref(), cluster.status().step), (Some("Running"), step));
    assert!(plan.status.message.unwrap().contains("what trains goes on without it"));
}

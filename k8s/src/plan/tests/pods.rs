//! What pods a job has, and when they become others.

use super::*;

#[test]
fn other_pods_are_made_after_a_pause() {
    // While it trains: it pauses for it by itself.
    let mut cluster = Cluster::trains(job());
    cluster.job.spec.termination_grace_period_seconds = 7;
    let before = cluster.crew().clone();
    cluster.look();
    cluster.settle();
    assert_eq!(cluster.asked, ["pause"]);
    assert_eq!(cluster.crew(), &before, "its pods stay until the checkpoint is taken");
    cluster.run().phase = Phase::Paused;
    assert!(cluster.look().changes.contains(&Change::RemoveWorkers));
    cluster.settle();
    assert_eq!(cluster.asked, ["pause", "resume"]);
    assert!(cluster.crew().template != before.template && !cluster.crew().suspended);

    // While it is suspended: it stays so.
    let mut cluster = Cluster::trains(job());
    cluster.job.spec.suspend = true;
    cluster.look();
    cluster.run().phase = Phase::Paused;
    cluster.settle();
    let before = cluster.crew().clone();
    cluster.job.spec.image = "anello:2".into();
    cluster.settle();
    assert!(cluster.crew().template != before.template && cluster.crew().suspended);
    assert_eq!(cluster.asked, ["pause"]);

    // While Kueue has not admitted it.
    let mut queued = job();
    queued.spec.queue_name = Some("research".into());
    let mut cluster = Cluster::new(queued);
    cluster.look();
    cluster.coordinator_answers(Phase::Forming);
    cluster.observed.crew.as_mut().unwrap().suspended = true;
    let before = cluster.crew().clone();
    cluster.job.spec.image = "anello:2".into();
    cluster.look();
    cluster.look();
    assert!(cluster.crew().template != before.template);

    // One that was made before pods were told apart is left alone.
    let mut cluster = Cluster::trains(job());
    cluster.observed.crew.as_mut().unwrap().template = None;
    assert!(!cluster.look().changes.contains(&Change::RemoveWorkers));
}

#[test]
fn a_node_that_computed_wrongly_is_left_out_after_a_pause() {
    let mut cluster = Cluster::trains(job());
    cluster.run().quarantined = vec!["node-7".into()];
    cluster.settle();
    assert_eq!(cluster.asked, ["pause"]);
    assert_eq!(cluster.status().quarantined_nodes, ["node-7"]);
    cluster.run().phase = Phase::Paused;
    cluster.settle();
    assert_eq!(cluster.crew().without, ["node-7"]);
    assert!(!cluster.crew().suspended);
    assert_eq!(cluster.asked, ["pause", "resume"]);
    // The status remembers, whoever is coordinator then.
    cluster.run().quarantined.clear();
    cluster.run().phase = Phase::Running;
    cluster.settle();
    assert_eq!(cluster.crew().without, ["node-7"]);
}

#[test]
fn certificates_of_cert_manager_have_the_names_that_the_command_knows() {
    let mut job = job();
    job.spec.tls = Some(TlsSource { secret_name: "certs".into(), cert_manager: true });
    let crew = Crew { workers: 1, ..Crew::default() };
    let of = |pod: k8s_openapi::api::core::v1::PodTemplateSpec| {
        let volumes = pod.spec.and_then(|pod| pod.volumes).unwrap_or_default();
        let secret = volumes.into_iter().find_map(|volume| volume.secret).unwrap();
        let items = secret.items.unwrap().into_iter().map(|item| format!("{} as {}", item.key, item.path));
        (secret.secret_name.unwrap(), items.collect::<Vec<_>>())
    };
    let (name, items) = of(objects::workers(&job, &crew).spec.unwrap().template);
    assert_eq!(name, "certs-worker");
    assert_eq!(items, ["ca.crt as ca.pem", "tls.crt as worker.pem", "tls.key as worker.key"]);
    let (name, items) = of(objects::coordinator(&job, 1).spec.unwrap().template);
    assert_eq!(name, "certs-coordinator");
    assert_eq!(items, ["ca.crt as ca.pem", "tls.crt as coordinator.pem", "tls.key as coordinator.key"]);
}

/// All objects of a job with most of what one can ask for, as files.
#[test]
fn objects_are_as_they_were() {
    let mut job = job();
    job.spec.config = ConfigSource { inline: Some("include = \"tiny\"\n".into()), ..ConfigSource::default() };
    job.spec.set = vec!["seed=7".into()];
    job.spec.gpu = Some(Gpu::default());
    job.spec.threads = Some(8);
    job.spec.queue_name = Some("gpus".into());
    job.spec.node_selector.insert("gpu".into(), "h100".into());
    job.spec.env_from = vec![crate::secret_variables("bucket")];
    job.spec.http =
        Some(HttpSource { token_secret_name: Some("tokens".into()), peak_flops: Some("989e12".into()) });
    let crew = Crew { workers: 4, suspend: None, without: vec!["node-7".into()] };
    let texts = [
        serde_saphyr::to_string(&objects::config_map(&job).unwrap()),
        serde_saphyr::to_string(&objects::coordinator_service(&job)),
        serde_saphyr::to_string(&objects::workers_service(&job)),
        serde_saphyr::to_string(&objects::network_policy(&job)),
        serde_saphyr::to_string(&objects::coordinator(&job, 1)),
        serde_saphyr::to_string(&objects::workers(&job, &crew)),
    ];
    insta::assert_snapshot!(texts.map(Result::unwrap).join("---\n"));
    // The same workers, as a JobSet.
    job.spec.workers.kind = WorkersKind::JobSet;
    let crew = Crew { suspend: Some(false), ..crew };
    insta::assert_snapshot!("job_set", serde_saphyr::to_string(&objects::job_set(&job, &crew)).unwrap());
}

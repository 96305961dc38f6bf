//! A small cluster in which plans are carried out, and what is asked of it step by step.

use k8s_openapi::api::batch::v1::JobSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;

use super::*;
use crate::resource::{ConfigSource, Gpu, HttpSource, PretrainJobSpec, TlsSource, Workers};

pub(crate) fn job() -> PretrainJob {
    let spec = PretrainJobSpec {
        config: ConfigSource { preset: Some("tiny".into()), ..ConfigSource::default() },
        state: "s3://bucket/runs/".into(),
        image: "anello:1".into(),
        workers: Workers { desired: 4, min: 2, max: Some(8), kind: WorkersKind::Job },
        tls: Some(TlsSource { secret_name: "certs".into(), ..TlsSource::default() }),
        ..PretrainJobSpec::default()
    };
    let mut job = PretrainJob::new("llm", spec);
    job.metadata.namespace = Some("research".into());
    job.metadata.uid = Some("5f1c".into());
    job.metadata.generation = Some(1);
    job
}

/// Kubernetes and a coordinator, as far as plans see them.
struct Cluster {
    job: PretrainJob,
    observed: Observed,
    /// What the coordinator was asked, and what people were told.
    asked: Vec<String>,
    events: Vec<String>,
    gone: bool,
}

impl Cluster {
    fn new(job: PretrainJob) -> Self {
        Self {
            job,
            observed: Observed { now: 1_000, ..Observed::default() },
            asked: Vec::new(),
            events: Vec::new(),
            gone: false,
        }
    }

    fn run(&mut self) -> &mut RunSeen {
        self.observed.run.as_mut().expect("the coordinator answers")
    }

    fn crew(&self) -> &CrewSeen {
        self.observed.crew.as_ref().expect("there is a Job")
    }

    fn status(&self) -> &PretrainJobStatus {
        self.job.status.as_ref().expect("a plan was carried out")
    }

    /// The coordinator's pod is up, and it has taken the job up.
    fn coordinator_answers(&mut self, phase: Phase) {
        self.observed.coordinator = Some(CoordinatorSeen { ready: true, ..CoordinatorSeen::default() });
        let min = self.job.spec.workers.min as u32;
        self.observed.run = Some(RunSeen {
            phase,
            desired: min,
            workers: 0,
            step: None,
            total_steps: 464,
            loss: None,
            tokens_per_s: None,
            message: None,
            quarantined: Vec::new(),
        });
    }

    /// Carries one plan out, as the API server and the Job controller would.
    fn look(&mut self) -> Plan {
        self.observed.now += 10;
        let plan = plan(&self.job, &self.observed);
        self.job.status = Some(plan.status.clone());
        for change in &plan.changes {
            match change {
                Change::AddFinalizer => {
                    self.job.metadata.finalizers.get_or_insert_default().push(FINALIZER.into());
                }
                Change::RemoveFinalizer => {
                    self.job.metadata.finalizers = None;
                    self.gone |= self.job.metadata.deletion_timestamp.is_some();
                }
                Change::ConfigMap(_) | Change::Service(_) | Change::NetworkPolicy(_) => {}
                Change::Coordinator(deployment) => {
                    match deployment.spec.as_ref().and_then(|spec| spec.replicas) {
                        Some(0) => (self.observed.coordinator, self.observed.run) = (None, None),
                        _ => drop(self.observed.coordinator.get_or_insert_default()),
                    }
                }
                Change::Workers(made) => self.make_workers(&made.metadata, made.spec.as_ref().unwrap()),
                Change::JobSet(made) => {
                    let mut spec = made.spec.replicated_jobs[0].template.spec.clone().unwrap();
                    spec.suspend = made.spec.suspend;
                    let template = &made.metadata.annotations.as_ref().unwrap()[objects::TEMPLATE];
                    let before = self.observed.crew.as_ref().and_then(|crew| crew.template.clone());
                    assert!(before.is_none_or(|before| before == *template), "a JobSet is changed");
                    self.make_workers(&made.metadata, &spec);
                }
                Change::RemoveWorkers => self.observed.crew = None,
                Change::Scale(workers) => {
                    self.asked.push(format!("scale to {workers}"));
                    self.run().desired = *workers;
                }
                Change::Pause => {
                    self.asked.push("pause".into());
                    self.run().phase = Phase::Pausing;
                }
                Change::Resume => {
                    self.asked.push("resume".into());
                    self.run().phase = Phase::Forming;
                }
                Change::Event { reason, .. } => self.events.push((*reason).to_owned()),
                Change::Delete => self.job.metadata.deletion_timestamp = Some(time(self.observed.now)),
            }
        }
        plan
    }

    fn make_workers(&mut self, metadata: &ObjectMeta, spec: &JobSpec) {
        let (metadata, spec) = (metadata.clone(), spec.clone());
        let before = self.observed.crew.clone();
        let affinity = spec.template.spec.unwrap().affinity.and_then(|a| a.node_affinity);
        let required = affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution);
        let without: Vec<String> = required
            .into_iter()
            .flat_map(|r| r.node_selector_terms)
            .flat_map(|term| term.match_expressions.unwrap())
            .flat_map(|expression| expression.values.unwrap())
            .collect();
        let template = metadata.annotations.as_ref().unwrap()[objects::TEMPLATE].clone();
        if let Some(before) = &before {
            let same = before.template.as_ref().is_none_or(|of_theirs| *of_theirs == template);
            assert!(same, "a Job's pods cannot become others");
            let may_change = before.suspended || spec.suspend == Some(true);
            assert!(
                may_change || before.without == without,
                "a Job's pods cannot be changed while it has some"
            );
        }
        let suspended = spec.suspend.unwrap_or(before.as_ref().is_some_and(|crew| crew.suspended));
        let ran = before.as_ref().is_some_and(|crew| !crew.suspended);
        let trains = self.observed.run.as_ref().is_some_and(|run| {
            matches!(run.phase, Phase::Running | Phase::Forming | Phase::Recovering | Phase::Pausing)
        });
        assert!(!(ran && suspended && trains), "pods are taken away before the checkpoint is taken");
        let parallelism = spec.parallelism.unwrap();
        assert_eq!(spec.completions, Some(parallelism), "an Indexed Job is elastic when both are equal");
        self.observed.crew = Some(CrewSeen {
            parallelism,
            asked: metadata.annotations.as_ref().unwrap()[objects::ASKED].parse().unwrap(),
            suspended,
            active: if suspended { 0 } else { parallelism },
            without,
            failed: None,
            template: Some(template),
            short: None,
            going: false,
        });
    }

    /// Looks until nothing is asked any more.
    fn settle(&mut self) {
        for _ in 0..5 {
            self.look();
        }
        let before = self.asked.len();
        self.look();
        assert_eq!(self.asked.len(), before, "it asks again and again: {:?}", self.asked);
    }

    fn trains(job: PretrainJob) -> Self {
        let mut cluster = Self::new(job);
        cluster.look();
        cluster.coordinator_answers(Phase::Forming);
        cluster.settle();
        cluster.run().phase = Phase::Running;
        cluster.run().workers = cluster.job.spec.workers.desired as u32;
        cluster.settle();
        cluster.asked.clear();
        cluster
    }
}

fn time(second: i64) -> Time {
    Time(Timestamp::from_second(second).unwrap())
}

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

/// All objects of a job with most of what one can ask for, as files.
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

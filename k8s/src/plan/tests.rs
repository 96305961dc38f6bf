//! A small cluster in which plans are carried out, and what is asked of it step by step.

mod life;
mod pods;
mod queues;
mod trouble;

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

//! The workers' Job, and what tells one from another.

use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement,
    PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
};
use k8s_openapi::api::core::v1::{
    Affinity, Container, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm,
    PodTemplateSpec,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt;

use super::pod::{from_pod, pod, variable};
use super::{ASKED, PORT, TEMPLATE, coordinator_name, labels, metadata, workers_name};
use crate::resource::{PretrainJob, WorkersKind};

/// The label by which Kueue knows that a Job is its business.
const QUEUE_LABEL: &str = "kueue.x-k8s.io/queue-name";
/// By which Kueue may admit fewer pods than are asked for.
const MIN_PARALLELISM: &str = "kueue.x-k8s.io/job-min-parallelism";
const EQUAL_COMPLETIONS: &str = "kueue.x-k8s.io/job-completions-equal-parallelism";
/// Name of a node in its own labels.
const HOSTNAME: &str = "kubernetes.io/hostname";
/// Deaths of a worker's pod before its index is given up: each is retried with a growing pause.
const BACKOFF_LIMIT_PER_INDEX: i32 = 1000;
/// Exit codes of `anello` (see `anello --help`).
mod exit {
    /// The arguments or the config are wrong.
    pub const USAGE: i32 = 2;
    /// The worker has left before the run was over, because it was asked to (`--left-code`; EX_TEMPFAIL of sysexits.h).
    pub const LEFT: i32 = 75;
    /// The machine computed wrongly.
    pub const EVICTED: i32 = 5;
}

/// How the workers' Job is to be now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Crew {
    /// Pods.
    pub workers: i32,
    /// No pods; absent: Kueue decides.
    pub suspend: Option<bool>,
    /// Nodes that no worker is sent to.
    pub without: Vec<String>,
}

/// The workers: a pod for each.
pub fn workers(job: &PretrainJob, crew: &Crew) -> Job {
    let (name, spec) = (job.name_any(), &job.spec);
    let template = template(job, &crew.without);
    let mut metadata = metadata(job, workers_name(&name), labels(&name, "worker"));
    let annotations = metadata.annotations.get_or_insert_default();
    annotations.insert(ASKED.to_owned(), spec.workers.desired.to_string());
    annotations.insert(TEMPLATE.to_owned(), crew_digest(job, &crew.without));
    if let Some(queue) = &spec.queue_name {
        // Kueue refuses one that is not below the parallelism, and of JobSets it admits all or nothing.
        if spec.workers.min < spec.workers.desired && spec.workers.kind == WorkersKind::Job {
            annotations.insert(MIN_PARALLELISM.to_owned(), spec.workers.min.to_string());
            annotations.insert(EQUAL_COMPLETIONS.to_owned(), "true".to_owned());
        }
        metadata.labels.get_or_insert_default().insert(QUEUE_LABEL.to_owned(), queue.clone());
    }
    Job {
        metadata,
        spec: Some(JobSpec {
            completion_mode: Some("Indexed".to_owned()),
            // Elastic: an Indexed Job may change both together.
            completions: Some(crew.workers),
            parallelism: Some(crew.workers),
            suspend: crew.suspend,
            backoff_limit_per_index: Some(BACKOFF_LIMIT_PER_INDEX),
            pod_failure_policy: Some(failure_policy()),
            pod_replacement_policy: Some("Failed".to_owned()),
            template,
            ..JobSpec::default()
        }),
        status: None,
    }
}

/// Whether nothing of the workers' object can be changed once it is made, but for a JobSet's `suspend`: JobSet and Kueue refuse
/// that, and what Kueue admitted is Kueue's.
pub fn is_fixed(job: &PretrainJob) -> bool {
    job.spec.queue_name.is_some() || job.spec.workers.kind == WorkersKind::JobSet
}

/// What tells the workers' object from others that a job could have, when its pods stay away from the nodes `without`: one that
/// differs in this asks for another object. For a Job alone these are its pods, wherever they may run; see [`is_fixed`].
pub fn crew_digest(job: &PretrainJob, without: &[String]) -> String {
    let spec = &job.spec;
    let text = if is_fixed(job) {
        let counts = (spec.workers.desired, spec.workers.min, spec.workers.kind);
        serde_json::to_vec(&(template(job, without), counts, &spec.queue_name))
    } else {
        serde_json::to_vec(&template(job, &[]))
    };
    blake3::hash(&text.expect("a template is plain data")).to_hex()[..16].to_owned()
}

/// A worker's pod, which stays away from some nodes.
fn template(job: &PretrainJob, without: &[String]) -> PodTemplateSpec {
    let (name, spec) = (job.name_any(), &job.spec);
    let coordinator = format!("{}:{PORT}", coordinator_name(&name));
    let arguments = ["worker", "--coordinator", &coordinator, "--job", &name];
    let left = exit::LEFT.to_string();
    let place = ["--address", "$(POD_IP)", "--machine", "$(NODE_NAME)", "--left-code", &left];
    let threads = spec.threads.map(|threads| ["--threads".to_owned(), threads.to_string()]);
    let arguments = arguments.into_iter().chain(place).map(str::to_owned);
    let mut resources = spec.resources.clone().unwrap_or_default();
    if let Some(gpu) = &spec.gpu {
        let amount = Quantity(gpu.count.to_string());
        // Kubernetes asks that the two are equal for devices.
        for all in [&mut resources.limits, &mut resources.requests] {
            all.get_or_insert_default().insert(gpu.resource.clone(), amount.clone());
        }
    }
    let container = Container {
        name: "worker".to_owned(),
        env: Some(vec![
            from_pod("POD_IP", "status.podIP"),
            from_pod("NODE_NAME", "spec.nodeName"),
            // As many threads for LibTorch as the pod may use are found by itself; a library that waits must not spin.
            variable("OMP_WAIT_POLICY", "PASSIVE"),
        ]),
        resources: Some(resources),
        ..Container::default()
    };
    let arguments = arguments.chain(threads.into_iter().flatten()).collect();
    let mut template = pod(job, "worker", arguments, container, Vec::new());
    let pod = template.spec.get_or_insert_default();
    pod.affinity = (!without.is_empty()).then(|| away_from(without));
    pod.restart_policy = Some("Never".to_owned());
    pod.subdomain = Some(workers_name(&name));
    pod.node_selector = Some(spec.node_selector.clone()).filter(|labels| !labels.is_empty());
    pod.priority_class_name = spec.priority_class_name.clone();
    pod.termination_grace_period_seconds = Some(spec.termination_grace_period_seconds);
    template
}

/// What becomes of the Job when a worker's pod fails.
fn failure_policy() -> PodFailurePolicy {
    let exits = |action: &str, values: Vec<i32>| PodFailurePolicyRule {
        action: action.to_owned(),
        on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
            container_name: Some("worker".to_owned()),
            operator: "In".to_owned(),
            values,
        }),
        on_pod_conditions: None,
    };
    let disrupted = PodFailurePolicyOnPodConditionsPattern {
        type_: "DisruptionTarget".to_owned(),
        status: Some("True".to_owned()),
    };
    PodFailurePolicy {
        rules: vec![
            // A node that drains or is lost is nobody's fault.
            PodFailurePolicyRule {
                action: "Ignore".to_owned(),
                on_pod_conditions: Some(vec![disrupted]),
                on_exit_codes: None,
            },
            exits("FailJob", vec![exit::USAGE]),
            // It was asked to go, or another node may do: the one that it was on is left out.
            exits("Ignore", vec![exit::EVICTED, exit::LEFT]),
        ],
    }
}

fn away_from(nodes: &[String]) -> Affinity {
    let elsewhere = NodeSelectorRequirement {
        key: HOSTNAME.to_owned(),
        operator: "NotIn".to_owned(),
        values: Some(nodes.to_vec()),
    };
    let term = NodeSelectorTerm { match_expressions: Some(vec![elsewhere]), match_fields: None };
    let required = NodeSelector { node_selector_terms: vec![term] };
    Affinity {
        node_affinity: Some(NodeAffinity {
            required_during_scheduling_ignored_during_execution: Some(required),
            ..NodeAffinity::default()
        }),
        ..Affinity::default()
    }
}

//! The objects that a job is made of, as they are to be. Pure: the same job gives the same objects.
//!
//! ```text
//! PretrainJob llm ─┬─ ConfigMap   llm-config        the run config, when it is inline
//!                  ├─ Deployment  llm-coordinator   one pod, killed and started at will
//!                  ├─ Service     llm-coordinator   where workers and users find it
//!                  ├─ Service     llm-workers       headless: names for the workers' pods
//!                  ├─ Job         llm-workers       indexed and elastic: a pod for each worker
//!                  └─ NetworkPolicy llm             who may come in
//! ```

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy};
use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement,
    PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
};
use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, ConfigMap, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource,
    EnvVar, EnvVarSource, GRPCAction, KeyToPath, NodeAffinity, NodeSelector, NodeSelectorRequirement,
    NodeSelectorTerm, ObjectFieldSelector, PodSecurityContext, PodSpec, PodTemplateSpec, Probe,
    ResourceRequirements, SeccompProfile, SecretVolumeSource, SecurityContext, Service, ServicePort,
    ServiceSpec, TCPSocketAction, Volume, VolumeMount,
};
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{Resource, ResourceExt};

use crate::resource::{ConfigSource, PretrainJob};

/// Port of the coordinator.
pub const PORT: i32 = 7700;
/// The job that an object belongs to.
pub const JOB_LABEL: &str = "anello.dev/job";
/// What an object is in it: coordinator or worker.
pub const ROLE_LABEL: &str = "anello.dev/role";
/// On the coordinator's pod: which PretrainJob it is of.
const UID: &str = "anello.dev/uid";
/// On the workers' Job: the pods that were asked for.
pub const ASKED: &str = "anello.dev/asked";
/// The label by which Kueue knows that a Job is its business.
const QUEUE_LABEL: &str = "kueue.x-k8s.io/queue-name";
/// By which Kueue may admit fewer pods than are asked for.
const MIN_PARALLELISM: &str = "kueue.x-k8s.io/job-min-parallelism";
const EQUAL_COMPLETIONS: &str = "kueue.x-k8s.io/job-completions-equal-parallelism";
/// Name of a node in its own labels.
const HOSTNAME: &str = "kubernetes.io/hostname";
/// Deaths of a worker's pod before its index is given up: each is retried with a growing pause.
const BACKOFF_LIMIT_PER_INDEX: i32 = 1000;
/// Where the config is mounted.
const CONFIG_DIR: &str = "/etc/anello/config";
/// Where certificates are mounted.
const TLS_DIR: &str = "/etc/anello/tls";
/// Exit codes of `anello` (see `anello --help`).
mod exit {
    /// The arguments or the config are wrong.
    pub const USAGE: i32 = 2;
    /// The worker has left before the run was over, because it was asked to (`--left-code`; EX_TEMPFAIL of sysexits.h).
    pub const LEFT: i32 = 75;
    /// The machine computed wrongly.
    pub const EVICTED: i32 = 5;
}

/// Name of the coordinator's Deployment and Service.
pub fn coordinator_name(job: &str) -> String {
    format!("{job}-coordinator")
}

/// Name of the workers' Job and Service.
pub fn workers_name(job: &str) -> String {
    format!("{job}-workers")
}

/// Selects the pods of the workers.
pub fn workers_selector(job: &str) -> String {
    format!("{JOB_LABEL}={job},{ROLE_LABEL}=worker")
}

/// The run folder of a job.
pub fn run_of(job: &PretrainJob) -> String {
    format!("{}/{}", job.spec.state.trim_end_matches('/'), job.name_any())
}

fn labels(job: &str, role: &str) -> BTreeMap<String, String> {
    let label = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    let own = [(JOB_LABEL, job), (ROLE_LABEL, role)];
    let common =
        [("app.kubernetes.io/name", "anello"), ("app.kubernetes.io/managed-by", "anello-controller")];
    own.into_iter().chain(common).map(label).collect()
}

/// Metadata of an object of `job`.
fn metadata(job: &PretrainJob, name: String, labels: BTreeMap<String, String>) -> ObjectMeta {
    let owner: Option<OwnerReference> = job.controller_owner_ref(&());
    ObjectMeta {
        name: Some(name),
        namespace: job.namespace(),
        labels: Some(labels),
        owner_references: owner.map(|owner| vec![owner]),
        ..ObjectMeta::default()
    }
}

/// The ConfigMap of an inline config.
pub fn config_map(job: &PretrainJob) -> Option<ConfigMap> {
    let inline = job.spec.config.inline.clone()?;
    let name = format!("{}-config", job.name_any());
    Some(ConfigMap {
        metadata: metadata(job, name, labels(&job.name_any(), "config")),
        data: Some(BTreeMap::from([("run.toml".to_owned(), inline)])),
        ..ConfigMap::default()
    })
}

/// What restricted pod security asks of a container.
fn restricted() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
        read_only_root_filesystem: Some(true),
        ..SecurityContext::default()
    }
}

fn variable(name: &str, value: &str) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value.to_owned()), value_from: None }
}

fn from_pod(name: &str, path: &str) -> EnvVar {
    let field = ObjectFieldSelector { field_path: path.to_owned(), api_version: None };
    let from = EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() };
    EnvVar { name: name.to_owned(), value: None, value_from: Some(from) }
}

/// What all pods of a job have: `arguments` of `anello`, the volumes that `more` names besides the user's.
fn pod(
    job: &PretrainJob,
    role: &str,
    arguments: Vec<String>,
    container: Container,
    more: Vec<(Volume, VolumeMount)>,
) -> PodTemplateSpec {
    let spec = &job.spec;
    let scratch = Volume {
        name: "anello-tmp".to_owned(),
        empty_dir: Some(EmptyDirVolumeSource::default()),
        ..Volume::default()
    };
    let scratch_mount = VolumeMount {
        name: "anello-tmp".to_owned(),
        mount_path: "/tmp".to_owned(),
        ..VolumeMount::default()
    };
    let tls = spec.tls.as_ref().map(|tls| {
        // A key is for its role alone.
        let files = ["ca.pem".to_owned(), format!("{role}.pem"), format!("{role}.key")];
        let item = |file: String| KeyToPath { key: file.clone(), path: file, mode: Some(0o440) };
        let source = SecretVolumeSource {
            secret_name: Some(tls.secret_name.clone()),
            items: Some(files.into_iter().map(item).collect()),
            ..SecretVolumeSource::default()
        };
        let volume = Volume { name: "anello-tls".to_owned(), secret: Some(source), ..Volume::default() };
        let mount = VolumeMount {
            name: "anello-tls".to_owned(),
            mount_path: TLS_DIR.to_owned(),
            read_only: Some(true),
            ..VolumeMount::default()
        };
        (volume, mount)
    });
    let own = std::iter::once((scratch, scratch_mount)).chain(tls).chain(more);
    let (volumes, mounts): (Vec<_>, Vec<_>) = own.unzip();
    let protection = match &spec.tls {
        Some(_) => ["--tls".to_owned(), TLS_DIR.to_owned()].to_vec(),
        None => vec!["--insecure".to_owned()],
    };
    let env_from = Some(spec.env_from.clone()).filter(|from| !from.is_empty());
    let mut env = spec.env.clone();
    env.extend(container.env.clone().unwrap_or_default());
    let container = Container {
        image: Some(spec.image.clone()),
        image_pull_policy: spec.image_pull_policy.clone(),
        command: Some(vec!["anello".to_owned()]),
        args: Some(arguments.into_iter().chain(protection).collect()),
        env: Some(env),
        env_from,
        volume_mounts: Some(mounts.into_iter().chain(spec.volume_mounts.clone()).collect()),
        security_context: Some(restricted()),
        // So that the last words of a pod that fails are in its status, and in ours.
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        ..container
    };
    let pod = PodSpec {
        containers: vec![container],
        volumes: Some(volumes.into_iter().chain(spec.volumes.clone()).collect()),
        tolerations: Some(spec.tolerations.clone()).filter(|all| !all.is_empty()),
        image_pull_secrets: Some(spec.image_pull_secrets.clone()).filter(|all| !all.is_empty()),
        service_account_name: spec.service_account_name.clone(),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(65532),
            run_as_group: Some(65532),
            fs_group: Some(65532),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".to_owned(),
                ..SeccompProfile::default()
            }),
            ..PodSecurityContext::default()
        }),
        ..PodSpec::default()
    };
    PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(labels(&job.name_any(), role)), ..ObjectMeta::default() }),
        spec: Some(pod),
    }
}

/// Where the coordinator finds the config: its argument, and what is mounted for it.
fn config(job: &PretrainJob) -> (String, Vec<(Volume, VolumeMount)>) {
    let (name, key) = match &job.spec.config {
        ConfigSource { preset: Some(preset), .. } => return (preset.clone(), Vec::new()),
        ConfigSource { config_map: Some(map), .. } => (map.name.clone(), map.key.clone()),
        ConfigSource { .. } => (format!("{}-config", job.name_any()), "run.toml".to_owned()),
    };
    let file = "run.toml".to_owned();
    let source = ConfigMapVolumeSource {
        name,
        items: Some(vec![KeyToPath { key, path: file.clone(), mode: None }]),
        ..ConfigMapVolumeSource::default()
    };
    let volume = Volume { name: "anello-config".to_owned(), config_map: Some(source), ..Volume::default() };
    let mount = VolumeMount {
        name: "anello-config".to_owned(),
        mount_path: CONFIG_DIR.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    };
    (format!("{CONFIG_DIR}/{file}"), vec![(volume, mount)])
}

/// The coordinator. It submits the job to itself when the place does not hold it yet, and goes on with it when it does.
pub fn coordinator(job: &PretrainJob, replicas: i32) -> Deployment {
    let (name, spec) = (job.name_any(), &job.spec);
    let (config, mounts) = config(job);
    // Not with the workers that are wanted, or it would be started anew by each change of them: it is told.
    let (listen, min) = (format!("0.0.0.0:{PORT}"), spec.workers.min.to_string());
    let mut arguments = vec!["coordinator", "--jobs", &spec.state, "--slots", "0", "--listen", &listen];
    arguments.extend(["--detection", &spec.detection, "--submit", &config, "--name", &name, "--min", &min]);
    arguments.extend(spec.set.iter().flat_map(|set| ["--set", set]));
    let arguments = arguments.into_iter().map(str::to_owned).collect();
    let request = |(name, amount): (&str, &str)| (name.to_owned(), Quantity(amount.to_owned()));
    let requests = [("cpu", "100m"), ("memory", "256Mi")].map(request);
    let modest = ResourceRequirements { requests: Some(requests.into()), ..ResourceRequirements::default() };
    let probe = match &spec.tls {
        // gRPC probes of the kubelet know no client certificates.
        Some(_) => Probe {
            tcp_socket: Some(TCPSocketAction { port: IntOrString::Int(PORT), host: None }),
            ..Probe::default()
        },
        None => Probe { grpc: Some(GRPCAction { port: PORT, service: None }), ..Probe::default() },
    };
    let container = Container {
        name: "coordinator".to_owned(),
        ports: Some(vec![ContainerPort {
            name: Some("grpc".to_owned()),
            container_port: PORT,
            ..ContainerPort::default()
        }]),
        readiness_probe: Some(Probe { period_seconds: Some(5), ..probe }),
        resources: Some(spec.coordinator_resources.clone().unwrap_or(modest)),
        ..Container::default()
    };
    let mut template = pod(job, "coordinator", arguments, container, mounts);
    // A job that is made anew under an old name has a coordinator of its own, which reads the config anew.
    let whose = BTreeMap::from([(UID.to_owned(), job.uid().unwrap_or_default())]);
    template.metadata.get_or_insert_default().annotations = Some(whose);
    if let Some(pod) = &mut template.spec {
        pod.termination_grace_period_seconds = Some(30);
    }
    let own = labels(&name, "coordinator");
    let selector = |label: &str| (label.to_owned(), own[label].clone());
    Deployment {
        metadata: metadata(job, coordinator_name(&name), own.clone()),
        spec: Some(DeploymentSpec {
            replicas: Some(replicas),
            // Two at once would only fence one another.
            strategy: Some(DeploymentStrategy { type_: Some("Recreate".to_owned()), rolling_update: None }),
            selector: LabelSelector {
                match_labels: Some([JOB_LABEL, ROLE_LABEL].map(selector).into()),
                match_expressions: None,
            },
            template,
            ..DeploymentSpec::default()
        }),
        status: None,
    }
}

fn service(job: &PretrainJob, name: String, role: &str, spec: ServiceSpec) -> Service {
    let own = labels(&job.name_any(), role);
    let selector = [JOB_LABEL, ROLE_LABEL].map(|label| (label.to_owned(), own[label].clone()));
    Service {
        metadata: metadata(job, name, own),
        spec: Some(ServiceSpec { selector: Some(selector.into()), ..spec }),
        status: None,
    }
}

/// Where workers and users find the coordinator.
pub fn coordinator_service(job: &PretrainJob) -> Service {
    let port = ServicePort {
        name: Some("grpc".to_owned()),
        port: PORT,
        target_port: Some(IntOrString::String("grpc".to_owned())),
        ..ServicePort::default()
    };
    let spec = ServiceSpec { ports: Some(vec![port]), ..ServiceSpec::default() };
    service(job, coordinator_name(&job.name_any()), "coordinator", spec)
}

/// Names for the workers' pods.
pub fn workers_service(job: &PretrainJob) -> Service {
    let spec = ServiceSpec {
        cluster_ip: Some("None".to_owned()),
        publish_not_ready_addresses: Some(true),
        ..ServiceSpec::default()
    };
    service(job, workers_name(&job.name_any()), "worker", spec)
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
    pod.restart_policy = Some("Never".to_owned());
    pod.subdomain = Some(workers_name(&name));
    pod.node_selector = Some(spec.node_selector.clone()).filter(|labels| !labels.is_empty());
    pod.priority_class_name = spec.priority_class_name.clone();
    pod.termination_grace_period_seconds = Some(spec.termination_grace_period_seconds);
    pod.affinity = (!crew.without.is_empty()).then(|| away_from(&crew.without));
    let mut metadata = metadata(job, workers_name(&name), labels(&name, "worker"));
    let annotations = metadata.annotations.get_or_insert_default();
    annotations.insert(ASKED.to_owned(), spec.workers.desired.to_string());
    if let Some(queue) = &spec.queue_name {
        annotations.insert(MIN_PARALLELISM.to_owned(), spec.workers.min.to_string());
        annotations.insert(EQUAL_COMPLETIONS.to_owned(), "true".to_owned());
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

/// Who may come in: the job's own pods everywhere, and anyone who has a certificate, or is let in by the cluster's own
/// rules, at the coordinator.
pub fn network_policy(job: &PretrainJob) -> NetworkPolicy {
    let name = job.name_any();
    let own = LabelSelector {
        match_labels: Some(BTreeMap::from([(JOB_LABEL.to_owned(), name.clone())])),
        match_expressions: None,
    };
    let controller = LabelSelector {
        match_labels: Some(BTreeMap::from([(
            "app.kubernetes.io/name".to_owned(),
            "anello-controller".to_owned(),
        )])),
        match_expressions: None,
    };
    let peers = vec![NetworkPolicyPeer { pod_selector: Some(own.clone()), ..NetworkPolicyPeer::default() }];
    let users = NetworkPolicyPeer {
        pod_selector: Some(controller),
        namespace_selector: Some(LabelSelector::default()),
        ..NetworkPolicyPeer::default()
    };
    let grpc = NetworkPolicyPort { port: Some(IntOrString::Int(PORT)), ..NetworkPolicyPort::default() };
    NetworkPolicy {
        metadata: metadata(job, name.clone(), labels(&name, "network")),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(own),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(vec![
                NetworkPolicyIngressRule { from: Some(peers), ports: None },
                NetworkPolicyIngressRule { from: Some(vec![users]), ports: Some(vec![grpc]) },
            ]),
            egress: None,
        }),
    }
}

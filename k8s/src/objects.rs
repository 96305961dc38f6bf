//! The objects that a job is made of, as they are to be. Pure: the same job gives the same objects.
//!
//! ```text
//! PretrainJob llm ─┬─ ConfigMap   llm-config        the run config, when it is inline
//!                  ├─ Deployment  llm-coordinator   one pod, killed and started at will
//!                  ├─ Service     llm-coordinator   where workers and users find it
//!                  ├─ Service     llm-workers       headless: names for the workers' pods
//!                  ├─ Job         llm-workers       indexed and elastic: a pod for each worker; or, when asked,
//!                  │  JobSet      llm               with such a Job, llm-workers-0, and JobSet's Service llm-workers
//!                  └─ NetworkPolicy llm             who may come in
//! ```

//!
//! `pod` is what all pods have.

mod coordinator;
mod jobset;
mod pod;
mod workers;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, Service, ServicePort, ServiceSpec};
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{Resource, ResourceExt};

use crate::resource::PretrainJob;

pub use coordinator::coordinator;
pub use jobset::{JobSet, job_set, replicated_name};
pub use workers::{Crew, crew_digest, is_fixed, workers};

/// Port of the coordinator.
pub const PORT: i32 = 7700;
/// Port of metrics and the page, in every pod of a job that serves them.
pub const HTTP: i32 = 9100;
/// The job that an object belongs to.
pub const JOB_LABEL: &str = "anello.dev/job";
/// What an object is in it: coordinator or worker.
pub const ROLE_LABEL: &str = "anello.dev/role";
/// On the workers' Job or JobSet: the pods that were asked for.
pub const ASKED: &str = "anello.dev/asked";
/// On the workers' Job or JobSet: what tells it from others ([`crew_digest`]).
pub const TEMPLATE: &str = "anello.dev/template";

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
    let port = |name: &str, port| ServicePort {
        name: Some(name.to_owned()),
        port,
        target_port: Some(IntOrString::String(name.to_owned())),
        ..ServicePort::default()
    };
    let http = job.spec.http.as_ref().map(|_| port("http", HTTP));
    let ports = std::iter::once(port("grpc", PORT)).chain(http).collect();
    let spec = ServiceSpec { ports: Some(ports), ..ServiceSpec::default() };
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

/// Who may come in: the job's own pods everywhere, the controller at the coordinator, and anyone in the cluster where metrics
/// are served: what they may read there is a matter of certificates and tokens.
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
    let anyone = NetworkPolicyPeer {
        namespace_selector: Some(LabelSelector::default()),
        ..NetworkPolicyPeer::default()
    };
    let rule = |from: Vec<NetworkPolicyPeer>, port: Option<i32>| NetworkPolicyIngressRule {
        from: Some(from),
        ports: port.map(|port| {
            vec![NetworkPolicyPort { port: Some(IntOrString::Int(port)), ..NetworkPolicyPort::default() }]
        }),
    };
    let http = job.spec.http.as_ref().map(|_| rule(vec![anyone], Some(HTTP)));
    let rules = [rule(peers, None), rule(vec![users], Some(PORT))].into_iter().chain(http);
    NetworkPolicy {
        metadata: metadata(job, name.clone(), labels(&name, "network")),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(own),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(rules.collect()),
            egress: None,
        }),
    }
}

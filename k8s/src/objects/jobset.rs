//! The workers as a JobSet (<https://jobset.sigs.k8s.io>, v1alpha2): as much of that resource as is written or read here.

use k8s_openapi::api::batch::v1::JobTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};
use kube::{CustomResource, ResourceExt};
use serde::{Deserialize, Serialize};

use super::workers::{Crew, workers};
use super::{metadata, workers_name};
use crate::resource::PretrainJob;

/// Name of the one replicated job.
const REPLICATED: &str = "workers";

/// Jobs that belong together.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "jobset.x-k8s.io",
    version = "v1alpha2",
    kind = "JobSet",
    namespaced,
    schema = "disabled",
    status = "JobSetStatus",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct JobSetSpec {
    /// Kinds of Jobs.
    #[serde(default)]
    pub replicated_jobs: Vec<ReplicatedJob>,
    /// Names of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
    /// What becomes of it when a Job fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_policy: Option<FailurePolicy>,
    /// No pods are to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,
}

/// Jobs that are alike.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplicatedJob {
    /// Its Jobs are JOBSET-NAME-0, and so on.
    pub name: String,
    /// How many.
    #[serde(default)]
    pub replicas: i32,
    /// What each is.
    pub template: JobTemplateSpec,
}

/// A headless Service that JobSet makes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// Whether there is one.
    #[serde(rename = "enableDNSHostnames", default, skip_serializing_if = "Option::is_none")]
    pub enable_dns_hostnames: Option<bool>,
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subdomain: Option<String>,
    /// Also pods that are not ready have names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publish_not_ready_addresses: Option<bool>,
}

/// What becomes of it when a Job fails.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FailurePolicy {
    /// How often all Jobs are made anew before it has failed.
    #[serde(default)]
    pub max_restarts: i32,
}

/// What JobSet says of one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobSetStatus {
    /// Completed, Failed, Suspended and others.
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

/// Name of the Job that the JobSet of a job makes: that of a plain Job is another.
pub fn replicated_name(job: &str) -> String {
    format!("{job}-{REPLICATED}-0")
}

/// The workers: a JobSet of one elastic Job, which would be [`workers`] by itself.
///
/// JobSet changes no Job that it has made but for `suspend` (its webhook refuses it; what may be changed besides are labels,
/// annotations, node selectors and tolerations of pods, for Kueue). So all else asks for another one: see
/// [`super::crew_digest`].
pub fn job_set(job: &PretrainJob, crew: &Crew) -> JobSet {
    let name = job.name_any();
    let mut made = workers(job, crew);
    let mut spec = made.spec.take().unwrap_or_default();
    let suspend = spec.suspend.take();
    let labels = made.metadata.labels.clone().unwrap_or_default();
    let mut own = metadata(job, name.clone(), labels.clone());
    own.annotations = made.metadata.annotations.take();
    let of_job = ObjectMeta { labels: Some(super::labels(&name, "worker")), ..ObjectMeta::default() };
    let template = JobTemplateSpec { metadata: Some(of_job), spec: Some(spec) };
    JobSet {
        metadata: own,
        spec: JobSetSpec {
            replicated_jobs: vec![ReplicatedJob { name: REPLICATED.to_owned(), replicas: 1, template }],
            network: Some(Network {
                enable_dns_hostnames: Some(true),
                subdomain: Some(workers_name(&name)),
                publish_not_ready_addresses: Some(true),
            }),
            // The Job bears what may happen to workers; when it fails, no other one will do better.
            failure_policy: Some(FailurePolicy { max_restarts: 0 }),
            suspend,
        },
        status: None,
    }
}

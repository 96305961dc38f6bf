//! `PretrainJob`: what a user writes, and what the controller says of it. `reference` tells of every field.

mod reference;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    EnvFromSource, EnvVar, LocalObjectReference, ResourceRequirements, Toleration, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use reference::reference;

/// A run, and the workers that it is to have. Its weights and losses depend on `config` and `set` alone.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "anello.dev",
    version = "v1alpha1",
    kind = "PretrainJob",
    plural = "pretrainjobs",
    shortname = "ptj",
    category = "all",
    namespaced,
    status = "PretrainJobStatus",
    derive = "PartialEq",
    doc = "A pretraining run: the same weights and losses, to the bit, whatever becomes of its pods.",
    scale(
        spec_replicas_path = ".spec.workers.desired",
        status_replicas_path = ".status.workers",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Step", type_ = "integer", json_path = ".status.step"),
    printcolumn(name = "Of", type_ = "integer", json_path = ".status.totalSteps"),
    printcolumn(name = "Loss", type_ = "string", json_path = ".status.loss"),
    printcolumn(name = "Workers", type_ = "integer", json_path = ".status.workers"),
    printcolumn(name = "Wanted", type_ = "integer", json_path = ".spec.workers.desired"),
    printcolumn(name = "Tokens/s", type_ = "string", json_path = ".status.tokensPerSecond", priority = "1"),
    printcolumn(name = "Waits for", type_ = "string", json_path = ".status.message", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    // The longest name that is made from it is that of a worker's pod, and its host name has at most 63 letters.
    validation = Rule::new("self.metadata.name.size() <= 48 && !self.metadata.name.contains('.')")
        .message("the name of a PretrainJob has at most 48 letters and no dots: pods and services are named after it"),
    // As JobSet's own webhook has it for the pods that it makes.
    validation = Rule::new("self.spec.workers.kind != 'JobSet' || (self.metadata.name.size() <= 42 && self.metadata.name.matches('^[a-z]'))")
        .message("with workers.kind JobSet the name of a PretrainJob begins with a letter and has at most 42")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.config == oldSelf.config && self.set == oldSelf.set && self.state == oldSelf.state")
        .message("config, set and state are what the run is: they cannot change; submit another PretrainJob"),
    validation = Rule::new("self.workers.min == oldSelf.workers.min")
        .message("workers.min cannot change: it is submitted with the job"),
    validation = Rule::new("self.workers.kind == oldSelf.workers.kind")
        .message("workers.kind cannot change; delete the PretrainJob and make it anew: its run goes on"),
    validation = Rule::new("self.image == oldSelf.image || self.suspend")
        .message("image can change while suspend is true: all workers of a ring must be of one build"),
    validation = Rule::new("has(self.tls) != self.insecure")
        .message("give tls.secretName, or insecure: true where nobody else reaches the pods' network; not both")
)]
pub struct PretrainJobSpec {
    /// The run config.
    pub config: ConfigSource,
    /// Overrides of it, as `--set` takes them: `stage.stable.lr=1e-4`.
    #[serde(default)]
    #[schemars(length(max = 128), inner(length(max = 1024)))]
    pub set: Vec<String>,
    /// Place of the run folder: a URL (s3://, gs://, az://) or a path in a volume that all pods have. The run is in
    /// STATE/NAME; what is there already is gone on with.
    #[x_kube(validation = Rule::new("self.size() > 0").message("state must not be empty"))]
    #[schemars(length(max = 4096))]
    pub state: String,
    /// Image with the `anello` command.
    #[x_kube(validation = Rule::new("self.size() > 0").message("image must not be empty"))]
    #[schemars(length(max = 1024))]
    pub image: String,
    /// When the image is pulled: Always, IfNotPresent or Never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Always", "IfNotPresent", "Never"]))]
    pub image_pull_policy: Option<String>,
    /// Secrets for pulling it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// How many workers.
    #[serde(default)]
    pub workers: Workers,
    /// CPU threads of each worker; absent: all cores that its pod may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub threads: Option<i32>,
    /// Devices of each worker; absent: CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,
    /// Requests and limits of each worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
    /// Requests and limits of the coordinator (default: requests of a tenth of a core and 256 MiB).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coordinator_resources: Option<ResourceRequirements>,
    /// Nodes for the workers, by their labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that pods bear.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// Volumes of all pods, with data or state.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Volume>,
    /// Where they are mounted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volume_mounts: Vec<VolumeMount>,
    /// Variables of all pods.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<EnvVar>,
    /// Secrets and ConfigMaps whose entries are variables of all pods: a store's credentials.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env_from: Vec<EnvFromSource>,
    /// Account of the pods, for a cloud's workload identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account_name: Option<String>,
    /// Priority class of the workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class_name: Option<String>,
    /// Kueue queue that admits the workers; Kueue may then admit fewer than are wanted, down to workers.min.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_name: Option<String>,
    /// Take a checkpoint and let all workers go, until it is false again.
    #[serde(default)]
    pub suspend: bool,
    /// Delete the PretrainJob so many seconds after its run is over; absent: never. The run folder stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub ttl_seconds_after_finished: Option<i32>,
    /// Seconds that a worker is given to hand over when its pod is to go.
    #[serde(default = "grace")]
    #[schemars(range(min = 1, max = 86400))]
    pub termination_grace_period_seconds: i64,
    /// How long a silent fault of a worker may go unseen, as `10s`; absent: `ring.detection` of the config.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9]+(ms|s|m)$"))]
    pub detection: Option<String>,
    /// TLS between the pods, with certificates of `anello certs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsSource>,
    /// No TLS: whoever reaches the pods' network can read and change what is trained.
    #[serde(default)]
    pub insecure: bool,
    /// Serve metrics on port 9100 of every pod, and the page and its interface on the coordinator's; absent: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpSource>,
}

impl Default for PretrainJobSpec {
    /// What is not written in a manifest, over an empty config.
    fn default() -> Self {
        let nothing = serde_json::json!({ "config": {}, "state": "", "image": "" });
        serde_json::from_value(nothing).expect("all else has a default")
    }
}

fn grace() -> i64 {
    120
}

/// A run config.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("[has(self.preset), has(self.inline), has(self.configMap)].filter(given, given).size() == 1")
        .message("give one of preset, inline and configMap")
)]
pub struct ConfigSource {
    /// Name of a preset, as `ouro-1.4b`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// The config itself, TOML.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 524288))]
    pub inline: Option<String>,
    /// A ConfigMap with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map: Option<ConfigMapKey>,
}

/// An entry of a ConfigMap.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigMapKey {
    /// The ConfigMap, in the same namespace.
    pub name: String,
    /// Its entry.
    #[serde(default = "config_key")]
    pub key: String,
}

fn config_key() -> String {
    "run.toml".to_owned()
}

/// How many workers. The result does not depend on it.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.min <= self.desired").message("workers.desired is below workers.min"),
    validation = Rule::new("!has(self.max) || self.desired <= self.max").message("workers.desired is above workers.max")
)]
pub struct Workers {
    /// That are wanted; `kubectl scale` sets it.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 4096))]
    pub desired: i32,
    /// Fewest that train; with fewer the job waits.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 4096))]
    pub min: i32,
    /// Most that `desired` may be set to, by a person or an autoscaler.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub max: Option<i32>,
    /// What makes their pods: Job, which changes its number of pods while they train; or JobSet, where the cluster has it and
    /// its queues or tools are made for it: to change their number, the run pauses with a checkpoint and goes on.
    #[serde(default)]
    pub kind: WorkersKind,
}

/// What makes the workers' pods.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum WorkersKind {
    /// An elastic Indexed Job.
    #[default]
    Job,
    /// A JobSet of one.
    JobSet,
}

fn one() -> i32 {
    1
}

impl Default for Workers {
    fn default() -> Self {
        Self { desired: 1, min: 1, max: None, kind: WorkersKind::Job }
    }
}

impl Default for Gpu {
    fn default() -> Self {
        Self { resource: nvidia(), count: 1 }
    }
}

/// Devices of a worker.
#[derive(JsonSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Gpu {
    /// Name of the resource.
    #[serde(default = "nvidia")]
    pub resource: String,
    /// How many. A worker computes on one: more are for who shares a device among pods.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 16))]
    pub count: i32,
}

fn nvidia() -> String {
    "nvidia.com/gpu".to_owned()
}

/// Where certificates are.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TlsSource {
    /// A Secret in the same namespace with ca.pem, coordinator.pem, coordinator.key, worker.pem and worker.key, as
    /// `anello certs init` makes them; with `certManager` the beginning of the names of two.
    pub secret_name: String,
    /// The Secrets are secretName-coordinator and secretName-worker, each with ca.crt, tls.crt and tls.key: as cert-manager
    /// writes them for certificates of the names coordinator.anello and worker.anello.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cert_manager: bool,
}

/// What is served over HTTP.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpSource {
    /// A Secret in the same namespace whose entry `tokens` says who may read and who may act: lines `ROLE NAME TOKEN`. Without
    /// it whoever has a certificate, or with `insecure` reaches the port, may read, and nobody may act.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_secret_name: Option<String>,
    /// Peak FLOP/s of one worker's device, as `989e12`: metrics tell then which share of it the model reaches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9]+(\.[0-9]+)?([eE][0-9]+)?$"))]
    pub peak_flops: Option<String>,
}

/// What the controller knows of a job. A view: the truth is the run folder.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PretrainJobStatus {
    /// Queued, Forming, Running, Pausing, Paused, Recovering, Completed, Failed or Cancelled; the last three are for good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// What it waits for, or why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Steps applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<i64>,
    /// Steps of the whole run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_steps: Option<i64>,
    /// Objective of the last step, nats a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<String>,
    /// Tokens a second over the last steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<String>,
    /// Workers that are connected.
    #[serde(default)]
    pub workers: i32,
    /// Selects the pods of the workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Where users and workers reach the coordinator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coordinator: Option<String>,
    /// The run folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// Nodes on which a worker computed wrongly: no worker is sent there any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub quarantined_nodes: Vec<String>,
    /// When the run was over, seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_unix_seconds: Option<i64>,
    /// Generation of the spec that this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// CoordinatorReady, Training, Suspended, Complete, Failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

#[cfg(test)]
mod tests;

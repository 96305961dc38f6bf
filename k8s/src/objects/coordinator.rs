//! The coordinator's Deployment.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy};
use k8s_openapi::api::core::v1::{
    ConfigMapVolumeSource, Container, ContainerPort, GRPCAction, KeyToPath, Probe, ResourceRequirements,
    TCPSocketAction, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use super::pod::pod;
use super::{JOB_LABEL, PORT, ROLE_LABEL, coordinator_name, labels, metadata};
use crate::resource::{ConfigSource, PretrainJob};

/// On the coordinator's pod: which PretrainJob it is of.
const UID: &str = "anello.dev/uid";
/// Where the config is mounted.
const CONFIG_DIR: &str = "/etc/anello/config";

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
    arguments.extend(spec.detection.iter().flat_map(|detection| ["--detection", detection]));
    arguments.extend(["--submit", &config, "--name", &name, "--min", &min]);
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

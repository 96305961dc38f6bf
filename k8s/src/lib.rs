//! Anello on Kubernetes: the `PretrainJob` resource and its controller.
//!
//! `resource` is what users write; `objects` (what a job is made of), `plan` (what is to be done) and `status` (what is
//! said of it) are pure; `controller` is the shell that observes, applies and looks again, and `coordinator` its way to a
//! job's coordinator, `crew` to its workers' Job or JobSet. `lease` says which of several controllers acts.
//! `doctor` asks a cluster whether all of that is in order.

mod controller;
mod coordinator;
mod crew;
mod doctor;
mod lease;
mod objects;
mod plan;
mod resource;
mod status;

use k8s_openapi::api::core::v1::{EnvFromSource, SecretEnvSource};

pub use controller::{ControllerOptions, Error, apply, run};
pub use doctor::{Checkup, checkup};
pub use resource::{
    ConfigMapKey, ConfigSource, Gpu, HttpSource, PretrainJob, PretrainJobSpec, PretrainJobStatus, TlsSource,
    Workers, WorkersKind, reference,
};

/// The definition of the resource, YAML: `kubectl apply -f` takes it.
pub fn definition() -> String {
    use kube::CustomResourceExt;
    serde_saphyr::to_string(&PretrainJob::crd()).expect("a definition is plain data")
}

/// An object as a file for `kubectl apply -f`, YAML, without a status.
pub fn manifest(job: &PretrainJob) -> String {
    serde_saphyr::to_string(&PretrainJob { status: None, ..job.clone() }).expect("a resource is plain data")
}

/// The variables that are the entries of a Secret.
pub fn secret_variables(name: &str) -> EnvFromSource {
    let secret = SecretEnvSource { name: name.to_owned(), optional: None };
    EnvFromSource { secret_ref: Some(secret), ..EnvFromSource::default() }
}

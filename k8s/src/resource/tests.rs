//! What the API server refuses, by the definition's own rules, and that the definition is as it was.

use kube::core::cel::{validate_cel, validate_cel_update};

use super::*;
use crate::plan::tests::job;

fn told(result: Result<(), impl std::fmt::Display>) -> String {
    result.err().map(|errors| errors.to_string()).unwrap_or_default()
}

/// The rules' words for a job that was changed so, after it was made.
fn update(change: impl FnOnce(&mut PretrainJobSpec)) -> String {
    let (old, mut new) = (job(), job());
    change(&mut new.spec);
    told(validate_cel_update(&new, &old))
}

/// The rules' words for a job that is made so.
fn create(change: impl FnOnce(&mut PretrainJob)) -> String {
    let mut new = job();
    change(&mut new);
    told(validate_cel(&new))
}

#[test]
fn what_the_run_is_cannot_change() {
    assert_eq!(update(|_| ()), "");
    assert_eq!(update(|spec| spec.workers.desired = 8), "");
    assert_eq!(update(|spec| spec.suspend = true), "");
    let fixed = "they cannot change; submit another PretrainJob";
    for text in [
        update(|spec| spec.config.preset = Some("mano".into())),
        update(|spec| spec.set = vec!["seed=2".into()]),
        update(|spec| spec.state = "s3://other".into()),
    ] {
        assert!(text.contains(fixed), "{text}");
    }
    assert!(update(|spec| spec.workers.min = 1).contains("workers.min cannot change"));
    assert!(update(|spec| spec.workers.kind = WorkersKind::JobSet).contains("workers.kind cannot change"));
    assert!(
        update(|spec| spec.image = "anello:2".into()).contains("all workers of a ring must be of one build")
    );
    let suspended = update(|spec| {
        spec.image = "anello:2".into();
        spec.suspend = true;
    });
    assert_eq!(suspended, "");
}

#[test]
fn what_cannot_be_is_refused() {
    assert_eq!(create(|_| ()), "");
    let one = "give one of preset, inline and configMap";
    assert!(create(|job| job.spec.config.preset = None).contains(one));
    assert!(create(|job| job.spec.config.inline = Some("include = \"tiny\"".into())).contains(one));
    assert!(create(|job| job.spec.tls = None).contains("give tls.secretName, or insecure: true"));
    assert!(create(|job| job.spec.insecure = true).contains("not both"));
    assert!(create(|job| job.spec.workers.desired = 1).contains("workers.desired is below workers.min"));
    assert!(create(|job| job.spec.workers.desired = 9).contains("workers.desired is above workers.max"));
    assert!(create(|job| job.spec.state = String::new()).contains("state must not be empty"));
    assert!(create(|job| job.spec.image = String::new()).contains("image must not be empty"));
    let name = |name: &str| create(|job| job.metadata.name = Some(name.to_owned()));
    assert!(name(&"x".repeat(49)).contains("at most 48 letters"));
    assert!(name("a.b").contains("no dots"));
    let of_set = |name: &str| {
        create(|job| {
            job.spec.workers.kind = WorkersKind::JobSet;
            job.metadata.name = Some(name.to_owned());
        })
    };
    assert_eq!(of_set(&"x".repeat(42)), "");
    assert!(of_set(&"x".repeat(43)).contains("has at most 42"));
    assert!(of_set("7b").contains("begins with a letter"));
}

#[test]
fn a_manifest_needs_little() {
    let text = r#"{"config": {"preset": "tiny"}, "state": "/runs", "image": "anello", "insecure": true}"#;
    let spec: PretrainJobSpec = serde_json::from_str(text).unwrap();
    assert_eq!(spec.workers, Workers { desired: 1, min: 1, max: None, kind: WorkersKind::Job });
    assert_eq!((spec.detection.as_deref(), spec.termination_grace_period_seconds), (None, 120));
    assert_eq!(told(validate_cel(&PretrainJob::new("a", spec))), "");
}

/// Without the schemas of Kubernetes' own types, which are long and not ours.
#[test]
fn the_definition_is_as_it_was() {
    use kube::CustomResourceExt;
    let mut crd = serde_json::to_value(PretrainJob::crd()).unwrap();
    let schema = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
    let spec = crd.pointer_mut(schema).and_then(serde_json::Value::as_object_mut).unwrap();
    for foreign in
        ["env", "envFrom", "volumes", "volumeMounts", "tolerations", "resources", "coordinatorResources"]
    {
        assert!(spec.remove(foreign).is_some(), "{foreign}");
    }
    insta::assert_snapshot!(serde_saphyr::to_string(&crd).unwrap());
}

#[test]
fn its_reference_is_that_of_this_build() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/pretrainjob.md");
    if std::env::var_os("ANELLO_UPDATE").is_some() {
        std::fs::write(page, reference()).unwrap();
    }
    let written = std::fs::read_to_string(page).unwrap_or_default();
    assert!(
        written == reference(),
        "{page} is old; write it anew: ANELLO_UPDATE=1 cargo test -p anello-k8s reference"
    );
}

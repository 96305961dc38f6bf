//! Who else has a say in a job's pods: JobSet, itself; Kueue, whose part is played here by its own rules; and cert-manager, by
//! its definition.

use anello_tests::{kube_definition, wait_until};

use super::{LONG, SYSTEM, Site, namespace, template};

/// JobSet changes nothing of what it has made: so the run pauses, and goes on with another one.
#[test]
fn a_job_set_is_scaled_suspended_and_comes_to_its_end() {
    let Some(site) = Site::start("jobset", 2) else { return };
    site.apply(&site.manifest_with("a", 2, &[LONG], &["--job-set"]));
    let told = || site.value("a", "{.status.message}");
    wait_until("it is told that there are no JobSets", || told().contains("this cluster has no JobSets"));
    let _job_sets = site.cluster().start_job_sets();
    site.wait_for_checkpoint("a", 3);
    let set = |path: &str| site.value_of("jobsets.jobset.x-k8s.io/a", path);
    let workers = || set("{.spec.replicatedJobs[0].template.spec.parallelism}");
    let ended = || site.ended("a");
    site.kubectl(&["scale", "pretrainjob", "a", "--replicas", "3"]);
    wait_until("another is made", || workers() == "3" || ended());
    wait_until("three pods run", || site.pods("a", "worker").len() == 3 || ended());
    site.suspend("a", true);
    wait_until("it is paused", || site.value("a", "{.status.phase}") == "Paused" || ended());
    wait_until("its workers are gone", || site.pods("a", "worker").is_empty());
    if !ended() {
        wait_until("it is suspended", || set("{.spec.suspend}") == "true");
        let path = "/spec/replicatedJobs/0/template/spec/parallelism";
        let patch = format!(r#"[{{"op":"replace","path":"{path}","value":1}}]"#);
        let patch = ["-n", "jobset", "patch", "jobset", "a", "--type=json", "-p", &patch];
        let refused = site.cluster().kubectl(&patch).expect_err("JobSet lets nobody change it");
        assert!(refused.contains("immutable"), "{refused}");
    }
    site.suspend("a", false);
    site.wait_for_phase("a", "Completed");
    site.assert_undisturbed_long("a");
    let left = ["get", "jobsets,jobs,pods,services", "-l", "anello.dev/role=worker", "-o", "name"];
    wait_until("nothing of its workers is left", || site.kubectl(&left).is_empty());
    wait_until("JobSet's Service is gone", || {
        site.value_of("service/a-workers", "{.metadata.name}").is_empty()
    });
}

/// What Kueue's webhook does to Jobs with a queue, and refuses (v0.17: pkg/controller/jobs/job/job_webhook.go).
const RULES: &str = r#"
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicy
metadata: {name: queue-suspends}
spec:
  failurePolicy: Fail
  reinvocationPolicy: Never
  matchConstraints:
    namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: queue}}
    resourceRules: [{apiGroups: [batch], apiVersions: [v1], resources: [jobs], operations: [CREATE]}]
  matchConditions: [{name: queued, expression: "'kueue.x-k8s.io/queue-name' in object.metadata.?labels.orValue({})"}]
  mutations:
  - patchType: ApplyConfiguration
    applyConfiguration: {expression: "Object{spec: Object.spec{suspend: true}}"}
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicyBinding
metadata: {name: queue-suspends}
spec: {policyName: queue-suspends}
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: queue-refuses}
spec:
  failurePolicy: Fail
  matchConstraints:
    namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: queue}}
    resourceRules: [{apiGroups: [batch], apiVersions: [v1], resources: [jobs], operations: [CREATE, UPDATE]}]
  variables:
  - {name: partial, expression: "object.metadata.?annotations['kueue.x-k8s.io/job-min-parallelism'].orValue('')"}
  - {name: queue, expression: "object.metadata.?labels['kueue.x-k8s.io/queue-name'].orValue('')"}
  validations:
  - expression: "oldObject != null || variables.partial == '' || int(variables.partial) < object.spec.parallelism"
    message: "job-min-parallelism should be below parallelism"
  - expression: "variables.partial == '' || object.spec.parallelism == object.spec.completions"
    message: "completions should be equal to parallelism"
  - expression: "oldObject == null || oldObject.spec.suspend || variables.partial == '' || object.spec.parallelism == oldObject.spec.parallelism"
    message: "parallelism cannot change when partial admission is enabled and the job is not suspended"
  - expression: "oldObject == null || oldObject.spec.suspend || variables.queue == oldObject.metadata.?labels['kueue.x-k8s.io/queue-name'].orValue('')"
    message: "the queue cannot change while the job is not suspended"
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: queue-refuses}
spec: {policyName: queue-refuses, validationActions: [Deny]}
"#;

/// Kueue admits fewer than are wanted on nodes of its choice, takes them back, and admits all. Its controller is played by hand.
#[test]
fn a_queue_admits_some_takes_them_back_and_admits_all() {
    let Some(site) = Site::start("queue", 2) else { return };
    site.cluster().apply(RULES);
    let probe = "apiVersion: batch/v1\nkind: Job\nmetadata: {name: probe, labels: {kueue.x-k8s.io/queue-name: q}}\n\
                 spec: {template: {spec: {restartPolicy: Never, containers: [{name: a, image: a}]}}}\n";
    let suspends = || {
        let dry = ["-n", "queue", "create", "--dry-run=server", "-o", "jsonpath={.spec.suspend}", "-f", "-"];
        site.cluster().kubectl_with(&dry, probe).is_ok_and(|told| told == "true")
    };
    wait_until("the rules are in force", suspends);
    let user = r#"{"key":"gpu","operator":"Exists"}"#;
    let manifest = site.manifest_with("a", 3, &[LONG], &["--queue", "gpus"]);
    let manifest = manifest.replacen("spec:\n", &format!("spec:\n  tolerations: [{user}]\n"), 1);
    site.apply(&manifest);

    let crew = |path: &str| site.value_of("job/a-workers", path);
    let ended = || site.ended("a");
    let play = |patch: &str| {
        let patch = ["-n", "queue", "patch", "job", "a-workers", "--type=merge", "-p", patch];
        let played = site.cluster().kubectl(&patch);
        assert!(played.is_ok() || ended(), "{played:?}");
    };
    let admit = |workers: u32, flavor: &str| {
        let pods = format!(
            r#"{{"nodeSelector":{flavor},"tolerations":[{user},{{"key":"spot","operator":"Exists"}}]}}"#
        );
        let counts = format!(r#""parallelism":{workers},"completions":{workers}"#);
        play(&format!(r#"{{"spec":{{"suspend":false,{counts},"template":{{"spec":{pods}}}}}}}"#));
    };
    let waits = || crew("{.spec.suspend}") == "true" && crew("{.status.startTime}").is_empty();
    wait_until("it waits for the queue", waits);
    assert_eq!(crew("{.metadata.labels.kueue\\.x-k8s\\.io/queue-name}"), "gpus");
    assert_eq!(crew("{.spec.parallelism}"), "3");

    admit(2, r#"{"kubernetes.io/hostname":"queue-1"}"#);
    site.wait_for_checkpoint("a", 3);
    let nodes = ["get", "pods", "-l", "anello.dev/role=worker", "-o", "jsonpath={.items[*].spec.nodeName}"];
    let nodes = site.kubectl(&nodes);
    let (workers, taints) = (crew("{.spec.parallelism}"), crew("{.spec.template.spec.tolerations[*].key}"));
    // First it is said that it has ended, then its Job goes.
    if !ended() {
        assert!(nodes.split(' ').all(|node| node == "queue-1"), "{nodes}");
        assert_eq!(workers, "2");
        assert_eq!(taints, "gpu spot", "what Kueue added stays");
    }
    // Evicted: first of all it is suspended, then it is as it was before.
    play(r#"{"spec":{"suspend":true}}"#);
    wait_until("its workers are gone", || site.pods("a", "worker").is_empty());
    wait_until("it has not started", || waits() || ended());
    let counts = r#""parallelism":3,"completions":3"#;
    let pods = format!(r#""template":{{"spec":{{"nodeSelector":null,"tolerations":[{user}]}}}}"#);
    play(&format!(r#"{{"spec":{{{counts},{pods}}}}}"#));
    admit(3, "null");
    wait_until("three pods run", || site.pods("a", "worker").len() == 3 || ended());

    // A person's pause leaves the queue, and another number stands in line anew.
    site.suspend("a", true);
    wait_until("it has left the queue", || crew("{.metadata.name}").is_empty() || ended());
    site.kubectl(&["scale", "pretrainjob", "a", "--replicas", "1"]);
    site.suspend("a", false);
    wait_until("it waits for the queue", || waits() || ended());
    admit(1, "null");
    site.wait_for_phase("a", "Completed");
    site.assert_undisturbed_long("a");
}

#[test]
fn certificates_are_what_cert_manager_knows() {
    let Some(site) = Site::start("certificates", 1) else { return };
    let definition = kube_definition("cert-manager/cert-manager.io_certificates.yaml");
    site.cluster().apply(&std::fs::read_to_string(definition).expect("scripts/kube-tools fetched it"));
    let established = || site.cluster().kubectl(&["get", "certificates", "-A"]).is_ok();
    wait_until("the resource is known", established);
    site.cluster().apply(&namespace(SYSTEM));
    let manifest = template(&[
        "certManager.enabled=true",
        "certManager.issuer.name=anello-ca",
        "certManager.namespaces={certificates}",
        "tls.secretName=anello-user",
    ]);
    let certificates: Vec<&str> =
        manifest.split("\n---\n").filter(|object| object.contains("kind: Certificate\n")).collect();
    assert_eq!(certificates.len(), 3, "{manifest}");
    let apply = |manifest: &str| {
        let strictly = ["apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-"];
        site.cluster().kubectl_with(&strictly, manifest)
    };
    for certificate in certificates {
        apply(certificate).unwrap_or_else(|refused| panic!("{refused}\n{certificate}"));
        for (from, to, of) in [
            ("  secretName: ", "  secretNamme: ", "secretNamme"),
            ("algorithm: ECDSA", "algorithm: ECDS", "algorithm"),
            ("usages: [digital signature", "usages: [digital seal", "usages"),
        ] {
            let wrong = certificate.replacen(from, to, 1);
            let refused = apply(&wrong).expect_err(from);
            assert!(wrong != certificate && refused.contains(of), "{refused}");
        }
    }
}

//! What becomes of jobs.

use anello_tests::{newest_checkpoint, wait_until};

use super::{LONG, SYSTEM, Site, make_secret};

#[test]
fn a_job_trains_is_scaled_and_comes_to_its_end() {
    let Some(site) = Site::start("scaled", 2) else { return };
    what_cannot_be_is_refused(&site);
    site.submit("a", 2);
    let told = |role: &str, what: &str| site.metrics("a", role).iter().any(|text| text.contains(what));
    let ended = || site.ended("a");
    wait_until("the coordinator tells of the job", || {
        told("coordinator", "anello_step{job=\"a\"}") || ended()
    });
    wait_until("a worker tells of its steps", || told("worker", "anello_steps_total{job=\"a\"") || ended());
    let columns = site.kubectl(&["get", "pretrainjob", "a"]);
    assert!(
        columns.starts_with("NAME   PHASE") && columns.contains("WORKERS") && columns.contains("LOSS"),
        "{columns}"
    );
    site.kubectl(&["scale", "pretrainjob", "a", "--replicas", "3"]);
    wait_until("three pods run", || site.pods("a", "worker").len() == 3 || ended());
    site.kubectl(&["scale", "pretrainjob", "a", "--replicas", "1"]);
    site.wait_for_phase("a", "Completed");
    site.assert_undisturbed("a");
    assert_eq!(site.value("a", "{.status.conditions[?(@.type=='Complete')].status}"), "True");
    assert_eq!(site.value("a", "{.status.step}"), "31");
    let events = site.kubectl(&["get", "events", "-o", "jsonpath={.items[*].reason}"]);
    assert!(events.contains("Completed"), "{events}");
    wait_until("nothing of it runs", || {
        site.pods("a", "worker").is_empty() && site.pods("a", "coordinator").is_empty()
    });
    site.kubectl(&["delete", "pretrainjob", "a", "--timeout=60s"]);
    wait_until("its objects are gone", || {
        site.kubectl(&[
            "get",
            "jobs,deployments,services,networkpolicies,configmaps",
            "-l",
            "anello.dev/job=a",
            "-o",
            "name",
        ])
        .is_empty()
    });
    assert_eq!(newest_checkpoint(&site.run_of("a")), 31, "the run folder stays");
}

/// By the API server, in our words.
fn what_cannot_be_is_refused(site: &Site) {
    let manifest = site.manifest("bad", 1, &[]);
    let refused = |from: &str, to: &str| {
        let manifest = manifest.replacen(from, to, 1);
        site.try_apply(&manifest).expect_err("it is refused")
    };
    let told = refused("insecure: true", "insecure: false");
    assert!(told.contains("give tls.secretName, or insecure: true"), "{told}");
    let told = refused("desired: 1", "desired: 0");
    assert!(told.contains("spec.workers.desired"), "{told}");
    let told = refused("name: bad", "name: bad.name");
    assert!(told.contains("no dots"), "{told}");
    let told = refused("image: anello:test", "imagge: anello:test");
    assert!(told.contains("imagge"), "{told}");
}

#[test]
fn whatever_is_killed_or_lost_changes_nothing() {
    let Some(site) = Site::start("killed", 3) else { return };
    site.apply(&site.manifest("a", 3, &[LONG]));
    site.wait_for_checkpoint("a", 3);
    // How far it is when something strikes is left to the machine, and also whether it has ended by then.
    let kill =
        |pod: &str, how: &[&str]| site.kubectl(&[&["delete", pod, "--ignore-not-found"], how].concat());
    if let Some(pod) = site.pods("a", "worker").first() {
        kill(pod, &["--grace-period=0", "--force"]);
    }
    if let Some(pod) = site.pods("a", "coordinator").first() {
        kill(pod, &["--wait=false"]);
    }
    let ended = || site.ended("a");
    wait_until("there is a coordinator", || !site.pods("a", "coordinator").is_empty() || ended());
    // The controller dies, too, and another takes its place; then a node is drained in order.
    site.cluster()
        .kubectl(&["-n", SYSTEM, "delete", "pods", "--all", "--grace-period=0", "--force"])
        .unwrap_or_else(|refused| panic!("{refused}"));
    let _ = site.cluster().kubectl(&["drain", "killed-1", "--force", "--ignore-daemonsets", "--timeout=60s"]);
    site.wait_for_phase("a", "Completed");
    site.assert_undisturbed_long("a");
}

#[test]
fn a_job_is_suspended_resumed_deleted_and_made_anew() {
    let Some(site) = Site::start("suspended", 1) else { return };
    site.apply(&site.manifest("a", 2, &[]));
    site.wait_for_checkpoint("a", 3);
    site.suspend("a", true);
    site.wait_for_phase("a", "Paused");
    wait_until("its workers are gone", || site.pods("a", "worker").is_empty());
    let at = newest_checkpoint(&site.run_of("a"));
    site.suspend("a", false);
    wait_until("it goes on", || newest_checkpoint(&site.run_of("a")) > at);
    // Deleting it takes a checkpoint and loses nothing: the same job goes on.
    site.kubectl(&["delete", "pretrainjob", "a", "--timeout=100s"]);
    site.apply(&site.manifest("a", 2, &["seed=4"]));
    site.wait_for_phase("a", "Failed");
    let told = site.value("a", "{.status.message}");
    assert!(told.contains("whose seed differs"), "{told}");
    site.kubectl(&["delete", "pretrainjob", "a", "--timeout=60s"]);
    site.apply(&site.manifest("a", 1, &[]));
    site.wait_for_phase("a", "Completed");
    site.assert_undisturbed("a");
}

/// With certificates in Secrets as cert-manager writes them.
#[test]
fn a_job_with_tls_trains() {
    let Some(site) = Site::start("secured", 1) else { return };
    for role in ["coordinator", "worker"] {
        let (certificate, key) = (format!("{role}.pem"), format!("{role}.key"));
        let files = [("ca.crt", "ca.pem"), ("tls.crt", &*certificate), ("tls.key", &*key)];
        make_secret(site.cluster(), "secured", &format!("pods-{role}"), files);
    }
    let manifest = site.manifest_with("a", 2, &[], &["--tls-secret", "pods", "--cert-manager"]);
    assert!(manifest.contains("certManager: true") && !manifest.contains("insecure: true"), "{manifest}");
    site.apply(&manifest);
    site.wait_for_phase("a", "Completed");
    site.assert_undisturbed("a");
    assert_eq!(site.value("a", "{.status.step}"), "31", "the controller reached its coordinator");
}

#[test]
fn two_jobs_do_not_disturb_one_another() {
    let Some(site) = Site::start("two", 2) else { return };
    site.apply(&format!("{}---\n{}", site.manifest("a", 2, &[]), site.manifest("b", 1, &[])));
    for job in ["a", "b"] {
        site.wait_for_phase(job, "Completed");
        site.assert_undisturbed(job);
        assert_eq!(site.value(job, "{.status.run}"), site.run_of(job).display().to_string());
    }
}

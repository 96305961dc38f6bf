//! What a cluster takes away without asking.

use anello_tests::wait_until;

use super::{LONG, Site};

/// A node stops without a word: its worker is missed, and nobody else can be had while Kubernetes believes in the node. When
/// the node is given up, the pod's successor runs elsewhere.
#[test]
fn a_node_is_lost_without_a_drain() {
    let Some(site) = Site::start("lost", 3) else { return };
    // So that the run can neither go on nor end before the successor is there.
    let manifest = site.manifest("a", 2, &[LONG]).replacen("min: 1", "min: 2", 1);
    assert!(manifest.contains("min: 2"), "{manifest}");
    site.apply(&manifest);
    site.wait_for_checkpoint("a", 3);
    let node_of = |role: &str| {
        let labels = format!("anello.dev/job=a,anello.dev/role={role}");
        let path = "jsonpath={.items[0].spec.nodeName}";
        site.kubectl(&["get", "pods", "-l", &labels, "-o", path])
    };
    let (coordinator, worker) = (node_of("coordinator"), node_of("worker"));
    site.cluster().lose_node(&worker);
    let unknown = || site.value("a", "{.status.phase}");
    wait_until("it is missed", || unknown() == "Recovering" || worker == coordinator || site.ended("a"));
    // As who looks after the machines does in the end.
    site.cluster().kubectl(&["delete", "node", &worker]).unwrap_or_else(|refused| panic!("{refused}"));
    site.wait_for_phase("a", "Completed");
    site.assert_undisturbed_long("a");
}

/// A namespace has room for fewer pods than are wanted: people are told, and with more room the job goes on by itself.
#[test]
fn a_quota_is_exhausted() {
    let Some(site) = Site::start("quota", 2) else { return };
    let quota = |pods: u32| {
        format!(
            "apiVersion: v1\nkind: ResourceQuota\nmetadata: {{name: room}}\nspec: {{hard: {{pods: '{pods}'}}}}\n"
        )
    };
    let room = |pods: u32| {
        site.apply(&quota(pods));
        let known = || site.value_of("resourcequota/room", "{.status.hard.pods}") == pods.to_string();
        wait_until("the quota is known", known);
    };
    // Not even for the coordinator. It begins suspended, so that no worker takes what room there is.
    room(0);
    let manifest = site.manifest("a", 2, &[]).replacen("min: 1", "min: 2", 1);
    site.apply(&manifest.replacen("suspend: false", "suspend: true", 1));
    let told = |what: &str| site.value("a", "{.status.message}").contains(what);
    wait_until("it is told of the coordinator", || {
        told("the coordinator does not start") && told("exceeded quota")
    });
    // For the coordinator and one worker.
    room(2);
    site.wait_for_phase("a", "Paused");
    site.suspend("a", false);
    wait_until("it is told of the workers", || told("some workers have no pods") && told("exceeded quota"));
    room(3);
    site.wait_for_phase("a", "Completed");
    site.assert_undisturbed("a");
}

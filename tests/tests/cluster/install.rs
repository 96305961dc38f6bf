//! The chart in a cluster, by helm: as users install it, upgrade it and remove it.

use std::sync::Arc;

use anello_tests::{Cluster, wait_until};

use super::{LONG, SYSTEM, Site, change, chart, namespace, world};

/// A release of the chart, in a namespace.
pub struct Release {
    pub name: &'static str,
    pub namespace: &'static str,
}

impl Release {
    /// `helm ACTION NAME CHART`, with `values` as `--set` takes them; it waits until all is ready with `--wait` in `more`.
    pub fn helm(&self, cluster: &Cluster, action: &str, chart: &str, values: &[&str], more: &[&str]) {
        let sets: Vec<&str> = values.iter().flat_map(|value| ["--set", value]).collect();
        let arguments =
            [&[action, self.name, chart, "--namespace", self.namespace][..], &sets, more].concat();
        cluster.helm(&arguments).unwrap_or_else(|refused| panic!("{arguments:?}: {refused}"));
    }
}

/// Until all of it is ready.
const WAIT: [&str; 3] = ["--wait", "--timeout", "300s"];

/// The chart of an older build is installed, a job of that build is stored, and then comes this build. With certificates, by
/// which the controller also reaches the coordinators of jobs with TLS.
pub fn install(cluster: &Cluster) {
    let release = Release { name: "anello", namespace: SYSTEM };
    let older = change::older_chart(cluster);
    let values = ["tls.secretName=anello-user"];
    release.helm(cluster, "install", &older, &values, &[]);
    change::store_old_job(cluster);
    // The older controller never had a node to run on: it is of this build.
    cluster.add_nodes(SYSTEM, 1);
    release.helm(cluster, "upgrade", &chart(), &values, &WAIT);
}

/// With rights in its own namespace alone. What trains when the chart is removed trains on, and when it is installed again, its
/// controller takes that up.
#[test]
fn it_is_installed_upgraded_removed_and_installed_again() {
    const HOME: &str = "home";
    let Some(cluster) = Cluster::start(&world().folder.join("another-cluster")) else { return };
    cluster.apply(&namespace(HOME));
    cluster.add_nodes(HOME, 2);
    let site = Site { cluster: Some(Arc::new(cluster)), name: HOME };
    let release = Release { name: "trial", namespace: HOME };
    let own = ["ownNamespaceOnly=true"];
    release.helm(site.cluster(), "install", &chart(), &own, &WAIT);
    site.submit("a", 2);
    site.wait_for_phase("a", "Completed");
    site.assert_undisturbed("a");

    let more = [&["--reuse-values"], &WAIT[..]].concat();
    release.helm(site.cluster(), "upgrade", &chart(), &["log=debug", "replicas=2"], &more);
    let arguments = site.value_of("deployment/trial-anello", "{.spec.template.spec.containers[0].args}");
    assert_eq!(arguments, r#"["controller","--namespace","home","--log","debug"]"#);
    assert_eq!(site.value_of("deployment/trial-anello", "{.status.readyReplicas}"), "2");

    site.apply(&site.manifest("b", 2, &[LONG]));
    site.wait_for_checkpoint("b", 3);
    let gone = [&["uninstall", release.name, "--namespace", HOME][..], &WAIT].concat();
    site.cluster().helm(&gone).unwrap_or_else(|refused| panic!("{refused}"));
    let left = "deployments,roles,rolebindings,serviceaccounts";
    let of_it = ["get", left, "-l", "app.kubernetes.io/instance=trial", "-o", "name"];
    wait_until("all of it is gone", || site.kubectl(&of_it).is_empty());
    let definition = site.value_of("crd/pretrainjobs.anello.dev", "{.metadata.deletionTimestamp}");
    assert_eq!(definition, "", "the definition is to stay, and all jobs with it");
    assert_eq!(site.kubectl(&["get", "pretrainjobs", "-o", "jsonpath={.items[*].metadata.name}"]), "a b");
    // Nobody is there to say that it has ended, should it have.
    let workers = site.value_of("job/b-workers", "{.spec.parallelism}");
    assert!(workers == "2" || site.ended("b"), "what trains goes on: {workers}");

    release.helm(site.cluster(), "install", &chart(), &own, &WAIT);
    site.wait_for_phase("b", "Completed");
    site.assert_undisturbed_long("b");
}

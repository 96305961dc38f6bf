//! The chart in a cluster, by helm: as users install it, upgrade it and remove it.

use std::sync::Arc;

use anello_tests::{Cluster, Done, Process, wait_until};

use super::{LONG, SYSTEM, Site, change, chart, namespace, world};

/// Namespace of a release that looks after its own namespace alone.
const HOME: &str = "home";

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

/// `anello doctor --kube` of a person who may do everything.
fn doctor(cluster: &Cluster, namespace: &str) -> Done {
    let arguments = ["doctor", "--kube", "--namespace", namespace];
    let variables = [("KUBECONFIG", cluster.kubeconfig().display().to_string())];
    Process::start_with(&world().folder, &arguments, &variables).wait()
}

/// Waits until a controller has begun: Kubernetes calls it ready before that, and a doctor has no patience without end.
fn wait_for_lease(cluster: &Cluster, namespace: &str) {
    let holder =
        ["-n", namespace, "get", "lease", "anello-controller", "-o", "jsonpath={.spec.holderIdentity}"];
    wait_until("it has the Lease", || cluster.kubectl(&holder).is_ok_and(|holder| !holder.is_empty()));
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
    // What the API server tells of a definition's fields lags behind the definition.
    wait_until("the definition is found to be another build's", || {
        let told = doctor(cluster, SYSTEM).expect(1);
        told.contains("pretrainjobs.anello.dev is of another build: it lacks spec.terminationGracePeriodSeconds; `helm upgrade`")
            && told.contains("controller: none of 1 of Deployment anello is ready: ")
    });
    // The older controller never had a node to run on: it is of this build.
    cluster.add_nodes(SYSTEM, 1);
    release.helm(cluster, "upgrade", &chart(), &values, &WAIT);
}

/// With rights in its own namespace alone. What trains when the chart is removed trains on, and when it is installed again, its
/// controller takes that up.
#[test]
fn it_is_installed_upgraded_removed_and_installed_again() {
    let Some(cluster) = Cluster::start(&world().folder.join("another-cluster")) else { return };
    cluster.apply(&namespace(HOME));
    cluster.add_nodes(HOME, 2);
    let site = Site { cluster: Some(Arc::new(cluster)), name: HOME };
    let release = Release { name: "trial", namespace: HOME };
    let own = ["ownNamespaceOnly=true"];
    let told = doctor(site.cluster(), HOME).expect(1);
    for nothing in [
        "PretrainJobs are not looked after as they must be in this cluster\n  cluster: Kubernetes v1.",
        "\n  definition: the cluster serves no pretrainjobs, pretrainjobs/status, pretrainjobs/scale of anello.dev/v1alpha1; `helm",
        "\n  controller: namespace home has no Deployment of one; ",
        "\n  lease: nobody ever held anello-controller in namespace home; ",
    ] {
        assert!(told.contains(nothing), "{nothing}: {told}");
    }
    release.helm(site.cluster(), "install", &chart(), &own, &WAIT);
    is_found_in_order(&site, &release);
    a_right_that_is_missing_is_found(&site, &release);
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

/// With rights in all namespaces, and certificates.
#[test]
fn a_release_for_all_namespaces_is_found_in_order() {
    let Some(cluster) = super::cluster() else { return };
    wait_for_lease(&cluster, SYSTEM);
    let test = ["test", "anello", "--namespace", SYSTEM, "--timeout", "300s"];
    cluster.helm(&test).unwrap_or_else(|refused| panic!("{refused}"));
    let variables = [("KUBECONFIG", cluster.kubeconfig().display().to_string())];
    let arguments = ["doctor", "--kube", "--namespace", SYSTEM, "--tls", "certs", "--json"];
    let told = Process::start_with(&world().folder, &arguments, &variables).wait().expect(0);
    let told: serde_json::Value = serde_json::from_str(&told).expect("it is JSON");
    let found: Vec<&str> =
        told["found"].as_array().expect("a list").iter().flat_map(|line| line.as_str()).collect();
    assert_eq!(told["fit"], true);
    for line in [
        "rights: service account anello-system/anello may do all ",
        "are ready, for the jobs of all namespaces",
        "certificates: CN=anello user, valid from ",
    ] {
        assert!(found.iter().any(|found| found.contains(line)), "{line}: {found:?}");
    }
}

/// Those of the docs, as somebody copies them.
#[test]
fn manifests_of_the_docs_are_taken() {
    let Some(site) = Site::start("docs", 1) else { return };
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs");
    for page in ["kubernetes.md", "tutorial-kubernetes.md"] {
        let text = std::fs::read_to_string(format!("{docs}/{page}")).expect("the page is there");
        let blocks = text.split("```yaml\n").skip(1).filter_map(|rest| Some(rest.split_once("```")?.0));
        let jobs: Vec<&str> = blocks.filter(|block| block.contains("kind: PretrainJob\n")).collect();
        assert!(!jobs.is_empty(), "{page} shows how a job is written");
        for job in jobs {
            let apply = ["apply", "--server-side", "--dry-run=server", "-n", "docs", "-f", "-"];
            let taken = site.cluster().kubectl_with(&apply, job);
            assert!(taken.is_ok(), "{page}: {taken:?}\n{job}");
        }
    }
}

/// By a pod of the release that has the controller's rights, and by a person.
fn is_found_in_order(site: &Site, release: &Release) {
    wait_for_lease(site.cluster(), release.namespace);
    let test = ["test", release.name, "--namespace", release.namespace, "--timeout", "300s"];
    site.cluster().helm(&test).unwrap_or_else(|refused| panic!("{refused}\n{}", doctors_word(site)));
    let told = doctor(site.cluster(), release.namespace).expect(0);
    for line in [
        "PretrainJobs are looked after in this cluster\n",
        "\n  definition: pretrainjobs.anello.dev is served, and is this build's\n",
        "\n  controller: 1 of 1 of Deployment trial-anello are ready, for the jobs of namespace home\n",
        "\n  rights: service account home/trial-anello may do all ",
        " holds anello-controller in namespace home and renews it\n",
        "\n  others: JobSet is not, which jobs with workers.kind JobSet need; Kueue is not, ",
    ] {
        assert!(told.contains(line), "{line}: {told}");
    }
}

/// The end of what the pod of `helm test` wrote, which is kept when it fails.
fn doctors_word(site: &Site) -> String {
    site.value_of("pod/trial-anello-doctor", "{.status.containerStatuses[0].state.terminated.message}")
}

fn a_right_that_is_missing_is_found(site: &Site, release: &Release) {
    let patch = |rules: &serde_json::Value| {
        let rules = serde_json::json!({ "rules": rules }).to_string();
        site.kubectl(&["patch", "role", "trial-anello", "--type=merge", "-p", &rules]);
    };
    let rules = site.value_of("role/trial-anello", "{.rules}");
    let whole: serde_json::Value = serde_json::from_str(&rules).expect("kubectl writes JSON");
    let mut less = whole.clone();
    less.as_array_mut().expect("a list of rules").retain(|rule| rule["resources"][0] != "configmaps");
    patch(&less);
    let missing = "rights: service account home/trial-anello may not create configmaps in namespace home, patch configmaps \
                   in namespace home; `helm upgrade`";
    wait_until("a person is told of it", || {
        let done = doctor(site.cluster(), HOME);
        done.out.contains(missing) && done.status.code() == Some(1)
    });
    let test = ["test", release.name, "--namespace", release.namespace, "--timeout", "300s"];
    assert!(site.cluster().helm(&test).is_err(), "the test fails, too");
    let word = doctors_word(site);
    assert!(word.contains(missing), "{word}");
    patch(&whole);
    wait_until("it is mended", || doctor(site.cluster(), HOME).status.success());
}

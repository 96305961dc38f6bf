//! PretrainJobs on a real control plane: the API server, its Job and Deployment controllers, what the Helm chart makes with the
//! rights that it gives, and pods that are processes of this machine. A run that ends is the undisturbed one.

mod chart;
mod life;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anello_tests::{Cluster, World, http_at, kube_tool, newest_checkpoint, wait_until};

/// The world of these tests.
fn world() -> &'static World {
    anello_tests::world(env!("CARGO_TARGET_TMPDIR"), "cluster")
}

/// The chart in this repository.
fn chart() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../k8s/chart").to_owned()
}

/// `helm template` with `values`, each as `--set` takes it.
fn template(values: &[&str]) -> String {
    let sets = values.iter().flat_map(|value| ["--set", value]);
    let done = std::process::Command::new(kube_tool("helm"))
        .args(["template", "anello", &chart(), "--namespace", "anello-system"])
        .args(sets)
        .output()
        .expect("scripts/kube-tools fetched helm");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).expect("a manifest is text")
}

/// A cluster with the chart's objects in it, and a namespace `research` for jobs; both under restricted pod security.
struct Site {
    cluster: Cluster,
    name: &'static str,
    _turn: MutexGuard<'static, ()>,
}

/// A control plane and a ring are enough for a small machine at one time.
static TURN: Mutex<()> = Mutex::new(());

impl Site {
    fn start(name: &'static str, nodes: &[&str]) -> Option<Self> {
        // One that failed leaves nothing behind.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let cluster = Cluster::start(&world().folder.join(name), nodes)?;
        let namespace = |name: &str| {
            format!(
                "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  labels: \
                 {{pod-security.kubernetes.io/enforce: restricted}}\n"
            )
        };
        cluster.apply(&format!("{}---\n{}", namespace("anello-system"), namespace("research")));
        cluster.apply(&template(&[]));
        let established = || cluster.kubectl(&["get", "pretrainjobs", "-n", "research"]).is_ok();
        wait_until("the resource is known", established);
        Some(Self { cluster, name, _turn: turn })
    }

    fn place(&self) -> String {
        world().folder.join(self.name).join("state").display().to_string()
    }

    fn run_of(&self, job: &str) -> PathBuf {
        PathBuf::from(self.place()).join(job)
    }

    /// The manifest of a job, as `anello submit --kube` makes it, with `settings` as `--set` takes them.
    fn manifest(&self, job: &str, workers: u32, settings: &[&str]) -> String {
        let (place, workers) = (self.place(), workers.to_string());
        let arguments =
            ["submit", "small.toml", "--kube", "--dry-run", "--image", "anello:test", "--state", &place];
        let more = ["--name", job, "--workers", &workers, "--metrics", "--set", "compute.threads=1"];
        let settings: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
        world().anello(&[&arguments[..], &more, &settings].concat()).expect(0)
    }

    fn submit(&self, job: &str, workers: u32) {
        self.apply(&self.manifest(job, workers, &[]));
    }

    fn apply(&self, manifest: &str) {
        let applied = ["apply", "--server-side", "-n", "research", "-f", "-"];
        self.cluster
            .kubectl_with(&applied, manifest)
            .unwrap_or_else(|refused| panic!("{refused}\n{manifest}"));
    }

    fn kubectl(&self, arguments: &[&str]) -> String {
        let arguments = [&["-n", "research"], arguments].concat();
        self.cluster.kubectl(&arguments).unwrap_or_else(|refused| panic!("{arguments:?}: {refused}"))
    }

    /// A value of a job by JSONPath.
    fn value(&self, job: &str, path: &str) -> String {
        let path = format!("jsonpath={path}");
        self.cluster.kubectl(&["-n", "research", "get", "pretrainjob", job, "-o", &path]).unwrap_or_default()
    }

    fn wait_for_phase(&self, job: &str, phase: &str) {
        let mut seen = String::new();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(300);
        while seen != phase {
            seen = self.value(job, "{.status.phase}");
            if std::time::Instant::now() > end {
                let all = ["get", "pods,jobs,deployments,pretrainjobs", "-A", "-o", "wide"];
                let all = self.cluster.kubectl(&all).unwrap_or_default();
                let events = self.kubectl(&["get", "events"]);
                let pods = world().folder.join(self.name).join("pods");
                panic!("{job} is {seen}, not {phase}; logs in {}\n{all}\n{events}", pods.display());
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }

    fn wait_for_checkpoint(&self, job: &str, step: u64) {
        let run = self.run_of(job);
        wait_until("it is so far", || newest_checkpoint(&run) >= step);
    }

    /// Pods of a job in a role, that run.
    fn pods(&self, job: &str, role: &str) -> Vec<String> {
        let labels = format!("anello.dev/job={job},anello.dev/role={role}");
        let running = "--field-selector=status.phase=Running";
        let told = self.kubectl(&["get", "pods", "-l", &labels, running, "-o", "name"]);
        told.lines().map(str::to_owned).collect()
    }

    /// What the pods of a role tell Prometheus.
    fn metrics(&self, job: &str, role: &str) -> Vec<String> {
        let labels = format!("anello.dev/job={job},anello.dev/role={role}");
        let address = "jsonpath={.items[*].status.podIP}";
        let addresses = self.kubectl(&["get", "pods", "-l", &labels, "-o", address]);
        let ask = |address: &str| http_at((address, 9100), "GET", "/metrics", &[], "");
        addresses.split_whitespace().map(ask).filter(|(code, _)| *code == 200).map(|(_, text)| text).collect()
    }

    /// The job's run is the undisturbed one.
    fn assert_undisturbed(&self, job: &str) {
        let run = self.run_of(job).display().to_string();
        world().assert_undisturbed(&run);
    }
}

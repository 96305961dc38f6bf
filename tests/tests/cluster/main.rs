//! PretrainJobs on a real control plane: the API server, its Job and Deployment controllers, the Helm chart as helm installs it with
//! the rights that it gives, and pods that are processes of this machine. A run that ends is the undisturbed one.
//!
//! Cases that run at one time share a control plane and a controller; each has its namespace and nodes.

mod change;
mod chart;
mod install;
mod life;
mod loss;
mod queue;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use anello_tests::{Cluster, Process, World, http_at, kube_tool, newest_checkpoint, wait_until};

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

/// One of the namespaces of a cluster with the chart's objects in it, under restricted pod security, with nodes of its own.
struct Site {
    cluster: Option<Arc<Cluster>>,
    name: &'static str,
}

/// The cluster of the cases that are under way: one control plane is enough for all of them.
static CLUSTER: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());

/// Some hundreds of steps: seconds, in which a few calls of kubectl find it training.
const LONG: &str = "stage.stable.tokens=128Ki";

/// Namespace of the controller.
const SYSTEM: &str = "anello-system";

fn namespace(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  labels: \
         {{pod-security.kubernetes.io/enforce: restricted}}\n"
    )
}

/// The cluster of the others that run now, or another one.
fn cluster() -> Option<Arc<Cluster>> {
    // One that failed leaves nothing behind.
    let mut shared = CLUSTER.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(cluster) = shared.upgrade() {
        return Some(cluster);
    }
    let cluster = Arc::new(Cluster::start(&world().folder.join("cluster"))?);
    cluster.apply(&namespace(SYSTEM));
    world().anello(&["certs", "init", "--dir", "certs", "--force"]).expect(0);
    make_secret(&cluster, SYSTEM, "anello-user", ["ca.pem", "user.pem", "user.key"].map(|file| (file, file)));
    install::install(&cluster);
    *shared = Arc::downgrade(&cluster);
    Some(cluster)
}

/// A Secret of files in `certs`, each with the name of its entry.
fn make_secret(cluster: &Cluster, namespace: &str, name: &str, files: [(&str, &str); 3]) {
    let folder = world().folder.join("certs");
    let files = files.map(|(entry, file)| format!("--from-file={entry}={}", folder.join(file).display()));
    let mut arguments = vec!["-n", namespace, "create", "secret", "generic", name];
    arguments.extend(files.iter().map(String::as_str));
    cluster.kubectl(&arguments).unwrap_or_else(|refused| panic!("{refused}"));
}

impl Drop for Site {
    fn drop(&mut self) {
        // Of a case that failed; whoever runs beside it is to have the machine.
        let jobs = ["-n", self.name, "delete", "pretrainjobs", "--all", "--wait=false"];
        let _ = self.cluster().kubectl(&jobs);
        // Nobody starts another while this one ends.
        let _shared = CLUSTER.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.cluster.take());
    }
}

impl Site {
    fn start(name: &'static str, nodes: usize) -> Option<Self> {
        let site = Self { cluster: Some(cluster()?), name };
        site.cluster().add_nodes(name, nodes);
        site.cluster().apply(&namespace(name));
        let established = || site.cluster().kubectl(&["get", "pretrainjobs", "-n", name]).is_ok();
        wait_until("the resource is known", established);
        Some(site)
    }

    fn cluster(&self) -> &Cluster {
        self.cluster.as_ref().expect("it is there until the case ends")
    }

    fn place(&self) -> String {
        world().folder.join(self.name).join("state").display().to_string()
    }

    fn run_of(&self, job: &str) -> PathBuf {
        PathBuf::from(self.place()).join(job)
    }

    /// `anello submit --kube` of a job, with `settings` as `--set` takes them, and more arguments.
    fn submission(&self, job: &str, workers: u32, settings: &[&str], more: &[&str]) -> Vec<String> {
        let (place, workers) = (self.place(), workers.to_string());
        let submit = ["submit", "small.toml", "--kube", "--image", "anello:test", "--state", &place];
        let usual = ["--name", job, "--workers", &workers, "--metrics", "--set", "compute.threads=1"];
        let settings: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
        [&submit[..], &usual, &settings, more].concat().into_iter().map(str::to_owned).collect()
    }

    /// The manifest of a job, as `anello submit --kube` makes it, with `settings` as `--set` takes them.
    fn manifest(&self, job: &str, workers: u32, settings: &[&str]) -> String {
        self.manifest_with(job, workers, settings, &[])
    }

    /// The same, with more arguments.
    fn manifest_with(&self, job: &str, workers: u32, settings: &[&str], more: &[&str]) -> String {
        let arguments = self.submission(job, workers, settings, &[more, &["--dry-run"]].concat());
        world().anello(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).expect(0)
    }

    /// By a person at a desk, who has a kubeconfig.
    fn submit(&self, job: &str, workers: u32) {
        let arguments = self.submission(job, workers, &[], &["--namespace", self.name]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let variables = [("KUBECONFIG", self.cluster().kubeconfig().display().to_string())];
        let told = Process::start_with(&world().folder, &arguments, &variables).wait().expect(0);
        assert!(
            told.starts_with(&format!("PretrainJob {job} is made in namespace {}\n", self.name)),
            "{told}"
        );
    }

    fn apply(&self, manifest: &str) {
        self.try_apply(manifest).unwrap_or_else(|refused| panic!("{refused}\n{manifest}"));
    }

    /// The error is what the API server says.
    fn try_apply(&self, manifest: &str) -> Result<String, String> {
        self.cluster().kubectl_with(&["apply", "--server-side", "-n", self.name, "-f", "-"], manifest)
    }

    /// Changes the spec of a job; the error is what the API server says.
    fn patch(&self, job: &str, spec: &str) -> Result<String, String> {
        let patch = format!("{{\"spec\":{spec}}}");
        self.cluster().kubectl(&["-n", self.name, "patch", "pretrainjob", job, "--type=merge", "-p", &patch])
    }

    fn suspend(&self, job: &str, on: bool) {
        self.patch(job, &format!("{{\"suspend\":{on}}}")).unwrap_or_else(|refused| panic!("{refused}"));
    }

    fn kubectl(&self, arguments: &[&str]) -> String {
        let arguments = [&["-n", self.name], arguments].concat();
        self.cluster().kubectl(&arguments).unwrap_or_else(|refused| panic!("{arguments:?}: {refused}"))
    }

    /// A value of an object by JSONPath; empty when it, or the object, is not there.
    fn value_of(&self, object: &str, path: &str) -> String {
        let path = format!("jsonpath={path}");
        self.cluster().kubectl(&["-n", self.name, "get", object, "-o", &path]).unwrap_or_default()
    }

    /// A value of a job by JSONPath.
    fn value(&self, job: &str, path: &str) -> String {
        self.value_of(&format!("pretrainjob/{job}"), path)
    }

    fn ended(&self, job: &str) -> bool {
        self.value(job, "{.status.phase}") == "Completed"
    }

    fn wait_for_phase(&self, job: &str, phase: &str) {
        let mut seen = String::new();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(300);
        while seen != phase {
            seen = self.value(job, "{.status.phase}");
            if std::time::Instant::now() > end {
                let all = ["get", "pods,jobs,deployments,pretrainjobs", "-A", "-o", "wide"];
                let all = self.cluster().kubectl(&all).unwrap_or_default();
                let events = self.kubectl(&["get", "events"]);
                let pods = world().folder.join("cluster/pods");
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

    /// The same for one of [`LONG`].
    fn assert_undisturbed_long(&self, job: &str) {
        static MADE: OnceLock<()> = OnceLock::new();
        MADE.get_or_init(|| {
            world().anello(&["run", "small.toml", "--out", "long", "--set", LONG]).expect(0);
        });
        world().assert_alike(&self.run_of(job).display().to_string(), "long");
    }
}

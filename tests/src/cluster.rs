//! A real control plane of Kubernetes on loopback: etcd, the API server and the controller manager.

use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use k8s_openapi::ByteString;
use serde_json::{Value, json};

use crate::kubelet::{DEDICATED, Kubelet};
use crate::server::{End, Server};
use crate::{anello, free_port, wait_until};

/// Controllers that these tests need, and the kubelet's part of the API server's work does not replace.
const CONTROLLERS: &str = "deployment-controller,replicaset-controller,job-controller,garbage-collector-controller,\
                           namespace-controller,serviceaccount-controller,pod-garbage-collector-controller,\
                           resourcequota-controller,disruption-controller";

/// Token of who may do everything.
pub const ADMIN: &str = "token-of-the-admin";

/// Where a tool of `scripts/kube-tools` is.
pub fn kube_tool(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv-kube/bin").join(name)
}

/// A file of `scripts/kube-tools` that another project publishes.
pub fn kube_definition(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv-kube/definitions").join(name)
}

/// A part of a control plane: nothing of it is to be kept, and an API server whose etcd is gone takes its time.
fn part(flags: &[String], log: &Path) -> Server {
    Server::start(&kube_tool("controlplane"), flags, log, End::AtOnce)
}

/// A cluster under way. It ends when it is dropped or this process ends.
#[derive(Debug)]
pub struct Cluster {
    // Pods first, then what they speak with.
    kubelet: Option<Kubelet>,
    _parts: Vec<Server>,
    folder: PathBuf,
}

impl Cluster {
    /// Starts one in `folder`, without nodes; absent where no control plane was built, which is said.
    pub fn start(folder: &Path) -> Option<Self> {
        let program = kube_tool("controlplane");
        if !program.exists() {
            println!("NOT RUN, for there is no control plane: install Go and run scripts/kube-tools");
            return None;
        }
        let _ = std::fs::remove_dir_all(folder);
        std::fs::create_dir_all(folder.join("keys")).expect("the test's folder can be written");
        let at = |name: &str| folder.join(name).display().to_string();
        let (etcd, peers, api) = (free_port(), free_port(), free_port());
        let words = |part: &str, flags: Vec<String>| [vec![part.to_owned()], flags].concat();
        let client = format!("http://127.0.0.1:{etcd}");
        let flags = vec![
            format!("--data-dir={}", at("etcd")),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls=http://127.0.0.1:{peers}"),
            "--unsafe-no-fsync".to_owned(),
        ];
        let mut parts = vec![part(&words("etcd", flags), &folder.join("etcd.log"))];
        wait_until("etcd listens", || TcpStream::connect(("127.0.0.1", etcd)).is_ok());

        // Any pair of keys will do for the tokens of service accounts.
        anello(folder, &["certs", "init", "--dir", "keys/accounts"]).expect(0);
        let (key, public) = (at("keys/accounts/user.key"), at("keys/accounts/user.pem"));
        let tokens = format!("{ADMIN},admin,1,system:masters\n");
        std::fs::write(at("keys/tokens.csv"), tokens).expect("the test's folder can be written");
        let flags = vec![
            format!("--etcd-servers={client}"),
            "--bind-address=127.0.0.1".to_owned(),
            "--advertise-address=127.0.0.1".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            format!("--secure-port={api}"),
            format!("--cert-dir={}", at("keys")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={public}"),
            format!("--service-account-signing-key-file={key}"),
            format!("--token-auth-file={}", at("keys/tokens.csv")),
            "--authorization-mode=RBAC".to_owned(),
            // So that services are on this machine.
            "--service-cluster-ip-range=127.96.0.0/16".to_owned(),
        ];
        parts.push(part(&words("apiserver", flags), &folder.join("apiserver.log")));
        let config = kubeconfig(api, ADMIN);
        std::fs::write(at("admin.kubeconfig"), &config).expect("the test's folder can be written");
        let mut cluster = Self { kubelet: None, _parts: parts, folder: folder.to_owned() };
        wait_until("the API server is ready", || cluster.kubectl(&["get", "--raw", "/readyz"]).is_ok());
        let flags = vec![
            format!("--kubeconfig={}", at("admin.kubeconfig")),
            "--leader-elect=false".to_owned(),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", free_port()),
            format!("--cert-dir={}", at("keys")),
            format!("--service-account-private-key-file={key}"),
            format!("--controllers={CONTROLLERS}"),
        ];
        cluster._parts.push(part(&words("controller-manager", flags), &folder.join("controllers.log")));
        let pods = folder.join("pods");
        cluster.kubelet = Some(Kubelet::start(&cluster.kubeconfig(), &pods));
        Some(cluster)
    }

    /// Makes nodes `NAMESPACE-0`, `NAMESPACE-1`, … for the pods of a namespace, and for no others.
    pub fn add_nodes(&self, namespace: &str, nodes: usize) {
        let node = |at: usize| {
            format!(
                "apiVersion: v1\nkind: Node\nmetadata:\n  name: {namespace}-{at}\n  labels: \
                 {{kubernetes.io/hostname: {namespace}-{at}, {DEDICATED}: {namespace}}}\n"
            )
        };
        self.apply(&(0..nodes).map(node).collect::<Vec<_>>().join("---\n"));
    }

    /// A node stops without a word: what runs there does nothing more, and nobody closes its connections.
    pub fn lose_node(&self, name: &str) {
        self.kubelet.as_ref().expect("it is there until the cluster ends").lose(name);
    }

    /// How to reach it as one who may do everything.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.join("admin.kubeconfig")
    }

    /// `kubectl ARGUMENTS`; the error is what it says.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String, String> {
        self.kubectl_with(arguments, "")
    }

    /// The same with `input` at its standard input.
    pub fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        self.tool("kubectl", arguments, input)
    }

    /// `helm ARGUMENTS`; the error is what it says.
    pub fn helm(&self, arguments: &[&str]) -> Result<String, String> {
        self.tool("helm", arguments, "")
    }

    fn tool(&self, name: &str, arguments: &[&str], input: &str) -> Result<String, String> {
        let mut child = Command::new(kube_tool(name))
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .args(arguments)
            .env("HOME", &self.folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("scripts/kube-tools fetched kubectl and helm");
        let wrote = child.stdin.take().expect("it is piped").write_all(input.as_bytes());
        let done = child.wait_with_output().map_err(|cause| cause.to_string())?;
        wrote.map_err(|cause| cause.to_string())?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim().to_owned();
        if done.status.success() { Ok(text(done.stdout)) } else { Err(text(done.stderr)) }
    }

    /// Installs JobSet: its resource, its controller, which ends when what is returned is dropped, and its webhooks.
    ///
    /// # Panics
    /// When any of it is refused.
    pub fn start_job_sets(&self) -> Server {
        let text = |path: PathBuf| std::fs::read_to_string(path).expect("scripts/kube-tools fetched it");
        self.apply(&text(kube_definition("jobset/jobset.x-k8s.io_jobsets.yaml")));
        let known = || self.kubectl(&["get", "jobsets", "-A"]).is_ok();
        wait_until("the resource is known", known);
        let (port, keys) = (free_port(), self.folder.join("keys/jobset"));
        let flags = [
            "jobset-controller".to_owned(),
            format!("--kubeconfig={}", self.kubeconfig().display()),
            format!("--webhook-port={port}"),
            format!("--cert-dir={}", keys.display()),
        ];
        let controller = part(&flags, &self.folder.join("jobset.log"));
        wait_until("JobSet's webhooks listen", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        // As they are published, but for where they are. Those of pods are for JobSets that want nodes of their own.
        let hooks = kube_definition("jobset/manifests.yaml").display().to_string();
        let hooks = self.kubectl(&["create", "--dry-run=client", "-o", "json", "-f", &hooks]);
        let hooks = hooks.unwrap_or_else(|refused| panic!("{refused}"));
        let authority = std::fs::read(keys.join("tls.crt")).expect("the controller wrote it");
        let mut count = 0;
        // One after the other, without a list around them.
        for configuration in serde_json::Deserializer::from_str(&hooks).into_iter::<Value>() {
            let mut configuration = configuration.expect("kubectl writes JSON");
            let mut items = match configuration["items"].as_array() {
                Some(items) => items.clone(),
                None => vec![configuration.take()],
            };
            for item in &mut items {
                let hooks = item["webhooks"].as_array_mut().expect("they are webhooks");
                hooks.retain(|hook| hook["rules"][0]["resources"][0] == "jobsets");
                for hook in hooks {
                    let path = hook["clientConfig"]["service"]["path"].as_str().expect("it has a path");
                    let url = format!("https://127.0.0.1:{port}{path}");
                    hook["clientConfig"] = json!({ "url": url, "caBundle": ByteString(authority.clone()) });
                    count += 1;
                }
                self.apply(&item.to_string());
            }
        }
        assert_eq!(count, 2, "one changes and one refuses");
        controller
    }

    /// Applies a manifest.
    ///
    /// # Panics
    /// When it is refused.
    pub fn apply(&self, manifest: &str) {
        if let Err(refused) = self.kubectl_with(&["apply", "--server-side", "-f", "-"], manifest) {
            panic!("{refused}\n{manifest}");
        }
    }
}

fn kubeconfig(port: u16, token: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: it\n\
         clusters: [{{name: it, cluster: {{server: 'https://127.0.0.1:{port}', insecure-skip-tls-verify: true}}}}]\n\
         users: [{{name: it, user: {{token: '{token}'}}}}]\n\
         contexts: [{{name: it, context: {{cluster: it, user: it}}}}]\n"
    )
}

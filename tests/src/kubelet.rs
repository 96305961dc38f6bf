//! A scheduler and kubelet whose pods are processes of this machine, for tests: it runs the one container of each pod as
//! `anello`, with its arguments, variables and volumes, and tells the API server what becomes of it.
//!
//! What differs from a real one: a pod's address is one of loopback, that of the service which selects it where there is
//! one, and does not change; a service's name in an argument is replaced by its address, and `0.0.0.0` by the pod's; mounts are folders of the
//! pod's own, so paths in arguments are rewritten to them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{
    Binding, ConfigMap, Container, ContainerState, ContainerStateRunning, ContainerStateTerminated,
    ContainerStatus, Node, ObjectReference, Pod, PodCondition, PodIP, PodStatus, Secret, Service,
    ServiceAccount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use crate::cluster::ADMIN;
use crate::{binary, signal};

/// Between two looks at all pods.
const ROUND: Duration = Duration::from_millis(100);
/// Before a container that ended is started again.
const BACKOFF: Duration = Duration::from_secs(1);
/// Letters of a log's end that are a termination message.
const MESSAGE: usize = 2048;
/// Name of a node in its own labels.
const HOSTNAME: &str = "kubernetes.io/hostname";
/// On a node: the namespace whose pods alone it takes.
pub const DEDICATED: &str = "tests.anello.dev/namespace";

/// A kubelet under way; it and its pods end when it is dropped.
#[derive(Debug)]
pub struct Kubelet {
    stop: Arc<AtomicBool>,
    lost: Lost,
    thread: Option<JoinHandle<()>>,
}

/// Nodes that are lost.
type Lost = Arc<Mutex<BTreeSet<String>>>;

impl Kubelet {
    /// Serves all nodes of the API server of `kubeconfig`; pods' files are in `folder`.
    pub fn start(kubeconfig: &Path, folder: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let lost = Lost::default();
        let (folder, kubeconfig) = (folder.to_owned(), kubeconfig.to_owned());
        let (until, away) = (Arc::clone(&stop), Arc::clone(&lost));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(serve(kubeconfig, folder, away, until));
        });
        Self { stop, lost, thread: Some(thread) }
    }

    /// As when a machine stops without a word: what runs on `node` does nothing more, and nothing is told of it. Its
    /// connections stay open, since nobody is there to close them.
    pub fn lose(&self, node: &str) {
        self.lost.lock().expect("no holder panics").insert(node.to_owned());
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A client of the cluster that `kubeconfig` names.
async fn client_of(kubeconfig: &Path) -> Client {
    let read = kube::config::Kubeconfig::read_from(kubeconfig).expect("the kubeconfig is there");
    let config = kube::Config::from_custom_kubeconfig(read, &Default::default()).await;
    Client::try_from(config.expect("the kubeconfig is whole")).expect("a client")
}

async fn serve(kubeconfig: PathBuf, folder: PathBuf, lost: Lost, stop: Arc<AtomicBool>) {
    let client = client_of(&kubeconfig).await;
    let admin = std::fs::read_to_string(&kubeconfig).expect("it was read already");
    let mut desk = Desk { client, folder, admin, lost, pods: BTreeMap::new(), next: 0 };
    while !stop.load(Ordering::Relaxed) {
        // What fails is tried again in the next round, as everything that speaks to an API server must.
        if let Err(error) = desk.round().await {
            eprintln!("kubelet: {error}");
        }
        tokio::time::sleep(ROUND).await;
    }
}

/// `metadata.labels['NAME']` or `metadata.annotations['NAME']` of a pod.
fn entry(pod: &Pod, path: &str) -> Option<String> {
    let (entries, name) = path.strip_suffix("']")?.split_once("['")?;
    match entries {
        "metadata.labels" => pod.labels().get(name).cloned(),
        "metadata.annotations" => pod.annotations().get(name).cloned(),
        _ => None,
    }
}

/// A pod that was started.
struct Started {
    node: String,
    ip: String,
    child: Option<Child>,
    log: PathBuf,
    container: Container,
    since: Timestamp,
    restarts: i32,
    again: Option<Instant>,
    /// When it is killed if it has not gone by then.
    kill: Option<Instant>,
    ready: bool,
    last: Option<ContainerStateTerminated>,
    /// Its end was told.
    over: bool,
    /// Its node is lost.
    lost: bool,
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

struct Desk {
    client: Client,
    folder: PathBuf,
    /// The kubeconfig of who may do everything.
    admin: String,
    lost: Lost,
    pods: BTreeMap<String, Started>,
    /// Counts pods that were bound or started.
    next: u32,
}

impl Desk {
    async fn round(&mut self) -> Result<(), kube::Error> {
        let pods = Api::<Pod>::all(self.client.clone()).list(&ListParams::default()).await?;
        let there: BTreeSet<String> = pods.items.iter().filter_map(|pod| pod.uid()).collect();
        self.pods.retain(|uid, _| there.contains(uid));
        for pod in &pods.items {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
            let done = match node {
                Some(node) if self.is_lost(&node) => {
                    self.freeze(pod);
                    Ok(())
                }
                Some(node) => self.tend(pod, node).await,
                None if pod.metadata.deletion_timestamp.is_none() => self.bind(pod).await,
                None => Ok(()),
            };
            // One that is in trouble keeps nobody else waiting; it is tried again in the next round.
            if let Err(error) = done {
                eprintln!("kubelet: pod {}: {error}", pod.name_any());
            }
        }
        Ok(())
    }

    fn is_lost(&self, node: &str) -> bool {
        self.lost.lock().expect("no holder panics").contains(node)
    }

    /// What ran on a node that is lost.
    fn freeze(&mut self, pod: &Pod) {
        let Some(started) = self.pods.get_mut(&pod.uid().unwrap_or_default()) else { return };
        if let (false, Some(child)) = (started.lost, &started.child) {
            signal(child.id(), "STOP");
        }
        started.lost = true;
    }

    fn api<K>(&self, pod: &Pod) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default())
    }

    /// As a scheduler does: to the next node that it may be on.
    async fn bind(&mut self, pod: &Pod) -> Result<(), kube::Error> {
        let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref()?.node_affinity.clone());
        let terms = affinity.and_then(|nodes| nodes.required_during_scheduling_ignored_during_execution);
        let expressions = terms.into_iter().flat_map(|terms| terms.node_selector_terms);
        let away: Vec<String> = expressions
            .flat_map(|term| term.match_expressions.unwrap_or_default())
            .filter(|expression| expression.key == HOSTNAME && expression.operator == "NotIn")
            .flat_map(|expression| expression.values.unwrap_or_default())
            .collect();
        let nodes = Api::<Node>::all(self.client.clone()).list(&ListParams::default()).await?;
        let selector = pod.spec.as_ref().and_then(|spec| spec.node_selector.clone()).unwrap_or_default();
        let may = |node: &&Node| {
            let chosen = selector.iter().all(|(label, value)| node.labels().get(label) == Some(value));
            let spec = node.spec.clone().unwrap_or_default();
            let other = node.labels().get(DEDICATED).is_some_and(|of| Some(of) != pod.namespace().as_ref());
            let name = node.name_any();
            chosen
                && !other
                && spec.unschedulable != Some(true)
                && !away.contains(&name)
                && !self.is_lost(&name)
        };
        let open: Vec<String> = nodes.items.iter().filter(may).map(ResourceExt::name_any).collect();
        let Some(node) = open.get(self.next as usize % open.len().max(1)) else { return Ok(()) };
        let target = ObjectReference { name: Some(node.clone()), ..ObjectReference::default() };
        let binding = Binding { metadata: pod.metadata.clone(), target };
        self.next += 1;
        let api: Api<Pod> = self.api(pod);
        api.create_subresource::<_, serde_json::Value>(
            "binding",
            &pod.name_any(),
            &PostParams::default(),
            &binding,
        )
        .await
        .map(drop)
    }

    async fn tend(&mut self, pod: &Pod, node: String) -> Result<(), kube::Error> {
        let uid = pod.uid().unwrap_or_default();
        let phase = pod.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default();
        let leaving = pod.metadata.deletion_timestamp.is_some();
        if !self.pods.contains_key(&uid) {
            if leaving || phase != "Pending" {
                return if leaving { self.remove(pod).await } else { Ok(()) };
            }
            let started = self.start(pod, node, None).await?;
            self.pods.insert(uid.clone(), started);
        }
        let Some(started) = self.pods.get_mut(&uid) else { return Ok(()) };
        if leaving && started.kill.is_none() {
            let grace = pod.metadata.deletion_grace_period_seconds.unwrap_or(30);
            started.kill = Some(Instant::now() + Duration::from_secs(grace as u64));
            if let Some(child) = &started.child {
                signal(child.id(), "TERM");
            }
        }
        if started.kill.is_some_and(|at| Instant::now() >= at)
            && let Some(child) = &mut started.child
        {
            let _ = child.kill();
        }
        started.look();
        let always = pod.spec.as_ref().is_none_or(|spec| spec.restart_policy.as_deref() != Some("Never"));
        let ended = started.child.is_none();
        if ended && always && !leaving {
            let again = *started.again.get_or_insert_with(|| Instant::now() + BACKOFF);
            if Instant::now() >= again {
                let (restarts, last) = (started.restarts + 1, started.last.clone());
                let (node, ip) = (started.node.clone(), started.ip.clone());
                let mut anew = self.start(pod, node, Some(ip)).await?;
                (anew.restarts, anew.last) = (restarts, last);
                self.pods.insert(uid.clone(), anew);
            }
        }
        let Some(started) = self.pods.get_mut(&uid) else { return Ok(()) };
        let over = ended && (leaving || !always);
        let status = started.status(over);
        let told = pod.status.as_ref();
        let same = told.is_some_and(|told| {
            told.phase == status.phase && told.container_statuses == status.container_statuses
        });
        if !same && !started.over {
            let api: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
            // Whole: the conditions of others, as that of a disruption, are kept.
            let ours = status.conditions.clone().unwrap_or_default();
            let told = told.and_then(|told| told.conditions.clone()).unwrap_or_default().into_iter();
            let others = told.filter(|other| ours.iter().all(|own| own.type_ != other.type_));
            let status = PodStatus { conditions: Some(others.chain(ours.clone()).collect()), ..status };
            let patch = Patch::Merge(json!({ "status": status }));
            let patched = api.patch_status(&pod.name_any(), &PatchParams::default(), &patch).await;
            match patched {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                patched => drop(patched?),
            }
        }
        started.over |= over;
        if over && leaving { self.remove(pod).await } else { Ok(()) }
    }

    /// The last word of a pod that was asked to go.
    async fn remove(&self, pod: &Pod) -> Result<(), kube::Error> {
        if pod.metadata.deletion_grace_period_seconds == Some(0) {
            return Ok(());
        }
        let now = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: pod.uid(), resource_version: None }),
            ..DeleteParams::default()
        };
        let api: Api<Pod> = self.api(pod);
        match api.delete(&pod.name_any(), &now).await {
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
            deleted => deleted.map(drop),
        }
    }

    async fn start(&mut self, pod: &Pod, node: String, ip: Option<String>) -> Result<Started, kube::Error> {
        let spec = pod.spec.clone().unwrap_or_default();
        let container = spec.containers[0].clone();
        let services = self.api::<Service>(pod).list(&ListParams::default()).await?;
        let (mut addresses, mut ip) = (BTreeMap::new(), ip);
        for service in &services.items {
            let Some(spec) = &service.spec else { continue };
            let Some(address) = spec.cluster_ip.clone().filter(|address| address != "None") else { continue };
            let selects = spec.selector.as_ref().is_some_and(|selector| {
                selector.iter().all(|(label, value)| pod.labels().get(label) == Some(value))
            });
            if selects {
                ip = Some(address.clone());
            }
            addresses.insert(service.name_any(), address);
        }
        self.next += 1;
        let (high, low) = (self.next / 250, self.next % 250 + 1);
        let ip = ip.unwrap_or_else(|| format!("127.97.{high}.{low}"));
        let home = self.folder.join(pod.uid().unwrap_or_default());
        std::fs::create_dir_all(&home).expect("the test's folder can be written");
        for volume in spec.volumes.iter().flatten() {
            let folder = home.join(&volume.name);
            std::fs::create_dir_all(&folder).expect("the test's folder can be written");
            let write = |name: &str, bytes: &[u8]| {
                std::fs::write(folder.join(name), bytes).expect("the test's folder can be written");
            };
            if let Some(source) = &volume.config_map {
                let map = self.api::<ConfigMap>(pod).get(&source.name).await?;
                for item in source.items.iter().flatten() {
                    write(&item.path, map.data.as_ref().map_or("", |data| &data[&item.key]).as_bytes());
                }
            }
            if let Some(source) = &volume.secret {
                let name = source.secret_name.clone().unwrap_or_default();
                let secret = self.api::<Secret>(pod).get(&name).await?;
                for item in source.items.iter().flatten() {
                    write(&item.path, &secret.data.as_ref().expect("it has entries")[&item.key].0);
                }
            }
        }
        let mounts = container.volume_mounts.iter().flatten();
        let mounts: Vec<(String, String)> = mounts
            .map(|mount| (mount.mount_path.clone(), home.join(&mount.name).display().to_string()))
            .collect();
        let mut variables = BTreeMap::new();
        if spec.automount_service_account_token != Some(false) {
            // What a real pod finds in a volume: a token of its service account.
            let name = spec.service_account_name.as_deref().unwrap_or("default");
            let accounts = self.api::<ServiceAccount>(pod);
            let made =
                accounts.create_token_request(name, &PostParams::default(), &TokenRequest::default()).await?;
            let token = made.status.and_then(|status| status.token).expect("a token that was made is told");
            let file = home.join("kubeconfig");
            let config = self.admin.replace(ADMIN, &token);
            std::fs::write(&file, config).expect("the test's folder can be written");
            variables.insert("KUBECONFIG".to_owned(), file.display().to_string());
        }
        for from in container.env_from.iter().flatten() {
            let Some(source) = &from.secret_ref else { continue };
            let secret = self.api::<Secret>(pod).get(&source.name).await?;
            for (name, value) in secret.data.unwrap_or_default() {
                variables.insert(name, String::from_utf8(value.0).expect("a variable is text"));
            }
        }
        for variable in container.env.iter().flatten() {
            let path = variable
                .value_from
                .as_ref()
                .and_then(|from| Some(from.field_ref.as_ref()?.field_path.clone()));
            let value = match path.as_deref() {
                Some("status.podIP") => ip.clone(),
                Some("spec.nodeName") => node.clone(),
                Some("metadata.namespace") => pod.namespace().unwrap_or_default(),
                Some(path) => {
                    entry(pod, path).unwrap_or_else(|| panic!("this kubelet knows no field {path}"))
                }
                None => variable.value.clone().unwrap_or_default(),
            };
            variables.insert(variable.name.clone(), value);
        }
        let argument = |text: &String| {
            let mut text = text.replace("0.0.0.0", &ip);
            for (name, value) in &variables {
                text = text.replace(&format!("$({name})"), value);
            }
            for (name, address) in &addresses {
                text = text.replace(&format!("{name}:"), &format!("{address}:"));
            }
            // Nothing is handed over in a pod's scratch, and these tests may lie in /tmp themselves.
            let mount = mounts.iter().find(|(path, _)| path != "/tmp" && text.starts_with(path.as_str()));
            mount.map_or(text.clone(), |(path, folder)| text.replacen(path.as_str(), folder, 1))
        };
        let arguments: Vec<String> = container.args.iter().flatten().map(argument).collect();
        let log = home.join("log");
        let file = || {
            File::options().create(true).append(true).open(&log).expect("the test's folder can be written")
        };
        assert_eq!(container.command.as_deref(), Some(&["anello".to_owned()][..]));
        let child = Command::new(binary())
            .args(arguments)
            .env("RUST_LOG", "info")
            .envs(&variables)
            .current_dir(&home)
            .stdin(Stdio::null())
            .stdout(file())
            .stderr(file())
            .spawn()
            .expect("anello starts");
        Ok(Started {
            node,
            ip,
            child: Some(child),
            log,
            container,
            since: Timestamp::now(),
            restarts: 0,
            again: None,
            kill: None,
            ready: false,
            last: None,
            over: false,
            lost: false,
        })
    }
}

impl Started {
    /// Whether it has ended, and whether it listens.
    fn look(&mut self) {
        let Some(child) = &mut self.child else { return };
        if let Some(ended) = child.try_wait().expect("it is our child") {
            // As a shell has it: a signal is 128 and its number.
            use std::os::unix::process::ExitStatusExt;
            let code = ended.code().unwrap_or_else(|| 128 + ended.signal().unwrap_or_default());
            let text = std::fs::read(&self.log).unwrap_or_default();
            let text = String::from_utf8_lossy(&text[text.len().saturating_sub(MESSAGE)..]).into_owned();
            self.last = Some(ContainerStateTerminated {
                exit_code: code,
                message: (code != 0).then_some(text),
                started_at: Some(Time(self.since)),
                finished_at: Some(Time(Timestamp::now())),
                reason: Some(if code == 0 { "Completed" } else { "Error" }.to_owned()),
                ..ContainerStateTerminated::default()
            });
            (self.child, self.ready) = (None, false);
        } else if !self.ready {
            let port = self.container.ports.iter().flatten().map(|port| port.container_port as u16).next();
            let probed = self.container.readiness_probe.is_some();
            let address = port.filter(|_| probed).map(|port| format!("{}:{port}", self.ip));
            self.ready = address.is_none_or(|address| TcpStream::connect(address).is_ok());
        }
    }

    /// What is told of it; `over` when it is not started again.
    fn status(&self, over: bool) -> PodStatus {
        let running = ContainerStateRunning { started_at: Some(Time(self.since)) };
        let ended = ContainerState { terminated: self.last.clone(), ..ContainerState::default() };
        let alive = ContainerState { running: Some(running), ..ContainerState::default() };
        let restarted = (self.restarts > 0).then(|| ended.clone());
        let phase = match &self.last {
            Some(last) if over && last.exit_code == 0 => "Succeeded",
            Some(_) if over => "Failed",
            _ => "Running",
        };
        let condition = |kind: &str| PodCondition {
            type_: kind.to_owned(),
            status: if self.ready { "True" } else { "False" }.to_owned(),
            ..PodCondition::default()
        };
        PodStatus {
            phase: Some(phase.to_owned()),
            pod_ip: Some(self.ip.clone()),
            pod_ips: Some(vec![PodIP { ip: self.ip.clone() }]),
            start_time: Some(Time(self.since)),
            conditions: Some(vec![condition("Ready"), condition("ContainersReady")]),
            container_statuses: Some(vec![ContainerStatus {
                name: self.container.name.clone(),
                image: self.container.image.clone().unwrap_or_default(),
                ready: self.ready,
                restart_count: self.restarts,
                state: Some(if self.child.is_some() { alive } else { ended }),
                last_state: restarted,
                ..ContainerStatus::default()
            }]),
            ..PodStatus::default()
        }
    }
}

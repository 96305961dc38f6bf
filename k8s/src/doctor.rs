//! Is a cluster fit for PretrainJobs, and is somebody there to look after them? What a person would ask after an install.
//!
//! Asked of the API server alone, with what anybody who is logged in may ask, the controller's service account included: the
//! chart's test runs it as that account. `rights` knows what the controller must be allowed to do.

mod rights;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{GetParams, ListParams};
use kube::core::Request;
use kube::{Api, Client, CustomResourceExt, Resource, ResourceExt};
use serde_json::Value;

use crate::controller::{Error, look_at};
use crate::lease::{self, GOOD, RENEW};
use crate::plan::CoordinatorSeen;
use crate::resource::PretrainJob;
use rights::{Account, JOB_SETS, in_words, questions, refused};

/// Whose pods are controllers, as the chart labels them.
const CONTROLLERS: &str = "app.kubernetes.io/name=anello-controller";
/// Between two looks at the Lease.
const ROUND: Duration = Duration::from_millis(500);
/// Until a controller that has just started has the Lease: one that came to its end without a word is waited for first.
const PATIENCE: Duration = Duration::from_secs(45);
/// Fields that are named when a definition lacks some.
const FIELDS_MAX: usize = 6;
/// Groups of others that some jobs need, and which.
const OTHERS: [(&str, &str, &str); 2] =
    [("JobSet", JOB_SETS, "workers.kind JobSet"), ("Kueue", "kueue.x-k8s.io", "queueName")];

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checkup {
    /// Whether PretrainJobs are looked after.
    pub fit: bool,
    /// What was found, in words, in the order in which one thing needs another; with a remedy where something is wrong.
    pub found: Vec<String>,
}

impl Checkup {
    /// It is well, and so.
    fn well(&mut self, line: String) {
        self.found.push(line);
    }

    /// It is not well.
    fn ill(&mut self, line: String) {
        self.fit = false;
        self.found.push(line);
    }

    fn say(&mut self, said: Result<String, String>) {
        match said {
            Ok(line) => self.well(line),
            Err(line) => self.ill(line),
        }
    }
}

/// A controller as the chart installs it.
struct Installed {
    account: Account,
    /// Whose jobs it looks after; absent: all.
    namespace: Option<String>,
    ready: bool,
}

/// Looks at the cluster of the current kubeconfig, or of the pod that this runs in, and at the controller in `namespace` (absent:
/// the kubeconfig's). It takes up to 45 s to say that a controller does nothing.
///
/// # Errors
/// [`Error::NoCluster`]. All else is a finding.
pub async fn checkup(namespace: Option<&str>) -> Result<Checkup, Error> {
    let client = Client::try_default().await.map_err(|cause| Error::NoCluster(cause.to_string()))?;
    let namespace = namespace.unwrap_or(client.default_namespace()).to_owned();
    let mut checkup = Checkup { fit: true, found: Vec::new() };
    match client.apiserver_version().await {
        Ok(version) => checkup.well(format!("cluster: Kubernetes {}", version.git_version)),
        Err(cause) => {
            let remedy = "look at KUBECONFIG and at the way to the API server";
            checkup.ill(format!("cluster: the API server does not answer: {cause}; {remedy}"));
            return Ok(checkup);
        }
    }
    checkup.say(definition(&client).await);
    let groups = match client.list_api_groups().await {
        Ok(list) => list.groups.into_iter().map(|group| group.name).collect(),
        Err(cause) => {
            checkup.ill(format!("groups: the API server does not tell what it serves: {cause}"));
            BTreeSet::new()
        }
    };
    let installed = match installed(&client, &namespace).await {
        Ok((line, installed)) => {
            checkup.say(line);
            installed
        }
        Err(cause) => {
            checkup.ill(format!("controller: {}", unread("Deployments", &namespace, &cause)));
            None
        }
    };
    if let Some(installed) = &installed {
        let asked = questions(installed.namespace.as_deref(), &namespace, groups.contains(JOB_SETS));
        let count = asked.len();
        let answer = refused(&client, &installed.account, asked).await;
        checkup.say(of_rights(&installed.account, count, answer));
    }
    let leases: Api<Lease> = Api::namespaced(client.clone(), &namespace);
    let ready = installed.is_some_and(|installed| installed.ready);
    checkup.say(match pulse(&leases, ready).await {
        Ok(pulse) => of_lease(&pulse, &namespace),
        Err(cause) => Err(format!("lease: {}", unread("Leases", &namespace, &cause))),
    });
    checkup.well(others(&groups));
    Ok(checkup)
}

fn unread(what: &str, namespace: &str, cause: &kube::Error) -> String {
    let remedy = match cause {
        kube::Error::Api(status) if status.code == 403 => {
            "; ask as somebody who may, or as the controller itself, by `helm test`"
        }
        _ => "",
    };
    format!("{what} of namespace {namespace} cannot be read: {cause}{remedy}")
}

/// Whether the resource is served, as this build knows it.
async fn definition(client: &Client) -> Result<String, String> {
    let (name, version) = (PretrainJob::crd_name(), PretrainJob::api_version(&()).into_owned());
    let remedy = "`helm upgrade` brings it, or `anello crd | kubectl apply --server-side -f -`";
    let served = match client.list_api_group_resources(&version).await {
        Ok(served) => served.resources.into_iter().map(|resource| resource.name).collect(),
        Err(kube::Error::Api(status)) if status.code == 404 => BTreeSet::new(),
        Err(cause) => return Err(format!("definition: whether {name} is served is not told: {cause}")),
    };
    let plural = PretrainJob::plural(&()).into_owned();
    let wanted = [plural.clone(), format!("{plural}/status"), format!("{plural}/scale")];
    let absent: Vec<&str> =
        wanted.iter().filter(|wanted| !served.contains(*wanted)).map(String::as_str).collect();
    if !absent.is_empty() {
        return Err(format!(
            "definition: the cluster serves no {} of {version}; {remedy}",
            absent.join(", ")
        ));
    }
    let schema = Request::new(format!("/openapi/v3/apis/{}", PretrainJob::group(&())))
        .get(&PretrainJob::version(&()), &GetParams::default());
    let schema = match schema {
        Ok(request) => client.request_text(request).await.ok(),
        Err(_) => None,
    };
    let schema = schema.and_then(|text| serde_json::from_str::<Value>(&text).ok());
    let theirs = schema.as_ref().and_then(published).map(fields).unwrap_or_default();
    of_fields(name, &own_fields(), &theirs).map_err(|line| format!("{line}; {remedy}"))
}

/// The schema of PretrainJobs in the document that the API server publishes of their group.
fn published(document: &Value) -> Option<&Value> {
    let (group, kind) = (PretrainJob::group(&()).into_owned(), PretrainJob::kind(&()).into_owned());
    document["components"]["schemas"].as_object()?.values().find(|schema| {
        let kinds = schema["x-kubernetes-group-version-kind"].as_array();
        kinds.into_iter().flatten().any(|of| of["group"] == *group && of["kind"] == *kind)
    })
}

/// Paths of the fields that this build's definition has.
fn own_fields() -> BTreeSet<String> {
    let definition = serde_json::to_value(PretrainJob::crd()).expect("a definition is plain data");
    fields(&definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
}

/// Paths of the fields below `spec` and `status` of a schema, as `spec.workers.min`; those in lists and maps included.
fn fields(schema: &Value) -> BTreeSet<String> {
    fn walk(schema: &Value, path: &str, found: &mut BTreeSet<String>) {
        for (name, of) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}.{name}");
            walk(of, &path, found);
            found.insert(path);
        }
        for inner in ["items", "additionalProperties"].iter().filter_map(|inner| schema.get(inner)) {
            walk(inner, path, found);
        }
    }
    let mut found = BTreeSet::new();
    for part in ["spec", "status"] {
        walk(&schema["properties"][part], part, &mut found);
    }
    found
}

/// What is said of a definition that has the fields `theirs`, none when they are not told, by a build that knows `ours`.
fn of_fields(name: &str, ours: &BTreeSet<String>, theirs: &BTreeSet<String>) -> Result<String, String> {
    let named = |fields: Vec<&String>| {
        let shown: Vec<&str> = fields.iter().take(FIELDS_MAX).map(|field| field.as_str()).collect();
        let rest = fields.len() - shown.len();
        let rest = if rest == 0 { String::new() } else { format!(" and {rest} more") };
        shown.join(", ") + &rest
    };
    if theirs.is_empty() {
        return Ok(format!("definition: {name} is served; its fields are not told"));
    }
    let lacks: Vec<&String> = ours.difference(theirs).collect();
    let more: Vec<&String> = theirs.difference(ours).collect();
    match (lacks.is_empty(), more.is_empty()) {
        (true, true) => Ok(format!("definition: {name} is served, and is this build's")),
        (true, false) => Ok(format!("definition: {name} is of a newer build: it also has {}", named(more))),
        (false, _) => Err(format!("definition: {name} is of another build: it lacks {}", named(lacks))),
    }
}

/// The controller that the chart installed in `namespace`, and how it is.
async fn installed(
    client: &Client,
    namespace: &str,
) -> Result<(Result<String, String>, Option<Installed>), kube::Error> {
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    let labelled = ListParams::default().labels(CONTROLLERS);
    let Some(deployment) = deployments.list(&labelled).await?.items.into_iter().next() else {
        let line = format!(
            "controller: namespace {namespace} has no Deployment of one; name its namespace by --namespace, or install it: \
             `helm install anello k8s/chart --namespace {namespace}`"
        );
        return Ok((Err(line), None));
    };
    let name = deployment.name_any();
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    let ready = deployment.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or_default();
    let pod = deployment.spec.as_ref().and_then(|spec| spec.template.spec.clone()).unwrap_or_default();
    let arguments = pod.containers.iter().find(|container| container.name == "controller");
    let arguments = arguments.and_then(|container| container.args.clone()).unwrap_or_default();
    let of = arguments.iter().skip_while(|argument| *argument != "--namespace").nth(1).cloned();
    let account = pod.service_account_name.unwrap_or_else(|| "default".to_owned());
    let whose = of.as_ref().map_or("all namespaces".to_owned(), |of| format!("namespace {of}"));
    let account = Account { namespace: namespace.to_owned(), name: account };
    let installed = Installed { account, namespace: of, ready: ready > 0 };
    if ready > 0 {
        let line = format!(
            "controller: {ready} of {wanted} of Deployment {name} are ready, for the jobs of {whose}"
        );
        return Ok((Ok(line), Some(installed)));
    }
    let why = match wanted {
        0 => "it is to have no replicas".to_owned(),
        _ => why_not(client, namespace, &deployment).await?,
    };
    let line = format!(
        "controller: none of {wanted} of Deployment {name} is ready: {why}; \
         `kubectl -n {namespace} describe deployment,pods -l {CONTROLLERS}`"
    );
    Ok((Err(line), Some(installed)))
}

/// Why no pod of a Deployment is ready, as far as Kubernetes says.
async fn why_not(client: &Client, namespace: &str, deployment: &Deployment) -> Result<String, kube::Error> {
    let conditions = deployment.status.as_ref().and_then(|status| status.conditions.clone());
    let failed = |kind: &str| kind == "ReplicaFailure";
    let failure = conditions.into_iter().flatten().find(|condition| failed(&condition.type_));
    if let Some(message) = failure.and_then(|condition| condition.message) {
        return Ok(message);
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    for pod in pods.list(&ListParams::default().labels(CONTROLLERS)).await?.items {
        let Some(status) = &pod.status else { continue };
        let mut seen = CoordinatorSeen::default();
        status.container_statuses.iter().flatten().for_each(|container| look_at(container, &mut seen));
        let unplaced = || {
            let mut conditions = status.conditions.iter().flatten();
            let placed = conditions.find(|condition| condition.type_ == "PodScheduled")?;
            placed.message.clone().filter(|_| placed.status == "False")
        };
        if let Some(words) = seen.hopeless.or(seen.failing).or_else(unplaced) {
            return Ok(format!("pod {}: {words}", pod.name_any()));
        }
    }
    Ok("it is not said why".to_owned())
}

/// What is said of the answer to `count` questions about `account`.
fn of_rights(
    account: &Account,
    count: usize,
    answer: Result<Vec<k8s_openapi::api::authorization::v1::ResourceAttributes>, kube::Error>,
) -> Result<String, String> {
    let Account { namespace, name } = account;
    let who = format!("service account {namespace}/{name}");
    match answer {
        Ok(refused) if refused.is_empty() => {
            Ok(format!("rights: {who} may do all {count} things that it must"))
        }
        Ok(refused) => {
            let refused: Vec<String> = refused.iter().map(in_words).collect();
            let refused = refused.join(", ");
            Err(format!("rights: {who} may not {refused}; `helm upgrade` mends the chart's roles"))
        }
        // That says nothing about the controller.
        Err(kube::Error::Api(status)) if status.code == 403 => Ok(format!(
            "rights: what {who} may is not told to everybody ({}); `helm test` asks as the controller itself",
            status.message
        )),
        Err(cause) => Err(format!("rights: what {who} may is not told: {cause}")),
    }
}

/// What is seen of a Lease.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Pulse {
    /// Nobody ever had it.
    Absent,
    /// Who had it let it go.
    LetGo,
    /// Its holder renewed it while this looked on.
    Beats { holder: String },
    /// Nobody did, for so long.
    Silent { holder: String, watched: Duration },
}

/// What a look at a Lease shows: its holder, if there is one, and what changes with each renewal.
type Beat = Option<(String, Option<MicroTime>)>;

/// Looks on until the Lease is renewed. Clocks are not compared, as in [`lease`]. Where a controller is `ready` it is waited for.
async fn pulse(leases: &Api<Lease>, ready: bool) -> Result<Pulse, kube::Error> {
    let began = Instant::now();
    let mut first: Option<Beat> = None;
    loop {
        let lease = leases.get_opt(lease::NAME).await?;
        let is_there = lease.is_some();
        let spec = lease.and_then(|lease| lease.spec).unwrap_or_default();
        let holder = spec.holder_identity.filter(|holder| !holder.is_empty());
        let now: Beat = holder.map(|holder| (holder, spec.renew_time));
        let before = first.get_or_insert_with(|| now.clone());
        if let (Some((holder, _)), true) = (&now, now != *before) {
            return Ok(Pulse::Beats { holder: holder.clone() });
        }
        // One that holds it where no pod is ready may be elsewhere.
        let patience = match (ready, &now) {
            (true, _) => PATIENCE,
            (false, Some(_)) => GOOD + RENEW,
            (false, None) => Duration::ZERO,
        };
        let watched = began.elapsed();
        if watched >= patience {
            return Ok(match now {
                Some((holder, _)) => Pulse::Silent { holder, watched },
                None if is_there => Pulse::LetGo,
                None => Pulse::Absent,
            });
        }
        tokio::time::sleep(ROUND).await;
    }
}

fn of_lease(pulse: &Pulse, namespace: &str) -> Result<String, String> {
    let name = lease::NAME;
    let remedy = format!("`kubectl -n {namespace} logs -l {CONTROLLERS}` says what the controller does");
    let ill = |what: String| Err(format!("lease: {what}; jobs wait, and what trains trains on; {remedy}"));
    match pulse {
        Pulse::Beats { holder } => {
            Ok(format!("lease: {holder} holds {name} in namespace {namespace} and renews it"))
        }
        Pulse::Absent => ill(format!("nobody ever held {name} in namespace {namespace}")),
        Pulse::LetGo => {
            ill(format!("nobody holds {name} in namespace {namespace}: its last holder let it go"))
        }
        Pulse::Silent { holder, watched } => ill(format!(
            "{holder} holds {name} in namespace {namespace} and did not renew it in {} s",
            watched.as_secs()
        )),
    }
}

/// What is said of what others bring.
fn others(groups: &BTreeSet<String>) -> String {
    let told = OTHERS.map(|(name, group, whose)| match groups.contains(group) {
        true => format!("{name} is there"),
        false => format!("{name} is not, which jobs with {whose} need"),
    });
    format!("others: {}", told.join("; "))
}

#[cfg(test)]
mod tests;

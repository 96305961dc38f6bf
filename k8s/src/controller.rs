//! The shell of the controller: it looks at a job, has [`plan`] say what to do, and does it, while it holds a Lease.

use std::sync::Arc;
use std::time::Duration;

use anello_tls::Tls;
use futures::StreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, ContainerStatus, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PropagationPolicy};
use kube::core::NamespaceResourceScope;
use kube::runtime::controller::{Action, Controller};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::coordinator::Coordinator;
use crate::crew;
use crate::lease::{Holding, RENEW};
use crate::objects::{JOB_LABEL, JobSet, PORT, ROLE_LABEL, coordinator_name, workers_name};
use crate::plan::{Change, CoordinatorSeen, FINALIZER, Observed, Plan, plan};
use crate::resource::{PretrainJob, WorkersKind};

/// The name under which fields are ours.
const MANAGER: &str = "anello-controller";
/// Pause after a look that failed.
const PAUSE: Duration = Duration::from_secs(5);
/// Letters of a pod's last words that are passed on.
pub(crate) const WORDS_MAX: usize = 1000;

/// Why the controller ends, or a look at a job failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server.
    #[error("the API server, {action}: {source}")]
    Kube {
        /// What was tried.
        action: &'static str,
        /// What it said.
        source: Box<kube::Error>,
    },
    /// No cluster was found.
    #[error("no cluster: {0}; give a kubeconfig by KUBECONFIG, or run this in a pod with a service account")]
    NoCluster(String),
    /// Another controller has the Lease.
    #[error("another controller holds the Lease now: this one leaves")]
    Replaced,
    /// The coordinator of a job.
    #[error("the coordinator of the job, asked to {action}: {reason}")]
    Coordinator {
        /// What it was asked to do.
        action: &'static str,
        /// What went wrong.
        reason: String,
    },
}

pub(crate) fn kube(action: &'static str) -> impl FnOnce(kube::Error) -> Error {
    move |source| Error::Kube { action, source: Box::new(source) }
}

/// What a controller is to look after.
#[derive(Clone, Debug)]
pub struct ControllerOptions {
    /// The namespace; absent: all.
    pub namespace: Option<String>,
    /// Namespace of its Lease.
    pub lease_namespace: String,
    /// What tells it from others.
    pub identity: String,
    /// Its certificate as a user of the jobs' coordinators; absent: only jobs without TLS answer it.
    pub tls: Option<Tls>,
}

struct Context {
    client: Client,
    options: ControllerOptions,
    recorder: Recorder,
}

/// Looks after all jobs until `stop` ends, or another controller has the Lease.
///
/// # Errors
/// No cluster; a Lease that cannot be had or is lost.
pub async fn run(options: ControllerOptions, stop: impl Future<Output = ()> + Send) -> Result<(), Error> {
    let client = Client::try_default().await.map_err(|cause| Error::NoCluster(cause.to_string()))?;
    let leases: Api<Lease> = Api::namespaced(client.clone(), &options.lease_namespace);
    let mut lease = Holding::new(leases, options.identity.clone());
    tokio::pin!(stop);
    while !lease.take().await? {
        tokio::select! {
            () = &mut stop => return Ok(()),
            () = tokio::time::sleep(RENEW) => {}
        }
    }
    tracing::info!(identity = options.identity, "this controller holds the Lease");
    let reporter = Reporter { controller: MANAGER.to_owned(), instance: Some(options.identity.clone()) };
    let context = Arc::new(Context {
        client: client.clone(),
        recorder: Recorder::new(client.clone(), reporter),
        options,
    });
    let looks = looks(client, context);
    let lost = async {
        while lease.take().await.unwrap_or_default() {
            tokio::time::sleep(RENEW).await;
        }
    };
    tokio::select! {
        () = &mut stop => {
            lease.give_back().await;
            Ok(())
        }
        () = lost => Err(Error::Replaced),
        () = looks => Ok(()),
    }
}

/// Makes `job` in `namespace`, or in that of the kubeconfig's context, which is returned. One that is there is changed.
///
/// # Errors
/// No cluster; what the API server refuses.
pub async fn apply(job: &PretrainJob, namespace: Option<&str>) -> Result<String, Error> {
    let client = Client::try_default().await.map_err(|cause| Error::NoCluster(cause.to_string()))?;
    let namespace = namespace.unwrap_or(client.default_namespace()).to_owned();
    let jobs: Api<PretrainJob> = Api::namespaced(client, &namespace);
    let ours = PatchParams::apply("anello-submit");
    let made = jobs.patch(&job.name_any(), &ours, &Patch::Apply(job)).await;
    made.map_err(kube("making the PretrainJob"))?;
    Ok(namespace)
}

/// Looks at every job when it or one of its objects changes, and when its plan says.
async fn looks(client: Client, context: Arc<Context>) {
    fn all<K>(client: &Client, namespace: Option<&str>) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        match namespace {
            Some(namespace) => Api::namespaced(client.clone(), namespace),
            None => Api::all(client.clone()),
        }
    }
    let namespace = context.options.namespace.clone();
    let namespace = namespace.as_deref();
    let ours = watcher::Config::default().labels(JOB_LABEL);
    Controller::new(all::<PretrainJob>(&client, namespace), watcher::Config::default())
        .owns(all::<Deployment>(&client, namespace), ours.clone())
        .owns(all::<Job>(&client, namespace), ours)
        .run(look, again, context)
        .for_each(|looked| async move {
            match looked {
                Ok((job, _)) => tracing::debug!(job = job.name, namespace = job.namespace, "looked at"),
                Err(cause) => tracing::warn!(%cause, "a look failed"),
            }
        })
        .await;
}

/// After a look that failed.
fn again(job: Arc<PretrainJob>, error: &Error, _: Arc<Context>) -> Action {
    tracing::warn!(job = job.name_any(), namespace = job.namespace(), %error, "looked at in vain");
    Action::requeue(PAUSE)
}

async fn look(job: Arc<PretrainJob>, context: Arc<Context>) -> Result<Action, Error> {
    let mut coordinator = None;
    let observed = observe(&job, &context, &mut coordinator).await?;
    let Plan { changes, status, again_s } = plan(&job, &observed);
    let namespace = job.namespace().unwrap_or_default();
    let jobs: Api<PretrainJob> = Api::namespaced(context.client.clone(), &namespace);
    // First of all, so that what people are told is what was seen, also when a change fails.
    let said = json!({
        "apiVersion": PretrainJob::api_version(&()), "kind": PretrainJob::kind(&()), "status": status,
    });
    if job.status.as_ref() != Some(&status) {
        let ours = PatchParams::apply(MANAGER).force();
        let patched = jobs.patch_status(&job.name_any(), &ours, &Patch::Apply(said)).await;
        ignore_gone(patched.map(drop)).map_err(kube("writing the status"))?;
    }
    for change in changes {
        tracing::debug!(job = job.name_any(), ?change, "a change");
        make(&job, &context, &namespace, &jobs, change, &mut coordinator).await?;
    }
    Ok(again_s.map_or_else(Action::await_change, |s| Action::requeue(Duration::from_secs(s))))
}

/// What is gone needs no change.
fn ignore_gone(result: Result<(), kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        result => result,
    }
}

async fn observe(
    job: &PretrainJob,
    context: &Context,
    coordinator: &mut Option<Coordinator>,
) -> Result<Observed, Error> {
    let (name, namespace) = (job.name_any(), job.namespace().unwrap_or_default());
    let deployments: Api<Deployment> = Api::namespaced(context.client.clone(), &namespace);
    let pods: Api<Pod> = Api::namespaced(context.client.clone(), &namespace);
    let deployment =
        deployments.get_opt(&coordinator_name(&name)).await.map_err(kube("reading a Deployment"))?;
    let now = Timestamp::now().as_second();
    let (crew, no_job_sets) = crew::look(job, &context.client, now).await?;
    let mut observed = Observed { now, crew, no_job_sets, ..Observed::default() };
    let Some(deployment) = deployment else { return Ok(observed) };
    let status = deployment.status.unwrap_or_default();
    let ready = status.ready_replicas.unwrap_or_default() > 0;
    let mut seen = CoordinatorSeen { ready, ..CoordinatorSeen::default() };
    if !ready {
        let conditions = status.conditions.into_iter().flatten();
        // No pod could be made: as when a quota is exhausted.
        seen.failing = conditions
            .filter(|condition| condition.type_ == "ReplicaFailure" && condition.status == "True")
            .find_map(|condition| condition.message);
        let labels = format!("{JOB_LABEL}={name},{ROLE_LABEL}=coordinator");
        let pods = pods.list(&ListParams::default().labels(&labels)).await.map_err(kube("listing pods"))?;
        let containers = pods.items.iter().filter_map(|pod| pod.status.as_ref()?.container_statuses.as_ref());
        for container in containers.flatten() {
            look_at(container, &mut seen);
        }
    }
    observed.coordinator = Some(seen);
    if ready {
        // By its address, which needs no DNS where this runs; with TLS its certificate says who it is.
        let services: Api<Service> = Api::namespaced(context.client.clone(), &namespace);
        let service = services.get_opt(&coordinator_name(&name)).await.map_err(kube("reading a Service"))?;
        let ip = service.and_then(|service| service.spec?.cluster_ip).unwrap_or_default();
        let address = if ip.contains(':') { format!("[{ip}]:{PORT}") } else { format!("{ip}:{PORT}") };
        let tls = context.options.tls.clone().filter(|_| job.spec.tls.is_some());
        let run = match Coordinator::connect(address, tls, name.clone()).await {
            Ok(connected) => coordinator.insert(connected).look().await,
            Err(reason) => Err(reason),
        };
        observed.run = run
            .inspect_err(|reason| tracing::info!(job = name, reason, "a coordinator does not answer"))
            .ok();
    }
    Ok(observed)
}

/// Why the coordinator's container does not run.
pub(crate) fn look_at(container: &ContainerStatus, seen: &mut CoordinatorSeen) {
    let states = [container.state.as_ref(), container.last_state.as_ref()];
    let ended = states.into_iter().flatten().find_map(|state| state.terminated.as_ref());
    if let Some(ended) = ended {
        let message = ended.message.as_deref().unwrap_or_default().trim();
        let words: String = message.chars().take(WORDS_MAX).collect();
        let words = if words.is_empty() { format!("exit code {}", ended.exit_code) } else { words };
        if ended.exit_code == 2 {
            seen.hopeless = Some(words);
        } else {
            seen.failing = Some(words);
        }
    } else if let Some(waiting) = container.state.as_ref().and_then(|state| state.waiting.as_ref()) {
        // An image that cannot be pulled, a Secret that is not there.
        let words = [waiting.reason.clone(), waiting.message.clone()].into_iter().flatten();
        seen.failing = Some(words.collect::<Vec<_>>().join(": "));
    }
}

/// Makes an object so, by server-side apply.
async fn apply_object<K>(context: &Context, namespace: &str, object: &K) -> Result<(), Error>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + Serialize
        + DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(context.client.clone(), namespace);
    let ours = PatchParams::apply(MANAGER).force();
    let applied = api.patch(&object.name_any(), &ours, &Patch::Apply(object)).await;
    applied.map(drop).map_err(kube("applying an object"))
}

/// Makes one change.
async fn make(
    job: &PretrainJob,
    context: &Context,
    namespace: &str,
    jobs: &Api<PretrainJob>,
    change: Change,
    coordinator: &mut Option<Coordinator>,
) -> Result<(), Error> {
    let name = job.name_any();
    let finalizers = |finalizers: Vec<&str>| {
        // With its version: another's finalizer that came meanwhile is not to be lost.
        let metadata = json!({ "finalizers": finalizers, "resourceVersion": job.resource_version() });
        Patch::Merge(json!({ "metadata": metadata }))
    };
    let others = || job.finalizers().iter().map(String::as_str).filter(|other| *other != FINALIZER);
    match change {
        Change::AddFinalizer => {
            let patch = finalizers(others().chain([FINALIZER]).collect());
            let patched = jobs.patch(&name, &PatchParams::default(), &patch).await;
            patched.map(drop).map_err(kube("adding the finalizer"))
        }
        Change::RemoveFinalizer => {
            let patch = finalizers(others().collect());
            let patched = jobs.patch(&name, &PatchParams::default(), &patch).await;
            ignore_gone(patched.map(drop)).map_err(kube("removing the finalizer"))
        }
        Change::ConfigMap(object) => apply_object::<ConfigMap>(context, namespace, &object).await,
        Change::Service(object) => apply_object::<Service>(context, namespace, &object).await,
        Change::NetworkPolicy(object) => apply_object::<NetworkPolicy>(context, namespace, &object).await,
        Change::Coordinator(object) => apply_object::<Deployment>(context, namespace, &object).await,
        Change::Workers(object) => apply_object::<Job>(context, namespace, &object).await,
        Change::JobSet(object) => apply_object::<JobSet>(context, namespace, &object).await,
        Change::RemoveWorkers => {
            let with = |policy| DeleteParams { propagation_policy: Some(policy), ..DeleteParams::default() };
            let client = context.client.clone();
            let deleted = match job.spec.workers.kind {
                WorkersKind::Job => {
                    let crews: Api<Job> = Api::namespaced(client, namespace);
                    crews.delete(&workers_name(&name), &with(PropagationPolicy::Background)).await.map(drop)
                }
                // It is there until its Job is gone, which the next one could not make under that name before.
                WorkersKind::JobSet => {
                    let crews: Api<JobSet> = Api::namespaced(client, namespace);
                    crews.delete(&name, &with(PropagationPolicy::Foreground)).await.map(drop)
                }
            };
            ignore_gone(deleted).map_err(kube("deleting the workers"))
        }
        Change::Scale(workers) => ask("scale", coordinator, async |to| to.scale(workers).await).await,
        Change::Pause => ask("pause", coordinator, async |to| to.pause().await).await,
        Change::Resume => ask("resume", coordinator, async |to| to.resume().await).await,
        Change::Event { reason, warning, note } => {
            let event = Event {
                type_: if warning { EventType::Warning } else { EventType::Normal },
                reason,
                note: Some(note),
                action: "Reconcile".to_owned(),
                secondary: None,
            };
            let told = context.recorder.publish(&event, &job.object_ref(&())).await;
            // Nothing depends on it.
            if let Err(cause) = told {
                tracing::warn!(%cause, "an event could not be told");
            }
            Ok(())
        }
        Change::Delete => {
            let deleted = jobs.delete(&name, &DeleteParams::background()).await;
            ignore_gone(deleted.map(drop)).map_err(kube("deleting a PretrainJob"))
        }
    }
}

async fn ask(
    action: &'static str,
    coordinator: &mut Option<Coordinator>,
    call: impl AsyncFnOnce(&mut Coordinator) -> Result<(), String>,
) -> Result<(), Error> {
    let Some(coordinator) = coordinator else { return Ok(()) };
    call(coordinator).await.map_err(|reason| Error::Coordinator { action, reason })
}

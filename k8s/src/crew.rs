//! What is seen of the workers' Job or JobSet.

use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::Event as KubeEvent;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};

use crate::controller::{Error, WORDS_MAX, kube};
use crate::objects::{ASKED, JobSet, TEMPLATE, replicated_name, workers_name};
use crate::plan::CrewSeen;
use crate::resource::{PretrainJob, WorkersKind};

/// Seconds for which it is believed that no pod can be made: the Job controller tries again once a minute at least.
const RECENT_S: i64 = 300;

/// The workers of `job` as they are, and whether there can be none since the cluster knows no JobSets.
pub async fn look(job: &PretrainJob, client: &Client, now: i64) -> Result<(Option<CrewSeen>, bool), Error> {
    let (name, namespace) = (job.name_any(), job.namespace().unwrap_or_default());
    let jobs: Api<Job> = Api::namespaced(client.clone(), &namespace);
    let reading = || kube("reading the workers");
    let (mut crew, job_name) = match job.spec.workers.kind {
        WorkersKind::Job => {
            let job_name = workers_name(&name);
            let Some(made) = jobs.get_opt(&job_name).await.map_err(reading())? else {
                return Ok((None, false));
            };
            (of_job(&made), job_name)
        }
        WorkersKind::JobSet => {
            let sets: Api<JobSet> = Api::namespaced(client.clone(), &namespace);
            let set = match sets.get(&name).await {
                Ok(set) => set,
                // No such object, or no such resource.
                Err(kube::Error::Api(status)) if status.code == 404 => {
                    return Ok((None, !knows_job_sets(client).await?));
                }
                Err(cause) => return Err(reading()(cause)),
            };
            let job_name = replicated_name(&name);
            let made = jobs.get_opt(&job_name).await.map_err(reading())?;
            (of_set(&set, made.as_ref()), job_name)
        }
    };
    if !crew.suspended && crew.active < crew.parallelism {
        crew.short = why_short(client, &namespace, &job_name, now).await?;
    }
    Ok((Some(crew), false))
}

/// Whether the cluster has the resource.
async fn knows_job_sets(client: &Client) -> Result<bool, Error> {
    match client.list_api_group_resources("jobset.x-k8s.io/v1alpha2").await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(cause) => Err(kube("asking for JobSets")(cause)),
    }
}

/// Why Kubernetes made no pod for the Job `name`, when it has said so lately: a quota, a policy.
async fn why_short(client: &Client, namespace: &str, name: &str, now: i64) -> Result<Option<String>, Error> {
    let events: Api<KubeEvent> = Api::namespaced(client.clone(), namespace);
    let of = format!("involvedObject.kind=Job,involvedObject.name={name},reason=FailedCreate");
    let told = events.list(&ListParams::default().fields(&of)).await.map_err(kube("listing events"))?;
    let at = |event: &KubeEvent| {
        let last = event.last_timestamp.as_ref().map(|at| at.0.as_second());
        last.or_else(|| event.event_time.as_ref().map(|at| at.0.as_second())).unwrap_or_default()
    };
    let newest = told.items.into_iter().max_by_key(at).filter(|event| now - at(event) < RECENT_S);
    Ok(newest.and_then(|event| event.message).map(|words| words.chars().take(WORDS_MAX).collect()))
}

/// What its pods are to be.
fn of_spec(spec: &JobSpec) -> CrewSeen {
    let affinity = spec.template.spec.clone().and_then(|pod| pod.affinity?.node_affinity);
    let terms = affinity.and_then(|nodes| nodes.required_during_scheduling_ignored_during_execution);
    let expressions = terms.into_iter().flat_map(|terms| terms.node_selector_terms);
    let without = expressions.flat_map(|term| term.match_expressions.unwrap_or_default());
    CrewSeen {
        parallelism: spec.parallelism.unwrap_or(1),
        suspended: spec.suspend.unwrap_or_default(),
        without: without.flat_map(|expression| expression.values.unwrap_or_default()).collect(),
        ..CrewSeen::default()
    }
}

/// What is written on either.
fn annotated(crew: CrewSeen, object: &impl ResourceExt) -> CrewSeen {
    let asked = object.annotations().get(ASKED).and_then(|asked| asked.parse().ok());
    CrewSeen {
        asked: asked.unwrap_or(crew.parallelism),
        template: object.annotations().get(TEMPLATE).cloned(),
        going: object.meta().deletion_timestamp.is_some(),
        ..crew
    }
}

fn words(reason: Option<String>, message: Option<String>) -> String {
    [reason, message].into_iter().flatten().collect::<Vec<_>>().join(": ")
}

fn of_job(job: &Job) -> CrewSeen {
    let status = job.status.clone().unwrap_or_default();
    let mut conditions = status.conditions.unwrap_or_default().into_iter();
    let failed = conditions.find(|condition| condition.type_ == "Failed" && condition.status == "True");
    let crew = of_spec(&job.spec.clone().unwrap_or_default());
    CrewSeen {
        active: status.active.unwrap_or_default(),
        failed: failed.map(|condition| words(condition.reason, condition.message)),
        ..annotated(crew, job)
    }
}

/// Of a JobSet, and of the Job that it made, which counts pods and knows better than the JobSet why it failed.
fn of_set(set: &JobSet, made: Option<&Job>) -> CrewSeen {
    let replicated = set.spec.replicated_jobs.first().and_then(|first| first.template.spec.clone());
    let crew = of_spec(&replicated.unwrap_or_default());
    let of_made = made.map(of_job).unwrap_or_default();
    let conditions = set.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    let failed =
        conditions.iter().find(|condition| condition.type_ == "Failed" && condition.status == "True");
    let failed = failed.map(|it| words(Some(it.reason.clone()), Some(it.message.clone())));
    CrewSeen {
        suspended: set.spec.suspend.unwrap_or_default(),
        active: of_made.active,
        failed: failed.map(|failed| of_made.failed.unwrap_or(failed)),
        ..annotated(crew, set)
    }
}

//! What the controller must be allowed to do, and who may.

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec, SubjectAccessReview,
    SubjectAccessReviewSpec, SubjectAccessReviewStatus,
};
use kube::api::PostParams;
use kube::{Api, Client};

use crate::lease;

/// Questions that are asked at once.
const AT_ONCE: usize = 8;

/// A resource, and what is done with it. A subresource is behind a slash.
pub(super) struct Right {
    pub group: &'static str,
    pub resource: &'static str,
    pub verbs: &'static [&'static str],
}

/// What the controller does with the objects of jobs: what the chart's role gives, as a test compares. JobSets are left out of
/// it where the cluster knows none.
pub(super) const OF_JOBS: [Right; 12] = [
    Right {
        group: "anello.dev",
        resource: "pretrainjobs",
        verbs: &["get", "list", "watch", "patch", "delete"],
    },
    Right { group: "anello.dev", resource: "pretrainjobs/status", verbs: &["patch"] },
    Right { group: "anello.dev", resource: "pretrainjobs/finalizers", verbs: &["update"] },
    Right { group: "apps", resource: "deployments", verbs: &["get", "list", "watch", "create", "patch"] },
    Right { group: "batch", resource: "jobs", verbs: &["get", "list", "watch", "create", "patch", "delete"] },
    Right { group: JOB_SETS, resource: "jobsets", verbs: &["get", "create", "patch", "delete"] },
    Right { group: "", resource: "services", verbs: &["get", "create", "patch"] },
    Right { group: "", resource: "configmaps", verbs: &["create", "patch"] },
    Right { group: "networking.k8s.io", resource: "networkpolicies", verbs: &["create", "patch"] },
    Right { group: "", resource: "pods", verbs: &["list"] },
    Right { group: "events.k8s.io", resource: "events", verbs: &["create", "patch"] },
    Right { group: "", resource: "events", verbs: &["list"] },
];

/// The group of JobSets.
pub(super) const JOB_SETS: &str = "jobset.x-k8s.io";

/// Whoever may, or may not: a service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Account {
    pub namespace: String,
    pub name: String,
}

impl Account {
    /// Its name as a user.
    fn user(&self) -> String {
        format!("system:serviceaccount:{}:{}", self.namespace, self.name)
    }

    /// Its groups, which the API server does not look up when it is asked about somebody else.
    fn groups(&self) -> Vec<String> {
        let own = format!("system:serviceaccounts:{}", self.namespace);
        vec!["system:serviceaccounts".to_owned(), own, "system:authenticated".to_owned()]
    }
}

/// Questions about the jobs in `namespace`, or in all, and about the Lease in `lease_namespace`.
pub(super) fn questions(
    namespace: Option<&str>,
    lease_namespace: &str,
    job_sets: bool,
) -> Vec<ResourceAttributes> {
    let text = |text: &str| Some(text.to_owned());
    let of_jobs = OF_JOBS.iter().filter(|right| job_sets || right.group != JOB_SETS).flat_map(|right| {
        let (resource, subresource) = match right.resource.split_once('/') {
            Some((resource, subresource)) => (resource, text(subresource)),
            None => (right.resource, None),
        };
        right.verbs.iter().map(move |verb| ResourceAttributes {
            group: text(right.group),
            resource: text(resource),
            subresource: subresource.clone(),
            verb: text(verb),
            namespace: namespace.map(str::to_owned),
            ..ResourceAttributes::default()
        })
    });
    let of_lease = ["create", "get", "update"].map(|verb| ResourceAttributes {
        group: text("coordination.k8s.io"),
        resource: text("leases"),
        verb: text(verb),
        namespace: text(lease_namespace),
        // What is to be made has no name yet.
        name: (verb != "create").then(|| lease::NAME.to_owned()),
        ..ResourceAttributes::default()
    });
    of_jobs.chain(of_lease).collect()
}

/// A question as a person says it: `create jobs.batch in all namespaces`.
pub(super) fn in_words(question: &ResourceAttributes) -> String {
    let of = |text: &Option<String>| text.clone().unwrap_or_default();
    let mut resource = of(&question.resource);
    if let Some(subresource) = &question.subresource {
        resource = format!("{resource}/{subresource}");
    }
    let group = of(&question.group);
    let resource = if group.is_empty() { resource } else { format!("{resource}.{group}") };
    let place = question.namespace.as_ref().map_or("all namespaces".to_owned(), |n| format!("namespace {n}"));
    format!("{} {resource} in {place}", of(&question.verb))
}

/// Who asks: whether it is `account` itself.
async fn is_self(client: &Client, account: &Account) -> bool {
    let reviews: Api<SelfSubjectReview> = Api::all(client.clone());
    let told = reviews.create(&PostParams::default(), &SelfSubjectReview::default()).await;
    let user = told.ok().and_then(|told| told.status?.user_info?.username);
    user.is_some_and(|user| user == account.user())
}

/// Those of `questions` that `account` may not.
///
/// # Errors
/// What the API server says: who asks about somebody else must be allowed to.
pub(super) async fn refused(
    client: &Client,
    account: &Account,
    questions: Vec<ResourceAttributes>,
) -> Result<Vec<ResourceAttributes>, kube::Error> {
    let own = is_self(client, account).await;
    let asked = questions.into_iter().map(|question| async move {
        let status = if own {
            ask_of_self(client, question.clone()).await?
        } else {
            ask_of(client, account, question.clone()).await?
        };
        Ok::<_, kube::Error>(status.is_none_or(|status| !status.allowed).then_some(question))
    });
    let answers: Vec<Option<ResourceAttributes>> =
        stream::iter(asked).buffered(AT_ONCE).try_collect().await?;
    Ok(answers.into_iter().flatten().collect())
}

async fn ask_of_self(
    client: &Client,
    question: ResourceAttributes,
) -> Result<Option<SubjectAccessReviewStatus>, kube::Error> {
    let spec = SelfSubjectAccessReviewSpec {
        resource_attributes: Some(question),
        ..SelfSubjectAccessReviewSpec::default()
    };
    let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
    let reviews: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    Ok(reviews.create(&PostParams::default(), &review).await?.status)
}

async fn ask_of(
    client: &Client,
    account: &Account,
    question: ResourceAttributes,
) -> Result<Option<SubjectAccessReviewStatus>, kube::Error> {
    let spec = SubjectAccessReviewSpec {
        resource_attributes: Some(question),
        user: Some(account.user()),
        groups: Some(account.groups()),
        ..SubjectAccessReviewSpec::default()
    };
    let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
    let reviews: Api<SubjectAccessReview> = Api::all(client.clone());
    Ok(reviews.create(&PostParams::default(), &review).await?.status)
}

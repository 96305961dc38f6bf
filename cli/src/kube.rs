//! Kubernetes: `anello crd`, `anello controller` and `anello submit --kube`.

use std::path::Path;

use anello_k8s::{
    ConfigSource, ControllerOptions, Gpu, HttpSource, PretrainJob, PretrainJobSpec, TlsSource, Workers,
    WorkersKind, apply, manifest,
};
use anello_tls::Role;

use crate::certs::TlsArgs;
use crate::config::load;
use crate::failure::{Exit, Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::jobs::SubmitArgs;
use crate::screen::Screen;
use crate::worker::host_name;

/// Arguments of `anello controller`.
#[derive(Debug, clap::Args)]
pub struct ControllerArgs {
    /// Look after the jobs of this namespace alone (default: of all).
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// Namespace of the Lease by which one of several controllers is the one that acts.
    #[arg(long, value_name = "NAME", env = "POD_NAMESPACE", default_value = "default")]
    lease_namespace: String,
    #[command(flatten)]
    tls: TlsArgs,
}

/// What `anello submit --kube` says of the job besides its config.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Kubernetes")]
pub struct KubeArgs {
    /// Make a PretrainJob of it in the cluster of the current kubeconfig, instead of asking a coordinator.
    #[arg(long, requires_all = ["image", "state"])]
    pub kube: bool,
    /// Print the PretrainJob, YAML, and make nothing.
    #[arg(long, requires = "kube")]
    dry_run: bool,
    /// Namespace (default: that of the kubeconfig's context).
    #[arg(long, value_name = "NAME", requires = "kube")]
    namespace: Option<String>,
    /// Image of the pods.
    #[arg(long, value_name = "IMAGE", requires = "kube")]
    image: Option<String>,
    /// Place of the run folder: a URL, or a path that all pods have.
    #[arg(long, value_name = "PLACE", requires = "kube")]
    state: Option<String>,
    /// Devices of each worker, of nvidia.com/gpu.
    #[arg(long, value_name = "N", requires = "kube", value_parser = clap::value_parser!(i32).range(1..=16))]
    gpus: Option<i32>,
    /// Kueue queue that admits the workers.
    #[arg(long, value_name = "NAME", requires = "kube")]
    queue: Option<String>,
    /// The workers' pods are of a JobSet instead of a Job.
    #[arg(long, requires = "kube")]
    job_set: bool,
    /// Secret with the pods' certificates (without one nothing is encrypted).
    #[arg(long, value_name = "NAME", requires = "kube")]
    tls_secret: Option<String>,
    /// The Secrets are NAME-coordinator and NAME-worker, as cert-manager writes them.
    #[arg(long, requires = "tls_secret")]
    cert_manager: bool,
    /// Serve metrics on port 9100 of every pod, and the page on the coordinator's.
    #[arg(long, requires = "kube")]
    metrics: bool,
    /// Secret whose entry `tokens` says who may read them, and who may act on the page.
    #[arg(long, value_name = "NAME", requires = "metrics")]
    token_secret: Option<String>,
    /// Secret whose entries are variables of all pods: a store's credentials. May be given again.
    #[arg(long, value_name = "NAME", requires = "kube")]
    secret: Vec<String>,
}

/// Arguments of `anello crd`.
#[derive(Debug, clap::Args)]
pub struct CrdArgs {
    /// Print a page of its fields instead, Markdown.
    #[arg(long)]
    reference: bool,
}

/// `anello crd`
pub fn crd(args: &CrdArgs, screen: &Screen) -> Outcome {
    screen.print(&if args.reference { anello_k8s::reference() } else { anello_k8s::definition() })?;
    Ok(Exit::Done)
}

/// `anello controller`
pub fn controller(args: &ControllerArgs, screen: &Screen) -> Outcome {
    let interrupt = Interrupt::watch()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let options = ControllerOptions {
        namespace: args.namespace.clone(),
        lease_namespace: args.lease_namespace.clone(),
        identity: format!("{}-{}", host_name(), std::process::id()),
        tls: args.tls.load(Role::User)?,
    };
    let of = args.namespace.as_ref().map_or("all namespaces".to_owned(), |name| format!("namespace {name}"));
    screen.line(&format!("controller of the PretrainJobs of {of}"))?;
    let stop = async {
        while !interrupt.raised() {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    runtime.block_on(anello_k8s::run(options, stop)).map_err(|error| Failure::Kube(Box::new(error)))?;
    Ok(Exit::Interrupted)
}

/// `anello submit --kube`
pub fn submit(args: &SubmitArgs, screen: &Screen) -> Outcome {
    let (given, kube) = (&args.config, &args.kube);
    // Here, where a person reads what is wrong; data may be where only the pods reach it.
    let loaded = load(&given.config, &given.sets)?;
    let name =
        args.name.clone().unwrap_or_else(|| loaded.config.name.clone()).replace('_', "-").to_lowercase();
    let config = if Path::new(&given.config).is_file() {
        // With all that it includes; its overrides are in it.
        ConfigSource { inline: Some(loaded.config.to_toml()), ..ConfigSource::default() }
    } else {
        ConfigSource { preset: Some(given.config.clone()), ..ConfigSource::default() }
    };
    let set = if config.preset.is_some() { given.sets.clone() } else { Vec::new() };
    let desired = args.workers.unwrap_or(args.min) as i32;
    let kind = if kube.job_set { WorkersKind::JobSet } else { WorkersKind::Job };
    let spec = PretrainJobSpec {
        config,
        set,
        state: kube.state.clone().unwrap_or_default(),
        image: kube.image.clone().unwrap_or_default(),
        workers: Workers { desired, min: args.min as i32, max: None, kind },
        gpu: kube.gpus.map(|count| Gpu { count, ..Gpu::default() }),
        queue_name: kube.queue.clone(),
        env_from: kube.secret.iter().map(|name| anello_k8s::secret_variables(name)).collect(),
        tls: kube
            .tls_secret
            .clone()
            .map(|secret_name| TlsSource { secret_name, cert_manager: kube.cert_manager }),
        insecure: kube.tls_secret.is_none(),
        http: kube
            .metrics
            .then(|| HttpSource { token_secret_name: kube.token_secret.clone(), ..HttpSource::default() }),
        ..PretrainJobSpec::default()
    };
    let job = PretrainJob::new(&name, spec);
    if kube.dry_run {
        screen.print(&manifest(&job))?;
        return Ok(Exit::Done);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let namespace = runtime
        .block_on(apply(&job, kube.namespace.as_deref()))
        .map_err(|error| Failure::Kube(Box::new(error)))?;
    screen.line(&format!(
        "PretrainJob {name} is made in namespace {namespace}\n`kubectl -n {namespace} get pretrainjob {name} --watch` \
         shows how it goes"
    ))?;
    Ok(Exit::Done)
}

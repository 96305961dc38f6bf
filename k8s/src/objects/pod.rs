//! What all pods of a job have: restricted security, certificates, tokens, the user's volumes and variables.

use k8s_openapi::api::core::v1::{
    Capabilities, Container, ContainerPort, EmptyDirVolumeSource, EnvVar, EnvVarSource, KeyToPath,
    ObjectFieldSelector, PodSecurityContext, PodSpec, PodTemplateSpec, SeccompProfile, SecretVolumeSource,
    SecurityContext, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;

use super::{HTTP, labels};
use crate::resource::PretrainJob;

/// Where certificates are mounted.
const TLS_DIR: &str = "/etc/anello/tls";
/// Where the file of tokens is mounted, and its name.
const TOKENS: (&str, &str) = ("/etc/anello/http", "tokens");

/// What restricted pod security asks of a container.
fn restricted() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
        read_only_root_filesystem: Some(true),
        ..SecurityContext::default()
    }
}

pub fn variable(name: &str, value: &str) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value.to_owned()), value_from: None }
}

pub fn from_pod(name: &str, path: &str) -> EnvVar {
    let field = ObjectFieldSelector { field_path: path.to_owned(), api_version: None };
    let from = EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() };
    EnvVar { name: name.to_owned(), value: None, value_from: Some(from) }
}

/// Entries of a Secret of the user's, as files of these names mounted at `path`.
fn secret(volume: &str, path: &str, name: &str, files: Vec<(&str, String)>) -> (Volume, VolumeMount) {
    let item = |(key, path): (&str, String)| KeyToPath { key: key.to_owned(), path, mode: Some(0o440) };
    let source = SecretVolumeSource {
        secret_name: Some(name.to_owned()),
        items: Some(files.into_iter().map(item).collect()),
        ..SecretVolumeSource::default()
    };
    let mount = VolumeMount {
        name: volume.to_owned(),
        mount_path: path.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    };
    (Volume { name: volume.to_owned(), secret: Some(source), ..Volume::default() }, mount)
}

/// Arguments by which a pod serves metrics, and the coordinator's also the page.
fn http(job: &PretrainJob) -> Vec<String> {
    let Some(http) = &job.spec.http else { return Vec::new() };
    let mut arguments = vec!["--http".to_owned(), format!("0.0.0.0:{HTTP}")];
    if http.token_secret_name.is_some() {
        arguments.extend(["--token".to_owned(), format!("{}/{}", TOKENS.0, TOKENS.1)]);
    }
    if let Some(flops) = &http.peak_flops {
        arguments.extend(["--peak-flops".to_owned(), flops.clone()]);
    }
    arguments
}

/// What all pods of a job have: `arguments` of `anello`, the volumes that `more` names besides the user's.
pub fn pod(
    job: &PretrainJob,
    role: &str,
    arguments: Vec<String>,
    container: Container,
    more: Vec<(Volume, VolumeMount)>,
) -> PodTemplateSpec {
    let spec = &job.spec;
    let scratch = Volume {
        name: "anello-tmp".to_owned(),
        empty_dir: Some(EmptyDirVolumeSource::default()),
        ..Volume::default()
    };
    let scratch_mount = VolumeMount {
        name: "anello-tmp".to_owned(),
        mount_path: "/tmp".to_owned(),
        ..VolumeMount::default()
    };
    let tls = spec.tls.as_ref().map(|tls| {
        // A key is for its role alone.
        let files = ["ca.pem".to_owned(), format!("{role}.pem"), format!("{role}.key")];
        if tls.cert_manager {
            let files = ["ca.crt", "tls.crt", "tls.key"].into_iter().zip(files).collect();
            return secret("anello-tls", TLS_DIR, &format!("{}-{role}", tls.secret_name), files);
        }
        let files = files.iter().map(|file| (file.as_str(), file.clone())).collect();
        secret("anello-tls", TLS_DIR, &tls.secret_name, files)
    });
    let tokens = spec.http.as_ref().and_then(|http| http.token_secret_name.as_ref());
    let tokens =
        tokens.map(|name| secret("anello-http", TOKENS.0, name, vec![(TOKENS.1, TOKENS.1.to_owned())]));
    let own = std::iter::once((scratch, scratch_mount)).chain(tls).chain(tokens).chain(more);
    let (volumes, mounts): (Vec<_>, Vec<_>) = own.unzip();
    let protection = match &spec.tls {
        Some(_) => ["--tls".to_owned(), TLS_DIR.to_owned()].to_vec(),
        None => vec!["--insecure".to_owned()],
    };
    let mut container = container;
    if spec.http.is_some() {
        let port =
            ContainerPort { name: Some("http".to_owned()), container_port: HTTP, ..ContainerPort::default() };
        container.ports.get_or_insert_default().push(port);
    }
    let env_from = Some(spec.env_from.clone()).filter(|from| !from.is_empty());
    let mut env = spec.env.clone();
    env.extend(container.env.clone().unwrap_or_default());
    let container = Container {
        image: Some(spec.image.clone()),
        image_pull_policy: spec.image_pull_policy.clone(),
        command: Some(vec!["anello".to_owned()]),
        args: Some(arguments.into_iter().chain(protection).chain(http(job)).collect()),
        env: Some(env),
        env_from,
        volume_mounts: Some(mounts.into_iter().chain(spec.volume_mounts.clone()).collect()),
        security_context: Some(restricted()),
        // So that the last words of a pod that fails are in its status, and in ours.
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        ..container
    };
    let pod = PodSpec {
        containers: vec![container],
        volumes: Some(volumes.into_iter().chain(spec.volumes.clone()).collect()),
        tolerations: Some(spec.tolerations.clone()).filter(|all| !all.is_empty()),
        image_pull_secrets: Some(spec.image_pull_secrets.clone()).filter(|all| !all.is_empty()),
        service_account_name: spec.service_account_name.clone(),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(65532),
            run_as_group: Some(65532),
            fs_group: Some(65532),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".to_owned(),
                ..SeccompProfile::default()
            }),
            ..PodSecurityContext::default()
        }),
        ..PodSpec::default()
    };
    PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(labels(&job.name_any(), role)), ..ObjectMeta::default() }),
        spec: Some(pod),
    }
}

//! The Helm chart: well-formed, valid against Kubernetes' schemas, and with the definition that the command prints.

use std::process::Command;

use anello_tests::kube_tool;

use super::{chart, template, world};

/// With all that monitoring can have.
const MONITORED: [&str; 5] = [
    "podMonitor.enabled=true",
    "podMonitor.scheme=https",
    "podMonitor.tlsConfig.ca.secret.name=certs",
    "prometheusRule.enabled=true",
    "dashboards.enabled=true",
];

#[test]
fn its_definition_is_that_of_this_build() {
    let file = format!("{}/crd/pretrainjob.yaml", chart());
    let ours = world().anello(&["crd"]).expect(0);
    if std::env::var_os("ANELLO_UPDATE").is_some() {
        std::fs::write(&file, &ours).unwrap();
    }
    let theirs = std::fs::read_to_string(&file).unwrap();
    assert!(
        ours == theirs,
        "{file} is old; write it anew: ANELLO_UPDATE=1 cargo test -p anello-tests --test cluster chart"
    );
}

#[test]
fn it_is_well_formed() {
    let lint = Command::new(kube_tool("helm")).args(["lint", "--strict", &chart()]).output().unwrap();
    assert!(lint.status.success(), "{}", String::from_utf8_lossy(&lint.stdout));
    let refused = Command::new(kube_tool("helm"))
        .args(["template", "anello", &chart(), "--set", "replicas=0", "--set", "imagge.tag=1"])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && told.contains("replicas") && told.contains("imagge"), "{told}");
}

#[test]
fn what_it_makes_is_valid() {
    let sets: [&[&str]; 6] = [
        &[],
        &["ownNamespaceOnly=true", "crd.install=false", "replicas=2"],
        &["tls.secretName=certs", "image.tag=1.2.3", "priorityClassName=high", "log=anello_k8s=debug"],
        &[
            "serviceAccount.create=false",
            "serviceAccount.name=mine",
            "nodeSelector.disk=ssd",
            "podLabels.team=a",
        ],
        &MONITORED,
        &["certManager.enabled=true", "certManager.issuer.name=ca", "tls.secretName=certs"],
    ];
    for values in sets {
        let manifest = template(values);
        let file = tempfile(&manifest);
        let program = kube_tool("kubernetes-validate");
        let valid = Command::new(program).args(["--strict", "-k", "1.36"]).arg(&file).output().unwrap();
        let told =
            String::from_utf8_lossy(&valid.stdout).into_owned() + &String::from_utf8_lossy(&valid.stderr);
        assert!(valid.status.success(), "{values:?}: {told}\n{manifest}");
    }
    let own = template(&["ownNamespaceOnly=true"]);
    assert!(!own.contains("kind: ClusterRole") && own.contains("- --namespace"), "{own}");
}

#[test]
fn it_brings_the_alerts_and_dashboards_of_this_build() {
    assert!(
        !template(&[]).contains("monitoring.coreos.com"),
        "where nobody asks for it, no operator is needed"
    );
    let manifest = template(&MONITORED);
    let alerts = |text: &str| {
        text.lines()
            .filter(|line| line.trim().starts_with("- alert: ") || line.trim().starts_with("alert: "))
            .count()
    };
    let rules = std::fs::read_to_string(format!("{}/../rules/anello.yaml", chart())).unwrap();
    assert!(alerts(&rules) > 10 && alerts(&manifest) == alerts(&rules), "{manifest}");
    for dashboard in std::fs::read_dir(format!("{}/../dashboards", chart())).unwrap() {
        let name = dashboard.unwrap().file_name().into_string().unwrap();
        assert!(manifest.contains(&format!("  {name}: |-\n    {{\n")), "{name}");
    }
}

/// A certificate says a role, and a monitor asks for one name.
#[test]
fn with_tls_each_role_has_a_monitor_that_knows_its_name() {
    let monitors = |values: &[&str]| -> Vec<String> {
        let manifest = template(values);
        manifest.split("\n---\n").filter(|o| o.contains("kind: PodMonitor")).map(str::to_owned).collect()
    };
    let plain = monitors(&["podMonitor.enabled=true"]);
    assert!(
        plain.len() == 1 && !plain[0].contains("tlsConfig") && !plain[0].contains("anello.dev/role:"),
        "{plain:?}"
    );
    let secured = monitors(&MONITORED);
    assert_eq!(secured.len(), 2, "{secured:?}");
    for (monitor, role) in secured.iter().zip(["coordinator", "worker"]) {
        for line in [
            format!("  name: anello-{role}\n"),
            format!("      anello.dev/role: {role}\n"),
            format!("      serverName: {role}.anello"),
            "        secret:\n          name: certs".to_owned(),
        ] {
            assert!(monitor.contains(&line), "{line}\n{monitor}");
        }
    }
}

/// Those of the controller, and of the pods of two namespaces; and the controller finds its own under cert-manager's names.
#[test]
fn cert_manager_makes_certificates_of_roles_when_asked() {
    assert!(!template(&[]).contains("cert-manager.io"), "where nobody asks for it, it is not needed");
    let values = [
        "certManager.enabled=true",
        "certManager.issuer.name=anello-ca",
        "certManager.namespaces={research,teaching}",
        "tls.secretName=anello-user",
    ];
    let manifest = template(&values);
    let certificates: Vec<&str> =
        manifest.split("\n---\n").filter(|object| object.contains("kind: Certificate\n")).collect();
    let expected = [
        ("user", "anello-system", "anello-user"),
        ("coordinator", "research", "anello-pods-coordinator"),
        ("worker", "research", "anello-pods-worker"),
        ("coordinator", "teaching", "anello-pods-coordinator"),
        ("worker", "teaching", "anello-pods-worker"),
    ];
    assert_eq!(certificates.len(), expected.len(), "{manifest}");
    for (certificate, (role, namespace, secret)) in certificates.iter().zip(expected) {
        for line in [
            format!("  namespace: {namespace}\n"),
            format!("  secretName: {secret}\n"),
            format!("  dnsNames: [{role}.anello]\n"),
            "    name: anello-ca\n    kind: ClusterIssuer\n".to_owned(),
        ] {
            assert!(certificate.contains(&line), "{line}\n{certificate}");
        }
    }
    assert!(manifest.contains("- { key: tls.crt, path: user.pem }"), "{manifest}");
    for (without, told) in [(1, "certManager.issuer.name"), (3, "tls.secretName")] {
        let values =
            values.iter().enumerate().filter(|(at, _)| *at != without).flat_map(|(_, v)| ["--set", v]);
        let done =
            Command::new(kube_tool("helm")).args(["template", "anello", &chart()]).args(values).output();
        let done = done.unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(!done.status.success() && said.contains(told), "{said}");
    }
}

/// Without what that validator does not know: definitions, and resources that others define.
fn tempfile(manifest: &str) -> std::path::PathBuf {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let unknown = [
        "kind: CustomResourceDefinition",
        "apiVersion: monitoring.coreos.com",
        "apiVersion: cert-manager.io",
    ];
    let known =
        manifest.split("\n---\n").filter(|object| unknown.iter().all(|unknown| !object.contains(unknown)));
    let file = world().folder.join(format!("chart-{}.yaml", COUNT.fetch_add(1, Ordering::Relaxed)));
    std::fs::write(&file, known.collect::<Vec<_>>().join("\n---\n")).unwrap();
    file
}

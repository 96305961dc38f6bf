//! Objects that change, or are older than what reads them.

use std::process::Command;

use anello_tests::{Cluster, wait_until};

use super::{LONG, Site, chart, namespace, world};

/// Namespace of the job that was stored by an older build.
const OLD: &str = "old";

#[test]
fn what_may_change_of_a_spec_changes_and_what_may_not_is_refused() {
    let Some(site) = Site::start("changed", 1) else { return };
    site.apply(&site.manifest("a", 2, &[LONG]));
    site.wait_for_checkpoint("a", 3);
    let refused = |spec: &str| site.patch("a", spec).expect_err(spec);
    let fixed = "config, set and state are what the run is: they cannot change; submit another PretrainJob";
    for spec in [r#"{"set":["seed=9"]}"#, r#"{"state":"/elsewhere"}"#, r#"{"config":{"inline":"seed = 9"}}"#]
    {
        let told = refused(spec);
        assert!(told.contains(fixed), "{told}");
    }
    let told = refused(r#"{"workers":{"min":2}}"#);
    assert!(told.contains("workers.min cannot change"), "{told}");
    let told = refused(r#"{"image":"anello:next"}"#);
    assert!(told.contains("image can change while suspend is true"), "{told}");
    let told = refused(r#"{"detection":"soon"}"#);
    assert!(told.contains("spec.detection"), "{told}");

    // While it is suspended the pods may become others: no Job can be changed in that, so there is another one.
    site.suspend("a", true);
    let (of_image, of_grace) =
        ("{.spec.template.spec.containers[0].image}", "{.spec.template.spec.terminationGracePeriodSeconds}");
    let crew = |path: &str| site.value_of("job/a-workers", path);
    wait_until("it is paused", || site.value("a", "{.status.phase}") == "Paused" || site.ended("a"));
    let change = |spec: &str| drop(site.patch("a", spec).unwrap_or_else(|refused| panic!("{refused}")));
    change(r#"{"image":"anello:next","ttlSecondsAfterFinished":86400}"#);
    wait_until("its pods are to be of the other image", || {
        crew(of_image) == "anello:next" || site.ended("a")
    });
    site.suspend("a", false);
    // While it trains, it pauses for that by itself.
    wait_until("it trains again", || site.value("a", "{.status.phase}") == "Running" || site.ended("a"));
    change(r#"{"terminationGracePeriodSeconds":77}"#);
    wait_until("its pods are to have more time", || crew(of_grace) == "77" || site.ended("a"));
    site.wait_for_phase("a", "Completed");
    site.assert_undisturbed_long("a");
}

/// This chart as an older build had it: its definition has a field that this build has no more, and lacks one that it has.
pub fn older_chart(cluster: &Cluster) -> String {
    let older = world().folder.join("older-chart").display().to_string();
    // Of a cluster that these cases had before.
    let _ = std::fs::remove_dir_all(&older);
    let copied = Command::new("cp").args(["-rL", &chart(), &older]).status().expect("there is cp");
    assert!(copied.success());
    let file = format!("{older}/crd/pretrainjob.yaml");
    let spec = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
    let patch = format!(
        r#"[{{"op":"remove","path":"{spec}/terminationGracePeriodSeconds"}},{{"op":"add","path":"{spec}/shards","value":{{"type":"integer"}}}}]"#
    );
    let patch = ["patch", "--local", "-f", &file, "--type=json", "-p", &patch, "-o", "yaml"];
    let definition = cluster.kubectl(&patch).unwrap_or_else(|refused| panic!("{refused}"));
    std::fs::write(&file, definition).expect("the test's folder can be written");
    older
}

/// A job as a build has it whose chart is [`older_chart`].
pub fn store_old_job(cluster: &Cluster) {
    cluster.add_nodes(OLD, 1);
    cluster.apply(&namespace(OLD));
    let manifest = old_manifest();
    // The definition that is served lags behind the one that is stored.
    let stored = || {
        let applied = ["apply", "--server-side", "-n", OLD, "-f", "-"];
        cluster.kubectl_with(&applied, &manifest).is_ok()
    };
    wait_until("the old job is stored", stored);
    let told = cluster.kubectl(&["get", "pretrainjob", "a", "-n", OLD, "-o", "jsonpath={.spec}"]);
    let told = told.unwrap_or_else(|refused| panic!("{refused}"));
    assert!(told.contains("\"shards\":3") && !told.contains("\"terminationGracePeriodSeconds\":"), "{told}");
}

/// Of a build that had `shards` and no `terminationGracePeriodSeconds`, suspended.
fn old_manifest() -> String {
    let place = world().folder.join(OLD).join("state").display().to_string();
    let submit = ["submit", "small.toml", "--kube", "--dry-run", "--image", "anello:test", "--state", &place];
    let more = ["--name", "a", "--workers", "1", "--set", "compute.threads=1"];
    let manifest = world().anello(&[&submit[..], &more].concat()).expect(0);
    let lines = manifest.lines().filter(|line| !line.starts_with("  terminationGracePeriodSeconds:"));
    let manifest =
        lines.collect::<Vec<_>>().join("\n").replacen("suspend: false", "suspend: true\n  shards: 3", 1);
    assert!(
        manifest.contains("\n  shards: 3\n") && !manifest.contains("\n  terminationGracePeriodSeconds:"),
        "{manifest}"
    );
    manifest + "\n"
}

#[test]
fn a_job_that_an_older_build_stored_is_read_and_trained() {
    let Some(site) = Site::start(OLD, 1) else { return };
    let told = || site.value("a", "{.spec}");
    wait_until("it is served as this build has it", || {
        told().contains("\"terminationGracePeriodSeconds\":120")
    });
    assert!(!told().contains("shards"), "{}", told());
    // Who still asks for what is gone hears of it, by its name.
    let refused = site.try_apply(&old_manifest()).expect_err("a field that is gone is refused");
    assert!(refused.contains("shards"), "{refused}");
    site.suspend("a", false);
    site.wait_for_phase("a", "Completed");
    site.assert_undisturbed("a");
}

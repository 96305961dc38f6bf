//! Alerts that Prometheus raises of runs that go wrong, by what makes real ones go wrong. Those of rings are in `http`. One has
//! no cause that a test could bring about: `AnelloInvariantViolated` is of what must never be. Its rule is tried on made-up
//! figures by `promtool test rules`, and what it counts by the tests of the invariants.

use anello_coordinator::telemetry::rules::{Limits, render};
use anello_tests::{Fate, Process, Prometheus, Proxy, S3, newest_checkpoint, objects, wait_until};

use super::http::Serving;
use super::world;

/// The recipe's second stage has many steps, so that no run is over before it was looked at.
const LONG: &str = "stage.stable.tokens=3000000";

/// Nothing that was in the test's folder before.
fn fresh(name: &str) -> std::path::PathBuf {
    let folder = world().folder.join(name);
    let _ = std::fs::remove_dir_all(&folder);
    folder
}

#[test]
fn a_store_that_refuses_raises_its_alerts_until_it_is_back() {
    let s3 = S3::start(&world().folder.join("logs"));
    let proxy = Proxy::start(s3.port(), 0, &[Fate::Status(403)], 2);
    let url = s3.url("alerts");
    let run = ["run", "small.toml", "--sample", "0", "--out", &url, "--set", LONG];
    let serving = Serving::start_with(&run, &s3.variables_by(proxy.port()));
    // What has happened is soon forgotten, so that an alert's end is seen, too.
    let limits = Limits { window_s: 5, for_s: 0, every_s: 0.25, ..Limits::default() };
    let folder = fresh("alerts-store-prometheus");
    let Some(prometheus) = Prometheus::start(&folder, serving.port, &render(&limits)) else { return };
    let alerts = ["AnelloStoreFails", "AnelloCheckpointFails"];
    let nothing_failed = || prometheus.value("sum(anello_checkpoint_failures_total)") == Some(0.0);
    wait_until("it is scraped, and no checkpoint has failed", nothing_failed);
    wait_until("a checkpoint is there", || s3.newest_checkpoint("alerts") >= 3);
    assert!(!alerts.iter().any(|alert| prometheus.fires(alert)), "all is well");

    // As when credentials are withdrawn.
    proxy.harm(100);
    for alert in alerts {
        wait_until(alert, || prometheus.fires(alert));
    }
    let at = s3.newest_checkpoint("alerts");
    proxy.harm(0);
    wait_until("checkpoints are written again", || s3.newest_checkpoint("alerts") > at);
    for alert in alerts {
        wait_until("it is forgotten", || !prometheus.fires(alert));
    }
    serving.process.signal("INT");
    serving.process.wait().expect(130);
}

/// The store is well, and so are the coordinator and one worker: files of the other may be no larger than its share of a
/// checkpoint.
#[test]
fn a_worker_that_cannot_write_its_parts_raises_an_alert_and_is_named_once_a_checkpoint() {
    let serving = Serving::coordinator("alerts-parts", "0", &["--detection", "30s"]);
    let limits = Limits { window_s: 5, for_s: 0, every_s: 0.25, ..Limits::default() };
    let folder = fresh("alerts-parts-prometheus");
    let Some(prometheus) = Prometheus::start(&folder, serving.port, &render(&limits)) else { return };
    wait_until("it is scraped", || prometheus.value("up{job=\"anello-coordinator\"}") == Some(1.0));
    serving.ask(&["submit", "small.toml", "--name", "parts", "--workers", "2", "--set", LONG]);
    let work = ["worker", "--coordinator", serving.coordinator_address(), "--job", "parts", "--threads", "1"];
    let well = Process::start(&world().folder, &work);
    let limited = "trap '' XFSZ; ulimit -S -f 16; exec \"$0\" \"$@\"";
    let before = ["sh", "-c", limited].map(str::to_owned);
    let ill = Process::start_by(&before, &world().folder, &work, &[]);
    wait_until("AnelloCheckpointFails", || prometheus.fires("AnelloCheckpointFails"));
    let run = world().folder.join("alerts-parts/parts");
    let failed = || -> Vec<String> {
        let told = serving.ask(&["logs", "parts"]);
        let failed = told.lines().filter(|line| line.contains("could not be written now"));
        failed.map(|line| line.split_once("checkpoint ").unwrap().1.to_owned()).collect()
    };
    wait_until("another one fails", || failed().len() > 1);
    let told = failed();
    let mut steps: Vec<&str> = told.iter().map(|line| line.split_once(' ').unwrap().0).collect();
    assert!(
        told.iter().all(|line| line.contains("could not write its parts: ") && line.contains("too large")),
        "{told:?}"
    );
    steps.dedup();
    assert_eq!(steps.len(), told.len(), "one record a checkpoint: {told:?}");
    wait_until("whoever keeps copies of its blocks writes them", || newest_checkpoint(&run) > 0);

    let lifted = std::process::Command::new("prlimit")
        .args(["--fsize=unlimited", "--pid", &ill.id().to_string()])
        .status();
    assert!(lifted.is_ok_and(|status| status.success()), "prlimit is in util-linux");
    wait_until("it is forgotten", || !prometheus.fires("AnelloCheckpointFails"));
    serving.ask(&["cancel", "parts"]);
    [well, ill].into_iter().for_each(|worker| drop(worker.wait()));
}

#[test]
fn a_rate_that_is_too_high_and_a_disk_that_is_lost_raise_their_alerts() {
    let serving = Serving::coordinator("alerts-jobs", "1", &[]);
    // However slow the machine is, the mean of all of the stage before is the measure.
    let limits = Limits { spike_window_s: (2, 600), for_s: 0, every_s: 0.25, ..Limits::default() };
    let folder = fresh("alerts-jobs-prometheus");
    let Some(prometheus) = Prometheus::start(&folder, serving.port, &render(&limits)) else { return };
    let is = |expression: &str, holds: fn(f64) -> bool| prometheus.value(expression).is_some_and(holds);
    wait_until("it is scraped", || is("up{job=\"anello-coordinator\"}", |up| up == 1.0));

    // It learns, until its rate has risen a thousandfold.
    let rate = ["lr_curve=wsd", "lr=8", "lr_warmup=0.03", "lr_decay=0"];
    let mut settings: Vec<String> = rate.iter().map(|of| format!("stage.stable.{of}")).collect();
    settings.extend([LONG.to_owned(), "checkpoint.every_steps=1000000".to_owned()]);
    let settings: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    serving.ask(&[&["submit", "small.toml", "--name", "rises"][..], &settings].concat());
    wait_until("AnelloLossSpike", || prometheus.fires("AnelloLossSpike"));
    serving.ask(&["cancel", "rises"]);

    // While it is paused, the disk with its checkpoints' parts is lost.
    serving.ask(&["submit", "small.toml", "--name", "lost", "--set", LONG]);
    let run = world().folder.join("alerts-jobs/lost");
    wait_until("a checkpoint is there", || newest_checkpoint(&run) >= 3);
    serving.ask(&["pause", "lost"]);
    wait_until("it is paused", || serving.process.out().contains("job lost is paused\n"));
    assert!(!prometheus.fires("AnelloJobFailed"), "nothing has failed so far");
    for object in objects(&run.join("checkpoints")) {
        if object.extension().is_some_and(|extension| extension == "safetensors") {
            std::fs::remove_file(&object).unwrap();
        }
    }
    serving.ask(&["resume", "lost"]);
    let failed = "ALERTS{alertname=\"AnelloJobFailed\", job=\"lost\", alertstate=\"firing\"}";
    wait_until("AnelloJobFailed", || is(failed, |fires| fires == 1.0));
    let told = serving.ask(&["describe", "lost"]);
    assert!(told.contains("none of the checkpoints can be read"), "{told}");
}

//! What Prometheus, a browser and an operator see of real runs; and that a run's bits do not know of it.

use std::sync::atomic::{AtomicBool, Ordering};

use anello_coordinator::telemetry::rules::{Limits, render};
use anello_tests::{Process, Prometheus, free_port, http, newest_checkpoint, page, signal, wait_until};

use super::world;

pub const OPERATOR: &str = "operator-0123456789abcdef";

/// `anello` with a page.
pub struct Serving {
    pub process: Process,
    pub port: u16,
    coordinator: String,
}

/// A file of tokens: that of ann, who may act, and that of bob, who may look.
pub fn make_tokens(name: &str) {
    let tokens = world().folder.join(name);
    std::fs::write(&tokens, format!("operator ann {OPERATOR}\nviewer bob viewer-0123456789abcdef\n"))
        .unwrap();
    std::fs::set_permissions(&tokens, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
}

impl Serving {
    fn start(arguments: &[&str]) -> Self {
        Self::start_with(arguments, &[])
    }

    /// With these variables besides those of the test.
    pub fn start_with(arguments: &[&str], variables: &[(&str, String)]) -> Self {
        let arguments = [arguments, &["--http", "127.0.0.1:0"]].concat();
        let mut process = Process::start_with(&world().folder, &arguments, variables);
        let port = |out: &str| out.split_once("page at http://127.0.0.1:")?.1.split_once('/')?.0.parse().ok();
        wait_until("the page is there", || port(&process.out()).is_some() || process.ended());
        let port = port(&process.out()).unwrap_or_else(|| panic!("{}\n{}", process.out(), process.log()));
        let out = process.out();
        let coordinator = out.split_once("coordinator at ").and_then(|(_, rest)| rest.split_once(','));
        Self {
            coordinator: coordinator.map(|(address, _)| address.to_owned()).unwrap_or_default(),
            process,
            port,
        }
    }

    /// A coordinator of a fresh place.
    pub fn coordinator(place: &str, slots: &str, more: &[&str]) -> Self {
        let _ = std::fs::remove_dir_all(world().folder.join(place));
        let arguments = ["coordinator", "--listen", "127.0.0.1:0", "--jobs", place, "--slots", slots];
        Self::start(&[&arguments[..], more].concat())
    }

    /// Where workers and users find the coordinator.
    pub fn coordinator_address(&self) -> &str {
        &self.coordinator
    }

    pub fn ask(&self, arguments: &[&str]) -> String {
        world().anello(&[arguments, &["--coordinator", &self.coordinator]].concat()).expect(0)
    }

    /// The body of a page that is there.
    pub fn get(&self, path: &str) -> String {
        let (status, body) = http(self.port, "GET", path, &[], "");
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    /// Whether a line of the metrics begins so.
    fn tells(&self, line: &str) -> bool {
        let (_, text) = http(self.port, "GET", "/metrics", &[], "");
        text.lines().any(|of| of.starts_with(line))
    }
}

#[test]
fn whoever_watches_a_run_changes_no_bit_of_it() {
    for (name, more) in [("http-one", &[][..]), ("http-ring", &["--workers", "2"])] {
        let _ = std::fs::remove_dir_all(world().folder.join(name));
        let run = ["run", "small.toml", "--out", name, "--sample", "0"];
        let serving = Serving::start(&[&run[..], more].concat());
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for path in
                ["/metrics", "/api/v1/jobs/small", "/api/v1/jobs/small/metrics", "/api/v1/jobs/small/events"]
            {
                let (over, port) = (&over, serving.port);
                scope.spawn(move || {
                    while !over.load(Ordering::Relaxed) && http(port, "GET", path, &[], "").0 != 0 {}
                });
            }
            let done = serving.process.wait();
            over.store(true, Ordering::Relaxed);
            done.expect(0);
        });
        world().assert_undisturbed(name);
        world().assert_same_checkpoints(name);
    }
}

#[test]
fn prometheus_scrapes_a_run_and_alerts_fire_by_their_causes() {
    // Nobody is taken for dead by silence here: who is frozen stays.
    let serving = Serving::coordinator("http-alerts", "3", &["--detection", "30s", "--peak-flops", "1e9"]);
    let limits = Limits {
        stalled_s: 3,
        checkpoint_s: 2,
        straggler_ratio: 1.0,
        starvation_ratio: 0.0,
        deaths: 0,
        window_s: 60,
        for_s: 0,
        every_s: 0.25,
        ..Limits::default()
    };
    let folder = world().folder.join("http-prometheus");
    let Some(prometheus) = Prometheus::start(&folder, serving.port, &render(&limits)) else { return };
    let is = |expression: &str, holds: fn(f64) -> bool| prometheus.value(expression).is_some_and(holds);
    wait_until("it is scraped", || is("up{job=\"anello-coordinator\"}", |up| up == 1.0));
    assert!(!prometheus.fires("AnelloCoordinatorDown") && !prometheus.fires("AnelloStalled"));

    // A long job, without checkpoints, whose rate makes it diverge.
    let long = ["--set", "stage.stable.tokens=3000000", "--set", "checkpoint.every_steps=1000000"];
    let diverges = ["--set", "stage.stable.lr=10", "--set", "optimizer.weight_decay=1"];
    let submit = ["submit", "small.toml", "--name", "a", "--workers", "2"];
    serving.ask(&[&submit[..], &long, &diverges].concat());
    wait_until("its steps are there", || is("anello_step{job=\"a\"}", |step| step > 20.0));
    wait_until("its loop steps are there", || {
        is("count(anello_exit_probability_ratio{job=\"a\"})", |loops| loops >= 2.0)
    });
    wait_until("both its workers are there", || {
        is("count(anello_worker_lanes{job=\"a\"})", |workers| workers == 2.0)
    });
    for alert in ["AnelloNoCheckpoint", "AnelloNonFiniteSteps", "AnelloStraggler", "AnelloDataStarvation"] {
        wait_until(alert, || prometheus.fires(alert));
    }
    assert!(!prometheus.fires("AnelloStalled") && !prometheus.fires("AnelloWorkersDie"));

    // One is killed: the other goes on, a new one comes, and who is gone is not spoken of any more.
    let workers = serving.process.children();
    signal(workers[0], "KILL");
    wait_until("AnelloWorkersDie", || prometheus.fires("AnelloWorkersDie"));
    wait_until("the ring recovered", || is("anello_recovery_seconds_count{job=\"a\"}", |count| count >= 1.0));
    wait_until("there are two again", || is("anello_member_workers{job=\"a\"}", |members| members == 2.0));
    wait_until("and only two are told of", || {
        is("count(anello_worker_lanes{job=\"a\"})", |workers| workers == 2.0)
    });
    assert!(is("anello_goodput_ratio{job=\"a\"}", |goodput| goodput > 0.0 && goodput <= 1.0));

    // All are frozen.
    let workers = serving.process.children();
    workers.iter().for_each(|worker| signal(*worker, "STOP"));
    wait_until("AnelloStalled", || prometheus.fires("AnelloStalled"));
    workers.iter().for_each(|worker| signal(*worker, "CONT"));
    wait_until("it goes on", || !prometheus.fires("AnelloStalled"));
    serving.ask(&["cancel", "a"]);
    wait_until("it is cancelled", || {
        is("anello_job_phase{job=\"a\", phase=\"cancelled\"}", |phase| phase == 1.0)
    });
    wait_until("nobody is told of", || prometheus.value("anello_worker_lanes{job=\"a\"}").is_none());

    // A replica that differs, of three.
    let flips = ["--set", "ring.fault=weights@400/1", "--set", "ring.digest_every_steps=10"];
    let job =
        ["submit", "small.toml", "--name", "b", "--workers", "3", "--set", "stage.stable.tokens=300000"];
    serving.ask(&[&job[..], &flips].concat());
    wait_until("it is known", || is("anello_digest_mismatches_total{job=\"b\"}", |count| count == 0.0));
    wait_until("AnelloDigestMismatch", || prometheus.fires("AnelloDigestMismatch"));
    assert!(is("sum(anello_invariant_violations_total)", |count| count == 0.0));

    assert!(serving.process.kill());
    wait_until("AnelloCoordinatorDown", || prometheus.fires("AnelloCoordinatorDown"));
}

#[test]
fn an_operator_may_act_and_each_act_is_told_in_the_log() {
    make_tokens("http-tokens");
    let serving = Serving::coordinator("http-acts", "1", &["--token", "http-tokens"]);
    serving.ask(&["submit", "small.toml", "--name", "a", "--set", "stage.stable.tokens=300000"]);
    let (ann, bob) = (format!("Bearer {OPERATOR}"), "Bearer viewer-0123456789abcdef".to_owned());
    let act = |who: &str, action: &str, body: &str| {
        let path = format!("/api/v1/jobs/a/{action}");
        http(serving.port, "POST", &path, &[("Authorization", who)], body).0
    };
    let folder = world().folder.join("http-acts/a");
    wait_until("it is so far", || newest_checkpoint(&folder) >= 3);
    assert_eq!((act(&bob, "pause", ""), act("Bearer nobody", "pause", "")), (403, 401));
    assert_eq!((act(&ann, "pause", ""), act(&ann, "scale", "{\"workers\": 3}")), (200, 400));
    let phase = |phase: &str| serving.process.out().contains(&format!("job a is {phase}\n"));
    wait_until("it is paused", || phase("paused"));
    assert_eq!(act(&ann, "cancel", ""), 200);
    wait_until("it is cancelled", || phase("cancelled"));
    assert_eq!(act(&ann, "resume", ""), 409);
    let log = serving.process.log();
    for line in [
        "who=\"ann\" role=\"operator\"",
        "action=\"pause\" job=\"a\" outcome=200",
        "action=\"scale\" job=\"a\" outcome=400",
        "action=\"resume\" job=\"a\" outcome=409",
        "asked over gRPC job=\"a\" wish=\"submit\" done=true",
    ] {
        assert!(log.contains(line), "{line}\n{log}");
    }
    assert!(!log.contains(OPERATOR) && !serving.process.out().contains(OPERATOR));
}

#[test]
fn a_worker_tells_its_own_metrics() {
    let _ = std::fs::remove_dir_all(world().folder.join("http-worker"));
    let run = ["run", "small.toml", "--out", "http-worker", "--workers", "2", "--external", "--sample", "0"];
    let long = ["--set", "stage.stable.tokens=300000"];
    let serving = Serving::start(&[&run[..], &long].concat());
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let worker = ["worker", "--coordinator", &serving.coordinator, "--job", "small", "--http", &address];
    let _worker = Process::start(&world().folder, &worker);
    let _other = Process::start(&world().folder, &worker[..5]);
    let value = |name: &str| -> f64 {
        let (_, text) = http(port, "GET", "/metrics", &[], "");
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok()).unwrap_or(-1.0)
    };
    wait_until("it tells of its steps", || {
        value("anello_steps_total{job=\"small\",stage=\"stable\"}") >= 4.0
    });
    // Half of a gradient goes to the other, and half of the sum, at each step: some hundred kilobytes.
    wait_until("it sends to the other", || value("anello_ring_sent_bytes_total{job=\"small\"}") >= 262_144.0);
    assert!(value("anello_data_queue_bytes{job=\"small\"}") >= 0.0);
    let (_, text) = http(port, "GET", "/metrics", &[], "");
    assert!(text.contains("anello_store_requests_total{job=\"small\",operation=\"get\"}"), "{text}");
    assert!(
        !text.contains("anello_worker_") && !text.contains("anello_job_phase"),
        "that is the coordinator's: {text}"
    );
    assert_eq!(http(port, "GET", "/api/v1/jobs", &[], "").0, 404);
    assert!(serving.tells("anello_member_workers{job=\"small\"} 2"));
}

/// Bytes that two workers send each other for a step of the stage `name`, the only one of their run, by their own count.
fn sent_for_a_step(name: &str, stage: &str) -> f64 {
    let run = format!("http-sent-{name}");
    let _ = std::fs::remove_dir_all(world().folder.join(&run));
    let (stages, stage) = (format!("stages=[\"{name}\"]"), format!("stage.{name}={stage}"));
    let arguments = ["run", "small.toml", "--out", &run, "--workers", "2", "--external", "--sample", "0"];
    // Nothing but steps: without checkpoints nobody compares replicas.
    let sets = [&stages, &stage, "model.hidden=128", "checkpoint.every_steps=1000000"];
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let serving = Serving::start(&[&arguments[..], &sets].concat());
    let ports = [free_port(), free_port()];
    let _workers = ports.map(|port| {
        let address = format!("127.0.0.1:{port}");
        let worker = ["worker", "--coordinator", &serving.coordinator, "--job", "small", "--threads", "1"];
        Process::start(&world().folder, &[&worker[..], &["--http", &address]].concat())
    });
    let of_worker = ports.map(|port| {
        let (mut steps, mut bytes) = (0.0, 0.0);
        wait_until("it tells of its steps", || {
            let (_, text) = http(port, "GET", "/metrics", &[], "");
            let value = |name: &str| -> f64 {
                let line = text.lines().find_map(|line| line.strip_prefix(name)?.split_once("} "));
                line.and_then(|(_, value)| value.parse().ok()).unwrap_or(0.0)
            };
            (steps, bytes) = (value("anello_steps_total{"), value("anello_ring_sent_bytes_total{"));
            steps >= 30.0
        });
        bytes / steps
    });
    of_worker.iter().sum()
}

/// With the language model frozen a step sends the gradient of the gate's block, to be added up and as the sum, and no other.
#[test]
fn the_gradient_of_what_is_frozen_is_sent_to_nobody() {
    let sizes = "tokens=3000000,sequence=16,batch=128,lr=1e-3,loops=2,mixture={tales=1}";
    let all = sent_for_a_step("stable", &format!("{{{sizes}}}"));
    let gate = sent_for_a_step("gate", &format!("{{loss=\"gate\",{sizes}}}"));
    println!("bytes a step: {all} of everything, {gate} of the gate");
    const BLOCK_BYTES: f64 = (4 << 16) as f64;
    // The embedding and lm_head alone are eight blocks; each block goes to its owner once, and its sum back once.
    assert!(all > 8.0 * 2.0 * BLOCK_BYTES, "{all} bytes a step");
    assert!((1.9..2.1).contains(&(gate / BLOCK_BYTES)), "{gate} bytes a step");
}

#[test]
fn a_browser_shows_the_jobs_and_what_became_of_them() {
    let mut serving = Serving::coordinator("http-page", "2", &[]);
    serving.ask(&["submit", "small.toml", "--name", "a", "--workers", "2"]);
    serving.ask(&["submit", "small.toml", "--name", "b", "--set", "seed=4"]);
    wait_until("both are completed", || {
        ["a", "b"].iter().all(|job| serving.process.out().contains(&format!("job {job} is completed\n")))
            || serving.process.ended()
    });
    let show =
        |route: &str| page(&world().folder, &format!("http://127.0.0.1:{}/?live=0#{route}", serving.port));
    let Some(list) = show("/") else { return };
    for text in ["<h1>Jobs</h1>", "2 completed", "href=\"#/jobs/a\"", "31 / 31", "Compare"] {
        assert!(list.contains(text), "{text} is not in\n{list}");
    }
    let job = show("/jobs/a").unwrap();
    for text in [
        "<h1>a</h1>",
        "class=\"chip completed\"",
        "of 31, 100.0 %",
        "Loss by loop step",
        "Where tokens exit",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Time of the job",
        "mid-training",
        "Checkpoints",
        "with 2 workers from step 1",
        "run folder",
        "[optimizer]",
    ] {
        assert!(job.contains(text), "{text} is not in\n{job}");
    }
    // Lines and areas are drawn, of numbers alone.
    assert!(job.matches("<path ").count() > 20 && !job.contains("NaN"), "{job}");
    // Who cannot see them is told what they are.
    assert!(job.matches("aria-label=\"").count() > 12 && job.contains("role=\"progressbar\""), "{job}");
    let compared = show("/compare/a/b").unwrap();
    for text in [
        "<h1>a and b</h1>",
        "Loss of the last loop step",
        "Side by side",
        "Their configs differ.",
        "seed = 4",
    ] {
        assert!(compared.contains(text), "{text} is not in\n{compared}");
    }
    let none = show("/jobs/none").unwrap();
    assert!(none.contains("there is no job none"), "{none}");
    assert!(serving.get("/api/v1/jobs").contains("\"phase\":\"completed\""));
}

/// What became of the time is in the run folder: another coordinator tells the same.
#[test]
fn what_became_of_the_time_outlives_the_coordinator() {
    let start = |place: &str| {
        let arguments = ["coordinator", "--listen", "127.0.0.1:0", "--jobs", place, "--slots", "1"];
        Serving::start(&arguments)
    };
    let _ = std::fs::remove_dir_all(world().folder.join("http-time"));
    let serving = start("http-time");
    serving.ask(&["submit", "small.toml", "--name", "a"]);
    serving.ask(&["submit", "small.toml", "--name", "b", "--set", "stage.stable.tokens=3000000"]);
    let over = |serving: &Serving| serving.process.out().contains("job a is completed\n");
    wait_until("the first is completed", || over(&serving));
    let folder = world().folder.join("http-time/b");
    wait_until("the second is so far", || newest_checkpoint(&folder) >= 3);
    let time = |serving: &Serving, job: &str| -> serde_json::Value {
        let detail = serving.get(&format!("/api/v1/jobs/{job}"));
        serde_json::from_str::<serde_json::Value>(&detail).expect("it is JSON")["time"].clone()
    };
    // The clock of what is over stands still.
    wait_until("the end is known", || {
        let before = time(&serving, "a");
        std::thread::sleep(std::time::Duration::from_millis(100));
        before == time(&serving, "a")
    });
    let (a, b) = (time(&serving, "a"), time(&serving, "b"));
    assert!(
        a["productive_s"].as_f64() > Some(0.0) && a["wall_s"].as_f64() > a["productive_s"].as_f64(),
        "{a}"
    );
    assert!(serving.process.kill());

    let serving = start("http-time");
    wait_until("the rows are read", || !time(&serving, "a").is_null() && !time(&serving, "b").is_null());
    assert_eq!(time(&serving, "a"), a, "of what is over all is known");
    let later = time(&serving, "b");
    for what in ["wall_s", "productive_s"] {
        // Its last steps may not have been written; they are computed again.
        let share = if what == "wall_s" { 1.0 } else { 0.25 };
        assert!(later[what].as_f64() >= b[what].as_f64().map(|s| share * s), "{what}: {b} {later}");
    }
    wait_until("it is told to Prometheus, too", || serving.tells("anello_goodput_ratio{job=\"b\"}"));
    serving.ask(&["cancel", "b"]);
}

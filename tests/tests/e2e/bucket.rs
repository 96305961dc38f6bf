//! Runs in a bucket are the runs in a folder, whatever happens to them.

use std::sync::OnceLock;

use anello_tests::{Asked, Done, Fate, Process, Proxy, S3, free_port, signal, wait_until};

use super::http::Serving;
use super::world;

fn s3() -> &'static S3 {
    static SERVER: OnceLock<S3> = OnceLock::new();
    SERVER.get_or_init(|| S3::start(&world().folder.join("logs")))
}

fn start(arguments: &[&str]) -> Process {
    Process::start_with(&world().folder, arguments, &s3().variables())
}

fn anello(arguments: &[&str]) -> Done {
    start(arguments).wait()
}

/// Asserts that the run at `url` is complete and is the undisturbed one, in every figure and every checkpoint.
fn assert_undisturbed(url: &str) {
    anello(&["checkpoint", "verify", url]).expect(0);
    let told = anello(&["bisect", "undisturbed", url]).expect(0);
    let whole = told.contains("are equal in all that both have: 31 steps and 7 checkpoints");
    assert!(whole, "{told}\n{}", anello(&["events", url]).expect(0));
}

#[test]
fn a_run_whose_data_is_in_a_bucket_too_is_killed_and_resumed() {
    let (data, url) = (s3().url("data"), s3().url("killed"));
    for source in ["tales", "lists"] {
        let (text, out) = (format!("{source}.jsonl"), format!("{data}/{source}"));
        let tokenize = ["data", "tokenize", &text, "--tokenizer", "tokenizer.json", "--out", &out];
        anello(&[&tokenize[..], &["--row-group", "200"]].concat()).expect(0);
        anello(&["data", "verify", &out]).expect(0);
    }
    let sets = ["tales", "lists"].map(|source| format!("data.sources.{source}.url={data}/{source}"));
    let mut arguments = vec!["run", "small.toml", "--out", &url, "--set", &sets[0], "--set", &sets[1]];
    for until in [5, 14, 22] {
        let mut process = start(&arguments);
        wait_until("it is so far", || s3().newest_checkpoint("killed") >= until || process.ended());
        assert!(process.kill(), "it was over too soon");
        arguments = vec!["run", "--resume", &url];
    }
    anello(&arguments).expect(0);
    assert_undisturbed(&url);
    let events = anello(&["events", &url]).expect(0);
    assert!(events.matches("resumed after step").count() >= 2, "{events}");
}

/// Starts a coordinator of the run at `url` and two workers, which reach the bucket by `port`; kills the coordinator as soon as
/// there is a checkpoint of step 6, and has another take over. The workers go on.
fn taken_over(name: &str, bucket_port: u16, read_timeout: &str) {
    let url = s3().url(name);
    let mut variables = s3().variables_by(bucket_port);
    variables.push(("AWS_READ_TIMEOUT", read_timeout.to_owned()));
    let start = |arguments: &[&str]| Process::start_with(&world().folder, arguments, &variables);
    let port = free_port().to_string();
    let address = format!("127.0.0.1:{port}");
    let external = ["--workers", "2", "--external", "--port", &port, "--detection", "1s", "--sample", "0"];
    let mut first = start(&[&["run", "small.toml", "--out", &url][..], &external].concat());
    let worker = || start(&["worker", "--coordinator", &address, "--job", "small", "--threads", "1"]);
    let workers = [worker(), worker()];
    wait_until("it is so far", || s3().newest_checkpoint(name) >= 6 || first.ended());
    assert!(first.kill(), "it was over too soon");
    start(&[&["run", "--resume", &url][..], &external].concat()).wait().expect(0);
    for worker in workers {
        worker.wait().expect(0);
    }
    assert_undisturbed(&url);
}

#[test]
fn a_coordinator_of_a_run_in_a_bucket_is_killed_and_taken_over() {
    taken_over("ring", s3().port(), "30s");
}

/// The same where coordinators and workers reach the bucket by a network that refuses, loses answers, cuts and delays.
#[test]
fn a_coordinator_behind_a_bad_network_is_killed_and_taken_over() {
    for seed in [11, 12] {
        let fates = [
            Fate::Status(500),
            Fate::Status(503),
            Fate::Cut,
            Fate::AnswerLost,
            Fate::Short,
            Fate::Slow,
            Fate::Silence,
        ];
        let proxy = Proxy::start(s3().port(), 10, &fates, seed);
        taken_over(&format!("ring-taken-over-{seed}"), proxy.port(), "1s");
        let harmed = proxy.harmed();
        println!("seed {seed}: {harmed:?}");
        assert!(harmed.iter().all(|(_, count)| *count > 0), "{harmed:?}");
    }
}

#[test]
fn a_coordinator_keeps_its_jobs_in_a_bucket() {
    let (jobs, address) = (s3().url("jobs"), format!("127.0.0.1:{}", free_port()));
    let keep = ["coordinator", "--listen", &address, "--jobs", &jobs, "--slots", "2", "--detection", "1s"];
    let mut coordinator = start(&keep);
    wait_until("it listens", || coordinator.out().contains("coordinator at") || coordinator.ended());
    anello(&["submit", "small.toml", "--workers", "2", "--coordinator", &address]).expect(0);
    wait_until("it is so far", || s3().newest_checkpoint("jobs/small") >= 6 || coordinator.ended());
    assert!(coordinator.kill(), "it was over too soon");
    let mut coordinator = start(&keep);
    wait_until("it listens", || coordinator.out().contains("coordinator at") || coordinator.ended());
    anello(&["watch", "small", "--coordinator", &address]).expect(0);
    coordinator.signal("INT");
    coordinator.wait().expect(130);
    assert_undisturbed(&format!("{jobs}/small"));
}

/// A key to a bucket is in no object, no log, no answer and on no page.
#[test]
fn keys_to_a_bucket_are_told_nobody() {
    const KEYS: [&str; 2] = ["a-key-that-nobody-is-told", "a-token-that-nobody-is-told"];
    let jobs = s3().url("secret");
    let mut variables = s3().variables();
    variables.retain(|(name, _)| *name != "AWS_SECRET_ACCESS_KEY");
    variables.push(("AWS_SECRET_ACCESS_KEY", KEYS[0].to_owned()));
    variables.push(("AWS_SESSION_TOKEN", KEYS[1].to_owned()));
    let folder = &world().folder;
    let quiet = |what: &str, text: &str| {
        assert!(!KEYS.iter().any(|key| text.contains(key)), "{what} tells a key:\n{text}");
    };
    let mut done = Vec::new();
    let arguments =
        ["coordinator", "--listen", "127.0.0.1:0", "--jobs", &jobs, "--slots", "2", "--log", "debug"];
    let serving = Serving::start_with(&arguments, &variables);
    serving.ask(&["submit", "small.toml", "--workers", "2"]);
    done.push(("what is watched".to_owned(), serving.ask(&["watch", "small"])));
    let job = "/api/v1/jobs/small";
    let pages = ["/", "/metrics", "/api/v1/jobs", job, &format!("{job}/events"), &format!("{job}/config")];
    done.extend(pages.map(|page| (page.to_owned(), serving.get(page))));
    done.extend(
        [["describe", "small"], ["logs", "small"]].map(|asks| (asks[0].to_owned(), serving.ask(&asks))),
    );
    serving.process.signal("INT");
    let coordinator = serving.process.wait();
    let debugged = coordinator.log.contains("DEBUG");
    assert!(debugged, "it logs all that it is asked to: {}", coordinator.log);
    done.push(("the coordinator".to_owned(), format!("{}{}", coordinator.out, coordinator.log)));
    // What goes wrong is told with its place and what to set, and not with what is set.
    let absent =
        Process::start_with(folder, &["checkpoint", "list", "s3://no-such-bucket/run"], &variables).wait();
    assert!(absent.log.contains("no-such-bucket"), "{absent:?}");
    done.push(("an error".to_owned(), format!("{}{}", absent.out, absent.log)));
    let objects = s3().keys("secret");
    assert!(objects.len() > 20, "{objects:?}");
    done.extend(objects.into_iter().map(|key| (key.clone(), s3().object(&key))));
    done.iter().for_each(|(what, text)| quiet(what, text));
}

#[test]
fn of_two_processes_on_a_run_in_a_bucket_one_is_told_to_leave() {
    let url = s3().url("twice");
    let mut first = start(&["run", "small.toml", "--out", &url, "--sample", "0"]);
    wait_until("it is so far", || s3().newest_checkpoint("twice") >= 3 || first.ended());
    let second = start(&["run", "--resume", &url, "--sample", "0"]);
    let ends = [first.wait(), second.wait()];
    let (well, badly): (Vec<_>, Vec<_>) = ends.into_iter().partition(|done| done.status.success());
    assert!(!well.is_empty(), "both have failed: {badly:?}");
    for done in badly {
        assert!(done.log.contains("was written by another process"), "{done:?}");
        done.expect(1);
    }
    assert_undisturbed(&url);
}

#[test]
fn what_is_wrong_with_a_place_is_said_with_what_to_set() {
    let absent = anello(&["events", "s3://no-such-bucket/run"]);
    assert!(absent.log.contains("no-such-bucket"), "{absent:?}");
    let folder = &world().folder;
    let without = Process::start_with(folder, &["checkpoint", "list", "ftp://host/run"], &[]).wait();
    assert!(
        without.log.contains("ftp:// is no store that is known here; give s3://, gs://, az://"),
        "{without:?}"
    );
    without.expect(2);
}

#[test]
fn the_doctor_finds_a_bucket_fit() {
    let told = anello(&["doctor", &s3().url("doctor")]).expect(0);
    assert!(
        told.contains("/doctor is fit for runs and coordinators\nput-if-absent: one winner in 20 of 20"),
        "{told}"
    );
    assert_eq!(s3().keys("doctor"), Vec::<String>::new(), "it leaves nothing behind");
}

/// A checkpoint that is copied to a bucket is a run that goes on there; pruned, the run keeps what it must.
#[test]
fn a_copy_goes_on_elsewhere_and_pruning_keeps_what_is_whole() {
    let url = s3().url("copied");
    let told = anello(&["checkpoint", "copy", "undisturbed@20", &url]).expect(0);
    assert!(told.contains("checkpoint 20 of undisturbed") && told.contains("parts sent"), "{told}");
    let again = anello(&["checkpoint", "copy", "undisturbed@20", &url]).expect(0);
    assert!(again.contains("; 0 of "), "{again}");
    anello(&["run", "--resume", &url, "--sample", "0"]).expect(0);
    let told = anello(&["checkpoint", "diff", "undisturbed", &url]).expect(0);
    assert!(told.contains("are equal: all"), "{told}");
    let refused = anello(&["checkpoint", "copy", "undisturbed@20", &url]);
    assert!(refused.log.contains("it holds a run with a history of its own"), "{refused:?}");
    refused.expect(2);

    let list = || anello(&["checkpoint", "list", &url]).expect(0);
    let before = list();
    let planned = anello(&["checkpoint", "prune", &url, "--keep-last", "2", "--dry-run"]).expect(0);
    assert!(planned.contains("checkpoint 31 is whole") && planned.contains("would go: "), "{planned}");
    assert_eq!(list(), before, "nothing went");
    anello(&["checkpoint", "prune", &url, "--keep-last", "2"]).expect(0);
    anello(&["checkpoint", "verify", &url]).expect(0);
    let after = list();
    assert!(after.lines().count() < before.lines().count(), "{before}\n{after}");
    let nothing = anello(&["checkpoint", "prune", &url, "--keep-last", "2"]).expect(0);
    assert!(nothing.contains("go: none"), "{nothing}");
}

/// Data, log, metrics and checkpoints by way of a network that loses, cuts, delays and refuses, and two kills in between.
#[test]
fn a_run_over_a_bad_network_is_the_undisturbed_run() {
    let fates = [
        Fate::Status(500),
        Fate::Status(503),
        Fate::Status(429),
        Fate::AnswerLost,
        Fate::Short,
        Fate::Cut,
        Fate::Slow,
        Fate::Silence,
    ];
    let (data, url) = (s3().url("storm-data"), s3().url("storm"));
    for source in ["tales", "lists"] {
        let (text, out) = (format!("{source}.jsonl"), format!("{data}/{source}"));
        let tokenize = ["data", "tokenize", &text, "--tokenizer", "tokenizer.json", "--out", &out];
        anello(&[&tokenize[..], &["--row-group", "200"]].concat()).expect(0);
    }
    let proxy = Proxy::start(s3().port(), 8, &fates, 5);
    let mut variables = s3().variables_by(proxy.port());
    // What is silent is given up after a second, and not after half a minute.
    variables.push(("AWS_READ_TIMEOUT", "1s".to_owned()));
    let start = |arguments: &[&str]| Process::start_with(&world().folder, arguments, &variables);
    let cache = world().folder.join("storm-cache").display().to_string();
    let sets = ["tales", "lists"].map(|source| format!("data.sources.{source}.url={data}/{source}"));
    let cache = format!("data.cache_dir={cache}");
    let mut arguments = vec!["run", "small.toml", "--out", &url, "--sample", "0"];
    for set in sets.iter().chain([&cache]) {
        arguments.extend(["--set", set]);
    }
    for until in [5, 14] {
        let mut process = start(&arguments);
        wait_until("it is so far", || s3().newest_checkpoint("storm") >= until || process.ended());
        assert!(process.kill(), "it was over too soon");
        arguments = vec!["run", "--resume", &url, "--sample", "0"];
    }
    start(&arguments).wait().expect(0);
    assert_undisturbed(&url);
    let harmed = proxy.harmed();
    assert!(harmed.iter().map(|(_, count)| count).sum::<u64>() > 20, "{harmed:?}");
}

/// The checkpoints of a ring by way of a network that loses, delays and refuses, while a worker is killed.
#[test]
fn a_ring_over_a_bad_network_is_the_undisturbed_run() {
    let fates = [Fate::Status(500), Fate::Status(503), Fate::AnswerLost, Fate::Short, Fate::Slow];
    let proxy = Proxy::start(s3().port(), 8, &fates, 9);
    let mut variables = s3().variables_by(proxy.port());
    variables.push(("AWS_READ_TIMEOUT", "1s".to_owned()));
    let url = s3().url("ring-storm");
    let arguments = ["run", "small.toml", "--out", &url, "--workers", "2", "--sample", "0"];
    let mut ring = Process::start_with(&world().folder, &arguments, &variables);
    wait_until("it is so far", || s3().newest_checkpoint("ring-storm") >= 9 || ring.ended());
    let worker = *ring.children().first().expect("it was over too soon");
    signal(worker, "KILL");
    ring.wait().expect(0);
    assert_undisturbed(&url);
    let harmed = proxy.harmed();
    assert!(harmed.iter().map(|(_, count)| count).sum::<u64>() > 10, "{harmed:?}");
}

/// The workers of a machine fetch what they need of the shards into one cache: a ring after it, of more workers, asks the bucket for
/// nothing of them. All are the undisturbed run.
#[test]
fn workers_of_a_machine_share_what_they_fetched() {
    let data = s3().url("shared-data");
    for source in ["tales", "lists"] {
        let (text, out) = (format!("{source}.jsonl"), format!("{data}/{source}"));
        let tokenize = ["data", "tokenize", &text, "--tokenizer", "tokenizer.json", "--out", &out];
        anello(&[&tokenize[..], &["--row-group", "200"]].concat()).expect(0);
    }
    let cache = format!("data.cache_dir={}", world().folder.join("shared-cache").display());
    let sets = ["tales", "lists"].map(|source| format!("data.sources.{source}.url={data}/{source}"));
    // Requests for shards.
    let fetched = |name: &str, workers: &str, sets: &[&String]| {
        let proxy = Proxy::start(s3().port(), 0, &[], 1);
        let url = s3().url(name);
        let mut arguments = vec!["run", "small.toml", "--out", &url, "--sample", "0", "--workers", workers];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        Process::start_with(&world().folder, &arguments, &s3().variables_by(proxy.port())).wait().expect(0);
        assert_undisturbed(&url);
        let is_shard = |path: &String| path.contains("/shared-data/") && path.ends_with(".parquet");
        proxy.asked().iter().filter(|asked| asked.method == "GET" && asked.paths.iter().any(is_shard)).count()
    };
    let without = fetched("cacheless", "3", &[&sets[0], &sets[1]]);
    let first = fetched("cache-filled", "3", &[&sets[0], &sets[1], &cache]);
    let second = fetched("cache-full", "4", &[&sets[0], &sets[1], &cache]);
    assert!(
        second == 0 && 0 < first && first < without,
        "{without} without a cache, then {first}, then {second}"
    );
}

/// With a checksum algorithm set, every object goes with the checksum of its bytes, which a server that knows it checks.
#[test]
fn what_is_written_carries_its_checksum() {
    let proxy = Proxy::start(s3().port(), 0, &[], 1);
    let copy = |to: &str, algorithm: Option<&str>| {
        let mut variables = s3().variables_by(proxy.port());
        variables.extend(algorithm.map(|name| ("AWS_CHECKSUM_ALGORITHM", name.to_owned())));
        let arguments = ["checkpoint", "copy", "undisturbed@20", &s3().url(to)];
        Process::start_with(&world().folder, &arguments, &variables).wait().expect(0);
        let writes = proxy.writes();
        let of_copy: Vec<String> =
            writes.into_iter().filter(|head| head.contains(&format!("/{to}/"))).collect();
        assert!(of_copy.len() >= 5, "parts and a manifest: {of_copy:?}");
        of_copy
    };
    let value = |head: &str, name: &str| {
        let mut lines = head.lines().filter_map(|line| line.split_once(':'));
        Some(lines.find(|(key, _)| key.eq_ignore_ascii_case(name))?.1.trim().to_owned())
    };
    for head in copy("checked", Some("sha256")) {
        let checksum = value(&head, "x-amz-checksum-sha256").unwrap_or_else(|| panic!("{head}"));
        // The signature has the same digest of the body, as hex.
        let signed = value(&head, "x-amz-content-sha256").unwrap_or_else(|| panic!("{head}"));
        assert_eq!(hex_of_base64(&checksum), signed, "{head}");
    }
    let plain = copy("unchecked", None);
    assert!(plain.iter().all(|head| value(head, "x-amz-checksum-sha256").is_none()), "{plain:?}");
    anello(&["checkpoint", "verify", &s3().url("checked")]).expect(0);
}

fn hex_of_base64(text: &str) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits = text.trim_end_matches('=').bytes().fold(String::new(), |bits, digit| {
        let value = DIGITS.iter().position(|known| *known == digit).unwrap();
        bits + &format!("{value:06b}")
    });
    let bytes = (0..bits.len() / 8).map(|at| u8::from_str_radix(&bits[at * 8..at * 8 + 8], 2).unwrap());
    bytes.map(|byte| format!("{byte:02x}")).collect()
}

/// Of each checkpoint the store is asked, one after the other was answered, for its parts, what was written of them, its manifest,
/// `latest.json`, and then for old ones to go: their manifests first, then their parts. One process does so, and a ring.
#[test]
fn what_a_checkpoint_asks_of_the_store_comes_in_its_order() {
    for (name, workers) in [("ordered", &[][..]), ("ordered-ring", &["--workers", "3"])] {
        let proxy = Proxy::start(s3().port(), 0, &[], 1);
        let url = s3().url(name);
        let run = ["run", "small.toml", "--out", &url, "--sample", "0", "--set", "checkpoint.keep_last=2"];
        Process::start_with(&world().folder, &[&run[..], workers].concat(), &s3().variables_by(proxy.port()))
            .wait()
            .expect(0);
        let asked = proxy.asked();
        let prefix = format!("anello/{name}/");
        let of = |method: &str, is_it: &dyn Fn(&str) -> bool| -> Vec<&Asked> {
            let of_it = |path: &String| path.strip_prefix(&prefix).is_some_and(is_it);
            asked.iter().filter(|asked| asked.method == method && asked.paths.iter().any(of_it)).collect()
        };
        let came = |of: &[&Asked]| of.iter().map(|asked| asked.ticks[0]).min();
        let answered = |of: &[&Asked]| of.iter().map(|asked| asked.ticks[1]).max();
        let step_of = |asked: &Asked| {
            let path = asked.paths[0].strip_prefix(&prefix)?.strip_prefix("checkpoints/")?;
            path.strip_suffix("/manifest.json")?.parse::<u64>().ok()
        };
        let puts = asked.iter().filter(|asked| asked.method == "PUT");
        let steps: Vec<u64> = puts.filter_map(step_of).collect();
        assert!(steps.len() >= 8 && steps.is_sorted(), "{name}: {steps:?}");
        let mut pruned = 0;
        for step in steps {
            let folder = format!("checkpoints/{step:010}/");
            let is_manifest = |path: &str| path == format!("{folder}manifest.json");
            let manifest = of("PUT", &is_manifest);
            let [created_by] = &manifest[..] else { panic!("{name}, {step}: {manifest:?}") };
            // A ring's second copies of blocks, which it does not name, may come at any time.
            let is_part = |path: &str| {
                path.strip_prefix(&folder).is_some_and(|part| {
                    part.starts_with("part-") && created_by.body.contains(&format!("\"{part}\""))
                })
            };
            let written = of("PUT", &is_part);
            assert!(written.len() >= 2, "{name}, {step}: {written:?}");
            assert!(created_by.if_absent, "{name}, {step}: {created_by:?}");
            let created = came(&manifest);
            for part in &written {
                let read = of("GET", &|path| format!("{prefix}{path}") == part.paths[0]);
                let back =
                    read.iter().filter(|read| read.ticks[0] > part.ticks[1] && Some(read.ticks[1]) < created);
                assert!(
                    back.count() >= 1,
                    "{name}, {step}: {part:?} is read back before the manifest: {read:?}"
                );
            }
            assert!(answered(&written) < created, "{name}, {step}: parts, then the manifest");
            let latest = of("PUT", &|path| path == "latest.json");
            let moved = latest.into_iter().find(|moved| Some(moved.ticks[0]) > answered(&manifest));
            let moved = moved.unwrap_or_else(|| panic!("{name}, {step}: latest.json was not moved"));
            // What goes after this one goes after latest.json was moved, manifest by manifest and then parts.
            let next = of("PUT", &|path| path.ends_with("/manifest.json"));
            let next = next.into_iter().map(|next| next.ticks[0]).filter(|next| Some(*next) > created).min();
            let since = |asked: &&Asked| {
                Some(asked.ticks[0]) > created && next.is_none_or(|next| asked.ticks[0] < next)
            };
            let gone: Vec<&Asked> =
                of("DELETE", &|path| path.starts_with("checkpoints/")).into_iter().filter(since).collect();
            assert!(came(&gone).is_none_or(|first| first > moved.ticks[1]), "{name}, {step}: {gone:?}");
            let manifests = gone.iter().filter(|gone| gone.paths[0].ends_with("/manifest.json")).count();
            let (first, rest) = gone.split_at(manifests);
            assert!(first.iter().all(|gone| gone.paths[0].ends_with("/manifest.json")), "{name}: {gone:?}");
            assert!(rest.len() >= 2 * manifests, "{name}, {step}: the parts of those that go: {gone:?}");
            pruned += manifests;
        }
        assert!(pruned >= 3, "{name}: {pruned} were pruned");
        anello(&["checkpoint", "verify", &url]).expect(0);
        anello(&["checkpoint", "diff", "undisturbed", &url]).expect(0);
    }
}

/// Parts that go in pieces, each request of which may be refused, cut off, done and not told of, or answered short: what is
/// there is whole or is not there, and it is all there in the end.
#[test]
fn an_upload_in_pieces_over_a_bad_network_is_a_whole_object_or_none() {
    // 31 MB in one part: four pieces.
    let run = ["run", "small.toml", "--out", "pieces", "--until", "1", "--sample", "0"];
    let sizes = ["model.hidden=384", "model.ffn=512", "checkpoint.part_bytes=64MiB"];
    world().anello(&[&run[..], &sizes.map(|set| ["--set", set]).concat()].concat()).expect(0);
    let fates =
        [Fate::Status(500), Fate::Status(503), Fate::Cut, Fate::AnswerLost, Fate::Short, Fate::Silence];
    let (mut failed, mut harmed) = (0, 0);
    for seed in 1..=4 {
        let name = format!("pieces-{seed}");
        // One request in two, of those that an upload in pieces is made of: it begins, its pieces, it is complete.
        let proxy = Proxy::start(s3().port(), 50, &fates, seed);
        proxy.harm_only("upload");
        let mut variables = s3().variables_by(proxy.port());
        variables.push(("AWS_READ_TIMEOUT", "1s".to_owned()));
        let copy = || {
            let copy = ["checkpoint", "copy", "pieces@1", &s3().url(&name)];
            Process::start_with(&world().folder, &copy, &variables).wait()
        };
        let prefix = format!("{name}/");
        let assert_whole = |what: &str| {
            let keys = s3().keys(&format!("{name}/checkpoints/"));
            for part in keys.iter().filter(|key| key.contains("/part-")) {
                let here = world().folder.join("pieces").join(part.strip_prefix(&prefix).unwrap());
                let here = std::fs::read(here).unwrap();
                assert!(here.len() > 24 << 20, "{} bytes are four pieces", here.len());
                assert!(s3().bytes(part) == here, "{what}: {part} is not what was sent");
            }
        };
        for attempt in 1.. {
            let done = copy();
            assert_whole(&format!("{name}, attempt {attempt}"));
            if done.status.success() {
                break;
            }
            failed += 1;
            assert!(attempt < 20 && done.log.contains("error: "), "{done:?}");
        }
        anello(&["checkpoint", "verify", &s3().url(&name)]).expect(0);
        harmed += proxy.harmed().iter().map(|(_, count)| count).sum::<u64>();
        let pieces = proxy.writes().iter().filter(|head| head.contains("partNumber=")).count();
        assert!(pieces >= 4, "{name}: {pieces} pieces");
    }
    println!("{failed} copies failed, {harmed} requests came to harm");
    assert!(harmed > 12, "{harmed} requests came to harm");
}

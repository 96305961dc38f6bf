//! Rings that begin with a checkpoint: together they read it once.

use anello_tests::{Process, free_port, newest_checkpoint, wait_until};
use serde_json::Value;

use super::ring::{WILD, assert_no_strays, assert_undisturbed, spikes, start, worker};
use super::world;

/// The sum of a figure over the lines of a log that tell of it.
fn told(log: &str, figure: &str) -> u64 {
    let figure = format!("{figure}=");
    let bytes = log.split(&figure).skip(1);
    let number = |rest: &str| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u64>().ok();
    bytes.filter_map(number).sum()
}

fn text_of_manifest(run: &str, step: u64) -> String {
    let path = world().folder.join(run).join(format!("checkpoints/{step:010}/manifest.json"));
    std::fs::read_to_string(path).unwrap()
}

fn parts(run: &str, step: u64) -> Vec<Value> {
    let manifest: Value = serde_json::from_str(&text_of_manifest(run, step)).unwrap();
    manifest["parts"].as_array().unwrap().clone()
}

/// Bytes of the parts of a checkpoint, and of its manifest for each of so many members.
fn bytes_of(run: &str, step: u64, members: u64) -> u64 {
    let parts = parts(run, step);
    let once = parts.iter().map(|part| part["bytes"].as_u64().unwrap()).sum::<u64>();
    once + members * text_of_manifest(run, step).len() as u64
}

/// What three workers have logged when the job of `coordinator` at `port` is over.
fn logs_of_three(coordinator: Process, port: &str) -> Vec<String> {
    let address = format!("127.0.0.1:{port}");
    let workers: Vec<_> = (0..3).map(|_| worker(&address)).collect();
    let logs = workers.into_iter().map(|worker| {
        let done = worker.wait();
        let log = done.log.clone();
        done.expect(0);
        log
    });
    let logs = logs.collect();
    coordinator.wait().expect(0);
    logs
}

/// Each part leaves the store once, whoever needs which of its blocks; only the manifest is read by all.
#[test]
fn a_ring_reads_each_byte_of_a_checkpoint_once() {
    for (run, copies) in [("loading-all", "all"), ("loading-shared", "2")] {
        let place = world().folder.join(run);
        let copies = format!("ring.state_copies={copies}");
        let mut process = start(run, 2, &["--set", &copies]);
        wait_until("it is so far", || newest_checkpoint(&place) >= 6 || process.ended());
        process.signal("INT");
        process.wait().expect(130);
        // Old ones go: what there is to read is told before it is read.
        let newest = newest_checkpoint(&place);
        let (manifest, expected) = (text_of_manifest(run, newest), bytes_of(run, newest, 3));

        let port = free_port().to_string();
        let resume = ["run", "--resume", run, "--workers", "3", "--external", "--port", &port];
        let coordinator = Process::start(&world().folder, &[&resume[..], &["--sample", "0"]].concat());
        let logs = logs_of_three(coordinator, &port);
        let read: Vec<u64> = logs.iter().map(|log| told(log, "read_bytes")).collect();
        assert_eq!(read.iter().sum::<u64>(), expected, "{copies}: {read:?} read");
        assert!(read.iter().all(|bytes| *bytes > manifest.len() as u64), "{copies}: {read:?}");
        assert!(logs.iter().all(|log| told(log, "peers_bytes") > 0), "{logs:?}");
        assert_undisturbed(run);
    }
}

/// After a spike too each part leaves the store once: the ring goes back together.
#[test]
fn a_ring_that_goes_back_reads_each_byte_of_a_checkpoint_once() {
    for (run, copies) in [("back-all", "all"), ("back-shared", "2")] {
        let (copies, port) = (format!("ring.state_copies={copies}"), free_port().to_string());
        // Whichever it is that they go back to is there to be looked at afterwards.
        let kept = ["--set", "checkpoint.keep_every_steps=1", "--set", &copies];
        let begin = ["run", "small.toml", "--out", run, "--workers", "3", "--external", "--port", &port];
        let arguments = [&begin[..], &["--sample", "0"], &WILD, &kept].concat();
        let coordinator = Process::start(&world().folder, &arguments);
        let logs = logs_of_three(coordinator, &port);
        // What each tells of every time: the checkpoint, and the bytes that it asked of the store.
        let took = |log: &String| -> Vec<(u64, u64)> {
            let lines = log.lines().filter(|line| line.contains("took state from a checkpoint"));
            lines.map(|line| (told(line, "step"), told(line, "read_bytes"))).collect()
        };
        let took: Vec<Vec<(u64, u64)>> = logs.iter().map(took).collect();
        assert!(!took[0].is_empty(), "{copies}: the ring goes back to a checkpoint: {logs:?}");
        for at in 0..took[0].len() {
            let steps: Vec<u64> = took.iter().map(|of| of[at].0).collect();
            assert!(steps.iter().all(|step| *step == steps[0]), "{copies}: {took:?}");
            let read: u64 = took.iter().map(|of| of[at].1).sum();
            assert_eq!(read, bytes_of(run, steps[0], 3), "{copies}: {took:?}");
        }
        assert_no_strays(run);
    }
    assert_eq!(spikes("back-all"), spikes("back-shared"));
    world().anello(&["checkpoint", "diff", "back-all", "back-shared"]).expect(0);
}

/// A part of the checkpoint that they would go back to is damaged: all go back further, and come to the same bits.
#[test]
fn a_ring_that_finds_a_damaged_checkpoint_goes_back_further() {
    let one = ["run", "small.toml", "--out", "further-one", "--sample", "0"];
    world().anello(&[&one[..], &WILD].concat()).expect(0);
    let spikes_of_one = spikes("further-one");
    // The first spike that there is a checkpoint to go back from.
    let spikes_at = spikes_of_one.iter().filter_map(|told| told.split(' ').next()?.parse::<u64>().ok());
    let spike = spikes_at.filter(|spike| *spike >= 7).min().expect("the run is wild");
    let (back_to, run) = ((spike - 2) / 5 * 5, "further-ring");
    let until = spike.to_string();
    let begin = ["run", "small.toml", "--out", run, "--sample", "0", "--until", &until];
    world().anello(&[&begin[..], &WILD].concat()).expect(0);
    let part = &parts(run, back_to)[0];
    let path = format!("checkpoints/{back_to:010}/{}", part["name"].as_str().unwrap());
    let path = world().folder.join(run).join(path);
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let resume = ["run", "--resume", run, "--workers", "2", "--sample", "0"];
    let done = world().anello(&resume);
    let told = done.log.matches("trying the checkpoint before it").count();
    done.expect(0);
    assert!(told >= 1, "one of them found it damaged");
    assert_eq!(spikes(run), spikes_of_one);
    world().anello(&["checkpoint", "diff", "further-one", run]).expect(0);
}

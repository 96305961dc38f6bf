//! Rings that begin with a checkpoint: together they read it once.

use anello_tests::{Process, free_port, newest_checkpoint, wait_until};
use serde_json::Value;

use super::ring::{assert_undisturbed, start, worker};
use super::world;

/// The sum of a figure over the lines of a log that tell of it.
fn told(log: &str, figure: &str) -> u64 {
    let figure = format!("{figure}=");
    let bytes = log.split(&figure).skip(1);
    let number = |rest: &str| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u64>().ok();
    bytes.filter_map(number).sum()
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
        let manifest = place.join(format!("checkpoints/{:010}/manifest.json", newest_checkpoint(&place)));
        let manifest = std::fs::read_to_string(manifest).unwrap();
        let parts: Value = serde_json::from_str(&manifest).unwrap();
        let parts = parts["parts"].as_array().unwrap().iter().map(|part| part["bytes"].as_u64().unwrap());
        let once = parts.sum::<u64>();

        let port = free_port().to_string();
        let resume = ["run", "--resume", run, "--workers", "3", "--external", "--port", &port];
        let coordinator = Process::start(&world().folder, &[&resume[..], &["--sample", "0"]].concat());
        let address = format!("127.0.0.1:{port}");
        let workers: Vec<_> = (0..3).map(|_| worker(&address)).collect();
        let logs: Vec<String> = workers
            .into_iter()
            .map(|worker| {
                let done = worker.wait();
                let log = done.log.clone();
                done.expect(0);
                log
            })
            .collect();
        coordinator.wait().expect(0);
        let read: Vec<u64> = logs.iter().map(|log| told(log, "read_bytes")).collect();
        let manifests = 3 * manifest.len() as u64;
        assert_eq!(read.iter().sum::<u64>(), once + manifests, "{copies}: {read:?} read");
        assert!(read.iter().all(|bytes| *bytes > manifest.len() as u64), "{copies}: {read:?}");
        assert!(logs.iter().all(|log| told(log, "peers_bytes") > 0), "{logs:?}");
        assert_undisturbed(run);
    }
}

//! Workers that come while others train: they are sent the state meanwhile, and nothing of the run changes.

use std::sync::OnceLock;

use anello_tests::{Process, free_port, newest_checkpoint, signal, wait_until};
use serde_json::{Value, json};

use super::faults::{Random, SHARED, taken_up};
use super::ring::{
    assert_no_strays, blamed, events, machine_of, records, start, start_on_machines, worker, worker_with,
};
use super::world;

/// Long enough for processes that start while it trains.
const LONG: [&str; 2] = ["--set", "stage.stable.tokens=128Ki"];

/// Long enough for processes that come and go at random.
pub(super) const RANDOM: [&str; 2] = ["--set", "stage.stable.tokens=32Ki"];

/// Its steps.
pub(super) const RANDOM_STEPS: u64 = 152;

fn alone(run: &'static str, set: &[&str]) -> &'static str {
    let one = ["run", "small.toml", "--out", run, "--sample", "0"];
    world().anello(&[&one[..], set].concat()).expect(0);
    run
}

/// The long run of one worker.
fn undisturbed() -> &'static str {
    static RUN: OnceLock<&str> = OnceLock::new();
    RUN.get_or_init(|| alone("joiners-undisturbed", &LONG))
}

/// The run of one worker to which those come and go at random.
pub(super) fn undisturbed_at_random() -> &'static str {
    static RUN: OnceLock<&str> = OnceLock::new();
    RUN.get_or_init(|| alone("joiners-random-undisturbed", &RANDOM))
}

/// A coordinator that takes workers from outside, and its address.
fn coordinator(run: &str, workers: u32, more: &[&str]) -> (Process, String) {
    let port = free_port().to_string();
    let process = start(run, workers, &[&["--external", "--port", &port][..], &LONG, more].concat());
    (process, format!("127.0.0.1:{port}"))
}

/// What the log says of the rings that were formed: members, first step, and how many of them learn.
fn rings(told: &str) -> Vec<(u64, u64, u64)> {
    let number = |text: &str, after: &str| {
        let digits = text
            .split_once(after)?
            .1
            .split(|c: char| !c.is_ascii_digit() && c != ' ' && c != '\u{a0}')
            .next()?;
        digits.chars().filter(char::is_ascii_digit).collect::<String>().parse::<u64>().ok()
    };
    let formed = told.lines().filter(|line| line.contains(" formed with "));
    let ring = |line: &str| {
        Some((
            number(line, "formed with ")?,
            number(line, "from step ")?,
            if line.contains("while the others train") { number(line, "sent to ")? } else { 0 },
        ))
    };
    formed.map(|line| ring(line).unwrap_or_else(|| panic!("{line}"))).collect()
}

#[test]
fn what_a_joiner_lacks_comes_while_the_others_train() {
    let run = "joiners-slow-state";
    let place = world().folder.join(run);
    // The state is 3 MiB, so that it takes two seconds at least.
    let (mut process, address) = coordinator(run, 3, &["--set", "ring.state_bandwidth=1MiB"]);
    let mut workers = vec![worker(&address)];
    wait_until("it is so far", || newest_checkpoint(&place) >= 3 || process.ended());
    workers.push(worker(&address));
    wait_until("it is so far", || newest_checkpoint(&place) >= 9 || process.ended());
    workers.push(worker(&address));
    process.wait().expect(0);
    workers.into_iter().for_each(|worker| drop(worker.wait().expect(0)));
    let told = events(run);
    let rings = rings(&told);
    assert_eq!(rings[0], (1, 1, 0), "{told}");
    let learns = rings.iter().position(|(_, _, learn)| *learn > 0).unwrap_or_else(|| panic!("{told}"));
    // The ring after it begins when the state is there; or the run has ended before.
    let from = rings[learns].1;
    let until = rings.get(learns + 1).map_or(500, |(_, from, _)| *from);
    assert!(until >= from + 3, "the ring has waited for the state: {told}");
    world().assert_alike(run, undisturbed());
    assert_no_strays(run);
}

#[test]
fn a_joiner_trains_soon() {
    let run = "joiners-fast";
    let place = world().folder.join(run);
    let (mut process, address) = coordinator(run, 2, &[]);
    let mut workers = vec![worker(&address)];
    wait_until("it is so far", || newest_checkpoint(&place) >= 3 || process.ended());
    workers.push(worker(&address));
    process.wait().expect(0);
    workers.into_iter().for_each(|worker| drop(worker.wait().expect(0)));
    let told = events(run);
    let rings = rings(&told);
    assert!(rings.iter().any(|(members, _, learn)| *members == 2 && *learn > 0), "{told}");
    assert!(rings.iter().any(|(members, _, learn)| *members == 2 && *learn == 0), "{told}");
    world().assert_alike(run, undisturbed());
    assert_no_strays(run);
}

/// Nobody counts on what a joiner has before it has all: it may die, and so may those that it learns from.
#[test]
fn deaths_while_a_joiner_is_sent_the_state_change_nothing() {
    let run = "joiners-deaths";
    let place = world().folder.join(run);
    let learning = || events(run).matches("while the others train").count();
    // The state would take longer than the run.
    let (mut process, address) = coordinator(run, 2, &["--set", "ring.state_bandwidth=4KiB"]);
    let first = worker(&address);
    wait_until("it is so far", || newest_checkpoint(&place) >= 3 || process.ended());
    let second = worker(&address);
    wait_until("it learns", || learning() >= 1 || process.ended());
    let before = newest_checkpoint(&place);
    wait_until("the other trains meanwhile", || newest_checkpoint(&place) >= before + 6 || process.ended());
    signal(second.id(), "KILL");
    drop(second.wait());
    wait_until("it is missed", || events(run).contains(" lost (") || process.ended());
    let third = worker(&address);
    wait_until("another learns", || learning() >= 2 || process.ended());
    let before = newest_checkpoint(&place);
    wait_until("the other trains meanwhile", || newest_checkpoint(&place) >= before + 3 || process.ended());
    signal(first.id(), "KILL");
    drop(first.wait());
    process.wait().expect(0);
    third.wait().expect(0);
    let told = events(run);
    assert!(told.contains("state from checkpoint"), "{told}");
    world().assert_alike(run, undisturbed());
    assert_no_strays(run);
}

/// Where moments are shared out a joiner has the weights with a step of those that train, and the moments of its share, which take a
/// second here, while they train on.
#[test]
fn where_moments_are_shared_out_a_joiner_is_sent_its_share_while_the_others_train() {
    let run = "joiners-shared";
    let place = world().folder.join(run);
    let (mut process, address) =
        coordinator(run, 4, &[&SHARED[..], &["--set", "ring.state_bandwidth=1MiB"]].concat());
    let mut workers = vec![worker(&address)];
    // Rings of one, two, three and four: the first two have all moments everywhere.
    for step in [3, 9, 15] {
        wait_until("it is so far", || newest_checkpoint(&place) >= step || process.ended());
        workers.push(worker(&address));
    }
    process.wait().expect(0);
    let last = workers.pop().expect("four came").wait();
    workers.into_iter().for_each(|worker| drop(worker.wait().expect(0)));
    let told = events(run);
    let rings = rings(&told);
    assert!(rings.iter().any(|(_, _, learn)| *learn > 0), "{told}");
    // After a ring in which some learn comes one in which they train, some steps later; in it the next one may learn already.
    let entered = |pair: &[(u64, u64, u64)]| {
        let [(before, from, learn), (members, entered, others)] = pair else { return false };
        *learn > 0 && members - others >= *before && *entered > from + 3
    };
    assert!(rings.windows(2).any(entered), "{told}");
    // Until it has lanes: later a stack grows, for which all moments move.
    let learned = last.log.split_once("holds the state that it was sent").map(|(_, after)| after);
    let entered = learned.and_then(|after| after.split_once("has its share of the state"));
    let (before, _) = entered.unwrap_or_else(|| panic!("{}", last.log));
    assert!(!before.contains("took state from peers"), "moments moved at a boundary: {}", last.log);
    last.expect(0);
    assert!(!told.contains("given up") && !told.contains("state from checkpoint"), "{told}");
    world().assert_alike(run, undisturbed());
    assert_no_strays(run);
}

/// A joiner comes while the language model is frozen, which has no moments then.
fn joins_while_frozen(run: &str, more: &[&str]) {
    let gate =
        "stage.gate={loss=\"gate\",tokens=8192,sequence=16,batch=128,lr=1e-2,loops=2,mixture={tales=1}}";
    let stages = ["--set", "stages=[\"warmup\",\"gate\",\"stable\"]", "--set", gate];
    let one = format!("{run}-one");
    let alone = ["run", "small.toml", "--out", &one, "--sample", "0"];
    world().anello(&[&alone[..], &stages].concat()).expect(0);
    let (place, port) = (world().folder.join(run), free_port().to_string());
    let outside = ["--external", "--port", &port];
    let mut process = start(run, 3, &[&outside[..], &stages, more].concat());
    let mut workers = vec![worker(&format!("127.0.0.1:{port}"))];
    for step in [8, 20] {
        wait_until("it is so far", || newest_checkpoint(&place) >= step || process.ended());
        workers.push(worker(&format!("127.0.0.1:{port}")));
    }
    process.wait().expect(0);
    workers.into_iter().for_each(|worker| drop(worker.wait().expect(0)));
    let told = events(run);
    // On a busy machine both may come at once.
    assert!(["2", "3"].iter().any(|many| told.contains(&format!("formed with {many} workers"))), "{told}");
    assert!(!told.contains("given up") && !told.contains("state from checkpoint"), "{told}");
    world().assert_alike(run, &one);
    assert_no_strays(run);
}

#[test]
fn a_joiner_comes_while_the_language_model_is_frozen() {
    joins_while_frozen("joiners-frozen-all", &[]);
}

/// Steps that move some of the weights alone spread no others: a joiner has those at the boundary.
#[test]
fn where_moments_are_shared_out_a_joiner_comes_while_the_language_model_is_frozen() {
    joins_while_frozen("joiners-frozen", &SHARED);
}

#[test]
fn whoever_comes_goes_and_dies_changes_nothing() {
    Random::Joiners.train_all(3..=4);
}

/// What the kernel says that a process does: `T` when it is stopped.
fn activity_of(process: u32) -> Option<char> {
    let told = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    told.rsplit_once(") ")?.1.chars().next()
}

/// A worker that is frozen closes nothing: it is missed for its silence, the others go on without it, and when it moves again the same
/// process trains again.
#[test]
fn a_worker_that_is_frozen_is_missed_and_comes_back() {
    let run = "joiners-frozen-worker";
    let place = world().folder.join(run);
    let (mut process, workers, _) = start_on_machines(run, 3, &LONG);
    wait_until("it is so far", || newest_checkpoint(&place) >= 6 || process.ended());
    let frozen = &workers[1];
    frozen.signal("STOP");
    wait_until("it is missed", || events(run).contains(" lost (silent for ") || process.ended());
    // Parts that it has written before may make a checkpoint; of steps that come after it is no part.
    let before = newest_checkpoint(&place);
    wait_until("the others train on", || newest_checkpoint(&place) >= before + 6 || process.ended());
    assert!(!process.ended(), "it was over too soon: {}", events(run));
    assert_eq!(activity_of(frozen.id()), Some('T'));
    let told = records(run);
    frozen.signal("CONT");
    let (lost, _) = blamed(&told, "lost", 0);
    let missed = lost["worker"].as_str().unwrap();
    assert_eq!(machine_of(&told, missed), "m1", "{lost}");
    assert!(lost["reason"].as_str().unwrap().starts_with("silent for "), "{lost}");
    let members = |records: &[Value]| {
        let after = records.iter().skip_while(|record| record["number"] != lost["number"]);
        let rings = after.filter(|record| record["kind"] == "formed");
        rings.map(|ring| ring["members"].as_array().unwrap().len()).collect::<Vec<_>>()
    };
    assert_eq!(members(&told).first(), Some(&2), "{}", events(run));
    wait_until("it trains again", || members(&records(run)).contains(&3) || process.ended());
    process.wait().expect(0);
    workers.into_iter().for_each(|worker| drop(worker.wait().expect(0)));
    let told = records(run);
    let mut after = told.iter().skip_while(|record| record["number"] != lost["number"]);
    assert!(after.any(|record| record["kind"] == "joined" && record["machine"] == "m1"), "{}", events(run));
    assert!(members(&told).contains(&3) && !events(run).contains("state from checkpoint"), "{}", events(run));
    world().assert_alike(run, undisturbed());
    assert_no_strays(run);
}

/// Who was sent away has its machine in the log: no worker of it is taken any more, by no coordinator.
#[test]
fn a_machine_whose_worker_was_sent_away_is_in_quarantine() {
    let run = "joiners-quarantine";
    let fault = ["--set", "ring.fault=weights@16/1"];
    let (mut coordinator, mut workers, port) = start_on_machines(run, 3, &[&LONG[..], &fault].concat());
    let address = format!("127.0.0.1:{port}");
    wait_until("one is sent away", || workers.iter_mut().any(Process::ended) || coordinator.ended());
    let at = workers.iter_mut().position(Process::ended).unwrap_or_else(|| panic!("{}", coordinator.log()));
    workers.remove(at).wait().expect(5);
    let told = records(run);
    let (evicted, guilty) = blamed(&told, "evicted", 1);
    let machine = format!("m{at}");
    assert_eq!((evicted["worker"].as_str(), machine_of(&told, guilty)), (Some(guilty), &*machine));
    let refused = || {
        let done = worker_with(&address, &["--machine", &machine]).wait();
        assert!(done.log.contains(&format!("sent away: machine {machine} is quarantined: ")), "{done:?}");
        done.expect(5);
    };
    refused();
    assert!(coordinator.kill(), "it was over too soon");
    let mut coordinator = taken_up(run, 3, &port);
    refused();
    assert!(!coordinator.ended(), "it was over too soon: {}", events(run));
    // Another is welcome.
    workers.push(worker_with(&address, &["--machine", "m9"]));
    coordinator.wait().expect(0);
    workers.into_iter().for_each(|worker| drop(worker.wait().expect(0)));
    let told = records(run);
    let taken_up = told.iter().rposition(|record| record["kind"] == "taken-up").unwrap();
    let joined: Vec<&Value> = told[taken_up..]
        .iter()
        .filter(|record| record["kind"] == "joined")
        .map(|it| &it["machine"])
        .collect();
    assert!(joined.contains(&&json!("m9")) && !joined.contains(&&json!(machine)), "{joined:?}");
    world().assert_alike(run, undisturbed());
    assert_no_strays(run);
}

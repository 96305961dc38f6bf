//! Rings whose moments are shared out (`ring.state_copies = 2`): a block's are with two workers. Whatever happens, the run is
//! the undisturbed one.

use std::collections::BTreeSet;

use anello_tests::{Done, Process, free_port, http, newest_checkpoint, signal, wait_until, without_seconds};

use super::faults::{Random, SHARED, rank_of};
use super::ring::{
    assert_sent_away, assert_undisturbed, blamed, events, records, start, start_on_machines,
    train_stages_that_freeze, worker,
};
use super::world;

/// Bytes of the moments of a block, and blocks of the model.
const BLOCK: u64 = 2 * 4 * 65536;
const BLOCKS: u64 = 4;

#[test]
fn moments_that_are_shared_out_are_those_of_one_worker_and_take_less_memory() {
    for workers in 2..=4 {
        let run = format!("shards-of-{workers}");
        let port = free_port().to_string();
        let coordinator = start(&run, workers, &[&SHARED[..], &["--external", "--port", &port]].concat());
        let address = format!("127.0.0.1:{port}");
        let processes: Vec<_> = (0..workers).map(|_| worker(&address)).collect();
        let mut held = BTreeSet::new();
        for done in processes.into_iter().map(Process::wait) {
            let told = done.log.split("moments_bytes=").skip(1);
            let bytes = |rest: &str| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u64>().ok();
            held.extend(told.filter_map(bytes));
            done.expect(0);
        }
        coordinator.wait().expect(0);
        assert_undisturbed(&run);
        // Of two, each has all; of four, half.
        let expected: &[u64] = match workers {
            2 => &[BLOCKS],
            3 => &[2, 3],
            _ => &[2],
        };
        let expected: BTreeSet<u64> = expected.iter().map(|blocks| blocks * BLOCK).collect();
        assert!(held.is_superset(&expected), "{workers} workers: {held:?}, and not {expected:?}");
    }
}

#[test]
fn workers_that_die_freeze_and_leave_change_nothing_1() {
    Random::Shared.train_all(1..=6);
}

#[test]
fn workers_that_die_freeze_and_leave_change_nothing_2() {
    Random::Shared.train_all(7..=12);
}

#[test]
fn whatever_happens_to_workers_and_coordinator_changes_nothing() {
    Random::SharedOutside.train_all(1..=5);
}

/// One death loses nothing: the moments are with the neighbours.
#[test]
fn one_death_costs_no_step() {
    let run = "shards-one-death";
    let place = world().folder.join(run);
    let mut process = start(run, 4, &SHARED);
    wait_until("it is so far", || newest_checkpoint(&place) >= 9 || process.ended());
    signal(process.children()[1], "KILL");
    process.wait().expect(0);
    let told = events(run);
    assert!(!told.contains("given up") && !told.contains("state from checkpoint"), "{told}");
    assert!(told.contains("with 3 workers from step"), "{told}");
    assert_undisturbed(run);
}

/// The step that the page of a run tells of, by what the run has written.
fn step_of(out: &str) -> Option<u64> {
    let port = out.split_once("page at http://127.0.0.1:")?.1.split_once('/')?.0.parse().ok()?;
    let (_, metrics) = http(port, "GET", "/metrics", &[], "");
    let line = metrics.lines().find(|line| line.starts_with("anello_step{"))?.to_owned();
    line.rsplit_once(' ')?.1.parse().ok()
}

/// The first step of the first ring of three, once there is one.
fn first_step_of_three(run: &str) -> Option<u64> {
    let told = world().anello(&["events", run]).out;
    let (_, after) = told.split_once("formed with 3 workers")?;
    after.split_once("from step ")?.1.split_once(',')?.0.parse().ok()
}

/// Of three, any two are neighbours: when both die together, what only they had is lost, and the run goes back to its last
/// checkpoint and says why.
#[test]
fn a_pair_that_dies_sends_the_run_back_to_its_checkpoint_in_words() {
    let run = "shards-pair";
    // Between two stages there is no checkpoint: the second is long, so that there are steps to lose for as long as it takes
    // to see that some are done.
    let stages =
        ["stages=[\"warmup\",\"stable\"]", "stage.stable.tokens=64000", "checkpoint.every_steps=1000"];
    let sets: Vec<&str> = stages.iter().flat_map(|set| ["--set", set]).collect();
    let one = [&["run", "small.toml", "--out", "shards-pair-one", "--sample", "0"], &sets[..]].concat();
    world().anello(&one).expect(0);

    let mut process = start(run, 3, &[&SHARED[..], &sets, &["--http", "127.0.0.1:0"]].concat());
    // All that is waited for stays true: that three train, and that steps of the second stage are done. Whoever else has
    // applied a step may be one behind the one that reports it.
    let mut first = None;
    wait_until("three are members", || {
        first = first_step_of_three(run);
        first.is_some() || process.ended()
    });
    let enough = first.map(|step| step.max(6) + 2);
    wait_until("there are steps to lose", || step_of(&process.out()) >= enough || process.ended());
    let children = process.children();
    let [one, other, _] = children[..] else { panic!("three workers, not {children:?}: {}", process.log()) };
    // Frozen first, so that neither hears of the other's end.
    for name in ["STOP", "KILL"] {
        [one, other].iter().for_each(|worker| signal(*worker, name));
    }
    process.wait().expect(0);
    let told = events(run);
    assert!(
        told.contains("is given up and the run goes back to its last checkpoint: the moments of block"),
        "{told}"
    );
    assert!(told.contains("state from checkpoint"), "{told}");
    world().anello(&["checkpoint", "diff", "shards-pair-one", run]).expect(0);
    let figures = |run| without_seconds(&world().anello(&["metrics", run, "--csv"]).expect(0));
    assert_eq!(figures(run), figures("shards-pair-one"));
}

/// Two that go together are let go one after the other, so that what only they have is handed over.
#[test]
fn two_that_are_preempted_together_hand_over_what_they_have() {
    let run = "shards-preempted";
    let place = world().folder.join(run);
    let mut process = start(run, 4, &SHARED);
    wait_until("it is so far", || newest_checkpoint(&place) >= 6 || process.ended());
    let children = process.children();
    for worker in &children[1..3] {
        signal(*worker, "TERM");
    }
    process.wait().expect(0);
    let told = events(run);
    assert!(!told.contains("given up") && !told.contains("state from checkpoint"), "{told}");
    assert_undisturbed(run);
}

/// A moment that flips is found where it is held twice, and nobody can tell who is right. A weight is held by all until the
/// next step, which takes it over from its owner: here a comparison comes first.
#[test]
fn a_flipped_bit_is_found_and_changes_nothing() {
    for fault in ["weights@18/1", "exp_avg@7/0", "exp_avg_sq@16/2"] {
        let run = format!("shards-flipped-{}", fault.replace(['@', '/'], "-"));
        let set = format!("ring.fault={fault}");
        let (coordinator, processes, _) =
            start_on_machines(&run, 3, &[&SHARED[..], &["--set", &set]].concat());
        let done: Vec<Done> = processes.into_iter().map(Process::wait).collect();
        coordinator.wait().expect(0);
        let told = events(&run);
        if fault.starts_with("weights") {
            assert!(told.contains("sent away after step") && told.contains("with 2 workers"), "{told}");
            assert_sent_away(&run, rank_of(fault), done);
        } else {
            let records = records(&run);
            let (fell_back, guilty) = blamed(&records, "fell-back", rank_of(fault));
            let reason = fell_back["reason"].as_str().unwrap_or_default();
            let (pair, _) = reason.split_once(" have different moments of the blocks of ").expect(reason);
            assert!(pair.contains(guilty), "{guilty} is not of the pair: {reason}");
            assert!(told.contains("is given up and the run goes back to its last checkpoint"), "{told}");
            assert!(!told.contains("sent away"), "{told}");
            done.into_iter().for_each(|done| drop(done.expect(0)));
        }
        assert_undisturbed(&run);
    }
}

/// What is frozen is neither sent around nor moved.
#[test]
fn stages_that_freeze_parameters_are_the_same() {
    train_stages_that_freeze("shards-late", [3, 4], &SHARED);
}

/// What was shared out is whole in a checkpoint: one process goes on with it, and a ring after that.
#[test]
fn one_process_goes_on_where_such_a_ring_stopped() {
    let run = "shards-both-ways";
    let place = world().folder.join(run);
    let mut process = start(run, 4, &SHARED);
    wait_until("it is so far", || newest_checkpoint(&place) >= 6 || process.ended());
    process.signal("INT");
    process.wait().expect(130);
    world().anello(&["run", "--resume", run, "--until", "18", "--sample", "0"]).expect(0);
    world().anello(&["run", "--resume", run, "--workers", "3", "--sample", "0"]).expect(0);
    assert_undisturbed(run);
}

//! Faults at random moments, faults that are aimed, and bits that flip: the run is the undisturbed one.

use std::ops::RangeInclusive;
use std::time::Duration;

use anello_tests::{
    Dice, Done, Process, checkpoint_in_writing, free_port, newest_checkpoint, signal, wait_until,
};

use super::ring::{
    STEPS, assert_no_strays, assert_sent_away, assert_undisturbed, blamed, events, records, rest, start,
    start_on_machines, worker,
};
use super::{joiners, kill, world};

/// Moments are shared out.
pub(super) const SHARED: [&str; 2] = ["--set", "ring.state_copies=2"];

/// Runs that are disturbed at random moments. One of a kind and a seed is always disturbed alike, as far as its processes keep time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Random {
    /// Workers of `anello run` are killed, frozen and preempted.
    Disturbed,
    /// Workers that nobody starts again come, go, die and freeze, and so does their coordinator.
    Outside,
    /// Workers and coordinators die while a checkpoint is written.
    Aimed,
    /// [`Self::Disturbed`] where moments are shared out.
    Shared,
    /// [`Self::Outside`] where moments are shared out.
    SharedOutside,
    /// [`Self::Outside`] in a longer run, in which workers come that are sent their state at some pace while the others train, with moments
    /// shared out or not.
    Joiners,
    /// One process is killed and resumed.
    Killed,
}

impl Random {
    const ALL: [Self; 7] = [
        Self::Disturbed,
        Self::Outside,
        Self::Aimed,
        Self::Shared,
        Self::SharedOutside,
        Self::Joiners,
        Self::Killed,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Disturbed => "disturbed",
            Self::Outside => "outside",
            Self::Aimed => "aimed",
            Self::Shared => "shared",
            Self::SharedOutside => "shared-outside",
            Self::Joiners => "joiners",
            Self::Killed => "killed",
        }
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The runs of these seeds. Returns how many faults came in time.
    pub(super) fn train_all(self, seeds: RangeInclusive<u64>) -> usize {
        seeds.map(|seed| self.train(seed)).sum()
    }

    /// Trains `NAME-SEED`, which must be the undisturbed run. Returns how many faults came in time.
    fn train(self, seed: u64) -> usize {
        let _replay = Replay(self, seed);
        let (run, mut dice) = (format!("{}-{seed}", self.name()), Dice(seed));
        let struck = match self {
            Self::Disturbed => {
                let workers = 2 + dice.below(3) as u32;
                disturb(dice, &run, workers, &[])
            }
            Self::Shared => {
                let workers = 3 + dice.below(2) as u32;
                disturb(dice, &run, workers, &SHARED)
            }
            Self::Outside => {
                let wanted = 2 + dice.below(3) as u32;
                disturb_from_outside(dice, &run, wanted, STEPS, &[])
            }
            Self::SharedOutside => disturb_from_outside(dice, &run, 4, STEPS, &SHARED),
            Self::Joiners => {
                let shared: &[&str] = if dice.below(2) == 0 { &SHARED } else { &[] };
                let pace = ["4KiB", "256KiB", "1MiB"][dice.below(3) as usize];
                let pace = ["--set", &format!("ring.state_bandwidth={pace}")];
                let set = [shared, &pace, &joiners::RANDOM].concat();
                disturb_from_outside(dice, &run, 4, joiners::RANDOM_STEPS, &set)
            }
            Self::Aimed => aim(dice, &run),
            Self::Killed => kill::kill_and_resume(dice, &run),
        };
        println!("{run}: {struck:?}");
        match self {
            Self::Joiners => {
                world().assert_alike(&run, joiners::undisturbed_at_random());
                assert_no_strays(&run);
            }
            Self::Killed => kill::assert_undisturbed(&run),
            _ => assert_undisturbed(&run),
        }
        struck.len()
    }
}

/// Says how to see a failure again.
struct Replay(Random, u64);

impl Replay {
    fn command(&self) -> String {
        let Self(kind, seed) = self;
        let soak = "cargo test -p anello-tests --test e2e -- --ignored faults::soak --nocapture";
        format!("ANELLO_KIND={} ANELLO_SEED={seed} ANELLO_SOAK_RUNS=1 {soak}", kind.name())
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay: {}", self.command());
        }
    }
}

/// Kills, freezes and preempts workers at random moments.
fn disturb(mut dice: Dice, run: &str, workers: u32, set: &[&str]) -> Vec<String> {
    let place = world().folder.join(run);
    let mut process = start(run, workers, set);
    let (mut struck, mut preempted) = (Vec::new(), 0);
    for fault in 0..4 {
        let from = fault * STEPS / 5 + dice.below(STEPS / 5);
        wait_until("it is so far", || newest_checkpoint(&place) >= from || process.ended());
        rest(Duration::from_millis(dice.below(60)));
        let children = process.children();
        if children.is_empty() {
            continue;
        }
        let victim = children[dice.below(children.len() as u64) as usize];
        match dice.below(4) {
            // One that goes when it is asked to is not replaced: one must stay.
            0 if preempted + 1 < workers => {
                preempted += 1;
                signal(victim, "TERM");
                struck.push("preempted".to_owned());
            }
            1 => {
                signal(victim, "STOP");
                rest(Duration::from_millis(200 + dice.below(1500)));
                signal(victim, "CONT");
                struck.push("frozen".to_owned());
            }
            _ => {
                signal(victim, "KILL");
                struck.push("killed".to_owned());
            }
        }
    }
    process.wait().expect(0);
    assert!(!struck.is_empty(), "it was over too soon");
    struck
}

/// A coordinator that takes a run up whose coordinator is dead.
pub(super) fn taken_up(run: &str, wanted: u32, port: &str) -> Process {
    let wanted = wanted.to_string();
    let resume = ["run", "--resume", run, "--detection", "1s", "--workers", &wanted, "--sample", "0"];
    Process::start(&world().folder, &[&resume[..], &["--external", "--port", port]].concat())
}

/// Workers that nobody starts again, and a coordinator that is not spared: killed and taken over, frozen, joined, left.
fn disturb_from_outside(mut dice: Dice, run: &str, wanted: u32, steps: u64, set: &[&str]) -> Vec<String> {
    let port = free_port().to_string();
    let (place, address) = (world().folder.join(run), format!("127.0.0.1:{port}"));
    let more = ["--external", "--port", &port];
    let mut coordinator = start(run, wanted, &[&more[..], set].concat());
    let mut workers: Vec<Process> =
        (0..1 + dice.below(u64::from(wanted))).map(|_| worker(&address)).collect();
    wait_until("the run is there", || place.join("events/00000001.json").exists() || coordinator.ended());
    let mut struck = Vec::new();
    for fault in 0..6 {
        let from = fault * steps / 7 + dice.below(steps / 7);
        wait_until("it is so far", || newest_checkpoint(&place) >= from || coordinator.ended());
        rest(Duration::from_millis(dice.below(60)));
        if coordinator.ended() {
            break;
        }
        let at = dice.below(workers.len() as u64) as usize;
        let frozen = Duration::from_millis(200 + dice.below(1500));
        match dice.below(6) {
            0 => {
                workers.push(worker(&address));
                struck.push("joined".to_owned());
            }
            1 => {
                workers.push(worker(&address));
                signal(workers[at].id(), "TERM");
                struck.push("asked to go".to_owned());
            }
            2 => {
                for (name, pause) in [("STOP", frozen), ("CONT", Duration::ZERO)] {
                    signal(workers[at].id(), name);
                    rest(pause);
                }
                struck.push("frozen".to_owned());
            }
            3 => {
                for (name, pause) in [("STOP", frozen), ("CONT", Duration::ZERO)] {
                    signal(coordinator.id(), name);
                    rest(pause);
                }
                struck.push("coordinator frozen".to_owned());
            }
            4 => {
                coordinator.kill();
                rest(Duration::from_millis(dice.below(1200)));
                coordinator = taken_up(run, wanted, &port);
                struck.push("coordinator killed".to_owned());
            }
            _ => {
                workers.push(worker(&address));
                workers.swap_remove(at).kill();
                struck.push("killed".to_owned());
            }
        }
    }
    coordinator.wait().expect(0);
    drop(workers);
    struck
}

/// Kills that come while a checkpoint has parts and no manifest: of one worker of three, of two that follow each other in the ring, or of
/// the coordinator, which is taken over at once.
fn aim(mut dice: Dice, run: &str) -> Vec<String> {
    let port = free_port().to_string();
    let (place, address) = (world().folder.join(run), format!("127.0.0.1:{port}"));
    let external = ["--external", "--port", &port];
    // A part a block, so that there are some.
    let parts = ["--set", "checkpoint.part_bytes=1MiB", "--set", "checkpoint.every_steps=3"];
    let mut coordinator = start(run, 3, &[&external[..], &parts].concat());
    let mut workers: Vec<Process> = (0..3).map(|_| worker(&address)).collect();
    let mut struck = Vec::new();
    for fault in 0..4 {
        let from = fault * STEPS / 6 + dice.below(3);
        let mut in_time = false;
        wait_until("a checkpoint is being written", || {
            in_time = newest_checkpoint(&place) >= from && checkpoint_in_writing(&place);
            in_time || coordinator.ended()
        });
        if !in_time {
            break;
        }
        match dice.below(3) {
            0 => {
                coordinator.kill();
                coordinator = taken_up(run, 3, &port);
                struck.push("the coordinator".to_owned());
            }
            number => {
                for _ in 0..number {
                    workers.push(worker(&address));
                    workers.remove(0).kill();
                }
                struck.push(if number == 1 { "a worker" } else { "two workers" }.to_owned());
            }
        }
    }
    coordinator.wait().expect(0);
    drop(workers);
    struck
}

/// `make soak`: whole runs with faults of new seeds from `ANELLO_SEED` on, until stopped, or `ANELLO_SOAK_RUNS` of them; of every kind in
/// turn, or of `ANELLO_KIND`.
#[test]
#[ignore = "runs until it is stopped; see `make soak`"]
fn soak() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let kind = std::env::var("ANELLO_KIND").ok();
    let kind = kind.map(|name| Random::named(&name).unwrap_or_else(|| panic!("{name} is no kind of run")));
    let first = number("ANELLO_SEED").unwrap_or(1 << 32);
    for seed in first..first.saturating_add(number("ANELLO_SOAK_RUNS").unwrap_or(u64::MAX - first)) {
        let kind = kind.unwrap_or(Random::ALL[(seed % Random::ALL.len() as u64) as usize]);
        kind.train(seed);
        // What was right need not be kept: hundreds of runs.
        let _ = std::fs::remove_dir_all(world().folder.join(format!("{}-{seed}", kind.name())));
    }
}

#[test]
fn what_a_failure_prints_is_the_very_run() {
    for kind in Random::ALL {
        let command = Replay(kind, 1 << 33).command();
        let words: Vec<&str> = command.split(' ').take_while(|word| *word != "cargo").collect();
        let kind_of = |word: &str| Random::named(word.strip_prefix("ANELLO_KIND=")?);
        let [named, seed, "ANELLO_SOAK_RUNS=1"] = words[..] else { panic!("{command}") };
        assert_eq!((kind_of(named), seed), (Some(kind), "ANELLO_SEED=8589934592"));
    }
}

#[test]
fn whatever_happens_to_workers_and_coordinator_changes_nothing() {
    Random::Outside.train_all(1..=5);
}

#[test]
fn who_dies_while_a_checkpoint_is_written_changes_nothing() {
    let struck = Random::Aimed.train_all(1..=4);
    assert!(struck >= 8, "only {struck} of 16 faults came while a checkpoint was written");
}

#[test]
fn workers_that_die_freeze_and_leave_change_nothing_1() {
    Random::Disturbed.train_all(1..=8);
}

#[test]
fn workers_that_die_freeze_and_leave_change_nothing_2() {
    Random::Disturbed.train_all(9..=16);
}

/// The rank in a `ring.fault`.
pub(super) fn rank_of(fault: &str) -> usize {
    fault.rsplit_once('/').and_then(|(_, rank)| rank.trim_end_matches('*').parse().ok()).expect("…/RANK")
}

/// A bit that flips in one replica: of three, the one that differs is named and sent away; of two, nobody can tell, and
/// the run goes on from its checkpoint. Either way it is the undisturbed run.
#[test]
fn a_flipped_bit_is_found_and_changes_nothing() {
    for (workers, fault) in [(3, "weights@16/1"), (3, "exp_avg@7/0"), (2, "exp_avg_sq@16/1")] {
        let run = format!("ring-flipped-{}", fault.replace(['@', '/'], "-"));
        let set = format!("ring.fault={fault}");
        let (coordinator, processes, _) = start_on_machines(&run, workers, &["--set", &set]);
        let done: Vec<Done> = processes.into_iter().map(Process::wait).collect();
        coordinator.wait().expect(0);
        let told = events(&run);
        if workers == 3 {
            assert!(
                told.contains("sent away after step") && told.contains("in block 0 (model.embed_tokens"),
                "{told}"
            );
            assert!(told.contains("with 2 workers"), "{told}");
            assert_sent_away(&run, rank_of(fault), done);
        } else {
            assert!(told.contains("state from checkpoint") && !told.contains("sent away"), "{told}");
            done.into_iter().for_each(|done| drop(done.expect(0)));
        }
        assert_undisturbed(&run);
    }
}

/// A bit that flips on its way is seen by whoever receives it, who says of whom it was; the step is made again.
#[test]
fn a_bit_that_flips_on_the_wire_is_found_and_changes_nothing() {
    for (copies, rank) in [("all", 1), ("2", 0)] {
        let run = format!("ring-flipped-wire-{copies}");
        let (fault, copies) = (format!("ring.fault=wire@7/{rank}"), format!("ring.state_copies={copies}"));
        start(&run, 3, &["--set", &fault, "--set", &copies]).wait().expect(0);
        let told = events(&run);
        let records = records(&run);
        let (broke, sender) = blamed(&records, "broke", rank);
        let reason = broke["reason"].as_str().unwrap_or_default();
        assert!(reason.starts_with(&format!("rank {rank} sent block ")), "{broke}");
        assert!(reason.contains(" with a wrong checksum in its payload"), "{broke}");
        assert!(reason.ends_with(&format!(" (rank {rank} is worker {sender})")), "{broke}, and not {sender}");
        assert_ne!(broke["worker"], sender, "whoever receives it says so: {broke}");
        assert!(told.contains(" broke after step 7: "), "{told}");
        assert_eq!(told.matches(" broke after ").count(), 1, "{told}");
        assert!(!told.contains("state from checkpoint") && !told.contains(" lost ("), "{told}");
        assert_undisturbed(&run);
    }
}

/// A gradient that one worker computes wrongly reaches all replicas alike: only a second computation can see it.
#[test]
fn a_wrong_gradient_is_found_before_it_is_applied() {
    for workers in [3, 2] {
        let run = format!("ring-wrong-gradient-{workers}");
        let set = ["--set", "ring.fault=gradient@5/1", "--set", "ring.spot_check_every_steps=1"];
        let (coordinator, processes, _) = start_on_machines(&run, workers, &set);
        let done: Vec<Done> = processes.into_iter().map(Process::wait).collect();
        coordinator.wait().expect(0);
        let told = events(&run);
        if workers == 3 {
            assert!(
                told.contains("computes another gradient of lane") && told.contains("with 2 workers"),
                "{told}"
            );
            assert_sent_away(&run, 1, done);
        } else {
            assert!(told.contains("state from checkpoint") && !told.contains("sent away"), "{told}");
            done.into_iter().for_each(|done| drop(done.expect(0)));
        }
        assert_undisturbed(&run);
    }
}

/// A step that fails each time that it is made: from what the workers hold, from the last checkpoint, and then the run ends and says
/// why. What was before that step stays.
#[test]
fn a_step_that_fails_again_and_again_ends_the_run_in_words() {
    let run = "ring-fails-again";
    let fault = ["--set", "ring.fault=wire@7/1*"];
    let (coordinator, processes, _) = start_on_machines(run, 3, &fault);
    let done = coordinator.wait();
    let why = "step 7 has failed 4 times: rank 1 sent block ";
    assert!(done.log.contains(&format!("error: {why}")), "{done:?}");
    done.expect(1);
    for done in processes.into_iter().map(Process::wait) {
        assert!(done.log.contains(why), "{done:?}");
        done.expect(7);
    }
    let all = records(run);
    let of = |kind: &str| all.iter().filter(|record| record["kind"] == kind).collect::<Vec<_>>();
    let rings: Vec<(&str, u64)> = of("formed")
        .into_iter()
        .map(|ring| (ring["source"].as_str().unwrap(), ring["start"].as_u64().unwrap()))
        .collect();
    assert_eq!(rings, [("seed", 0), ("peers", 7), ("checkpoint", 6), ("checkpoint", 6)], "{}", events(run));
    assert_eq!(of("broke").len(), 3, "{}", events(run));
    let [ended] = of("ended")[..] else { panic!("{}", events(run)) };
    assert_eq!(ended["outcome"], "failed");
    let (ended, sender) = blamed(&all, "ended", 1);
    let reason = ended["reason"].as_str().unwrap();
    assert!(reason.starts_with(why) && reason.ends_with(&format!("is worker {sender})")), "{ended}");
    assert_eq!(newest_checkpoint(&world().folder.join(run)), 6);
    world().anello(&["checkpoint", "verify", run]).expect(0);
    // One process has no wire.
    world().anello(&["run", "--resume", run, "--sample", "0"]).expect(0);
    assert_undisturbed(run);
}

//! One seed, one history: the membership core and the workers' own machine over a fake network, clock and store.
//!
//! Phase 1 injects deaths, freezes, cuts, delays, preemptions, pairs and halves that do not reach one another, coordinator crashes, stale
//! coordinators and sleeping ones, store errors, failures of steps and flipped bits; the invariants hold after every event. In phase 2 faults stop, and the run must finish.
//! A failure prints the seed: `ANELLO_SEED=n cargo test -p anello-coordinator --lib one_seed -- --nocapture` replays it.

pub(super) mod invariants;
mod world;

pub(super) use world::Bug;
use world::{Report, World};

fn run(seed: u64, bug: Option<Bug>) -> Result<Report, String> {
    World::new(seed, bug, false).run()
}

/// Ends a test with the command that replays what it has found: `one_seed` runs each kind of world.
fn fail(seed: u64, failure: &str) -> ! {
    panic!(
        "seed {seed}: {failure}\nreplay: ANELLO_SEED={seed} cargo test -p anello-coordinator --lib one_seed -- --nocapture"
    )
}

/// Runs `seeds`; the first failure ends the test with the command that replays it.
fn run_all(seeds: std::ops::Range<u64>) -> Report {
    let mut total = Report::default();
    for seed in seeds {
        match run(seed, None) {
            Ok(report) => total.add(&report),
            Err(failure) => fail(seed, &failure),
        }
    }
    total
}

/// Schedules in each of the four tests below, which the test runner spreads over the cores.
const SCHEDULES: u64 = 25_000;

#[test]
fn schedules_first_quarter() {
    let total = run_all(0..SCHEDULES);
    println!("{total:?}");
    // A simulation in which nothing happens proves nothing.
    for (what, count) in total.counts() {
        assert!(count > SCHEDULES / 100, "{what} happened {count} times in {SCHEDULES} schedules");
    }
}

#[test]
fn schedules_second_quarter() {
    run_all(SCHEDULES..2 * SCHEDULES);
}

#[test]
fn schedules_third_quarter() {
    run_all(2 * SCHEDULES..3 * SCHEDULES);
}

#[test]
fn schedules_fourth_quarter() {
    run_all(3 * SCHEDULES..4 * SCHEDULES);
}

#[test]
fn the_same_seed_is_the_same_history() {
    for seed in 0..50 {
        let (one, two) = (run(seed, None).unwrap(), run(seed, None).unwrap());
        assert_eq!(one, two, "seed {seed}");
    }
    let hashes: std::collections::BTreeSet<u64> =
        (0..50).map(|seed| run(seed, None).unwrap().trace).collect();
    assert!(hashes.len() > 45, "histories are alike: {}", hashes.len());
}

/// Where nothing else happens, a network that is cut in two costs one ring each time that both halves are tried together.
#[test]
fn a_network_that_is_cut_in_two_costs_one_ring() {
    let mut healed = 0;
    for seed in 0..3000 {
        match World::halved(seed, false).run() {
            Ok(report) => healed += report.healed,
            Err(failure) => fail(seed, &failure),
        }
    }
    assert!(healed > 2000, "{healed} rings were broken by a cut");
}

/// Members that go or die while a ring recovers from the one before, again and again: it converges once that is over.
#[test]
fn a_ring_that_loses_a_member_whenever_it_forms_forms_in_the_end() {
    let mut total = Report::default();
    for seed in 0..3000 {
        match World::hunted(seed, false).run() {
            Ok(report) => total.add(&report),
            Err(failure) => fail(seed, &failure),
        }
    }
    let struck = total.preemptions + total.kills;
    assert!(struck > 30_000 && total.preemptions > 10_000 && total.kills > 10_000, "{total:?}");
}

/// Each classic mistake, put in by hand, is found, by what it breaks.
#[test]
fn planted_bugs_are_found() {
    for (bug, breaks) in [
        (Bug::LostVote, "a generation was formed while worker"),
        (Bug::StaleGradient, "is not that of an undisturbed run"),
        (Bug::EarlyManifest, "is committed and the part of worker"),
        (Bug::AbandonedCheckpoint, "the job ends without checkpoint"),
        (Bug::DroppedShard, "no member has the moments of block"),
        (Bug::ForgottenRows, "lacks figures of steps before it"),
        (Bug::KeptReplica, "is not that of an undisturbed run"),
    ] {
        let found = (0..10_000).find_map(|seed| run(seed, Some(bug)).err().map(|failure| (seed, failure)));
        let (seed, failure) = found.unwrap_or_else(|| panic!("{bug:?} was not found within 10 000 seeds"));
        println!("{bug:?}: seed {seed}: {failure}");
        assert!(failure.contains(breaks), "{bug:?} of seed {seed} breaks something else: {failure}");
    }
}

/// Replays `ANELLO_SEED` with its trace; without it, a few seeds.
#[test]
fn one_seed() {
    let seed =
        std::env::var("ANELLO_SEED").ok().map(|seed| seed.parse::<u64>().expect("ANELLO_SEED is a number"));
    for at in seed.map_or(0..3, |seed| seed..seed + 1) {
        let told = seed.is_some();
        for world in [World::new(at, None, told), World::halved(at, told), World::hunted(at, told)] {
            let outcome = world.run();
            assert!(outcome.is_ok(), "seed {at}: {outcome:?}");
        }
    }
}

/// `make soak`: new seeds until stopped, or for `ANELLO_SOAK_SCHEDULES`.
#[test]
#[ignore = "runs until it is stopped; see `make soak`"]
fn soak() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let first = number("ANELLO_SEED").unwrap_or(1 << 32);
    let last = number("ANELLO_SOAK_SCHEDULES").map_or(u64::MAX, |count| first + count);
    let mut at = first;
    while at < last {
        let next = (at + 100_000).min(last);
        println!("seeds {at}..{next}: {:?}", run_all(at..next));
        at = next;
    }
}

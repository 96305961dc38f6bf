//! `kill -9` at any moment, then `--resume`: the same bits.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anello_tests::{Dice, Process, checkpoint_in_writing, newest_checkpoint, objects, wait_until};

use super::faults::Random;
use super::ring::assert_no_strays;
use super::world;

/// Kills of one run before it may go to its end.
const KILLS: u64 = 5;
/// Steps of the run.
const STEPS: u64 = 31;

/// Kills one process at random moments, and resumes it.
pub(super) fn kill_and_resume(mut dice: Dice, run: &str) -> Vec<String> {
    let world = world();
    let place = world.folder.join(run);
    let mut arguments = vec!["run", "small.toml", "--out", run];
    let mut moments = Vec::new();
    for kill in 0..KILLS {
        let mut process = Process::start(&world.folder, &arguments);
        // First to some step of a share of the run of its own, so that the kills are all over the stages.
        let share = STEPS / KILLS;
        let from = kill * share + dice.below(share);
        wait_until("it is so far", || newest_checkpoint(&place) >= from || process.ended());
        let before = objects(&place);
        let new = |before: &BTreeSet<PathBuf>| objects(&place).difference(before).count();
        let moment = match dice.below(3) {
            0 => {
                let count = 1 + dice.below(8) as usize;
                wait_until("it has written so much", || new(&before) >= count || process.ended());
                format!("{count} objects later")
            }
            1 => {
                wait_until("it writes a checkpoint", || {
                    new(&before) > 0 && checkpoint_in_writing(&place) || process.ended()
                });
                "in a checkpoint".to_owned()
            }
            _ => {
                let (began, after) = (Instant::now(), Duration::from_millis(dice.below(150)));
                wait_until("its time has come", || began.elapsed() >= after || process.ended());
                format!("{after:?} later")
            }
        };
        let newest = newest_checkpoint(&place);
        let moment = format!("after checkpoint {newest}, {moment}");
        let struck = process.kill();
        let verified = world.anello(&["checkpoint", "verify", run]);
        let none = verified.status.code() == Some(2) && verified.log.contains("no checkpoint");
        assert!(none || verified.status.success(), "killed {moment}: {verified:?}");
        moments.extend(struck.then_some(moment));
        if place.join("config.toml").exists() {
            arguments = vec!["run", "--resume", run];
        }
    }
    assert!(!moments.is_empty(), "no kill was in time");
    world.anello(&arguments).expect(0);
    moments
}

pub(super) fn assert_undisturbed(run: &str) {
    world().assert_undisturbed(run);
    world().assert_same_checkpoints(run);
    assert_no_strays(run);
}

#[test]
fn a_run_killed_at_random_moments_is_the_same_run_1() {
    Random::Killed.train_all(1..=1);
}

#[test]
fn a_run_killed_at_random_moments_is_the_same_run_2() {
    Random::Killed.train_all(2..=2);
}

#[test]
fn a_run_killed_at_random_moments_is_the_same_run_3() {
    Random::Killed.train_all(3..=3);
}

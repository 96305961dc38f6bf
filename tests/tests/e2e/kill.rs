//! `kill -9` at any moment, then `--resume`: the same bits.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anello_tests::{Dice, Process, checkpoint_in_writing, newest_checkpoint, objects, wait_until};

use super::world;

/// Kills of one run before it may go to its end.
const KILLS: u64 = 5;
/// Steps of the run.
const STEPS: u64 = 31;

fn killed_and_resumed(seed: u64) {
    let world = world();
    let run = format!("killed-{seed}");
    let place = world.folder.join(&run);
    let mut dice = Dice(seed);
    let mut arguments = vec!["run", "small.toml", "--out", &run];
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
        let verified = world.anello(&["checkpoint", "verify", &run]);
        let none = verified.status.code() == Some(2) && verified.log.contains("no checkpoint");
        assert!(none || verified.status.success(), "seed {seed}, killed {moment}: {verified:?}");
        moments.push((moment, struck));
        if place.join("config.toml").exists() {
            arguments = vec!["run", "--resume", &run];
        }
    }
    println!("seed {seed}: killed {moments:?}");
    assert!(moments.iter().any(|(_, struck)| *struck), "seed {seed}: no kill was in time");
    world.anello(&arguments).expect(0);
    world.assert_undisturbed(&run);
    world.assert_same_checkpoints(&run);
    let strays = objects(&place).into_iter().find(|path| path.to_string_lossy().contains('#'));
    assert_eq!(strays, None, "seed {seed}: the kills have left something");
}

#[test]
fn a_run_killed_at_random_moments_is_the_same_run_1() {
    killed_and_resumed(1);
}

#[test]
fn a_run_killed_at_random_moments_is_the_same_run_2() {
    killed_and_resumed(2);
}

#[test]
fn a_run_killed_at_random_moments_is_the_same_run_3() {
    killed_and_resumed(3);
}

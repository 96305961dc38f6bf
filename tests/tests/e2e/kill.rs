//! `kill -9` at any moment, then `--resume`: the same bits.

use std::time::{Duration, Instant};

use anello_tests::{Dice, Process, checkpoint_in_writing, objects, wait_until};

use super::world;

/// Kills of one run before it may go to its end.
const KILLS: u32 = 6;

fn killed_and_resumed(seed: u64) {
    let world = world();
    let run = format!("killed-{seed}");
    let place = world.folder.join(&run);
    let mut dice = Dice(seed);
    let mut arguments = vec!["run", "small.toml", "--out", &run];
    let mut moments = Vec::new();
    for _ in 0..KILLS {
        let before = objects(&place);
        let mut process = Process::start(&world.folder, &arguments);
        let moment = match dice.below(3) {
            0 => {
                let count = 1 + dice.below(14) as usize;
                wait_until("it has written so much", || {
                    objects(&place).difference(&before).count() >= count || process.ended()
                });
                format!("after {count} new objects")
            }
            1 => {
                let ready = || objects(&place).iter().any(|path| path.ends_with("config.toml"));
                // Left by the kill before: it is written again first.
                let stale = checkpoint_in_writing(&place);
                wait_until("it writes a checkpoint", || {
                    ready() && !stale && checkpoint_in_writing(&place)
                        || stale && objects(&place).difference(&before).count() >= 3
                        || process.ended()
                });
                "in a checkpoint".to_owned()
            }
            _ => {
                wait_until("it has begun", || objects(&place).len() > before.len() || process.ended());
                let (began, after) = (Instant::now(), Duration::from_millis(dice.below(700)));
                wait_until("its time has come", || began.elapsed() >= after || process.ended());
                format!("{after:?} after its first object")
            }
        };
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

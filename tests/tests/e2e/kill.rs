//! `kill -9` at any moment, then `--resume`: the same bits.

use std::collections::BTreeSet;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anello_tests::{Dice, Process, checkpoint_in_writing, newest_checkpoint, objects, signal, wait_until};

use super::faults::Random;
use super::ring::{assert_no_strays, rest};
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

/// For processes that nobody has use for to be gone, on a busy machine.
const GOES_WITHIN: Duration = Duration::from_secs(20);

/// Processes that have a word in their environment, as all have that were started by one that has it, directly or not.
fn marked(mark: &str) -> Vec<u32> {
    let is_marked = |id: &u32| {
        let environment = std::fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    };
    let ids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    ids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_marked).collect()
}

/// What a run folder is documented to hold.
fn is_of_a_run(object: &Path) -> bool {
    let names: Vec<&str> = object.iter().filter_map(|name| name.to_str()).collect();
    match names[..] {
        ["config.toml" | "environment.json" | "latest.json"] => true,
        ["events", name] => name.ends_with(".json"),
        ["metrics", name] => name.ends_with(".parquet"),
        ["checkpoints", _, "manifest.json"] => true,
        ["checkpoints", _, name] => name.starts_with("part-") && name.ends_with(".safetensors"),
        _ => false,
    }
}

/// Whoever of a run is killed, alone or with all others: no process of it stays, no shared memory, and no file but the run folder's; and a
/// run that is started at once goes on.
#[test]
fn nothing_outlives_a_process() {
    for (run, all) in [("killed-all", true), ("killed-parent", false)] {
        // A folder of its own, also for whatever is temporary or of a user.
        let folder = world().folder.join(format!("{run}-here"));
        for own in ["", "tmp", "home"] {
            std::fs::create_dir_all(folder.join(own)).unwrap();
        }
        for name in ["small.toml", "tokenizer.json", "data"] {
            symlink(world().folder.join(name), folder.join(name)).unwrap();
        }
        let place = world().folder.join(run);
        let out = place.display().to_string();
        let mark = format!("ANELLO_TEST_MARK={run}-{}", std::process::id());
        let path = |name: &str| folder.join(name).display().to_string();
        let (name, value) = mark.split_once('=').unwrap();
        let variables = [(name, value.to_owned()), ("TMPDIR", path("tmp")), ("HOME", path("home"))];
        let shared = || objects(Path::new("/dev/shm"));
        let (shared_before, files_before) = (shared(), objects(&folder));
        let left = || -> Vec<PathBuf> {
            let new = objects(&folder).difference(&files_before).cloned().collect::<Vec<_>>();
            new.into_iter().filter(|path| !path.starts_with(folder.join("logs"))).collect()
        };

        let ring = ["--workers", "3", "--sample", "0"];
        let begin = [&["run", "small.toml", "--out", &out][..], &ring].concat();
        let mut process = Process::start_with(&folder, &begin, &variables);
        wait_until("it is so far", || newest_checkpoint(&place) >= 6 || process.ended());
        let ids = marked(&mark);
        assert_eq!(ids.len(), 4, "it and three workers: {}", process.log());
        let began = Instant::now();
        if all {
            ids.iter().for_each(|id| signal(*id, "KILL"));
        }
        process.kill();
        assert!(newest_checkpoint(&place) < STEPS, "it was over too soon");
        while !marked(&mark).is_empty() && began.elapsed() < GOES_WITHIN {
            rest(Duration::from_millis(20));
        }
        let stays = marked(&mark);
        stays.iter().for_each(|id| signal(*id, "KILL"));
        assert!(stays.is_empty(), "after {GOES_WITHIN:?} processes of it are there: {stays:?}");
        assert_eq!(left(), Vec::<PathBuf>::new(), "all that it left");
        // Others come and go there.
        wait_until("what is new in shared memory is gone", || shared().is_subset(&shared_before));
        let strays = objects(&place).into_iter().filter(|path| !path.to_string_lossy().contains('#'));
        let strays: Vec<_> = strays.filter(|path| !is_of_a_run(path.strip_prefix(&place).unwrap())).collect();
        assert!(strays.is_empty(), "{strays:?}");

        let resume = [&["run", "--resume", &out][..], &ring].concat();
        Process::start_with(&folder, &resume, &variables).wait().expect(0);
        assert_eq!((marked(&mark), left()), (Vec::new(), Vec::new()), "all that it left");
        assert_undisturbed(run);
        let strays: Vec<_> = objects(&place)
            .into_iter()
            .filter(|path| !is_of_a_run(path.strip_prefix(&place).unwrap()))
            .collect();
        assert!(strays.is_empty(), "{strays:?}");
    }
}

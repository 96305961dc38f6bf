//! Two processes on one run.

use anello_tests::{Process, objects, wait_until};

use super::world;

#[test]
fn of_two_processes_on_a_run_one_is_told_to_leave() {
    let (world, run) = (world(), "twice");
    let place = world.folder.join(run);
    let mut first = Process::start(&world.folder, &["run", "small.toml", "--out", run]);
    wait_until("a checkpoint is written", || {
        objects(&place).iter().any(|path| path.ends_with("manifest.json")) || first.ended()
    });
    let second = Process::start(&world.folder, &["run", "--resume", run]);
    let ends = [first.wait(), second.wait()];
    let (well, badly): (Vec<_>, Vec<_>) = ends.into_iter().partition(|done| done.status.success());
    assert!(!well.is_empty(), "both have failed: {badly:?}");
    for done in badly {
        let log = done.log.clone();
        done.expect(1);
        assert!(log.contains("was written by another process; only one may train a run"), "{log}");
    }
    world.assert_undisturbed(run);
}

#[test]
fn a_second_run_in_a_folder_is_refused() {
    let done = world().anello(&["run", "small.toml", "--out", "undisturbed"]);
    assert!(done.log.contains("undisturbed holds a run already; resume it"), "{done:?}");
    done.expect(2);
    world().anello(&["run", "--resume", "undisturbed"]).expect(0);
    world().assert_undisturbed("undisturbed");
}

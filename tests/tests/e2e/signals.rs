//! Ctrl-C once, twice, and SIGTERM.

use anello_tests::{Process, objects, wait_until};

use super::world;

fn started(run: &str) -> Process {
    let place = world().folder.join(run);
    let mut process = Process::start(&world().folder, &["run", "small.toml", "--out", run]);
    wait_until("a checkpoint is written", || {
        objects(&place).iter().any(|path| path.ends_with("manifest.json")) || process.ended()
    });
    assert!(!process.ended(), "it was over too soon\nout: {}\nlog: {}", process.out(), process.log());
    process
}

fn last_event(run: &str) -> String {
    world().anello(&["events", run]).expect(0).lines().last().unwrap_or_default().to_owned()
}

#[test]
fn one_signal_finishes_the_step_saves_it_and_leaves() {
    for signal in ["INT", "TERM"] {
        let run = format!("signal-{signal}");
        let process = started(&run);
        process.signal(signal);
        let out = process.wait().expect(130);
        assert!(out.contains("stopping: this step is finished and a checkpoint taken"), "{out}");
        assert!(last_event(&run).contains("stopped"), "{}", last_event(&run));
        world().anello(&["checkpoint", "verify", &run]).expect(0);
        let steps = world().anello(&["metrics", &run]).expect(0).lines().count() - 1;
        let saved = world().folder.join(&run).join(format!("checkpoints/{steps:010}/manifest.json"));
        assert!(saved.exists(), "the last step, {steps}, is saved");
        world().anello(&["run", "--resume", &run]).expect(0);
        world().assert_undisturbed(&run);
    }
}

#[test]
fn a_second_signal_leaves_at_once() {
    let run = "signal-twice";
    let process = started(run);
    // Stopped, it gets both when it goes on: two of one kind would become one.
    for signal in ["STOP", "INT", "TERM", "CONT"] {
        process.signal(signal);
    }
    process.wait().expect(131);
    assert!(!last_event(run).contains("stopped"), "it did not take its time: {}", last_event(run));
    world().anello(&["run", "--resume", run]).expect(0);
    world().assert_undisturbed(run);
}

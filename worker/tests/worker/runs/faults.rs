//! A store that fails, and two processes on one run.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anello_store::Store;
use anello_store::events::Event;
use anello_worker::{Control, Ended, Resume, Run, Training};

use super::store::{Fate, TestStore};
use super::*;

/// A new run that tries a failed checkpoint again at once.
fn create(store: &Store, data: &Data) -> Run {
    let mut run = Run::create(store.clone(), data.config()).unwrap();
    run.retry = Duration::ZERO;
    run
}

fn failures(notices: &[Notice]) -> Vec<u64> {
    let failed = notices.iter().filter_map(|notice| match notice {
        Notice::CheckpointFailed { step, cause } => {
            assert!(cause.contains("no space left on device"), "the cause in words: {cause}");
            Some(*step)
        }
        _ => None,
    });
    failed.collect()
}

#[test]
fn a_full_disk_costs_a_checkpoint_and_not_the_run() {
    let data = Data::new();
    let store = TestStore::new();
    // Full from the checkpoint after step 7 on, until three attempts have failed.
    let mut refusals = 0;
    store.rule(move |path| {
        let late = path.starts_with("checkpoints/")
            && !path.contains("/0000000003/")
            && !path.contains("/0000000004/");
        if late && path.contains("part-00000") && refusals < 3 {
            refusals += 1;
            return Fate::DiskFull;
        }
        Fate::Done
    });
    let (ended, notices) = drive(create(&store.run(), &data), None);
    assert_eq!(ended.unwrap(), reference().ended);
    assert_finished(&store.run(), "the disk was full for a while");
    let failed = failures(&notices);
    assert_eq!((failed.len(), failed[0]), (3, 7), "{failed:?}");
    let logged: Vec<u64> = events_of(&store.run())
        .into_iter()
        .filter_map(|e| match e {
            Event::CheckpointFailed { step, cause } if cause.contains("no space left on device") => {
                Some(step)
            }
            _ => None,
        })
        .collect();
    assert_eq!(logged, failed);
    // Each failure is made good at the first step after it was known, once.
    let checkpoints = checkpoint::steps(&store.run()).unwrap();
    let after: Vec<u64> =
        checkpoints.iter().copied().filter(|step| *step > *failed.last().unwrap()).collect();
    let planned = [8, 10, 12, 15];
    let extra = after.iter().filter(|step| !planned.contains(step)).count();
    assert!(extra <= 1, "one checkpoint makes up for the last failure: {checkpoints:?} after {failed:?}");
    let unplanned = failed.iter().filter(|step| **step != 7 && !planned.contains(step)).count();
    assert!(unplanned <= 2, "an attempt a failure: {failed:?}");
}

/// The store is slow when the checkpoint that failed is tried again: the next step must not begin another.
#[test]
fn a_failed_checkpoint_is_made_good_once() {
    let (data, store) = (Data::new(), TestStore::new());
    let mut refused = false;
    store.rule(move |path| {
        if path.starts_with("checkpoints/0000000003/") && !std::mem::replace(&mut refused, true) {
            return Fate::DiskFull;
        }
        if path.starts_with("checkpoints/") {
            std::thread::sleep(Duration::from_millis(20));
        }
        Fate::Done
    });
    let mut run = create(&store.run(), &data);
    run.config.checkpoint.every_steps = 100;
    let (ended, notices) = drive(run, None);
    ended.unwrap();
    assert_eq!(failures(&notices), [3]);
    assert_finished(&store.run(), "one failure");
    let checkpoints = checkpoint::steps(&store.run()).unwrap();
    let extra: Vec<_> = checkpoints.iter().filter(|step| ![7, 10, 12, 15].contains(*step)).collect();
    assert!(extra.len() <= 1, "one makes up for checkpoint 3: {checkpoints:?}");
}

#[test]
fn a_disk_that_stays_full_ends_the_run_with_its_last_good_checkpoint() {
    let data = Data::new();
    let store = TestStore::new();
    store.rule(|path| {
        let early = ["config", "environment", "events", "metrics/0000000000", "checkpoints/0000000003"];
        if early.iter().any(|prefix| path.starts_with(prefix)) { Fate::Done } else { Fate::DiskFull }
    });
    let (ended, notices) = drive(create(&store.run(), &data), None);
    let text = ended.unwrap_err().to_string();
    assert!(
        text.contains("memory/metrics/0000000003-0000000014.parquet")
            && text.contains("no space left on device"),
        "{text}"
    );
    let steps = notices.iter().filter(|notice| matches!(notice, Notice::Step(_))).count();
    assert_eq!(steps, 15, "all steps were trained");
    assert!(failures(&notices).len() >= 6, "it tried");
    assert_eq!(checkpoint::steps(&store.run()).unwrap(), [3]);
    let manifest = checkpoint::verify(&store.run(), 3).unwrap();
    assert_eq!(manifest.weights, reference().manifests[&3].weights);
    assert!(matches!(events_of(&store.run()).pop(), Some(Event::CheckpointFailed { step: 15, .. })));

    store.rule(|_| Fate::Done);
    resume(&store.run(), None);
    assert_finished(&store.run(), "the disk has room again");
}

/// Writes of every kind fail once, in both ways.
#[test]
fn any_single_write_may_fail() {
    let data = Data::new();
    let whole = TestStore::new();
    drive(create(&whole.run(), &data), None).0.unwrap();
    // The first three make the folder and claim it: when one fails, the run does not begin.
    let writes = whole.journal().len();
    for fate in [Fate::DiskFull, Fate::AnswerLost] {
        for failing in (3..writes).step_by(4) {
            let store = TestStore::new();
            let mut count = 0;
            let (said, told) = channel();
            store.rule(move |path| {
                count += 1;
                if count != failing + 1 {
                    return Fate::Done;
                }
                let _ = said.send(path.to_owned());
                fate
            });
            let (ended, notices) = drive(create(&store.run(), &data), None);
            let what = format!("{fate:?} at {}", told.recv().unwrap_or_else(|_| "no write".to_owned()));
            assert_eq!(ended.unwrap_or_else(|e| panic!("{what}: {e}")), reference().ended, "{what}");
            assert!(failures(&notices).len() <= 1, "{what}");
            assert_finished(&store.run(), &what);
            let numbers: Vec<u64> = events::read(&store.run()).unwrap().iter().map(|r| r.number).collect();
            assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>(), "{what}");
        }
    }
}

#[test]
fn a_log_that_cannot_be_written_at_the_end_is_an_error() {
    let data = Data::new();
    let store = TestStore::new();
    store.rule(|path| {
        if path >= "events/00000005" && path.starts_with("events") { Fate::DiskFull } else { Fate::Done }
    });
    let text = drive(create(&store.run(), &data), None).0.unwrap_err().to_string();
    assert!(text.contains("events/00000005.json") && text.contains("no space left on device"), "{text}");
    assert_undisturbed(&store.run(), 15, "the log failed, the run did not");
    store.rule(|_| Fate::Done);
    resume(&store.run(), None);
    assert_finished(&store.run(), "the disk has room again");
}

/// Which path a process stands still at.
type Place = fn(&str) -> bool;

/// A process that stands still at its first write to a path that `stands_at` says, until it is told to go on.
struct Stalled {
    training: Training,
    stands: Receiver<String>,
    go_on: Sender<()>,
}

fn stalled(store: &TestStore, run: Run, stands_at: Place) -> Stalled {
    let ((said, stands), (go_on, told)) = (channel(), channel());
    let mut stood = false;
    store.rule(move |path| {
        if !stood && stands_at(path) {
            stood = true;
            said.send(path.to_owned()).unwrap();
            let _ = told.recv();
        }
        Fate::Done
    });
    let training = Training::start(run, Control::default(), None).unwrap();
    Stalled { training, stands, go_on }
}

fn assert_fenced(ended: Result<Ended, Error>, what: &str) {
    let error = ended.expect_err("one of the two must leave");
    assert!(error.is_fenced(), "{what}: {error:?}");
    let text = error.to_string();
    assert!(text.contains("only one may train a run: stop the other, then resume"), "{what}: {text}");
}

/// A process that was asleep in mid-write while another took the run up and finished it, in all kinds of places. When
/// it wakes it must leave, and what it still writes must not change a byte of what the other wrote.
#[test]
fn a_process_that_slept_while_another_took_over_changes_nothing() {
    let data = Data::new();
    let places: [(&str, Place); 5] = [
        ("an event", |path| path.starts_with("events/") && path >= "events/00000005"),
        ("a part", |path| path.starts_with("checkpoints/0000000008/part-")),
        ("a manifest", |path| path == "checkpoints/0000000008/manifest.json"),
        ("metrics", |path| path.starts_with("metrics/0000000007-")),
        ("its first event", |path| path.starts_with("events/")),
    ];
    for (place, stands_at) in places {
        for allow in [false, true] {
            let what =
                format!("asleep in writing {place}, the other {}", if allow { "changed" } else { "alike" });
            let store = TestStore::new();
            let run = Run::create(store.run(), data.config()).unwrap();
            let sleeper = stalled(&store, run, stands_at);
            sleeper.stands.recv().unwrap();

            let other = store.another();
            let mut config = data.config();
            if allow {
                config.optimizer.clip = 0.25;
            }
            let ended = resume_with(&other.run(), Resume { config: Some(config), allow }, None);
            assert!(ended.finished);
            let before = store.objects();
            sleeper.go_on.send(()).unwrap();
            assert_fenced(sleeper.training.join(), &what);
            for (path, bytes) in before {
                assert!(store.objects().get(&path) == Some(&bytes), "{what}: {path} was overwritten");
            }
            if allow {
                let steps = checkpoint::steps(&store.run()).unwrap();
                steps.iter().for_each(|step| drop(checkpoint::verify(&store.run(), *step).unwrap()));
                assert_eq!(resume(&store.run(), None), ended, "{what}");
            } else {
                assert_finished(&store.run(), &what);
            }
        }
    }
}

/// A process that wakes in a checkpoint of which the other has none keeps to itself: no manifest of the other's goes.
#[test]
fn a_process_that_slept_lets_no_checkpoint_of_the_other_go() {
    let (data, store) = (Data::new(), TestStore::new());
    let mut config = data.config();
    (config.checkpoint.keep_last, config.checkpoint.keep_stage_ends) = (2, false);
    let run = Run::create(store.run(), config).unwrap();
    let sleeper = stalled(&store, run, |path| path == "checkpoints/0000000004/manifest.json");
    sleeper.stands.recv().unwrap();
    let mut config = data.config();
    config.checkpoint.every_steps = 5;
    let options = Resume { config: Some(config), allow: false };
    assert!(resume_with(&store.another().run(), options, None).finished);
    let before = checkpoint::steps(&store.run()).unwrap();
    assert_eq!(before, [3, 5, 7, 10, 12, 15]);
    sleeper.go_on.send(()).unwrap();
    assert_fenced(sleeper.training.join(), "asleep in a checkpoint");
    let after = checkpoint::steps(&store.run()).unwrap();
    assert!(before.iter().all(|step| after.contains(step)), "{after:?}");
    assert_finished(&store.run(), "asleep in a checkpoint");
}

/// The newcomer is the one that sleeps, before its claim: it must not have touched the run of the other.
#[test]
fn a_newcomer_that_comes_too_late_changes_nothing() {
    let data = Data::new();
    let store = TestStore::new();
    // Rows of step 7 are logged, and no checkpoint has them.
    let first = stalled(&store, Run::create(store.run(), data.config()).unwrap(), |path| {
        path.starts_with("checkpoints/0000000008/manifest")
    });
    first.stands.recv().unwrap();
    let other = store.another();
    let mut config = data.config();
    config.checkpoint.every_steps = 7;
    let options = Resume { config: Some(config), allow: false };
    let newcomer = Run::resume(other.run(), options).unwrap();
    let newcomer = stalled(&other, newcomer, |path| path.starts_with("events/"));
    newcomer.stands.recv().unwrap();
    let before = store.objects();
    first.go_on.send(()).unwrap();
    assert_eq!(first.training.join().unwrap(), reference().ended);
    let finished = store.objects();
    newcomer.go_on.send(()).unwrap();
    assert_fenced(newcomer.training.join(), "the newcomer");
    assert!(store.objects() == finished, "the newcomer changed something");
    // The pointer alone is moved, by the first.
    for (path, bytes) in before.into_iter().filter(|(path, _)| path != checkpoint::LATEST) {
        assert_eq!(finished.get(&path), Some(&bytes), "{path} was changed before the claim");
    }
    assert_finished(&store.run(), "a newcomer came too late");
}

/// Without any order imposed: both train at full speed, one leaves, the run is right.
#[test]
fn of_two_processes_at_once_one_leaves() {
    let data = Data::new();
    let store = Store::memory().unwrap();
    let first = Training::start(Run::create(store.clone(), data.config()).unwrap(), Control::default(), None)
        .unwrap();
    let mut second = None;
    for notice in &first.notices {
        if matches!(notice, Notice::Checkpoint { step: 4, .. }) {
            let run = Run::resume(store.clone(), Resume::default()).unwrap();
            second = Some(Training::start(run, Control::default(), None).unwrap());
        }
    }
    let ends = [first.join(), second.unwrap().join()];
    let (ended, fenced): (Vec<_>, Vec<_>) = ends.into_iter().partition(Result::is_ok);
    // The first may have been through before the second had begun.
    assert!(!ended.is_empty());
    ended.into_iter().for_each(|ended| assert_eq!(ended.unwrap(), reference().ended));
    fenced.into_iter().for_each(|fenced| assert_fenced(fenced, "at full speed"));
    assert_finished(&store, "two at full speed");
}

//! Run twice, stopped anywhere, killed anywhere: the same bits.

use anello_configs::Recompute;
use anello_store::events::Event;
use anello_store::{Object, Store};
use anello_worker::{Control, Ended, Resume, Run, Training};

use super::store::{Change, TestStore};
use super::*;

#[test]
fn the_small_run_has_everything_that_a_real_one_has() {
    let data = Data::new();
    let config = data.config();
    let schedule = Schedule::new(&config);
    let spans: Vec<(u64, u32)> = schedule.stages().map(|(_, span)| (span.steps, span.layers)).collect();
    assert_eq!(spans, [(3, 1), (4, 1), (3, 1), (2, 2), (3, 2)]);
    let batches: Vec<u64> = (3..7).map(|step| schedule.at(step).unwrap().batch_tokens).collect();
    assert_eq!(batches, [128, 128, 128, 256]);
    let reference = reference();
    assert!(reference.ended.finished && reference.ended.step == 15);
    assert!(reference.records.iter().all(|r| r.applied && r.loss.is_finite()));
    assert_eq!(reference.manifests[&7].updates, 7);
    assert_eq!(reference.manifests[&8].updates, 1, "the optimizer starts anew");
    assert!(reference.manifests[&15].parts.len() > 1);
    let epochs = |e: &Event| matches!(e, Event::Epoch { source, .. } if source == "code");
    let store = Store::memory().unwrap();
    begin(&store, &config, None);
    assert!(events_of(&store).iter().any(epochs), "a source runs out and starts anew");
}

/// A limit of the bytes a second that go to the run folder takes its time, and changes nothing.
#[test]
fn a_limited_store_is_as_good() {
    let (data, store) = (Data::new(), Store::memory().unwrap());
    let config = data.config().with(&[("store.bandwidth", Some("\"8MiB\""))]).unwrap();
    let began = std::time::Instant::now();
    let ended = begin(&store, &config, None);
    assert_eq!(ended, reference().ended);
    let written = store.list("checkpoints").unwrap().iter().map(|object| object.bytes).sum::<u64>();
    // All but the last turn was waited for.
    let least = written.saturating_sub(2 << 20) as f64 / f64::from(8 << 20);
    assert!(
        written > 8 << 20 && began.elapsed().as_secs_f64() >= least,
        "{written} bytes, {least} s at least"
    );
}

/// What is frozen does not change by one bit, and neither do its moments; what is not frozen does.
#[test]
fn a_stage_moves_what_it_trains_and_nothing_else() {
    let data = Data::new();
    let config = data.config_with_late_stages();
    let (reference, store) = undisturbed(config.clone());
    let state = |step| load(&store, step, &config.model, tch::Device::Cpu).unwrap().state;
    for (before, after, gate_moves, rest_moves) in
        [(14, 15, true, true), (15, 18, true, false), (18, 20, false, true)]
    {
        let (before, after) = (state(before), state(after));
        let moves = |name: &str| if name.contains("early_exit_gate") { gate_moves } else { rest_moves };
        let buffers = |state: &anello_worker::State| {
            [0, 1, 2].map(|buffer| Vec::<f32>::try_from(state.whole(buffer)).unwrap())
        };
        let [old, _, _] = buffers(&before);
        let [new, moments @ ..] = buffers(&after);
        for entry in before.layout.entries() {
            let pairs = old[entry.range()].iter().zip(&new[entry.range()]);
            let changed = pairs.into_iter().any(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(changed, moves(&entry.name), "weights of {}", entry.name);
            // Each of these stages trains other parameters than the one before, and so begins with moments at zero.
            for moments in &moments {
                let any = moments[entry.range()].iter().any(|moment| *moment != 0.0);
                assert_eq!(any, moves(&entry.name), "moments of {}", entry.name);
            }
        }
        let room = if rest_moves { after.layout.len() } else { checkpoint::BLOCK };
        assert_eq!(
            (after.exp_avg.numel(), after.exp_avg_sq.numel()),
            (room, room),
            "what is frozen has none"
        );
    }
    let records = &reference.records;
    assert!(
        records[15..18].iter().all(|r| r.loss > 0.0 && r.loss < 3.0),
        "the gate's loss is no cross-entropy of tokens"
    );
    assert!(records[18..].iter().all(|r| r.loss == r.loop_loss[2]), "fine-tuning minimises L(T)");

    // Stopped anywhere in these stages and at their borders, it goes on as if nothing had been.
    for stop in 14..20 {
        let again = Store::memory().unwrap();
        begin(&again, &config, Some(stop));
        assert_eq!(resume(&again, None).weights, reference.ended.weights, "stopped after {stop} steps");
        for (ours, theirs) in metrics::read(&again).unwrap().iter().zip(records) {
            assert_eq!(
                ours.without_seconds(),
                theirs.without_seconds(),
                "stopped after {stop}: step {}",
                ours.step
            );
        }
    }
}

/// While the gate alone trains, a checkpoint writes the block that it is in and names those of the language model. Killed
/// between any two writes of it, and with the checkpoints gone that the parts were written for, it is the same run.
#[test]
fn what_is_frozen_is_not_written_again() {
    let data = Data::new();
    let mut config = data.config_with_late_stages();
    let (reference, _) = undisturbed(config.clone());
    config.checkpoint.every_steps = 1;
    (config.checkpoint.keep_last, config.checkpoint.keep_stage_ends) = (2, false);
    let store = TestStore::new();
    begin(&store.run(), &config, None);
    let journal = store.journal();
    let blocks_written = |step: u64| {
        let folder = format!("{}/part-", checkpoint::folder(step));
        let written = journal.iter().filter(|(path, _)| path.starts_with(&folder));
        let bytes: usize = written.filter_map(|(_, bytes)| Some(bytes.as_ref()?.len())).sum();
        bytes / checkpoint::BLOCK_BYTES
    };
    let written: Vec<usize> = (15..=20).map(blocks_written).collect();
    // Of three buffers. The gate's block was in a part of two, of which the other's weights are written once more.
    assert_eq!(written, [4 * 3, 3 + 1, 3, 3, 4 * 3, 4 * 3], "steps 15..18 train the gate");
    assert_eq!(checkpoint::steps(&store.run()).unwrap(), [19, 20]);
    assert_eq!(store.run().list("checkpoints").unwrap().len(), 2 * 3, "no part outlives its checkpoints");

    let from = journal.iter().position(|(path, _)| path.starts_with("checkpoints/0000000016/")).unwrap();
    let until =
        journal.iter().rposition(|(path, _)| path.starts_with("checkpoints/0000000018/part")).unwrap();
    for killed in from..=until {
        let what = format!("killed after change {killed}, to {}", journal[killed - 1].0);
        let left = TestStore::after(&journal[..killed]).run();
        for step in checkpoint::steps(&left).unwrap() {
            checkpoint::verify(&left, step).unwrap_or_else(|e| panic!("{what}: {e}"));
        }
        assert_eq!(resume(&left, None), reference.ended, "{what}");
        for step in checkpoint::steps(&left).unwrap() {
            let manifest = checkpoint::verify(&left, step).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(bits(&manifest), bits(&reference.manifests[&step]), "{what}: checkpoint {step}");
        }
    }
}

#[test]
fn a_run_twice_is_the_same_run() {
    let data = Data::new();
    let folder = tempfile::tempdir().unwrap();
    let store = Store::durable(folder.path().join("run").to_str().unwrap()).unwrap();
    let ended = begin(&store, &data.config(), None);
    assert_eq!(ended, reference().ended);
    assert_finished(&store, "a second run, in a folder");

    let again = Store::memory().unwrap();
    begin(&again, &data.config(), None);
    let objects = store.list("checkpoints").unwrap();
    assert_eq!(objects, again.list("checkpoints").unwrap());
    for Object { path, .. } in objects {
        assert!(store.get(&path).unwrap() == again.get(&path).unwrap(), "{path} is the same bytes");
    }

    let (other, mut config) = (Store::memory().unwrap(), data.config());
    config.seed += 1;
    assert_ne!(begin(&other, &config, None).weights, ended.weights, "another seed is another run");
}

#[test]
fn a_run_stopped_after_any_step_goes_on_as_if_nothing_had_been() {
    let data = Data::new();
    for stop in 0..=total_steps(&data.config()) {
        let what = format!("stopped after {stop} steps");
        let store = Store::memory().unwrap();
        let stopped = begin(&store, &data.config(), Some(stop));
        assert_eq!(stopped.step, stop);
        assert_eq!(stopped.finished, stop == reference().ended.step);
        if stop > 0 {
            assert_eq!(stopped.weights, reference().manifests[&stop].weights, "{what}");
            assert_undisturbed(&store, stop, &what);
        }
        if stop < reference().ended.step {
            assert_eq!(events_of(&store).pop(), Some(Event::Stopped { step: stop }));
        }
        assert_eq!(resume(&store, None), reference().ended, "{what}");
        assert_resumed_from(&store, stop, &what);
        assert_finished_at_zero(&store, stop, &what);
    }
}

/// [`assert_finished`], past a checkpoint of the very beginning, which the undisturbed run does not take.
fn assert_finished_at_zero(store: &Store, stop: u64, what: &str) {
    if stop == 0 {
        checkpoint::delete(store, 0).unwrap();
    }
    assert_finished(store, what);
}

fn assert_resumed_from(store: &Store, stop: u64, what: &str) {
    let started = events_of(store).into_iter().filter_map(|event| match event {
        Event::Started { step, .. } => Some(step),
        _ => None,
    });
    assert_eq!(started.collect::<Vec<_>>(), [0, stop], "{what}: where the processes began");
}

#[test]
fn a_run_stopped_after_every_step_is_the_same_run() {
    let (data, store) = (Data::new(), Store::memory().unwrap());
    begin(&store, &data.config(), Some(1));
    for until in 2..=total_steps(&data.config()) {
        resume(&store, Some(until));
    }
    assert_finished(&store, "one process a step");
}

#[test]
fn stop_finishes_the_step_and_saves_it() {
    let data = Data::new();
    for after in [0, 1, 3, 4, 8, 11] {
        let store = Store::memory().unwrap();
        let (control, run) = (Control::default(), Run::create(store.clone(), data.config()).unwrap());
        if after == 0 {
            control.stop();
        }
        let training = Training::start(run, control.clone(), None).unwrap();
        let mut seen = 0;
        for notice in &training.notices {
            seen += u64::from(matches!(notice, Notice::Step(_)));
            if seen == after {
                control.stop();
            }
        }
        let Ended { step, finished, .. } = training.join().unwrap();
        assert_eq!(seen, step, "every step was told");
        assert!(
            !finished && step >= after && (after > 0 || step == 0),
            "stop after {after} took until {step}"
        );
        assert_eq!(checkpoint::steps(&store).unwrap().last(), Some(&step), "the last step is saved");
        assert_eq!(events_of(&store).pop(), Some(Event::Stopped { step }));
        resume(&store, None);
        assert_finished_at_zero(&store, step, "stopped by hand");
    }
}

#[test]
fn what_is_no_mathematics_may_change_at_any_resume() {
    let (data, moved) = (Data::new(), Data::new());
    let store = Store::memory().unwrap();
    begin(&store, &data.config(), Some(2));
    let changes: [fn(&mut RunConfig); 9] = [
        |c| c.compute.threads = Some(1),
        |c| c.compute.recompute = Recompute::None,
        |c| c.compute.threads = Some(3),
        |c| c.compute.recompute = Recompute::Loop,
        |c| c.compute.offload = true,
        |c| (c.checkpoint.every_steps, c.checkpoint.part_bytes) = (2, 8 << 20),
        |c| c.data.prefetch_bytes = 1 << 20,
        |c| c.name = "another-name".to_owned(),
        |c| c.checkpoint.part_bytes = 64 << 10,
    ];
    let mut config = moved.config();
    for (change, until) in changes.into_iter().zip([3, 5, 7, 8, 9, 10, 11, 13, 15]) {
        change(&mut config);
        let options = Resume { config: Some(config.clone()), allow: false };
        assert_eq!(resume_with(&store, options, Some(until)).step, until);
        assert_eq!(anello_store::read_config(&store).unwrap(), config, "the folder has the new config");
    }
    assert_finished(&store, "changed on the way");
}

/// All that a run does to its folder which keeps two checkpoints.
fn changes_of_a_run_that_prunes(data: &Data) -> Vec<Change> {
    let mut config = data.config();
    (config.checkpoint.keep_last, config.checkpoint.keep_stage_ends) = (2, false);
    let store = TestStore::new();
    begin(&store.run(), &config, None);
    store.journal()
}

/// After any change to the run folder the process may be killed: between the parts and their manifest, between
/// an old manifest and its parts, between metrics and checkpoint, before the first event.
#[test]
fn a_run_killed_between_any_two_writes_is_the_same_run() {
    let data = Data::new();
    let journal = changes_of_a_run_that_prunes(&data);
    let manifests = journal.iter().filter(|(path, bytes)| path.ends_with("manifest.json") && bytes.is_none());
    assert!(manifests.count() > 3, "retention was at work");
    // Every third: there are some nine checkpoints of a few changes each, so that all places are met.
    for killed in (1..=journal.len()).step_by(3) {
        let (path, bytes) = &journal[killed - 1];
        let verb = if bytes.is_some() { "writing" } else { "deleting" };
        let what = format!("killed after change {killed} of {}: {verb} {path}", journal.len());
        let left = TestStore::after(&journal[..killed]);
        resume(&left.run(), None);
        assert_finished(&left.run(), &what);
        let checkpoints = checkpoint::steps(&left.run()).unwrap();
        let kept = checkpoints.len();
        assert!(kept <= 2, "{what}: {kept} checkpoints are kept");
        let objects = left.run().list("checkpoints").unwrap();
        let stray = objects.iter().find(|object| {
            !checkpoints
                .iter()
                .any(|step| object.path.starts_with(&format!("{}/", checkpoint::folder(*step))))
        });
        assert_eq!(stray, None, "{what}: an object without a checkpoint stays for ever");
    }
}

/// Whoever takes a killed run up is killed too, after one change more than the one before: they get there all the same.
#[test]
fn a_run_whose_successors_are_killed_too_is_the_same_run() {
    let data = Data::new();
    let journal = changes_of_a_run_that_prunes(&data);
    // In the midst of its pruning, its parts, and before its first event.
    let deletes = |(at, (_, bytes)): (usize, &Change)| bytes.is_none().then_some(at);
    let deletion = journal.iter().enumerate().find_map(deletes).expect("retention was at work");
    for first in [1, journal.len() / 3, deletion + 1] {
        let (mut changes, mut killed) = (journal[..first].to_vec(), 0);
        loop {
            let left = TestStore::after(&changes);
            let before = left.journal().len();
            resume(&left.run(), None);
            let made = left.journal().split_off(before);
            if made.len() <= killed + 1 {
                assert_finished(
                    &left.run(),
                    &format!("killed first after change {first}, then {killed} times"),
                );
                assert!(checkpoint::steps(&left.run()).unwrap().len() <= 2);
                break;
            }
            killed += 1;
            changes.extend_from_slice(&made[..killed]);
        }
        assert!(killed > 3, "{killed} were killed");
    }
}

/// A copy of the folder, taken while the run writes to it, is what a kill leaves: half-written parts, names that the
/// store has not given yet.
#[test]
fn a_folder_copied_in_mid_run_goes_on_to_the_same_bits() {
    let data = Data::new();
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("run");
    let store = Store::durable(place.to_str().unwrap()).unwrap();
    let run = Run::create(store, data.config()).unwrap();
    let training = Training::start(run, Control::default(), None).unwrap();
    let mut copies = Vec::new();
    for notice in &training.notices {
        // Mostly while the writer is at work on a checkpoint.
        if matches!(&notice, Notice::Step(record) if [2, 3, 6, 7, 9, 11].contains(&record.step)) {
            let copy = folder.path().join(format!("copy-{}", copies.len()));
            copy_folder(&place, &copy);
            copies.push(copy);
        }
    }
    assert_eq!(training.join().unwrap(), reference().ended);
    assert_eq!(copies.len(), 6);
    for copy in copies {
        // What a process leaves in mid-write, under the names that `object_store` gives to files it has not finished.
        let torn = copy.join("checkpoints/0000000009");
        std::fs::create_dir_all(&torn).unwrap();
        std::fs::write(torn.join("part-00000.safetensors#1"), [7; 100]).unwrap();
        std::fs::write(torn.join("manifest.json#1"), b"{\"format\":").unwrap();
        let store = Store::durable(copy.to_str().unwrap()).unwrap();
        resume(&store, None);
        assert_finished(&store, &copy.display().to_string());
        assert!(!torn.join("manifest.json#1").exists() && !torn.exists(), "what was torn is gone");
    }
}

/// Copies manifests before parts: in the order in which a kill cannot be kinder than the copy.
fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    let mut entries: Vec<_> = std::fs::read_dir(from).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for entry in entries {
        let target = to.join(entry.file_name().unwrap());
        if entry.is_dir() {
            copy_folder(&entry, &target);
        } else if let Err(gone) = std::fs::copy(&entry, &target) {
            // The store renamed or removed it meanwhile.
            assert_eq!(gone.kind(), std::io::ErrorKind::NotFound, "{}", entry.display());
        }
    }
}

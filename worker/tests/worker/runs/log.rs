//! What a run leaves behind for people: events in order, environment, retention, differences, skipped steps.

use anello_configs::Checkpoint;
use anello_store::checkpoint::{Facts, Position};
use anello_store::events::Event;
use anello_store::{Environment, Notice, Store};
use anello_worker::checkpoint::{BlockDifference, Snapshot, compare};

use super::*;

fn words(events: &[Event]) -> Vec<String> {
    let word = |event: &Event| match event {
        Event::Started { step, .. } => Some(format!("started {step}")),
        Event::Stage { step, stage } => Some(format!("{stage} {step}")),
        Event::Checkpoint { step, .. } => Some(format!("checkpoint {step}")),
        Event::Stopped { step } => Some(format!("stopped {step}")),
        Event::Finished { step, .. } => Some(format!("finished {step}")),
        Event::Epoch { .. } => None,
        other => Some(format!("{other:?}")),
    };
    events.iter().filter_map(word).collect()
}

#[test]
fn events_tell_the_run_in_order() {
    let data = Data::new();
    let store = Store::memory().unwrap();
    let run = Run::create(store.clone(), data.config()).unwrap();
    let (ended, notices) = drive(run, Some(13));
    ended.unwrap();
    resume(&store, None);
    let records = events::read(&store).unwrap();
    assert!(records.iter().map(|record| record.number).eq(1..=records.len() as u64));
    assert!(records.is_sorted_by_key(|record| record.unix_ms));
    let events = events_of(&store);
    let expected = "started 0, warmup 0, checkpoint 3, stable 3, checkpoint 4, checkpoint 7, ct-anneal 7, \
         checkpoint 8, checkpoint 10, longct 10, checkpoint 12, mid-training 12, checkpoint 13, stopped 13, \
         started 13, checkpoint 15, finished 15";
    let sorted = |words: Vec<String>| {
        let mut by_step: Vec<(u64, String)> =
            words.into_iter().map(|w| (w.rsplit(' ').next().unwrap().parse().unwrap(), w)).collect();
        by_step.sort();
        by_step
    };
    // A checkpoint is written in the background: it may be told after the stage that begins meanwhile.
    let expected: Vec<String> = expected.split(", ").map(|w| w.trim().to_owned()).collect();
    assert_eq!(sorted(words(&events)), sorted(expected.clone()));
    let without = |words: Vec<String>| -> Vec<String> {
        words.into_iter().filter(|word| !word.starts_with("checkpoint")).collect()
    };
    assert_eq!(without(words(&events)), without(expected));
    for event in &events {
        if let Event::Checkpoint { step, weights } = event {
            assert_eq!(*weights, reference().manifests[step].weights);
        }
    }

    let told: Vec<Event> = notices
        .into_iter()
        .filter_map(|notice| match notice {
            Notice::Logged(record) => Some(record.event),
            _ => None,
        })
        .collect();
    assert_eq!(told, events[..told.len()], "every record is told");
    assert!(matches!(told.last(), Some(Event::Stopped { step: 13 })));

    let (mut epochs, mut early) = (Vec::<(String, u64)>::new(), false);
    for event in events {
        if let Event::Epoch { step, source, epoch } = event {
            early |= step < 13;
            let again = epochs.iter().any(|(other, known)| *other == source && *known >= epoch);
            assert!(!again, "epoch {epoch} of {source} is told twice");
            epochs.push((source, epoch));
        }
    }
    assert!(early, "one began before the stop");
}

#[test]
fn the_environment_is_recorded() {
    let data = Data::new();
    let store = Store::memory().unwrap();
    let mut config = data.config();
    config.compute.threads = Some(2);
    begin(&store, &config, Some(3));
    let bytes = store.get("environment.json").unwrap().unwrap();
    let environment: Environment = serde_json::from_slice(&bytes).unwrap();
    // On other CPUs the bits would follow from the second.
    let is_intel = std::fs::read_to_string("/proc/cpuinfo").unwrap().contains("GenuineIntel");
    assert_eq!(environment.threads, if is_intel { 2 } else { 1 });
    assert_eq!(environment.anello, env!("CARGO_PKG_VERSION"));
    assert!(environment.libtorch.starts_with('2') && !environment.device.is_empty());
    assert!(environment.system.contains(std::env::consts::ARCH));
    let Some(Event::Started { environment: started, .. }) = events_of(&store).into_iter().next() else {
        panic!("the first event is the start")
    };
    assert_eq!(started, environment);
    assert_eq!(checkpoint::read_manifest(&store, 3).unwrap().environment, environment);
}

#[test]
fn retention_keeps_what_it_says() {
    let data = Data::new();
    let policies = [
        (2, None, false, vec![12, 15]),
        (3, None, false, vec![10, 12, 15]),
        (2, None, true, vec![3, 7, 10, 12, 15]),
        (2, Some(4), false, vec![4, 8, 12, 15]),
        (4, Some(8), true, vec![3, 7, 8, 9, 10, 12, 15]),
    ];
    for (keep_last, keep_every_steps, keep_stage_ends, expected) in policies {
        let store = Store::memory().unwrap();
        let mut config = data.config();
        let Checkpoint { every_steps, part_bytes, .. } = config.checkpoint;
        config.checkpoint =
            Checkpoint { every_steps, keep_last, keep_every_steps, keep_stage_ends, part_bytes };
        begin(&store, &config, Some(9));
        resume(&store, None);
        let what = format!("{:?}", config.checkpoint);
        // The stop after step 9 took one of its own, which goes like any other.
        assert_eq!(checkpoint::steps(&store).unwrap(), expected, "{what}");
        assert_finished(&store, &what);
        let folders: std::collections::BTreeSet<String> = store
            .list("checkpoints")
            .unwrap()
            .iter()
            .map(|object| object.path.rsplit_once('/').unwrap().0.to_owned())
            .collect();
        assert!(
            folders.into_iter().eq(expected.into_iter().map(checkpoint::folder)),
            "{what}: parts that stay"
        );
    }
}

#[test]
fn compare_says_which_blocks_differ() {
    let data = Data::new();
    let stores = [Store::memory().unwrap(), Store::memory().unwrap()];
    let config = data.config();
    begin(&stores[0], &config, Some(6));
    let mut other = data.config();
    (other.checkpoint.part_bytes, other.checkpoint.every_steps) = (8 << 20, 2);
    begin(&stores[1], &other, Some(6));
    let [a, b] = &stores;
    let same = compare((a, 6), (b, 6), &config.model).unwrap();
    assert!(same.differences.is_empty() && same.facts.is_empty(), "{same:?}");
    assert_eq!(same.blocks, 12);

    let later = compare((a, 4), (a, 6), &config.model).unwrap();
    let facts: Vec<&str> = later.facts.iter().map(|(what, ..)| *what).collect();
    assert_eq!(facts, ["step", "tokens", "updates", "cursors"]);
    assert_eq!(later.facts[0], ("step", "4".to_owned(), "6".to_owned()));
    assert!(later.differences.len() >= 9, "weights and both moments have moved: {}", later.differences.len());
    assert!(later.differences.iter().all(|d| d.max_abs > 0.0 && d.elements > 0));

    // One element, by a known amount.
    let Loaded { manifest, state } = load(b, 6, &config.model, tch::Device::Cpu).unwrap();
    let _ = state.exp_avg.narrow(0, 70_000, 1).g_add_scalar_(0.5);
    save_again(b, &manifest, &state);
    let changed = compare((a, 6), (b, 6), &config.model).unwrap();
    let [BlockDifference { buffer: "exp_avg", block: 1, names, elements: 1, max_abs }] =
        &changed.differences[..]
    else {
        panic!("{:?}", changed.differences)
    };
    assert!((max_abs - 0.5).abs() < 1e-6 && names.iter().any(|name| name == "lm_head.weight"), "{names:?}");
    assert!(changed.facts.is_empty());

    let text = compare((a, 6), (b, 7), &config.model).unwrap_err().to_string();
    assert!(text.contains("checkpoint 7") && text.contains("there are: 2, 3, 4, 6"), "{text}");
}

/// Writes a checkpoint anew with another state.
fn save_again(store: &Store, manifest: &Manifest, state: &anello_worker::State) {
    let Manifest { step, stage, stage_end, tokens, cursors, losses, config, data, environment, .. } =
        manifest.clone();
    let position = Position { step, stage, stage_end, tokens };
    let (updates, layers) = (state.updates, state.layout.layers() as u32);
    let facts = Facts { position, updates, layers, cursors, losses, config, data, environment };
    let snapshot = Snapshot::take(state, 0..state.layout.blocks(), facts.clone());
    checkpoint::delete(store, step).unwrap();
    let written = write(store, &snapshot, 1 << 20, 0).unwrap();
    checkpoint::commit(store, Manifest::new(facts, written)).unwrap();
}

/// A token whose embedding is infinite: the steps whose batch holds it are not finite, the others are.
#[test]
fn a_step_that_is_not_finite_is_left_out_and_the_run_goes_on() {
    let data = Data::new();
    let rare = 2001;
    let stream = Stream::new(3, "rare", &[]);
    let documents: Vec<Vec<i32>> = (0..200)
        .map(|d| {
            let mut ids: Vec<i32> = (0..20).map(|t| 1 + stream.below_at(d * 20 + t, 1999) as i32).collect();
            if d % 40 == 7 {
                ids[3] = rare;
            }
            ids
        })
        .collect();
    write_source(&data.folder.path().join("words"), &documents);
    let mut config = data.config();
    config.checkpoint.every_steps = 1;
    for stage in &mut config.stages {
        stage.mixture = [("words".to_owned(), 1.0)].into();
    }
    let store = Store::memory().unwrap();
    begin(&store, &config, Some(2));
    let Loaded { manifest, state } = load(&store, 2, &config.model, tch::Device::Cpu).unwrap();
    let hidden = i64::from(config.model.hidden);
    let _ = state.weights.narrow(0, i64::from(rare) * hidden, 1).fill_(f64::INFINITY);
    save_again(&store, &manifest, &state);

    let run = Run::resume(store.clone(), Default::default()).unwrap();
    let (ended, _) = drive(run, None);
    assert!(ended.unwrap().finished);
    let records = metrics::read(&store).unwrap();
    assert_eq!(records.len(), 15);
    let (applied, skipped): (Vec<_>, Vec<_>) = records.iter().skip(2).partition(|record| record.applied);
    assert!(
        applied.len() >= 3 && !skipped.is_empty(),
        "{} applied, {} skipped",
        applied.len(),
        skipped.len()
    );
    assert!(applied.iter().all(|record| record.loss.is_finite() && record.grad_norm.is_finite()));
    assert!(skipped.iter().all(|record| !record.loss.is_finite() || !record.grad_norm.is_finite()));
    assert!(applied.iter().any(|a| skipped.iter().any(|s| s.step < a.step)), "it went on after one");
    let logged: Vec<u64> = events_of(&store)
        .into_iter()
        .filter_map(|event| match event {
            Event::Skipped { step, loss } => {
                assert!(["NaN", "inf", "-inf"].contains(&loss.as_str()), "{loss}");
                Some(step)
            }
            _ => None,
        })
        .collect();
    assert_eq!(logged, skipped.iter().map(|record| record.step).collect::<Vec<_>>());
    // Weights and moments stand still in a skipped step, and the count of updates too.
    for record in skipped {
        let [before, after] =
            [record.step, record.step + 1].map(|step| checkpoint::read_manifest(&store, step).unwrap());
        let resets = record.stage == "ct-anneal" && before.stage != "ct-anneal";
        let grows = before.elements != after.elements || before.layers != after.layers;
        assert_eq!(after.updates, if resets { 0 } else { before.updates }, "step {}", record.step);
        if !grows {
            assert_eq!(before.weights, after.weights, "step {}", record.step);
        }
        assert!(resets || grows || before.blocks == after.blocks, "step {}", record.step);
    }
}

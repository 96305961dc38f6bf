//! Loss spikes: found by the rule, told of, and left out when the config says so; alike however the run is cut.

use anello_worker::audit::{Options, Subject, Verdict, audit};

use super::*;

/// Thirty steps of one stage, whose learning rate makes the loss leap.
fn wild(data: &Data, on_spike: &str) -> RunConfig {
    const STAGE: &str = r#"
[stage.stable]
tokens = 3840
sequence = 16
batch = 128
lr = 0.3
loops = 2
mixture = { words = 3, code = 1 }
"#;
    let (head, _) = CONFIG.split_once("[stage.warmup]").unwrap();
    let (before, rest) = head.split_once("stages = ").unwrap();
    let (_, after) = rest.split_once('\n').unwrap();
    let guard = format!(
        "[guard]\non_spike = {on_spike:?}\nwindow = 6\nfactor = 1.2\nfloor = 0.01\nrollback_steps = 2\n"
    );
    data.parse(&format!("{before}stages = [\"stable\"]\n{after}{guard}{STAGE}"))
}

fn spikes(store: &Store) -> Vec<(u64, f64, f64, bool)> {
    let told = events_of(store).into_iter().filter_map(|event| match event {
        Event::Spike { step, loss, limit, skipped, .. } => {
            Some((step, loss.parse().unwrap(), limit.parse().unwrap(), skipped))
        }
        _ => None,
    });
    told.collect()
}

fn weights(store: &Store, step: u64) -> String {
    checkpoint::read_manifest(store, step).unwrap().weights
}

#[test]
fn spikes_are_told_of_and_left_out_by_the_same_rule() {
    let data = Data::new();
    let (logged, skipped, off) =
        (Store::memory().unwrap(), Store::memory().unwrap(), Store::memory().unwrap());
    for (store, on_spike) in [(&logged, "log"), (&skipped, "skip"), (&off, "off")] {
        let mut config = wild(&data, on_spike);
        config.checkpoint.every_steps = 1;
        begin(store, &config, None);
    }
    let told = spikes(&logged);
    assert!(!told.is_empty(), "the run is wild");
    assert!(told.iter().all(|(_, loss, limit, skipped)| loss > limit && !skipped));
    let rows = metrics::read(&logged).unwrap();
    assert!(rows.iter().all(|row| row.applied));
    for (step, loss, ..) in &told {
        assert_eq!(rows[*step as usize].loss.to_bits(), loss.to_bits());
    }
    // To tell of it changes nothing.
    let last = rows.len() as u64;
    assert_eq!(weights(&logged, last), weights(&off, last));
    assert_eq!(spikes(&off), []);
    assert!(checkpoint::read_manifest(&off, last).unwrap().losses.is_empty());

    // Up to the first both are the same run; its update is left out.
    let first = told[0].0;
    assert_eq!(spikes(&skipped)[0], (first, told[0].1, told[0].2, true));
    assert_eq!(weights(&skipped, first), weights(&logged, first));
    let rows = metrics::read(&skipped).unwrap();
    for row in &rows {
        let left_out = spikes(&skipped).iter().any(|(step, ..)| *step == row.step);
        assert_eq!(row.applied, !left_out, "step {}", row.step);
        if row.step > 0 {
            let same = weights(&skipped, row.step) == weights(&skipped, row.step + 1);
            assert_eq!(same, left_out, "step {}", row.step);
        }
    }
    let manifest = checkpoint::read_manifest(&skipped, first).unwrap();
    let before: Vec<f64> = rows[..first as usize].iter().map(|row| row.loss).collect();
    assert_eq!(manifest.losses, before[before.len().saturating_sub(6)..], "the window is in the checkpoint");
}

#[test]
fn a_run_that_is_stopped_anywhere_leaves_out_the_same_steps() {
    let (data, undisturbed) = (Data::new(), Store::memory().unwrap());
    let config = wild(&data, "skip");
    let ended = begin(&undisturbed, &config, None);
    let expected = spikes(&undisturbed);
    assert!(!expected.is_empty());
    for stop in 1..ended.step {
        let store = Store::memory().unwrap();
        begin(&store, &config, Some(stop));
        assert_eq!(resume(&store, None), ended, "stopped after {stop} steps");
        assert_eq!(spikes(&store), expected, "stopped after {stop} steps");
    }
    let options = Options { workers: 2, ..Options::default() };
    let findings = audit(&undisturbed, &options, &mut |_| {}).unwrap();
    assert_eq!(findings.verdict, Verdict::Confirmed, "{findings:#?}");
}

fn gone_back(store: &Store) -> Vec<(u64, u64)> {
    let told = events_of(store).into_iter().filter_map(|event| match event {
        Event::Spike { step, back_to: Some(to), .. } => Some((step, to)),
        _ => None,
    });
    told.collect()
}

#[test]
fn after_a_spike_the_state_is_that_of_some_steps_before() {
    let (data, logged, store) = (Data::new(), Store::memory().unwrap(), Store::memory().unwrap());
    for (store, on_spike) in [(&logged, "log"), (&store, "rollback")] {
        let mut config = wild(&data, on_spike);
        config.checkpoint.every_steps = 1;
        begin(store, &config, None);
    }
    let undone = gone_back(&store);
    assert!(undone.len() > 1, "the run is wild: {undone:?}");
    let (first, to) = undone[0];
    // Up to the first both are the same run.
    assert_eq!((first, to), (spikes(&logged)[0].0, first - 2));
    assert_eq!(weights(&store, first), weights(&logged, first));
    let rows = metrics::read(&store).unwrap();
    assert_eq!(rows.len() as u64, wild(&data, "off").stages[0].tokens / 128);
    for (at, (step, to)) in undone.iter().enumerate() {
        let (after, before) = [step + 1, *to].map(|at| checkpoint::read_manifest(&store, at).unwrap()).into();
        assert_eq!(after.blocks, before.blocks, "weights and moments after step {step}");
        assert_eq!(after.updates, before.updates);
        assert_ne!(after.cursors, before.cursors, "its batches are left out");
        assert_eq!(after.losses, [0.0; 0], "losses are measured anew");
        assert!(!rows[*step as usize].applied);
        assert!(at == 0 || undone[at - 1].0 < *to, "it goes back behind no other spike: {undone:?}");
    }
    let between: Vec<u64> = rows.iter().filter(|row| !row.applied).map(|row| row.step).collect();
    assert_eq!(between, undone.iter().map(|(step, _)| *step).collect::<Vec<_>>());
}

/// With few checkpoints, of which old ones go, the steps before the spike are computed again from what is left.
#[test]
fn a_run_that_goes_back_is_the_same_wherever_it_is_stopped() {
    let (data, undisturbed) = (Data::new(), Store::memory().unwrap());
    let mut config = wild(&data, "rollback");
    (config.checkpoint.every_steps, config.checkpoint.keep_last) = (5, 2);
    let ended = begin(&undisturbed, &config, None);
    let expected = gone_back(&undisturbed);
    assert!(expected.iter().any(|(_, to)| !to.is_multiple_of(5)), "steps are computed again: {expected:?}");
    for stop in 1..ended.step {
        let store = Store::memory().unwrap();
        begin(&store, &config, Some(stop));
        assert_eq!(resume(&store, None), ended, "stopped after {stop} steps");
        assert_eq!(gone_back(&store), expected, "stopped after {stop} steps");
    }
    // Checkpoints that are damaged are passed over for older ones, down to the seed.
    for damaged in [1, 2] {
        let store = Store::memory().unwrap();
        let stop = expected[0].0;
        begin(&store, &config, Some(stop));
        let known = checkpoint::steps(&store).unwrap();
        for step in known.iter().filter(|step| **step < stop).rev().take(damaged) {
            let path = format!("{}/manifest.json", checkpoint::folder(*step));
            store.put(&path, "{}").unwrap();
        }
        assert_eq!(resume(&store, None), ended, "{damaged} of {known:?} are damaged");
        assert_eq!(gone_back(&store), expected);
    }
    for workers in [1, 2] {
        let options = Options { workers, ..Options::default() };
        let findings = audit(&undisturbed, &options, &mut |_| {}).unwrap();
        assert_eq!(findings.verdict, Verdict::Confirmed, "{findings:#?}");
    }
}

/// A change of the mathematics begins the window anew: no spike leads back behind it, wherever the run is cut, and a run that
/// is computed again finds the same.
#[test]
fn no_spike_leads_back_behind_a_change_of_the_mathematics() {
    let data = Data::new();
    let mut config = wild(&data, "rollback");
    (config.checkpoint.every_steps, config.checkpoint.keep_last) = (5, 2);
    // From its last spike on the run goes on at another rate: by the losses before, there would soon be a spike.
    let plain = Store::memory().unwrap();
    begin(&plain, &config, None);
    let change = gone_back(&plain)[0].0;
    let mut changed = config.clone();
    changed.optimizer.weight_decay = 0.2;
    let allowed = || Resume { config: Some(changed.clone()), allow: true };

    let undisturbed = Store::memory().unwrap();
    begin(&undisturbed, &config, Some(change));
    let ended = resume_with(&undisturbed, allowed(), None);
    let expected = gone_back(&undisturbed);
    assert!(!expected.is_empty(), "the run is wild after the change too");
    let half_a_window = u64::from(config.guard.window.div_ceil(2));
    for (step, to) in &expected {
        assert!(*to >= change && *step >= change + half_a_window, "changed at {change}: {expected:?}");
    }
    for stop in (change..ended.step).step_by(3) {
        let store = Store::memory().unwrap();
        begin(&store, &config, Some(change));
        resume_with(&store, allowed(), Some(stop));
        assert_eq!(resume(&store, None), ended, "stopped after {stop} steps");
        assert_eq!(gone_back(&store), expected, "stopped after {stop} steps");
    }
    let findings = audit(&undisturbed, &Options::default(), &mut |_| {}).unwrap();
    assert_eq!(findings.verdict, Verdict::Confirmed, "{findings:#?}");

    // Without the checkpoint of the change nothing before it is computed with what came after it.
    let store = Store::memory().unwrap();
    begin(&store, &config, Some(change));
    resume_with(&store, allowed(), Some(expected[0].0));
    for step in
        checkpoint::steps(&store).unwrap().into_iter().filter(|step| (change..expected[0].0).contains(step))
    {
        store.put(&format!("{}/manifest.json", checkpoint::folder(step)), "{}").unwrap();
    }
    let (refused, _) = drive(Run::resume(store, Resume::default()).unwrap(), None);
    let told = refused.unwrap_err().to_string();
    assert!(told.contains("since then the mathematics changed (--allow)"), "{told}");
}

#[test]
fn only_what_skips_is_mathematics() {
    let data = Data::new();
    let digest = |on_spike| wild(&data, on_spike).digest();
    assert_eq!(digest("log"), digest("off"));
    assert_ne!(digest("log"), digest("skip"));
    assert_ne!(digest("rollback"), digest("skip"));
    let keys = wild(&data, "skip").mathematics();
    for key in ["guard.on_spike", "guard.window", "guard.factor", "guard.floor"] {
        assert!(keys.contains_key(key), "{key}");
    }
    assert!(!keys.contains_key("guard.rollback_steps"));
    assert!(wild(&data, "rollback").mathematics().contains_key("guard.rollback_steps"));
}

/// What the log tells of a spike is part of the record: one that was changed, left out or made up is named.
#[test]
fn a_spike_that_was_changed_in_the_log_is_named() {
    let (data, store) = (Data::new(), Store::memory().unwrap());
    begin(&store, &wild(&data, "rollback"), None);
    let records = events::read(&store).unwrap();
    let path = |number: u64| format!("events/{number:08}.json");
    let put = |record: &events::Record| {
        store.put(&path(record.number), serde_json::to_vec(record).unwrap()).unwrap();
    };
    let found = || {
        let findings = audit(&store, &Options::default(), &mut |_| {}).unwrap();
        let told =
            findings.contradictions.iter().map(|found| (found.subject, found.step, found.fact.clone()));
        (findings.verdict, told.collect::<Vec<_>>())
    };
    assert_eq!(found(), (Verdict::Confirmed, vec![]));
    let is_spike = |record: &&events::Record| matches!(record.event, Event::Spike { back_to: Some(_), .. });
    let right = records.iter().find(is_spike).expect("the run is wild");
    let Event::Spike { step, back_to: Some(to), .. } = right.event else { unreachable!("just found") };
    let quiet = (0..step).next_back().expect("no spike is at the first step");
    let with = |change: &dyn Fn(&mut u64, &mut Option<u64>)| {
        let mut record = right.clone();
        if let Event::Spike { step, back_to, .. } = &mut record.event {
            change(step, back_to);
        }
        record
    };
    let none = events::Record {
        event: Event::Epoch { step, source: "words".to_owned(), epoch: 1 },
        ..right.clone()
    };
    for (forged, at, expected) in [
        (with(&|_, back_to| *back_to = Some(to - 1)), step, "where it comes to"),
        (none, step, "the log does not tell"),
        (with(&|step, _| *step = quiet), quiet, "which it does not come to"),
    ] {
        put(&forged);
        let (verdict, told) = found();
        let [(Subject::Log, Some(named), fact)] = &told[..] else { panic!("{expected}: {told:?}") };
        assert_eq!((verdict, *named), (Verdict::Refuted, at));
        assert!(fact.starts_with(&format!("at step {at}: ")) && fact.contains(expected), "{fact}");
    }
    put(right);
    assert_eq!(found().0, Verdict::Confirmed);
}

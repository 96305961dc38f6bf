//! Why two runs are not the same: the first step, phase, lane and block, and whose fault it is.

use std::ops::ControlFlow;

use anello_dataloader::{Index, LaneStep, Loader, LoaderOptions};
use anello_worker::bisect::{
    Difference, Findings, Options, Phase, Progress, Replay, Replayed, Verdict, bisect,
};
use anello_worker::checkpoint::Snapshot;
use anello_worker::{Engine, as_mut_slice};
use tch::Device;

use super::*;

/// The small run of `config`, trained to its end.
fn trained(config: &RunConfig) -> Store {
    let store = Store::memory().unwrap();
    begin(&store, config, None);
    store
}

pub fn with(config: &RunConfig, key: &str, value: &str) -> RunConfig {
    assert!(config.mathematics().contains_key(key), "{key} is no key");
    config.with(&[(key, Some(value))]).unwrap()
}

fn found(a: &Store, b: &Store) -> Findings {
    let before = [a, b].map(|store| store.list("").unwrap());
    let findings = bisect(a, b, Options::default(), &mut |_| {}).unwrap();
    assert_eq!(before, [a, b].map(|store| store.list("").unwrap()), "a run folder was changed");
    findings
}

/// What the records of two runs tell.
pub fn read_only(a: &Store, b: &Store) -> Findings {
    bisect(a, b, Options { read_only: true, ..Options::default() }, &mut |_| {}).unwrap()
}

fn replayed(findings: &Findings) -> &Replayed {
    findings.replayed().unwrap_or_else(|| panic!("{findings:#?}"))
}

/// (step, phase, lane, buffer and block)
type Place = (u64, Phase, Option<u32>, Option<(&'static str, usize)>);

fn place(difference: &Difference) -> Place {
    let Difference { step, phase, lane, blocks, .. } = difference;
    (*step, *phase, *lane, blocks.as_ref().map(|blocks| (blocks.buffer, blocks.block)))
}

fn names(difference: &Difference) -> Vec<&str> {
    difference.figures.iter().map(|figure| figure.name.as_str()).collect()
}

/// Bisects the small run and the one with another value for `key`: both are right, and differ at `expected`, with these
/// figures, computed again from `from` on.
fn config_that_differs(key: &str, value: &str, expected: Place, figures: &[&str], from: u64) -> Findings {
    let data = Data::new();
    let (config, findings) = (data.config(), {
        let other = with(&data.config(), key, value);
        found(&trained(&data.config()), &trained(&other))
    });
    assert_eq!(findings.verdict, Verdict::Inputs, "{key}: {findings:#?}");
    let keys: Vec<&str> = findings.config.iter().map(|key| key.key.as_str()).collect();
    assert_eq!(keys, [key]);
    assert_eq!(findings.config[0].values, [config.mathematics().get(key).cloned(), Some(value.to_owned())]);
    assert_eq!(findings.configs_part_at, Some(expected.0), "{key}");
    let replayed = replayed(&findings);
    assert_eq!(replayed.off_record, [None, None], "{key}");
    let differs = replayed.differs.as_ref().unwrap();
    assert_eq!((place(differs), names(differs)), (expected, figures.to_vec()), "{key}: {differs:#?}");
    assert_eq!((replayed.from, replayed.to), (from, expected.0 + 1), "{key}");
    findings
}

#[test]
fn equal_runs_are_equal_however_they_were_kept() {
    let data = [Data::new(), Data::new()];
    let mut config = data[1].config();
    (config.checkpoint.every_steps, config.checkpoint.part_bytes) = (1, 64 << 10);
    let (a, b) = (trained(&data[0].config()), Store::memory().unwrap());
    begin(&b, &config, Some(11));
    resume(&b, None);
    let findings = found(&a, &b);
    assert_eq!(findings.verdict, Verdict::Equal, "{findings:#?}");
    assert_eq!(findings.replay, Replay::NotNeeded);
    assert_eq!((findings.records.steps, findings.first()), (15, None));
    assert_eq!(findings.records.equal_checkpoints, [3, 4, 7, 8, 10, 12, 15]);
    assert_eq!((findings.config, findings.configs_part_at, findings.data), (vec![], None, vec![]));
}

#[test]
fn a_run_that_goes_on_is_compared_as_far_as_it_is() {
    let data = Data::new();
    let (a, b) = (trained(&data.config()), Store::memory().unwrap());
    begin(&b, &data.config(), Some(9));
    let findings = found(&a, &b);
    assert_eq!((findings.verdict, findings.records.steps), (Verdict::Equal, 9), "{findings:#?}");

    let other = Store::memory().unwrap();
    begin(&other, &with(&data.config(), "stage.longct.beta", "0.03"), Some(9));
    let findings = found(&a, &other);
    assert_eq!(findings.verdict, Verdict::EqualSoFar, "{findings:#?}");
    assert_eq!((findings.configs_part_at, &findings.replay), (Some(10), &Replay::NotNeeded));

    let new = Store::memory().unwrap();
    Run::create(new.clone(), data.config()).map(drop).unwrap();
    assert_eq!(found(&a, &new).verdict, Verdict::NothingToCompare);
}

#[test]
fn another_learning_rate_in_a_late_stage_is_an_update() {
    let place = (12, Phase::Update, None, Some(("weights", 0)));
    let findings = config_that_differs("stage.mid-training.lr", "0.002", place, &["lr"], 12);
    let differs = replayed(&findings).differs.as_ref().unwrap();
    assert_eq!(differs.figures[0].values, ["0.001", "0.002"]);
    let blocks = differs.blocks.as_ref().unwrap();
    assert_eq!(blocks.element.as_ref().unwrap().tensor, "model.embed_tokens.weight");
    let records = findings.records;
    assert_eq!(records.equal_checkpoints, [3, 4, 7, 8, 10, 12]);
    assert_eq!(records.checkpoint.and_then(|difference| difference.checkpoint), Some(15));
    assert_eq!(records.figures.map(|figures| (figures.step, figures.phase)), Some((12, Phase::Update)));
}

#[test]
fn another_seed_is_another_start() {
    let place = (0, Phase::Start, None, Some(("weights", 0)));
    config_that_differs("seed", "8", place, &[], 0);
}

#[test]
fn another_weight_of_the_entropy_is_a_loss_of_the_first_lane() {
    config_that_differs("stage.ct-anneal.beta", "0.06", (7, Phase::Forward, Some(0), None), &["loss"], 7);
}

#[test]
fn another_clip_is_a_clip() {
    config_that_differs("optimizer.clip", "0.001", (0, Phase::Norm, None, None), &["clip_factor"], 0);
}

#[test]
fn moments_that_are_not_reset_are_the_start_of_a_stage() {
    let place = (7, Phase::Start, None, Some(("exp_avg", 0)));
    config_that_differs("stage.ct-anneal.reset_optimizer", "false", place, &["updates"], 7);
}

#[test]
fn another_mixture_is_a_batch() {
    let data = Data::new();
    let other = with(&data.config(), "stage.longct.mixture.code", "5.0");
    let (step, lane) = first_other_batch(&data.config(), &other);
    assert!(step >= 10, "the stage begins with step 10");
    let findings = found(&trained(&data.config()), &trained(&other));
    assert_eq!(findings.verdict, Verdict::Inputs, "{findings:#?}");
    assert_eq!(place(findings.first().unwrap()), (step, Phase::Batch, Some(lane), None));
}

/// The first step and lane that get another batch, by the loader itself.
fn first_other_batch(a: &RunConfig, b: &RunConfig) -> (u64, u32) {
    let steps = |config| Loader::open(LoaderOptions::of(config).unwrap()).unwrap().map(Result::unwrap);
    let other = steps(a).zip(steps(b)).find(|(a, b)| a.micro_batches != b.micro_batches);
    let (LaneStep { step, lane, .. }, _) = other.expect("some batch differs");
    (step, lane)
}

#[test]
fn one_token_of_the_data_is_found_in_its_lane() {
    let (data, changed) = (Data::new(), Data::new());
    let stream = Stream::new(3, "words", &[]);
    let mut documents: Vec<Vec<i32>> = (0..220)
        .map(|d| {
            let token = |t| 1 + stream.below_at(1000 + d * 50 + t, 2000) as i32;
            (0..5 + stream.below_at(d, 40)).map(token).collect()
        })
        .collect();
    documents[130][3] ^= 1;
    let index = |data: &Data| {
        let store = Store::open(data.folder.path().join("words").to_str().unwrap()).unwrap();
        let index = Index::build(&store, true, 1, &|_| ControlFlow::Continue(())).unwrap();
        index.save(&store).unwrap();
    };
    write_source(&changed.folder.path().join("words"), &documents);
    index(&data);
    index(&changed);
    let (step, lane) = first_other_batch(&data.config(), &changed.config());
    assert!(step > 0, "the first batch would show it without any search");
    let findings = found(&trained(&data.config()), &trained(&changed.config()));
    assert_eq!((findings.verdict, &findings.config), (Verdict::Inputs, &vec![]), "{findings:#?}");
    let note = "source words is not the same: row group ";
    assert!(findings.notes.iter().any(|told| told.starts_with(note)), "{:?}", findings.notes);
    let first = findings.first().unwrap();
    assert_eq!(place(first), (step, Phase::Batch, Some(lane), None));
    let [was, is] = first.figures[0].values.each_ref().map(|value| value.parse::<i32>().unwrap());
    assert_eq!(was ^ is, 1, "{first:#?}");
    assert_eq!(replayed(&findings).off_record, [None, None]);
}

#[test]
fn a_config_that_was_changed_on_the_way_is_followed() {
    let data = Data::new();
    let (a, b) = (trained(&data.config()), Store::memory().unwrap());
    begin(&b, &data.config(), Some(5));
    let changed = with(&data.config(), "stage.stable.loops", "3");
    resume_with(&b, Resume { config: Some(changed.clone()), allow: true }, None);
    let findings = found(&a, &b);
    assert_eq!(findings.verdict, Verdict::Inputs, "{findings:#?}");
    let keys: Vec<(u64, &str)> = findings.config.iter().map(|key| (key.from, key.key.as_str())).collect();
    assert_eq!((keys, findings.configs_part_at), (vec![(5, "stage.stable.loops")], Some(5)));
    assert_eq!(replayed(&findings).off_record, [None, None]);
    let first = findings.first().unwrap();
    assert_eq!(place(first), (5, Phase::Forward, Some(0), None));

    // The same on both sides is the same run: it is computed over the change without a difference.
    let c = Store::memory().unwrap();
    begin(&c, &data.config(), Some(5));
    resume_with(&c, Resume { config: Some(changed), allow: true }, None);
    assert_eq!(found(&b, &c).verdict, Verdict::Equal);
    change_figure(&c, 6, |record| record.grad_norm = f64::from_bits(record.grad_norm.to_bits() ^ 1));
    forget_checkpoints(&c);
    let findings = found(&b, &c);
    assert_eq!(findings.verdict, Verdict::OffRecordB, "{findings:#?}");
    assert_eq!(place(findings.first().unwrap()), (6, Phase::Norm, None, None));
    assert_eq!((replayed(&findings).from, replayed(&findings).checkpoint), (0, false));
}

pub fn change_figure(store: &Store, step: u64, change: impl FnOnce(&mut StepRecord)) {
    let mut records = metrics::read(store).unwrap();
    change(&mut records[step as usize]);
    metrics::truncate(store, 0).unwrap();
    metrics::write(store, &records).unwrap();
}

fn forget_checkpoints(store: &Store) {
    for step in checkpoint::steps(store).unwrap() {
        checkpoint::delete(store, step).unwrap();
    }
}

/// Trains `config` to `until` with a bit of one weight flipped after `after` steps, by an engine of its own, and puts
/// figures and checkpoints on record as a run does.
fn computed_wrongly(config: &RunConfig, after: u64, element: usize) -> Store {
    let store = trained(config);
    let mut engine = Engine::new(config, Device::Cpu).unwrap();
    let mut loader = Loader::open(LoaderOptions::of(config).unwrap()).unwrap();
    let schedule = Schedule::new(config);
    let mut records = Vec::new();
    for step in 0..total_steps(config) {
        let plan = schedule.at(step).unwrap();
        engine.enter(&plan);
        for lane in 0..config.lanes {
            let lane_step = loader.next().unwrap().unwrap();
            engine.lane(plan.stage, lane, &lane_step.micro_batches);
        }
        records.push(engine.finish(&plan).record(&plan, Default::default()));
        if step + 1 == after {
            let mut same_memory = engine.state().weights.shallow_clone();
            let weight = &mut as_mut_slice(&mut same_memory)[element];
            *weight = f32::from_bits(weight.to_bits() ^ 1);
        }
        if let Ok(manifest) = checkpoint::read_manifest(&store, step + 1) {
            let state = engine.state();
            let facts = anello_store::checkpoint::Facts {
                position: anello_worker::position_after(&schedule, step + 1),
                updates: state.updates,
                layers: state.layout.layers() as u32,
                cursors: manifest.cursors,
                losses: manifest.losses,
                config: manifest.config,
                data: manifest.data,
                environment: manifest.environment,
            };
            checkpoint::delete(&store, step + 1).unwrap();
            let snapshot = Snapshot::take(state, 0..state.layout.blocks(), facts);
            let written = write(&store, &snapshot, 1, config.checkpoint.part_bytes).unwrap();
            checkpoint::commit(&store, Manifest::new(snapshot.facts, written)).unwrap();
        }
    }
    metrics::truncate(&store, 0).unwrap();
    metrics::write(&store, &records).unwrap();
    store
}

#[test]
fn a_weight_that_a_machine_got_wrong_is_found_in_its_checkpoint() {
    let data = Data::new();
    let config = data.config();
    let right = trained(&config);
    let wrong = computed_wrongly(&config, 8, 65_536 + 33);
    for (a, b, verdict) in [(&right, &wrong, Verdict::OffRecordB), (&wrong, &right, Verdict::OffRecordA)] {
        let findings = found(a, b);
        assert_eq!(findings.verdict, verdict, "{findings:#?}");
        assert_eq!(replayed(&findings).differs, None);
        let first = findings.first().unwrap();
        assert_eq!(place(first), (7, Phase::Update, None, Some(("weights", 1))));
        let element = first.blocks.as_ref().unwrap().element.as_ref().unwrap();
        // Row 2048 of the table of 2048 rows would be the first layer: q_proj, of 32 columns.
        assert_eq!(
            (element.tensor.as_str(), &element.index[..], element.differ),
            ("model.layers.0.self_attn.q_proj.weight", &[1, 1][..], 1)
        );
        let [recorded, computed] = element.values.each_ref().map(|value| value.parse::<f32>().unwrap());
        assert_eq!(recorded.to_bits() ^ computed.to_bits(), 1);
        assert_eq!((replayed(&findings).from, replayed(&findings).to), (7, 8));
    }
    // Without the checkpoints from there on it shows in the first figure that it reaches.
    let records = [&right, &wrong].map(|store| metrics::read(store).unwrap());
    let rows = records[0].iter().zip(&records[1]);
    let first = rows.clone().position(|(a, b)| a.without_seconds() != b.without_seconds()).unwrap() as u64;
    assert!(first >= 8, "{first}");
    for step in [8, 10, 12, 15] {
        checkpoint::delete(&wrong, step).unwrap();
    }
    let findings = found(&right, &wrong);
    assert_eq!(findings.verdict, Verdict::OffRecordB, "{findings:#?}");
    assert_eq!(place(findings.first().unwrap()), (first, Phase::Forward, None, None));
    assert_eq!(replayed(&findings).from, 7);
}

#[test]
fn two_runs_of_another_machine_are_not_judged_here() {
    let data = Data::new();
    let a = trained(&data.config());
    let b = trained(&with(&data.config(), "stage.mid-training.lr_to", "2e-5"));
    for run in [&a, &b] {
        change_figure(run, 12, |record| record.loss = f64::from_bits(record.loss.to_bits() ^ 1));
    }
    let findings = found(&a, &b);
    assert_eq!(findings.records.part_at(), Some(13));
    assert_eq!(findings.verdict, Verdict::Elsewhere, "{findings:#?}");
    assert_eq!(place(findings.first().unwrap()), (12, Phase::Forward, None, None));
}

#[test]
fn what_is_only_read_is_told_without_phase_and_lane() {
    let data = Data::new();
    let a = trained(&data.config());
    let b = trained(&with(&data.config(), "stage.mid-training.lr", "0.002"));
    let mut told = Vec::new();
    let findings = bisect(&a, &b, Options { read_only: true, ..Options::default() }, &mut |progress| {
        told.push(progress)
    })
    .unwrap();
    assert_eq!((findings.verdict, &findings.replay), (Verdict::Recorded, &Replay::NotWanted));
    assert_eq!(place(findings.first().unwrap()), (12, Phase::Update, None, None));
    assert_eq!(told, [Progress::Reading]);
    bisect(&a, &b, Options::default(), &mut |progress| told.push(progress)).unwrap();
    let replaying = |done| Progress::Replaying { done, steps: 1 };
    assert_eq!(told[1..], [Progress::Reading, replaying(0), replaying(1)]);
}

#[test]
fn a_damaged_checkpoint_is_stepped_over_and_named() {
    let data = Data::new();
    let a = trained(&data.config());
    let b = trained(&with(&data.config(), "stage.mid-training.lr", "0.002"));
    let lose_part = |store: &Store, step: u64| {
        let part = checkpoint::read_manifest(store, step).unwrap().parts[0].name.clone();
        store.delete(&format!("{}/{part}", checkpoint::folder(step))).unwrap();
    };
    let expected = (12, Phase::Update, None, Some(("weights", 0)));
    lose_part(&a, 12);
    let findings = found(&a, &b);
    assert_eq!((place(findings.first().unwrap()), replayed(&findings).from), (expected, 12));
    let note = findings.notes.join("\n");
    assert!(note.contains("checkpoint 12: part") && note.contains("which is equal, was taken"), "{note}");

    lose_part(&b, 12);
    let findings = found(&a, &b);
    assert_eq!((place(findings.first().unwrap()), replayed(&findings).from), (expected, 10));

    // The blocks of a checkpoint that cannot be read are told by their digests.
    lose_part(&b, 15);
    let records = found(&a, &b).records;
    let blocks = records.checkpoint.unwrap().blocks.unwrap();
    assert_eq!((blocks.buffer, blocks.block, blocks.element), ("weights", 0, None));
    assert_eq!(blocks.tensors, ["model.embed_tokens.weight"]);
}

#[test]
fn what_cannot_be_read_is_never_called_equal() {
    let data = Data::new();
    let broken = || [trained(&data.config()), trained(&data.config())];
    let [a, b] = broken();
    let metrics_of = b.list("metrics").unwrap()[0].path.clone();
    b.put(&metrics_of, "no parquet").unwrap();
    let findings = found(&a, &b);
    assert_eq!((findings.verdict, findings.records.steps), (Verdict::Unknown, 0), "{findings:#?}");
    assert!(findings.notes[0].contains(&metrics_of), "{:?}", findings.notes);

    let [a, b] = broken();
    let manifest = format!("{}/manifest.json", checkpoint::folder(8));
    b.put(&manifest, "{}").unwrap();
    let findings = found(&a, &b);
    assert_eq!(findings.verdict, Verdict::Unknown, "{findings:#?}");
    assert!(findings.notes[0].starts_with("checkpoint 8: manifest.json"), "{:?}", findings.notes);

    let [a, b] = broken();
    let records = metrics::read(&b).unwrap();
    metrics::truncate(&b, 0).unwrap();
    metrics::write(&b, &records[4..]).unwrap();
    let findings = found(&a, &b);
    assert_eq!((findings.verdict, findings.records.steps), (Verdict::Unknown, 11), "{findings:#?}");
    assert!(findings.notes[0].contains("misses 4 steps, the first is 0"), "{:?}", findings.notes);
}

#[test]
fn without_the_data_what_is_on_record_is_told() {
    let (data, config) = (Data::new(), Data::new().config());
    let a = trained(&data.config());
    let b = trained(&with(&data.config(), "stage.mid-training.lr", "0.002"));
    b.put(anello_store::CONFIG, with(&config, "stage.mid-training.lr", "0.002").to_toml()).unwrap();
    let findings = found(&a, &b);
    let Replay::Impossible { reason } = &findings.replay else { panic!("{findings:#?}") };
    assert!(reason.contains("/code") || reason.contains("/words"), "{reason}");
    assert_eq!(findings.verdict, Verdict::Recorded);
    assert_eq!(findings.records.part_at(), Some(12));
}

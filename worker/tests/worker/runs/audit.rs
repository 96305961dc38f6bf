//! A run against its record: what is right is confirmed, and whatever was changed is found and named.

use std::ops::ControlFlow;

use anello_dataloader::Index;
use anello_store::CONFIG;
use anello_worker::audit::{Findings, Options, Progress, Subject, Verdict, audit};
use anello_worker::bisect::{Difference, Phase};
use anello_worker::checkpoint::Snapshot;
use anello_worker::{as_mut_slice, position_after};
use tch::Device;

use super::bisect::{change_figure, with};
use super::*;

fn trained(config: &RunConfig) -> Store {
    let store = Store::memory().unwrap();
    begin(&store, config, None);
    store
}

fn audited(store: &Store, steps: Option<(u64, u64)>, workers: u32) -> Findings {
    let before = store.list("").unwrap();
    let options = Options { steps, workers, threads: Some(1), ..Options::default() };
    let findings = audit(store, &options, &mut |_| {}).unwrap();
    assert_eq!(before, store.list("").unwrap(), "the run folder was changed");
    findings
}

/// (step, phase, buffer and block) of what does not come out.
fn place(findings: &Findings) -> (u64, Phase, Option<(&'static str, usize)>) {
    let Difference { step, phase, blocks, .. } =
        findings.difference.as_ref().unwrap_or_else(|| panic!("{findings:#?}"));
    (*step, *phase, blocks.as_ref().map(|blocks| (blocks.buffer, blocks.block)))
}

fn subjects(findings: &Findings) -> Vec<(Subject, Option<u64>)> {
    findings.contradictions.iter().map(|found| (found.subject, found.step)).collect()
}

/// The small run's sources, with an index that has checksums.
fn with_checksums() -> Data {
    let data = Data::new();
    ["words", "code"].iter().for_each(|source| index(&data, source));
    data
}

fn index(data: &Data, source: &str) {
    let store = Store::open(data.folder.path().join(source).to_str().unwrap()).unwrap();
    Index::build(&store, true, 1, &|_| ControlFlow::Continue(())).unwrap().save(&store).unwrap();
}

#[test]
fn a_run_is_what_its_record_says_from_any_step_to_any_other_and_by_any_number_of_workers() {
    let data = with_checksums();
    let mut config = data.config();
    config.record.digest_every_steps = 3;
    let store = Store::memory().unwrap();
    begin(&store, &config, Some(6));
    resume(&store, None);
    for (steps, workers, from, computed, digests, checkpoints) in [
        (None, 1, 0, 15, 5, vec![3, 4, 6, 7, 8, 10, 12, 15]),
        (None, 3, 0, 15, 5, vec![3, 4, 6, 7, 8, 10, 12, 15]),
        (None, 100, 0, 15, 5, vec![3, 4, 6, 7, 8, 10, 12, 15]),
        (Some((5, 9)), 2, 4, 5, 2, vec![6, 7, 8]),
        (Some((12, 13)), 2, 12, 1, 0, vec![]),
    ] {
        let findings = audited(&store, steps, workers);
        assert_eq!(findings.verdict, Verdict::Confirmed, "{findings:#?}");
        assert_eq!((findings.from, findings.checkpoint), (from, from > 0));
        let compared = &findings.compared;
        assert_eq!((compared.steps, compared.figures, compared.digests), (computed, computed, digests));
        assert_eq!(compared.checkpoints, checkpoints, "{steps:?} by {workers}");
        assert_eq!((findings.notes, findings.unchecked), (vec![], vec![]));
    }
    let mut told = Vec::new();
    let options = Options { workers: 2, ..Options::default() };
    audit(&store, &options, &mut |progress| told.push(progress)).unwrap();
    let computing = |progress: &Progress| matches!(progress, Progress::Computing { steps: 15, .. });
    assert_eq!(told.iter().filter(|progress| computing(progress)).count(), 16);
}

#[test]
fn a_run_of_all_stages_whose_config_was_changed_on_the_way_is_confirmed() {
    let (data, store) = (with_checksums(), Store::memory().unwrap());
    let config = data.config_with_late_stages();
    begin(&store, &config, Some(5));
    let changed = with(&config, "stage.stable.loops", "3");
    resume_with(&store, Resume { config: Some(changed), allow: true }, None);
    let findings = audited(&store, None, 2);
    assert_eq!((findings.verdict, findings.compared.steps), (Verdict::Confirmed, 20), "{findings:#?}");
}

#[test]
fn a_logged_figure_that_was_changed_is_named() {
    let data = with_checksums();
    let store = trained(&data.config());
    let nudged = |value: f64| f64::from_bits(value.to_bits() ^ 1);
    change_figure(&store, 9, |record| record.loop_loss[1] = nudged(record.loop_loss[1]));
    change_figure(&store, 6, |record| record.loss = nudged(record.loss));
    for workers in [1, 3] {
        let findings = audited(&store, None, workers);
        assert_eq!((findings.verdict, place(&findings)), (Verdict::Refuted, (6, Phase::Forward, None)));
        let figures = &findings.difference.as_ref().unwrap().figures;
        let [theirs, ours] = figures[0].values.each_ref().map(|value| value.parse::<f64>().unwrap());
        assert_eq!((figures.len(), figures[0].name.as_str()), (1, "loss"));
        assert_eq!(theirs.to_bits(), ours.to_bits() ^ 1);
        assert_eq!(subjects(&findings), []);
    }
    // What was asked for is right, and only that is said.
    assert_eq!(audited(&store, Some((0, 6)), 1).verdict, Verdict::Confirmed);
    assert_eq!(place(&audited(&store, Some((8, 15)), 1)), (9, Phase::Forward, None));

    change_figure(&store, 6, |record| record.loss = nudged(record.loss));
    change_figure(&store, 9, |record| {
        record.loop_loss[1] = nudged(record.loop_loss[1]);
        record.weights = Some("0".repeat(64));
    });
    let findings = audited(&store, None, 1);
    assert_eq!(place(&findings), (9, Phase::Update, None));
    assert_eq!(subjects(&findings), [(Subject::Checkpoint, Some(10))], "{findings:#?}");
}

/// Makes the checkpoint after `step` steps anew with one bit of `buffer` flipped: with its digests right, as someone does
/// it who knows the format.
fn forge(store: &Store, config: &RunConfig, step: u64, buffer: usize, element: usize) {
    let Loaded { manifest, state } = load(store, step, &config.model, Device::Cpu).unwrap();
    let mut flat = [&state.weights, &state.exp_avg, &state.exp_avg_sq][buffer].shallow_clone();
    let value = &mut as_mut_slice(&mut flat)[element];
    *value = f32::from_bits(value.to_bits() ^ 1);
    let facts = anello_store::checkpoint::Facts {
        position: position_after(&Schedule::new(config), step),
        updates: manifest.updates,
        layers: manifest.layers,
        cursors: manifest.cursors,
        losses: manifest.losses,
        config: manifest.config,
        data: manifest.data,
        environment: manifest.environment,
    };
    checkpoint::delete(store, step).unwrap();
    let snapshot = Snapshot::take(&state, 0..state.layout.blocks(), facts);
    let written = write(store, &snapshot, config.checkpoint.part_bytes, 1).unwrap();
    checkpoint::commit(store, Manifest::new(snapshot.facts, written)).unwrap();
}

#[test]
fn a_block_of_a_checkpoint_that_was_changed_is_named() {
    let data = with_checksums();
    let config = data.config();
    // Bytes of a part, by someone who does not know the format.
    let store = trained(&config);
    let part = &checkpoint::read_manifest(&store, 12).unwrap().parts[0];
    let path = format!("{}/{}", checkpoint::folder(12), part.name);
    let mut bytes = store.get(&path).unwrap().unwrap().to_vec();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    store.put(&path, bytes).unwrap();
    let findings = audited(&store, None, 2);
    assert_eq!(
        (findings.verdict, subjects(&findings)),
        (Verdict::Refuted, vec![(Subject::Checkpoint, Some(12))])
    );
    assert_eq!(findings.difference, None, "the run itself is right, and nothing began from that checkpoint");
    let fact = &findings.contradictions[0].fact;
    assert!(fact.contains(&part.name) && fact.contains("block"), "{fact}");

    // A weight: log and metrics speak against it, and so does what comes out.
    let store = trained(&config);
    forge(&store, &config, 8, 0, 65_536 + 33);
    let findings = audited(&store, None, 3);
    assert_eq!(place(&findings), (7, Phase::Update, Some(("weights", 1))));
    let element = findings.difference.as_ref().unwrap().blocks.as_ref().unwrap().element.as_ref().unwrap();
    assert_eq!(element.tensor, "model.layers.0.self_attn.q_proj.weight");
    assert_eq!(subjects(&findings), [(Subject::Checkpoint, Some(8))]);

    // A moment, of which no digest is in the log: computing alone finds it, from whichever side.
    let store = trained(&config);
    forge(&store, &config, 8, 1, 7);
    let findings = audited(&store, None, 1);
    assert_eq!(place(&findings), (7, Phase::Update, Some(("exp_avg", 0))));
    assert_eq!(subjects(&findings), []);
    let findings = audited(&store, Some((8, 15)), 1);
    assert_eq!((findings.verdict, findings.from), (Verdict::Refuted, 8), "{findings:#?}");
    assert!(place(&findings).0 >= 8);
    let by_three = audited(&store, None, 3);
    assert_eq!(
        by_three.difference,
        audited(&store, None, 1).difference,
        "the first is named, whoever finds it"
    );
}

#[test]
fn a_config_that_was_changed_is_named() {
    let data = with_checksums();
    let store = trained(&data.config());
    let place_of_config = store.place_of(CONFIG);
    store.put(CONFIG, with(&data.config(), "stage.ct-anneal.beta", "0.06").to_toml()).unwrap();
    let findings = audited(&store, None, 1);
    assert_eq!((findings.verdict, subjects(&findings)), (Verdict::Refuted, vec![(Subject::Config, Some(3))]));
    assert!(findings.contradictions[0].fact.contains(&place_of_config), "{findings:#?}");
    let first = (7, Phase::Forward, Some(("weights", 0)));
    assert_eq!(place(&findings), first, "where it begins to matter; checkpoint 8 has the blocks");
    // Without any checkpoint the steps alone tell.
    for step in checkpoint::steps(&store).unwrap() {
        checkpoint::delete(&store, step).unwrap();
    }
    let findings = audited(&store, None, 1);
    assert_eq!((subjects(&findings), place(&findings)), (vec![], (7, Phase::Forward, None)));
    // What is no mathematics may be any.
    let other = data.config().with(&[("compute.recompute", Some("\"loop\""))]).unwrap();
    store.put(CONFIG, other.to_toml()).unwrap();
    assert_eq!(audited(&store, None, 1).verdict, Verdict::Confirmed);
}

/// The steps of a run whose data was replaced on the way are checked piece by piece, each while its data is there.
#[test]
fn a_run_whose_data_was_replaced_is_confirmed_in_two_pieces() {
    let (data, store) = (with_checksums(), Store::memory().unwrap());
    begin(&store, &data.config(), Some(5));
    let replace = |documents: u64| {
        data.write("code", documents);
        index(&data, "code");
    };
    replace(25);
    resume_with(&store, Resume { config: None, allow: true }, None);

    let findings = audited(&store, None, 2);
    assert_eq!((findings.verdict, subjects(&findings)), (Verdict::Incomplete, vec![]), "{findings:#?}");
    assert_eq!((findings.from, findings.checkpoint, findings.compared.steps), (5, true, 10));
    let [lost] = &findings.unchecked[..] else { panic!("{findings:#?}") };
    assert!(lost.starts_with("the steps 0 to 4: their data was replaced (--allow), code was "), "{lost}");
    assert!(lost.ends_with("put it in its place again, and audit them with --steps 0..5"), "{lost}");
    let told = "from step 5 on memory was trained on other data, as its log tells: source code, ";
    assert!(findings.notes[0].starts_with(told), "{findings:#?}");
    assert_eq!(audited(&store, Some((7, 12)), 1).verdict, Verdict::Confirmed);
    // A run with the same change of data is equal to it, one without parts from it there.
    let (same, without) = (Store::memory().unwrap(), Store::memory().unwrap());
    let allowed = || Resume { config: None, allow: true };
    replace(24);
    begin(&same, &data.config(), Some(5));
    begin(&without, &data.config(), None);

    // With the old data in its place the other piece.
    let findings = audited(&store, Some((0, 5)), 1);
    assert_eq!((findings.verdict, findings.compared.steps), (Verdict::Confirmed, 5), "{findings:#?}");
    let findings = audited(&store, None, 1);
    assert_eq!((findings.verdict, findings.compared.steps), (Verdict::Incomplete, 5), "{findings:#?}");
    assert!(findings.unchecked[0].starts_with("the steps 5 to 14: "), "{findings:#?}");
    let read_only = super::bisect::read_only;
    let found = read_only(&store, &without);
    assert_eq!(found.data.iter().map(|other| other.from).collect::<Vec<_>>(), [5], "{found:#?}");

    replace(25);
    resume_with(&same, allowed(), None);
    let found = read_only(&store, &same);
    assert_eq!((found.verdict, found.data.len()), (anello_worker::bisect::Verdict::Equal, 0), "{found:#?}");

    // Data that is neither is no data of this run.
    replace(26);
    let findings = audited(&store, None, 1);
    assert_eq!((findings.verdict, subjects(&findings)[0]), (Verdict::Refuted, (Subject::Data, None)));
}

#[test]
fn data_that_was_changed_is_named() {
    let data = with_checksums();
    let store = trained(&data.config());
    let shard = data.folder.path().join("words/000.parquet");
    let right = std::fs::read(&shard).unwrap();
    // Bytes of tokens, in all of its row groups: the index's checksums are others.
    let mut bytes = right.clone();
    let footer = u32::from_le_bytes(*right[..right.len() - 4].last_chunk().unwrap()) as usize;
    bytes[4..right.len() - 8 - footer].iter_mut().step_by(64).for_each(|byte| *byte ^= 1);
    std::fs::write(&shard, &bytes).unwrap();
    let findings = audited(&store, None, 1);
    let [(Subject::Data, Some(step))] = subjects(&findings)[..] else { panic!("{findings:#?}") };
    let fact = &findings.contradictions[0].fact;
    assert!(fact.contains("words/000.parquet: row group ") && fact.contains("checksum"), "{fact}");
    assert_eq!((findings.verdict, findings.compared.steps), (Verdict::Refuted, step));

    // With an index that is made anew over them, sizes and counts are what they were: the checkpoints know what was in them.
    index(&data, "words");
    let findings = audited(&store, None, 1);
    assert_eq!(subjects(&findings)[0], (Subject::Data, None), "{findings:#?}");
    assert!(findings.contradictions[0].fact.starts_with("source words at "), "{findings:#?}");
    let refused = Run::resume(store.clone(), Resume::default()).and_then(|run| drive(run, None).0);
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("the data of words has changed since the run began"), "{text}");
    std::fs::write(&shard, &right).unwrap();
    index(&data, "words");

    // A shard that is gone, or longer.
    std::fs::write(&shard, [&right[..], b"more"].concat()).unwrap();
    let findings = audited(&store, None, 2);
    assert_eq!(subjects(&findings), [(Subject::Data, None)], "{findings:#?}");
    assert!(findings.contradictions[0].fact.contains("000.parquet"), "{findings:#?}");

    // Other documents, and an index that was made of them: the run says what it was trained on.
    std::fs::write(&shard, &right).unwrap();
    assert_eq!(audited(&store, None, 1).verdict, Verdict::Confirmed);
    write_source(&data.folder.path().join("words"), &[vec![5; 40], vec![6; 50], vec![7; 30]]);
    index(&data, "words");
    let findings = audited(&store, None, 1);
    assert_eq!(subjects(&findings), [(Subject::Data, None)], "{findings:#?}");
    assert!(findings.contradictions[0].fact.starts_with("source words at "), "{findings:#?}");
    assert_eq!(place(&findings).0, 0);
}

#[test]
fn a_run_whose_data_was_moved_is_audited_where_it_lies_now() {
    let data = with_checksums();
    let mut config = data.config();
    config.eval = anello_configs::Eval {
        every_steps: 5,
        sequences: 4,
        sets: [("held-out".to_owned(), config.data.sources["code"].clone())].into(),
    };
    let store = trained(&config);
    let url = |name: &str| data.folder.path().join(name).to_str().unwrap().to_owned();
    let moved = |name: &str, to: &str| (name.to_owned(), url(to));
    for name in ["words", "code"] {
        std::fs::rename(url(name), url(&format!("{name}-moved"))).unwrap();
    }
    let audited = |data: &[(String, String)]| {
        let options = Options { workers: 2, threads: Some(1), data: data.to_vec(), ..Options::default() };
        audit(&store, &options, &mut |_| {})
    };
    assert_ne!(audited(&[]).unwrap().verdict, Verdict::Confirmed);
    let sources = [moved("words", "words-moved"), moved("code", "code-moved")];
    let findings = audited(&sources).unwrap();
    assert_eq!(findings.verdict, Verdict::Incomplete, "{findings:#?}");
    assert!(findings.unchecked[0].starts_with("the figures on held-out data: "), "{findings:#?}");
    let all = [&sources[..], &[moved("held-out", "code-moved")]].concat();
    let findings = audited(&all).unwrap();
    assert_eq!((findings.verdict, findings.compared.figures), (Verdict::Confirmed, 15), "{findings:#?}");
    // Nothing of it is written down.
    assert_eq!(anello_store::read_config(&store).unwrap().data.sources["words"].url, url("words"));

    let refused = |data: &[(String, String)]| audited(data).unwrap_err().to_string();
    let other = refused(&[moved("words", "code-moved")]);
    let [ours, theirs] = ["code-moved", "words-moved"]
        .map(|name| Index::open(&Store::open(&url(name)).unwrap()).unwrap().digest());
    let fact =
        format!("source words at {} is the data {ours}, memory was trained on {theirs}", url("code-moved"));
    assert!(other.contains(&fact), "{other}");
    let unknown = refused(&[moved("word", "words-moved")]);
    assert!(unknown.contains("knows no data called word; it has code, words, held-out"), "{unknown}");
    assert!(refused(&[moved("words", "nowhere")]).contains("nowhere"));
}

#[test]
fn what_cannot_be_checked_is_never_called_right() {
    let data = with_checksums();
    let store = trained(&data.config());
    let records = metrics::read(&store).unwrap();
    metrics::truncate(&store, 0).unwrap();
    metrics::write(&store, &records[4..]).unwrap();
    let findings = audited(&store, None, 2);
    assert_eq!((findings.verdict, findings.compared.figures), (Verdict::Incomplete, 11), "{findings:#?}");
    assert!(findings.unchecked[0].contains("misses 4 steps, the first is 0"), "{findings:#?}");

    let refused = |steps| {
        let options = Options { steps: Some(steps), ..Options::default() };
        audit(&store, &options, &mut |_| {}).unwrap_err().to_string()
    };
    assert!(refused((5, 16)).contains("has logged the steps up to 14, not 15; give steps up to 15"));
    assert!(refused((5, 5)).contains("steps 5..5 are none"));
    let new = Store::memory().unwrap();
    Run::create(new.clone(), data.config()).map(drop).unwrap();
    let none = audit(&new, &Options::default(), &mut |_| {}).unwrap_err().to_string();
    assert!(none.contains("has logged no step yet"), "{none}");
}

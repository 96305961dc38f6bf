//! What a resume refuses, and what `allow` lets through.

use anello_store::Store;
use anello_store::checkpoint::Manifest;
use anello_store::events::Event;
use anello_worker::Resume;

use super::store::TestStore;
use super::*;

fn refused(store: &Store, options: Resume) -> String {
    match Run::resume(store.clone(), options) {
        Ok(run) => drive(run, None).0.expect_err("it must be refused").to_string(),
        Err(error) => error.to_string(),
    }
}

fn with(config: &RunConfig, allow: bool) -> Resume {
    Resume { config: Some(config.clone()), allow }
}

fn set_lr(config: &mut RunConfig, stage: usize, lr: f64) {
    config.stages[stage].lr = anello_configs::LrCurve::Constant { lr };
}

#[test]
fn a_changed_learning_rate_is_refused_by_its_key_and_can_be_allowed() {
    let data = Data::new();
    let store = TestStore::new();
    begin(&store.run(), &data.config(), Some(5));
    let (before, run) = (store.objects(), store.run());
    let mut config = data.config();
    set_lr(&mut config, 1, 1e-3);
    config.optimizer.clip = 0.5;
    let text = refused(&run, with(&config, false));
    for said in ["optimizer.clip: 1.0 -> 0.5", "stage.stable.lr: 0.003 -> 0.001", "--allow"] {
        assert!(text.contains(said), "{text:?} does not say {said:?}");
    }
    assert!(store.objects() == before, "a refusal leaves the folder as it was");

    let ended = resume_with(&run, with(&config, true), None);
    assert_ne!(ended.weights, reference().ended.weights, "it is another run from here on");
    let changes = |event: Event| match event {
        Event::Started { step, changed, .. } => Some((step, changed)),
        _ => None,
    };
    let of = |key: &str, a: &str, b: &str| (key.to_owned(), a.to_owned(), b.to_owned());
    let changed = vec![of("optimizer.clip", "1.0", "0.5"), of("stage.stable.lr", "0.003", "0.001")];
    let started: Vec<_> = events_of(&run).into_iter().filter_map(changes).collect();
    assert_eq!(started, [(0, Vec::new()), (5, changed)], "the log names the change and its step");
    assert_eq!(anello_store::read_config(&run).unwrap(), config);
    assert_eq!(resume(&run, None).weights, ended.weights, "the folder's own config needs no permission");

    let records = metrics::read(&run).unwrap();
    assert_eq!(records.len(), 15);
    for (ours, theirs) in records.iter().zip(&reference().records).take(5) {
        assert_eq!(ours.without_seconds(), theirs.without_seconds(), "step {} was before it", ours.step);
    }
    assert_eq!(records[5].lr, 1e-3);
}

/// A run with an allowed change is as exact as any other: it may be killed and resumed without saying it again.
#[test]
fn a_run_with_an_allowed_change_can_be_killed_too() {
    let data = Data::new();
    let mut config = data.config();
    set_lr(&mut config, 1, 1e-3);
    let store = TestStore::new();
    begin(&store.run(), &data.config(), Some(5));
    let killed_at = store.journal().len();
    let ended = resume_with(&store.run(), with(&config, true), None);
    let journal = store.journal();
    let config_written = journal.iter().skip(killed_at).position(|(path, _)| path == "config.toml").unwrap();
    for killed in [config_written + 1, config_written + 2, config_written + 8] {
        let left = TestStore::after(&journal[..killed_at + killed]).run();
        assert_eq!(resume(&left, None), ended, "killed {killed} changes after the resume");
    }
}

#[test]
fn lanes_and_model_never_change() {
    let data = Data::new();
    let store = TestStore::new();
    begin(&store.run(), &data.config(), Some(5));
    let before = store.objects();
    for allow in [false, true] {
        let mut config = data.config();
        config.lanes = 8;
        let text = refused(&store.run(), with(&config, allow));
        assert!(text.contains("lanes"), "{text}");
        assert_eq!(allow, text.contains("has 4 lanes, the config 8; begin a new run"), "{text}");

        let mut config = data.config();
        config.model.ffn = 64;
        let text = refused(&store.run(), with(&config, allow));
        assert_eq!(allow, text.contains("has other sizes than the config's; begin a new run"), "{text}");
        assert_eq!(!allow, text.contains("model.ffn: 48 -> 64"), "{text}");
    }
    assert!(store.objects() == before, "a refusal leaves the folder as it was");
}

#[test]
fn changed_data_is_refused_by_the_name_of_its_source() {
    let data = Data::new();
    let store = TestStore::new();
    begin(&store.run(), &data.config(), Some(5));
    let before = store.objects();
    data.write("code", 25);
    let text = refused(&store.run(), Resume::default());
    assert!(text.contains("the data of code has changed since the run began"), "{text}");
    assert!(text.contains("--allow"), "{text}");
    assert!(store.objects() == before, "a refusal leaves the folder as it was");
    let digest = |manifest: &Manifest| manifest.data["code"].clone();
    let old = digest(&checkpoint::read_manifest(&store.run(), 5).unwrap());
    // Killed before there is a checkpoint of it, it need not be allowed again.
    let allow = Resume { config: None, allow: true };
    resume_with(&store.run(), allow, Some(5));
    let ended = resume(&store.run(), None);
    assert!(ended.finished && ended.weights != reference().ended.weights);
    let new = digest(&checkpoint::read_manifest(&store.run(), 15).unwrap());
    let replaced = events_of(&store.run()).into_iter().filter_map(|event| match event {
        Event::Started { step, data, .. } => Some((step, data)),
        _ => None,
    });
    let change = (5, vec![("code".to_owned(), old, new)]);
    assert_eq!(
        replaced.collect::<Vec<_>>(),
        [(0, vec![]), change, (5, vec![])],
        "the log names it and its step"
    );

    data.write("words", 200);
    let text = refused(&store.run(), Resume::default());
    assert!(text.contains("the data of words has changed"), "{text}");
}

#[test]
fn a_folder_holds_one_run() {
    let data = Data::new();
    let store = TestStore::new();
    let Err(error) = Run::resume(store.run(), Resume::default()) else {
        panic!("there is nothing to resume")
    };
    assert!(error.to_string().contains("memory holds no run"), "{error}");
    begin(&store.run(), &data.config(), Some(2));
    let before = store.objects();
    let Err(error) = Run::create(store.run(), data.config()) else { panic!("there is a run already") };
    assert!(error.to_string().contains("memory holds a run already; resume it"), "{error}");
    assert!(store.objects() == before, "a refusal leaves the folder as it was");

    store.run().put("config.toml", "lanes = \n".as_bytes()).unwrap();
    let text = refused(&store.run(), Resume::default());
    assert!(text.contains("memory/config.toml does not parse"), "{text}");
}

/// What is left of a run is nothing to begin a new one in, nor to begin the same one anew.
#[test]
fn where_history_is_lost_nothing_is_written() {
    let (data, store) = (Data::new(), TestStore::new());
    begin(&store.run(), &data.config(), Some(5));
    store.run().delete("config.toml").unwrap();
    let before = store.objects();
    let Err(error) = Run::create(store.run(), data.config()) else { panic!("something is there") };
    assert!(error.to_string().contains("of a run whose config.toml is missing; bring it back"), "{error}");
    assert!(store.objects() == before, "a refusal leaves the folder as it was");

    store.run().put("config.toml", data.config().to_toml()).unwrap();
    for step in checkpoint::steps(&store.run()).unwrap() {
        checkpoint::delete(&store.run(), step).unwrap();
    }
    let before = store.objects();
    let text = refused(&store.run(), Resume::default());
    assert!(
        text.contains("tells of it, and no checkpoint is there any more; bring the checkpoints back"),
        "{text}"
    );
    assert!(store.objects() == before, "a refusal leaves the folder as it was");
}

#[test]
fn data_that_is_not_there_leaves_no_run_behind() {
    let (data, store) = (Data::new(), TestStore::new());
    let mut config = data.config();
    config.data.sources.get_mut("code").unwrap().url = "/nowhere/at/all".to_owned();
    let Err(error) = Run::create(store.run(), config) else { panic!("there is no such data") };
    assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
    assert!(store.objects().is_empty());
}

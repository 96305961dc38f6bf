//! Held-out data, measured while a run trains: no bit of the run changes, and the figures are the model's.

use anello_dataloader::{Dataset, InOrder};
use anello_store::metrics::Evaluated;
use anello_worker::audit::{Options, Verdict, audit};
use anello_worker::evaluate::Evaluation;
use anello_worker::{Model, Rotary};
use tch::Device;

use super::*;

/// The small run, measured every third step on two sets, of which the last stage but one has only one.
fn measured(data: &Data) -> RunConfig {
    data.write("held", 30);
    let url = |source: &str| format!("{:?}", data.folder.path().join(source).to_str().unwrap());
    let config = data.config().with(&[
        ("eval.every_steps", Some("3")),
        ("eval.sequences", Some("9")),
        ("eval.sets.held.url", Some(&url("held"))),
        ("eval.sets.code.url", Some(&url("code"))),
        ("stage.longct.eval", Some("[\"held\"]")),
    ]);
    config.unwrap()
}

fn evals(store: &Store) -> Vec<(u64, Vec<Evaluated>)> {
    let records = metrics::read(store).unwrap().into_iter();
    records.filter(|record| !record.evals.is_empty()).map(|record| (record.step, record.evals)).collect()
}

#[test]
fn a_run_that_is_measured_is_the_same_run() {
    let (data, store) = (Data::new(), Store::memory().unwrap());
    let config = measured(&data);
    assert_eq!(config.digest(), data.config().digest(), "none of it is mathematics");
    begin(&store, &config, None);
    let steps: Vec<u64> = checkpoint::steps(&store).unwrap();
    for step in steps {
        let manifest = checkpoint::verify(&store, step).unwrap();
        assert_eq!(bits(&manifest), bits(&reference().manifests[&step]), "checkpoint {step}");
    }
    let rows = metrics::read(&store).unwrap().into_iter();
    for (ours, theirs) in rows.zip(&reference().records) {
        let ours = StepRecord { evals: Vec::new(), ..ours.without_seconds() };
        assert_eq!(ours, theirs.without_seconds());
    }
    let evals = evals(&store);
    let places: Vec<(u64, Vec<&str>)> = evals
        .iter()
        .map(|(step, evals)| (*step, evals.iter().map(|eval| eval.set.as_str()).collect()))
        .collect();
    let both = vec!["code", "held"];
    let expected =
        [(2, both.clone()), (5, both.clone()), (6, both.clone()), (8, both.clone()), (9, both.clone())];
    assert_eq!(places[..5], expected, "every third step, and the ends of stages");
    assert_eq!(places[5..], [(11, vec!["held"]), (14, both)]);
}

/// By the plain way: the checkpoint's weights, all sequences at once in batches of one.
#[test]
fn the_figures_are_those_of_the_checkpoint() {
    let (data, store) = (Data::new(), Store::memory().unwrap());
    let config = measured(&data);
    begin(&store, &config, None);
    let schedule = Schedule::new(&config);
    for (step, evals) in evals(&store) {
        let Ok(manifest) = checkpoint::read_manifest(&store, step + 1) else { continue };
        let state = load(&store, manifest.step, &config.model, Device::Cpu).unwrap().state;
        let model = Model::new(&config.model, config.compute.dtype, &state.layout, &state.weights);
        let stage = schedule.at(step).unwrap().stage;
        let rotary = Rotary::new(stage.rope_base, model.head_size(), stage.sequence.into(), Device::Cpu);
        for eval in evals {
            let set = Dataset::open(&config.eval.sets[&eval.set].url).unwrap();
            let sequences = 9u32.next_multiple_of(stage.micro_batch) as usize;
            let batches = InOrder::new(&set, 1, stage.sequence, stage.mask, None);
            let mut plain = Evaluation::new(stage.loops, &[]);
            batches.take(sequences).for_each(|batch| {
                plain.add(&model, &rotary, stage.mask, &batch.unwrap());
            });
            assert_eq!(eval.counted, plain.counted, "step {step}, {}", eval.set);
            for (t, sums) in plain.steps.iter().enumerate() {
                let mean = sums.loss / plain.counted as f64;
                assert!((eval.loop_loss[t] - mean).abs() < 1e-5, "{} and {mean}", eval.loop_loss[t]);
            }
            let shares: f64 = eval.exit.iter().sum();
            assert!((shares - 1.0).abs() < 1e-4 && eval.accuracy.iter().all(|a| (0.0..=1.0).contains(a)));
        }
    }
}

#[test]
fn a_run_that_is_stopped_anywhere_is_measured_alike() {
    let (data, undisturbed) = (Data::new(), Store::memory().unwrap());
    let config = measured(&data);
    begin(&undisturbed, &config, None);
    for stop in [1, 2, 3, 5, 6, 11] {
        let store = Store::memory().unwrap();
        begin(&store, &config, Some(stop));
        resume(&store, None);
        assert_eq!(evals(&store), evals(&undisturbed), "stopped after {stop} steps");
    }
    // Killed with steps that no checkpoint has: they are measured once more, and logged once.
    let store = Store::memory().unwrap();
    begin(&store, &config, Some(6));
    checkpoint::delete(&store, 6).unwrap();
    resume(&store, None);
    assert_eq!(evals(&store), evals(&undisturbed));
}

#[test]
fn an_audit_measures_again() {
    let (data, store) = (Data::new(), Store::memory().unwrap());
    begin(&store, &measured(&data), None);
    let audited = || audit(&store, &Options { workers: 2, ..Options::default() }, &mut |_| {}).unwrap();
    assert_eq!(audited().verdict, Verdict::Confirmed, "{:#?}", audited());
    super::bisect::change_figure(&store, 8, |record| record.evals[1].accuracy[0] += 0.125);
    let difference = audited().difference.unwrap();
    assert_eq!((difference.step, difference.figures[0].name.as_str()), (8, "eval_held_accuracy_1"));
    assert_eq!(difference.figures.len(), 1);
    // Without the set all else can be audited, and what was not is said.
    std::fs::remove_dir_all(data.folder.path().join("held")).unwrap();
    let findings = audited();
    assert_eq!((findings.verdict, findings.compared.steps), (Verdict::Incomplete, 15), "{findings:#?}");
    assert!(findings.unchecked[0].starts_with("the figures on held-out data: "), "{findings:#?}");
}

#[test]
fn a_set_that_is_not_there_is_said_before_the_run_begins() {
    let (data, store) = (Data::new(), Store::memory().unwrap());
    let config = measured(&data);
    std::fs::remove_dir_all(data.folder.path().join("held")).unwrap();
    let error = Run::create(store.clone(), config).map(drop).unwrap_err();
    assert!(error.to_string().contains("/held"), "{error}");
    assert_eq!(store.list("").unwrap(), []);
}

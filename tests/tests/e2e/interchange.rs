//! Weights that leave a run in the published layout, and begin others.

use std::collections::BTreeSet;
use std::path::Path;

use anello_tests::{Process, newest_checkpoint, objects, signal, wait_until};
use serde_json::Value;

use super::world;

/// The oldest checkpoint that the undisturbed run has kept: of its first stage, before the stack grows.
fn oldest() -> u64 {
    let step = |path: &Path| {
        path.to_str()?.split_once("/checkpoints/")?.1.strip_suffix("/manifest.json")?.parse().ok()
    };
    objects(&world().folder.join("undisturbed")).iter().filter_map(|path| step(path)).min().unwrap()
}

#[test]
fn runs_that_begin_with_the_same_weights_are_the_same_run() {
    let world = world();
    let from = format!("undisturbed@{}", oldest());
    world.anello(&["export", &from, "--to", "published", "--dtype", "fp32", "--shard", "20kB"]).expect(0);
    let there: BTreeSet<String> = std::fs::read_dir(world.folder.join("published"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for file in [
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "README.md",
    ] {
        assert!(there.contains(file), "{file} is not among {there:?}");
    }
    let said =
        world.anello(&["import", "published", "--config", "small.toml", "--out", "imported"]).expect(0);
    assert!(said.contains("train it: anello run --resume imported"), "{said}");
    world
        .anello(&["export", "imported@0", "--to", "published-again", "--dtype", "fp32", "--shard", "20kB"])
        .expect(0);
    for file in &there {
        let [a, b] = ["published", "published-again"]
            .map(|folder| std::fs::read(world.folder.join(folder).join(file)));
        assert!(a.unwrap() == b.unwrap(), "{file} changed");
    }

    // One process; two workers that begin with the run itself; and one that goes on with a config that names no digest.
    world.anello(&["run", "--resume", "imported", "--sample", "0"]).expect(0);
    let set = format!("init.from={from}");
    let ring = ["run", "small.toml", "--set", &set, "--out", "warm", "--workers", "2", "--sample", "0"];
    world.anello(&ring).expect(0);
    world.anello(&["checkpoint", "diff", "imported", "warm"]).expect(0);
    world.anello(&["checkpoint", "diff", "imported", "undisturbed"]).expect(1);
    world
        .anello(&["run", "small.toml", "--set", &set, "--out", "halves", "--until", "5", "--sample", "0"])
        .expect(0);
    world.anello(&["run", "small.toml", "--set", &set, "--resume", "halves", "--sample", "0"]).expect(0);
    world.anello(&["checkpoint", "diff", "halves", "warm"]).expect(0);
}

/// A larger stack begins with a smaller one of another run, repeated: one process, and a ring of which a worker is killed, come to the
/// same weights, and to others than a run that begins with its seed.
#[test]
fn a_larger_stack_begins_with_a_checkpoint_of_another_run() {
    let sets = ["model.layers=3", "stages=[\"warmup\",\"stable\"]"].map(|set| ["--set", set]).concat();
    let run = |out: &str, more: &[&str]| {
        let run = ["run", "small.toml", "--out", out, "--sample", "0"];
        Process::start(&world().folder, &[&run[..], &sets, more].concat())
    };
    let from = format!("undisturbed@{}", oldest());
    let begun = format!("init.from={from}");
    let begun = ["--set", &begun];
    run("grown", &begun).wait().expect(0);
    let mut ring = run("grown-ring", &[&begun[..], &["--workers", "2"]].concat());
    wait_until("it is so far", || newest_checkpoint(&world().folder.join("grown-ring")) >= 6 || ring.ended());
    if let Some(worker) = ring.children().first() {
        signal(*worker, "KILL");
    }
    ring.wait().expect(0);
    run("grown-of-seed", &[]).wait().expect(0);
    let world = world();
    world.anello(&["checkpoint", "diff", "grown", "grown-ring"]).expect(0);
    world.anello(&["checkpoint", "diff", "grown", "grown-of-seed"]).expect(1);
    world.anello(&["audit", "grown"]).expect(0);
    let config = std::fs::read_to_string(world.folder.join("grown/config.toml")).unwrap();
    assert!(config.contains(&from) && config.contains("weights = \""), "the digest is pinned: {config}");
    let refused = run("never", &["--set", "init.from=undisturbed"]).wait();
    let said = refused.log.clone();
    refused.expect(2);
    assert!(said.contains("has 2 layers, the config's model 3; give as many, or a multiple"), "{said}");
}

/// The card says what the weights are, as the run's manifest and metrics have it.
#[test]
fn the_card_tells_where_the_weights_come_from() {
    let world = world();
    world.anello(&["export", "undisturbed", "--to", "carded"]).expect(0);
    let card = std::fs::read_to_string(world.folder.join("carded/README.md")).unwrap();
    let step = newest_checkpoint(&world.folder.join("undisturbed"));
    let manifest = world.folder.join(format!("undisturbed/checkpoints/{step:010}/manifest.json"));
    let manifest: Value = serde_json::from_slice(&std::fs::read(manifest).unwrap()).unwrap();
    let quoted = |what: &str, digest: &Value| format!("| {what} | `{}` |", digest.as_str().unwrap());
    let mut expected =
        vec![quoted("config digest", &manifest["config"]), quoted("weights digest", &manifest["weights"])];
    let data = manifest["data"].as_object().unwrap();
    assert_eq!(data.keys().collect::<Vec<_>>(), ["lists", "tales"]);
    expected.extend(data.iter().map(|(name, digest)| quoted(&format!("data index digest, {name}"), digest)));
    // 512, 1 792, 768, 1 280 and 768 of the stages.
    assert_eq!(manifest["tokens"], 5120);
    expected.push("| tokens seen | 5 120 |".to_owned());
    let metrics = world.anello(&["metrics", "undisturbed", "--jsonl"]).expect(0);
    let last: Value = serde_json::from_str(metrics.lines().next_back().unwrap()).unwrap();
    assert_eq!(last["step"].as_u64().unwrap() + 1, step);
    expected.extend((1..=3).map(|t| {
        let of = |what: &str| last[what][t - 1].as_f64().unwrap();
        format!("| {t} | {:.4} | {:.1} % |", of("loop_loss"), of("exit") * 100.0)
    }));
    for line in expected {
        assert!(
            card.lines().any(|of_card| of_card.replace(['\u{a0}', '\u{202f}'], " ") == line),
            "{line}: {card}"
        );
    }
    assert!(!card.contains("| 4 |"), "{card}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let world = world();
    let run = |more: &[&str]| {
        let arguments = [&["run", "small.toml", "--out", "refused"], more].concat();
        let done = world.anello(&arguments);
        assert!(!world.folder.join("refused/config.toml").exists(), "nothing is made");
        done
    };
    let place = "init.from=undisturbed";
    for (more, code, expected) in [
        (vec!["--set", place, "--set", "model.ffn=64"], 2, "has other sizes than the config's"),
        (vec!["--set", "init.from=data"], 2, "holds neither a run nor a published checkpoint"),
        (vec!["--set", "init.from=undisturbed@999"], 1, "has no checkpoints/0000000999/manifest.json"),
        (
            vec!["--set", "init.weights=abc", "--set", place],
            2,
            "init.weights is abc; give the digest of the weights",
        ),
        (vec!["--set", "init.form=x"], 2, "init.form is no key; did you mean `from`?"),
    ] {
        let done = run(&more);
        let said = done.log.clone();
        done.expect(code);
        assert!(said.contains(expected), "{more:?}: {said}");
    }
}

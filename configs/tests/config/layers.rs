//! Which layer wins, what a table in a layer does to the one below, and where relative paths go.

use std::path::PathBuf;

use anello_configs::*;

use crate::{SMALL, folder, load, loaded, path, small};

#[test]
fn includes_then_the_file_then_the_environment_then_set() {
    let folder = folder(&[
        (
            "base.toml",
            &format!(
                "{SMALL}\n[optimizer]\nclip = 1\nbeta1 = 0.1\nbeta2 = 0.2\neps = 0.1\nweight_decay = 0.1\n"
            ),
        ),
        ("second.toml", "[optimizer]\nclip = 2\nbeta1 = 0.2\neps = 0.2\nweight_decay = 0.2\n"),
        (
            "run.toml",
            "include = [\"base.toml\", \"second.toml\"]\n[optimizer]\nclip = 3\neps = 0.3\nweight_decay = 0.3\n",
        ),
    ]);
    let file = path(&folder, "run.toml");
    let variable = |key: &str, value: &str| (format!("ANELLO_SET__optimizer__{key}"), value.to_owned());
    let options = LoadOptions {
        environment: vec![
            variable("clip", "4"),
            variable("weight_decay", "0.4"),
            ("PATH".to_owned(), "/bin".to_owned()),
        ],
        sets: vec!["optimizer.clip=5".to_owned(), "optimizer.clip = 6".to_owned()],
        ..LoadOptions::new(&*file)
    };
    let Loaded { config, origins, files } = RunConfig::load(&options).unwrap();
    let expected = Optimizer { beta1: 0.2, beta2: 0.2, eps: 0.3, weight_decay: 0.4, clip: 6.0 };
    assert_eq!(config.optimizer, expected);
    assert_eq!(files, [path(&folder, "base.toml"), path(&folder, "second.toml"), file.clone()]);
    let at = |key: &str| origins[key].to_string().replace(folder.path().to_str().unwrap(), "");
    assert_eq!(at("optimizer.beta2"), "/base.toml:37:9");
    assert_eq!(at("optimizer.beta1"), "/second.toml:3:9");
    assert_eq!(at("optimizer.eps"), "/run.toml:4:7");
    assert_eq!(at("optimizer.weight_decay"), "environment ANELLO_SET__optimizer__weight_decay");
    assert_eq!(at("optimizer.clip"), "--set optimizer.clip = 6");
    assert!(!origins.contains_key("seed"), "nobody wrote it");
}

#[test]
fn a_braced_table_replaces_and_every_other_merges() {
    let mixture = |sets: &[&str]| {
        let config = loaded("tiny", sets);
        config.stages[1]
            .mixture
            .iter()
            .map(|(name, weight)| format!("{name}={weight}"))
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(mixture(&[]), "code=0.3 docs=0.7");
    assert_eq!(mixture(&["stage.stable.mixture.code=0.5"]), "code=0.5 docs=0.7");
    assert_eq!(mixture(&["stage.stable.mixture={code = 1}"]), "code=1");
    assert_eq!(mixture(&["stage.stable.mixture.code=0"]), "docs=0.7");
}

#[test]
fn a_later_list_of_stages_may_drop_some() {
    let config = loaded("tiny", &["stages=[\"stable\", \"warmup\"]"]);
    assert_eq!(
        config.stages.iter().map(|stage| stage.name.as_str()).collect::<Vec<_>>(),
        ["stable", "warmup"]
    );
    // What a dropped stage says no longer matters.
    loaded("tiny", &["stage.longct.batch=1", "stages=[\"stable\"]"]);
}

#[test]
fn a_later_curve_drops_the_numbers_of_the_one_before() {
    let config = loaded("tiny", &["stage.ct-anneal.lr_curve=constant", "stage.ct-anneal.lr=1e-4"]);
    assert_eq!(config.stages[2].lr, LrCurve::Constant { lr: 1e-4 });
    let config = loaded("tiny", &["stage.stable.lr=1e-4"]);
    assert_eq!(config.stages[1].lr, LrCurve::Constant { lr: 1e-4 });
}

#[test]
fn none_takes_back_what_an_earlier_layer_set() {
    let config = loaded(
        "ouro-1.4b",
        &["checkpoint.keep_every_steps=none", "compute.threads=2", "compute.threads=none"],
    );
    assert_eq!((config.checkpoint.keep_every_steps, config.compute.threads), (None, None));
    assert_eq!(loaded("tiny", &["data.tokenizer=none"]).data.tokenizer, None);
}

#[test]
fn quantities_and_words_need_no_quotes_on_the_command_line() {
    let config =
        loaded("tiny", &["stage.stable.tokens=0.05T", "compute.dtype=bf16", "data.prefetch_bytes=1GB"]);
    assert_eq!(config.stages[1].tokens, 50_000_000_000);
    assert_eq!((config.compute.dtype, config.data.prefetch_bytes), (Dtype::Bf16, 1_000_000_000));
    assert_eq!(loaded("tiny", &["stage.stable.tokens=6e12"]).stages[1].tokens, 6_000_000_000_000);
    assert_eq!(loaded("tiny", &["name=\"quoted\""]).name, "quoted");
}

#[test]
fn defaults_fill_what_nobody_wrote() {
    let config = RunConfig::parse("small.toml", SMALL).unwrap();
    assert_eq!((config.seed, config.model.kv_heads), (1, config.model.heads));
    let stage = &config.stages[1];
    assert_eq!((stage.loops, stage.beta, stage.rope_base), (4, 0.05, 1e4));
    // A single source needs no mixture, and loss = "gate" trains the gate.
    let one = SMALL
        .replace("code.url = \"data/code\"\n", "")
        .replace("mixture = { web = 1 }\n", "loss = \"gate\"\n");
    let one = RunConfig::parse("one.toml", &one.replace(", code = 0.3", "")).unwrap();
    assert_eq!(one.stages[0].mixture, [("web".to_owned(), 1.0)].into());
    assert_eq!(one.stages[0].trains, Trains::Gate);
}

/// Whoever trains other parameters than the stage before begins with moments at zero, and says so where the config is kept.
#[test]
fn a_stage_that_trains_something_else_resets_the_optimizer() {
    let resets = |sets: &[&str]| {
        let config = loaded("tiny", &[&["stages=[\"warmup\",\"stable\",\"mid-training\"]"], sets].concat());
        let resets = |config: &RunConfig| -> Vec<bool> {
            config.stages.iter().map(|stage| stage.reset_optimizer).collect()
        };
        let again = RunConfig::parse("again", &config.to_toml()).unwrap();
        assert_eq!(resets(&again), resets(&config));
        resets(&config)
    };
    assert_eq!(resets(&[]), [false; 3]);
    assert_eq!(resets(&["stage.stable.loss=gate"]), [false, true, true]);
    assert_eq!(resets(&["stage.stable.loss=gate", "stage.mid-training.loss=gate"]), [false, true, false]);
    assert_eq!(resets(&["stage.warmup.loss=gate"]), [true, true, false]);
    assert_eq!(resets(&["stage.stable.loss=sft"]), [false; 3], "all but the gate move");
    let both = [
        "stage.stable.loss=gate",
        "stage.stable.reset_optimizer=false",
        "stage.mid-training.reset_optimizer=false",
    ];
    assert_eq!(resets(&both), [false; 3], "the moments stay");
}

#[test]
fn a_fault_comes_once_or_again_and_again() {
    for (text, again) in [("wire@7/1", false), ("wire@7/1*", true)] {
        let config = loaded("tiny", &[&format!("ring.fault={text}")]);
        let fault = Fault { buffer: "wire".to_owned(), step: 7, rank: 1, again };
        assert_eq!(config.ring.fault, Some(fault));
        assert_eq!(RunConfig::parse("again", &config.to_toml()).unwrap().ring, config.ring);
    }
    for wrong in ["wire@7", "wire@7/1**", "wire@7/*", "heat@7/1"] {
        let error = load("tiny", &[&format!("ring.fault={wrong}")]).unwrap_err().to_string();
        assert!(error.contains("ring.fault"), "{error}");
    }
}

#[test]
fn relative_paths_are_relative_to_where_they_stand() {
    let folder = folder(&[
        ("configs/base.toml", SMALL),
        (
            "runs/run.toml",
            "include = [\"../configs/base.toml\"]\ndata.sources.code.url = \"s3://bucket/code\"\n",
        ),
    ]);
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let options = LoadOptions {
        directory: folder.path().to_owned(),
        sets: vec!["data.tokenizer=tokenizer.json".to_owned()],
        ..LoadOptions::new("runs/run.toml")
    };
    let data = RunConfig::load(&options).unwrap().config.data;
    assert_eq!(data.sources["web"].url, at("runs/../configs/data/web"));
    assert_eq!(data.sources["code"].url, "s3://bucket/code");
    assert_eq!(data.tokenizer, Some(at("tokenizer.json")));
    // Those of a preset are relative to the current directory, and stay so when it is not given.
    let options = LoadOptions { directory: PathBuf::from("/somewhere"), ..LoadOptions::new("tiny") };
    assert_eq!(
        RunConfig::load(&options).unwrap().config.data.sources["docs"].url,
        "/somewhere/data/tiny/docs"
    );
    assert_eq!(loaded("tiny", &[]).data.sources["docs"].url, "data/tiny/docs");
    std::fs::write(folder.path().join("mine.toml"), "include = \"preset:tiny\"\n").unwrap();
    assert_eq!(loaded(&at("mine.toml"), &[]).data.sources["docs"].url, "data/tiny/docs");
}

#[test]
fn check_sources_names_the_ones_that_are_missing_and_used() {
    let folder = folder(&[("run.toml", SMALL), ("data/web/part.parquet", "")]);
    let file = path(&folder, "run.toml");
    let error = load(&file, &[]).unwrap().check_sources().unwrap_err().to_string();
    let shown = error.replace(folder.path().to_str().unwrap(), "");
    insta::assert_snapshot!(shown, @"
    the config has a problem
      /run.toml:14:12: data.sources.code.url is /data/code, which does not exist; make it with `anello data`, or set data.sources.code.url to where it is
    ");
    load(&file, &["stage.stable.mixture={web=1}"]).unwrap().check_sources().unwrap();
    load(&file, &["data.sources.code.url=gs://bucket/code"]).unwrap().check_sources().unwrap();
    let found = format!("data.sources.code.url=file://{}/data/web", folder.path().display());
    load(&file, &[&found]).unwrap().check_sources().unwrap();
}

#[test]
fn a_file_may_be_included_twice_but_not_by_itself() {
    let folder = folder(&[
        ("base.toml", SMALL),
        ("a.toml", "include = [\"base.toml\"]\nseed = 2\n"),
        ("b.toml", "include = \"base.toml\"\nlanes = 1\n"),
        ("both.toml", "include = [\"a.toml\", \"./b.toml\"]\n"),
        ("ring.toml", "include = [\"ring2.toml\"]\n"),
        ("ring2.toml", "include = [\"base.toml\", \"ring.toml\"]\n"),
    ]);
    let config = loaded(&path(&folder, "both.toml"), &[]);
    // b's copy of the base comes after a, but the base says nothing of the seed.
    assert_eq!((config.seed, config.lanes), (2, 1));
    let error = load(&path(&folder, "ring.toml"), &[]).unwrap_err().to_string();
    insta::assert_snapshot!(error.replace(folder.path().to_str().unwrap(), ""), @"
    the config has a problem
      /ring2.toml:1:25: /ring.toml includes itself, by way of /ring.toml → /ring2.toml; take one of these includes out
    ");
}

#[test]
fn a_config_that_is_no_file_here_is_laid_under_all_else() {
    let written =
        small(&["data.sources.web.url=s3://bucket/web", "data.sources.code.url=s3://bucket/code"]).unwrap();
    let options = |text: String, set: &str| LoadOptions {
        text: Some(text),
        sets: vec![set.to_owned()],
        ..LoadOptions::new("s3://bucket/run/config.toml")
    };
    let loaded = RunConfig::load(&options(written.to_toml(), "seed=77")).unwrap();
    assert_eq!(loaded.config, RunConfig { seed: 77, ..written.clone() });
    assert_eq!(loaded.files, ["s3://bucket/run/config.toml"]);
    let wrong = RunConfig::load(&options(written.to_toml().replace("lanes = 2", "lanes = 3"), "seed=1"));
    let text = wrong.unwrap_err().to_string();
    assert!(text.contains("s3://bucket/run/config.toml") && text.contains("lanes is 3"), "{text}");
}

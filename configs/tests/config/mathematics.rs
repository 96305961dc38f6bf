//! What names a run's bits, and what does not.

use anello_configs::RunConfig;

use crate::{SMALL, loaded, small};

#[test]
fn what_leaves_the_bits_alone_leaves_the_digest_alone() {
    let config = small(&[]).unwrap();
    for set in [
        "name=other",
        "compute.threads=3",
        "compute.device=cuda",
        "compute.device=cuda:3",
        "compute.recompute=none",
        "compute.recompute=loop",
        "compute.offload=true",
        "checkpoint.every_steps=7",
        "checkpoint.keep_last=9",
        "checkpoint.keep_every_steps=9",
        "checkpoint.keep_stage_ends=false",
        "checkpoint.part_bytes=1MiB",
        "ring.lanes=by-speed",
        "ring.state_copies=2",
        "ring.state_bandwidth=1MiB",
        "ring.transport=nccl",
        "store.bandwidth=50MiB",
        "guard.rollback_steps=2",
        "data.prefetch_bytes=1MiB",
        "data.cache_dir=/var/cache/anello",
        "data.tokenizer=tokenizer.json",
        "data.sources.web.url=s3://bucket/web",
        "data.sources.unused.url=unused",
    ] {
        let other = small(&[set]).unwrap();
        assert_ne!(other, config, "{set}");
        assert_eq!(other.digest(), config.digest(), "{set}");
        assert_eq!(other.diff_mathematics(&config), [], "{set}");
    }
}

#[test]
fn graphs_leave_the_bits_of_fused_kernels_alone() {
    let with =
        |more: &[&str]| small(&[&["compute.device=cuda", "compute.fused=true"], more].concat()).unwrap();
    let (config, other) = (with(&[]), with(&["compute.graphs=true"]));
    assert_ne!(other, config);
    assert_eq!((other.digest(), other.diff_mathematics(&config)), (config.digest(), Vec::new()));
}

#[test]
fn what_changes_the_bits_is_named() {
    let config = small(&[]).unwrap();
    let table = [
        ("seed=2", "seed: 1 here, 2 there"),
        ("lanes=1", "lanes: 2 here, 1 there"),
        ("model.ffn=32", "model.ffn: 16 here, 32 there"),
        ("model.rms_eps=1e-5", "model.rms_eps: 1e-6 here, 1e-5 there"),
        ("optimizer.clip=2", "optimizer.clip: 1.0 here, 2.0 there"),
        ("compute.dtype=bf16", "compute.dtype: \"fp32\" here, \"bf16\" there"),
        ("compute.device=cuda compute.fused=true", "compute.fused: absent here, true there"),
        ("compute.loss_chunk_tokens=512", "compute.loss_chunk_tokens: 1024 here, 512 there"),
        ("data.on_corrupt=skip", "data.on_corrupt: \"fail\" here, \"skip\" there"),
        (
            "stages=[\"stable\",\"warmup\"]",
            "stages: [\"warmup\", \"stable\"] here, [\"stable\", \"warmup\"] there",
        ),
        ("stage.stable.lr=1e-4", "stage.stable.lr: 0.001 here, 0.0001 there"),
        ("stage.stable.mixture.code=0", "stage.stable.mixture.code: 0.3 here, absent there"),
        ("stage.stable.upcycle.layers=4", "stage.stable.upcycle.layers: absent here, 4 there"),
        ("stage.stable.micro_batch=2", "stage.stable.micro_batch: 1 here, 2 there"),
    ];
    for (set, difference) in table {
        let other = small(&set.split(' ').collect::<Vec<_>>()).unwrap();
        assert_ne!(other.digest(), config.digest(), "{set}");
        let found: Vec<String> = config.diff_mathematics(&other).iter().map(ToString::to_string).collect();
        assert_eq!(found, [difference], "{set}");
    }
}

#[test]
fn how_it_is_written_does_not_matter() {
    let config = RunConfig::parse("small.toml", SMALL).unwrap();
    let spelled = SMALL
        .replace("tokens = \"4Ki\"", "tokens = 4_096")
        .replace("1e-3", "0.001")
        .replace("= 0\n", "= 0.0\n");
    assert_eq!(RunConfig::parse("other.toml", &spelled).unwrap().digest(), config.digest());
}

/// The digest of a config is in run folders: it may change only when the mathematics does.
#[test]
fn the_digest_is_pinned() {
    insta::assert_snapshot!(RunConfig::parse("small.toml", SMALL).unwrap().digest());
}

#[test]
fn the_resolved_config_reads_like_a_config() {
    insta::assert_snapshot!(
        loaded(
            "tiny",
            &[
                "stage.stable.batch_ramp={from=\"1Ki\",over=\"256Ki\"}",
                "stage.stable.micro_batch=1",
                "stage.longct.upcycle.layers=4"
            ]
        )
        .to_toml()
    );
}

#[test]
fn a_config_changed_in_code_can_be_checked() {
    let mut config = small(&[]).unwrap();
    assert!(config.check().is_ok());
    config.lanes = 3;
    let error = config.check().unwrap_err().to_string();
    assert!(error.contains("lanes is 3, which is not a power of two; give 2 or 4"), "{error}");
}

/// The README's tables against the code: every key is there, and says rightly whether the bits depend on it.
#[test]
fn the_readme_knows_every_key() {
    let readme = include_str!("../../README.md");
    let sets = [
        "compute.threads=2",
        "data.cache_dir=cache",
        "store.bandwidth=100MB",
        "checkpoint.keep_every_steps=5",
        "ring.state_bandwidth=100MB",
        "ring.fault=weights@3/1",
        "init.from=runs/a@4",
        "init.weights=0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "stage.stable.batch_ramp={from=\"1Ki\",over=\"256Ki\"}",
        "stage.stable.micro_batch=1",
        "stage.stable.lr_curve=wsd",
        "stage.longct.upcycle.layers=4",
        "eval.sets.tales.url=tales",
        "stage.stable.eval=[\"tales\"]",
    ];
    let config = loaded("tiny", &sets);
    let mathematics = config.mathematics();
    let (mut section, mut seen) = (String::new(), std::collections::BTreeSet::new());
    for line in config.to_toml().lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = format!("{}.", name.trim_end_matches(']'));
        }
        let Some((key, _)) = line.split_once(" = ") else { continue };
        let full = format!("{section}{key}");
        let mut shown = full.clone();
        if section.starts_with("stage.") {
            shown = key
                .split_once('.')
                .map_or(key, |(head, _)| if head == "mixture" { "mixture.SOURCE" } else { key })
                .to_owned();
        } else if section.starts_with("data.sources.") {
            shown = "data.sources.NAME.url".to_owned();
        } else if section.starts_with("eval.sets.") {
            shown = "eval.sets.NAME.url".to_owned();
        }
        let row = readme.lines().find(|row| {
            row.starts_with('|') && row.split('|').nth(1).unwrap().contains(&format!("`{shown}`"))
        });
        let row = row.unwrap_or_else(|| panic!("{shown} has no row"));
        let bits = row.split('|').nth(3).unwrap().trim() == "yes";
        assert_eq!(bits, mathematics.contains_key(&full), "{row}");
        seen.insert(row);
    }
    let rows = readme.lines().filter(|row| row.starts_with("| `")).count();
    assert_eq!(seen.len(), rows, "a row of the README is no key");
}

#[test]
fn a_config_with_other_values_is_the_one_that_was_set_so() {
    let config = small(&[]).unwrap();
    let ramp = "stage.stable.batch_ramp={from=64,over=\"2Ki\"}";
    let other = small(&["seed=9", "model.rms_eps=1e-5", ramp]).unwrap();
    let differences = config.diff_mathematics(&other);
    assert_eq!(differences.len(), 4, "{differences:?}");
    let forth: Vec<_> = differences.iter().map(|d| (d.key.as_str(), d.theirs.as_deref())).collect();
    // Each has a folder of its own for its sources.
    let same = |a: RunConfig, b: &RunConfig| {
        assert_eq!((a.digest(), &a.stages, &a.model), (b.digest(), &b.stages, &b.model));
    };
    same(config.with(&forth).unwrap(), &other);
    let back: Vec<_> = differences.iter().map(|d| (d.key.as_str(), d.ours.as_deref())).collect();
    same(other.with(&back).unwrap(), &config);
    assert_eq!(config.with(&[]).unwrap(), config);
    let wrong = config.with(&[("seed", Some("-1"))]).unwrap_err().to_string();
    assert!(wrong.contains("seed"), "{wrong}");
}

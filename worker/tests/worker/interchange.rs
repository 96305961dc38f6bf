//! The published layout: what is written is read back, and a broken folder is refused with all that is wrong.

use std::fs;
use std::path::{Path, PathBuf};

use anello_configs::{Dtype, Init, Model, RunConfig};
use anello_store::Store;
use anello_worker::interchange::{self, Export, Use};
use anello_worker::{Layout, as_slice, initial_state, pin_init};
use proptest::prelude::*;
use serde_json::{Value, json};
use tch::Device;

use super::support::sizes;

const USED: Use = Use { loops: 3, rope_base: 40_000.0, positions: 256, init_std: 0.3 };

fn weights(model: &Model) -> (Layout, Vec<f32>) {
    let layout = Layout::new(model, model.layers);
    let weights = as_slice(&layout.initial(9, Device::Cpu)).to_vec();
    (layout, weights)
}

fn export(to: &Path, model: &Model, dtype: Dtype, shard_bytes: u64) -> interchange::Exported {
    let (layout, weights) = weights(model);
    let what = Export {
        model,
        used: USED,
        dtype,
        shard_bytes,
        tokenizer: Some(b"{}"),
        readme: "where it comes from",
    };
    interchange::export(to, &layout, &weights, &what).unwrap()
}

fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all.into_iter()
        .map(|path| (path.strip_prefix(folder).unwrap().to_owned(), fs::read(&path).unwrap()))
        .collect()
}

fn read(folder: &Path, model: &Model) -> Result<(Layout, Vec<f32>), String> {
    interchange::read(&Store::open(folder.to_str().unwrap()).unwrap(), model)
        .map_err(|error| error.to_string())
}

#[test]
fn weights_come_back_as_they_were_written() {
    let scratch = tempfile::tempdir().unwrap();
    let model = sizes();
    let (layout, original) = weights(&model);
    for (name, dtype, shard) in
        [("one", Dtype::Fp32, u64::MAX), ("many", Dtype::Fp32, 9000), ("half", Dtype::Bf16, 9000)]
    {
        let to = scratch.path().join(name);
        let exported = export(&to, &model, dtype, shard);
        assert_eq!(exported.shards > 1, shard == 9000, "{name}");
        assert_eq!(to.join("model.safetensors.index.json").exists(), shard == 9000);
        let (found, read_back) = read(&to, &model).unwrap();
        assert_eq!(found, layout);
        for entry in layout.entries() {
            for at in entry.range() {
                let expected = if dtype == Dtype::Bf16 {
                    half::bf16::from_f32(original[at]).to_f32()
                } else {
                    original[at]
                };
                assert_eq!(read_back[at].to_bits(), expected.to_bits(), "{name}, {}", entry.name);
            }
        }
        // What was read and is written again is the same bytes.
        let again = scratch.path().join(format!("{name}-again"));
        let what = Export {
            model: &model,
            used: interchange::published_use(&Store::open(to.to_str().unwrap()).unwrap()).unwrap(),
            dtype,
            shard_bytes: shard,
            tokenizer: Some(b"{}"),
            readme: "where it comes from",
        };
        interchange::export(&again, &layout, &read_back, &what).unwrap();
        assert_eq!(files(&to), files(&again), "{name}");
        let refused = interchange::export(&again, &layout, &read_back, &what).unwrap_err().to_string();
        assert!(refused.contains("is there already; give a folder that is not"), "{refused}");
    }
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 6, "nothing half-written is left");
}

#[test]
fn the_config_has_the_published_keys() {
    let scratch = tempfile::tempdir().unwrap();
    let to = scratch.path().join("hf");
    export(&to, &sizes(), Dtype::Bf16, u64::MAX);
    let config: Value = serde_json::from_slice(&fs::read(to.join("config.json")).unwrap()).unwrap();
    let expected = json!({
        "model_type": "ouro", "architectures": ["OuroForCausalLM"], "vocab_size": 61, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "hidden_act": "silu", "max_position_embeddings": 256, "initializer_range": 0.3, "rms_norm_eps": 1e-6,
        "rope_theta": 40000.0, "tie_word_embeddings": false, "total_ut_steps": 3, "early_exit_threshold": 1.0,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "bfloat16",
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(config[key], *value, "{key}");
    }
    let found = interchange::published_model(&Store::open(to.to_str().unwrap()).unwrap()).unwrap();
    assert_eq!(found, Model { embed_std: 0.3, ..sizes() });
}

/// A safetensors file of these tensors.
fn tensors(list: &[(&str, &str, Vec<usize>, usize)]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in list {
        let end = data.len() + bytes;
        header.insert(
            (*name).to_owned(),
            json!({ "dtype": dtype, "shape": shape, "data_offsets": [data.len(), end] }),
        );
        data.resize(end, 0);
    }
    let header = serde_json::to_vec(&header).unwrap();
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}

/// A file of two tensors of two numbers, which its table puts at these bytes.
fn placed(places: [(usize, usize); 2]) -> Vec<u8> {
    let entry = |(from, to)| json!({ "dtype": "F32", "shape": [2], "data_offsets": [from, to] });
    let header = serde_json::to_vec(&json!({ "a": entry(places[0]), "b": entry(places[1]) })).unwrap();
    let end = places.map(|(_, to)| to).into_iter().max().unwrap();
    [&(header.len() as u64).to_le_bytes()[..], &header, &vec![0; end]].concat()
}

#[test]
fn a_broken_folder_is_refused_with_all_that_is_wrong() {
    let scratch = tempfile::tempdir().unwrap();
    type Break = fn(&Path);
    fn config(folder: &Path, change: impl Fn(&mut Value)) {
        json_file(&folder.join("config.json"), change);
    }
    fn index(folder: &Path, change: impl Fn(&mut Value)) {
        json_file(&folder.join("model.safetensors.index.json"), change);
    }
    fn json_file(path: &Path, change: impl Fn(&mut Value)) {
        let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        change(&mut value);
        fs::write(path, value.to_string()).unwrap();
    }
    fn shard(folder: &Path) -> PathBuf {
        let name =
            files(folder).into_iter().find(|(path, _)| path.extension().is_some_and(|e| e == "safetensors"));
        folder.join(name.unwrap().0)
    }
    let cases: &[(Break, &[&str])] = &[
        (|f| fs::remove_file(f.join("config.json")).unwrap(), &["config.json is missing"]),
        (|f| fs::write(f.join("config.json"), "[1]").unwrap(), &["config.json is no JSON object"]),
        (|f| fs::write(f.join("config.json"), [0xff, 0xfe]).unwrap(), &["config.json is no JSON object"]),
        (
            |f| {
                config(f, |c| {
                    c["hidden_size"] = json!(64);
                    c["num_hidden_layers"] = json!(5);
                    c["hidden_act"] = json!("gelu");
                    c["tie_word_embeddings"] = json!(true);
                    c["rope_scaling"] = json!({ "type": "yarn" });
                    c.as_object_mut().unwrap().remove("vocab_size");
                })
            },
            &[
                "hidden_size is 64; the config's model has 32",
                "num_hidden_layers is 5; the config's model has 2",
                "hidden_act is \"gelu\"",
                "tie_word_embeddings is true",
                "rope_scaling is {\"type\":\"yarn\"}",
                "vocab_size is missing",
            ],
        ),
        // Sizes, names and shapes are told of together, however many do not fit.
        (
            |f| {
                config(f, |c| c["hidden_size"] = json!(64));
                fs::write(shard(f), tensors(&[("model.else", "F32", vec![1], 4)])).unwrap();
                index(f, |i| {
                    for at in 0..40 {
                        i["weight_map"][format!("model.more.{at}")] =
                            json!("model-00001-of-00002.safetensors");
                    }
                });
            },
            &[
                "hidden_size is 64",
                "model.else in model-00001",
                "model.more.0 is no tensor",
                "model.more.39 is no tensor",
                "model.embed_tokens.weight is missing",
            ],
        ),
        (|f| index(f, |i| i["weight_map"] = json!(7)), &["has no weight_map of names to files"]),
        (
            |f| {
                index(f, |i| {
                    i["weight_map"]["lm_head.weight"] = json!("../../etc/passwd");
                    i["weight_map"]["model.norm.weight"] = json!("/etc/passwd.safetensors");
                    i["weight_map"]["model.extra"] = json!("model-00001-of-00002.safetensors");
                })
            },
            &[
                "lm_head.weight is in \"../../etc/passwd\", which is no file of this folder",
                "model.norm.weight is in \"/etc/passwd.safetensors\"",
                "model.extra is no tensor of this model",
            ],
        ),
        (
            |f| {
                index(f, |i| {
                    i["weight_map"]["model.layers.0.self_attn.q_proj.weight"] =
                        i["weight_map"]["lm_head.weight"].clone();
                    i["weight_map"].as_object_mut().unwrap().remove("model.embed_tokens.weight");
                })
            },
            &[
                "model.layers.0.self_attn.q_proj.weight is in model-00002-of-00013.safetensors, which the index does not say",
                "model.layers.0.self_attn.q_proj.weight is missing",
                "model.embed_tokens.weight is missing",
            ],
        ),
        (|f| fs::remove_file(shard(f)).unwrap(), &["model-00001-of-", "safetensors is missing"]),
        (
            |f| {
                let bytes = fs::read(shard(f)).unwrap();
                fs::write(shard(f), &bytes[..bytes.len() - 5]).unwrap();
            },
            &["is no safetensors"],
        ),
        // A header that claims to be larger than the file, than the address space, and one that is no JSON.
        (|f| fs::write(shard(f), u64::MAX.to_le_bytes()).unwrap(), &["is no safetensors"]),
        (
            |f| fs::write(shard(f), [&(1u64 << 40).to_le_bytes()[..], b"{}"].concat()).unwrap(),
            &["is no safetensors"],
        ),
        (|f| fs::write(shard(f), [&2u64.to_le_bytes()[..], b"{{"].concat()).unwrap(), &["is no safetensors"]),
        // Tensors that share bytes, that leave some to nobody, and one that ends before it begins.
        (
            |f| fs::write(shard(f), placed([(0, 8), (4, 12)])).unwrap(),
            &["is no safetensors: invalid offset for tensor `b`"],
        ),
        (
            |f| fs::write(shard(f), placed([(0, 8), (12, 20)])).unwrap(),
            &["is no safetensors: invalid offset for tensor `b`"],
        ),
        (|f| fs::write(shard(f), placed([(0, 8), (8, 0)])).unwrap(), &["is no safetensors"]),
        // A tensor of 2^62 rows.
        (
            |f| {
                fs::write(shard(f), tensors(&[("model.embed_tokens.weight", "F32", vec![1 << 62, 32], 128)]))
                    .unwrap()
            },
            &["is no safetensors"],
        ),
        (
            |f| {
                let wrong = [
                    ("model.embed_tokens.weight", "F32", vec![32, 61], 4 * 32 * 61),
                    ("model.else", "F32", vec![1], 4),
                ];
                fs::write(shard(f), tensors(&wrong)).unwrap();
            },
            &[
                "model.embed_tokens.weight in model-00001",
                "has the shape [32, 61], not [61, 32]",
                "model.else in model-00001",
            ],
        ),
        (
            |f| {
                fs::write(
                    shard(f),
                    tensors(&[("model.embed_tokens.weight", "I32", vec![61, 32], 4 * 32 * 61)]),
                )
                .unwrap()
            },
            &["is I32; F32, BF16 and F16 are read"],
        ),
    ];
    for (at, (broken, expected)) in cases.iter().enumerate() {
        let folder = scratch.path().join(at.to_string());
        export(&folder, &sizes(), Dtype::Fp32, 9000);
        broken(&folder);
        let error = read(&folder, &sizes()).unwrap_err();
        for part in *expected {
            assert!(error.contains(part), "case {at}: {part:?} is not in: {error}");
        }
        assert!(
            error.ends_with("; give the folder of an Ouro checkpoint with the sizes of the config's model")
        );
    }
}

/// A folder whose `config.json` has these keys changed.
fn claiming(folder: &Path, keys: Value) -> Store {
    export(folder, &sizes(), Dtype::Fp32, u64::MAX);
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    fs::write(path, config.to_string()).unwrap();
    Store::open(folder.to_str().unwrap()).unwrap()
}

/// What a folder says of how its weights are used is within what a stage may have, and all that is not is said at once,
/// before the weights are read.
#[test]
fn a_use_that_cannot_be_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = |name: &str, keys| claiming(&scratch.path().join(name), keys);
    let none = folder(
        "none",
        json!({ "total_ut_steps": 0, "max_position_embeddings": 0, "rope_theta": 0, "initializer_range": -1,
                "rms_norm_eps": 0 }),
    );
    let told = [
        interchange::published_use(&none).unwrap_err().to_string(),
        interchange::published_model(&none).unwrap_err().to_string(),
    ];
    for error in &told {
        for part in [
            "total_ut_steps is 0; a whole number, 1 to 64, is wanted",
            "max_position_embeddings is 0; a whole number, 2 to 16777216, is wanted",
            "rope_theta is 0; a number, 2 to 1e12, is wanted",
            "initializer_range is -1; a number above 0, up to 1, is wanted",
        ] {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    }
    assert!(told[1].contains("rms_norm_eps is 0; a number above 0, up to 0.01, is wanted"), "{}", told[1]);
    for (at, (key, value)) in [
        ("total_ut_steps", json!(1e12)),
        ("total_ut_steps", json!(65)),
        ("total_ut_steps", json!(2.5)),
        ("total_ut_steps", json!("4")),
        ("max_position_embeddings", json!(u64::MAX)),
        ("max_position_embeddings", json!(-2)),
        ("rope_theta", json!(1e300)),
    ]
    .into_iter()
    .enumerate()
    {
        let error = interchange::published_use(&folder(&at.to_string(), json!({ key: value.clone() })));
        let error = error.unwrap_err().to_string();
        assert!(error.contains(&format!("config.json: {key} is {value}; a")), "{error}");
    }
    let said = interchange::published_use(&folder("null", json!({ "rope_theta": null }))).unwrap();
    assert_eq!(said, Use { rope_base: 10_000.0, ..USED });
}

/// No memory is asked for on the word of a `config.json` alone: these sizes would be more than there are addresses.
#[test]
fn sizes_that_no_file_can_hold_are_refused_before_they_are_given_memory() {
    let scratch = tempfile::tempdir().unwrap();
    let large = json!({ "vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 24,
        "num_hidden_layers": 4096, "head_dim": 1 << 18 });
    let store = claiming(&scratch.path().join("hf"), large);
    let model = interchange::published_model(&store).unwrap();
    let error = interchange::read(&store, &model).unwrap_err().to_string();
    for part in [
        " parameters, and the files of weights have ",
        // The first by name of more than are told.
        "lm_head.weight in model.safetensors has the shape [61, 32], not [16777216, 1048576]",
        "more; give the folder of an Ouro checkpoint",
    ] {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    /// No damage to any file makes the reader panic, or hands out weights of another length.
    #[test]
    fn any_damage_is_an_error_or_harmless(file in 0usize..8, at in any::<prop::sample::Index>(), byte: u8, cut: bool) {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("hf");
        export(&folder, &sizes(), Dtype::Bf16, 9000);
        let all = files(&folder);
        let (name, mut bytes) = all[file % all.len()].clone();
        let at = at.index(bytes.len());
        if cut { bytes.truncate(at) } else { bytes[at] ^= byte }
        fs::write(folder.join(name), bytes).unwrap();
        if let Ok((layout, weights)) = read(&folder, &sizes()) {
            prop_assert_eq!(weights.len(), layout.len());
        }
    }
}

fn config(sets: &str) -> RunConfig {
    let text = format!(
        "name = \"init\"\nstages = [\"a\"]\n[model]\nlayers = 2\nhidden = 32\nheads = 4\nffn = 48\nvocab = 61\n{sets}\n\
         [data.sources.x]\nurl = \"x\"\n[stage.a]\ntokens = 64\nsequence = 16\nbatch = 64\nlr = 1e-3\n"
    );
    RunConfig::parse("init.toml", &text).unwrap()
}

#[test]
fn a_run_begins_with_the_weights_that_its_config_names() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("hf");
    export(&folder, &sizes(), Dtype::Fp32, 9000);
    let (_, original) = weights(&sizes());
    let named = config(&format!("[init]\nfrom = {folder:?}"));
    let mut pinned = named.clone();
    pin_init(&mut pinned).unwrap();
    let digest = pinned.init.as_ref().unwrap().weights.clone().unwrap();
    assert_eq!(digest.len(), 64);
    assert!(named.digest() != pinned.digest(), "which weights they are changes the run");
    assert!(pinned.digest() != config("").digest());
    assert_eq!(RunConfig::parse("again", &pinned.to_toml()).unwrap(), pinned);
    let state = initial_state(&pinned, Device::Cpu).unwrap();
    assert_eq!(as_slice(&state.weights), original);

    // Another digest than was asked for, and weights that changed since.
    let mut wrong = pinned.clone();
    wrong.init = Some(Init { weights: Some("0".repeat(64)), ..wrong.init.unwrap() });
    let error = pin_init(&mut wrong).unwrap_err().to_string();
    assert!(error.contains(&format!("has the weights {digest}, and not init.weights = 000")), "{error}");
    fs::remove_dir_all(&folder).unwrap();
    let gone = initial_state(&pinned, Device::Cpu).unwrap_err().to_string();
    assert!(gone.contains("which holds neither a run nor a published checkpoint"), "{gone}");
    let (layout, mut other) = weights(&sizes());
    other[5] += 1.0;
    let what = Export {
        model: &sizes(),
        used: USED,
        dtype: Dtype::Fp32,
        shard_bytes: u64::MAX,
        tokenizer: None,
        readme: "",
    };
    interchange::export(&folder, &layout, &other, &what).unwrap();
    let changed = initial_state(&pinned, Device::Cpu).unwrap_err().to_string();
    assert!(changed.contains(&format!("the run began with {digest}")), "{changed}");
}

#[test]
fn a_larger_stack_repeats_the_one_that_it_begins_with() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("hf");
    export(&folder, &sizes(), Dtype::Fp32, u64::MAX);
    let (small, original) = weights(&sizes());
    let parse = |layers: u32| {
        let mut config = config(&format!("[init]\nfrom = {folder:?}"));
        config.model.layers = layers;
        config
    };
    let state = initial_state(&parse(6), Device::Cpu).unwrap();
    for entry in state.layout.entries() {
        let name = entry.name.clone();
        let source =
            (2..6).fold(name, |name, l| name.replace(&format!("layers.{l}."), &format!("layers.{}.", l % 2)));
        let source = small.find(&source).unwrap();
        assert_eq!(as_slice(&state.weights)[entry.range()], original[source.range()], "{}", entry.name);
    }
    let error = initial_state(&parse(5), Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("num_hidden_layers is 2; the config's model has 5"), "{error}");
}

//! Broken things that someone hands in: each is an error with a message, whatever it claims, and never a panic or memory that
//! only a claim asks for.

#[path = "../../../dataloader/tests/common/footer.rs"]
mod footer;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anello_tests::{Done, Process, objects};
use serde_json::{Value, json};

use super::world;

/// Runs `anello ARGUMENTS` where addresses end after 16 GB: LibTorch takes a few, and each claim below far more.
fn limited(arguments: &[&str]) -> Done {
    let before = ["sh", "-c", "ulimit -v 16000000 && exec \"$@\"", "sh"].map(str::to_owned);
    Process::start_by(&before, &world().folder, arguments, &[]).wait()
}

/// Asserts that it is an error, told once and in words.
fn assert_refused(arguments: &[&str], code: i32, expected: &str) {
    let done = limited(arguments);
    let log = done.log.clone();
    done.expect(code);
    let errors = log.lines().filter(|line| line.starts_with("error: ")).count();
    assert!(errors == 1 && log.contains(expected), "{arguments:?}, {expected:?}: {log}");
    for word in ["panicked", "memory allocation", "RUST_BACKTRACE", "bad_alloc"] {
        assert!(!log.contains(word), "{arguments:?}: {log}");
    }
}

/// A checkpoint in the published layout, with these keys of its `config.json` changed.
fn published(name: &str, keys: Value) {
    let folder = world().folder.join(name);
    world().anello(&["export", "undisturbed@4", "--to", name, "--dtype", "fp32"]).expect(0);
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn a_folder_whose_config_claims_what_cannot_be_is_refused() {
    published("claims-nothing", json!({}));
    let sizes = ["--data", "data/tales", "--tokens", "256", "--threads", "1"];
    limited(&[&["eval", "claims-nothing"], &sizes[..]].concat()).expect(0);
    for (name, keys, expected) in [
        (
            "claims-no-positions",
            json!({ "max_position_embeddings": 0 }),
            "max_position_embeddings is 0; a whole number, 2 to 16777216, is wanted",
        ),
        (
            "claims-no-loops",
            json!({ "total_ut_steps": 0 }),
            "total_ut_steps is 0; a whole number, 1 to 64, is",
        ),
        ("claims-loops", json!({ "total_ut_steps": 1e12 }), "total_ut_steps is 1000000000000.0"),
        (
            "claims-vocab",
            json!({ "vocab_size": 1 << 24, "hidden_size": 1 << 16, "head_dim": 1 << 14 }),
            "parameters, and the files of weights have",
        ),
    ] {
        published(name, keys);
        assert_refused(&[&["eval", name], &sizes[..]].concat(), 2, expected);
        assert_refused(&["generate", name, "--prompt", "x", "--tokens", "2"], 2, expected);
        assert_refused(&["import", name, "--config", "small.toml", "--out", "never"], 2, expected);
        assert!(!world().folder.join("never").exists(), "{name}: a run was begun");
    }
}

/// A file of weights that takes a few kilobytes of the disk and claims terabytes: its table is all that is read of it.
#[test]
fn a_file_of_weights_that_is_all_holes_is_refused_before_it_is_read() {
    published("holes-not", json!({}));
    let weights = fs::read(world().folder.join("holes-not/model.safetensors")).unwrap();
    let (length, rest) = weights.split_at(8);
    let length = u64::from_le_bytes(*length.first_chunk().unwrap()) as usize;
    let mut table: Value = serde_json::from_slice(&rest[..length]).unwrap();
    // A tensor more, of 4 TiB, after all others.
    let end = weights.len() - 8 - length;
    let more = 1u64 << 42;
    table["more"] = json!({ "dtype": "F32", "shape": [more / 4], "data_offsets": [end, end as u64 + more] });
    let table = table.to_string();
    let head = [&(table.len() as u64).to_le_bytes()[..], table.as_bytes()].concat();
    for (name, head, size, expected) in [
        (
            "holes-more",
            &head,
            (head.len() + end) as u64 + more,
            "more in model.safetensors is no tensor of this model",
        ),
        (
            "holes-longer",
            &head,
            more << 1,
            "model.safetensors is no safetensors: it has 8796093022208 bytes, and its table tells",
        ),
        (
            "holes-alone",
            &Vec::new(),
            more,
            "model.safetensors is no safetensors: it has 4398046511104 bytes, and a table of 0",
        ),
        (
            "holes-table",
            &more.to_le_bytes().to_vec(),
            more << 1,
            "model.safetensors is no safetensors: it has 8796093022208 bytes, and a table of 4398046511104",
        ),
    ] {
        published(name, json!({}));
        let path = world().folder.join(name).join("model.safetensors");
        fs::write(&path, head).unwrap();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(size).unwrap();
        assert_refused(&["generate", name, "--prompt", "x", "--tokens", "2"], 2, expected);
        assert_refused(&["import", name, "--config", "small.toml", "--out", "never"], 2, expected);
        fs::remove_file(path).unwrap();
    }
}

/// Files that are read whole and claim terabytes: each is refused by its size.
#[test]
fn a_file_of_holes_in_the_place_of_any_other_is_refused_before_it_is_read() {
    let world = world();
    world.anello(&["run", "small.toml", "--out", "holed", "--until", "5", "--sample", "0"]).expect(0);
    published("holed-export", json!({}));
    fs::create_dir_all(world.folder.join("holed-data")).unwrap();
    for file in objects(&world.folder.join("data/tales")) {
        fs::copy(&file, world.folder.join("holed-data").join(file.file_name().unwrap())).unwrap();
    }
    let first = |folder: &str| {
        let all = objects(&world.folder.join(folder));
        all.first().unwrap().strip_prefix(&world.folder).unwrap().to_str().unwrap().to_owned()
    };
    for (file, code, arguments) in [
        ("holed-export/config.json".to_owned(), 1, &["generate", "holed-export", "--prompt", "x"][..]),
        ("holed-data/index.json".to_owned(), 1, &["data", "verify", "holed-data"]),
        (first("holed/metrics"), 1, &["metrics", "holed", "--csv"]),
        (first("holed/events"), 1, &["events", "holed"]),
        ("holed/config.toml".to_owned(), 2, &["audit", "holed"]),
    ] {
        let path = world.folder.join(&file);
        let good = fs::read(&path).unwrap();
        fs::File::create(&path).unwrap().set_len(1 << 42).unwrap();
        let expected = format!("{file} has 4398046511104 bytes, and nothing of its kind has more than");
        assert_refused(arguments, code, &expected);
        fs::write(path, good).unwrap();
    }
}

/// A shard of the tales in a folder of its own, whose footer claims so many rows, or values, of its first row group.
fn lying(name: &str, rows: Option<i64>, values: Option<i64>) {
    let tales = objects(&world().folder.join("data/tales"));
    let shard = tales.iter().find(|path| path.extension().is_some_and(|end| end == "parquet")).unwrap();
    let folder = world().folder.join(name);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("a.parquet"), footer::lying(&fs::read(shard).unwrap(), rows, values)).unwrap();
}

#[test]
fn a_shard_whose_footer_claims_what_cannot_be_is_refused() {
    let eval = |set| ["eval", "undisturbed", "--data", set, "--tokens", "256", "--threads", "1"];
    lying("lying-not", None, None);
    limited(&eval("lying-not")).expect(0);
    for (name, rows, values, expected) in [
        ("lying-rows", Some(1 << 62), None, "lying-rows/a.parquet"),
        ("lying-values", None, Some(1 << 62), "lying-values/a.parquet"),
        // 34 GB of tokens, if it were believed.
        (
            "lying-little",
            None,
            Some((1 << 32) - 2),
            "4294967294 tokens in one row group, whose ids take too few bytes",
        ),
        ("lying-less", None, Some(1 << 27), "the footer tells of 134217728 values, the pages of "),
    ] {
        lying(name, rows, values);
        assert_refused(&eval(name), 1, expected);
    }
}

/// Every file of a folder with what it holds.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    objects(folder).into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

#[test]
fn a_run_whose_log_cannot_be_read_is_left_as_it_is() {
    let world = world();
    world.anello(&["run", "small.toml", "--out", "unread", "--until", "5", "--sample", "0"]).expect(0);
    let folder = world.folder.join("unread");
    let last = objects(&folder.join("events")).into_iter().next_back().unwrap();
    let good = fs::read(&last).unwrap();
    let mut newer: Value = serde_json::from_slice(&good).unwrap();
    newer["kind"] = json!("of-a-newer-build");
    for (bad, expected) in [
        (&newer.to_string().into_bytes()[..], "unknown variant `of-a-newer-build`"),
        (&good[..good.len() / 2], "EOF while parsing"),
        (b"\xff\xfe", "expected value"),
        (b"", "EOF while parsing"),
    ] {
        fs::write(&last, bad).unwrap();
        let before = contents(&folder);
        let done = world.anello(&["run", "--resume", "unread", "--sample", "0"]);
        let log = done.log.clone();
        done.expect(1);
        let name = last.file_name().unwrap().to_str().unwrap();
        let place = format!("unread/events/{name} does not parse: {expected}");
        assert!(log.contains(&place) && log.contains("; restore it, or use a build that wrote it"), "{log}");
        assert!(!log.contains("panicked"), "{log}");
        assert!(contents(&folder) == before, "{expected}: the folder has changed");
    }
    fs::write(&last, good).unwrap();
    world.anello(&["run", "--resume", "unread", "--sample", "0"]).expect(0);
}

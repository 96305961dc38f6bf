//! The config from outside: what a user writes, and what comes of it.

mod errors;
mod layers;
mod mathematics;
mod presets;
mod properties;
mod schedule;

use anello_configs::{ConfigError, LoadOptions, Loaded, RunConfig};

/// A small config that is right, to be broken or changed.
pub const SMALL: &str = r#"name = "small"
lanes = 2
stages = ["warmup", "stable"]

[model]
layers = 2
hidden = 8
heads = 2
ffn = 16
vocab = 64

[data.sources]
web.url = "data/web"
code.url = "data/code"

[stage.warmup]
tokens = 1000
sequence = 16
batch = 64
micro_batch = 2
lr_curve = "linear"
lr_from = 0
lr_to = 1e-3
mixture = { web = 1 }

[stage.stable]
tokens = "4Ki"
sequence = 16
batch = 128
micro_batch = 1
lr = 1e-3
mixture = { web = 0.7, code = 0.3 }
"#;

/// Loads a preset or file with `--set` arguments.
pub fn load(config: &str, sets: &[&str]) -> Result<Loaded, ConfigError> {
    let sets = sets.iter().map(|set| (*set).to_owned()).collect();
    RunConfig::load(&LoadOptions { sets, ..LoadOptions::new(config) })
}

/// As [`load`], of what must be right.
pub fn loaded(config: &str, sets: &[&str]) -> RunConfig {
    load(config, sets).unwrap_or_else(|error| panic!("{config} {sets:?}: {error}")).config
}

/// [`SMALL`] with `--set` arguments.
pub fn small(sets: &[&str]) -> Result<RunConfig, ConfigError> {
    let folder = folder(&[("small.toml", SMALL)]);
    load(&path(&folder, "small.toml"), sets).map(|loaded| loaded.config)
}

/// A folder with these files.
pub fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    folder
}

/// The path of a file in it.
pub fn path(folder: &tempfile::TempDir, name: &str) -> String {
    folder.path().join(name).to_str().unwrap().to_owned()
}

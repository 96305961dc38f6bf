//! Whole runs, in this process: the same bits whatever happened on the way.
//!
//! The run is small and has all that a real one has: five stages that change T, β, sequence length, RoPE base, mask
//! and mixture, a batch ramp, an optimizer reset and an upcycling; two sources; checkpoints of several parts.

mod audit;
mod bisect;
mod damage;
mod faults;
mod learning;
mod log;
mod resume;
mod same_bits;
mod several;
mod spikes;
mod store;
mod validation;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use anello_configs::{RunConfig, Schedule, random::Stream};
use anello_dataloader::{ShardFormat, ShardWriter};
use anello_store::checkpoint::{self, Manifest};
use anello_store::events::{self, Event};
use anello_store::metrics::{self, StepRecord};
use anello_store::{Error as StoreError, Notice, Store};
use anello_worker::checkpoint::{Loaded, load, write};
use anello_worker::{Control, Ended, Error, Resume, Run, Training};
use tempfile::TempDir;

const CONFIG: &str = r#"
name = "small"
seed = 7
lanes = 4
stages = ["warmup", "stable", "ct-anneal", "longct", "mid-training"]

[model]
layers = 1
hidden = 32
heads = 4
kv_heads = 2
ffn = 48
vocab = 2048

[compute]
recompute = "none"
loss_chunk_tokens = 40
threads = 1

[data]
prefetch_bytes = 4096
sources.words.url = "DATA/words"
sources.code.url = "DATA/code"

[checkpoint]
every_steps = 4
keep_last = 100
part_bytes = "1600KiB"

[stage.warmup]
tokens = 384
sequence = 16
batch = 128
micro_batch = 2
lr_curve = "linear"
lr_from = 0
lr_to = 3e-3
loops = 2
beta = 0.1
rope_base = 10_000
mixture = { words = 3, code = 1 }

[stage.stable]
tokens = 640
sequence = 16
batch = 256
batch_ramp = { from = 128, over = 384 }
micro_batch = 2
lr = 3e-3
loops = 2
beta = 0.05
rope_base = 10_000
mixture = { words = 3, code = 1 }

[stage.ct-anneal]
tokens = 384
sequence = 32
batch = 128
lr_curve = "cosine"
lr_from = 1e-3
lr_to = 1e-4
loops = 3
beta = 0.05
rope_base = 40_000
mixture = { words = 1 }
reset_optimizer = true

[stage.longct]
tokens = 512
sequence = 64
batch = 256
lr_curve = "cosine"
lr_from = 1e-3
lr_to = 1e-4
loops = 2
beta = 0.02
rope_base = 1_000_000
mask = "causal"
mixture = { words = 1, code = 2 }
upcycle = { layers = 2 }

[stage.mid-training]
tokens = 384
sequence = 32
batch = 128
lr_curve = "wsd"
lr = 1e-3
lr_to = 1e-5
lr_decay = 0.5
loops = 3
beta = 0.05
rope_base = 1_000_000
mixture = { code = 1 }
"#;

/// What may follow pretraining: the gate alone, then fine-tuning.
const LATE_STAGES: &str = r#"
[stage.gate]
loss = "gate"
tokens = 384
sequence = 32
batch = 128
lr = 1e-2
loops = 3
rope_base = 1_000_000
mixture = { words = 1 }

[stage.sft]
loss = "sft"
tokens = 256
sequence = 32
batch = 128
lr = 1e-3
loops = 3
rope_base = 1_000_000
mixture = { words = 1 }
"#;

/// Token sources in a folder of their own.
pub struct Data {
    folder: TempDir,
}

impl Data {
    /// Two small sources: `code` is so small that lanes go through it more than once.
    pub fn new() -> Self {
        let data = Self { folder: tempfile::tempdir().unwrap() };
        data.write("words", 220);
        data.write("code", 24);
        data
    }

    pub fn write(&self, source: &str, count: u64) {
        let stream = Stream::new(3, source, &[]);
        let documents: Vec<Vec<i32>> = (0..count)
            .map(|d| {
                let length = 5 + stream.below_at(d, 40);
                (0..length).map(|t| 1 + stream.below_at(1000 + d * 50 + t, 2000) as i32).collect()
            })
            .collect();
        write_source(&self.folder.path().join(source), &documents);
    }

    /// The small run over this data.
    pub fn config(&self) -> RunConfig {
        self.parse(CONFIG)
    }

    /// The small run, and the stages after pretraining: steps 15..18 train the gate, 18..20 fine-tune.
    pub fn config_with_late_stages(&self) -> RunConfig {
        let listed = CONFIG.replace("\"mid-training\"]", "\"mid-training\", \"gate\", \"sft\"]");
        self.parse(&format!("{listed}{LATE_STAGES}"))
    }

    fn parse(&self, text: &str) -> RunConfig {
        let text = text.replace("DATA", self.folder.path().to_str().unwrap());
        RunConfig::parse("small.toml", &text).unwrap_or_else(|e| panic!("{e}"))
    }
}

pub fn write_source(folder: &Path, documents: &[Vec<i32>]) {
    std::fs::create_dir_all(folder).unwrap();
    let format = ShardFormat { row_group_tokens: 120, zstd_level: 1 };
    for (at, part) in documents.chunks(documents.len().div_ceil(2)).enumerate() {
        let mut writer = ShardWriter::new(format, false, None).unwrap();
        part.iter().for_each(|ids| writer.push(ids, None).unwrap());
        std::fs::write(folder.join(format!("{at:03}.parquet")), writer.finish().unwrap().bytes).unwrap();
    }
}

pub fn total_steps(config: &RunConfig) -> u64 {
    Schedule::new(config).total_steps()
}

/// Trains `run` to `until` or its end, and returns how it ended beside everything that it told.
pub fn drive(run: Run, until: Option<u64>) -> (Result<Ended, Error>, Vec<Notice>) {
    let training = Training::start(run, Control::default(), until).unwrap();
    let notices = training.notices.iter().collect();
    (training.join(), notices)
}

/// Trains a new run of `config` in `store`.
pub fn begin(store: &Store, config: &RunConfig, until: Option<u64>) -> Ended {
    let run = Run::create(store.clone(), config.clone()).unwrap();
    drive(run, until).0.unwrap_or_else(|e| panic!("{e}"))
}

/// Goes on with the run in `store` as it is.
pub fn resume(store: &Store, until: Option<u64>) -> Ended {
    resume_with(store, Resume::default(), until)
}

pub fn resume_with(store: &Store, options: Resume, until: Option<u64>) -> Ended {
    let run = Run::resume(store.clone(), options).unwrap_or_else(|e| panic!("{e}"));
    drive(run, until).0.unwrap_or_else(|e| panic!("{e}"))
}

pub fn events_of(store: &Store) -> Vec<Event> {
    events::read(store).unwrap().into_iter().map(|record| record.event).collect()
}

/// What the undisturbed run came to.
pub struct Reference {
    pub ended: Ended,
    pub records: Vec<StepRecord>,
    /// Of the checkpoint after every step.
    pub manifests: BTreeMap<u64, Manifest>,
}

/// The undisturbed run, trained once for all tests.
pub fn reference() -> &'static Reference {
    static REFERENCE: OnceLock<Reference> = OnceLock::new();
    REFERENCE.get_or_init(|| undisturbed(Data::new().config()).0)
}

/// What a run of `config` comes to when nothing disturbs it, and where it is.
pub fn undisturbed(mut config: RunConfig) -> (Reference, Store) {
    let store = Store::memory().unwrap();
    config.checkpoint.every_steps = 1;
    let ended = begin(&store, &config, None);
    let read = |step| checkpoint::verify(&store, step).unwrap();
    let manifests: BTreeMap<_, _> =
        checkpoint::steps(&store).unwrap().into_iter().map(|step| (step, read(step))).collect();
    assert_eq!(manifests.len() as u64, total_steps(&config));
    (Reference { ended, records: metrics::read(&store).unwrap(), manifests }, store)
}

/// Everything of a manifest that must be the same whoever wrote it, and whatever its parts' size.
fn bits(manifest: &Manifest) -> String {
    let Manifest { step, stage, stage_end, tokens, updates, layers, elements, config, data, cursors, .. } =
        manifest;
    let Manifest { blocks, weights, .. } = manifest;
    format!(
        "{step} {stage} {stage_end} {tokens} {updates} {layers} {elements} {config} {data:?} {cursors:?} \
         {weights} {blocks:?}"
    )
}

/// Asserts that the run in `store` stands after `step` steps and is, in every checkpoint and every metric, the
/// undisturbed one.
pub fn assert_undisturbed(store: &Store, step: u64, what: &str) {
    let reference = reference();
    let steps = checkpoint::steps(store).unwrap();
    assert_eq!(steps.last(), Some(&step), "{what}: the newest checkpoint");
    for step in steps {
        let manifest = checkpoint::verify(store, step).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(bits(&manifest), bits(&reference.manifests[&step]), "{what}: checkpoint {step}");
    }
    let records = metrics::read(store).unwrap();
    assert_eq!(records.len() as u64, step, "{what}: rows of metrics");
    for (ours, theirs) in records.iter().zip(&reference.records) {
        assert_eq!(ours.without_seconds(), theirs.without_seconds(), "{what}: metrics of step {}", ours.step);
    }
}

/// Asserts that the run in `store` is complete and is the undisturbed one.
pub fn assert_finished(store: &Store, what: &str) {
    let reference = reference();
    assert_undisturbed(store, reference.ended.step, what);
    let last = events_of(store).pop();
    let Ended { step, weights, .. } = reference.ended.clone();
    assert_eq!(last, Some(Event::Finished { step, weights }), "{what}: the last event");
}

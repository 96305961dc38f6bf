//! Tokens per second and core from local zstd Parquet to packed micro-batches.
//!
//! ```text
//! cargo bench -p anello-dataloader --profile dev --bench throughput -- [--set DIR] [--tokens N] [--json]
//! ```
//! Writes a set of documents of real text's lengths and frequencies to `--set` (a temporary folder otherwise; one that is there is used as
//! it is), and goes through it by one loader thread. Rates are per second of CPU time of the whole process, since a
//! shared machine says little by the clock; both are printed. The last line with `--json` is one JSON object.
//! `baseline.py` reads the same set into the same shapes in Python.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anello_configs::random::Stream;
use anello_configs::{Mask, OnCorrupt};
use anello_dataloader::{Dataset, Index, Loader, LoaderOptions, Packer, ShardFormat, ShardWriter, StepData};
use anello_store::Store;

const VOCAB: u32 = 49152;
const SEQUENCE: u32 = 4096;
const SEQUENCES: u32 = 8;
const SHARD_TOKENS: u64 = 8 << 20;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (mut set, mut tokens, mut json) = (None, 64u64 << 20, false);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| fail(&format!("{argument} wants a value")));
        match argument.as_str() {
            "--set" => set = Some(value()),
            "--tokens" => tokens = value().parse().unwrap_or_else(|_| fail("--tokens wants a number")),
            "--json" => json = true,
            "--bench" => {}
            other => fail(&format!("unknown argument {other}")),
        }
    }
    let temporary = set.is_none();
    let folder = set.unwrap_or_else(|| {
        std::env::temp_dir().join(format!("anello-bench-{}", std::process::id())).display().to_string()
    });
    if !Path::new(&folder).join("index.json").exists() {
        write(&folder, tokens);
    }
    let report = measure(&folder);
    if temporary {
        std::fs::remove_dir_all(&folder).unwrap_or_else(|e| fail(&format!("{folder}: {e}")));
    }
    for (name, rate) in &report.rates {
        println!("{name:<32} {:>8.1} M tokens/s a core", rate / 1e6);
    }
    println!("{:<32} {:>8.1} M tokens/s by the clock", "loader, 1 thread", report.wall / 1e6);
    println!("{:<32} {:>8.2}", "bytes a token on disk", report.bytes_per_token);
    if json {
        let object = serde_json::json!({
            "bench": "dataloader/throughput", "set": folder, "sequence": SEQUENCE, "sequences": SEQUENCES,
            "tokens": report.tokens, "tokens_per_core_second": report.rates["parquet to micro-batches"],
            "decode_tokens_per_core_second": report.rates["parquet to documents"],
            "pack_tokens_per_core_second": report.rates["documents to micro-batches"],
            "tokens_per_second": report.wall, "bytes_per_token": report.bytes_per_token,
        });
        println!("{object}");
    }
}

fn fail(said: &str) -> ! {
    eprintln!("throughput: {said}");
    std::process::exit(2)
}

/// Documents with log-normal lengths (median 400, mean 660 tokens) and ids whose frequency falls with their rank.
fn write(folder: &str, tokens: u64) {
    let store = Store::open(folder).unwrap_or_else(|e| fail(&e.to_string()));
    let shards = tokens.div_ceil(SHARD_TOKENS);
    let mut document = 0;
    for shard in 0..shards {
        let mut writer =
            ShardWriter::new(ShardFormat::default(), false, Some("bench")).expect("the format is fine");
        while writer.tokens() < SHARD_TOKENS.min(tokens) {
            let stream = Stream::new(1, "bench", &[document]);
            let length = (f64::from(stream.normals_at(0)[0]) + 400f64.ln()).exp().clamp(8.0, 65536.0) as u64;
            let id = |at| f64::from(VOCAB).powf(stream.unit_at(4 + at)) as i32 - 1;
            let ids: Vec<i32> = (0..length).map(id).collect();
            writer.push(&ids, None).expect("memory takes it");
            document += 1;
        }
        let bytes = writer.finish().expect("memory takes it").bytes;
        store
            .put(&format!("shard-{shard:05}-of-{shards:05}.parquet"), bytes)
            .unwrap_or_else(|e| fail(&e.to_string()));
    }
    let index = Index::build(&store, true, 2, &|_| ControlFlow::Continue(()));
    index.and_then(|index| index.save(&store)).unwrap_or_else(|e| fail(&e.to_string()));
}

struct Report {
    tokens: u64,
    rates: BTreeMap<&'static str, f64>,
    wall: f64,
    bytes_per_token: f64,
}

fn measure(folder: &str) -> Report {
    let dataset = Arc::new(Dataset::open(folder).unwrap_or_else(|e| fail(&e.to_string())));
    let index = dataset.index();
    let bytes: u64 = index.shards.iter().map(|s| s.bytes).sum();
    let mut rates = BTreeMap::new();

    // One pass warms the page cache; the best of three is reported.
    let groups = dataset.row_groups();
    let decode = best(3, || {
        (0..groups)
            .map(|at| dataset.read(at, Some(VOCAB)).expect("it was just written").tokens().len() as u64)
            .sum()
    });
    rates.insert("parquet to documents", decode.0);

    let decoded: Vec<_> =
        (0..groups.min(32)).map(|at| dataset.read(at, None).expect("it was just read")).collect();
    let pack = best(3, || {
        let (mut packer, mut tokens) = (Packer::new(SEQUENCES, SEQUENCE, Mask::Document), 0);
        for document in (0..8).flat_map(|_| &decoded).flat_map(|documents| documents.iter()) {
            let mut from = 0;
            while from < document.tokens.len() {
                if packer.room() == 0 {
                    let next = Packer::new(SEQUENCES, SEQUENCE, Mask::Document);
                    tokens += std::mem::replace(&mut packer, next).finish().tokens() as u64;
                }
                from += packer.push(document, from);
            }
        }
        tokens
    });
    rates.insert("documents to micro-batches", pack.0);

    let whole = best(3, || {
        let per_step = u64::from(SEQUENCE * SEQUENCES) * 4;
        let steps = (index.tokens() / per_step).max(1);
        let mixture = Arc::new(BTreeMap::from([("bench".to_owned(), 1.0)]));
        let loader = Loader::open(LoaderOptions {
            sources: BTreeMap::from([("bench".to_owned(), dataset.clone())]),
            seed: 1,
            lanes: 4,
            serve: 0..4,
            plan: Arc::new(move |step| {
                (step < steps).then(|| StepData {
                    stage: 0,
                    sequence: SEQUENCE,
                    micro_batch: SEQUENCES,
                    micro_batches: 1,
                    mask: Mask::Document,
                    mixture: mixture.clone(),
                })
            }),
            start_step: 0,
            cursors: None,
            vocab: Some(VOCAB),
            on_corrupt: OnCorrupt::Fail,
            prefetch_bytes: 64 << 20,
            threads: 1,
        });
        let steps = loader.unwrap_or_else(|e| fail(&e.to_string()));
        steps
            .map(|step| {
                step.expect("it reads well").micro_batches.iter().map(|b| b.tokens() as u64).sum::<u64>()
            })
            .sum()
    });
    rates.insert("parquet to micro-batches", whole.0);
    Report {
        tokens: index.tokens(),
        rates,
        wall: whole.1,
        bytes_per_token: bytes as f64 / index.tokens() as f64,
    }
}

/// The best tokens per CPU second, and per second by the clock, of `rounds`.
fn best(rounds: usize, mut work: impl FnMut() -> u64) -> (f64, f64) {
    (0..rounds).fold((0.0, 0.0), |best: (f64, f64), _| {
        let (cpu, clock) = (cpu_seconds(), Instant::now());
        let tokens = work() as f64;
        let rates = (tokens / (cpu_seconds() - cpu), tokens / clock.elapsed().as_secs_f64());
        (best.0.max(rates.0), best.1.max(rates.1))
    })
}

/// CPU time of this process's threads, those that ended included: user and system ticks of 10 ms.
fn cpu_seconds() -> f64 {
    let stat =
        std::fs::read_to_string("/proc/self/stat").unwrap_or_else(|e| fail(&format!("/proc/self/stat: {e}")));
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

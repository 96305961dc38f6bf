//! A run learns.

use anello_store::Store;

use super::*;

const CONFIG: &str = r#"
name = "learns"
lanes = 1
stages = ["stable"]

[model]
layers = 1
hidden = 32
heads = 4
ffn = 64
vocab = 64

[compute]
recompute = "none"
threads = 1

[data]
sources.patterns.url = "DATA/patterns"

[checkpoint]
every_steps = 1000

[stage.stable]
tokens = "256Ki"
sequence = 32
batch = 1024
micro_batch = 32
lr_curve = "wsd"
lr = 2e-2
lr_warmup = 0.05
lr_decay = 0.4
loops = 3
beta = 0.05
mixture = { patterns = 1 }
"#;

/// Each document counts up by a stride of its own: the next token takes two tokens before it to tell, so there is
/// more to find out than one pass through one layer can.
#[test]
fn a_run_learns_and_its_last_loop_step_most() {
    let data = Data { folder: tempfile::tempdir().unwrap() };
    let stream = Stream::new(5, "patterns", &[]);
    let documents: Vec<Vec<i32>> = (0..400)
        .map(|d| {
            let (start, stride) = (stream.below_at(2 * d, 64), 1 + stream.below_at(2 * d + 1, 31));
            (0..32).map(|t| ((start + t * stride) % 64) as i32).collect()
        })
        .collect();
    write_source(&data.folder.path().join("patterns"), &documents);
    let text = CONFIG.replace("DATA", data.folder.path().to_str().unwrap());
    let config = RunConfig::parse("learns.toml", &text).unwrap_or_else(|e| panic!("{e}"));
    let store = Store::memory().unwrap();
    begin(&store, &config, None);
    let records = metrics::read(&store).unwrap();
    let uniform = 64f64.ln();
    let first = &records[0];
    assert!(
        first.loop_loss.iter().all(|loss| (loss - uniform).abs() < 0.1),
        "it begins with no idea: {first:?}"
    );
    let last = &records[records.len() - 20..];
    let mean = |t: usize| last.iter().map(|record| record.loop_loss[t]).sum::<f64>() / last.len() as f64;
    let (one, three) = (mean(0), mean(2));
    println!("loss of loop step 1 {one:.3}, of loop step 3 {three:.3}, of a guess {uniform:.3}");
    assert!(three < 0.35 * uniform, "loop step 3 ends at {three}, a guess at {uniform}");
    assert!(three < one - 0.3, "loop step 3 ends at {three}, loop step 1 at {one}");
}

//! What a run puts on record: audited, and read by TensorBoard itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anello_tests::{Process, newest_checkpoint, wait_until};
use serde_json::{Value, json};

use super::world;

/// The metrics of a run, a row a step, without what tells of time.
fn metrics(run: &str) -> Vec<Value> {
    let rows = world().anello(&["metrics", run, "--jsonl"]).expect(0);
    let row = |line: &str| {
        let mut row: serde_json::Map<String, Value> = serde_json::from_str(line).unwrap();
        row.retain(|name, _| !name.ends_with("_s"));
        Value::Object(row)
    };
    rows.lines().map(row).collect()
}

fn audit(run: &str, more: &[&str], code: i32) -> (Value, String) {
    let arguments = [&["audit", run][..], more].concat();
    let found = world().anello(&[&arguments[..], &["--json"]].concat()).expect(code);
    let found = serde_json::from_str(&found).unwrap_or_else(|cause| panic!("{cause}: {found}"));
    (found, world().anello(&arguments).expect(code))
}

/// By the timeline, every worker measures the model on the held-out sequences of the lanes that it serves, and of no others.
fn assert_each_measures_its_lanes(trace: &str) {
    let text = std::fs::read_to_string(world().folder.join(trace)).unwrap();
    let events: Vec<Value> =
        serde_json::from_str(&format!("{}]", text.trim_end().trim_end_matches(','))).unwrap();
    let lanes_of = |name: &str| {
        let mut lanes = BTreeMap::<u64, BTreeSet<u64>>::new();
        for span in events.iter().filter(|event| event["ph"] == "X" && event["name"] == name) {
            let lane = span["args"]["lane"].as_str().and_then(|lane| lane.parse().ok());
            let lane = lane.or_else(|| span["args"]["lane"].as_u64()).unwrap_or_else(|| panic!("{span}"));
            lanes.entry(span["pid"].as_u64().unwrap()).or_default().insert(lane);
        }
        lanes
    };
    let (served, measured) = (lanes_of("lane"), lanes_of("held-out"));
    assert!(served.len() >= 2 && served == measured, "served {served:?}, measured {measured:?}");
}

#[test]
fn a_ring_puts_on_record_what_one_process_does_and_is_audited_alike() {
    let measured = ["--set", "eval.every_steps=8", "--set", "eval.sets.lists.url=data/lists"];
    for (run, workers) in [("recorded-1", None), ("recorded-2", Some("2")), ("recorded-3", Some("3"))] {
        let trace = format!("{run}.json");
        let workers = workers.map(|workers| ["--workers", workers, "--trace", &trace]);
        let arguments = ["run", "small.toml", "--out", run, "--sample", "0"];
        let more: Vec<&str> = workers.iter().flatten().copied().chain(measured).collect();
        world().anello(&[&arguments[..], &more].concat()).expect(0);
        let (ours, theirs) = (metrics(run), metrics("recorded-1"));
        assert_eq!(ours, theirs, "{run}: digests of weights and held-out figures are among them");
        let digests: Vec<u64> = ours
            .iter()
            .filter(|row| row["weights"].is_string())
            .map(|row| row["step"].as_u64().unwrap())
            .collect();
        assert_eq!(digests, [9, 19, 29]);
        assert!(ours.iter().filter(|row| row["evals"].is_array()).count() >= 3, "{run}");
        if workers.is_some() {
            assert_each_measures_its_lanes(&trace);
        }
        let (found, told) = audit(run, &["--workers", "2"], 0);
        assert_eq!((&found["verdict"], &found["compared"]["steps"]), (&json!("confirmed"), &json!(31)));
        assert!(told.starts_with(&format!("{run} is what its record says: steps 0 to 30 ")), "{told}");
    }
    // Killed in the middle, and gone on with by another number of workers.
    let arguments = ["run", "small.toml", "--out", "recorded-4", "--sample", "0", "--workers", "2"];
    let mut process = Process::start(&world().folder, &[&arguments[..], &measured].concat());
    let place = world().folder.join("recorded-4");
    wait_until("it has a checkpoint", || newest_checkpoint(&place) >= 4 || process.ended());
    process.kill();
    world().anello(&["run", "--resume", "recorded-4", "--sample", "0", "--workers", "3"]).expect(0);
    assert_eq!(metrics("recorded-4"), metrics("recorded-1"));

    let (found, told) = audit("recorded-2", &["--steps", "15..20"], 0);
    assert_eq!((&found["from"], &found["asked"]), (&json!(14), &json!([15, 20])));
    assert!(told.contains("computed again: 6 steps from checkpoint 14, "), "{told}");
}

#[test]
fn a_bit_that_flipped_without_anyone_noticing_is_named_by_an_audit() {
    let run = "recorded-flip";
    let flip = ["--set", "ring.fault=weights@14/0", "--set", "ring.digest_every_steps=0", "--workers", "1"];
    let arguments = ["run", "small.toml", "--out", run, "--sample", "0"];
    world().anello(&[&arguments[..], &flip].concat()).expect(0);
    let (found, told) = audit(run, &[], 1);
    let difference = &found["difference"];
    assert_eq!((&difference["step"], &difference["blocks"]["block"]), (&json!(13), &json!(0)), "{found:#}");
    let first = "recorded-flip is not what its record says: it differs by checkpoint 14: weights, block 0 (";
    assert!(told.starts_with(first), "{told}");
    let refused = world().anello(&["audit", run, "--steps", "0..99"]);
    assert!(
        refused.log.contains("has logged the steps up to 30, not 98; give steps up to 31"),
        "{refused:?}"
    );
    refused.expect(2);
}

/// Prints every scalar that TensorBoard finds: tag to [[step, value], …].
const READ: &str = "
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={'scalars': 0})
events.Reload()
print(json.dumps({tag: [[s.step, s.value] for s in events.Scalars(tag)] for tag in events.Tags()['scalars']}))
";

/// A python with the packages that others read metrics with.
fn reader() -> PathBuf {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv-tensorboard/bin/python");
    assert!(python.exists(), "{} is missing; run scripts/tensorboard-venv", python.display());
    python
}

/// Reads every row of the Parquet files of a folder, and its columns.
const ROWS: &str = "
import glob, json, sys
import pyarrow.parquet as parquet
tables = [parquet.read_table(path) for path in sorted(glob.glob(sys.argv[1] + '/*.parquet'))]
rows = [row for table in tables for row in table.to_pylist()]
columns = {field.name: str(field.type) for table in tables for field in table.schema}
print(json.dumps({'rows': rows, 'columns': columns}))
";

/// The metrics of a run are Parquet for everybody: one row a step, one column a loop step, the very bits.
#[test]
fn pyarrow_reads_the_metrics() {
    let folder = world().folder.join("undisturbed/metrics");
    let done = Command::new(reader()).args(["-c", ROWS, folder.to_str().unwrap()]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let read: Value = serde_json::from_slice(&done.stdout).unwrap();
    let (theirs, ours) = (read["rows"].as_array().unwrap(), metrics("undisturbed"));
    assert_eq!(theirs.len(), ours.len());
    for (theirs, ours) in theirs.iter().zip(&ours) {
        for column in
            ["step", "stage", "tokens", "batch_tokens", "counted", "applied", "lr", "loss", "grad_norm"]
        {
            assert_eq!(theirs[column], ours[column], "{column} of step {}", ours["step"]);
        }
        let loops = ours["loop_loss"].as_array().unwrap();
        for t in 0..loops.len() {
            assert_eq!(
                theirs[format!("loss_{}", t + 1)],
                ours["loop_loss"][t],
                "loss of loop step {}",
                t + 1
            );
            assert_eq!(theirs[format!("exit_{}", t + 1)], ours["exit"][t], "exit at loop step {}", t + 1);
        }
        assert_eq!(theirs.get(format!("loss_{}", loops.len() + 1)).unwrap_or(&Value::Null), &Value::Null);
    }
    for (column, kind) in [("step", "uint64"), ("stage", "string"), ("applied", "bool"), ("loss_1", "double")]
    {
        assert_eq!(read["columns"][column], *kind, "{column}");
    }
}

#[test]
fn tensorboard_reads_the_metrics() {
    let folder = world().folder.join("tensorboard");
    let folder = folder.to_str().unwrap();
    // Twice: the second takes the place of the first.
    for _ in 0..2 {
        let told = world().anello(&["metrics", "undisturbed", "--tensorboard", folder]).expect(0);
        assert!(told.contains("tfevents"), "{told}");
    }
    let done = Command::new(reader()).args(["-c", READ, folder]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let read: Value = serde_json::from_slice(&done.stdout).unwrap();
    let rows = metrics("undisturbed");
    for (tag, of) in [("loss/objective", "/loss"), ("loss/loop_1", "/loop_loss/0"), ("optimizer/lr", "/lr")] {
        let points = read[tag].as_array().unwrap_or_else(|| panic!("{tag} is not in {read}"));
        assert_eq!(points.len(), rows.len(), "{tag}");
        for (point, row) in points.iter().zip(&rows) {
            assert_eq!(point[0], row["step"]);
            let (theirs, ours) = (point[1].as_f64().unwrap(), row.pointer(of).unwrap().as_f64().unwrap());
            assert_eq!(theirs as f32, ours as f32, "{tag} of step {}", row["step"]);
        }
    }
}

//! `anello events` and `anello metrics`.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anello_store::events;
use anello_store::metrics::{self, Evaluated, StepRecord};
use serde_json::{Map, Value, json};

use crate::failure::{Exit, Failure, Outcome};
use crate::place::open_run;
use crate::screen::Screen;
use crate::tensorboard;
use crate::text::{grouped, utc};
use anello_store::words::describe;

/// Arguments of `anello events`.
#[derive(Debug, clap::Args)]
pub struct EventsArgs {
    /// The folder of the run.
    run: String,
}

/// `anello events`
pub fn events(args: &EventsArgs, screen: &Screen) -> Outcome {
    let records = events::read(&open_run(&args.run)?)?;
    let line =
        |record: &events::Record| format!("{} UTC  {}\n", utc(record.unix_ms), describe(&record.event));
    screen.print(&records.iter().map(line).collect::<String>())?;
    Ok(Exit::Done)
}

/// Arguments of `anello metrics`.
#[derive(Debug, clap::Args)]
pub struct MetricsArgs {
    /// The folder of the run.
    run: String,
    /// Comma-separated values with a header (the default).
    #[arg(long, conflicts_with = "jsonl")]
    csv: bool,
    /// One JSON object a line.
    #[arg(long)]
    jsonl: bool,
    /// Write them as an event file of TensorBoard into this folder, in place of the one that an earlier call wrote:
    /// `tensorboard --logdir DIR` shows it.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["csv", "jsonl"])]
    tensorboard: Option<PathBuf>,
}

/// `anello metrics`
pub fn metrics(args: &MetricsArgs, screen: &Screen) -> Outcome {
    let store = open_run(&args.run)?;
    let records = metrics::read(&store)?;
    if let Some(folder) = &args.tensorboard {
        let begun_ms = events::read_after(&store, 0, 1)?.first().map_or(0, |record| record.unix_ms);
        let path = write_event_file(folder, &records, begun_ms)?;
        screen.line(&format!("{}: {} steps", path.display(), grouped(records.len() as u64)))?;
        return Ok(Exit::Done);
    }
    let mut out = BufWriter::new(io::stdout().lock());
    if args.jsonl {
        write_jsonl(&mut out, &records)?
    } else {
        write_csv(&mut out, &records)?
    }
    out.flush()?;
    Ok(Exit::Done)
}

/// The event file of `records` in `folder`, with one name for one run: it is written beside and moved over the old one, so
/// that TensorBoard never reads half of it.
fn write_event_file(folder: &Path, records: &[StepRecord], begun_ms: u64) -> Result<PathBuf, Failure> {
    let path = folder.join(format!("events.out.tfevents.{:010}.anello", begun_ms / 1000));
    let failed = |source| Failure::File { action: "writing", path: path.clone(), source };
    let mut bytes = Vec::new();
    tensorboard::write(&mut bytes, records, begun_ms as f64 / 1000.0).map_err(failed)?;
    std::fs::create_dir_all(folder).map_err(failed)?;
    let unfinished = folder.join(".unfinished");
    std::fs::write(&unfinished, bytes).map_err(failed)?;
    std::fs::rename(&unfinished, &path).map_err(failed)?;
    Ok(path)
}

/// The columns that every record has, in the order of the Parquet files.
fn columns(record: &StepRecord) -> [(&'static str, Value); 21] {
    let seconds = &record.seconds;
    [
        ("step", json!(record.step)),
        ("stage", json!(record.stage)),
        ("tokens", json!(record.tokens)),
        ("batch_tokens", json!(record.batch_tokens)),
        ("counted", json!(record.counted)),
        ("applied", json!(record.applied)),
        ("lr", json!(record.lr)),
        ("loss", json!(record.loss)),
        ("entropy", json!(record.entropy)),
        ("kl", json!(record.kl())),
        ("depth", json!(record.depth())),
        ("grad_norm", json!(record.grad_norm)),
        ("step_s", json!(seconds.step)),
        ("data_s", json!(seconds.data)),
        ("compute_s", json!(seconds.compute)),
        ("update_s", json!(seconds.update)),
        ("checkpoint_s", json!(seconds.checkpoint)),
        ("reduce_s", json!(seconds.reduce)),
        ("eval_s", json!(seconds.eval)),
        ("forward_s", json!(seconds.forward)),
        ("weights", json!(record.weights)),
    ]
}

/// The held-out sets that were measured, each with the largest T.
fn held_out(records: &[StepRecord]) -> BTreeMap<&str, usize> {
    let mut sets = BTreeMap::new();
    for eval in records.iter().flat_map(|record| &record.evals) {
        let loops = sets.entry(eval.set.as_str()).or_default();
        *loops = eval.loop_loss.len().max(*loops);
    }
    sets
}

/// Columns of the loop steps follow, then those of held-out sets, as many as the largest T of the run has; a value that is not there or not finite
/// is empty.
fn write_csv(out: &mut impl Write, records: &[StepRecord]) -> io::Result<()> {
    let loops = records.iter().map(|record| record.loop_loss.len()).max().unwrap_or(0);
    let Some(first) = records.first() else { return Ok(()) };
    let mut header: Vec<String> = columns(first).iter().map(|(name, _)| (*name).to_owned()).collect();
    header.extend((1..=loops).flat_map(|t| [format!("loss_{t}"), format!("exit_{t}")]));
    let sets = held_out(records);
    for (set, loops) in &sets {
        header.push(format!("eval_{set}_counted"));
        header.extend(
            (1..=*loops)
                .flat_map(|t| ["loss", "accuracy", "exit"].map(|figure| format!("eval_{set}_{figure}_{t}"))),
        );
    }
    writeln!(out, "{}", header.join(","))?;
    for record in records {
        let mut cells: Vec<String> = columns(record).iter().map(|(_, value)| cell(value)).collect();
        let number = |values: &[f64], t: usize| values.get(t).map(|v| cell(&json!(v))).unwrap_or_default();
        cells.extend((0..loops).flat_map(|t| [number(&record.loop_loss, t), number(&record.exit, t)]));
        for (set, loops) in &sets {
            let eval = record.evals.iter().find(|eval| eval.set == *set);
            cells.push(eval.map(|eval| eval.counted.to_string()).unwrap_or_default());
            cells.extend((0..*loops).flat_map(|t| {
                let figures = eval.map(|eval| [&eval.loop_loss, &eval.accuracy, &eval.exit]);
                figures.map_or_else(Default::default, |figures| figures.map(|values| number(values, t)))
            }));
        }
        writeln!(out, "{}", cells.join(","))?;
    }
    Ok(())
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) if text.contains([',', '"', '\n', '\r']) => {
            format!("\"{}\"", text.replace('"', "\"\""))
        }
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Loop steps are lists `loop_loss` and `exit`; held-out sets are a list `evals` where any was measured. What is not finite
/// is null.
fn write_jsonl(out: &mut impl Write, records: &[StepRecord]) -> io::Result<()> {
    for record in records {
        let columns = columns(record).into_iter().map(|(name, value)| (name.to_owned(), value));
        let mut object: Map<String, Value> = columns.collect();
        object.insert("loop_loss".to_owned(), json!(record.loop_loss));
        object.insert("exit".to_owned(), json!(record.exit));
        if !record.evals.is_empty() {
            let evals = record.evals.iter().map(|eval| {
                let Evaluated { set, counted, loop_loss, accuracy, exit } = eval;
                json!({ "set": set, "counted": counted, "loop_loss": loop_loss, "accuracy": accuracy, "exit": exit })
            });
            object.insert("evals".to_owned(), evals.collect());
        }
        writeln!(out, "{}", Value::Object(object))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::record_of;

    #[test]
    fn rows_have_the_columns_of_the_largest_t() {
        let mut records = vec![record_of(0, "a, \"b\"", 2), record_of(1, "c", 1)];
        records[1].grad_norm = f64::NAN;
        let mut out = Vec::new();
        write_csv(&mut out, &records).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].starts_with("step,stage,tokens,") && lines[0].ends_with(",loss_1,exit_1,loss_2,exit_2")
        );
        assert!(lines[1].starts_with("0,\"a, \"\"b\"\"\",100,100,97,true,0.001,7.0,"), "{}", lines[1]);
        assert!(lines[2].ends_with(",6.9,1.0,,") && lines[2].contains(",1.0,,0.5,"), "{}", lines[2]);
        assert_eq!(lines[2].matches(',').count(), lines[0].matches(',').count());
    }

    #[test]
    fn held_out_sets_have_columns_of_their_own() {
        let mut records = vec![record_of(0, "a", 1), record_of(1, "a", 1)];
        let (loop_loss, accuracy, exit) = (vec![2.5, 2.25], vec![0.5, 0.75], vec![0.25, 0.75]);
        records[1].evals = vec![Evaluated { set: "tales".to_owned(), counted: 9, loop_loss, accuracy, exit }];
        let mut out = Vec::new();
        write_csv(&mut out, &records).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let columns = "eval_tales_counted,eval_tales_loss_1,eval_tales_accuracy_1,eval_tales_exit_1,\
                       eval_tales_loss_2,eval_tales_accuracy_2,eval_tales_exit_2";
        assert!(lines[0].ends_with(columns), "{}", lines[0]);
        assert!(
            lines[1].ends_with(",,,,,,,") && lines[2].ends_with(",9,2.5,0.5,0.25,2.25,0.75,0.75"),
            "{text}"
        );
        assert_eq!(lines[1].matches(',').count(), lines[0].matches(',').count());
        let mut out = Vec::new();
        write_jsonl(&mut out, &records).unwrap();
        let text = String::from_utf8(out).unwrap();
        let values: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(
            (&values[0]["evals"], &values[1]["evals"][0]["loop_loss"][1]),
            (&Value::Null, &json!(2.25))
        );
    }

    #[test]
    fn json_lines_parse_and_nan_is_null() {
        let records = [StepRecord { loss: f64::NAN, ..record_of(3, "warmup", 4) }];
        let mut out = Vec::new();
        write_jsonl(&mut out, &records).unwrap();
        let value: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(
            (&value["step"], &value["loss"], value["exit"].as_array().map(Vec::len)),
            (&json!(3), &Value::Null, Some(4))
        );
    }
}

//! `anello events` and `anello metrics`.

use std::io::{self, BufWriter, Write};

use anello_store::events;
use anello_store::metrics::{self, StepRecord};
use serde_json::{Map, Value, json};

use crate::failure::{Exit, Outcome};
use crate::place::open_run;
use crate::screen::Screen;
use crate::text::utc;
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
}

/// `anello metrics`
pub fn metrics(args: &MetricsArgs) -> Outcome {
    let records = metrics::read(&open_run(&args.run)?)?;
    let mut out = BufWriter::new(io::stdout().lock());
    if args.jsonl {
        write_jsonl(&mut out, &records)?
    } else {
        write_csv(&mut out, &records)?
    }
    out.flush()?;
    Ok(Exit::Done)
}

/// The columns that every record has, in the order of the Parquet files.
fn columns(record: &StepRecord) -> [(&'static str, Value); 18] {
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
    ]
}

/// Columns of the loop steps follow, as many as the largest T of the run has; a value that is not there or not finite
/// is empty.
fn write_csv(out: &mut impl Write, records: &[StepRecord]) -> io::Result<()> {
    let loops = records.iter().map(|record| record.loop_loss.len()).max().unwrap_or(0);
    let Some(first) = records.first() else { return Ok(()) };
    let mut header: Vec<String> = columns(first).iter().map(|(name, _)| (*name).to_owned()).collect();
    header.extend((1..=loops).flat_map(|t| [format!("loss_{t}"), format!("exit_{t}")]));
    writeln!(out, "{}", header.join(","))?;
    for record in records {
        let mut cells: Vec<String> = columns(record).iter().map(|(_, value)| cell(value)).collect();
        let number = |values: &[f64], t: usize| values.get(t).map(|v| cell(&json!(v))).unwrap_or_default();
        cells.extend((0..loops).flat_map(|t| [number(&record.loop_loss, t), number(&record.exit, t)]));
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

/// Loop steps are lists `loop_loss` and `exit`; what is not finite is null.
fn write_jsonl(out: &mut impl Write, records: &[StepRecord]) -> io::Result<()> {
    for record in records {
        let columns = columns(record).into_iter().map(|(name, value)| (name.to_owned(), value));
        let mut object: Map<String, Value> = columns.collect();
        object.insert("loop_loss".to_owned(), json!(record.loop_loss));
        object.insert("exit".to_owned(), json!(record.exit));
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

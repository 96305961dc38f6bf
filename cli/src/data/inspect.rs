//! `anello data inspect`.

use std::path::PathBuf;

use anello_dataloader::{Dataset, Inspection};

use super::{Threads, Unit, Watch};
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::screen::Screen;
use crate::text::{Table, bytes, grouped};
use crate::tokenizer::read_tokenizer;

/// Arguments of `anello data inspect`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder or URL of the set.
    set: String,
    /// Decode the samples with this `tokenizer.json`.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Documents to show, spread over the set.
    #[arg(long, value_name = "COUNT", default_value_t = 3)]
    samples: u64,
    /// Tokens of each that are shown.
    #[arg(long, value_name = "COUNT", default_value_t = 48)]
    sample_tokens: usize,
    #[command(flatten)]
    threads: Threads,
}

/// Reads the set, and what it holds in words.
pub fn inspected(args: &Args, screen: &Screen, interrupt: &Interrupt) -> Result<String, Failure> {
    let tokenizer = args.tokenizer.as_deref().map(read_tokenizer).transpose()?;
    let dataset = Dataset::open(&args.set)?;
    let watch = Watch::new(screen, interrupt, "reading", Unit::RowGroups);
    let found = anello_dataloader::inspect(
        &dataset,
        tokenizer.as_ref(),
        args.samples,
        args.sample_tokens,
        args.threads.count(),
        &|progress| watch.report(progress),
    )?;
    Ok(told(&args.set, &dataset.index().digest(), &found))
}

fn told(set: &str, digest: &str, found: &Inspection) -> String {
    let mut facts = Table::new(2);
    facts
        .row(["set", set])
        .row(["digest", digest])
        .row(["shards", &format!("{} ({})", grouped(found.shards), bytes(found.bytes))])
        .row(["row groups", &grouped(found.row_groups)])
        .row(["documents", &grouped(found.rows)])
        .row(["tokens", &grouped(found.tokens)])
        .row(["targets", &grouped(found.counted)])
        .row(["largest id", &grouped(found.max_id.into())])
        .row([
            "length",
            &format!(
                "{} to {} tokens, mean {:.1}",
                grouped(found.length_min),
                grouped(found.length_max),
                found.length_mean
            ),
        ]);
    let mut text = facts.render();
    if !found.rows_by_source.is_empty() {
        let mut sources = Table::new(1);
        found.rows_by_source.iter().for_each(|(source, rows)| {
            sources.row([format!("  {source}"), grouped(*rows)]);
        });
        text.push_str(&format!("\ndocuments by source\n{}", sources.render()));
    }
    text.push_str(&format!("\ndocuments by length, tokens\n{}", histogram(&found.lengths)));
    for sample in &found.samples {
        let length = grouped(sample.length as u64);
        text.push_str(&format!("\n{}, row {}: {length} tokens\n", sample.place, sample.row));
        let shown = match &sample.text {
            Some(text) => text.clone(),
            None => sample.ids.iter().map(i32::to_string).collect::<Vec<_>>().join(" "),
        };
        shown.lines().for_each(|line| text.push_str(&format!("  | {line}\n")));
    }
    text
}

/// A bar for each power of two, from the first that has documents.
fn histogram(lengths: &[u64]) -> String {
    const WIDTH: u64 = 40;
    let most = lengths.iter().copied().max().unwrap_or(0).max(1);
    let mut table = Table::new(1);
    for (bucket, &rows) in lengths.iter().enumerate().skip_while(|(_, rows)| **rows == 0) {
        let (from, to) =
            if bucket == 0 { (0, 0) } else { (1u64 << (bucket - 1), (1u64 << (bucket - 1)) * 2 - 1) };
        let range = if from == to { grouped(from) } else { format!("{}–{}", grouped(from), grouped(to)) };
        let bar = "█".repeat((rows * WIDTH).div_ceil(most) as usize);
        table.row([format!("  {range}"), grouped(rows), format!("{bar:<width$}", width = WIDTH as usize)]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anello_dataloader::Sample;

    #[test]
    fn a_set_is_told_in_words() {
        let found = Inspection {
            shards: 2,
            bytes: 12_345,
            row_groups: 3,
            rows: 1_005,
            tokens: 50_000,
            counted: 50_000,
            max_id: 2047,
            lengths: vec![0, 5, 0, 1000],
            length_min: 1,
            length_mean: 49.75,
            length_max: 7,
            rows_by_source: [("docs".to_owned(), 1005)].into(),
            samples: vec![Sample {
                place: "a.parquet, row group 0".into(),
                row: 0,
                length: 7,
                ids: vec![1, 2],
                text: None,
            }],
        };
        let text = told("data/docs", "abc", &found);
        assert!(
            text.contains("documents   1 005\n") && text.contains("length      1 to 7 tokens, mean 49.8\n"),
            "{text}"
        );
        assert!(
            text.contains("\n  docs  1 005\n")
                && text.ends_with("a.parquet, row group 0, row 0: 7 tokens\n  | 1 2\n")
        );
        let bar = "█".repeat(40);
        assert_eq!(
            histogram(&found.lengths),
            format!("  1        5  █\n  2–3      0\n  4–7  1 000  {bar}\n")
        );
    }
}

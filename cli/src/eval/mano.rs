//! Mano's accuracy beside that of the paper (LOOPLM §6). Pure.

use std::collections::BTreeMap;

use anello_dataloader::{MicroBatch, mano_operations};
use anello_worker::evaluate::Evaluation;

use crate::failure::Failure;
use crate::text::{Table, grouped};

/// Most operations (L) of the paper's three settings, in which expressions of exactly L are tested.
const LENGTHS: [u32; 3] = [10, 16, 24];
/// Layers, loops, and accuracy in per cent for each of [`LENGTHS`]: arXiv 2510.25741, hidden size 1024, modulo 23.
const PAPER: [(u32, u32, [f64; 3]); 7] = [
    (2, 1, [21.5, 8.4, 7.5]),
    (2, 6, [98.1, 96.3, 78.0]),
    (3, 1, [75.4, 29.8, 11.0]),
    (3, 4, [97.9, 95.8, 92.2]),
    (6, 1, [84.7, 59.5, 20.0]),
    (6, 2, [93.4, 88.5, 35.1]),
    (12, 1, [93.6, 94.4, 34.8]),
];

/// The test set beside the set that a run was trained on.
pub fn test_set(sources: &BTreeMap<String, String>) -> Result<String, Failure> {
    let mut sets: Vec<String> = sources
        .values()
        .filter_map(|url| Some(format!("{}/eval", url.trim_end_matches('/').strip_suffix("/train")?)))
        .collect();
    match (sets.pop(), sets.is_empty()) {
        (Some(set), true) => Ok(set),
        _ => Err(Failure::Usage(
            "which test set is meant is not known: the model was not trained on one set SET/train; give it with --data \
             SET/eval"
                .to_owned(),
        )),
    }
}

/// Operations of the expressions of `set`, of which `batch` is the first: those of a test set all have as many.
pub fn operations(set: &str, batch: &MicroBatch) -> Result<u32, Failure> {
    let told = batch.input_ids.get(1).copied().and_then(mano_operations);
    told.ok_or_else(|| {
        Failure::Usage(format!(
            "{set} is no set of Mano; make one with `anello data synth mano`, and give its eval"
        ))
    })
}

/// The accuracy of a model of `layers` layers on expressions of `operations` operations, beside the paper's.
pub fn table(operations: u32, layers: u32, found: &Evaluation) -> String {
    let percent = |value: f64| format!("{value:.1}");
    let mut table = Table::new(0);
    let head = LENGTHS.map(|length| format!("L = {length}"));
    table.row(["layers x loops", &head[0], &head[1], &head[2]]);
    for (layers, loops, accuracy) in PAPER {
        let [first, second, third] = accuracy.map(percent);
        table.row([format!("{layers} x {loops}"), first, second, third]);
    }
    let last = found.steps.last().map_or(0.0, |sums| sums.correct as f64 / found.counted.max(1) as f64);
    format!(
        "\nMano, expressions of {} operations: {layers} x {} answers {} % right. The paper's models (hidden 1024, modulo 23), %:\n{}",
        grouped(u64::from(operations)),
        found.steps.len(),
        percent(last * 100.0),
        table.render()
    )
}

#[cfg(test)]
mod tests {
    use anello_worker::evaluate::Sums;

    use super::*;

    #[test]
    fn the_accuracy_stands_beside_the_papers() {
        let mut found = Evaluation::new(6, &[]);
        found.counted = 1000;
        found.steps = vec![Sums { loss: 1.0, correct: 100, depth: 1.0 }; 5];
        found.steps.push(Sums { loss: 1.0, correct: 973, depth: 6.0 });
        let text = table(10, 2, &found);
        let told = "Mano, expressions of 10 operations: 2 x 6 answers 97.3 % right.";
        assert!(text.contains(told), "{text}");
        let row = |words: &[&str]| text.lines().any(|line| line.split_whitespace().eq(words.iter().copied()));
        assert!(row(&["layers", "x", "loops", "L", "=", "10", "L", "=", "16", "L", "=", "24"]), "{text}");
        assert!(
            row(&["2", "x", "6", "98.1", "96.3", "78.0"]) && row(&["12", "x", "1", "93.6", "94.4", "34.8"])
        );
    }

    #[test]
    fn the_test_set_is_beside_the_one_trained_on() {
        let of = |urls: &[&str]| {
            test_set(&urls.iter().map(|url| ((*url).to_owned(), (*url).to_owned())).collect())
        };
        assert_eq!(of(&["s3://b/mano/train/"]).unwrap(), "s3://b/mano/eval");
        for unknown in [&["data/mano"][..], &["a/train", "b/train"], &[]] {
            assert!(of(unknown).unwrap_err().text().contains("--data SET/eval"), "{unknown:?}");
        }
    }
}

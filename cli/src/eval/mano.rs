//! Mano's accuracy beside that of the paper (LOOPLM §6). Pure.

use std::collections::BTreeMap;

use anello_dataloader::{ManoDocument, MicroBatch, read_mano};
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
///
/// Every document that is whole in the batch must be an expression of Mano with its right answer, all by one modulus.
pub fn operations(set: &str, batch: &MicroBatch) -> Result<u32, Failure> {
    let no_mano = |why: &str| {
        Failure::Usage(format!(
            "{set} is no test set of Mano: {why}; make one with `anello data synth mano`, and give its eval"
        ))
    };
    let length = batch.length as usize;
    let starts = batch.segment_starts.iter().map(|start| *start as usize);
    let ends = starts.clone().skip(1).chain([batch.tokens()]);
    let mut found: Option<ManoDocument> = None;
    for (start, end) in starts.zip(ends) {
        // At the ends of a sequence a document may be cut.
        if start % length == 0 && start > 0 || end % length == 0 {
            continue;
        }
        // The answer is the target of the last token that has one.
        let answer = Some(batch.targets[end - 1]).filter(|answer| *answer >= 0);
        let document: Vec<i64> = batch.input_ids[start..end].iter().copied().chain(answer).collect();
        let read = read_mano(&document).map_err(|why| no_mano(&format!("one of its documents {why}")))?;
        let before = found.unwrap_or(read);
        if before.operations != read.operations {
            let lengths = format!("{} and {} operations", before.operations, read.operations);
            return Err(no_mano(&format!("its expressions are not of one length, but of {lengths}")));
        }
        let moduli = before.moduli & read.moduli;
        if moduli == 0 {
            return Err(no_mano("there is no modulus by which all its answers are right"));
        }
        found = Some(ManoDocument { moduli, ..read });
    }
    let found = found.ok_or_else(|| {
        Failure::Usage(format!(
            "no document of {set} is whole within {length} tokens; give a longer --sequence"
        ))
    })?;
    Ok(found.operations)
}

/// A model that was measured.
#[derive(Debug)]
pub struct Answers<'a> {
    /// What the user calls it.
    pub name: &'a str,
    /// Its layers.
    pub layers: u32,
    /// What it is worth at each of its loop steps.
    pub found: &'a Evaluation,
}

/// The accuracies of models on expressions of `operations` operations, beside the paper's.
pub fn table(operations: u32, models: &[Answers<'_>]) -> String {
    let percent = |value: f64| format!("{value:.1}");
    let mut table = Table::new(1);
    let head = LENGTHS.map(|length| format!("L = {length}"));
    table.row(["model", "layers x loops", "here", &head[0], &head[1], &head[2]]);
    for Answers { name, layers, found } in models {
        let last = found.steps.last().map_or(0.0, |sums| sums.correct as f64 / found.counted.max(1) as f64);
        let sizes = format!("{layers} x {}", found.steps.len());
        table.row([*name, &sizes, &percent(last * 100.0), "", "", ""]);
    }
    for (layers, loops, accuracy) in PAPER {
        let [first, second, third] = accuracy.map(percent);
        table.row(["the paper's", &format!("{layers} x {loops}"), "", &first, &second, &third]);
    }
    format!(
        "\nMano: right answers to expressions of {} operations here, and of L in the paper (hidden 1024, modulo 23), %\n{}",
        grouped(u64::from(operations)),
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
        let mut once = Evaluation::new(1, &[]);
        (once.counted, once.steps) = (1000, vec![Sums { loss: 2.0, correct: 214, depth: 1.0 }]);
        let looped = Answers { name: "mano", layers: 2, found: &found };
        let text = table(10, &[looped, Answers { name: "mano-once", layers: 2, found: &once }]);
        assert!(text.contains("Mano: right answers to expressions of 10 operations here"), "{text}");
        let row = |told: &str| text.lines().any(|line| line.split_whitespace().eq(told.split_whitespace()));
        for told in [
            "model layers x loops here L = 10 L = 16 L = 24",
            "mano 2 x 6 97.3",
            "mano-once 2 x 1 21.4",
            "the paper's 2 x 6 98.1 96.3 78.0",
            "the paper's 12 x 1 93.6 94.4 34.8",
        ] {
            assert!(row(told), "{told} is not in {text}");
        }
    }

    /// A batch of one sequence of `documents`, whose first and last may be cut, packed as the loader packs.
    fn batch(documents: &[&[i64]], length: u32) -> MicroBatch {
        let (mut input_ids, mut targets, mut positions, mut segment_starts) =
            (vec![], vec![], vec![], vec![]);
        for document in documents {
            segment_starts.push(input_ids.len() as u32);
            let (last, inputs) = document.split_last().unwrap();
            for (at, id) in inputs.iter().enumerate() {
                input_ids.push(*id);
                positions.push(at as i32);
                targets.push(if at + 1 == inputs.len() { *last } else { -100 });
            }
        }
        input_ids.truncate(length as usize);
        targets.truncate(length as usize);
        MicroBatch { sequences: 1, length, input_ids, targets, positions, segment_starts, counted: 1 }
    }

    #[test]
    fn data_of_mano_is_told_by_its_documents_and_not_by_one_token() {
        // <bos> <len_2> - * 5 7 20 <ans> 15, and <bos> <len_2> + + 1 1 1 <ans> 3
        let (first, second): (&[i64], &[i64]) =
            (&[1, 30, 4, 5, 11, 13, 26, 2, 21], &[1, 30, 3, 3, 7, 7, 7, 2, 9]);
        assert_eq!(operations("set", &batch(&[first, second, &first[..5]], 20)).unwrap(), 2);
        // <bos> <len_1> + 1 1 <ans> 2
        let short: &[i64] = &[1, 29, 3, 7, 7, 2, 8];
        // 3 · 3 = 2 modulo 7, and by 7 alone
        let by_seven: &[i64] = &[1, 29, 5, 9, 9, 2, 8];
        let by_many: &[i64] = &[1, 29, 5, 9, 9, 2, 15];
        for (documents, said) in [
            (vec![first, short, first], "not of one length, but of 2 and 1 operations"),
            (vec![by_seven, by_many, first], "no modulus by which all its answers are right"),
            // Another set's second token may be one of Mano's.
            (vec![&[40, 30, 200, 17, 30, 7][..], first, first], "one of its documents"),
        ] {
            let length = documents.iter().map(|document| document.len() as u32 - 1).sum::<u32>() - 2;
            let told = operations("set", &batch(&documents, length)).unwrap_err().text();
            assert!(told.contains("set is no test set of Mano") && told.contains(said), "{told}");
        }
        let cut = operations("set", &batch(&[first], 6)).unwrap_err().text();
        assert!(cut.contains("give a longer --sequence"), "{cut}");
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

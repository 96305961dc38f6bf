use proptest::prelude::*;

use super::*;
use crate::decode::Documents;

type Row = (Vec<i32>, Option<Vec<u8>>);

/// Packs all of `documents` into micro-batches of `sequences` × `length`; the last one is filled up with a document
/// of zeros, which is not returned.
fn pack(documents: &Documents, sequences: u32, length: u32, mask: Mask) -> (Vec<MicroBatch>, usize) {
    let mut batches = Vec::new();
    let mut packer = Packer::new(sequences, length, mask);
    for document in documents.iter() {
        let mut from = 0;
        while from < document.tokens.len() {
            if packer.room() == 0 {
                batches.push(std::mem::replace(&mut packer, Packer::new(sequences, length, mask)).finish());
            }
            from += packer.push(document, from);
        }
    }
    let filler = Documents::from_rows(&[(vec![0; length as usize], None)]);
    let mut padding = 0;
    while packer.room() > 0 {
        padding += packer.push(Document { counted: None, ..filler.at(0) }, 0);
    }
    batches.push(packer.finish());
    (batches, padding)
}

fn rows(masked: bool) -> impl Strategy<Value = Vec<Row>> {
    let row = prop::collection::vec((1i32..1000, 0u8..2), 1..40).prop_map(move |row| {
        let (ids, mask) = row.into_iter().unzip();
        (ids, masked.then_some(mask))
    });
    prop::collection::vec(row, 1..30)
}

proptest! {
    #[test]
    fn tokens_come_in_order_and_each_pair_is_trained_once(
        rows in prop::bool::ANY.prop_flat_map(rows), sequences in 1u32..5, length in 1u32..33,
    ) {
        let documents = Documents::from_rows(&rows);
        let (batches, padding) = pack(&documents, sequences, length, Mask::Document);
        let flat = |of: fn(&MicroBatch) -> &Vec<i64>| -> Vec<i64> {
            let all: Vec<i64> = batches.iter().flat_map(|b| of(b).clone()).collect();
            all[..all.len() - padding].to_vec()
        };
        let ids: Vec<i64> = rows.iter().flat_map(|(ids, _)| ids).map(|id| i64::from(*id)).collect();
        prop_assert_eq!(flat(|b| &b.input_ids), ids);
        let targets: Vec<i64> = rows.iter().flat_map(|(ids, mask)| {
            (1..=ids.len()).map(move |next| match ids.get(next) {
                Some(id) if mask.as_ref().is_none_or(|mask| mask[next] == 1) => i64::from(*id),
                _ => -100,
            })
        }).collect();
        prop_assert_eq!(flat(|b| &b.targets), targets);
        for batch in &batches {
            prop_assert_eq!(batch.counted, batch.targets.iter().filter(|t| **t != -100).count() as u64);
        }
    }

    #[test]
    fn segments_are_what_the_mask_says(rows in rows(false), sequences in 1u32..5, length in 1u32..33) {
        let documents = Documents::from_rows(&rows);
        for mask in [Mask::Document, Mask::Causal] {
            for batch in pack(&documents, sequences, length, mask).0 {
                let (starts, tokens) = (&batch.segment_starts, (sequences * length) as usize);
                prop_assert_eq!([batch.input_ids.len(), batch.targets.len(), batch.positions.len()], [tokens; 3]);
                prop_assert!(starts.windows(2).all(|w| w[0] < w[1]) && starts[0] == 0);
                prop_assert!((0..sequences).all(|row| starts.binary_search(&(row * length)).is_ok()));
                let mut position = 0;
                for at in 0..tokens {
                    position = if starts.binary_search(&(at as u32)).is_ok() { 0 } else { position + 1 };
                    prop_assert_eq!(batch.positions[at], position);
                    // A target reaches into the same document only: within a segment it is the next token.
                    let inside = at + 1 < tokens && starts.binary_search(&(at as u32 + 1)).is_err();
                    if inside && mask == Mask::Document {
                        prop_assert_eq!(batch.targets[at], batch.input_ids[at + 1]);
                    }
                }
                if mask == Mask::Causal {
                    prop_assert_eq!(starts.len() as u32, sequences);
                }
            }
        }
    }
}

#[test]
fn the_example_of_the_module_is_true() {
    let rows = [(vec![10, 11, 12], None), (vec![20, 21, 22, 23], None), (vec![30, 31, 32, 33], None)];
    let documents = Documents::from_rows(&rows);
    let mut packer = Packer::new(2, 5, Mask::Document);
    assert_eq!(packer.push(documents.at(0), 0), 3);
    assert_eq!(packer.push(documents.at(1), 0), 2);
    assert_eq!(packer.push(documents.at(1), 2), 2);
    assert_eq!(packer.push(documents.at(2), 0), 3);
    assert_eq!(
        packer.finish(),
        MicroBatch {
            sequences: 2,
            length: 5,
            input_ids: vec![10, 11, 12, 20, 21, 22, 23, 30, 31, 32],
            targets: vec![11, 12, -100, 21, 22, 23, -100, 31, 32, 33],
            positions: vec![0, 1, 2, 0, 1, 0, 1, 0, 1, 2],
            segment_starts: vec![0, 3, 5, 7],
            counted: 8,
        }
    );
}

#[test]
#[should_panic(expected = "a micro-batch is full before it is used")]
fn an_unfilled_micro_batch_is_not_handed_out() {
    Packer::new(1, 4, Mask::Document).finish();
}

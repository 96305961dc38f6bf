//! A shard of any bytes is an error, or documents whose ids are within the vocabulary.

#![no_main]

use std::ops::ControlFlow;

use anello_dataloader::{Dataset, Index};
use anello_store::Store;
use libfuzzer_sys::fuzz_target;

const VOCAB: i32 = 1000;

fuzz_target!(|bytes: &[u8]| {
    let store = Store::memory().expect("there is memory");
    store.put("a.parquet", bytes.to_vec()).expect("memory takes it");
    let index = match Index::build(&store, true, 1, &|_| ControlFlow::Continue(())) {
        Ok(index) => index,
        Err(error) => return drop(error.to_string()),
    };
    let Ok(dataset) = Dataset::new(store, index) else { return };
    for at in 0..dataset.row_groups().min(4) {
        match dataset.read(at, Some(VOCAB as u32)) {
            Ok(documents) => assert!(documents.tokens().iter().all(|token| (0..VOCAB).contains(token))),
            Err(error) => drop(error.to_string()),
        }
    }
});

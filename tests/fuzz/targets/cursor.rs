//! A cursor of any bytes is an error, or a place from which a lane goes on.

#![no_main]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::{Arc, OnceLock};

use anello_configs::{Mask, OnCorrupt};
use anello_dataloader::{Cursor, Dataset, Index, Loader, LoaderOptions, StepData};
use anello_store::Store;
use libfuzzer_sys::fuzz_target;

/// Some hundred documents.
const SHARD: &[u8] = include_bytes!("../seeds/shard/lists.parquet");

fn options() -> &'static LoaderOptions {
    static OPTIONS: OnceLock<LoaderOptions> = OnceLock::new();
    OPTIONS.get_or_init(|| {
        let store = Store::memory().expect("there is memory");
        store.put("a.parquet", SHARD.to_vec()).expect("memory takes it");
        let index = Index::build(&store, true, 1, &|_| ControlFlow::Continue(())).expect("the seed is a shard");
        let dataset = Arc::new(Dataset::new(store, index).expect("the seed is a token set"));
        let mixture = Arc::new(BTreeMap::from([("a".to_owned(), 1.0)]));
        let step = move |step: u64| StepData {
            stage: (step / 2) as u32,
            sequence: 16,
            micro_batch: 1,
            micro_batches: 2,
            mask: Mask::Document,
            mixture: mixture.clone(),
        };
        LoaderOptions {
            sources: BTreeMap::from([("a".to_owned(), dataset)]),
            seed: 1,
            lanes: 2,
            serve: 0..1,
            plan: Arc::new(move |at| (at < 4).then(|| step(at))),
            start_step: 0,
            cursors: None,
            vocab: None,
            on_corrupt: OnCorrupt::Fail,
            prefetch_bytes: 1 << 16,
            threads: 1,
        }
    })
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(cursor) = serde_json::from_slice::<Cursor>(bytes) else { return };
    match Loader::open(LoaderOptions { cursors: Some(vec![cursor]), ..options().clone() }) {
        Ok(loader) => loader.for_each(drop),
        Err(error) => drop(error.to_string()),
    }
});

//! An index of any bytes is an error, or one that tells of what is there.

#![no_main]

use anello_dataloader::{Dataset, INDEX_FILE, Index};
use anello_store::Store;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let store = Store::memory().expect("there is memory");
    store.put("a.parquet", vec![0; 64]).expect("memory takes it");
    store.put(INDEX_FILE, bytes.to_vec()).expect("memory takes it");
    let index = match Index::load(&store) {
        Ok(index) => index.expect("it is there"),
        Err(error) => return drop(error.to_string()),
    };
    index.digest();
    let Ok(dataset) = Dataset::new(store, index) else { return };
    if dataset.row_groups() > 0 {
        dataset.read(0, Some(1000)).expect_err("the shard is no Parquet").to_string();
    }
});

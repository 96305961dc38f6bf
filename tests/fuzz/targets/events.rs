//! A record of any bytes is an error, or an event that can be told in words.

#![no_main]

use anello_store::{Store, events, words};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let store = Store::memory().expect("there is memory");
    store.put("events/00000001.json", bytes.to_vec()).expect("memory takes it");
    match events::read(&store) {
        Ok(records) => records.iter().for_each(|record| drop(words::describe(&record.event))),
        Err(error) => drop(error.to_string()),
    }
});

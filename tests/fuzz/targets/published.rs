//! A file of weights of any bytes, and a config of any text, in a folder of the published layout: refused, or weights of the sizes
//! that the config tells of.

#![no_main]

use anello_store::Store;
use anello_worker::interchange;
use libfuzzer_sys::fuzz_target;

// Up to the first zero byte a config, then a file of weights.
fuzz_target!(|bytes: &[u8]| {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let (config, weights) = (&bytes[..end], bytes.get(end + 1..).unwrap_or_default());
    let store = Store::memory().expect("there is memory");
    store.put("config.json", config.to_vec()).expect("memory takes it");
    store.put("model.safetensors", weights.to_vec()).expect("memory takes it");
    let read = interchange::published_use(&store)
        .and_then(|_| interchange::published_model(&store))
        .and_then(|model| interchange::read(&store, &model));
    match read {
        Ok((layout, read)) => assert_eq!(layout.len(), read.len()),
        Err(error) => drop(error.to_string()),
    }
});

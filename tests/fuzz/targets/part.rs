//! A part of any bytes is refused: nothing but what the manifest knows is taken.

#![no_main]

use anello_store::Store;
use anello_store::checkpoint::{BlockDigests, Manifest, Part, read_part};
use libfuzzer_sys::fuzz_target;

/// What the manifest of a checkpoint is besides its parts.
const MANIFEST: &str = include_str!("../seeds/manifest/small.json");

fuzz_target!(|bytes: &[u8]| {
    let manifest: Manifest = serde_json::from_str(MANIFEST).expect("the seed is a manifest");
    let part = Part {
        name: "part-00000-00001-00000001.safetensors".to_owned(),
        step: None,
        still: bytes.len() % 2 == 1,
        first_block: 0,
        blocks: 1,
        bytes: bytes.len() as u64,
        blake3: blake3::hash(bytes).to_hex().to_string(),
    };
    let none = || vec![String::new()];
    let blocks = BlockDigests { weights: none(), exp_avg: none(), exp_avg_sq: none() };
    let manifest = Manifest { parts: vec![part.clone()], blocks, ..manifest };
    let store = Store::memory().expect("there is memory");
    store.put(&part.path(manifest.step), bytes.to_vec()).expect("memory takes it");
    let read = read_part(&store, &manifest, &part, |_| String::new(), |_, _, _| panic!("it is taken"));
    read.expect_err("it is refused").to_string();
});

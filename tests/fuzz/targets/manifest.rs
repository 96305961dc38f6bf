//! A manifest of any bytes, sealed as one does who means it, is refused or whole: what its parts say can be asked of it.

#![no_main]

use anello_store::checkpoint::Manifest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = Manifest::parse(bytes, 4, "fuzz");
    let Ok(mut manifest) = serde_json::from_slice::<Manifest>(bytes) else { return };
    manifest.blake3.clear();
    let bare = serde_json::to_vec(&manifest).expect("a manifest is JSON");
    manifest.blake3 = blake3::hash(&bare).to_hex().to_string();
    let sealed = serde_json::to_vec(&manifest).expect("a manifest is JSON");
    let Ok(manifest) = Manifest::parse(&sealed, 4, "fuzz") else { return };
    let blocks = manifest.blocks.of(0).len();
    assert_eq!(manifest.step, 4);
    assert!(manifest.parts.iter().all(|part| part.range().end <= blocks && !part.path(4).contains("..")));
    let _ = manifest.bytes();
});

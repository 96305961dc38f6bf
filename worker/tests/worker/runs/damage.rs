//! Damaged checkpoints: found, named, passed over; never used, never deleted.

use anello_store::events::Event;
use anello_store::{Store, checkpoint};
use safetensors::SafeTensors;

use super::store::TestStore;
use super::*;

const NEWEST: u64 = 12;
const BEFORE: u64 = 10;

/// A run that was stopped after step 12, with checkpoints of four parts after 3, 6, 7, 9, 10 and 12.
fn stopped(data: &Data) -> TestStore {
    let (store, mut config) = (TestStore::new(), data.config());
    (config.checkpoint.every_steps, config.checkpoint.part_bytes) = (3, 64 << 10);
    begin(&store.run(), &config, Some(NEWEST));
    store
}

fn part_of(store: &Store, step: u64, part: usize) -> String {
    let manifest = checkpoint::read_manifest(store, step).unwrap();
    format!("{}/{}", checkpoint::folder(step), manifest.parts[part].name)
}

fn manifest_of(step: u64) -> String {
    format!("{}/manifest.json", checkpoint::folder(step))
}

fn change(store: &Store, path: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = store.get(path).unwrap().unwrap().to_vec();
    change(&mut bytes);
    store.put(path, bytes).unwrap();
}

/// The place in a part of the first byte of one of its buffers.
fn place_of(bytes: &[u8], buffer: &str) -> usize {
    let (header, metadata) = SafeTensors::read_metadata(bytes).unwrap();
    8 + header + metadata.info(buffer).unwrap().data_offsets.0
}

/// A kind of damage to the newest checkpoint, and what the error must say of it.
type Damage = (&'static str, fn(&Store), &'static [&'static str]);

const DAMAGES: &[Damage] = &[
    (
        "a bit of a weight",
        |store| {
            change(store, &part_of(store, NEWEST, 1), |bytes| {
                let at = place_of(bytes, "weights");
                bytes[at + 4321] ^= 1;
            });
        },
        &["part part-00001", "(2 of 4)", "block 1 of weights has changed", "lm_head.weight"],
    ),
    (
        "a bit of the last moment",
        |store| {
            change(store, &part_of(store, NEWEST, 3), |bytes| {
                let at = place_of(bytes, "exp_avg_sq");
                bytes[at + 65_536 * 4 - 1] ^= 0x80;
            });
        },
        &["part part-00003", "(4 of 4)", "block 3 of exp_avg_sq has changed"],
    ),
    (
        "a bit of a first moment",
        |store| {
            change(store, &part_of(store, NEWEST, 0), |bytes| {
                let at = place_of(bytes, "exp_avg");
                bytes[at] ^= 2;
            });
        },
        &["part part-00000", "block 0 of exp_avg has changed", "embed_tokens"],
    ),
    (
        "the length of a header",
        |store| change(store, &part_of(store, NEWEST, 0), |bytes| bytes[3] ^= 0x40),
        &["part part-00000", "(1 of 4)", "safetensors"],
    ),
    (
        "a word of a header",
        |store| {
            change(store, &part_of(store, NEWEST, 2), |bytes| {
                let at = bytes.windows(6).position(|w| w == b"anello").unwrap();
                bytes[at] = b'A';
            });
        },
        &["part part-00002", "header has changed"],
    ),
    (
        "a truncated part",
        |store| change(store, &part_of(store, NEWEST, 2), |bytes| bytes.truncate(1000)),
        &["part part-00002", "has 1000 bytes, not"],
    ),
    ("an empty part", |store| change(store, &part_of(store, NEWEST, 0), Vec::clear), &["has 0 bytes"]),
    (
        "a part that is too long",
        |store| change(store, &part_of(store, NEWEST, 3), |bytes| bytes.push(0)),
        &["part part-00003", "bytes, not"],
    ),
    (
        "a missing part",
        |store| store.delete(&part_of(store, NEWEST, 1)).unwrap(),
        &["part part-00001", "(2 of 4)", "is missing"],
    ),
    (
        "a part of another checkpoint",
        |store| {
            let other = store.get(&part_of(store, BEFORE, 0)).unwrap().unwrap();
            store.put(&part_of(store, NEWEST, 0), other).unwrap();
        },
        &["part part-00000", "block 0 of"],
    ),
    (
        "a truncated manifest",
        |store| change(store, &manifest_of(NEWEST), |bytes| bytes.truncate(bytes.len() / 2)),
        &["manifest.json", "EOF"],
    ),
    ("an empty manifest", |store| change(store, &manifest_of(NEWEST), Vec::clear), &["manifest.json"]),
    (
        "a manifest of zeros",
        |store| change(store, &manifest_of(NEWEST), |bytes| bytes.fill(0)),
        &["manifest.json"],
    ),
    (
        "another number of updates",
        |store| {
            change(store, &manifest_of(NEWEST), |bytes| {
                let key = b"\"updates\": ";
                let at = bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len();
                bytes[at] ^= 1;
            });
        },
        &["manifest.json", "has changed"],
    ),
    (
        "the manifest of another checkpoint",
        |store| {
            let other = store.get(&manifest_of(BEFORE)).unwrap().unwrap();
            store.put(&manifest_of(NEWEST), other).unwrap();
        },
        &["manifest.json", "contradicts itself"],
    ),
];

#[test]
fn damage_is_found_named_and_passed_over() {
    let data = Data::new();
    let whole = stopped(&data).journal();
    for (what, damage, said) in DAMAGES {
        let store = TestStore::after(&whole).run();
        damage(&store);
        let damaged_manifest = store.get(&manifest_of(NEWEST)).unwrap().unwrap();
        let loaded = load(&store, NEWEST, &data.config().model, tch::Device::Cpu);
        let verified = checkpoint::verify(&store, NEWEST);
        let Err(Error::Store(loaded)) = loaded else { panic!("{what}: {loaded:?}") };
        for error in [&loaded, &verified.unwrap_err()] {
            assert!(matches!(error, StoreError::Checkpoint { step: NEWEST, .. }), "{what}: {error:?}");
            let text = error.to_string();
            assert!(text.starts_with("checkpoint 12: "), "{what}: {text}");
            assert!(text.ends_with("; use the checkpoint before it"), "{what}: {text}");
            // `verify` does not know the model, so not the names of its tensors.
            let known = |word: &&&str| !word.contains("lm_head") && !word.contains("embed");
            for word in said.iter().filter(known) {
                assert!(text.contains(word), "{what}: {text:?} does not say {word:?}");
            }
        }
        assert!(said.iter().all(|word| loaded.to_string().contains(word)), "{what}: {loaded}");

        resume(&store, None);
        assert_finished(&store, what);
        let passed_over: Vec<_> = events_of(&store)
            .into_iter()
            .filter_map(|event| match event {
                Event::PassedOver { step, reason } => Some((step, reason)),
                _ => None,
            })
            .collect();
        assert_eq!(passed_over, [(NEWEST, loaded.to_string())], "{what}");
        let aside = format!("{}/manifest.set-aside.json", checkpoint::folder(NEWEST));
        assert_eq!(store.get(&aside).unwrap(), Some(damaged_manifest), "{what}: it is set aside");
    }
}

#[test]
fn the_newest_whole_one_is_taken_however_many_are_not() {
    let data = Data::new();
    let store = stopped(&data).run();
    for step in [9, BEFORE, NEWEST] {
        store.delete(&part_of(&store, step, 0)).unwrap();
    }
    let before: Vec<Event> = events_of(&store);
    resume(&store, None);
    assert_finished(&store, "three are damaged");
    let after = &events_of(&store)[before.len()..];
    let steps: Vec<u64> = after
        .iter()
        .filter_map(|event| match event {
            Event::PassedOver { step, .. } => Some(*step),
            _ => None,
        })
        .collect();
    assert_eq!(steps, [NEWEST, BEFORE, 9]);
    assert!(matches!(after[3], Event::Started { step: 7, .. }), "{:?}", after[3]);
}

#[test]
fn when_all_are_damaged_nothing_is_touched() {
    let data = Data::new();
    let store = stopped(&data);
    for step in checkpoint::steps(&store.run()).unwrap() {
        change(&store.run(), &part_of(&store.run(), step, 2), |bytes| bytes[70_000] ^= 1);
    }
    let before = store.objects();
    let run = Run::resume(store.run(), Resume::default()).unwrap();
    let text = drive(run, None).0.unwrap_err().to_string();
    assert!(text.contains("none of the 6 checkpoints of memory is whole"), "{text}");
    assert!(text.contains("verify"), "the remedy: {text}");
    assert!(store.objects() == before, "the folder is as it was");
}

/// Whatever byte of a manifest flips: it is found, unless it was in the white space.
#[test]
fn no_flipped_byte_of_a_manifest_is_believed() {
    let data = Data::new();
    let store = stopped(&data).run();
    let path = manifest_of(NEWEST);
    let (whole, bytes) =
        (checkpoint::read_manifest(&store, NEWEST).unwrap(), store.get(&path).unwrap().unwrap());
    let mut found = 0;
    for at in 0..bytes.len() {
        for bit in [0, 1, 3] {
            let mut flipped = bytes.to_vec();
            flipped[at] ^= 1 << bit;
            store.put(&path, flipped).unwrap();
            match checkpoint::read_manifest(&store, NEWEST) {
                Ok(manifest) => assert_eq!(manifest, whole, "bit {bit} of byte {at} was believed"),
                Err(StoreError::Checkpoint { .. } | StoreError::Malformed { .. }) => found += 1,
                Err(other) => panic!("bit {bit} of byte {at}: {other}"),
            }
        }
    }
    assert!(found > bytes.len(), "{found} of {} flips were found", 3 * bytes.len());
}

/// Bytes all over a part.
#[test]
fn no_flipped_byte_of_a_part_is_believed() {
    let data = Data::new();
    let store = stopped(&data).run();
    let path = part_of(&store, NEWEST, 1);
    let bytes = store.get(&path).unwrap().unwrap();
    let header = place_of(&bytes, "exp_avg");
    let everywhere = (0..header).step_by(7).chain((header..bytes.len()).step_by(40_009));
    for at in everywhere {
        let mut flipped = bytes.to_vec();
        flipped[at] ^= 0x10;
        store.put(&path, flipped).unwrap();
        let found = checkpoint::verify(&store, NEWEST);
        assert!(matches!(found, Err(StoreError::Checkpoint { .. })), "byte {at} was believed");
    }
}

#[test]
fn parts_without_a_manifest_are_no_checkpoint() {
    let data = Data::new();
    let store = stopped(&data).run();
    store.delete(&manifest_of(NEWEST)).unwrap();
    assert_eq!(checkpoint::steps(&store).unwrap().last(), Some(&BEFORE));
    let text = checkpoint::verify(&store, NEWEST).unwrap_err().to_string();
    assert!(text.contains("there are: 3, 6, 7, 9, 10"), "{text}");
    resume(&store, None);
    assert_finished(&store, "a half-written checkpoint");
    let passed_over = events_of(&store).into_iter().any(|e| matches!(e, Event::PassedOver { .. }));
    assert!(!passed_over, "there was nothing to pass over");
}

/// A checkpoint of a newer build is whole: it is not this build's to set aside.
#[test]
fn a_checkpoint_of_a_newer_format_stops_the_run() {
    let data = Data::new();
    let store = stopped(&data);
    change(&store.run(), &manifest_of(NEWEST), |bytes| {
        let text = String::from_utf8(bytes.clone()).unwrap();
        *bytes = text.replacen("\"format\": 1", "\"format\": 4", 1).into_bytes();
    });
    let before = store.objects();
    let text = drive(Run::resume(store.run(), Resume::default()).unwrap(), None).0.unwrap_err().to_string();
    assert!(text.contains("it has format 4, this build reads up to 3"), "{text}");
    assert!(text.contains("checkpoints/0000000012/manifest.json"), "{text}");
    assert!(store.objects() == before, "the folder is as it was");
}

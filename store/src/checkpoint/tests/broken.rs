//! Broken and hostile checkpoints: each is one clear error, without a panic and without memory for what it claims.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::catalog::manifest_path;
use super::*;

/// Changes the manifest of checkpoint 4 and seals it again, as one does who means it.
fn resealed(store: &Store, change: impl FnOnce(&mut Value)) -> crate::Result<Manifest> {
    let path = manifest_path(4);
    let mut value: Value = serde_json::from_slice(&store.get(&path).unwrap().unwrap()).unwrap();
    change(&mut value);
    if let Ok(manifest) = serde_json::from_value::<Manifest>(value.clone()) {
        value["blake3"] = manifest.digest().into();
    }
    store.put(&path, serde_json::to_vec(&value).unwrap()).unwrap();
    read_manifest(store, 4)
}

#[test]
fn manifests_that_claim_what_cannot_be() {
    const HUGE: u64 = 1 << 62;
    /// What is done to it, and what the error must say.
    type Case = (&'static str, fn(&mut Value), &'static str);
    let cases: &[Case] = &[
        (
            "a name that leads away",
            |m| m["parts"][0]["name"] = json!("part-/../../../etc/passwd"),
            "is out of place",
        ),
        ("an absolute name", |m| m["parts"][1]["name"] = json!("/etc/passwd"), "is out of place"),
        ("a name of another kind", |m| m["parts"][1]["name"] = json!("manifest.json"), "is out of place"),
        (
            "a name with a line break",
            |m| m["parts"][1]["name"] = json!("part-\n"),
            "\"part-\\n\" is out of place",
        ),
        ("a part of a later checkpoint", |m| m["parts"][0]["step"] = json!(5), "is out of place"),
        ("a part of itself as of another", |m| m["parts"][0]["step"] = json!(4), "is out of place"),
        ("a part of no blocks", |m| m["parts"][0]["blocks"] = json!(0), "is out of place"),
        ("a part of 2^62 blocks", |m| m["parts"][4]["blocks"] = json!(HUGE), "contradicts itself"),
        ("all of 2^64 blocks", |m| m["parts"][4]["blocks"] = json!(u64::MAX), "contradicts itself"),
        ("parts that overlap", |m| m["parts"][1]["first_block"] = json!(0), "is out of place"),
        ("a hole", |m| drop(m["parts"].as_array_mut().unwrap().remove(1)), "is out of place"),
        ("parts in another order", |m| m["parts"].as_array_mut().unwrap().swap(0, 1), "is out of place"),
        ("no parts", |m| m["parts"] = json!([]), "contradicts itself"),
        ("2^62 elements", |m| m["elements"] = json!(HUGE), "contradicts itself"),
        ("blocks of another size", |m| m["block"] = json!(1), "contradicts itself"),
        (
            "a digest less",
            |m| drop(m["blocks"]["exp_avg"].as_array_mut().unwrap().pop()),
            "contradicts itself",
        ),
        (
            "a digest more",
            |m| m["blocks"]["exp_avg"].as_array_mut().unwrap().push(json!("x")),
            "contradicts itself",
        ),
        ("another step", |m| m["step"] = json!(3), "contradicts itself"),
        ("other weights", |m| m["weights"] = json!("x"), "contradicts itself"),
        (
            "a negative size",
            |m| m["parts"][0]["bytes"] = json!(-1),
            "manifest.json: invalid value: integer `-1`",
        ),
        ("a fraction", |m| m["tokens"] = json!(1.5), "manifest.json: invalid type: floating point"),
        (
            "no cursors",
            |m| drop(m.as_object_mut().unwrap().remove("cursors")),
            "manifest.json: missing field `cursors`",
        ),
        ("a list", |m| *m = json!([]), "manifest.json: invalid length 0"),
        ("nothing", |m| *m = Value::Null, "manifest.json: invalid type: null"),
    ];
    for (what, change, said) in cases {
        let refused = resealed(&incremental(), change);
        let text = refused.as_ref().map(|_| String::new()).unwrap_or_else(ToString::to_string);
        assert!(matches!(refused, Err(Error::Checkpoint { step: 4, .. })), "{what}: {refused:?}");
        assert!(text.starts_with("checkpoint 4: manifest.json") && text.contains(said), "{what}: {text}");
    }
    let newer = resealed(&incremental(), |m| m["format"] = json!(4)).unwrap_err().to_string();
    assert_eq!(
        newer,
        "memory/checkpoints/0000000004/manifest.json does not parse: it has format 4, this build reads up to 3; \
         use the build that wrote it or a newer one"
    );
    let nested = "[".repeat(100_000);
    let store = incremental();
    store.put(&manifest_path(4), nested).unwrap();
    assert!(matches!(read_manifest(&store, 4), Err(Error::Checkpoint { .. })));
}

/// A safetensors object of one's own making: a header and so many bytes after it.
fn object(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 7);
    bytes
}

fn tensors(of: [(&str, &str, [usize; 2]); 3]) -> String {
    let entry = |(name, dtype, [start, end]): (&str, &str, [usize; 2])| {
        format!(
            r#""{name}":{{"dtype":"{dtype}","shape":[{}],"data_offsets":[{start},{end}]}}"#,
            (end - start) / 4
        )
    };
    format!("{{{}}}", of.map(entry).join(","))
}

#[test]
fn parts_that_claim_what_cannot_be() {
    const N: usize = BLOCK_BYTES;
    let names = ["exp_avg", "exp_avg_sq", "weights"];
    let plain = |names: [&str; 3]| {
        object(
            &tensors([
                (names[0], "F32", [0, N]),
                (names[1], "F32", [N, 2 * N]),
                (names[2], "F32", [2 * N, 3 * N]),
            ]),
            3 * N,
        )
    };
    let mut long_header = plain(names);
    long_header[..8].copy_from_slice(&(1u64 << 62).to_le_bytes());
    let mut past_the_end = plain(names);
    let length = past_the_end.len() as u64;
    past_the_end[..8].copy_from_slice(&length.to_le_bytes());
    let overlapping =
        tensors([("exp_avg", "F32", [0, N]), ("exp_avg_sq", "F32", [0, N]), ("weights", "F32", [N, 2 * N])]);
    let gap = tensors([
        ("exp_avg", "F32", [0, N]),
        ("exp_avg_sq", "F32", [2 * N, 3 * N]),
        ("weights", "F32", [3 * N, 4 * N]),
    ]);
    let doubles = tensors([
        ("exp_avg", "F64", [0, N]),
        ("exp_avg_sq", "F32", [N, 2 * N]),
        ("weights", "F32", [2 * N, 3 * N]),
    ]);
    let short =
        tensors([("exp_avg", "F32", [0, 4]), ("exp_avg_sq", "F32", [4, 8]), ("weights", "F32", [8, 12])]);
    let endless = r#"{"weights":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}"#;
    let cases: [(&str, Vec<u8>, &str); 12] = [
        ("nothing", Vec::new(), "is no safetensors"),
        ("seven bytes", vec![1; 7], "is no safetensors"),
        ("a header of 2^62 bytes", long_header, "is no safetensors"),
        ("a header past the end", past_the_end, "is no safetensors"),
        ("tensors that overlap", object(&overlapping, 3 * N), "is no safetensors"),
        ("a gap between tensors", object(&gap, 4 * N), "is no safetensors"),
        ("numbers of another kind", object(&doubles, 3 * N), "is no safetensors"),
        ("a shape that overflows", object(endless, 4), "is no safetensors"),
        ("an object without its end", plain(names)[..N].to_vec(), "is no safetensors"),
        ("a tensor of another name", plain(["exp_avg", "exp_avg_sq", "widths"]), "weights: "),
        ("tensors that are too short", object(&short, 12), "weights: 4 bytes"),
        ("a header that is no JSON", object("\u{0}\u{1}", 3 * N), "is no safetensors"),
    ];
    for (what, bytes, said) in cases {
        let store = incremental();
        let path = manifest_path(4);
        let mut value: Value = serde_json::from_slice(&store.get(&path).unwrap().unwrap()).unwrap();
        // The manifest means it, so that its own digest does not find it.
        value["parts"][1]["bytes"] = bytes.len().into();
        value["parts"][1]["blake3"] = blake3::hash(&bytes).to_hex().to_string().into();
        let manifest: Manifest = serde_json::from_value(value.clone()).unwrap();
        value["blake3"] = manifest.digest().into();
        store.put(&path, serde_json::to_vec(&value).unwrap()).unwrap();
        store.put(&manifest.parts[1].path(4), bytes).unwrap();
        let text = verify(&store, 4).unwrap_err().to_string();
        let part = "checkpoint 4: part part-00001-00002-00000001.safetensors (2 of 5)";
        assert!(text.starts_with(part) && text.contains(said), "{what}: {text}");
        // What it claims to have is not read when it has not.
        let claimed = Part { bytes: 1 << 62, ..manifest.parts[1].clone() };
        let text =
            read_part(&store, &manifest, &claimed, |_| String::new(), |_, _, _| ()).unwrap_err().to_string();
        assert!(text.contains("bytes, not 4611686018427387904"), "{what}: {text}");
    }
}

fn damage() -> impl Strategy<Value = (usize, usize, Vec<u8>)> {
    (any::<usize>(), 0..40usize, prop::collection::vec(any::<u8>(), 0..40))
}

/// Bytes with some cut out anywhere and others put there.
fn damaged(bytes: &[u8], (at, cut, new): &(usize, usize, Vec<u8>)) -> Vec<u8> {
    let at = at % (bytes.len() + 1);
    [&bytes[..at], new, &bytes[bytes.len().min(at + cut)..]].concat()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn no_damage_to_a_manifest_is_believed(damage in damage()) {
        let store = incremental_once();
        let whole = read_manifest(store, 4).unwrap();
        let bytes = damaged(&store.get(&manifest_path(4)).unwrap().unwrap(), &damage);
        match Manifest::parse(&bytes, 4, "there") {
            Ok(manifest) => prop_assert_eq!(manifest, whole),
            Err(Error::Checkpoint { step: 4, .. } | Error::Malformed { .. }) => {}
            Err(other) => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn no_damage_to_the_head_of_a_part_is_believed(damage in damage()) {
        let store = Store::memory().unwrap();
        let written = part_of(&store, 7, 1, 0, buffers(1, 5));
        let manifest = commit(&store, Manifest::new(facts(7), vec![written])).unwrap();
        let path = manifest.parts[0].path(7);
        let bytes = store.get(&path).unwrap().unwrap();
        let (at, cut, new) = damage;
        // As many bytes as before, so that it is read.
        let new = damaged(&bytes, &(at % 400, new.len().max(cut.min(1)), new));
        let mut new = new;
        new.resize(bytes.len(), 5);
        store.put(&path, new.clone()).unwrap();
        match verify(&store, 7) {
            Ok(_) => prop_assert!(new == bytes, "damage was believed"),
            Err(Error::Checkpoint { step: 7, .. }) => prop_assert!(new != bytes),
            Err(other) => prop_assert!(false, "{other:?}"),
        }
    }
}

fn incremental_once() -> &'static Store {
    static STORE: std::sync::OnceLock<Store> = std::sync::OnceLock::new();
    STORE.get_or_init(incremental)
}

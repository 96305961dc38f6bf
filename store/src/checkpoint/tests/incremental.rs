//! What an earlier checkpoint has is named, and not written again.

use super::*;

#[test]
fn what_did_not_change_is_named_and_not_written_again() {
    let store = incremental();
    let manifest = |step| verify(&store, step).unwrap();
    let said: Vec<String> = (1..=4).map(|step| told(&manifest(step))).collect();
    assert_eq!(
        said,
        [
            "0..4, 4..6",
            "0..4 of 1, 4..5, 5..6",
            "0..4 of 1, 4..5 of 2, 5..6",
            "0..1, 1..2, 2..4, 4..5 of 2, 5..6 of 3"
        ]
    );
    assert_eq!((1..=4).map(|step| manifest(step).format).collect::<Vec<_>>(), [1, 2, 2, 2]);
    let written: Vec<u64> = (1..=4)
        .map(|step| names(&store, step).iter().filter(|name| name.starts_with("part")).count() as u64)
        .collect();
    assert_eq!(written, [2, 2, 1, 3]);
    // The bytes do not tell of it.
    let whole = Store::memory().unwrap();
    let plain = saved_state(&whole, 4, [9, 4, 9, 9, 9, 3]);
    assert_eq!((&plain.blocks, &plain.weights), (&manifest(4).blocks, &manifest(4).weights));
    let mut read = [0, 1, 2].map(|_| Vec::new());
    for part in &manifest(4).parts {
        let take = |buffer: usize, _: usize, bytes: &[u8]| read[buffer].extend_from_slice(bytes);
        read_part(&store, &manifest(4), part, |_| String::new(), take).unwrap();
    }
    assert_eq!(read.map(Bytes::from), state([9, 4, 9, 9, 9, 3]));
}

/// A stage that freezes all but one block sets all moments to zero: of what was written before the weights alone count, and what is
/// new of the frozen has no moments.
#[test]
fn what_stands_still_is_not_written_again_and_has_no_moments() {
    let store = Store::memory().unwrap();
    saved_state(&store, 1, [9; 6]);
    let frozen = |store: &Store, step: u64, fills: [u8; 6]| {
        let [weights, moments, _] = state(fills);
        let moved = moments.slice(4 * BLOCK_BYTES..5 * BLOCK_BYTES);
        let part_bytes = 4 * (BLOCK_BYTES * BUFFERS.len()) as u64;
        let buffers = [weights, moved.clone(), moved];
        let written = write_blocks(store, step, 1, part_bytes, 0, 4..5, &buffers).unwrap();
        commit(store, Manifest::new(facts(step), written)).unwrap();
        verify(store, step).unwrap()
    };
    let [second, third, fourth] = [(2, [9; 6]), (3, [9, 9, 9, 9, 7, 9]), (4, [9, 5, 9, 9, 7, 9])]
        .map(|(step, fills)| frozen(&store, step, fills));
    assert_eq!(told(&second), "0..4 still of 1, 4..5, 5..6 still");
    assert_eq!(told(&third), "0..4 still of 1, 4..5, 5..6 still of 2");
    assert_eq!(told(&fourth), "0..1 still, 1..2 still, 2..4 still, 4..5 of 3, 5..6 still of 2");
    assert_eq!(
        [&second, &third, &fourth].map(|manifest| (manifest.format, manifest.moved())),
        [(3, 4..5), (3, 4..5), (3, 4..5)]
    );
    let sizes: Vec<u64> = second.parts.iter().map(|part| part.bytes / BLOCK_BYTES as u64).collect();
    assert_eq!(sizes, [12, 3, 1], "blocks of numbers");
    // Alone, in memory and in a folder, it is the same state.
    let folder = tempfile::tempdir().unwrap();
    let alone = Store::open(folder.path().to_str().unwrap()).unwrap();
    let plain = frozen(&alone, 3, [9, 9, 9, 9, 7, 9]);
    assert_eq!(told(&plain), "0..4 still, 4..5, 5..6 still");
    assert_eq!((&plain.blocks, &plain.weights), (&third.blocks, &third.weights));
    for (store, manifest) in [(&store, &third), (&alone, &plain)] {
        let mut read = [0, 1, 2].map(|_| vec![1; 6 * BLOCK_BYTES]);
        for part in &manifest.parts {
            let take = |buffer: usize, block: usize, bytes: &[u8]| {
                read[buffer][block * BLOCK_BYTES..][..BLOCK_BYTES].copy_from_slice(bytes);
            };
            read_part(store, manifest, part, |_| String::new(), take).unwrap();
        }
        let [weights, moments, _] = state([9, 9, 9, 9, 7, 9]);
        assert_eq!(read[0], weights);
        for moments_read in &read[1..] {
            for (block, bytes) in moments_read.chunks(BLOCK_BYTES).enumerate() {
                let expected = if block == 4 {
                    &moments[4 * BLOCK_BYTES..5 * BLOCK_BYTES]
                } else {
                    &[0; BLOCK_BYTES][..]
                };
                assert!(bytes == expected, "block {block}");
            }
        }
    }
    // Weights that changed are found in an old part as in a new one; its moments do not count any more.
    for (part, place, found) in [
        (0, 2 * BLOCK_BYTES, None),
        (0, 10 * BLOCK_BYTES, Some("block 2 of weights")),
        (2, 0, Some("block 5 of weights")),
    ] {
        let path = third.parts[part].path(3);
        let whole = store.get(&path).unwrap().unwrap();
        let mut bytes = whole.to_vec();
        let numbers = bytes.len() - third.parts[part].bytes as usize / BLOCK_BYTES * BLOCK_BYTES;
        bytes[numbers + place + 9] ^= 1;
        store.put(&path, bytes).unwrap();
        let told = verify(&store, 3).map(drop).map_err(|error| error.to_string());
        match found {
            Some(found) => assert!(told.as_ref().is_err_and(|told| told.contains(found)), "{told:?}"),
            None => assert_eq!(told, Ok(())),
        }
        store.put(&path, whole).unwrap();
    }
    // A manifest that says so of moments that are not zero contradicts itself.
    let mut wrong = Manifest { parts: second.parts.clone(), ..saved_state(&store, 5, [9; 6]) };
    (wrong.step, wrong.blake3) = (5, wrong.digest());
    let bytes = serde_json::to_vec(&wrong).unwrap();
    assert!(Manifest::parse(&bytes, 5, "here").unwrap_err().to_string().contains("contradicts itself"));
}

#[test]
fn writers_that_cut_the_same_blocks_otherwise_make_one_checkpoint() {
    let store = Store::memory().unwrap();
    let write = |first, blocks| part_of(&store, 7, 9, first, buffers(blocks, 5));
    let one = [write(0, 2), write(2, 2)];
    let other = [write(1, 1), write(2, 1), write(3, 1)];
    for order in [[&one[..], &other], [&other, &one]] {
        let manifest = Manifest::new(facts(7), order.concat());
        assert_eq!(told(&manifest), "0..2, 2..4");
    }
    let mixed = Manifest::new(facts(7), [&one[..1], &other].concat());
    assert_eq!(told(&mixed), "0..2, 2..3, 3..4");
    commit(&store, mixed).unwrap();
    verify(&store, 7).unwrap();
    // 0..2 leads nowhere when 2 is not there to go on from.
    let way = [write(0, 1), write(0, 2), write(1, 3)];
    assert_eq!(told(&Manifest::new(facts(8), way.to_vec())), "0..1, 1..4");
}

mod broken;

use bytes::Bytes;

use super::*;
use crate::{Cursor, Environment, Error, Store};

fn facts(step: u64) -> Facts {
    let text = |text: &str| text.to_owned();
    Facts {
        position: Position { step, stage: text("stable"), stage_end: step == 2, tokens: 100 * step },
        updates: step,
        layers: 2,
        cursors: vec![Cursor::default()],
        losses: vec![7.25, 0.1 + 0.2],
        config: text("c"),
        data: [(text("docs"), text("d"))].into(),
        environment: Environment {
            anello: text("0.1.0"),
            revision: None,
            libtorch: text("2"),
            device: text("CPU"),
            threads: 1,
            system: text("linux"),
        },
    }
}

/// The buffers of `blocks` blocks, all bytes of a buffer its index plus `fill`.
fn buffers(blocks: usize, fill: u8) -> [Bytes; 3] {
    [0, 1, 2].map(|buffer| vec![fill + buffer; blocks * BLOCK_BYTES].into())
}

fn part_of(store: &Store, step: u64, stamp: impl Into<Stamp>, first: usize, buffers: [Bytes; 3]) -> Written {
    let digests = blocks::Digests::new(first, 0..usize::MAX, &buffers);
    part::write_part(store, step, stamp.into(), first, &digests, 0..digests.blocks()).unwrap()
}

/// Three blocks in two parts.
fn parts(store: &Store, step: u64, session: u64, fill: u8) -> Vec<Written> {
    let write = |first, blocks| part_of(store, step, session, first, buffers(blocks, fill));
    vec![write(2, 1), write(0, 2)]
}

fn saved(store: &Store, step: u64, session: u64, fill: u8) -> crate::Result<Manifest> {
    commit(store, Manifest::new(facts(step), parts(store, step, session, fill)))
}

fn names(store: &Store, step: u64) -> Vec<String> {
    let objects = store.list(&folder(step)).unwrap();
    objects.into_iter().map(|o| o.path.rsplit_once('/').unwrap().1.to_owned()).collect()
}

#[test]
fn a_checkpoint_exists_with_its_manifest_and_reads_back() {
    let store = Store::memory().unwrap();
    let manifest = Manifest::new(facts(7), parts(&store, 7, 1, 5));
    assert_eq!(steps(&store).unwrap(), [0u64; 0]);
    assert_eq!(commit(&store, manifest.clone()).unwrap(), manifest);
    assert_eq!((steps(&store).unwrap(), verify(&store, 7).unwrap()), (vec![7], manifest.clone()));
    assert_eq!((manifest.elements, manifest.parts[1].range()), (3 * BLOCK as u64, 2..3));

    let mut read = [0, 1, 2].map(|_| Vec::new());
    for part in &manifest.parts {
        let take = |buffer: usize, _: usize, bytes: &[u8]| read[buffer].extend_from_slice(bytes);
        read_part(&store, &manifest, part, |_| String::new(), take).unwrap();
    }
    assert_eq!(read, [5, 6, 7].map(|byte| vec![byte; 3 * BLOCK_BYTES]));
}

#[test]
fn a_second_commit_is_a_success_with_the_same_state_and_fenced_with_another() {
    let store = Store::memory().unwrap();
    let first = saved(&store, 7, 1, 5).unwrap();
    assert_eq!(saved(&store, 7, 2, 5).unwrap(), first);
    let refused = saved(&store, 7, 3, 6);
    assert!(matches!(refused, Err(Error::Fenced { .. })), "{refused:?}");
    assert_eq!(verify(&store, 7).unwrap(), first);
}

#[test]
fn a_manifest_whose_parts_were_tidied_away_is_no_checkpoint() {
    let store = Store::memory().unwrap();
    let manifest = Manifest::new(facts(7), parts(&store, 7, 1, 5));
    plan_pruning(&store, |_| Vec::new(), |_| Some(7)).unwrap().carry_out(&store).unwrap();
    let refused = commit(&store, manifest);
    assert!(matches!(refused, Err(Error::Checkpoint { .. })), "{refused:?}");
    assert!(store.list("").unwrap().is_empty());
}

#[test]
fn parts_of_several_writers_make_one_checkpoint_and_travel_as_json() {
    let store = Store::memory().unwrap();
    let write = |first, blocks| part_of(&store, 7, 9, first, buffers(blocks, 0));
    let [here, there] = [write(0, 2), write(2, 1)];
    let sent = serde_json::to_string(&vec![there]).unwrap();
    let received: Vec<Written> = serde_json::from_str(&sent).unwrap();
    assert_eq!(serde_json::to_string(&received).unwrap(), sent);
    let said: Facts = serde_json::from_str(&serde_json::to_string(&facts(7)).unwrap()).unwrap();
    assert_eq!(said, facts(7));
    let manifest = Manifest::new(said, received.into_iter().chain([here]).collect());
    assert_eq!(commit(&store, manifest.clone()).unwrap(), verify(&store, 7).unwrap());
    assert_eq!(manifest.weights, Manifest::new(facts(7), parts(&Store::memory().unwrap(), 7, 1, 0)).weights);
}

/// Where nobody compares replicas, a second copy may be other bytes, cut otherwise: it takes nothing from the owner's parts,
/// and goes when what no checkpoint names is removed.
#[test]
fn a_second_copy_that_differs_spoils_no_checkpoint() {
    let store = Store::memory().unwrap();
    let write = |first: usize, blocks: usize, byte: u8, second: bool| {
        let bytes: [Bytes; 3] = [0, 1, 2].map(|_| vec![byte; blocks * BLOCK_BYTES].into());
        part_of(&store, 7, Stamp { number: 9, second }, first, bytes)
    };
    let own = [write(0, 2, 1, false), write(2, 1, 1, false), write(3, 1, 1, false)];
    let copies = [write(2, 2, 9, true), write(0, 2, 9, true)];
    let all: Vec<Written> = own.iter().cloned().chain(copies.iter().cloned()).collect();
    for parts in [all.clone(), all.into_iter().rev().collect()] {
        let manifest = Manifest::of_writers(facts(7), parts);
        assert_eq!(manifest, Manifest::new(facts(7), own.to_vec()));
        assert_eq!(commit(&store, manifest.clone()).unwrap(), verify(&store, 7).unwrap());
    }
    // Where the owner has written nothing, the second copy is what there is.
    let manifest = Manifest::of_writers(facts(7), vec![copies[0].clone(), own[0].clone()]);
    assert_eq!(manifest, Manifest::new(facts(7), vec![own[0].clone(), copies[0].clone()]));
    saved(&store, 8, 1, 5).unwrap();
    plan_pruning(&store, |_| vec![], |_| Some(8)).unwrap().carry_out(&store).unwrap();
    verify(&store, 7).unwrap();
    assert_eq!(names(&store, 7).len(), 4, "three parts and the manifest: {:?}", names(&store, 7));
}

/// What a keeper of a second copy found unchanged is named no sooner than what the owner wrote.
#[test]
fn of_what_differs_the_owner_wrote_the_part_that_is_named() {
    let store = Store::memory().unwrap();
    let write = |step, byte: u8, second| {
        let bytes: [Bytes; 3] = [0, 1, 2].map(|_| vec![byte; 2 * BLOCK_BYTES].into());
        write_blocks(&store, step, Stamp { number: 9, second }, 1 << 20, 0, 0..usize::MAX, &bytes).unwrap()
    };
    let kept_by_both = |byte| [write(8, byte, false), write(8, 1, true)].concat();
    commit(&store, Manifest::of_writers(facts(7), [write(7, 1, true)].concat())).unwrap();
    assert!(write(8, 1, true).iter().all(|written| written.part.step == Some(7)));
    let owns = Manifest::of_writers(facts(8), kept_by_both(2));
    assert_eq!(owns, Manifest::new(facts(8), write(8, 2, false)));
    let same = Manifest::of_writers(facts(8), kept_by_both(1));
    assert!(same.parts.iter().all(|part| part.step == Some(7)), "{:?}", same.parts);
    commit(&store, same).unwrap();
    verify(&store, 8).unwrap();
}

#[test]
fn a_manifest_with_a_hole_is_not_committed() {
    let store = Store::memory().unwrap();
    let holed = parts(&store, 7, 1, 5).into_iter().take(1).collect();
    let refused = commit(&store, Manifest::new(facts(7), holed));
    assert!(matches!(refused, Err(Error::Checkpoint { step: 7, .. })), "{refused:?}");
    assert_eq!(steps(&store).unwrap(), [0u64; 0]);
}

#[test]
fn writers_agree_on_the_facts_when_only_threads_differ() {
    let base = facts(7);
    let mut other = base.clone();
    other.environment.threads = 64;
    assert_eq!(base.digest(), other.digest());
    other.cursors[0].draws += 1;
    assert_ne!(base.digest(), other.digest());
    assert_ne!(base.digest(), facts(8).digest());
}

#[test]
fn damage_is_named_and_a_newer_format_is_none() {
    let store = Store::memory().unwrap();
    let manifest = saved(&store, 7, 1, 5).unwrap();
    let path = format!("{}/{}", folder(7), manifest.parts[0].name);
    let mut bytes = store.get(&path).unwrap().unwrap().to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    store.put(&path, bytes).unwrap();
    let told = read_part(&store, &manifest, &manifest.parts[0], |_| "a, b".to_owned(), |_, _, _| ());
    assert_eq!(
        told.unwrap_err().to_string(),
        "checkpoint 7: part part-00000-00002-00000001.safetensors (1 of 2): block 1 of weights has changed, \
         which holds a, b; use the checkpoint before it"
    );
    let missing = read_manifest(&store, 8).unwrap_err().to_string();
    assert_eq!(missing, "checkpoint 8: memory has no checkpoints/0000000008/manifest.json; there are: 7");
    let newer = serde_json::to_string(&manifest).unwrap().replacen("\"format\":1", "\"format\":4", 1);
    let newer = Manifest::parse(newer.as_bytes(), 7, "memory/manifest.json");
    assert!(matches!(newer, Err(Error::Malformed { .. })), "{newer:?}");
}

#[test]
fn pruning_takes_what_the_policy_lets_go_and_what_no_checkpoint_names() {
    let store = Store::memory().unwrap();
    for step in 1..=5 {
        saved(&store, step, 1, step as u8).unwrap();
    }
    parts(&store, 4, 2, 9);
    parts(&store, 6, 2, 9);
    set_aside(&store, 3).unwrap();
    let policy = anello_configs::Checkpoint {
        every_steps: 1,
        keep_last: 2,
        keep_every_steps: None,
        keep_stage_ends: true,
        part_bytes: 1,
    };
    prune(&store, &Retention { policy, reach: 0 }).unwrap();
    assert_eq!(steps(&store).unwrap(), [2, 4, 5]);
    let own = ["part-00000-00002-00000001.safetensors", "part-00002-00003-00000001.safetensors"];
    assert_eq!(names(&store, 1), [""; 0]);
    assert_eq!(names(&store, 3), ["manifest.set-aside.json", own[0], own[1]], "kept for whoever looks");
    assert_eq!(names(&store, 4), ["manifest.json", own[0], own[1]], "the other writer's are gone");
    assert_eq!(names(&store, 6).len(), 2, "after the newest: still being written");
    delete(&store, 3).unwrap();
    assert_eq!(names(&store, 3), [""; 0]);
}

/// Six blocks, all bytes of block `b` being `fills[b]` plus the index of the buffer.
fn state(fills: [u8; 6]) -> [Bytes; 3] {
    [0, 1, 2].map(|buffer| {
        fills.iter().flat_map(|fill| vec![fill + buffer; BLOCK_BYTES]).collect::<Vec<u8>>().into()
    })
}

/// Saves a state in parts of at most four blocks.
fn saved_state(store: &Store, step: u64, fills: [u8; 6]) -> Manifest {
    let part_bytes = 4 * (BLOCK_BYTES * BUFFERS.len()) as u64;
    let written = write_blocks(store, step, 1, part_bytes, 0, 0..usize::MAX, &state(fills)).unwrap();
    commit(store, Manifest::new(facts(step), written)).unwrap()
}

fn told(manifest: &Manifest) -> String {
    let of = |part: &Part| part.step.map(|of| format!(" of {of}")).unwrap_or_default();
    let still = |part: &Part| if part.still { " still" } else { "" };
    let word =
        |part: &Part| format!("{}..{}{}{}", part.range().start, part.range().end, still(part), of(part));
    manifest.parts.iter().map(word).collect::<Vec<_>>().join(", ")
}

fn retention() -> Retention {
    let policy = anello_configs::Checkpoint {
        every_steps: 1,
        keep_last: 2,
        keep_every_steps: None,
        keep_stage_ends: false,
        part_bytes: 1,
    };
    Retention { policy, reach: 0 }
}

/// Five checkpoints: the last block alone changes until the third, then another.
fn incremental() -> Store {
    let store = Store::memory().unwrap();
    for (step, fills) in (1..).zip([[9; 6], [9, 9, 9, 9, 9, 2], [9, 9, 9, 9, 9, 3], [9, 4, 9, 9, 9, 3]]) {
        saved_state(&store, step, fills);
    }
    store
}

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
fn a_part_goes_with_the_last_checkpoint_that_names_it() {
    let store = incremental();
    prune(&store, &retention()).unwrap();
    assert_eq!(steps(&store).unwrap(), [3, 4]);
    let there = |step| names(&store, step).iter().map(|name| name[5..16].to_owned()).collect::<Vec<_>>();
    assert_eq!((there(1), there(2)), (vec!["00000-00004".to_owned()], vec!["00004-00005".to_owned()]));
    for step in [3, 4] {
        verify(&store, step).unwrap();
    }
    // Two more that share nothing with those before.
    for (step, fill) in [(5, 50), (6, 60)] {
        saved_state(&store, step, [fill; 6]);
        prune(&store, &retention()).unwrap();
    }
    assert_eq!(steps(&store).unwrap(), [5, 6]);
    assert_eq!(store.list("checkpoints").unwrap().len(), 2 * 3, "two parts and a manifest each");
    for step in [5, 6] {
        verify(&store, step).unwrap();
    }
}

#[test]
fn pruning_that_is_killed_anywhere_leaves_whole_checkpoints_and_is_finished_by_the_next() {
    let store = incremental();
    parts(&store, 3, 2, 9);
    let plan = |store: &Store| {
        let gone = |kept: &[(u64, bool)]| superseded(&retention(), kept);
        plan_pruning(store, gone, |kept| kept.last().copied()).unwrap()
    };
    let pruning = plan(&store);
    assert_eq!((&pruning.gone[..], &pruning.kept[..]), (&[1, 2][..], &[3, 4][..]));
    assert_eq!(
        pruning.objects.len(),
        2 + 1 + 1 + 2,
        "manifests, parts that nobody names, and the other writer's"
    );
    assert!(pruning.bytes() > 5 * BLOCK_BYTES as u64);
    pruning.carry_out(&store).unwrap();
    let done = store.list("").unwrap();
    for killed in 0..pruning.objects.len() {
        let left = incremental();
        parts(&left, 3, 2, 9);
        let some = Pruning { objects: pruning.objects[..killed].to_vec(), ..pruning.clone() };
        some.carry_out(&left).unwrap();
        for step in steps(&left).unwrap() {
            verify(&left, step).unwrap_or_else(|e| panic!("killed after {killed}: {e}"));
        }
        plan(&left).carry_out(&left).unwrap();
        assert_eq!(left.list("").unwrap(), done, "killed after {killed}");
    }
}

#[test]
fn nothing_is_removed_while_a_manifest_cannot_be_read_and_may_name_it() {
    let store = incremental();
    let path = catalog::manifest_path(4);
    let text = String::from_utf8(store.get(&path).unwrap().unwrap().to_vec()).unwrap();
    store.put(&path, text.replacen("\"format\": 2", "\"format\": 4", 1)).unwrap();
    let before = store.list("").unwrap();
    let refused = prune(&store, &retention());
    assert!(matches!(refused, Err(Error::Malformed { .. })), "{refused:?}");
    assert_eq!(store.list("").unwrap(), before);
    // One that is damaged names nothing that anyone can use; what it has of its own stays to be looked at.
    store.put(&path, text.replacen("\"updates\": 4", "\"updates\": 5", 1)).unwrap();
    prune(&store, &retention()).unwrap();
    assert_eq!(steps(&store).unwrap(), [2, 3, 4]);
    assert_eq!(names(&store, 4).len(), 4);
    for step in [2, 3] {
        verify(&store, step).unwrap();
    }
}

/// Damages a part as `how` says: it is gone, cut short, or has another byte and its size.
fn damage(store: &Store, path: &str, how: &str) {
    let mut bytes = store.get(path).unwrap().unwrap().to_vec();
    match how {
        "gone" => return store.delete(path).unwrap(),
        "short" => bytes.truncate(1000),
        _ => bytes[100_000] ^= 1,
    }
    store.put(path, bytes).unwrap();
}

/// In memory and in a folder, whose times are those of files.
fn stores() -> [(Store, Option<tempfile::TempDir>); 2] {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("run");
    [(Store::memory().unwrap(), None), (Store::durable(place.to_str().unwrap()).unwrap(), Some(folder))]
}

/// Of what stays, one that is older than the newest was proved to be whole before anything goes. A damaged one stays too, and
/// the older ones that it does not stand for.
#[test]
fn no_checkpoint_goes_for_one_that_is_damaged() {
    for how in ["gone", "short", "changed"] {
        for (store, _folder) in stores() {
            for step in 1..=4 {
                saved_state(&store, step, [step as u8 * 10; 6]);
            }
            let part = read_manifest(&store, 3).unwrap().parts[1].path(3);
            damage(&store, &part, how);
            for prune in [let_go, prune] {
                let pruned = prune(&store, &retention()).unwrap();
                assert_eq!(steps(&store).unwrap(), [2, 3, 4], "{how}");
                assert_eq!(pruned.kept, [2, 4], "{how}");
                let [(3, flaw)] = &pruned.flawed[..] else { panic!("{how}: {:?}", pruned.flawed) };
                assert!(flaw.contains("part-00004-00006"), "{how}: {flaw}");
                for step in [2, 4] {
                    verify(&store, step).unwrap();
                }
            }
            // As soon as whole ones follow, the older one is not needed any more. What is seen to be damaged is left to be looked
            // at; what is not needed is not read to see.
            for step in [5, 6] {
                saved_state(&store, step, [step as u8 * 10; 6]);
                prune(&store, &retention()).unwrap();
            }
            let left: &[u64] = if how == "changed" { &[5, 6] } else { &[3, 5, 6] };
            assert_eq!(steps(&store).unwrap(), left, "{how}");
        }
    }
}

/// A part that several name was written for the oldest of them: damage is found however new a manifest is that names it.
#[test]
fn what_is_damaged_for_all_lets_none_of_them_go() {
    for (store, _folder) in stores() {
        let fills = |step| [9, 9, 9, 9, 9, step];
        (1..=2).for_each(|step| drop(saved_state(&store, step.into(), fills(step))));
        let written =
            write_blocks(&store, 3, 1, 12 * BLOCK_BYTES as u64, 0, 0..usize::MAX, &state(fills(3))).unwrap();
        damage(&store, &read_manifest(&store, 1).unwrap().parts[0].path(1), "changed");
        commit(&store, Manifest::new(facts(3), written)).unwrap();
        saved_state(&store, 4, fills(4));
        for prune in [let_go, prune] {
            let pruned = prune(&store, &retention()).unwrap();
            assert_eq!((pruned.gone.len(), steps(&store).unwrap()), (0, vec![1, 2, 3, 4]));
            let flawed: Vec<u64> = pruned.flawed.iter().map(|(step, _)| *step).collect();
            assert_eq!(flawed, [1, 2, 3, 4], "{:?}", pruned.flawed);
        }
    }
}

/// A part that the store has written anew since its checkpoint is not named again unread: it is written.
#[test]
fn what_was_damaged_is_not_in_the_next_checkpoint() {
    for how in ["gone", "short", "changed"] {
        for (store, _folder) in stores() {
            saved_state(&store, 1, [9; 6]);
            damage(&store, &read_manifest(&store, 1).unwrap().parts[0].path(1), how);
            assert_eq!(told(&saved_state(&store, 2, [9; 6])), "0..4, 4..6 of 1", "{how}");
            verify(&store, 2).unwrap();
        }
    }
}

/// Where the store's times say nothing, as in a copy of a folder, one checkpoint is read and nothing is held back.
#[test]
fn parts_that_were_written_anew_with_the_same_bytes_are_whole() {
    for (store, _folder) in stores() {
        for step in 1..=4 {
            saved_state(&store, step, [step as u8 * 10; 6]);
        }
        for path in store.list("checkpoints").unwrap().into_iter().map(|object| object.path) {
            let bytes = store.get(&path).unwrap().unwrap();
            store.put(&path, bytes).unwrap();
        }
        let read = || store.traffic().read_bytes;
        let before = read();
        let pruned = prune(&store, &retention()).unwrap();
        assert_eq!((pruned.gone, pruned.flawed), (vec![1, 2], vec![]));
        let (one, read) = (18 * BLOCK_BYTES as u64, read() - before);
        assert!(read > one && read < one + one / 2, "{read} bytes were read, {one} are a checkpoint's");
    }
}

/// It is no matter of reading everything each time: nothing that lies as it was written is read again.
#[test]
fn pruning_reads_manifests_and_no_parts() {
    for (store, _folder) in stores() {
        for step in 1..=5 {
            saved_state(&store, step, [step as u8 * 10; 6]);
        }
        let before = store.traffic().read_bytes;
        assert_eq!(prune(&store, &retention()).unwrap().gone, [1, 2, 3]);
        assert!(store.traffic().read_bytes - before < BLOCK_BYTES as u64);
    }
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

#[test]
fn a_part_that_is_gone_or_cut_short_is_found_before_the_manifest() {
    for short in [true, false] {
        let store = Store::memory().unwrap();
        let manifest = Manifest::new(facts(7), parts(&store, 7, 1, 5));
        let path = manifest.parts[1].path(7);
        if short { store.put(&path, "short") } else { store.delete(&path) }.unwrap();
        let refused = commit(&store, manifest).unwrap_err().to_string();
        assert!(
            refused.starts_with(
                "checkpoint 7: checkpoints/0000000007/part-00002-00003-00000001.safetensors is not there as"
            ),
            "{refused}"
        );
        assert_eq!(steps(&store).unwrap(), [0u64; 0]);
    }
}

#[test]
fn a_run_does_not_begin_where_history_is_lost() {
    use crate::events::{Event, EventLog};
    let store = Store::memory().unwrap();
    refuse_leftovers(&store).unwrap();
    assert_eq!(known_steps(&store).unwrap(), [0u64; 0]);
    let weights = saved(&store, 7, 1, 5).unwrap().weights;
    EventLog::open(&store).unwrap().append(Event::Checkpoint { step: 7, weights }).unwrap();
    assert_eq!(known_steps(&store).unwrap(), [7]);
    let refused = refuse_leftovers(&store).unwrap_err().to_string();
    assert_eq!(
        refused,
        "memory: there is events/00000001.json of a run whose config.toml is missing; bring it back, or give another place"
    );
    delete(&store, 7).unwrap();
    let refused = known_steps(&store).unwrap_err().to_string();
    assert_eq!(
        refused,
        "checkpoint 7: the log of memory tells of it, and no checkpoint is there any more; bring the checkpoints back, \
         or begin a new run in another place"
    );
}

#[test]
fn the_pointer_is_a_hint_and_no_more() {
    let store = Store::memory().unwrap();
    let manifests = [3, 5].map(|step| saved(&store, step, 1, 5).unwrap());
    point_at(&store, &manifests[1]).unwrap();
    let said: serde_json::Value = serde_json::from_slice(&store.get(LATEST).unwrap().unwrap()).unwrap();
    assert_eq!(
        (&said["step"], &said["manifest"]),
        (&5.into(), &"checkpoints/0000000005/manifest.json".into())
    );
    assert_eq!(said["weights"], manifests[1].weights);
    // Left behind, ahead, or damaged: what is there is what counts.
    point_at(&store, &manifests[0]).unwrap();
    assert_eq!(steps(&store).unwrap(), [3, 5]);
    delete(&store, 3).unwrap();
    assert_eq!(steps(&store).unwrap(), [5]);
    store.put(LATEST, "{").unwrap();
    assert_eq!(steps(&store).unwrap(), [5]);
}

/// A run with a config and a checkpoint of parts of several steps.
fn run_to_copy() -> Store {
    let store = incremental();
    store.put(crate::CONFIG, "name = \"copied\"\n").unwrap();
    store.put(crate::ENVIRONMENT, "{}").unwrap();
    store
}

#[test]
fn a_copy_is_the_same_bytes_and_what_is_there_is_not_sent_again() {
    let (from, to) = (run_to_copy(), Store::memory().unwrap());
    let copied = copy(&from, 3, &to, |_| ()).unwrap();
    assert_eq!((copied.sent.0, copied.there), (3, 0));
    assert_eq!((verify(&to, 3).unwrap(), steps(&to).unwrap()), (read_manifest(&from, 3).unwrap(), vec![3]));
    for object in to.list("").unwrap().iter().filter(|object| object.path != LATEST) {
        assert_eq!(to.get(&object.path).unwrap(), from.get(&object.path).unwrap(), "{}", object.path);
    }
    // The next shares two parts with it; a damaged one is sent again.
    let damaged = read_manifest(&from, 4).unwrap().parts[4].path(4);
    let mut bytes = to.get(&damaged).unwrap().unwrap().to_vec();
    bytes[100_000] ^= 1;
    to.put(&damaged, bytes).unwrap();
    let copied = copy(&from, 4, &to, |_| ()).unwrap();
    assert_eq!((copied.sent.0, copied.there), (4, 1));
    let copied = copy(&from, 4, &to, |_| ()).unwrap();
    assert_eq!((copied.sent, copied.there), ((0, 0), 5));
    for step in [3, 4] {
        verify(&to, step).unwrap();
    }
    assert!(String::from_utf8_lossy(&to.get(LATEST).unwrap().unwrap()).contains("\"step\": 4"));
}

#[test]
fn a_copy_is_refused_where_something_else_is_and_of_what_is_damaged() {
    let from = run_to_copy();
    let refused = |to: &Store| copy(&from, 4, to, |_| ()).unwrap_err().to_string();
    let to = Store::memory().unwrap();
    to.put("events/00000001.json", "{}").unwrap();
    assert!(
        refused(&to).starts_with("memory: it holds a run with a history of its own; copy to"),
        "{}",
        refused(&to)
    );
    let to = Store::memory().unwrap();
    to.put(crate::CONFIG, "name = \"other\"\n").unwrap();
    assert!(
        refused(&to).starts_with("memory: it holds checkpoints of another run; copy to"),
        "{}",
        refused(&to)
    );
    let to = Store::memory().unwrap();
    let other = Facts { config: "other".to_owned(), ..facts(2) };
    commit(&to, Manifest::new(other, parts(&to, 2, 1, 5))).unwrap();
    assert!(
        refused(&to).starts_with("memory: it holds checkpoints of another run; copy to"),
        "{}",
        refused(&to)
    );

    let to = Store::memory().unwrap();
    let path = read_manifest(&from, 4).unwrap().parts[4].path(4);
    let mut bytes = from.get(&path).unwrap().unwrap().to_vec();
    bytes[100_000] ^= 1;
    from.put(&path, bytes).unwrap();
    assert_eq!(
        refused(&to),
        "checkpoint 4: part part-00005-00006-00000001.safetensors has changed since it was written; \
         use the checkpoint before it"
    );
    assert_eq!((steps(&to).unwrap(), to.get(crate::CONFIG).unwrap()), (vec![], None));
}

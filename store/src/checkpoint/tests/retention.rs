//! What goes and what stays, whatever is damaged and whenever it is killed.

use super::*;

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

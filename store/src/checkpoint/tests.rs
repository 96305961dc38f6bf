mod broken;
mod copying;
mod incremental;
mod retention;

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

/// Five checkpoints: the last block alone changes until the third, then another.
fn incremental() -> Store {
    let store = Store::memory().unwrap();
    for (step, fills) in (1..).zip([[9; 6], [9, 9, 9, 9, 9, 2], [9, 9, 9, 9, 9, 3], [9, 4, 9, 9, 9, 3]]) {
        saved_state(&store, step, fills);
    }
    store
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

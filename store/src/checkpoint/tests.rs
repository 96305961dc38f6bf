use super::*;
use crate::{Cursor, Environment, Error, Store};

fn facts(step: u64) -> Facts {
    let text = |text: &str| text.to_owned();
    Facts {
        position: Position { step, stage: text("stable"), stage_end: step == 2, tokens: 100 * step },
        updates: step,
        layers: 2,
        cursors: vec![Cursor::default()],
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

/// Three blocks in two parts, all bytes of a buffer its index plus `fill`.
fn parts(store: &Store, step: u64, session: u64, fill: u8) -> Vec<Written> {
    let write = |index: usize, first: usize, blocks: usize| {
        let buffers = [0, 1, 2].map(|buffer| vec![fill + buffer; blocks * BLOCK_BYTES]);
        let name = format!("part-{index:05}-{session:08}.safetensors");
        write_part(store, step, name, first, buffers.each_ref().map(Vec::as_slice)).unwrap()
    };
    vec![write(1, 2, 1), write(0, 0, 2)]
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
        let take = |buffer: usize, bytes: &[u8]| read[buffer].extend_from_slice(bytes);
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
    tidy(&store, 7).unwrap();
    let refused = commit(&store, manifest);
    assert!(matches!(refused, Err(Error::Fenced { .. })), "{refused:?}");
    assert!(store.list("").unwrap().is_empty());
}

#[test]
fn parts_of_several_writers_make_one_checkpoint_and_travel_as_json() {
    let store = Store::memory().unwrap();
    let write = |first: usize, blocks: usize| {
        let buffers = [0, 1, 2].map(|buffer| vec![buffer; blocks * BLOCK_BYTES]);
        let name = format!("part-{first:05}-00000009.safetensors");
        write_part(&store, 7, name, first, buffers.each_ref().map(Vec::as_slice)).unwrap()
    };
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
    let told = read_part(&store, &manifest, &manifest.parts[0], |_| "a, b".to_owned(), |_, _| ());
    assert_eq!(
        told.unwrap_err().to_string(),
        "checkpoint 7: part part-00000-00000001.safetensors (1 of 2): block 1 of weights has changed, \
         which holds a, b; use the checkpoint before it"
    );
    let missing = read_manifest(&store, 8).unwrap_err().to_string();
    assert_eq!(missing, "checkpoint 8: memory has no checkpoints/0000000008/manifest.json; there are: 7");
    let newer = serde_json::to_string(&manifest).unwrap().replacen("\"format\":1", "\"format\":2", 1);
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
    prune(&store, &policy).unwrap();
    assert_eq!(steps(&store).unwrap(), [2, 4, 5]);
    let own = ["part-00000-00000001.safetensors", "part-00001-00000001.safetensors"];
    assert_eq!(names(&store, 1), [""; 0]);
    assert_eq!(names(&store, 3), ["manifest.set-aside.json", own[0], own[1]], "kept for whoever looks");
    assert_eq!(names(&store, 4), ["manifest.json", own[0], own[1]], "the other writer's are gone");
    assert_eq!(names(&store, 6).len(), 2, "after the newest: still being written");
    delete(&store, 3).unwrap();
    assert_eq!(names(&store, 3), [""; 0]);
}

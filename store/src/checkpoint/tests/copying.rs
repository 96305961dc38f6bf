//! Checkpoints from one store to another.

use super::*;

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

mod faults;
mod lag;

use super::*;

fn paths(store: &Store, folder: &str) -> Vec<String> {
    store.list(folder).unwrap().into_iter().map(|object| object.path).collect()
}

/// What every store does.
fn conforms(store: &Store) {
    assert_eq!((store.get("a/b").unwrap(), paths(store, ""), paths(store, "a")), (None, vec![], vec![]));
    store.delete("a/b").unwrap();
    assert!(store.create("a/b", "first").unwrap());
    assert!(!store.create("a/b", "second").unwrap());
    assert_eq!(store.get("a/b").unwrap().unwrap(), "first");
    store.put("a/b", "0123456789").unwrap();
    store.put("ab/c", "").unwrap();
    store.put("a/100% ~é [x]", "odd").unwrap();

    let objects = store.list("").unwrap();
    assert_eq!(objects.iter().map(|o| o.bytes).collect::<Vec<_>>(), [3, 10, 0]);
    assert_eq!(store.get(&objects[0].path).unwrap().unwrap(), "odd", "the path of a list is one to read");
    assert_eq!(paths(store, "a").len(), 2, "a folder is no prefix of names");
    assert_eq!((store.tail("a/b", 3).unwrap(), store.tail("a/b", 99).unwrap().len()), ("789".into(), 10));
    assert_eq!(store.ranges("a/b", &[0..2, 8..9]).unwrap(), ["01", "8"]);
    let missing = store.tail("a/c", 3).unwrap_err();
    let told = format!("reading {}/a/c: ", store.place());
    assert!(matches!(missing, Error::Object { .. }) && missing.to_string().starts_with(&told), "{missing}");

    for object in objects {
        store.delete(&object.path).unwrap();
    }
    assert!(paths(store, "").is_empty());
}

#[test]
fn every_store_conforms() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    conforms(&Store::memory().unwrap());
    conforms(&Store::open("memory://").unwrap());
    conforms(&Store::open(&at("open")).unwrap());
    conforms(&Store::open(&format!("file://{}/", at("open"))).unwrap());
    conforms(&Store::durable(&at("durable/run")).unwrap());
    conforms(&Store::durable(&format!("file://{}", at("durable/run"))).unwrap());
}

/// A file may claim any size: nothing of one is read that is larger than anything read whole.
#[test]
fn what_claims_to_be_too_large_is_not_read() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::durable(root.path().to_str().unwrap()).unwrap();
    for bytes in [WHOLE_BYTES_MAX + 1, 1 << 42] {
        std::fs::File::create(root.path().join("holes")).unwrap().set_len(bytes).unwrap();
        let error = store.get("holes").unwrap_err().to_string();
        let expected =
            format!("/holes has {bytes} bytes, and nothing of its kind has more than 1073741824; restore it");
        assert!(error.ends_with(&expected), "{error}");
    }
}

#[test]
fn memory_is_a_place_that_is_empty_each_time() {
    let store = Store::durable("memory://").unwrap();
    store.put("a", "x").unwrap();
    assert_eq!(store.get("a").unwrap().unwrap(), "x");
    assert_eq!((store.place(), store.folder()), ("memory://", None));
    assert_eq!(Store::open(store.place()).unwrap().list("").unwrap(), vec![]);
}

#[test]
fn only_a_durable_store_makes_its_folder() {
    let root = tempfile::tempdir().unwrap();
    let (place, folder) = (root.path().join("a/run/"), root.path().join("a/run"));
    let store = Store::open(place.to_str().unwrap()).unwrap();
    assert_eq!((store.get("config.toml").unwrap(), store.list("").unwrap()), (None, vec![]));
    assert!(!root.path().join("a").exists());
    assert_eq!(store.place(), folder.to_str().unwrap());

    let store = Store::durable(place.to_str().unwrap()).unwrap();
    assert!(folder.is_dir());
    store.put("checkpoints/1/part", "x").unwrap();
    store.delete("checkpoints/1/part").unwrap();
    assert!(folder.is_dir() && !folder.join("checkpoints").exists());
    assert_eq!(store.folder(), Some(folder.as_path()));
}

#[test]
fn a_place_that_is_none_says_what_to_do() {
    for open in [Store::open, Store::durable] {
        let fault = |place: &str| {
            let error = open(place).unwrap_err();
            assert!(error.is_wrong_place(), "{error:?}");
            error.to_string()
        };
        let text = fault("ftp://host/folder");
        assert!(
            text.starts_with("ftp://host/folder: ftp:// is no store that is known here; give s3://, gs://, az://, file:// or memory://"),
            "{text}"
        );
        let text = fault("file://host/folder");
        assert!(text.ends_with("not an absolute path; write file:///folder"), "{text}");
    }
}

#[test]
fn a_sweep_removes_half_written_files_and_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::durable(root.path().to_str().unwrap()).unwrap();
    store.put("events/1.json", "{}").unwrap();
    std::fs::write(root.path().join("events/2.json#1"), "{").unwrap();
    std::fs::write(root.path().join("notes#a"), "mine").unwrap();
    std::fs::create_dir(root.path().join("metrics")).unwrap();
    std::fs::write(root.path().join("metrics/0-1.parquet#12"), "").unwrap();
    store.sweep();
    assert!(!root.path().join("events/2.json#1").exists() && !root.path().join("metrics").exists());
    assert!(root.path().join("notes#a").exists());
    assert_eq!(store.get("events/1.json").unwrap().unwrap(), "{}");
}

/// What is asked of a store with a limit takes at least as long as its bytes: each way, clones included.
#[test]
fn a_limit_is_one_for_all_clones() {
    let store = Store::memory().unwrap().limited(Some(1 << 20));
    let (clone, quarter) = (store.clone(), vec![7u8; 1 << 18]);
    let began = std::time::Instant::now();
    store.put("a", quarter.clone()).unwrap();
    clone.put("b", quarter.clone()).unwrap();
    store.put("c", quarter.clone()).unwrap();
    assert!(began.elapsed() >= std::time::Duration::from_millis(500), "{:?}", began.elapsed());
    let began = std::time::Instant::now();
    for path in ["a", "b", "c"] {
        assert_eq!(clone.get(path).unwrap().unwrap(), quarter);
    }
    assert!(began.elapsed() >= std::time::Duration::from_millis(500), "{:?}", began.elapsed());
}

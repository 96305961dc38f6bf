use std::cell::Cell;
use std::process::{Command, Stdio};

use super::*;

/// Entry `number`: two ranges of bytes that follow from it.
fn content(number: u64) -> Vec<Bytes> {
    let chunk =
        |length: usize| (0..length).map(|at| (at as u64 * 31 + number) as u8).collect::<Vec<u8>>().into();
    vec![chunk(40_000), chunk(1000 + number as usize)]
}

fn with_wanted<T>(number: u64, blake3: Option<&str>, call: impl FnOnce(Wanted<'_>) -> T) -> T {
    let ranges = [7..40_007, 50_000..51_000 + number];
    call(Wanted { place: &format!("s3://bucket/{number}.parquet"), version: "v", ranges: &ranges, blake3 })
}

/// What the cache gives for entry `number`, and whether it had to be fetched.
fn get(cache: &Cache, number: u64) -> (Vec<Bytes>, bool) {
    let fetched = Cell::new(false);
    let fetch = || {
        fetched.set(true);
        Ok(content(number))
    };
    let got = with_wanted(number, None, |wanted| cache.get(wanted, fetch)).unwrap();
    (got, fetched.get())
}

fn files(dir: &Path) -> Vec<(PathBuf, u64)> {
    let folders = fs::read_dir(dir).into_iter().flatten().flatten();
    let files = folders.flat_map(|folder| fs::read_dir(folder.path()).into_iter().flatten().flatten());
    files.map(|file| (file.path(), file.metadata().map_or(0, |metadata| metadata.len()))).collect()
}

#[test]
fn what_was_fetched_once_is_not_fetched_again_by_whomever() {
    let dir = tempfile::tempdir().unwrap();
    for (round, cache) in
        [Cache::open(dir.path(), 1 << 30), Cache::open(dir.path(), 1 << 30)].iter().enumerate()
    {
        for number in 0..5 {
            assert_eq!(get(cache, number), (content(number), round == 0));
        }
    }
    assert_eq!(files(dir.path()).len(), 5, "and nothing unfinished");
}

/// Does something to the bytes of an entry.
type Damage = fn(&mut Vec<u8>);

#[test]
fn a_damaged_entry_is_fetched_anew() {
    let damages: [(&str, Damage); 5] = [
        ("a bit", |bytes| bytes[20_000] ^= 1),
        ("a bit of its digest", |bytes| *bytes.last_mut().unwrap() ^= 1),
        ("its end is missing", |bytes| bytes.truncate(10_000)),
        ("it is empty", Vec::clear),
        ("it is too long", |bytes| bytes.push(0)),
    ];
    for (what, damage) in damages {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), 1 << 30);
        get(&cache, 3);
        let [(path, _)] = &files(dir.path())[..] else { panic!("one entry") };
        let mut bytes = fs::read(path).unwrap();
        damage(&mut bytes);
        fs::write(path, bytes).unwrap();
        assert_eq!(get(&cache, 3), (content(3), true), "{what}");
        assert_eq!(get(&cache, 3), (content(3), false), "{what}: it is right again");
    }
}

#[test]
fn what_the_index_does_not_know_is_neither_kept_nor_believed() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), 1 << 30);
    let right = blake3::hash(&content(3).concat()).to_hex().to_string();
    let times = Cell::new(0);
    let ask = |blake3: &str, content: Vec<Bytes>| {
        let fetch = || {
            times.set(times.get() + 1);
            Ok(content.clone())
        };
        with_wanted(3, Some(blake3), |wanted| cache.get(wanted, fetch)).unwrap()
    };
    for round in 1..=2 {
        ask(&right, content(4));
        assert_eq!((times.get(), files(dir.path()).len()), (round, 0), "damaged where it came from");
    }
    assert_eq!((ask(&right, content(3)), ask(&right, content(3))), (content(3), content(3)));
    assert_eq!(times.get(), 3);
    // Under the name of another digest.
    let other = "0".repeat(64);
    ask(&other, content(3));
    assert_eq!(times.get(), 4);
}

#[test]
fn what_was_used_longest_ago_goes_first_and_the_bound_holds() {
    let dir = tempfile::tempdir().unwrap();
    let entry = 41_100u64;
    let bound = 20 * entry;
    let cache = Cache::open(dir.path(), bound);
    for number in 0..16 {
        get(&cache, number);
        // Times as far apart as those of a real one.
        let then = now() - Duration::from_secs(1000 - number * 10);
        let path =
            with_wanted(number, None, |wanted| dir.path().join(&wanted.name()[..2]).join(wanted.name()));
        File::open(path).unwrap().set_times(FileTimes::new().set_modified(then)).unwrap();
    }
    assert!(!get(&cache, 0).1, "it is the one that was used last now");
    for number in 16..40 {
        get(&cache, number);
        let total: u64 = files(dir.path()).iter().map(|(_, bytes)| bytes).sum();
        assert!(total <= bound, "{total} bytes of {bound} after entry {number}");
        if number == 18 {
            assert!(!get(&cache, 0).1 && get(&cache, 1).1, "the oldest went, and not what was used since");
        }
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("file");
    fs::write(&place, "no folder").unwrap();
    let cache = Cache::open(&place.join("cache"), 1 << 30);
    for number in 0..250 {
        assert_eq!(get(&cache, number), (content(number), true));
    }
    assert_eq!(cache.failures.load(Ordering::Relaxed), 3, "it was tried now and then");
    fs::remove_file(&place).unwrap();
    for number in 0..200 {
        get(&cache, number);
    }
    assert!(!get(&cache, 199).1, "it can be written again");
}

#[test]
fn what_a_killed_process_has_left_is_removed_in_the_end() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("tmp")).unwrap();
    let [old, new] = ["1-0", "2-0"].map(|name| dir.path().join("tmp").join(name));
    for path in [&old, &new] {
        fs::write(path, "half").unwrap();
    }
    let long_ago = now() - 2 * LEFT_AFTER;
    File::options()
        .write(true)
        .open(&old)
        .unwrap()
        .set_times(FileTimes::new().set_modified(long_ago))
        .unwrap();
    Cache::open(dir.path(), 1 << 30);
    assert!(!old.exists() && new.exists());
}

const FOLDER: &str = "ANELLO_TEST_CACHE";
const BOUND: u64 = 30 * 41_100;

/// A process of the test below: uses the cache until it is killed.
#[test]
#[ignore = "run by another test"]
fn a_process_that_uses_the_cache() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let cache = Cache::open(Path::new(&folder), BOUND);
    for turn in 0.. {
        let number = (turn * 7 + u64::from(std::process::id())) % 50;
        assert_eq!(get(&cache, number).0, content(number));
    }
}

#[test]
fn processes_that_share_it_and_are_killed_leave_nothing_that_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..6 {
        let start = || {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "cache::tests::a_process_that_uses_the_cache", "--ignored"])
                .env(FOLDER, dir.path())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        };
        let mut processes = [start(), start()];
        // Both are at work.
        let began = std::time::Instant::now();
        while files(dir.path()).len() < 10 {
            assert!(began.elapsed() < Duration::from_secs(120), "nobody writes");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(30 + 17 * round));
        for process in &mut processes {
            assert!(process.try_wait().unwrap().is_none(), "it found something wrong");
            process.kill().unwrap();
            process.wait().unwrap();
        }
        // As they left it: nobody has looked at the folder since.
        let entries =
            files(dir.path()).into_iter().filter(|(path, _)| !path.starts_with(dir.path().join("tmp")));
        let (count, total) = entries.fold((0, 0), |(count, total), (_, bytes)| (count + 1, total + bytes));
        assert!(count > 0 && total <= BOUND, "{count} entries, {total} bytes");
    }
    let cache = Cache::open(dir.path(), BOUND);
    let fetched = (0..50).filter(|number| get(&cache, *number).1).count();
    assert!(fetched < 50, "what is kept is right and is used");
}

//! What was fetched of remote shards, kept in a folder of the machine.
//!
//! ```text
//! DIR/3f/3fa4…    one entry: the bytes, then their BLAKE3; named by the BLAKE3 of where they are from
//! DIR/tmp/…       entries that are being written: renamed when they are whole
//! ```
//! Several processes share it, and any of them may be killed at any moment: an entry is there whole or not at all, and is
//! believed only when its digest is right. There is no lock and no list. What is used longest ago goes first, by the time of the
//! file, which every use sets anew. That a file cannot be written, for the disk is full, costs the next fetch and no more.

use std::fs::{self, File, FileTimes};
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use crate::Result;

/// The digest at the end of an entry.
const TRAILER: usize = blake3::OUT_LEN;
/// What processes may add between two looks at the folder, as a share of the bound: 32 of them add an eighth at most.
const ADDED_SHARE: u64 = 256;
/// A file that has been written for so long is one that a killed process has left.
const LEFT_AFTER: Duration = Duration::from_secs(3600);
/// Entries that are not written after one could not be: a full disk is not tried at every fetch.
const SKIPPED_AFTER_FAILURE: u64 = 100;

/// A folder of the machine that keeps what was fetched. Clones of a run's processes share it by its path.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
    bound: u64,
    /// Bytes that this process has added since it last looked at the folder.
    added: Mutex<u64>,
    /// Entries that are still to be left out, and failures so far.
    skip: AtomicU64,
    failures: AtomicU64,
    /// Numbers the files that this process writes.
    next: AtomicU64,
}

/// What an entry holds: ranges of a shard.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    /// Where the shard is.
    pub place: &'a str,
    /// What else tells it apart from another file at the same place: its size, and what the index says of it.
    pub version: &'a str,
    /// The ranges.
    pub ranges: &'a [Range<u64>],
    /// Digest of the ranges, one after the other, where the index has it.
    pub blake3: Option<&'a str>,
}

impl Wanted<'_> {
    fn name(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        add(self.place.as_bytes());
        add(self.version.as_bytes());
        add(self.blake3.unwrap_or_default().as_bytes());
        for range in self.ranges {
            add(&range.start.to_le_bytes());
            add(&range.end.to_le_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The bytes of each range, cut out of all of them together; `None` when they are another number.
    fn cut(&self, all: &Bytes) -> Option<Vec<Bytes>> {
        let mut rest = all.clone();
        let lengths = self.ranges.iter().map(|range| (range.end - range.start) as usize);
        let cut: Option<Vec<Bytes>> =
            lengths.map(|length| (length <= rest.len()).then(|| rest.split_to(length))).collect();
        cut.filter(|_| rest.is_empty())
    }

    fn is_right(&self, hash: &blake3::Hash) -> bool {
        self.blake3.is_none_or(|expected| hash.to_hex().as_str() == expected)
    }
}

impl Cache {
    /// The cache in `dir`, which holds at most `bound` bytes. A folder that cannot be made is no error: then everything is
    /// fetched.
    pub fn open(dir: &Path, bound: u64) -> Self {
        let cache = Self {
            dir: dir.to_owned(),
            bound,
            added: Mutex::default(),
            skip: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            next: AtomicU64::new(0),
        };
        cache.tidy();
        cache
    }

    /// The bytes of each range: those that are kept, else what `fetch` gets, which is kept then.
    pub(crate) fn get(
        &self,
        wanted: Wanted<'_>,
        fetch: impl FnOnce() -> Result<Vec<Bytes>>,
    ) -> Result<Vec<Bytes>> {
        let name = wanted.name();
        let path = self.dir.join(&name[..2]).join(&name);
        if let Some(kept) = read(&path, &wanted) {
            return Ok(kept);
        }
        let fetched = fetch()?;
        let mut hasher = blake3::Hasher::new();
        fetched.iter().for_each(|chunk| {
            hasher.update(chunk);
        });
        let hash = hasher.finalize();
        // What is damaged where it came from is for the caller to find, each time anew.
        if wanted.is_right(&hash) && !self.skips() {
            match self.write(&path, &fetched, &hash) {
                Ok(bytes) => self.count(bytes),
                Err(cause) => self.failed(&cause),
            }
        }
        Ok(fetched)
    }

    /// Whether an entry is left out, since one could not be written a little while ago.
    fn skips(&self) -> bool {
        self.skip.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    fn failed(&self, cause: &std::io::Error) {
        self.skip.store(SKIPPED_AFTER_FAILURE, Ordering::Relaxed);
        if self.failures.fetch_add(1, Ordering::Relaxed) == 0 {
            let dir = self.dir.display();
            tracing::warn!(%dir, %cause, "the cache of shards cannot be written; they are fetched every time");
        }
    }

    /// Whole or not at all: written beside the entries, then renamed.
    fn write(&self, path: &Path, chunks: &[Bytes], hash: &blake3::Hash) -> std::io::Result<u64> {
        let folder = self.dir.join("tmp");
        fs::create_dir_all(&folder)?;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let unfinished = folder.join(format!("{}-{number}", std::process::id()));
        let written = (|| {
            let mut file = File::create(&unfinished)?;
            chunks.iter().try_for_each(|chunk| file.write_all(chunk))?;
            file.write_all(hash.as_bytes())?;
            fs::create_dir_all(path.parent().expect("an entry has a folder"))?;
            fs::rename(&unfinished, path)
        })();
        if let Err(cause) = written {
            let _ = fs::remove_file(&unfinished);
            return Err(cause);
        }
        Ok((chunks.iter().map(Bytes::len).sum::<usize>() + TRAILER) as u64)
    }

    fn count(&self, bytes: u64) {
        let mut added = self.added.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *added += bytes;
        if *added > self.bound / ADDED_SHARE {
            *added = 0;
            drop(added);
            self.tidy();
        }
    }

    /// Looks at the whole folder: removes what was left unfinished, and what was used longest ago where there is too much: from
    /// seven eighths of the bound down to three quarters.
    fn tidy(&self) {
        let now = now();
        let (mut entries, mut total) = (Vec::new(), 0);
        for folder in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let unfinished = folder.file_name() == "tmp";
            for file in fs::read_dir(folder.path()).into_iter().flatten().flatten() {
                let Ok(metadata) = file.metadata() else { continue };
                let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                if !unfinished {
                    total += metadata.len();
                    entries.push((used, metadata.len(), file.path()));
                } else if now.duration_since(used).is_ok_and(|age| age > LEFT_AFTER) {
                    let _ = fs::remove_file(file.path());
                }
            }
        }
        if total <= self.bound - self.bound / 8 {
            return;
        }
        entries.sort_unstable();
        for (_, bytes, path) in entries {
            if total <= self.bound - self.bound / 4 {
                break;
            }
            // Another process may have removed it: then it is as gone.
            let _ = fs::remove_file(path);
            total -= bytes;
        }
    }
}

/// The entry at `path`, when it is whole; one that is not is removed.
fn read(path: &Path, wanted: &Wanted<'_>) -> Option<Vec<Bytes>> {
    let file = File::open(path).ok()?;
    let lengths = wanted.ranges.iter().map(|range| range.end - range.start);
    let expected = lengths.fold(TRAILER as u64, u64::saturating_add);
    let whole =
        (file.metadata().ok()?.len() == expected).then(|| fs::read(path).ok()).flatten().and_then(|bytes| {
            let (content, trailer) =
                bytes.split_last_chunk::<TRAILER>().map(|(content, trailer)| (content.len(), *trailer))?;
            let bytes = Bytes::from(bytes).slice(..content);
            let hash = blake3::hash(&bytes);
            (hash == trailer && wanted.is_right(&hash)).then(|| wanted.cut(&bytes)).flatten()
        });
    if whole.is_none() {
        tracing::warn!(path = %path.display(), "an entry of the cache of shards is damaged; it is fetched anew");
        let _ = fs::remove_file(path);
        return None;
    }
    // The next look at the folder sees that it was used. That this cannot be told costs its place in the order.
    let _ = file.set_times(FileTimes::new().set_modified(now()));
    whole
}

#[expect(clippy::disallowed_methods, reason = "which entries of a cache go decides nothing in a run")]
fn now() -> SystemTime {
    SystemTime::now()
}

#[cfg(test)]
mod tests;

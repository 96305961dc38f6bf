//! A prefix of an object store, for plain threads.

mod direct;
mod pieces;

use std::ops::Range;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::client::{HttpError, HttpErrorKind};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::{Path, PathPart};
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use tokio::runtime::Runtime;

pub use self::direct::Reader;
use self::pieces::{SHORT, UNPROVED, whole};
use crate::limit::Limits;
use crate::remote::{self, Remote};
use crate::traffic::{Meter, Operation, Traffic};
use crate::{Error, Result};

/// Attempts at a put-if-absent, and the pause after the first: 6.3 s of pauses in all.
const CREATE: Attempts = Attempts { most: 7, pause: Duration::from_millis(100) };
/// Bytes of an object at most that is read whole, whatever it claims to have: a manifest of 300 thousand million parameters has a
/// gibibyte, and so has the index of some ten million row groups.
pub const WHOLE_BYTES_MAX: u64 = 1 << 30;
/// Time after which an answer that broke off is not asked for again: the client may have spent as long on each.
const PATIENCE: Duration = Duration::from_secs(30);

/// A folder or bucket prefix, read and written from plain threads. Clones are the same store.
///
/// Every method blocks the calling thread; none may be called on a thread of an async runtime. Paths are those below
/// the prefix, `/` between their parts. An object is written whole or not at all.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    /// The same objects through a client that tries once.
    once: Arc<dyn ObjectStore>,
    attempts: Attempts,
    prefix: Path,
    place: String,
    folder: Option<PathBuf>,
    /// Which files the objects of a folder are.
    files: Option<Arc<LocalFileSystem>>,
    /// What is written outlives a power cut.
    durable: bool,
    runtime: Arc<Runtime>,
    meter: Arc<Meter>,
    limits: Option<Arc<Limits>>,
}

/// How often something is tried. The pause doubles each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempts {
    /// At most so often, at least once.
    pub most: u32,
    /// Between the first two.
    pub pause: Duration,
}

/// What came of [`Store::get_sized`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// There is none.
    Absent,
    /// It has so many bytes, which were not wanted.
    Other(u64),
    /// All of it.
    Bytes(Bytes),
}

/// An object of a [`Store`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Object {
    /// Path below the prefix.
    pub path: String,
    /// Size, bytes.
    pub bytes: u64,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Store").field(&self.place).finish()
    }
}

impl Store {
    /// The store at `place`: a path, `file:///…`, or `s3://…`, `gs://…`, `az://…` or `memory://`. Makes
    /// nothing: where there is no folder there are no objects, until one is put there.
    pub fn open(place: &str) -> Result<Self> {
        let Some(folder) = local_folder(place)? else { return Self::remote(place) };
        let wrong = |e: &dyn std::fmt::Display| wrong_place(place, e);
        let absolute = std::path::absolute(&folder).map_err(|e| wrong(&e))?;
        let prefix = Path::from_absolute_path(&absolute).map_err(|e| wrong(&e))?;
        let files = Arc::new(LocalFileSystem::new());
        let store = Self::with_prefix(files.clone(), prefix, shown(&folder), Some(absolute))?;
        Ok(Self { files: Some(files), ..store })
    }

    /// The store at `place`, as a run folder wants it. A folder is made when it is missing, what is written to it
    /// outlives a power cut once it is visible, and a folder below it goes with its last object.
    pub fn durable(place: &str) -> Result<Self> {
        let Some(folder) = local_folder(place)? else { return Self::remote(place) };
        let failed = |source| Error::System { action: "making the folder", place: place.to_owned(), source };
        let absolute = std::path::absolute(&folder).map_err(|e| wrong_place(place, &e))?;
        std::fs::create_dir_all(&absolute).map_err(failed)?;
        let local = LocalFileSystem::new_with_prefix(&absolute).map_err(|source| Error::Object {
            action: "opening",
            place: place.to_owned(),
            source: Box::new(source),
            remedy: String::new(),
        })?;
        // Durable before visible: a manifest must not outlive the power cut that its parts did not.
        let files = Arc::new(local.with_fsync(true).with_automatic_cleanup(true));
        let store = Self::with_prefix(files.clone(), Path::default(), shown(&folder), Some(absolute))?;
        Ok(Self { files: Some(files), durable: true, ..store })
    }

    /// A store in memory, gone with the process.
    pub fn memory() -> Result<Self> {
        Self::new(Arc::new(InMemory::new()), "memory")
    }

    /// All of any store; `place` is its name for people.
    pub fn new(store: Arc<dyn ObjectStore>, place: &str) -> Result<Self> {
        Self::with_prefix(store, Path::default(), place.to_owned(), None)
    }

    fn remote(url: &str) -> Result<Self> {
        let Remote { patient, once, prefix } = remote::open(url).map_err(|e| wrong_place(url, &e))?;
        let place =
            Some(url.trim_end_matches('/')).filter(|place| place.contains("://")).unwrap_or("memory://");
        let store = Self::with_prefix(patient, prefix, place.to_owned(), None)?;
        Ok(Self { once, attempts: CREATE, ..store })
    }

    /// Tries a put-if-absent so often before it is an error: for stores that do not do so themselves.
    pub fn trying(self, attempts: Attempts) -> Self {
        Self { attempts, ..self }
    }

    /// The same, of which this process reads at most so many bytes of whole objects a second, and writes at most so many:
    /// of checkpoints above all. The clones of what is returned share the limit. `None`: as fast as it goes.
    pub fn limited(self, bytes_per_s: Option<u64>) -> Self {
        Self { limits: bytes_per_s.map(|limit| Arc::new(Limits::new(limit))), ..self }
    }

    fn with_prefix(
        inner: Arc<dyn ObjectStore>,
        prefix: Path,
        place: String,
        folder: Option<PathBuf>,
    ) -> Result<Self> {
        // Calls run on the thread that makes them; these threads carry what a remote store does beside them.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("anello-store")
            .enable_all()
            .build()
            .map_err(|source| Error::System {
                action: "starting the I/O thread of",
                place: place.clone(),
                source,
            })?;
        let attempts = Attempts { most: 1, ..CREATE };
        let once = inner.clone();
        Ok(Self {
            inner,
            once,
            attempts,
            prefix,
            place,
            folder,
            files: None,
            durable: false,
            runtime: Arc::new(runtime),
            meter: Arc::default(),
            limits: None,
        })
    }

    /// Where it is, for people: the path of a folder, else the URL. [`Store::open`] takes it.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Where the object at `path` is, for people.
    pub fn place_of(&self, path: &str) -> String {
        format!("{}/{path}", self.place)
    }

    /// The folder, when that is what it is.
    pub fn folder(&self) -> Option<&FilePath> {
        self.folder.as_deref()
    }

    /// What was asked of this store and its clones, and what came of it.
    pub fn traffic(&self) -> Traffic {
        self.meter.read_off()
    }

    /// Everything below `folder` (`""`: everything), ordered by path.
    pub fn list(&self, folder: &str) -> Result<Vec<Object>> {
        Ok(self.entries(folder)?.into_iter().map(|(object, _)| object).collect())
    }

    /// [`Store::list`], and when each was written by the store's clock, microseconds since 1970.
    pub(crate) fn entries(&self, folder: &str) -> Result<Vec<(Object, i64)>> {
        let at = self.at(folder);
        let list = || self.runtime.block_on(self.inner.list(Some(&at)).try_collect::<Vec<_>>());
        let found = self.patiently(Operation::List, list).map_err(|e| self.failed("listing", folder, e))?;
        let mut objects: Vec<(Object, i64)> = found
            .into_iter()
            .filter_map(|meta| {
                let parts = meta.location.prefix_match(&self.prefix)?;
                let path = parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/");
                let written_us = meta.last_modified.timestamp_micros();
                (!path.is_empty()).then_some((Object { path, bytes: meta.size }, written_us))
            })
            .collect();
        objects.sort_unstable();
        Ok(objects)
    }

    /// Names of the folders right below `folder` (`""`: the prefix itself), in order. Whatever they hold is not listed.
    pub fn folders(&self, folder: &str) -> Result<Vec<String>> {
        let at = self.at(folder);
        let list = || self.runtime.block_on(self.inner.list_with_delimiter(Some(&at)));
        let found = self.patiently(Operation::List, list).map_err(|e| self.failed("listing", folder, e))?;
        let name = |path: Path| path.parts().next_back().map(|part| part.as_ref().to_owned());
        let mut names: Vec<String> = found.common_prefixes.into_iter().filter_map(name).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// What `attempt` gives. One whose answer broke off is made again: the clients repeat requests, and not always the
    /// reading of their answers.
    fn patiently<T>(
        &self,
        operation: Operation,
        attempt: impl Fn() -> object_store::Result<T>,
    ) -> object_store::Result<T> {
        let began = Instant::now();
        self.while_wrong(operation, |cause| broke_off(cause) && began.elapsed() < PATIENCE, attempt)
    }

    /// What `attempt` gives, made again while it fails with what `again` says so of, as often as this store tries; counted as one.
    fn while_wrong<T>(
        &self,
        operation: Operation,
        again: impl Fn(&object_store::Error) -> bool,
        attempt: impl Fn() -> object_store::Result<T>,
    ) -> object_store::Result<T> {
        let mut pause = self.attempts.pause;
        for _ in 1..self.attempts.most {
            match attempt() {
                Err(cause) if again(&cause) => {}
                done => return self.meter.count(operation, done),
            }
            self.meter.retry(operation);
            std::thread::sleep(pause);
            pause *= 2;
        }
        self.meter.count(operation, attempt())
    }

    /// The place of the prefix `folder` of this one: [`Store::durable`] takes it.
    pub fn below(&self, folder: &str) -> String {
        format!("{}/{folder}", self.place)
    }

    /// The object's bytes; `None` where there is none. [`Error::TooLarge`] for one of more than [`WHOLE_BYTES_MAX`]: nothing that is read
    /// whole is that large (parts, shards and weights are read in pieces, or as long as another object says).
    pub fn get(&self, path: &str) -> Result<Option<Bytes>> {
        match self.get_sized(path, |size| size <= WHOLE_BYTES_MAX)? {
            Fetched::Bytes(bytes) => Ok(Some(bytes)),
            Fetched::Absent => Ok(None),
            Fetched::Other(bytes) => Err(Error::TooLarge { place: self.place_of(path), bytes }),
        }
    }

    /// The object's bytes, when `fits` says so of how many they are. Nothing is read of others: what an object claims to be
    /// bounds what is held in memory for it.
    pub fn get_sized(&self, path: &str, fits: impl Fn(u64) -> bool) -> Result<Fetched> {
        let at = self.at(path);
        let read = || match self.runtime.block_on(self.read(&at, &fits)) {
            Err(object_store::Error::NotFound { .. }) => Ok(Fetched::Absent),
            read => Ok(read?.map_or_else(Fetched::Other, Fetched::Bytes)),
        };
        let found = self.patiently(Operation::Get, read).map_err(|e| self.failed("reading", path, e))?;
        if let Fetched::Bytes(bytes) = &found {
            self.meter.read(bytes.len());
        }
        Ok(found)
    }

    /// The object as a file that is read piece by piece, when it is one, of `bytes` bytes and not a small one; otherwise it is
    /// for [`Store::get_sized`] to say what there is.
    pub fn file(&self, path: &str, bytes: u64) -> Option<Reader> {
        let file = self.files.as_ref()?.path_to_filesystem(&self.at(path)).ok()?;
        let reader = (bytes >= pieces::PIECE as u64).then(|| Reader::open(&file).ok())??;
        (reader.size() == bytes).then_some(reader)
    }

    /// What a piece of a file was read as, counted.
    pub(crate) fn read_piece<'a>(
        &self,
        path: &str,
        reader: &'a mut Reader,
        range: Range<u64>,
    ) -> Result<&'a [u8]> {
        let bytes = (range.end - range.start) as usize;
        self.runtime.block_on(self.may_read(bytes));
        let read = reader.read(range).map_err(pieces::of_file);
        self.meter.read(bytes);
        read.map_err(|e| self.failed("reading", path, e))
    }

    /// The last `length` bytes of the object, or all of it if it is shorter.
    pub fn tail(&self, path: &str, length: u64) -> Result<Bytes> {
        let at = self.at(path);
        let options = GetOptions { range: Some(GetRange::Suffix(length)), ..Default::default() };
        let read = async || {
            match self.inner.get_opts(&at, options.clone()).await {
                // Azure has no ranges that count from the end.
                Err(object_store::Error::NotSupported { .. }) => {
                    let size = self.inner.head(&at).await?.size;
                    self.inner.get_range(&at, size.saturating_sub(length)..size).await
                }
                got => got?.bytes().await,
            }
        };
        let read = self.patiently(Operation::Get, || self.runtime.block_on(read()));
        read.inspect(|bytes| self.meter.read(bytes.len())).map_err(|e| self.failed("reading", path, e))
    }

    /// The bytes of each range of the object.
    pub fn ranges(&self, path: &str, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let at = self.at(path);
        let read = || {
            let lengths = ranges.iter().map(|range| range.end - range.start);
            self.runtime.block_on(self.may_read(lengths.clone().sum::<u64>() as usize));
            let pieces = self.runtime.block_on(self.inner.get_ranges(&at, ranges))?;
            pieces.into_iter().zip(lengths).map(|(bytes, length)| whole(bytes, length)).collect()
        };
        let read = self.patiently(Operation::Get, read);
        let read = read.inspect(|pieces: &Vec<Bytes>| self.meter.read(pieces.iter().map(Bytes::len).sum()));
        read.map_err(|e| self.failed("reading", path, e))
    }

    /// Writes the object, over an old one if there is one.
    pub fn put(&self, path: &str, bytes: impl Into<Bytes>) -> Result<()> {
        self.put_chunks(path, &[bytes.into()])
    }

    /// Creates the object. `false`: it was there, and is as it was.
    ///
    /// When an answer was lost on the way, the object is read: with our bytes it is ours.
    pub fn create(&self, path: &str, bytes: impl Into<Bytes>) -> Result<bool> {
        let bytes = bytes.into();
        self.meter.written(bytes.len());
        self.meter.count(Operation::Create, self.create_patiently(path, bytes))
    }

    fn create_patiently(&self, path: &str, bytes: Bytes) -> Result<bool> {
        let at = self.at(path);
        let (mut unsure, mut pause) = (false, self.attempts.pause);
        for attempt in 1.. {
            let payload = PutPayload::from(bytes.clone());
            let put = self.once.put_opts(&at, payload, PutMode::Create.into());
            match self.runtime.block_on(put) {
                Ok(_) => return Ok(true),
                Err(object_store::Error::AlreadyExists { .. }) if self.folder.is_some() => return Ok(false),
                Err(cause @ object_store::Error::AlreadyExists { .. }) => match self.get(path)? {
                    Some(there) => return Ok(unsure && there == bytes),
                    // Somebody is about to create it, or was and did not.
                    None if attempt < self.attempts.most => {}
                    None => return Err(self.failed("creating", path, cause)),
                },
                Err(object_store::Error::Generic { .. }) if attempt < self.attempts.most => unsure = true,
                Err(cause) => return Err(self.failed("creating", path, cause)),
            }
            self.meter.retry(Operation::Create);
            std::thread::sleep(pause);
            pause *= 2;
        }
        unreachable!("the last attempt returns")
    }

    /// Size of the object, bytes; `None` where there is none.
    pub fn size(&self, path: &str) -> Result<Option<u64>> {
        Ok(self.head(path)?.map(|meta| meta.size))
    }

    /// When the object was written by the store's clock, milliseconds since 1970; `None` where there is none.
    pub fn written_ms(&self, path: &str) -> Result<Option<i64>> {
        Ok(self.head(path)?.map(|meta| meta.last_modified.timestamp_millis()))
    }

    fn head(&self, path: &str) -> Result<Option<ObjectMeta>> {
        let at = self.at(path);
        let head = || none_if_absent(self.runtime.block_on(self.inner.head(&at)));
        self.patiently(Operation::Head, head).map_err(|e| self.failed("reading", path, e))
    }

    /// Deletes the object; one that is not there is fine.
    pub fn delete(&self, path: &str) -> Result<()> {
        let at = self.at(path);
        let delete = || none_if_absent(self.runtime.block_on(self.inner.delete(&at)));
        self.patiently(Operation::Delete, delete).map(drop).map_err(|e| self.failed("deleting", path, e))
    }

    /// Removes what a killed process had not finished to write. In a folder an object is written as `NAME#N` and then
    /// renamed, so a kill can leave such a file, which no list shows; other stores leave nothing.
    pub fn sweep(&self) {
        let mut open: Vec<PathBuf> = self.folder.iter().cloned().collect();
        while let Some(folder) = open.pop() {
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
                if is_folder {
                    open.push(entry.path());
                } else if is_unfinished(&entry.file_name().to_string_lossy()) {
                    // One that has gone meanwhile is as good, and one that cannot be removed costs only its space.
                    // The folder goes with its last file, as when the store deletes.
                    let _ = std::fs::remove_file(entry.path()).and_then(|()| std::fs::remove_dir(&folder));
                }
            }
        }
    }

    fn at(&self, path: &str) -> Path {
        // What a listing gave is taken as it is; `join` on a string would encode a `%` in it once more.
        path.split('/').filter(|part| !part.is_empty()).fold(self.prefix.clone(), |at, part| {
            match PathPart::parse(part) {
                Ok(part) => at.join(part),
                Err(_) => at.join(part),
            }
        })
    }

    fn failed(&self, action: &'static str, path: &str, source: object_store::Error) -> Error {
        let place = if path.is_empty() { self.place.clone() } else { self.place_of(path) };
        // Of what the store gave us, and not as it was written, it knows no remedy.
        let ours = matches!(source, object_store::Error::Generic { store, .. } if [SHORT, UNPROVED].contains(&store));
        let remedy = remote::remedy(&place, &source).filter(|_| !ours);
        let remedy = remedy.map(|remedy| format!("; {remedy}")).unwrap_or_default();
        Error::Object { action, place, source: Box::new(source), remedy }
    }
}

/// Whether an answer came and was not all of one, so that it may be asked for again.
fn broke_off(error: &object_store::Error) -> bool {
    let (store, source) = match error {
        object_store::Error::Generic { store, source } => (*store, source),
        // The object was written anew while it was read.
        other => return matches!(other, object_store::Error::Precondition { .. }),
    };
    // The client repeats requests that could not be sent or had no answer. It does not repeat these, when they are met while
    // the answer is read.
    let unrepeated = |error: &HttpError| {
        use HttpErrorKind::{Decode, Interrupted, Unknown};
        matches!(error.kind(), Decode | Interrupted | Unknown)
    };
    let source: &(dyn std::error::Error + 'static) = source.as_ref();
    let causes = std::iter::successors(Some(source), |error| error.source());
    let told = source.to_string();
    // For listings object_store has words only.
    let of_listing = ["Error getting list response body", "Got invalid list response"];
    store == SHORT
        || source.is::<HttpError>()
        || causes.filter_map(|error| error.downcast_ref()).any(unrepeated)
        || of_listing.iter().any(|words| told.starts_with(words))
}

fn none_if_absent<T>(found: object_store::Result<T>) -> object_store::Result<Option<T>> {
    match found {
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        found => found.map(Some),
    }
}

fn wrong_place(place: &str, detail: &dyn std::fmt::Display) -> Error {
    Error::Place { place: place.to_owned(), detail: detail.to_string() }
}

/// The folder at `place`, a path or a `file:///…` URL; `None` for another scheme.
fn local_folder(place: &str) -> Result<Option<PathBuf>> {
    match place.split_once("://") {
        None => Ok(Some(PathBuf::from(place))),
        Some(("file", _)) => {
            let parsed = url::Url::parse(place).map_err(|e| wrong_place(place, &e))?;
            let path = parsed.to_file_path();
            path.map(Some).map_err(|()| wrong_place(place, &"not an absolute path; write file:///folder"))
        }
        Some(_) => Ok(None),
    }
}

fn shown(folder: &FilePath) -> String {
    folder.display().to_string().trim_end_matches('/').to_owned()
}

fn is_unfinished(name: &str) -> bool {
    let number = name.rsplit_once('#').map(|(_, number)| number);
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests;

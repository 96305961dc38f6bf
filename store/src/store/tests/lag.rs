//! A store that shows what was written a while later: new objects are not there yet, old ones still are, and listings are
//! behind. Its put-if-absent is atomic all the same, as that of every store that is fit for a ledger.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;

use futures::future::ready;
use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use object_store::{
    CopyOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions, PutOptions,
    PutResult,
};

use super::*;
use crate::checkpoint::{self, Retention};
use crate::events::{self, Event, EventLog};

/// An object that was written, or, without bytes, deleted.
#[derive(Clone)]
struct Version {
    at: Instant,
    found: Option<(ObjectMeta, Bytes)>,
}

/// What comes late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Late {
    /// Objects, and their sizes.
    Objects,
    /// Listings.
    Listings,
    /// Both.
    All,
}

#[derive(Clone)]
struct Lagging {
    late: Late,
    lag: Duration,
    versions: Arc<Mutex<BTreeMap<Path, Vec<Version>>>>,
    /// Answers that were not those of a store without a lag.
    stale: Arc<Mutex<usize>>,
}

impl Lagging {
    fn new(late: Late, lag: Duration) -> Self {
        Self { late, lag, versions: Arc::default(), stale: Arc::default() }
    }

    /// A store that tries so often that what is late is there in the end.
    fn store(&self) -> Store {
        let attempts = Attempts { most: 7, pause: Duration::from_millis(5) };
        Store::new(Arc::new(self.clone()), "lagging").unwrap().trying(attempts)
    }

    /// The same objects as they are.
    fn beyond(&self) -> Store {
        Store::new(Arc::new(Self { lag: Duration::ZERO, ..self.clone() }), "beyond").unwrap()
    }

    fn stale(&self) -> usize {
        *self.stale.lock().unwrap()
    }

    fn write(&self, path: &Path, found: Option<(ObjectMeta, Bytes)>) {
        let version = Version { at: Instant::now(), found };
        self.versions.lock().unwrap().entry(path.clone()).or_default().push(version);
    }

    /// What is shown of these versions, to whom asks for an object or for a listing.
    fn shown(&self, versions: &[Version], listing: bool) -> Option<(ObjectMeta, Bytes)> {
        let is_late = self.late == Late::All || listing == (self.late == Late::Listings);
        let shows = |version: &&Version| !is_late || version.at.elapsed() >= self.lag;
        let shown = versions.iter().rev().find(shows);
        if shown.map(|shown| shown.at) != versions.last().map(|last| last.at) {
            *self.stale.lock().unwrap() += 1;
        }
        shown?.found.clone()
    }
}

impl fmt::Display for Lagging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("lagging")
    }
}

impl fmt::Debug for Lagging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lagging")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Lagging {
    async fn put_opts(
        &self,
        path: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        let (bytes, inner) = (Bytes::from(payload), InMemory::new());
        let put = inner.put(path, bytes.clone().into()).await?;
        let meta = inner.head(path).await?;
        let mut all = self.versions.lock().unwrap();
        let versions = all.entry(path.clone()).or_default();
        if options.mode == PutMode::Create && versions.last().is_some_and(|last| last.found.is_some()) {
            let source = "it is there".into();
            return Err(object_store::Error::AlreadyExists { path: path.to_string(), source });
        }
        versions.push(Version { at: Instant::now(), found: Some((meta, bytes)) });
        Ok(put)
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        unimplemented!("nothing is so large")
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        let versions = self.versions.lock().unwrap().get(path).cloned().unwrap_or_default();
        let absent = || object_store::Error::NotFound {
            path: path.to_string(),
            source: "not there, or not yet".into(),
        };
        let (_, bytes) = self.shown(&versions, false).ok_or_else(absent)?;
        let inner = InMemory::new();
        inner.put(path, bytes.into()).await?;
        inner.get_opts(path, options).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        let store = self.clone();
        paths.map(move |path| path.inspect(|path| store.write(path, None))).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let all = self.versions.lock().unwrap();
        let within = |path: &Path| prefix.is_none_or(|prefix| path.prefix_match(prefix).is_some());
        let shown = all.iter().filter(|(path, _)| within(path));
        let shown = shown.filter_map(|(_, versions)| Some(Ok(self.shown(versions, true)?.0)));
        stream::iter(shown.collect::<Vec<_>>()).filter(|_| ready(true)).boxed()
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> object_store::Result<ListResult> {
        unimplemented!("no folder is asked for")
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> object_store::Result<()> {
        unimplemented!("nothing is copied")
    }
}

const LAG: Duration = Duration::from_millis(60);

/// The checkpoint after `step` steps, as a process makes it: parts, manifest, log, pointer, and old ones go.
fn checkpointed(store: &Store, log: &mut EventLog, step: u64) -> Result<()> {
    let bytes =
        [1, 2, 3].map(|buffer| Bytes::from(vec![step as u8 * 3 + buffer; 2 * checkpoint::BLOCK_BYTES]));
    let written = checkpoint::write_blocks(store, step, log.session(), 1 << 20, 0, 0..usize::MAX, &bytes)?;
    log.check()?;
    let mut facts = super::faults::facts();
    facts.position.step = step;
    let manifest = checkpoint::commit(store, checkpoint::Manifest::new(facts, written))?;
    log.append(Event::Checkpoint { step, weights: manifest.weights.clone() })?;
    checkpoint::point_at(store, &manifest)?;
    match checkpoint::prune(store, &retention()) {
        // A manifest that is listed and not shown yet: it is tried again after the next checkpoint.
        Err(Error::Checkpoint { .. }) => Ok(()),
        pruned => pruned.map(drop),
    }
}

fn retention() -> Retention {
    let policy = anello_configs::Checkpoint {
        every_steps: 1,
        keep_last: 2,
        keep_every_steps: None,
        keep_stage_ends: false,
        part_bytes: 1 << 20,
    };
    Retention { policy, reach: 0 }
}

/// The newest checkpoint that can be read, as a process finds it that takes a run up; those that cannot are set aside.
fn found(store: &Store) -> Result<u64> {
    for step in checkpoint::known_steps(store)?.into_iter().rev() {
        match checkpoint::verify(store, step) {
            Ok(_) => return Ok(step),
            Err(Error::Checkpoint { .. }) => checkpoint::set_aside(store, step)?,
            Err(other) => return Err(other),
        }
    }
    Ok(0)
}

/// All that there is is whole: the newest checkpoint and one before it, and a log without gaps that tells of them.
fn assert_whole(beyond: &Store, newest: u64, what: &str) {
    let steps = checkpoint::steps(beyond).unwrap();
    assert!(steps.len() >= 2 && steps.last() == Some(&newest), "{what}: {steps:?}");
    for step in steps {
        checkpoint::verify(beyond, step).unwrap_or_else(|e| panic!("{what}: {e}"));
    }
    let records = events::read(beyond).unwrap();
    assert_eq!(
        records.iter().map(|record| record.number).collect::<Vec<_>>(),
        (1..=records.len() as u64).collect::<Vec<_>>(),
        "{what}"
    );
    let told = records.iter().rev().find_map(|record| match record.event {
        Event::Checkpoint { step, .. } => Some(step),
        _ => None,
    });
    assert_eq!(told, Some(newest), "{what}");
}

/// A run that saves, dies and is taken up at once, again and again, on a store that shows everything late.
#[test]
fn a_run_outlives_what_a_store_shows_late() {
    for late in [Late::Objects, Late::Listings, Late::All] {
        let lagging = Lagging::new(late, LAG);
        let (mut step, mut refused) = (0, 0);
        for life in 1..=4 {
            let store = lagging.store();
            let what = format!("{late:?}, life {life}");
            let before = checkpoint::steps(&lagging.beyond()).unwrap();
            let began = Instant::now();
            // A process that is refused is started again.
            let (from, mut log) = loop {
                assert!(began.elapsed() < 20 * LAG, "{what}: it is refused for ever");
                let taken_up = found(&store).and_then(|from| {
                    let mut log = EventLog::open(&store)?;
                    log.append(Event::TakenUp { step: Some(from) })?;
                    Ok((from, log))
                });
                match taken_up {
                    Ok(taken_up) => break taken_up,
                    Err(Error::Fenced { .. } | Error::Checkpoint { .. }) => refused += 1,
                    Err(other) => panic!("{what}: {other}"),
                }
                std::thread::sleep(LAG / 3);
            };
            assert!(from <= step && (before.is_empty() || from > 0), "{what}: from {from} of {before:?}");
            step = from;
            for _ in 0..3 {
                step += 1;
                checkpointed(&store, &mut log, step).unwrap_or_else(|e| panic!("{what}, {step}: {e}"));
            }
            assert_whole(&lagging.beyond(), step, &what);
        }
        assert!(lagging.stale() > 20, "{late:?}: {} answers were stale", lagging.stale());
        assert!(late != Late::Listings || (refused, step) == (0, 12), "{late:?}: {refused}, {step}");
        println!("{late:?}: {} stale answers, {refused} times refused, {step} steps", lagging.stale());
        std::thread::sleep(LAG);
        assert_whole(&lagging.store(), step, "in the end");
    }
}

/// What is not shown for longer than anyone waits is no checkpoint, and the error says which part is not there.
#[test]
fn a_part_that_is_not_shown_in_time_is_no_checkpoint() {
    let lagging = Lagging::new(Late::All, Duration::from_secs(3600));
    let attempts = Attempts { most: 3, pause: Duration::from_millis(1) };
    let store = lagging.store().trying(attempts);
    let mut log = EventLog::open(&store).unwrap();
    let refused = checkpointed(&store, &mut log, 1).unwrap_err().to_string();
    assert!(
        refused.starts_with(
            "reading back lagging/checkpoints/0000000001/part-00000-00001-00000001.safetensors: "
        ),
        "{refused}"
    );
    assert_eq!(checkpoint::steps(&lagging.beyond()).unwrap(), [0u64; 0]);
}

//! A network between us and the objects: answers that are lost, late, cut short or refused.

use std::fmt;
use std::io::{Read, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::ready;
use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use object_store::{
    CopyOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions,
    PutOptions, PutResult, UploadPart,
};

use super::super::pieces::{PIECE, PIECES};
use super::*;
use crate::checkpoint::{self, BLOCK_BYTES, Facts, Manifest, Position};
use crate::doctor;
use crate::events::{Event, EventLog};

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Done,
    /// Nothing is done, and the caller is told so (a 500, or a 503 that asks to slow down).
    Refused,
    /// It is done, and the caller is told that it is not.
    AnswerLost,
    /// Somebody else's put-if-absent is under way: as the 409 of a real bucket.
    Conflict,
    /// It is done, a while later.
    Late,
    /// The body ends before its time: that of an answer, or that of a piece that is sent, and nobody notices.
    Short,
    /// That of a listing does.
    BrokenOff,
}

/// Decides over the next requests, one each; those after are done.
#[derive(Clone)]
struct Network {
    inner: Arc<InMemory>,
    fates: Arc<Mutex<Vec<Fate>>>,
    /// As a server whose put-if-absent looks first, and writes afterwards.
    looks_first: bool,
    /// Requests and pieces that there were, the most pieces at a time, and the most reads.
    seen: Arc<[AtomicUsize; 4]>,
    /// Reads that are under way.
    reads: Arc<AtomicUsize>,
    /// What listings do not show yet: paths that end so.
    unlisted: &'static str,
}

impl Network {
    fn new() -> Self {
        let (inner, fates, seen, reads) = Default::default();
        Self { inner, fates, looks_first: false, seen, reads, unlisted: "/" }
    }

    /// A store that tries three times.
    fn store(&self) -> Store {
        let attempts = Attempts { most: 3, pause: Duration::from_millis(1) };
        Store::new(Arc::new(self.clone()), "network").unwrap().trying(attempts)
    }

    /// The same objects without a network between.
    fn beyond(&self) -> Store {
        Store::new(self.inner.clone(), "beyond").unwrap()
    }

    fn next(&self, fates: &[Fate]) {
        *self.fates.lock().unwrap() = fates.iter().rev().copied().collect();
    }

    async fn fate(&self) -> object_store::Result<Fate> {
        self.seen[0].fetch_add(1, Ordering::Relaxed);
        let fate = self.fates.lock().unwrap().pop().unwrap_or(Fate::Done);
        match fate {
            Fate::Refused => return Err(lost()),
            Fate::Late => tokio::time::sleep(Duration::from_millis(20)).await,
            Fate::Done | Fate::AnswerLost | Fate::Conflict | Fate::Short | Fate::BrokenOff => {}
        }
        Ok(fate)
    }
}

fn lost() -> object_store::Error {
    object_store::Error::Generic { store: "network", source: "503 slow down".into() }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("network")
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Network")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Network {
    async fn put_opts(
        &self,
        path: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        let fate = self.fate().await?;
        if fate == Fate::Conflict {
            let source = "409 conflict".into();
            return Err(object_store::Error::AlreadyExists { path: path.to_string(), source });
        }
        if self.looks_first && options.mode == PutMode::Create && self.inner.head(path).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
            return self.inner.put(path, payload).await;
        }
        let put = self.inner.put_opts(path, payload, options).await?;
        if fate == Fate::AnswerLost { Err(lost()) } else { Ok(put) }
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        _: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        if self.fate().await? == Fate::AnswerLost {
            return Err(lost());
        }
        let (path, network) = (path.clone(), self.clone());
        Ok(Box::new(Upload { path, pieces: Arc::default(), network, under_way: Arc::default() }))
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        let now = self.reads.fetch_add(1, Ordering::Relaxed) + 1;
        self.seen[3].fetch_max(now, Ordering::Relaxed);
        let fate = self.fate().await;
        tokio::task::yield_now().await;
        self.reads.fetch_sub(1, Ordering::Relaxed);
        let fate = fate?;
        let found = self.inner.get_opts(path, options).await?;
        if fate != Fate::Short {
            return Ok(found);
        }
        let GetResult { meta, range, attributes, extensions, .. } = found;
        let bytes =
            self.inner.get_opts(path, GetOptions { range: Some(range.clone().into()), ..Default::default() });
        let bytes = bytes.await?.bytes().await?;
        let some = bytes.slice(..bytes.len() / 2);
        let payload = GetResultPayload::Stream(stream::once(async { Ok(some) }).boxed());
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let mut fates = self.fates.lock().unwrap();
        if fates.last() == Some(&Fate::BrokenOff) {
            fates.pop();
            // In the words of object_store's clients.
            let source =
                "Error getting list response body: HTTP error: request or response body error".into();
            return stream::once(ready(Err(object_store::Error::Generic { store: "S3", source }))).boxed();
        }
        let unlisted = self.unlisted;
        let shown = move |meta: &ObjectMeta| !meta.location.as_ref().ends_with(unlisted);
        self.inner.list(prefix).filter(move |meta| ready(meta.as_ref().map_or(true, shown))).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> object_store::Result<()> {
        unimplemented!("nothing is copied")
    }
}

/// An upload in pieces: the object is there once it is complete.
#[derive(Debug)]
struct Upload {
    path: Path,
    /// Those that came.
    pieces: Arc<Mutex<Vec<Option<Bytes>>>>,
    network: Network,
    under_way: Arc<AtomicUsize>,
}

#[async_trait::async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (network, under_way) = (self.network.clone(), self.under_way.clone());
        let (pieces, data) = (self.pieces.clone(), Bytes::from(data));
        pieces.lock().unwrap().push(None);
        let number = pieces.lock().unwrap().len() - 1;
        Box::pin(async move {
            let now = under_way.fetch_add(1, Ordering::Relaxed) + 1;
            network.seen[2].fetch_max(now, Ordering::Relaxed);
            network.seen[1].fetch_add(1, Ordering::Relaxed);
            let fate = network.fate().await;
            tokio::task::yield_now().await;
            under_way.fetch_sub(1, Ordering::Relaxed);
            let fate = fate?;
            let came = if fate == Fate::Short { data.slice(..data.len() / 2) } else { data };
            pieces.lock().unwrap()[number] = Some(came);
            if fate == Fate::AnswerLost { Err(lost()) } else { Ok(()) }
        })
    }

    async fn complete(&mut self) -> object_store::Result<PutResult> {
        let fate = self.network.fate().await?;
        let pieces: Option<Vec<Bytes>> = self.pieces.lock().unwrap().drain(..).collect();
        let all = pieces.expect("a piece that did not come is an error before").concat();
        let put = self.network.inner.put(&self.path, all.into()).await?;
        if fate == Fate::AnswerLost { Err(lost()) } else { Ok(put) }
    }

    async fn abort(&mut self) -> object_store::Result<()> {
        self.pieces.lock().unwrap().clear();
        Ok(())
    }
}

#[test]
fn of_a_put_if_absent_whose_answer_was_lost_it_is_known_whose_it_is() {
    use Fate::{AnswerLost, Conflict, Done, Late, Refused};
    // Ours: what is done at the first attempt, at a later one, or was done and nobody said so.
    let ours: &[&[Fate]] = &[
        &[Done],
        &[Late],
        &[Refused, Done],
        &[Refused, Refused, Late],
        &[AnswerLost],
        &[Refused, AnswerLost],
        &[AnswerLost, Refused],
        &[Conflict, Done],
    ];
    for fates in ours {
        let network = Network::new();
        network.next(fates);
        assert!(network.store().create("events/1.json", "ours").unwrap(), "{fates:?}");
        assert_eq!(network.beyond().get("events/1.json").unwrap().unwrap(), "ours");
        assert!(!network.store().create("events/1.json", "ours").unwrap(), "{fates:?}: only once");
    }
    // Somebody else's: never ours, whatever the network does, and never overwritten.
    for fates in [&[Done][..], &[Refused, Done], &[AnswerLost], &[Conflict, Done], &[Late]] {
        let network = Network::new();
        network.beyond().put("events/1.json", "theirs").unwrap();
        network.next(fates);
        assert!(!network.store().create("events/1.json", "ours").unwrap(), "{fates:?}");
        assert_eq!(network.beyond().get("events/1.json").unwrap().unwrap(), "theirs");
    }
    let network = Network::new();
    network.next(&[Refused; 3]);
    let error = network.store().create("events/1.json", "ours").unwrap_err();
    assert!(error.to_string().starts_with("creating network/events/1.json: "), "{error}");
    assert_eq!(network.beyond().list("").unwrap(), []);
}

#[test]
fn of_two_that_write_the_same_record_over_a_bad_network_one_is_fenced() {
    for fates in
        [[Fate::AnswerLost, Fate::Done], [Fate::Refused, Fate::AnswerLost], [Fate::Conflict, Fate::Done]]
    {
        let network = Network::new();
        let mut logs = [0, 1].map(|_| EventLog::open(&network.store()).unwrap());
        network.next(&fates);
        logs[0].append(Event::Stopped { step: 1 }).unwrap();
        let second = logs[1].append(Event::Stopped { step: 2 });
        assert!(matches!(second, Err(Error::Fenced { .. })), "{fates:?}: {second:?}");
        logs[0].append(Event::Stopped { step: 3 }).unwrap();
    }
}

#[test]
fn what_came_short_is_read_again_and_never_taken_for_whole() {
    let network = Network::new();
    network.beyond().put("a", "0123456789").unwrap();
    network.next(&[Fate::Short, Fate::Short]);
    assert_eq!(network.store().get("a").unwrap().unwrap(), "0123456789");
    network.next(&[Fate::Short; 3]);
    let error = network.store().get("a").unwrap_err();
    assert!(error.to_string().contains("5 bytes came of 10"), "{error}");
    let range = || network.store().ranges("a", std::slice::from_ref(&(2..6)));
    network.next(&[Fate::Short, Fate::Short]);
    assert_eq!(range().unwrap(), ["2345"]);
    network.next(&[Fate::Short; 3]);
    let error = range().unwrap_err();
    assert!(error.to_string().contains("2 bytes came of 4"), "{error}");
}

#[test]
fn a_listing_that_breaks_off_is_asked_for_again() {
    let network = Network::new();
    let store = network.store();
    store.put("a/b", "x").unwrap();
    network.next(&[Fate::BrokenOff, Fate::BrokenOff]);
    assert_eq!(store.list("a").unwrap().len(), 1);
    network.next(&[Fate::BrokenOff; 3]);
    let told = store.list("a").unwrap_err().to_string();
    assert!(told.contains("listing") && told.contains("response body"), "{told}");
}

/// A server of one bucket that gives `answers` in turn, one a connection, and says which requests came.
fn server(answers: Vec<&'static str>) -> (Store, std::thread::JoinHandle<Vec<String>>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let serve = move || {
        let one = |answer: &str| {
            let (mut client, _) = listener.accept().unwrap();
            let mut request = vec![0; 4096];
            let read = client.read(&mut request).unwrap();
            client.write_all(answer.as_bytes()).unwrap();
            let line = String::from_utf8_lossy(&request[..read]);
            line.split(" HTTP").next().unwrap().to_owned()
        };
        answers.into_iter().map(one).collect()
    };
    let client = object_store::aws::AmazonS3Builder::new()
        .with_bucket_name("bucket")
        .with_endpoint(endpoint)
        .with_client_options(object_store::ClientOptions::new().with_allow_http(true))
        .with_access_key_id("key")
        .with_secret_access_key("secret")
        .build();
    let store = Store::new(Arc::new(client.unwrap()), "s3://bucket").unwrap();
    let attempts = Attempts { most: 3, pause: Duration::from_millis(1) };
    (store.trying(attempts), std::thread::spawn(serve))
}

/// The client repeats a request whose answer does not come, and none whose answer is an error that breaks off.
#[test]
fn an_answer_that_breaks_off_in_an_error_is_asked_for_again() {
    const BROKEN: &str =
        "HTTP/1.1 404 Not Found\r\nContent-Length: 90\r\nConnection: close\r\n\r\n<Error><Code>";
    const NONE: &str = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (store, served) = server(vec![BROKEN, BROKEN, NONE]);
    assert_eq!(store.get("events/1.json").unwrap(), None);
    assert_eq!(served.join().unwrap(), ["GET /bucket/events/1.json"; 3]);
    assert_eq!(store.traffic().of(Operation::Get).retries, 2);

    let (store, served) = server(vec![BROKEN; 3]);
    let told = store.get("events/1.json").unwrap_err().to_string();
    assert!(told.starts_with("reading s3://bucket/events/1.json: "), "{told}");
    served.join().unwrap();
}

fn large() -> Bytes {
    (0..5 * PIECE + 3).map(|at| (at % 251) as u8).collect::<Vec<u8>>().into()
}

#[test]
fn large_objects_go_in_bounded_pieces_and_appear_whole_or_not_at_all() {
    let network = Network::new();
    network.store().put("large", large()).unwrap();
    let seen = || network.seen.each_ref().map(|seen| seen.load(Ordering::Relaxed));
    assert_eq!(seen()[1], 6);
    assert!((2..=PIECES).contains(&seen()[2]), "{} pieces at a time", seen()[2]);
    let before = seen()[0];
    assert!(network.store().get("large").unwrap().unwrap() == large());
    assert_eq!(seen()[0] - before, 7, "one request that tells its size, and one a piece");
    assert!((2..=PIECES).contains(&seen()[3]), "{} pieces are read at a time", seen()[3]);

    network.next(&[Fate::Done, Fate::Done, Fate::Refused]);
    network.store().put("other", large()).unwrap_err();
    assert_eq!(network.beyond().get("other").unwrap(), None);
    network.next(&[Fate::Done, Fate::Late, Fate::Short]);
    assert!(network.store().get("large").unwrap().unwrap() == large());
}

/// Whatever becomes of each request of an upload in pieces: the object is the new one whole, or what was there before; whoever is
/// told that it was written and proved has it; and the next attempt succeeds.
#[test]
fn no_fault_in_pieces_leaves_a_part_of_an_object() {
    use Fate::{AnswerLost, Done, Refused, Short};
    // Three pieces: the upload begins, its pieces go, it is complete, its size is asked for, and it is read back.
    let new: Bytes = large().slice(..2 * PIECE + 5);
    let fates = [Done, Refused, AnswerLost, Short];
    let mut outcomes = [0; 2];
    for before in [None, Some(Bytes::from(vec![7u8; 2 * PIECE + 9]))] {
        for number in 0..fates.len().pow(5) {
            let chosen: [Fate; 5] =
                std::array::from_fn(|at| fates[number / fates.len().pow(at as u32) % fates.len()]);
            // Of two that come to harm the first alone counts.
            if chosen.iter().filter(|fate| **fate != Done).count() > 2 {
                continue;
            }
            let what = format!("{chosen:?}, {}", before.is_some());
            let network = Network::new();
            let beyond = network.beyond();
            if let Some(before) = &before {
                beyond.put("large", before.clone()).unwrap();
            }
            network.next(&chosen);
            let told = network.store().put_proved("large", std::slice::from_ref(&new), |_| ());
            outcomes[usize::from(told.is_ok())] += 1;
            let there = beyond.get("large").unwrap();
            let whole = there == before || there.as_ref() == Some(&new);
            let cut = chosen[1..4].contains(&Short);
            assert!(whole || cut && told.is_err(), "{what}: {told:?}");
            assert!(told.is_err() || there.as_ref() == Some(&new), "{what}");
            network.next(&[]);
            network.store().put_proved("large", std::slice::from_ref(&new), |_| ()).unwrap();
            assert!(beyond.get("large").unwrap().as_ref() == Some(&new), "{what}");
        }
    }
    assert!(outcomes[0] > 100 && outcomes[1] > 4, "{outcomes:?}");
}

#[test]
fn an_object_that_is_written_anew_while_it_is_read_is_read_again() {
    // Its first piece is of one version, and the next would be of another.
    let network = Network::new();
    network.beyond().put("large", large()).unwrap();
    let other: Bytes = vec![7u8; large().len()].into();
    let reader = network.store();
    network.next(&[Fate::Late; 3]);
    let writer = {
        let (network, other) = (network.clone(), other.clone());
        std::thread::spawn(move || {
            while network.seen[0].load(Ordering::Relaxed) < 2 {
                std::thread::yield_now();
            }
            network.beyond().put("large", other).unwrap();
        })
    };
    let read = reader.get("large").unwrap().unwrap();
    writer.join().unwrap();
    assert!(read == other || read == large(), "a mixture of two versions");
}

pub(super) fn facts() -> Facts {
    let environment: crate::Environment = serde_json::from_value(serde_json::json!({
        "anello": "0", "revision": null, "libtorch": "0", "device": "a CPU", "threads": 1, "system": "linux"
    }))
    .unwrap();
    Facts {
        position: Position { step: 3, stage: "stable".to_owned(), stage_end: false, tokens: 3 },
        updates: 3,
        layers: 1,
        cursors: Vec::new(),
        losses: Vec::new(),
        config: String::new(),
        data: Default::default(),
        environment,
    }
}

fn buffers(blocks: usize) -> [Bytes; 3] {
    [1, 2, 3].map(|byte| Bytes::from(vec![byte; blocks * BLOCK_BYTES]))
}

#[test]
fn no_fault_leaves_a_checkpoint_that_is_not_whole() {
    let (buffers, facts) = (buffers(1), facts());
    let fates = [Fate::Done, Fate::Refused, Fate::AnswerLost, Fate::Conflict, Fate::Short];
    let mut outcomes = [0, 0];
    // What becomes of writing the part, of looking at its size, of reading it back, and of creating the manifest.
    for number in 0..fates.len().pow(4) {
        let chosen = [1, 5, 25, 125].map(|place| fates[number / place % fates.len()]);
        let what = format!("{chosen:?}");
        let network = Network::new();
        network.next(&chosen);
        let store = network.store();
        let write = || {
            let written = checkpoint::write_blocks(&store, 3, 1, 1 << 20, 0, 0..usize::MAX, &buffers)?;
            checkpoint::commit(&store, Manifest::new(facts.clone(), written))
        };
        let committed = write().is_ok();
        outcomes[usize::from(committed)] += 1;
        let beyond = network.beyond();
        let there = checkpoint::steps(&beyond).unwrap();
        // A caller that heard of no success tries again; one that did has it.
        assert!(!committed || there == [3], "{what}");
        for step in there {
            checkpoint::verify(&beyond, step).unwrap_or_else(|e| panic!("{what}: {e}"));
        }
        network.next(&[]);
        write().unwrap_or_else(|e| panic!("{what}, again: {e}"));
        checkpoint::verify(&beyond, 3).unwrap();
    }
    assert!(outcomes.iter().all(|count| *count > 20), "{outcomes:?}");
}

#[test]
fn a_store_that_lets_two_win_is_found_and_refused() {
    let network = Network { looks_first: true, ..Network::new() };
    let checkup = doctor::check(&network.store()).unwrap();
    assert!(!checkup.is_fit() && checkup.raced.winners_most > 1, "{checkup:?}");
    assert!(checkup.faults[0].starts_with("put-if-absent is not atomic there: "), "{checkup:?}");
    let refused = doctor::check_ledger(&network.store()).unwrap_err();
    assert!(refused.is_wrong_place(), "{refused:?}");
    let text = refused.to_string();
    assert!(
        text.starts_with("network: put-if-absent is not atomic") && text.contains("use a store that"),
        "{text}"
    );
    assert_eq!(network.beyond().list("").unwrap(), [], "nothing is left behind");
    doctor::check_ledger(&Network::new().store()).unwrap();
}

#[test]
fn a_checkpoint_that_listings_do_not_show_yet_is_known_by_the_pointer() {
    let network = Network { unlisted: "0000000003/manifest.json", ..Network::new() };
    let store = network.store();
    let written = checkpoint::write_blocks(&store, 3, 1, 1 << 20, 0, 0..usize::MAX, &buffers(1)).unwrap();
    let manifest = checkpoint::commit(&store, Manifest::new(facts(), written)).unwrap();
    assert_eq!(checkpoint::steps(&store).unwrap(), [0u64; 0]);
    checkpoint::point_at(&store, &manifest).unwrap();
    assert_eq!(checkpoint::steps(&store).unwrap(), [3]);
    // Nor does pruning take its parts for nobody's.
    let nothing = checkpoint::plan_pruning(&store, |_| Vec::new(), |_| Some(9)).unwrap();
    assert_eq!((nothing.kept, nothing.objects), (vec![3], vec![]));
}

/// One that listings do not show yet, while they show a later one, loses no part when what nobody names is removed.
#[test]
fn parts_of_a_checkpoint_that_listings_do_not_show_yet_stay() {
    let network = Network { unlisted: "0000000003/manifest.json", ..Network::new() };
    let store = network.store();
    for step in 3..=5 {
        let mut facts = facts();
        facts.position.step = step;
        let bytes = [1, 2, 3].map(|byte| Bytes::from(vec![byte * 10 + step as u8; BLOCK_BYTES]));
        let written = checkpoint::write_blocks(&store, step, 1, 1 << 20, 0, 0..usize::MAX, &bytes).unwrap();
        checkpoint::commit(&store, Manifest::new(facts, written)).unwrap();
    }
    assert_eq!(checkpoint::steps(&store).unwrap(), [4, 5]);
    let nothing = checkpoint::plan_pruning(&store, |_| Vec::new(), |_| Some(9)).unwrap();
    assert_eq!((nothing.kept, nothing.objects), (vec![3, 4, 5], vec![]));
}

/// A copy that a bad network cuts short after any request is no run and no checkpoint, and goes on where it was.
#[test]
fn a_copy_that_is_cut_short_goes_on() {
    let from = Store::memory().unwrap();
    from.put(crate::CONFIG, "name = \"copied\"\n").unwrap();
    let written = checkpoint::write_blocks(&from, 3, 1, 1 << 20, 0, 0..usize::MAX, &buffers(4)).unwrap();
    checkpoint::commit(&from, Manifest::new(facts(), written)).unwrap();
    let (mut cut_short, mut resumed) = (0, 0);
    for requests in 0..60 {
        for broken in [Fate::Refused, Fate::AnswerLost] {
            let network = Network::new();
            let fates = [vec![Fate::Done; requests], vec![broken; 1000]].concat();
            network.next(&fates);
            let first = checkpoint::copy(&from, 3, &network.store(), |_| ());
            network.next(&[]);
            let beyond = network.beyond();
            for step in checkpoint::steps(&beyond).unwrap() {
                checkpoint::verify(&beyond, step).unwrap();
            }
            if first.is_ok() {
                continue;
            }
            cut_short += 1;
            let is_run = beyond.get(crate::CONFIG).unwrap().is_some();
            assert!(
                !is_run || checkpoint::steps(&beyond).unwrap() == [3],
                "a run without what it is a copy of"
            );
            let again = checkpoint::copy(&from, 3, &network.store(), |_| ()).unwrap();
            resumed = again.there.max(resumed);
            assert_eq!(again.sent.0 + again.there, 4);
            assert_eq!(checkpoint::verify(&beyond, 3).unwrap().parts.len(), 4);
            assert!(beyond.get(crate::CONFIG).unwrap().is_some());
        }
    }
    assert!(cut_short > 30 && resumed == 4, "{cut_short} were cut short, {resumed} parts were there");
}

//! The crate against a fake of the symbols that records what is called, and can be stuck.

use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use nccl_rs::symbols::{Comm, Symbols, UniqueId, code};
use nccl_rs::{Buffer, Communicator, Error, InitOptions, Library, State, Version, Watchdog};

/// Long enough for a loaded machine; a test that waits for it fails.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Fake {
    version: i32,
    calls: Mutex<Vec<String>>,
    /// Looks at a communicator that find it at work, before it is ready.
    at_work: AtomicUsize,
    /// What `ncclCommGetAsyncError` says then.
    state: AtomicI32,
    /// What `ncclSend` returns.
    send: AtomicI32,
    made: AtomicUsize,
    /// Aborts do not return while this is true.
    stuck: (Mutex<bool>, Condvar),
}

impl Fake {
    fn new() -> Arc<Self> {
        Arc::new(Self { version: 23_203, ..Self::default() })
    }

    fn call(&self, text: String) {
        self.calls.lock().unwrap().push(text);
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    fn set_stuck(&self, stuck: bool) {
        *self.stuck.0.lock().unwrap() = stuck;
        self.stuck.1.notify_all();
    }
}

#[allow(unsafe_code)]
impl Symbols for Fake {
    fn version(&self) -> (i32, i32) {
        (0, self.version)
    }

    fn text(&self, code: i32, _: Option<Comm>) -> String {
        format!("words for {code}")
    }

    fn unique_id(&self) -> (i32, UniqueId) {
        (0, UniqueId([7; 128]))
    }

    fn init_rank(&self, ranks: i32, id: &UniqueId, rank: i32) -> (i32, Comm) {
        assert_eq!(id.0, [7; 128]);
        let comm = self.made.fetch_add(1, Ordering::SeqCst) + 1;
        self.call(format!("init {comm}: {rank} of {ranks}"));
        (code::IN_PROGRESS, Comm(comm))
    }

    unsafe fn async_error(&self, _: Comm) -> (i32, i32) {
        let left = self.at_work.load(Ordering::SeqCst);
        if left > 0 {
            self.at_work.store(left.saturating_sub(usize::from(left < usize::MAX)), Ordering::SeqCst);
            return (0, code::IN_PROGRESS);
        }
        (0, self.state.load(Ordering::SeqCst))
    }

    unsafe fn abort(&self, comm: Comm) -> i32 {
        self.call(format!("abort {}", comm.0));
        let mut stuck = self.stuck.0.lock().unwrap();
        while *stuck {
            stuck = self.stuck.1.wait(stuck).unwrap();
        }
        0
    }

    fn group_start(&self) -> i32 {
        self.call("group {".to_owned());
        0
    }

    fn group_end(&self) -> i32 {
        self.call("}".to_owned());
        code::IN_PROGRESS
    }

    unsafe fn send(&self, from: usize, count: usize, kind: i32, peer: i32, comm: Comm, stream: usize) -> i32 {
        self.call(format!("send {}: {count} of kind {kind} at {from} to {peer} in {stream}", comm.0));
        self.send.load(Ordering::SeqCst)
    }

    unsafe fn recv(&self, to: usize, count: usize, kind: i32, peer: i32, comm: Comm, stream: usize) -> i32 {
        self.call(format!("recv {}: {count} of kind {kind} at {to} from {peer} in {stream}", comm.0));
        0
    }

    unsafe fn all_reduce(&self, from: usize, to: usize, count: usize, _: i32, comm: Comm, _: usize) -> i32 {
        self.call(format!("all-reduce {}: {count} at {from} to {to}", comm.0));
        0
    }
}

fn nobody() -> Option<String> {
    None
}

fn watchdog(grace: Duration) -> (Watchdog, Receiver<String>) {
    let (tell, told): (Sender<String>, _) = channel();
    (Watchdog::start(grace, move |what| drop(tell.send(what.to_owned()))).unwrap(), told)
}

fn meet(fake: &Arc<Fake>, watchdog: &Watchdog, rank: u32) -> Result<Communicator, Error> {
    let library = Library::of(fake.clone()).unwrap();
    let id = library.unique_id().unwrap();
    Communicator::meet(&library, watchdog, &id, 4, rank, &InitOptions { deadline: PATIENCE, stop: &nobody })
}

#[allow(unsafe_code)]
fn floats(address: usize, elements: usize) -> Buffer {
    // SAFETY: the fake touches no memory.
    unsafe { Buffer::floats(address, elements) }
}

#[test]
fn bad_versions_are_refused_by_number() {
    for (version, words) in [
        (
            21_805,
            "NCCL 2.18.5: before 2.22 several communicators cannot be aborted together; use 2.28 or newer",
        ),
        (22_105, "NCCL 2.21.5: before 2.22"),
        (22_501, "NCCL 2.25.1: in 2.25 and 2.26.0 ncclCommAbort hangs"),
        (30_000, "NCCL 3.0.0: another major version has another ABI"),
    ] {
        let fake = Fake { version, ..Fake::default() };
        let error = Library::of(Arc::new(fake)).unwrap_err().to_string();
        assert!(error.starts_with(words), "{error}");
    }
    for (version, shares) in
        [(22_203, false), (22_602, false), (22_809, false), (23_000, true), (23_203, true)]
    {
        assert_eq!((Version(version).check(), Version(version).shares_gpus()), (Ok(()), shares), "{version}");
    }
}

#[test]
fn a_communicator_is_polled_until_it_is_made() {
    let (fake, (watchdog, _)) = (Fake::new(), watchdog(PATIENCE));
    fake.at_work.store(3, Ordering::SeqCst);
    let made = meet(&fake, &watchdog, 1).unwrap();
    assert_eq!((made.rank(), made.ranks(), made.state()), (1, 4, Ok(State::Ready)));
    assert_eq!(fake.calls(), ["init 1: 1 of 4"]);
    assert!(matches!(meet(&fake, &watchdog, 4), Err(Error::Usage(_))));
}

#[test]
fn who_waits_for_peers_that_never_come_is_stopped_and_leaves_nothing() {
    let (fake, (watchdog, stuck)) = (Fake::new(), watchdog(PATIENCE));
    fake.at_work.store(usize::MAX, Ordering::SeqCst);
    let library = Library::of(fake.clone()).unwrap();
    let id = library.unique_id().unwrap();
    let meet =
        |options: &InitOptions<'_>| Communicator::meet(&library, &watchdog, &id, 4, 0, options).unwrap_err();
    let late = meet(&InitOptions { deadline: Duration::from_millis(5), stop: &nobody });
    assert_eq!(late.to_string(), "meeting all ranks took longer than 5 ms");
    // What is dropped is aborted a little later, by the watchdog's thread.
    assert!(watchdog.settle(PATIENCE));
    let gone = || Some("the coordinator says so".to_owned());
    let stopped = meet(&InitOptions { deadline: PATIENCE, stop: &gone });
    assert_eq!(stopped, Error::Aborted { reason: "the coordinator says so".to_owned() });
    assert!(watchdog.settle(PATIENCE));
    assert_eq!(
        fake.calls(),
        ["init 1: 0 of 4", "group {", "abort 1", "}", "init 2: 0 of 4", "group {", "abort 2", "}"]
            .map(str::to_owned)
    );
    assert!(stuck.try_recv().is_err());
}

#[test]
fn sends_and_receives_are_one_group_and_waited_for() {
    let (fake, (watchdog, _)) = (Fake::new(), watchdog(PATIENCE));
    let made = meet(&fake, &watchdog, 0).unwrap();
    fake.calls();
    fake.at_work.store(2, Ordering::SeqCst);
    made.group(9, &nobody, |group| {
        group.send(floats(100, 5), 1)?;
        group.recv(floats(200, 6), 3)
    })
    .unwrap();
    assert_eq!(
        fake.calls(),
        ["group {", "send 1: 5 of kind 7 at 100 to 1 in 9", "recv 1: 6 of kind 7 at 200 from 3 in 9", "}"]
    );
    assert_eq!(fake.at_work.load(Ordering::SeqCst), 0, "the group was polled until it was taken");
    made.all_reduce(floats(1, 8), floats(2, 8), 9, &nobody).unwrap();
    assert!(matches!(made.all_reduce(floats(1, 8), floats(2, 9), 9, &nobody), Err(Error::Usage(_))));
}

#[test]
fn a_group_is_ended_whatever_happens_in_it() {
    let (fake, (watchdog, _)) = (Fake::new(), watchdog(PATIENCE));
    let made = meet(&fake, &watchdog, 0).unwrap();
    fake.calls();
    fake.send.store(4, Ordering::SeqCst);
    let error = made.group(9, &nobody, |group| group.send(floats(1, 1), 1)).unwrap_err();
    assert_eq!(error, Error::Call { call: "ncclSend", code: 4, text: "words for 4".to_owned() });
    let error = made.group(9, &nobody, |group| group.recv(floats(1, 1), 4)).unwrap_err();
    assert_eq!(error.to_string(), "rank 4 of 4 ranks");
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = made.group(9, &nobody, |_| panic!("in the middle"));
    }));
    assert!(panic.is_err());
    let calls = fake.calls();
    let count = |what: &str| calls.iter().filter(|call| *call == what).count();
    assert_eq!((count("group {"), count("}")), (3, 3), "{calls:?}");
    // The lock was let go: it can be aborted still.
    watchdog.abort_all("enough");
    assert!(watchdog.settle(PATIENCE));
    assert!(fake.calls().contains(&"abort 1".to_owned()));
}

#[test]
fn a_peer_that_is_gone_is_an_error_in_words() {
    let (fake, (watchdog, _)) = (Fake::new(), watchdog(PATIENCE));
    let made = meet(&fake, &watchdog, 0).unwrap();
    fake.state.store(6, Ordering::SeqCst);
    let error = made.group(9, &nobody, |group| group.send(floats(1, 1), 1)).unwrap_err();
    assert_eq!(error, Error::Broken { code: 6, text: "words for 6".to_owned() });
}

#[test]
fn all_are_aborted_within_one_group_and_each_once() {
    let (fake, (watchdog, stuck)) = (Fake::new(), watchdog(PATIENCE));
    let (a, b) = (meet(&fake, &watchdog, 0).unwrap(), meet(&fake, &watchdog, 1).unwrap());
    fake.calls();
    watchdog.abort_all("worker 3 is gone");
    let aborted = Error::Aborted { reason: "worker 3 is gone".to_owned() };
    // At once, whatever the watchdog's thread is at.
    assert_eq!((a.state(), b.state()), (Err(aborted.clone()), Err(aborted.clone())));
    assert_eq!(a.group(9, &nobody, |_| Ok(())), Err(aborted));
    watchdog.abort_all("again");
    drop((a, b));
    assert!(watchdog.settle(PATIENCE));
    assert_eq!(fake.calls(), ["group {", "abort 1", "abort 2", "}"]);
    assert!(stuck.try_recv().is_err());
}

/// Another thread aborts who waits for a call that never is through.
#[test]
fn an_abort_ends_a_wait() {
    let (fake, (watchdog, _)) = (Fake::new(), watchdog(PATIENCE));
    let made = meet(&fake, &watchdog, 0).unwrap();
    fake.at_work.store(usize::MAX, Ordering::SeqCst);
    let error = std::thread::scope(|scope| {
        let waits = scope.spawn(|| made.group(9, &nobody, |group| group.send(floats(1, 1), 1)));
        watchdog.abort_all("a peer is frozen");
        waits.join().unwrap().unwrap_err()
    });
    assert_eq!(error, Error::Aborted { reason: "a peer is frozen".to_owned() });
}

#[test]
fn a_stuck_abort_is_told_and_drops_do_not_wait_for_it() {
    let (fake, (watchdog, stuck)) = (Fake::new(), watchdog(Duration::from_millis(20)));
    let (a, b) = (meet(&fake, &watchdog, 0).unwrap(), meet(&fake, &watchdog, 1).unwrap());
    fake.set_stuck(true);
    // These return although no abort does.
    drop(a);
    watchdog.abort_all("over");
    drop(b);
    let told = stuck.recv_timeout(PATIENCE).unwrap();
    assert_eq!(told, "the abort of 1 communicators of NCCL takes longer than 20 ms");
    fake.set_stuck(false);
}

#[test]
fn a_real_nccl_that_is_there_is_loaded() {
    let Ok(path) = std::env::var("ANELLO_NCCL") else {
        eprintln!("SKIPPED: ANELLO_NCCL names no libnccl.so.2");
        return;
    };
    let library = Library::load(std::path::Path::new(&path)).unwrap();
    assert!(library.version() >= Version(22_203));
    assert_ne!(library.unique_id().unwrap(), library.unique_id().unwrap());
}

#[test]
fn a_library_that_is_not_there_is_named() {
    let missing = Library::load(std::path::Path::new("/nowhere/libnccl.so.2")).unwrap_err().to_string();
    assert!(missing.starts_with("/nowhere/libnccl.so.2: ") && missing.contains("No such file"), "{missing}");
}

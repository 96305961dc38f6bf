//! Writing a worker's parts of checkpoints, in the background.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anello_proto::ring::{Generation, Step, Written};
use anello_store::Store;
use anello_store::checkpoint::Parts;

use crate::checkpoint::{self, Snapshot};
use crate::error::{Error, Result};

/// Pauses between two attempts, from the first to the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Attempts before a checkpoint is given up for the next one.
const ATTEMPTS: u32 = 6;

/// The thread that writes. It has one snapshot at a time.
pub(super) struct PartsWriter {
    snapshots: Option<SyncSender<(Snapshot, Generation)>>,
    done: Receiver<()>,
    writing: bool,
    thread: Option<JoinHandle<()>>,
}

impl PartsWriter {
    /// `tell` hears of every checkpoint whose parts of this worker are durable.
    pub fn start(store: Store, part_bytes: u64, tell: impl Fn(Written) + Send + 'static) -> Result<Self> {
        let (snapshots, inbox) = sync_channel::<(Snapshot, Generation)>(1);
        let (finished, done) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("parts".to_owned())
            .spawn(move || {
                for (snapshot, generation) in inbox {
                    if let Some(written) = write(&store, part_bytes, &snapshot, generation) {
                        tell(written);
                    }
                    if finished.send(()).is_err() {
                        return;
                    }
                }
            })
            .map_err(|source| Error::System { action: "starting the parts thread", source })?;
        Ok(Self { snapshots: Some(snapshots), done, writing: false, thread: Some(thread) })
    }

    /// Hands over a snapshot, after the one before is written or given up.
    pub fn write(&mut self, snapshot: Snapshot, generation: Generation) {
        self.wait();
        let snapshots = self.snapshots.as_ref().expect("dropped with the writer");
        self.writing = snapshots.send((snapshot, generation)).is_ok();
    }

    /// Waits until nothing is being written.
    pub fn wait(&mut self) {
        if std::mem::take(&mut self.writing) {
            let _ = self.done.recv();
        }
    }
}

impl Drop for PartsWriter {
    fn drop(&mut self) {
        self.wait();
        self.snapshots = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn write(store: &Store, part_bytes: u64, snapshot: &Snapshot, generation: Generation) -> Option<Written> {
    let step = snapshot.facts.position.step;
    let mut pause = PAUSE.0;
    for attempt in 1..=ATTEMPTS {
        match checkpoint::write(store, snapshot, part_bytes, generation.0) {
            Ok(written) => {
                let parts = Parts { facts: snapshot.facts.clone(), written };
                let parts = serde_json::to_string(&parts).expect("maps have string keys");
                let facts = snapshot.facts.digest();
                return Some(Written { step: Step(step), generation, parts, facts });
            }
            Err(cause) => {
                tracing::warn!(step, attempt, %cause, "parts of a checkpoint cannot be written now");
                std::thread::sleep(pause);
                pause = (pause * 2).min(PAUSE.1);
            }
        }
    }
    None
}

//! Writing a worker's parts of checkpoints, in the background.
//!
//! A worker copies the blocks that it owns and those of the member after it, and keeps the second copy until the
//! checkpoint is committed: when that member dies first, the coordinator asks this one to write them, whether it is in a
//! ring or not. So a death costs no checkpoint. While nobody commits, for the coordinator is away, copies pile up: the
//! oldest then go to the store, and not out of memory alone, so that a death meanwhile costs none either.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

use anello_member::Event;
use anello_proto::ring::{Generation, Kept as KeptBlocks, Step, Unwritten, WorkerId, Written};
use anello_store::Store;
use anello_store::checkpoint::{Parts, Stamp, Written as WrittenPart};

use crate::checkpoint::{self, Snapshot};
use crate::error::{Error, Result};

/// A worker's copy of a state that a checkpoint is to be made of.
pub(super) struct Copy {
    pub generation: Generation,
    /// Blocks of the whole state.
    pub all_blocks: u64,
    /// The blocks that this worker owns.
    pub own: Snapshot,
    /// The member after this one, and the blocks that it owns; absent in a ring of one.
    pub next: Option<(WorkerId, Snapshot)>,
}

/// What the thread is told.
pub(super) enum Told {
    /// Write this, and keep the second copy.
    Write(Box<Copy>),
    /// Write the second copy that is kept for this checkpoint.
    WriteKept(Step, Generation),
    /// The checkpoint of this step is committed.
    Committed(Step),
}

/// Pauses between two attempts, from the first to the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Attempts before a checkpoint is given up for the next one.
const ATTEMPTS: u32 = 6;
/// Second copies that are kept: of a checkpoint that is being committed, and of the one after it.
const KEPT_MAX: usize = 2;

/// The thread that writes. It has one copy to write at a time.
pub(super) struct PartsWriter {
    told: Sender<Told>,
    done: Receiver<()>,
    writing: bool,
}

/// What [`PartsWriter::start`] listens to, besides its own handle.
pub(super) fn inbox() -> (Sender<Told>, Receiver<Told>) {
    channel()
}

impl PartsWriter {
    /// `tell` hears of every checkpoint whose parts of this worker are durable, again when there are more of them, of those
    /// that are given up, and when a copy that is asked for is not there.
    pub fn start(
        store: Store,
        part_bytes: u64,
        (told, inbox): (Sender<Told>, Receiver<Told>),
        tell: impl Fn(Event) + Send + 'static,
    ) -> Result<Self> {
        let (finished, done) = sync_channel(1);
        let mut desk = Desk { store, part_bytes, tell, finished, kept: Vec::new() };
        // The shell has a handle on it too, so that it is not waited for: it ends with the process.
        std::thread::Builder::new()
            .name("parts".to_owned())
            .spawn(move || {
                for told in inbox {
                    desk.take(told);
                }
            })
            .map_err(|source| Error::System { action: "starting the parts thread", source })?;
        Ok(Self { told, done, writing: false })
    }

    /// Hands over a copy, after the one before is written or given up.
    pub fn write(&mut self, copy: Copy) {
        self.wait();
        self.writing = self.told.send(Told::Write(Box::new(copy))).is_ok();
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
    }
}

/// A checkpoint of which this worker holds a second copy of another's blocks.
struct Kept {
    step: Step,
    generation: Generation,
    all_blocks: u64,
    own: Vec<WrittenPart>,
    own_blocks: std::ops::Range<u64>,
    next: (WorkerId, Snapshot),
}

struct Desk<F> {
    store: Store,
    part_bytes: u64,
    tell: F,
    finished: SyncSender<()>,
    kept: Vec<Kept>,
}

fn blocks(snapshot: &Snapshot) -> std::ops::Range<u64> {
    let blocks = snapshot.blocks();
    blocks.start as u64..blocks.end as u64
}

impl<F: Fn(Event)> Desk<F> {
    fn take(&mut self, told: Told) {
        match told {
            Told::Write(copy) => {
                self.write(*copy);
                let _ = self.finished.try_send(());
            }
            Told::WriteKept(step, generation) => {
                let asked = |kept: &Kept| (kept.step, kept.generation) == (step, generation);
                match self.kept.iter().position(asked) {
                    Some(at) => {
                        let kept = self.kept.remove(at);
                        tracing::info!(%step, worker = %kept.next.0, "writing the parts of a member that is gone");
                        self.write_second(kept);
                    }
                    None => (self.tell)(Event::LetGo { step, generation }),
                }
            }
            Told::Committed(step) => self.kept.retain(|kept| kept.step != step),
        }
    }

    fn write(&mut self, copy: Copy) {
        let Copy { generation, all_blocks, own, next } = copy;
        let step = Step(own.facts.position.step);
        let written = match self.write_parts(&own, Stamp::from(generation.0)) {
            Ok(written) => written,
            Err(reason) => return (self.tell)(Event::Unwritten(Unwritten { step, generation, reason })),
        };
        let own_blocks = blocks(&own);
        let kept = next.as_ref().map(|(owner, copy)| KeptBlocks { owner: *owner, blocks: blocks(copy) });
        let told =
            Written { kept, ..told(&own, generation, all_blocks, written.clone(), vec![own_blocks.clone()]) };
        (self.tell)(Event::Wrote(told));
        if let Some(next) = next {
            self.kept.push(Kept { step, generation, all_blocks, own: written, own_blocks, next });
            if self.kept.len() > KEPT_MAX {
                let oldest = self.kept.remove(0);
                self.write_second(oldest);
            }
        }
    }

    /// Writes a second copy, or gives it up: it is kept no longer. The next member may write the same blocks, and not the same
    /// bytes where nobody compares replicas: so they are other objects.
    fn write_second(&self, kept: Kept) {
        let Kept { step, generation, all_blocks, mut own, own_blocks, next: (_, snapshot) } = kept;
        let mut written = vec![own_blocks];
        let second = self.write_parts(&snapshot, Stamp { number: generation.0, second: true });
        let failed = second.map(|parts| {
            own.extend(parts);
            written.push(blocks(&snapshot));
        });
        (self.tell)(Event::Wrote(told(&snapshot, generation, all_blocks, own, written)));
        if let Err(reason) = failed {
            (self.tell)(Event::Unwritten(Unwritten { step, generation, reason }));
        }
    }

    /// Writes parts, with some patience. Of those that are given up, the last error is told.
    fn write_parts(
        &self,
        snapshot: &Snapshot,
        stamp: Stamp,
    ) -> std::result::Result<Vec<WrittenPart>, String> {
        let step = snapshot.facts.position.step;
        let (mut pause, mut attempt) = (PAUSE.0, 1);
        loop {
            match checkpoint::write(&self.store, snapshot, self.part_bytes, stamp) {
                Ok(written) => return Ok(written),
                Err(cause) if attempt == ATTEMPTS => {
                    tracing::warn!(step, attempt, %cause, "parts of a checkpoint are given up");
                    return Err(cause.to_string());
                }
                Err(cause) => {
                    tracing::warn!(step, attempt, %cause, "parts of a checkpoint cannot be written now");
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(PAUSE.1);
                    attempt += 1;
                }
            }
        }
    }
}

/// What is said of parts that are durable; no second copy is kept.
fn told(
    snapshot: &Snapshot,
    generation: Generation,
    all_blocks: u64,
    written: Vec<WrittenPart>,
    blocks: Vec<std::ops::Range<u64>>,
) -> Written {
    let (step, facts) = (Step(snapshot.facts.position.step), snapshot.facts.digest());
    let parts = Parts { facts: snapshot.facts.clone(), written };
    let parts = serde_json::to_string(&parts).expect("maps have string keys");
    Written { step, generation, parts, facts, blocks, all_blocks, kept: None }
}

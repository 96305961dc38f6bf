//! The sum over workers by NCCL: blocks go from GPU to GPU, and the owner adds them there along the tree over lanes.
//!
//! ```text
//! compute stream   … backward: layer L whole ┬ layer L−1 whole ┬ …                             ┬ update
//! stream of sums        send, receive, add ──┴─ send, receive, add ──┴─ … ─ own blocks to all ─┘
//! TCP                                      words ─ all are alive and have sent ─┘
//! ```
//! All members walk the blocks in the same order ([`Layout::backward_blocks`]), so their groups of sends and receives
//! meet. Additions are those of `tcp`, in fp32 and in its order, so the bits are too. Words, the rendezvous and the news of
//! a death stay with TCP, whose sockets break when a process does. Who waits for a GPU looks at the abort handle and at
//! NCCL meanwhile: a peer that is gone ends in an abort, by its socket or by the coordinator, and never in a wait. NCCL
//! has no checksums: a bit that flips between two GPUs is found by the digests of replicas alone.
//!
//! [`Layout::backward_blocks`]: crate::params::Layout::backward_blocks

pub mod speed;

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anello_collective::{AbortHandle, Collective, Error as RingError, Rank, Ring, Step};
use nccl_rs::{Communicator, Error as NcclError, Group, InitOptions, Library, UniqueId, Watchdog};
use tch::{Device, Kind, Tensor};

use super::sum::Words;
use crate::cover::both;
use crate::engine::Growing;
use crate::ffi;
use crate::ffi::torch::{Event, Stream, Thrown};
use crate::objective::LossSums;
use crate::params::BLOCK;

/// Time that an abort may take before the process ends.
const GRACE: Duration = Duration::from_secs(30);
/// Time for all members to make their communicator: they have met over TCP already.
const MEET: Duration = Duration::from_secs(120);
/// Pause between two looks at the GPU.
const POLL: Duration = Duration::from_micros(50);

/// What a process has of NCCL: made once.
#[derive(Debug)]
pub(super) struct Nccl {
    library: Library,
    watchdog: Watchdog,
}

impl Nccl {
    /// Loads `path`, a `libnccl.so.2`.
    ///
    /// # Errors
    /// No such library, or one that is refused.
    pub fn load(path: &Path) -> Result<Self, NcclError> {
        Ok(Self::of(Library::load(path)?, Watchdog::that_ends_the_process(GRACE)?))
    }

    /// With a watchdog of the caller's.
    pub fn of(library: Library, watchdog: Watchdog) -> Self {
        Self { library, watchdog }
    }

    /// Its version, in words.
    pub fn version(&self) -> String {
        format!("NCCL {}", self.library.version())
    }

    /// The GPUs of all members of `ring`, which have met and call this together. `order` is that in which blocks become
    /// whole in a step; `abort` ends every wait.
    ///
    /// # Errors
    /// Those of the ring; [`RingError::Dead`] by what NCCL says.
    pub fn meet(
        &self,
        ring: &mut dyn Collective,
        step: Step,
        order: Vec<Range<usize>>,
        device: Device,
    ) -> Result<Gpus, RingError> {
        let (rank, members) = (ring.ring().rank(), ring.ring().members() as u32);
        // Only the first makes one; what goes wrong there is for all to know.
        let made = (rank.index() == 0).then(|| self.library.unique_id());
        let said = made.map_or(Vec::new(), |made| made.map_or(Vec::new(), |id| id.0.to_vec()));
        let said = ring.exchange(step, &said)?.swap_remove(0);
        let id: [u8; 128] = said.try_into().map_err(|_| RingError::Dead {
            cause: "NCCL of the first member makes no id: look at its network interfaces".to_owned(),
        })?;
        let abort = ring.abort_handle();
        let stop = || abort.reason().map(str::to_owned);
        let options = InitOptions { deadline: MEET, stop: &stop };
        let met = Communicator::meet(&self.library, &self.watchdog, &UniqueId(id), members, rank.0, &options);
        let communicator = met.map_err(dead)?;
        let own = ring.ring().elements(rank).len() as i64;
        let places = |other: Rank| {
            let parts = if other == rank { &[] } else { ring.ring().parts(other) };
            parts.iter().map(|_| Tensor::zeros([own], (Kind::Float, device))).collect()
        };
        Ok(Gpus {
            communicator,
            watchdog: self.watchdog.clone(),
            sums: Stream::new(device).map_err(thrown)?,
            received: (0..members).map(Rank).map(places).collect(),
            order,
            device,
            abort,
            sent_bytes: 0,
        })
    }
}

/// The GPUs of one generation, in the hands of one member. After an error they are of no use, and nothing of this
/// generation runs on them any more.
#[derive(Debug)]
pub(super) struct Gpus {
    communicator: Communicator,
    watchdog: Watchdog,
    /// Where blocks are sent, received and added.
    sums: Stream,
    /// By rank and part: what others have of the blocks that we own; laid as those are.
    received: Vec<Vec<Tensor>>,
    order: Vec<Range<usize>>,
    device: Device,
    abort: AbortHandle,
    sent_bytes: u64,
}

impl Gpus {
    /// Adds up the partial sums of all members into `total`, flat on our device, as [`add_up`](super::sum::add_up) does. The
    /// partial sums that `compute` tells of stay as they are until this returns.
    ///
    /// Returns what `compute` does, and everyone's words.
    pub fn add_up<T>(
        &mut self,
        ring: &mut dyn Collective,
        step: Step,
        total: &Tensor,
        word: impl FnOnce(Vec<(u32, u32, LossSums)>) -> Vec<u8>,
        compute: impl FnOnce(&mut dyn FnMut(Growing<'_>)) -> T,
    ) -> (T, Result<Words, RingError>) {
        let order: Vec<_> = self.order.iter().filter(|blocks| !blocks.is_empty()).cloned().collect();
        let (mut missing, mut reduced) = (order.iter(), Ok(()));
        let (mut word, mut said, mut partials) = (Some(word), None, Vec::new());
        let computed = compute(&mut |growing| match growing {
            Growing::Sums(sums, buffers) => {
                said = word.take().map(|word| word(sums));
                partials = buffers;
            }
            Growing::Whole(blocks) if reduced.is_ok() => {
                assert_eq!(missing.next(), Some(&blocks), "blocks become whole in the order of the layout");
                reduced = self.reduce(ring.ring(), &partials, total, &blocks);
            }
            Growing::Whole(_) | Growing::Lane(_) => {}
        });
        let _span = tracing::trace_span!("wait for the sum").entered();
        let said = said.or_else(|| word.take().map(|word| word(Vec::new()))).unwrap_or_default();
        // Who serves no lanes was told of no blocks: it only receives and adds.
        for blocks in missing {
            reduced = reduced.and_then(|()| self.reduce(ring.ring(), &partials, total, blocks));
        }
        let summed = reduced.and_then(|()| {
            let words = ring.exchange(step, &said)?;
            self.gather(ring.ring(), total).map(|()| words)
        });
        (computed, self.ended_by(summed))
    }

    /// Gives what lies in own blocks of `total` to all, and takes theirs. Who has them all knows that every member has
    /// made the step ready.
    ///
    /// # Errors
    /// Those of the ring; [`RingError::Dead`] by what NCCL says.
    pub fn spread(&mut self, ring: &mut dyn Collective, step: Step, total: &Tensor) -> Result<(), RingError> {
        let _span = tracing::trace_span!("all-gather of weights").entered();
        // A member that owns nothing sends nothing either.
        let spread = ring.exchange(step, &[]).and_then(|_| self.gather(ring.ring(), total));
        self.ended_by(spread)
    }

    /// Bytes that were sent to the other members so far.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Sends these blocks of `partials` to their owners, and adds those that we own, once the current stream is through
    /// with what it has.
    fn reduce(
        &mut self,
        ring: &Ring,
        partials: &[Tensor],
        total: &Tensor,
        blocks: &Range<usize>,
    ) -> Result<(), RingError> {
        let rank = ring.rank();
        self.after_what_is_computed()?;
        let (owned, first) = (ring.blocks(rank), ring.blocks(rank).start);
        let own = both(&owned, blocks);
        let sent = self.group(|group| {
            let mut sent = 0;
            for other in others(ring) {
                let theirs = both(&ring.blocks(other), blocks);
                if !theirs.is_empty() {
                    for part in partials {
                        group.send(ffi::for_nccl(&cut(part, &theirs, 0)), other.0)?;
                        sent += bytes(&theirs);
                    }
                }
                if !own.is_empty() {
                    for place in &self.received[other.index()] {
                        group.recv(ffi::for_nccl(&cut(place, &own, first)), other.0)?;
                    }
                }
            }
            Ok(sent)
        })?;
        self.sent_bytes += sent;
        if own.is_empty() {
            return Ok(());
        }
        let part = |of: Rank, part: usize| match of == rank {
            true => cut(&partials[part], &own, 0),
            false => cut(&self.received[of.index()][part], &own, first),
        };
        let added = self.sums.scope(|| {
            cut(total, &own, 0).copy_(&ring.fold(part, |left, right| left + right));
        });
        added.map_err(thrown)
    }

    /// Gives own blocks of `total` to all, takes theirs, and returns once they are here.
    fn gather(&mut self, ring: &Ring, total: &Tensor) -> Result<(), RingError> {
        let rank = ring.rank();
        self.after_what_is_computed()?;
        let sent = self.group(|group| {
            let mut sent = 0;
            for (blocks, other) in
                self.order.iter().flat_map(|blocks| others(ring).map(move |other| (blocks, other)))
            {
                let (own, theirs) = (both(&ring.blocks(rank), blocks), both(&ring.blocks(other), blocks));
                if !own.is_empty() {
                    group.send(ffi::for_nccl(&cut(total, &own, 0)), other.0)?;
                    sent += bytes(&own);
                }
                if !theirs.is_empty() {
                    group.recv(ffi::for_nccl(&cut(total, &theirs, 0)), other.0)?;
                }
            }
            Ok(sent)
        })?;
        self.sent_bytes += sent;
        let here = self.sums.record().map_err(thrown)?;
        self.wait(&here)?;
        Stream::current(self.device).and_then(|compute| compute.wait(&here)).map_err(thrown)
    }

    /// NCCL's own sum of `from` over all members into `to`, for measurements; returns once it is here.
    fn all_reduce(&self, from: &Tensor, to: &Tensor) -> Result<(), RingError> {
        self.after_what_is_computed()?;
        let stop = || self.abort.reason().map(str::to_owned);
        let (from, to, stream) =
            (ffi::for_nccl(from), ffi::for_nccl(to), self.sums.native().map_err(thrown)?);
        self.communicator.all_reduce(from, to, stream, &stop).map_err(dead)?;
        let here = self.sums.record().map_err(thrown)?;
        self.wait(&here)
    }

    /// What is put into the stream of sums from now on begins when the current stream is through with what it has.
    fn after_what_is_computed(&self) -> Result<(), RingError> {
        let computed = Stream::current(self.device).and_then(Stream::record);
        computed.and_then(|computed| self.sums.wait(&computed)).map_err(thrown)
    }

    /// Puts what `calls` sends and receives into the stream of sums; returns what it does.
    fn group(&self, calls: impl FnOnce(&mut Group<'_>) -> nccl_rs::Result<u64>) -> Result<u64, RingError> {
        let stop = || self.abort.reason().map(str::to_owned);
        let (stream, mut sent) = (self.sums.native().map_err(thrown)?, 0);
        let grouped = self.communicator.group(stream, &stop, |group| {
            sent = calls(group)?;
            Ok(())
        });
        grouped.map(|()| sent).map_err(dead)
    }

    /// Waits until the stream of sums is past `event`, or the ring is broken.
    fn wait(&self, event: &Event) -> Result<(), RingError> {
        while !event.is_done().map_err(thrown)? {
            self.communicator.state().map_err(dead)?;
            if let Some(reason) = self.abort.reason() {
                return Err(RingError::Aborted { reason: reason.to_owned() });
            }
            std::thread::sleep(POLL);
        }
        // The stream is past what was aborted, too.
        self.communicator.state().map(drop).map_err(dead)
    }

    fn ended_by<T>(&self, result: Result<T, RingError>) -> Result<T, RingError> {
        if let Err(error) = &result {
            self.end(&error.to_string());
        }
        result
    }

    /// Aborts, and returns when no kernel of NCCL uses memory of ours any more.
    fn end(&self, reason: &str) {
        self.watchdog.abort_all(reason);
        // Longer than the watchdog gives an abort before it ends the process.
        self.watchdog.settle(GRACE * 2);
        let _ = self.sums.synchronize();
    }
}

impl Drop for Gpus {
    fn drop(&mut self) {
        self.end("the generation is over");
    }
}

fn others(ring: &Ring) -> impl Iterator<Item = Rank> + use<> {
    let own = ring.rank();
    (0..ring.members() as u32).map(Rank).filter(move |other| *other != own)
}

fn bytes(blocks: &Range<usize>) -> u64 {
    (blocks.len() * BLOCK * size_of::<f32>()) as u64
}

/// These blocks of a buffer that begins with block `first`.
fn cut(flat: &Tensor, blocks: &Range<usize>, first: usize) -> Tensor {
    flat.narrow(0, ((blocks.start - first) * BLOCK) as i64, (blocks.len() * BLOCK) as i64)
}

fn dead(error: NcclError) -> RingError {
    match error {
        NcclError::Aborted { reason } => RingError::Aborted { reason },
        other => RingError::Dead { cause: other.to_string() },
    }
}

fn thrown(error: Thrown) -> RingError {
    RingError::Dead { cause: error.to_string() }
}

#[cfg(test)]
mod tests;

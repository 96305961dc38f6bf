//! The sum over workers, under way while this worker still computes.
//!
//! ```text
//! this thread    … last lane: forward ┬ losses ┬ layer L ┬ … ┬ layer 1 ┬ embedding ┐ join   all-gather ▶ update
//!                                     ▼        ▼         ▼   ▼         ▼           │
//! "reduce"                       begins, sends and adds the blocks that are whole ─┘
//! ```

use std::ops::Range;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use anello_collective::{Collective, Error as RingError, Partials, Step};
use tch::{Device, Kind, Tensor};

use crate::engine::Growing;
use crate::ffi::torch::{self, Event};
use crate::ffi::{self, Shared};
use crate::host::{Beside, FAILED};
use crate::objective::LossSums;
use crate::params::BLOCK;

/// How long the mover sleeps when no socket moves, before it looks whether more blocks are whole.
const PATIENCE: Duration = Duration::from_millis(1);

/// The same while blocks are on their way from a GPU.
const COPYING: Duration = Duration::from_micros(50);

/// Everyone's words, in the order of ranks.
pub(super) type Words = Vec<Vec<u8>>;

/// Where the sum of all workers lands: a flat buffer on the engine's device, and, where that is a GPU, memory of the host on
/// the way between it and the ring.
///
/// ```text
/// GPU   partial sums ─ own stream ─▶ pinned copies         pinned sum ──▶ total
///                                        └──▶ ring: sum ──────▲
/// ```
#[derive(Debug)]
pub struct Total {
    values: Tensor,
    staging: Option<Staging>,
}

impl Total {
    /// A total of `len` elements for an engine on `device`, added up by a ring on the host.
    ///
    /// # Panics
    /// When the device or the host has no memory for it.
    pub fn new(len: usize, device: Device) -> Self {
        let staging = (device != Device::Cpu).then(|| Staging::new(len, device));
        Self { staging, ..Self::on_device(len, device) }
    }

    /// The same, added up where it lies.
    ///
    /// # Panics
    /// When the device has no memory for it.
    pub fn on_device(len: usize, device: Device) -> Self {
        Self { values: Tensor::zeros([len as i64], (Kind::Float, device)), staging: None }
    }

    /// Gives what lies in own blocks to all, and takes theirs: the new weights, where the moments are shared out. Who has them
    /// all knows that every member has made the step ready: whatever comes now, it can be gone on from.
    pub(super) fn spread(&mut self, ring: &mut dyn Collective, step: Step) -> Result<(), RingError> {
        let _span = tracing::trace_span!("all-gather of weights").entered();
        let Some(staging) = &mut self.staging else {
            return ring.all_gather(step, ffi::as_mut_slice(&mut self.values));
        };
        staging.total.copy_(&self.values);
        ring.all_gather(step, ffi::as_mut_slice(&mut staging.total))?;
        self.values.copy_(&staging.total);
        Ok(())
    }

    /// The sum, once [`add_up`] has made it: flat, on the engine's device.
    pub fn values(&self) -> &Tensor {
        &self.values
    }
}

/// Copies on the host of a GPU's partial sums, made on a stream of their own beside the backward.
#[derive(Debug)]
struct Staging {
    copies: Beside,
    /// Pinned: one for each partial sum, as many as a step has needed.
    parts: Vec<Tensor>,
    /// Pinned: the sum.
    total: Tensor,
}

impl Staging {
    fn new(len: usize, device: Device) -> Self {
        let total = torch::pinned(len).expect(FAILED).zero_();
        Self { copies: Beside::of(device), parts: Vec::new(), total }
    }

    /// Memory for copies of `buffers`.
    fn for_parts(&mut self, buffers: &[Tensor]) -> Vec<Tensor> {
        while self.parts.len() < buffers.len() {
            self.parts.push(torch::pinned(self.total.numel()).expect(FAILED).zero_());
        }
        self.parts.iter().take(buffers.len()).map(Tensor::shallow_clone).collect()
    }

    /// Copies these blocks of `buffers` once the current stream is through with them; the event is that they are here.
    fn copy(&self, buffers: &[Tensor], blocks: &Range<usize>) -> Event {
        let (start, len) = ((blocks.start * BLOCK) as i64, (blocks.len() * BLOCK) as i64);
        let pairs = buffers.iter().zip(&self.parts);
        let cut = pairs.map(|(from, to)| [from, to].map(|flat| flat.narrow(0, start, len)));
        self.copies.start(cut.map(|[from, to]| (from, to)))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // A ring that broke may have left copies under way into memory that goes now.
        self.copies.finish();
    }
}

/// Blocks that are whole: at once, or when their copies are on the host.
type Whole = (Range<usize>, Option<Event>);

/// Adds up the partial sums of all members into `total`. `compute` yields ours and tells of what is whole on the way; it
/// tells of none when this worker serves no lanes. `word` makes this worker's word from its loss sums.
///
/// Returns what `compute` does, and everyone's words; an error of the ring is known when `compute` is through.
pub fn add_up<T>(
    ring: &mut dyn Collective,
    step: Step,
    total: &mut Total,
    word: impl FnOnce(Vec<(u32, u32, LossSums)>) -> Vec<u8>,
    compute: impl FnOnce(&mut dyn FnMut(Growing<'_>)) -> T,
) -> (T, Result<Words, RingError>) {
    let Total { values, staging } = total;
    let Some(staging) = staging else {
        let staged = |buffers: Vec<Tensor>| (buffers, None);
        return add_up_on_host(ring, step, ffi::as_mut_slice(values), word, compute, staged);
    };
    let mut sum = staging.total.shallow_clone();
    let (computed, words) =
        add_up_on_host(ring, step, ffi::as_mut_slice(&mut sum), word, compute, |buffers| {
            (staging.for_parts(&buffers), Some((&*staging, buffers)))
        });
    values.copy_(&sum);
    (computed, words)
}

/// [`add_up`] in memory of the host. `staged` says where the partial sums are read, and what copies them there.
fn add_up_on_host<'s, T>(
    ring: &mut dyn Collective,
    step: Step,
    total: &mut [f32],
    word: impl FnOnce(Vec<(u32, u32, LossSums)>) -> Vec<u8>,
    compute: impl FnOnce(&mut dyn FnMut(Growing<'_>)) -> T,
    staged: impl FnOnce(Vec<Tensor>) -> (Vec<Tensor>, Option<(&'s Staging, Vec<Tensor>)>),
) -> (T, Result<Words, RingError>) {
    let own = ring.ring().elements(ring.ring().rank());
    let (computed, words) = std::thread::scope(|scope| {
        let (tell, told) = channel();
        let mut idle = Some((&mut *ring, &mut total[own], told, word, staged));
        let (mut mover, mut copying) = (None, None);
        let computed = compute(&mut |growing| match growing {
            Growing::Sums(sums, buffers) => {
                let (ring, out, told, word, staged) = idle.take().expect("the sums are told once");
                let (buffers, from) = staged(buffers);
                copying = from;
                let (word, partials) = (word(sums), Shared::new(buffers));
                let reduce = move || move_blocks(ring, step, &word, &partials, out, &told);
                mover =
                    Some(std::thread::Builder::new().name("reduce".to_owned()).spawn_scoped(scope, reduce));
            }
            Growing::Whole(blocks) => {
                let here = copying.as_ref().map(|(staging, buffers)| staging.copy(buffers, &blocks));
                // A mover that is gone says why when it is joined.
                drop(tell.send((blocks, here)));
            }
            Growing::Lane(_) => {}
        });
        let _span = tracing::trace_span!("wait for the sum").entered();
        let words = match (mover, idle) {
            (Some(Ok(mover)), _) => mover.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            (Some(Err(cause)), _) => {
                Err(RingError::System { action: "starting a thread", cause: cause.to_string() })
            }
            (None, Some((ring, out, _, word, _))) => {
                let reduction = ring.reduction(step, &word(Vec::new()));
                reduction.and_then(|reduction| reduction.finish(&Vec::<&[f32]>::new(), out))
            }
            (None, None) => unreachable!("who takes the ring starts the mover"),
        };
        (computed, words)
    });
    let _span = tracing::trace_span!("all-gather").entered();
    let gathered = words.and_then(|words| ring.all_gather(step, total).map(|()| words));
    (computed, gathered)
}

/// One reduction: `whole` says which blocks are ready, until all are. When it ends before, so does the ring.
fn move_blocks(
    ring: &mut dyn Collective,
    step: Step,
    word: &[u8],
    partials: &dyn Partials,
    out: &mut [f32],
    whole: &Receiver<Whole>,
) -> Result<Words, RingError> {
    let _span = tracing::trace_span!("reduce").entered();
    let mut missing = ring.ring().summed();
    let mut reduction = ring.reduction(step, word)?;
    while missing > 0 {
        match whole.try_recv() {
            Ok((blocks, here)) => {
                while here.as_ref().is_some_and(|copied| !copied.is_done().unwrap_or(true)) {
                    reduction.advance(0..0, partials, out, COPYING)?;
                }
                missing -= blocks.len();
                let _span = tracing::trace_span!("blocks", whole = blocks.len(), missing).entered();
                reduction.advance(blocks, partials, out, Duration::ZERO)?;
            }
            Err(TryRecvError::Empty) => reduction.advance(0..0, partials, out, PATIENCE)?,
            Err(TryRecvError::Disconnected) => {
                return Err(RingError::Dead { cause: format!("{missing} blocks were never computed") });
            }
        }
    }
    let _span = tracing::trace_span!("last blocks").entered();
    reduction.finish(partials, out)
}

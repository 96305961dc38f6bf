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
use tch::Tensor;

use crate::engine::Growing;
use crate::ffi::{self, Shared};
use crate::objective::LossSums;

/// How long the mover sleeps when no socket moves, before it looks whether more blocks are whole.
const PATIENCE: Duration = Duration::from_millis(1);

/// Everyone's words, in the order of ranks.
type Words = Vec<Vec<u8>>;

/// Adds up the partial sums of all members into `total`, the whole flat buffer. `compute` yields ours and tells of what
/// is whole on the way; it tells of none when this worker serves no lanes. `word` makes this worker's word from its loss
/// sums.
///
/// Returns what `compute` does, and everyone's words; an error of the ring is known when `compute` is through.
pub fn add_up<T>(
    ring: &mut dyn Collective,
    step: Step,
    total: &mut Tensor,
    word: impl FnOnce(Vec<(u32, u32, LossSums)>) -> Vec<u8>,
    compute: impl FnOnce(&mut dyn FnMut(Growing<'_>)) -> T,
) -> (T, Result<Words, RingError>) {
    let total = ffi::as_mut_slice(total);
    let own = ring.ring().elements(ring.ring().rank());
    let (computed, words) = std::thread::scope(|scope| {
        let (tell, told) = channel();
        let mut idle = Some((&mut *ring, &mut total[own], told, word));
        let mut mover = None;
        let computed = compute(&mut |growing| match growing {
            Growing::Sums(sums, buffers) => {
                let (ring, out, told, word) = idle.take().expect("the sums are told once");
                let (word, partials) = (word(sums), Shared::new(buffers));
                let reduce = move || move_blocks(ring, step, &word, &partials, out, &told);
                mover =
                    Some(std::thread::Builder::new().name("reduce".to_owned()).spawn_scoped(scope, reduce));
            }
            // A mover that is gone says why when it is joined.
            Growing::Whole(blocks) => drop(tell.send(blocks)),
            Growing::Lane(_) => {}
        });
        let _span = tracing::trace_span!("wait for the sum").entered();
        let words = match (mover, idle) {
            (Some(Ok(mover)), _) => mover.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            (Some(Err(cause)), _) => {
                Err(RingError::System { action: "starting a thread", cause: cause.to_string() })
            }
            (None, Some((ring, out, _, word))) => {
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
    whole: &Receiver<Range<usize>>,
) -> Result<Words, RingError> {
    let _span = tracing::trace_span!("reduce").entered();
    let mut missing = ring.ring().shape().blocks as usize;
    let mut reduction = ring.reduction(step, word)?;
    while missing > 0 {
        match whole.try_recv() {
            Ok(blocks) => {
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

//! Validation by a ring: every member measures its own lanes, the sums go to all, and all add them alike.

use std::ops::Range;

use anello_collective::{Collective, Error as RingError, Step as RingStep, tcp};
use anello_configs::StepPlan;
use anello_store::metrics::Evaluated;

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::evaluate::{Evaluation, Sums};
use crate::validate::{HeldOut, LaneSums, of_lanes};

/// Bytes of sums that go into one message, which may be longer.
const MESSAGE: usize = 64_000;

/// What the model is worth after the step of `plan`, whose lanes are served as `members` says, by rank. A ring that breaks
/// meanwhile loses no figure, since the step is applied: then all lanes are measured here, which are the same bits. The
/// second is why the ring must end. With `alone` false it measures nothing then.
pub(super) fn measure(
    held_out: &mut HeldOut,
    engine: &Engine,
    plan: &StepPlan<'_>,
    members: &[Range<u32>],
    alone: bool,
    ring: &mut tcp::Tcp,
) -> Result<(Vec<Evaluated>, Option<RingError>)> {
    let own = &members[ring.ring().rank().index()];
    let sums = held_out.lanes(engine, plan, own)?;
    match exchange(sums, plan, members, ring)? {
        Ok(evals) => Ok((evals, None)),
        Err(broken) if !alone => Ok((Vec::new(), Some(broken))),
        Err(broken) => Ok((held_out.measure(engine, plan)?, Some(broken))),
    }
}

fn exchange(
    sums: LaneSums,
    plan: &StepPlan<'_>,
    members: &[Range<u32>],
    ring: &mut tcp::Tcp,
) -> Result<std::result::Result<Vec<Evaluated>, RingError>> {
    let loops = plan.stage.loops as usize;
    let lane_bytes = 8 + loops * 24;
    // All send as many messages as the one with the most lanes.
    let lanes_a_message = (MESSAGE / lane_bytes).max(1);
    let most = members.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
    let mut evals = Vec::new();
    for (set, own) in sums {
        let mut of_rank: Vec<Vec<u8>> = vec![Vec::new(); members.len()];
        for from in (0..most).step_by(lanes_a_message) {
            let lanes = own.iter().skip(from).take(lanes_a_message);
            let message: Vec<u8> = lanes.flat_map(encode).collect();
            match ring.exchange(RingStep(plan.step), &message) {
                Ok(messages) => of_rank.iter_mut().zip(messages).for_each(|(have, more)| have.extend(more)),
                Err(broken) => return Ok(Err(broken)),
            }
        }
        let mut lanes = Vec::new();
        for (rank, (bytes, served)) in of_rank.iter().zip(members).enumerate() {
            if bytes.len() != served.len() * lane_bytes {
                let fact = format!("the held-out sums of rank {rank} are not those of lanes {served:?}");
                return Err(Error::Ring { fact });
            }
            lanes.extend(bytes.chunks(lane_bytes).map(|bytes| decode(bytes, loops)));
        }
        evals.push(of_lanes(set, &lanes));
    }
    Ok(Ok(evals))
}

/// Tokens that count, then loss, right tokens and exit mass of each loop step: 8 bytes each, little-endian.
fn encode(lane: &Evaluation) -> Vec<u8> {
    let per_loop = lane.steps.iter().zip(&lane.exit);
    let numbers = per_loop.flat_map(|(sums, exit)| [sums.loss.to_bits(), sums.correct, exit.to_bits()]);
    std::iter::once(lane.counted).chain(numbers).flat_map(u64::to_le_bytes).collect()
}

/// Of bytes of the right length.
fn decode(bytes: &[u8], loops: usize) -> Evaluation {
    let mut numbers = bytes.as_chunks().0.iter().map(|eight| u64::from_le_bytes(*eight));
    let mut next = || numbers.next().expect("the length was checked");
    let mut lane = Evaluation::new(0, &[]);
    lane.counted = next();
    for step in 1..=loops {
        let (loss, correct) = (f64::from_bits(next()), next());
        lane.exit.push(f64::from_bits(next()));
        // All tokens that count leave at a loop step that is not chosen.
        lane.steps.push(Sums { loss, correct, depth: lane.counted as f64 * step as f64 });
    }
    lane
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_the_same_bits_on_the_other_side() {
        let mut lane = Evaluation::new(2, &[]);
        lane.counted = 7;
        lane.exit = vec![0.1 + 0.2, 6.7];
        lane.steps[0] = Sums { loss: 51.3, correct: 2, depth: 7.0 };
        lane.steps[1] = Sums { loss: f64::from_bits(0x4049_0000_0000_0001), correct: 5, depth: 14.0 };
        let bytes = encode(&lane);
        assert_eq!((bytes.len(), decode(&bytes, 2)), (8 + 2 * 24, lane));
    }
}

//! A state that is copied from worker to worker while both train.
//!
//! A step changes every block of a state, but only by its update. So a block that a learner is sent before a step's update is
//! brought to the state after that step by the learner's own update, which takes part in every sum: nothing is replayed, and a
//! peer keeps no copy. What is not there yet is updated too, and means nothing until it is sent.
//!
//! ```text
//! peer      step s: forward, backward ▏sum▕ update ▏ step s+1: forward, backward ▏sum▕ update ▏
//!           blocks 0..k as of s  │                  │ blocks k..n as of s+1       │
//! learner   waits                ▼ ▏sum▕ update ▏   ▼  waits             ▏sum▕ update ▏ all of it, as of s+2
//! ```
//! A block says after how many steps it was read. One that comes after the learner's update of that step is asked for again; one
//! that was read after an update which the learner is still to make waits for that.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use anello_proto::ring::Step;
use tch::Tensor;

use crate::checkpoint::flat;
use crate::host;
use crate::optimizer::State;
use crate::params::BLOCK;

/// How often it is looked whether an update is over.
const POLL: Duration = Duration::from_millis(1);

/// A state whose blocks are read, or filled in, by other threads between a training thread's updates.
pub(super) struct Live {
    /// The training thread waits for the lock: nobody else takes it.
    updates: AtomicBool,
    /// Gradients are on their way: state lets them pass.
    sums: AtomicBool,
    now: Mutex<Now>,
    /// Blocks that were not sent yet.
    missing: AtomicUsize,
    /// Blocks of a buffer.
    blocks: usize,
}

struct Now {
    /// Steps applied.
    step: Step,
    /// Weights, first and second moments: whole, in the memory of the state that trains.
    buffers: [Tensor; 3],
    /// Blocks that were not sent yet.
    missing: BTreeSet<usize>,
}

/// What became of blocks that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Put {
    /// They are part of the state.
    Taken,
    /// They are those of a step whose update is still to be made.
    Early,
    /// They are those before an update that was made: they are to be asked for again.
    Late,
}

impl Live {
    /// Of a state after `step` that lacks all blocks of `missing`; panics when some moments are elsewhere.
    pub fn new(step: Step, state: &State, missing: Range<usize>) -> Self {
        assert!(state.cover.is_all(), "all moments are here");
        let buffers =
            [&state.weights, &state.exp_avg, &state.exp_avg_sq].map(|buffer| buffer.detach().shallow_clone());
        let count = AtomicUsize::new(missing.len());
        let now = Mutex::new(Now { step, buffers, missing: missing.collect() });
        let [updates, sums] = [false, false].map(AtomicBool::new);
        Self { updates, sums, now, missing: count, blocks: state.layout.blocks() }
    }

    /// The state as it is between two updates. Not for asynchronous code: it waits for an update.
    fn now(&self) -> MutexGuard<'_, Now> {
        while self.updates.load(Ordering::Relaxed) {
            std::thread::sleep(POLL);
        }
        self.now.lock().expect("no holder panics")
    }

    /// The first gradients of a step are sent: until its update they are what the ring waits for.
    pub fn begin_sum(&self) {
        self.sums.store(true, Ordering::Relaxed);
    }

    /// Whether gradients are on their way.
    pub fn is_in_sum(&self) -> bool {
        self.sums.load(Ordering::Relaxed)
    }

    /// Makes the update of a step, while nobody reads or fills in blocks.
    pub fn update<T>(&self, update: impl FnOnce() -> T) -> T {
        // The others hold the lock for the copy of some blocks, and are many: one that waits for its turn might wait long.
        self.updates.store(true, Ordering::Relaxed);
        let mut now = self.now.lock().expect("no holder panics");
        let done = update();
        now.step = Step(now.step.0 + 1);
        self.sums.store(false, Ordering::Relaxed);
        self.updates.store(false, Ordering::Relaxed);
        done
    }

    /// The blocks as they are now, little-endian: steps applied, weights, first and second moments. Absent: there are not so many.
    pub fn take(&self, blocks: Range<usize>) -> Option<(Step, [Vec<u8>; 3])> {
        let now = self.now();
        let is_there = blocks.start < blocks.end && blocks.end <= self.blocks;
        let is_whole = is_there && now.missing.range(blocks.clone()).next().is_none();
        is_whole
            .then(|| (now.step, now.buffers.each_ref().map(|buffer| host::copied(&part(buffer, &blocks)))))
    }

    /// Fills in blocks, from `first` on, that were read after `step`, if they are wanted.
    pub fn put(&self, step: Step, first: usize, buffers: &[Vec<u8>; 3]) -> Put {
        let mut now = self.now();
        if step > now.step {
            return Put::Early;
        }
        if step < now.step {
            return Put::Late;
        }
        let blocks = first..first + buffers[0].len() / (4 * BLOCK);
        for (buffer, bytes) in now.buffers.iter().zip(buffers) {
            part(buffer, &blocks).copy_(&flat(bytes, buffer.device()));
        }
        now.missing.retain(|block| !blocks.contains(block));
        self.missing.store(now.missing.len(), Ordering::Release);
        Put::Taken
    }

    /// Blocks that were not sent yet.
    pub fn missing(&self) -> usize {
        self.missing.load(Ordering::Acquire)
    }

    /// Blocks of a buffer.
    pub fn blocks(&self) -> usize {
        self.blocks
    }
}

/// Some blocks of a flat buffer.
fn part(flat: &Tensor, blocks: &Range<usize>) -> Tensor {
    flat.narrow(0, (blocks.start * BLOCK) as i64, (blocks.len() * BLOCK) as i64)
}

#[cfg(test)]
pub(super) mod tests {
    use anello_configs::Model;
    use tch::{Device, Kind};

    use super::*;
    use crate::params::Layout;

    pub(in crate::ring) fn state(seed: u64) -> State {
        let sizes = Model {
            layers: 2,
            hidden: 128,
            heads: 2,
            kv_heads: 2,
            ffn: 256,
            vocab: 500,
            rms_eps: 1e-6,
            init_std: 0.02,
            embed_std: 0.02,
            post_norm: 1.0,
        };
        let layout = Layout::new(&sizes, 2);
        let weights = layout.initial(seed, Device::Cpu);
        State::new(layout, weights)
    }

    /// What stands for an update: each element follows from itself and the step alone.
    pub(in crate::ring) fn advance(state: &State, step: u64) {
        for (at, flat) in [&state.weights, &state.exp_avg, &state.exp_avg_sq].into_iter().enumerate() {
            let mut flat = flat.shallow_clone();
            flat *= 1.25;
            flat += (step * 3 + at as u64) as f64;
        }
    }

    pub(in crate::ring) fn bytes(state: &State) -> [Vec<u8>; 3] {
        [&state.weights, &state.exp_avg, &state.exp_avg_sq].map(host::copied)
    }

    #[test]
    fn a_state_that_comes_over_several_steps_is_that_of_the_peer() {
        let (peer, learner) = (state(1), state(2));
        let blocks = peer.layout.blocks();
        assert!(blocks >= 4, "{blocks} blocks");
        let (of_peer, of_learner) =
            (Live::new(Step(7), &peer, 0..0), Live::new(Step(7), &learner, 0..blocks));
        for block in 0..blocks {
            let step = 7 + block as u64;
            let (read, parts) = of_peer.take(block..block + 1).unwrap();
            assert_eq!(read, Step(step));
            match block % 3 {
                // Before the update of both.
                0 => assert_eq!(of_learner.put(read, block, &parts), Put::Taken),
                // Read after the peer's update, before that of the learner.
                1 => {}
                // It comes too late, and is asked for again.
                _ => {
                    of_learner.update(|| advance(&learner, step));
                    of_peer.update(|| advance(&peer, step));
                    assert_eq!(of_learner.put(read, block, &parts), Put::Late);
                    let (read, parts) = of_peer.take(block..block + 1).unwrap();
                    assert_eq!(of_learner.put(read, block, &parts), Put::Taken);
                    continue;
                }
            }
            of_peer.update(|| advance(&peer, step));
            if block % 3 == 1 {
                let (read, parts) = of_peer.take(block..block + 1).unwrap();
                assert_eq!((read, of_learner.put(read, block, &parts)), (Step(step + 1), Put::Early));
                of_learner.update(|| advance(&learner, step));
                assert_eq!(of_learner.put(read, block, &parts), Put::Taken);
            } else {
                of_learner.update(|| advance(&learner, step));
            }
        }
        assert_eq!(of_learner.missing(), 0);
        assert!(bytes(&peer) == bytes(&learner), "the same bits");
    }

    #[test]
    fn what_a_learner_lacks_it_does_not_hand_on() {
        let learner = state(2);
        let blocks = learner.layout.blocks();
        let live = Live::new(Step(3), &learner, 1..blocks);
        assert!(live.take(0..1).is_some());
        for wrong in [0..2, 1..2, 0..0, 0..blocks + 1, blocks..blocks + 1] {
            assert!(live.take(wrong.clone()).is_none(), "{wrong:?}");
        }
    }

    #[test]
    fn an_update_is_seen_whole() {
        // Readers that never rest: what they see of a block is of one step, and the update gets its turn.
        let layout = state(1).layout;
        let zeros = || layout.zeros(Device::Cpu);
        let ones = State { exp_avg: zeros(), exp_avg_sq: zeros(), ..State::new(layout.clone(), zeros()) };
        let live = Live::new(Step(0), &ones, 0..0);
        let over = AtomicBool::new(false);
        let buffers = [&ones.weights, &ones.exp_avg, &ones.exp_avg_sq].map(Tensor::shallow_clone);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        let (step, parts) = live.take(0..2).unwrap();
                        let wanted = (step.0 as f32).to_le_bytes();
                        assert!(
                            parts.iter().all(|bytes| bytes.chunks(4).all(|value| value == wanted)),
                            "{step}"
                        );
                    }
                });
            }
            for _ in 0..20 {
                live.update(|| {
                    for buffer in &buffers {
                        let mut buffer = buffer.shallow_clone();
                        buffer += 1.0;
                    }
                });
            }
            over.store(true, Ordering::Relaxed);
        });
        assert_eq!(ones.weights.sum(Kind::Double).double_value(&[]), 20.0 * ones.weights.numel() as f64);
    }
}

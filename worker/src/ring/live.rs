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
use crate::cover::{Cover, both};
use crate::host;
use crate::optimizer::State;
use crate::params::BLOCK;

/// How often it is looked whether an update is over.
const POLL: Duration = Duration::from_millis(1);

/// A state whose blocks are read, or filled in, by other threads between a training thread's updates.
#[derive(Debug)]
pub(super) struct Live {
    /// The training thread waits for the lock: nobody else takes it.
    updates: AtomicBool,
    /// Gradients are on their way: state lets them pass.
    sums: AtomicBool,
    now: Mutex<Now>,
    /// Blocks that were not sent yet.
    missing: AtomicUsize,
    /// Blocks of the weights.
    blocks: usize,
    /// Blocks that were not sent yet lack their weights too.
    with_weights: bool,
    /// The blocks that have moments; those of all others are zero, and nothing is said of them.
    moved: Range<usize>,
}

#[derive(Debug)]
struct Now {
    /// Steps applied.
    step: Step,
    /// Weights, first and second moments, in the memory of the state. Absent: nobody reads or fills it in any more.
    buffers: Option<[Tensor; 3]>,
    /// The blocks whose moments are in those buffers.
    room: Cover,
    /// Blocks that were not sent yet.
    missing: BTreeSet<usize>,
}

/// What is read of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wants {
    pub weights: bool,
    pub moments: bool,
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
    /// Of a state after `step` that lacks the weights and moments of all blocks of `missing`; panics when some moments are elsewhere.
    pub fn new(step: Step, state: &State, missing: Range<usize>) -> Self {
        assert!(state.cover.is_all(), "all moments are here");
        let missing = Cover::of([missing], state.layout.blocks());
        Self { with_weights: true, ..Self::lacking_moments(step, state, &missing) }
    }

    /// Of a state after `step` that lacks the moments of some blocks for which it has room.
    pub fn lacking_moments(step: Step, state: &State, missing: &Cover) -> Self {
        let buffers =
            [&state.weights, &state.exp_avg, &state.exp_avg_sq].map(|buffer| buffer.detach().shallow_clone());
        let (count, blocks) = (AtomicUsize::new(missing.len()), state.layout.blocks());
        let missing = missing.ranges().iter().cloned().flatten().collect();
        let now = Mutex::new(Now { step, buffers: Some(buffers), room: state.room(), missing });
        let [updates, sums] = [false, false].map(AtomicBool::new);
        let moved = state.moved.clone();
        Self { updates, sums, now, missing: count, blocks, with_weights: false, moved }
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

    /// Some blocks as they are now, little-endian: steps applied, weights, first and second moments, as far as they are wanted;
    /// no moments of blocks that are not moved. Absent: not all of it is here.
    pub fn take(&self, blocks: Range<usize>, wants: Wants) -> Option<(Step, [Vec<u8>; 3])> {
        let now = self.now();
        let is_there = blocks.start < blocks.end && blocks.end <= self.blocks;
        let looked_at = wants.moments || self.with_weights;
        if !is_there || looked_at && now.missing.range(blocks.clone()).next().is_some() {
            return None;
        }
        let [weights, exp_avg, exp_avg_sq] = now.buffers.as_ref()?;
        let mut read = [const { Vec::new() }; 3];
        if wants.weights {
            read[0] = host::copied(&part(weights, &blocks));
        }
        if wants.moments && !both(&blocks, &self.moved).is_empty() {
            let place = now.room.place(blocks)?;
            read[1] = host::copied(&part(exp_avg, &place));
            read[2] = host::copied(&part(exp_avg_sq, &place));
        }
        Some((now.step, read))
    }

    /// Fills in a block that was read after `step`.
    pub fn put(&self, step: Step, block: usize, read: &[Vec<u8>; 3]) -> Put {
        let mut now = self.now();
        if step > now.step {
            return Put::Early;
        }
        if step < now.step {
            return Put::Late;
        }
        let blocks = block..block + 1;
        let Some(buffers) = now.buffers.as_ref().filter(|_| now.missing.contains(&block)) else {
            return Put::Taken;
        };
        // Where there is no room for moments here, they are zero there too.
        let (of_weights, of_moments) =
            (Some(&blocks).filter(|_| self.with_weights), now.room.place(blocks.clone()));
        let places = [of_weights, of_moments.as_ref(), of_moments.as_ref()];
        for ((buffer, bytes), place) in buffers.iter().zip(read).zip(places) {
            match place.map(|place| part(buffer, place)) {
                Some(mut place) if bytes.is_empty() => drop(place.zero_()),
                Some(mut place) => place.copy_(&flat(bytes, buffer.device())),
                None => {}
            }
        }
        now.missing.remove(&block);
        self.missing.store(now.missing.len(), Ordering::Release);
        Put::Taken
    }

    /// What its blocks lack besides, of those that are not here.
    pub fn wants(&self) -> Wants {
        Wants { weights: self.with_weights, moments: true }
    }

    /// The state is nobody's to read or to fill in any more. Returns the blocks that were not sent.
    pub fn close(&self) -> Cover {
        let mut now = self.now.lock().expect("no holder panics");
        now.buffers = None;
        Cover::of(now.missing.iter().map(|block| *block..block + 1), self.blocks)
    }

    /// Blocks that were not sent yet.
    pub fn missing(&self) -> usize {
        self.missing.load(Ordering::Acquire)
    }

    /// Blocks of the weights.
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

    impl Wants {
        const ALL: Self = Self { weights: true, moments: true };
    }

    #[test]
    fn moments_come_to_where_there_is_room_and_nothing_else_does() {
        let blocks = state(1).layout.blocks();
        let cover = |range: Range<usize>| Cover::of([range], blocks);
        let peer = state(1).with_cover(cover(1..3), &[]);
        // Of its two blocks it lacks the second, which is not where the peer has it.
        let mut learner = state(2).with_cover(cover(0..2), &[]);
        learner.weights = peer.weights.copy();
        let of_peer = Live::lacking_moments(Step(7), &peer, &Cover::none(blocks));
        let of_learner = Live::lacking_moments(Step(7), &learner, &cover(1..2));
        for (live, state) in [(&of_peer, &peer), (&of_learner, &learner)] {
            live.update(|| advance(state, 7));
        }
        let own = learner.moments(0..1).map(|flat| flat.copy());
        let (step, read) = of_peer.take(1..2, of_learner.wants()).unwrap();
        assert!(read[0].is_empty(), "weights come with a step");
        assert_eq!(of_learner.put(Step(7), 1, &read), Put::Late);
        assert_eq!((of_learner.missing(), of_learner.put(step, 1, &read)), (1, Put::Taken));
        assert_eq!(of_learner.missing(), 0);
        for (at, flat) in learner.moments(1..2).iter().enumerate() {
            assert!(flat.equal(&peer.moments(1..2)[at]) && learner.moments(0..1)[at].equal(&own[at]));
        }
        assert!(learner.weights.equal(&peer.weights));
        // What has no room, or is not lacked, changes nothing.
        let other = read.each_ref().map(|bytes| vec![0; bytes.len()]);
        for block in [0, 1, 2, blocks] {
            assert_eq!(of_learner.put(step, block, &other), Put::Taken);
        }
        assert!(learner.moments(1..2)[0].equal(&peer.moments(1..2)[0]));
        assert!(learner.moments(0..1)[0].equal(&own[0]));
    }

    /// Of two that hold one state one may have room for moments that the other knows to be zero.
    #[test]
    fn moments_that_do_not_come_are_zero() {
        let (mut peer, learner) = (state(1), state(2));
        peer.reset_moments(1..2);
        let blocks = peer.layout.blocks();
        let (of_peer, of_learner) =
            (Live::new(Step(7), &peer, 0..0), Live::new(Step(7), &learner, 0..blocks));
        // What was updated before it came means nothing.
        advance(&learner, 7);
        advance(&peer, 7);
        for block in 0..blocks {
            let (step, read) = of_peer.take(block..block + 1, Wants::ALL).unwrap();
            assert_eq!(read[1].is_empty(), block != 1);
            assert_eq!(of_learner.put(step, block, &read), Put::Taken);
        }
        assert_eq!(of_learner.missing(), 0);
        for buffer in 0..3 {
            assert!(learner.whole(buffer).equal(&peer.whole(buffer)), "buffer {buffer}");
        }
        // The other way round what comes has no room, and is zero.
        let (zero, mut small) = (state(1), state(2));
        small.reset_moments(0..0);
        let (of_zero, of_small) = (Live::new(Step(7), &zero, 0..0), Live::new(Step(7), &small, 0..blocks));
        for block in 0..blocks {
            let (step, read) = of_zero.take(block..block + 1, Wants::ALL).unwrap();
            assert_eq!(of_small.put(step, block, &read), Put::Taken);
        }
        assert_eq!((of_small.missing(), small.exp_avg.numel()), (0, 0));
        assert!(small.weights.equal(&zero.weights));
    }

    #[test]
    fn what_is_closed_is_neither_read_nor_filled_in() {
        let (peer, learner) = (state(1), state(2));
        let blocks = peer.layout.blocks();
        let of_peer = Live::new(Step(7), &peer, 0..0);
        let of_learner = Live::new(Step(7), &learner, 0..blocks);
        let (step, read) = of_peer.take(0..1, Wants::ALL).unwrap();
        assert_eq!(of_learner.put(step, 0, &read), Put::Taken);
        let all_but_one = Cover::all(blocks).without(&Cover::of(std::iter::once(0..1), blocks));
        assert_eq!((of_peer.close(), of_learner.close()), (Cover::none(blocks), all_but_one.clone()));
        assert!(of_peer.take(0..1, Wants::ALL).is_none());
        let before = bytes(&learner);
        of_learner.put(step, 1, &read);
        assert!(bytes(&learner) == before);
        assert_eq!(of_learner.close(), all_but_one);
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
            let (read, parts) = of_peer.take(block..block + 1, Wants::ALL).unwrap();
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
                    let (read, parts) = of_peer.take(block..block + 1, Wants::ALL).unwrap();
                    assert_eq!(of_learner.put(read, block, &parts), Put::Taken);
                    continue;
                }
            }
            of_peer.update(|| advance(&peer, step));
            if block % 3 == 1 {
                let (read, parts) = of_peer.take(block..block + 1, Wants::ALL).unwrap();
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
        assert!(live.take(0..1, Wants::ALL).is_some());
        for wrong in [0..2, 1..2, 0..0, 0..blocks + 1, blocks..blocks + 1] {
            assert!(live.take(wrong.clone(), Wants::ALL).is_none(), "{wrong:?}");
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
                        let (step, parts) = live.take(0..2, Wants::ALL).unwrap();
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

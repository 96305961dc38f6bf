//! Which blocks go where in an operation, and what is done with those that come. No sockets here.

use std::cell::Cell;

use zerocopy::IntoBytes;

use super::frame::{Address, Kind};
use crate::ring::Ready;
use crate::{Generation, Partials, Rank, Ring, Step};

/// Bytes of blocks that may wait at an owner for the same blocks of others, for each part; two blocks at least. Small, so
/// that what was received is still in the cache when it is added; who is ahead has the sockets' buffers beside.
const WINDOW_BYTES: usize = 1 << 19;

/// The data frames of an operation: to and from each rank, in an order that both sides know.
pub(crate) trait Traffic {
    /// Frames that go to `rank`.
    fn outgoing(&self, rank: Rank) -> usize;
    /// Whether frame `index` to `rank` may go.
    fn is_ready(&self, rank: Rank, index: usize) -> bool;
    /// Frame `index` to `rank`.
    fn frame(&self, rank: Rank, index: usize) -> (Address, &[u8]);
    /// Its payload's checksum.
    fn checksum(&self, address: Address, payload: &[u8]) -> u32;
    /// Frames that come from `rank`.
    fn incoming(&self, rank: Rank) -> usize;
    /// Whether there is a place for frame `index` of `rank`.
    fn has_place(&self, rank: Rank, index: usize) -> bool;
    /// The place for frame `index` of `rank`.
    fn place(&mut self, rank: Rank, index: usize) -> (Address, &mut [u8]);
    /// Frame `index` of `rank` is in its place, and sound.
    fn arrived(&mut self, rank: Rank, index: usize);
}

/// An operation without blocks.
pub(crate) struct NoBlocks;

impl Traffic for NoBlocks {
    fn outgoing(&self, _: Rank) -> usize {
        0
    }

    fn is_ready(&self, _: Rank, _: usize) -> bool {
        false
    }

    fn frame(&self, _: Rank, _: usize) -> (Address, &[u8]) {
        unreachable!("there are none")
    }

    fn checksum(&self, _: Address, _: &[u8]) -> u32 {
        unreachable!("there are none")
    }

    fn incoming(&self, _: Rank) -> usize {
        0
    }

    fn has_place(&self, _: Rank, _: usize) -> bool {
        false
    }

    fn place(&mut self, _: Rank, _: usize) -> (Address, &mut [u8]) {
        unreachable!("there are none")
    }

    fn arrived(&mut self, _: Rank, _: usize) {}
}

/// Own blocks to everyone, everyone's blocks in place.
pub(crate) struct Gather<'a> {
    ring: &'a Ring,
    generation: Generation,
    step: Step,
    buffer: &'a mut [f32],
    /// Of own blocks: the same for every receiver.
    checksums: Vec<Cell<Option<u32>>>,
}

impl<'a> Gather<'a> {
    pub fn new(ring: &'a Ring, generation: Generation, step: Step, buffer: &'a mut [f32]) -> Self {
        let checksums = vec![Cell::new(None); ring.blocks(ring.rank()).len()];
        Self { ring, generation, step, buffer, checksums }
    }

    fn address(&self, block: usize) -> Address {
        Address {
            kind: Kind::Gathered,
            generation: self.generation,
            step: self.step,
            block: block as u32,
            part: 0,
        }
    }
}

impl Traffic for Gather<'_> {
    fn outgoing(&self, _: Rank) -> usize {
        self.checksums.len()
    }

    fn is_ready(&self, _: Rank, _: usize) -> bool {
        true
    }

    fn frame(&self, _: Rank, index: usize) -> (Address, &[u8]) {
        let block = self.ring.blocks(self.ring.rank()).start + index;
        (self.address(block), self.buffer[self.ring.block(block)].as_bytes())
    }

    fn checksum(&self, address: Address, payload: &[u8]) -> u32 {
        let known = &self.checksums[address.block as usize - self.ring.blocks(self.ring.rank()).start];
        let checksum = known.get().unwrap_or_else(|| crc32fast::hash(payload));
        known.set(Some(checksum));
        checksum
    }

    fn incoming(&self, rank: Rank) -> usize {
        self.ring.blocks(rank).len()
    }

    fn has_place(&self, _: Rank, _: usize) -> bool {
        true
    }

    fn place(&mut self, rank: Rank, index: usize) -> (Address, &mut [u8]) {
        let block = self.ring.blocks(rank).start + index;
        (self.address(block), self.buffer[self.ring.block(block)].as_mut_bytes())
    }

    fn arrived(&mut self, _: Rank, _: usize) {}
}

/// What a reduction knows between calls.
#[derive(Debug)]
pub(crate) struct Reducing {
    pub step: Step,
    pub ready: Ready,
    /// Frames arrived, by rank.
    arrived: Vec<usize>,
    /// Own blocks added.
    added: usize,
    places: Places,
}

/// Where parts of others wait, by rank: a ring of blocks, each with all parts of the rank. Kept from step to step.
#[derive(Debug, Default)]
pub(crate) struct Places {
    values: Vec<Vec<f32>>,
    scratch: Vec<f32>,
}

/// Blocks of a window.
fn window(ring: &Ring) -> usize {
    (WINDOW_BYTES / (4 * ring.shape().block_len)).clamp(2, 64)
}

impl Places {
    fn fit(&mut self, ring: &Ring) {
        self.values.resize_with(ring.members(), Vec::new);
        let blocks = window(ring).min(ring.blocks(ring.rank()).len());
        for (rank, values) in (0..).map(Rank).zip(&mut self.values) {
            let parts = if rank == ring.rank() { 0 } else { ring.parts(rank).len() };
            values.resize(blocks * parts * ring.shape().block_len, 0.0);
        }
    }
}

impl Reducing {
    pub fn new(ring: &Ring, step: Step, mut places: Places) -> Self {
        places.fit(ring);
        Self { step, ready: Ready::none(ring), arrived: vec![0; ring.members()], added: 0, places }
    }

    pub fn into_places(self) -> Places {
        self.places
    }
}

/// Parts of blocks to their owners; the sums of own blocks.
pub(crate) struct Reduce<'a> {
    ring: &'a Ring,
    generation: Generation,
    state: &'a mut Reducing,
    own_parts: usize,
    partials: &'a dyn Partials,
    out: &'a mut [f32],
}

impl<'a> Reduce<'a> {
    /// Goes on with a reduction; adds what became ready meanwhile.
    pub fn new(
        ring: &'a Ring,
        generation: Generation,
        state: &'a mut Reducing,
        partials: &'a dyn Partials,
        out: &'a mut [f32],
    ) -> Self {
        let mut reduce =
            Self { ring, generation, state, own_parts: ring.parts(ring.rank()).len(), partials, out };
        reduce.add();
        reduce
    }

    /// Block and part of frame `index` of `rank`, and the place among those that wait.
    fn place_of(&self, rank: Rank, index: usize) -> (usize, usize, std::ops::Range<usize>) {
        let (parts, len) = (self.ring.parts(rank).len(), self.ring.shape().block_len);
        let (block, part) = (index / parts, index % parts);
        let at = (block % window(self.ring)) * parts + part;
        (self.ring.turns(self.ring.rank())[block], part, at * len..(at + 1) * len)
    }

    /// Adds the next own blocks whose parts are all there.
    fn add(&mut self) {
        let (ring, own) = (self.ring, self.ring.rank());
        let Reducing { ready, arrived, added, places, .. } = &mut *self.state;
        while let Some(&block) = ring.turns(own).get(*added).filter(|block| ready.contains(**block)) {
            let others = (0..).map(Rank).zip(&*arrived).filter(|(rank, _)| *rank != own);
            if others.into_iter().any(|(rank, arrived)| *arrived < (*added + 1) * ring.parts(rank).len()) {
                return;
            }
            let len = ring.shape().block_len;
            let part = |rank: Rank, part: usize| {
                if rank == own {
                    return self.partials.elements(part, ring.block(block));
                }
                let at = (*added % window(ring)) * ring.parts(rank).len() + part;
                &places.values[rank.index()][at * len..(at + 1) * len]
            };
            ring.add(part, &mut self.out[ring.in_own(block)], &mut places.scratch);
            *added += 1;
        }
    }
}

impl Traffic for Reduce<'_> {
    fn outgoing(&self, rank: Rank) -> usize {
        self.ring.blocks(rank).len() * self.own_parts
    }

    fn is_ready(&self, rank: Rank, index: usize) -> bool {
        self.state.ready.contains(self.ring.turns(rank)[index / self.own_parts])
    }

    fn frame(&self, rank: Rank, index: usize) -> (Address, &[u8]) {
        let (block, part) = (self.ring.turns(rank)[index / self.own_parts], index % self.own_parts);
        let address = Address {
            kind: Kind::Part,
            generation: self.generation,
            step: self.state.step,
            block: block as u32,
            part: part as u16,
        };
        (address, self.partials.elements(part, self.ring.block(block)).as_bytes())
    }

    fn checksum(&self, _: Address, payload: &[u8]) -> u32 {
        crc32fast::hash(payload)
    }

    fn incoming(&self, rank: Rank) -> usize {
        self.ring.blocks(self.ring.rank()).len() * self.ring.parts(rank).len()
    }

    fn has_place(&self, rank: Rank, index: usize) -> bool {
        index / self.ring.parts(rank).len() < self.state.added + window(self.ring)
    }

    fn place(&mut self, rank: Rank, index: usize) -> (Address, &mut [u8]) {
        let (block, part, place) = self.place_of(rank, index);
        let address = Address {
            kind: Kind::Part,
            generation: self.generation,
            step: self.state.step,
            block: block as u32,
            part: part as u16,
        };
        (address, self.state.places.values[rank.index()][place].as_mut_bytes())
    }

    fn arrived(&mut self, rank: Rank, index: usize) {
        self.state.arrived[rank.index()] = index + 1;
        if (index + 1).is_multiple_of(self.ring.parts(rank).len()) {
            self.add();
        }
    }
}

//! Weights and moments, and where they are.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use anello_configs::RunConfig;
use tch::{Device, Kind, Tensor};

use super::part;
use crate::cover::{Cover, Piece, both};
use crate::host::Reading;
use crate::params::{BLOCK, Layout};

/// Weights and moments: all that an update changes.
///
/// ```text
/// blocks of the state     0    1    2    3    4    5    6    7
/// cover                  |         |                        |     with whom they are: here, or with others of the ring
/// moved                            |                   |          what has moments other than zero
/// exp_avg, exp_avg_sq              | 2 |         | 5 | 6 |        the blocks that are in both
/// ```
#[derive(Debug)]
pub struct State {
    /// Where the parameters lie.
    pub layout: Layout,
    /// Weights, fp32, flat.
    pub weights: Tensor,
    /// First moments, fp32: those of the blocks of [`State::room`], one after the other.
    pub exp_avg: Tensor,
    /// Second moments, as the first.
    pub exp_avg_sq: Tensor,
    /// The blocks whose moments are known here: all, unless they are shared out over a ring.
    pub cover: Cover,
    /// The blocks that are moved, or were since the moments were last zero: those of all others are zero, and take no room
    /// anywhere.
    pub moved: Range<usize>,
    /// Updates applied since the moments were last zero.
    pub updates: u64,
    /// Losses of the last steps of the stage, the oldest first: what a spike is measured by.
    pub losses: Vec<f64>,
    /// Who copies it beside the training, so that the next change waits.
    pub(crate) reading: RefCell<Vec<Arc<Reading>>>,
}

/// First and second moments of `room`.
fn zero_moments(room: &Cover, device: Device) -> [Tensor; 2] {
    [0, 1].map(|_| Tensor::zeros([room.elements() as i64], (Kind::Float, device)))
}

impl State {
    /// Fresh weights, moments at zero, with room for all.
    pub fn new(layout: Layout, weights: Tensor) -> Self {
        let all = layout.blocks();
        Self::at_zero(layout, weights, Cover::all(all), 0..all)
    }

    /// The same with room for none, until a stage moves some.
    pub fn unmoved(layout: Layout, weights: Tensor) -> Self {
        let cover = Cover::all(layout.blocks());
        Self::at_zero(layout, weights, cover, 0..0)
    }

    /// Weights alone, of a state in which the blocks `moved` have moments: all of them are elsewhere.
    pub fn without_moments(layout: Layout, weights: Tensor, moved: Range<usize>) -> Self {
        let cover = Cover::none(layout.blocks());
        Self::at_zero(layout, weights, cover, moved)
    }

    /// The moments of `cover`, at zero, with room for those of the blocks `moved`.
    pub(crate) fn at_zero(layout: Layout, weights: Tensor, cover: Cover, moved: Range<usize>) -> Self {
        let [exp_avg, exp_avg_sq] = zero_moments(&cover.within(&moved), weights.device());
        let reading = RefCell::default();
        Self { layout, weights, exp_avg, exp_avg_sq, cover, moved, updates: 0, losses: Vec::new(), reading }
    }

    /// The initial weights of the seed of `config`.
    pub fn of_seed(config: &RunConfig, device: Device) -> Self {
        let layout = Layout::new(&config.model, config.model.layers);
        let weights = layout.initial(config.seed, device);
        Self::unmoved(layout, weights)
    }

    /// The same in memory of its own.
    pub fn copy(&self) -> Self {
        self.with_flats(Tensor::copy)
    }

    /// The same on `device`; in the same memory when it is there already.
    pub fn on(self, device: Device) -> Self {
        let to = |flat: Tensor| flat.to_device(device);
        let (weights, exp_avg, exp_avg_sq) = (to(self.weights), to(self.exp_avg), to(self.exp_avg_sq));
        Self { weights, exp_avg, exp_avg_sq, ..self }
    }

    /// The same in the same memory.
    pub fn share(&self) -> Self {
        Self { reading: self.reading.clone(), ..self.with_flats(Tensor::shallow_clone) }
    }

    /// The same with what `of` makes of weights and moments, which nobody copies yet.
    fn with_flats(&self, of: impl Fn(&Tensor) -> Tensor) -> Self {
        Self {
            layout: self.layout.clone(),
            weights: of(&self.weights),
            exp_avg: of(&self.exp_avg),
            exp_avg_sq: of(&self.exp_avg_sq),
            cover: self.cover.clone(),
            moved: self.moved.clone(),
            updates: self.updates,
            losses: self.losses.clone(),
            reading: RefCell::default(),
        }
    }

    /// Copies on the host of the weights of `blocks`, and of those of their moments that are not zero for standing still, made beside
    /// what is computed until the state changes. Panics when these are elsewhere.
    pub(crate) fn read(&self, blocks: Range<usize>) -> Arc<Reading> {
        let weights = part(&self.weights, blocks.start * BLOCK..blocks.end * BLOCK);
        let [exp_avg, exp_avg_sq] = self.moments(blocks);
        let reading = Arc::new(Reading::start([weights, exp_avg, exp_avg_sq]));
        if let Reading::Beside(_) = *reading {
            self.reading.borrow_mut().push(Arc::clone(&reading));
        }
        reading
    }

    /// What is computed from now on may change the buffers.
    pub(super) fn settle(&self) {
        self.reading.take().iter().for_each(|reading| reading.wait_until_read());
    }

    /// Sets moments and their count to zero. From here on the blocks `moved` are moved, and there is room for theirs alone.
    pub fn reset_moments(&mut self, moved: Range<usize>) {
        self.settle();
        self.updates = 0;
        if self.moved == moved {
            let _ = self.exp_avg.zero_();
            let _ = self.exp_avg_sq.zero_();
        } else {
            self.moved = moved;
            // Not both at a time.
            for flat in [&mut self.exp_avg, &mut self.exp_avg_sq] {
                *flat = Tensor::zeros([0], (Kind::Float, self.weights.device()));
            }
            [self.exp_avg, self.exp_avg_sq] = zero_moments(&self.room(), self.weights.device());
        }
    }

    /// Makes room for the moments of `blocks`, which are about to be moved. They are zero where there was none.
    pub fn make_room(&mut self, blocks: Range<usize>) {
        if blocks.is_empty() || both(&blocks, &self.moved) == blocks {
            return;
        }
        self.lay_out(match self.moved.is_empty() {
            true => blocks,
            false => blocks.start.min(self.moved.start)..blocks.end.max(self.moved.end),
        });
    }

    /// Takes it from others that all moments outside of the blocks `moved` are zero: there may be room here for what is to be
    /// moved next.
    pub fn narrow(&mut self, moved: &Range<usize>) {
        let moved = both(&self.moved, moved);
        if moved != self.moved {
            self.lay_out(moved);
        }
    }

    /// The same moments with room for those of the blocks `moved`.
    fn lay_out(&mut self, moved: Range<usize>) {
        self.settle();
        let room = self.cover.within(&moved);
        let new = zero_moments(&room, self.weights.device());
        for range in self.room().within(&moved).ranges() {
            let place = room.place(range.clone()).expect("it is in both");
            for (new, old) in new.iter().zip(self.moments(range.clone())) {
                part(new, place.start * BLOCK..place.end * BLOCK).copy_(&old);
            }
        }
        ([self.exp_avg, self.exp_avg_sq], self.moved) = (new, moved);
    }

    /// The state over a stack of `layers` layers, weights and moments repeated (see [`Layout::upcycled`]). Panics when some
    /// moments are elsewhere.
    pub fn upcycled(&self, layout: Layout) -> Self {
        let spread = |flat: &Tensor| layout.upcycled(&self.layout, flat);
        let weights = spread(&self.weights);
        let (updates, losses) = (self.updates, self.losses.clone());
        let mut grown = match self.moved.is_empty() {
            true => Self::unmoved(layout.clone(), weights),
            false => Self {
                exp_avg: spread(&self.whole(1)),
                exp_avg_sq: spread(&self.whole(2)),
                weights,
                cover: Cover::all(layout.blocks()),
                moved: 0..layout.blocks(),
                layout: layout.clone(),
                reading: RefCell::default(),
                ..self.share()
            },
        };
        (grown.updates, grown.losses) = (updates, losses);
        grown
    }

    /// One of the buffers, as they are counted in a checkpoint, for all blocks. Panics when some moments are elsewhere.
    pub fn whole(&self, buffer: usize) -> Tensor {
        assert!(self.cover.is_all(), "all moments are here");
        let flat = [&self.weights, &self.exp_avg, &self.exp_avg_sq][buffer];
        if flat.numel() == self.weights.numel() {
            return flat.shallow_clone();
        }
        let whole = self.layout.zeros(flat.device());
        part(&whole, self.moved.start * BLOCK..self.moved.end * BLOCK).copy_(flat);
        whole
    }

    /// The blocks whose moments are in the buffers.
    pub fn room(&self) -> Cover {
        self.cover.within(&self.moved)
    }

    /// The moments of those of `blocks`, which are next to one another, that are moved; panics when some are elsewhere.
    pub fn moments(&self, blocks: Range<usize>) -> [Tensor; 2] {
        let known = self.cover.place(blocks.clone()).is_some();
        let place = self.room().place(both(&blocks, &self.moved)).filter(|_| known);
        let place = place.unwrap_or_else(|| panic!("the moments of blocks {blocks:?} are elsewhere"));
        [&self.exp_avg, &self.exp_avg_sq].map(|flat| part(flat, place.start * BLOCK..place.end * BLOCK))
    }

    /// The same weights with the moments of `cover`: those that are here, and, where they are not, of `others`, each from a
    /// first block on. Panics when some are in neither, and are not zero for standing still.
    pub fn with_cover(self, cover: Cover, others: &[(usize, [Tensor; 2])]) -> Self {
        if cover == self.cover && others.is_empty() {
            return self;
        }
        let room = cover.within(&self.moved);
        let new = zero_moments(&room, self.weights.device());
        let mut filled = Cover::none(cover.of_blocks());
        let mut fill = |blocks: Range<usize>, from: [Tensor; 2]| {
            for Piece { blocks: part_of, at } in room.pieces(blocks.clone()) {
                let source = (part_of.start - blocks.start) * BLOCK..(part_of.end - blocks.start) * BLOCK;
                for (new, from) in new.iter().zip(&from) {
                    let place = at * BLOCK..(at + part_of.len()) * BLOCK;
                    part(new, place).copy_(&part(from, source.clone()));
                }
                filled = filled.and(&Cover::of([part_of], cover.of_blocks()));
            }
        };
        for (first, moments) in others {
            let blocks = moments[0].numel() / BLOCK;
            fill(*first..first + blocks, moments.each_ref().map(Tensor::shallow_clone));
        }
        if self.cover.of_blocks() == cover.of_blocks() {
            for range in self.room().ranges() {
                fill(range.clone(), self.moments(range.clone()));
            }
        }
        assert_eq!(filled, room, "moments are missing");
        let [exp_avg, exp_avg_sq] = new;
        Self { exp_avg, exp_avg_sq, cover, ..self }
    }
}

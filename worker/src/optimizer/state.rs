//! Weights and moments, and where they are.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use anello_configs::RunConfig;
use tch::{Device, Kind, Tensor};

use super::part;
use crate::cover::{Cover, Piece};
use crate::host::Reading;
use crate::params::{BLOCK, Layout};

/// Weights and moments: all that an update changes.
#[derive(Debug)]
pub struct State {
    /// Where the parameters lie.
    pub layout: Layout,
    /// Weights, fp32, flat.
    pub weights: Tensor,
    /// First moments, fp32: those of the blocks of `cover`, one after the other.
    pub exp_avg: Tensor,
    /// Second moments, as the first.
    pub exp_avg_sq: Tensor,
    /// The blocks whose moments are here: all, unless they are shared out over a ring.
    pub cover: Cover,
    /// Updates applied since the moments were last zero.
    pub updates: u64,
    /// Losses of the last steps of the stage, the oldest first: what a spike is measured by.
    pub losses: Vec<f64>,
    /// Who copies it beside the training, so that the next change waits.
    pub(crate) reading: RefCell<Vec<Arc<Reading>>>,
}

/// First and second moments of `cover`.
fn zero_moments(cover: &Cover, device: Device) -> [Tensor; 2] {
    [0, 1].map(|_| Tensor::zeros([cover.elements() as i64], (Kind::Float, device)))
}

impl State {
    /// Fresh weights, moments at zero.
    pub fn new(layout: Layout, weights: Tensor) -> Self {
        let cover = Cover::all(layout.blocks());
        Self::at_zero(layout, weights, cover)
    }

    /// Weights alone: all moments are elsewhere.
    pub fn without_moments(layout: Layout, weights: Tensor) -> Self {
        let cover = Cover::none(layout.blocks());
        Self::at_zero(layout, weights, cover)
    }

    /// The moments of `cover`, at zero.
    fn at_zero(layout: Layout, weights: Tensor, cover: Cover) -> Self {
        let [exp_avg, exp_avg_sq] = zero_moments(&cover, weights.device());
        let reading = RefCell::default();
        Self { layout, weights, exp_avg, exp_avg_sq, cover, updates: 0, losses: Vec::new(), reading }
    }

    /// The initial weights of the seed of `config`.
    pub fn of_seed(config: &RunConfig, device: Device) -> Self {
        let layout = Layout::new(&config.model, config.model.layers);
        let weights = layout.initial(config.seed, device);
        Self::new(layout, weights)
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
            updates: self.updates,
            losses: self.losses.clone(),
            reading: RefCell::default(),
        }
    }

    /// Copies of weights and moments of `blocks` on the host, made beside what is computed until the state changes. Panics when
    /// their moments are elsewhere.
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

    /// Sets moments and their count to zero.
    pub fn reset_moments(&mut self) {
        self.settle();
        let _ = self.exp_avg.zero_();
        let _ = self.exp_avg_sq.zero_();
        self.updates = 0;
    }

    /// The state over a stack of `layers` layers, weights and moments repeated (see [`Layout::upcycled`]). Panics when some
    /// moments are elsewhere.
    pub fn upcycled(&self, layout: Layout) -> Self {
        assert!(self.cover.is_all(), "a stack grows where all moments are");
        let spread = self.with_flats(|flat| layout.upcycled(&self.layout, flat));
        Self { cover: Cover::all(layout.blocks()), layout, ..spread }
    }

    /// The moments of `blocks`, which are next to one another; panics when some are elsewhere.
    pub fn moments(&self, blocks: Range<usize>) -> [Tensor; 2] {
        let place = self.cover.place(blocks.clone());
        let place = place.unwrap_or_else(|| panic!("the moments of blocks {blocks:?} are elsewhere"));
        [&self.exp_avg, &self.exp_avg_sq].map(|flat| part(flat, place.start * BLOCK..place.end * BLOCK))
    }

    /// The blocks of `blocks` whose moments are here, and where these lie, in blocks.
    pub(super) fn places(&self, blocks: Range<usize>) -> Vec<(usize, usize)> {
        let pieces = self.cover.pieces(blocks).into_iter();
        pieces.flat_map(|Piece { blocks, at }| blocks.zip(at..)).collect()
    }

    /// The same weights with the moments of `cover`: those that are here, and, where they are not, of `others`, each from a
    /// first block on. Panics when some are in neither.
    pub fn with_cover(self, cover: Cover, others: &[(usize, [Tensor; 2])]) -> Self {
        if cover == self.cover && others.is_empty() {
            return self;
        }
        let new = zero_moments(&cover, self.weights.device());
        let mut filled = Cover::none(cover.of_blocks());
        let mut fill = |blocks: Range<usize>, from: [Tensor; 2]| {
            for Piece { blocks: part_of, at } in cover.pieces(blocks.clone()) {
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
            for range in self.cover.ranges() {
                fill(range.clone(), self.moments(range.clone()));
            }
        }
        assert_eq!(filled, cover, "moments are missing");
        let [exp_avg, exp_avg_sq] = new;
        Self { exp_avg, exp_avg_sq, cover, ..self }
    }
}

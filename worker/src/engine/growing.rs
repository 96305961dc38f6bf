//! A worker's last lane: what it adds to the tree, block by block, while the rest of it is computed.

use std::ops::Range;

use tch::Tensor;

use crate::fold::Fold;
use crate::objective::LossSums;
use crate::params::BLOCK;

/// What a worker's last lane tells while it is computed, in this order: [`Growing::Sums`], [`Growing::Whole`] again and
/// again, [`Growing::Lane`], and the rest of the blocks.
#[derive(Debug)]
pub enum Growing<'a> {
    /// The worker's partial sums, one for each maximal aligned subtree of its lanes: (first lane, number of lanes, loss
    /// sums), and the gradient buffer of each, which is still written to.
    Sums(Vec<(u32, u32, LossSums)>, Vec<Tensor>),
    /// These blocks of all partial sums are whole.
    Whole(Range<usize>),
    /// The gradient of the lane alone, whole. Block 0 is not yet part of a sum.
    Lane(&'a mut Tensor),
}

/// The additions that a lane's gradient sets off in the tree, made as far as it is whole.
#[derive(Default)]
pub(super) struct Chain {
    /// Where the lane's gradient is computed, when that is not its own buffer.
    place: Option<Tensor>,
    /// The lane's own buffer, then each that the one before it is added to.
    buffers: Vec<Tensor>,
    /// Blocks that become whole, one part of the model after the other.
    whole: std::vec::IntoIter<Range<usize>>,
}

impl Chain {
    /// That of the lane of `gradient`, which makes `grown` of `fold`.
    pub fn new<T>(
        place: Option<&Tensor>,
        gradient: &Tensor,
        fold: &Fold<(Tensor, T)>,
        grown: &Fold<(Tensor, T)>,
        whole: Vec<Range<usize>>,
    ) -> Self {
        let merged = fold.partials().len() + 1 - grown.partials().len();
        let onto = fold.partials().iter().rev().take(merged).map(|(_, _, (gradient, _))| gradient);
        let buffers = [gradient].into_iter().chain(onto).map(Tensor::shallow_clone).collect();
        Self { place: place.map(Tensor::shallow_clone), buffers, whole: whole.into_iter() }
    }

    /// The lane's gradient is whole, and in its own buffer from here on.
    pub fn take_over(&mut self) {
        if let Some(place) = self.place.take() {
            let rest = self.whole.as_slice().iter().filter(|blocks| !blocks.is_empty());
            rest.for_each(|blocks| copy(&place, &self.buffers[0], blocks));
        }
    }

    /// Adds what is left, once all is whole.
    pub fn rest(&mut self, tell: &mut dyn FnMut(Growing<'_>)) {
        while !self.whole.as_slice().is_empty() {
            self.next(tell);
        }
    }

    /// Adds the blocks that became whole, and tells of them.
    pub fn next(&mut self, tell: &mut dyn FnMut(Growing<'_>)) {
        let blocks = self.whole.next().expect("the walk has as many stations as the model has parts");
        if !blocks.is_empty() {
            let _span = tracing::trace_span!("fold", blocks = blocks.len()).entered();
            if let Some(place) = &self.place {
                copy(place, &self.buffers[0], &blocks);
            }
            for pair in self.buffers.windows(2) {
                let _ = of(&pair[1], &blocks).g_add_(&of(&pair[0], &blocks));
            }
            tell(Growing::Whole(blocks));
        }
    }

    /// The buffers that are in no sum any more.
    pub fn into_free(mut self) -> Vec<Tensor> {
        self.buffers.pop();
        self.buffers
    }
}

fn of(flat: &Tensor, blocks: &Range<usize>) -> Tensor {
    flat.narrow(0, (blocks.start * BLOCK) as i64, (blocks.len() * BLOCK) as i64)
}

fn copy(from: &Tensor, to: &Tensor, blocks: &Range<usize>) {
    of(to, blocks).copy_(&of(from, blocks));
}

/// [`Growing::Sums`] of `fold`.
pub(super) fn tell_sums(fold: &Fold<(Tensor, LossSums)>, tell: &mut dyn FnMut(Growing<'_>)) {
    let partials = fold.partials().iter();
    let each = partials
        .map(|(first, lanes, (gradient, sums))| ((*first, *lanes, sums.clone()), gradient.shallow_clone()));
    let (sums, buffers) = each.unzip();
    tell(Growing::Sums(sums, buffers));
}

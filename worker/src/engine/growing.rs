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
    /// The lane's own buffer, then each that the one before it is added to.
    buffers: Vec<Tensor>,
    /// Blocks that become whole, one part of the model after the other.
    whole: std::vec::IntoIter<Range<usize>>,
}

impl Chain {
    /// That of the lane of `gradient`, which makes `grown` of `fold`.
    pub fn new<T>(
        gradient: &Tensor,
        fold: &Fold<(Tensor, T)>,
        grown: &Fold<(Tensor, T)>,
        whole: Vec<Range<usize>>,
    ) -> Self {
        let merged = fold.partials().len() + 1 - grown.partials().len();
        let onto = fold.partials().iter().rev().take(merged).map(|(_, _, (gradient, _))| gradient);
        let buffers = [gradient].into_iter().chain(onto).map(Tensor::shallow_clone).collect();
        Self { buffers, whole: whole.into_iter() }
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
            let (start, len) = ((blocks.start * BLOCK) as i64, (blocks.len() * BLOCK) as i64);
            for pair in self.buffers.windows(2) {
                let _ = pair[1].narrow(0, start, len).g_add_(&pair[0].narrow(0, start, len));
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

/// [`Growing::Sums`] of `fold`.
pub(super) fn tell_sums(fold: &Fold<(Tensor, LossSums)>, tell: &mut dyn FnMut(Growing<'_>)) {
    let partials = fold.partials().iter();
    let each = partials
        .map(|(first, lanes, (gradient, sums))| ((*first, *lanes, sums.clone()), gradient.shallow_clone()));
    let (sums, buffers) = each.unzip();
    tell(Growing::Sums(sums, buffers));
}

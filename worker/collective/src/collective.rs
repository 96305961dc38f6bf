//! The seam: what a step asks of its ring.

use std::ops::Range;
use std::time::Duration;

use crate::{AbortHandle, Result, Ring, Step};

/// Bytes of a message at most.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// One generation's ring, in the hands of one member.
///
/// All members call the same operations in the same order with the same steps. A call blocks until its result is
/// there, and returns an error at once when a member is lost or the [`AbortHandle`] is used. A member that is
/// frozen but not closed blocks the others until then.
///
/// After an error other than [`Error::Shape`](crate::Error::Shape) the collective is dead: its connections are closed
/// (so that the others learn), and every call returns [`Error::Dead`](crate::Error::Dead). Outputs and
/// gathered blocks may hold garbage then; partial sums and own blocks are never written to.
///
/// Dropping a collective closes it. Members that still wait for something from it get
/// [`Error::Lost`](crate::Error::Lost).
pub trait Collective: Send {
    /// Who we are, who serves which lanes and owns which blocks.
    fn ring(&self) -> &Ring;

    /// The handle that ends blocked calls from another thread.
    fn abort_handle(&self) -> AbortHandle;

    /// Begins the reduction of `step`. `message` (up to [`MESSAGE_BYTES_MAX`]) rides along to all members: the
    /// control word, loss sums, token counts.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for a message too long; [`Error::Dead`](crate::Error::Dead).
    fn reduction<'a>(&'a mut self, step: Step, message: &[u8]) -> Result<Box<dyn Reduction + 'a>>;

    /// Gives every member's own blocks of `buffer` (the whole flat buffer) to all members, in place: those that are summed
    /// ([`Shape::order`](crate::Shape)).
    ///
    /// # Errors
    /// Those of the trait.
    fn all_gather(&mut self, step: Step, buffer: &mut [f32]) -> Result<()>;

    /// Gives `message` (up to [`MESSAGE_BYTES_MAX`]) to all members; returns everyone's in the order of ranks.
    ///
    /// # Errors
    /// Those of the trait; [`Error::Shape`](crate::Error::Shape) for a message too long.
    fn exchange(&mut self, step: Step, message: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Adds the partial sums of all members along the tree over lanes: `out` gets our own blocks of the sum.
    ///
    /// `partials` are whole flat buffers, one for each of our parts ([`Ring::parts`]), in order. `out` has the length
    /// of [`Ring::elements`] of our rank. A [`reduction`](Self::reduction) whose blocks are all ready and that
    /// carries no message.
    ///
    /// # Errors
    /// Those of the trait; [`Error::Shape`](crate::Error::Shape) when buffers have the wrong number or length.
    fn reduce_scatter(&mut self, step: Step, partials: &[&[f32]], out: &mut [f32]) -> Result<()> {
        let partials = partials.to_vec();
        self.ring().check_reduce(&partials, out)?;
        self.reduction(step, &[])?.finish(&partials, out).map(drop)
    }
}

/// The partial sums of one member: whole flat buffers, one for each of its parts, which may still be written to where
/// nobody has said yet that blocks are final.
pub trait Partials: Sync {
    /// The length of each buffer, in elements.
    fn lens(&self) -> Vec<usize>;

    /// Some elements of one buffer; asked for only where their blocks are final.
    fn elements(&self, part: usize, range: Range<usize>) -> &[f32];
}

impl Partials for Vec<&[f32]> {
    fn lens(&self) -> Vec<usize> {
        self.iter().map(|partial| partial.len()).collect()
    }

    fn elements(&self, part: usize, range: Range<usize>) -> &[f32] {
        &self[part][range]
    }
}

/// A reduction under way. It is fed with blocks as they become final, so that sending overlaps with what computes the
/// rest, without a copy: nothing is borrowed between calls. Every call gets the same `partials` and `out`, as in
/// [`Collective::reduce_scatter`].
///
/// Dropping it before [`finish`](Self::finish) has succeeded ends the collective.
pub trait Reduction: Send {
    /// Says that `blocks` of all partial sums are final until `finish` returns, sends and receives what is possible, and
    /// returns when nothing moved for `patience`. Blocks go to an owner in the order of [`Shape`](crate::Shape): one
    /// that is not ready holds back the later ones of the same owner.
    ///
    /// # Errors
    /// As [`Collective`].
    fn advance(
        &mut self,
        blocks: Range<usize>,
        partials: &dyn Partials,
        out: &mut [f32],
        patience: Duration,
    ) -> Result<()>;

    /// Says that all blocks are final, and waits for the sum and for everyone's message, in the order of ranks.
    ///
    /// # Errors
    /// As [`Collective`].
    fn finish(self: Box<Self>, partials: &dyn Partials, out: &mut [f32]) -> Result<Vec<Vec<u8>>>;
}

pub(crate) fn check_message(message: &[u8]) -> Result<()> {
    if message.len() > MESSAGE_BYTES_MAX {
        return Err(crate::Error::shape(format!(
            "a message of {} bytes; {MESSAGE_BYTES_MAX} are allowed",
            message.len()
        )));
    }
    Ok(())
}

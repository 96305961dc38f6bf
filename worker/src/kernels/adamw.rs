//! Launches of `adamw.cu`.

use tch::{Kind, Tensor};

use super::{BLOCK, Kernels};
use crate::ffi::argument::Argument::{self, Elements, F32, I64};
use crate::optimizer::Scale;

/// Elements of a thread of those over flat buffers, as in the sources.
const OF_A_THREAD: usize = 4;

impl Kernels {
    /// One AdamW update in place of flat fp32 `weights` and moments, of which the first `decayed` decay, by the sum `gradient`.
    pub(crate) fn adamw_update(
        &self,
        scale: &Scale,
        [weights, exp_avg, exp_avg_sq]: [&Tensor; 3],
        gradient: &Tensor,
        decayed: usize,
    ) {
        let len = flat([weights, exp_avg, exp_avg_sq, gradient]);
        let [beta1, rest1, beta2, rest2] = scale.betas();
        let [correction2, eps, decay, rate] = scale.of_weights();
        self.launch_flat(
            "adamw_update",
            len,
            &[
                Elements(weights),
                Elements(exp_avg),
                Elements(exp_avg_sq),
                Elements(gradient),
                I64(len as i64),
                I64(decayed as i64),
                F32(scale.gradient as f32),
                F32(beta1),
                F32(rest1),
                F32(beta2),
                F32(rest2),
                F32(correction2),
                F32(eps),
                F32(decay),
                F32(rate),
            ],
        );
    }

    /// The moments' part of it, by a gradient that is scaled.
    pub(crate) fn adamw_moments(
        &self,
        scale: &Scale,
        [exp_avg, exp_avg_sq]: [&Tensor; 2],
        gradient: &Tensor,
    ) {
        let len = flat([exp_avg, exp_avg_sq, gradient]);
        let [beta1, rest1, beta2, rest2] = scale.betas();
        self.launch_flat(
            "adamw_moments",
            len,
            &[
                Elements(exp_avg),
                Elements(exp_avg_sq),
                Elements(gradient),
                I64(len as i64),
                F32(beta1),
                F32(rest1),
                F32(beta2),
                F32(rest2),
            ],
        );
    }

    /// The weights' part of it, by moments that are those of the step.
    pub(crate) fn adamw_weights(
        &self,
        scale: &Scale,
        weights: &Tensor,
        [exp_avg, exp_avg_sq]: [&Tensor; 2],
        decayed: usize,
    ) {
        let len = flat([weights, exp_avg, exp_avg_sq]);
        let [correction2, eps, decay, rate] = scale.of_weights();
        self.launch_flat(
            "adamw_weights",
            len,
            &[
                Elements(weights),
                Elements(exp_avg),
                Elements(exp_avg_sq),
                I64(len as i64),
                I64(decayed as i64),
                F32(correction2),
                F32(eps),
                F32(decay),
                F32(rate),
            ],
        );
    }

    /// The sum of squares of each row of 1024 of a flat fp32 gradient, each row halved ten times.
    pub(crate) fn square_rows(&self, gradient: &Tensor) -> Tensor {
        const ROW: usize = 1024;
        let len = flat([gradient]);
        assert!(len.is_multiple_of(ROW), "whole rows");
        let rows = len / ROW;
        let sums = Tensor::empty([rows as i64], (Kind::Float, gradient.device()));
        let warps = BLOCK as usize / 32;
        self.launch(
            "square_rows",
            rows.div_ceil(warps),
            BLOCK,
            &[Elements(&sums), Elements(gradient), I64(rows as i64)],
        );
        sums
    }

    /// A kernel that has a few elements of `len` a thread.
    fn launch_flat(&self, name: &'static str, len: usize, arguments: &[Argument<'_>]) {
        self.launch(name, len.div_ceil(OF_A_THREAD * BLOCK as usize), BLOCK, arguments);
    }
}

/// Elements of flat fp32 buffers that are as long as one another.
pub(super) fn flat<const N: usize>(buffers: [&Tensor; N]) -> usize {
    let len = buffers[0].numel();
    for buffer in buffers {
        let found = (buffer.kind(), buffer.numel(), buffer.is_contiguous());
        assert_eq!(found, (Kind::Float, len, true), "what a kernel is given");
    }
    len
}

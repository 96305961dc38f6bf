//! Launches of `cross_entropy.cu`.

use tch::{Kind, Tensor};

use super::{Kernels, dense, int, is_aligned, suffixed};
use crate::ffi::argument::Argument::{Elements, I32};

impl Kernels {
    /// Cross-entropy of the rows of `logits_nv` (fp32 or bf16) with `targets_n` (int64; below 0: it does not count), `[n]`, fp32.
    /// The logits become the gradient of the sum of these weighted by `weights_n` (fp32; 0 where it does not count).
    pub(crate) fn cross_entropy(&self, logits_nv: &Tensor, targets_n: &Tensor, weights_n: &Tensor) -> Tensor {
        let [n, v] = logits_nv.size()[..] else { panic!("logits are rows, not {:?}", logits_nv.size()) };
        let kind = logits_nv.kind();
        assert!(logits_nv.is_contiguous() && is_aligned(logits_nv), "logits become gradients in place");
        let targets = dense(targets_n, Kind::Int64, &[n]);
        let weights = dense(weights_n, Kind::Float, &[n]);
        let losses = Tensor::empty([n], (Kind::Float, logits_nv.device()));
        self.launch(
            suffixed(kind, "cross_entropy_f32", "cross_entropy_bf16"),
            n as usize,
            1024.min(32 * int(v).unsigned_abs().div_ceil(32)),
            &[Elements(&losses), Elements(logits_nv), Elements(&targets), Elements(&weights), I32(int(v))],
        );
        losses
    }
}

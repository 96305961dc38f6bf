//! Launches of `rope.cu`.

use tch::Tensor;

use super::{BLOCK, FAILED, Kernels, dense, int, is_aligned, suffixed};
use crate::ffi::argument::Argument::{Elements, F32, I32, I64};
use crate::ffi::node::with_backward;

impl Kernels {
    /// RoPE in the rotate-half form of `x`, `[n, heads, k]`, by the angles whose cos and sin are `[n, 1, k/2]`, all of one format;
    /// with a graph when one is recorded. Tokens of `x` may be any distance apart.
    pub(crate) fn rope(&self, x: &Tensor, cos_n1k: &Tensor, sin_n1k: &Tensor) -> Tensor {
        let y = tch::no_grad(|| self.rotated(x, cos_n1k, sin_n1k));
        let kernels = self.clone();
        let backward = move |g: &Tensor, saved: &[Tensor]| {
            let of_x = Tensor::empty(g.size(), (g.kind(), g.device()));
            kernels.rotate(&of_x, g, [&saved[0], &saved[1]], -1.0);
            Vec::from([of_x])
        };
        with_backward(&y, &[x], &[cos_n1k, sin_n1k], Box::new(backward)).expect(FAILED)
    }

    pub(super) fn rotated(&self, x: &Tensor, cos_n1k: &Tensor, sin_n1k: &Tensor) -> Tensor {
        let y = Tensor::empty(x.size(), (x.kind(), x.device()));
        self.rotate(&y, x, [cos_n1k, sin_n1k], 1.0);
        y
    }

    /// By the negative angles, in place, of heads that lie side by side in rows.
    pub(super) fn rotate_back(&self, x: &Tensor, cos_n1k: &Tensor, sin_n1k: &Tensor) {
        assert!(x.stride()[1..] == [x.size()[2], 1] && is_aligned(x), "heads that lie side by side");
        self.rotate(x, x, [cos_n1k, sin_n1k], -1.0);
    }

    /// `x` into `y`, whose heads lie side by side in rows.
    fn rotate(&self, y: &Tensor, x: &Tensor, tables: [&Tensor; 2], sign: f32) {
        let [n, heads, k] = x.size()[..] else { panic!("RoPE is of [n, heads, k], not of {:?}", x.size()) };
        let kind = x.kind();
        let [cos, sin] = tables.map(|table| dense(table, kind, &[n, 1, k / 2]));
        let by_token = x.stride()[1..] == [k, 1] && is_aligned(x);
        let x = if by_token { x.shallow_clone() } else { dense(&x.contiguous(), kind, &[n, heads, k]) };
        self.launch(
            suffixed(kind, "rope_f32", "rope_bf16"),
            n as usize,
            BLOCK,
            &[
                Elements(y),
                Elements(&x),
                Elements(&cos),
                Elements(&sin),
                I32(int(heads)),
                I32(int(k / 2)),
                I64(y.stride()[0]),
                I64(x.stride()[0]),
                F32(sign),
            ],
        );
    }
}

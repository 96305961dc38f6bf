//! Launches of `rms_norm.cu`.

use tch::{Kind, Tensor};

use super::{FAILED, Kernels, dense, int, suffixed};
use crate::ffi::argument::Argument::{Elements, F32, I32, Null};
use crate::ffi::node::with_backward;

/// Rows whose part of a norm's weight gradient one block adds up: part of what bits follow from.
const ROWS_OF_A_BLOCK: usize = 8;

/// Threads of a block that has rows of `width`: whole warps, about eight elements a thread and at most sixteen (`ELEMENTS` in the
/// sources) up to a width of 12,288.
fn threads_of_a_row(width: i64) -> u32 {
    assert!(width <= 12_288, "rows of {width} are wider than a block");
    32 * (width as u32).div_ceil(256).clamp(1, 24)
}

impl Kernels {
    /// RMSNorm of the rows of `x` (`[n, d]`, fp32 or bf16) with an fp32 `weight` (`[d]`), added to `residual` where there is one;
    /// with a graph when one is recorded.
    pub(crate) fn rms_norm(
        &self,
        x_nd: &Tensor,
        weight_d: &Tensor,
        residual_nd: Option<&Tensor>,
        eps: f64,
    ) -> Tensor {
        let [n, d] = x_nd.size()[..] else { panic!("a norm is of rows, not of {:?}", x_nd.size()) };
        let kind = x_nd.kind();
        let (y, inverse, x, weight) = tch::no_grad(|| {
            let (x, weight) = (dense(x_nd, kind, &[n, d]), dense(weight_d, Kind::Float, &[d]));
            let residual = residual_nd.map(|residual| dense(residual, kind, &[n, d]));
            let y = Tensor::empty([n, d], (kind, x.device()));
            let inverse = Tensor::empty([n], (Kind::Float, x.device()));
            let name = suffixed(kind, "rms_norm_forward_f32", "rms_norm_forward_bf16");
            self.launch(
                name,
                n as usize,
                threads_of_a_row(d),
                &[
                    Elements(&y),
                    Elements(&inverse),
                    Elements(&x),
                    Elements(&weight),
                    residual.as_ref().map_or(Null, Elements),
                    I32(int(d)),
                    F32(eps as f32),
                ],
            );
            (y, inverse, x, weight)
        });
        let inputs: Vec<&Tensor> = [x_nd, weight_d].into_iter().chain(residual_nd).collect();
        let (kernels, adds) = (self.clone(), residual_nd.is_some());
        let backward = move |g: &Tensor, saved: &[Tensor]| {
            let [x, weight, inverse] = saved else { unreachable!("three were saved") };
            let [of_x, of_weight] = kernels.rms_norm_backward(g, x, weight, inverse);
            let of_residual = adds.then(|| g.shallow_clone());
            [of_x, of_weight].into_iter().chain(of_residual).collect()
        };
        with_backward(&y, &inputs, &[&x, &weight, &inverse], Box::new(backward)).expect(FAILED)
    }

    /// Gradients of x and the weight.
    fn rms_norm_backward(
        &self,
        g_nd: &Tensor,
        x_nd: &Tensor,
        weight_d: &Tensor,
        inverse_n: &Tensor,
    ) -> [Tensor; 2] {
        let [n, d] = x_nd.size()[..] else { unreachable!("it was saved as rows") };
        let (kind, device) = (x_nd.kind(), x_nd.device());
        let g = dense(g_nd, kind, &[n, d]);
        let of_x = Tensor::empty([n, d], (kind, device));
        let blocks = (n as usize).div_ceil(ROWS_OF_A_BLOCK);
        let partials = Tensor::empty([blocks as i64, d], (Kind::Float, device));
        let name = suffixed(kind, "rms_norm_backward_f32", "rms_norm_backward_bf16");
        self.launch(
            name,
            blocks,
            threads_of_a_row(d),
            &[
                Elements(&of_x),
                Elements(&partials),
                Elements(&g),
                Elements(x_nd),
                Elements(weight_d),
                Elements(inverse_n),
                I32(int(n)),
                I32(int(d)),
                I32(ROWS_OF_A_BLOCK as i32),
            ],
        );
        let of_weight = Tensor::empty([d], (Kind::Float, device));
        self.launch(
            "rms_norm_weight",
            (d as usize).div_ceil(32),
            1024,
            &[Elements(&of_weight), Elements(&partials), I32(blocks as i32), I32(int(d))],
        );
        [of_x, of_weight]
    }
}

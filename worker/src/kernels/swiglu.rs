//! Launches of `swiglu.cu`.

use tch::{Kind, Tensor};

use super::{BLOCK, FAILED, Kernels, ONCE, dense, int, suffixed};
use crate::ffi::argument::Argument::{self, Elements, I32};
use crate::ffi::node::with_backward;

/// Elements of rows of `width` that a thread has at once, as in the sources.
fn at_once(kind: Kind, width: i64) -> i64 {
    let once = (ONCE / kind.elt_size_in_bytes()) as i64;
    if width % once == 0 { once } else { 1 }
}

impl Kernels {
    /// SwiGLU of rows [gate | up], `[n, 2f] -> [n, f]`, fp32 or bf16; with a graph when one is recorded.
    pub(crate) fn swiglu(&self, gate_up: &Tensor) -> Tensor {
        let [n, f2] = gate_up.size()[..] else { panic!("SwiGLU is of rows, not of {:?}", gate_up.size()) };
        let (kind, f) = (gate_up.kind(), f2 / 2);
        let (y, x) = tch::no_grad(|| {
            let x = dense(gate_up, kind, &[n, 2 * f]);
            let y = Tensor::empty([n, f], (kind, x.device()));
            let name = suffixed(kind, "swiglu_forward_f32", "swiglu_forward_bf16");
            self.launch_gates(name, (n, f), kind, &[Elements(&y), Elements(&x), I32(int(n)), I32(int(f))]);
            (y, x)
        });
        let kernels = self.clone();
        let backward = move |g: &Tensor, saved: &[Tensor]| Vec::from([kernels.swiglu_backward(g, &saved[0])]);
        with_backward(&y, &[gate_up], &[&x], Box::new(backward)).expect(FAILED)
    }

    fn swiglu_backward(&self, g_nf: &Tensor, gate_up: &Tensor) -> Tensor {
        let [n, f2] = gate_up.size()[..] else { unreachable!("it was saved as rows") };
        let (kind, f) = (gate_up.kind(), f2 / 2);
        let g = dense(g_nf, kind, &[n, f]);
        let of_gate_up = gate_up.empty_like();
        let name = suffixed(kind, "swiglu_backward_f32", "swiglu_backward_bf16");
        let arguments = [Elements(&of_gate_up), Elements(&g), Elements(gate_up), I32(int(n)), I32(int(f))];
        self.launch_gates(name, (n, f), kind, &arguments);
        of_gate_up
    }

    /// A kernel whose threads have some elements of a row of `f` each.
    fn launch_gates(&self, name: &'static str, (n, f): (i64, i64), kind: Kind, arguments: &[Argument<'_>]) {
        let threads = n * (f / at_once(kind, f));
        assert!(u32::try_from(threads).is_ok(), "a micro-batch has fewer than 2^32 gates");
        self.launch(name, (threads as usize).div_ceil(BLOCK as usize), BLOCK, arguments);
    }
}

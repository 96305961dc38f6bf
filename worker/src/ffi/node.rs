//! A backward of Rust's as a node of LibTorch's graph, by `shim.cpp`: tch has no such thing.

use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;

use tch::Tensor;

use super::torch::{Raw, Thrown, checked};

unsafe extern "C" {
    fn anello_with_backward(
        output: *const Raw,
        inputs: *const *const Raw,
        n_inputs: i64,
        saved: *const *const Raw,
        n_saved: i64,
        closure: *mut c_void,
        backward: Backward,
        release: unsafe extern "C" fn(*mut c_void),
        out: *mut *mut Raw,
    ) -> c_int;
}

type Backward = unsafe extern "C" fn(*mut c_void, *mut Raw, *mut *mut Raw, i64, *mut *mut Raw, i64) -> c_int;

/// From the gradient of the output and what was saved: the gradients of the inputs, in order. LibTorch calls it on a thread of
/// its own where the tensors are a GPU's, whose stream is then that of the forward.
pub(crate) type Gradients = Box<dyn Fn(&Tensor, &[Tensor]) -> Vec<Tensor> + Send + Sync>;

/// `output`, which was computed from `inputs` without a graph, with `backward` as its node where a graph is recorded. The graph
/// keeps `saved`.
pub(crate) fn with_backward(
    output: &Tensor,
    inputs: &[&Tensor],
    saved: &[&Tensor],
    backward: Gradients,
) -> Result<Tensor, Thrown> {
    let pointers = |tensors: &[&Tensor]| -> Vec<*const Raw> {
        tensors.iter().map(|tensor| tensor.as_ptr().cast()).collect()
    };
    let (of, kept) = (pointers(inputs), pointers(saved));
    let closure = Box::into_raw(Box::new(backward)).cast();
    let mut raw = null_mut();
    // SAFETY: live tensors, of which the shim makes others; it takes over the closure, and gives it to the two functions below
    // alone; `raw` is written only on success.
    checked(unsafe {
        anello_with_backward(
            output.as_ptr().cast(),
            of.as_ptr(),
            of.len() as i64,
            kept.as_ptr(),
            kept.len() as i64,
            closure,
            call,
            release,
            &raw mut raw,
        )
    })?;
    // SAFETY: made by `new at::Tensor`, as tch makes its own, which frees it.
    Ok(unsafe { Tensor::from_ptr(raw.cast()) })
}

/// Calls a closure that [`with_backward`] made.
unsafe extern "C" fn call(
    closure: *mut c_void,
    of_output: *mut Raw,
    saved: *mut *mut Raw,
    n_saved: i64,
    of_inputs: *mut *mut Raw,
    n_inputs: i64,
) -> c_int {
    // SAFETY: the pointer is that of a live `Gradients`, which may be called on any thread.
    let backward = unsafe { &*closure.cast::<Gradients>() };
    // SAFETY: tensors that the shim made for us to free, so many as it says.
    let (of_output, saved) = unsafe {
        let saved = (0..n_saved as usize).map(|i| Tensor::from_ptr((*saved.add(i)).cast()));
        (Tensor::from_ptr(of_output.cast()), saved.collect::<Vec<_>>())
    };
    // A panic has told its words, and must not pass through C++.
    let found = catch_unwind(AssertUnwindSafe(|| tch::no_grad(|| backward(&of_output, &saved))));
    let Ok(found) = found else { return -1 };
    if found.len() as i64 != n_inputs {
        return -1;
    }
    for (i, gradient) in found.into_iter().enumerate() {
        let mut gradient = std::mem::ManuallyDrop::new(gradient);
        // SAFETY: within the places that the shim has; it takes over the tensor.
        unsafe { *of_inputs.add(i) = gradient.as_mut_ptr().cast() };
    }
    0
}

/// Drops a closure that [`with_backward`] made, once.
unsafe extern "C" fn release(closure: *mut c_void) {
    // SAFETY: as it was made by `Box::into_raw`.
    drop(unsafe { Box::from_raw(closure.cast::<Gradients>()) });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn doubled(x: &Tensor, backward: Gradients) -> Tensor {
        let output = tch::no_grad(|| x * 2.0);
        with_backward(&output, &[x], &[x], backward).unwrap()
    }

    #[test]
    fn a_backward_is_called_with_the_gradient_and_what_was_saved_and_then_let_go() {
        let x = Tensor::from_slice(&[1f32, -3.0]).set_requires_grad(true);
        let kept = Arc::new(());
        let held = Arc::clone(&kept);
        // Not the derivative, so that it is known who was asked.
        let y = doubled(
            &x,
            Box::new(move |g, saved| {
                let _ = &held;
                Vec::from([g * &saved[0]])
            }),
        );
        let z = (&y * Tensor::from_slice(&[10f32, 100.0])).sum(tch::Kind::Float);
        let found = Tensor::run_backward(&[z], &[&x], false, false);
        assert_eq!(Vec::<f32>::try_from(&found[0]).unwrap(), [10.0, -300.0]);
        assert_eq!(Vec::<f32>::try_from(&y.detach()).unwrap(), [2.0, -6.0]);
        drop((y, found));
        assert_eq!(Arc::strong_count(&kept), 1);
    }

    #[test]
    fn without_a_graph_there_is_no_node() {
        let x = Tensor::from_slice(&[1f32]).set_requires_grad(true);
        let y = tch::no_grad(|| doubled(&x, Box::new(|_, _| unreachable!("nobody asks"))));
        assert!(!y.requires_grad());
        let y = doubled(&x.detach(), Box::new(|_, _| unreachable!("nobody asks")));
        assert!(!y.requires_grad());
    }

    #[test]
    fn a_backward_that_panics_is_an_error_of_the_walk() {
        let x = Tensor::from_slice(&[1f32]).set_requires_grad(true);
        let panics: Gradients = Box::new(|_, _| -> Vec<Tensor> { panic!("on purpose") });
        for backward in [panics, Box::new(|_, _| Vec::new())] {
            let y = doubled(&x, backward).sum(tch::Kind::Float);
            let error = Tensor::f_run_backward(&[y], &[&x], false, false).unwrap_err().to_string();
            assert!(error.contains("the backward of a fused kernel failed"), "{error}");
        }
    }
}

//! What an update does to all elements alike, and the formula of one.

use tch::Tensor;

use crate::kernels::Kernels;

/// What the update of a step has in common for all elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scale {
    /// Of the gradient's sum: the mean over tokens, and the clip.
    pub gradient: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// 1 − β2^u.
    pub correction2: f64,
    /// 1 − lr·decay.
    pub decay: f64,
    /// lr / (1 − β1^u).
    pub rate: f64,
}

impl Scale {
    /// β1, 1 − β1, β2 and 1 − β2 as fp32.
    pub fn betas(&self) -> [f32; 4] {
        [self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2].map(|value| value as f32)
    }

    /// 1 − β2^u, ε, 1 − lr·decay and lr / (1 − β1^u) as fp32.
    pub fn of_weights(&self) -> [f32; 4] {
        [self.correction2, self.eps, self.decay, self.rate].map(|value| value as f32)
    }

    pub fn moments(&self, kernels: Option<&Kernels>, m: &mut Tensor, v: &mut Tensor, g: &Tensor) {
        if let Some(kernels) = kernels {
            return kernels.adamw_moments(self, [m, v], g);
        }
        *m *= self.beta1;
        *m += g * (1.0 - self.beta1);
        *v *= self.beta2;
        *v += g.square() * (1.0 - self.beta2);
    }

    pub fn weights(&self, kernels: Option<&Kernels>, w: &mut Tensor, m: &Tensor, v: &Tensor, decayed: bool) {
        if let Some(kernels) = kernels {
            let len = if decayed { w.numel() } else { 0 };
            return kernels.adamw_weights(self, w, [m, v], len);
        }
        let root = (v / self.correction2).sqrt() + self.eps;
        if decayed {
            *w *= self.decay;
        }
        *w -= m / root * self.rate;
    }
}

//! The GPUs that plans know, from their makers' data sheets.

use std::fmt;
use std::str::FromStr;

use crate::run::Dtype;

/// A kind of GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    /// What a user calls it.
    pub name: &'static str,
    /// Dense bf16 matrix multiplications, FLOP/s.
    pub bf16_flops: f64,
    /// fp32 outside the tensor cores, FLOP/s.
    pub fp32_flops: f64,
    /// Memory, bytes.
    pub memory_bytes: u64,
}

impl Gpu {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::of("a100", 312e12, 19.5e12, 80),
        Self::of("h100", 989e12, 67e12, 80),
        Self::of("h200", 989e12, 67e12, 141),
        Self::of("b200", 2250e12, 80e12, 180),
        Self::of("l40s", 362e12, 91.6e12, 48),
        Self::of("rtx-4090", 165e12, 82.6e12, 24),
    ];

    const fn of(name: &'static str, bf16_flops: f64, fp32_flops: f64, gigabytes: u64) -> Self {
        Self { name, bf16_flops, fp32_flops, memory_bytes: gigabytes * 1_000_000_000 }
    }

    /// Peak of matrix multiplications in this format, FLOP/s.
    pub fn peak(&self, dtype: Dtype) -> f64 {
        match dtype {
            Dtype::Fp32 => self.fp32_flops,
            Dtype::Bf16 => self.bf16_flops,
        }
    }
}

/// No GPU of this name is known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no GPU is called {0}; there are {all}", all = Gpu::ALL.map(|gpu| gpu.name).join(", "))]
pub struct UnknownGpu(String);

impl FromStr for Gpu {
    type Err = UnknownGpu;

    fn from_str(name: &str) -> Result<Self, UnknownGpu> {
        let gpu = Self::ALL.into_iter().find(|gpu| gpu.name.eq_ignore_ascii_case(name));
        gpu.ok_or_else(|| UnknownGpu(name.to_owned()))
    }
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

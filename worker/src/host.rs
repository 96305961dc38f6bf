//! Flat buffers of a device, as memory of the host: in place on a CPU, a copy from a GPU.

use std::ops::Deref;

use tch::{Device, Tensor};
use zerocopy::IntoBytes;

use crate::ffi;
use crate::params::BLOCK;

/// Blocks of a GPU's buffer that are on the host at a time: 256 MiB.
const PIECE: usize = 256 << 20 >> 2;
const _: () = assert!(PIECE.is_multiple_of(BLOCK), "a piece is of whole blocks");

/// Elements of an fp32 buffer, readable here.
#[derive(Debug)]
pub(crate) struct OnHost(Tensor);

impl OnHost {
    /// Those of `tensor`: itself on a CPU, where nobody may write to it meanwhile; else a copy.
    pub fn of(tensor: &Tensor) -> Self {
        match tensor.device() {
            Device::Cpu => Self(tensor.shallow_clone()),
            _ => Self(tensor.to_device(Device::Cpu)),
        }
    }
}

impl Deref for OnHost {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        ffi::as_slice(&self.0)
    }
}

/// A flat buffer in pieces of whole blocks, in order: all of it at once on a CPU.
pub(crate) fn pieces(flat: &Tensor) -> impl Iterator<Item = OnHost> {
    let len = flat.numel();
    let piece = if flat.device() == Device::Cpu { len.max(1) } else { PIECE };
    let flat = flat.shallow_clone();
    (0..len)
        .step_by(piece)
        .map(move |start| OnHost::of(&flat.narrow(0, start as i64, piece.min(len - start) as i64)))
}

/// What numbers are in files and on the wire: their bytes, little-endian, which is how they lie in memory.
pub(crate) fn bytes(values: &[f32]) -> &[u8] {
    values.as_bytes()
}

/// [`bytes()`] to write to.
pub(crate) fn bytes_mut(values: &mut [f32]) -> &mut [u8] {
    values.as_mut_bytes()
}

const _: () = assert!(cfg!(target_endian = "little"), "LibTorch is there for no other machines");

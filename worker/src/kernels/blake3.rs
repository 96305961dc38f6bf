//! Launches of `blake3.cu`.

use tch::{Device, Kind, Tensor};

use super::adamw::flat;
use super::{Kernels, is_aligned};
use crate::ffi::argument::Argument::Elements;
use crate::params::BLOCK;

/// Bytes of a chunk, of which a thread has one.
const CHUNK: usize = 1024;
const CHUNKS: usize = BLOCK * size_of::<f32>() / CHUNK;
const _: () = assert!(CHUNKS == 256, "as in the source");

impl Kernels {
    /// BLAKE3 of each block of a flat fp32 buffer, as `blake3::hash` has it of the same bytes on the host.
    pub(crate) fn block_digests(&self, values: &Tensor) -> Vec<blake3::Hash> {
        const WORDS: usize = blake3::OUT_LEN / 4;
        let len = flat([values]);
        assert!(len.is_multiple_of(BLOCK) && is_aligned(values), "whole blocks, which begin where one may");
        let blocks = len / BLOCK;
        let digests = Tensor::empty([blocks as i64, WORDS as i64], (Kind::Int, values.device()));
        self.launch("blake3_blocks", blocks, CHUNKS as u32, &[Elements(&digests), Elements(values)]);
        let words = Vec::<i32>::try_from(digests.to_device(Device::Cpu).view([-1])).expect("words");
        let digest = |words: &[i32; WORDS]| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            blake3::Hash::from_slice(&bytes).expect("as long as a digest")
        };
        words.as_chunks().0.iter().map(digest).collect()
    }
}

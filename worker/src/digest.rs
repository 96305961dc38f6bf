//! Digests of flat buffers by block, made where these lie: a GPU hashes its memory faster than the host could copy it.

use tch::{Device, Tensor};

use crate::kernels;
use crate::params::BLOCK;
use crate::{ffi, host};

/// Threads that hash at most: past so many the memory is what they wait for.
const THREADS: usize = 8;

/// BLAKE3 of each block of `flat`, fp32 and of whole blocks: of its bytes, little-endian.
pub(crate) fn of_blocks(flat: &Tensor) -> Vec<blake3::Hash> {
    if flat.device() == Device::Cpu {
        return on_host(ffi::as_slice(flat));
    }
    match kernels::if_there(flat.device()) {
        Some(kernels) => kernels.block_digests(flat),
        None => host::pieces(flat).flat_map(|piece| on_host(&piece)).collect(),
    }
}

/// One digest of all of `flats`, whatever the device: that of the digests of their blocks.
pub(crate) fn of_all(flats: &[&Tensor]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for digest in flats.iter().flat_map(|flat| of_blocks(flat)) {
        hasher.update(digest.as_bytes());
    }
    hasher.finalize()
}

/// By several threads.
fn on_host(values: &[f32]) -> Vec<blake3::Hash> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(THREADS);
    let share = values.len().div_ceil(threads).next_multiple_of(BLOCK).max(BLOCK);
    let of_share = |values: &[f32]| -> Vec<blake3::Hash> {
        values.chunks(BLOCK).map(|block| blake3::hash(host::bytes(block))).collect()
    };
    std::thread::scope(|scope| {
        let mut shares = values.chunks(share);
        let own = shares.next().unwrap_or(&[]);
        let others: Vec<_> = shares.map(|values| scope.spawn(move || of_share(values))).collect();
        let mut digests = of_share(own);
        digests.extend(others.into_iter().flat_map(|other| other.join().expect("hashing does not panic")));
        digests
    })
}

//! Digests of flat buffers by block, made where these lie: a GPU hashes its memory faster than the host could copy it.

use std::ops::Range;
use std::sync::LazyLock;

use tch::{Device, Tensor};

use crate::cover::both;
use crate::kernels;
use crate::optimizer::State;
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

/// BLAKE3 of a block of zeros.
static OF_ZEROS: LazyLock<blake3::Hash> = LazyLock::new(|| blake3::hash(&[0; BLOCK * 4]));

/// Those of the first and second moments of `blocks` of a state. They do not tell whether there is room for what is zero.
pub(crate) fn of_moments(state: &State, blocks: Range<usize>) -> [Vec<blake3::Hash>; 2] {
    let moved = both(&blocks, &state.moved);
    state.moments(blocks.clone()).map(|flat| {
        let mut digests = vec![*OF_ZEROS; blocks.len()];
        if !moved.is_empty() {
            let first = moved.start - blocks.start;
            digests[first..first + moved.len()].copy_from_slice(&of_blocks(&flat));
        }
        digests
    })
}

/// One digest of all of `flat`, whatever the device: that of the digests of its blocks.
pub(crate) fn of_all(flat: &Tensor) -> blake3::Hash {
    of_digests(&of_blocks(flat))
}

/// One digest of these.
pub(crate) fn of_digests<'a>(digests: impl IntoIterator<Item = &'a blake3::Hash>) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for digest in digests {
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

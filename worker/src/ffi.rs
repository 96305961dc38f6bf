//! The only unsafe code: what the C library offers and no crate of ours wraps.
#![allow(unsafe_code)]

use std::sync::Once;

/// Keeps freed memory in the process for the next tensor, from the first call on.
///
/// A step allocates and frees the same large tensors over and over. By default glibc hands each back to the kernel,
/// which zeroes new pages for the next: a fifth of a small model's step on a CPU. What stays is what a step needed at
/// its most, so the peak does not move. Elsewhere than on glibc this does nothing.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use std::ffi::c_int;
        const M_TRIM_THRESHOLD: c_int = -1;
        const M_MMAP_THRESHOLD: c_int = -3;
        const LARGE: c_int = 1 << 30;
        unsafe extern "C" {
            fn mallopt(parameter: c_int, value: c_int) -> c_int;
        }
        static CALLED: Once = Once::new();
        CALLED.call_once(|| {
            // SAFETY: glibc's own function, declared as in malloc.h; it takes the allocator's lock. A value it does
            // not accept changes nothing and is reported by the result, which no one needs.
            unsafe {
                mallopt(M_TRIM_THRESHOLD, c_int::MAX);
                mallopt(M_MMAP_THRESHOLD, LARGE);
            }
        });
    }
}

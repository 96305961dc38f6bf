//! What the kernel knows of a connection.
#![allow(unsafe_code, reason = "getsockopt(TCP_INFO), which rustix and nix do not have")]

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

/// A connection, as its kernel has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Info {
    /// Times that bytes or questions were sent anew since the last acknowledgement.
    pub asked: u32,
    /// Since the last acknowledgement.
    pub last_heard: Duration,
    /// From a segment to its acknowledgement, the shortest: who is busy acknowledges late.
    pub round_trip: Duration,
}

/// Absent where the kernel does not say.
pub(crate) fn info(socket: &impl AsFd) -> Option<Info> {
    let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the descriptor is open while it is borrowed, and the kernel writes at most `len` bytes, which are there.
    let status = unsafe {
        let fd = socket.as_fd().as_raw_fd();
        libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut len)
    };
    if status != 0 {
        return None;
    }
    // SAFETY: integers alone, for which what the kernel left out, being zero, is a value too.
    let info = unsafe { info.assume_init() };
    Some(Info {
        asked: u32::from(info.tcpi_retransmits) + u32::from(info.tcpi_probes),
        last_heard: Duration::from_millis(info.tcpi_last_ack_recv.into()),
        round_trip: Duration::from_micros(info.tcpi_min_rtt.into()),
    })
}

//! Whether the kernel asks for acknowledgements of a connection in vain: what no option of sockets ends in time.
//!
//! TCP_USER_TIMEOUT would, but it counts a window that the other side keeps full as well, and who computes does not empty the
//! one for blocks. The kernel tells both apart: from a machine that is there, a full window is answered.
#![allow(unsafe_code, reason = "getsockopt(TCP_INFO), which rustix and nix do not have")]

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

/// What a connection was seen to do, look by look.
#[derive(Debug, Default)]
pub(crate) struct Unheard {
    /// The first and the last of the looks that have all found the kernel asking, without an acknowledgement between them.
    looks: Option<(Instant, Instant)>,
}

impl Unheard {
    /// Looks at the connection: for how long its kernel has been seen asking in vain, with looks at most `pause` apart. What is
    /// seen once may be a question whose answer is on its way.
    pub fn look(&mut self, socket: &impl AsFd, now: Instant, pause: Duration) -> Duration {
        let Some(Info { asked: 1.., last_heard }) = info(socket) else {
            self.looks = None;
            return Duration::ZERO;
        };
        let goes_on = |(first, last): &(Instant, Instant)| now - *last <= pause && last_heard >= now - *first;
        let (first, _) = self.looks.filter(goes_on).unwrap_or((now, now));
        self.looks = Some((first, now));
        now - first
    }
}

/// Whether a connection's kernel has asked in vain more than once, and nothing was acknowledged for `time`: what one look tells.
pub(crate) fn is_unheard(socket: &impl AsFd, time: Duration) -> bool {
    info(socket).is_some_and(|Info { asked, last_heard }| asked > 1 && last_heard >= time)
}

struct Info {
    /// Times that bytes or questions were sent anew since the last acknowledgement.
    asked: u32,
    last_heard: Duration,
}

/// Absent where the kernel does not say.
fn info(socket: &impl AsFd) -> Option<Info> {
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
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_window_that_stays_full_is_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _other = listener.accept().unwrap();
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[0; 1 << 16]).is_ok() {}
        let (mut unheard, start) = (Unheard::default(), Instant::now());
        // The kernel's questions come twice as long apart each time: here up to 1.6 s.
        while start.elapsed() < Duration::from_secs(4) {
            std::thread::sleep(Duration::from_millis(100));
            let found = unheard.look(&socket, Instant::now(), Duration::from_secs(60));
            assert!(found < Duration::from_secs(1), "{found:?}");
        }
    }
}

//! Whether the kernel asks for acknowledgements of a connection in vain: what no option of sockets ends in time.
//!
//! TCP_USER_TIMEOUT would, but it counts a window that the other side keeps full as well, and who computes does not empty the
//! one for blocks. The kernel tells both apart: from a machine that is there, a full window is answered.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::info::{Info, info};

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
        let Some(Info { asked: 1.., last_heard, .. }) = info(socket) else {
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
    info(socket).is_some_and(|Info { asked, last_heard, .. }| asked > 1 && last_heard >= time)
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

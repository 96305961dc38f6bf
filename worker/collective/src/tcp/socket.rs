//! What the standard library has no safe call for: poll, dialing without blocking, buffer sizes.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

use super::info::info;
use super::stream::Stream;
use crate::{AbortHandle, Error, Result};

/// What is waited for, each with a mark of the caller.
pub(crate) struct Poll<'a, T> {
    fds: Vec<PollFd<'a>>,
    marks: Vec<T>,
    /// What holds whatever the kernel says.
    at_once: Vec<PollFlags>,
}

impl<'a, T> Poll<'a, T> {
    pub fn new() -> Self {
        Self { fds: Vec::new(), marks: Vec::new(), at_once: Vec::new() }
    }

    pub fn push(&mut self, fd: &'a impl AsFd, flags: PollFlags, mark: T) {
        self.fds.push(PollFd::new(fd, flags));
        self.marks.push(mark);
        self.at_once.push(PollFlags::empty());
    }

    /// The same for a connection that may hold bytes itself: those that came are ready, those that go are waited for.
    pub fn push_stream(&mut self, stream: &'a Stream, mut flags: PollFlags, mark: T) {
        flags.set(PollFlags::OUT, flags.contains(PollFlags::OUT) || stream.has_unsent());
        self.push(stream, flags, mark);
        if stream.has_unread() {
            self.at_once[self.fds.len() - 1] = flags & PollFlags::IN;
        }
    }

    /// Waits until something is ready or `timeout` (none: for ever) is over; what is ready, with its flags.
    pub fn wait(mut self, timeout: Option<Duration>) -> Result<Vec<(T, PollFlags)>> {
        let is_ready = self.at_once.iter().any(|flags| !flags.is_empty());
        let timeout = if is_ready { Some(Duration::ZERO) } else { timeout };
        // Rounded up, so that a deadline is over when the wait is.
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: timeout.as_secs().min(1 << 30) as i64,
            tv_nsec: i64::from(timeout.subsec_nanos()),
        });
        match poll(&mut self.fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Error::system("waiting for connections")(errno.into())),
        }
        let flags = self.fds.iter().zip(self.at_once).map(|(fd, at_once)| fd.revents() | at_once);
        Ok(self.marks.into_iter().zip(flags).filter(|(_, flags)| !flags.is_empty()).collect())
    }
}

/// The end of a pipe that becomes readable when the handle is used.
#[derive(Debug)]
pub(crate) struct Wake {
    readable: UnixStream,
    /// Kept here alone: the handle may live longer, and must not keep descriptors open.
    _writable: Arc<UnixStream>,
}

impl Wake {
    pub fn by(abort: &AbortHandle) -> Result<Self> {
        let (readable, writable) = UnixStream::pair().map_err(Error::system("making a wake-up pipe"))?;
        let writable = Arc::new(writable);
        let weak = Arc::downgrade(&writable);
        abort.on_abort(move || {
            if let Some(writable) = weak.upgrade() {
                // Full means that it is readable already.
                let _ = io::Write::write(&mut &*writable, &[1]);
            }
        });
        Ok(Self { readable, _writable: writable })
    }

    pub fn fd(&self) -> &UnixStream {
        &self.readable
    }
}

/// Begins to connect to `address`; the connection is there when the socket is writable and has no error.
pub(crate) fn dial(address: SocketAddr, buffer_bytes: Option<usize>) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
    unpace(&socket);
    // Before connecting: the window's scale is settled then.
    set_buffers(&socket, buffer_bytes)?;
    match connect(&socket, &address) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(socket.into()),
        Err(errno) => Err(errno.into()),
    }
}

/// Receive buffer of a connection for messages: with what the kernel doubles it to, twice the most that may wait there for
/// who computes meanwhile, so that [`watch`] never takes a full window for silence.
const MESSAGES_BYTES: usize = 208 << 10;

/// Has the kernel notice when nothing is heard from the other machine for `silence`, though this process may not look, and the
/// other neither: it asks when all is quiet. Seconds are what the kernel counts in, so it may be one later. What was lost
/// ends the connection after `silence` only where `messages` says that it is for these: the kernel takes a window that stays
/// full for silence too, and who computes does not empty the one for blocks.
pub(crate) fn watch(socket: &impl AsFd, silence: Duration, messages: bool) -> io::Result<()> {
    let silence_ms = u32::try_from(silence.as_millis()).unwrap_or(u32::MAX).max(1);
    let pause = Duration::from_secs((silence.as_secs() / 3).clamp(1, 1 << 14));
    sockopt::set_tcp_keepidle(socket, pause)?;
    sockopt::set_tcp_keepintvl(socket, pause)?;
    sockopt::set_tcp_keepcnt(socket, 3)?;
    sockopt::set_socket_keepalive(socket, true)?;
    if messages {
        if sockopt::socket_recv_buffer_size(socket)? < 2 * MESSAGES_BYTES {
            sockopt::set_socket_recv_buffer_size(socket, MESSAGES_BYTES)?;
        }
        sockopt::set_tcp_user_timeout(socket, silence_ms)?;
    }
    Ok(())
}

/// Round trips of a network of one's own are shorter.
const NEAR: Duration = Duration::from_millis(1);

/// Has a socket that is not connected yet send without pacing, where the system's default is BBR: that sends by a clock and in
/// small pieces, which is for long ways with losses, and on a near one nearly doubles what an exchange costs in CPU time
/// (docs/measured.md). A connection that has once been paced stays so. Returns what it would have been.
pub(crate) fn unpace(socket: &impl AsFd) -> Option<String> {
    let paced = sockopt::tcp_congestion(socket).ok().filter(|name| name.starts_with("bbr"))?;
    // Which of the two there is, the kernel says; with neither it stays as it is.
    let unpaced =
        ["cubic", "reno"].into_iter().find(|name| sockopt::set_tcp_congestion(socket, name).is_ok());
    unpaced.map(|_| paced)
}

/// Gives a connection to a machine that is far away the system's default back.
pub(crate) fn pace_if_far(socket: &impl AsFd, default: &str) {
    if info(socket).is_some_and(|info| info.round_trip >= NEAR) {
        // Else it stays as it is, and works.
        let _ = sockopt::set_tcp_congestion(socket, default);
    }
}

/// Whether an error says that nothing came back, rather than that somebody closed or refused: also that there is no way.
pub(crate) fn is_silence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable
    )
}

/// Whether an attempt to connect fails since no packet gets there: routes that lead nowhere have errors of their own.
pub(crate) fn has_no_way(error: &io::Error) -> bool {
    is_silence(error) || matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::PermissionDenied)
}

/// Sets both socket buffers; the kernel's own tuning stays on with `None`.
pub(crate) fn set_buffers(socket: &impl AsFd, bytes: Option<usize>) -> io::Result<()> {
    if let Some(bytes) = bytes {
        sockopt::set_socket_recv_buffer_size(socket, bytes)?;
        sockopt::set_socket_send_buffer_size(socket, bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_near_connection_is_not_paced() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = |name: &str| {
            let socket = dial(listener.local_addr().unwrap(), None).unwrap();
            sockopt::set_tcp_congestion(&socket, name).map(|()| socket)
        };
        let named = |socket: &TcpStream| sockopt::tcp_congestion(socket).unwrap();
        let socket = near("reno").unwrap();
        assert_eq!((unpace(&socket), named(&socket)), (None, "reno".to_owned()), "it is not paced");
        match near("bbr") {
            Err(cause) => println!("NOT RUN, for this kernel or user has no BBR: {cause}"),
            Ok(socket) => {
                assert_eq!(unpace(&socket), Some("bbr".to_owned()));
                let unpaced = named(&socket);
                assert!(["cubic", "reno"].contains(&unpaced.as_str()), "{unpaced}");
                pace_if_far(&socket, "bbr");
                assert_eq!(named(&socket), unpaced, "this machine is near");
            }
        }
    }
}

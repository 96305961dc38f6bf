//! What the standard library has no safe call for: poll, dialing without blocking, buffer sizes.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

use crate::{AbortHandle, Error, Result};

/// What is waited for, each with a mark of the caller.
pub(crate) struct Poll<'a, T> {
    fds: Vec<PollFd<'a>>,
    marks: Vec<T>,
}

impl<'a, T> Poll<'a, T> {
    pub fn new() -> Self {
        Self { fds: Vec::new(), marks: Vec::new() }
    }

    pub fn push(&mut self, fd: &'a impl AsFd, flags: PollFlags, mark: T) {
        self.fds.push(PollFd::new(fd, flags));
        self.marks.push(mark);
    }

    /// Waits until something is ready or `timeout` (none: for ever) is over; what is ready, with its flags.
    pub fn wait(mut self, timeout: Option<Duration>) -> Result<Vec<(T, PollFlags)>> {
        // Rounded up, so that a deadline is over when the wait is.
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: timeout.as_secs().min(1 << 30) as i64,
            tv_nsec: i64::from(timeout.subsec_nanos()),
        });
        match poll(&mut self.fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Error::system("waiting for connections")(errno.into())),
        }
        let ready = self.marks.into_iter().zip(self.fds).map(|(mark, fd)| (mark, fd.revents()));
        Ok(ready.filter(|(_, flags)| !flags.is_empty()).collect())
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
    // Before connecting: the window's scale is settled then.
    set_buffers(&socket, buffer_bytes)?;
    match connect(&socket, &address) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(socket.into()),
        Err(errno) => Err(errno.into()),
    }
}

/// Sets both socket buffers; the kernel's own tuning stays on with `None`.
pub(crate) fn set_buffers(socket: &impl AsFd, bytes: Option<usize>) -> io::Result<()> {
    if let Some(bytes) = bytes {
        sockopt::set_socket_recv_buffer_size(socket, bytes)?;
        sockopt::set_socket_send_buffer_size(socket, bytes)?;
    }
    Ok(())
}

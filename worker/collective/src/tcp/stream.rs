//! A connection between members: a plain socket, or one with TLS between the frames and it. Neither ever blocks.

use std::io::{self, BufReader, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use anello_tls::{Protocol, Role, Tls};
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

/// Sealed bytes that are read at once: two records of TLS.
const SEALED_BYTES: usize = 32 << 10;

/// How members prove to one another that they are workers.
#[derive(Clone, Debug)]
pub(crate) struct Security {
    pub tls: Tls,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Security {
    pub fn new(tls: Tls) -> Self {
        let client = tls.client(Protocol::Ring);
        let server = tls.server(Protocol::Ring, &[Role::Worker]);
        Self { tls, client, server }
    }
}

/// A connection between members.
#[derive(Debug)]
pub(crate) enum Stream {
    Plain(TcpStream),
    Tls(Box<Sealed>),
}

/// A socket under TLS. The handshake is made by reading and writing, like all else.
///
/// Holds at most [`SEALED_BYTES`] that came and 64 KiB that go, and what rustls keeps of a handshake: 64 KiB.
#[derive(Debug)]
pub(crate) struct Sealed {
    session: Connection,
    socket: BufReader<TcpStream>,
    /// Opened bytes that nobody has read yet.
    opened: usize,
}

impl Stream {
    /// The side that dialed `socket`.
    pub fn dialed(socket: TcpStream, security: Option<&Security>) -> io::Result<Self> {
        let Some(security) = security else { return Ok(Self::Plain(socket)) };
        let session = ClientConnection::new(security.client.clone(), Role::Worker.server_name());
        Ok(Self::sealed(session.map_err(io::Error::other)?.into(), socket))
    }

    /// The side to which `socket` came.
    pub fn accepted(socket: TcpStream, security: Option<&Security>) -> io::Result<Self> {
        let Some(security) = security else { return Ok(Self::Plain(socket)) };
        let session = ServerConnection::new(security.server.clone());
        Ok(Self::sealed(session.map_err(io::Error::other)?.into(), socket))
    }

    fn sealed(session: Connection, socket: TcpStream) -> Self {
        let socket = BufReader::with_capacity(SEALED_BYTES, socket);
        Self::Tls(Box::new(Sealed { session, socket, opened: 0 }))
    }

    /// Whether bytes that were written wait for the socket to take them: [`flush`](Write::flush) when it can.
    pub fn has_unsent(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(sealed) => sealed.session.wants_write(),
        }
    }

    /// Whether bytes can be read of which the socket knows nothing any more.
    pub fn has_unread(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(sealed) => sealed.opened > 0 || !sealed.socket.buffer().is_empty(),
        }
    }

    /// Says to the other side that nothing more comes.
    pub fn shutdown(&self) {
        let _ = self.socket().shutdown(Shutdown::Write);
    }

    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(sealed) => sealed.socket.get_ref(),
        }
    }
}

/// The error of TLS in an error of a connection.
pub(crate) fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}

impl Read for Stream {
    fn read(&mut self, place: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(place),
            Self::Tls(sealed) => sealed.read(place),
        }
    }

    fn read_vectored(&mut self, places: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read_vectored(places),
            // One place after the other: what is opened lies in memory, so that there is no call to save.
            Self::Tls(sealed) => match places.iter_mut().find(|place| !place.is_empty()) {
                Some(place) => sealed.read(place),
                None => Ok(0),
            },
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Tls(sealed) => sealed.write(|writer| writer.write(bytes)),
        }
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write_vectored(slices),
            Self::Tls(sealed) => sealed.write(|writer| writer.write_vectored(slices)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Tls(sealed) => sealed.send(),
        }
    }
}

impl Sealed {
    /// Reads what is opened; `WouldBlock` only when neither the socket nor we hold anything more.
    fn read(&mut self, place: &mut [u8]) -> io::Result<usize> {
        while self.opened == 0 {
            if self.session.read_tls(&mut self.socket)? == 0 {
                return Ok(0);
            }
            let state = self.session.process_new_packets();
            // Words of a handshake, or why we refuse. What the socket does not take now is unsent.
            let _ = self.send();
            let state = state.map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
            self.opened = state.plaintext_bytes_to_read();
        }
        let read = self.session.reader().read(place)?;
        self.opened -= read;
        Ok(read)
    }

    /// Seals bytes and sends what the socket takes. Takes none before those of earlier calls are sent, so that few wait.
    fn write(
        &mut self,
        bytes: impl FnOnce(&mut rustls::Writer<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.send()?;
        let taken = bytes(&mut self.session.writer())?;
        match self.send() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
            _ => Ok(taken),
        }
    }

    /// Sends what is sealed.
    fn send(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            match self.session.write_tls(self.socket.get_mut()) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

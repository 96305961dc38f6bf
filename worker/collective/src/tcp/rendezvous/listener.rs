//! The ports of a worker.

use std::io;
use std::net::{SocketAddr, TcpListener};

use anello_tls::Tls;

use super::super::socket::unpace;
use super::super::stream::Security;

/// What came to a listener and did not belong to the ring that was forming.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    /// Workers of an older generation of the job.
    pub stale: u64,
    /// Workers of a newer generation, told to try again.
    pub early: u64,
    /// Workers of another job.
    pub foreign: u64,
    /// Connections that said something else, or nothing for 5 s.
    pub garbage: u64,
    /// With TLS: connections without a certificate that makes them workers.
    pub untrusted: u64,
}

/// The ports of a worker, one at each of its addresses. It outlives generations: each rendezvous takes the connections that
/// came meanwhile.
#[derive(Debug)]
pub struct Listener {
    pub(super) sockets: Vec<TcpListener>,
    /// What paces connections by the system's default, where these begin without it.
    pub(in crate::tcp) paced: Option<String>,
    pub(super) security: Option<Security>,
    pub(super) refusals: Refusals,
}

impl Listener {
    /// Listens on `address`; port 0 takes a free one. Without TLS: for a network where only the job's workers are.
    ///
    /// # Errors
    /// Those of the system.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        Self { sockets: Vec::new(), paced: None, security: None, refusals: Refusals::default() }
            .and_at(address)
    }

    /// Listens on `address` too, as where a machine is reached by several networks: members try one after the other.
    ///
    /// # Errors
    /// Those of the system.
    pub fn and_at(mut self, address: SocketAddr) -> io::Result<Self> {
        let socket = TcpListener::bind(address)?;
        socket.set_nonblocking(true)?;
        // Those who come have it of the listener.
        self.paced = unpace(&socket).or(self.paced);
        self.sockets.push(socket);
        Ok(self)
    }

    /// The same with TLS, here and on the way to others: all members must have it.
    #[must_use]
    pub fn with_tls(self, tls: Tls) -> Self {
        Self { security: Some(Security::new(tls)), ..self }
    }

    /// Where it listens, in the order in which that was asked for.
    ///
    /// # Errors
    /// Those of the system.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.sockets.iter().map(TcpListener::local_addr).collect()
    }

    /// What was refused since it was bound.
    pub fn refusals(&self) -> Refusals {
        self.refusals
    }
}

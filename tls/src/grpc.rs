//! Connections of gRPC, with TLS or without: those that come to a server, and those that a client makes.
//!
//! Both sides speak HTTP/2 over what comes out of here, so that one place decides who may connect and says why not.
//! Strangers have 5 s and 64 KiB to prove who they are, 1024 of them at once; the rest waits in the kernel. Who speaks
//! HTTP/2 without TLS to a server that wants it is told so in HTTP/2.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::{Error, Protocol, Role, Tls};

/// For one that connects to prove who it is.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Connections that prove who they are at one moment.
const HANDSHAKES_MAX: usize = 1024;
/// Connections that are ready for the server to take them.
const READY_MAX: usize = 64;
/// Pause after a connection could not be accepted, as when descriptors run out.
const RETRY: Duration = Duration::from_millis(100);
/// Between two lines in the log about strangers, however many come.
const QUIET: Duration = Duration::from_secs(10);
/// For a server to say whether it wants TLS.
const ASK: Duration = Duration::from_secs(2);

/// Who is at the other end; it is among the extensions of each request.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its roles; absent without TLS.
    roles: Option<Vec<Role>>,
    /// Its address; absent when it was gone before anyone looked.
    address: Option<IpAddr>,
}

impl Peer {
    /// Where a request came from.
    pub fn address_of<T>(request: &Request<T>) -> Option<IpAddr> {
        request.extensions().get::<Self>()?.address
    }
}

/// Lets only those in who have `role`, or who came where there is no TLS: an interceptor of a service behind
/// [`incoming`].
pub fn only(role: Role) -> impl Fn(Request<()>) -> Result<Request<()>, Status> + Clone {
    move |request| match request.extensions().get::<Peer>() {
        Some(Peer { roles: None, .. }) => Ok(request),
        Some(Peer { roles: Some(roles), .. }) if roles.contains(&role) => Ok(request),
        Some(Peer { roles: Some(roles), .. }) => {
            let shown = Role::words(roles);
            // Somebody of ours, with a key that is not for this.
            tracing::warn!(%role, shown, "a call is refused");
            Err(Status::permission_denied(format!(
                "this is for a {role}, and the certificate is that of a {shown}; give one of `anello certs issue \
                 {role}`"
            )))
        }
        None => Err(Status::internal("this connection did not come through the door; report this as a bug")),
    }
}

/// A connection, with TLS or without.
#[derive(Debug)]
pub enum Wire<T> {
    /// Without.
    Plain(TcpStream),
    /// With.
    Tls(Box<T>),
}

/// A connection that was let in.
pub type Accepted = Wire<tokio_rustls::server::TlsStream<TcpStream>>;

/// A connection that we made.
type Dialed = Wire<BufReader<tokio_rustls::client::TlsStream<TcpStream>>>;

impl Connected for Accepted {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        let (roles, socket) = match self {
            Self::Plain(stream) => (None, stream),
            Self::Tls(stream) => {
                let (socket, session) = stream.get_ref();
                let shown = session.peer_certificates().and_then(|chain| chain.first());
                (Some(shown.map(Role::of).unwrap_or_default()), socket)
            }
        };
        Peer { roles, address: socket.peer_addr().ok().map(|address| address.ip()) }
    }
}

/// The same call on whichever it is.
macro_rules! either {
    ($wire:expr, $stream:ident => $call:expr) => {
        match $wire.get_mut() {
            Wire::Plain(stream) => {
                let $stream = Pin::new(stream);
                $call
            }
            Wire::Tls(stream) => {
                let $stream = Pin::new(&mut **stream);
                $call
            }
        }
    };
}

impl<T: AsyncRead + Unpin> AsyncRead for Wire<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_read(cx, buf))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Wire<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_shutdown(cx))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }
}

/// The connections that come to `listener`, each when it has proved who it is. With TLS those in who have one of the
/// roles; without, whoever comes.
pub fn incoming(listener: TcpListener, tls: Option<(&Tls, &[Role])>) -> ReceiverStream<io::Result<Accepted>> {
    let (ready, accepted) = mpsc::channel(READY_MAX);
    let config = tls.map(|(tls, roles)| tls.server(Protocol::Grpc, roles));
    tokio::spawn(accept(listener, config, ready));
    ReceiverStream::new(accepted)
}

async fn accept(
    listener: TcpListener,
    config: Option<Arc<ServerConfig>>,
    ready: mpsc::Sender<io::Result<Accepted>>,
) {
    let (room, log) = (Arc::new(Semaphore::new(HANDSHAKES_MAX)), Arc::new(Log::default()));
    loop {
        let stream = tokio::select! {
            () = ready.closed() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, address) = match stream {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        // Small words must not wait for one another.
        let _ = stream.set_nodelay(true);
        let Some(config) = config.clone() else {
            if ready.send(Ok(Wire::Plain(stream))).await.is_err() {
                return;
            }
            continue;
        };
        let seat = room.clone().acquire_owned().await.expect("nobody closes it");
        let (ready, log) = (ready.clone(), log.clone());
        tokio::spawn(async move {
            let shaken = tokio::time::timeout(HANDSHAKE, shake(stream, config)).await;
            drop(seat);
            match shaken {
                Ok(Ok(Some(accepted))) => drop(ready.send(Ok(accepted)).await),
                Ok(Ok(None)) => {}
                Ok(Err(cause)) => log.refused(address, &cause.to_string()),
                Err(_) => log.refused(address, "it did not prove who it is in time"),
            }
        });
    }
}

/// The connection, when it is let in; none when it was closed without a word, as whoever only looks whether we listen
/// does.
async fn shake(stream: TcpStream, config: Arc<ServerConfig>) -> io::Result<Option<Accepted>> {
    let mut first = [0; 1];
    if stream.peek(&mut first).await? == 0 {
        return Ok(None);
    }
    // A TLS connection begins with a handshake record.
    if first[0] != 0x16 {
        tell_that_tls_is_wanted(stream).await;
        return Err(io::Error::other("it does not speak TLS"));
    }
    Ok(Some(Wire::Tls(Box::new(TlsAcceptor::from(config).accept(stream).await?))))
}

/// An HTTP/2 connection that ends at once with INADEQUATE_SECURITY: settings (empty), then GOAWAY.
const GO_AWAY: &[u8; 26] = b"\0\0\0\x04\0\0\0\0\0\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\x0c";

async fn tell_that_tls_is_wanted(mut stream: TcpStream) {
    let said = async {
        stream.write_all(GO_AWAY).await?;
        stream.shutdown().await?;
        // Unread bytes would make the kernel cut the connection, our word included.
        tokio::io::copy(&mut stream.take(1 << 16), &mut tokio::io::sink()).await
    };
    let _ = said.await;
}

/// Tells of strangers, but not of more than one in a while.
#[derive(Debug, Default)]
struct Log {
    state: std::sync::Mutex<(u64, Option<Instant>)>,
}

impl Log {
    fn refused(&self, address: SocketAddr, cause: &str) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.0 += 1;
        if state.1.is_none_or(|said| said.elapsed() >= QUIET) {
            state.1 = Some(Instant::now());
            tracing::warn!(%address, cause, refused_so_far = state.0, "a connection is refused");
        }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address is none.
    #[error("{0} is no address; give host:port")]
    Address(String),
    /// Connecting again changes nothing.
    #[error(transparent)]
    Refused(#[from] Error),
    /// Nothing came back: no answer, and no refusal.
    #[error("{0}")]
    Unanswered(String),
    /// Nobody answers there now.
    #[error("{0}")]
    Away(String),
}

/// The other end of a connection to make.
#[derive(Clone, Debug)]
pub struct To {
    /// `host:port`.
    pub address: String,
    /// What it is to be.
    pub role: Role,
    /// Our certificates; absent: no TLS.
    pub tls: Option<Tls>,
}

impl To {
    /// A connection, within `patience`. It is made again when it broke and somebody asks for something.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect(&self, patience: Duration) -> Result<Channel, ConnectError> {
        self.dialed(patience, None, |endpoint| endpoint).await
    }

    /// The same, of somebody who says something all the time: it breaks when the other machine acknowledges nothing for `silence`, as
    /// one that is gone does, which closes nothing. Its kernel does that, however busy the process is.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect_talking(&self, silence: Duration) -> Result<Channel, ConnectError> {
        self.dialed(silence, Some(silence), |endpoint| endpoint).await
    }

    /// The same, and what is asked over it fails when nothing comes back from the other machine for `silence`.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect_watched(&self, silence: Duration) -> Result<Channel, ConnectError> {
        // HTTP/2 asks after one half, and gives up after the other.
        let half = silence / 2;
        self.dialed(silence, None, |endpoint| {
            endpoint.http2_keep_alive_interval(half).keep_alive_timeout(half).keep_alive_while_idle(true)
        })
        .await
    }

    async fn dialed(
        &self,
        patience: Duration,
        silence: Option<Duration>,
        with: impl FnOnce(Endpoint) -> Endpoint,
    ) -> Result<Channel, ConnectError> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address))
            .map_err(|_| ConnectError::Address(self.address.clone()))?;
        let endpoint = with(endpoint.connect_timeout(patience));
        let to = self.clone();
        let connector = tower::service_fn(move |_| {
            let to = to.clone();
            async move { to.dial(silence).await.map(TokioIo::new) }
        });
        let error = match endpoint.connect_with_connector(connector).await {
            Ok(channel) => return Ok(channel),
            Err(error) => error,
        };
        let mut causes = std::iter::successors(std::error::Error::source(&error), |cause| cause.source());
        match causes.find_map(|cause| cause.downcast_ref::<io::Error>()) {
            Some(cause) if is_lost(cause) => Err(ConnectError::Unanswered(cause.to_string())),
            Some(cause) => {
                Err(refusal(cause).map_or_else(|| ConnectError::Away(cause.to_string()), Into::into))
            }
            // The time is over.
            None => Err(ConnectError::Unanswered("no answer".to_owned())),
        }
    }

    /// What a person calls it.
    fn name(&self) -> String {
        format!("the {} at {}", self.role, self.address)
    }

    async fn dial(&self, silence: Option<Duration>) -> io::Result<Dialed> {
        let stream = TcpStream::connect(&self.address).await?;
        stream.set_nodelay(true)?;
        if let Some(silence) = silence {
            rustix::net::sockopt::set_tcp_user_timeout(&stream, silence.as_millis() as u32)?;
        }
        let Some(tls) = &self.tls else { return Ok(Dialed::Plain(stream)) };
        let explained =
            |error: io::Error| match error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
                Some(cause) => io::Error::other(tls.explain(cause, &self.name(), self.role)),
                None => error,
            };
        let connector = TlsConnector::from(tls.client(Protocol::Grpc));
        let stream = connector.connect(self.role.server_name(), stream).await.map_err(explained)?;
        // Our side is through before theirs has looked at our certificate; a server of HTTP/2 speaks first, so that its
        // first word says that we are in.
        let mut stream = BufReader::new(stream);
        if stream.fill_buf().await.map_err(explained)?.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection"));
        }
        Ok(Dialed::Tls(Box::new(stream)))
    }

    /// Whether a call failed since the two sides do not accept one another, so that asking again changes nothing.
    pub async fn refusal(&self, status: &Status) -> Option<Error> {
        let refused = |fact: &str, remedy: &str| Error::Refused {
            peer: self.name(),
            fact: fact.to_owned(),
            remedy: remedy.to_owned(),
        };
        // The connection's word, not the service's.
        let of_connection = std::error::Error::source(status).map(|source| {
            let mut causes = std::iter::successors(Some(source), |cause| cause.source());
            causes.find_map(|cause| refusal(cause.downcast_ref()?))
        });
        if let Some(error) = of_connection {
            if error.is_some() {
                return error;
            }
            let remedy = "give --tls DIR with certificates of its CA (ANELLO_TLS_DIR does the same)";
            return (self.tls.is_none() && self.wants_tls().await).then(|| refused("wants TLS", remedy));
        }
        let (fact, remedy) =
            status.message().split_once("; ").unwrap_or((status.message(), "its log may say more"));
        (status.code() == Code::PermissionDenied).then(|| refused(&format!("says: {fact}"), remedy))
    }

    /// Asks a server that ends our connections whether that is why. HTTP/2 itself tells a caller only what comes after its
    /// call.
    async fn wants_tls(&self) -> bool {
        let ask = async {
            let mut stream = TcpStream::connect(&self.address).await?;
            stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
            let mut word = [0; GO_AWAY.len()];
            stream.read_exact(&mut word).await?;
            Ok::<_, io::Error>(word == *GO_AWAY)
        };
        matches!(tokio::time::timeout(ASK, ask).await, Ok(Ok(true)))
    }
}

/// Whether an error says that nothing comes back from the other machine, or that there is no way to it.
fn is_lost(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::TimedOut
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::PermissionDenied
    )
}

/// What of ours is in an error of a connection.
fn refusal(error: &io::Error) -> Option<Error> {
    error.get_ref()?.downcast_ref::<Error>().cloned()
}

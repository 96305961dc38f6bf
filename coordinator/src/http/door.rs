//! Connections: how many, how slow, and with TLS or without.
//!
//! Who sends nothing, or reads nothing, holds a place for some seconds and no longer; who comes when all places are taken
//! is told so. HTTP/1.1 alone is spoken: a page and a scraper want no more.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anello_tls::{Protection, Protocol, Role as TlsRole};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;

use super::site::Site;
use crate::error::{Error, Result};
use crate::rate::Rates;

/// What one server bears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at one moment.
    pub connections: usize,
    /// For a TLS handshake, and for the head of a request; also how long a connection may be idle.
    pub head: Duration,
    /// For the body of a request.
    pub body: Duration,
    /// Without a byte of an answer taken.
    pub stall: Duration,
    /// Bytes of a request's head.
    pub head_bytes: usize,
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Readers of streams at one moment.
    pub streams: usize,
    /// Requests a second of one address; probes of health are not counted.
    pub rates: Rates,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 512,
            head: Duration::from_secs(10),
            body: Duration::from_secs(10),
            stall: Duration::from_secs(20),
            head_bytes: 16 << 10,
            body_bytes: 16 << 10,
            streams: 128,
            rates: Rates::DEFAULT,
        }
    }
}

/// A server that has its address and serves nothing yet.
#[derive(Debug)]
pub struct Bound {
    /// Where it listens.
    pub address: SocketAddr,
    listener: TcpListener,
    protection: Protection,
    limits: Limits,
}

/// A server under way.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    /// Where a browser finds it.
    pub url: String,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

/// For connections that are under way when it is stopped.
const FAREWELL: Duration = Duration::from_secs(1);
/// Pause after a connection could not be accepted, as when descriptors run out.
const RETRY: Duration = Duration::from_millis(100);

impl Bound {
    /// Takes `address` (port 0: any free one).
    ///
    /// # Errors
    /// [`Error::Serve`]; [`Error::Tls`] for an address that others reach when there is no TLS.
    pub async fn bind(address: SocketAddr, protection: Protection, limits: Limits) -> Result<Self> {
        protection.check(address.ip())?;
        let failed =
            |cause: io::Error| Error::Serve { address: address.to_string(), cause: cause.to_string() };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { address, listener, protection, limits })
    }

    /// Serves `site` on the current runtime. With TLS, whoever connects shows a certificate of a user or a worker, unless the
    /// site has tokens: those say who it is then.
    pub fn serve(self, site: Site) -> Server {
        let Self { address, listener, protection, limits } = self;
        let site = site.bounded(limits, address.ip().is_loopback() && protection.tls().is_none());
        let tls = protection.tls().map(|tls| match site.has_tokens() {
            true => tls.server_for_anyone(Protocol::Http),
            false => tls.server(Protocol::Http, &[TlsRole::User, TlsRole::Worker]),
        });
        let url = format!("{}://{address}/", if tls.is_some() { "https" } else { "http" });
        let (stop, stopped) = watch::channel(false);
        let door = Door { site, limits, tls: tls.map(TlsAcceptor::from), stopped };
        let task = tokio::spawn(door.accept(listener));
        Server { address, url, stop, task }
    }
}

impl Server {
    /// Ends it, and every connection.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        self.task.abort();
        let _ = self.task.await;
        let _ = tokio::time::timeout(FAREWELL, self.stop.closed()).await;
    }
}

#[derive(Clone)]
struct Door {
    site: Site,
    limits: Limits,
    tls: Option<TlsAcceptor>,
    stopped: watch::Receiver<bool>,
}

impl Door {
    async fn accept(self, listener: TcpListener) {
        let room = Arc::new(Semaphore::new(self.limits.connections));
        loop {
            let (stream, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "an HTTP connection could not be accepted");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            let _ = stream.set_nodelay(true);
            let door = self.clone();
            match room.clone().try_acquire_owned() {
                Ok(place) => drop(tokio::spawn(async move {
                    let mut stopped = door.stopped.clone();
                    tokio::select! {
                        () = door.serve(stream, from) => {}
                        _ = stopped.wait_for(|stopped| *stopped) => {}
                    }
                    drop(place);
                })),
                Err(_) => drop(tokio::spawn(turn_away(stream))),
            }
        }
    }

    async fn serve(&self, stream: TcpStream, from: SocketAddr) {
        let stream = Patient::new(stream, self.limits.stall);
        match &self.tls {
            None => self.speak(stream, from).await,
            Some(tls) => match tokio::time::timeout(self.limits.head, tls.accept(stream)).await {
                Ok(Ok(stream)) => self.speak(stream, from).await,
                Ok(Err(cause)) => tracing::debug!(%cause, %from, "an HTTP connection is refused"),
                Err(_) => tracing::debug!(%from, "an HTTP connection did not prove who it is in time"),
            },
        }
    }

    async fn speak<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, stream: S, from: SocketAddr) {
        let site = self.site.clone();
        let service = hyper::service::service_fn(move |request| {
            let site = site.clone();
            async move { Ok::<_, std::convert::Infallible>(site.answer(request, from).await) }
        });
        let spoken = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.head)
            .max_buf_size(self.limits.head_bytes)
            .serve_connection(TokioIo::new(stream), service)
            .await;
        if let Err(cause) = spoken {
            tracing::debug!(%cause, %from, "an HTTP connection broke");
        }
    }
}

/// Says that there is no place. It costs nothing to hold, since it waits for nobody.
async fn turn_away(mut stream: TcpStream) {
    const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let _ = tokio::time::timeout(Duration::from_millis(200), stream.write_all(FULL)).await;
}

/// A connection whose other end must take something in a while.
struct Patient {
    stream: TcpStream,
    patience: Duration,
    /// Until when, while something waits to be taken.
    until: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    fn new(stream: TcpStream, patience: Duration) -> Self {
        Self { stream, patience, until: None }
    }

    fn waited<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.until = None;
            return written;
        }
        let deadline = Instant::now() + self.patience;
        let until = self.until.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        match until.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::Error::from(io::ErrorKind::TimedOut))),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.waited(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.waited(cx, done)
    }
}

//! The gRPC face: connections of workers, handed to the jobs that they name.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use anello_proto::ring::{Leave, Order, WorkerId};
use anello_proto::v1;
use anello_proto::v1::jobs_server::JobsServer;
use anello_proto::v1::ring_server::{Ring, RingServer};
use anello_tls::grpc::{incoming, only};
use anello_tls::{Protection, Role};
use tokio::sync::oneshot;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::api::{Api, REQUEST_BYTES_MAX};
use crate::error::{Error, Result};
use crate::job::{Input, Job};
use crate::rate::{Limiter, Rates};
use crate::registry::Registry;

/// Time for a connection to say hello.
const HELLO: Duration = Duration::from_secs(10);
/// Bytes of a worker's message at most: a stance with lists of parts, at about 200 bytes a block of 768 KiB of state. A
/// worker that owns all of 3 billion parameters has 46 000 blocks: 9 MiB a list, and it keeps lists of 32 MiB.
const MESSAGE_BYTES_MAX: usize = 48 << 20;

/// The jobs that are served, by name.
#[derive(Clone, Debug, Default)]
pub struct Jobs {
    jobs: Arc<RwLock<BTreeMap<String, Job>>>,
}

impl Jobs {
    /// Serves a job from now on.
    pub fn add(&self, job: Job) {
        self.jobs.write().expect("no holder panics").insert(job.name().to_owned(), job);
    }

    /// Serves it no more.
    pub fn remove(&self, name: &str) {
        self.jobs.write().expect("no holder panics").remove(name);
    }

    /// The job called `name`.
    pub fn find(&self, name: &str) -> Option<Job> {
        self.jobs.read().expect("no holder panics").get(name).cloned()
    }

    fn names(&self) -> String {
        let jobs = self.jobs.read().expect("no holder panics");
        if jobs.is_empty() { "none".to_owned() } else { jobs.keys().cloned().collect::<Vec<_>>().join(", ") }
    }
}

/// A server under way.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

/// A server that has its address and serves nothing yet.
#[derive(Debug)]
pub struct Bound {
    /// Where it listens.
    pub address: SocketAddr,
    listener: tokio::net::TcpListener,
    protection: Protection,
    rates: Rates,
}

fn failed(address: SocketAddr, cause: impl ToString) -> Error {
    Error::Serve { address: address.to_string(), cause: cause.to_string() }
}

impl Bound {
    /// With these rates of users' requests; workers, who are few and say little, are not counted.
    pub fn limited(self, rates: Rates) -> Self {
        Self { rates, ..self }
    }

    /// Serves workers of `jobs`, and users when there is a registry; besides, gRPC's own health and reflection services.
    /// With TLS the first are for certificates of workers, the second for those of users, the others for both.
    ///
    /// # Errors
    /// [`Error::Serve`].
    pub async fn serve(self, jobs: Jobs, registry: Option<Registry>) -> Result<Server> {
        let Self { address, listener, protection, rates } = self;
        let (stop, stopped) = oneshot::channel::<()>();
        let ring = RingServer::new(Service { jobs }).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<RingServer<Service>>().await;
        let limiter = Limiter::new(rates);
        let users = registry.map(|registry| {
            JobsServer::new(Api { registry, limiter }).max_decoding_message_size(REQUEST_BYTES_MAX)
        });
        if users.is_some() {
            health.set_serving::<JobsServer<Api>>().await;
        }
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(anello_proto::DESCRIPTORS)
            .build_v1()
            .map_err(|cause| failed(address, cause))?;
        let connections =
            incoming(listener, protection.tls().map(|tls| (tls, &[Role::Worker, Role::User][..])));
        let server = tonic::transport::Server::builder()
            .add_service(InterceptedService::new(ring, only(Role::Worker)))
            .add_optional_service(users.map(|users| InterceptedService::new(users, only(Role::User))))
            .add_service(health_service)
            .add_service(reflection)
            .serve_with_incoming_shutdown(connections, async {
                let _ = stopped.await;
            });
        let task = tokio::spawn(async move {
            if let Err(error) = server.await {
                tracing::error!(%error, "the server has ended");
            }
        });
        Ok(Server { address, stop, task })
    }
}

impl Server {
    /// Takes `address` (port 0: any free one).
    ///
    /// # Errors
    /// [`Error::Serve`]; [`Error::Tls`] for an address that others reach when there is no TLS.
    pub async fn bind(address: SocketAddr, protection: Protection) -> Result<Bound> {
        protection.check(address.ip())?;
        let listener =
            tokio::net::TcpListener::bind(address).await.map_err(|cause| failed(address, cause))?;
        let address = listener.local_addr().map_err(|cause| failed(address, cause))?;
        Ok(Bound { address, listener, protection, rates: Rates::DEFAULT })
    }

    /// Serves workers of `jobs` on the loopback address `address`, and no users.
    ///
    /// # Errors
    /// Those of [`Server::bind`].
    pub async fn start(address: SocketAddr, jobs: Jobs) -> Result<Self> {
        Self::bind(address, Protection::Loopback).await?.serve(jobs, None).await
    }

    /// Ends it, and every connection.
    pub async fn stop(self) {
        let _ = self.stop.send(());
        self.task.abort();
        let _ = self.task.await;
    }
}

#[derive(Debug)]
struct Service {
    jobs: Jobs,
}

#[tonic::async_trait]
impl Ring for Service {
    type AttachStream =
        std::pin::Pin<Box<dyn tokio_stream::Stream<Item = std::result::Result<v1::ToWorker, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::FromWorker>>,
    ) -> std::result::Result<Response<Self::AttachStream>, Status> {
        let mut words = request.into_inner();
        let first = tokio::time::timeout(HELLO, words.next()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no hello came; say hello first"))?;
        let hello = match first.transpose()?.and_then(|message| message.word) {
            Some(v1::from_worker::Word::Hello(hello)) => hello,
            _ => {
                return Err(Status::invalid_argument(
                    "the first word is a hello; start workers of this build",
                ));
            }
        };
        let (orders, outbox) = Job::orders();
        let outbox = ReceiverStream::new(outbox);
        let Some(job) = self.jobs.find(&hello.job) else {
            let reason = format!("there is no job {}; there are: {}", hello.job, self.jobs.names());
            let order = Order::Leave { why: Leave::Refused { reason } };
            let _ = orders.try_send(Ok(v1::ToWorker { epoch: 0, order: Some((&order).into()) }));
            return Ok(Response::new(Box::pin(outbox)));
        };
        let (worker, connection) = (WorkerId(hello.worker), hello.connection);
        if !job.give(Input::Hello { hello: Box::new(hello), orders }).await {
            return Err(Status::unavailable("the job is over"));
        }
        tokio::spawn(async move {
            let unread = loop {
                match words.next().await {
                    Some(Ok(v1::FromWorker { word: Some(word) })) => {
                        if !job.give(Input::Word { worker, connection, word }).await {
                            return;
                        }
                    }
                    Some(Ok(v1::FromWorker { word: None })) => {}
                    // Too long, or no message at all.
                    Some(Err(why)) if matches!(why.code(), Code::OutOfRange | Code::Internal) => {
                        break Some(why);
                    }
                    Some(Err(_)) | None => break None,
                }
            };
            job.give(Input::Closed { worker, connection, unread }).await;
        });
        Ok(Response::new(Box::pin(outbox)))
    }
}

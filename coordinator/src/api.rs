//! The gRPC face for users: requests, checked and handed to the registry.

use std::pin::Pin;
use std::time::Duration;

use anello_proto::convert::Malformed;
use anello_proto::jobs::{JobName, Phase, Submission};
use anello_proto::v1;
use anello_proto::v1::jobs_server::Jobs;
use anello_store::{Store, events};
use anello_tls::grpc::Peer;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::rate::{Kind, Limiter, TooOften, seconds};
use crate::registry::{Command, Refusal, Registry, Wish, log_record};

/// Bytes of a request: a config of 1 MiB, and names.
pub(crate) const REQUEST_BYTES_MAX: usize = 2 << 20;
/// How often a watcher is shown what changed.
const WATCH_EVERY: Duration = Duration::from_millis(250);
/// Messages that may wait for a reader; a slower one is waited for.
const STREAM_MAX: usize = 16;
/// Records that are read at once.
const RECORDS: usize = 256;

type Answer<T> = Result<Response<T>, Status>;
type Stream<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

#[derive(Clone, Debug)]
pub(crate) struct Api {
    pub registry: Registry,
    pub limiter: Limiter,
}

/// Metadata of a refusal: whole seconds after which the next request is answered.
const RETRY_AFTER: &str = "retry-after";

impl From<TooOften> for Status {
    fn from(refused: TooOften) -> Self {
        let mut status = Self::resource_exhausted(refused.to_string());
        status.metadata_mut().insert(RETRY_AFTER, seconds(refused.again).into());
        status
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let text = refusal.to_string();
        match refusal {
            Refusal::NoSuchJob { .. } => Self::not_found(text),
            Refusal::Taken { .. } => Self::already_exists(text),
            Refusal::Over { .. } => Self::failed_precondition(text),
            Refusal::Invalid(_) => Self::invalid_argument(text),
            Refusal::Store(_) | Refusal::Ending(_) => Self::unavailable(text),
        }
    }
}

fn malformed(malformed: Malformed) -> Status {
    Status::invalid_argument(malformed.to_string())
}

fn is_over(detail: &v1::JobDetail) -> bool {
    let phase = detail.job.as_ref().and_then(|job| Phase::try_from(job.phase()).ok());
    phase.is_none_or(Phase::is_terminal)
}

impl Api {
    /// The request, unless whoever sent it asks too often.
    fn admit<T>(&self, request: Request<T>, kind: Kind) -> Result<T, Status> {
        if let Some(address) = Peer::address_of(&request) {
            self.limiter.admit(address, kind)?;
        }
        Ok(request.into_inner())
    }

    async fn detail(&self, name: &JobName) -> Result<v1::JobDetail, Refusal> {
        self.registry.describe(name).await
    }

    async fn want(&self, name: JobName, wish: Wish) -> Answer<v1::Job> {
        let wanted = self.registry.want(&name, wish).await;
        tracing::info!(target: crate::AUDIT, job = %name, ?wish, done = wanted.is_ok(), "asked over gRPC");
        Ok(Response::new(wanted?))
    }
}

#[tonic::async_trait]
impl Jobs for Api {
    async fn submit(&self, request: Request<v1::SubmitRequest>) -> Answer<v1::Job> {
        let submission = Submission::try_from(self.admit(request, Kind::Change)?).map_err(malformed)?;
        let job = self.registry.ask(|reply| Command::Submit(submission, reply)).await;
        let name = job.as_ref().map(|job| job.name.as_str()).unwrap_or_default();
        tracing::info!(target: crate::AUDIT, job = name, wish = "submit", done = job.is_ok(), "asked over gRPC");
        Ok(Response::new(job?))
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Answer<v1::ListResponse> {
        self.admit(request, Kind::Read)?;
        Ok(Response::new(v1::ListResponse { jobs: self.registry.ask(Command::List).await? }))
    }

    async fn describe(&self, request: Request<v1::JobRequest>) -> Answer<v1::JobDetail> {
        let name = JobName::try_from(self.admit(request, Kind::Read)?).map_err(malformed)?;
        Ok(Response::new(self.detail(&name).await?))
    }

    type WatchStream = Stream<v1::JobDetail>;

    async fn watch(&self, request: Request<v1::JobRequest>) -> Answer<Self::WatchStream> {
        let name = JobName::try_from(self.admit(request, Kind::Read)?).map_err(malformed)?;
        let mut detail = self.detail(&name).await?;
        let (sender, stream) = mpsc::channel(STREAM_MAX);
        let api = self.clone();
        tokio::spawn(async move {
            loop {
                if sender.send(Ok(detail.clone())).await.is_err() || is_over(&detail) {
                    return;
                }
                loop {
                    tokio::select! {
                        () = sender.closed() => return,
                        () = tokio::time::sleep(WATCH_EVERY) => {}
                    }
                    match api.detail(&name).await {
                        Ok(now) if now == detail => {}
                        Ok(now) => {
                            detail = now;
                            break;
                        }
                        Err(refusal) => {
                            let _ = sender.send(Err(refusal.into())).await;
                            return;
                        }
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    type LogsStream = Stream<v1::LogRecord>;

    async fn logs(&self, request: Request<v1::LogsRequest>) -> Answer<Self::LogsStream> {
        let (name, follow, mut after) =
            <(JobName, bool, u64)>::try_from(self.admit(request, Kind::Read)?).map_err(malformed)?;
        let job = self.detail(&name).await?.job.unwrap_or_default();
        let (sender, stream) = mpsc::channel(STREAM_MAX);
        let api = self.clone();
        tokio::spawn(async move {
            loop {
                // Asked before the log is read: what is over writes nothing more, once its ring is let go, whose last word is how it
                // ended.
                let is_last = |detail: v1::JobDetail| is_over(&detail) && detail.generation.is_none();
                let last = !follow || api.detail(&name).await.is_ok_and(is_last);
                let place = job.run.clone();
                let read = tokio::task::spawn_blocking(move || {
                    events::read_after(&Store::open(&place)?, after, RECORDS)
                });
                let records = match read.await {
                    Ok(Ok(records)) => records,
                    Ok(Err(error)) => {
                        let _ = sender.send(Err(Refusal::Store(error).into())).await;
                        return;
                    }
                    Err(_) => return,
                };
                let more = records.len() == RECORDS;
                for record in records {
                    after = record.number;
                    if sender.send(Ok(log_record(&record))).await.is_err() {
                        return;
                    }
                }
                if more {
                    continue;
                }
                if last {
                    return;
                }
                tokio::select! {
                    () = sender.closed() => return,
                    () = tokio::time::sleep(WATCH_EVERY) => {}
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn pause(&self, request: Request<v1::JobRequest>) -> Answer<v1::Job> {
        self.want(JobName::try_from(self.admit(request, Kind::Change)?).map_err(malformed)?, Wish::Pause)
            .await
    }

    async fn resume(&self, request: Request<v1::JobRequest>) -> Answer<v1::Job> {
        self.want(JobName::try_from(self.admit(request, Kind::Change)?).map_err(malformed)?, Wish::Resume)
            .await
    }

    async fn scale(&self, request: Request<v1::ScaleRequest>) -> Answer<v1::Job> {
        let (name, workers) =
            <(JobName, u32)>::try_from(self.admit(request, Kind::Change)?).map_err(malformed)?;
        self.want(name, Wish::Scale(workers)).await
    }

    async fn checkpoint(&self, request: Request<v1::JobRequest>) -> Answer<v1::CheckpointResponse> {
        let name = JobName::try_from(self.admit(request, Kind::Change)?).map_err(malformed)?;
        let wanted = self.registry.checkpoint(&name).await;
        tracing::info!(target: crate::AUDIT, job = %name, wish = "checkpoint", done = wanted.is_ok(), "asked over gRPC");
        let (job, step) = wanted?;
        Ok(Response::new(v1::CheckpointResponse { job: Some(job), step }))
    }

    async fn cancel(&self, request: Request<v1::JobRequest>) -> Answer<v1::Job> {
        self.want(JobName::try_from(self.admit(request, Kind::Change)?).map_err(malformed)?, Wish::Cancel)
            .await
    }
}

//! A user's way to a coordinator: the command's and the controller's.

use std::time::Duration;

use anello_proto::v1;
use anello_proto::v1::jobs_client::JobsClient;
use anello_tls::grpc::{ConnectError, To};
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

/// A connection to a coordinator as its user. A call waits no longer than [`Client::connect`] says; cancelled, it may have
/// been done or not.
#[derive(Clone, Debug)]
pub struct Client {
    jobs: JobsClient<Channel>,
    to: To,
    answer: Duration,
}

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It may have been done or not.
    #[error("the coordinator at {address} has not answered for {seconds} s; try again")]
    Silent {
        /// The coordinator.
        address: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The two sides do not accept one another.
    #[error(transparent)]
    Refused(anello_tls::Error),
    /// The coordinator says no, or the connection broke.
    #[error("{}: {}", .0.code(), .0.message())]
    Failed(Box<Status>),
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident: $request:ident -> $answer:ty),+ $(,)?) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// [`CallError`].
        pub async fn $name(&mut self, request: v1::$request) -> Result<$answer, CallError> {
            let call = tokio::time::timeout(self.answer, self.jobs.$name(request)).await;
            self.answered(call).await
        }
    )+};
}

impl Client {
    /// Connects within `patience`; each call has `answer` for the answer, or the beginning of a stream.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect(to: To, patience: Duration, answer: Duration) -> Result<Self, ConnectError> {
        let jobs = JobsClient::new(to.connect(patience).await?);
        Ok(Self { jobs, to, answer })
    }

    /// The address of the coordinator.
    pub fn address(&self) -> &str {
        &self.to.address
    }

    calls! {
        /// Puts a job into the queue.
        submit: SubmitRequest -> v1::Job,
        /// Every job.
        list: ListRequest -> v1::ListResponse,
        /// All that there is to see of a job.
        describe: JobRequest -> v1::JobDetail,
        /// Takes a checkpoint and stops until it is resumed.
        pause: JobRequest -> v1::Job,
        /// Puts a paused job back into the queue.
        resume: JobRequest -> v1::Job,
        /// Asks for another number of workers.
        scale: ScaleRequest -> v1::Job,
        /// Stops for good.
        cancel: JobRequest -> v1::Job,
        /// Asks for a checkpoint of all that is trained now.
        checkpoint: JobRequest -> v1::CheckpointResponse,
        /// What there is to see of a job, each time that it changes.
        watch: JobRequest -> Streaming<v1::JobDetail>,
        /// The records of a job's log.
        logs: LogsRequest -> Streaming<v1::LogRecord>,
    }

    /// The next message of a stream, for as long as it takes; absent at its end.
    ///
    /// # Errors
    /// [`CallError`], but not that nothing comes.
    pub async fn next<T>(&self, stream: &mut Streaming<T>) -> Result<Option<T>, CallError> {
        match stream.message().await {
            Ok(message) => Ok(message),
            Err(status) => Err(self.failed(status).await),
        }
    }

    async fn answered<T>(
        &self,
        call: Result<Result<Response<T>, Status>, tokio::time::error::Elapsed>,
    ) -> Result<T, CallError> {
        match call {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(self.failed(status).await),
            Err(_) => {
                Err(CallError::Silent { address: self.to.address.clone(), seconds: self.answer.as_secs() })
            }
        }
    }

    async fn failed(&self, status: Status) -> CallError {
        match self.to.refusal(&status).await {
            Some(refused) => CallError::Refused(refused),
            None => CallError::Failed(Box::new(status)),
        }
    }
}

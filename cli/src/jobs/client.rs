//! The connection to a coordinator, for a command that waits for its answers.

use std::time::Duration;

use anello_proto::v1;
use anello_proto::v1::jobs_client::JobsClient;
use anello_tls::Role;
use anello_tls::grpc::{ConnectError, To};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::At;
use crate::failure::Failure;

/// Time to connect: on loopback nothing takes long but a coordinator that is not there.
const CONNECT: Duration = Duration::from_secs(5);
/// Time for an answer: it may wait for the job's log, and the store behind it for its pauses.
const ANSWER: Duration = Duration::from_secs(60);

/// A coordinator.
pub struct Client {
    runtime: Runtime,
    jobs: JobsClient<Channel>,
    to: To,
}

macro_rules! calls {
    ($($name:ident: $request:ident -> $answer:ty),+ $(,)?) => {$(
        pub fn $name(&mut self, request: v1::$request) -> Result<$answer, Failure> {
            let answer = self.runtime.block_on(async {
                tokio::time::timeout(ANSWER, self.jobs.$name(request)).await
            });
            let answer = answer.map_err(|_| self.silent())?;
            Ok(answer.map_err(|status| self.failed(status))?.into_inner())
        }
    )+};
}

impl Client {
    /// Connects.
    pub fn connect(at: &At) -> Result<Self, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let to =
            To { address: at.coordinator.clone(), role: Role::Coordinator, tls: at.tls.load(Role::User)? };
        let channel = runtime.block_on(to.connect(CONNECT)).map_err(|error| match error {
            ConnectError::Address(address) => Failure::Usage(format!(
                "`{address}` is no address of a coordinator; give one as 127.0.0.1:7700"
            )),
            ConnectError::Refused(error) => error.into(),
            ConnectError::Away(_) | ConnectError::Unanswered(_) => Failure::Unreachable(format!(
                "there is no coordinator at {}; start one with `anello coordinator --jobs DIR`, or give the address \
                 of another with --coordinator",
                to.address
            )),
        })?;
        Ok(Self { runtime, jobs: JobsClient::new(channel), to })
    }

    calls! {
        submit: SubmitRequest -> v1::Job,
        describe: JobRequest -> v1::JobDetail,
        pause: JobRequest -> v1::Job,
        resume: JobRequest -> v1::Job,
        scale: ScaleRequest -> v1::Job,
        cancel: JobRequest -> v1::Job,
        watch: JobRequest -> Streaming<v1::JobDetail>,
        logs: LogsRequest -> Streaming<v1::LogRecord>,
    }

    pub fn list(&mut self) -> Result<Vec<v1::Job>, Failure> {
        let answer = self.runtime.block_on(self.jobs.list(v1::ListRequest {}));
        Ok(answer.map_err(|status| self.failed(status))?.into_inner().jobs)
    }

    /// The next message of a stream, for as long as it takes; absent at its end.
    pub fn next<T>(&self, stream: &mut Streaming<T>) -> Result<Option<T>, Failure> {
        self.runtime.block_on(stream.message()).map_err(|status| self.failed(status))
    }

    fn silent(&self) -> Failure {
        let (address, seconds) = (&self.to.address, ANSWER.as_secs());
        Failure::Unreachable(format!(
            "the coordinator at {address} has not answered for {seconds} s; try again"
        ))
    }

    fn failed(&self, status: Status) -> Failure {
        if let Some(refused) = self.runtime.block_on(self.to.refusal(&status)) {
            return refused.into();
        }
        let (address, text) = (&self.to.address, status.message().to_owned());
        match status.code() {
            Code::NotFound | Code::AlreadyExists | Code::FailedPrecondition | Code::InvalidArgument => {
                Failure::Usage(text)
            }
            Code::Unimplemented => Failure::Usage(format!(
                "the coordinator at {address} belongs to one `anello run` and takes no jobs; start one with `anello \
                 coordinator --jobs DIR`"
            )),
            Code::Unavailable => Failure::Unreachable(text),
            _ => {
                Failure::Unreachable(format!("the connection to the coordinator at {address} broke: {text}"))
            }
        }
    }
}

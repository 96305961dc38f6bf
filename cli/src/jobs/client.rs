//! The connection to a coordinator, for a command that waits for its answers.

use std::time::Duration;

use anello_coordinator::client::{self, CallError};
use anello_proto::v1;
use anello_tls::Role;
use anello_tls::grpc::{ConnectError, To};
use tokio::runtime::Runtime;
use tonic::{Code, Streaming};

use super::At;
use crate::failure::Failure;

/// Time to connect: on loopback nothing takes long but a coordinator that is not there.
const CONNECT: Duration = Duration::from_secs(5);
/// Time for an answer: it may wait for the job's log, and the store behind it for its pauses.
const ANSWER: Duration = Duration::from_secs(60);

/// A coordinator.
pub struct Client {
    runtime: Runtime,
    calls: client::Client,
}

macro_rules! calls {
    ($($name:ident: $request:ident -> $answer:ty),+ $(,)?) => {$(
        pub fn $name(&mut self, request: v1::$request) -> Result<$answer, Failure> {
            let answer = self.runtime.block_on(self.calls.$name(request));
            answer.map_err(|error| self.failed(error))
        }
    )+};
}

impl Client {
    /// Connects.
    pub fn connect(at: &At) -> Result<Self, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let address = at.coordinator.clone();
        let to = To { address: address.clone(), role: Role::Coordinator, tls: at.tls.load(Role::User)? };
        let calls = runtime.block_on(client::Client::connect(to, CONNECT, ANSWER));
        let calls = calls.map_err(|error| match error {
            ConnectError::Address(address) => Failure::Usage(format!(
                "`{address}` is no address of a coordinator; give one as 127.0.0.1:7700"
            )),
            ConnectError::Refused(error) => error.into(),
            ConnectError::Away(_) | ConnectError::Unanswered(_) => Failure::Unreachable(format!(
                "there is no coordinator at {address}; start one with `anello coordinator --jobs DIR`, or give the \
                 address of another with --coordinator"
            )),
        })?;
        Ok(Self { runtime, calls })
    }

    calls! {
        submit: SubmitRequest -> v1::Job,
        list: ListRequest -> v1::ListResponse,
        describe: JobRequest -> v1::JobDetail,
        pause: JobRequest -> v1::Job,
        resume: JobRequest -> v1::Job,
        scale: ScaleRequest -> v1::Job,
        cancel: JobRequest -> v1::Job,
        checkpoint: JobRequest -> v1::CheckpointResponse,
        watch: JobRequest -> Streaming<v1::JobDetail>,
        logs: LogsRequest -> Streaming<v1::LogRecord>,
    }

    /// The next message of a stream, for as long as it takes; absent at its end.
    pub fn next<T>(&self, stream: &mut Streaming<T>) -> Result<Option<T>, Failure> {
        self.runtime.block_on(self.calls.next(stream)).map_err(|error| self.failed(error))
    }

    fn failed(&self, error: CallError) -> Failure {
        let status = match error {
            CallError::Silent { .. } => return Failure::Unreachable(error.to_string()),
            CallError::Refused(refused) => return refused.into(),
            CallError::Failed(status) => status,
        };
        let (address, text) = (self.calls.address(), status.message().to_owned());
        match status.code() {
            Code::NotFound | Code::AlreadyExists | Code::FailedPrecondition | Code::InvalidArgument => {
                Failure::Usage(text)
            }
            Code::Unimplemented => Failure::Usage(format!(
                "the coordinator at {address} belongs to one `anello run` and takes no jobs; start one with `anello \
                 coordinator --jobs DIR`"
            )),
            Code::Unavailable | Code::ResourceExhausted => Failure::Unreachable(text),
            _ => {
                Failure::Unreachable(format!("the connection to the coordinator at {address} broke: {text}"))
            }
        }
    }
}

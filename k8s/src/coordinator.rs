//! The controller's way to the coordinator of a job.

use std::time::Duration;

use anello_proto::jobs::Phase;
use anello_proto::v1;
use anello_proto::v1::jobs_client::JobsClient;
use anello_tls::grpc::To;
use anello_tls::{Role, Tls};
use tonic::transport::Channel;

use crate::plan::RunSeen;

/// Time to connect, and for an answer: a coordinator that is slower is looked at again later.
const PATIENCE: Duration = Duration::from_secs(5);

/// A coordinator that answered.
pub struct Coordinator {
    jobs: JobsClient<Channel>,
    job: String,
}

fn told(status: &tonic::Status) -> String {
    format!("{}: {}", status.code(), status.message())
}

/// Waits for an answer, but not for long.
async fn answer<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, String> {
    let answer = tokio::time::timeout(PATIENCE, call).await;
    let answer = answer.map_err(|_| format!("no answer within {} s", PATIENCE.as_secs()))?;
    answer.map(tonic::Response::into_inner).map_err(|status| told(&status))
}

impl Coordinator {
    /// Connects to the coordinator of `job` at `address`.
    ///
    /// # Errors
    /// In words.
    pub async fn connect(address: String, tls: Option<Tls>, job: String) -> Result<Self, String> {
        let to = To { address, role: Role::Coordinator, tls };
        let channel = to.connect(PATIENCE).await.map_err(|error| error.to_string())?;
        Ok(Self { jobs: JobsClient::new(channel), job })
    }

    fn request(&self) -> v1::JobRequest {
        v1::JobRequest { name: self.job.clone() }
    }

    /// How the run is.
    ///
    /// # Errors
    /// In words.
    pub async fn look(&mut self) -> Result<RunSeen, String> {
        let request = self.request();
        let detail = answer(self.jobs.describe(request)).await?;
        let job = detail.job.ok_or("it tells of no job")?;
        let phase = Phase::try_from(job.phase()).map_err(|malformed| malformed.to_string())?;
        Ok(RunSeen {
            phase,
            desired: job.desired,
            workers: job.workers,
            step: job.step,
            total_steps: job.total_steps,
            loss: job.loss,
            tokens_per_s: job.tokens_per_s,
            message: job.reason.or(job.waits_for),
            quarantined: detail.quarantined,
        })
    }

    /// Asks for another number of workers.
    ///
    /// # Errors
    /// In words.
    pub async fn scale(&mut self, workers: u32) -> Result<(), String> {
        let request = v1::ScaleRequest { name: self.job.clone(), workers };
        answer(self.jobs.scale(request)).await.map(drop)
    }

    /// Asks it to take a checkpoint and let its workers go.
    ///
    /// # Errors
    /// In words.
    pub async fn pause(&mut self) -> Result<(), String> {
        let request = self.request();
        answer(self.jobs.pause(request)).await.map(drop)
    }

    /// Asks it to go on.
    ///
    /// # Errors
    /// In words.
    pub async fn resume(&mut self) -> Result<(), String> {
        let request = self.request();
        answer(self.jobs.resume(request)).await.map(drop)
    }
}

//! The controller's way to the coordinator of a job.

use std::time::Duration;

use anello_coordinator::client::{CallError, Client};
use anello_proto::jobs::Phase;
use anello_proto::v1;
use anello_tls::grpc::To;
use anello_tls::{Role, Tls};

use crate::plan::RunSeen;

/// Time to connect, and for an answer: a coordinator that is slower is looked at again later.
const PATIENCE: Duration = Duration::from_secs(5);

/// A coordinator that answered.
pub struct Coordinator {
    client: Client,
    job: String,
}

fn told(error: CallError) -> String {
    error.to_string()
}

impl Coordinator {
    /// Connects to the coordinator of `job` at `address`.
    ///
    /// # Errors
    /// In words.
    pub async fn connect(address: String, tls: Option<Tls>, job: String) -> Result<Self, String> {
        let to = To { address, role: Role::Coordinator, tls };
        let client = Client::connect(to, PATIENCE, PATIENCE).await.map_err(|error| error.to_string())?;
        Ok(Self { client, job })
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
        let detail = self.client.describe(request).await.map_err(told)?;
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
        self.client.scale(request).await.map(drop).map_err(told)
    }

    /// Asks it to take a checkpoint and let its workers go.
    ///
    /// # Errors
    /// In words.
    pub async fn pause(&mut self) -> Result<(), String> {
        let request = self.request();
        self.client.pause(request).await.map(drop).map_err(told)
    }

    /// Asks it to go on.
    ///
    /// # Errors
    /// In words.
    pub async fn resume(&mut self) -> Result<(), String> {
        let request = self.request();
        self.client.resume(request).await.map(drop).map_err(told)
    }
}

//! Whose jobs are shown: those of a registry, or the one run of a process.

use anello_proto::jobs::{JobName, Phase};
use anello_proto::v1;

use crate::registry::{Command, Refusal, Registry, Wish, attendant};
use crate::telemetry::{Board, Figures};

/// Who keeps the jobs that are shown.
#[derive(Clone, Debug)]
pub enum Keeper {
    /// A registry, which also does what users want.
    Registry(Registry),
    /// Nobody: they are runs of their own, that a board knows of.
    Board,
}

impl Keeper {
    /// All jobs, the oldest first.
    pub(super) async fn list(&self, board: &Board) -> Result<Vec<v1::Job>, Refusal> {
        match self {
            Self::Registry(registry) => registry.ask(Command::List).await,
            Self::Board => {
                let mut jobs = Vec::new();
                board.each(|name, figures| jobs.push(job_of(name, figures)));
                Ok(jobs)
            }
        }
    }

    /// All that there is to see of one.
    pub(super) async fn describe(&self, board: &Board, name: &JobName) -> Result<v1::JobDetail, Refusal> {
        match self {
            Self::Registry(registry) => registry.describe(name).await,
            Self::Board => {
                board.with(name.as_str(), |figures| detail_of(name.as_str(), figures)).ok_or_else(|| {
                    let mut names = Vec::new();
                    board.each(|name, _| names.push(name.to_owned()));
                    Refusal::NoSuchJob { name: name.to_string(), there: names.join(", ") }
                })
            }
        }
    }

    /// Does what a user wants.
    pub(super) async fn want(&self, name: &JobName, wish: Wish) -> Result<v1::Job, Refusal> {
        self.registry()?.want(name, wish).await
    }

    /// Asks for a checkpoint of all that is trained now.
    pub(super) async fn checkpoint(&self, name: &JobName) -> Result<v1::Job, Refusal> {
        Ok(self.registry()?.checkpoint(name).await?.0)
    }

    fn registry(&self) -> Result<&Registry, Refusal> {
        match self {
            Self::Registry(registry) => Ok(registry),
            Self::Board => Err(Refusal::Invalid(
                "this run is no coordinator's job; stop it with Ctrl-C where it was started, and go on with `anello run \
                 --resume`"
                    .to_owned(),
            )),
        }
    }

    /// Whether it may be asked to.
    pub(super) fn takes_wishes(&self) -> bool {
        matches!(self, Self::Registry(_))
    }
}

fn job_of(name: &str, figures: &Figures) -> v1::Job {
    let status = figures.status.as_ref();
    v1::Job {
        name: name.to_owned(),
        phase: v1::Phase::from(figures.phase.unwrap_or(Phase::Forming)).into(),
        min: 1,
        desired: figures.wanted.unwrap_or(1),
        workers: status.map_or(1, |status| status.workers),
        created_unix_ms: 0,
        run: figures.run.clone(),
        step: figures.steps_done(),
        total_steps: figures.schedule.total_steps(),
        loss: figures.last().map(|row| row.loss),
        tokens_per_s: figures.tokens_per_s(),
        waits_for: status.and_then(|status| status.waits_for.clone()),
        queue_position: None,
        reason: None,
        quarantined: status.map_or(0, |status| status.quarantined.len() as u32),
    }
}

fn detail_of(name: &str, figures: &Figures) -> v1::JobDetail {
    let status = figures.status.as_ref();
    v1::JobDetail {
        job: Some(job_of(name, figures)),
        generation: status.map(|status| status.generation.0),
        committed: figures.checkpoint.map(|newest| newest.step),
        workers: status.map_or(Vec::new(), |status| status.attendants.iter().map(attendant).collect()),
        steps: Vec::new(),
        events: Vec::new(),
        lanes: figures.lanes,
        quarantined: status.map_or(Vec::new(), |status| status.quarantined.clone()),
    }
}

//! The jobs of one place: which there are, whose turn it is, and what users want of them.
//!
//! ```text
//! users ──── Command ──▶ ┌──────────┐ ── share (queue) ──▶ crews of worker processes
//! rings ──── Notice ───▶ │ a thread │ ── start, amend ───▶ a ring each (job)
//! clock ──── tick ─────▶ └──────────┘ ── Said ───────────▶ whoever runs the coordinator
//! ```
//! One plain thread, since store calls block. It keeps nothing that the place does not hold: a coordinator that is
//! killed and started again on the same place takes up every job that is not over.

mod entry;
mod keeper;
mod phase;
mod place;
mod queue;
mod view;

use std::sync::mpsc::Sender as SaidSender;
use std::thread::JoinHandle;
use std::time::Duration;

use anello_configs::{RunConfig, Timings};
use anello_proto::jobs::{JobName, Phase, Submission};
use anello_proto::v1;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use crate::error::{Error, Result};
use crate::launch::Launcher;
use crate::service::Jobs;
use crate::telemetry::Board;
use entry::Entry;
use keeper::Keeper;
use place::Place;
pub(crate) use view::{attendant, log_record};

/// Why a user's wish is not done.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// No job has this name.
    #[error("there is no job {name}; there {}", match there.as_str() { "" => "are none".to_owned(), there => format!("are: {there}") })]
    NoSuchJob {
        /// The name.
        name: String,
        /// The jobs that there are.
        there: String,
    },
    /// The name is taken.
    #[error("there is a job {name} already, and it is {phase}; submit this one under another name")]
    Taken {
        /// The name.
        name: String,
        /// Its phase.
        phase: String,
    },
    /// The job is over.
    #[error("job {name} is {phase}, which is for good; submit it anew under another name")]
    Over {
        /// The name.
        name: String,
        /// Its phase.
        phase: Phase,
    },
    /// What is asked for cannot be.
    #[error("{0}")]
    Invalid(String),
    /// The place, or the job's run folder, cannot be used.
    #[error(transparent)]
    Store(#[from] anello_store::Error),
    /// The coordinator is on its way out, or the job was at that moment.
    #[error("{0}; ask again")]
    Ending(&'static str),
}

type Reply<T> = oneshot::Sender<std::result::Result<T, Refusal>>;

/// What is wanted of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    Pause,
    Resume,
    Cancel,
    Scale(u32),
}

/// A wish that is on its way into the job's log: told when it is there.
pub(crate) type Recorded = Option<oneshot::Receiver<()>>;

pub(crate) enum Command {
    Submit(Submission, Reply<v1::Job>),
    Ensure(Submission, Reply<v1::Job>),
    List(Reply<Vec<v1::Job>>),
    Describe(JobName, Reply<v1::JobDetail>),
    Want(JobName, Wish, Reply<Recorded>),
    Checkpoint(JobName, Reply<u64>),
    Stop,
    HandOver,
}

/// What the person who runs the coordinator is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// A job is in another phase.
    Phase {
        /// Its name.
        job: String,
        /// The phase.
        phase: Phase,
        /// Why, when there is more to say.
        why: Option<String>,
    },
    /// Something about a job or its processes.
    Job {
        /// Its name.
        job: String,
        /// What.
        text: String,
    },
    /// Another coordinator has the place: this one has ended its workers and does nothing more.
    Fenced {
        /// What told so.
        by: String,
    },
}

/// What a registry is to keep.
#[derive(Clone, Debug)]
pub struct RegistryOptions {
    /// The place of its jobs: a path or URL.
    pub place: String,
    /// Worker processes at most; absent: none are started here, they come from elsewhere.
    pub slots: Option<u32>,
    /// The times of all rings, whatever their configs say; absent: `ring.detection` of each.
    pub timings: Option<Timings>,
    /// Where it is told how the jobs are.
    pub board: Board,
}

/// A hand on the registry.
#[derive(Clone, Debug)]
pub struct Registry {
    commands: mpsc::Sender<Command>,
}

/// Commands that may wait: more users than that at one moment wait for their turn.
const COMMANDS_MAX: usize = 256;
/// How often a wish is given to a job that comes to its end meanwhile, and the pause between: some seconds in all, for a
/// ring takes as long to see off its workers.
const WANT_TRIES: u32 = 100;
const WANT_PAUSE: Duration = Duration::from_millis(100);
impl Registry {
    /// Takes the place over and keeps its jobs, on a thread of its own. Rings run on `runtime` and are served by `jobs`;
    /// `launcher` says how workers of a job are started, given its name, its run and how many it wants.
    ///
    /// # Errors
    /// Those of the store; a thread that cannot be started.
    pub fn start<L: Launcher + 'static>(
        options: RegistryOptions,
        runtime: Handle,
        jobs: Jobs,
        said: SaidSender<Said>,
        launcher: impl Fn(&str, &RunConfig, u32) -> L + Send + 'static,
    ) -> Result<(Self, JoinHandle<()>)> {
        let place = Place::take(&options.place)?;
        let mut entries = Vec::new();
        for spec in place.specs()? {
            let (name, run) = (spec.name.clone(), place.run_of(&spec));
            match Entry::load(spec, run, options.board.clone()) {
                Ok(entry) => entries.push(entry),
                Err(error) => tracing::warn!(name, %error, "a job that cannot be read is left out"),
            }
        }
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let launcher = Box::new(launcher);
        let keeper = Keeper::new(options, place, entries, runtime, jobs, said, launcher);
        let thread = std::thread::Builder::new()
            .name("registry".to_owned())
            .spawn(move || keeper.run(inbox))
            .map_err(|source| Error::System { action: "starting the registry's thread", source })?;
        Ok((Self { commands }, thread))
    }

    /// Submits a job, unless the place holds it already: then it goes on.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] when the job that is there is another run; else as for a job that a user submits.
    pub async fn ensure(&self, submission: Submission) -> std::result::Result<(), Refusal> {
        self.ask(|reply| Command::Ensure(submission, reply)).await.map(drop)
    }

    /// Takes a checkpoint of every job and ends; the next coordinator goes on with them.
    pub async fn stop(&self) {
        let _ = self.commands.send(Command::Stop).await;
    }

    /// Ends and leaves the workers training, for the next coordinator to go on with: what is known of their steps is
    /// written down first. For workers that were started elsewhere: those of this coordinator end with it.
    pub async fn hand_over(&self) {
        let _ = self.commands.send(Command::HandOver).await;
    }

    /// All that there is to see of a job.
    pub(crate) async fn describe(&self, name: &JobName) -> std::result::Result<v1::JobDetail, Refusal> {
        self.ask(|reply| Command::Describe(name.clone(), reply)).await
    }

    /// Does what a user wants of a job: answered when the job's log holds it.
    pub(crate) async fn want(&self, name: &JobName, wish: Wish) -> std::result::Result<v1::Job, Refusal> {
        for _ in 0..WANT_TRIES {
            let recorded = self.ask(|reply| Command::Want(name.clone(), wish, reply)).await?;
            let Some(recorded) = recorded else { return self.see(name).await };
            if recorded.await.is_ok() {
                return self.see(name).await;
            }
            // The job's ring came to its end at this moment, as when it has just paused: the log is free a little later.
            tokio::time::sleep(WANT_PAUSE).await;
        }
        Err(Refusal::Ending("the job comes to an end at this moment"))
    }

    /// Asks for a checkpoint of all that is trained now; the answer is the job, and the step that it holds at least.
    pub(crate) async fn checkpoint(&self, name: &JobName) -> std::result::Result<(v1::Job, u64), Refusal> {
        let step = self.ask(|reply| Command::Checkpoint(name.clone(), reply)).await?;
        Ok((self.see(name).await?, step))
    }

    async fn see(&self, name: &JobName) -> std::result::Result<v1::Job, Refusal> {
        Ok(self.describe(name).await?.job.unwrap_or_default())
    }

    pub(crate) async fn ask<T>(
        &self,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> std::result::Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        let ending = || Refusal::Ending("this coordinator is ending");
        self.commands.send(command(reply)).await.map_err(|_| ending())?;
        answer.await.map_err(|_| ending())?
    }
}

#[cfg(test)]
mod tests;

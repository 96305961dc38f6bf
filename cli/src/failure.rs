//! How a command ends, and the exit code that says so.

use std::io;
use std::path::PathBuf;

/// The section of `anello --help` on exit codes.
pub const EXIT_CODES: &str = "\
Exit codes:
  0    done (also: `--until` was reached; of `watch`: the job is complete, or cancelled; of `worker`: it was asked to
       go, as SIGTERM does, handed over and left, unless --left-code gives another code for that)
  1    failed; of `checkpoint verify` and `data verify`: something is broken; of `checkpoint diff` and `bisect`: they
       differ; of `audit`: the run is not what its record says; of `doctor`: no run may live there
  2    the arguments or the config are wrong; of `checkpoint diff` and `bisect`: they could not be compared; of `audit`:
       not all could be checked; of `doctor`: it could not be tried
  3    refused: of `worker`, since it does not fit the job; of what connects to a coordinator, since one side does
       not accept the other's certificate. Starting it again changes nothing
  4    of `worker --until-eof`: the process that started it is gone
  5    of `worker`: sent away, since its state differed from all others': do not use this machine again
  6    of `worker`: the run's data or device are not there on this machine; whoever started it tries a few times more
  7    of `worker`: the job has failed, which starting a worker again does not change
  101  a fault of this program, whose log says where: starting it again may do
  130  interrupted by Ctrl-C or SIGTERM, everything saved: `run --resume`, or the same `data` or `coordinator`
       command, goes on
  131  interrupted a second time: left at once, what was not saved is lost";

/// How a command that did not fail ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// All is done.
    Done,
    /// It was asked whether something is so, and it is not.
    No,
    /// Somebody interrupted it, and it saved what it had.
    Interrupted,
    /// A worker that left before the run was over, as it was asked to.
    Left(u8),
}

impl Exit {
    /// The exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::No => 1,
            Self::Interrupted => 130,
            Self::Left(code) => code,
        }
    }
}

/// The exit code of a worker whose parent is gone.
pub const ORPHANED: i32 = 4;

/// The exit code of a second interrupt.
pub const LEFT_AT_ONCE: i32 = 131;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The arguments do not fit what is there.
    #[error("{0}")]
    Usage(String),
    /// The config is wrong.
    #[error(transparent)]
    Config(#[from] anello_configs::ConfigError),
    /// A worker that the coordinator refused.
    #[error("the coordinator refuses this worker: {0}")]
    Refused(String),
    /// A worker that was sent away for good.
    #[error("sent away: {0}; look at this machine's memory and device before using it again")]
    Evicted(String),
    /// A worker whose run's data or device are not there.
    #[error(transparent)]
    Unfit(anello_worker::Error),
    /// A ring that ended.
    #[error("{0}")]
    Ring(String),
    /// A worker whose job has failed.
    #[error("{0}")]
    JobFailed(String),
    /// A coordinator that cannot be reached, or cannot answer now.
    #[error("{0}")]
    Unreachable(String),
    /// Kubernetes.
    #[error(transparent)]
    Kube(Box<anello_k8s::Error>),
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] anello_tls::Error),
    /// The coordinator.
    #[error(transparent)]
    Coordinator(#[from] anello_coordinator::Error),
    /// Training.
    #[error(transparent)]
    Worker(#[from] anello_worker::Error),
    /// The run folder, or a store of data.
    #[error(transparent)]
    Store(#[from] anello_store::Error),
    /// The data tools.
    #[error(transparent)]
    Data(#[from] anello_dataloader::Error),
    /// A file that the user named.
    #[error("{action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Standard output, or another thing of the process's own.
    #[error(transparent)]
    System(#[from] io::Error),
}

impl Failure {
    /// The exit code.
    pub fn code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Config(_) | Self::Worker(anello_worker::Error::Config { .. }) => 2,
            Self::Store(source)
            | Self::Worker(anello_worker::Error::Store(source))
            | Self::Data(anello_dataloader::Error::Store(source))
                if source.is_wrong_place() =>
            {
                2
            }
            Self::Tls(source)
            | Self::Worker(anello_worker::Error::Tls(source))
            | Self::Coordinator(anello_coordinator::Error::Tls(source)) => match source {
                anello_tls::Error::Refused { .. } => 3,
                _ => 2,
            },
            Self::Refused(_) => 3,
            Self::Evicted(_) => 5,
            Self::Unfit(_) => 6,
            Self::JobFailed(_) => 7,
            Self::Data(anello_dataloader::Error::Stopped) => Exit::Interrupted.code(),
            Self::Ring(_) | Self::Unreachable(_) | Self::Coordinator(_) | Self::Kube(_) => 1,
            Self::Worker(_) | Self::Store(_) | Self::Data(_) | Self::File { .. } | Self::System(_) => 1,
        }
    }

    /// Whether the reader of our output has gone away, as `head` does: no failure for a person.
    pub fn is_closed_pipe(&self) -> bool {
        matches!(self, Self::System(source) if source.kind() == io::ErrorKind::BrokenPipe)
    }

    /// The message, with the causes that it does not tell itself.
    pub fn text(&self) -> String {
        anello_worker::with_causes(self)
    }
}

/// The result of a command.
pub type Outcome = Result<Exit, Failure>;

//! What the HTTP interface says, as JSON. Numbers of a run are 32-bit here; `anello metrics` has all bits.

use std::collections::BTreeMap;

use anello_proto::jobs::Phase;
use anello_proto::v1;
use anello_store::events::Record;
use anello_store::words::describe;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::history::{Band as Values, FIGURES, Thinned};
use crate::telemetry::Shares;

/// A job in a list.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Job {
    /// Its name.
    pub name: String,
    /// queued, forming, running, pausing, paused, recovering, completed, failed or cancelled.
    pub phase: String,
    /// Whether the phase never changes again.
    pub over: bool,
    /// Fewest workers that train.
    pub min: u32,
    /// Workers that are wanted.
    pub desired: u32,
    /// Workers that are connected.
    pub workers: u32,
    /// When it was submitted, milliseconds since 1970; absent: it was not, since it is a run of its own.
    pub created_unix_ms: Option<u64>,
    /// Path or URL of its run folder.
    pub run: String,
    /// Steps done; absent: not known.
    pub step: Option<u64>,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Objective of the last step, nats a token; absent: none was told, or it was no number.
    pub loss: Option<f64>,
    /// Tokens a second over the last steps.
    pub tokens_per_s: Option<f64>,
    /// What it waits for.
    pub waits_for: Option<String>,
    /// Jobs in the queue before it, while it is queued.
    pub queue_position: Option<u32>,
    /// Why it failed.
    pub reason: Option<String>,
}

/// The jobs of a server.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Jobs {
    /// The oldest first.
    pub jobs: Vec<Job>,
    /// What the caller may do: viewer or operator.
    pub role: String,
}

/// All that there is to see of a job now.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct JobDetail {
    /// As in the list.
    pub job: Job,
    /// Number of the newest generation; absent: there is none.
    pub generation: Option<u64>,
    /// Lanes of the run.
    pub lanes: u32,
    /// Workers, members first and in rank order.
    pub workers: Vec<Worker>,
    /// Checkpoints that exist, and those that retention removed, in the order of steps.
    pub checkpoints: Vec<Checkpoint>,
    /// Where the time of the run went; absent: nobody keeps account of it here.
    pub time: Option<Time>,
}

/// A worker.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Worker {
    /// Its id, 16 hex digits.
    pub worker: String,
    /// Where it runs.
    pub machine: String,
    /// The first lane that it serves; absent: it is no member.
    pub first_lane: Option<u32>,
    /// The lane after its last.
    pub end_lane: Option<u32>,
    /// Steps applied to the state that it holds.
    pub holds: Option<u64>,
    /// What it does, for people.
    pub activity: String,
    /// Mean seconds of its last steps by where they went: step, data, compute (of it, forward), reduce, update, checkpoint.
    pub seconds: Option<BTreeMap<String, f64>>,
    /// Its time for a lane as a multiple of the members' median, when it is slow.
    pub slow: Option<f64>,
}

/// A checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Checkpoint {
    /// Steps applied.
    pub step: u64,
    /// When it was complete, milliseconds since 1970; absent: the log does not say.
    pub unix_ms: Option<u64>,
    /// Digest of the weights; absent: the log does not say.
    pub weights: Option<String>,
    /// Whether it exists still.
    pub kept: bool,
}

/// Where time went since this process took the job up.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Time {
    /// Seconds in all.
    pub wall_s: f64,
    /// Seconds that trained.
    pub productive_s: f64,
    /// As a share of the time without pauses.
    pub goodput: f64,
    /// Share of the same time inside steps that the run keeps.
    pub effective: f64,
    /// Seconds lost by cause: data, checkpoint, recovery, recomputed, paused, other.
    pub lost_s: BTreeMap<String, f64>,
}

/// A record of the event log.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Event {
    /// From 1, without gaps.
    pub number: u64,
    /// When, milliseconds since 1970.
    pub unix_ms: u64,
    /// Its kind, as the log has it.
    pub kind: String,
    /// What happened, for people.
    pub text: String,
    /// Whether a person may want to know.
    pub bad: bool,
}

/// Some records.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Events {
    /// In order.
    pub events: Vec<Event>,
    /// Ask again with this `after` for what comes later.
    pub next: u64,
}

/// What a job was submitted with, and where it began.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Config {
    /// The resolved config, TOML.
    pub toml: String,
    /// Digest of it.
    pub digest: String,
    /// Where it runs; absent: that is not written down.
    pub environment: Option<String>,
    /// Size of the vocabulary.
    pub vocab: u32,
    /// The gradient norm at which gradients are clipped.
    pub clip: f64,
    /// The recipe.
    pub stages: Vec<Stage>,
}

/// A stage of the recipe.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Stage {
    /// Its name.
    pub name: String,
    /// Its first step.
    pub first_step: u64,
    /// Its steps.
    pub steps: u64,
    /// Its tokens.
    pub tokens: u64,
    /// Tokens of the run before it.
    pub tokens_before: u64,
    /// Loop steps T.
    pub loops: u32,
    /// Layers of the stack.
    pub layers: u32,
    /// Tokens of a sequence.
    pub sequence: u32,
}

/// A figure at some points.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Band {
    /// Means; null where there is no number.
    pub mean: Vec<Option<f32>>,
    /// The least value of each point's steps; left out when each point is one step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min: Option<Vec<Option<f32>>>,
    /// The largest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<Vec<Option<f32>>>,
}

/// The figures of some steps in few points.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Metrics {
    /// Steps that a point stands for, at most.
    pub stride: u64,
    /// Steps in the part that was asked for.
    pub rows: u64,
    /// The last step of each point.
    pub step: Vec<u64>,
    /// Tokens of the run after it.
    pub tokens: Vec<u64>,
    /// Index of each point's stage in `stages`.
    pub stage: Vec<u16>,
    /// Names of stages.
    pub stages: Vec<String>,
    /// By name, with the least and the largest where the figure has them; those of seconds are means alone.
    pub figures: BTreeMap<String, Band>,
    /// L(t) for t = 1..=T.
    pub loop_loss: Vec<Band>,
    /// Mean p(t) for t = 1..=T.
    pub exit: Vec<Vec<Option<f32>>>,
    /// Steps that were skipped since they were not finite, each with the tokens of the run after it; at most 500.
    pub skipped: Vec<(u64, u64)>,
}

/// Another number of workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Scale {
    /// Workers that are wanted.
    pub workers: u32,
}

/// Why something is not done.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Problem {
    /// Fact and remedy.
    pub error: String,
}

/// Whether the server is well.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Health {
    /// `ok`.
    pub status: String,
    /// Version of the program.
    pub version: String,
}

impl From<v1::Job> for Job {
    fn from(job: v1::Job) -> Self {
        let phase = Phase::try_from(job.phase()).ok();
        Self {
            phase: phase.map_or("unknown".to_owned(), |phase| phase.to_string()),
            over: phase.is_some_and(Phase::is_terminal),
            name: job.name,
            min: job.min,
            desired: job.desired,
            workers: job.workers,
            created_unix_ms: Some(job.created_unix_ms).filter(|ms| *ms > 0),
            run: job.run,
            step: job.step,
            total_steps: job.total_steps,
            loss: job.loss.filter(|loss| loss.is_finite()),
            tokens_per_s: job.tokens_per_s,
            waits_for: job.waits_for,
            queue_position: job.queue_position,
            reason: job.reason,
        }
    }
}

impl From<v1::Attendant> for Worker {
    fn from(worker: v1::Attendant) -> Self {
        let seconds = worker.pace.map(|pace| {
            let parts = [
                ("step", pace.whole_s),
                ("data", pace.data_s),
                ("compute", pace.compute_s),
                ("forward", pace.forward_s),
                ("reduce", pace.reduce_s),
                ("update", pace.update_s),
                ("checkpoint", pace.checkpoint_s),
            ];
            parts.into_iter().map(|(name, seconds)| (name.to_owned(), seconds)).collect()
        });
        Self {
            worker: format!("{:016x}", worker.worker),
            machine: worker.machine,
            first_lane: worker.first_lane,
            end_lane: worker.end_lane,
            holds: worker.holds,
            activity: worker.activity,
            seconds,
            slow: worker.slow,
        }
    }
}

impl From<&Record> for Event {
    fn from(record: &Record) -> Self {
        use anello_store::events::Event as Logged;
        let kind = serde_json::to_value(&record.event)
            .ok()
            .and_then(|value| Some(value.get("kind")?.as_str()?.to_owned()));
        let bad = matches!(
            record.event,
            Logged::PassedOver { .. }
                | Logged::Skipped { .. }
                | Logged::Spike { .. }
                | Logged::SkippedData { .. }
                | Logged::CheckpointFailed { .. }
                | Logged::Broke { .. }
                | Logged::Lost { .. }
                | Logged::Evicted { .. }
                | Logged::FellBack { .. }
                | Logged::LeftOut { .. }
                | Logged::Slow { .. }
        );
        Self {
            number: record.number,
            unix_ms: record.unix_ms,
            kind: kind.unwrap_or_default(),
            text: describe(&record.event),
            bad,
        }
    }
}

impl From<Shares> for Time {
    fn from(shares: Shares) -> Self {
        Self {
            wall_s: shares.wall_s,
            productive_s: shares.productive_s,
            goodput: shares.goodput,
            effective: shares.effective,
            lost_s: shares.lost.iter().map(|(cause, seconds)| (cause.name().to_owned(), *seconds)).collect(),
        }
    }
}

/// Four digits are more than a screen shows.
fn rounded(values: Vec<Option<f32>>) -> Vec<Option<f32>> {
    values.into_iter().map(|value| format!("{:.4e}", value?).parse().ok()).collect()
}

impl From<Thinned> for Metrics {
    fn from(thinned: Thinned) -> Self {
        let single = thinned.stride == 1;
        let band = |values: Values, extremes: bool| {
            let extreme = |values| (extremes && !single).then(|| rounded(values));
            Band { mean: rounded(values.mean), min: extreme(values.min), max: extreme(values.max) }
        };
        let figures = FIGURES.iter().zip(thinned.figures);
        let mut figures: BTreeMap<String, Band> =
            figures.map(|(figure, values)| (figure.name.to_owned(), band(values, figure.extremes))).collect();
        figures.insert("tokens_per_s".to_owned(), band(thinned.tokens_per_s, true));
        Self {
            stride: thinned.stride,
            rows: thinned.rows,
            step: thinned.step,
            tokens: thinned.tokens,
            stage: thinned.stage,
            stages: thinned.stages,
            figures,
            loop_loss: thinned.loop_loss.into_iter().map(|values| band(values, true)).collect(),
            exit: thinned.exit.into_iter().map(rounded).collect(),
            skipped: thinned.skipped,
        }
    }
}

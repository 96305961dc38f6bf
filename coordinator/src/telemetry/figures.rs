//! All that is known of one job, as far as it is told to others. Pure: what happened goes in, time is an input.

use std::collections::{BTreeMap, VecDeque};

use anello_configs::{RunConfig, Schedule, TokenFlops};
use anello_proto::jobs::Phase;
use anello_store::events::{Event, Record};
use anello_store::metrics::{Seconds, StepRecord};
use anello_store::{Notice, Refused, Store, Traffic};

use super::goodput::{Goodput, Shares, Times};
use super::invariants::{self, Invariant};
use crate::core::Status;

/// Rows that are kept: more than ever wait to be written to the run folder.
pub const RECENT: usize = 4096;
/// Records of the log, and checkpoints, that are kept.
const KEPT: usize = 256;
/// Steps that the speed is over.
const SPEED_STEPS: usize = 16;

/// Why a worker was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Death {
    /// It said nothing for a whole lease.
    Silent,
    /// Its connections were closed.
    Closed,
    /// Its state differed from that of most others.
    Evicted,
}

impl Death {
    /// All of them, with their names in labels.
    pub const ALL: [(Self, &'static str); 3] =
        [(Self::Silent, "silent"), (Self::Closed, "closed"), (Self::Evicted, "evicted")];

    /// By the log's words.
    fn of(reason: &str) -> Self {
        if reason.starts_with("silent") { Self::Silent } else { Self::Closed }
    }
}

/// The newest checkpoint.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Newest {
    /// Steps applied.
    pub step: u64,
    /// When it was complete, milliseconds since 1970; absent: before this process.
    pub unix_ms: Option<u64>,
    /// Seconds and bytes of it, when this process saw it come.
    pub written: Option<(f64, u64)>,
}

/// How often something took how long: counts by upper bound, as Prometheus has them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Durations {
    /// Every duration, seconds, in the order of time.
    pub all: Vec<f64>,
}

/// What the log says of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logged {
    /// When it was complete, milliseconds since 1970.
    pub unix_ms: u64,
    /// Digest of the weights.
    pub weights: String,
}

/// What happened so often.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts {
    pub generations: u64,
    pub joins: u64,
    pub deaths: BTreeMap<Death, u64>,
    pub again: u64,
    pub mismatches: u64,
    pub refused: BTreeMap<Refused, u64>,
    pub violations: BTreeMap<Invariant, u64>,
    pub checkpoints: u64,
    pub checkpoint_failures: u64,
    pub passed_over: u64,
    pub epochs: u64,
    pub skipped_data: u64,
    pub skipped: u64,
    /// Steps by stage, in the order of stages.
    pub steps: BTreeMap<usize, u64>,
}

/// All that is told of a job.
#[derive(Clone, Debug)]
pub struct Figures {
    /// The plan of its run.
    pub schedule: Schedule,
    /// Model FLOPs of a token by stage.
    flops: Vec<f64>,
    /// Names of the stages.
    pub stages: Vec<String>,
    /// Path or URL of its run folder.
    pub run: String,
    /// Lanes of the run.
    pub lanes: u32,
    /// What it is trained on, while it is.
    store: Option<Store>,
    /// What was asked of the stores before that one.
    past: Traffic,
    /// When this process began to know it, or first heard of its training; milliseconds since 1970.
    pub began_ms: u64,
    /// The last rows, in the order of steps.
    pub recent: VecDeque<StepRecord>,
    /// When the newest was heard of.
    pub last_step_ms: Option<u64>,
    /// Seconds of all steps that were heard of.
    pub seconds: Seconds,
    /// FLOPs of them.
    pub done_flops: f64,
    /// How often what happened.
    pub counts: Counts,
    /// What changes of the ring took.
    pub recoveries: Durations,
    /// The newest checkpoint.
    pub checkpoint: Option<Newest>,
    /// The last checkpoints that the log tells of, by step, whether they exist still or not.
    pub checkpoints: BTreeMap<u64, Logged>,
    /// The last records of the log.
    pub events: VecDeque<Record>,
    /// Since the first record of its log.
    goodput: Option<Goodput>,
    /// Rows of the run folder that were not read yet are missing from it.
    rows_missing: bool,
    /// This process heard of its training.
    heard: bool,
    /// The newest generation that was formed.
    pub generation: Option<u64>,
    /// The phase, where somebody decides on it.
    pub phase: Option<Phase>,
    /// The ring, where there is one.
    pub status: Option<Status>,
    /// Workers that are wanted, where somebody asks for some.
    pub wanted: Option<u32>,
    /// Bytes of data that wait for the next steps, where this process computes them.
    pub queued_bytes: Option<u64>,
    /// Bytes that were sent to the other members of the ring, where this process is one.
    pub sent_bytes: u64,
}

impl Figures {
    /// Of a run that is taken up at `now_ms`. `checkpoint` is its newest, `row` the newest row.
    pub fn new(
        config: &RunConfig,
        run: &str,
        checkpoint: Option<u64>,
        row: Option<StepRecord>,
        now_ms: u64,
    ) -> Self {
        let schedule = Schedule::new(config);
        let flops = schedule
            .stages()
            .map(|(stage, span)| {
                TokenFlops::new(&config.model, span.layers, stage, config.compute.recompute).model
            })
            .collect();
        Self {
            rows_missing: row.is_some(),
            heard: false,
            flops,
            stages: schedule.stages().map(|(stage, _)| stage.name.as_str().to_owned()).collect(),
            schedule,
            run: run.to_owned(),
            lanes: config.lanes,
            store: None,
            past: Traffic::default(),
            began_ms: now_ms,
            recent: row.into_iter().collect(),
            last_step_ms: None,
            seconds: Seconds::default(),
            done_flops: 0.0,
            counts: Counts::default(),
            recoveries: Durations::default(),
            checkpoint: checkpoint.map(|step| Newest { step, unix_ms: None, written: None }),
            checkpoints: BTreeMap::new(),
            events: VecDeque::new(),
            goodput: None,
            generation: None,
            phase: None,
            status: None,
            wanted: None,
            queued_bytes: None,
            sent_bytes: 0,
        }
    }

    /// A record of the log of before it was taken up, in its order: it is known, and not counted.
    pub fn recall(&mut self, record: &Record) {
        self.goodput.get_or_insert_with(|| Goodput::new(record.unix_ms)).record(record);
        match &record.event {
            Event::Formed { generation, .. } => self.generation = Some(*generation),
            Event::Checkpoint { step, .. } => {
                if let Some(newest) = self.checkpoint.as_mut().filter(|newest| newest.step == *step) {
                    newest.unix_ms = Some(record.unix_ms);
                }
            }
            Event::Started { .. }
            | Event::PassedOver { .. }
            | Event::Broke { .. }
            | Event::Stage { .. }
            | Event::Skipped { .. }
            | Event::Spike { .. }
            | Event::Epoch { .. }
            | Event::SkippedData { .. }
            | Event::CheckpointFailed { .. }
            | Event::TakenUp { .. }
            | Event::Goal { .. }
            | Event::Joined { .. }
            | Event::Lost { .. }
            | Event::Evicted { .. }
            | Event::Recovered { .. }
            | Event::FellBack { .. }
            | Event::LeftOut { .. }
            | Event::Slow { .. }
            | Event::InStep { .. }
            | Event::Ended { .. }
            | Event::Stopped { .. }
            | Event::Finished { .. } => {}
        }
        self.keep(record);
    }

    fn keep(&mut self, record: &Record) {
        if let Event::Checkpoint { step, weights } = &record.event {
            let logged = Logged { unix_ms: record.unix_ms, weights: weights.clone() };
            self.checkpoints.insert(*step, logged);
            if self.checkpoints.len() > KEPT {
                self.checkpoints.pop_first();
            }
        }
        self.events.push_back(record.clone());
        if self.events.len() > KEPT {
            self.events.pop_front();
        }
    }

    /// Something happened.
    pub fn observe(&mut self, notice: &Notice, now_ms: u64) {
        if !self.heard {
            (self.heard, self.began_ms) = (true, now_ms);
        }
        if self.goodput.is_none() {
            let began_ms = if let Notice::Logged(record) = notice { record.unix_ms } else { now_ms };
            self.goodput = Some(Goodput::new(began_ms));
        }
        match notice {
            Notice::Step(row) => self.row(row, now_ms),
            Notice::Logged(record) => self.record(record),
            Notice::Checkpoint { step, seconds, bytes } => {
                self.counts.checkpoints += 1;
                self.claim(
                    Invariant::CheckpointAfterItsSteps,
                    invariants::checkpoint_after_its_steps(self.steps_done(), *step),
                );
                let written = Some((*seconds, *bytes));
                self.checkpoint = Some(Newest { step: *step, unix_ms: Some(now_ms), written });
            }
            Notice::CheckpointFailed { .. } => self.counts.checkpoint_failures += 1,
            Notice::Refused(what) => *self.counts.refused.entry(*what).or_default() += 1,
            Notice::Ready { .. } | Notice::Stage { .. } => {}
        }
    }

    /// What the steps of before it was taken up took.
    pub fn recall_times(&mut self, times: Times) {
        if let Some(goodput) = &mut self.goodput {
            goodput.steps(times);
        }
        self.rows_missing = false;
    }

    /// What became of the time of the run up to `now_ms`; absent while that is not known.
    pub fn shares(&self, now_ms: u64) -> Option<Shares> {
        let goodput = self.goodput.as_ref().filter(|_| !self.rows_missing)?;
        Some(goodput.at(now_ms))
    }

    fn claim(&mut self, invariant: Invariant, holds: Result<(), String>) {
        if let Err(seen) = holds {
            *self.counts.violations.entry(invariant).or_default() += 1;
            tracing::error!(
                invariant = invariant.name(),
                seen,
                "what must always be true is not; report this as a bug"
            );
        }
    }

    fn row(&mut self, row: &StepRecord, now_ms: u64) {
        self.claim(Invariant::BatchOfThePlan, invariants::batch_of_the_plan(&self.schedule, row));
        // A run that went back to a checkpoint tells its steps again.
        while self.recent.back().is_some_and(|last| last.step >= row.step) {
            self.recent.pop_back();
        }
        let stage = self.stages.iter().position(|name| *name == row.stage);
        if let Some(stage) = stage {
            *self.counts.steps.entry(stage).or_default() += 1;
            self.done_flops += self.flops[stage] * row.batch_tokens as f64;
        }
        self.counts.skipped += u64::from(!row.applied);
        let add = |sum: &mut f64, of: f64| *sum += if of.is_finite() { of.max(0.0) } else { 0.0 };
        let (sum, of) = (&mut self.seconds, row.seconds);
        add(&mut sum.step, of.step);
        add(&mut sum.data, of.data);
        add(&mut sum.compute, of.compute);
        add(&mut sum.forward, of.forward);
        add(&mut sum.reduce, of.reduce);
        add(&mut sum.update, of.update);
        add(&mut sum.checkpoint, of.checkpoint);
        if let Some(goodput) = &mut self.goodput {
            goodput.step(row);
        }
        self.last_step_ms = Some(now_ms);
        self.recent.push_back(row.clone());
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
    }

    fn record(&mut self, record: &Record) {
        if let Some(goodput) = &mut self.goodput {
            goodput.record(record);
        }
        self.keep(record);
        match &record.event {
            Event::Joined { .. } => self.counts.joins += 1,
            Event::Lost { reason, .. } => *self.counts.deaths.entry(Death::of(reason)).or_default() += 1,
            Event::Evicted { .. } => {
                *self.counts.deaths.entry(Death::Evicted).or_default() += 1;
                self.counts.mismatches += 1;
            }
            Event::Formed { generation, members, .. } => {
                let members =
                    members.iter().map(|member| (&member.worker, member.first_lane..member.end_lane));
                self.claim(
                    Invariant::LanesCoveredOnce,
                    invariants::lanes_are_covered_once(members, self.lanes),
                );
                let rises = invariants::generations_rise(self.generation, *generation);
                self.claim(Invariant::GenerationsRise, rises);
                self.generation = Some(*generation);
                self.counts.generations += 1;
            }
            Event::Recovered { took_ms, again, .. } => {
                self.recoveries.all.push(*took_ms as f64 / 1e3);
                self.counts.again += again;
            }
            Event::PassedOver { .. } => self.counts.passed_over += 1,
            Event::Epoch { .. } => self.counts.epochs += 1,
            Event::SkippedData { .. } => self.counts.skipped_data += 1,
            Event::Goal { workers, .. } => self.wanted = Some(*workers),
            // Counted where they are told of as notices of their own.
            Event::Checkpoint { .. }
            | Event::CheckpointFailed { .. }
            | Event::Skipped { .. }
            | Event::Spike { .. }
            | Event::Broke { .. } => {}
            Event::Started { .. }
            | Event::Stage { .. }
            | Event::TakenUp { .. }
            | Event::FellBack { .. }
            | Event::LeftOut { .. }
            | Event::Slow { .. }
            | Event::InStep { .. }
            | Event::Ended { .. }
            | Event::Stopped { .. }
            | Event::Finished { .. } => {}
        }
    }

    /// It is trained on `store` from now on; absent: it is not trained here any more.
    pub fn use_store(&mut self, store: Option<Store>) {
        self.past = self.traffic();
        self.store = store;
    }

    /// What was asked of its stores.
    pub fn traffic(&self) -> Traffic {
        self.past + self.store.as_ref().map(Store::traffic).unwrap_or_default()
    }

    /// A step was computed here: bytes of data that wait now, and bytes that it sent to the other members.
    pub fn bear(&mut self, queued_bytes: u64, sent_bytes: u64) {
        self.queued_bytes = Some(queued_bytes);
        self.sent_bytes += sent_bytes;
    }

    /// The newest row.
    pub fn last(&self) -> Option<&StepRecord> {
        self.recent.back()
    }

    /// Steps done.
    pub fn steps_done(&self) -> Option<u64> {
        self.last().map(|row| row.step + 1)
    }

    /// Tokens a second over the last steps.
    pub fn tokens_per_s(&self) -> Option<f64> {
        let last = || self.recent.iter().rev().take(SPEED_STEPS);
        let (tokens, seconds) = (
            last().map(|row| row.batch_tokens).sum::<u64>(),
            last().map(|row| row.seconds.step).sum::<f64>(),
        );
        (seconds > 0.0).then(|| tokens as f64 / seconds)
    }

    /// Model FLOP/s over the last steps.
    pub fn flops_per_s(&self) -> Option<f64> {
        let last = self.last()?;
        let stage = self.stages.iter().position(|name| *name == last.stage)?;
        Some(self.tokens_per_s()? * self.flops[stage])
    }

    /// Members of the ring; 1 where there is no ring.
    pub fn members(&self) -> u32 {
        match &self.status {
            Some(status) => status.formation.as_ref().map_or(0, |formation| formation.members.len() as u32),
            None => 1,
        }
    }

    /// Members' times for a lane as multiples of their lower median, by worker's number.
    pub fn straggler_scores(&self) -> BTreeMap<u64, f64> {
        let attendants = self.status.iter().flat_map(|status| &status.attendants);
        let costs: Vec<(u64, f64)> = attendants
            .filter_map(|attendant| {
                let pace = attendant.pace.filter(|pace| pace.steps > 0 && pace.lanes > 0)?;
                let lanes = f64::from(pace.lanes) * f64::from(pace.steps);
                Some((attendant.worker.0, pace.spent.compute_us as f64 / lanes))
            })
            .collect();
        let mut sorted: Vec<f64> = costs.iter().map(|(_, cost)| *cost).collect();
        sorted.sort_by(f64::total_cmp);
        let Some(median) = sorted.get(sorted.len().saturating_sub(1) / 2).copied().filter(|m| *m > 0.0)
        else {
            return BTreeMap::new();
        };
        costs.into_iter().map(|(worker, cost)| (worker, cost / median)).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use anello_store::events::RingMember;

    use super::*;

    /// 32 steps of warmup and 384 of stable, of 8 Ki tokens.
    pub fn config() -> RunConfig {
        let stage = |name: &str, tokens: &str| {
            format!(
                "[stage.{name}]\ntokens = {tokens:?}\nsequence = 128\nbatch = \"8Ki\"\nmicro_batch = 16\nlr_curve = \
                 \"constant\"\nlr = 3e-3\nloops = 4\nbeta = 0.1\nrope_base = 10_000\nmixture = {{ docs = 1.0 }}\n"
            )
        };
        let head = "name = \"small\"\nseed = 1\nlanes = 4\nstages = [\"warmup\", \"stable\"]\n\
                    data.sources.docs.url = \"docs\"\n\
                    [model]\nlayers = 2\nhidden = 128\nheads = 4\nffn = 352\nvocab = 2048\n";
        let text = head.to_owned() + &stage("warmup", "256Ki") + &stage("stable", "3Mi");
        RunConfig::parse("small.toml", &text).expect("a config of ours")
    }

    /// A row as the plan of [`config`] has it.
    pub fn row(step: u64) -> StepRecord {
        let schedule = Schedule::new(&config());
        let plan = schedule.at(step).expect("it is in the run");
        let loops = plan.stage.loops as usize;
        StepRecord {
            step,
            stage: plan.stage.name.as_str().to_owned(),
            tokens: plan.tokens_before + plan.batch_tokens,
            batch_tokens: plan.batch_tokens,
            counted: plan.batch_tokens,
            lr: plan.lr,
            loss: 5.0,
            loop_loss: (0..loops).map(|t| 5.5 - t as f64 / 10.0).collect(),
            exit: vec![1.0 / loops as f64; loops],
            entropy: (loops as f64).ln(),
            grad_norm: 0.5,
            applied: true,
            weights: None,
            evals: Vec::new(),
            seconds: Seconds {
                step: 0.5,
                data: 0.05,
                compute: 0.3,
                forward: 0.1,
                reduce: 0.1,
                update: 0.04,
                checkpoint: 0.01,
                eval: 0.0,
            },
        }
    }

    pub fn figures() -> Figures {
        Figures::new(&config(), "runs/a", None, None, 1_000)
    }

    fn logged(event: Event) -> Notice {
        Notice::Logged(Record { number: 1, unix_ms: 1_000, event })
    }

    #[test]
    fn what_happens_is_counted() {
        let mut figures = figures();
        for step in 0..3 {
            figures.observe(&Notice::Step(row(step)), 2_000 + step);
        }
        let text = |text: &str| text.to_owned();
        let lost = |reason: &str| Event::Lost { worker: text("a"), step: None, reason: text(reason) };
        for event in [
            Event::Joined { worker: text("a"), machine: text("m") },
            lost("silent for 10.000 s"),
            lost("it closed its connection"),
            lost("it closed its connections to the coordinator and to its peers"),
            Event::Evicted { worker: text("a"), machine: text("m"), step: None, reason: text("block 3") },
            Event::Recovered { generation: 2, workers: 1, took_ms: 210, again: 3, checkpoint: None },
        ] {
            figures.observe(&logged(event), 3_000);
        }
        let deaths = BTreeMap::from([(Death::Silent, 1), (Death::Closed, 2), (Death::Evicted, 1)]);
        assert_eq!(figures.counts.deaths, deaths);
        assert_eq!((figures.counts.joins, figures.counts.mismatches, figures.counts.again), (1, 1, 3));
        assert_eq!((figures.steps_done(), figures.last_step_ms), (Some(3), Some(2_002)));
        assert_eq!(figures.recoveries.all, [0.21]);
        assert!(figures.counts.violations.is_empty());
        let tokens: u64 = (0..3).map(|step| row(step).batch_tokens).sum();
        assert!((figures.tokens_per_s().unwrap() - tokens as f64 / 1.5).abs() < 1e-6);
        assert!(figures.done_flops > 0.0 && figures.seconds.step == 1.5);
    }

    #[test]
    fn what_must_not_be_is_counted_each_time() {
        let mut figures = figures();
        let row = row(0);
        figures.observe(&Notice::Step(StepRecord { tokens: row.tokens + 1, ..row }), 1);
        let lanes = figures.lanes;
        let formed = |generation, end_lane| {
            let (ring, peers) = (Vec::new(), Vec::new());
            let members = vec![RingMember { worker: "1".to_owned(), ring, peers, first_lane: 0, end_lane }];
            let (source, holders) = ("seed".to_owned(), Vec::new());
            logged(Event::Formed { generation, start: 0, source, holders, members, save_first: false })
        };
        figures.observe(&formed(4, lanes), 2);
        figures.observe(&formed(5, lanes), 2);
        figures.observe(&formed(5, lanes), 2);
        figures.observe(&formed(6, lanes - 1), 2);
        figures.observe(&Notice::Checkpoint { step: 1, seconds: 0.1, bytes: 9 }, 3);
        figures.observe(&Notice::Checkpoint { step: 2, seconds: 0.1, bytes: 9 }, 3);
        let each = Invariant::ALL.map(|invariant| (invariant, 1));
        assert_eq!(figures.counts.violations, BTreeMap::from(each));
    }

    #[test]
    fn a_run_that_went_back_is_where_it_is() {
        let mut figures = figures();
        for step in [0, 1, 2, 3, 1, 2] {
            figures.observe(&Notice::Step(row(step)), 1);
        }
        let steps: Vec<u64> = figures.recent.iter().map(|row| row.step).collect();
        assert_eq!(steps, [0, 1, 2]);
        for step in 3..(RECENT as u64).min(figures.schedule.total_steps()) + 2 {
            if step < figures.schedule.total_steps() {
                figures.observe(&Notice::Step(row(step)), 1);
            }
        }
        assert!(figures.recent.len() <= RECENT);
    }
}

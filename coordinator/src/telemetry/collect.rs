//! From what is known to samples. A scrape makes them anew.

use std::collections::BTreeMap;

use anello_proto::jobs::Phase;
use anello_store::{Operation, Refused};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{CounterVec, GaugeVec, HistogramOpts, HistogramVec, Opts};

use super::board::Board;
use super::families::*;
use super::figures::{Death, Figures};
use super::invariants::Invariant;
use super::unix_ms;

/// A board as a registry reads it.
pub(super) struct Collected {
    board: Board,
    started_s: f64,
    descriptions: Vec<Desc>,
}

impl Collected {
    pub fn new(board: Board) -> Self {
        let describe = |family: &Family| {
            let labels = family.labels.iter().map(|label| (*label).to_owned()).collect();
            Desc::new(family.name.to_owned(), family.help.to_owned(), labels, Default::default())
                .expect("names and labels are checked by a test")
        };
        let descriptions = FAMILIES.iter().map(describe).collect();
        Self { board, started_s: unix_ms() as f64 / 1e3, descriptions }
    }
}

impl Collector for Collected {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut samples = Samples::default();
        samples.set(&BUILD, &[env!("CARGO_PKG_VERSION")], 1.0);
        samples.set(&STARTED, &[], self.started_s);
        let (now_ms, peak) = (unix_ms(), self.board.peak_flops());
        self.board.each(|job, figures| samples.job(job, figures, now_ms, peak));
        samples.families()
    }
}

/// Values, each with its labels.
type Labelled<T> = Vec<(Vec<String>, T)>;

/// Values by family and labels. A value that is set twice is the later one.
#[derive(Default)]
struct Samples {
    values: BTreeMap<&'static str, Labelled<f64>>,
    durations: BTreeMap<&'static str, Labelled<Vec<f64>>>,
}

impl Samples {
    fn set(&mut self, family: &Family, labels: &[&str], value: f64) {
        debug_assert_eq!(family.labels.len(), labels.len(), "{}", family.name);
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        self.values.entry(family.name).or_default().push((labels, value));
    }

    fn set_if(&mut self, family: &Family, labels: &[&str], value: Option<f64>) {
        if let Some(value) = value {
            self.set(family, labels, value);
        }
    }

    fn job(&mut self, job: &str, figures: &Figures, now_ms: u64, peak_flops: Option<f64>) {
        self.progress(job, figures);
        self.steps(job, figures, peak_flops);
        if let Some(row) = figures.last() {
            self.row(job, row);
        }
        if figures.phase.is_some() || figures.status.is_some() {
            self.ring(job, figures);
        }
        self.time(job, figures, now_ms);
        self.store(job, figures, now_ms);
    }

    fn progress(&mut self, job: &str, figures: &Figures) {
        if let Some(now) = figures.phase {
            for phase in PHASES {
                self.set(&PHASE, &[job, &phase.to_string()], f64::from(u8::from(phase == now)));
            }
        }
        let last = figures.last();
        self.set(&STEP, &[job], figures.steps_done().unwrap_or(0) as f64);
        self.set(&PLANNED_STEPS, &[job], figures.schedule.total_steps() as f64);
        self.set(&TOKENS, &[job], last.map_or(0, |row| row.tokens) as f64);
        self.set(&PLANNED_TOKENS, &[job], figures.schedule.total_tokens() as f64);
        let heard_ms = figures.last_step_ms.unwrap_or(figures.began_ms);
        self.set(&LAST_STEP, &[job], heard_ms as f64 / 1e3);
    }

    fn row(&mut self, job: &str, row: &anello_store::metrics::StepRecord) {
        let stage = [job, row.stage.as_str()];
        self.set(&LOSS, &stage, row.loss);
        for (t, (loss, exit)) in row.loop_loss.iter().zip(&row.exit).enumerate() {
            let t = (t + 1).to_string();
            self.set(&LOOP_LOSS, &[job, &row.stage, &t], *loss);
            self.set(&EXIT, &[job, &row.stage, &t], *exit);
        }
        self.set(&ENTROPY, &stage, row.entropy);
        self.set(&DEPTH, &stage, row.depth());
        self.set(&NORM, &stage, row.grad_norm);
        self.set(&RATE, &stage, row.lr);
    }

    fn steps(&mut self, job: &str, figures: &Figures, peak_flops: Option<f64>) {
        for (stage, count) in &figures.counts.steps {
            self.set(&STEPS, &[job, &figures.stages[*stage]], *count as f64);
        }
        self.set(&SKIPPED, &[job], figures.counts.skipped as f64);
        let s = &figures.seconds;
        let told = s.data + s.compute + s.reduce + s.update + s.checkpoint;
        let (backward, other) = ((s.compute - s.forward).max(0.0), (s.step - told).max(0.0));
        for (phase, seconds) in [s.data, s.forward, backward, s.reduce, s.update, s.checkpoint, other]
            .into_iter()
            .zip(STEP_PHASES)
            .map(|(s, p)| (p, s))
        {
            self.set(&STEP_SECONDS, &[job, phase], seconds);
        }
        if let Some(queued) = figures.queued_bytes {
            self.set(&QUEUED, &[job], queued as f64);
            self.set(&SENT, &[job], figures.sent_bytes as f64);
        }
        self.set_if(&THROUGHPUT, &[job], figures.tokens_per_s());
        self.set(&FLOPS, &[job], figures.done_flops);
        if let (Some(peak), Some(flops), members @ 1..) =
            (peak_flops, figures.flops_per_s(), figures.members())
        {
            self.set(&UTILISATION, &[job], flops / (peak * f64::from(members)));
        }
    }

    fn ring(&mut self, job: &str, figures: &Figures) {
        let counts = &figures.counts;
        self.set_if(&WANTED, &[job], figures.wanted.map(f64::from));
        self.set(&CONNECTED, &[job], figures.status.as_ref().map_or(0.0, |status| f64::from(status.workers)));
        self.set(&MEMBERS, &[job], if figures.status.is_some() { f64::from(figures.members()) } else { 0.0 });
        self.set(&GENERATION, &[job], figures.generation.unwrap_or(0) as f64);
        self.set(&GENERATIONS, &[job], counts.generations as f64);
        self.set(&JOINS, &[job], counts.joins as f64);
        for (death, name) in Death::ALL {
            self.set(&DEATHS, &[job, name], counts.deaths.get(&death).copied().unwrap_or(0) as f64);
        }
        let recoveries = self.durations.entry(RECOVERY.name).or_default();
        recoveries.push((vec![job.to_owned()], figures.recoveries.all.clone()));
        self.set(&AGAIN, &[job], counts.again as f64);
        self.set(&MISMATCHES, &[job], counts.mismatches as f64);
        for (refused, name) in Refused::ALL {
            self.set(&REFUSED, &[job, name], counts.refused.get(&refused).copied().unwrap_or(0) as f64);
        }
        let scores = figures.straggler_scores();
        for attendant in figures.status.iter().flat_map(|status| &status.attendants) {
            let worker = attendant.worker.to_string();
            let lanes = attendant.lanes.as_ref().map(|lanes| lanes.len() as f64);
            self.set_if(&WORKER_LANES, &[job, &worker], lanes);
            let score = scores.get(&attendant.worker.0).copied();
            self.set_if(&STRAGGLER, &[job, &worker], score);
            let Some(pace) = attendant.pace.filter(|pace| pace.steps > 0) else { continue };
            let s = pace.spent;
            let backward_us = s.compute_us.saturating_sub(s.forward_us);
            let told = [s.data_us, s.forward_us, backward_us, s.reduce_us, s.update_us, s.checkpoint_us];
            let other = s.step_us.saturating_sub(told.iter().sum());
            for (us, phase) in told.into_iter().chain([other]).zip(STEP_PHASES) {
                let mean = us as f64 / 1e6 / f64::from(pace.steps);
                self.set(&WORKER_SECONDS, &[job, &worker, phase], mean);
            }
        }
    }

    fn time(&mut self, job: &str, figures: &Figures, now_ms: u64) {
        for invariant in Invariant::ALL {
            let count = figures.counts.violations.get(&invariant).copied().unwrap_or(0);
            self.set(&VIOLATIONS, &[job, invariant.name()], count as f64);
        }
        let (Some(_), Some(shares)) = (figures.phase, figures.shares(now_ms)) else { return };
        self.set(&GOODPUT, &[job], shares.goodput);
        self.set(&ETTR, &[job], shares.effective);
        for (cause, seconds) in shares.lost {
            self.set(&LOST, &[job, cause.name()], seconds);
        }
    }

    fn store(&mut self, job: &str, figures: &Figures, now_ms: u64) {
        if figures.phase.is_some() {
            self.checkpoints(job, figures, now_ms);
        }
        let traffic = figures.traffic();
        for operation in Operation::ALL {
            let name = operation.name();
            let of = traffic.of(operation);
            self.set(&STORE_REQUESTS, &[job, name], of.requests as f64);
            self.set(&STORE_ERRORS, &[job, name], of.errors as f64);
            self.set(&STORE_RETRIES, &[job, name], of.retries as f64);
        }
        self.set(&STORE_BYTES, &[job, "read"], traffic.read_bytes as f64);
        self.set(&STORE_BYTES, &[job, "written"], traffic.written_bytes as f64);
    }

    fn checkpoints(&mut self, job: &str, figures: &Figures, now_ms: u64) {
        let counts = &figures.counts;
        let newest = figures.checkpoint;
        self.set(&CHECKPOINT_STEP, &[job], newest.map_or(0, |newest| newest.step) as f64);
        let since = newest.and_then(|newest| newest.unix_ms).unwrap_or(figures.began_ms);
        self.set(&CHECKPOINT_AGE, &[job], now_ms.saturating_sub(since) as f64 / 1e3);
        if let Some((seconds, bytes)) = newest.and_then(|newest| newest.written) {
            self.set(&CHECKPOINT_SECONDS, &[job], seconds);
            self.set(&CHECKPOINT_BYTES, &[job], bytes as f64);
        }
        self.set(&CHECKPOINTS, &[job], counts.checkpoints as f64);
        self.set(&CHECKPOINT_FAILURES, &[job], counts.checkpoint_failures as f64);
        self.set(&PASSED_OVER, &[job], counts.passed_over as f64);
        self.set(&EPOCHS, &[job], counts.epochs as f64);
        self.set(&SKIPPED_DATA, &[job], counts.skipped_data as f64);
    }

    /// As the encoder wants them: families without a sample are left out.
    fn families(self) -> Vec<MetricFamily> {
        let known = "names, labels and their number are checked by tests";
        let mut all = Vec::new();
        for family in FAMILIES {
            let opts = Opts::new(family.name, family.help);
            match family.kind {
                Kind::Gauge => {
                    let Some(values) = self.values.get(family.name) else { continue };
                    let gauges = GaugeVec::new(opts, family.labels).expect(known);
                    for (labels, value) in values {
                        gauges.with_label_values(labels).set(*value);
                    }
                    all.extend(gauges.collect());
                }
                Kind::Counter => {
                    let Some(values) = self.values.get(family.name) else { continue };
                    let counters = CounterVec::new(opts, family.labels).expect(known);
                    for (labels, value) in values {
                        counters.with_label_values(labels).inc_by(*value);
                    }
                    all.extend(counters.collect());
                }
                Kind::Histogram(bounds) => {
                    let Some(durations) = self.durations.get(family.name) else { continue };
                    let opts = HistogramOpts::from(opts).buckets(bounds.to_vec());
                    let histograms = HistogramVec::new(opts, family.labels).expect(known);
                    for (labels, seconds) in durations {
                        let histogram = histograms.with_label_values(labels);
                        seconds.iter().for_each(|seconds| histogram.observe(*seconds));
                    }
                    all.extend(histograms.collect());
                }
            }
        }
        all
    }
}

const STEP_PHASES: [&str; 7] = ["data", "forward", "backward", "reduce", "update", "checkpoint", "other"];

const PHASES: [Phase; 9] = [
    Phase::Queued,
    Phase::Forming,
    Phase::Running,
    Phase::Pausing,
    Phase::Paused,
    Phase::Recovering,
    Phase::Completed,
    Phase::Failed,
    Phase::Cancelled,
];

#[cfg(test)]
mod tests;

//! Alerts, as Prometheus reads them. The times and limits are those of [`Limits`]: the files in the repository have the
//! default ones.

use std::fmt::Write;

/// When something is worth an alert. Times in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// A job that is to train has told of no step for so long.
    pub stalled_s: u64,
    /// No checkpoint was completed for so long.
    pub checkpoint_s: u64,
    /// The mean loss of the last minutes as a multiple of that of the time before.
    pub spike_ratio: f64,
    /// The last minutes, and the time before, that the means are of.
    pub spike_window_s: (u64, u64),
    /// A member's time for a lane as a multiple of the median.
    pub straggler_ratio: f64,
    /// Share of steps that waits for data.
    pub starvation_ratio: f64,
    /// Deaths of workers within [`Limits::window_s`].
    pub deaths: u64,
    /// What is counted is counted over so long.
    pub window_s: u64,
    /// A state must last so long before it is told.
    pub for_s: u64,
    /// Each rule is looked at so often.
    pub every_s: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            stalled_s: 600,
            checkpoint_s: 7200,
            spike_ratio: 1.25,
            spike_window_s: (300, 3600),
            straggler_ratio: 1.5,
            starvation_ratio: 0.2,
            deaths: 5,
            window_s: 900,
            for_s: 300,
            every_s: 30.0,
        }
    }
}

/// An alert.
#[derive(Clone, Debug, PartialEq)]
pub struct Alert {
    /// Its name.
    pub name: &'static str,
    /// `critical`: a person must act now. `warning`: within the day.
    pub severity: &'static str,
    /// When it is true.
    pub expression: String,
    /// For how long it must be, seconds.
    pub for_s: u64,
    /// What it is, with Prometheus' placeholders.
    pub summary: &'static str,
    /// What to do.
    pub remedy: &'static str,
}

/// Jobs that are to train.
const TRAINS: &str = "max by (job) (anello_job_phase{phase=~\"forming|running|recovering\"}) == 1";

/// All alerts.
pub fn alerts(limits: &Limits) -> Vec<Alert> {
    let Limits {
        stalled_s,
        checkpoint_s,
        spike_ratio,
        straggler_ratio,
        starvation_ratio,
        deaths,
        window_s,
        for_s,
        ..
    } = *limits;
    let (short, long) = limits.spike_window_s;
    let alert = |name, severity, expression: String, for_s, summary, remedy| Alert {
        name,
        severity,
        expression,
        for_s,
        summary,
        remedy,
    };
    vec![
        alert(
            "AnelloCoordinatorDown",
            "critical",
            "up{job=\"anello-coordinator\"} == 0".to_owned(),
            for_s.min(60),
            "The coordinator at {{ $labels.instance }} does not answer.",
            "Training goes on without it, but nobody joins, no death is mended and no checkpoint is committed. Start \
             `anello coordinator` again on the same --jobs place, on any machine.",
        ),
        alert(
            "AnelloJobFailed",
            "critical",
            "anello_job_phase{phase=\"failed\"} == 1".to_owned(),
            0,
            "Job {{ $labels.job }} has failed.",
            "`anello describe` says why. Mend that and submit the same config with the same run folder under another name: \
             it goes on from its newest checkpoint.",
        ),
        alert(
            "AnelloStalled",
            "critical",
            format!("(time() - anello_last_step_timestamp_seconds > {stalled_s}) and on (job) ({TRAINS})"),
            0,
            "Job {{ $labels.job }} has told of no step for {{ $value | humanizeDuration }}.",
            "`anello describe` says what it waits for: workers that are missing, state, the store. `anello top` shows who \
             still moves; a worker that is frozen is evicted after ring.detection.",
        ),
        alert(
            "AnelloNoCheckpoint",
            "warning",
            format!("(anello_checkpoint_age_seconds > {checkpoint_s}) and on (job) ({TRAINS})"),
            0,
            "Job {{ $labels.job }} has completed no checkpoint for {{ $value | humanizeDuration }}.",
            "`anello logs` tells of attempts that failed; `anello doctor PLACE` tries the store. If steps are slow, lower \
             checkpoint.every_steps: it changes no bit.",
        ),
        alert(
            "AnelloCheckpointFails",
            "warning",
            format!("increase(anello_checkpoint_failures_total[{window_s}s]) > 0"),
            0,
            "A checkpoint of job {{ $labels.job }} could not be written.",
            "Training goes on and the next one is tried. `anello logs` has the store's words: space, permission, or a \
             server that is away.",
        ),
        alert(
            "AnelloLossSpike",
            "warning",
            format!(
                "avg_over_time(anello_loss_nats[{short}s]) > {spike_ratio} * avg_over_time(anello_loss_nats[{long}s] offset \
                 {short}s)"
            ),
            0,
            "The loss of job {{ $labels.job }} in stage {{ $labels.stage }} is {{ $value | humanize }} nats and was lower.",
            "Look at the gradient norm and the learning rate beside it, and at the data of those steps. A run is the same \
             bits each time: resume from a checkpoint before with another rate or mixture.",
        ),
        alert(
            "AnelloNonFiniteSteps",
            "warning",
            format!("increase(anello_steps_skipped_total[{window_s}s]) > 0"),
            0,
            "Steps of job {{ $labels.job }} were not finite and were skipped.",
            "One now and then is harmless: it changes nothing. More in a row mean that the run has diverged: go back to a \
             checkpoint before, with a lower learning rate.",
        ),
        alert(
            "AnelloDigestMismatch",
            "critical",
            format!("increase(anello_digest_mismatches_total[{window_s}s]) > 0"),
            0,
            "A worker of job {{ $labels.job }} computed something else than the others and was sent away.",
            "The run is whole: the majority's state was kept. `anello logs` names the machine; take it out of service and \
             test its memory and its GPU.",
        ),
        alert(
            "AnelloInvariantViolated",
            "critical",
            format!("increase(anello_invariant_violations_total[{window_s}s]) > 0"),
            0,
            "Job {{ $labels.job }}: {{ $labels.invariant }} does not hold.",
            "This must never be. Pause the job, keep its run folder and its logs, and report it as a bug.",
        ),
        alert(
            "AnelloStraggler",
            "warning",
            format!("anello_worker_straggler_ratio > {straggler_ratio}"),
            for_s,
            "Worker {{ $labels.worker }} of job {{ $labels.job }} takes {{ $value | humanize }} times as long as others.",
            "All wait for it at each step. `anello top` names its machine; look for other load, heat or a slower link. With \
             ring.lanes = \"by-speed\" it gets fewer lanes.",
        ),
        alert(
            "AnelloDataStarvation",
            "warning",
            format!(
                "sum by (job) (rate(anello_step_seconds_total{{phase=\"data\"}}[{window_s}s])) > {starvation_ratio} * sum by (job) \
                 (rate(anello_step_seconds_total[{window_s}s]))"
            ),
            for_s,
            "Job {{ $labels.job }} waits for data.",
            "Raise data.prefetch_bytes, bring the data nearer, or write it in larger row groups: none of it changes a bit.",
        ),
        alert(
            "AnelloWorkersDie",
            "warning",
            format!("sum by (job) (increase(anello_worker_deaths_total[{window_s}s])) > {deaths}"),
            0,
            "Workers of job {{ $labels.job }} die again and again.",
            "The same bits come out, slowly. `anello logs` says how each was lost; the workers' own logs say why: memory, \
             preemption, a crash.",
        ),
        alert(
            "AnelloStoreFails",
            "warning",
            format!("sum by (job) (increase(anello_store_errors_total[{window_s}s])) > 0"),
            for_s,
            "Operations on the run folder of job {{ $labels.job }} fail.",
            "`anello doctor PLACE` tries the store. Steps go on; checkpoints and the log wait until it is back.",
        ),
    ]
}

/// The file of rules.
pub fn render(limits: &Limits) -> String {
    let mut text = "# Alerts on Anello's metrics. Made by `anello dashboards`; edit coordinator/src/telemetry/rules.rs.\n\
                    # Scrape the coordinator as job `anello-coordinator` with `honor_labels: true`.\n\
                    groups:\n"
        .to_owned();
    let every_ms = (limits.every_s * 1e3) as u64;
    let _ = write!(text, "- name: anello\n  interval: {every_ms}ms\n  rules:\n");
    for Alert { name, severity, expression, for_s, summary, remedy } in alerts(limits) {
        let quoted = |text: &str| format!("'{}'", text.replace('\'', "''"));
        let _ = write!(
            text,
            "  - alert: {name}\n    expr: {}\n    for: {for_s}s\n    labels:\n      severity: {severity}\n    annotations:\n      \
             summary: {}\n      description: {}\n",
            quoted(&expression),
            quoted(summary),
            quoted(remedy)
        );
    }
    text
}

//! Every metric: its name, kind, labels and help. Units are base units; a ratio is 0 to 1 unless it says otherwise.

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only rises, from when the process started.
    Counter,
    /// Counts by size, with these upper bounds.
    Histogram(&'static [f64]),
}

/// Who tells a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Teller {
    /// Whoever keeps the run: a coordinator, or `anello run`.
    Keeper,
    /// A worker.
    Worker,
    /// Both.
    Both,
}

/// A metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Family {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Its labels; each has values from a set that is bounded by the run.
    pub labels: &'static [&'static str],
    /// What it says, with its unit.
    pub help: &'static str,
    /// Who tells it.
    pub teller: Teller,
}

macro_rules! families {
    ($($(#[$attribute:meta])* $constant:ident = $teller:ident $kind:expr, $name:literal, [$($label:literal),*], $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $constant: Family = Family {
                name: $name,
                kind: $kind,
                labels: &[$($label),*],
                help: $help,
                teller: Teller::$teller,
            };
        )*
        /// All of them, in the order in which people read of them.
        pub const FAMILIES: &[Family] = &[$($constant),*];
    };
}

use Kind::{Counter, Gauge, Histogram};

families! {
    BUILD = Both Gauge, "anello_build_info", ["version"],
        "1, with the version of the program.";
    STARTED = Both Gauge, "anello_start_timestamp_seconds", [],
        "When the process started, seconds since 1970.";

    PHASE = Keeper Gauge, "anello_job_phase", ["job", "phase"],
        "1 for the phase that the job is in, 0 for all others.";
    STEP = Both Gauge, "anello_step", ["job"],
        "Steps of the run that are done: applied, or skipped since they were not finite.";
    PLANNED_STEPS = Both Gauge, "anello_planned_steps", ["job"],
        "Steps of the whole run.";
    TOKENS = Both Counter, "anello_tokens_total", ["job"],
        "Tokens that the run was trained on.";
    PLANNED_TOKENS = Both Gauge, "anello_planned_tokens", ["job"],
        "Tokens of the whole run.";
    LAST_STEP = Both Gauge, "anello_last_step_timestamp_seconds", ["job"],
        "When the newest step was heard of, or before the first when the job was taken up; seconds since 1970.";

    LOSS = Both Gauge, "anello_loss_nats", ["job", "stage"],
        "The objective at the newest step, nats a token.";
    LOOP_LOSS = Both Gauge, "anello_loop_loss_nats", ["job", "stage", "loop"],
        "Cross-entropy L(t) of the newest step at loop step t, nats a token.";
    EXIT = Both Gauge, "anello_exit_probability_ratio", ["job", "stage", "loop"],
        "Mean probability p(t) of the newest step that a token exits at loop step t.";
    ENTROPY = Both Gauge, "anello_exit_entropy_nats", ["job", "stage"],
        "Mean entropy H(p) of the exit distribution at the newest step, nats.";
    DEPTH = Both Gauge, "anello_expected_depth_loops", ["job", "stage"],
        "Expected depth, the sum of t times p(t), at the newest step, loop steps.";
    NORM = Both Gauge, "anello_gradient_norm", ["job", "stage"],
        "Global gradient norm of the newest step before the clip.";
    RATE = Both Gauge, "anello_learning_rate", ["job", "stage"],
        "Learning rate of the newest step.";

    STEPS = Both Counter, "anello_steps_total", ["job", "stage"],
        "Steps that this process has heard of.";
    SKIPPED = Both Counter, "anello_steps_skipped_total", ["job"],
        "Steps that were not applied since their loss or gradient was not finite.";
    STEP_SECONDS = Both Counter, "anello_step_seconds_total", ["job", "phase"],
        "Wall-clock seconds of steps by where they went: data (waiting for it), forward, backward (with the losses), reduce (in \
         the collective), update, checkpoint (waiting for its copy), other.";
    THROUGHPUT = Both Gauge, "anello_tokens_per_second", ["job"],
        "Tokens a second of wall clock over the last steps, 16 at most.";
    FLOPS = Both Counter, "anello_model_flops_total", ["job"],
        "Floating-point operations of the model in the steps that this process has heard of, without what is recomputed.";
    UTILISATION = Keeper Gauge, "anello_model_flops_utilisation_ratio", ["job"],
        "Model FLOP/s over the last steps as a share of the peak of all members; only with --peak-flops.";

    GOODPUT = Keeper Gauge, "anello_goodput_ratio", ["job"],
        "Of the time since the run began, whoever kept it, pauses left out: the share in which steps that the run keeps were \
         computed, reduced and applied.";
    ETTR = Keeper Gauge, "anello_effective_training_time_ratio", ["job"],
        "Of the same time: the share inside steps that the run keeps, waits for data and checkpoints included.";
    LOST = Keeper Gauge, "anello_lost_seconds", ["job", "cause"],
        "Seconds since the run began that trained nothing: data, checkpoint (waits inside steps), recovery (from a \
         ring's end to the next one's first step), recomputed (steps done again), paused, other.";

    GENERATION = Keeper Gauge, "anello_generation", ["job"],
        "Number of the newest generation of the ring.";
    GENERATIONS = Keeper Counter, "anello_generations_total", ["job"],
        "Generations that were formed.";
    CONNECTED = Keeper Gauge, "anello_connected_workers", ["job"],
        "Workers that are connected.";
    MEMBERS = Keeper Gauge, "anello_member_workers", ["job"],
        "Members of the ring that trains or comes together.";
    WANTED = Keeper Gauge, "anello_wanted_workers", ["job"],
        "Workers that the user asks for.";
    JOINS = Keeper Counter, "anello_worker_joins_total", ["job"],
        "Workers that came.";
    DEATHS = Keeper Counter, "anello_worker_deaths_total", ["job", "reason"],
        "Workers that were lost: silent (for a whole lease), closed (its connections), evicted (its state differed).";
    RECOVERY = Keeper Histogram(&[0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0]),
        "anello_recovery_seconds", ["job"],
        "From when a ring broke, or held for a change, to the first step of the next one, seconds.";
    AGAIN = Keeper Counter, "anello_recomputed_steps_total", ["job"],
        "Steps that had been applied and were computed again.";
    MISMATCHES = Keeper Counter, "anello_digest_mismatches_total", ["job"],
        "Workers that were sent away since the digest of their state differed from that of most others.";
    REFUSED = Keeper Counter, "anello_worker_words_refused_total", ["job", "reason"],
        "Words of workers that were not taken: stranger (another build or device), malformed, impossible (a step or generation that \
         cannot be, a second hello), event (no step's, or unknown).";
    VIOLATIONS = Keeper Counter, "anello_invariant_violations_total", ["job", "invariant"],
        "Times that something was seen that must never be; any at all is a bug, or damage.";

    WORKER_LANES = Keeper Gauge, "anello_worker_lanes", ["job", "worker"],
        "Lanes that a member serves.";
    WORKER_SECONDS = Keeper Gauge, "anello_worker_step_seconds", ["job", "worker", "phase"],
        "Mean seconds of a member's last steps by where they went, as in anello_step_seconds_total.";
    STRAGGLER = Keeper Gauge, "anello_worker_straggler_ratio", ["job", "worker"],
        "A member's time for a lane's forward and backward as a multiple of the members' lower median.";

    CHECKPOINT_STEP = Keeper Gauge, "anello_checkpoint_step", ["job"],
        "Step of the newest checkpoint.";
    CHECKPOINT_AGE = Keeper Gauge, "anello_checkpoint_age_seconds", ["job"],
        "Seconds since the newest checkpoint was complete, or before the first since the job was taken up.";
    CHECKPOINT_BYTES = Keeper Gauge, "anello_checkpoint_bytes", ["job"],
        "Size of the newest checkpoint's parts, bytes.";
    CHECKPOINT_SECONDS = Keeper Gauge, "anello_checkpoint_write_seconds", ["job"],
        "Seconds that the newest checkpoint took to commit, or in a run of one process to write, in the background.";
    CHECKPOINTS = Keeper Counter, "anello_checkpoints_total", ["job"],
        "Checkpoints that were completed.";
    CHECKPOINT_FAILURES = Keeper Counter, "anello_checkpoint_failures_total", ["job"],
        "Attempts at a checkpoint that failed; training goes on and the next one is tried.";
    PASSED_OVER = Keeper Counter, "anello_checkpoints_passed_over_total", ["job"],
        "Checkpoints that were damaged and passed over.";

    SENT = Worker Counter, "anello_ring_sent_bytes_total", ["job"],
        "Bytes of gradients that a worker sent to the other members, with the heads of their frames.";
    QUEUED = Worker Gauge, "anello_data_queue_bytes", ["job"],
        "Bytes of packed batches that wait for a worker's next steps.";
    EPOCHS = Keeper Counter, "anello_data_epochs_total", ["job"],
        "Times that a lane began a source anew.";
    SKIPPED_DATA = Keeper Counter, "anello_data_skipped_row_groups_total", ["job"],
        "Row groups that could not be read and were left out.";

    STORE_REQUESTS = Both Counter, "anello_store_requests_total", ["job", "operation"],
        "Operations on the run folder's object store: get, put, create, list, head, delete.";
    STORE_ERRORS = Both Counter, "anello_store_errors_total", ["job", "operation"],
        "Those of them that failed, after all their retries.";
    STORE_RETRIES = Both Counter, "anello_store_retries_total", ["job", "operation"],
        "Attempts of these operations after the first.";
    STORE_BYTES = Both Counter, "anello_store_bytes_total", ["job", "direction"],
        "Bytes of objects that were read and written.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_prometheus_wants() {
        let mut names: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), FAMILIES.len(), "each name is one family's");
        let labels = [
            "job",
            "stage",
            "worker",
            "loop",
            "phase",
            "cause",
            "reason",
            "operation",
            "direction",
            "invariant",
            "version",
        ];
        for Family { name, kind, labels: its, help, .. } in FAMILIES {
            assert!(
                name.starts_with("anello_") && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'),
                "{name}"
            );
            assert_eq!(*kind == Kind::Counter, name.ends_with("_total"), "{name}");
            assert!(help.ends_with('.') && !help.contains("  "), "{name}: {help}");
            assert!(its.iter().all(|label| labels.contains(label)), "{name}: {its:?}");
        }
    }
}

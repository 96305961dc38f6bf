//! What a person sees when a run has ended. Pure.

use anello_store::metrics::StepRecord;
use anello_worker::Ended;

use crate::stages::{StageSummary, summarise};
use crate::text::{Table, duration, grouped, nats, per_second};

/// How the run ended, and what became of each stage.
pub fn table(records: &[StepRecord], ended: &Ended) -> String {
    let stages = summarise(records);
    let seconds: f64 = stages.iter().map(|stage| stage.seconds).sum();
    let how = if ended.finished { "finished" } else { "stopped" };
    let mut text =
        format!("\n{how} after {} steps and {} of training\n", grouped(ended.step), duration(seconds));
    if !stages.is_empty() {
        text.push_str(&format!("\n{}", rows(&stages).render()));
        text.push_str(
            "(loss: the objective; first and last are means over a few steps, as are L(1), L(T) and depth)\n",
        );
    }
    text
}

fn rows(stages: &[StageSummary]) -> Table {
    let mut table = Table::new(1);
    table.row(["stage", "steps", "tokens", "loss first → last", "L(1)", "L(T)", "T", "depth", "tokens/s"]);
    for stage in stages {
        let loss = |t: Option<&f64>| t.copied().map_or("–".to_owned(), nats);
        let skipped = match stage.skipped {
            0 => String::new(),
            skipped => format!(" ({} skipped)", grouped(skipped)),
        };
        table.row([
            stage.stage.clone(),
            grouped(stage.steps) + &skipped,
            grouped(stage.tokens),
            format!("{} → {}", nats(stage.loss_first), nats(stage.loss_last)),
            loss(stage.loop_loss.first()),
            loss(stage.loop_loss.last()),
            stage.loop_loss.len().to_string(),
            format!("{:.2}", stage.depth),
            per_second(stage.tokens_per_s),
        ]);
    }
    table
}

/// The weights, and where everything lies.
pub fn places(ended: &Ended, place: &str, checkpoints: &[u64]) -> String {
    let steps: Vec<String> = checkpoints.iter().copied().map(grouped).collect();
    let mut table = Table::new(2);
    table
        .row(["weights", &ended.weights])
        .row(["config", &format!("{place}/config.toml")])
        .row(["metrics", &format!("{place}/metrics  (anello metrics {place})")])
        .row(["events", &format!("{place}/events  (anello events {place})")])
        .row(["checkpoints", &format!("{place}/checkpoints  (after steps {})", steps.join(", "))])
        .row(["report", &format!("anello report {place}")]);
    if !ended.finished {
        table.row(["go on", &format!("anello run --resume {place}")]);
    }
    format!("\n{}", table.render())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::record_of;

    #[test]
    fn the_end_of_a_run_that_was_stopped() {
        let mut records: Vec<StepRecord> =
            (0..24).map(|s| record_of(s, if s < 4 { "warmup" } else { "stable" }, 4)).collect();
        records[20].applied = false;
        let ended = Ended { step: 24, finished: false, weights: "0123abcd".into() };
        let text = table(&records, &ended) + &places(&ended, "runs/x", &[10, 24]);
        let expected = "
stopped after 24 steps and 12 s of training

stage            steps  tokens  loss first → last   L(1)   L(T)  T  depth  tokens/s
warmup               4     400      6.950 → 6.750  6.750  5.250  4   2.50       200
stable  20 (1 skipped)   2 000      6.200 → 5.167  5.167  3.667  4   2.50       200
(loss: the objective; first and last are means over a few steps, as are L(1), L(T) and depth)

weights      0123abcd
config       runs/x/config.toml
metrics      runs/x/metrics  (anello metrics runs/x)
events       runs/x/events  (anello events runs/x)
checkpoints  runs/x/checkpoints  (after steps 10, 24)
report       anello report runs/x
go on        anello run --resume runs/x
";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_run_without_a_step_has_no_table() {
        let ended = Ended { step: 0, finished: true, weights: "0".into() };
        let text = table(&[], &ended) + &places(&ended, "runs/x", &[0]);
        assert!(!text.contains("L(1)") && !text.contains("go on"), "{text}");
    }
}

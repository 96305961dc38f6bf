//! The lines that a person reads while a run trains. Pure.

use anello_configs::{Parameters, RunConfig, Schedule};
use anello_store::Notice;
use anello_store::events::Event;
use anello_store::metrics::{Evaluated, StepRecord};

use super::tracker::Tracker;
use crate::text::{count, duration, grouped, lr, nats, per_second, percent, short};
use anello_store::words::describe;

/// The first line of a run.
pub fn heading(config: &RunConfig, schedule: &Schedule, place: &str) -> String {
    let parameters = Parameters::new(&config.model, config.model.layers).total();
    let vocab = config.model.vocab;
    format!(
        "{}: {} parameters, {} stages, {} steps, {} tokens; into {place}\n\
         a model that knows nothing has a loss of ln {vocab} = {}",
        config.name,
        count(parameters),
        config.stages.len(),
        grouped(schedule.total_steps()),
        grouped(schedule.total_tokens()),
        nats(f64::from(vocab).ln()),
    )
}

/// `stage stable (2 of 2): 384 steps, 3 145 728 tokens, sequence 128, T = 4`
pub fn stage(tracker: &Tracker) -> String {
    let stages = tracker.schedule().stages();
    let of = stages.len();
    let Some((stage, span)) = stages.clone().nth(tracker.stage) else { return String::new() };
    format!(
        "stage {} ({} of {of}): {} steps, {} tokens, sequence {}, T = {}",
        stage.name,
        span.index + 1,
        grouped(span.steps),
        grouped(span.tokens),
        grouped(stage.sequence.into()),
        stage.loops,
    )
}

/// The line of a step, for a log: everything that the live display has.
pub fn step(tracker: &Tracker) -> String {
    let Some(last) = &tracker.last else { return String::new() };
    let until = tracker.until_step();
    let width = grouped(until).chars().count();
    let loops: Vec<String> = last.loop_loss.iter().copied().map(nats).collect();
    format!(
        "step {:>width$}/{} {:>7}  {}  loss {}  loops {}  depth {:.2}  lr {}  norm {}  {} tok/s  ETA {}{}",
        grouped(tracker.step),
        grouped(until),
        percent(tracker.step, until),
        last.stage,
        nats(last.loss),
        loops.join(" "),
        last.depth(),
        lr(last.lr),
        short(last.grad_norm),
        per_second(tracker.speed.tokens_per_s().unwrap_or(f64::NAN)),
        duration(tracker.eta_s().unwrap_or(f64::NAN)),
        if last.applied { "" } else { "  SKIPPED" },
    )
}

/// A line for each held-out set that was measured after a step:
/// `step 200 on held-out data tales: loops 3.100 2.900  accuracy 41.20 % 43.10 %`
pub fn evals(record: &StepRecord) -> Vec<String> {
    let line = |eval: &Evaluated| {
        let losses: Vec<String> = eval.loop_loss.iter().copied().map(nats).collect();
        let right: Vec<String> =
            eval.accuracy.iter().map(|share| format!("{:.2} %", share * 100.0)).collect();
        format!(
            "step {} on held-out data {}: loops {}  accuracy {}",
            grouped(record.step + 1),
            eval.set,
            losses.join(" "),
            right.join(" ")
        )
    };
    record.evals.iter().map(line).collect()
}

/// What is worth a line of its own, on a terminal and in a log.
pub fn news(notice: &Notice) -> Option<String> {
    match notice {
        Notice::CheckpointFailed { step, cause } => {
            Some(format!("checkpoint {} could not be written now, training goes on: {cause}", grouped(*step)))
        }
        Notice::Logged(record) => match &record.event {
            Event::Started { step, changed, data, .. }
                if *step > 0 || !(changed.is_empty() && data.is_empty()) =>
            {
                Some(describe(&record.event))
            }
            Event::PassedOver { .. }
            | Event::Broke { .. }
            | Event::Skipped { .. }
            | Event::Spike { .. }
            | Event::Epoch { .. }
            | Event::SkippedData { .. }
            | Event::TakenUp { .. }
            | Event::Goal { .. }
            | Event::Joined { .. }
            | Event::Lost { .. }
            | Event::Evicted { .. }
            | Event::Formed { .. }
            | Event::Recovered { .. }
            | Event::FellBack { .. }
            | Event::LeftOut { .. }
            | Event::Slow { .. }
            | Event::InStep { .. } => Some(describe(&record.event)),
            // The others have a notice of their own, or are told at the end.
            Event::Started { .. }
            | Event::Stage { .. }
            | Event::Checkpoint { .. }
            | Event::CheckpointFailed { .. }
            | Event::Ended { .. }
            | Event::Stopped { .. }
            | Event::Finished { .. } => None,
        },
        Notice::Ready { .. }
        | Notice::Stage { .. }
        | Notice::Step(_)
        | Notice::Checkpoint { .. }
        | Notice::Refused(_) => None,
    }
}

/// `checkpoint 100, written in 42 ms`
pub fn checkpoint(step: u64, seconds: f64) -> String {
    format!("checkpoint {}, written in {}", grouped(step), duration(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::{config_of, record_of};

    fn tracker() -> Tracker {
        let config = config_of();
        Tracker::new(&config, None)
    }

    #[test]
    fn a_step_is_one_line() {
        let mut tracker = tracker();
        assert_eq!(step(&tracker), "");
        let mut record = record_of(39, "stable", 4);
        (record.batch_tokens, record.seconds.step) = (8192, 0.5);
        tracker.observe(&Notice::Step(record.clone()));
        assert_eq!(
            step(&tracker),
            "step  40/416   9.6 %  stable  loss 3.100  loops 3.100 2.600 2.100 1.600  depth 2.50  lr 1.00e-3  \
             norm 0.300  16 384 tok/s  ETA 3 min 8 s"
        );
        (record.applied, record.loss, record.grad_norm) = (false, f64::NAN, f64::INFINITY);
        tracker.observe(&Notice::Step(record));
        assert!(step(&tracker).contains("loss NaN") && step(&tracker).ends_with("  SKIPPED"));
    }

    #[test]
    fn a_held_out_set_is_one_line() {
        let mut record = record_of(199, "stable", 2);
        assert_eq!(evals(&record), [""; 0]);
        let (loop_loss, accuracy) = (vec![3.1, 2.9], vec![0.412, 0.431]);
        let set = "tales".to_owned();
        record.evals = vec![Evaluated { set, counted: 7, loop_loss, accuracy, exit: vec![0.5; 2] }];
        assert_eq!(
            evals(&record),
            ["step 200 on held-out data tales: loops 3.100 2.900  accuracy 41.20 % 43.10 %"]
        );
    }

    #[test]
    fn a_run_and_its_stages_introduce_themselves() {
        let config = config_of();
        let mut tracker = tracker();
        assert_eq!(
            heading(&config, tracker.schedule(), "runs/small"),
            "small: 927 K parameters, 2 stages, 416 steps, 3 407 872 tokens; into runs/small\n\
             a model that knows nothing has a loss of ln 2048 = 7.625"
        );
        tracker.observe(&Notice::Stage { index: 1 });
        assert_eq!(
            stage(&tracker),
            "stage stable (2 of 2): 384 steps, 3 145 728 tokens, sequence 128, T = 4"
        );
        assert_eq!(checkpoint(1200, 0.042), "checkpoint 1 200, written in 42 ms");
    }
}

//! The metrics as series of points, few enough to draw. Pure.

use std::collections::{BTreeMap, BTreeSet};

use anello_store::events::Event;
use anello_store::metrics::StepRecord;
use serde_json::{Value, json};

use super::Story;

/// Points of a series at most, about.
const POINTS: usize = 2000;

/// A moving average reaches over so many points in all, of those that a series has.
const SMOOTH_SHARE: usize = 30;

/// What the page's script draws.
pub fn data(story: &Story) -> Value {
    let records = &story.records;
    let stride = records.len().div_ceil(POINTS).max(1);
    // A point is the mean of `stride` steps, all of one stage.
    let points: Vec<&[StepRecord]> =
        records.chunk_by(|a, b| a.stage == b.stage).flat_map(|stage| stage.chunks(stride)).collect();
    let series = |of: &dyn Fn(&StepRecord) -> f64| points.iter().map(|p| mean(p, of)).collect::<Vec<f64>>();
    let reach = points.len() / SMOOTH_SHARE / 2;
    let smooth = |values: &[f64]| -> Vec<f64> {
        let mut smoothed = Vec::with_capacity(values.len());
        for stage in points.chunk_by(|a, b| a[0].stage == b[0].stage) {
            let at = smoothed.len();
            smoothed.extend(moving_average(&values[at..at + stage.len()], reach));
        }
        smoothed
    };

    let loops = records.iter().map(|record| record.loop_loss.len()).max().unwrap_or(0);
    let per_loop = |of: fn(&StepRecord) -> &Vec<f64>| -> Vec<Vec<f64>> {
        let at = |t: usize| series(&move |record| of(record).get(t).copied().unwrap_or(f64::NAN));
        (0..loops).map(at).collect()
    };
    let losses = per_loop(|record| &record.loop_loss);
    let norm = series(&|record| record.grad_norm);
    let speed: Vec<f64> = points
        .iter()
        .map(|point| {
            let seconds: f64 = point.iter().map(|record| record.seconds.step).sum();
            point.iter().map(|record| record.batch_tokens).sum::<u64>() as f64 / seconds
        })
        .collect();
    let share = |of: &dyn Fn(&StepRecord) -> f64| {
        let ratio = |point: &&[StepRecord]| mean(point, of) / mean(point, &|record| record.seconds.step);
        smooth(&points.iter().map(ratio).collect::<Vec<f64>>())
    };

    json!({
        "stride": stride,
        "tokens": points.iter().map(|p| p[p.len() - 1].tokens).collect::<Vec<_>>(),
        "step": points.iter().map(|p| p[p.len() - 1].step).collect::<Vec<_>>(),
        "stages": stages(story),
        "loops": loops,
        "loop": losses.iter().map(|values| rounded(values)).collect::<Vec<_>>(),
        "loopSmooth": losses.iter().map(|values| rounded(&smooth(values))).collect::<Vec<_>>(),
        "exit": per_loop(|record| &record.exit).iter().map(|values| rounded(&smooth(values))).collect::<Vec<_>>(),
        "depth": rounded(&smooth(&series(&StepRecord::depth))),
        "entropy": rounded(&smooth(&series(&|record| record.entropy))),
        "lr": rounded(&series(&|record| record.lr)),
        "norm": rounded(&norm),
        "normSmooth": rounded(&smooth(&norm)),
        "speed": rounded(&speed),
        "speedSmooth": rounded(&smooth(&speed)),
        "time": {
            "compute": rounded(&share(&|record| record.seconds.compute)),
            "reduce": rounded(&share(&|record| record.seconds.reduce)),
            "update": rounded(&share(&|record| record.seconds.update)),
            "data": rounded(&share(&|record| record.seconds.data)),
            "checkpoint": rounded(&share(&|record| record.seconds.checkpoint)),
            "eval": rounded(&share(&|record| record.seconds.eval)),
            "other": rounded(&share(&other_seconds)),
        },
        "heldOut": held_out(&points),
        "checkpoints": checkpoints(story),
        "skipped": records.iter().filter(|r| !r.applied).map(|r| json!([r.step, r.tokens])).collect::<Vec<_>>(),
        "lnV": f64::from(story.config.model.vocab).ln(),
        "clip": story.config.optimizer.clip,
    })
}

/// Of each held-out set the loss of each loop step, at every point as it was last measured.
fn held_out(points: &[&[StepRecord]]) -> Vec<Value> {
    let all = || points.iter().flat_map(|point| point.iter()).flat_map(|record| &record.evals);
    let sets: BTreeSet<&str> = all().map(|eval| eval.set.as_str()).collect();
    let of_set = |set: &str| {
        let loops = all().filter(|eval| eval.set == set).map(|eval| eval.loop_loss.len()).max().unwrap_or(0);
        let of_loop = |t: usize| {
            let mut last = f64::NAN;
            let values = points.iter().map(|point| {
                let measured = point.iter().flat_map(|record| &record.evals).rfind(|eval| eval.set == set);
                if let Some(eval) = measured {
                    last = eval.loop_loss.get(t).copied().unwrap_or(f64::NAN);
                }
                last
            });
            rounded(&values.collect::<Vec<f64>>())
        };
        json!({ "set": set, "loop": (0..loops).map(of_loop).collect::<Vec<_>>() })
    };
    sets.into_iter().map(of_set).collect()
}

fn other_seconds(record: &StepRecord) -> f64 {
    let seconds = &record.seconds;
    (seconds.step
        - seconds.compute
        - seconds.reduce
        - seconds.update
        - seconds.data
        - seconds.checkpoint
        - seconds.eval)
        .max(0.0)
}

/// Where each trained stage begins and ends, tokens.
fn stages(story: &Story) -> Vec<Value> {
    let stages = story.records.chunk_by(|a, b| a.stage == b.stage);
    stages
        .map(|records| {
            let (first, last) = (&records[0], &records[records.len() - 1]);
            json!({ "name": first.stage, "from": first.tokens - first.batch_tokens, "to": last.tokens })
        })
        .collect()
}

/// Step, tokens, and whether it still exists: every checkpoint that was taken, as far as the run stands.
fn checkpoints(story: &Story) -> Vec<Value> {
    let logged = story.events.iter().filter_map(|record| match record.event {
        Event::Checkpoint { step, .. } => Some(step),
        _ => None,
    });
    let end = story.records.last().map_or(0, |record| record.step + 1);
    let mut all: BTreeMap<u64, bool> = logged.filter(|step| *step <= end).map(|step| (step, false)).collect();
    all.extend(story.kept.iter().map(|step| (*step, true)));
    all.into_iter().map(|(step, kept)| json!([step, story.tokens_at(step), kept])).collect()
}

/// The mean of what is finite.
fn mean(records: &[StepRecord], of: &dyn Fn(&StepRecord) -> f64) -> f64 {
    let finite = records.iter().map(of).filter(|value| value.is_finite());
    let (sum, count) = finite.fold((0.0, 0u32), |(sum, count), value| (sum + value, count + 1));
    sum / f64::from(count)
}

/// The mean of what is finite within `reach` points on either side; at the ends, of fewer.
fn moving_average(values: &[f64], reach: usize) -> Vec<f64> {
    let at = |index: usize| {
        let window = values[index.saturating_sub(reach)..values.len().min(index + reach + 1)]
            .iter()
            .filter(|value| value.is_finite());
        let (sum, count) = window.fold((0.0, 0u32), |(sum, count), value| (sum + value, count + 1));
        sum / f64::from(count)
    };
    (0..values.len()).map(at).collect()
}

/// Five digits are more than a screen shows; null where there is no number.
fn rounded(values: &[f64]) -> Vec<Option<f64>> {
    let round = |value: &f64| format!("{value:.4e}").parse::<f64>().ok().filter(|value| value.is_finite());
    values.iter().map(round).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_pass_over_what_is_not_finite() {
        assert_eq!(moving_average(&[0.0, 1.0, 2.0, 3.0, 4.0], 2), [1.0, 1.5, 2.0, 2.5, 3.0]);
        assert_eq!(moving_average(&[0.0, f64::NAN, 2.0, 6.0], 1), [0.0, 1.0, 4.0, 4.0]);
        assert_eq!(moving_average(&[], 3), [0.0; 0]);
        assert_eq!(
            rounded(&[1.234_567_8, f64::NAN, 0.0, -3e-9]),
            [Some(1.2346), None, Some(0.0), Some(-3e-9)]
        );
    }
}

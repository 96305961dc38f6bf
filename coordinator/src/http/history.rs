//! The figures of a whole run in memory, and as few points of them as a screen shows. Pure.
//!
//! A row takes 4 bytes a figure: a million steps of 4 loop steps are 84 MB. Points are made by one walk over them: each is the
//! mean of so many steps, all of one stage, with the least and the largest value among them, so that no spike is lost.

use anello_store::metrics::StepRecord;

/// A figure that a row has whatever its loop steps.
pub struct Figure {
    /// What the API calls it.
    pub name: &'static str,
    /// Whether the least and the largest of the steps behind a point are told beside their mean.
    pub extremes: bool,
    of: fn(&StepRecord) -> f64,
}

/// All of them, in the order of their columns: the one list that history, API and page go by.
pub const FIGURES: [Figure; 12] = {
    const fn banded(name: &'static str, of: fn(&StepRecord) -> f64) -> Figure {
        Figure { name, extremes: true, of }
    }
    const fn mean(name: &'static str, of: fn(&StepRecord) -> f64) -> Figure {
        Figure { name, extremes: false, of }
    }
    [
        banded("loss", |row| row.loss),
        banded("lr", |row| row.lr),
        banded("grad_norm", |row| row.grad_norm),
        banded("entropy", |row| row.entropy),
        banded("depth", StepRecord::depth),
        mean("seconds", |row| row.seconds.step),
        mean("data_seconds", |row| row.seconds.data),
        mean("compute_seconds", |row| row.seconds.compute),
        mean("reduce_seconds", |row| row.seconds.reduce),
        mean("update_seconds", |row| row.seconds.update),
        mean("checkpoint_seconds", |row| row.seconds.checkpoint),
        mean("forward_seconds", |row| row.seconds.forward),
    ]
};

/// The rows of a run, column by column, in the order of steps.
#[derive(Clone, Debug, Default)]
pub struct History {
    steps: Vec<u64>,
    tokens: Vec<u64>,
    batch: Vec<f32>,
    applied: Vec<bool>,
    stage: Vec<u16>,
    stages: Vec<String>,
    figures: [Vec<f32>; FIGURES.len()],
    loop_loss: Vec<Vec<f32>>,
    exit: Vec<Vec<f32>>,
}

/// A figure at some points; `None` where there is no number.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Band {
    /// Means of what is finite.
    pub mean: Vec<Option<f32>>,
    /// The least.
    pub min: Vec<Option<f32>>,
    /// The largest.
    pub max: Vec<Option<f32>>,
}

/// A part of a run in few points.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Thinned {
    /// Steps that a point stands for, at most.
    pub stride: u64,
    /// Rows in the part.
    pub rows: u64,
    /// The last step of each point.
    pub step: Vec<u64>,
    /// Tokens of the run after it.
    pub tokens: Vec<u64>,
    /// Index of the point's stage in `stages`.
    pub stage: Vec<u16>,
    /// Names of the stages that were trained.
    pub stages: Vec<String>,
    /// In the order of `FIGURES`.
    pub figures: Vec<Band>,
    /// Tokens a second of wall clock.
    pub tokens_per_s: Band,
    /// L(t).
    pub loop_loss: Vec<Band>,
    /// p(t): means alone.
    pub exit: Vec<Vec<Option<f32>>>,
    /// Steps that were not finite, with the tokens of the run after them; the first `SKIPPED_MAX` of the part.
    pub skipped: Vec<(u64, u64)>,
}

/// Skipped steps that are named.
pub const SKIPPED_MAX: usize = 500;

impl History {
    /// Rows.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Step of the newest row.
    pub fn last(&self) -> Option<u64> {
        self.steps.last().copied()
    }

    /// Adds a row. One of a step that is there already takes the place of that and of all after it: the run went back.
    pub fn push(&mut self, row: &StepRecord) {
        if self.last().is_some_and(|last| last >= row.step) {
            self.truncate(row.step);
        }
        let at = self.len();
        let stage = self.stages.iter().position(|name| *name == row.stage).unwrap_or_else(|| {
            self.stages.push(row.stage.clone());
            self.stages.len() - 1
        });
        self.steps.push(row.step);
        self.tokens.push(row.tokens);
        self.batch.push(row.batch_tokens as f32);
        self.applied.push(row.applied);
        self.stage.push(u16::try_from(stage).unwrap_or(u16::MAX));
        for (column, figure) in self.figures.iter_mut().zip(FIGURES) {
            column.push((figure.of)(row) as f32);
        }
        for (columns, values) in [(&mut self.loop_loss, &row.loop_loss), (&mut self.exit, &row.exit)] {
            while columns.len() < values.len() {
                columns.push(vec![f32::NAN; at]);
            }
            for (t, column) in columns.iter_mut().enumerate() {
                column.push(values.get(t).map_or(f32::NAN, |value| *value as f32));
            }
        }
    }

    /// Forgets `step` and all after it.
    pub fn truncate(&mut self, step: u64) {
        let length = self.steps.partition_point(|of| *of < step);
        self.steps.truncate(length);
        self.tokens.truncate(length);
        self.batch.truncate(length);
        self.applied.truncate(length);
        self.stage.truncate(length);
        let columns = self.figures.iter_mut().chain(&mut self.loop_loss).chain(&mut self.exit);
        columns.for_each(|column| column.truncate(length));
    }

    /// Steps `from..to` in about `points` points: no more than that and one a stage.
    pub fn thin(&self, from: u64, to: u64, points: usize) -> Thinned {
        let start = self.steps.partition_point(|step| *step < from);
        let end = self.steps.partition_point(|step| *step < to).max(start);
        let stride = (end - start).div_ceil(points.max(1)).max(1);
        let mut spans: Vec<std::ops::Range<usize>> = Vec::with_capacity(points + self.stages.len());
        let mut at = start;
        while at < end {
            let stage = self.stage[at];
            let room = end.min(at + stride);
            let length = self.stage[at..room].iter().take_while(|of| **of == stage).count();
            spans.push(at..at + length);
            at += length;
        }
        let last = |of: &[u64]| spans.iter().map(|span| of[span.end - 1]).collect::<Vec<u64>>();
        let skipped = (start..end).filter(|row| !self.applied[*row]);
        let [.., seconds, _, _, _, _, _, _] = &self.figures;
        let speed = |row: usize| self.batch[row] / seconds[row];
        Thinned {
            stride: stride as u64,
            rows: (end - start) as u64,
            step: last(&self.steps),
            tokens: last(&self.tokens),
            stage: spans.iter().map(|span| self.stage[span.start]).collect(),
            stages: self.stages.clone(),
            figures: self.figures.iter().map(|column| band(&spans, |row| column[row])).collect(),
            tokens_per_s: Band {
                // The mean over time, not over steps.
                mean: spans
                    .iter()
                    .map(|span| {
                        let sum = |of: &[f32]| of[span.clone()].iter().map(|v| f64::from(*v)).sum::<f64>();
                        finite((sum(&self.batch) / sum(seconds)) as f32)
                    })
                    .collect(),
                ..band(&spans, speed)
            },
            loop_loss: self.loop_loss.iter().map(|column| band(&spans, |row| column[row])).collect(),
            exit: self.exit.iter().map(|column| band(&spans, |row| column[row]).mean).collect(),
            skipped: skipped.take(SKIPPED_MAX).map(|row| (self.steps[row], self.tokens[row])).collect(),
        }
    }
}

fn finite(value: f32) -> Option<f32> {
    value.is_finite().then_some(value)
}

fn band(spans: &[std::ops::Range<usize>], of: impl Fn(usize) -> f32) -> Band {
    let mut band = Band::default();
    for span in spans {
        let (mut sum, mut count, mut min, mut max) = (0.0_f64, 0_u32, f32::INFINITY, f32::NEG_INFINITY);
        for value in span.clone().map(&of).filter(|value| value.is_finite()) {
            sum += f64::from(value);
            count += 1;
            min = min.min(value);
            max = max.max(value);
        }
        band.mean.push((count > 0).then(|| (sum / f64::from(count)) as f32));
        band.min.push(finite(min));
        band.max.push(finite(max));
    }
    band
}

#[cfg(test)]
mod tests {
    use anello_store::metrics::Seconds;

    use super::*;

    fn row(step: u64, stage: &str, loops: usize, loss: f64) -> StepRecord {
        StepRecord {
            step,
            stage: stage.into(),
            tokens: 100 * (step + 1),
            batch_tokens: 100,
            counted: 100,
            lr: 1e-3,
            loss,
            loop_loss: vec![loss; loops],
            exit: vec![1.0 / loops as f64; loops],
            entropy: 0.5,
            grad_norm: 1.0,
            applied: loss.is_finite(),
            weights: None,
            evals: Vec::new(),
            seconds: Seconds { step: 0.5, ..Seconds::default() },
        }
    }

    #[test]
    fn a_point_is_of_one_stage_and_keeps_its_extremes() {
        let mut history = History::default();
        for step in 0..10 {
            let loss = if step == 2 { f64::NAN } else { step as f64 };
            history.push(&row(step, if step < 5 { "a" } else { "b" }, if step < 5 { 2 } else { 3 }, loss));
        }
        let thinned = history.thin(0, u64::MAX, 3);
        assert_eq!((thinned.stride, thinned.rows), (4, 10));
        assert_eq!((&thinned.step[..], &thinned.stage[..]), (&[3, 4, 8, 9][..], &[0, 0, 1, 1][..]));
        assert_eq!(thinned.tokens, [400, 500, 900, 1000]);
        let loss = &thinned.figures[0];
        assert_eq!(loss.mean, [Some(4.0 / 3.0), Some(4.0), Some(6.5), Some(9.0)]);
        assert_eq!((loss.min[0], loss.max[0], loss.max[2]), (Some(0.0), Some(3.0), Some(8.0)));
        assert_eq!(thinned.loop_loss[2].mean, [None, None, Some(6.5), Some(9.0)]);
        assert_eq!(thinned.exit[0], [Some(0.5), Some(0.5), Some(1.0 / 3.0), Some(1.0 / 3.0)]);
        assert_eq!(thinned.tokens_per_s.mean, [Some(200.0); 4]);
        assert_eq!(thinned.skipped, [(2, 300)]);
        let part = history.thin(4, 7, 100);
        assert_eq!((part.step, part.stride, part.rows), (vec![4, 5, 6], 1, 3));
        assert_eq!(history.thin(20, 30, 5).rows, 0);
        assert_eq!(
            History::default().thin(0, 9, 5),
            Thinned { stride: 1, figures: vec![Band::default(); FIGURES.len()], ..Thinned::default() }
        );
    }

    #[test]
    fn a_run_that_went_back_is_told_as_it_went_on() {
        let mut history = History::default();
        for step in [0, 1, 2, 3, 4, 2, 3] {
            history.push(&row(step, "a", 1, 1.0));
        }
        assert_eq!((history.len(), history.last()), (4, Some(3)));
        assert_eq!(history.thin(0, 99, 99).step, [0, 1, 2, 3]);
    }

    #[test]
    fn a_million_steps_are_few_points_and_no_spike_is_lost() {
        let mut history = History::default();
        let mut row = row(0, "stable", 4, 3.0);
        for step in 0..1_000_000 {
            (row.step, row.tokens) = (step, 100 * (step + 1));
            row.loss = if step == 777_777 { 42.0 } else { 3.0 };
            history.push(&row);
        }
        let began = std::time::Instant::now();
        let thinned = history.thin(0, u64::MAX, 800);
        assert!(began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
        assert_eq!((thinned.step.len(), thinned.rows, thinned.stride), (800, 1_000_000, 1250));
        let spikes: Vec<usize> = (0..800).filter(|at| thinned.figures[0].max[*at] == Some(42.0)).collect();
        assert_eq!(spikes, [777_777 / 1250]);
        let near = history.thin(777_000, 778_000, 800);
        assert_eq!((near.rows, near.stride), (1000, 2));
        let bytes = serde_json::to_vec(&super::super::words::Metrics::from(thinned)).unwrap().len();
        assert!(bytes < 400_000, "{bytes} bytes for a page");
    }
}

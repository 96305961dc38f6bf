//! Both runs computed again, step by step and side by side.

use anello_configs::ComputeDevice;
use anello_dataloader::{Dataset, MicroBatch, RowGroupEntry};
use anello_store::Error as StoreError;
use anello_store::metrics::StepRecord;
use tch::{Device, Tensor};

use super::compare;
use super::findings::{Difference, Figure, Phase, Replayed};
use super::recorded::Recorded;
use super::side::{Ran, Side, Start};
use crate::device;
use crate::engine::{Engine, Outcome};
use crate::environment;
use crate::error::{Error, Result};
use crate::objective::LossSums;
use crate::params::Layout;

/// Computes both again, on `device`, from the first of `starts` that can be had, until something differs, at most until `until` steps are
/// applied. `progress` hears (steps applied at the start, steps applied).
pub(super) fn replay(
    (a, b): (&Recorded, &Recorded),
    device: ComputeDevice,
    starts: &[Start],
    until: u64,
    notes: &mut Vec<String>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Replayed> {
    let device = device::open(device)?;
    let (start, mut sides) = open((a, b), device, starts, notes)?;
    note_other_sources(&sides, notes);
    let here = environment::of(device, None);
    let mut found = Replayed {
        from: start.step,
        checkpoint: start.checkpoint,
        to: start.step,
        differs: None,
        off_record: [None, None],
        here: (here.device.clone(), here.build()),
    };
    while found.to < until && found.differs.is_none() && found.off_record == [None, None] {
        progress(start.step, found.to);
        let step = found.to;
        let Stepped { differs, computed } = step_both(&mut sides, step, step == start.step)?;
        found.to += 1;
        found.differs = differs;
        found.off_record = [0, 1].map(|side| sides[side].off_record(&computed[side]));
    }
    progress(start.step, found.to);
    Ok(found)
}

/// Both runs at the first start whose state can be read.
fn open<'a>(
    (a, b): (&'a Recorded, &'a Recorded),
    device: Device,
    starts: &[Start],
    notes: &mut Vec<String>,
) -> Result<(Start, [Side<'a>; 2])> {
    let (last, others) = starts.split_last().expect("there is always the seed");
    let both = |start: Start, notes: &mut Vec<String>| {
        let of_a = Side::open(a, start, device, Some(b), notes)?;
        Ok([of_a, Side::open(b, start, device, Some(a), notes)?])
    };
    for &start in others {
        match both(start, notes) {
            Ok(sides) => return Ok((start, sides)),
            Err(damaged @ Error::Store(StoreError::Checkpoint { .. })) => notes.push(damaged.to_string()),
            Err(other) => return Err(other),
        }
    }
    Ok((*last, both(*last, notes)?))
}

/// Sources of one name that are not the same, by their indexes: which tokens they hold is told by checksums, where both
/// have them.
fn note_other_sources([a, b]: &[Side<'_>; 2], notes: &mut Vec<String>) {
    for (name, of_a) in &a.sources {
        let Some(of_b) = b.sources.get(name) else { continue };
        let groups = |dataset: &Dataset| -> Vec<(String, RowGroupEntry)> {
            let shards = dataset.index().shards.iter();
            let each = shards
                .flat_map(|shard| shard.row_groups.iter().map(|group| (shard.path.clone(), group.clone())));
            each.collect()
        };
        let (in_a, in_b) = (groups(of_a), groups(of_b));
        let same = |((path_a, a), (path_b, b)): &(&(String, RowGroupEntry), &(String, RowGroupEntry))| {
            let checksums = a.blake3.as_ref().zip(b.blake3.as_ref());
            path_a == path_b
                && (a.rows, a.tokens) == (b.rows, b.tokens)
                && checksums.is_none_or(|(a, b)| a == b)
        };
        if let Some(at) = in_a.iter().zip(&in_b).position(|pair| !same(&pair)) {
            notes.push(format!(
                "source {name} is not the same: row group {at} in {} is the first that differs",
                in_a[at].0
            ));
        } else if in_a.len() != in_b.len() {
            let counts = [in_a.len(), in_b.len()].map(|count| count.to_string()).join(" row groups in A, ");
            notes.push(format!("source {name} is not the same: {counts} in B"));
        }
    }
}

/// A step of both.
struct Stepped {
    differs: Option<Difference>,
    computed: [StepRecord; 2],
}

/// Keeps the earliest phase of the differences of one step.
struct First {
    step: u64,
    found: Option<Difference>,
}

impl First {
    fn note(&mut self, phase: Phase, difference: impl FnOnce() -> Option<Difference>) {
        if self.found.as_ref().is_none_or(|found| phase < found.phase) {
            self.found = difference().or(self.found.take());
        }
    }

    fn figures(&mut self, phase: Phase, lane: Option<u32>, figures: impl FnOnce() -> Vec<Figure>) {
        let step = self.step;
        self.note(phase, || {
            let figures = figures();
            (!figures.is_empty()).then_some(Difference {
                step,
                phase,
                checkpoint: None,
                lane,
                figures,
                blocks: None,
            })
        });
    }

    /// Compares what a lane came to; gradients only where both lie in one `layout`.
    fn lane(&mut self, lane: u32, a: &Ran, b: &Ran, layout: Option<&Layout>) {
        let step = self.step;
        self.figures(Phase::Batch, Some(lane), || {
            batches(&a.micro_batches, &b.micro_batches).into_iter().collect()
        });
        self.figures(Phase::Forward, Some(lane), || compare::sums(&a.sums, &b.sums));
        self.note(Phase::Gradient, || {
            let blocks = compare::blocks("gradient", layout?, &a.gradient, &b.gradient)?;
            let (lane, phase, blocks) = (Some(lane), Phase::Gradient, Some(blocks));
            Some(Difference { step, phase, checkpoint: None, lane, figures: Vec::new(), blocks })
        });
    }

    /// Compares what all lanes together came to; gradients only where both lie in one `layout`.
    fn total(&mut self, a: &(Tensor, LossSums), b: &(Tensor, LossSums), layout: Option<&Layout>) {
        let step = self.step;
        self.note(Phase::Reduce, || {
            let blocks = layout.and_then(|layout| compare::blocks("total", layout, &a.0, &b.0));
            let figures = compare::sums(&a.1, &b.1);
            let differs = blocks.is_some() || !figures.is_empty();
            let phase = Phase::Reduce;
            differs.then_some(Difference { step, phase, checkpoint: None, lane: None, figures, blocks })
        });
    }
}

fn step_both(sides: &mut [Side<'_>; 2], step: u64, first_step: bool) -> Result<Stepped> {
    for side in sides.iter_mut() {
        side.follow_config(step)?;
    }
    let [a, b] = sides;
    let plans = (a.plan(step)?, b.plan(step)?);
    a.engine.enter(&plans.0);
    b.engine.enter(&plans.1);
    let mut first = First { step, found: None };
    if first_step || plans.0.first_of_stage || plans.1.first_of_stage {
        first.note(Phase::Start, || states(step, Phase::Start, &a.engine, &b.engine, Vec::new()));
    }
    let lanes = [a.cursors.len() as u32, b.cursors.len() as u32];
    let same_layout = a.engine.state().layout.has_places_of(&b.engine.state().layout);
    for lane in 0..lanes[0].max(lanes[1]) {
        let of_a = if lane < lanes[0] { Some(a.run_lane(&plans.0, lane)?) } else { None };
        let of_b = if lane < lanes[1] { Some(b.run_lane(&plans.1, lane)?) } else { None };
        if let (Some(of_a), Some(of_b)) = (&of_a, &of_b) {
            first.lane(lane, of_a, of_b, same_layout.then_some(&a.engine.state().layout));
        }
        for (side, of_lane) in [(&mut *a, of_a), (&mut *b, of_b)] {
            if let Some(Ran { gradient, sums, .. }) = of_lane {
                side.engine.fold_lane(lane, gradient, sums);
            }
        }
    }
    if lanes[0] != lanes[1] {
        first.figures(Phase::Reduce, None, || {
            vec![Figure { name: "lanes".to_owned(), values: lanes.map(|lanes| lanes.to_string()) }]
        });
    }
    let totals = (a.total(), b.total());
    first.total(&totals.0, &totals.1, same_layout.then_some(&a.engine.state().layout));
    let outcomes = (a.finish(&plans.0, totals.0)?, b.finish(&plans.1, totals.1)?);
    first.figures(Phase::Norm, None, || norms((a, &outcomes.0), (b, &outcomes.1), step));
    first.note(Phase::Update, || {
        let rates = [plans.0.lr, plans.1.lr].map(compare::exact);
        let rate = (rates[0] != rates[1]).then(|| Figure { name: "lr".to_owned(), values: rates });
        states(step, Phase::Update, &a.engine, &b.engine, rate.into_iter().collect())
    });
    let computed = [a.record(&plans.0, &outcomes.0)?, b.record(&plans.1, &outcomes.1)?];
    Ok(Stepped { differs: first.found, computed })
}

/// The first place at which what a lane trains on differs.
fn batches(a: &[MicroBatch], b: &[MicroBatch]) -> Option<Figure> {
    let figure = |name: String, a: String, b: String| Some(Figure { name, values: [a, b] });
    if a.len() != b.len() {
        return figure("micro-batches".to_owned(), a.len().to_string(), b.len().to_string());
    }
    let (at, (a, b)) = a.iter().zip(b).enumerate().find(|(_, (a, b))| a != b)?;
    let shape = |batch: &MicroBatch| format!("{} x {}", batch.sequences, batch.length);
    if shape(a) != shape(b) {
        return figure(format!("micro-batch {at}"), shape(a), shape(b));
    }
    let length = a.length as usize;
    let place = |token: usize| format!("micro-batch {at}, row {}, token {}", token / length, token % length);
    let all = |batch: &MicroBatch| {
        let positions = batch.positions.iter().map(|position| i64::from(*position));
        [batch.input_ids.clone(), batch.targets.clone(), positions.collect()]
    };
    let (of_a, of_b) = (all(a), all(b));
    // The first token at which any of the three differs, and of these the first.
    let (token, which) = (0..a.tokens())
        .flat_map(|token| (0..of_a.len()).map(move |which| (token, which)))
        .find(|(token, which)| of_a[*which][*token] != of_b[*which][*token])?;
    let name = format!("{}, {}", place(token), ["id", "target", "position"][which]);
    figure(name, of_a[which][token].to_string(), of_b[which][token].to_string())
}

/// Norm, clip and whether the step was applied, where they differ.
fn norms(a: (&Side<'_>, &Outcome), b: (&Side<'_>, &Outcome), step: u64) -> Vec<Figure> {
    let of = |(side, outcome): (&Side<'_>, &Outcome)| {
        let (norm, clip) = (outcome.update.grad_norm, side.run.config_at(step).optimizer.clip);
        let factor = if norm > clip { clip / norm } else { 1.0 };
        let applied = outcome.update.applied.to_string();
        [("grad_norm", compare::exact(norm)), ("clip_factor", compare::exact(factor)), ("applied", applied)]
    };
    let pairs = of(a).into_iter().zip(of(b));
    pairs
        .filter(|((_, a), (_, b))| a != b)
        .map(|((name, a), (_, b))| Figure { name: name.to_owned(), values: [a, b] })
        .collect()
}

/// Where two states differ, beside the `figures` that are known to differ.
fn states(step: u64, phase: Phase, a: &Engine, b: &Engine, mut figures: Vec<Figure>) -> Option<Difference> {
    let (of_a, of_b) = (a.state(), b.state());
    let mut count = |name: &str, a: u64, b: u64| {
        if a != b {
            figures.push(Figure { name: name.to_owned(), values: [a.to_string(), b.to_string()] });
        }
    };
    count("layers", of_a.layout.layers() as u64, of_b.layout.layers() as u64);
    count("elements", of_a.layout.len() as u64, of_b.layout.len() as u64);
    count("updates", of_a.updates, of_b.updates);
    let blocks = if of_a.layout.has_places_of(&of_b.layout) { compare::states(of_a, of_b) } else { None };
    let differs = blocks.is_some() || !figures.is_empty();
    differs.then_some(Difference { step, phase, checkpoint: None, lane: None, figures, blocks })
}

#[cfg(test)]
mod tests;

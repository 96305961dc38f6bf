//! Two records side by side. Pure but for reading the parts of a checkpoint that differs.

use std::collections::BTreeSet;

use anello_configs::StepPlan;
use anello_store::checkpoint::{BUFFERS, Manifest, same_data};
use anello_store::metrics::{Evaluated, StepRecord};
use tch::{Device, Kind, Tensor};

use super::findings::{Blocks, Difference, Element, Figure, KeyDifference, Phase, Records, SourceDifference};
use super::recorded::Recorded;
use crate::checkpoint::{block_digest, load};
use crate::host::OnHost;
use crate::objective::LossSums;
use crate::optimizer::State;
use crate::params::{BLOCK, Layout};

/// A figure of a step: the phase that it comes from, its name, and the shortest text that reads back to its bits.
type FigureOf = (Phase, String, String);

/// Where the records of two runs part.
pub(super) fn records(a: &Recorded, b: &Recorded) -> Records {
    let common = a.records.iter().filter_map(|(step, of_a)| Some((of_a, b.records.get(step)?)));
    let mut found = Records { steps: common.clone().count() as u64, ..Records::default() };
    found.figures = common.clone().find_map(|(of_a, of_b)| figures(of_a, of_b));
    for (&step, of_a) in &a.manifests {
        let Some(of_b) = b.manifests.get(&step) else { continue };
        match checkpoints((a, of_a), (b, of_b)) {
            None => found.equal_checkpoints.push(step),
            Some(difference) => {
                found.checkpoint = Some(difference);
                break;
            }
        }
    }
    found
}

/// The figures of a step that differ, bit for bit, and the first phase among them.
pub(super) fn figures(a: &StepRecord, b: &StepRecord) -> Option<Difference> {
    let (mut in_a, mut in_b) = (figures_of(a), figures_of(b));
    // How often the weights are put on record may differ between two runs that are the same.
    if let (Some(of_a), Some(of_b)) = (&a.weights, &b.weights) {
        for (figures, digest) in [(&mut in_a, of_a), (&mut in_b, of_b)] {
            figures.push((Phase::Update, "weights".to_owned(), digest.clone()));
        }
    }
    // So may what they are measured on.
    for of_a in &a.evals {
        if let Some(of_b) = b.evals.iter().find(|of_b| of_b.set == of_a.set) {
            in_a.extend(evals_of(of_a));
            in_b.extend(evals_of(of_b));
        }
    }
    let differing = pairs(in_a, in_b);
    let phase = differing.iter().map(|(phase, _)| *phase).min()?;
    let figures = differing.into_iter().map(|(_, figure)| figure).collect();
    Some(Difference { step: a.step, phase, checkpoint: None, lane: None, figures, blocks: None })
}

fn figures_of(record: &StepRecord) -> Vec<FigureOf> {
    let StepRecord { tokens, batch_tokens, counted, lr, loss, loop_loss, exit, entropy, .. } = record;
    let counts = [("tokens", tokens), ("batch_tokens", batch_tokens), ("counted", counted)];
    let mut figures: Vec<FigureOf> =
        counts.map(|(name, count)| (Phase::Batch, name.to_owned(), count.to_string())).into();
    figures.extend(losses_of(loop_loss, exit, *entropy, *loss));
    figures.push((Phase::Norm, "grad_norm".to_owned(), exact(record.grad_norm)));
    figures.push((Phase::Norm, "applied".to_owned(), record.applied.to_string()));
    figures.push((Phase::Update, "lr".to_owned(), exact(*lr)));
    figures
}

fn evals_of(eval: &Evaluated) -> Vec<FigureOf> {
    let Evaluated { set, counted, loop_loss, accuracy, exit } = eval;
    let mut figures = vec![(Phase::Eval, format!("eval_{set}_counted"), counted.to_string())];
    for (stem, values) in [("loss", loop_loss), ("accuracy", accuracy), ("exit", exit)] {
        let named = values.iter().zip(1..);
        figures
            .extend(named.map(|(value, t)| (Phase::Eval, format!("eval_{set}_{stem}_{t}"), exact(*value))));
    }
    figures
}

fn losses_of(loop_loss: &[f64], exit: &[f64], entropy: f64, loss: f64) -> Vec<FigureOf> {
    let per_loop = |stem: &'static str, values: &[f64]| {
        let named = values.iter().zip(1..).map(move |(value, t)| (format!("{stem}_{t}"), exact(*value)));
        named.collect::<Vec<_>>()
    };
    let all = per_loop("loss", loop_loss).into_iter().chain(per_loop("exit", exit));
    let all = all.chain([("entropy".to_owned(), exact(entropy)), ("loss".to_owned(), exact(loss))]);
    all.map(|(name, value)| (Phase::Forward, name, value)).collect()
}

/// The loss sums of a lane, or of all, that differ.
pub(super) fn sums(a: &LossSums, b: &LossSums) -> Vec<Figure> {
    let of = |sums: &LossSums| {
        let LossSums { counted, loss, cross_entropy, exit, entropy } = sums;
        let mut figures = vec![(Phase::Forward, "counted".to_owned(), counted.to_string())];
        figures.extend(losses_of(cross_entropy, exit, *entropy, *loss));
        figures
    };
    pairs(of(a), of(b)).into_iter().map(|(_, figure)| figure).collect()
}

/// The shortest text that reads back to the same bits.
pub(super) fn exact(value: f64) -> String {
    format!("{value:?}")
}

/// Figures of both that differ, by name, in the order of `a`.
fn pairs(a: Vec<FigureOf>, b: Vec<FigureOf>) -> Vec<(Phase, Figure)> {
    let value = |figures: &[FigureOf], name: &str| {
        let found = figures.iter().find(|(_, known, _)| known == name);
        found.map_or("absent".to_owned(), |(_, _, value)| value.clone())
    };
    let only_b = b.iter().filter(|(_, name, _)| a.iter().all(|(_, known, _)| known != name));
    let names = a.iter().chain(only_b).map(|(phase, name, _)| (*phase, name.clone()));
    names
        .map(|(phase, name)| {
            let values = [value(&a, &name), value(&b, &name)];
            (phase, Figure { name, values })
        })
        .filter(|(_, figure)| figure.values[0] != figure.values[1])
        .collect()
}

/// Where two checkpoints after the same number of steps differ in what a run goes on from.
fn checkpoints(a: (&Recorded, &Manifest), b: (&Recorded, &Manifest)) -> Option<Difference> {
    let (of_a, of_b) = (a.1, b.1);
    let counts = [
        ("layers", of_a.layers.to_string(), of_b.layers.to_string()),
        ("elements", of_a.elements.to_string(), of_b.elements.to_string()),
        ("updates", of_a.updates.to_string(), of_b.updates.to_string()),
        ("tokens", of_a.tokens.to_string(), of_b.tokens.to_string()),
    ];
    let mut figures: Vec<Figure> = counts
        .into_iter()
        .filter(|(_, a, b)| a != b)
        .map(|(name, a, b)| Figure { name: name.to_owned(), values: [a, b] })
        .collect();
    let blocks = if of_a.elements == of_b.elements { differing_blocks(a, b) } else { None };
    let lane = of_a.cursors.iter().zip(&of_b.cursors).position(|(a, b)| a != b);
    if let Some(lane) = lane {
        let shown = |manifest: &Manifest| {
            serde_json::to_string(&manifest.cursors[lane]).expect("a cursor has string keys")
        };
        figures.push(Figure { name: "cursor".to_owned(), values: [shown(of_a), shown(of_b)] });
    }
    if figures.is_empty() && blocks.is_none() && of_a.cursors.len() == of_b.cursors.len() {
        return None;
    }
    // What was loaded last says nothing about the phase: all that is known is that the steps before it differ.
    let phase = match (of_a.step, &blocks, lane) {
        (0, _, _) => Phase::Start,
        (_, None, Some(_)) => Phase::Batch,
        _ => Phase::Update,
    };
    let lane = lane.map(|lane| lane as u32).filter(|_| phase == Phase::Batch);
    let (step, checkpoint) = (of_a.step.saturating_sub(1), Some(of_a.step));
    Some(Difference { step, phase, checkpoint, lane, figures, blocks })
}

fn differing_blocks(a: (&Recorded, &Manifest), b: (&Recorded, &Manifest)) -> Option<Blocks> {
    if a.1.blocks == b.1.blocks {
        return None;
    }
    let step = a.1.step;
    let loaded = |run: &Recorded| {
        let model = &run.config_at(step.saturating_sub(1)).model;
        load(&run.store, step, model, Device::Cpu).ok().map(|loaded| loaded.state)
    };
    if let (Some(of_a), Some(of_b)) = (loaded(a.0), loaded(b.0)) {
        return states(&of_a, &of_b);
    }
    // A part cannot be read: digests tell where, if not by how much.
    let layout = Layout::new(&a.0.config_at(step.saturating_sub(1)).model, a.1.layers);
    by_digests(a.1, b.1, &layout)
}

fn by_digests(a: &Manifest, b: &Manifest, layout: &Layout) -> Option<Blocks> {
    (0..BUFFERS.len()).find_map(|buffer| {
        let (of_a, of_b) = (a.blocks.of(buffer), b.blocks.of(buffer));
        let differ: Vec<usize> = (0..of_a.len()).filter(|block| of_a[*block] != of_b[*block]).collect();
        let block = *differ.first()?;
        let tensors = layout.names_in(block).map(str::to_owned).collect();
        Some(Blocks { buffer: BUFFERS[buffer], block, differ: differ.len(), tensors, element: None })
    })
}

/// The first of weights, first and second moments in which two states of one layout differ.
pub(super) fn states(a: &State, b: &State) -> Option<Blocks> {
    let differ = |(buffer, name)| blocks(name, &a.layout, &a.whole(buffer), &b.whole(buffer));
    BUFFERS.into_iter().enumerate().find_map(|(buffer, name)| differ((buffer, name)))
}

/// Where two flat buffers of `layout` differ, bit for bit.
pub(super) fn blocks(buffer: &'static str, layout: &Layout, a: &Tensor, b: &Tensor) -> Option<Blocks> {
    // As integers: two zeros of other signs are other bits, and a NaN equals itself.
    if a.device() == b.device() && a.view_dtype(Kind::Int).equal(&b.view_dtype(Kind::Int)) {
        return None;
    }
    let (of_a, of_b) = (OnHost::of(a), OnHost::of(b));
    let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
    let pairs = of_a.chunks(BLOCK).zip(of_b.chunks(BLOCK));
    let differ: Vec<usize> =
        pairs.enumerate().filter(|(_, (a, b))| !a.iter().zip(*b).all(same)).map(|(block, _)| block).collect();
    let block = *differ.first()?;
    let range = block * BLOCK..(block + 1) * BLOCK;
    let (mut first, mut elements, mut max_abs) = (None, 0, 0f64);
    for at in range.filter(|at| !same((&of_a[*at], &of_b[*at]))) {
        first.get_or_insert(at);
        elements += 1;
        let delta = (f64::from(of_a[at]) - f64::from(of_b[at])).abs();
        max_abs = if delta.is_nan() || max_abs.is_nan() { f64::NAN } else { max_abs.max(delta) };
    }
    let at = first?;
    let values = [of_a[at], of_b[at]].map(|value| format!("{value:?}"));
    let (tensor, index) = layout.place_of(at).unwrap_or_else(|| ("padding".to_owned(), vec![at]));
    Some(Blocks {
        buffer,
        block,
        differ: differ.len(),
        tensors: layout.names_in(block).map(str::to_owned).collect(),
        element: Some(Element { tensor, index, values, differ: elements, max_abs }),
    })
}

/// Keys of the mathematics in which the configs of two runs differ, for each step at which that changes.
pub(super) fn configs(a: &Recorded, b: &Recorded) -> Vec<KeyDifference> {
    let starts: BTreeSet<u64> = a.epochs.iter().chain(&b.epochs).map(|epoch| epoch.from).collect();
    let mut found: Vec<KeyDifference> = Vec::new();
    for from in starts {
        for difference in a.config_at(from).diff_mathematics(b.config_at(from)) {
            let values = [difference.ours, difference.theirs];
            let known = found.iter().rev().find(|known| known.key == difference.key);
            if known.is_none_or(|known| known.values != values) {
                found.push(KeyDifference { from, key: difference.key, values });
            }
        }
    }
    found
}

/// The first step that the configs of two runs make another one; absent when they never do.
pub(super) fn configs_part_at(a: &Recorded, b: &Recorded, config: &[KeyDifference]) -> Option<u64> {
    // The keys of stages speak by what they make of a step; all others from where they hold.
    let is_recipe = |key: &str| key == "stages" || key.starts_with("stage.");
    let at_once = config.iter().filter(|key| !is_recipe(&key.key)).map(|key| key.from).min();
    let steps = a.total_steps().max(b.total_steps());
    let by_plan = || (0..steps).find(|step| !same_plan(a.plan_at(*step), b.plan_at(*step)));
    match at_once {
        Some(0) => Some(0),
        _ if config.is_empty() => None,
        at_once => [at_once, by_plan()].into_iter().flatten().min(),
    }
}

/// Whether two plans make the same step of the same state.
fn same_plan(a: Option<StepPlan<'_>>, b: Option<StepPlan<'_>>) -> bool {
    let (Some(a), Some(b)) = (a, b) else { return a.is_none() && b.is_none() };
    let figures = |plan: &StepPlan<'_>| {
        let stage = plan.stage;
        (
            (plan.stage_index, plan.batch_tokens, plan.micro_batches_per_lane, stage.sequence),
            (plan.lr.to_bits(), stage.beta.to_bits(), stage.rope_base.to_bits(), stage.loops),
            (plan.layers, plan.reset_optimizer, plan.upcycle),
        )
    };
    figures(&a) == figures(&b)
        && a.stage.mixture == b.stage.mixture
        && (a.stage.mask, a.stage.trains, a.stage.loss) == (b.stage.mask, b.stage.trains, b.stage.loss)
}

/// Sources that both know and whose index differs, for each step at which that changes.
pub(super) fn data(a: &Recorded, b: &Recorded) -> Vec<SourceDifference> {
    let starts: BTreeSet<u64> = a.epochs.iter().chain(&b.epochs).map(|epoch| epoch.from).collect();
    let mut found: Vec<SourceDifference> = Vec::new();
    for from in starts {
        for (source, of_a) in a.data_at(from) {
            let Some(of_b) = b.data_at(from).get(source).filter(|of_b| !same_data(of_a, of_b)) else {
                continue;
            };
            let values = [of_a.clone(), of_b.clone()];
            let known = found.iter().rev().find(|known| known.source == *source);
            if known.is_none_or(|known| known.values != values) {
                found.push(SourceDifference { from, source: source.clone(), values });
            }
        }
    }
    found
}

/// Where a state that was computed here differs from the checkpoint that `run` has of it.
pub(super) fn from_checkpoint(run: &Recorded, manifest: &Manifest, state: &State) -> Option<Difference> {
    let step = manifest.step.saturating_sub(1);
    let mut figures = Vec::new();
    let mut figure = |name: &str, theirs: u64, ours: u64| {
        if theirs != ours {
            figures.push(Figure { name: name.to_owned(), values: [theirs.to_string(), ours.to_string()] });
        }
    };
    figure("layers", manifest.layers.into(), state.layout.layers() as u64);
    figure("updates", manifest.updates, state.updates);
    let same_size = manifest.elements == state.layout.len() as u64;
    let blocks = if same_size { off_digests(run, manifest, state) } else { None };
    if figures.is_empty() && blocks.is_none() {
        return None;
    }
    let (phase, checkpoint) = (Phase::Update, Some(manifest.step));
    Some(Difference { step, phase, checkpoint, lane: None, figures, blocks })
}

fn off_digests(run: &Recorded, manifest: &Manifest, state: &State) -> Option<Blocks> {
    let mut found = None;
    for (buffer, name) in BUFFERS.into_iter().enumerate() {
        let theirs = manifest.blocks.of(buffer);
        let flat = OnHost::of(&state.whole(buffer));
        let pairs = flat.chunks(BLOCK).zip(theirs).enumerate();
        let differ: Vec<usize> = pairs
            .filter(|(_, (values, theirs))| block_digest(values) != **theirs)
            .map(|(block, _)| block)
            .collect();
        if let Some(&block) = differ.first() {
            let tensors = state.layout.names_in(block).map(str::to_owned).collect();
            found = Some(Blocks { buffer: name, block, differ: differ.len(), tensors, element: None });
            break;
        }
    }
    let found = found?;
    // The values themselves, when the checkpoint can be read still.
    let model = &run.config_at(manifest.step.saturating_sub(1)).model;
    let theirs = load(&run.store, manifest.step, model, Device::Cpu).ok();
    theirs.and_then(|theirs| states(&theirs.state, state)).or(Some(found))
}

//! The plan as text.

use std::time::Duration;

use super::units::{binary, duration, number};
use super::{Plan, StageEstimate};
use crate::quantity::Unit;
use crate::run::{LrCurve, Recompute, StateCopies};
use crate::text::{Table, bytes, count, flops, grouped};
use crate::timings::Timings;

pub(super) fn render(plan: &Plan) -> String {
    let sections = [
        heading(plan),
        parameters(plan),
        stages(plan),
        arithmetic(plan),
        memory(plan),
        ring(plan),
        notes(plan),
    ];
    sections.into_iter().filter(|section| !section.is_empty()).collect::<Vec<_>>().join("\n")
}

fn heading(plan: &Plan) -> String {
    let (cluster, gpu) = (plan.cluster, plan.cluster.gpu);
    format!(
        "{} on {} × {}: {}/s {} and {} each, at {} % utilisation\n",
        plan.name,
        cluster.count,
        gpu.name,
        flops(gpu.peak(plan.dtype)),
        plan.dtype,
        bytes(gpu.memory_bytes),
        number((cluster.utilisation * 1000.0).round() / 10.0),
    )
}

/// One column for each size that the model has: one, unless a stage upcycles it.
fn parameters(plan: &Plan) -> String {
    let mut sizes: Vec<&StageEstimate> = Vec::new();
    for stage in &plan.stages {
        if sizes.last().is_none_or(|last| last.span.layers != stage.span.layers) {
            sizes.push(stage);
        }
    }
    let mut grid = Grid::new("parameters");
    if sizes.len() > 1 {
        let layers = sizes.iter().map(|size| format!("{} layers", size.span.layers));
        grid.row(["".to_owned()].into_iter().chain(layers));
    }
    let mut part = |name: &str, of: &dyn Fn(&super::Parameters) -> u64| {
        let cells = sizes.iter().map(|size| grouped(of(&size.parameters)));
        grid.row([name.to_owned()].into_iter().chain(cells));
    };
    part("embedding", &|p| p.embedding);
    part("attention", &|p| p.attention);
    part("mlp", &|p| p.mlp);
    part("norms", &|p| p.norms);
    part("exit gate", &|p| p.gate);
    part("lm_head", &|p| p.lm_head);
    part("total", &|p| p.total());
    grid.text()
}

fn stages(plan: &Plan) -> String {
    let mut grid = Grid::new("stages");
    let titles =
        ["", "steps", "tokens asked", "tokens trained", "sequence", "batch", "T", "β", "RoPE base", "lr"];
    grid.row(titles.map(str::to_owned));
    for StageEstimate { stage, span, .. } in &plan.stages {
        let batch = match stage.batch.ramp {
            Some(ramp) => format!("{} → {}", binary(ramp.from), binary(stage.batch.tokens)),
            None => binary(stage.batch.tokens),
        };
        grid.row([
            stage.name.clone(),
            grouped(span.steps),
            grouped(span.tokens_asked),
            grouped(span.tokens),
            binary(stage.sequence.into()),
            batch,
            stage.loops.to_string(),
            number(stage.beta),
            number(stage.rope_base),
            rate(&stage.lr),
        ]);
    }
    let sum = |of: &dyn Fn(&StageEstimate) -> u64| grouped(plan.stages.iter().map(of).sum());
    grid.row([
        "total".to_owned(),
        sum(&|s| s.span.steps),
        sum(&|s| s.span.tokens_asked),
        sum(&|s| s.span.tokens),
    ]);
    format!("{}  tokens are trained in whole batches: each stage rounds up to the next\n", grid.text())
}

fn rate(curve: &LrCurve) -> String {
    match *curve {
        LrCurve::Constant { lr } => format!("{} constant", number(lr)),
        LrCurve::Linear { from, to } => format!("{} → {} linear", number(from), number(to)),
        LrCurve::Cosine { from, to } => format!("{} → {} cosine", number(from), number(to)),
        LrCurve::Wsd { peak, to, warmup, decay } => {
            let rise = if warmup > 0.0 { "0 → " } else { "" };
            let fall = if decay > 0.0 { format!(" → {}", number(to)) } else { String::new() };
            format!("{rise}{}{fall} wsd", number(peak))
        }
    }
}

fn arithmetic(plan: &Plan) -> String {
    let mut grid = Grid::new("arithmetic and time");
    let titles = ["", "FLOPs a token", "recomputed", "FLOPs", "tokens/s", "time", "GPU-hours"];
    grid.row(titles.map(str::to_owned));
    for stage in &plan.stages {
        let tokens = stage.span.tokens as f64;
        grid.row([
            stage.stage.name.clone(),
            flops(stage.flops.model),
            flops(stage.flops.recomputed),
            flops(stage.flops.model * tokens),
            count((tokens / stage.seconds) as u64),
            duration(stage.seconds),
            hours(stage.gpu_hours),
        ]);
    }
    let blank = String::new;
    let (all, time, gpu_hours) = (flops(plan.flops()), duration(plan.seconds()), hours(plan.gpu_hours()));
    grid.row(["total".to_owned(), blank(), blank(), all, blank(), time, gpu_hours]);
    grid.text()
}

fn hours(hours: f64) -> String {
    if hours < 9.95 { format!("{hours:.1}") } else { grouped(hours.round() as u64) }
}

/// What the forward keeps beside activations.
fn kept(recompute: Recompute) -> &'static str {
    match recompute {
        Recompute::None => "kept",
        Recompute::Layer => "layer inputs",
        Recompute::Loop => "loop inputs",
    }
}

fn memory(plan: &Plan) -> String {
    let title = match plan.lanes_per_worker {
        1 => "memory of a worker (1 lane)".to_owned(),
        n => format!("memory of a worker ({n} lanes)"),
    };
    let mut grid = Grid::new(&title);
    let titles = [
        "",
        "weights",
        "master",
        "moments",
        "gradient",
        "fold",
        "sum",
        kept(plan.recompute),
        "activations",
        "hidden",
        "logits",
        "total",
    ];
    grid.row(titles.map(str::to_owned));
    for stage in &plan.stages {
        let m = &stage.memory;
        let parts = [
            m.weights,
            m.master,
            m.moments,
            m.gradient,
            m.fold,
            m.sum,
            m.inputs,
            m.activations,
            m.hidden,
            m.logits,
            m.total(),
        ];
        grid.row([stage.stage.name.clone()].into_iter().chain(parts.map(bytes)));
    }
    grid.text()
}

/// What follows from how long a silent fault may go unseen. A closed connection needs no time-out.
fn ring(plan: &Plan) -> String {
    let Timings { heartbeat, lease, watch, gather, silence, poll, connect, retry, grace } = plan.timings;
    let shown = |time: Duration| Unit::Time.shown(time.as_millis() as u64);
    let times = [heartbeat, lease, silence, poll, connect, retry, gather, watch, grace].map(shown);
    let mut grid = Grid::new("ring times");
    let names = ["heartbeat", "lease", "silence", "poll", "connect", "retry", "gather", "log watch", "grace"];
    grid.row(names.map(str::to_owned));
    grid.row(times);
    grid.text()
}

fn notes(plan: &Plan) -> String {
    let (count, lanes) = (plan.cluster.count, plan.lanes);
    let mut notes = Vec::new();
    if let Some(largest) = plan.largest()
        && !plan.fits()
    {
        let (needed, held) = (largest.memory.total(), plan.cluster.gpu.memory_bytes);
        let remedies = [
            (plan.lanes_per_worker > 1, "serve fewer lanes a worker"),
            (largest.stage.micro_batch > 1, "take a smaller micro_batch"),
            (plan.recompute == Recompute::None, "recompute layers"),
            (
                plan.recompute == Recompute::Layer && !plan.offload,
                "keep layer inputs on the host (compute.offload)",
            ),
            match plan.state_copies {
                StateCopies::All if count > 2 => {
                    (true, "share out the moments (ring.state_copies = 2), or take a larger GPU")
                }
                StateCopies::All => (true, "take a larger GPU"),
                StateCopies::Two => (true, "take more GPUs, or larger ones"),
            },
        ];
        let remedies: Vec<&str> =
            remedies.into_iter().filter(|(helps, _)| *helps).map(|(_, text)| text).collect();
        notes.push(format!(
            "stage {} needs {} a worker, but {} has {}; {}",
            largest.stage.name,
            bytes(needed),
            plan.cluster.gpu.name,
            bytes(held),
            remedies.join(", ")
        ));
    }
    let on_host = plan.stages.iter().map(|stage| stage.memory.on_host).max().unwrap_or(0);
    if on_host > 0 {
        let kept = kept(plan.recompute);
        notes.push(format!("{kept} wait on the host: up to {} of its memory a worker", bytes(on_host)));
    }
    if count > lanes {
        let idle = count - lanes;
        notes.push(format!(
            "{idle} of {count} GPUs have no lane to serve; give up to {lanes}, or a run of more lanes"
        ));
    } else if count > 0 && !lanes.is_multiple_of(count) {
        let busy = 100.0 * f64::from(lanes) / f64::from(plan.lanes_per_worker * count);
        notes.push(format!(
            "{lanes} lanes do not divide among {count} GPUs, which are busy {busy:.0} % of the time; give a power of two"
        ));
    }
    notes.into_iter().map(|note| format!("note: {note}\n")).collect()
}

/// A table under a title: the first column to the left, the others to the right.
struct Grid {
    title: String,
    table: Table,
}

impl Grid {
    fn new(title: &str) -> Self {
        Self { title: title.to_owned(), table: Table::new(1) }
    }

    fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.table.row(cells);
    }

    fn text(&self) -> String {
        let lines = self.table.render();
        let indented = lines.lines().map(|line| format!("  {line}").trim_end().to_owned() + "\n");
        format!("{}\n{}", self.title, indented.collect::<String>())
    }
}

//! From the merged tree to the typed config: every key once, with its default and its range.
//!
//! Decoding never stops at a problem. A value that is wrong is reported and stands in as something harmless; its key is
//! remembered as bad, so that no check that looks at it reports a second problem for the same cause.

mod section;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub(crate) use section::Found;
use section::Section;

use crate::names::{A_NAME, Curve, closest, is_name};
use crate::problem::Origin;
use crate::quantity::Unit;
use crate::run::*;
use crate::tree::{Entry, Node, Table, Value, join};

/// Largest count of tokens in a stage: the tokens of every possible run fit in 64 bits.
const STAGE_TOKENS_MAX: u64 = 10_000_000_000_000_000;
const STAGES_MAX: usize = 1000;

/// Decodes the whole tree; `config` is what the user calls it.
pub(crate) fn decode(root: &Table, config: &Arc<str>) -> (RunConfig, Found) {
    let mut found = Found::default();
    let mut top = Section::new(&mut found, root, Origin::Missing(config.clone()), String::new());

    let name = top.run_name("name");
    let seed = top.count("seed", 0..=i64::MAX as u64, Some(1));
    let lanes = top.count("lanes", 1..=1 << 16, Some(1)) as u32;
    let model = top.section("model", model).unwrap_or_else(|| {
        if !top.has("model") {
            top.missing("model", "a [model] table with layers, hidden, heads, ffn and vocab");
        }
        Model {
            layers: 1,
            hidden: 2,
            heads: 1,
            kv_heads: 1,
            ffn: 1,
            vocab: 2,
            rms_eps: 1e-6,
            init_std: 0.02,
            embed_std: 0.02,
            post_norm: 1.0,
        }
    });
    let init = top.optional("init").then(|| top.section("init", init)).flatten();
    let optimizer = top.section_or_empty("optimizer", optimizer);
    let compute = top.section_or_empty("compute", compute);
    let data = top.section_or_empty("data", data);
    let checkpoint = top.section_or_empty("checkpoint", checkpoint);
    let store = top.section_or_empty("store", store);
    let guard = top.section_or_empty("guard", guard);
    let eval = top.section_or_empty("eval", eval);
    let record = top.section_or_empty("record", record);
    let ring = top.section_or_empty("ring", ring);
    let stages = stages(&mut top, &data.sources);
    top.finish();
    let config = RunConfig {
        name,
        seed,
        lanes,
        model,
        init,
        optimizer,
        compute,
        data,
        checkpoint,
        store,
        guard,
        eval,
        record,
        ring,
        stages,
    };
    (config, found)
}

fn model(s: &mut Section<'_, '_>) -> Model {
    let heads = s.count("heads", 1..=4096, None) as u32;
    let std = "a number above 0, up to 1";
    let init_std = s.number("init_std", std, |v| v > 0.0 && v <= 1.0, Some(0.02));
    Model {
        layers: s.count("layers", 1..=LAYERS_MAX, None) as u32,
        hidden: s.count("hidden", 2..=1 << 20, None) as u32,
        heads,
        kv_heads: s.count("kv_heads", 1..=4096, Some(heads.into())) as u32,
        ffn: s.count("ffn", 1..=1 << 24, None) as u32,
        vocab: s.count("vocab", 2..=1 << 24, None) as u32,
        rms_eps: s.number("rms_eps", "a number above 0, up to 0.01", |v| v > 0.0 && v <= 0.01, Some(1e-6)),
        init_std,
        embed_std: s.number("embed_std", std, |v| v > 0.0 && v <= 1.0, Some(init_std)),
        post_norm: s.number("post_norm", "a number from 0 to 1", |v| (0.0..=1.0).contains(&v), Some(1.0)),
    }
}

fn init(s: &mut Section<'_, '_>) -> Init {
    let digest =
        "the digest of the weights, 64 hexadecimal digits; or leave it out, to be found when the run is made";
    let is_digest = |text: &str| {
        text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    Init {
        from: s.location("from"),
        weights: s.optional("weights").then(|| s.text("weights", digest, is_digest)),
    }
}

/// Layers that a stack may have, at the first step or after an upcycling.
pub(crate) const LAYERS_MAX: u64 = 4096;

fn optimizer(s: &mut Section<'_, '_>) -> Optimizer {
    let decay = "a number from 0 up to, not including, 1";
    Optimizer {
        beta1: s.number("beta1", decay, |v| (0.0..1.0).contains(&v), Some(0.9)),
        beta2: s.number("beta2", decay, |v| (0.0..1.0).contains(&v), Some(0.95)),
        eps: s.number("eps", "a number above 0, up to 1", |v| v > 0.0 && v <= 1.0, Some(1e-8)),
        weight_decay: s.number("weight_decay", "a number, 0 to 10", |v| (0.0..=10.0).contains(&v), Some(0.1)),
        clip: s.number("clip", "a number above 0, up to 1e9", |v| v > 0.0 && v <= 1e9, Some(1.0)),
    }
}

fn compute(s: &mut Section<'_, '_>) -> Compute {
    Compute {
        device: s.parsed("device", ComputeDevice::ACCEPTED, ComputeDevice::default()),
        dtype: s.choice("dtype", Dtype::Fp32),
        recompute: s.choice("recompute", Recompute::Layer),
        offload: s.flag("offload", false),
        fused: s.flag("fused", false),
        graphs: s.flag("graphs", false),
        loss_chunk_tokens: s.quantity("loss_chunk_tokens", Unit::Tokens, 1..=8192, Some(1024)) as u32,
        threads: s.optional("threads").then(|| s.count("threads", 1..=4096, None) as u32),
    }
}

fn data(s: &mut Section<'_, '_>) -> Data {
    let sources = s.map("sources", |s, name| s.section(name, source));
    Data {
        tokenizer: s.optional("tokenizer").then(|| s.location("tokenizer")),
        sources: sources.into_iter().filter_map(|(name, source)| Some((name, source?))).collect(),
        on_corrupt: s.choice("on_corrupt", OnCorrupt::Fail),
        prefetch_bytes: s.quantity("prefetch_bytes", Unit::Bytes, 4096..=1 << 46, Some(256 << 20)),
        cache: cache(s),
    }
}

fn cache(s: &mut Section<'_, '_>) -> Option<Cache> {
    let bytes = s.quantity("cache_bytes", Unit::Bytes, 1 << 20..=1 << 50, Some(10 << 30));
    let is_path =
        |text: &str| !text.trim().is_empty() && !text.contains(char::is_control) && !text.contains("://");
    let dir = s.optional("cache_dir").then(|| s.text("cache_dir", "a path on the machine", is_path));
    dir.map(|dir| Cache { dir, bytes })
}

fn source(s: &mut Section<'_, '_>) -> Source {
    Source { url: s.location("url") }
}

fn checkpoint(s: &mut Section<'_, '_>) -> Checkpoint {
    let steps = 1..=1 << 53;
    Checkpoint {
        every_steps: s.count("every_steps", steps.clone(), Some(1000)),
        keep_last: s.count("keep_last", 2..=1_000_000, Some(3)) as u32,
        keep_every_steps: s.optional("keep_every_steps").then(|| s.count("keep_every_steps", steps, None)),
        keep_stage_ends: s.flag("keep_stage_ends", true),
        part_bytes: s.quantity("part_bytes", Unit::Bytes, 64 << 10..=64 << 30, Some(256 << 20)),
    }
}

fn store(s: &mut Section<'_, '_>) -> RunStore {
    let bandwidth = s.optional("bandwidth");
    RunStore { bandwidth: bandwidth.then(|| s.quantity("bandwidth", Unit::Bytes, 1 << 10..=1 << 50, None)) }
}

fn guard(s: &mut Section<'_, '_>) -> Guard {
    let window = s.count("window", 4..=10_000, Some(64));
    Guard {
        on_spike: s.choice("on_spike", OnSpike::Log),
        window: window as u32,
        factor: s.number("factor", "a number, 1 to 1000", |v| (1.0..=1000.0).contains(&v), Some(8.0)),
        floor: s.number("floor", "a number above 0, up to 100", |v| v > 0.0 && v <= 100.0, Some(0.2)),
        rollback_steps: s.count("rollback_steps", 1..=window.div_ceil(2), Some((window / 4).max(1))),
    }
}

fn eval(s: &mut Section<'_, '_>) -> Eval {
    let sets = s.map("sets", |s, name| s.section(name, source));
    Eval {
        every_steps: s.count("every_steps", 0..=1 << 53, Some(0)),
        sequences: s.count("sequences", 1..=1 << 24, Some(64)) as u32,
        sets: sets.into_iter().filter_map(|(name, set)| Some((name, set?))).collect(),
    }
}

fn record(s: &mut Section<'_, '_>) -> Record {
    Record { digest_every_steps: s.count("digest_every_steps", 0..=1 << 53, Some(10)) }
}

fn ring(s: &mut Section<'_, '_>) -> Ring {
    let fault =
        "a fault as weights@STEP/RANK, exp_avg@…, exp_avg_sq@…, gradient@… or wire@…, or with * at its end";
    Ring {
        detection_ms: s.quantity("detection", Unit::Time, 100..=3_600_000, Some(10_000)),
        digest_every_steps: s.count("digest_every_steps", 0..=1 << 53, Some(100)),
        spot_check_every_steps: s.count("spot_check_every_steps", 0..=1 << 53, Some(500)),
        straggler_factor: s.number(
            "straggler_factor",
            "0, or a factor above 1, up to 1000",
            |v| v == 0.0 || v > 1.0 && v <= 1000.0,
            Some(1.5),
        ),
        straggler_window_steps: s.count("straggler_window_steps", 1..=1_000_000, Some(20)) as u32,
        lanes: s.choice("lanes", LaneShares::Balanced),
        state_copies: s.state_copies("state_copies"),
        state_bandwidth: s
            .optional("state_bandwidth")
            .then(|| s.quantity("state_bandwidth", Unit::Bytes, 1 << 10..=1 << 50, None)),
        transport: s.choice("transport", Transport::Tcp),
        fault: s
            .optional("fault")
            .then(|| read_fault(&s.text("fault", fault, |text| read_fault(text).is_some())))
            .flatten(),
    }
}

fn read_fault(text: &str) -> Option<Fault> {
    let (buffer, place) = text.split_once('@')?;
    let (step, rank) = place.split_once('/')?;
    let (rank, again) = rank.strip_suffix('*').map_or((rank, false), |rank| (rank, true));
    let known = ["weights", "exp_avg", "exp_avg_sq", "gradient", "wire"].contains(&buffer);
    let (step, rank) = (step.parse().ok()?, rank.parse().ok()?);
    known.then(|| Fault { buffer: buffer.to_owned(), step, rank, again })
}

/// The stages in the order of `stages`, each from its `[stage.NAME]`.
fn stages(top: &mut Section<'_, '_>, sources: &BTreeMap<String, Source>) -> Vec<Stage> {
    let listed = stage_names(top);
    let mut unsaid = BTreeSet::new();
    let mut all = top.map("stage", |s, name| {
        s.section(name, |s| {
            if !s.has("reset_optimizer") {
                unsaid.insert(name.to_owned());
            }
            stage(s, name, sources)
        })
    });
    let list_layer = top.table.find("stages").map_or(0, |entry| entry.node.place.layer);
    let mut stages = Vec::new();
    for (name, origin) in &listed {
        match all.remove(name) {
            Some(Some(stage)) => stages.push(stage),
            Some(None) => {} // reported: it is no table
            None => {
                let remedy = match closest(name, all.keys().map(String::as_str)) {
                    Some(close) => format!("did you mean `{close}`?"),
                    None => format!("add a [stage.{name}] table, or take it out of `stages`"),
                };
                top.report(origin.clone(), "stages", format!("stage `{name}` has no table"), remedy);
            }
        }
    }
    // A list in a later layer may drop stages on purpose; a table written beside or after the list is a slip.
    for name in all.into_keys() {
        let path = format!("stage.{name}");
        let Some(Entry { key, node }) = top.table.find(&path) else { continue };
        let layer = if let Value::Table(table) = &node.value { table.latest_layer() } else { key.layer };
        top.found.forgive(&path);
        if layer >= list_layer && !listed.is_empty() {
            let remedy = match closest(&name, stages.iter().map(|stage| stage.name.as_str())) {
                Some(close) => format!("did you mean `{close}`?"),
                None => "list it where it should run, or remove its table".to_owned(),
            };
            let fact = format!("stage `{name}` is not listed in `stages`");
            top.report(key.origin.clone(), &path, fact, remedy);
        }
    }
    // What is frozen has no moments, and what is frozen no longer begins with none.
    let mut before = Trains::All;
    for stage in &mut stages {
        if unsaid.contains(&stage.name) {
            stage.reset_optimizer = stage.trains != before;
        }
        before = stage.trains;
    }
    stages
}

/// The names in `stages`, each once, with where each stands.
fn stage_names(s: &mut Section<'_, '_>) -> Vec<(String, Origin)> {
    let accepted = format!("the names of 1 to {STAGES_MAX} stages in order, as [\"warmup\", \"stable\"]");
    let nodes = s.read("stages", &accepted, None, |node| match &node.value {
        Value::List(items) if (1..=STAGES_MAX).contains(&items.len()) => Some(items),
        _ => None,
    });
    let mut names: Vec<(String, Origin)> = Vec::new();
    for node in nodes.into_iter().flatten() {
        let origin = node.place.origin.clone();
        match &node.value {
            Value::Text(name) if names.iter().any(|(other, _)| other == name) => {
                let remedy = "give the second one a name and a table of its own".to_owned();
                s.report(origin, "stages", format!("stage `{name}` is listed twice"), remedy);
            }
            Value::Text(name) if is_name(name) => names.push((name.clone(), origin)),
            _ => {
                let fact = format!("stages holds {}, which is no name", node.shown);
                s.report(origin, "stages", fact, format!("give a name of {A_NAME}"));
            }
        }
    }
    names
}

fn stage(s: &mut Section<'_, '_>, name: &str, sources: &BTreeMap<String, Source>) -> Stage {
    let loss = s.choice("loss", Loss::Loop);
    let trains = if loss == Loss::Gate { Trains::Gate } else { Trains::All };
    Stage {
        name: name.to_owned(),
        tokens: s.quantity("tokens", Unit::Tokens, 1..=STAGE_TOKENS_MAX, None),
        sequence: s.quantity("sequence", Unit::Tokens, 2..=1 << 24, None) as u32,
        batch: Batch {
            tokens: s.quantity("batch", Unit::Tokens, 1..=1 << 40, None),
            ramp: s.optional("batch_ramp").then(|| s.section("batch_ramp", ramp)).flatten(),
        },
        micro_batch: s.count("micro_batch", 1..=1 << 16, Some(1)) as u32,
        lr: lr(s),
        loops: s.count("loops", 1..=64, Some(4)) as u32,
        beta: s.number("beta", "a number, 0 to 100", |v| (0.0..=100.0).contains(&v), Some(0.05)),
        rope_base: s.number("rope_base", "a number, 2 to 1e12", |v| (2.0..=1e12).contains(&v), Some(1e4)),
        mixture: mixture(s, sources),
        mask: s.choice("mask", Mask::Document),
        trains: s.choice("trains", trains),
        loss,
        reset_optimizer: s.flag("reset_optimizer", false),
        upcycle: s.optional("upcycle").then(|| s.section("upcycle", upcycle)).flatten(),
        eval: s.optional("eval").then(|| names(s, "eval", "the names of held-out sets, as [\"held-out\"]")),
    }
}

/// A list of names.
fn names(s: &mut Section<'_, '_>, key: &str, accepted: &str) -> Vec<String> {
    let name = |node: &Node| match &node.value {
        Value::Text(name) if is_name(name) => Some(name.clone()),
        _ => None,
    };
    let read = s.read(key, accepted, None, |node| match &node.value {
        Value::List(items) => items.iter().map(name).collect::<Option<Vec<String>>>(),
        _ => None,
    });
    read.unwrap_or_default()
}

fn ramp(s: &mut Section<'_, '_>) -> Ramp {
    Ramp {
        from: s.quantity("from", Unit::Tokens, 1..=1 << 40, None),
        over: s.quantity("over", Unit::Tokens, 1..=STAGE_TOKENS_MAX, None),
    }
}

fn upcycle(s: &mut Section<'_, '_>) -> Upcycle {
    Upcycle { layers: s.count("layers", 1..=LAYERS_MAX, None) as u32 }
}

/// Weights by source; a weight of 0 takes the source out. One source alone needs no mixture.
fn mixture(s: &mut Section<'_, '_>, sources: &BTreeMap<String, Source>) -> BTreeMap<String, f64> {
    if !s.has("mixture")
        && let (1, Some(only)) = (sources.len(), sources.keys().next())
    {
        s.known.insert("mixture".to_owned());
        return BTreeMap::from([(only.clone(), 1.0)]);
    }
    if !s.has("mixture") {
        let weights: Vec<String> = sources.keys().take(3).map(|name| format!("{name} = 1")).collect();
        let accepted = format!("the weights of its sources, as mixture = {{ {} }}", weights.join(", "));
        s.missing("mixture", &accepted);
        return BTreeMap::new();
    }
    let weight = "a number, 0 to 1e12";
    s.map("mixture", |s, name| s.number(name, weight, |v| (0.0..=1e12).contains(&v), Some(0.0)))
        .into_iter()
        .filter(|(_, weight)| *weight > 0.0)
        .collect()
}

const LR_KEYS: [&str; 5] = ["lr", "lr_from", "lr_to", "lr_warmup", "lr_decay"];

/// `lr_curve` says which of the other keys there are.
fn lr(s: &mut Section<'_, '_>) -> LrCurve {
    let stand_in = LrCurve::Constant { lr: 0.0 };
    s.known.extend(LR_KEYS.map(str::to_owned));
    if !s.optional("lr_curve") && LR_KEYS[1..].iter().any(|key| s.optional(key)) {
        let accepted =
            "\"linear\" or \"cosine\" for lr_from and lr_to, or \"wsd\" for a warmup and a decay of lr";
        s.missing("lr_curve", accepted);
        return stand_in;
    }
    let Some(curve) = s.word("lr_curve", Some(Curve::Constant)) else { return stand_in };
    let (used, word): (&[&str], _) = match curve {
        Curve::Constant => (&["lr"], "constant"),
        Curve::Linear => (&["lr_from", "lr_to"], "linear"),
        Curve::Cosine => (&["lr_from", "lr_to"], "cosine"),
        Curve::Wsd => (&["lr", "lr_to", "lr_warmup", "lr_decay"], "wsd"),
    };
    // A curve set in a later layer replaces the numbers of the one before; a number beside or after it is a slip.
    let curve_layer = s.table.find("lr_curve").map_or(0, |entry| entry.node.place.layer);
    for key in LR_KEYS.into_iter().filter(|key| !used.contains(key)) {
        let Some(Entry { node, .. }) = s.table.entries.get(key).filter(|_| s.optional(key)) else { continue };
        if node.place.layer >= curve_layer {
            let (path, remedy) =
                (join(&s.path, key), format!("set {}, or another lr_curve", used.join(" and ")));
            let fact = format!("{path} is {}, which a {word} learning rate does not have", node.shown);
            s.report(node.place.origin.clone(), &path, fact, remedy);
        }
    }
    match curve {
        Curve::Constant => LrCurve::Constant { lr: s.rate("lr", None) },
        Curve::Linear => LrCurve::Linear { from: s.rate("lr_from", None), to: s.rate("lr_to", None) },
        Curve::Cosine => LrCurve::Cosine { from: s.rate("lr_from", None), to: s.rate("lr_to", None) },
        Curve::Wsd => {
            let peak = s.rate("lr", None);
            let share = |s: &mut Section<'_, '_>, key| {
                s.number(key, "a share of the stage, 0 to 1", |v| (0.0..=1.0).contains(&v), Some(0.0))
            };
            let (warmup, decay) = (share(s, "lr_warmup"), share(s, "lr_decay"));
            let to = s.rate("lr_to", Some(if decay == 0.0 { peak } else { 0.0 }));
            LrCurve::Wsd { peak, to, warmup, decay }
        }
    }
}

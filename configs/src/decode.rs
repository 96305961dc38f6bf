//! From the merged tree to the typed config: every key once, with its default and its range.
//!
//! Decoding never stops at a problem. A value that is wrong is reported and stands in as something harmless; its key is
//! remembered as bad, so that no check that looks at it reports a second problem for the same cause.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::names::{A_NAME, Curve, Named, closest, is_name};
use crate::problem::{Origin, Problem};
use crate::quantity::{self, Unit};
use crate::run::*;
use crate::tree::{Entry, Node, Table, Value, join};

/// Largest count of tokens in a stage: the tokens of every possible run fit in 64 bits.
const STAGE_TOKENS_MAX: u64 = 10_000_000_000_000_000;
const STAGES_MAX: usize = 1000;

/// What is wrong, as far as it has been found.
#[derive(Default)]
pub(crate) struct Found {
    problems: Vec<Problem>,
    /// Keys with a problem: what is said to follow from their values follows from stand-ins.
    bad: BTreeSet<String>,
}

impl Found {
    pub fn report(&mut self, problem: Problem) {
        self.bad.insert(problem.key.clone());
        self.problems.push(problem);
    }

    /// Whether `key`, or anything in the table `key`, has a problem.
    pub fn is_bad(&self, key: &str) -> bool {
        self.bad.iter().any(|bad| is_inside(bad, key))
    }

    /// Takes back what was reported of `key` and of the table `key`: it is not part of the run.
    fn forgive(&mut self, key: &str) {
        self.problems.retain(|problem| !is_inside(&problem.key, key));
        self.bad.retain(|bad| !is_inside(bad, key));
    }

    pub fn into_problems(self) -> Vec<Problem> {
        self.problems
    }
}

fn is_inside(key: &str, outer: &str) -> bool {
    key.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Decodes the whole tree; `config` is what the user calls it.
pub(crate) fn decode(root: &Table, config: &Arc<str>) -> (RunConfig, Found) {
    let mut found = Found::default();
    let mut top = Section::new(&mut found, root, Origin::Missing(config.clone()), String::new());

    let name = top.run_name("name");
    let seed = top.count("seed", 0..=i64::MAX as u64, Some(1));
    let lanes = top.count("lanes", 1..=1 << 16, Some(1)) as u32;
    let model = top.section("model", model).unwrap_or_else(|| {
        top.missing("model", "a [model] table with layers, hidden, heads, ffn and vocab");
        Model { layers: 1, hidden: 2, heads: 1, kv_heads: 1, ffn: 1, vocab: 2, rms_eps: 1e-6, init_std: 0.02 }
    });
    let optimizer = top.section_or_empty("optimizer", optimizer);
    let compute = top.section_or_empty("compute", compute);
    let data = top.section_or_empty("data", data);
    let checkpoint = top.section_or_empty("checkpoint", checkpoint);
    let stages = stages(&mut top, &data.sources);
    top.finish();
    (RunConfig { name, seed, lanes, model, optimizer, compute, data, checkpoint, stages }, found)
}

fn model(s: &mut Section<'_, '_>) -> Model {
    let heads = s.count("heads", 1..=4096, None) as u32;
    Model {
        layers: s.count("layers", 1..=LAYERS_MAX, None) as u32,
        hidden: s.count("hidden", 2..=1 << 20, None) as u32,
        heads,
        kv_heads: s.count("kv_heads", 1..=4096, Some(heads.into())) as u32,
        ffn: s.count("ffn", 1..=1 << 24, None) as u32,
        vocab: s.count("vocab", 2..=1 << 24, None) as u32,
        rms_eps: s.number("rms_eps", "a number above 0, up to 0.01", |v| v > 0.0 && v <= 0.01, Some(1e-6)),
        init_std: s.number("init_std", "a number above 0, up to 1", |v| v > 0.0 && v <= 1.0, Some(0.02)),
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
        dtype: s.choice("dtype", Dtype::Fp32),
        recompute: s.choice("recompute", Recompute::Layer),
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
    }
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

/// The stages in the order of `stages`, each from its `[stage.NAME]`.
fn stages(top: &mut Section<'_, '_>, sources: &BTreeMap<String, Source>) -> Vec<Stage> {
    let listed = top.stage_names();
    let mut all = top.map("stage", |s, name| s.section(name, |s| stage(s, name, sources)));
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
    stages
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
    }
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
    if s.table.find("mixture").is_none()
        && let (1, Some(only)) = (sources.len(), sources.keys().next())
    {
        s.known.insert("mixture".to_owned());
        return BTreeMap::from([(only.clone(), 1.0)]);
    }
    if s.table.find("mixture").is_none() {
        let weights: Vec<String> = sources.keys().take(3).map(|name| format!("{name} = 1")).collect();
        s.missing(
            "mixture",
            &format!("the weights of its sources, as mixture = {{ {} }}", weights.join(", ")),
        );
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
    let written = |key: &str| s.table.find(key).is_some_and(|entry| !is_none(&entry.node));
    if !written("lr_curve") && LR_KEYS[1..].iter().any(|key| written(key)) {
        s.missing(
            "lr_curve",
            "\"linear\" or \"cosine\" for lr_from and lr_to, or \"wsd\" for a warmup and a decay of lr",
        );
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
        let Some(node) = s.table.find(key).map(|entry| &entry.node) else { continue };
        if node.place.layer >= curve_layer && !is_none(node) {
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

/// A table being read: what has been asked for, and where to report.
struct Section<'f, 't> {
    found: &'f mut Found,
    table: &'t Table,
    /// Where a missing key would stand.
    origin: Origin,
    path: String,
    known: BTreeSet<String>,
}

impl<'f, 't> Section<'f, 't> {
    fn new(found: &'f mut Found, table: &'t Table, origin: Origin, path: String) -> Self {
        Self { found, table, origin, path, known: BTreeSet::new() }
    }

    fn report(&mut self, origin: Origin, key: &str, fact: String, remedy: String) {
        self.found.report(Problem { origin, key: key.to_owned(), fact, remedy });
    }

    fn missing(&mut self, key: &str, accepted: &str) {
        self.known.insert(key.to_owned());
        let path = join(&self.path, key);
        self.report(self.origin.clone(), &path, format!("{path} is missing"), format!("add {accepted}"));
    }

    /// Reads `key`, or reports that it is missing or not as `accepted`.
    fn read<T>(
        &mut self,
        key: &str,
        accepted: &str,
        default: Option<T>,
        read: impl FnOnce(&'t Node) -> Option<T>,
    ) -> Option<T> {
        self.known.insert(key.to_owned());
        let Some(Entry { node, .. }) = self.table.entries.get(key) else {
            if default.is_none() {
                self.missing(key, accepted);
            }
            return default;
        };
        let value = read(node);
        if value.is_none() {
            let path = join(&self.path, key);
            let is = match &node.value {
                Value::Table(_) => "a table".to_owned(),
                Value::Text(text) if text.is_empty() => "empty".to_owned(),
                _ => node.shown.clone(),
            };
            self.report(
                node.place.origin.clone(),
                &path,
                format!("{path} is {is}"),
                format!("give {accepted}"),
            );
        }
        value
    }

    /// A whole number in `range`.
    fn count(&mut self, key: &str, range: RangeInclusive<u64>, default: Option<u64>) -> u64 {
        let accepted = format!("a whole number, {} to {}", range.start(), range.end());
        let (low, high) = (i128::from(*range.start()), i128::from(*range.end()));
        self.read(key, &accepted, default, |node| match node.value {
            Value::Integer(value) if (low..=high).contains(&value) => u64::try_from(value).ok(),
            _ => None,
        })
        .unwrap_or(*range.start())
    }

    /// A whole number in `range`, possibly with a unit.
    fn quantity(&mut self, key: &str, unit: Unit, range: RangeInclusive<u64>, default: Option<u64>) -> u64 {
        let accepted = unit.accepted(&range);
        let value = self.read(key, &accepted, default, |node| {
            let value = match &node.value {
                Value::Integer(value) => u64::try_from(*value).ok(),
                Value::Float(_, digits) | Value::Text(digits) => quantity::parse(digits, unit),
                _ => None,
            };
            value.filter(|value| range.contains(value))
        });
        value.unwrap_or(*range.start())
    }

    /// A number that `accepts`.
    fn number(
        &mut self,
        key: &str,
        accepted: &str,
        accepts: impl FnOnce(f64) -> bool,
        default: Option<f64>,
    ) -> f64 {
        let value = self.read(key, accepted, default, |node| {
            let value = match node.value {
                Value::Integer(value) => value as f64,
                Value::Float(value, _) => value,
                _ => return None,
            };
            (value.is_finite() && accepts(value)).then_some(value)
        });
        value.unwrap_or_default()
    }

    fn rate(&mut self, key: &str, default: Option<f64>) -> f64 {
        self.number(key, "a learning rate, 0 to 10", |v| (0.0..=10.0).contains(&v), default)
    }

    fn flag(&mut self, key: &str, default: bool) -> bool {
        self.read(key, "true or false", Some(default), |node| match node.value {
            Value::Bool(value) => Some(value),
            _ => None,
        })
        .unwrap_or(default)
    }

    fn choice<T: Named>(&mut self, key: &str, default: T) -> T {
        self.word(key, Some(default)).unwrap_or(default)
    }

    /// One of the words of a closed choice; absent when it is none of them.
    fn word<T: Named>(&mut self, key: &str, default: Option<T>) -> Option<T> {
        let words: Vec<String> = T::NAMES.iter().map(|(word, _)| format!("\"{word}\"")).collect();
        self.read(key, &words.join(" or "), default, |node| match &node.value {
            Value::Text(text) => T::NAMES.iter().find(|(word, _)| word == text).map(|(_, value)| *value),
            _ => None,
        })
    }

    fn text(&mut self, key: &str, accepted: &str, accepts: impl FnOnce(&str) -> bool) -> String {
        self.read(key, accepted, None, |node| match &node.value {
            Value::Text(text) if accepts(text) => Some(text.clone()),
            _ => None,
        })
        .unwrap_or_default()
    }

    /// The name of a run may hold dots as well (`ouro-1.4b`), since no key is made of it.
    fn run_name(&mut self, key: &str) -> String {
        let accepts = |text: &str| is_name(&text.replace('.', "-")) && !text.starts_with('.');
        self.text(key, "a name of 1 to 64 letters, digits, `-`, `_` and `.`, not first", accepts)
    }

    /// A path, or a URL of a store that there is.
    fn location(&mut self, key: &str) -> String {
        const SCHEMES: [&str; 4] = ["file", "s3", "gs", "az"];
        self.text(key, "a path, or a URL that begins with file://, s3://, gs:// or az://", |text| {
            let scheme = text.split_once("://").map(|(scheme, _)| scheme);
            !text.trim().is_empty()
                && !text.contains(char::is_control)
                && scheme.is_none_or(|scheme| SCHEMES.contains(&scheme))
        })
    }

    /// Whether an optional key is there; `"none"` takes back what an earlier layer set.
    fn optional(&mut self, key: &str) -> bool {
        self.known.insert(key.to_owned());
        self.table.entries.get(key).is_some_and(|entry| !is_none(&entry.node))
    }

    /// Reads the table `key`; absent when there is none, or (reported) when it is something else.
    fn section<T>(&mut self, key: &str, read: impl FnOnce(&mut Section<'_, 't>) -> T) -> Option<T> {
        self.known.insert(key.to_owned());
        let entry = self.table.entries.get(key)?;
        let path = join(&self.path, key);
        let Value::Table(table) = &entry.node.value else {
            let fact = format!("{path} is {}, {}", entry.node.shown, entry.node.value.kind());
            self.report(entry.node.place.origin.clone(), &path, fact, "give a table".to_owned());
            return None;
        };
        let mut section = Section::new(self.found, table, entry.node.place.origin.clone(), path);
        let value = read(&mut section);
        section.finish();
        Some(value)
    }

    /// Reads the table `key` with defaults for all that is not there.
    fn section_or_empty<T>(&mut self, key: &str, read: impl Fn(&mut Section<'_, '_>) -> T) -> T {
        match self.section(key, |s| read(s)) {
            Some(value) => value,
            None => {
                let empty = Table::default();
                let path = join(&self.path, key);
                read(&mut Section::new(self.found, &empty, self.origin.clone(), path))
            }
        }
    }

    /// Reads a table whose keys are names that the user gives.
    fn map<T>(
        &mut self,
        key: &str,
        mut read: impl FnMut(&mut Section<'_, 't>, &str) -> T,
    ) -> BTreeMap<String, T> {
        self.section(key, |s| {
            let mut values = BTreeMap::new();
            for (name, entry) in &s.table.entries {
                if is_name(name) {
                    values.insert(name.clone(), read(s, name));
                } else {
                    s.known.insert(name.clone());
                    let path = join(&s.path, name);
                    let fact = format!("{path} has a name that cannot be used");
                    s.report(entry.key.origin.clone(), &path, fact, format!("give a name of {A_NAME}"));
                }
            }
            values
        })
        .unwrap_or_default()
    }

    /// The names in `stages`, each once, with where each stands.
    fn stage_names(&mut self) -> Vec<(String, Origin)> {
        let accepted = format!("the names of 1 to {STAGES_MAX} stages in order, as [\"warmup\", \"stable\"]");
        let nodes = self.read("stages", &accepted, None, |node| match &node.value {
            Value::List(items) if (1..=STAGES_MAX).contains(&items.len()) => Some(items),
            _ => None,
        });
        let mut names: Vec<(String, Origin)> = Vec::new();
        for node in nodes.into_iter().flatten() {
            let origin = node.place.origin.clone();
            match &node.value {
                Value::Text(name) if names.iter().any(|(other, _)| other == name) => {
                    let remedy = "give the second one a name and a table of its own".to_owned();
                    self.report(origin, "stages", format!("stage `{name}` is listed twice"), remedy);
                }
                Value::Text(name) if is_name(name) => names.push((name.clone(), origin)),
                _ => {
                    let fact = format!("stages holds {}, which is no name", node.shown);
                    self.report(origin, "stages", fact, format!("give a name of {A_NAME}"));
                }
            }
        }
        names
    }

    /// Reports the keys that nobody asked for.
    fn finish(&mut self) {
        let unknown: Vec<_> =
            self.table.entries.iter().filter(|(key, _)| !self.known.contains(*key)).collect();
        for (key, entry) in unknown {
            let path = join(&self.path, key);
            let known = self.known.iter().map(String::as_str);
            let remedy = match closest(key, known.clone()) {
                Some(close) => format!("did you mean `{close}`?"),
                None => format!("the keys here are {}", known.collect::<Vec<_>>().join(", ")),
            };
            self.report(entry.key.origin.clone(), &path, format!("{path} is no key"), remedy);
        }
    }
}

fn is_none(node: &Node) -> bool {
    matches!(&node.value, Value::Text(text) if text == "none")
}

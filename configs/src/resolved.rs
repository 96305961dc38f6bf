//! The config as keys and values: to write it down, to name it by a digest, and to say what differs.

use std::collections::BTreeMap;
use std::fmt;

use crate::problem::ConfigError;
use crate::quantity::Unit;
use crate::run::*;

/// A key of the mathematics in which two configs differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The dotted key.
    pub key: String,
    /// Its value here; absent when this config has no such key.
    pub ours: Option<String>,
    /// Its value in the other config.
    pub theirs: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "absent".to_owned());
        write!(f, "{}: {} here, {} there", self.key, shown(&self.ours), shown(&self.theirs))
    }
}

impl RunConfig {
    /// The whole config as TOML, with every default written out: [`RunConfig::parse`] reads it back to an equal value.
    pub fn to_toml(&self) -> String {
        let (mut text, mut open) = (String::new(), String::new());
        for entry in entries(self) {
            if entry.section != open {
                text.push_str(&format!("\n[{}]\n", entry.section));
                open = entry.section;
            }
            text.push_str(&format!("{} = {}\n", entry.key, entry.value));
        }
        text
    }

    /// Reads the config back from its own TOML, which checks a config that was made or changed in code.
    pub fn check(&self) -> Result<(), ConfigError> {
        Self::parse(&self.name, &self.to_toml()).map(|_| ())
    }

    /// This config with other values, as TOML, for these dotted keys; `None` takes a key out. Keys and values are as
    /// [`RunConfig::mathematics`] and [`RunConfig::diff_mathematics`] have them.
    pub fn with(&self, changes: &[(&str, Option<&str>)]) -> Result<Self, ConfigError> {
        let whole = entries(self).into_iter();
        let mut values: BTreeMap<String, String> =
            whole.map(|entry| (crate::tree::join(&entry.section, &entry.key), entry.value)).collect();
        for &(key, value) in changes {
            match value {
                Some(value) => drop(values.insert(key.to_owned(), value.to_owned())),
                None => drop(values.remove(key)),
            }
        }
        let text: String = values.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
        Self::parse(&self.name, &text)
    }

    /// Every key that changes the bits of the run, with its value as TOML.
    ///
    /// Left out, because the weights after each step are the same whatever they say:
    /// `name`; `compute.device`, since the bits are promised for one kind of device anyway; `compute.threads`,
    /// `compute.recompute`, `compute.offload` and `compute.graphs` (the kernels do not depend on them); `checkpoint.*`; `store.*`; `guard.*` unless it leaves updates
    /// out; `eval.*` and the `eval` of a stage, which only measure; `record.*`; `ring.*`;
    /// `data.prefetch_bytes`, `data.cache_dir` and `data.cache_bytes`; `data.tokenizer`, which only turns samples into text; and `data.sources.*`: a source
    /// is known to the mathematics by its name in a mixture, so that data can move. That it is the same data is for
    /// the data's own digest to say. Of weights to begin with, `init.weights` counts, and not where they lie.
    ///
    /// `compute.fused` counts where it is true: without it a run has the bits that it always had.
    ///
    /// Kept, though it often makes no difference: `data.on_corrupt`, since it decides which tokens are trained on.
    pub fn mathematics(&self) -> BTreeMap<String, String> {
        let entries = entries(self).into_iter().filter(|entry| entry.changes_bits);
        entries.map(|entry| (crate::tree::join(&entry.section, &entry.key), entry.value)).collect()
    }

    /// BLAKE3 of [`RunConfig::mathematics`], in hex: two runs with the same digest, data and device kind have the
    /// same bits.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for (key, value) in self.mathematics() {
            hasher.update(format!("{key} = {value}\n").as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The keys of the mathematics in which `other` differs from this config, in order.
    pub fn diff_mathematics(&self, other: &Self) -> Vec<Difference> {
        let (mut ours, mut theirs) = (self.mathematics(), other.mathematics());
        let keys: std::collections::BTreeSet<String> = ours.keys().chain(theirs.keys()).cloned().collect();
        keys.into_iter()
            .map(|key| Difference { ours: ours.remove(&key), theirs: theirs.remove(&key), key })
            .filter(|difference| difference.ours != difference.theirs)
            .collect()
    }
}

struct ConfigEntry {
    section: String,
    key: String,
    value: String,
    changes_bits: bool,
}

/// The entries of one section.
struct Section<'a> {
    entries: &'a mut Vec<ConfigEntry>,
    name: String,
}

impl Section<'_> {
    fn put(&mut self, key: &str, value: String, changes_bits: bool) -> &mut Self {
        self.entries.push(ConfigEntry {
            section: self.name.clone(),
            key: key.to_owned(),
            value,
            changes_bits,
        });
        self
    }

    /// A key that changes the bits.
    fn bits(&mut self, key: &str, value: impl Toml) -> &mut Self {
        self.put(key, value.toml(), true)
    }

    /// A key that leaves the bits alone.
    fn rest(&mut self, key: &str, value: impl Toml) -> &mut Self {
        self.put(key, value.toml(), false)
    }
}

/// Every key of a config, in the order in which a person would write them. The patterns name every field, so that a
/// new one cannot be forgotten here.
fn entries(config: &RunConfig) -> Vec<ConfigEntry> {
    let mut entries = Vec::new();
    let mut section = |name: &str, fill: &dyn Fn(&mut Section<'_>)| {
        fill(&mut Section { entries: &mut entries, name: name.to_owned() })
    };
    let RunConfig {
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
    } = config;
    section("", &|s| {
        let names: Vec<String> = stages.iter().map(|stage| stage.name.as_str().toml()).collect();
        s.rest("name", name.as_str()).bits("seed", *seed).bits("lanes", *lanes);
        s.put("stages", format!("[{}]", names.join(", ")), true);
    });
    section("model", &|s| {
        let Model { layers, hidden, heads, kv_heads, ffn, vocab, rms_eps, init_std, embed_std, post_norm } =
            model;
        s.bits("layers", *layers).bits("hidden", *hidden).bits("heads", *heads).bits("kv_heads", *kv_heads);
        s.bits("ffn", *ffn).bits("vocab", *vocab).bits("rms_eps", *rms_eps).bits("init_std", *init_std);
        s.bits("embed_std", *embed_std).bits("post_norm", *post_norm);
    });
    if let Some(Init { from, weights }) = init {
        section("init", &|s| {
            s.rest("from", from.as_str());
            if let Some(weights) = weights {
                s.bits("weights", weights.as_str());
            }
        });
    }
    section("optimizer", &|s| {
        let Optimizer { beta1, beta2, eps, weight_decay, clip } = optimizer;
        s.bits("beta1", *beta1).bits("beta2", *beta2).bits("eps", *eps);
        s.bits("weight_decay", *weight_decay).bits("clip", *clip);
    });
    section("compute", &|s| {
        let Compute { device, dtype, recompute, offload, fused, graphs, loss_chunk_tokens, threads } =
            compute;
        s.rest("device", device.to_string().as_str());
        s.bits("dtype", dtype.name()).rest("recompute", recompute.name());
        s.rest("offload", *offload);
        // Runs from before there was a choice have the mathematics of its absence.
        s.put("fused", fused.toml(), *fused);
        s.rest("graphs", *graphs);
        s.bits("loss_chunk_tokens", *loss_chunk_tokens);
        if let Some(threads) = threads {
            s.rest("threads", *threads);
        }
    });
    let Data { tokenizer, sources, on_corrupt, prefetch_bytes, cache } = data;
    section("data", &|s| {
        if let Some(tokenizer) = tokenizer {
            s.rest("tokenizer", tokenizer.as_str());
        }
        s.bits("on_corrupt", on_corrupt.name()).rest("prefetch_bytes", *prefetch_bytes);
        if let Some(Cache { dir, bytes }) = cache {
            s.rest("cache_dir", dir.as_str()).rest("cache_bytes", *bytes);
        }
    });
    for (name, Source { url }) in sources {
        section(&format!("data.sources.{name}"), &|s| {
            s.rest("url", url.as_str());
        });
    }
    section("checkpoint", &|s| {
        let Checkpoint { every_steps, keep_last, keep_every_steps, keep_stage_ends, part_bytes } = checkpoint;
        s.rest("every_steps", *every_steps).rest("keep_last", *keep_last);
        if let Some(steps) = keep_every_steps {
            s.rest("keep_every_steps", *steps);
        }
        s.rest("keep_stage_ends", *keep_stage_ends).rest("part_bytes", *part_bytes);
    });
    if let RunStore { bandwidth: Some(bandwidth) } = store {
        section("store", &|s| {
            s.rest("bandwidth", *bandwidth);
        });
    }
    section("guard", &|s| {
        let Guard { on_spike, window, factor, floor, rollback_steps } = guard;
        // What is only told of changes no bit, and neither does what is measured for it.
        let changes_bits = matches!(on_spike, OnSpike::Skip | OnSpike::Rollback);
        s.put("on_spike", on_spike.name().toml(), changes_bits).put("window", window.toml(), changes_bits);
        s.put("factor", factor.toml(), changes_bits).put("floor", floor.toml(), changes_bits);
        s.put("rollback_steps", rollback_steps.toml(), *on_spike == OnSpike::Rollback);
    });
    let Eval { every_steps, sequences, sets } = eval;
    section("eval", &|s| {
        s.rest("every_steps", *every_steps).rest("sequences", *sequences);
    });
    for (name, Source { url }) in sets {
        section(&format!("eval.sets.{name}"), &|s| {
            s.rest("url", url.as_str());
        });
    }
    section("record", &|s| {
        let Record { digest_every_steps } = record;
        s.rest("digest_every_steps", *digest_every_steps);
    });
    let Ring {
        detection_ms,
        digest_every_steps,
        spot_check_every_steps,
        straggler_factor,
        straggler_window_steps,
        lanes,
        state_copies,
        state_bandwidth,
        transport,
        fault,
    } = ring;
    section("ring", &|s| {
        s.rest("detection", Unit::Time.shown(*detection_ms).as_str());
        s.rest("digest_every_steps", *digest_every_steps);
        s.rest("spot_check_every_steps", *spot_check_every_steps);
        s.rest("straggler_factor", *straggler_factor);
        s.rest("straggler_window_steps", *straggler_window_steps).rest("lanes", lanes.name());
        match state_copies {
            StateCopies::All => s.rest("state_copies", "all"),
            StateCopies::Two => s.rest("state_copies", 2u64),
        };
        if let Some(bandwidth) = state_bandwidth {
            s.rest("state_bandwidth", *bandwidth);
        }
        s.rest("transport", transport.name());
        if let Some(Fault { buffer, step, rank, again }) = fault {
            let again = if *again { "*" } else { "" };
            s.rest("fault", format!("{buffer}@{step}/{rank}{again}").as_str());
        }
    });
    for stage in stages {
        section(&format!("stage.{}", stage.name), &|s| stage_entries(s, stage));
    }
    entries
}

fn stage_entries(s: &mut Section<'_>, stage: &Stage) {
    let Stage {
        name: _,
        tokens,
        sequence,
        batch: Batch { tokens: batch, ramp },
        micro_batch,
        lr,
        loops,
        beta,
        rope_base,
        mixture,
        mask,
        trains,
        loss,
        reset_optimizer,
        upcycle,
        eval,
    } = stage;
    s.bits("tokens", *tokens).bits("sequence", *sequence).bits("batch", *batch);
    if let Some(Ramp { from, over }) = ramp {
        s.bits("batch_ramp.from", *from).bits("batch_ramp.over", *over);
    }
    s.bits("micro_batch", *micro_batch);
    match *lr {
        LrCurve::Constant { lr } => s.bits("lr_curve", "constant").bits("lr", lr),
        LrCurve::Linear { from, to } => s.bits("lr_curve", "linear").bits("lr_from", from).bits("lr_to", to),
        LrCurve::Cosine { from, to } => s.bits("lr_curve", "cosine").bits("lr_from", from).bits("lr_to", to),
        LrCurve::Wsd { peak, to, warmup, decay } => {
            s.bits("lr_curve", "wsd").bits("lr", peak).bits("lr_to", to);
            s.bits("lr_warmup", warmup).bits("lr_decay", decay)
        }
    };
    s.bits("loops", *loops).bits("beta", *beta).bits("rope_base", *rope_base);
    for (source, weight) in mixture {
        s.bits(&format!("mixture.{source}"), *weight);
    }
    s.bits("mask", mask.name()).bits("trains", trains.name()).bits("loss", loss.name());
    s.bits("reset_optimizer", *reset_optimizer);
    if let Some(Upcycle { layers }) = upcycle {
        s.bits("upcycle.layers", *layers);
    }
    if let Some(sets) = eval {
        let names: Vec<String> = sets.iter().map(|name| name.as_str().toml()).collect();
        s.put("eval", format!("[{}]", names.join(", ")), false);
    }
}

/// A value as TOML.
trait Toml {
    fn toml(&self) -> String;
}

impl Toml for u32 {
    fn toml(&self) -> String {
        self.to_string()
    }
}

impl Toml for u64 {
    fn toml(&self) -> String {
        self.to_string()
    }
}

impl Toml for bool {
    fn toml(&self) -> String {
        self.to_string()
    }
}

/// The shortest text that reads back to the same bits.
impl Toml for f64 {
    fn toml(&self) -> String {
        format!("{self:?}")
    }
}

impl Toml for &str {
    fn toml(&self) -> String {
        toml::Value::String((*self).to_owned()).to_string()
    }
}

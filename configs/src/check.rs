//! What must hold between the values of a config: pure, and all of it at once.

use crate::decode::LAYERS_MAX;
use crate::lanes::LANE_PLACES_MAX;
use crate::names::closest;
use crate::run::*;

/// Something that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    /// The key to point at.
    pub key: String,
    /// The other keys that the finding rests on: if one of them is bad, the finding says nothing.
    pub uses: Vec<String>,
    pub fact: String,
    pub remedy: String,
}

/// Plateaus that a batch ramp may have: bounds the schedule's table at 4 MiB a stage.
const PLATEAUS_MAX: u64 = 65_536;

/// Bytes of a decoded token on its way to the worker: id, label, document and position, each 32 bits.
const PREFETCH_BYTES_PER_TOKEN: u64 = 16;

/// All findings, in the order of the config.
pub(crate) fn check(config: &RunConfig) -> Vec<Finding> {
    let mut findings = Findings(Vec::new());
    lanes(config, &mut findings);
    model(&config.model, &mut findings);
    prefetch(config, &mut findings);
    if config.compute.offload && config.compute.recompute == Recompute::None {
        let fact =
            "compute.offload is true, and with compute.recompute \"none\" no inputs are kept".to_owned();
        let remedy = "set compute.recompute to \"layer\", or leave compute.offload out";
        findings.add("compute.offload", &["compute.recompute"], fact, remedy);
    }
    fused(config, &mut findings);
    graphs(&config.compute, &mut findings);
    if config.eval.every_steps > 0 && config.eval.sets.is_empty() {
        let fact = "eval.every_steps is above 0, and there is no held-out set".to_owned();
        findings.add("eval.every_steps", &[], fact, "add an [eval.sets.NAME] table with its url");
    }
    let mut layers = config.model.layers;
    for stage in &config.stages {
        batch(config, stage, &mut findings);
        mixture(config, stage, &mut findings);
        curve(stage, &mut findings);
        objective(stage, &mut findings);
        eval(config, stage, &mut findings);
        layers = upcycle(stage, layers, &mut findings);
    }
    findings.0
}

struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, key: impl Into<String>, uses: &[&str], fact: String, remedy: impl Into<String>) {
        let uses = uses.iter().map(|key| (*key).to_owned()).collect();
        self.0.push(Finding { key: key.into(), uses, fact, remedy: remedy.into() });
    }
}

/// Widest hidden state that a block of a fused kernel takes: sixteen channels for each of 768 threads.
const FUSED_HIDDEN_MAX: u32 = 12_288;

fn fused(config: &RunConfig, findings: &mut Findings) {
    let Compute { fused, device, .. } = config.compute;
    if fused && device == ComputeDevice::Cpu {
        let fact =
            "compute.fused is true, and compute.device is \"cpu\", which has no fused kernels".to_owned();
        let remedy = "set compute.device to \"cuda\", or leave compute.fused out";
        findings.add("compute.fused", &["compute.device"], fact, remedy);
    }
    let hidden = config.model.hidden;
    if fused && hidden > FUSED_HIDDEN_MAX {
        let fact = format!("compute.fused is true, and model.hidden is {hidden}");
        let remedy = format!("leave compute.fused out: its kernels take up to {FUSED_HIDDEN_MAX}");
        findings.add("compute.fused", &["model.hidden"], fact, remedy);
    }
}

fn graphs(compute: &Compute, findings: &mut Findings) {
    if compute.graphs && !compute.fused {
        let fact =
            "compute.graphs is true, and compute.fused is not: some of LibTorch's kernels cannot be recorded";
        let remedy = "set compute.fused to true, or leave compute.graphs out";
        findings.add("compute.graphs", &["compute.fused"], fact.to_owned(), remedy);
    }
    if compute.graphs && compute.offload {
        let fact = "compute.graphs and compute.offload are true: what goes to the host's memory and back cannot be recorded";
        let remedy = "leave one of them out: where compute.offload is of use kernels take long, and graphs gain nothing";
        findings.add("compute.graphs", &["compute.offload"], fact.to_owned(), remedy);
    }
}

fn lanes(config: &RunConfig, findings: &mut Findings) {
    let lanes = config.lanes;
    if !lanes.is_power_of_two() {
        let above = lanes.next_power_of_two();
        let remedy = format!("give {} or {above}", above / 2);
        findings.add("lanes", &[], format!("lanes is {lanes}, which is not a power of two"), remedy);
    }
    let sources = config.data.sources.len() as u64;
    if u64::from(lanes) * sources > LANE_PLACES_MAX {
        let fact = format!(
            "lanes is {lanes} and data.sources has {sources} sources: every step tells of every lane's place in each, at \
             most {LANE_PLACES_MAX} in all"
        );
        let fits = 1u64 << (LANE_PLACES_MAX / sources).ilog2();
        let remedy = format!("give at most {fits} lanes or {} sources", LANE_PLACES_MAX / u64::from(lanes));
        findings.add("lanes", &["data.sources"], fact, remedy);
    }
}

fn model(model: &Model, findings: &mut Findings) {
    let Model { hidden, heads, kv_heads, .. } = *model;
    if hidden % heads != 0 || (hidden / heads) % 2 != 0 {
        let fact = if hidden % heads != 0 {
            format!("model.heads is {heads}, which does not divide model.hidden = {hidden}")
        } else {
            format!("model.heads is {heads}, which makes the head size {hidden} / {heads} odd")
        };
        let fits: Vec<u32> =
            (1..=hidden.min(4096)).filter(|h| hidden % h == 0 && (hidden / h) % 2 == 0).collect();
        let remedy = match nearest(&fits, heads) {
            fits if fits.is_empty() => "give an even model.hidden".to_owned(),
            fits => format!("give {}, or another model.hidden", either(&fits)),
        };
        findings.add("model.heads", &["model.hidden"], fact, remedy);
    }
    if heads % kv_heads != 0 {
        let fits: Vec<u32> = (1..=heads).filter(|kv| heads % kv == 0).collect();
        let fact = format!("model.kv_heads is {kv_heads}, which does not divide model.heads = {heads}");
        findings.add(
            "model.kv_heads",
            &["model.heads"],
            fact,
            format!("give {}", either(&nearest(&fits, kv_heads))),
        );
    }
}

fn prefetch(config: &RunConfig, findings: &mut Findings) {
    let largest = config.stages.iter().max_by_key(|s| u64::from(s.sequence) * u64::from(s.micro_batch));
    let Some(stage) = largest else { return };
    let needed = quantum(config, stage).saturating_mul(PREFETCH_BYTES_PER_TOKEN);
    let held = config.data.prefetch_bytes;
    if held < needed {
        let (sequence, micro_batch) = (key(stage, "sequence"), key(stage, "micro_batch"));
        let product = format!("{} × {} × {}", config.lanes, stage.sequence, stage.micro_batch);
        let fact = format!(
            "data.prefetch_bytes is {held}, less than one micro-batch for every lane of stage `{}`: lanes × sequence × \
             micro_batch × {PREFETCH_BYTES_PER_TOKEN} bytes = {product} × {PREFETCH_BYTES_PER_TOKEN} = {needed}",
            stage.name
        );
        let uses = ["lanes", &sequence, &micro_batch];
        findings.add("data.prefetch_bytes", &uses, fact, format!("give at least {needed}"));
    }
}

fn batch(config: &RunConfig, stage: &Stage, findings: &mut Findings) {
    let quantum = quantum(config, stage);
    let (sequence, micro_batch, batch) =
        (key(stage, "sequence"), key(stage, "micro_batch"), key(stage, "batch"));
    let shape: [&str; 3] = ["lanes", &sequence, &micro_batch];
    let product = format!("{} × {} × {} = {quantum}", config.lanes, stage.sequence, stage.micro_batch);
    let mut whole = |key: &str, tokens: u64| {
        if !tokens.is_multiple_of(quantum) {
            let below = tokens / quantum * quantum;
            let fits: Vec<u64> = [below, below + quantum].into_iter().filter(|fit| *fit > 0).collect();
            let fact =
                format!("{key} is {tokens}, not a multiple of lanes × sequence × micro_batch = {product}");
            findings.add(key, &shape, fact, format!("give {}", either(&fits)));
        }
    };
    whole(&batch, stage.batch.tokens);
    let Some(Ramp { from, over }) = stage.batch.ramp else { return };
    let (from_key, over_key, tokens) =
        (key(stage, "batch_ramp.from"), key(stage, "batch_ramp.over"), key(stage, "tokens"));
    whole(&from_key, from);
    if from >= stage.batch.tokens {
        let fact = format!("{from_key} is {from}, not below {batch} = {}", stage.batch.tokens);
        findings.add(&from_key, &[&batch], fact, "give a smaller one, or leave out batch_ramp");
    } else if (stage.batch.tokens - from) / quantum > PLATEAUS_MAX {
        let fact = format!(
            "{from_key} is {from}, which is more than {PLATEAUS_MAX} steps of {quantum} below {batch}"
        );
        findings.add(&from_key, &[&batch, shape[0], shape[1], shape[2]], fact, "give a larger micro_batch");
    }
    if over > stage.tokens {
        let fact = format!("{over_key} is {over}, more than {tokens} = {}", stage.tokens);
        findings.add(&over_key, &[&tokens], fact, format!("give at most {}", stage.tokens));
    }
}

fn mixture(config: &RunConfig, stage: &Stage, findings: &mut Findings) {
    let mixture = key(stage, "mixture");
    if stage.mixture.is_empty() {
        let fact = format!("{mixture} sums to 0");
        let sources = config.data.sources.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let remedy = match sources.is_empty() {
            true => "add a [data.sources.NAME] table with its url, and give it a weight above 0".to_owned(),
            false => format!("give a weight above 0 to one of {sources}"),
        };
        findings.add(mixture, &[], fact, remedy);
        return;
    }
    for name in stage.mixture.keys().filter(|name| !config.data.sources.contains_key(*name)) {
        let sources = config.data.sources.keys().map(String::as_str);
        let remedy = match closest(name, sources) {
            Some(close) => format!("did you mean `{close}`?"),
            None => format!("add a [data.sources.{name}] table with its url"),
        };
        let (key, source) = (format!("{mixture}.{name}"), format!("data.sources.{name}"));
        findings.add(key, &[&source], format!("{mixture} names `{name}`, which is no source"), remedy);
    }
}

fn eval(config: &RunConfig, stage: &Stage, findings: &mut Findings) {
    let sets = &config.eval.sets;
    for name in stage.eval.iter().flatten().filter(|name| !sets.contains_key(*name)) {
        let remedy = match closest(name, sets.keys().map(String::as_str)) {
            Some(close) => format!("did you mean `{close}`?"),
            None => format!("add an [eval.sets.{name}] table with its url"),
        };
        let (key, set) = (key(stage, "eval"), format!("eval.sets.{name}"));
        let fact = format!("{key} names `{name}`, which is no held-out set");
        findings.add(key, &[&set], fact, remedy);
    }
}

fn curve(stage: &Stage, findings: &mut Findings) {
    let LrCurve::Wsd { peak, to, warmup, decay } = stage.lr else { return };
    let (decay_key, warmup_key, to_key, lr_key) =
        (key(stage, "lr_decay"), key(stage, "lr_warmup"), key(stage, "lr_to"), key(stage, "lr"));
    if warmup + decay > 1.0 {
        let fact =
            format!("{decay_key} is {decay}, which with lr_warmup = {warmup} is more than the whole stage");
        findings.add(&decay_key, &[&warmup_key], fact, format!("give 0 to {}", 1.0 - warmup));
    }
    if decay == 0.0 && to != peak {
        let fact = format!("{to_key} is {to}, but with lr_decay = 0 the learning rate stays at lr = {peak}");
        findings.add(
            &to_key,
            &[&decay_key, &lr_key],
            fact,
            "give lr_decay a share above 0, or leave out lr_to",
        );
    }
}

fn objective(stage: &Stage, findings: &mut Findings) {
    let (loss, trains, loops) = (key(stage, "loss"), key(stage, "trains"), key(stage, "loops"));
    if stage.loss == Loss::Gate && stage.trains == Trains::All {
        let fact = format!("{trains} is \"all\", but loss = \"gate\" leaves the language model alone");
        findings.add(&trains, &[&loss], fact, "give \"gate\", or another loss");
    }
    if stage.loss == Loss::Sft && stage.trains == Trains::Gate {
        let fact = format!("{trains} is \"gate\", but loss = \"sft\" has no gradient for the gate");
        findings.add(&trains, &[&loss], fact, "give \"all\", or another loss");
    }
    if stage.trains == Trains::Gate && stage.loops < 2 {
        let fact = format!(
            "{loops} is {}, and with one loop step there is nothing for the gate to learn",
            stage.loops
        );
        findings.add(&loops, &[&trains, &loss], fact, "give 2 or more");
    }
}

/// The layers after the stage's upcycling, if any.
fn upcycle(stage: &Stage, layers: u32, findings: &mut Findings) -> u32 {
    let Some(Upcycle { layers: after }) = stage.upcycle else { return layers };
    if after <= layers || !after.is_multiple_of(layers) {
        let key = key(stage, "upcycle.layers");
        let fact = format!("{key} is {after}, not a larger multiple of the {layers} layers before it");
        let multiples: Vec<u32> =
            (2..).map(|n| layers.saturating_mul(n)).take_while(|l| u64::from(*l) <= LAYERS_MAX).collect();
        let remedy = match nearest(&multiples, after) {
            fits if fits.is_empty() => "leave out upcycle".to_owned(),
            fits => format!("give {}", either(&fits)),
        };
        findings.add(key, &["model.layers"], fact, remedy);
    }
    after
}

/// Tokens that every lane's one micro-batch make together: the unit of a batch.
pub(crate) fn quantum(config: &RunConfig, stage: &Stage) -> u64 {
    u64::from(config.lanes) * u64::from(stage.sequence) * u64::from(stage.micro_batch)
}

fn key(stage: &Stage, key: &str) -> String {
    format!("stage.{}.{key}", stage.name)
}

/// The largest of `fits` at or below `value` and the smallest above it.
fn nearest(fits: &[u32], value: u32) -> Vec<u32> {
    let at = fits.partition_point(|fit| *fit <= value);
    fits[at.saturating_sub(1)..(at + 1).min(fits.len())].to_vec()
}

fn either<T: ToString>(fits: &[T]) -> String {
    fits.iter().map(T::to_string).collect::<Vec<_>>().join(" or ")
}

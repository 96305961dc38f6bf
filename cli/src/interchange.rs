//! `anello export` and `anello import`: weights in the published Ouro layout, out and in.

use std::fmt::Write as _;
use std::path::PathBuf;

use anello_configs::{Dtype, Model, RunConfig, Schedule, Stage};
use anello_store::checkpoint::Manifest;
use anello_store::metrics::{self, StepRecord};
use anello_store::{Environment, Store, read_config};
use anello_worker::interchange::{self, Export, Use};
use anello_worker::{Run, as_slice, pin_init};

use crate::config::{check_ready, load};
use crate::failure::{Exit, Failure, Outcome};
use crate::place::CheckpointName;
use crate::screen::Screen;
use crate::text::{bytes, grouped, read_bytes};
use crate::tokenizer::tokenizer_file;
use crate::weights::weights_at;
use anello_store::words::{short_digest, where_it_runs};

/// Arguments of `anello export`.
#[derive(Debug, clap::Args)]
pub struct ExportArgs {
    /// The newest checkpoint of the run unless a step is given; step 0 is what it began with.
    #[arg(value_name = "RUN[@STEP]")]
    name: CheckpointName,
    /// The folder to make.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Format of the tensors.
    #[arg(long, value_name = "FORMAT", default_value = "bf16", value_parser = ["bf16", "fp32"])]
    dtype: String,
    /// Size of a file of weights at most.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = read_bytes)]
    shard: u64,
}

/// Arguments of `anello import`.
#[derive(Debug, clap::Args)]
pub struct ImportArgs {
    /// The folder (or URL) with config.json and safetensors.
    folder: String,
    /// The recipe and the data of the run: a preset or a TOML file. The model's sizes are those of the folder.
    #[arg(long, value_name = "CONFIG")]
    config: String,
    /// The folder for the run (default: runs/NAME).
    #[arg(long, value_name = "DIR")]
    out: Option<String>,
    /// Set a key over the config: `stage.stable.lr=1e-4`. May be given again.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

/// `anello import`
pub fn import(args: &ImportArgs, screen: &Screen) -> Outcome {
    let sizes = interchange::published_model(&Store::open(&args.folder)?)?;
    let folder = crate::jobs::absolute(&args.folder)?;
    let quoted = toml_text(&folder);
    let Model { layers, hidden, heads, kv_heads, ffn, vocab, rms_eps, .. } = sizes;
    let mut sets = vec![
        format!("model.layers={layers}"),
        format!("model.hidden={hidden}"),
        format!("model.heads={heads}"),
        format!("model.kv_heads={kv_heads}"),
        format!("model.ffn={ffn}"),
        format!("model.vocab={vocab}"),
        format!("model.rms_eps={rms_eps:?}"),
        format!("init.from={quoted}"),
    ];
    sets.extend(args.sets.iter().cloned());
    let loaded = load(&args.config, &sets)?;
    check_ready(&loaded)?;
    let mut config = loaded.config;
    pin_init(&mut config)?;
    let out = args.out.clone().unwrap_or_else(|| format!("runs/{}", config.name));
    let weights = config.init.as_ref().and_then(|init| init.weights.clone()).unwrap_or_default();
    Run::create(Store::durable(&out)?, config)?;
    let digest = short_digest(&weights);
    screen.line(&format!(
        "{out} begins with the weights {digest} of {folder}; train it: anello run --resume {out}"
    ))?;
    Ok(Exit::Done)
}

/// A TOML string.
fn toml_text(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// `anello export`
pub fn export(args: &ExportArgs, screen: &Screen) -> Outcome {
    let (store, step) = args.name.open()?;
    let config = read_config(&store)?;
    let (manifest, layout, weights) = weights_at(&store, &config, step)?;
    let schedule = Schedule::new(&config);
    let last = step.saturating_sub(1);
    let Some(plan) = schedule.at(last) else {
        return Err(Failure::Usage(format!("{} has no step {last}", args.name)));
    };
    let trained = &config.stages[..=plan.stage_index];
    let tokenizer = tokenizer(&config)?;
    let (used, readme) = match untrained(&config, step)? {
        Some((used, readme)) => (used, readme),
        None => {
            let record = metrics::read(&store)?.into_iter().find(|record| record.step + 1 == step);
            let used = Use {
                loops: plan.stage.loops,
                rope_base: plan.stage.rope_base,
                positions: trained.iter().map(|stage| stage.sequence).max().unwrap_or(plan.stage.sequence),
                init_std: config.model.init_std,
            };
            (used, card(&config, plan.stage, manifest.as_ref(), record.as_ref()))
        }
    };
    let dtype = if args.dtype == "bf16" { Dtype::Bf16 } else { Dtype::Fp32 };
    let what = Export {
        model: &config.model,
        used,
        dtype,
        shard_bytes: args.shard,
        tokenizer: tokenizer.as_deref(),
        readme: &readme,
    };
    let exported = interchange::export(&args.to, &layout, as_slice(&weights), &what)?;
    screen.line(&format!(
        "{}: the weights after step {} of {}, {} tensors as {} in {} file{}, {}",
        args.to.display(),
        grouped(step),
        args.name.run,
        exported.tensors,
        args.dtype,
        exported.shards,
        if exported.shards == 1 { "" } else { "s" },
        bytes(exported.bytes),
    ))?;
    Ok(Exit::Done)
}

/// The text of the run's tokenizer.
fn tokenizer(config: &RunConfig) -> Result<Option<Vec<u8>>, Failure> {
    let Some(path) = tokenizer_file(config) else { return Ok(None) };
    let read = std::fs::read(&path);
    read.map(Some).map_err(|source| Failure::File { action: "reading the tokenizer", path, source })
}

/// What the published folder said of itself that a run began with, as long as the run has added nothing to it.
fn untrained(config: &RunConfig, step: u64) -> Result<Option<(Use, String)>, Failure> {
    let Some(init) = config.init.as_ref().filter(|_| step == 0) else { return Ok(None) };
    let store = Store::open(&init.from)?;
    if !interchange::is_published_layout(&store)? {
        return Ok(None);
    }
    let readme = store.get("README.md")?.map(|text| String::from_utf8_lossy(&text).into_owned());
    Ok(Some((interchange::published_use(&store)?, readme.unwrap_or_default())))
}

/// The model card: where the weights come from.
fn card(
    config: &RunConfig,
    stage: &Stage,
    manifest: Option<&Manifest>,
    record: Option<&StepRecord>,
) -> String {
    let mut text = format!(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [ouro, looped-language-model]\n---\n\
         # {}\n\nA looped language model: {} layers applied {} times with the same weights, hidden size {}, vocabulary {}.\n\
         Pretrained with Anello.\n\n## Where it comes from\n\n| | |\n|---|---|\n",
        config.name,
        manifest.map_or(config.model.layers, |manifest| manifest.layers),
        stage.loops,
        config.model.hidden,
        config.model.vocab,
    );
    let mut row = |what: &str, value: &str| {
        let _ = writeln!(text, "| {what} | {value} |");
    };
    row("config digest", &format!("`{}`", config.digest()));
    if let Some(init) = &config.init {
        row("began with the weights", &format!("`{}`", init.weights.as_deref().unwrap_or("unknown")));
    }
    if let Some(manifest) = manifest {
        row("weights digest", &format!("`{}`", manifest.weights));
        for (name, digest) in &manifest.data {
            row(&format!("data index digest, {name}"), &format!("`{digest}`"));
        }
        row("steps", &grouped(manifest.step));
        row("tokens seen", &grouped(manifest.tokens));
        row("stage", &format!("{}{}", manifest.stage, if manifest.stage_end { ", at its end" } else { "" }));
        // The same wherever it ran, as the weights are.
        let environment = Environment { threads: 0, ..manifest.environment.clone() };
        row("trained on", &where_it_runs(&environment).replace(", 0 threads", ""));
    }
    if let Some(record) = record {
        text.push_str(
            "\n## Loss of the last step\n\n| loop step | nats a token | leaves here |\n|---|---|---|\n",
        );
        for (at, (loss, exit)) in record.loop_loss.iter().zip(&record.exit).enumerate() {
            let _ = writeln!(text, "| {} | {loss:.4} | {:.1} % |", at + 1, exit * 100.0);
        }
    }
    text.push_str(
        "\n## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
         model = AutoModelForCausalLM.from_pretrained(\".\", trust_remote_code=True)\n```\n\
         The code that runs it is the published one of Ouro, which `config.json` names.\n",
    );
    text
}

//! A trained model by its name: a checkpoint of a run, or a folder in the published layout.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use anello_configs::{Dtype, RunConfig, Schedule};
use anello_store::checkpoint::Manifest;
use anello_store::{Store, read_config};
use anello_worker::checkpoint::load_weights;
use anello_worker::{Layout, Model, State, initial_state, interchange};
use tch::{Device, Tensor};
use tokenizers::Tokenizer;

use crate::failure::Failure;
use crate::place::CheckpointName;
use crate::tokenizer::{fitting, tokenizer_file, tokenizer_of};

/// A model that can be used.
pub struct Weights {
    /// What the user called it.
    pub name: String,
    /// It.
    pub model: Model,
    /// Layers in its stack.
    pub layers: u32,
    /// Tokens in the vocabulary.
    pub vocab: u32,
    /// Loop steps that it was last trained with.
    pub loops: u32,
    /// Base of the rotary angles.
    pub rope_base: f64,
    /// Sequence length of the stage last trained, tokens.
    pub sequence: u32,
    /// Its tokenizer, if it has one.
    pub tokenizer: Option<Tokenizer>,
    /// The file of that.
    pub tokenizer_file: Option<PathBuf>,
    /// Where the data of its run is, by source; empty where it is of no run.
    pub sources: BTreeMap<String, String>,
}

impl Weights {
    /// Loads `RUN`, `RUN@STEP` or a folder with `config.json`, to be computed on `device`.
    pub fn load(name: &str, device: Device) -> Result<Self, Failure> {
        let published = Store::open(name)?;
        if interchange::is_published_layout(&published)? {
            return Self::of_folder(name, &published, device);
        }
        let Ok(parsed) = CheckpointName::from_str(name);
        let (store, step) = parsed.open()?;
        let config = read_config(&store)?;
        let (_, layout, flat) = weights_at(&store, &config, step)?;
        let schedule = Schedule::new(&config);
        let plan = schedule
            .at(step.saturating_sub(1))
            .ok_or_else(|| Failure::Usage(format!("{name} is no step of its run's plan")))?;
        let model = Model::new(&config.model, config.compute.dtype, &layout, &flat.to_device(device));
        let tokenizer = tokenizer_of(&config)?;
        Ok(Self {
            name: name.to_owned(),
            model,
            layers: layout.layers() as u32,
            vocab: config.model.vocab,
            loops: plan.stage.loops,
            rope_base: plan.stage.rope_base,
            sequence: plan.stage.sequence,
            tokenizer_file: tokenizer.as_ref().and_then(|_| tokenizer_file(&config)),
            tokenizer,
            sources: config.data.sources.into_iter().map(|(name, source)| (name, source.url)).collect(),
        })
    }

    fn of_folder(name: &str, store: &Store, device: Device) -> Result<Self, Failure> {
        let sizes = interchange::published_model(store)?;
        let (layout, weights) = interchange::read(store, &sizes)?;
        let used = interchange::published_use(store)?;
        let flat = Tensor::from_slice(&weights).to_device(device);
        let tokenizer =
            store.folder().map(|folder| folder.join("tokenizer.json")).filter(|path| path.is_file());
        Ok(Self {
            name: name.to_owned(),
            model: Model::new(&sizes, Dtype::Fp32, &layout, &flat),
            layers: sizes.layers,
            vocab: sizes.vocab,
            loops: used.loops,
            rope_base: used.rope_base,
            sequence: used.positions.min(4096),
            tokenizer: tokenizer.as_deref().map(|path| fitting(path, sizes.vocab)).transpose()?,
            tokenizer_file: tokenizer,
            sources: BTreeMap::new(),
        })
    }

    /// The ids of `text`.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Failure> {
        let Some(tokenizer) = &self.tokenizer else {
            return Err(Failure::Usage(format!(
                "{} has no tokenizer; set data.tokenizer in its config",
                self.name
            )));
        };
        let encoded = tokenizer.encode(text, false);
        let encoded =
            encoded.map_err(|cause| Failure::Usage(format!("the text cannot be tokenized: {cause}")))?;
        let ids = encoded.get_ids().to_vec();
        match ids.iter().find(|id| **id >= self.vocab) {
            None => Ok(ids),
            Some(id) => Err(Failure::Usage(format!(
                "the tokenizer has the token {id}, the model's vocabulary {} tokens; give it its own tokenizer",
                self.vocab
            ))),
        }
    }

    /// The id of a special token, when there is one.
    pub fn token(&self, text: &str) -> Option<u32> {
        self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.token_to_id(text))
    }
}

/// Weights of a run after `step` steps, flat, and the checkpoint that they are from; after 0 what the run begins with.
pub fn weights_at(
    store: &Store,
    config: &RunConfig,
    step: u64,
) -> Result<(Option<Manifest>, Layout, Tensor), Failure> {
    if step == 0 {
        let State { layout, weights, .. } = initial_state(config, Device::Cpu)?;
        return Ok((None, layout, weights));
    }
    let (manifest, layout, weights) = load_weights(store, step, &config.model)?;
    Ok((Some(manifest), layout, Tensor::from_slice(&weights)))
}

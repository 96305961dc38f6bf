//! Weights out.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anello_configs::{Dtype, Model};
use safetensors::View;
use safetensors::tensor::Dtype as Format;
use serde_json::{Value, json};

use super::{BOS, CONFIG_JSON, EOS, INDEX_JSON, PAD, SINGLE, Use, config_json};
use crate::error::{Error, Result};
use crate::params::{Entry, Layout};

/// What is written.
#[derive(Clone, Debug)]
pub struct Export<'a> {
    /// Sizes; `layers` may be fewer than the weights have, after an upcycling.
    pub model: &'a Model,
    /// How the weights are used.
    pub used: Use,
    /// Format of the tensors.
    pub dtype: Dtype,
    /// Size of a file of weights at most, bytes, unless one tensor is larger.
    pub shard_bytes: u64,
    /// Text of `tokenizer.json`.
    pub tokenizer: Option<&'a [u8]>,
    /// Text of `README.md`.
    pub readme: &'a str,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// Files of weights.
    pub shards: usize,
    /// Tensors.
    pub tensors: usize,
    /// Bytes of the tensors.
    pub bytes: u64,
}

/// Writes `weights`, the flat buffer of `layout`, as the folder `to`: whole, or not at all.
///
/// # Errors
/// [`Error::Config`] when there is something at `to`; [`Error::File`].
pub fn export(to: &Path, layout: &Layout, weights: &[f32], what: &Export<'_>) -> Result<Exported> {
    if to.exists() {
        return Err(Error::config(format!("{} is there already", to.display()), "give a folder that is not"));
    }
    let name = to.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let beside = to.with_file_name(format!(".{name}.partial-{}", std::process::id()));
    let written = write(&beside, layout, weights, what).and_then(|exported| {
        fs::rename(&beside, to).map_err(Error::file("renaming", &beside))?;
        Ok(exported)
    });
    if written.is_err() {
        // What could be written is of no use; that it cannot be removed is not what went wrong.
        let _ = fs::remove_dir_all(&beside);
    }
    written
}

fn write(folder: &Path, layout: &Layout, weights: &[f32], what: &Export<'_>) -> Result<Exported> {
    fs::create_dir_all(folder).map_err(Error::file("making", folder))?;
    let text = |name: &str, text: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, text).map_err(Error::file("writing", &path))
    };
    let pretty = |value: &Value| format!("{value:#}\n").into_bytes();

    let model = Model { layers: layout.layers() as u32, ..what.model.clone() };
    let dtype = if what.dtype == Dtype::Bf16 { "bfloat16" } else { "float32" };
    text(CONFIG_JSON, &pretty(&config_json(&model, &what.used, dtype)))?;
    let shards = shards(layout, what);
    let (mut map, mut total) = (BTreeMap::new(), 0);
    for (at, entries) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => SINGLE.to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", at + 1),
        };
        let tensors = entries.iter().map(|entry| {
            map.insert(entry.name.clone(), name.clone());
            let tensor = Written::of(entry, weights, what.dtype);
            total += tensor.data_len() as u64;
            (entry.name.as_str(), tensor)
        });
        let path = folder.join(&name);
        // One key: several would be written in the random order of a hash map.
        let format = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
        safetensors::serialize_to_file(tensors.collect::<Vec<_>>(), Some(format), &path)
            .map_err(|cause| Error::file("writing", &path)(std::io::Error::other(cause.to_string())))?;
        // It was made for its maker's eyes only; the others are as the user's umask has them.
        let config = folder.join(CONFIG_JSON);
        let permissions = fs::metadata(&config).map_err(Error::file("reading", &config))?.permissions();
        fs::set_permissions(&path, permissions).map_err(Error::file("writing", &path))?;
    }
    if shards.len() > 1 {
        text(INDEX_JSON, &pretty(&json!({ "metadata": { "total_size": total }, "weight_map": map })))?;
    }
    let ids = json!({ "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD });
    text("generation_config.json", &pretty(&ids))?;
    if let Some(tokenizer) = what.tokenizer {
        text("tokenizer.json", tokenizer)?;
        let special =
            json!({ "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>" });
        text("special_tokens_map.json", &pretty(&special))?;
        let mut config = special;
        config["tokenizer_class"] = json!("PreTrainedTokenizerFast");
        config["model_max_length"] = json!(what.used.positions);
        config["clean_up_tokenization_spaces"] = json!(false);
        text("tokenizer_config.json", &pretty(&config))?;
    }
    text("README.md", what.readme.as_bytes())?;
    Ok(Exported { shards: shards.len(), tensors: layout.entries().len(), bytes: total })
}

/// The tensors of each file, in the order of the layout.
fn shards<'a>(layout: &'a Layout, what: &Export<'_>) -> Vec<Vec<&'a Entry>> {
    let mut shards: Vec<Vec<&Entry>> = vec![Vec::new()];
    let mut bytes = 0;
    for entry in layout.entries() {
        let size = (entry.len() * width(what.dtype)) as u64;
        if bytes > 0 && bytes + size > what.shard_bytes {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        shards.last_mut().expect("there is one from the start").push(entry);
    }
    shards
}

/// Bytes of a number.
fn width(dtype: Dtype) -> usize {
    if dtype == Dtype::Bf16 { 2 } else { 4 }
}

/// A tensor on its way to a file, converted when its turn comes.
struct Written<'a> {
    shape: Vec<usize>,
    values: &'a [f32],
    dtype: Dtype,
}

impl<'a> Written<'a> {
    fn of(entry: &Entry, weights: &'a [f32], dtype: Dtype) -> Self {
        let shape = entry.shape.iter().map(|size| *size as usize).collect();
        Self { shape, values: &weights[entry.range()], dtype }
    }
}

impl View for Written<'_> {
    fn dtype(&self) -> Format {
        if self.dtype == Dtype::Bf16 { Format::BF16 } else { Format::F32 }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let bytes: Vec<u8> = match self.dtype {
            Dtype::Bf16 => self.values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
            Dtype::Fp32 => self.values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.values.len() * width(self.dtype)
    }
}

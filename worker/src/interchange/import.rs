//! Weights in. Nothing of a folder is believed before it was checked, and all that is wrong is said at once.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Range, RangeInclusive};

use anello_configs::Model;
use anello_store::{Fetched, Store};
use safetensors::tensor::{Dtype as Format, Metadata, TensorInfo};
use serde_json::{Map, Value};

use super::{CONFIG_JSON, INDEX_JSON, SINGLE, Use, sizes};
use crate::error::{Error, Result};
use crate::params::{Entry, Layout};

/// Problems that are told of one by one: more than any model that there is has tensors.
const SHOWN: usize = 1000;
/// Longest table of a file of weights, bytes: what the format allows.
const TABLE_MAX: u64 = 100_000_000;
/// Bytes of a tensor that are read at a time, a whole number of elements of any format.
const PIECE: u64 = 32 << 20;
/// Longest sequence of a stage, tokens.
const POSITIONS_MAX: f64 = (1u64 << 24) as f64;

/// Whether `store` is such a folder.
pub fn is_published_layout(store: &Store) -> Result<bool> {
    Ok(store.get(CONFIG_JSON)?.is_some())
}

/// The sizes that the folder's `config.json` gives.
///
/// # Errors
/// [`Error::Config`] when it is no config of an Ouro model, or a size is missing or beyond what a run config allows.
pub fn published_model(store: &Store) -> Result<Model> {
    let config = config(store)?;
    let mut problems = Vec::new();
    let mut count = |key: &str, max: u64| match config.get(key).and_then(Value::as_u64) {
        Some(value @ 1..) if value <= max => value as u32,
        _ => {
            let found = config.get(key).map_or("missing".to_owned(), Value::to_string);
            problems.push(format!("{CONFIG_JSON}: {key} is {found}; a whole number up to {max} is wanted"));
            1
        }
    };
    let heads = count("num_attention_heads", 4096);
    let kv_heads =
        if config.contains_key("num_key_value_heads") { count("num_key_value_heads", 4096) } else { heads };
    let mut model = Model {
        layers: count("num_hidden_layers", 4096),
        hidden: count("hidden_size", 1 << 20),
        heads,
        kv_heads,
        ffn: count("intermediate_size", 1 << 24),
        vocab: count("vocab_size", 1 << 24),
        rms_eps: config.get("rms_norm_eps").and_then(Value::as_f64).unwrap_or(1e-6),
        init_std: 0.02,
        embed_std: 0.02,
        post_norm: 1.0,
    };
    // Of how they are used all is said now, too: nobody wants to hear of it after the weights were read.
    let used = usage(&config, &mut problems);
    (model.init_std, model.embed_std) = (used.init_std, used.init_std);
    if !(model.rms_eps > 0.0 && model.rms_eps <= 0.01) {
        let found = model.rms_eps;
        problems
            .push(format!("{CONFIG_JSON}: rms_norm_eps is {found}; a number above 0, up to 0.01, is wanted"));
    }
    if problems.is_empty() && (!model.hidden.is_multiple_of(2 * heads) || !heads.is_multiple_of(kv_heads)) {
        problems.push(format!(
            "{CONFIG_JSON}: hidden_size {} does not divide into {heads} heads of {kv_heads} keys",
            model.hidden
        ));
    }
    check_sizes(&config, &model, &mut problems);
    if problems.is_empty() { Ok(model) } else { Err(wrong(store, problems)) }
}

/// How the folder says that its weights are used; what it does not say is as in the published models.
///
/// # Errors
/// As [`published_model`].
pub fn published_use(store: &Store) -> Result<Use> {
    let mut problems = Vec::new();
    let used = usage(&config(store)?, &mut problems);
    if problems.is_empty() { Ok(used) } else { Err(wrong(store, problems)) }
}

/// As a stage of a run may have them: what is beyond has no meaning, or takes for ever.
fn usage(config: &Map<String, Value>, problems: &mut Vec<String>) -> Use {
    let mut number = |key: &str, default: f64, accepted: &str, accepts: &dyn Fn(f64) -> bool| {
        let Some(found) = config.get(key).filter(|found| !found.is_null()) else { return default };
        found.as_f64().filter(|value| accepts(*value)).unwrap_or_else(|| {
            problems.push(format!("{CONFIG_JSON}: {key} is {found}; {accepted} is wanted"));
            default
        })
    };
    let whole = |range: RangeInclusive<f64>| move |value: f64| value.fract() == 0.0 && range.contains(&value);
    let positions = whole(2.0..=POSITIONS_MAX);
    Use {
        loops: number("total_ut_steps", 4.0, "a whole number, 1 to 64,", &whole(1.0..=64.0)) as u32,
        rope_base: number("rope_theta", 10_000.0, "a number, 2 to 1e12,", &|v| (2.0..=1e12).contains(&v)),
        positions: number("max_position_embeddings", 32_768.0, "a whole number, 2 to 16777216,", &positions)
            as u32,
        init_std: number("initializer_range", 0.02, "a number above 0, up to 1,", &|v| v > 0.0 && v <= 1.0),
    }
}

/// The flat weights of a model of `model`'s sizes, and their layout. The folder may have fewer layers, of which `model`'s
/// are a multiple: the layout is then the folder's.
///
/// # Errors
/// [`Error::Config`] with every key, name, shape and format that is not as it should be; [`Error::Store`].
pub fn read(store: &Store, model: &Model) -> Result<(Layout, Vec<f32>)> {
    let config = config(store)?;
    let mut problems = Vec::new();
    let layers = check_sizes(&config, model, &mut problems);
    let layout = Layout::new(model, layers);
    let files = files(store, &layout, &mut problems)?;
    // The sizes are anybody's claim: they are given memory once there are files that can hold so much.
    let fits = can_hold(store, &layout, files.keys(), &mut problems)?;
    let mut missing: BTreeSet<&str> = layout.entries().iter().map(|entry| entry.name.as_str()).collect();
    let mut found = Vec::new();
    for (file, named) in &files {
        let Some(size) = store.size(file)? else {
            problems.push(format!("{file} is missing"));
            continue;
        };
        let tensors = match table(store, file, size)? {
            Ok(tensors) => tensors,
            Err(cause) => {
                problems.push(format!("{file} is no safetensors: {cause}"));
                continue;
            }
        };
        for Told { name, info, bytes } in tensors {
            match layout.find(&name) {
                Some(entry) if named.as_ref().is_none_or(|named| named.contains(&name)) => {
                    missing.remove(entry.name.as_str());
                    match check(entry, &info) {
                        Ok(()) => found.push((file, entry.range(), info.dtype, bytes)),
                        Err(fact) => problems.push(format!("{name} in {file} {fact}")),
                    }
                }
                Some(_) => problems.push(format!("{name} is in {file}, which the index does not say")),
                None => problems.push(format!("{name} in {file} is no tensor of this model")),
            }
        }
    }
    problems.extend(missing.into_iter().map(|name| format!("{name} is missing")));
    if !(problems.is_empty() && fits) {
        return Err(wrong(store, problems));
    }
    let mut weights = vec![0f32; layout.len()];
    for (file, range, format, bytes) in found {
        let width = (bytes.end - bytes.start) / range.len() as u64;
        let mut out = &mut weights[range];
        for start in bytes.clone().step_by(PIECE as usize) {
            let piece = start..bytes.end.min(start + PIECE);
            let (now, rest) = out.split_at_mut(((piece.end - piece.start) / width) as usize);
            store.ranges(file, &[piece])?.iter().for_each(|bytes| convert(format, bytes, now));
            out = rest;
        }
    }
    Ok((layout, weights))
}

/// A tensor as the table of its file tells of it, and where its bytes lie in the file.
struct Told {
    name: String,
    info: TensorInfo,
    bytes: Range<u64>,
}

/// The tensors of `file`, which has `size` bytes, in the order of their names, or what is wrong with its table. Nothing but the table
/// is read, and no more than [`TABLE_MAX`] of it, whatever it claims: a file may be large and hold nothing.
fn table(store: &Store, file: &str, size: u64) -> Result<std::result::Result<Vec<Told>, String>> {
    const LENGTH: u64 = 8;
    if size < LENGTH {
        return Ok(Err(format!("it has {size} bytes")));
    }
    let range = |range: Range<u64>| store.ranges(file, std::slice::from_ref(&range));
    let head = range(0..LENGTH)?;
    let length = head[0].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    if length == 0 || length > TABLE_MAX.min(size - LENGTH) {
        return Ok(Err(format!("it has {size} bytes, and a table of {length}")));
    }
    let start = LENGTH + length;
    let text = range(LENGTH..start)?;
    let told: Metadata = match serde_json::from_slice(&text[0]) {
        Ok(told) => told,
        Err(cause) => return Ok(Err(cause.to_string())),
    };
    let mut tensors: Vec<(String, TensorInfo)> =
        told.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
    tensors.sort_unstable_by_key(|(_, info)| info.data_offsets);
    let mut end = 0;
    for (name, TensorInfo { dtype, shape, data_offsets: (from, to) }) in &tensors {
        let elements = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
        let bits = elements.and_then(|elements| elements.checked_mul(dtype.bitsize()));
        let taken = to.checked_sub(*from).and_then(|bytes| bytes.checked_mul(8));
        if *from != end || bits.is_none() || bits != taken {
            return Ok(Err(format!(
                "{name} is {dtype:?} {shape:?} in the bytes {from} to {to}, after {end}"
            )));
        }
        end = *to;
    }
    if start.checked_add(end as u64) != Some(size) {
        return Ok(Err(format!("it has {size} bytes, and its table tells of {end} after {start}")));
    }
    // Problems are told in one order, whatever that of the file's table.
    tensors.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
    let place = |(name, info): (String, TensorInfo)| {
        let (from, to) = info.data_offsets;
        Told { name, bytes: start + from as u64..start + to as u64, info }
    };
    Ok(Ok(tensors.into_iter().map(place).collect()))
}

fn wrong(store: &Store, mut problems: Vec<String>) -> Error {
    if let more @ 1.. = problems.len().saturating_sub(SHOWN) {
        problems.truncate(SHOWN);
        problems.push(format!("… and {more} more"));
    }
    let fact = format!("{} cannot be used:\n  {}", store.place(), problems.join("\n  "));
    Error::config(fact, "give the folder of an Ouro checkpoint with the sizes of the config's model")
}

fn config(store: &Store) -> Result<Map<String, Value>> {
    let text =
        store.get(CONFIG_JSON)?.ok_or_else(|| wrong(store, vec![format!("{CONFIG_JSON} is missing")]))?;
    serde_json::from_slice(&text)
        .map_err(|cause| wrong(store, vec![format!("{CONFIG_JSON} is no JSON object: {cause}")]))
}

/// Checks the keys of `config` one by one; returns the folder's number of layers.
fn check_sizes(config: &Map<String, Value>, model: &Model, problems: &mut Vec<String>) -> u32 {
    let mut layers = model.layers;
    for (key, ours) in sizes(model) {
        let Some(theirs) = config.get(key) else {
            // Written by newer versions only; it follows from the others unless it is said.
            if key != "head_dim" {
                problems.push(format!("{CONFIG_JSON}: {key} is missing"));
            }
            continue;
        };
        let same = match (theirs.as_f64(), ours.as_f64()) {
            (Some(theirs), Some(ours)) => theirs == ours,
            _ => *theirs == ours,
        };
        if key == "num_hidden_layers"
            && let Some(fewer @ 1..) = theirs.as_u64().and_then(|layers| u32::try_from(layers).ok())
            && model.layers.is_multiple_of(fewer)
        {
            layers = fewer;
        } else if !same {
            problems.push(format!("{CONFIG_JSON}: {key} is {theirs}; the config's model has {ours}"));
        }
    }
    for (key, plain) in [("rope_scaling", Value::Null), ("use_sliding_window", Value::Bool(false))] {
        if let Some(theirs) = config.get(key).filter(|theirs| **theirs != plain) {
            problems.push(format!("{CONFIG_JSON}: {key} is {theirs}, which this model does not have"));
        }
    }
    layers
}

/// The files of weights, and which tensors the index puts in each; all that are there when there is no index.
#[allow(clippy::type_complexity)]
fn files(
    store: &Store,
    layout: &Layout,
    problems: &mut Vec<String>,
) -> Result<BTreeMap<String, Option<BTreeSet<String>>>> {
    let Some(text) = store.get(INDEX_JSON)? else {
        return Ok(BTreeMap::from([(SINGLE.to_owned(), None)]));
    };
    let map = serde_json::from_slice::<Value>(&text).ok();
    let map = map.as_ref().and_then(|index| index.get("weight_map")).and_then(Value::as_object);
    let Some(map) = map else {
        problems.push(format!("{INDEX_JSON} has no weight_map of names to files"));
        return Ok(BTreeMap::new());
    };
    let mut files: BTreeMap<String, Option<BTreeSet<String>>> = BTreeMap::new();
    for (name, file) in map {
        match file.as_str() {
            Some(file) if is_plain(file) => {
                files.entry(file.to_owned()).or_default().get_or_insert_default().insert(name.clone());
            }
            _ => problems.push(format!("{INDEX_JSON}: {name} is in {file}, which is no file of this folder")),
        }
        if layout.find(name).is_none() {
            problems.push(format!("{INDEX_JSON}: {name} is no tensor of this model"));
        }
    }
    Ok(files)
}

/// Whether `files` are large enough for the tensors of `layout`, in the shortest format that is read; a problem otherwise.
/// Nothing of them is read.
fn can_hold<'a>(
    store: &Store,
    layout: &Layout,
    files: impl Iterator<Item = &'a String>,
    problems: &mut Vec<String>,
) -> Result<bool> {
    let mut held = 0u64;
    for file in files {
        if let Fetched::Other(bytes) = store.get_sized(file, |_| false)? {
            held = held.saturating_add(bytes);
        }
    }
    let (parameters, shortest) = (layout.parameters() as u64, 2);
    let fits = parameters.saturating_mul(shortest) <= held;
    if !fits {
        problems.push(format!(
            "{CONFIG_JSON} tells of {parameters} parameters, and the files of weights have {held} bytes"
        ));
    }
    Ok(fits)
}

/// Whether `file` names a safetensors file beside the index, and nothing elsewhere.
fn is_plain(file: &str) -> bool {
    let harmless = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    file.chars().all(harmless) && !file.starts_with('.') && file.ends_with(".safetensors")
}

/// Whether the tensor that `info` tells of is that of `entry`, in a format that is read.
fn check(entry: &Entry, info: &TensorInfo) -> std::result::Result<(), String> {
    let shape: Vec<i64> = info.shape.iter().map(|size| *size as i64).collect();
    if shape != entry.shape {
        return Err(format!("has the shape {shape:?}, not {:?}", entry.shape));
    }
    match info.dtype {
        Format::F32 | Format::BF16 | Format::F16 => Ok(()),
        other => Err(format!("is {other:?}; F32, BF16 and F16 are read")),
    }
}

/// Values of one of the formats that [`check`] lets pass.
fn convert(format: Format, bytes: &[u8], out: &mut [f32]) {
    let halves = bytes.as_chunks().0;
    match format {
        Format::BF16 => {
            out.iter_mut().zip(halves).for_each(|(v, b)| *v = half::bf16::from_le_bytes(*b).to_f32());
        }
        Format::F16 => {
            out.iter_mut().zip(halves).for_each(|(v, b)| *v = half::f16::from_le_bytes(*b).to_f32());
        }
        _ => out.iter_mut().zip(bytes.as_chunks().0).for_each(|(v, b)| *v = f32::from_le_bytes(*b)),
    }
}

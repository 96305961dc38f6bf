//! What a run begins with: the weights of its seed, or others that its config names (`init.from`).

use anello_configs::{Init, RunConfig};
use anello_store::checkpoint::{digest_of_blocks, split_name, steps};
use anello_store::{CONFIG, Store, read_config};
use tch::{Device, Tensor};

use crate::checkpoint::{block_digest, load_weights};
use crate::error::{Error, Result};
use crate::interchange;
use crate::optimizer::State;
use crate::params::{BLOCK, Layout};

/// Weights before the first step of `config`, moments at zero.
///
/// # Errors
/// [`Error::Config`] when what `init.from` names is not there, does not fit the model, or has changed since the run was
/// made; [`Error::Store`].
pub fn initial_state(config: &RunConfig, device: Device) -> Result<State> {
    let Some(init) = &config.init else { return Ok(State::of_seed(config, device)) };
    let (_, layout, weights) = weights_of(&init.from, config)?;
    let digest = digest(&weights);
    match &init.weights {
        Some(expected) if *expected != digest => {
            let fact = format!("{} has the weights {digest}; the run began with {expected}", init.from);
            Err(Error::config(fact, "bring those back, or begin a new run"))
        }
        _ => Ok(State::unmoved(layout, Tensor::from_slice(&weights).to_device(device))),
    }
}

/// Says in `config` which weights those of `init.from` are, so that the run is a function of its config: their digest,
/// and the step of the checkpoint that is meant.
///
/// # Errors
/// As [`initial_state`].
pub fn pin_init(config: &mut RunConfig) -> Result<()> {
    let Some(init) = &config.init else { return Ok(()) };
    let (from, layout, weights) = weights_of(&init.from, config)?;
    drop(layout);
    let found = digest(&weights);
    if let Some(expected) = init.weights.as_ref().filter(|expected| **expected != found) {
        let fact = format!("{from} has the weights {found}, and not init.weights = {expected}");
        return Err(Error::config(fact, "name the weights that are meant, or leave init.weights out"));
    }
    config.init = Some(Init { from, weights: Some(found) });
    Ok(())
}

/// The weights at `from` in the layout of the model of `config`, and the full name of where they are from.
fn weights_of(from: &str, config: &RunConfig) -> Result<(String, Layout, Vec<f32>)> {
    let (run, step) = split_name(from);
    let (name, layout, weights) = if let (Some(store), None) = (published(from)?, step) {
        let (layout, weights) = interchange::read(&store, &config.model)?;
        (from.to_owned(), layout, weights)
    } else {
        let store = Store::open(run)?;
        if store.get(CONFIG)?.is_none() {
            let fact = format!("init.from is {from}, which holds neither a run nor a published checkpoint");
            return Err(Error::config(fact, "give RUN, RUN@STEP, or a folder with config.json"));
        }
        let step = match step {
            Some(step) => step,
            None => steps(&store)?.last().copied().ok_or_else(|| {
                Error::config(format!("{run} has no checkpoint yet"), "begin from one that has, or wait")
            })?,
        };
        let theirs = read_config(&store)?.model;
        let same = |layers| anello_configs::Model {
            layers,
            init_std: 0.0,
            embed_std: 0.0,
            post_norm: 0.0,
            ..theirs.clone()
        };
        let ours =
            anello_configs::Model { init_std: 0.0, embed_std: 0.0, post_norm: 0.0, ..config.model.clone() };
        if same(ours.layers) != ours {
            let fact = format!(
                "the model of {run} has other sizes than the config's: {theirs:?}, {:?}",
                config.model
            );
            return Err(Error::config(fact, "only the number of layers may differ"));
        }
        let (_, layout, weights) = load_weights(&store, step, &theirs)?;
        (format!("{run}@{step}"), layout, weights)
    };
    let wanted = config.model.layers as usize;
    if layout.layers() == wanted {
        return Ok((name, layout, weights));
    }
    if !wanted.is_multiple_of(layout.layers()) {
        let fact = format!("{name} has {} layers, the config's model {wanted}", layout.layers());
        return Err(Error::config(fact, "give as many, or a multiple: the stack is then repeated"));
    }
    let larger = Layout::new(&config.model, config.model.layers);
    let spread = larger.upcycled(&layout, &Tensor::from_slice(&weights));
    let weights = Vec::<f32>::try_from(&spread).expect("a vector of f32");
    Ok((name, larger, weights))
}

/// The folder `place`, when it is in the published layout.
fn published(place: &str) -> Result<Option<Store>> {
    let store = Store::open(place)?;
    Ok(interchange::is_published_layout(&store)?.then_some(store))
}

/// Digest of flat weights, as in a manifest.
fn digest(weights: &[f32]) -> String {
    digest_of_blocks(&weights.chunks(BLOCK).map(block_digest).collect::<Vec<_>>())
}

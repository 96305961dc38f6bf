//! One micro-batch forward and backward.

use anello_configs::{Compute, Mask, Trains};
use anello_dataloader::MicroBatch;
use tch::{Kind, Tensor};

use crate::host;
use crate::model::{Context, Model, Rotary, Tokens};
use crate::objective::{self, Figures, Goal, LossSums};
use crate::tape::Tape;

/// A micro-batch of n tokens on its device.
#[derive(Debug)]
pub struct Inputs {
    /// Where each token is, and what it attends to.
    pub context: Context,
    /// Token ids, `[n]`.
    pub ids_n: Tensor,
    /// The token after each, `[n]`; −100 where there is none or it does not count.
    pub targets_n: Tensor,
}

impl Inputs {
    /// `batch` on the device of `rotary`, for matrices of format `kind`; `mask` says what its segments are.
    pub fn new(batch: &MicroBatch, rotary: &Rotary, kind: Kind, mask: Mask) -> Self {
        let on_device = |values: &[i64]| host::upload(values, rotary.device());
        Self {
            context: Context::new(batch, rotary, kind, mask),
            ids_n: on_device(&batch.input_ids),
            targets_n: on_device(&batch.targets),
        }
    }

    /// What `model` reads of it, and how many documents it is told of, where nothing else of it has a part in what is computed.
    pub(super) fn fixed(&self, model: &Model) -> Option<(Vec<&Tensor>, usize)> {
        let (tensors, documents) = self.context.fixed(model)?;
        Some((tensors.into_iter().chain([&self.ids_n, &self.targets_n]).collect(), documents))
    }

    /// The same in memory of its own.
    pub(super) fn copy(&self) -> Self {
        let Self { context, ids_n, targets_n } = self;
        Self { context: context.copy(), ids_n: ids_n.copy(), targets_n: targets_n.copy() }
    }
}

/// What a forward and backward depends on besides model and tokens.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// Loop steps (T).
    pub loops: u32,
    /// What is minimised, and what moves.
    pub goal: Goal,
    /// What is kept and the size of a loss chunk.
    pub compute: &'a Compute,
}

/// How far the way back through a micro-batch is, with what is known by then.
#[derive(Clone, Copy, Debug)]
pub(super) enum Walked<F> {
    /// The hidden states are known: what follows are the losses and the way back.
    Hidden,
    /// The loss sums are made, and the gradients of lm_head and gate are whole.
    Losses(F),
    /// That of this layer is whole.
    Layer(usize),
}

impl<F> Walked<F> {
    /// The same place, with something else known.
    pub fn map<G>(self, known: impl FnOnce(F) -> G) -> Walked<G> {
        match self {
            Self::Hidden => Walked::Hidden,
            Self::Losses(figures) => Walked::Losses(known(figures)),
            Self::Layer(layer) => Walked::Layer(layer),
        }
    }
}

/// Forward and backward of one micro-batch. Adds the gradient of the loss's sum to the flat `gradient` and returns the sums.
pub fn forward_backward(model: &Model, inputs: &Inputs, pass: Pass<'_>, gradient: &Tensor) -> LossSums {
    walk(model, inputs, pass, gradient, &mut |_| {}).read()
}

/// [`forward_backward`] that says how far it is.
pub(super) fn walk(
    model: &Model,
    inputs: &Inputs,
    pass: Pass<'_>,
    gradient: &Tensor,
    walked: &mut dyn FnMut(Walked<&Figures>),
) -> Figures {
    let Inputs { context, ids_n, targets_n } = inputs;
    let chunk = i64::from(pass.compute.loss_chunk_tokens);
    let forward = tracing::trace_span!("forward").entered();
    let embedded_nd = tch::no_grad(|| model.embed_nd(ids_n));
    if pass.goal.trains == Trains::Gate {
        let hidden = hidden(model, context, embedded_nd, pass.loops);
        drop(forward);
        walked(Walked::Hidden);
        let _losses = tracing::trace_span!("losses").entered();
        let (figures, _) = objective::backward(model, &hidden, targets_n, pass.goal, chunk, gradient);
        walked(Walked::Losses(&figures));
        return figures;
    }
    let (hidden, tape) = Tape::forward(model, context, embedded_nd, pass.loops, pass.compute);
    drop(forward);
    walked(Walked::Hidden);
    let losses = tracing::trace_span!("losses").entered();
    let (figures, of_hidden) = objective::backward(model, &hidden, targets_n, pass.goal, chunk, gradient);
    let of_hidden = of_hidden.expect("all parameters move");
    drop((hidden, losses));
    walked(Walked::Losses(&figures));
    let of_embedded_nd = tape.backward(of_hidden, gradient, &mut |layer| walked(Walked::Layer(layer)));
    let of_embedded_nd = of_embedded_nd.to_kind(model.wide());
    let of_table =
        Tensor::embedding_dense_backward(&of_embedded_nd, ids_n, model.embed.value.size()[0], -1, false);
    model.embed.accumulate(gradient, &of_table);
    figures
}

/// h(1..=T), `[n, d]` each, of which no graph is kept.
pub(crate) fn hidden(model: &Model, tokens: &dyn Tokens, embedded_nd: Tensor, loops: u32) -> Vec<Tensor> {
    tch::no_grad(|| {
        let mut h = embedded_nd;
        (0..loops)
            .map(|_| {
                h = (0..model.layers.len()).fold(h.shallow_clone(), |h, l| model.layer_nd(l, &h, tokens));
                h.shallow_clone()
            })
            .collect()
    })
}

//! Small models, micro-batches and data sets for the tests.

use anello_configs::{
    Compute, ComputeDevice, Dtype, Loss, Mask, Model as Sizes, Recompute, Trains, random::Stream,
};
use anello_dataloader::MicroBatch;
use anello_worker::{Context, Goal, Inputs, Layout, LossSums, Model, Pass, Rotary, forward_backward};
use tch::{Device, Kind, Tensor};

pub fn sizes() -> Sizes {
    Sizes {
        layers: 2,
        hidden: 32,
        heads: 4,
        kv_heads: 4,
        ffn: 48,
        vocab: 61,
        rms_eps: 1e-6,
        init_std: 0.3,
        embed_std: 0.3,
        post_norm: 1.0,
    }
}

pub fn compute(recompute: Recompute, loss_chunk_tokens: u32) -> Compute {
    let device = ComputeDevice::Cpu;
    Compute {
        device,
        dtype: Dtype::Fp32,
        recompute,
        offload: false,
        fused: false,
        graphs: false,
        loss_chunk_tokens,
        threads: None,
    }
}

/// Documents of these lengths, one after the other, in rows of `length` tokens. `ignored(token)` has no target.
pub fn micro_batch(length: u32, documents: &[u32], vocab: u32, ignored: impl Fn(u32) -> bool) -> MicroBatch {
    let tokens: u32 = documents.iter().sum();
    assert_eq!(tokens % length, 0, "whole rows");
    let stream = Stream::new(11, "tokens", &[u64::from(tokens)]);
    let ids: Vec<i64> = (0..tokens).map(|i| stream.below_at(u64::from(i), u64::from(vocab)) as i64).collect();
    let ends: Vec<u32> = documents
        .iter()
        .scan(0, |at, len| {
            Some({
                *at += len;
                *at
            })
        })
        .collect();
    let mut batch = MicroBatch {
        sequences: tokens / length,
        length,
        input_ids: ids.clone(),
        targets: Vec::new(),
        positions: Vec::new(),
        segment_starts: Vec::new(),
        counted: 0,
    };
    for at in 0..tokens {
        let last_of_document = ends.contains(&(at + 1));
        let target = if last_of_document || ignored(at) { -100 } else { ids[at as usize + 1] };
        batch.counted += u64::from(target != -100);
        batch.targets.push(target);
        if at % length == 0 || ends.contains(&at) {
            batch.segment_starts.push(at);
        }
        batch.positions.push((at - batch.segment_starts.last().unwrap()) as i32);
    }
    batch
}

/// A model with weights of its own, in `kind` (f32 or f64).
pub struct Fixture {
    pub layout: Layout,
    pub flat: Tensor,
    pub model: Model,
    pub rotary: Rotary,
    pub sizes: Sizes,
}

impl Fixture {
    pub fn new(sizes: Sizes, kind: Kind, dtype: Dtype) -> Self {
        let layout = Layout::new(&sizes, sizes.layers);
        let flat = layout.initial(3, Device::Cpu).to_kind(kind);
        // Norms that are not one and a gate bias that is not zero, so that nothing is hidden by a neutral value.
        for (at, entry) in layout.entries().iter().enumerate() {
            if entry.name.contains("norm") || entry.name.ends_with("bias") {
                let values = flat.narrow(0, entry.offset as i64, entry.len() as i64);
                let stream = Stream::new(5, "jitter", &[at as u64]);
                let jitter: Vec<f64> =
                    (0..entry.len()).map(|i| 0.4 * (stream.unit_at(i as u64) - 0.5)).collect();
                let _ = values.shallow_clone().g_add_(&Tensor::from_slice(&jitter).to_kind(kind));
            }
        }
        let model = Model::new(&sizes, dtype, &layout, &flat);
        let rotary = Rotary::new(10_000.0, i64::from(sizes.hidden / sizes.heads), 256, Device::Cpu);
        Self { layout, flat, model, rotary, sizes }
    }

    pub fn context(&self, batch: &MicroBatch, mask: Mask) -> Context {
        Context::new(batch, &self.rotary, self.model.kind(), mask)
    }

    pub fn pass(&self, batch: &MicroBatch, compute: &Compute, loops: u32, beta: f64) -> (LossSums, Tensor) {
        self.pass_for(batch, compute, loops, Goal { loss: Loss::Loop, beta, trains: Trains::All })
    }

    pub fn pass_for(
        &self,
        batch: &MicroBatch,
        compute: &Compute,
        loops: u32,
        goal: Goal,
    ) -> (LossSums, Tensor) {
        let gradient = self.layout.zeros(Device::Cpu).to_kind(self.flat.kind());
        let inputs = Inputs::new(batch, &self.rotary, self.model.kind(), Mask::Document);
        let pass = Pass { loops, goal, compute };
        (forward_backward(&self.model, &inputs, pass, &gradient), gradient)
    }

    /// h(1..=T) by the plain recurrence.
    pub fn hidden(&self, batch: &MicroBatch, loops: u32) -> Vec<Tensor> {
        let context = self.context(batch, Mask::Document);
        let mut h = self.model.embed_nd(&Tensor::from_slice(&batch.input_ids));
        let mut all = Vec::new();
        for _ in 0..loops {
            for layer in 0..self.model.layers.len() {
                h = self.model.layer_nd(layer, &h, &context);
            }
            all.push(h.shallow_clone());
        }
        all
    }

    pub fn of(&self, flat: &Tensor, name: &str) -> Tensor {
        let entry = self.layout.find(name).unwrap();
        flat.narrow(0, entry.offset as i64, entry.len() as i64).view(entry.shape.as_slice())
    }
}

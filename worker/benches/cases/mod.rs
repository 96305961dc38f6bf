//! What the benches of this crate train.

use anello_configs::{Mask, RunConfig, random::Stream};
use anello_dataloader::{Document, MicroBatch, Packer};

/// Loop steps (T).
pub const LOOPS: u32 = 4;
/// Weight of the entropy.
pub const BETA: f64 = 0.1;

/// A model, and the batch of a step: `lanes` micro-batches of `sequences` × `sequence` tokens.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub name: &'static str,
    pub layers: u32,
    pub hidden: u32,
    pub ffn: u32,
    pub vocab: u32,
    pub sequence: u32,
    pub sequences: u32,
    pub lanes: u32,
}

pub const CASES: [Case; 5] = [
    Case {
        name: "tiny-128",
        layers: 2,
        hidden: 128,
        ffn: 352,
        vocab: 2048,
        sequence: 128,
        sequences: 16,
        lanes: 1,
    },
    Case {
        name: "tiny-512",
        layers: 2,
        hidden: 128,
        ffn: 352,
        vocab: 2048,
        sequence: 512,
        sequences: 4,
        lanes: 1,
    },
    Case {
        name: "d256",
        layers: 4,
        hidden: 256,
        ffn: 704,
        vocab: 4096,
        sequence: 512,
        sequences: 4,
        lanes: 1,
    },
    // Of a ring: one micro-batch a lane.
    Case {
        name: "ring",
        layers: 4,
        hidden: 256,
        ffn: 704,
        vocab: 4096,
        sequence: 512,
        sequences: 1,
        lanes: 4,
    },
    // Where logits matter: all of them at once are 512 MiB.
    Case {
        name: "memory",
        layers: 4,
        hidden: 256,
        ffn: 704,
        vocab: 16384,
        sequence: 2048,
        sequences: 1,
        lanes: 1,
    },
];

impl Case {
    /// The case called `name`.
    pub fn named(name: &str) -> Self {
        *CASES.iter().find(|case| case.name == name).unwrap_or_else(|| fail(&format!("no case {name}")))
    }

    /// Its run.
    pub fn config(&self, recompute: &str, threads: u32) -> RunConfig {
        let Case { name, layers, hidden, ffn, vocab, sequence, sequences, lanes } = *self;
        let batch = lanes * sequences * sequence;
        let text = format!(
            "name = \"bench-{name}\"\nseed = 1\nlanes = {lanes}\nstages = [\"all\"]\n\
             [model]\nlayers = {layers}\nhidden = {hidden}\nheads = 4\nffn = {ffn}\nvocab = {vocab}\n\
             [compute]\ndtype = \"fp32\"\nrecompute = \"{recompute}\"\nthreads = {threads}\n\
             [data]\nsources.none.url = \"none\"\n\
             [stage.all]\ntokens = {}\nsequence = {sequence}\nbatch = {batch}\nmicro_batch = {sequences}\n\
             lr_curve = \"constant\"\nlr = 1e-3\nloops = {LOOPS}\nbeta = {BETA}\nrope_base = 10_000\n\
             mixture = {{ none = 1 }}\n",
            u64::from(batch) * 1_000_000
        );
        RunConfig::parse("bench.toml", &text).unwrap_or_else(|e| fail(&e.to_string()))
    }

    /// The micro-batch of each lane: documents of log-normal lengths (median 400 tokens), packed.
    pub fn batches(&self) -> Vec<MicroBatch> {
        let mut documents = (0u64..).map(|at| {
            let stream = Stream::new(1, "bench", &[at]);
            let length = (f64::from(stream.normals_at(0)[0]) + 400f64.ln()).exp().clamp(8.0, 16384.0) as u64;
            (0..length).map(|i| stream.below_at(4 + i, u64::from(self.vocab)) as i32).collect::<Vec<_>>()
        });
        let (mut tokens, mut from) = (Vec::new(), 0);
        (0..self.lanes)
            .map(|_| {
                let mut packer = Packer::new(self.sequences, self.sequence, Mask::Document);
                while packer.room() > 0 {
                    if from == tokens.len() {
                        (tokens, from) = (documents.next().expect("documents never end"), 0);
                    }
                    from += packer.push(Document { tokens: &tokens, counted: None }, from);
                }
                packer.finish()
            })
            .collect()
    }
}

pub fn fail(said: &str) -> ! {
    eprintln!("bench: {said}");
    std::process::exit(2)
}

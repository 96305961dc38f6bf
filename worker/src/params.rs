//! Parameters: one flat fp32 buffer, the names in it, and the blocks it is cut into.
//!
//! ```text
//! | embed | layer 0: q k v o gate up down | layer 1 … | lm_head | pad | norms … final norm, gate w, gate b | pad |
//! |<---------------------- decayed: whole blocks ---------------------->|<------ not decayed: whole blocks ----->|
//! ```
//!
//! A block is [`BLOCK`] elements: the unit of the gradient norm, of digests, of ownership and of checkpoints. The
//! order puts q, k, v side by side, and gate, up, so that one matrix multiplication serves each group. Names and
//! shapes are those of the published Ouro checkpoints (LOOPLM §7).

use std::ops::Range;

use anello_configs::{Loss, Model, Trains, random::Stream};
pub use anello_store::checkpoint::BLOCK;
use tch::{Device, Kind, Tensor};

/// How a tensor starts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Init {
    /// Normal around 0 with this standard deviation.
    Normal(f64),
    Constant(f64),
}

/// A named tensor's place in the flat buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Name in the published layout.
    pub name: String,
    /// Shape, row-major.
    pub shape: Vec<i64>,
    /// First element in the flat buffer.
    pub offset: usize,
    init: Init,
}

impl Entry {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    /// True for a tensor of no elements, which no layout has.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where it lies in the flat buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// Where every tensor of a model lies in the flat buffer: a function of the sizes alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    entries: Vec<Entry>,
    decayed_len: usize,
    len: usize,
    layers: usize,
}

impl Layout {
    /// The layout of `model` with `layers` layers (which upcycling may have changed).
    pub fn new(model: &Model, layers: u32) -> Self {
        let (d, f, v) = (i64::from(model.hidden), i64::from(model.ffn), i64::from(model.vocab));
        let kv = d / i64::from(model.heads) * i64::from(model.kv_heads);
        let matrix = Init::Normal(model.init_std);
        let mut layout = Self { entries: Vec::new(), decayed_len: 0, len: 0, layers: layers as usize };
        layout.push("model.embed_tokens.weight", &[v, d], Init::Normal(model.embed_std));
        for l in 0..layers {
            for (part, shape) in [
                ("self_attn.q_proj", [d, d]),
                ("self_attn.k_proj", [kv, d]),
                ("self_attn.v_proj", [kv, d]),
                ("self_attn.o_proj", [d, d]),
                ("mlp.gate_proj", [f, d]),
                ("mlp.up_proj", [f, d]),
                ("mlp.down_proj", [d, f]),
            ] {
                layout.push(&format!("model.layers.{l}.{part}.weight"), &shape, matrix);
            }
        }
        layout.push("lm_head.weight", &[v, d], matrix);
        layout.pad();
        layout.decayed_len = layout.len;
        for l in 0..layers {
            for (norm, weight) in NORMS.into_iter().zip([1.0, model.post_norm, 1.0, model.post_norm]) {
                layout.push(&format!("model.layers.{l}.{norm}.weight"), &[d], Init::Constant(weight));
            }
        }
        layout.push("model.norm.weight", &[d], Init::Constant(1.0));
        layout.push("model.early_exit_gate.weight", &[1, d], matrix);
        layout.push("model.early_exit_gate.bias", &[1], Init::Constant(0.0));
        layout.pad();
        layout
    }

    fn push(&mut self, name: &str, shape: &[i64], init: Init) {
        let entry = Entry { name: name.to_owned(), shape: shape.to_vec(), offset: self.len, init };
        self.len += entry.len();
        self.entries.push(entry);
    }

    fn pad(&mut self) {
        self.len = self.len.next_multiple_of(BLOCK);
    }

    /// Elements of the flat buffer, padding included: a whole number of blocks.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a layout of no elements, which no model has.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.len / BLOCK
    }

    /// Leading elements that weight decay applies to: a whole number of blocks.
    pub fn decayed_len(&self) -> usize {
        self.decayed_len
    }

    /// Layers in the stack.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Every named tensor, in the order of the buffer.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The elements that a stage moves: with the language model frozen the gate, when fine-tuning all but the gate.
    pub fn moved(&self, trains: Trains, loss: Loss) -> Range<usize> {
        let gate = self.find("model.early_exit_gate.weight").expect("the layout has a gate").offset;
        let end = self.entries.last().expect("the layout has a gate").range().end;
        match (trains, loss) {
            (Trains::Gate, _) => gate..end,
            (Trains::All, Loss::Sft) => 0..gate,
            (Trains::All, _) => 0..self.len,
        }
    }

    /// The blocks whose gradient becomes whole on the way back through the first loop step, which is the last to be
    /// walked: after the losses, after each layer from the last to the first, then norms and gate, then the embedding. With the
    /// language model frozen it is the gate's alone, after the losses.
    pub fn backward_blocks(&self, trains: Trains) -> Vec<Range<usize>> {
        if trains == Trains::Gate {
            let gate = self.moved(trains, Loss::Gate);
            let blocks = gate.start / BLOCK..gate.end.div_ceil(BLOCK);
            return Vec::from([blocks]);
        }
        let start = |name: &str| self.find(name).expect("the layout has every part of the model").offset;
        let layers = (0..self.layers).rev().map(|l| format!("model.layers.{l}.self_attn.q_proj.weight"));
        let mut until = self.decayed_len / BLOCK;
        let descending = ["lm_head.weight".to_owned()].into_iter().chain(layers).map(|first| {
            let blocks = start(&first).div_ceil(BLOCK)..until;
            until = blocks.start;
            blocks
        });
        let mut whole: Vec<Range<usize>> = descending.collect();
        whole.extend([self.decayed_len / BLOCK..self.blocks(), 0..until]);
        whole
    }

    /// Parameters without padding.
    pub fn parameters(&self) -> usize {
        self.entries.iter().map(Entry::len).sum()
    }

    /// The entry called `name`, if there is one.
    pub fn find(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// The names whose tensors share elements with `block`.
    pub fn names_in(&self, block: usize) -> impl Iterator<Item = &str> {
        let (start, end) = (block * BLOCK, (block + 1) * BLOCK);
        self.entries.iter().filter(move |e| e.offset < end && e.range().end > start).map(|e| e.name.as_str())
    }

    /// The tensor that element `at` of the buffer belongs to, and where it is in it; absent for padding.
    pub fn place_of(&self, at: usize) -> Option<(String, Vec<usize>)> {
        let entry = self.entries.iter().find(|entry| entry.range().contains(&at))?;
        let mut rest = at - entry.offset;
        let mut index: Vec<usize> = entry
            .shape
            .iter()
            .rev()
            .map(|&size| {
                let here = rest % size as usize;
                rest /= size as usize;
                here
            })
            .collect();
        index.reverse();
        Some((entry.name.clone(), index))
    }

    /// Whether every tensor has the same name, shape and place in `other`, however it started.
    pub fn has_places_of(&self, other: &Self) -> bool {
        let places = |layout: &Self| -> Vec<(String, Vec<i64>, usize)> {
            layout.entries.iter().map(|e| (e.name.clone(), e.shape.clone(), e.offset)).collect()
        };
        self.len == other.len && places(self) == places(other)
    }

    /// A new flat buffer with the initial weights: each a function of (seed, its name, its shape) alone.
    ///
    /// Matrices are normal with `init_std`, the embedding with `embed_std`; the norms after a sub-layer start at
    /// `post_norm`, the other norms at one, the gate's bias at zero (LOOPLM §1 where those keys have their defaults).
    pub fn initial(&self, seed: u64, device: Device) -> Tensor {
        let mut values = vec![0f32; self.len];
        for entry in &self.entries {
            let out = &mut values[entry.range()];
            match entry.init {
                Init::Constant(value) => out.fill(value as f32),
                Init::Normal(std) => {
                    let stream = Stream::new(seed, &format!("init/{}", entry.name), &[]);
                    draw_normals(stream, std as f32, out);
                }
            }
        }
        Tensor::from_slice(&values).to_device(device)
    }

    /// A flat buffer of zeros.
    pub fn zeros(&self, device: Device) -> Tensor {
        Tensor::zeros([self.len as i64], (Kind::Float, device))
    }

    /// `flat` of layout `from` (fewer layers) spread over this layout: layer `l` is a copy of layer `l mod L_from`
    /// (LOOPLM §5, upcycling). Works for weights and for moments.
    pub fn upcycled(&self, from: &Layout, flat: &Tensor) -> Tensor {
        let out = self.zeros(flat.device());
        for entry in &self.entries {
            let source = match layer_of(&entry.name) {
                Some((layer, rest)) => format!("model.layers.{}.{rest}", layer % from.layers),
                None => entry.name.clone(),
            };
            let source = from.find(&source).expect("both layouts have the same parts");
            let values = flat.narrow(0, source.offset as i64, source.len() as i64);
            out.narrow(0, entry.offset as i64, entry.len() as i64).copy_(&values);
        }
        out
    }
}

/// Fills `out` with what `stream` draws, of this standard deviation, by several threads: four values are one draw, whoever makes it.
fn draw_normals(stream: Stream, std: f32, out: &mut [f32]) {
    const SERIAL_MAX: usize = 1 << 16;
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let share = out.len().div_ceil(threads).next_multiple_of(4).max(SERIAL_MAX);
    let draw = |first: usize, out: &mut [f32]| {
        for (index, four) in (first as u64 / 4..).zip(out.chunks_mut(4)) {
            for (value, normal) in four.iter_mut().zip(stream.normals_at(index)) {
                *value = normal * std;
            }
        }
    };
    std::thread::scope(|scope| {
        let mut shares = (0..).step_by(share).zip(out.chunks_mut(share));
        let own = shares.next();
        for (first, out) in shares {
            scope.spawn(move || draw(first, out));
        }
        if let Some((first, out)) = own {
            draw(first, out);
        }
    });
}

/// The four norms of a layer: before and after attention, before and after the MLP.
pub(crate) const NORMS: [&str; 4] =
    ["input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2"];

fn layer_of(name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use anello_configs::{LoadOptions, RunConfig, Stage};

    use super::*;

    fn model() -> Model {
        Model {
            layers: 2,
            hidden: 64,
            heads: 4,
            kv_heads: 2,
            ffn: 96,
            vocab: 200,
            rms_eps: 1e-6,
            init_std: 0.02,
            embed_std: 0.5,
            post_norm: 0.25,
        }
    }

    #[test]
    fn the_layout_is_dense_and_its_parts_are_whole_blocks() {
        let layout = Layout::new(&model(), 2);
        let mut at = 0;
        for entry in layout.entries() {
            if entry.offset != at {
                assert_eq!(entry.offset, layout.decayed_len(), "a gap before {}", entry.name);
            }
            at = entry.range().end;
        }
        assert_eq!(layout.decayed_len() % BLOCK, 0);
        assert_eq!(layout.len() % BLOCK, 0);
        let (d, f, v, kv) = (64, 96, 200, 32);
        let expected = 2 * (2 * d * d + 2 * kv * d + 3 * d * f + 4 * d) + 2 * v * d + d + d + 1;
        assert_eq!(layout.parameters(), expected);
        assert!(layout.names_in(0).any(|name| name == "model.embed_tokens.weight"));
    }

    #[test]
    fn a_block_is_whole_once_all_that_lies_in_it_was_walked() {
        let sizes = Model { hidden: 256, ffn: 700, ..model() };
        let layout = Layout::new(&sizes, 3);
        let walked = layout.backward_blocks(Trains::All);
        assert_eq!(walked.len(), 1 + 3 + 2, "losses, layers, norms and gate, embedding: {walked:?}");
        let mut seen: Vec<usize> = walked.iter().cloned().flatten().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..layout.blocks()).collect::<Vec<_>>());
        let when = |name: &str| match layer_of(name) {
            _ if name.contains("norm") || name.contains("gate.") => 4,
            Some((layer, _)) => 3 - layer,
            None if name.contains("embed") => 5,
            None => 0,
        };
        for (at, blocks) in walked.iter().enumerate() {
            for block in blocks.clone() {
                let latest = layout.names_in(block).map(when).max();
                assert!(
                    latest <= Some(at),
                    "block {block} is told after {at}, and is whole after {latest:?}"
                );
            }
        }
        assert!(walked[..4].iter().all(|blocks| !blocks.is_empty()), "{walked:?}");
    }

    #[test]
    fn what_a_stage_moves_is_the_gate_or_the_rest_or_all() {
        let layout = Layout::new(&model(), 2);
        let gate = layout.moved(Trains::Gate, Loss::Gate);
        for entry in layout.entries() {
            let is_gate = entry.name.contains("early_exit_gate");
            assert_eq!(gate.contains(&entry.offset), is_gate, "{}", entry.name);
            assert_eq!(
                layout.moved(Trains::All, Loss::Sft).contains(&entry.offset),
                !is_gate,
                "{}",
                entry.name
            );
        }
        assert_eq!(gate.len(), 64 + 1);
        assert_eq!(layout.moved(Trains::All, Loss::Loop), 0..layout.len());
        let tiny = RunConfig::load(&LoadOptions::new("tiny")).unwrap().config;
        for (trains, loss) in
            [(Trains::All, Loss::Loop), (Trains::All, Loss::Sft), (Trains::Gate, Loss::Gate)]
        {
            let stage = Stage { trains, loss, ..tiny.stages[0].clone() };
            assert_eq!(stage.moves_all(), layout.moved(trains, loss) == (0..layout.len()), "{loss:?}");
        }
        let [blocks] = &layout.backward_blocks(Trains::Gate)[..] else { panic!("the gate's") };
        assert!(blocks.start * BLOCK <= gate.start && gate.end <= blocks.end * BLOCK && blocks.len() <= 2);
    }

    #[test]
    fn an_element_has_a_place_in_its_tensor() {
        let layout = Layout::new(&model(), 2);
        let place = |at| layout.place_of(at).map(|(name, index)| format!("{name}{index:?}"));
        assert_eq!(place(64 + 7).as_deref(), Some("model.embed_tokens.weight[1, 7]"));
        let norm = layout.find("model.norm.weight").unwrap();
        assert_eq!(place(norm.offset + 63).as_deref(), Some("model.norm.weight[63]"));
        assert_eq!(place(layout.decayed_len() - 1), None);
        let other = Model { embed_std: 1.0, ..model() };
        assert!(layout.has_places_of(&Layout::new(&other, 2)) && layout != Layout::new(&other, 2));
        assert!(!layout.has_places_of(&Layout::new(&Model { heads: 2, ..model() }, 2)));
    }

    #[test]
    fn initial_weights_depend_on_seed_name_and_shape_alone() {
        let (two, three) = (Layout::new(&model(), 2), Layout::new(&model(), 3));
        let (a, b) = (two.initial(5, Device::Cpu), three.initial(5, Device::Cpu));
        let take = |layout: &Layout, flat: &Tensor, name: &str| {
            let entry = layout.find(name).unwrap();
            flat.narrow(0, entry.offset as i64, entry.len() as i64)
        };
        for name in ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"] {
            assert!(
                take(&two, &a, name).equal(&take(&three, &b, name)),
                "{name} moved with the number of layers"
            );
        }
        assert!(!a.equal(&two.initial(6, Device::Cpu)));
        let std = |name: &str| take(&two, &a, name).std(false).double_value(&[]);
        assert!((std("lm_head.weight") - 0.02).abs() < 0.001);
        assert!((std("model.embed_tokens.weight") - 0.5).abs() < 0.01);
        for (norm, weight) in NORMS.into_iter().zip([1.0, 0.25, 1.0, 0.25]) {
            let values = take(&two, &a, &format!("model.layers.1.{norm}.weight"));
            assert!(values.equal(&values.full_like(weight)), "{norm}");
        }
    }

    #[test]
    fn upcycling_repeats_the_stack() {
        let (small, large) = (Layout::new(&model(), 2), Layout::new(&model(), 6));
        let flat = small.initial(1, Device::Cpu);
        let grown = large.upcycled(&small, &flat);
        for entry in large.entries() {
            let source = match layer_of(&entry.name) {
                Some((layer, rest)) => format!("model.layers.{}.{rest}", layer % 2),
                None => entry.name.clone(),
            };
            let source = small.find(&source).unwrap();
            let got = grown.narrow(0, entry.offset as i64, entry.len() as i64);
            assert!(got.equal(&flat.narrow(0, source.offset as i64, source.len() as i64)), "{}", entry.name);
        }
    }
}

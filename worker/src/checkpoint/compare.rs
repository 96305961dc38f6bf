//! Two checkpoints side by side: which blocks differ, and by how much.

use anello_configs::Model;
use anello_store::checkpoint::{BLOCK, BUFFERS, read_manifest};
use anello_store::{Error as StoreError, Store};
use tch::Device;

use super::load;
use crate::error::Result;
use crate::params::Layout;

/// A block that differs.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockDifference {
    /// `weights`, `exp_avg` or `exp_avg_sq`.
    pub buffer: &'static str,
    /// The block.
    pub block: usize,
    /// Tensors with elements in it.
    pub names: Vec<String>,
    /// Elements that differ.
    pub elements: u64,
    /// Largest absolute difference.
    pub max_abs: f64,
}

/// What [`compare`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Blocks of all three buffers together.
    pub blocks: usize,
    /// Those that differ.
    pub differences: Vec<BlockDifference>,
    /// Facts beside the state that differ: (what, in a, in b).
    pub facts: Vec<(&'static str, String, String)>,
}

/// Compares checkpoint `a` with `b` (store and step each), of runs of the same `model`. Equal ones are told by their
/// digests; parts are read only when some differ.
pub fn compare(a: (&Store, u64), b: (&Store, u64), model: &Model) -> Result<Comparison> {
    let (in_a, in_b) = (read_manifest(a.0, a.1)?, read_manifest(b.0, b.1)?);
    if in_a.elements != in_b.elements {
        let fact = format!("it holds {} elements, checkpoint {} holds {}", in_a.elements, b.1, in_b.elements);
        let remedy = "compare runs of one model".to_owned();
        return Err(StoreError::Checkpoint { step: a.1, fact, remedy }.into());
    }
    let facts = [
        ("step", in_a.step.to_string(), in_b.step.to_string()),
        ("tokens", in_a.tokens.to_string(), in_b.tokens.to_string()),
        ("updates", in_a.updates.to_string(), in_b.updates.to_string()),
        ("config", in_a.config.clone(), in_b.config.clone()),
        ("data", format!("{:?}", in_a.data), format!("{:?}", in_b.data)),
        ("cursors", format!("{:?}", in_a.cursors), format!("{:?}", in_b.cursors)),
    ];
    let facts = facts.into_iter().filter(|(_, a, b)| a != b).collect();
    let blocks = in_a.blocks.weights.len() * BUFFERS.len();
    if in_a.blocks == in_b.blocks {
        return Ok(Comparison { blocks, differences: Vec::new(), facts });
    }
    let layout = Layout::new(model, in_a.layers);
    let state_a = load(a.0, a.1, model, Device::Cpu)?.state;
    let state_b = load(b.0, b.1, model, Device::Cpu)?.state;
    let mut differences = Vec::new();
    for (buffer, name) in BUFFERS.into_iter().enumerate() {
        let (left, right) = (state_a.whole(buffer), state_b.whole(buffer));
        for block in 0..layout.blocks() {
            if in_a.blocks.of(buffer)[block] == in_b.blocks.of(buffer)[block] {
                continue;
            }
            let part = |flat: &tch::Tensor| flat.narrow(0, (block * BLOCK) as i64, BLOCK as i64);
            let delta = (part(&left) - part(&right)).abs();
            differences.push(BlockDifference {
                buffer: name,
                block,
                names: layout.names_in(block).map(str::to_owned).collect(),
                elements: delta.count_nonzero(None::<i64>).int64_value(&[]) as u64,
                max_abs: delta.max().double_value(&[]),
            });
        }
    }
    Ok(Comparison { blocks, differences, facts })
}

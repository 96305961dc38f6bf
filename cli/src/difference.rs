//! A difference between two computations of one step, in words.

use anello_worker::bisect::{Blocks, Difference, Phase, Told};

use crate::text::grouped;

/// Figures that are told one by one.
pub const FIGURES_SHOWN: usize = 4;

/// Where a difference is: `at step 25, in the update: weights, block 0 (lm_head.weight)`.
pub fn place(difference: &Difference) -> String {
    let Difference { step, phase, checkpoint, lane, blocks, .. } = difference;
    let phase = match phase {
        Phase::Start => "in the state that it begins with",
        Phase::Batch => "in the batch",
        Phase::Forward => "in the losses",
        Phase::Gradient => "in the gradient",
        Phase::Reduce => "in the sum over lanes",
        Phase::Norm => "in the norm and clip",
        Phase::Update => "in the update",
        Phase::Eval => "on held-out data",
    };
    let at = match checkpoint {
        Some(checkpoint) => format!("by checkpoint {}", grouped(*checkpoint)),
        None => format!("at step {}, {phase}", grouped(*step)),
    };
    let lane = lane.map(|lane| format!(" of lane {lane}")).unwrap_or_default();
    let blocks = blocks.as_ref().map(|blocks| format!(": {}", block(blocks))).unwrap_or_default();
    format!("{at}{lane}{blocks}")
}

/// Blocks that differ: `weights, block 3 (lm_head.weight), and in 1 more block`.
pub fn block(blocks: &Blocks) -> String {
    let Blocks { buffer, block, differ, tensors, element } = blocks;
    let tensors = match element {
        Some(element) => element.tensor.clone(),
        None => tensors.join(", "),
    };
    let more = match differ - 1 {
        0 => String::new(),
        1 => ", and in 1 more block".to_owned(),
        more => format!(", and in {} more blocks", grouped(more as u64)),
    };
    format!("{buffer}, block {} ({tensors}){more}", grouped(*block as u64))
}

/// Both values of what differs, one a line.
pub fn values(difference: &Difference, [first, second]: [&str; 2]) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(element) = difference.blocks.as_ref().and_then(|blocks| blocks.element.as_ref()) {
        let [a, b] = &element.values;
        let elements = match element.differ {
            1 => "1 element of the block differs".to_owned(),
            n => format!("{} elements of the block differ", grouped(n as u64)),
        };
        lines.push(format!(
            "  {}{:?}: {a} {first}, {b} {second}; {elements}, max |Δ| {:.3e}",
            element.tensor, element.index, element.max_abs
        ));
    }
    for figure in difference.figures.iter().take(FIGURES_SHOWN) {
        let [a, b] = &figure.values;
        lines.push(format!("  {}: {a} {first}, {b} {second}", figure.name));
    }
    let more = difference.figures.len().saturating_sub(FIGURES_SHOWN);
    if more > 0 {
        lines.push(format!("  and {more} more figures; --json has all"));
    }
    lines
}

/// What a run folder tells, in one line.
pub fn told(told: &Told) -> String {
    let checkpoints = match &told.checkpoints[..] {
        [] => "no checkpoint".to_owned(),
        [one] => format!("checkpoint {}", grouped(*one)),
        [first, .., last] => {
            format!("{} checkpoints from {} to {}", told.checkpoints.len(), grouped(*first), grouped(*last))
        }
    };
    format!("{}: {} logged, {checkpoints}", told.place, steps_of(told.logged))
}

/// `1 step`, `2 steps`.
pub fn steps_of(number: u64) -> String {
    match number {
        1 => "1 step".to_owned(),
        number => format!("{} steps", grouped(number)),
    }
}

/// `1 checkpoint`, `2 checkpoints`.
pub fn checkpoints_of(number: usize) -> String {
    match number {
        1 => "1 checkpoint".to_owned(),
        number => format!("{} checkpoints", grouped(number as u64)),
    }
}

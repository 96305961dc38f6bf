//! What no config can make differ: that is why these are not whole runs.

use anello_configs::Model;

use tch::Device;

use super::*;
use crate::params::BLOCK;

fn layout() -> Layout {
    let sizes = Model {
        layers: 1,
        hidden: 32,
        heads: 2,
        kv_heads: 2,
        ffn: 48,
        vocab: 4096,
        rms_eps: 1e-6,
        init_std: 0.02,
        embed_std: 0.02,
        post_norm: 1.0,
    };
    Layout::new(&sizes, 1)
}

fn ran(layout: &Layout) -> Ran {
    let batch = MicroBatch {
        sequences: 2,
        length: 3,
        input_ids: vec![1, 2, 3, 4, 5, 6],
        targets: vec![2, 3, -100, 5, 6, -100],
        positions: vec![0, 1, 2, 0, 1, 2],
        segment_starts: vec![0, 3],
        counted: 4,
    };
    Ran { micro_batches: vec![batch], gradient: layout.zeros(Device::Cpu), sums: LossSums::zero(2) }
}

fn set(ran: &mut Ran, at: usize, value: f32) {
    crate::ffi::as_mut_slice(&mut ran.gradient)[at] = value;
}

#[test]
fn a_gradient_that_differs_is_named_by_lane_block_and_element() {
    let layout = layout();
    let (a, mut b) = (ran(&layout), ran(&layout));
    let mut first = First { step: 9, found: None };
    first.lane(0, &a, &b, Some(&layout));
    assert_eq!(first.found, None);
    set(&mut b, BLOCK + 32 * 3 + 7, 0.5);
    set(&mut b, BLOCK + 32 * 3 + 9, -2.0);
    set(&mut b, 2 * BLOCK, f32::MIN_POSITIVE);
    first.lane(3, &a, &b, Some(&layout));
    let found = first.found.unwrap();
    assert_eq!((found.step, found.phase, found.lane), (9, Phase::Gradient, Some(3)));
    let blocks = found.blocks.unwrap();
    assert_eq!((blocks.buffer, blocks.block, blocks.differ), ("gradient", 1, 2));
    let element = blocks.element.unwrap();
    // 2048 rows of 32 are a block of the embedding.
    assert_eq!((element.tensor.as_str(), &element.index[..]), ("model.embed_tokens.weight", &[2051, 7][..]));
    assert_eq!((element.values, element.differ), (["0.0".to_owned(), "0.5".to_owned()], 2));
    assert_eq!(element.max_abs, 2.0);
}

#[test]
fn bits_are_compared_not_values() {
    let layout = layout();
    let differ = |left: f32, right: f32| {
        let (mut a, mut b) = (ran(&layout), ran(&layout));
        set(&mut a, 5, left);
        set(&mut b, 5, right);
        compare::blocks("total", &layout, &a.gradient, &b.gradient).and_then(|blocks| blocks.element)
    };
    assert_eq!(differ(f32::NAN, f32::NAN), None);
    let zeros = differ(0.0, -0.0).unwrap();
    assert_eq!((zeros.values, zeros.max_abs), (["0.0".to_owned(), "-0.0".to_owned()], 0.0));
    assert!(differ(1.0, f32::NAN).unwrap().max_abs.is_nan());
}

#[test]
fn the_earliest_phase_wins_whichever_lane_it_is_of() {
    let layout = layout();
    let (a, mut gradient, mut losses, mut batch) = (ran(&layout), ran(&layout), ran(&layout), ran(&layout));
    set(&mut gradient, 0, 1.0);
    losses.sums.cross_entropy[1] = 3.5;
    batch.micro_batches[0].targets[4] = 7;
    set(&mut batch, 0, 1.0);
    let mut first = First { step: 0, found: None };
    let mut told = Vec::new();
    for (lane, other) in [gradient, losses, batch].iter().enumerate() {
        first.lane(lane as u32, &a, other, Some(&layout));
        let found = first.found.clone().unwrap();
        told.push((found.phase, found.lane, found.figures.first().cloned()));
    }
    let figure = |name: &str, a: &str, b: &str| {
        Some(Figure { name: name.to_owned(), values: [a.to_owned(), b.to_owned()] })
    };
    assert_eq!(
        told,
        [
            (Phase::Gradient, Some(0), None),
            (Phase::Forward, Some(1), figure("loss_2", "0.0", "3.5")),
            (Phase::Batch, Some(2), figure("micro-batch 0, row 1, token 1, target", "6", "7")),
        ]
    );
}

/// The same lanes, added up to something else: whoever added them computed wrongly.
#[test]
fn a_total_that_differs_where_no_lane_does_is_that_of_the_reduction() {
    let layout = layout();
    let total = |place: Option<usize>, loss: f64| {
        let mut all = ran(&layout);
        place.into_iter().for_each(|at| set(&mut all, at, 0.5));
        (all.gradient, LossSums { loss, ..all.sums })
    };
    let mut first = First { step: 4, found: None };
    first.lane(0, &ran(&layout), &ran(&layout), Some(&layout));
    first.total(&total(None, 1.0), &total(None, 1.0), Some(&layout));
    assert_eq!(first.found, None);
    first.total(&total(None, 1.0), &total(Some(BLOCK + 3), 1.5), Some(&layout));
    let found = first.found.clone().unwrap();
    assert_eq!((found.step, found.phase, found.lane), (4, Phase::Reduce, None));
    let blocks = found.blocks.unwrap();
    assert_eq!((blocks.buffer, blocks.block, blocks.differ), ("total", 1, 1));
    let figures: Vec<&str> = found.figures.iter().map(|figure| figure.name.as_str()).collect();
    assert_eq!(figures, ["loss"]);
    // Of states of different sizes only the figures are compared.
    let mut of_sizes = First { step: 4, found: None };
    of_sizes.total(&total(None, 1.0), &total(Some(3), 1.0), None);
    assert_eq!(of_sizes.found, None);
    // A lane that differs comes before it.
    let mut other = ran(&layout);
    set(&mut other, 7, 1.0);
    first.lane(2, &ran(&layout), &other, Some(&layout));
    assert_eq!(first.found.unwrap().phase, Phase::Gradient);
}

use anello_configs::{Model, Optimizer};
use tch::{Device, Tensor};

use super::norm::ROW;
use super::update::slices;
use super::*;
use crate::cover::Cover;
use crate::kernels::Kernels;
use crate::params::Layout;

fn options() -> Optimizer {
    Optimizer { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: 1.0 }
}

fn state() -> State {
    let sizes = Model {
        layers: 1,
        hidden: 32,
        heads: 2,
        kv_heads: 2,
        ffn: 64,
        vocab: 100,
        rms_eps: 1e-6,
        init_std: 0.02,
        embed_std: 0.02,
        post_norm: 1.0,
    };
    let layout = Layout::new(&sizes, 1);
    let weights = layout.initial(1, Device::Cpu);
    State::new(layout, weights)
}

fn gradient(state: &State, scale: f64, step: u64) -> Tensor {
    let stream = anello_configs::random::Stream::new(9, "gradient", &[step]);
    let values: Vec<f32> =
        (0..state.layout.len()).map(|i| ((stream.unit_at(i as u64) - 0.5) * scale) as f32).collect();
    Tensor::from_slice(&values)
}

fn summed(gradient: &Tensor, wanted: bool) -> Summed<'_> {
    Summed { gradient, counted: 10, wanted, fresh: false, kernels: None }
}

/// Against the formula of the module, in f64, element by element.
#[test]
fn updates_follow_the_formula() {
    let mut state = state();
    let start = Vec::<f32>::try_from(&state.weights).unwrap();
    let n = start.len();
    let (mut w, mut m, mut v) =
        (start.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), vec![0.0; n], vec![0.0; n]);
    for step in 1..=3u64 {
        let g = gradient(&state, 0.5, step);
        let host = Vec::<f32>::try_from(&g).unwrap();
        let counted = 10;
        let lr = 1e-2 / step as f64;
        let got = state.update(&options(), lr, summed(&g, true), 0..n);
        let norm = host.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt() / counted as f64;
        assert!((got.grad_norm - norm).abs() < 1e-5 * norm, "{} against {norm}", got.grad_norm);
        assert!(norm > 1.0, "the clip is exercised");
        for i in 0..n {
            let g = f64::from(host[i]) / counted as f64 / norm;
            m[i] = 0.9 * m[i] + 0.1 * g;
            v[i] = 0.95 * v[i] + 0.05 * g * g;
            let update = m[i]
                / (1.0 - 0.9f64.powi(step as i32))
                / ((v[i] / (1.0 - 0.95f64.powi(step as i32))).sqrt() + 1e-8);
            let decay = if i < state.layout.decayed_len() { 0.1 } else { 0.0 };
            w[i] = w[i] * (1.0 - lr * decay) - lr * update;
        }
    }
    let got = Vec::<f32>::try_from(&state.weights).unwrap();
    let worst = (0..n).map(|i| (f64::from(got[i]) - w[i]).abs()).fold(0.0, f64::max);
    assert!(worst < 2e-6, "worst difference {worst}");
}

#[test]
fn a_step_that_is_not_finite_changes_nothing() {
    for poison in [f64::NAN, f64::INFINITY] {
        let mut state = state();
        let before = state.weights.copy();
        let g = gradient(&state, 0.5, 1);
        let _ = g.narrow(0, 7, 1).fill_(poison);
        let all = 0..state.layout.len();
        let update = state.update(&options(), 1e-2, summed(&g, true), all);
        assert!(!update.applied && state.updates == 0);
        assert!(state.weights.equal(&before));
        assert_eq!(state.exp_avg.abs().max().double_value(&[]), 0.0);
    }
    let mut state = state();
    let g = gradient(&state, 0.5, 1);
    let all = 0..state.layout.len();
    assert!(!state.update(&options(), 1e-2, summed(&g, false), all).applied);
}

/// Two halves are one update, to the last bit, wherever the moments are and whatever moves; and before the second half
/// nothing is lost.
#[test]
fn an_update_in_two_halves_over_a_ring_is_the_same() {
    let all = state().layout.len();
    let blocks = all / BLOCK;
    assert!(blocks >= 2, "a state of more than a block");
    let fused = Kernels::emulated();
    for (members, moved, kernels) in [
        (3, 0..all, None),
        (2, 0..all, None),
        (3, 0..all - BLOCK / 3, None),
        (3, all - BLOCK..all - 40, None),
        (3, 100..all - BLOCK / 3, Some(&fused)),
    ] {
        let mut whole = state();
        let part_of = |rank| state().with_cover(Cover::of_rank(blocks, members, rank), &[]);
        let mut shards: Vec<State> = (0..members).map(part_of).collect();
        for step in 1..=5u64 {
            let (lr, finite) = (1e-2 / step as f64, step != 2);
            let sum = gradient(&whole, 0.5, step);
            // A stage that resets the moments begins with the fourth.
            let fresh = step == 4;
            if fresh {
                whole.reset_moments(blocks_of(&moved));
            }
            whole.update(&options(), lr, Summed { kernels, ..summed(&sum, finite) }, moved.clone());
            let gathered = gradient(&whole, 0.5, step);
            let prepared: Vec<Prepared> = (0..members)
                .map(|rank| {
                    let shard = &shards[rank];
                    let (weights, cover) = (shard.weights.copy(), shard.cover.clone());
                    let own = blocks * rank / members..blocks * (rank + 1) / members;
                    let sum = gradient(&whole, 0.5, step);
                    let (moved, own_blocks) = (moved.clone(), own.clone());
                    // Some have a buffer to spare, in which anything may be.
                    let room = (rank % 2 == 0).then(|| gradient(&whole, 7.0, step));
                    let sum_of = Summed { fresh, kernels, ..summed(&sum, finite) };
                    let prepared = shard.prepare(&options(), lr, sum_of, moved, own_blocks, room);
                    assert!(shard.weights.equal(&weights) && shard.cover == cover);
                    let own = own.start * BLOCK..own.end * BLOCK;
                    part(&gathered, own.clone()).copy_(&part(&sum, own));
                    prepared
                })
                .collect();
            for (shard, prepared) in shards.iter_mut().zip(&prepared) {
                shard.complete(prepared, Some(&gathered));
            }
            for shard in &shards {
                assert!(shard.weights.equal(&whole.weights), "{members} members, step {step}");
                assert_eq!(shard.updates, whole.updates);
                for range in shard.cover.ranges() {
                    let (ours, theirs) = (shard.moments(range.clone()), whole.moments(range.clone()));
                    assert_eq!(shard.moved, whole.moved);
                    assert!(ours.iter().zip(&theirs).all(|(a, b)| a.equal(b)), "step {step}");
                }
            }
        }
    }
}

/// Moments of what a stage freezes are let go with its reset, and the bits are those of a state that has room for all; what moves
/// later has moments again.
#[test]
fn what_is_frozen_has_no_moments() {
    let all = state().layout.len();
    let gate = all - BLOCK..all - 40;
    let blocks = all / BLOCK;
    let (mut frozen, mut roomy) = (state(), state());
    let mut unmoved = State::unmoved(state().layout, state().weights);
    assert_eq!(unmoved.exp_avg.numel(), 0, "nothing has moved");
    for (step, moved, fresh, room) in [
        (1, 0..all, false, blocks),
        (2, gate.clone(), true, 1),
        (3, gate.clone(), false, 1),
        // A stage that does not reset begins with zeros where there were none.
        (4, 0..all, false, blocks),
        (5, gate.clone(), false, blocks),
        (6, gate, true, 1),
        (7, 0..all, true, blocks),
    ] {
        if fresh {
            let _ = (roomy.exp_avg.zero_(), roomy.exp_avg_sq.zero_());
            roomy.updates = 0;
        }
        let update = |state: &mut State, fresh: bool| {
            let sum = gradient(state, 0.5, step);
            state.update(&options(), 1e-2, Summed { fresh, ..summed(&sum, true) }, moved.clone())
        };
        let expected = update(&mut roomy, false);
        for state in [&mut frozen, &mut unmoved] {
            assert_eq!(update(state, fresh), expected);
            assert_eq!(
                [&state.exp_avg, &state.exp_avg_sq].map(Tensor::numel),
                [room * BLOCK; 2],
                "step {step}"
            );
            for buffer in 0..3 {
                assert!(state.whole(buffer).equal(&roomy.whole(buffer)), "buffer {buffer} after {step}");
            }
            // Room that was made for what is still to come is no other state, and is let go when others know better.
            let (moved, whole) = (state.moved.clone(), [1, 2].map(|buffer| state.whole(buffer)));
            let mut early = state.copy();
            early.make_room(0..blocks);
            assert_eq!(early.exp_avg.numel(), all);
            early.narrow(&moved);
            assert_eq!((early.moved.clone(), early.exp_avg.numel()), (moved, room * BLOCK));
            assert!([1, 2].map(|buffer| early.whole(buffer)).iter().zip(&whole).all(|(a, b)| a.equal(b)));
            let digests = |state: &State| crate::digest::of_moments(state, 0..blocks);
            assert_eq!(digests(state), digests(&roomy), "whoever has room for zeros or not");
        }
    }
}

/// A member's moments are those of its share alone: less with every worker.
#[test]
fn memory_of_moments_falls_with_workers() {
    let blocks = 64;
    let held = |members| (0..members).map(|r| Cover::of_rank(blocks, members, r).len()).max().unwrap();
    assert_eq!([1, 2, 4, 8, 16].map(held), [64, 64, 32, 16, 8]);
    let state = state().with_cover(Cover::of_rank(2, 2, 0), &[]);
    assert_eq!(state.exp_avg.numel(), state.cover.elements());
}

#[test]
fn slices_cover_what_moves_and_none_decays_in_part() {
    for (moved, decayed, len) in
        [(0..30, 16, 4), (3..29, 16, 4), (3..29, 16, 100), (17..18, 16, 4), (5..5, 16, 4)]
    {
        let slices: Vec<Range<usize>> = slices(&moved, decayed, len).collect();
        let covered: Vec<usize> = slices.iter().cloned().flatten().collect();
        assert_eq!(covered, moved.clone().collect::<Vec<_>>(), "{slices:?}");
        assert!(
            slices.iter().all(|slice| slice.len() <= len && (slice.end <= decayed || slice.start >= decayed))
        );
    }
    let update = |device_slices: usize| {
        let mut state = state();
        let (g, all) = (gradient(&state, 0.5, 1), state.layout.len());
        let (_, scale) = state.measure(&options(), 1e-2, summed(&g, true), &(0..all));
        for slice in slices(&(0..all), state.layout.decayed_len(), device_slices) {
            let decays = slice.start < state.layout.decayed_len();
            let here = |flat: &Tensor| part(flat, slice.clone());
            let mut gradient = here(&g);
            gradient *= scale.unwrap().gradient;
            scale.unwrap().moments(None, &mut here(&state.exp_avg), &mut here(&state.exp_avg_sq), &gradient);
            scale.unwrap().weights(
                None,
                &mut here(&state.weights),
                &here(&state.exp_avg),
                &here(&state.exp_avg_sq),
                decays,
            );
        }
        state.weights = state.weights.copy();
        Vec::<f32>::try_from(&state.weights).unwrap().iter().map(|w| w.to_bits()).collect::<Vec<_>>()
    };
    assert_eq!(update(BLOCK), update(BLOCK * 256), "a GPU's slices have the bits of the CPU's");
}

/// What a GPU adds, in the order that is written for it: the plain loop has the same bits.
#[test]
fn rows_are_halved_as_it_is_written() {
    let g = gradient(&state(), 0.5, 1);
    let rows = g.view([-1, ROW]).square();
    let found = Vec::<f32>::try_from(&halved(&rows)).unwrap();
    let values = Vec::<f32>::try_from(&rows.reshape([-1])).unwrap();
    for (row, found) in values.chunks(ROW as usize).zip(&found) {
        let mut row = row.to_vec();
        while row.len() > 1 {
            let (left, right) = row.split_at(row.len() / 2);
            row = left.iter().zip(right).map(|(left, right)| left + right).collect();
        }
        assert_eq!(row[0].to_bits(), found.to_bits());
    }
    let blocks = block_square_sums(&g);
    let halved: Vec<f64> = found
        .chunks(BLOCK / ROW as usize)
        .map(|block| block.iter().map(|&row| f64::from(row)).sum())
        .collect();
    for (a, b) in blocks.iter().zip(&halved) {
        assert!((a - b).abs() < 1e-5 * a, "{a} against {b}");
    }
}

#[test]
fn the_norm_does_not_depend_on_threads() {
    let state = state();
    let g = gradient(&state, 0.5, 1);
    let of = |threads| {
        tch::set_num_threads(threads);
        block_square_sums(&g)
    };
    let one = of(1);
    assert_eq!(of(2), one);
    assert_eq!(of(3), one);
}

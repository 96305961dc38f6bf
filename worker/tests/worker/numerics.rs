//! Model and objective against something independent.

use anello_configs::{Compute, Dtype, Loss, Mask, Recompute, Trains};
use anello_worker::{Goal, LossSums, log_exit, token_losses};
use tch::{Kind, Tensor};

use crate::support::{Fixture, compute, micro_batch, sizes};

fn close(a: f64, b: f64, relative: f64, what: &str) {
    assert!((a - b).abs() <= relative * a.abs().max(b.abs()).max(1e-12), "{what}: {a} against {b}");
}

fn worst(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

/// The gradient of `goal`, of every tensor by name, against central differences in f64; what it does not move has none.
fn assert_differences(goal: Goal, relative: f64) {
    let f = Fixture::new(sizes(), Kind::Double, Dtype::Fp32);
    let batch = micro_batch(24, &[13, 30, 5], 61, |at| at % 7 == 3);
    let (compute, loops) = (compute(Recompute::Layer, 17), 3);
    let (_, gradient) = f.pass_for(&batch, &compute, loops, goal);
    let loss = || f.pass_for(&batch, &compute, loops, goal).0.loss;
    let moved = f.layout.moved(goal.trains, goal.loss);
    for (at, entry) in f.layout.entries().iter().enumerate() {
        let place = |flat: &Tensor| flat.narrow(0, entry.offset as i64, entry.len() as i64);
        if !moved.contains(&entry.offset) {
            assert_eq!(place(&gradient).abs().max().double_value(&[]), 0.0, "{goal:?}, {}", entry.name);
            continue;
        }
        let stream = anello_configs::random::Stream::new(17, "direction", &[at as u64]);
        let direction: Vec<f64> = (0..entry.len()).map(|i| stream.unit_at(i as u64) - 0.5).collect();
        let (direction, values) = (Tensor::from_slice(&direction), place(&f.flat));
        let saved = values.copy();
        let step = 1e-6;
        let at_offset = |by: f64| {
            values.shallow_clone().copy_(&(&saved + &direction * by));
            loss()
        };
        let difference = (at_offset(step) - at_offset(-step)) / (2.0 * step);
        values.shallow_clone().copy_(&saved);
        let ours = (place(&gradient) * &direction).sum(Kind::Double).double_value(&[]);
        close(ours, difference, relative, &format!("{goal:?}, {}", entry.name));
    }
}

#[test]
fn gradients_match_finite_differences_in_f64() {
    assert_differences(Goal { loss: Loss::Loop, beta: 0.3, trains: Trains::All }, 2e-6);
}

#[test]
fn gradients_of_the_other_objectives_match_finite_differences_in_f64() {
    let goal = |loss, trains| Goal { loss, beta: 0.3, trains };
    for goal in [goal(Loss::Gate, Trains::Gate), goal(Loss::Loop, Trains::Gate), goal(Loss::Sft, Trains::All)]
    {
        assert_differences(goal, 3e-6);
    }
}

/// Adaptive gate training by its formula (LOOPLM §3), token by token.
#[test]
fn the_gates_loss_is_that_of_the_formula() {
    let f = Fixture::new(sizes(), Kind::Double, Dtype::Fp32);
    let batch = micro_batch(24, &[13, 30, 5], 61, |at| at % 7 == 3);
    let goal = Goal { loss: Loss::Gate, beta: 0.0, trains: Trains::Gate };
    let (sums, _) = f.pass_for(&batch, &compute(Recompute::Layer, 17), 3, goal);
    let hidden: Vec<Tensor> = f.hidden(&batch, 3);
    let targets = Tensor::from_slice(&batch.targets);
    let host = |x: Tensor| Vec::<f64>::try_from(x.detach()).unwrap();
    let losses: Vec<Vec<f64>> = hidden
        .iter()
        .map(|h| {
            host(f.model.logits(h).cross_entropy_loss::<Tensor>(
                &targets,
                None,
                tch::Reduction::None,
                -100,
                0.0,
            ))
        })
        .collect();
    let lambda: Vec<Vec<f64>> = hidden.iter().map(|h| host(f.model.gate_logits(h).sigmoid())).collect();
    let mut expected = 0.0;
    for i in (0..batch.targets.len()).filter(|i| batch.targets[*i] != -100) {
        for t in 1..3 {
            let improvement = (losses[t - 1][i] - losses[t][i]).max(0.0);
            let w = 1.0 / (1.0 + (-50.0 * (improvement - 0.005)).exp());
            expected += (-w * (1.0 - lambda[t][i]).ln() - (1.0 - w) * lambda[t][i].ln()) / 3.0;
        }
    }
    close(sums.loss, expected, 1e-9, "the gate's loss");
}

/// All logits at once, one graph: what the chunked, segmented pass must equal.
fn naive(
    f: &Fixture,
    batch: &anello_dataloader::MicroBatch,
    loops: u32,
    beta: f64,
) -> (LossSums, Vec<Tensor>) {
    let hidden = f.hidden(batch, loops);
    let losses =
        token_losses(&f.model, &Tensor::stack(&hidden, 0), &Tensor::from_slice(&batch.targets), beta);
    let sum = |x: &Tensor| {
        let total = (x * &losses.counts_c).sum_dim_intlist(-1i64, false, Kind::Double).reshape([-1]);
        Vec::<f64>::try_from(total.detach()).unwrap()
    };
    let sums = LossSums {
        counted: batch.counted,
        loss: sum(&losses.loss_c)[0],
        cross_entropy: sum(&losses.cross_entropy_tc),
        exit: sum(&losses.exit_tc),
        entropy: sum(&losses.entropy_c)[0],
    };
    let leaves: Vec<&Tensor> = [
        &f.model.embed.value,
        &f.model.lm_head.value,
        &f.model.gate_weight.value,
        &f.model.gate_bias.value,
        &f.model.final_norm.value,
    ]
    .into_iter()
    .chain(f.model.layers.iter().flat_map(|l| l.leaves().map(|leaf| &leaf.value)))
    .collect();
    let loss = (&losses.loss_c * &losses.counts_c).sum(Kind::Float);
    (sums, Tensor::run_backward(&[loss], &leaves, false, false))
}

/// The gradients of `naive`'s leaves out of a flat one.
fn gathered(f: &Fixture, gradient: &Tensor) -> Vec<Tensor> {
    let shadow = anello_worker::Model::new(&f.sizes, Dtype::Fp32, &f.layout, gradient);
    let m = &shadow;
    [&m.embed, &m.lm_head, &m.gate_weight, &m.gate_bias, &m.final_norm]
        .into_iter()
        .chain(m.layers.iter().flat_map(|l| l.leaves()))
        .map(|leaf| leaf.value.detach())
        .collect()
}

/// The chunked, gate-weighted loss against the plain one, in value and gradient: masked tokens, odd chunk ends, a
/// row without any target.
#[test]
fn the_chunked_pass_equals_the_plain_graph() {
    let f = Fixture::new(sizes(), Kind::Float, Dtype::Fp32);
    let batch = micro_batch(24, &[13, 30, 5, 24], 61, |at| at % 7 == 3 || at >= 48);
    let (sums, gradients) = naive(&f, &batch, 4, 0.1);
    for chunk in [1, 7, 24, 71, 72, 4096] {
        for recompute in [Recompute::None, Recompute::Layer, Recompute::Loop] {
            let (got, gradient) = f.pass(&batch, &compute(recompute, chunk), 4, 0.1);
            assert_eq!(got.counted, sums.counted);
            close(got.loss, sums.loss, 1e-6, "loss");
            close(got.entropy, sums.entropy, 1e-6, "entropy");
            for t in 0..4 {
                close(got.cross_entropy[t], sums.cross_entropy[t], 1e-6, "cross-entropy");
                close(got.exit[t], sums.exit[t], 1e-6, "exit");
            }
            for (ours, plain) in gathered(&f, &gradient).iter().zip(&gradients) {
                let scale = plain.abs().max().double_value(&[]);
                assert!(
                    worst(ours, plain) <= 3e-5 * scale.max(1e-3),
                    "chunk {chunk}, {recompute:?}: {}",
                    worst(ours, plain)
                );
            }
        }
    }
}

#[test]
fn what_is_kept_leaves_the_bits_alone() {
    let f = Fixture::new(sizes(), Kind::Float, Dtype::Fp32);
    let batch = micro_batch(24, &[13, 30, 5], 61, |_| false);
    let all = [Recompute::None, Recompute::Layer, Recompute::Loop];
    let [none, layer, by_loop] = all.map(|recompute| f.pass(&batch, &compute(recompute, 16), 3, 0.1));
    assert_eq!(none.0, layer.0);
    assert_eq!(none.0, by_loop.0);
    assert!(none.1.equal(&layer.1) && none.1.equal(&by_loop.1));
}

#[test]
fn inputs_that_wait_on_the_host_leave_the_bits_alone() {
    let batch = micro_batch(24, &[13, 30, 5], 61, |_| false);
    for dtype in [Dtype::Fp32, Dtype::Bf16] {
        let f = Fixture::new(sizes(), Kind::Float, dtype);
        for recompute in [Recompute::None, Recompute::Layer, Recompute::Loop] {
            let kept = compute(recompute, 16);
            let away = Compute { offload: true, ..kept.clone() };
            let [kept, away] = [kept, away].map(|compute| f.pass(&batch, &compute, 3, 0.1));
            assert_eq!(kept.0, away.0, "{dtype:?}, {recompute:?}");
            assert!(kept.1.equal(&away.1), "{dtype:?}, {recompute:?}");
        }
    }
}

#[test]
fn bf16_matrices_stay_near_fp32_and_mask_the_same() {
    let fp32 = Fixture::new(sizes(), Kind::Float, Dtype::Fp32);
    let bf16 = Fixture::new(sizes(), Kind::Float, Dtype::Bf16);
    let batch = micro_batch(24, &[13, 30, 5], 61, |at| at % 5 == 0);
    let (a, ga) = fp32.pass(&batch, &compute(Recompute::Layer, 10), 3, 0.1);
    let (b, gb) = bf16.pass(&batch, &compute(Recompute::Layer, 10), 3, 0.1);
    assert_eq!(gb.kind(), Kind::Float, "gradients add up in fp32");
    assert_eq!(a.counted, b.counted);
    close(a.loss, b.loss, 0.03, "loss");
    let cosine = (&ga * &gb).sum(Kind::Double) / (ga.norm() * gb.norm());
    assert!(cosine.double_value(&[]) > 0.98, "cosine {}", cosine.double_value(&[]));
    let masked = micro_batch(24, &[24], 61, |_| true);
    let (sums, gradient) = bf16.pass(&masked, &compute(Recompute::Layer, 10), 3, 0.1);
    assert_eq!((sums.counted, sums.loss), (0, 0.0));
    assert_eq!(gradient.abs().max().double_value(&[]), 0.0, "nothing counts, nothing moves");
}

/// An ordinary Transformer written out plainly: pre- and post-norm blocks, dense attention, no tape, no lanes.
fn plain_transformer(f: &Fixture, ids: &[i64]) -> Tensor {
    let w = |name: &str| f.of(&f.flat, name);
    let (s, d, heads) = (ids.len() as i64, i64::from(f.sizes.hidden), i64::from(f.sizes.heads));
    let k = d / heads;
    let norm = |x: &Tensor, name: &str| {
        let rms = (x.pow_tensor_scalar(2).mean_dim(-1i64, true, Kind::Double) + 1e-6).sqrt();
        x / rms * w(name)
    };
    let angle = |p: i64, i: i64| p as f64 * 10_000f64.powf(-2.0 * i as f64 / k as f64);
    let table = |of: fn(f64) -> f64| {
        let values: Vec<f64> = (0..s).flat_map(|p| (0..k / 2).map(move |i| of(angle(p, i)))).collect();
        Tensor::from_slice(&values).view([s, k / 2])
    };
    let (cos, sin) = (table(f64::cos), table(f64::sin));
    let rope = |x_shk: &Tensor| {
        let (a, b) = (x_shk.narrow(-1, 0, k / 2), x_shk.narrow(-1, k / 2, k / 2));
        let (c, s) = (cos.unsqueeze(1), sin.unsqueeze(1));
        Tensor::cat(&[&a * &c - &b * &s, &a * &s + &b * &c], -1)
    };
    let mut h = w("model.embed_tokens.weight").index_select(0, &Tensor::from_slice(ids));
    for l in 0..f.sizes.layers {
        let name = |part: &str| format!("model.layers.{l}.{part}.weight");
        let linear = |x: &Tensor, part: &str| x.matmul(&w(&name(part)).tr());
        let x = norm(&h, &name("input_layernorm"));
        let of_heads = |part: &str| linear(&x, part).view([s, heads, k]);
        let (q, kk) = (rope(&of_heads("self_attn.q_proj")), rope(&of_heads("self_attn.k_proj")));
        let scores = q.transpose(0, 1).matmul(&kk.permute([1, 2, 0])) / (k as f64).sqrt();
        let later = Tensor::ones([s, s], (Kind::Bool, tch::Device::Cpu)).triu(1);
        let weights = scores.masked_fill(&later, f64::NEG_INFINITY).softmax(-1, Kind::Double);
        let v = of_heads("self_attn.v_proj").transpose(0, 1);
        let mixed = weights.matmul(&v).transpose(0, 1).reshape([s, d]);
        h = &h + norm(&linear(&mixed, "self_attn.o_proj"), &name("input_layernorm_2"));
        let x = norm(&h, &name("post_attention_layernorm"));
        let fed = linear(&x, "mlp.gate_proj").silu() * linear(&x, "mlp.up_proj");
        h = &h + norm(&linear(&fed, "mlp.down_proj"), &name("post_attention_layernorm_2"));
    }
    norm(&h, "model.norm.weight").matmul(&w("lm_head.weight").tr()).log_softmax(-1, Kind::Double)
}

#[test]
fn one_loop_step_is_an_ordinary_transformer() {
    let f = Fixture::new(sizes(), Kind::Double, Dtype::Fp32);
    let batch = micro_batch(24, &[24], 61, |_| false);
    let (sums, _) = f.pass(&batch, &compute(Recompute::Layer, 16), 1, 0.1);
    let log_probabilities = plain_transformer(&f, &batch.input_ids);
    let plain: f64 = (0..23).map(|i| -log_probabilities.double_value(&[i, batch.targets[i as usize]])).sum();
    close(sums.loss, plain, 1e-6, "loss");
    close(sums.cross_entropy[0], plain, 1e-6, "cross-entropy");
    assert_eq!(
        (sums.exit[0], sums.entropy),
        (23.0, 0.0),
        "one loop step is always the exit, without entropy"
    );
}

#[test]
fn key_value_heads_may_be_fewer() {
    let grouped = anello_configs::Model { kv_heads: 2, ..sizes() };
    let f = Fixture::new(grouped, Kind::Double, Dtype::Fp32);
    // The same model with each key/value head written twice.
    let full = Fixture::new(sizes(), Kind::Double, Dtype::Fp32);
    for entry in full.layout.entries() {
        let mut values = f.of(&f.flat, &entry.name);
        if entry.name.contains("k_proj") || entry.name.contains("v_proj") {
            values = values.view([2, 8, 32]).repeat_interleave_self_int(2, 0, 4).view([32, 32]);
        }
        full.of(&full.flat, &entry.name).copy_(&values);
    }
    let batch = micro_batch(24, &[10, 14], 61, |_| false);
    let [a, b] = [&f, &full].map(|f| f.pass(&batch, &compute(Recompute::Layer, 16), 2, 0.1).0);
    close(a.loss, b.loss, 1e-10, "loss");
}

#[test]
fn the_exit_distribution_sums_to_one_and_kl_is_ln_t_less_entropy() {
    let stream = anello_configs::random::Stream::new(1, "gates", &[]);
    let gates: Vec<f64> = (0..6 * 50).map(|i| 60.0 * (stream.unit_at(i) - 0.5)).collect();
    for loops in 1..=6i64 {
        let gates = Tensor::from_slice(&gates[..loops as usize * 50]).view([loops, 50]);
        let log_p = log_exit(&gates);
        let p = log_p.exp();
        let sum = p.sum_dim_intlist(0i64, false, Kind::Double);
        assert!(worst(&sum, &Tensor::ones_like(&sum)) < 1e-12);
        // By the recurrence of the paper, as products.
        let lambda = gates.sigmoid();
        let mut survival = Tensor::ones([50], (Kind::Double, tch::Device::Cpu));
        for t in 0..loops {
            let now = if t + 1 == loops { survival.copy() } else { lambda.get(t) * &survival };
            assert!(worst(&now, &p.get(t)) < 1e-12, "p({}) of {loops}", t + 1);
            survival *= 1.0 - lambda.get(t);
        }
        let entropy = -(&p * &log_p).sum_dim_intlist(0i64, false, Kind::Double);
        let kl = (&p * (&log_p + (loops as f64).ln())).sum_dim_intlist(0i64, false, Kind::Double);
        assert!(worst(&kl, &((loops as f64).ln() - entropy)) < 1e-12);
    }
}

#[test]
fn an_exit_that_is_certain_has_no_nan() {
    let gates = Tensor::from_slice(&[500f32, -500.0, 500.0, 0.0]).view([4, 1]).set_requires_grad(true);
    let log_p = log_exit(&gates);
    let p = log_p.exp();
    let entropy = -(&p * &log_p).sum(Kind::Float);
    let gradient = Tensor::run_backward(&[&entropy], &[&gates], false, false).remove(0);
    assert_eq!(entropy.double_value(&[]), 0.0);
    assert!(bool::try_from(gradient.isfinite().all()).unwrap(), "{gradient:?}");
}

/// Two documents in one sequence give the losses of each alone, by segments and by a dense mask.
#[test]
fn packed_documents_do_not_see_each_other() {
    let f = Fixture::new(sizes(), Kind::Double, Dtype::Fp32);
    let packed = micro_batch(200, &[80, 120], 61, |_| false);
    let many = micro_batch(200, &[10, 20, 5, 15, 30, 40, 60, 20], 61, |_| false);
    for batch in [packed, many] {
        let (together, _) = f.pass(&batch, &compute(Recompute::Layer, 64), 2, 0.1);
        let mut apart = LossSums::zero(2);
        let ends = batch.segment_starts[1..].iter().copied().chain([200]);
        for (start, end) in batch.segment_starts.iter().copied().zip(ends) {
            let part = start as usize..end as usize;
            let alone = anello_dataloader::MicroBatch {
                sequences: 1,
                length: end - start,
                input_ids: batch.input_ids[part.clone()].to_vec(),
                targets: batch.targets[part.clone()].to_vec(),
                positions: batch.positions[part].to_vec(),
                segment_starts: vec![0],
                counted: 0,
            };
            apart.add(&f.pass(&alone, &compute(Recompute::Layer, 64), 2, 0.1).0);
        }
        close(together.loss, apart.loss, 1e-9, "loss");
        close(together.cross_entropy[1], apart.cross_entropy[1], 1e-9, "cross-entropy");
    }
}

#[test]
fn the_dense_mask_and_the_segments_agree_in_gradient() {
    let f = Fixture::new(sizes(), Kind::Double, Dtype::Fp32);
    // Mean segment 40 takes the dense form; the same documents in two rows of long ones take the other.
    let short = micro_batch(120, &[40, 80, 30, 50, 20, 20], 61, |_| false);
    let dense = f.context(&short, Mask::Document);
    assert!(format!("{dense:?}").contains("Dense"));
    let hidden = f.model.embed_nd(&Tensor::from_slice(&short.input_ids));
    let by_dense = f.model.layer_nd(0, &hidden, &dense);
    let ends = short.segment_starts[1..].iter().copied().chain([240]);
    let by_segment: Vec<Tensor> = short
        .segment_starts
        .iter()
        .copied()
        .zip(ends)
        .map(|(start, end)| {
            let alone = anello_dataloader::MicroBatch {
                sequences: 1,
                length: end - start,
                input_ids: short.input_ids[start as usize..end as usize].to_vec(),
                targets: Vec::new(),
                positions: (0..(end - start) as i32).collect(),
                segment_starts: vec![0],
                counted: 0,
            };
            let context = f.context(&alone, Mask::Causal);
            f.model.layer_nd(0, &hidden.narrow(0, i64::from(start), i64::from(end - start)), &context)
        })
        .collect();
    assert!(worst(&by_dense, &Tensor::cat(&by_segment, 0)) < 1e-12);
}

#[test]
fn a_loop_step_more_extends_the_ones_before() {
    let f = Fixture::new(sizes(), Kind::Float, Dtype::Fp32);
    let batch = micro_batch(24, &[24, 24], 61, |_| false);
    let (three, five) = (f.hidden(&batch, 3), f.hidden(&batch, 5));
    assert!(three.iter().zip(&five).all(|(a, b)| a.equal(b)));
    let of = |loops| f.pass(&batch, &compute(Recompute::Layer, 16), loops, 0.1).0.cross_entropy;
    assert_eq!(of(3)[..], of(5)[..3]);
}

/// Forward and backward products of sizes of which some, on some CPUs, have other bits with other numbers of threads where MKL is not
/// told otherwise (`anello_worker::device::MKL`).
#[test]
fn the_number_of_threads_leaves_the_bits_of_products_alone() {
    let drawn = |seed: u64, rows: i64, columns: i64| {
        let stream = anello_configs::random::Stream::new(seed, "products", &[]);
        let values: Vec<f32> =
            (0..(rows * columns) as u64).map(|at| stream.unit_at(at) as f32 - 0.5).collect();
        Tensor::from_slice(&values).view([rows, columns])
    };
    for (tokens, inputs, outputs) in
        [(37, 1003, 16), (37, 2048, 6), (388, 96, 1), (300, 96, 1), (129, 500, 250), (512, 250, 96)]
    {
        let (x, w, g) = (drawn(1, tokens, inputs), drawn(2, outputs, inputs), drawn(3, tokens, outputs));
        let [one, two, three, eight] = [1, 2, 3, 8].map(|threads| {
            tch::set_num_threads(threads);
            [x.matmul(&w.tr()), g.matmul(&w), g.tr().matmul(&x)]
        });
        for other in [two, three, eight] {
            for (a, b) in one.iter().zip(&other) {
                assert!(a.equal(b), "{tokens} x {inputs} x {outputs}");
            }
        }
    }
}

/// Odd sizes, so that no tensor splits evenly over threads or vector registers.
#[test]
fn the_number_of_threads_leaves_the_bits_alone() {
    let odd = anello_configs::Model { hidden: 96, heads: 6, kv_heads: 6, ffn: 250, vocab: 1003, ..sizes() };
    let f = Fixture::new(odd, Kind::Float, Dtype::Fp32);
    let batch = micro_batch(129, &[100, 158, 1, 128], 1003, |at| at % 11 == 0);
    let [one, two, three] = [1, 2, 3].map(|threads| {
        tch::set_num_threads(threads);
        f.pass(&batch, &compute(Recompute::Layer, 100), 3, 0.1)
    });
    assert_eq!(one.0, two.0, "2 threads");
    assert_eq!(one.0, three.0, "3 threads");
    for entry in f.layout.entries() {
        let of = |g: &Tensor| f.of(g, &entry.name);
        assert!(of(&one.1).equal(&of(&two.1)), "2 threads: {}", entry.name);
        assert!(of(&one.1).equal(&of(&three.1)), "3 threads: {}", entry.name);
    }
}

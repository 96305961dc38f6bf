//! The schedule: exact in tokens, consistent between its views, and monotone where it should be.

use std::collections::BTreeMap;

use anello_configs::*;
use proptest::prelude::*;

use crate::{loaded, small};

/// Stages of every shape that a config can have, small enough to walk step by step.
fn stage(index: usize) -> impl Strategy<Value = (Stage, u64)> {
    let curve = prop_oneof![
        (1e-6..1e-2).prop_map(|lr| LrCurve::Constant { lr }),
        (0.0..1e-2, 0.0..1e-2).prop_map(|(from, to)| LrCurve::Linear { from, to }),
        (0.0..1e-2, 0.0..1e-2).prop_map(|(from, to)| LrCurve::Cosine { from, to }),
        (1e-6..1e-2, 0.0..1e-2, 0.0..0.5, 0.01..0.5).prop_map(|(peak, to, warmup, decay)| LrCurve::Wsd {
            peak,
            to,
            warmup,
            decay
        }),
    ];
    let shape = (1u32..5, 1u32..4, 1u64..30, 1u64..100_000, 0u64..30, 0u64..=100);
    (shape, curve, any::<bool>(), prop::option::of(2u32..4)).prop_map(
        move |((sequence, micro_batch, batch, tokens, rise, over), lr, reset_optimizer, upcycle)| {
            let quantum_per_lane = u64::from(sequence * 2) * u64::from(micro_batch);
            let ramp = (rise > 0 && rise < batch)
                .then(|| Ramp { from: batch - rise, over: (tokens * over / 100).max(1) });
            let stage = Stage {
                name: format!("stage-{index}"),
                tokens,
                sequence: sequence * 2,
                // In units of the quantum, which lanes make up.
                batch: Batch { tokens: batch, ramp },
                micro_batch,
                lr,
                loops: 4,
                beta: 0.05,
                rope_base: 1e4,
                mixture: BTreeMap::from([("web".to_owned(), 1.0)]),
                mask: Mask::Document,
                trains: Trains::All,
                loss: Loss::Loop,
                reset_optimizer,
                upcycle: upcycle.map(|times| Upcycle { layers: times }),
                eval: None,
            };
            (stage, quantum_per_lane)
        },
    )
}

fn run() -> impl Strategy<Value = RunConfig> {
    let stages = (1usize..4).prop_flat_map(|count| (0..count).map(stage).collect::<Vec<_>>());
    (0u32..4, stages).prop_map(|(lanes, stages)| {
        let mut config = small(&[]).unwrap();
        config.lanes = 1 << lanes;
        config.model.layers = 1;
        let mut layers = 1;
        config.stages = stages
            .into_iter()
            .map(|(mut stage, quantum_per_lane)| {
                let quantum = quantum_per_lane << lanes;
                stage.batch.tokens *= quantum;
                if let Some(ramp) = &mut stage.batch.ramp {
                    ramp.from *= quantum;
                }
                if let Some(upcycle) = &mut stage.upcycle {
                    upcycle.layers *= layers;
                    layers = upcycle.layers;
                }
                stage
            })
            .collect();
        config
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_step_follows_from_the_stages(config in run()) {
        match RunConfig::parse("again", &config.to_toml()) {
            Ok(again) => prop_assert_eq!(&again, &config),
            Err(error) => prop_assert!(false, "{error}"),
        }
        let schedule = Schedule::new(&config);
        let (mut step, mut tokens, mut layers) = (0, 0, config.model.layers);
        for (index, (stage, span)) in schedule.stages().enumerate() {
            prop_assert_eq!((span.index, span.first_step, span.tokens_before), (index, step, tokens));
            prop_assert_eq!(stage, &config.stages[index]);
            let quantum = u64::from(config.lanes * stage.sequence * stage.micro_batch);
            layers = stage.upcycle.map_or(layers, |upcycle| upcycle.layers);
            let (mut stage_tokens, mut batch_before) = (0, 0);
            for stage_step in 0..span.steps {
                let plan = schedule.at(step).unwrap();
                let (first, last) = (stage_step == 0, stage_step + 1 == span.steps);
                prop_assert_eq!((plan.step, plan.stage_index, plan.stage), (step, index, stage));
                prop_assert_eq!((plan.stage_step, plan.stage_steps), (stage_step, span.steps));
                prop_assert_eq!((plan.first_of_stage, plan.last_of_stage), (first, last));
                prop_assert_eq!((plan.tokens_before, plan.stage_tokens_before), (tokens, stage_tokens));
                prop_assert_eq!(plan.reset_optimizer, first && stage.reset_optimizer);
                prop_assert_eq!(plan.upcycle, stage.upcycle.filter(|_| first));
                prop_assert_eq!((plan.layers, span.layers), (layers, layers));
                prop_assert_eq!(plan.sequences_per_lane * u64::from(config.lanes * stage.sequence), plan.batch_tokens);
                prop_assert_eq!(plan.micro_batches_per_lane * u64::from(stage.micro_batch), plan.sequences_per_lane);
                prop_assert!(plan.micro_batches_per_lane > 0 && plan.batch_tokens.is_multiple_of(quantum));
                // A ramp only rises, and never past the batch.
                prop_assert!(batch_before <= plan.batch_tokens && plan.batch_tokens <= stage.batch.tokens);
                if stage.batch.ramp.is_none_or(|ramp| ramp.over <= stage_tokens) {
                    prop_assert_eq!(plan.batch_tokens, stage.batch.tokens);
                }
                prop_assert!(plan.lr.is_finite() && plan.lr >= 0.0);
                batch_before = plan.batch_tokens;
                stage_tokens += plan.batch_tokens;
                tokens += plan.batch_tokens;
                step += 1;
                if last {
                    prop_assert_eq!(plan.lr.to_bits(), stage.lr.last().to_bits());
                    // Whole batches: without the last one the stage would fall short.
                    prop_assert!(stage_tokens >= stage.tokens && stage_tokens - plan.batch_tokens < stage.tokens);
                }
            }
            prop_assert!(span.steps > 0);
            prop_assert_eq!((span.tokens, span.tokens_asked), (stage_tokens, stage.tokens));
            if stage.batch.ramp.is_none() {
                prop_assert_eq!(span.tokens, stage.tokens.next_multiple_of(stage.batch.tokens));
            }
        }
        prop_assert_eq!((schedule.total_steps(), schedule.total_tokens()), (step, tokens));
        prop_assert_eq!(schedule.at(step), None);
        prop_assert_eq!(schedule.at(u64::MAX), None);
    }

    #[test]
    fn a_curve_stays_between_its_ends(from in 0.0..1.0, to in 0.0..1.0, warmup in 0.0..0.5, decay in 0.01..0.5, total in 1u64..5000) {
        let within = |lr: f64, a: f64, b: f64| lr >= a.min(b) - 1e-15 && lr <= a.max(b) + 1e-15;
        let curves = [LrCurve::Linear { from, to }, LrCurve::Cosine { from, to }];
        for done in 1..=total {
            for curve in curves {
                prop_assert!(within(curve.at(done, total), from, to));
            }
            let wsd = LrCurve::Wsd { peak: from, to, warmup, decay };
            let lr = wsd.at(done, total);
            prop_assert!(within(lr, from, to) || lr <= from);
        }
        // Linear and cosine are monotone; half-way they are at the mean.
        for curve in curves {
            let rates: Vec<f64> = (1..=total).map(|done| curve.at(done, total)).collect();
            let order = |a: &f64, b: &f64| if from <= to { *a <= *b + 1e-15 } else { *a + 1e-15 >= *b };
            prop_assert!(rates.windows(2).all(|pair| order(&pair[0], &pair[1])));
            prop_assert!((curve.at(total, 2 * total) - (from + to) / 2.0).abs() < 1e-12);
        }
    }
}

#[test]
fn a_ramp_climbs_by_one_quantum_in_equal_shares() {
    // lanes 2 × sequence 16 × micro-batch 1 = 32; from 32 to 128 in plateaus of 32, 64 and 96 over 1152 tokens.
    let config = small(&["stage.stable.batch_ramp={from=32,over=1152}", "stages=[\"stable\"]"]).unwrap();
    let schedule = Schedule::new(&config);
    let mut plateaus: Vec<(u64, u64)> = Vec::new();
    for step in 0..schedule.total_steps() {
        let batch = schedule.at(step).unwrap().batch_tokens;
        match plateaus.last_mut() {
            Some((tokens, steps)) if *tokens == batch => *steps += 1,
            _ => plateaus.push((batch, 1)),
        }
    }
    // 384 tokens each, then 2944 of the 4096 are left: 23 whole batches.
    assert_eq!(plateaus, [(32, 12), (64, 6), (96, 4), (128, 23)]);
    assert_eq!(schedule.total_tokens(), 4096);
}

#[test]
fn learning_rates_are_where_the_curves_put_them() {
    let config = small(&[]).unwrap();
    let schedule = Schedule::new(&config);
    // Warmup: 1000 tokens in batches of 64 are 16 steps; then 4096 in batches of 128.
    let lr = |step| schedule.at(step).unwrap().lr;
    assert_eq!(schedule.total_steps(), 16 + 32);
    assert_eq!([lr(0), lr(7), lr(15), lr(16), lr(47)], [1e-3 / 16.0, 1e-3 / 2.0, 1e-3, 1e-3, 1e-3]);
    let wsd = LrCurve::Wsd { peak: 1.0, to: 0.0, warmup: 0.25, decay: 0.5 };
    let rates: Vec<f64> = (1..=8).map(|done| wsd.at(done, 8)).collect();
    assert_eq!(rates, [0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]);
    let cosine = LrCurve::Cosine { from: 1.0, to: 0.0 };
    assert!((cosine.at(1, 4) - (1.0 + 0.5f64.sqrt()) / 2.0).abs() < 1e-15);
}

#[test]
fn six_trillion_tokens_are_exact_and_cost_nothing_to_ask_about() {
    let schedule = Schedule::new(&loaded("ouro-1.4b", &[]));
    assert_eq!(schedule.total_steps(), 1_804_831);
    let batch = 4 << 20;
    assert_eq!(schedule.total_tokens(), 1_804_831 * batch);
    let last = schedule.at(schedule.total_steps() - 1).unwrap();
    assert_eq!((last.lr, last.last_of_stage, last.stage.name.as_str()), (1e-6, true, "mid-training"));
    assert_eq!(last.tokens_before + last.batch_tokens, schedule.total_tokens());
    let first = schedule.at(11_921).unwrap();
    assert_eq!(
        (first.stage.name.as_str(), first.first_of_stage, first.micro_batches_per_lane),
        ("stable", true, 16)
    );
}

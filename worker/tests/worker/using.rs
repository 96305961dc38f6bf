//! Generation and evaluation against the plain computation.

use anello_configs::{Dtype, Mask, Model as Sizes};
use anello_worker::evaluate::{Evaluation, Sums, continuation};
use anello_worker::{Cache, GenerateOptions, Generator, Leave, Sampled, log_exit, token_losses};
use tch::{Kind, Tensor};

use super::support::{Fixture, micro_batch, sizes};

const PROMPT: [u32; 5] = [7, 3, 19, 44, 7];
const ROPE_BASE: f64 = 10_000.0;

fn fixture() -> Fixture {
    // Fewer key/value heads than heads, as some models have.
    Fixture::new(Sizes { kv_heads: 2, ..sizes() }, Kind::Float, Dtype::Fp32)
}

fn options(loops: u32, leave: Leave) -> GenerateOptions {
    GenerateOptions { loops, leave, cache: Cache::Full, temperature: 0.0, top_p: 1.0, seed: 1 }
}

fn generate(fixture: &Fixture, options: GenerateOptions, tokens: usize) -> Vec<Sampled> {
    let mut generator = Generator::new(&fixture.model, ROPE_BASE, PROMPT.len() + tokens, options);
    let mut written = vec![generator.next(&PROMPT)];
    while written.len() < tokens {
        written.push(generator.next(&[written[written.len() - 1].id]));
    }
    written
}

/// The next token by running the whole text through all loop steps.
fn plainly(fixture: &Fixture, ids: &[u32], loops: u32, leave: Leave) -> Sampled {
    let mut batch = micro_batch(ids.len() as u32, &[ids.len() as u32], 61, |_| false);
    batch.input_ids = ids.iter().map(|id| i64::from(*id)).collect();
    let last = ids.len() as i64 - 1;
    let hidden: Vec<Tensor> =
        fixture.hidden(&batch, loops).iter().map(|h| h.narrow(0, last, 1).detach()).collect();
    let p = log_exit(&fixture.model.gate_logits(&Tensor::stack(&hidden, 0))).exp().reshape([-1]);
    let p = Vec::<f64>::try_from(p.to_kind(Kind::Double)).unwrap();
    let distance =
        |t: usize| f64::try_from((&hidden[t] - &hidden[t - 1]).to_kind(Kind::Double).norm()).unwrap();
    let exit = match leave {
        Leave::Step(step) => step as usize,
        Leave::Mass(q) => (1..=p.len()).find(|m| p[..*m].iter().sum::<f64>() >= q).unwrap_or(p.len()),
        Leave::Near(d) => (1..p.len()).find(|t| distance(*t) < d).map_or(p.len(), |t| t + 1),
        Leave::Weighted => p.len(),
    };
    let logits = match leave {
        Leave::Weighted => {
            hidden.iter().zip(&p).map(|(h, p)| fixture.model.logits(h) * *p).reduce(|a, b| a + b).unwrap()
        }
        _ => fixture.model.logits(&hidden[exit - 1]),
    };
    let probabilities = logits.reshape([-1]).softmax(-1, Kind::Double);
    let id = probabilities.argmax(0, false).int64_value(&[]);
    Sampled { id: id as u32, exit: exit as u32, probability: probabilities.double_value(&[id]) }
}

#[test]
fn the_full_cache_is_the_plain_computation() {
    let fixture = fixture();
    let mut depths = std::collections::BTreeSet::new();
    for loops in [1, 2, 5] {
        let rules =
            [0.0, 0.3, 0.6, 1.0].map(Leave::Mass).into_iter().chain([Leave::Step(1), Leave::Step(loops)]);
        for leave in rules.chain([Leave::Near(3.0), Leave::Near(6.0), Leave::Weighted]) {
            let mut ids = PROMPT.to_vec();
            for (at, sampled) in generate(&fixture, options(loops, leave), 24).into_iter().enumerate() {
                let expected = plainly(&fixture, &ids, loops, leave);
                let what = format!("token {at}, {loops} loop steps, {leave:?}");
                assert_eq!((sampled.id, sampled.exit), (expected.id, expected.exit), "{what}");
                assert!(
                    (sampled.probability - expected.probability).abs() < 1e-4,
                    "{what}: {sampled:?}, {expected:?}"
                );
                depths.insert((loops, sampled.exit));
                ids.push(sampled.id);
            }
        }
    }
    assert!(depths.len() >= 7, "tokens left at few loop steps only: {depths:?}");
}

#[test]
fn shared_caches_differ_only_where_they_must() {
    let fixture = fixture();
    let with = |loops, cache| {
        generate(&fixture, GenerateOptions { cache, ..options(loops, Leave::Step(loops)) }, 12)
    };
    let near = |a: &Sampled, b: &Sampled| a.id == b.id && (a.probability - b.probability).abs() < 1e-4;
    for cache in [Cache::Last, Cache::Averaged, Cache::First] {
        // With one loop step there is nothing to share; a prompt alone is exact.
        let one: Vec<_> = with(1, cache).into_iter().zip(with(1, Cache::Full)).collect();
        assert!(one.iter().all(|(a, b)| near(a, b)), "{cache:?}: {one:?}");
        let (shared, full) = (with(3, cache), with(3, Cache::Full));
        assert!(near(&shared[0], &full[0]), "{cache:?}");
        assert!(shared.iter().zip(&full).any(|(a, b)| !near(a, b)), "{cache:?} is the full cache");
    }
    let (last, first) = (with(3, Cache::Last), with(3, Cache::First));
    assert!(last.iter().zip(&first).any(|(a, b)| !near(a, b)));
}

#[test]
fn a_seed_draws_the_same_text_again() {
    let fixture = fixture();
    let drawn = |seed, temperature, top_p| {
        let options = GenerateOptions { seed, temperature, top_p, ..options(2, Leave::Mass(0.5)) };
        generate(&fixture, options, 20).iter().map(|sampled| sampled.id).collect::<Vec<_>>()
    };
    assert_eq!(drawn(1, 1.5, 1.0), drawn(1, 1.5, 1.0));
    assert_ne!(drawn(1, 1.5, 1.0), drawn(2, 1.5, 1.0));
    let greedy = drawn(1, 0.0, 1.0);
    assert_ne!(drawn(1, 1.5, 1.0), greedy);
    assert_eq!(drawn(1, 1.5, 1e-9), greedy, "the smallest nucleus is the most probable token");
}

#[test]
fn the_figures_are_those_of_the_plain_objective() {
    let fixture = fixture();
    let loops = 3;
    // More than one chunk of lm_head, and tokens that do not count.
    let batch = micro_batch(240, &[100, 140, 7, 233, 240, 200, 40, 240], 61, |token| token % 7 == 3);
    let mut found = Evaluation::new(loops, &[0.0, 0.4, 1.0]);
    found.add(&fixture.model, &fixture.rotary, Mask::Document, &batch);
    found.add(&fixture.model, &fixture.rotary, Mask::Document, &batch);

    let hidden = Tensor::stack(&fixture.hidden(&batch, loops), 0);
    let plain = token_losses(&fixture.model, &hidden, &Tensor::from_slice(&batch.targets), 0.1);
    let sum = |x: &Tensor| {
        (x.to_kind(Kind::Double) * plain.counts_c.to_kind(Kind::Double)).sum(Kind::Double).double_value(&[])
    };
    let near = |a: f64, b: f64| (a - b).abs() < 1e-6 * b.abs().max(1.0) * batch.counted as f64;
    assert_eq!(found.counted, 2 * batch.counted);
    for step in 0..loops as usize {
        let at = |x: &Tensor| x.get(step as i64);
        assert!(near(found.steps[step].loss, 2.0 * sum(&at(&plain.cross_entropy_tc))), "L({})", step + 1);
        assert!(near(found.exit[step], 2.0 * sum(&at(&plain.exit_tc))), "p({})", step + 1);
        let right = fixture
            .model
            .logits(&hidden.get(step as i64))
            .argmax(-1, false)
            .eq_tensor(&Tensor::from_slice(&batch.targets));
        assert_eq!(found.steps[step].correct, 2 * sum(&right) as u64, "accuracy of {}", step + 1);
        assert_eq!(found.steps[step].depth, (step as u64 + 1) as f64 * found.counted as f64);
    }
    assert_eq!(found.by_mass[0].1, found.steps[0], "no mass is enough at once");
    let (middle, all) = (&found.by_mass[1].1, &found.by_mass[2].1);
    assert!(middle.depth > found.steps[0].depth && middle.depth < all.depth, "{middle:?}");
    assert!(all.depth > 2.9 * found.counted as f64, "all mass is behind the last step: {all:?}");
}

/// Of each question the most probable choice is the answer, by the sum over its tokens; the rest is of the right one, a mean over them.
#[test]
fn a_question_counts_as_one_and_its_most_probable_choice_is_the_answer() {
    let sums = |loss, depth| Sums { loss, correct: 0, depth };
    let choice = |tokens, losses: [f64; 2], by_mass, exit: [f64; 2]| Evaluation {
        counted: tokens,
        steps: vec![sums(losses[0], tokens as f64), sums(losses[1], 2.0 * tokens as f64)],
        exit: exit.to_vec(),
        by_mass: vec![(0.5, by_mass)],
    };
    let (short, long) = (
        choice(1, [4.0, 3.0], sums(3.5, 1.5), [0.25, 0.75]),
        choice(4, [2.0, 6.0], sums(3.6, 7.0), [1.0, 3.0]),
    );
    let mut found = Evaluation::new(2, &[0.5]);
    found.add_question(&[short.clone(), long.clone()], 1);
    let expected = |loss, correct, depth| Sums { loss, correct, depth };
    assert_eq!(
        found.steps,
        [expected(0.5, 1, 1.0), expected(1.5, 0, 2.0)],
        "at the second step the short one"
    );
    assert_eq!(found.by_mass, [(0.5, expected(0.9, 0, 1.75))]);
    assert_eq!((found.counted, &found.exit), (1, &vec![0.25, 0.75]));
    found.add_question(&[short, long], 0);
    assert_eq!(found.steps, [expected(4.5, 1, 2.0), expected(4.5, 1, 4.0)]);
    assert_eq!((found.counted, found.by_mass[0].1.correct), (2, 1));
}

#[test]
fn a_continuation_is_as_probable_as_its_tokens() {
    let fixture = fixture();
    let more = [12u32, 5, 60];
    let found = continuation(&fixture.model, ROPE_BASE, (2, &[0.0]), &PROMPT, &more);
    assert_eq!((found.counted, &found.by_mass[0].1), (3, &found.steps[0]));
    let scores: Vec<f64> = found.steps.iter().map(|step| -step.loss).collect();
    let mut expected = [0.0f64; 2];
    let mut ids = PROMPT.to_vec();
    for next in more {
        let mut batch = micro_batch(ids.len() as u32, &[ids.len() as u32], 61, |_| false);
        batch.input_ids = ids.iter().map(|id| i64::from(*id)).collect();
        for (expected, h) in expected.iter_mut().zip(fixture.hidden(&batch, 2)) {
            let last = h.narrow(0, ids.len() as i64 - 1, 1);
            let log = fixture.model.logits(&last).log_softmax(-1, Kind::Double);
            *expected += log.double_value(&[0, i64::from(next)]);
        }
        ids.push(next);
    }
    assert!(scores.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-3), "{scores:?}, {expected:?}");
}

//! The presets and recipes against the tables of LOOPLM §1 and §5, row by row.

use std::collections::BTreeMap;

use anello_configs::*;

use crate::{folder, loaded, path};

#[test]
fn every_preset_survives_being_written_down() {
    for name in presets() {
        let config = loaded(name, &[]);
        let again = RunConfig::parse("resolved", &config.to_toml()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(again, config);
        assert_eq!(again.digest(), config.digest());
        assert_eq!(config.name, name);
    }
}

#[test]
fn sizes_are_those_of_the_table() {
    let table = [
        // L, D, H, F, parameters as §1 writes them, billions as it rounds them
        ("ouro-1.4b", 24, 2048, 16, 5632, 1.43),
        ("ouro-2.6b", 48, 2048, 16, 5632, 2.67),
        ("ouro-2.6b-wide", 32, 2560, 32, 6912, 2.79),
    ];
    for (name, layers, hidden, heads, ffn, billions) in table {
        let config = loaded(name, &[]);
        let model = Model {
            layers,
            hidden,
            heads,
            kv_heads: heads,
            ffn,
            vocab: 49_152,
            rms_eps: 1e-6,
            init_std: 0.02,
            embed_std: 0.02,
            post_norm: 1.0,
        };
        assert_eq!(config.model, model, "{name}");
        let [l, d, f] = [layers, hidden, ffn].map(u64::from);
        let total = l * (4 * d * d + 3 * d * f + 4 * d) + 2 * 49_152 * d + d + (d + 1);
        assert_eq!(Parameters::new(&model, layers).total(), total, "{name}");
        assert!((total as f64 / 1e9 - billions).abs() < 0.006, "{name} has {total}");
        assert_eq!(config.compute.dtype, Dtype::Bf16);
    }
}

/// What a recipe's row says of a stage, and nothing that it does not.
type Row<'a> = (&'a str, u64, u32, u64, LrCurve, u32, f64, f64);

fn rows(config: &RunConfig) -> Vec<Row<'_>> {
    let row = |s: &'_ Stage| (s.tokens, s.sequence, s.batch.tokens, s.lr, s.loops, s.beta, s.rope_base);
    config
        .stages
        .iter()
        .map(|s| (s.name.as_str(), row(s)))
        .map(|(n, (a, b, c, d, e, f, g))| (n, a, b, c, d, e, f, g))
        .collect()
}

const B: u64 = 1_000_000_000;
const T: u64 = 1000 * B;
const MI: u64 = 1 << 20;

#[test]
fn recipe_ouro_is_the_table() {
    let config = loaded("ouro-1.4b", &[]);
    let cosine = |from, to| LrCurve::Cosine { from, to };
    assert_eq!(
        rows(&config),
        [
            ("warmup", T / 20, 4096, 4 * MI, LrCurve::Linear { from: 0.0, to: 3e-4 }, 4, 0.1, 1e4),
            ("stable", 6 * T, 4096, 4 * MI, LrCurve::Constant { lr: 3e-4 }, 4, 0.05, 1e4),
            ("ct-anneal", 1400 * B, 16_384, 4 * MI, cosine(3e-5, 3e-6), 4, 0.05, 4e4),
            ("longct", 20 * B, 65_536, 4 * MI, cosine(3e-5, 3e-6), 4, 0.05, 1e6),
            ("mid-training", 100 * B, 4096, 4 * MI, cosine(1e-5, 1e-6), 4, 0.05, 1e6),
        ]
    );
    common(&config);
}

#[test]
fn recipe_ouro_v4_is_table_1() {
    let folder = folder(&[("v4.toml", "include = [\"preset:ouro-1.4b\", \"recipe:ouro-v4\"]")]);
    let config = loaded(&path(&folder, "v4.toml"), &[]);
    let (cosine, constant) = (|from, to| LrCurve::Cosine { from, to }, |lr| LrCurve::Constant { lr });
    // The warmup takes the first 0.05 T of 3 T.
    let first = LrCurve::Wsd { peak: 3e-4, to: 3e-4, warmup: 0.0166667, decay: 0.0 };
    assert_eq!(
        rows(&config),
        [
            ("1a", 3 * T, 4096, 8 * MI, first, 8, 0.1, 1e4),
            ("1b", 3 * T, 4096, 8 * MI, constant(3e-4), 4, 0.05, 1e4),
            ("ct-anneal", 1400 * B, 16_384, 8 * MI, cosine(3e-4, 3e-5), 4, 0.05, 4e4),
            ("longct", 20 * B, 65_536, 8 * MI, constant(3e-5), 4, 0.05, 1e6),
            ("mid-training", 300 * B, 32_768, 8 * MI, cosine(3e-5, 1e-5), 4, 0.05, 1e6),
        ]
    );
    let ramps: Vec<Option<Ramp>> = config.stages.iter().map(|stage| stage.batch.ramp).collect();
    assert_eq!(ramps, [Some(Ramp { from: 4 * MI, over: 3 * T }), None, None, None, None]);
    common(&config);
}

/// What both recipes say.
fn common(config: &RunConfig) {
    assert_eq!(config.lanes, 64);
    let optimizer = Optimizer { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: 1.0 };
    assert_eq!(config.optimizer, optimizer);

    let one = [
        ("nemotron-cc", 73.4),
        ("map-cc", 13.0),
        ("ultra-fineweb-zh", 2.0),
        ("opencoder", 7.5),
        ("megamath-web", 4.1),
    ];
    let two = [
        ("nemotron-cc-hq", 66.5),
        ("nemotron-cc-math", 15.0),
        ("megamath-hq", 4.6),
        ("opencoder-annealing", 0.5),
        ("synthetic-code", 3.8),
        ("sft-code", 3.4),
        ("sft-general", 6.2),
    ];
    let owned = |rows: &[(&str, f64)]| {
        rows.iter().map(|(name, w)| ((*name).to_owned(), *w)).collect::<BTreeMap<_, _>>()
    };
    let mixtures: Vec<_> = config.stages.iter().map(|stage| &stage.mixture).collect();
    assert_eq!(mixtures[0], &owned(&one));
    assert_eq!(mixtures[1], &owned(&one));
    assert_eq!(mixtures[2], &owned(&two));
    assert_eq!(mixtures[3], &owned(&[("prolong-64k", 1.0)]));
    // Stage 4, in billions of tokens.
    let replayed = |rows: &[(&str, f64)], billions: f64| {
        rows.iter().map(|(name, share)| ((*name).to_owned(), billions * share / 100.0)).collect::<Vec<_>>()
    };
    let four: BTreeMap<String, f64> = [("sft-mix".to_owned(), 90.0)]
        .into_iter()
        .chain(replayed(&one, 30.0))
        .chain(replayed(&two, 180.0))
        .collect();
    assert_eq!(mixtures[4].keys().collect::<Vec<_>>(), four.keys().collect::<Vec<_>>());
    for (name, weight) in &four {
        assert!((mixtures[4][name] - weight).abs() < 1e-9, "{name}: {} is not {weight}", mixtures[4][name]);
    }
    assert!((mixtures[4].values().sum::<f64>() - 300.0).abs() < 1e-9);

    for stage in &config.stages {
        let quantum = 64 * u64::from(stage.sequence) * u64::from(stage.micro_batch);
        assert!(stage.batch.tokens.is_multiple_of(quantum), "{}", stage.name);
        assert_eq!((stage.mask, stage.trains, stage.loss), (Mask::Document, Trains::All, Loss::Loop));
        assert_eq!((stage.reset_optimizer, stage.upcycle), (false, None));
    }
}

#[test]
fn ouro_2_6b_grows_from_24_layers_as_its_comment_says() {
    let text =
        "include = [\"preset:ouro-2.6b\"]\nmodel.layers = 24\nstage.ct-anneal.upcycle = { layers = 48 }\n";
    for line in text.lines() {
        assert!(embedded("preset:ouro-2.6b").unwrap().contains(line), "{line}");
    }
    let folder = folder(&[("grow.toml", text)]);
    let config = loaded(&path(&folder, "grow.toml"), &[]);
    let layers: Vec<u32> = Schedule::new(&config).stages().map(|(_, span)| span.layers).collect();
    assert_eq!(layers, [24, 24, 48, 48, 48]);
}

#[test]
fn mano_is_the_papers_setting() {
    let config = loaded("mano", &[]);
    let optimizer = Optimizer { beta1: 0.9, beta2: 0.98, eps: 1e-6, weight_decay: 0.1, clip: 1.0 };
    assert_eq!(config.optimizer, optimizer);
    assert_eq!((config.model.hidden, config.model.layers), (1024, 2));
    let schedule = Schedule::new(&config);
    let spans: Vec<_> = schedule.stages().collect();
    assert_eq!(spans[0].1.steps, 1000);
    for (stage, span) in &spans {
        assert_eq!((stage.sequence, stage.batch.tokens, stage.loops), (1024, 128 * 1024, 6));
        assert_eq!((stage.mask, span.tokens), (Mask::Document, span.tokens_asked));
    }
    assert_eq!(spans[1].0.lr.last() * 10.0, spans[1].0.lr.first());
}

/// What loops are compared with differs in them, and in its name.
#[test]
fn without_loops_mano_is_the_same() {
    for (looped, once, sets) in [
        ("mano", "mano-x1", &["stage.warmup.loops=1", "stage.train.loops=1"][..]),
        ("mano-small", "mano-small-x1", &["stage.train.loops=1"][..]),
    ] {
        let name = format!("name={once}");
        assert_eq!(loaded(once, &[]), loaded(looped, &[&[name.as_str()], sets].concat()));
    }
}

/// Small where the paper's is large, and the same where the paper's point is made.
#[test]
fn mano_small_is_two_layers_looped_six_times_on_a_cpu() {
    let (config, paper) = (loaded("mano-small", &[]), loaded("mano", &[]));
    assert_eq!(config.model.layers, paper.model.layers);
    assert_eq!(config.stages[0].loops, paper.stages[1].loops);
    assert_eq!(config.optimizer.beta2, paper.optimizer.beta2);
    assert_eq!(Schedule::new(&config).stages().map(|(_, span)| span.steps).sum::<u64>(), 2048);
}

#[test]
fn tiny_goes_through_the_five_stages_of_ouro() {
    let (tiny, ouro) = (loaded("tiny", &[]), loaded("ouro-1.4b", &[]));
    let names = |config: &RunConfig| config.stages.iter().map(|stage| stage.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&tiny), names(&ouro));
    for (small, large) in tiny.stages.iter().zip(&ouro.stages) {
        assert_eq!((small.loops, small.rope_base), (large.loops, large.rope_base));
        assert!(small.beta > large.beta, "{}: so few tokens must teach all loop steps", small.name);
        assert_eq!(std::mem::discriminant(&small.lr), std::mem::discriminant(&large.lr));
    }
    assert_eq!(tiny.data.tokenizer.as_deref(), Some("data/tiny/tokenizer.json"));
    let urls: Vec<&str> = tiny.data.sources.values().map(|source| source.url.as_str()).collect();
    assert_eq!(urls, ["data/tiny/code", "data/tiny/docs"]);
    assert_eq!((tiny.lanes, tiny.model.vocab), (4, 2048));
}

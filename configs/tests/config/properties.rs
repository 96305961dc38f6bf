//! Whatever is written, there is a config or an error, never a panic; and a config is whole.

use anello_configs::*;
use proptest::prelude::*;

/// Everything that can be asked of a config which was accepted.
fn exercise(config: &RunConfig) {
    let again = RunConfig::parse("again", &config.to_toml()).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(&again, config);
    let schedule = Schedule::new(config);
    for step in [0, schedule.total_steps() / 2, schedule.total_steps() - 1] {
        assert_eq!(schedule.at(step).unwrap().step, step);
    }
    let cluster = Cluster { gpu: Gpu::ALL[0], count: 3, utilisation: 0.4 };
    assert!(!Plan::new(config, cluster).render().is_empty());
}

fn try_text(text: &str) {
    match RunConfig::parse("any.toml", text) {
        Ok(config) => exercise(&config),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Keys that mean something, and some that do not.
fn key() -> impl Strategy<Value = String> {
    let words = [
        "name",
        "seed",
        "lanes",
        "stages",
        "stage",
        "model",
        "layers",
        "hidden",
        "heads",
        "kv_heads",
        "ffn",
        "vocab",
        "optimizer",
        "beta1",
        "eps",
        "compute",
        "dtype",
        "threads",
        "device",
        "loss_chunk_tokens",
        "data",
        "sources",
        "url",
        "docs",
        "code",
        "tokenizer",
        "prefetch_bytes",
        "cache_dir",
        "cache_bytes",
        "checkpoint",
        "keep_last",
        "warmup",
        "stable",
        "longct",
        "tokens",
        "sequence",
        "batch",
        "batch_ramp",
        "from",
        "over",
        "micro_batch",
        "lr",
        "lr_curve",
        "lr_from",
        "lr_to",
        "lr_warmup",
        "lr_decay",
        "loops",
        "beta",
        "mixture",
        "upcycle",
        "loss",
        "trains",
        "include",
        "",
    ];
    prop::collection::vec(prop::sample::select(words.to_vec()), 1..5).prop_map(|keys| keys.join("."))
}

fn value() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<i64>().prop_map(|v| v.to_string()),
        (0u64..5000).prop_map(|v| v.to_string()),
        (0u32..20).prop_map(|v| (1u64 << v).to_string()),
        any::<f64>().prop_map(|v| format!("{v:?}")),
        (0u32..2000, "[KMBTi]{0,2}").prop_map(|(v, unit)| format!("\"{v}{unit}\"")),
        "\\PC{0,12}",
        Just("[\"warmup\", \"stable\"]".to_owned()),
        Just("{ docs = 1, layers = 4, from = 4096, over = 10000 }".to_owned()),
        Just("\"wsd\"".to_owned()),
        Just("gate".to_owned()),
        Just("1979-05-27".to_owned()),
        Just("none".to_owned()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_text(text in any::<String>()) {
        try_text(&text);
    }

    #[test]
    fn any_toml(lines in prop::collection::vec((key(), value(), any::<bool>()), 0..12)) {
        let line = |(key, value, table): (String, String, bool)| {
            if table { format!("[{key}]\n") } else { format!("{key} = {value}\n") }
        };
        try_text(&lines.into_iter().map(line).collect::<String>());
    }

    #[test]
    fn any_change_of_a_preset(at in any::<prop::sample::Index>(), length in 0usize..8, with in "\\PC{0,6}") {
        let text = embedded("preset:tiny").unwrap();
        let boundaries: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
        let start = at.index(boundaries.len());
        let end = (start + length).min(boundaries.len() - 1);
        try_text(&format!("{}{with}{}", &text[..boundaries[start]], &text[boundaries[end]..]));
    }

    #[test]
    fn any_set(sets in prop::collection::vec(prop_oneof![any::<String>(), (key(), value()).prop_map(|(k, v)| format!("{k}={v}"))], 0..4),
               variable in any::<String>(), value in any::<String>()) {
        let environment = vec![(format!("ANELLO_SET__{variable}"), value)];
        for environment in [Vec::new(), environment] {
            let options = LoadOptions { sets: sets.clone(), environment, ..LoadOptions::new("tiny") };
            match RunConfig::load(&options) {
                Ok(loaded) => exercise(&loaded.config),
                Err(error) => prop_assert!(!error.problems().is_empty()),
            }
        }
    }

    /// Numbers in and around their ranges, where the arithmetic of plans and schedules could overflow.
    #[test]
    fn any_size(set in prop::sample::select(vec!["lanes", "model.layers", "model.hidden", "model.ffn", "model.vocab",
                "stage.stable.tokens", "stage.stable.sequence", "stage.stable.batch", "stage.stable.micro_batch"]),
                bits in 0u32..64, more in 0u64..3) {
        let options = LoadOptions { sets: vec![format!("{set}={}", (1u64 << bits) - 1 + more)], ..LoadOptions::new("tiny") };
        if let Ok(loaded) = RunConfig::load(&options) {
            exercise(&loaded.config);
        }
    }
}

#[test]
fn deep_nesting_is_an_error() {
    for text in [
        format!("a = {}", "[".repeat(100_000)),
        format!("a = {}{}", "[".repeat(100_000), "]".repeat(100_000)),
        format!("a = {}", "{a=".repeat(100_000)),
        format!("[{}a]", "a.".repeat(100_000)),
        format!("{}a = 1", "a.".repeat(100_000)),
    ] {
        assert!(RunConfig::parse("deep.toml", &text).is_err());
        assert!(RunConfig::load(&LoadOptions { sets: vec![text], ..LoadOptions::new("tiny") }).is_err());
    }
    let sets = vec![format!("{}a=1", "a.".repeat(100_000))];
    assert!(RunConfig::load(&LoadOptions { sets, ..LoadOptions::new("tiny") }).is_err());
}

/// The largest of everything at once.
#[test]
fn the_largest_config_that_is_accepted_has_a_plan() {
    let sets = [
        "lanes=65536",
        "model.layers=4096",
        "model.hidden=1048576",
        "model.heads=4096",
        "model.ffn=16777216",
        "model.vocab=16777216",
        "stage.stable.sequence=256",
        "stage.stable.micro_batch=65536",
        "stage.stable.loops=64",
        "stage.stable.batch=1Ti",
        "stage.stable.tokens=10000T",
        "compute.recompute=none",
        "data.prefetch_bytes=64TiB",
        "stages=[\"stable\"]",
    ];
    let sets = sets.map(str::to_owned).to_vec();
    match RunConfig::load(&LoadOptions { sets, ..LoadOptions::new("tiny") }) {
        Ok(loaded) => exercise(&loaded.config),
        Err(error) => panic!("{error}"),
    }
}

//! What a user reads when a config is wrong. Each case is one change to a config that is right.

use anello_configs::RunConfig;

use crate::{SMALL, folder, load, path, small};

fn shown(result: Result<RunConfig, anello_configs::ConfigError>) -> String {
    match result {
        Ok(_) => "accepted".to_owned(),
        Err(error) => error.problems().iter().map(|p| format!("  {p}\n")).collect::<String>() + &io(&error),
    }
}

fn io(error: &anello_configs::ConfigError) -> String {
    if error.problems().is_empty() { format!("  {error}\n") } else { String::new() }
}

/// [`SMALL`] with one text replaced, as `run.toml`.
fn changed(from: &str, to: &str) -> String {
    assert!(SMALL.contains(from), "{from}");
    shown(RunConfig::parse("run.toml", &SMALL.replacen(from, to, 1)))
}

#[test]
fn one_slip_in_a_file() {
    let cases = [
        ("lanes = 2", "lanes = 3"),
        ("lanes = 2", "lanes = 0"),
        ("lanes = 2", "lanse = 2"),
        ("name = \"small\"", "name = \"a/b\""),
        ("name = \"small\"", ""),
        ("stages = [\"warmup\", \"stable\"]", "stages = []"),
        ("stages = [\"warmup\", \"stable\"]", "stages = [\"warmup\", \"stable\", \"warmup\"]"),
        ("stages = [\"warmup\", \"stable\"]", "stages = [\"warmup\", \"stabel\", 3]"),
        ("stages = [\"warmup\", \"stable\"]", "stages = [\"stable\"]"),
        ("stages = [\"warmup\", \"stable\"]", ""),
        ("layers = 2", "layers = \"two\""),
        ("layers = 2", "layers = -1"),
        ("layers = 2", "layers = 99999999999999999999999999999999999999999999"),
        ("layers = 2", ""),
        ("layers = 2", "layers = 2\nactivation = \"gelu\""),
        ("heads = 2", "heads = 3"),
        ("heads = 2", "heads = 8"),
        ("heads = 2", "heads = 2\nkv_heads = 3"),
        ("hidden = 8", "hidden = 7"),
        ("[model]", "[modle]"),
        ("web.url = \"data/web\"", "web.url = \"ftp://host/web\""),
        ("web.url = \"data/web\"", "web.url = \"\""),
        ("web.url = \"data/web\"", "web = \"data/web\""),
        ("web.url = \"data/web\"", ""),
        ("web.url = \"data/web\"", "web.url = \"data/web\"\n\"c4 en\".url = \"data/c4\""),
        ("mixture = { web = 1 }", "mixture = { web = 0 }"),
        ("mixture = { web = 1 }", "mixture = { web = -1 }"),
        ("mixture = { web = 1 }", "mixture = { wbe = 1 }"),
        ("mixture = { web = 1 }", "mixture = { books = 1 }"),
        ("mixture = { web = 1 }", "mixture = \"web\""),
        ("mixture = { web = 1 }", ""),
        ("tokens = 1000", "tokens = \"1000 MB\""),
        ("tokens = 1000", "tokens = \"0.3\""),
        ("sequence = 16\nbatch = 64", "squence = 16\nbatch = 64"),
        ("batch = 64", "batch = 100"),
        ("batch = 64", "batch = 10"),
        ("micro_batch = 2", "micro_batch = 2\nloops = 0"),
        ("micro_batch = 2", "micro_batch = 2\nbeta = -0.1"),
        ("micro_batch = 2", "micro_batch = 2\nbeta = nan"),
        ("micro_batch = 2", "micro_batch = 2\nmask = \"documents\""),
        ("micro_batch = 2", "micro_batch = 2\nreset_optimizer = 1"),
        ("micro_batch = 2", "micro_batch = 2\nupcycle = { layers = 5 }"),
        ("micro_batch = 2", "micro_batch = 2\nupcycle = 4"),
        ("micro_batch = 2", "micro_batch = 2\nbatch_ramp = { from = 32, over = 2000 }"),
        ("micro_batch = 2", "micro_batch = 2\nbatch_ramp = { from = 64, over = 100 }"),
        ("micro_batch = 2", "micro_batch = 2\nloss = \"gate\"\ntrains = \"all\""),
        ("micro_batch = 2", "micro_batch = 2\nloss = \"sft\"\ntrains = \"gate\""),
        ("micro_batch = 2", "micro_batch = 2\nloss = \"gate\"\nloops = 1"),
        ("lr_from = 0", "lr = 1e-3"),
        ("lr_curve = \"linear\"", ""),
        ("lr_curve = \"linear\"", "lr_curve = \"quadratic\""),
        ("lr = 1e-3", "lr = 1e-3\nlr_curve = \"wsd\"\nlr_warmup = 0.4\nlr_decay = 0.7"),
        ("lr = 1e-3", "lr = 1e-3\nlr_curve = \"wsd\"\nlr_to = 1e-4"),
        ("lr = 1e-3", "lr = 30"),
        ("[model]", "[optimizer]\nbeta1 = 1.0\nclip = 0\n[model]"),
        (
            "[model]",
            "[compute]\nloss_chunk_tokens = 10_000\nthreads = 0\ndevice = \"cuda:01\"\ndtype = \"fp16\"\n[model]",
        ),
        ("[model]", "[checkpoint]\nkeep_last = 1\npart_bytes = \"1KiB\"\n[model]"),
        ("[model]", "include = [\"preset:tiny\"]\n[model]"),
        ("[model]", "[model"),
        ("hidden = 8", "hidden = 8\nhidden = 16\nheads ="),
    ];
    let mut text = String::new();
    for (from, to) in cases {
        let line = |text: &str| text.replace('\n', " ⏎ ");
        text.push_str(&format!("{} → {}\n{}\n", line(from), line(to), changed(from, to)));
    }
    insta::assert_snapshot!(text);
}

#[test]
fn one_slip_on_the_command_line() {
    let cases: &[&[&str]] = &[
        &["lanes=6"],
        &["lanes"],
        &["=3"],
        &["stage..lr=3"],
        &["include=preset:tiny"],
        &["stage.stabel.lr=1e-4"],
        &["stage.warmup.lr=1e-4"],
        &["stage.stable.lr=fast"],
        &["data.prefetch_bytes=4KiB", "stage.stable.sequence=256", "stage.stable.batch=512"],
        &["stage.stable.sequence=2", "stage.stable.batch=1Mi", "stage.stable.batch_ramp={from=4, over=100}"],
        &["stage.stable=4"],
        &["lanes=5", "model.layres=3", "seed"],
        &["stage.stable.micro_batch=16"],
        &["model.hidden=10", "model.heads=4"],
        &["stage.warmup.upcycle.layers=6", "stage.stable.upcycle.layers=9"],
    ];
    let folder = folder(&[("small.toml", SMALL)]);
    let mut text = String::new();
    for sets in cases {
        let result = load(&path(&folder, "small.toml"), sets).map(|loaded| loaded.config);
        let result = shown(result).replace(folder.path().to_str().unwrap(), "");
        text.push_str(&format!("--set {}\n{result}\n", sets.join(" --set ")));
    }
    let mut environment = anello_configs::LoadOptions::new("tiny");
    environment.environment =
        vec![("ANELLO_SET__lanes".into(), "5".into()), ("ANELLO_SET__".into(), "5".into())];
    let environment = RunConfig::load(&environment).map(|loaded| loaded.config);
    text.push_str(&format!("in the environment\n{}", shown(environment)));
    insta::assert_snapshot!(text);
}

/// Everything that is wrong is said at once, in a config with an error of every kind.
#[test]
fn all_at_once() {
    let text = r#"
name = "bad"
lanes = 12
stages = ["warmup", "stable", "anneal"]

[model]
layers = 2
hidden = 100
heads = 3
ffn = 0
vocab = 64
dropout = 0.1

[data.sources.web]
url = "data/web"

[stage.warmup]
tokens = "1M"
sequence = 16
batch = 1000
lr = 1e-3
loops = 0

[stage.stable]
tokens = "1M"
sequence = 16
batch = 384
lr_curve = "cosine"
lr = 1e-3
mixture = { wen = 1 }

[stage.extra]
tokens = 5
"#;
    insta::assert_snapshot!(RunConfig::parse("bad.toml", text).unwrap_err());
}

#[test]
fn files_that_are_not_there() {
    let folder = folder(&[
        ("missing.toml", "include = [\"preset:tiny\", \"nowhere.toml\"]\n"),
        ("typo.toml", "include = [\"preset:tniy\", 3]\n"),
    ]);
    let names = [
        "tniy",
        "nowhere.toml",
        "recipe:ouro-v5",
        &path(&folder, "missing.toml"),
        &path(&folder, "typo.toml"),
    ];
    let text: String = names.map(|name| shown(load(name, &[]).map(|loaded| loaded.config)) + "\n").concat();
    insta::assert_snapshot!(text.replace(folder.path().to_str().unwrap(), ""));
}

#[test]
fn lanes_and_sources_fit_into_a_steps_word() {
    let sources = |many: usize| -> Vec<String> {
        (0..many)
            .map(|at| format!("data.sources.s{at}.url=nowhere/{at}"))
            .chain(["lanes=65536".to_owned()])
            .collect()
    };
    let shown = |many| {
        let set = sources(many);
        small(&set.iter().map(String::as_str).collect::<Vec<_>>()).unwrap_err().to_string()
    };
    let refused = "every step tells of every lane's place in each, at most 262144 in all";
    let text = shown(3);
    assert!(text.contains(refused) && text.contains("give at most 32768 lanes or 4 sources"), "{text}");
    let text = shown(2);
    assert!(!text.contains(refused), "{text}");
}

#[test]
fn graphs_are_of_fused_kernels_and_of_what_stays_on_the_gpu() {
    let on = ["compute.device=cuda", "compute.graphs=true", "compute.fused=true"];
    small(&on).unwrap();
    let text = small(&on[..2]).unwrap_err().to_string();
    assert!(text.contains("compute.graphs is true, and compute.fused is not"), "{text}");
    assert!(text.contains("set compute.fused to true, or leave compute.graphs out"), "{text}");
    let text = small(&[on[0], on[1], on[2], "compute.offload=true"]).unwrap_err().to_string();
    assert!(text.contains("compute.graphs and compute.offload are true"), "{text}");
}

#[test]
fn fused_kernels_are_a_gpus_and_of_a_width() {
    let text = small(&["compute.fused=true"]).unwrap_err().to_string();
    assert!(text.contains("compute.device is \"cpu\", which has no fused kernels"), "{text}");
    assert!(text.contains("set compute.device to \"cuda\", or leave compute.fused out"), "{text}");
    let on = ["compute.device=cuda", "compute.fused=true"];
    small(&on).unwrap();
    let text = small(&[on[0], on[1], "model.hidden=12296"]).unwrap_err().to_string();
    assert!(text.contains("compute.fused is true, and model.hidden is 12296"), "{text}");
}

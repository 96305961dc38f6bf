//! Against the figures of LOOPLM §8, and snapshots of every preset.

use super::*;
use crate::load::{LoadOptions, presets};

fn load(name: &str, sets: &[&str]) -> RunConfig {
    let sets = sets.iter().map(|s| (*s).to_owned()).collect();
    match RunConfig::load(&LoadOptions { sets, ..LoadOptions::new(name) }) {
        Ok(loaded) => loaded.config,
        Err(error) => panic!("{name}: {error}"),
    }
}

fn cluster(gpu: &str, count: u32) -> Cluster {
    Cluster { gpu: gpu.parse().unwrap(), count, utilisation: 0.4 }
}

fn stage<'a>(plan: &'a Plan, name: &str) -> &'a StageEstimate {
    plan.stages.iter().find(|stage| stage.stage.name == name).unwrap()
}

#[test]
fn a_token_of_ouro_1_4b_at_4k_is_37_gflop() {
    let plan = Plan::new(&load("ouro-1.4b", &[]), cluster("h100", 64));
    let flops = stage(&plan, "stable").flops;
    // 6·(24·(4·2048² + 3·2048·5632) + 49152·2048)·4 + 6·24·4·2048·4096
    assert_eq!(flops.model, 36_842_766_336.0);
    // Recomputing the stack adds a third of the stack's share, which is all but the logits.
    let logits = 6.0 * 4.0 * 49_152.0 * 2048.0;
    assert_eq!(flops.recomputed, (flops.model - logits) / 3.0);
    assert_eq!(stage(&plan, "longct").flops.model, 36_842_766_336.0 + 6.0 * 24.0 * 4.0 * 2048.0 * 61_440.0);
}

#[test]
fn states_are_18_bytes_a_parameter() {
    for (name, gigabytes) in [("ouro-1.4b", 26), ("ouro-2.6b", 48)] {
        let plan = Plan::new(&load(name, &[]), cluster("h100", 64));
        let (state, parameters) = (plan.stages[0].memory.state(), plan.stages[0].parameters.total());
        assert_eq!(state, 18 * parameters);
        assert_eq!((state as f64 / 1e9).round() as u64, gigabytes, "{name}");
    }
    // Graphs add to a gradient of their own.
    let graphs = ["compute.device=cuda", "compute.fused=true", "compute.graphs=true"];
    let plan = Plan::new(&load("ouro-1.4b", &graphs), cluster("h100", 64));
    assert_eq!(plan.stages[0].memory.state(), 22 * plan.stages[0].parameters.total());
    // In fp32 there are no bf16 copies.
    let plan = Plan::new(&load("tiny", &[]), cluster("h100", 1));
    assert_eq!(plan.stages[0].memory.state(), 16 * plan.stages[0].parameters.total());
}

#[test]
fn moments_that_are_shared_out_take_less_with_every_worker() {
    let config = load("ouro-2.6b", &["ring.state_copies=2"]);
    let moments = |workers| Plan::new(&config, cluster("h100", workers)).stages[0].memory.moments;
    let parameters = Plan::new(&config, cluster("h100", 1)).stages[0].parameters.total();
    // Of two, each has what it owns and what the other does.
    assert_eq!([1, 2].map(moments), [8 * parameters; 2]);
    // 8 bytes of moments and 4 of the gradient that is kept beside them, of two shares.
    assert_eq!([4, 8, 64].map(moments), [4, 8, 64].map(|workers| (24 * parameters).div_ceil(workers)));
}

#[test]
fn a_ring_holds_the_sum_and_by_nccl_what_it_is_made_of() {
    let parameters = Parameters::new(&load("ouro-2.6b", &[]).model, 48).total();
    for (transport, workers, bytes) in [
        ("tcp", 1, 0),
        ("nccl", 1, 0),
        ("tcp", 4, 4 * parameters),
        ("nccl", 4, 7 * parameters),
        ("nccl", 2, 6 * parameters),
    ] {
        let config = load("ouro-2.6b", &[&format!("ring.transport={transport}")]);
        let plan = Plan::new(&config, cluster("h100", workers));
        assert_eq!(plan.stages[0].memory.sum, bytes, "{workers} workers by {transport}");
    }
}

#[test]
fn logits_and_layer_inputs_at_64k_are_as_the_paper_notes_say() {
    assert_eq!(logits_bytes(65_536, 49_152), 12_884_901_888); // 12.9 GB
    let plan = Plan::new(&load("ouro-1.4b", &[]), cluster("h100", 64));
    assert_eq!(stage(&plan, "longct").memory.inputs, 25_769_803_776); // 26 GB
}

#[test]
fn inputs_on_the_host_let_a_gpu_take_what_it_could_not() {
    let longct = |sets: &[&str]| {
        let plan = Plan::new(&load("ouro-1.4b", sets), cluster("h100", 8));
        (plan.fits(), stage(&plan, "longct").memory, plan.render())
    };
    let (fits, kept, text) = longct(&[]);
    assert!(!fits && text.contains("keep layer inputs on the host (compute.offload)"), "{text}");
    let (fits, away, text) = longct(&["compute.offload=true"]);
    assert!(fits && text.contains("note: layer inputs wait on the host: up to 25.8 GB"), "{text}");
    let hidden_state = 65_536 * 2048 * 2;
    assert_eq!((away.inputs, away.on_host), (3 * hidden_state, kept.inputs));
    assert_eq!(away.total(), kept.total() - kept.inputs + 3 * hidden_state);
}

#[test]
fn the_fold_holds_a_gradient_for_each_doubling_of_lanes() {
    let config = load("ouro-1.4b", &[]);
    let gradient = 4 * Parameters::new(&config.model, 24).total();
    for (workers, lanes, buffers) in [(64, 1, 0), (32, 2, 1), (16, 4, 2), (1, 64, 6), (48, 2, 1), (128, 1, 0)]
    {
        let plan = Plan::new(&config, cluster("h100", workers));
        assert_eq!(
            (plan.lanes_per_worker, plan.stages[0].memory.fold),
            (lanes, buffers * gradient),
            "{workers}"
        );
    }
}

#[test]
fn time_follows_from_flops_and_the_slowest_worker() {
    let config = load("ouro-1.4b", &[]);
    let (one, all) = (Plan::new(&config, cluster("h100", 1)), Plan::new(&config, cluster("h100", 64)));
    assert!((one.seconds() / all.seconds() - 64.0).abs() < 1e-9);
    assert!((one.gpu_hours() / all.gpu_hours() - 1.0).abs() < 1e-9);
    assert!((all.seconds() * 64.0 * 989e12 * 0.4 / all.flops() - 1.0).abs() < 1e-9);
    // 48 workers serve 64 lanes at the pace of those that have two, and 128 at the pace of 64.
    assert_eq!(
        Plan::new(&config, cluster("h100", 48)).seconds(),
        Plan::new(&config, cluster("h100", 32)).seconds()
    );
    assert_eq!(Plan::new(&config, cluster("h100", 128)).seconds(), all.seconds());
}

#[test]
fn a_gate_stage_runs_forward_only_and_sft_needs_one_loop_step_of_logits() {
    let config = load("ouro-1.4b", &["stage.stable.loss=gate"]);
    let plan = Plan::new(&config, cluster("h100", 64));
    assert_eq!(stage(&plan, "stable").flops, TokenFlops { model: 36_842_766_336.0 / 3.0, recomputed: 0.0 });
    let config = load("ouro-1.4b", &["stage.stable.loss=sft"]);
    let plan = Plan::new(&config, cluster("h100", 64));
    assert_eq!(stage(&plan, "stable").flops.model, 36_842_766_336.0 - 6.0 * 3.0 * 49_152.0 * 2048.0);
}

#[test]
fn every_preset_has_a_plan() {
    for name in presets() {
        let (gpu, count) = if name.starts_with("ouro") { ("h100", 64) } else { ("h100", 1) };
        let plan = Plan::new(&load(name, &[]), cluster(gpu, count));
        insta::assert_snapshot!(format!("plan_{name}"), plan.render());
    }
}

#[test]
fn other_plans() {
    let v4 = RunConfig::parse("v4.toml", &load_toml("include = [\"preset:ouro-1.4b\", \"recipe:ouro-v4\"]"))
        .unwrap();
    insta::assert_snapshot!("plan_ouro_v4", Plan::new(&v4, cluster("h200", 64)).render());
    let grown = load("ouro-2.6b", &["model.layers=24", "stage.ct-anneal.upcycle={layers=48}"]);
    insta::assert_snapshot!("plan_upcycled", Plan::new(&grown, cluster("a100", 96)).render());
}

/// The resolved TOML of a file with this text.
fn load_toml(text: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    std::fs::write(&path, text).unwrap();
    match RunConfig::load(&LoadOptions::new(path.to_str().unwrap())) {
        Ok(loaded) => loaded.config.to_toml(),
        Err(error) => panic!("{error}"),
    }
}

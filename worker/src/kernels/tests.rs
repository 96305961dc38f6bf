//! The kernels on a CPU, by their own text as C++, and that NVRTC compiles it.

use std::path::Path;

use anello_configs::{RunConfig, Schedule};
use anello_dataloader::MicroBatch;

use super::adamw::flat;
use super::*;
use crate::account::weights_digest;
use crate::engine::Engine;
use crate::optimizer::State;

/// Sizes that are multiples of nothing, and those where a warp, a block or its rows are just full.
const SIZES: [Sizes; 3] = [
    Sizes { tokens: 37, hidden: 65, ffn: 1027, heads: 3, head_size: 10, vocab: 131, flat: 5 * 1024, runs: 0 },
    Sizes {
        tokens: 16,
        hidden: 256,
        ffn: 1024,
        heads: 2,
        head_size: 64,
        vocab: 1024,
        flat: 8 * 1024,
        runs: 0,
    },
    Sizes { tokens: 1, hidden: 2, ffn: 1, heads: 1, head_size: 2, vocab: 2, flat: 1024, runs: 0 },
];

#[test]
fn every_kernel_is_right_forward_and_backward_in_both_formats() {
    let kernels = Kernels::emulated();
    for sizes in SIZES {
        let found = check(&kernels, Device::Cpu, sizes);
        assert_eq!(found.len(), 3 + 2 * 9);
        for checked in found {
            assert!(checked.is_right(), "{checked} with {sizes:?}");
        }
    }
}

#[test]
fn what_is_wrong_is_told() {
    let checked = Checked {
        name: "RoPE, bf16".to_owned(),
        off: 0.25,
        exact: false,
        repeatable: true,
        bytes: 3_000_000_000,
        seconds: Some(1e-3),
        chain_seconds: Some(4e-3),
    };
    let told = |checked: &Checked| (checked.is_right(), checked.to_string());
    let text = "RoPE, bf16: right, 25 % of what rounding may make, 3000 GB/s, 4.00 times LibTorch's chain";
    assert_eq!(told(&checked), (true, text.to_owned()));
    let wrong = Checked { off: 1.5, seconds: None, ..checked.clone() };
    assert_eq!(told(&wrong), (false, "RoPE, bf16: WRONG, 1.500 times what rounding may make".to_owned()));
    let exact = Checked { off: 2.0, exact: true, seconds: None, ..checked.clone() };
    assert_eq!(told(&exact), (false, "RoPE, bf16: WRONG, 2 elements have other bits".to_owned()));
    let unsteady = Checked { repeatable: false, seconds: None, ..checked.clone() };
    assert!(!unsteady.is_right() && unsteady.to_string().ends_with("NOT THE SAME BITS TWICE"));
    assert!(!Checked { off: f64::NAN, ..checked }.is_right());
}

/// A number that is none, or too large for a bf16, stays so.
#[test]
fn what_is_not_finite_stays_so() {
    let kernels = Kernels::emulated();
    for kind in [Kind::Float, Kind::BFloat16] {
        for poison in [f64::NAN, f64::INFINITY] {
            let gate_up = Tensor::from_slice(&[1.0, poison, 1.0, 1.0]).view([1, 4]).to_kind(kind);
            let found =
                Vec::<f64>::try_from(kernels.swiglu(&gate_up).view([-1]).to_kind(Kind::Double)).unwrap();
            assert!(found[0].is_finite() && !found[1].is_finite(), "{kind:?} {poison}: {found:?}");
        }
    }
    let large = Tensor::from_slice(&[3.4e38f32, 3.4e38]).view([1, 2]).to_kind(Kind::BFloat16);
    assert!(!kernels.swiglu(&large).isfinite().all().double_value(&[]).eq(&1.0));
}

#[test]
#[should_panic(expected = "what a kernel is given")]
fn buffers_of_other_lengths_are_refused() {
    let (a, b) =
        (Tensor::zeros([8], (Kind::Float, Device::Cpu)), Tensor::zeros([7], (Kind::Float, Device::Cpu)));
    flat([&a, &b]);
}

fn config(more: &[(&str, &str)]) -> RunConfig {
    let mut text = r#"
name = "fused"
seed = 7
lanes = 2
stages = ["train"]
[model]
layers = 1
hidden = 32
heads = 4
kv_heads = 2
ffn = 48
vocab = 61
init_std = 0.2
[data]
sources.mano.url = "mano"
[stage.train]
tokens = 96
sequence = 16
batch = 32
micro_batch = 1
lr = 1e-2
loops = 2
beta = 0.05
[compute]
"#
    .to_owned();
    for (key, value) in more {
        text += &format!("{key} = \"{value}\"\n");
    }
    RunConfig::parse("fused.toml", &text).unwrap()
}

/// Two documents of 7 and 9 tokens that follow from `seed`.
fn batch(seed: u64) -> MicroBatch {
    let stream = anello_configs::random::Stream::new(seed, "tokens", &[]);
    let ids: Vec<i64> = (0..17).map(|at| stream.below_at(at, 61) as i64).collect();
    let is_last = |at: usize| at == 6 || at == 15;
    MicroBatch {
        sequences: 1,
        length: 16,
        input_ids: ids[..16].to_vec(),
        targets: (0..16).map(|at| if is_last(at) { -100 } else { ids[at + 1] }).collect(),
        positions: (0..7).chain(0..9).collect(),
        segment_starts: Vec::from([0, 7]),
        counted: 14,
    }
}

/// Losses of two steps, and the weights after them; the update in `halves`, as a ring with shared-out moments makes it.
fn trained(config: &RunConfig, kernels: Option<Kernels>, halves: bool) -> (Vec<f64>, String) {
    let schedule = Schedule::new(config);
    let mut engine = Engine::with_kernels(config, State::of_seed(config, Device::Cpu), kernels);
    let mut losses = Vec::new();
    for step in 0..2 {
        let plan = schedule.at(step).unwrap();
        engine.enter(&plan);
        for lane in 0..2 {
            engine.lane(plan.stage, lane, &[batch(step * 2 + u64::from(lane))]);
        }
        if halves {
            let mut partials = engine.take_partials();
            let (_, _, gradient, sums) = partials.pop().unwrap();
            let blocks = engine.state().layout.blocks();
            let (prepared, _) = engine.prepare(&plan, &gradient, &sums, 0..blocks);
            let update = engine.complete(prepared, &gradient);
            assert!(update.applied);
            engine.recycle(gradient);
            losses.push(sums.loss / sums.counted as f64);
        } else {
            let outcome = engine.finish(&plan);
            assert!(outcome.update.applied);
            losses.push(outcome.loss());
        }
    }
    (losses, weights_digest(engine.state()))
}

#[test]
fn training_with_kernels_is_training_without_but_for_rounding() {
    for (dtype, bound) in [("fp32", 2e-5), ("bf16", 3e-2)] {
        let config = config(&[("dtype", dtype)]);
        let (without, _) = trained(&config, None, false);
        let (with, weights) = trained(&config, Some(Kernels::emulated()), false);
        for (a, b) in with.iter().zip(&without) {
            assert!((a - b).abs() < bound * b, "{dtype}: {with:?} against {without:?}");
        }
        assert!(with[1] != with[0]);
        // The bits are the same twice, whatever is kept of the forward, and in two halves.
        let ways = [("layer", true), ("none", false), ("loop", false), ("layer", false)];
        for (recompute, halves) in ways.into_iter().take(if dtype == "fp32" { 4 } else { 1 }) {
            let config = self::config(&[("dtype", dtype), ("recompute", recompute)]);
            let again = trained(&config, Some(Kernels::emulated()), halves);
            assert_eq!(again, (with.clone(), weights.clone()), "{dtype}, {recompute}, in halves: {halves}");
        }
    }
}

#[test]
fn a_cpu_has_none_and_says_so() {
    assert!(of(&config(&[]).compute, Device::Cpu).unwrap().is_none());
    let asks = Compute { fused: true, ..config(&[]).compute };
    let error = ready(&asks).unwrap_err().to_string();
    assert_eq!(
        error,
        "compute.fused is true, and a CPU has no fused kernels; compute on a GPU (--device cuda), or leave compute.fused out"
    );
}

/// Whatever is missing here, the compiler, the driver or that GPU, the error says that it is missed for the kernels.
#[test]
fn a_gpu_whose_kernels_cannot_be_had_is_an_error_in_words() {
    let error = Kernels::open(Device::Cuda(4096)).unwrap_err().to_string();
    assert!(error.starts_with("the device cuda:4096 with compute.fused cannot be had: "), "{error}");
    assert!(error.contains("ANELLO_NVRTC") && error.contains("leave compute.fused out"), "{error}");
}

/// What [`Nvrtc`] compiles for a GPU without one, with the NVRTC of the tests.
#[test]
fn nvrtc_compiles_every_kernel_for_gpus_and_says_what_is_wrong() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.test-tools/nvrtc");
    let path = folder.join("libnvrtc.so.12");
    assert!(path.is_file(), "{} is missing; run scripts/nvrtc-library", path.display());
    let nvrtc = Nvrtc::load(&path).unwrap();
    assert_eq!(nvrtc.version, (12, 1));
    for capability in [(8, 0), (9, 0)] {
        let code = compile(&nvrtc, capability).unwrap();
        assert_eq!(&code[..4], b"\x7fELF");
        for line in SOURCES.concat().lines() {
            let kernel = line.strip_prefix("KERNEL ").or_else(|| line.strip_prefix("ROW_KERNEL "));
            let Some(name) = kernel.and_then(|line| line.split('(').next()) else {
                continue;
            };
            assert!(code.windows(name.len()).any(|window| window == name.as_bytes()), "{name}");
        }
    }
    let error = compile(&nvrtc, (1, 0)).unwrap_err();
    assert!(error.contains("--gpu-architecture"), "{error}");
    let error = nvrtc.compile("KERNEL nothing() { none }", &OPTIONS.map(str::to_owned)).unwrap_err();
    assert!(error.contains("anello.cu(1)"), "{error}");
    let error = Nvrtc::load(&folder.join("libnvrtc.so.99")).unwrap_err();
    assert!(error.contains("libnvrtc.so.99"), "{error}");
}

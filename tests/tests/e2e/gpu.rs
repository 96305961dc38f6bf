//! `scripts/gpu-check`, as far as a machine without a GPU can run it: over real runs of the command, on the CPU.

use std::path::Path;
use std::process::Command;

use anello_tests::{Process, binary};
use serde_json::Value;

use super::world;

#[test]
fn the_script_for_gpus_works_without_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let table = Path::new(env!("CARGO_TARGET_TMPDIR")).join("gpu-check.json");
    let done = Command::new("python3")
        .arg(root.join("scripts/gpu-check"))
        .args(["--dry-run", "--budget", "1500", "--anello"])
        .arg(binary())
        .arg("--out")
        .arg(&table)
        .output()
        .unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{said}");
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&std::fs::read(table).unwrap()).unwrap();
    let verdict = |check: &str| {
        let row = rows.iter().find(|row| row["check"].as_str().unwrap().starts_with(check));
        row.unwrap_or_else(|| panic!("no row {check}: {said}"))["verdict"].as_str().unwrap().to_owned()
    };
    for check in [
        "losses, fp32",
        "losses, bf16",
        "same bits twice",
        "same bits over 1",
        "same bits over 2",
        "same bits over 4",
        "anello audit",
        "anello bisect",
        "anello eval against the CPU",
        "anello generate against the CPU",
    ] {
        assert_eq!(verdict(check), "ok", "{check}: {said}");
    }
    // Where the run was over before the kill, there is nothing to be judged.
    assert!(["ok", "-"].contains(&verdict("same bits, kill and join").as_str()), "{said}");
    for check in [
        "ouro-1.4b, T 4, S 4096, as",
        "ouro-1.4b, T 4, S 4096, by",
        "time that waits for data",
        "forward, of forward and backward",
        "memory, S 65536, compute.offload",
        "memory, ouro-2.6b",
        "cost of fixed bits",
        "stall of the second checkpoint",
        "mano: nothing recomputed",
        "memory, mano, compute.recompute=layer",
        "runs with compute.graphs",
        "bus bandwidth",
    ] {
        assert!(["ok", "-"].contains(&verdict(check).as_str()), "{check}: {said}");
    }
}

/// What computes takes the device as `run` does: on the CPU it says the same as without, and where there is no GPU all say so
/// in the same words.
#[test]
fn whatever_computes_takes_a_device() {
    let commands: [&[&str]; 4] = [
        &["audit", "undisturbed", "--steps", "3..5", "--json"],
        &["bisect", "undisturbed", "undisturbed", "--json"],
        &["eval", "undisturbed", "--data", "data/tales", "--tokens", "512", "--json"],
        &["generate", "undisturbed", "--prompt", "the", "--tokens", "2", "--json"],
    ];
    let without_gpus = [("ANELLO_TORCH_CUDA", "/nowhere".to_owned())];
    let refused = |arguments: &[&str]| {
        let arguments = [arguments, &["--device", "cuda:1"]].concat();
        let done = Process::start_with(&world().folder, &arguments, &without_gpus).wait();
        let told = done.log.lines().find(|line| line.starts_with("error: ")).unwrap_or_default().to_owned();
        // Of what compares, 1 is the answer no.
        done.expect(if ["audit", "bisect"].contains(&arguments[0]) { 2 } else { 1 });
        told
    };
    let expected = refused(&["run", "small.toml", "--out", "no-gpu"]);
    for words in ["the device cuda:1 cannot be had", "not in /nowhere (ANELLO_TORCH_CUDA)", "make cuda"] {
        assert!(expected.contains(words), "{expected}");
    }
    let figures = |told: String| {
        let mut told: Value = serde_json::from_str(&told).unwrap_or_else(|cause| panic!("{cause}: {told}"));
        // The only figure of a clock.
        told.as_object_mut().unwrap().retain(|key, _| key != "seconds" && key != "tokens_per_second");
        told
    };
    for command in commands {
        assert_eq!(refused(command), expected, "{command:?}");
        let on_cpu = world().anello(&[command, &["--device", "cpu"]].concat()).expect(0);
        assert_eq!(figures(on_cpu), figures(world().anello(command).expect(0)), "{command:?}");
        let done = world().anello(&[command, &["--device", "gpu"]].concat());
        assert!(done.log.contains("\"cpu\", \"cuda\" or \"cuda:N\""), "{done:?}");
        done.expect(2);
    }
    let done = Process::start_with(&world().folder, &["doctor", "--nccl", "2"], &without_gpus).wait();
    assert!(done.log.contains("the device cuda:0 cannot be had"), "{done:?}");
    done.expect(2);
    let read_only = ["bisect", "undisturbed", "undisturbed", "--read-only", "--device", "cpu"];
    world().anello(&read_only).expect(2);
}

/// On a CPU the bits of a product may follow the number of threads, unless MKL is told that they must not.
#[test]
fn kernels_of_mkl_whose_bits_may_vary_are_refused() {
    let run = |name: &str, kernels: &str| {
        let arguments = ["run", "small.toml", "--out", name];
        Process::start_with(&world().folder, &arguments, &[("MKL_CBWR", kernels.to_owned())]).wait()
    };
    let done = run("kernels-any", "AVX2");
    assert!(done.log.contains("MKL_CBWR is AVX2; set it to AUTO,STRICT: the bits depend on it"), "{done:?}");
    done.expect(1);
    run("kernels-strict", "AVX2,STRICT").expect(0);
    let manifests = world().folder.join("kernels-strict/checkpoints");
    let newest = std::fs::read_dir(manifests).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    let manifest = std::fs::read_to_string(newest.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    let device = manifest["environment"]["device"].as_str().unwrap();
    assert!(device.ends_with(", MKL_CBWR=AVX2,STRICT"), "{device}");
}

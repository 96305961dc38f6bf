//! The step: memory and speed of each recompute mode beside the naive graph, and the share of LibTorch in its time.
//!
//! ```text
//! cargo bench -p anello-worker --profile dev --bench step                       memory, then the profile
//! cargo bench -p anello-worker --profile dev --bench step -- memory | profile   one of them
//! … -- generate                                                                     tokens/s by the loop step left at, and by q
//! … -- serve CASE none|layer|loop THREADS DIR                                   for `scripts/bench_torch.py`
//! ```
//! Rows go to standard output, one JSON object a line, and to standard error as a table. Memory is measured in a
//! process of its own for each mode (`child`): `VmHWM`, the kernel's own record of the most that was resident.
//! `serve` writes weights, micro-batches and sizes to DIR and then takes a step for each line it reads.

use std::io::{BufRead, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anello_configs::{Loss, Mask, RunConfig, Schedule, Trains};
use anello_dataloader::MicroBatch;
use anello_worker::{
    Cache, Engine, GenerateOptions, Generator, Goal, Inputs, Layout, Leave, Model, Pass, Rotary, State,
    forward_backward, token_losses,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

#[path = "cases/mod.rs"]
mod cases;

use cases::{BETA, Case, LOOPS, fail};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        [] => {
            memory();
            profile();
        }
        ["memory"] => memory(),
        ["profile"] => profile(),
        ["generate"] => generate(),
        ["child", mode] => println!("{}", child(mode)),
        ["steps", case, recompute, threads, count] => {
            let number = |word: &str| word.parse().unwrap_or_else(|_| fail(&format!("{word} is no number")));
            steps(Case::named(case), recompute, number(threads), number(count));
        }
        ["serve", case, recompute, threads, folder] => {
            let threads = threads.parse().unwrap_or_else(|_| fail("how many threads?"));
            serve(Case::named(case), recompute, threads, Path::new(folder));
        }
        _ => fail("usage: step [memory | profile | serve CASE RECOMPUTE THREADS DIR]"),
    }
}

/// Standard output of this program called again with `arguments`.
fn again(wrapper: &[&str], arguments: &[&str]) -> Option<String> {
    let program = std::env::current_exe().unwrap_or_else(|e| fail(&e.to_string()));
    let program = program.to_str().unwrap_or_else(|| fail("this program's path is not text"));
    let line: Vec<&str> = wrapper.iter().copied().chain([program]).chain(arguments.iter().copied()).collect();
    // Threads that wait without spinning: on a shared machine the spinning takes the time of the thread waited for.
    let policy = std::env::var("OMP_WAIT_POLICY").unwrap_or_else(|_| "passive".into());
    let done = Command::new(line[0])
        .args(&line[1..])
        .env("OMP_WAIT_POLICY", policy)
        .stderr(Stdio::piped())
        .output()
        .ok()?;
    if !done.status.success() {
        eprintln!("{}: {}", line.join(" "), String::from_utf8_lossy(&done.stderr));
        return None;
    }
    Some(String::from_utf8_lossy(&done.stdout).into_owned())
}

// Memory and speed of the modes.

const MODES: [&str; 4] = ["naive", "none", "layer", "loop"];

fn memory() {
    let rows: Vec<Value> = MODES
        .iter()
        .map(|mode| {
            let said = again(&[], &["child", mode]).unwrap_or_else(|| fail(&format!("mode {mode} failed")));
            serde_json::from_str(said.trim()).unwrap_or_else(|e| fail(&format!("{mode}: {e}: {said}")))
        })
        .collect();
    let number = |row: &Value, key: &str| row[key].as_f64().unwrap_or(f64::NAN);
    let naive = &rows[0];
    eprintln!(
        "sequence 2048, T = 4, d 256, 4 layers, V 16384, fp32; MiB; step = peak less what was resident before it"
    );
    eprintln!("mode    resident before     peak     step   of naive: peak   step   tokens/s   loss off by");
    for row in &rows {
        let ratio = |key: &str| number(row, key) / number(naive, key);
        let off = (number(row, "loss") / number(naive, "loss") - 1.0).abs();
        eprintln!(
            "{:<8}{:>15.0}{:>9.0}{:>9.0}{:>16.1} %{:>5.1} %{:>11.0}{off:>14.1e}",
            row["mode"].as_str().unwrap_or_default(),
            number(row, "before_mib"),
            number(row, "peak_mib"),
            number(row, "step_mib"),
            100.0 * ratio("peak_mib"),
            100.0 * ratio("step_mib"),
            number(row, "tokens_per_second"),
        );
        let mut row = row.clone();
        row["peak_of_naive"] = json!(ratio("peak_mib"));
        row["step_of_naive"] = json!(ratio("step_mib"));
        row["loss_off"] = json!(off);
        println!("{row}");
    }
}

/// Forward and backward of one micro-batch in `mode`: memory from the first pass, the time of the faster of two.
fn child(mode: &str) -> Value {
    let case = Case::named("memory");
    let recompute = if mode == "naive" { "none" } else { mode };
    let config = case.config(recompute, threads());
    tch::set_num_threads(threads() as i32);
    let layout = Layout::new(&config.model, config.model.layers);
    let flat = layout.initial(config.seed, Device::Cpu);
    let model = Model::new(&config.model, config.compute.dtype, &layout, &flat);
    let gradient = layout.zeros(Device::Cpu);
    let rotary = Rotary::new(10_000.0, i64::from(case.hidden / 4), i64::from(case.sequence), Device::Cpu);
    let batch = case.batches().remove(0);
    let inputs = Inputs::new(&batch, &rotary, Kind::Float, Mask::Document);
    // One small product, so that LibTorch's threads and buffers are there before the step.
    let _ = Tensor::ones([64, 64], (Kind::Float, Device::Cpu))
        .matmul(&Tensor::ones([64, 64], (Kind::Float, Device::Cpu)));
    let _ = gradient.shallow_clone().fill_(0.0);

    let pass = || match mode {
        "naive" => naive(&model, &inputs, &gradient),
        _ => {
            let goal = Goal { loss: Loss::Loop, beta: BETA, trains: Trains::All };
            let pass = Pass { loops: LOOPS, goal, compute: &config.compute };
            forward_backward(&model, &inputs, pass, &gradient).loss
        }
    };
    let before = status_mib("VmRSS");
    let timed = || {
        let start = Instant::now();
        (pass(), start.elapsed().as_secs_f64())
    };
    let (loss, first) = timed();
    let peak = status_mib("VmHWM");
    let (_, second) = timed();
    json!({
        "bench": "worker/step/memory", "mode": mode, "sequence": case.sequence, "loops": LOOPS, "vocab": case.vocab,
        "before_mib": before, "peak_mib": peak, "step_mib": peak - before, "loss": loss,
        "tokens_per_second": batch.tokens() as f64 / first.min(second),
    })
}

/// The loop and all its logits in one graph, as autograd alone would have it.
fn naive(model: &Model, inputs: &Inputs, gradient: &Tensor) -> f64 {
    let Inputs { context, ids_n, targets_n } = inputs;
    let mut h = model.embed_nd(ids_n);
    let mut hidden = Vec::new();
    for _ in 0..LOOPS {
        for layer in 0..model.layers.len() {
            h = model.layer_nd(layer, &h, context);
        }
        hidden.push(h.shallow_clone());
    }
    let losses = token_losses(model, &Tensor::stack(&hidden, 0), targets_n, BETA);
    let leaves: Vec<_> =
        [&model.embed, &model.lm_head, &model.gate_weight, &model.gate_bias, &model.final_norm]
            .into_iter()
            .chain(model.layers.iter().flat_map(|layer| layer.leaves()))
            .collect();
    let weights: Vec<&Tensor> = leaves.iter().map(|leaf| &leaf.value).collect();
    let loss = (losses.loss_c * losses.counts_c).sum(Kind::Float);
    let gradients = Tensor::run_backward(&[&loss], &weights, false, false);
    for (leaf, of_leaf) in leaves.iter().zip(&gradients) {
        leaf.accumulate(gradient, of_leaf);
    }
    loss.double_value(&[])
}

fn status_mib(key: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_else(|e| fail(&e.to_string()));
    let line = status.lines().find(|line| line.starts_with(key)).unwrap_or_else(|| fail(key));
    let kib = line.split_whitespace().nth(1).and_then(|n| n.parse::<f64>().ok());
    kib.unwrap_or_else(|| fail(line)) / 1024.0
}

fn threads() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

// The profile.

/// `perf record` over steps of `make run`'s model, on one thread: which library each sample was in. Recording starts
/// after 3 seconds, when weights and the first step are behind.
fn profile() {
    let data = std::env::temp_dir().join(format!("anello-bench-{}.perf", std::process::id()));
    let data = data.to_str().unwrap_or_else(|| fail("the temporary folder's path is not text"));
    let record = ["perf", "record", "--quiet", "-D", "3000", "-F", "997", "-o", data, "--"];
    for recompute in ["none", "layer"] {
        if again(&record, &["steps", "tiny-128", recompute, "1", "15"]).is_none() {
            eprintln!("profile: not measured, since `perf record` does not work here (Debian: linux-perf)");
            return;
        }
        let report = Command::new("perf")
            .args(["report", "-i", data, "--stdio", "--sort", "dso", "-F", "overhead,dso", "-t", "|"])
            .stderr(Stdio::null())
            .output()
            .unwrap_or_else(|e| fail(&e.to_string()));
        let _ = std::fs::remove_file(data);
        let report = String::from_utf8_lossy(&report.stdout).into_owned();
        let shares: Vec<(f64, &str)> = report
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split_once('|'))
            .filter_map(|(share, dso)| Some((share.trim().trim_end_matches('%').parse().ok()?, dso.trim())))
            .collect();
        let of = |names: &[&str]| -> f64 {
            shares.iter().filter(|(_, dso)| names.iter().any(|n| dso.starts_with(n))).map(|(s, _)| s).sum()
        };
        let (libtorch, ours) = (of(&["libtorch", "libc10", "libgomp"]), of(&["step-"]));
        let (kernel, libc) =
            (of(&["[kernel", "[unknown]"]), of(&["libc.so", "libm.so", "ld-linux", "libstdc++"]));
        eprintln!(
            "profile tiny-128, recompute {recompute}: LibTorch {libtorch:.1} %, libc (mostly its memory) {libc:.1} %, \
             kernel (its page faults) {kernel:.1} %, this program {ours:.1} %"
        );
        println!(
            "{}",
            json!({
                "bench": "worker/step/profile", "case": "tiny-128", "recompute": recompute,
                "libtorch": libtorch / 100.0, "libc": libc / 100.0, "kernel": kernel / 100.0, "own": ours / 100.0,
            })
        );
    }
}

/// So many steps of `case`, and the CPU seconds of each.
fn steps(case: Case, recompute: &str, threads: u32, count: u32) {
    let mut stepper = Stepper::new(case, recompute, threads);
    for _ in 0..count {
        let cpu = cpu_seconds();
        stepper.step();
        eprintln!("{:.2}", cpu_seconds() - cpu);
    }
}

// Text.

/// Tokens a second by when a token leaves: all at the same loop step, or once so much exit mass is behind it. One thread, one
/// text.
fn generate() {
    const TOKENS: usize = 256;
    let case = Case::named("d256");
    tch::set_num_threads(1);
    let config = case.config("none", 1);
    let engine = Engine::new(&config, Device::Cpu).unwrap();
    let steps = (1..=LOOPS).rev().map(|step| (format!("loop step {step}"), Leave::Step(step)));
    // The gate begins at a half: so much leaves at each loop step of what has come there.
    let masses = [1.0, 0.8, 0.7, 0.4].map(|q| (format!("q = {q}"), Leave::Mass(q)));
    let mut deepest = f64::NAN;
    for (at, (rule, leave)) in steps.chain(masses).enumerate() {
        let options = GenerateOptions {
            loops: LOOPS,
            leave,
            cache: Cache::Full,
            temperature: 0.0,
            top_p: 1.0,
            seed: 1,
        };
        let mut generator = Generator::new(engine.model(), 1e4, 64 + TOKENS, options);
        let mut next: Vec<u32> = (100..164).collect();
        next = vec![generator.next(&next).id];
        let (start, mut depth) = (Instant::now(), 0);
        for _ in 1..TOKENS {
            let sampled = generator.next(&next);
            depth += sampled.exit;
            next = vec![sampled.id];
        }
        let rate = (TOKENS - 1) as f64 / start.elapsed().as_secs_f64();
        if at == 0 {
            deepest = rate;
        }
        let depth = f64::from(depth) / (TOKENS - 1) as f64;
        println!(
            "{}",
            json!({ "bench": "worker/generate", "rule": rule, "loops": LOOPS, "mean_depth": depth, "tokens_per_second": rate, "ratio": rate / deepest })
        );
    }
}

// Steps beside PyTorch's.

struct Stepper {
    config: RunConfig,
    engine: Engine,
    batches: Vec<MicroBatch>,
    next: u64,
}

impl Stepper {
    fn new(case: Case, recompute: &str, threads: u32) -> Self {
        tch::set_num_threads(threads as i32);
        let config = case.config(recompute, threads);
        let engine = Engine::new(&config, Device::Cpu).unwrap();
        Self { engine, config, batches: case.batches(), next: 0 }
    }

    /// One step: every lane, the update. Returns the mean loss, nats.
    fn step(&mut self) -> f64 {
        let schedule = Schedule::new(&self.config);
        let plan = schedule.at(self.next).unwrap_or_else(|| fail("the run is over"));
        self.next += 1;
        self.engine.enter(&plan);
        for (lane, batch) in self.batches.iter().enumerate() {
            self.engine.lane(plan.stage, lane as u32, std::slice::from_ref(batch));
        }
        let sums = self.engine.finish(&plan).sums;
        sums.loss / sums.counted as f64
    }
}

fn serve(case: Case, recompute: &str, threads: u32, folder: &Path) {
    let mut stepper = Stepper::new(case, recompute, threads);
    write_down(&stepper, folder).unwrap_or_else(|e| fail(&format!("{}: {e}", folder.display())));
    println!("{}", json!({ "ready": case.name }));
    for _line in std::io::stdin().lock().lines() {
        let (start, cpu) = (Instant::now(), cpu_seconds());
        let loss = stepper.step();
        let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu);
        println!("{}", json!({ "seconds": seconds, "cpu_seconds": cpu, "loss": loss }));
        let _ = std::io::stdout().flush();
    }
}

/// CPU time of this process so far, all threads: user and system ticks of 10 ms.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_else(|e| fail(&e.to_string()));
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|f| f.parse::<f64>().ok()).unwrap_or(f64::NAN);
    (ticks(11) + ticks(12)) / 100.0
}

/// What PyTorch needs to run the same steps: `case.json`, and the flat weights as they lie in memory.
fn write_down(stepper: &Stepper, folder: &Path) -> std::io::Result<()> {
    let State { layout, weights, .. } = stepper.engine.state();
    let weights = Vec::<f32>::try_from(weights).expect("a vector of f32");
    let entries: Vec<Value> = layout
        .entries()
        .iter()
        .map(|e| json!({ "name": e.name, "shape": e.shape, "offset": e.offset }))
        .collect();
    let batches: Vec<Value> = stepper
        .batches
        .iter()
        .map(|b| {
            json!({ "sequences": b.sequences, "input_ids": b.input_ids, "targets": b.targets,
                         "positions": b.positions, "segment_starts": b.segment_starts })
        })
        .collect();
    let (model, optimizer) = (&stepper.config.model, &stepper.config.optimizer);
    let case = json!({
        "layers": model.layers, "hidden": model.hidden, "heads": model.heads, "ffn": model.ffn, "vocab": model.vocab,
        "rms_eps": model.rms_eps, "loops": LOOPS, "beta": BETA, "rope_base": 10_000, "lr": 1e-3,
        "betas": [optimizer.beta1, optimizer.beta2], "eps": optimizer.eps, "weight_decay": optimizer.weight_decay,
        "clip": optimizer.clip, "entries": entries, "batches": batches,
    });
    std::fs::write(folder.join("case.json"), case.to_string())?;
    std::fs::write(
        folder.join("weights.f32"),
        weights.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>(),
    )
}

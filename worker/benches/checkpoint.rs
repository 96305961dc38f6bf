//! Saving and loading a state of a gibibyte, and what a step waits for of it.
//!
//! ```text
//! cargo bench -p anello-worker --profile dev --bench checkpoint -- serve    for `scripts/bench_checkpoint.py`
//! ```
//! `serve` prints the size of the state, then does for each line it reads what the line says, and prints the seconds:
//!
//! ```text
//! save FOLDER    copy the state, write its parts (each read back), commit the manifest
//! load FOLDER    read it, every block against its digest
//! copy FIRST     the copy alone, which training waits for, and a bare copy of the same bytes: FIRST, `ours` or `bare`, comes first
//! ```
//! A save says beside its seconds how long the copy took.

use std::io::BufRead;
use std::time::Instant;

use anello_configs::Model;
use anello_store::checkpoint::{Facts, Manifest, Position, commit};
use anello_store::{Cursor, Environment, Store};
use anello_worker::checkpoint::{Snapshot, load, write};
use anello_worker::{Layout, State, as_slice};
use serde_json::json;
use tch::{Device, Kind, Tensor};

/// The config's own default.
const PART_BYTES: u64 = 256 << 20;
const STEP: u64 = 1;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match &arguments[..] {
        [word] if word == "serve" => serve(),
        _ => println!("checkpoint: run by scripts/bench_checkpoint.py as `serve`"),
    }
}

/// 89 M parameters.
fn model() -> Model {
    Model {
        layers: 4,
        hidden: 1024,
        heads: 16,
        kv_heads: 16,
        ffn: 2816,
        vocab: 18_432,
        rms_eps: 1e-6,
        init_std: 0.02,
        embed_std: 0.02,
        post_norm: 1.0,
    }
}

fn facts(state: &State) -> Facts {
    let environment = Environment {
        anello: env!("CARGO_PKG_VERSION").to_owned(),
        revision: None,
        libtorch: String::new(),
        device: "CPU".to_owned(),
        threads: 1,
        system: String::new(),
    };
    Facts {
        position: Position { step: STEP, stage: "stable".to_owned(), stage_end: false, tokens: 1 },
        updates: state.updates,
        layers: state.layout.layers() as u32,
        cursors: vec![Cursor::default(); 64],
        losses: Vec::new(),
        config: String::new(),
        data: Default::default(),
        environment,
    }
}

fn serve() {
    let layout = Layout::new(&model(), model().layers);
    let flat = |seed: i64| {
        tch::manual_seed(seed);
        Tensor::randn([layout.len() as i64], (Kind::Float, Device::Cpu))
    };
    let mut state = State::new(layout.clone(), flat(1));
    (state.exp_avg, state.exp_avg_sq, state.updates) = (flat(2), flat(3), 7);
    println!("{}", json!({ "mib": (3 * layout.len()) >> 18 }));
    for line in std::io::stdin().lock().lines().map(|line| line.expect("standard input")) {
        let answer = match line.split_once(' ') {
            Some(("save", folder)) => save(&state, folder),
            Some(("copy", first)) => copy(&state, first),
            Some(("load", folder)) => {
                let store = Store::open(folder).expect("the folder");
                let began = Instant::now();
                let loaded = load(&store, STEP, &model(), Device::Cpu).expect("the checkpoint is whole");
                let seconds = began.elapsed().as_secs_f64();
                assert!(loaded.state.exp_avg.equal(&state.exp_avg), "what was saved");
                json!({ "seconds": seconds })
            }
            _ => panic!("save FOLDER, load FOLDER or copy FIRST, not {line}"),
        };
        println!("{answer}");
    }
}

fn save(state: &State, folder: &str) -> serde_json::Value {
    let store = Store::durable(folder).expect("the folder");
    let began = Instant::now();
    let snapshot = Snapshot::take(state, 0..state.layout.blocks(), facts(state));
    let copy_seconds = began.elapsed().as_secs_f64();
    let written = write(&store, &snapshot, PART_BYTES, STEP).expect("the disk has room");
    commit(&store, Manifest::new(snapshot.facts.clone(), written)).expect("all parts are there");
    json!({ "seconds": began.elapsed().as_secs_f64(), "copy_seconds": copy_seconds })
}

fn copy(state: &State, first: &str) -> serde_json::Value {
    let ours = || {
        let (began, facts) = (Instant::now(), facts(state));
        let snapshot = Snapshot::take(state, 0..state.layout.blocks(), facts);
        let seconds = began.elapsed().as_secs_f64();
        drop(snapshot);
        seconds
    };
    let bare = || {
        let began = Instant::now();
        let copies = [&state.weights, &state.exp_avg, &state.exp_avg_sq].map(|flat| as_slice(flat).to_vec());
        let seconds = began.elapsed().as_secs_f64();
        drop(copies);
        seconds
    };
    let (ours, bare) = match first {
        "ours" => {
            let seconds = ours();
            (seconds, bare())
        }
        _ => {
            let seconds = bare();
            (ours(), seconds)
        }
    };
    json!({ "copy_seconds": ours, "bare_seconds": bare })
}

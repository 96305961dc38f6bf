//! temp
use anello_configs::*;
use anello_dataloader::*;
use anello_worker::*;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let root = "data/tiny";
    if !std::path::Path::new("data/tiny/tokenizer.json").exists() {
        let t = std::time::Instant::now();
        let r = train_tokenizer(
            &TrainOptions {
                inputs: TextInputs::new(["data/tiny/raw/docs", "data/tiny/raw/code"]),
                vocab: 2048,
                bytes_max: 8 << 20,
                seed: 1,
                output: "data/tiny/tokenizer.json".into(),
            },
            &|_| std::ops::ControlFlow::Continue(()),
        )
        .unwrap();
        println!("{r:?} {:?}", t.elapsed());
        for s in ["docs", "code"] {
            let t = std::time::Instant::now();
            let r = tokenize(
                &TokenizeOptions {
                    inputs: TextInputs::new([format!("{root}/raw/{s}")]),
                    tokenizer: "data/tiny/tokenizer.json".into(),
                    output: format!("{root}/{s}"),
                    end: Some("<|endoftext|>".into()),
                    source: None,
                    format: ShardFormat { row_group_tokens: 32 << 10, zstd_level: 3 },
                    shard_bytes: 1 << 20,
                    threads: 2,
                },
                &|_| std::ops::ControlFlow::Continue(()),
            )
            .unwrap();
            println!("{s} {r:?} {:?}", t.elapsed());
        }
    }
    let config =
        RunConfig::load(&LoadOptions { config: "tiny".into(), sets: a[2..].to_vec(), ..Default::default() })
            .map_err(|e| panic!("{e}"))
            .unwrap()
            .config;
    let store = RunStore::open(&a[1]).unwrap();
    let total = Schedule::new(&config).total_steps();
    let run = Run::create(store, config).unwrap();
    let t = Training::start(run, Control::default(), None).unwrap();
    let start = std::time::Instant::now();
    for n in t.notices.iter() {
        if let Notice::Step(r) = n {
            if r.step % 20 == 0 || r.step + 1 == total || r.step < 3 {
                println!(
                    "{:>4}/{total} {:>8} {} loss {:.3} L {:?} depth {:.2} gn {:.2} lr {:.1e} {:.0} tok/s compute {:.2} upd {:.3} data {:.3} t={:.0}",
                    r.step,
                    r.tokens,
                    r.stage,
                    r.loss,
                    r.loop_loss.iter().map(|x| (x * 1000.0).round() / 1000.0).collect::<Vec<_>>(),
                    r.depth(),
                    r.grad_norm,
                    r.lr,
                    r.batch_tokens as f64 / r.seconds.step,
                    r.seconds.compute,
                    r.seconds.update,
                    r.seconds.data,
                    start.elapsed().as_secs_f64()
                );
            }
        } else if !matches!(n, Notice::Logged(_)) {
            println!("{n:?}");
        }
    }
    println!("{:?}", t.join());
}

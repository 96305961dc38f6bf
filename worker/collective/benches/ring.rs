//! The gradient of a step over loopback: `reduce_scatter` + `all_gather` of one flat buffer.
//!
//! ```text
//! cargo bench -p anello-collective --profile dev --bench ring -- serve RANK MEMBERS MIB HOST     for `scripts/bench_ring.py`
//! ```
//! `serve` listens on the address HOST, prints where, reads those of all members (a JSON list), connects, and then takes a step for each line
//! it reads: one lane a member, blocks of 256 KiB as the worker's. Each answer is one JSON object.

use std::io::BufRead;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anello_collective::tcp::{Listener, Options, SOCKET_BUFFER_BYTES, connect};
use anello_collective::{AbortHandle, Collective, Generation, Rank, Shape, Step};
use serde_json::json;

/// Elements of a block, as `anello_worker::BLOCK`.
const BLOCK: usize = 1 << 16;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let [serve, rank, members, mib, host] = arguments.as_slice() else { return usage() };
    match (serve.as_str(), rank.parse(), members.parse(), mib.parse(), host.parse()) {
        ("serve", Ok(rank), Ok(members), Ok(mib), Ok(host)) => serve_steps(rank, members, mib, host),
        _ => usage(),
    }
}

fn usage() {
    println!("ring: run by scripts/bench_ring.py as `serve RANK MEMBERS MIB HOST`");
}

fn serve_steps(rank: u32, members: usize, mib: usize, host: IpAddr) {
    let mut listener = Listener::bind(SocketAddr::new(host, 0)).expect("a free port");
    println!("{}", json!({ "address": listener.addresses().expect("a bound port")[0].to_string() }));
    let mut lines = std::io::stdin().lock().lines().map(|line| line.expect("standard input"));
    let addresses: Vec<SocketAddr> =
        serde_json::from_str(&lines.next().expect("the addresses")).expect("a list of addresses");
    let blocks = mib * (1 << 20) / (4 * BLOCK);
    let options = Options {
        rank: Rank(rank),
        members: addresses.into_iter().map(|address| vec![address]).collect(),
        shape: Shape::balanced(members.next_power_of_two() as u32, members, blocks as u32, BLOCK),
        generation: Generation(1),
        job: "bench".into(),
        config_digest: String::new(),
        build: String::new(),
        deadline: Duration::from_secs(30),
        socket_buffer_bytes: Some(SOCKET_BUFFER_BYTES),
        silence: Duration::from_secs(10),
        abort: AbortHandle::new(),
    };
    let mut ring = connect(&mut listener, &options).expect("all members come");
    let own = ring.ring().elements(Rank(rank));
    let parts = ring.ring().parts(Rank(rank)).len();
    let lane: Vec<f32> = (0..ring.ring().len()).map(|at| (at % 1000) as f32 * 1e-3).collect();
    let partials = vec![lane.as_slice(); parts];
    let mut sum = vec![0f32; lane.len()];
    println!("{}", json!({ "ready": rank }));
    for (step, _) in (0..).map(Step).zip(lines) {
        let (start, cpu) = (Instant::now(), cpu_seconds());
        ring.reduce_scatter(step, &partials, &mut sum[own.clone()]).expect("the reduction");
        let reduced = start.elapsed();
        ring.all_gather(step, &mut sum).expect("the gather");
        let answer = json!({
            "seconds": start.elapsed().as_secs_f64(), "reduce_seconds": reduced.as_secs_f64(),
            "cpu_seconds": cpu_seconds() - cpu, "last": sum[sum.len() - 1],
        });
        println!("{answer}");
    }
}

/// CPU time of this thread, which is the only one.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse().ok()).map_or(f64::NAN, |ns: f64| ns / 1e9)
}

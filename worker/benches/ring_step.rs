//! A step in a ring beside what it cannot do without: the compute of this worker's lanes, and the transfer that nothing can
//! hide.
//!
//! ```text
//! cargo bench -p anello-worker --profile dev --bench ring_step -- serve RANK MEMBERS HOST     for `scripts/bench_ring.py`
//! ```
//! `serve` listens on the address HOST, prints where, reads those of all members (a JSON list), connects, and then does
//! for each line it reads what the line says, once all members are there:
//!
//! ```text
//! compute     own lanes and the update, no ring
//! ring        the step: the sum begins while the last lane is computed
//! apart       the same, but the sum begins when the last lane is through
//! transfer    the sum of what is there already, and the gather
//! ```

use std::io::BufRead;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anello_collective::tcp::{Listener, Options, Tcp, connect};
use anello_collective::{AbortHandle, Collective, Generation, Rank, Shape, Step};
use anello_configs::{Schedule, StepPlan, Trains};
use anello_dataloader::MicroBatch;
use anello_worker::ring::{Total, add_up};
use anello_worker::{BLOCK, Engine, Growing, as_slice};
use serde_json::{Value, json};
use tch::Device;

#[path = "cases/mod.rs"]
#[allow(dead_code)]
mod cases;

use cases::{Case, fail};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["serve", rank, members, host] => match (rank.parse(), members.parse(), host.parse()) {
            (Ok(rank), Ok(members), Ok(host)) => serve(rank, members, host),
            _ => fail("serve RANK MEMBERS HOST"),
        },
        _ => println!("ring_step: run by scripts/bench_ring.py as `serve RANK MEMBERS HOST`"),
    }
}

fn serve(rank: u32, members: usize, host: IpAddr) {
    let case = Case::named("ring");
    tch::set_num_threads(1);
    let config = case.config("layer", 1);
    let engine = Engine::new(&config, Device::Cpu).unwrap();
    let layout = engine.state().layout.clone();
    let whole = layout.backward_blocks(Trains::All);
    let order = whole.iter().cloned().flatten().map(|block| block as u32).collect();
    let shape = Shape { order, ..Shape::balanced(case.lanes, members, layout.blocks() as u32, BLOCK) };
    let lanes = shape.ranges[rank as usize].clone();

    let mut listener = Listener::bind(SocketAddr::new(host, 0)).expect("a free port");
    println!("{}", json!({ "address": listener.addresses().expect("a bound port")[0].to_string() }));
    let mut lines = std::io::stdin().lock().lines().map(|line| line.expect("standard input"));
    let addresses: Vec<SocketAddr> =
        serde_json::from_str(&lines.next().expect("the addresses")).expect("a list of addresses");
    let options = Options {
        rank: Rank(rank),
        members: addresses.into_iter().map(|address| vec![address]).collect(),
        shape,
        generation: Generation(1),
        job: "bench".into(),
        config_digest: String::new(),
        build: String::new(),
        deadline: Duration::from_secs(30),
        socket_buffer_bytes: None,
        silence: Duration::from_secs(10),
        abort: AbortHandle::new(),
    };
    let mut ring = connect(&mut listener, &options).expect("all members come");
    let batches = case.batches()[lanes.start as usize..lanes.end as usize].to_vec();
    let mut worker =
        Worker { engine, first: lanes.start, batches, total: Total::new(layout.len(), Device::Cpu) };
    let last = whole.last().expect("there is an embedding").len() as f64 / layout.blocks() as f64;
    println!("{}", json!({ "ready": rank, "whole_at_the_end": last, "mib": layout.len() >> 18 }));

    let schedule = Schedule::new(&config);
    for (at, line) in (0..).zip(lines) {
        let plan = schedule.at(at).unwrap_or_else(|| fail("the run is over"));
        worker.engine.enter(&plan);
        ring.exchange(Step(at), b"").expect("all members are there");
        println!("{}", worker.act(&line, &plan, &mut ring));
    }
}

struct Worker {
    engine: Engine,
    first: u32,
    /// One a lane.
    batches: Vec<MicroBatch>,
    total: Total,
}

impl Worker {
    fn act(&mut self, what: &str, plan: &StepPlan<'_>, ring: &mut Tcp) -> Value {
        let start = Instant::now();
        if what == "transfer" {
            let gradient = self.total.values().copy();
            let own = ring.ring().elements(ring.ring().rank());
            let mut sum = vec![0f32; ring.ring().len()];
            let start = Instant::now();
            let reduced = ring.reduce_scatter(Step(plan.step), &[as_slice(&gradient)], &mut sum[own]);
            reduced.expect("the reduction");
            let reduce = start.elapsed().as_secs_f64();
            ring.all_gather(Step(plan.step), &mut sum).expect("the gather");
            return json!({ "reduce_seconds": reduce, "gather_seconds": start.elapsed().as_secs_f64() - reduce });
        }
        let (engine, first) = (&mut self.engine, self.first);
        let (last, before) = self.batches.split_last().expect("more lanes than members");
        let one = std::slice::from_ref;
        for (lane, batch) in (first..).zip(before) {
            engine.lane(plan.stage, lane, one(batch));
        }
        let lane = first + before.len() as u32;
        let mut compute = |tell: &mut dyn FnMut(Growing<'_>)| {
            engine.last_lane(plan.stage, lane, one(last), tell);
        };
        if what == "compute" {
            compute(&mut |_| {});
            let mut partials = self.engine.take_partials();
            let (_, _, gradient, sums) = partials.pop().expect("the lanes of a worker are one subtree");
            self.engine.finish_with(plan, &gradient, sums);
            self.engine.recycle(gradient);
        } else {
            let mut all = None;
            let keep = |sums: Vec<_>| {
                all = sums.into_iter().next();
                Vec::new()
            };
            let ((), words) = add_up(ring, Step(plan.step), &mut self.total, keep, |tell| match what {
                "ring" => compute(tell),
                "apart" => {
                    let (mut begun, mut whole) = (None, Vec::new());
                    compute(&mut |growing| match growing {
                        Growing::Sums(sums, buffers) => begun = Some(Growing::Sums(sums, buffers)),
                        Growing::Whole(blocks) => whole.push(blocks),
                        Growing::Lane(_) => {}
                    });
                    tell(begun.expect("a lane has sums"));
                    whole.into_iter().for_each(|blocks| tell(Growing::Whole(blocks)));
                }
                _ => fail("compute, ring, apart or transfer"),
            });
            words.expect("the sum");
            self.engine.abandon();
            let (_, _, sums) = all.expect("a worker has sums");
            self.engine.finish_with(plan, self.total.values(), sums);
        }
        json!({ "seconds": start.elapsed().as_secs_f64() })
    }
}

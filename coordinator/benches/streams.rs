//! What it costs to hold thousands of workers that only say that they live, and to form a large ring anew when one of them dies.
//!
//! ```text
//! cargo bench -p anello-coordinator --profile dev --bench streams [-- STREAMS [SECONDS]]
//! cargo bench -p anello-coordinator --profile dev --bench streams -- ring MEMBERS
//! ```
//! The real service and job in this process; the workers in another, over loopback, a connection each. Heartbeats are those of a
//! detection in 10 s. One JSON row.
//!
//! - Of STREAMS workers two are the ring, and the others stand by: CPU time of this process as a share of one core, and its resident
//!   memory.
//! - Of MEMBERS one closes its connection, and all others say that it is lost: seconds from there until the last of them is told its
//!   place in the next ring, and CPU time of this process for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anello_configs::{LoadOptions, RunConfig};
use anello_coordinator::{Job, JobOptions, Jobs, News, Opened, Server, Timings, create};
use anello_proto::v1;
use anello_proto::v1::from_worker::Word;
use anello_proto::v1::ring_client::RingClient;
use anello_proto::v1::stance::Activity;
use anello_proto::v1::to_worker::Order;
use anello_store::Store;
use anello_tls::Role;
use anello_tls::grpc::To;
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

const JOB: &str = "bench";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    raise_file_limit();
    match arguments.first().map(String::as_str) {
        Some("workers") => {
            let number = arguments[2].parse().expect("a number of workers");
            workers(&arguments[1], number, arguments.get(3).is_some());
        }
        Some("ring") => ring(arguments[1].parse().expect("a number of members")),
        _ => {
            let number = |at: usize| arguments.get(at).map(|text| text.parse::<u64>().expect("a number"));
            coordinator(number(0).unwrap_or(5000), Duration::from_secs(number(1).unwrap_or(20)));
        }
    }
}

/// A socket a stream.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("up to its maximum a limit can be raised");
}

fn coordinator(streams: u64, window: Duration) {
    serve(&LoadOptions::new("tiny"), 2, streams, &[], async |job, timings, _workers| {
        tokio::time::sleep(timings.heartbeat * 2).await;
        let (began, cpu) = (Instant::now(), cpu_seconds());
        tokio::time::sleep(window).await;
        let share = (cpu_seconds() - cpu) / began.elapsed().as_secs_f64();
        let status = job.status().await.expect("the job goes on");
        assert_eq!(u64::from(status.workers), streams, "workers were lost: {status:?}");
        assert_eq!(status.waits_for, None, "two of them are a ring");
        println!(
            r#"{{"bench":"coordinator/streams","streams":{streams},"cpu_share":{share:.4},"rss_mib":{:.1}}}"#,
            rss_mib()
        );
    });
}

fn ring(members: u64) {
    // A lane for each.
    let stages = ["warmup", "stable", "ct-anneal", "longct", "mid-training"];
    let lanes = members.next_power_of_two();
    let mut sets = vec![format!("lanes={lanes}")];
    for stage in stages {
        sets.extend([
            format!("stage.{stage}.batch={}", lanes * 512),
            format!("stage.{stage}.micro_batch=1"),
            format!("stage.{stage}.tokens={}", lanes * 512 * 10),
        ]);
    }
    let load = LoadOptions { sets, ..LoadOptions::new("tiny") };
    serve(&load, members as u32, members, &["ring"], async |job, _, workers| {
        let (began, mut said) = (cpu_seconds(), String::new());
        let read = std::io::BufRead::read_line(&mut std::io::BufReader::new(workers), &mut said);
        read.expect("the workers say what they saw");
        while job.status().await.is_none_or(|status| status.waits_for.is_some()) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let cpu = cpu_seconds() - began;
        println!(
            r#"{{"bench":"coordinator/ring","members":{members},"seconds":{},"cpu_seconds":{cpu:.2}}}"#,
            said.trim()
        );
    });
}

/// Runs the service with one job, which wants a ring of so many, and so many workers; `bench` once all are connected.
fn serve(
    load: &LoadOptions,
    desired: u32,
    number: u64,
    more: &[&str],
    bench: impl AsyncFnOnce(Job, Timings, std::process::ChildStdout),
) {
    // Store calls block: outside the runtime.
    let store = Store::memory().expect("a store in memory");
    let config = RunConfig::load(load).expect("the preset is right").config;
    create(&store, &config).expect("the store is empty");
    let timings = Timings::new(Duration::from_secs(10));
    let options = JobOptions { name: JOB.to_owned(), min: 1, desired, timings };
    let opened = Opened::take_up(store, options).expect("the run is there");
    // As `anello run --workers` has it.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let (notices, _heard) = std::sync::mpsc::channel();
        let (job, _end) = opened.start(notices, News::default()).expect("a thread starts");
        let jobs = Jobs::default();
        jobs.add(job.clone());
        let server = Server::start(([127, 0, 0, 1], 0).into(), jobs).await.expect("a free port");
        let here = std::env::current_exe().expect("a program knows its file");
        let mut workers = std::process::Command::new(here)
            .args(["workers", &server.address.to_string(), &number.to_string()])
            .args(more)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("this program starts");
        let said = workers.stdout.take().expect("it is a pipe");
        connected(&job, number).await;
        bench(job, timings, said).await;
        let _ = workers.kill();
        let _ = workers.wait();
    });
}

async fn connected(job: &Job, streams: u64) {
    let began = Instant::now();
    while job
        .status()
        .await
        .is_none_or(|status| u64::from(status.workers) < streams || status.waits_for.is_some())
    {
        assert!(
            began.elapsed() < Duration::from_secs(120),
            "not all are connected: {:?}",
            job.status().await
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// CPU time of this process.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("this is Linux");
    let after_name = stat.rsplit(") ").next().expect("a name in brackets");
    let ticks = after_name.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<f64>().expect("a number"));
    // USER_HZ, which is 100 wherever Linux runs.
    ticks.sum::<f64>() / 100.0
}

fn rss_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("this is Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
}

/// Of a ring of which one dies.
struct Fate {
    members: u64,
    /// Workers that were told their place in a ring, all rings together.
    placed: AtomicU64,
    /// When the first worker is to die, and when it has.
    all_train: Notify,
    death: watch::Sender<Option<Instant>>,
}

impl Fate {
    fn placed(&self) {
        let placed = self.placed.fetch_add(1, Ordering::Relaxed) + 1;
        if placed == self.members {
            self.all_train.notify_one();
        }
        let death = *self.death.borrow();
        if let Some(death) = death.filter(|_| placed == 2 * self.members - 1) {
            println!("{:.3}", death.elapsed().as_secs_f64());
        }
    }
}

fn workers(coordinator: &str, number: u64, one_dies: bool) {
    use rustix::process::{Signal, set_parent_process_death_signal};
    // Of a bench that panics nothing is left.
    set_parent_process_death_signal(Some(Signal::KILL)).expect("this is Linux");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let fate = Fate {
        members: if one_dies { number } else { 0 },
        placed: AtomicU64::new(0),
        all_train: Notify::new(),
        death: watch::Sender::new(None),
    };
    let fate = Arc::new(fate);
    runtime.expect("a runtime").block_on(async {
        for id in 1..=number {
            let (address, of_worker) = (coordinator.to_owned(), Arc::clone(&fate));
            tokio::spawn(async move {
                let dies = async {
                    of_worker.all_train.notified().await;
                    // So that the other side has seen them all.
                    tokio::time::sleep(Duration::from_secs(3)).await;
                };
                match id {
                    1 => tokio::select! {
                        () = worker(address, id, &of_worker) => {}
                        () = dies => drop(of_worker.death.send_replace(Some(Instant::now()))),
                    },
                    _ => worker(address, id, &of_worker).await,
                }
            });
            // They come one after the other, so that their heartbeats are spread as those of a real cluster.
            tokio::time::sleep(Duration::from_micros(400)).await;
        }
        std::future::pending::<()>().await;
    });
}

fn stance(activity: Activity, holds: Option<u64>) -> v1::FromWorker {
    let stance = v1::Stance { holds, activity: Some(activity), ..Default::default() };
    v1::FromWorker { word: Some(Word::Stance(stance)) }
}

/// Says what it must, and does as it is told without any model.
async fn worker(coordinator: String, id: u64, fate: &Fate) {
    let to = To { address: coordinator, role: Role::Worker, tls: None };
    let channel = to.connect_talking(Duration::from_secs(60)).await.expect("the coordinator is there");
    let (words, outbox) = mpsc::channel(16);
    let address = format!("127.0.0.1:{}", 1 + id % 60_000);
    let hello = v1::Hello {
        job: JOB.to_owned(),
        worker: id,
        connection: 1,
        endpoints: Some(v1::Endpoints { ring: vec![address.clone()], peers: vec![address] }),
        machine: format!("machine-{id}"),
        build: "bench".to_owned(),
        device: "cpu".to_owned(),
        stance: Some(v1::Stance { activity: Some(Activity::Outside(v1::Outside {})), ..Default::default() }),
    };
    words.send(v1::FromWorker { word: Some(Word::Hello(hello)) }).await.expect("the stream is open");
    let stream =
        RingClient::new(channel).attach(ReceiverStream::new(outbox)).await.expect("the service is there");
    let mut orders = stream.into_inner();
    let mut now = stance(Activity::Outside(v1::Outside {}), None);
    let mut beat = tokio::time::interval(Duration::from_secs(2));
    let (mut generation, mut death) = (0, fate.death.subscribe());
    loop {
        tokio::select! {
            order = orders.next() => match order.expect("the coordinator goes on").expect("a message").order {
                Some(Order::Welcome(welcome)) => {
                    beat = tokio::time::interval(Duration::from_millis(welcome.heartbeat_ms));
                }
                Some(Order::Form(formation)) => {
                    generation = formation.generation;
                    now = stance(Activity::Running(generation), Some(formation.start));
                    words.send(now.clone()).await.expect("the stream is open");
                    fate.placed();
                }
                // It says so by itself.
                Some(Order::Abort(_)) if fate.members > 0 => {}
                other => panic!("worker {id} is told {other:?}"),
            },
            Ok(()) = death.changed() => {
                let cause = v1::holding::Cause::Broken(v1::Broken { lost: Some(1), reason: "it is gone".to_owned() });
                now = stance(Activity::Holding(v1::Holding { generation, cause: Some(cause) }), Some(0));
                words.send(now.clone()).await.expect("the stream is open");
            }
            _ = beat.tick() => words.send(now.clone()).await.expect("the stream is open"),
        }
    }
}

//! What it costs to hold thousands of workers that only say that they live.
//!
//! ```text
//! cargo bench -p anello-coordinator --profile dev --bench streams [-- STREAMS [SECONDS]]
//! ```
//! The real service and job in this process; the workers in another, over loopback, a connection each. Two of them are the
//! ring, the others stand by. Heartbeats are those of a detection in 10 s. One JSON row: CPU time of this process as a
//! share of one core, and its resident memory.

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
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

const JOB: &str = "bench";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    raise_file_limit();
    match arguments.first().map(String::as_str) {
        Some("workers") => workers(&arguments[1], arguments[2].parse().expect("a number of streams")),
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
    // Store calls block: outside the runtime.
    let store = Store::memory().expect("a store in memory");
    let config = RunConfig::load(&LoadOptions::new("tiny")).expect("the preset is right").config;
    create(&store, &config).expect("the store is empty");
    let timings = Timings::new(Duration::from_secs(10));
    let options = JobOptions { name: JOB.to_owned(), min: 1, desired: 2, timings };
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
            .args(["workers", &server.address.to_string(), &streams.to_string()])
            .spawn()
            .expect("this program starts");
        connected(&job, streams).await;
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

fn workers(coordinator: &str, streams: u64) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    runtime.expect("a runtime").block_on(async {
        for id in 1..=streams {
            tokio::spawn(worker(coordinator.to_owned(), id));
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
async fn worker(coordinator: String, id: u64) {
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
    loop {
        tokio::select! {
            order = orders.next() => match order.expect("the coordinator goes on").expect("a message").order {
                Some(Order::Welcome(welcome)) => {
                    beat = tokio::time::interval(Duration::from_millis(welcome.heartbeat_ms));
                }
                Some(Order::Form(formation)) => {
                    now = stance(Activity::Running(formation.generation), Some(formation.start));
                    words.send(now.clone()).await.expect("the stream is open");
                }
                other => panic!("worker {id} is told {other:?}"),
            },
            _ = beat.tick() => words.send(now.clone()).await.expect("the stream is open"),
        }
    }
}

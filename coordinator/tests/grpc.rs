//! What a coordinator's services say to whoever speaks gRPC with them, and what they do not take.

mod common;

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anello_configs::{LoadOptions, RunConfig, Schedule};
use anello_coordinator::telemetry::Board;
use anello_coordinator::{
    Job, JobOptions, Jobs, News, Opened, Registry, RegistryOptions, Server, Timings, create,
};
use anello_proto::ring::WorkerId;
use anello_proto::v1;
use anello_proto::v1::from_worker::Word;
use anello_proto::v1::jobs_client::JobsClient;
use anello_proto::v1::leave::Why;
use anello_proto::v1::ring_client::RingClient;
use anello_proto::v1::stance::Activity;
use anello_proto::v1::to_worker::Order;
use anello_store::events::{Event, EventLog, RingMember};
use anello_store::{Notice, Refused, Store};
use anello_tls::Protection;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

/// Longest that an answer may take, on a machine that others use too.
const PATIENCE: Duration = Duration::from_secs(60);

/// A coordinator with a place without jobs, and the job `tiny` beside it, that has no worker yet.
struct Coordinator {
    address: SocketAddr,
    job: Job,
    notices: Receiver<Notice>,
    _place: tempfile::TempDir,
    _server: Server,
    runtime: tokio::runtime::Runtime,
}

impl Coordinator {
    fn start() -> Self {
        Self::start_on(run(), Duration::from_secs(60))
    }

    /// With a job whose run is this one.
    fn start_on(store: Store, detection: Duration) -> Self {
        Self::start_with(store, detection, Some(detection))
    }

    /// The same, and a registry that was `given` a detection for all of its jobs, or none.
    fn start_with(store: Store, detection: Duration, given: Option<Duration>) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let timings = Timings::new(detection);
        let options = JobOptions { name: "tiny".to_owned(), min: 1, desired: 2, timings };
        let opened = Opened::take_up(store, options).unwrap();
        let place = tempfile::tempdir().unwrap();
        let options = RegistryOptions {
            place: place.path().display().to_string(),
            slots: None,
            timings: given.map(Timings::new),
            board: Board::default(),
        };
        let jobs = Jobs::default();
        let (said, _) = channel();
        let (registry, _) =
            Registry::start(options, runtime.handle().clone(), jobs.clone(), said, common::nobody).unwrap();
        let (told, notices) = channel();
        let (job, server) = runtime.block_on(async {
            let (job, _) = opened.start(told, News::default()).unwrap();
            jobs.add(job.clone());
            let bound = Server::bind(([127, 0, 0, 1], 0).into(), Protection::Loopback).await.unwrap();
            (job, bound.serve(jobs, Some(registry)).await.unwrap())
        });
        Self { address: server.address, job, notices, _place: place, _server: server, runtime }
    }

    fn wait<T>(&self, asked: impl Future<Output = T>) -> T {
        self.runtime.block_on(async { tokio::time::timeout(PATIENCE, asked).await.expect("no answer") })
    }

    async fn channel(&self) -> Channel {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", self.address));
        endpoint.unwrap().connect().await.unwrap()
    }

    /// A connection on which these words were said: the job has the first of them.
    async fn open(&self, words: Vec<Word>) -> Result<Connection, Status> {
        let (say, said) = mpsc::channel(words.len());
        for word in words {
            say.send(v1::FromWorker { word: Some(word) }).await.unwrap();
        }
        let orders = RingClient::new(self.channel().await).attach(ReceiverStream::new(said)).await?;
        Ok(Connection { _say: say, orders: orders.into_inner() })
    }

    /// The same, and the first answer.
    async fn attach(&self, words: Vec<Word>) -> Result<(Connection, Option<Order>), Status> {
        let mut connection = self.open(words).await?;
        let first = connection.orders.message().await?.unwrap();
        Ok((connection, first.order))
    }

    /// What was refused since this was asked last.
    fn refused(&self) -> Vec<Refused> {
        let _ = self.known();
        let refused = |notice| if let Notice::Refused(what) = notice { Some(what) } else { None };
        self.notices.try_iter().filter_map(refused).collect()
    }

    /// Workers that the job knows.
    fn known(&self) -> Vec<u64> {
        let status = self.wait(self.job.status()).unwrap();
        status.attendants.iter().map(|attendant| attendant.worker.0).collect()
    }
}

/// A worker's connection, open for as long as this lives.
struct Connection {
    _say: mpsc::Sender<v1::FromWorker>,
    orders: Streaming<v1::ToWorker>,
}

/// A run that nobody has trained yet.
fn run() -> Store {
    let store = Store::memory().unwrap();
    create(&store, &RunConfig::load(&LoadOptions::new("tiny")).unwrap().config).unwrap();
    store
}

/// One whose last coordinator formed a ring of these workers, and was killed.
fn run_with_ring(workers: &[u64]) -> Store {
    let store = run();
    let member = |worker: &u64| RingMember {
        worker: WorkerId(*worker).to_string(),
        ring: vec![format!("127.0.0.1:{worker}")],
        peers: vec![format!("127.0.0.1:{worker}")],
        first_lane: 0,
        end_lane: 1,
    };
    let formed = Event::Formed {
        generation: 1,
        start: 0,
        source: "seed".to_owned(),
        holders: Vec::new(),
        members: workers.iter().map(member).collect(),
        save_first: false,
    };
    EventLog::open(&store).unwrap().append(formed).unwrap();
    store
}

fn hello(worker: u64, build: &str, device: &str) -> v1::Hello {
    let address = format!("127.0.0.1:{worker}");
    v1::Hello {
        job: "tiny".to_owned(),
        worker,
        connection: 1,
        endpoints: Some(v1::Endpoints { ring: vec![address.clone()], peers: vec![address] }),
        machine: format!("machine-{worker}"),
        build: build.to_owned(),
        device: device.to_owned(),
        stance: Some(v1::Stance { activity: Some(Activity::Outside(v1::Outside {})), ..Default::default() }),
    }
}

#[test]
fn a_worker_of_another_build_or_device_is_refused_and_told_what_differs() {
    let coordinator = Coordinator::start();
    let attach = |worker, build, device| {
        let said = vec![Word::Hello(hello(worker, build, device))];
        coordinator.wait(coordinator.attach(said)).unwrap()
    };
    // The first worker says what the job's workers are.
    let (_first, order) = attach(1, "0.1.0 avx2", "cpu");
    assert!(matches!(order, Some(Order::Welcome(_))), "{order:?}");
    let build = "its build is 0.2.0 avx2, the job's 0.1.0 avx2";
    let device = "its device is NVIDIA H100, the job's cpu";
    let remedy = "; start workers of one build on one kind of device";
    for (worker, [theirs, on], differs) in [
        (2, ["0.2.0 avx2", "cpu"], build.to_owned()),
        (3, ["0.1.0 avx2", "NVIDIA H100"], device.to_owned()),
        (4, ["0.2.0 avx2", "NVIDIA H100"], format!("{build} and {device}")),
    ] {
        let (_, order) = attach(worker, theirs, on);
        let reason = differs + remedy;
        assert_eq!(order, Some(Order::Leave(v1::Leave { why: Why::Refused.into(), reason })));
    }
    let (_second, order) = attach(5, "0.1.0 avx2", "cpu");
    assert!(matches!(order, Some(Order::Welcome(_))), "{order:?}");
    assert_eq!(coordinator.known(), [1, 5], "those that were refused are not known");
    assert_eq!(coordinator.refused(), [Refused::Stranger; 3]);
}

/// A ring trains on without its coordinator: the next one asks its members what they are, not whoever comes first.
#[test]
fn a_stranger_that_comes_before_the_ring_that_trains_is_the_one_that_is_refused() {
    let coordinator = Coordinator::start_on(run_with_ring(&[1, 2]), Duration::from_secs(60));
    let open = |worker, build| {
        let said = vec![Word::Hello(hello(worker, build, "cpu"))];
        coordinator.wait(coordinator.open(said)).unwrap()
    };
    let mut stranger = open(9, "0.2.0 avx2");
    let mut newcomer = open(8, "0.1.0 avx2");
    assert_eq!(coordinator.known(), [1, 2], "they wait");
    let mut members = [open(2, "0.1.0 avx2"), open(1, "0.1.0 avx2")];
    let first =
        |connection: &mut Connection| coordinator.wait(connection.orders.message()).unwrap().unwrap().order;
    for one_of_them in members.iter_mut().chain([&mut newcomer]) {
        let order = first(one_of_them);
        assert!(matches!(order, Some(Order::Welcome(_))), "{order:?}");
    }
    let reason =
        "its build is 0.2.0 avx2, the job's 0.1.0 avx2; start workers of one build on one kind of device";
    let reason = reason.to_owned();
    assert_eq!(first(&mut stranger), Some(Order::Leave(v1::Leave { why: Why::Refused.into(), reason })));
    assert_eq!(coordinator.known(), [1, 2, 8]);
}

/// Whoever moves a job to another build on purpose ends its workers first.
#[test]
fn a_job_moves_to_another_build_once_nobody_of_the_old_one_is_left() {
    let coordinator = Coordinator::start_on(run_with_ring(&[1, 2]), Duration::from_millis(100));
    let attach = |worker, build| {
        let said = vec![Word::Hello(hello(worker, build, "cpu"))];
        coordinator.wait(coordinator.attach(said)).unwrap()
    };
    let (new, order) = attach(9, "0.2.0 avx2");
    assert!(matches!(order, Some(Order::Welcome(_))), "the members are given up: {order:?}");
    drop(new);
    let until = Instant::now() + PATIENCE;
    while !coordinator.known().is_empty() {
        assert!(Instant::now() < until, "it is known still");
    }
    let (_newer, order) = attach(10, "0.3.0 avx2");
    assert!(matches!(order, Some(Order::Welcome(_))), "{order:?}");
}

/// What a coordinator that was killed has written of a machine that computes wrongly, the next one goes by.
#[test]
fn a_quarantine_is_read_from_the_log() {
    let store = run();
    let evicted = Event::Evicted {
        worker: WorkerId(7).to_string(),
        machine: "machine-9".to_owned(),
        step: Some(3),
        reason: "block 5".to_owned(),
    };
    EventLog::open(&store).unwrap().append(evicted).unwrap();
    let coordinator = Coordinator::start_on(store, Duration::from_secs(60));
    let attach = |worker| {
        let said = vec![Word::Hello(hello(worker, "build", "cpu"))];
        let (mut connection, first) = coordinator.wait(coordinator.attach(said)).unwrap();
        assert!(matches!(first, Some(Order::Welcome(_))), "{first:?}");
        coordinator.wait(async { connection.orders.message().await.unwrap().unwrap().order })
    };
    for (worker, machine) in [(9, "machine-9"), (7, "machine-7")] {
        let Some(Order::Leave(leave)) = attach(worker) else { panic!("worker {worker} is taken in") };
        let reason =
            format!("machine {machine} is quarantined: a worker's state there differed from all others'");
        assert_eq!((leave.why(), leave.reason), (Why::Evicted, reason));
    }
    let status = coordinator.wait(coordinator.job.status()).unwrap();
    assert_eq!(status.quarantined, ["machine-7", "machine-9"]);
    assert_eq!(status.attendants, []);
}

#[test]
fn a_worker_that_says_what_cannot_be_is_told_what_is_wrong() {
    let coordinator = Coordinator::start();
    let total = Schedule::new(&RunConfig::load(&LoadOptions::new("tiny")).unwrap().config).total_steps();
    let report = |step, event: &str| {
        Word::Step(v1::StepReport { step, events: vec![event.to_owned()], ..Default::default() })
    };
    let stance = |activity| Word::Stance(v1::Stance { activity: Some(activity), ..Default::default() });
    let holds = |step| {
        let activity = Some(Activity::Outside(v1::Outside {}));
        Word::Stance(v1::Stance { holds: Some(step), activity, ..Default::default() })
    };
    let remedy = "; start all parts of a job from one build of Anello";
    let evicted = r#"{"kind":"evicted","worker":"1","machine":"m","step":1,"reason":"spite"}"#;
    let cases = [
        (
            Word::Hello(hello(1, "build", "cpu")),
            Refused::Impossible,
            Code::FailedPrecondition,
            "it said hello twice; over one connection that is the first word, and only that".to_owned(),
        ),
        (
            Word::Stance(v1::Stance::default()),
            Refused::Malformed,
            Code::InvalidArgument,
            format!("a stance says no activity{remedy}"),
        ),
        (
            Word::Pace(v1::Pace::default()),
            Refused::Malformed,
            Code::InvalidArgument,
            format!("the time of 0 steps of 0 lanes{remedy}"),
        ),
        (
            Word::Failed(v1::Failed { reason: "f".repeat(16_385) }),
            Refused::Malformed,
            Code::InvalidArgument,
            format!("a reason of 16385 bytes, of at most 16384{remedy}"),
        ),
        (
            report(total, "{}"),
            Refused::Impossible,
            Code::OutOfRange,
            format!("it reports step {total}, and the run has {total}; start workers of this run"),
        ),
        (
            report(0, evicted),
            Refused::Event,
            Code::PermissionDenied,
            format!(
                "with step 0 it reports what no step brings about: {evicted}; that is the coordinator's to say"
            ),
        ),
        (
            stance(Activity::Running(7)),
            Refused::Impossible,
            Code::Aborted,
            "it speaks of generation 7, of which nobody was told; the newest here is 1".to_owned(),
        ),
        (
            holds(total + 1),
            Refused::Impossible,
            Code::Aborted,
            format!("it speaks of step {}, and the run has {total}; start workers of this run", total + 1),
        ),
    ];
    for (number, (word, what, code, text)) in cases.into_iter().enumerate() {
        let hello = hello(10 + number as u64, "build", "cpu");
        let (mut connection, order) =
            coordinator.wait(coordinator.attach(vec![Word::Hello(hello), word])).unwrap();
        assert!(matches!(order, Some(Order::Welcome(_))), "{order:?}");
        let last = loop {
            match coordinator.wait(connection.orders.message()) {
                Ok(Some(_)) => {}
                last => break last,
            }
        };
        let status = last.expect_err(&text);
        assert_eq!((status.code(), status.message()), (code, text.as_str()));
        assert_eq!(coordinator.refused(), [what], "{text}");
    }
    // Of a later build, say: the step is a step all the same, and the connection stays.
    let said = vec![Word::Hello(hello(1, "build", "cpu")), report(0, r#"{"kind":"dreamt"}"#)];
    let (_connection, _) = coordinator.wait(coordinator.attach(said)).unwrap();
    let heard = std::iter::repeat_with(|| coordinator.notices.recv_timeout(PATIENCE).unwrap())
        .find(|notice| !matches!(notice, Notice::Logged(_)));
    assert!(matches!(heard, Some(Notice::Refused(Refused::Event))), "{heard:?}");
    assert!(coordinator.known().contains(&1));
}

/// `ring.detection` is the job's; whoever starts the coordinator may say otherwise, for all of them.
#[test]
fn the_times_of_a_ring_are_those_of_its_config_unless_the_coordinator_was_given_others() {
    let second = Duration::from_secs(1);
    for (given, heartbeat_ms, silence_ms) in [(None, 8_400, 42_000), (Some(15 * second), 3_000, 15_000)] {
        let coordinator = Coordinator::start_with(run(), 60 * second, given);
        let mut options = LoadOptions::new("tiny");
        options.sets = vec!["ring.detection=42s".to_owned()];
        let config = RunConfig::load(&options).unwrap().config.to_toml();
        let request = v1::SubmitRequest { config, name: Some("own".to_owned()), ..Default::default() };
        let attached = async {
            JobsClient::new(coordinator.channel().await).submit(request).await?;
            let hello = v1::Hello { job: "own".to_owned(), ..hello(1, "build", "cpu") };
            coordinator.attach(vec![Word::Hello(hello)]).await
        };
        let (_connection, order) = coordinator.wait(attached).unwrap();
        let Some(Order::Welcome(welcome)) = order else { panic!("{order:?}") };
        assert_eq!((welcome.heartbeat_ms, welcome.silence_ms), (heartbeat_ms, silence_ms), "{given:?}");
    }
}

#[test]
fn health_and_reflection_are_answered() {
    let coordinator = Coordinator::start();
    let services = ["anello.v1.Jobs", "anello.v1.Ring"];
    coordinator.wait(async {
        let mut health = HealthClient::new(coordinator.channel().await);
        for service in ["", services[0], services[1]] {
            let asked = HealthCheckRequest { service: service.to_owned() };
            let HealthCheckResponse { status } = health.check(asked).await.unwrap().into_inner();
            assert_eq!(status, ServingStatus::Serving as i32, "{service}");
        }
        let unknown = HealthCheckRequest { service: "anello.v1.Peers".to_owned() };
        assert_eq!(health.check(unknown).await.unwrap_err().code(), Code::NotFound);

        let asked = |request| ServerReflectionRequest { host: String::new(), message_request: Some(request) };
        let symbol = "anello.v1.Jobs.Submit".to_owned();
        let asked =
            [MessageRequest::ListServices(String::new()), MessageRequest::FileContainingSymbol(symbol)]
                .map(asked);
        let mut reflection = ServerReflectionClient::new(coordinator.channel().await);
        let answers = reflection.server_reflection_info(tokio_stream::iter(asked)).await.unwrap();
        let answers: Vec<_> =
            answers.into_inner().map(|answer| answer.unwrap().message_response.unwrap()).collect().await;
        let [MessageResponse::ListServicesResponse(list), MessageResponse::FileDescriptorResponse(files)] =
            &answers[..]
        else {
            panic!("{answers:?}")
        };
        let listed: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
        assert!(services.iter().all(|service| listed.contains(service)), "{listed:?}");
        let file = files.file_descriptor_proto.concat();
        let names = |text: &str| file.windows(text.len()).any(|window| window == text.as_bytes());
        assert!(names("anello/v1/jobs.proto") && names("SubmitRequest"), "the file of the request");
    });
}

/// What is too long is refused by its length, before it is read; a little less is read, and refused for what it says.
#[test]
fn messages_that_are_too_long_are_not_taken() {
    const MIB: usize = 1 << 20;
    let coordinator = Coordinator::start();
    let submit = |bytes: usize| {
        let request = v1::SubmitRequest { config: "#".repeat(bytes), ..Default::default() };
        coordinator.wait(async { JobsClient::new(coordinator.channel().await).submit(request).await })
    };
    let refused = submit(2 * MIB).unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    assert!(refused.message().contains("the limit is: 2097152 bytes"), "{refused:?}");
    assert_eq!(submit(2 * MIB - 100).unwrap_err().code(), Code::InvalidArgument, "it is read");

    let say_hello = |bytes: usize| {
        let hello = v1::Hello { machine: "m".repeat(bytes), ..hello(1, "build", "cpu") };
        coordinator.wait(coordinator.attach(vec![Word::Hello(hello)]))
    };
    let refused = say_hello(48 * MIB).map(drop).unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    assert!(refused.message().contains("the limit is: 50331648 bytes"), "{refused:?}");
    let (_, order) = say_hello(48 * MIB - 1000).unwrap();
    let Some(Order::Leave(leave)) = order else { panic!("{order:?}") };
    assert!(leave.why() == Why::Refused && leave.reason.contains("machine"), "{leave:?}");
}

//! What a coordinator's services say to whoever speaks gRPC with them, and what they do not take.

mod common;

use std::net::SocketAddr;
use std::sync::mpsc::channel;
use std::time::Duration;

use anello_configs::{LoadOptions, RunConfig};
use anello_coordinator::telemetry::Board;
use anello_coordinator::{
    Job, JobOptions, Jobs, News, Opened, Registry, RegistryOptions, Server, Timings, create,
};
use anello_proto::v1;
use anello_proto::v1::from_worker::Word;
use anello_proto::v1::jobs_client::JobsClient;
use anello_proto::v1::leave::Why;
use anello_proto::v1::ring_client::RingClient;
use anello_proto::v1::stance::Activity;
use anello_proto::v1::to_worker::Order;
use anello_store::Store;
use anello_tls::Protection;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};
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
    _place: tempfile::TempDir,
    _server: Server,
    runtime: tokio::runtime::Runtime,
}

impl Coordinator {
    fn start() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let timings = Timings::new(Duration::from_secs(60));
        let store = Store::memory().unwrap();
        create(&store, &RunConfig::load(&LoadOptions::new("tiny")).unwrap().config).unwrap();
        let options = JobOptions { name: "tiny".to_owned(), min: 1, desired: 2, timings };
        let opened = Opened::take_up(store, options).unwrap();
        let place = tempfile::tempdir().unwrap();
        let options = RegistryOptions {
            place: place.path().display().to_string(),
            slots: None,
            timings,
            board: Board::default(),
        };
        let jobs = Jobs::default();
        let (said, _) = channel();
        let (registry, _) =
            Registry::start(options, runtime.handle().clone(), jobs.clone(), said, common::nobody).unwrap();
        let (job, server) = runtime.block_on(async {
            let (notices, _) = channel();
            let (job, _) = opened.start(notices, News::default()).unwrap();
            jobs.add(job.clone());
            let bound = Server::bind(([127, 0, 0, 1], 0).into(), Protection::Loopback).await.unwrap();
            (job, bound.serve(jobs, Some(registry)).await.unwrap())
        });
        Self { address: server.address, job, _place: place, _server: server, runtime }
    }

    fn wait<T>(&self, asked: impl Future<Output = T>) -> T {
        self.runtime.block_on(async { tokio::time::timeout(PATIENCE, asked).await.expect("no answer") })
    }

    async fn channel(&self) -> Channel {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", self.address));
        endpoint.unwrap().connect().await.unwrap()
    }

    /// A connection on which these words were said, and the first answer to them.
    async fn attach(
        &self,
        words: Vec<Word>,
    ) -> Result<(mpsc::Sender<v1::FromWorker>, Option<Order>), Status> {
        let (say, said) = mpsc::channel(words.len());
        for word in words {
            say.send(v1::FromWorker { word: Some(word) }).await.unwrap();
        }
        let orders = RingClient::new(self.channel().await).attach(ReceiverStream::new(said)).await?;
        let first = orders.into_inner().message().await?.unwrap();
        Ok((say, first.order))
    }
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
    let known = coordinator.wait(coordinator.job.status()).unwrap().attendants;
    let known: Vec<u64> = known.iter().map(|attendant| attendant.worker.0).collect();
    assert_eq!(known, [1, 5], "those that were refused are not known");
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

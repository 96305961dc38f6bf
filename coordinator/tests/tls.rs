//! Who gets into a coordinator's services, and what those who do not are told.

mod common;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

use anello_coordinator::telemetry::Board;
use anello_coordinator::{Error, Jobs, Rates, Registry, RegistryOptions, Server, Timings};
use anello_proto::v1;
use anello_proto::v1::jobs_client::JobsClient;
use anello_proto::v1::ring_client::RingClient;
use anello_tls::grpc::{ConnectError, To};
use anello_tls::{Files, Protection, Role, Tls, authority};
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(20);

fn load(dir: &Path, role: Role) -> Tls {
    Tls::load(Files::in_dir(dir, role), role).unwrap()
}

fn certificates() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    authority::init(dir.path(), 30, false).unwrap();
    dir
}

/// A coordinator that keeps a place without jobs, until it is dropped.
struct Coordinator {
    runtime: tokio::runtime::Runtime,
    address: SocketAddr,
    _place: tempfile::TempDir,
    _server: Server,
}

impl Coordinator {
    fn start(protection: Protection) -> Self {
        Self::start_with(protection, Rates::DEFAULT)
    }

    fn start_with(protection: Protection, rates: Rates) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let place = tempfile::tempdir().unwrap();
        let options = RegistryOptions {
            place: place.path().display().to_string(),
            slots: None,
            timings: Some(Timings::new(Duration::from_secs(1))),
            board: Board::default(),
        };
        let (said, _) = channel();
        let (registry, _) =
            Registry::start(options, runtime.handle().clone(), Jobs::default(), said, common::nobody)
                .unwrap();
        let server = runtime.block_on(async {
            let bound = Server::bind(([127, 0, 0, 1], 0).into(), protection).await.unwrap();
            bound.limited(rates).serve(Jobs::default(), Some(registry)).await.unwrap()
        });
        Self { runtime, address: server.address, _place: place, _server: server }
    }

    fn to(&self, tls: Option<Tls>) -> To {
        To { address: self.address.to_string(), role: Role::Coordinator, tls }
    }

    /// The jobs, as a user asks for them; else why not, without the address.
    fn list(&self, tls: Option<Tls>) -> Result<usize, String> {
        let to = self.to(tls);
        self.runtime.block_on(async {
            let channel = to.connect(PATIENCE).await.map_err(|error| self.refused(error))?;
            match JobsClient::new(channel).list(v1::ListRequest {}).await {
                Ok(answer) => Ok(answer.into_inner().jobs.len()),
                Err(status) => {
                    Err(self.unnamed(to.refusal(&status).await.unwrap_or_else(|| panic!("{status:?}"))))
                }
            }
        })
    }

    /// What a worker is told that says hello to a job that is not there; else why it does not get so far.
    fn attach(&self, tls: Option<Tls>) -> Result<String, String> {
        let to = self.to(tls);
        self.runtime.block_on(async {
            let channel = to.connect(PATIENCE).await.map_err(|error| self.refused(error))?;
            let hello = v1::Hello { job: "none".to_owned(), ..v1::Hello::default() };
            let hello = v1::FromWorker { word: Some(v1::from_worker::Word::Hello(hello)) };
            match RingClient::new(channel).attach(tokio_stream::once(hello)).await {
                Ok(orders) => Ok(format!("{:?}", orders.into_inner().message().await.unwrap().unwrap())),
                Err(status) => {
                    Err(self.unnamed(to.refusal(&status).await.unwrap_or_else(|| panic!("{status:?}"))))
                }
            }
        })
    }

    fn refused(&self, error: ConnectError) -> String {
        match error {
            ConnectError::Refused(error) => self.unnamed(error),
            other => panic!("{other:?}"),
        }
    }

    fn unnamed(&self, error: anello_tls::Error) -> String {
        error.to_string().replace(&self.address.to_string(), "ADDRESS")
    }
}

#[test]
fn each_service_is_for_its_role() {
    let dir = certificates();
    let coordinator = Coordinator::start(Protection::Tls(load(dir.path(), Role::Coordinator)));
    let [user, worker] = [Role::User, Role::Worker].map(|role| Some(load(dir.path(), role)));
    assert_eq!(coordinator.list(user.clone()), Ok(0));
    let told = coordinator.attach(worker.clone()).unwrap();
    assert!(told.contains("there is no job none"), "{told}");
    assert_eq!(
        coordinator.list(worker).unwrap_err(),
        "the coordinator at ADDRESS says: this is for a user, and the certificate is that of a worker; give one of \
         `anello certs issue user`"
    );
    assert_eq!(
        coordinator.attach(user).unwrap_err(),
        "the coordinator at ADDRESS says: this is for a worker, and the certificate is that of a user; give one of \
         `anello certs issue worker`"
    );
}

#[test]
fn who_proves_nothing_gets_nothing_and_is_in_nobodys_way() {
    let (dir, other) = (certificates(), certificates());
    let coordinator = Coordinator::start(Protection::Tls(load(dir.path(), Role::Coordinator)));
    // Some that say nothing.
    let silent =
        (0..50).map(|_| coordinator.runtime.block_on(TcpStream::connect(coordinator.address)).unwrap());
    let silent: Vec<TcpStream> = silent.collect();
    let wants = "the coordinator at ADDRESS wants TLS; give --tls DIR with certificates of its CA (ANELLO_TLS_DIR \
                 does the same)";
    for _ in 0..20 {
        assert_eq!(coordinator.list(None).unwrap_err(), wants);
        assert_eq!(coordinator.attach(None).unwrap_err(), wants);
    }
    let foreign = coordinator.list(Some(load(other.path(), Role::User))).unwrap_err();
    assert!(
        foreign.starts_with("the coordinator at ADDRESS shows a certificate that is not of the CA in "),
        "{foreign}"
    );
    // One that believes us, and that we do not believe.
    let theirs = Files { ca: other.path().join("ca.pem"), ..Files::in_dir(other.path(), Role::User) };
    let both = other.path().join("both.pem");
    let cas =
        [dir.path().join("ca.pem"), theirs.ca.clone()].map(|path| std::fs::read_to_string(path).unwrap());
    std::fs::write(&both, cas.concat()).unwrap();
    let mixed = Tls::load(Files { ca: both, ..theirs }, Role::User).unwrap();
    let told = coordinator.list(Some(mixed)).unwrap_err();
    assert!(told.starts_with("the coordinator at ADDRESS does not know the CA of "), "{told}");
    assert_eq!(coordinator.list(Some(load(dir.path(), Role::User))), Ok(0));
    drop(silent);
}

#[test]
fn without_tls_all_are_served_but_those_who_want_it() {
    let dir = certificates();
    let coordinator = Coordinator::start(Protection::Loopback);
    assert_eq!(coordinator.list(None), Ok(0));
    assert_eq!(
        coordinator.list(Some(load(dir.path(), Role::User))).unwrap_err(),
        "the coordinator at ADDRESS does not speak TLS; start it with --tls too, or leave TLS out here"
    );
}

#[test]
fn who_asks_too_often_is_told_when_to_come_again() {
    let number = |n| std::num::NonZeroU32::new(n).unwrap();
    let rates = Rates { requests: number(1000), changes: number(1) };
    let coordinator = Coordinator::start_with(Protection::Loopback, rates);
    let name = || v1::JobRequest { name: "none".to_owned() };
    let (answered, refused, listed) = coordinator.runtime.block_on(async {
        let mut jobs = JobsClient::new(coordinator.to(None).connect(PATIENCE).await.unwrap());
        let mut answered = 0;
        let refused = loop {
            let status = jobs.pause(name()).await.unwrap_err();
            if status.code() != tonic::Code::NotFound {
                break status;
            }
            answered += 1;
            assert!(answered < 100_000, "one is refused");
        };
        (answered, refused, jobs.list(v1::ListRequest {}).await.is_ok())
    });
    assert!(answered >= 5, "{answered}");
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    assert_eq!(
        refused.message(),
        "127.0.0.1 asks too often: this server answers 1 requests that change something a second of one address; try again \
         in 1 s"
    );
    assert_eq!(refused.metadata().get("retry-after").unwrap(), "1");
    assert!(listed, "it may look on");
    let told = coordinator.attach(None).unwrap();
    assert!(told.contains("there is no job none"), "workers are not counted: {told}");
}

#[test]
fn an_address_that_others_reach_is_not_taken_without_tls() {
    let dir = certificates();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bind = |protection| runtime.block_on(Server::bind(([0, 0, 0, 0], 0).into(), protection)).map(drop);
    let error = bind(Protection::Loopback).unwrap_err();
    assert!(matches!(&error, Error::Tls(anello_tls::Error::Address { .. })), "{error:?}");
    bind(Protection::Insecure).unwrap();
    bind(Protection::Tls(load(dir.path(), Role::Coordinator))).unwrap();
}

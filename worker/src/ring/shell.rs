//! The shell: connection, heartbeats, signals and the model thread around the pure [`Member`].

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use anello_collective::{AbortHandle, tcp};
use anello_configs::Timings;
use anello_member::{Effect, Event, KeptRows, Member};
use anello_proto::convert::Word;
use anello_proto::ring::{Epoch, Leave, WorkerId};
use anello_proto::v1;
use anello_proto::v1::from_worker::Word as Said;
use anello_store::Store;
use anello_tls::Role;
use anello_tls::grpc::{ConnectError, To};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::circle::Rows;
use super::link::Link;
use super::model::{Command, Model, Outside, Told};
use super::pace::Tally;
use super::{Watched, WorkerOptions, peers};
use crate::device;
use crate::environment;
use crate::error::{Error, Result, with_causes};

/// The first pause between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(50);
/// How often the wish to go is looked for.
const POLL: Duration = Duration::from_millis(50);

/// Serves until sent away.
pub(super) fn serve(options: WorkerOptions, terminate: Arc<AtomicBool>) -> Result<Leave> {
    let system = |action| move |source| Error::System { action, source };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("ring-shell")
        .enable_all()
        .build()
        .map_err(system("starting the worker's runtime"))?;
    options.addresses.iter().try_for_each(|address| options.protection.check(*address))?;
    let tls = options.protection.tls();
    let listener = listen(&options.addresses).map_err(system("listening for peers"))?;
    let listener = match tls {
        Some(tls) => listener.with_tls(tls.clone()),
        None => listener,
    };
    let ring = listener.addresses().map_err(system("listening for peers"))?;
    let job = peers::Job::new(&options.job);
    let (shelf, rows) = (peers::Shelf::default(), peers::SharedRows::default());
    let peers = runtime
        .block_on(peers::start(&job, &options.addresses, tls, shelf.clone(), rows.clone()))
        .map_err(system("listening for peers that lack state"))?;
    let texts = |addresses: &[SocketAddr]| addresses.iter().map(SocketAddr::to_string).collect();
    let here = environment::of(device::named(options.device.unwrap_or_default()), options.threads);
    let hello = v1::Hello {
        job: options.job.clone(),
        worker: draw_id(),
        connection: 0,
        endpoints: Some(v1::Endpoints { ring: texts(&ring), peers: texts(&peers) }),
        machine: options.machine.clone(),
        build: here.build(),
        device: here.device.clone(),
        stance: None,
    };
    let (tell, told) = mpsc::unbounded_channel();
    let coordinator = To { address: options.coordinator.clone(), role: Role::Coordinator, tls: tls.cloned() };
    let shell = Shell {
        options,
        coordinator,
        member: Member::new(None),
        hello,
        link: None,
        told,
        tell,
        model: None,
        parts_of_model: Some((listener, shelf)),
        runtime: runtime.handle().clone(),
        ring: None,
        welcomed: false,
        rows,
        tally: Tally::default(),
        heartbeat: Duration::from_secs(1),
        silence: Duration::from_secs(5),
        said_at: Instant::now(),
        paced_at: Instant::now(),
        connect_at: Instant::now(),
        pause: PAUSE,
    };
    let left = runtime.block_on(shell.serve(terminate));
    // What is left of the runtime are connections that nobody waits for.
    runtime.shutdown_background();
    left
}

/// The ring's listener at a free port of each of `addresses`.
fn listen(addresses: &[IpAddr]) -> std::io::Result<tcp::Listener> {
    let (first, more) = addresses.split_first().ok_or(std::io::ErrorKind::AddrNotAvailable)?;
    let at = |address: &IpAddr| SocketAddr::new(*address, 0);
    more.iter().try_fold(tcp::Listener::bind(at(first))?, |listener, address| listener.and_at(at(address)))
}

/// A number that no other process has: the hash of a map's random keys, which the system draws.
fn draw_id() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish().max(1)
}

/// The ring that was begun last, as far as the shell has a hand on it.
struct RingHand {
    abort: AbortHandle,
    hold: Arc<AtomicU8>,
}

struct Shell {
    options: WorkerOptions,
    coordinator: To,
    member: Member,
    hello: v1::Hello,
    link: Option<Link>,
    told: mpsc::UnboundedReceiver<Told>,
    tell: mpsc::UnboundedSender<Told>,
    model: Option<Model>,
    parts_of_model: Option<(tcp::Listener, peers::Shelf)>,
    runtime: tokio::runtime::Handle,
    ring: Option<RingHand>,
    /// The coordinator has said over this connection where the run is.
    welcomed: bool,
    /// Figures of steps that are not known to be in the run folder.
    rows: peers::SharedRows,
    /// Time of the steps since the last word about it.
    tally: Tally,
    heartbeat: Duration,
    /// Of a peer, after which it cannot be reached.
    silence: Duration,
    said_at: Instant,
    paced_at: Instant,
    connect_at: Instant,
    pause: Duration,
}

enum Happened {
    Order(Option<(Epoch, Word)>),
    Told(Told),
    Time,
}

impl Shell {
    /// Until sent away. Why it ends otherwise, the coordinator hears, if there is one: the log has it then.
    async fn serve(mut self, terminate: Arc<AtomicBool>) -> Result<Leave> {
        let left = self.run(&terminate).await;
        if let (Err(error), Some(link)) = (&left, self.link.take()) {
            link.say_last(Said::Failed(v1::Failed::of(&with_causes(error)))).await;
        }
        left
    }

    async fn run(&mut self, terminate: &AtomicBool) -> Result<Leave> {
        let mut terminating = false;
        loop {
            if self.link.is_none() && self.connect_at <= Instant::now() {
                self.connect().await?;
            }
            let happened = self.wait().await;
            let mut effects = Vec::new();
            match happened {
                Happened::Order(None) => {
                    self.link = None;
                    self.connect_at = Instant::now() + self.pause;
                    self.member.handle(Event::Unlinked, &mut effects);
                }
                Happened::Order(Some((_, Word::Welcome(welcome)))) => self.welcome(welcome)?,
                Happened::Order(Some((epoch, Word::Order(order)))) => {
                    if let anello_proto::ring::Order::Committed { step } = &order {
                        self.rows().durable(step.0);
                        if let Some(model) = &self.model {
                            model.committed(*step);
                        }
                    }
                    self.member.handle(Event::Ordered { epoch, order }, &mut effects);
                }
                Happened::Told(told) => self.told(told, &mut effects)?,
                Happened::Time => {}
            }
            if terminate.load(Ordering::Relaxed) && !terminating {
                terminating = true;
                tracing::info!(
                    "asked to go: at the next step boundary, once the coordinator has let others take over"
                );
                self.member.handle(Event::Terminate, &mut effects);
            }
            if let Some(left) = self.perform(effects) {
                return Ok(left);
            }
            if self.link.is_some() && self.said_at.elapsed() >= self.heartbeat {
                self.say_stance();
            }
            // Of its own, whatever else there was to say meanwhile.
            if self.link.is_some() && self.paced_at.elapsed() >= self.heartbeat {
                self.say_pace();
            }
        }
    }

    async fn wait(&mut self) -> Happened {
        let next = match self.link {
            Some(_) => self.said_at + self.heartbeat,
            None => self.connect_at,
        };
        let next = next.min(Instant::now() + POLL);
        let link = &mut self.link;
        let order = async {
            match link {
                Some(link) => link.orders.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            order = order => Happened::Order(order),
            Some(told) = self.told.recv() => Happened::Told(told),
            () = tokio::time::sleep_until(next) => Happened::Time,
        }
    }

    /// Tries to. Who was never welcomed gives up where trying again changes nothing; who was may have what all wait for.
    async fn connect(&mut self) -> Result<()> {
        self.hello.connection += 1;
        let stance = Some(self.member.stance().into());
        let hello = v1::Hello { stance, ..self.hello.clone() };
        match Link::open(&self.coordinator, hello, self.silence).await {
            Ok(link) => {
                self.link = Some(link);
                self.welcomed = false;
                self.rows().linked();
                self.pause = PAUSE;
                self.said_at = Instant::now();
                let mut effects = Vec::new();
                self.member.handle(Event::Linked, &mut effects);
            }
            Err(ConnectError::Refused(error)) if self.model.is_none() => return Err(error.into()),
            Err(ConnectError::Address(address)) => {
                return Err(Error::config(format!("{address} is no address"), "give host:port"));
            }
            Err(cause) => {
                match &cause {
                    // Once, until there was a connection again.
                    ConnectError::Refused(error) if self.pause == PAUSE => {
                        tracing::warn!(%error, "the way to the coordinator is closed");
                    }
                    cause => {
                        tracing::debug!(%cause, coordinator = self.coordinator.address, "no coordinator")
                    }
                }
                // A coordinator that comes back gives its workers a lease to report, which is some heartbeats.
                self.pause = (self.pause * 2).min(Timings::retry_within(self.heartbeat));
                self.connect_at = Instant::now() + self.pause;
            }
        }
        Ok(())
    }

    /// The coordinator says where the run is: the first time, the model thread starts. Said again over one connection, it
    /// asks for rows that rank 0 does not have.
    fn welcome(&mut self, welcome: v1::Welcome) -> Result<()> {
        self.heartbeat = Duration::from_millis(welcome.heartbeat_ms.max(1));
        self.silence = Duration::from_millis(welcome.silence_ms.max(1000));
        let again = std::mem::replace(&mut self.welcomed, true);
        if !again {
            // What happened since the hello was said.
            self.say_stance();
        }
        self.tell_rows(self.rows().welcomed(welcome.reported));
        if again {
            return Ok(());
        }
        if let Some((listener, shelf)) = self.parts_of_model.take() {
            let store = Store::durable(&welcome.run)?;
            self.watch(|| Watched::Run(store.clone()));
            let tell = self.tell.clone();
            let tls = self.coordinator.tls.clone();
            let (runtime, rows) = (self.runtime.clone(), self.rows.clone());
            let outside = Outside { listener, shelf, rows, tls, runtime, tell };
            let model = Model::start(store, &self.options, outside)?;
            self.model = Some(model);
        }
        Ok(())
    }

    fn told(&mut self, told: Told, effects: &mut Vec<Effect>) -> Result<()> {
        match told {
            Told::Event(event) => self.member.handle(event, effects),
            Told::Step(report, load) => {
                self.tally.add(&report);
                self.watch(|| Watched::Step(report.clone(), load));
                self.tell_rows(self.rows().applied(report.step, report));
            }
            Told::Took(Rows { durable, rows }) => {
                let rows = rows.into_iter().map(|row| (row.step, row)).collect();
                self.tell_rows(self.rows().took(durable, rows));
            }
            Told::Failed(error) => return Err(error),
        }
        Ok(())
    }

    fn watch(&self, what: impl FnOnce() -> Watched) {
        if let Some(watcher) = &self.options.watcher {
            let _ = watcher.send(what());
        }
    }

    /// Does what the member wants; returns why to go, when it is to.
    fn perform(&mut self, effects: Vec<Effect>) -> Option<Leave> {
        for effect in effects {
            match effect {
                Effect::Say(_) => self.say_stance(),
                Effect::Form(formation) => {
                    let worker = WorkerId(self.hello.worker);
                    self.tally.begin(&formation, worker);
                    self.tell_rows(self.rows().formed(formation.rank(worker) == Some(0)));
                    let ring = RingHand { abort: AbortHandle::new(), hold: Arc::default() };
                    let (abort, hold) = (ring.abort.clone(), ring.hold.clone());
                    self.ring = Some(ring);
                    if let Some(model) = &self.model {
                        let silence = self.silence;
                        model.command(Command::Form { formation, worker, abort, hold, silence });
                    }
                }
                Effect::Hold { save } => {
                    if let Some(ring) = &self.ring {
                        ring.hold.fetch_max(1 + u8::from(save), Ordering::Relaxed);
                    }
                }
                Effect::Abort { reason } => {
                    if let Some(ring) = &self.ring {
                        ring.abort.abort(reason);
                    }
                }
                Effect::WriteKept { step, generation } => {
                    if let Some(model) = &self.model {
                        model.write_kept(step, generation);
                    }
                }
                Effect::Exit(leave) => return Some(leave),
            }
        }
        None
    }

    fn say_stance(&mut self) {
        self.said_at = Instant::now();
        if let Some(link) = &self.link
            && !link.say(Said::Stance(self.member.stance().into()))
        {
            tracing::debug!("a word for the coordinator is lost; the next one says it all");
        }
    }

    /// For people, and to find one that is slow: what is lost is not said again.
    fn say_pace(&mut self) {
        self.paced_at = Instant::now();
        if let (Some(pace), Some(link)) = (self.tally.take(), &self.link) {
            link.say(Said::Pace((&pace).into()));
        }
    }

    fn rows(&self) -> MutexGuard<'_, KeptRows<v1::StepReport>> {
        self.rows.lock().expect("no holder panics")
    }

    /// As far as the connection has room: the coordinator asks for what it lacks, and drops what it knows.
    fn tell_rows<'a>(&self, rows: impl IntoIterator<Item = &'a v1::StepReport>) {
        if let Some(link) = &self.link {
            let _ = rows.into_iter().all(|row| link.say(Said::Step(row.clone())));
        }
    }
}

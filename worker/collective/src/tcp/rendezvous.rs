//! From addresses to a connected ring.
//!
//! ```text
//! dialer (higher rank)                          acceptor (lower rank)
//! idle ──dial──▶ connecting ──▶ Hello ────────▶ stranger ── fits ──▶ Welcome, connected
//!   ▲               │             │                ├─ rising generation ─▶ Later (the dialer tries again)
//!   └── refused, ◀──┘    Welcome ─┴▶ connected     ├─ older generation, other job ─▶ Refused, counted
//!       closed, Later    Refused ──▶ error         └─ all else that differs ─▶ Refused, and our own error
//! ```
//! One loop over non-blocking sockets: it sleeps until something happens, the deadline or an abort. Two connections a
//! pair: one for blocks, one for messages and last words, so that these are never behind a block cut in the middle.
//!
//! With TLS a connection begins with its handshake, which reading and writing greetings makes on the way: whoever does
//! not show a worker's certificate gets no further than that, within the same 5 s, and is counted.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anello_tls::{Role, Tls};
use rustix::event::PollFlags;

use super::frame::{Fault, Kind, MessageReceiver};
use super::hello::{
    Channel, Greeting, GreetingReader, Hello, NoGreeting, TEXT_BYTES_MAX, encode, lanes_checksum,
};
use super::socket::{Poll, Wake, dial, has_no_way, is_silence, set_buffers, watch};
use super::stream::{Security, Stream, tls_error};
use super::unheard::is_unheard;
use super::{Options, farewell_frame};
use crate::farewell::Farewell;
use crate::{Error, Generation, Rank, Result, Ring};

/// Between two attempts to reach a worker.
const RETRY: Duration = Duration::from_millis(50);
/// For a connection attempt that gets no answer, before the next address is tried.
const CONNECT: Duration = Duration::from_secs(2);
/// For a stranger to say who it is.
const GREET: Duration = Duration::from_secs(5);

/// What came to a listener and did not belong to the ring that was forming.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    /// Workers of an older generation of the job.
    pub stale: u64,
    /// Workers of a newer generation, told to try again.
    pub early: u64,
    /// Workers of another job.
    pub foreign: u64,
    /// Connections that said something else, or nothing for 5 s.
    pub garbage: u64,
    /// With TLS: connections without a certificate that makes them workers.
    pub untrusted: u64,
}

/// The port of a worker. It outlives generations: each rendezvous takes the connections that came meanwhile.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    security: Option<Security>,
    refusals: Refusals,
}

impl Listener {
    /// Listens on `address`; port 0 takes a free one. Without TLS: for a network where only the job's workers are.
    ///
    /// # Errors
    /// Those of the system.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = TcpListener::bind(address)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, security: None, refusals: Refusals::default() })
    }

    /// The same with TLS, here and on the way to others: all members must have it.
    #[must_use]
    pub fn with_tls(self, tls: Tls) -> Self {
        Self { security: Some(Security::new(tls)), ..self }
    }

    /// Where it listens.
    ///
    /// # Errors
    /// Those of the system.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// What was refused since it was bound.
    pub fn refusals(&self) -> Refusals {
        self.refusals
    }
}

/// A connection that has yet to say who it is.
struct Stranger {
    /// Taken when it was dealt with.
    stream: Option<Stream>,
    reader: GreetingReader,
    until: Instant,
}

enum Dialing {
    Idle(Instant),
    Connecting(TcpStream, Instant),
    Greeting(Stream, GreetingReader),
    Done,
}

/// Our way to one connection of a lower rank.
struct Dial {
    rank: Rank,
    channel: Channel,
    /// Which of its addresses is next.
    address: usize,
    state: Dialing,
    seen: String,
    /// Since when no attempt got an answer of any kind; absent: the last one did.
    unanswered: Option<Instant>,
}

#[derive(Clone, Copy)]
enum Mark {
    Wake,
    Listener,
    Dial(usize),
    Stranger(usize),
    Connected(Rank),
}

/// Both connections to a rank.
#[derive(Default)]
struct Pair {
    control: Option<Stream>,
    data: Option<Stream>,
}

impl Pair {
    fn channel(&mut self, channel: Channel) -> &mut Option<Stream> {
        match channel {
            Channel::Control => &mut self.control,
            Channel::Data => &mut self.data,
        }
    }

    fn is_complete(&self) -> bool {
        self.control.is_some() && self.data.is_some()
    }
}

struct Rendezvous<'a> {
    listener: &'a mut Listener,
    options: &'a Options,
    own: Hello,
    pairs: Vec<Pair>,
    dials: Vec<Dial>,
    strangers: Vec<Stranger>,
}

/// Connects to all members; the two connections (control, data) to each rank but our own.
pub(crate) fn meet(
    listener: &mut Listener,
    options: &Options,
    ring: &Ring,
    wake: &Wake,
) -> Result<Vec<(Rank, Stream, Stream)>> {
    let texts = [("job", &options.job), ("config digest", &options.config_digest), ("build", &options.build)];
    for (what, text) in texts {
        if text.len() > TEXT_BYTES_MAX {
            return Err(Error::shape(format!(
                "a {what} of {} bytes; {TEXT_BYTES_MAX} are allowed",
                text.len()
            )));
        }
    }
    if options.members.len() != ring.members() {
        return Err(Error::shape(format!(
            "addresses of {} members; the shape has {}",
            options.members.len(),
            ring.members()
        )));
    }
    if let Some(rank) = (0..ring.rank().index()).find(|rank| options.members[*rank].is_empty()) {
        return Err(Error::shape(format!("rank {rank} has no address")));
    }
    set_buffers(&listener.socket, options.socket_buffer_bytes)
        .map_err(Error::system("setting socket buffers"))?;
    let own = Hello {
        job: options.job.clone(),
        generation: options.generation.0,
        rank: ring.rank().0,
        to: ring.rank().0,
        channel: Channel::Control,
        config_digest: options.config_digest.clone(),
        build: options.build.clone(),
        members: ring.members() as u32,
        lanes: lanes_checksum(ring.shape()),
        blocks: ring.shape().blocks,
        block_len: ring.shape().block_len as u64,
    };
    // For the deadline: how long the caller is willing to wait decides nothing about the run.
    let start = Instant::now();
    let dials = (0..ring.rank().0).map(Rank).flat_map(|rank| {
        [Channel::Control, Channel::Data].map(|channel| Dial {
            rank,
            channel,
            address: 0,
            state: Dialing::Idle(start),
            seen: "no answer yet".into(),
            unanswered: None,
        })
    });
    let mut meeting = Rendezvous {
        listener,
        options,
        own,
        pairs: (0..ring.members()).map(|_| Pair::default()).collect(),
        dials: dials.collect(),
        strangers: Vec::new(),
    };
    // Bounded, since no clock goes on for ever.
    let met = meeting.run(wake, start + options.deadline.min(Duration::from_secs(1 << 30)));
    let met = met.map_err(|error| error.with_unreachable(meeting.unanswered(Instant::now())));
    let Rendezvous { pairs, .. } = meeting;
    if let Err(error) = &met {
        // Those who are connected would wait for us.
        let frame = farewell_frame(options.generation, 0, &Farewell::of(error));
        for mut control in pairs.into_iter().filter_map(|pair| pair.control) {
            let _ = control.write(&frame);
        }
        return Err(error.clone());
    }
    let links = (0..).map(Rank).zip(pairs).filter_map(|(rank, pair)| Some((rank, pair.control?, pair.data?)));
    Ok(links.collect())
}

impl Rendezvous<'_> {
    fn run(&mut self, wake: &Wake, deadline: Instant) -> Result<()> {
        loop {
            self.options.abort.check()?;
            let own = self.own.rank as usize;
            if self.pairs.iter().enumerate().all(|(rank, pair)| rank == own || pair.is_complete()) {
                return Ok(());
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(Error::Deadline {
                    generation: self.options.generation,
                    deadline_ms: self.options.deadline.as_millis() as u64,
                    waiting: self.waiting(),
                });
            }
            let next = self.turn(now)?.map_or(deadline, |next| next.min(deadline));
            for (mark, flags) in self.poll(wake).wait(Some(next.saturating_duration_since(now)))? {
                match mark {
                    Mark::Wake => {}
                    Mark::Listener => self.accept()?,
                    Mark::Dial(at) => self.go_on_dialing(at)?,
                    Mark::Stranger(at) => self.greet(at)?,
                    Mark::Connected(rank) => {
                        if flags.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) {
                            return Err(self.lost(rank));
                        }
                        let Pair { control, data } = &mut self.pairs[rank.index()];
                        // An end shows by itself.
                        [control, data].into_iter().flatten().for_each(|stream| drop(stream.flush()));
                    }
                }
            }
            self.strangers.retain(|stranger| stranger.stream.is_some());
        }
    }

    /// Does what time asks for; when it asks again.
    fn turn(&mut self, now: Instant) -> Result<Option<Instant>> {
        let silence = self.options.silence;
        for dialing in &mut self.dials {
            dialing.check(now, silence)?;
            match &dialing.state {
                Dialing::Idle(at) if *at <= now => {
                    let addresses = &self.options.members[dialing.rank.index()];
                    let address = addresses[dialing.address % addresses.len()];
                    let messages = dialing.channel == Channel::Control;
                    let dialed = dial(address, self.options.socket_buffer_bytes)
                        .and_then(|socket| watch(&socket, silence, messages).map(|()| socket));
                    dialing.state = match dialed {
                        Ok(stream) => Dialing::Connecting(stream, now + CONNECT.min(silence)),
                        Err(error) if has_no_way(&error) => {
                            dialing.unanswered(now, format!("{address}: {error}"))
                        }
                        Err(error) => dialing.failed(format!("{address}: {error}")),
                    };
                }
                Dialing::Connecting(_, until) if *until <= now => {
                    let addresses = &self.options.members[dialing.rank.index()];
                    let address = addresses[dialing.address % addresses.len()];
                    dialing.state = dialing.unanswered(now, format!("no answer from {address}"));
                }
                _ => {}
            }
        }
        let before = self.strangers.len();
        self.strangers.retain(|stranger| stranger.until > now);
        self.listener.refusals.garbage += (before - self.strangers.len()) as u64;
        let dials = self.dials.iter().filter_map(|dial| match &dial.state {
            Dialing::Idle(at) | Dialing::Connecting(_, at) => Some(*at),
            Dialing::Greeting(..) | Dialing::Done => None,
        });
        Ok(dials.chain(self.strangers.iter().map(|stranger| stranger.until)).min())
    }

    fn poll<'a>(&'a self, wake: &'a Wake) -> Poll<'a, Mark> {
        let mut poll = Poll::new();
        poll.push(wake.fd(), PollFlags::IN, Mark::Wake);
        poll.push(&self.listener.socket, PollFlags::IN, Mark::Listener);
        for (at, dial) in self.dials.iter().enumerate() {
            match &dial.state {
                Dialing::Connecting(stream, _) => poll.push(stream, PollFlags::OUT, Mark::Dial(at)),
                Dialing::Greeting(stream, _) => poll.push_stream(stream, PollFlags::IN, Mark::Dial(at)),
                Dialing::Idle(_) | Dialing::Done => {}
            }
        }
        for (at, stranger) in self.strangers.iter().enumerate() {
            if let Some(stream) = &stranger.stream {
                poll.push_stream(stream, PollFlags::IN, Mark::Stranger(at));
            }
        }
        for (rank, pair) in (0..).map(Rank).zip(&self.pairs) {
            for stream in [&pair.control, &pair.data].into_iter().flatten() {
                poll.push_stream(stream, PollFlags::RDHUP, Mark::Connected(rank));
            }
        }
        poll
    }

    fn accept(&mut self) -> Result<()> {
        // A few at a time; the rest waits in the kernel. Beyond the bound the oldest goes, so that strangers who say
        // nothing keep nobody out.
        let strangers_max = 64 + 2 * self.pairs.len();
        for _ in 0..64 {
            match self.listener.socket.accept() {
                Ok((stream, _)) => {
                    // Those who came before this rendezvous have the buffers of a listener that knew of none.
                    let prepared = stream
                        .set_nonblocking(true)
                        .and_then(|()| stream.set_nodelay(true))
                        .and_then(|()| set_buffers(&stream, self.options.socket_buffer_bytes))
                        .and_then(|()| watch(&stream, self.options.silence, false))
                        .and_then(|()| Stream::accepted(stream, self.listener.security.as_ref()));
                    let Ok(stream) = prepared else { continue };
                    if self.strangers.iter().filter(|stranger| stranger.stream.is_some()).count()
                        >= strangers_max
                    {
                        // In place, since marks of this round count by position.
                        let oldest = self.strangers.iter_mut().find_map(|stranger| stranger.stream.take());
                        self.listener.refusals.garbage += u64::from(oldest.is_some());
                    }
                    let until = Instant::now() + GREET;
                    self.strangers.push(Stranger {
                        stream: Some(stream),
                        reader: GreetingReader::default(),
                        until,
                    });
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => break,
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => {}
                    _ => return Err(Error::system("accepting a worker")(error)),
                },
            }
        }
        Ok(())
    }

    fn greet(&mut self, at: usize) -> Result<()> {
        let stranger = &mut self.strangers[at];
        let Some(mut stream) = stranger.stream.take() else { return Ok(()) };
        let theirs = match stranger.reader.read(&mut stream) {
            Ok(None) => {
                stranger.stream = Some(stream);
                return Ok(());
            }
            Ok(Some(Greeting::Hello(theirs))) => theirs,
            Ok(Some(_)) | Err(NoGreeting::Garbage) => {
                self.listener.refusals.garbage += 1;
                return Ok(());
            }
            Err(NoGreeting::Io(error)) => {
                self.listener.refusals.untrusted += u64::from(tls_error(&error).is_some());
                return Ok(());
            }
        };
        let ours = Hello { to: theirs.rank, channel: theirs.channel, ..self.own.clone() };
        let refusals = &mut self.listener.refusals;
        let differs = ours.differences(&theirs);
        if theirs.job == ours.job && theirs.generation > ours.generation {
            refusals.early += 1;
            answer(&mut stream, &Greeting::Later);
            return Ok(());
        }
        let expected = theirs.rank > ours.rank && theirs.rank < ours.members;
        if !differs.is_empty() || !expected {
            // The same in the words of the other side.
            let mut says = theirs.differences(&ours);
            if differs.is_empty() {
                says =
                    format!("{} dialed {}; higher ranks dial lower ones", Rank(theirs.rank), Rank(ours.rank));
            }
            answer(&mut stream, &Greeting::Refused(says.clone()));
            if theirs.job != ours.job {
                refusals.foreign += 1;
                return Ok(());
            }
            if theirs.generation != ours.generation {
                refusals.stale += 1;
                return Ok(());
            }
            let differs = if differs.is_empty() { says } else { differs };
            return Err(Error::Refused {
                peer: Rank(theirs.rank).to_string(),
                own: Rank(ours.rank).to_string(),
                differs,
            });
        }
        let messages = theirs.channel == Channel::Control;
        watch(&stream, self.options.silence, messages).map_err(Error::system("watching a connection"))?;
        if answer(&mut stream, &Greeting::Welcome(ours)) {
            *self.pairs[theirs.rank as usize].channel(theirs.channel) = Some(stream);
        }
        Ok(())
    }

    fn go_on_dialing(&mut self, at: usize) -> Result<()> {
        let dial = &mut self.dials[at];
        let ours = Hello { to: dial.rank.0, channel: dial.channel, ..self.own.clone() };
        match std::mem::replace(&mut dial.state, Dialing::Done) {
            Dialing::Connecting(stream, _) => {
                let connected = match stream.take_error() {
                    Ok(None) => stream
                        .set_nodelay(true)
                        .and_then(|()| Stream::dialed(stream, self.listener.security.as_ref())),
                    Ok(Some(error)) | Err(error) => Err(error),
                };
                let greeted =
                    connected.map(|mut stream| answer(&mut stream, &Greeting::Hello(ours)).then_some(stream));
                dial.state = match greeted {
                    Ok(Some(stream)) => {
                        dial.seen = "it does not answer our hello yet".into();
                        Dialing::Greeting(stream, GreetingReader::default())
                    }
                    Ok(None) => dial.failed("closed at once".into()),
                    Err(error) => dial.failed_by(&error, error.to_string()),
                };
            }
            Dialing::Greeting(mut stream, mut reader) => match reader.read(&mut stream) {
                Ok(None) => dial.state = Dialing::Greeting(stream, reader),
                Ok(Some(Greeting::Welcome(theirs))) => {
                    let differs = ours.differences(&theirs);
                    if !differs.is_empty() {
                        return Err(refused(dial.rank, ours.rank, differs));
                    }
                    *self.pairs[dial.rank.index()].channel(dial.channel) = Some(stream);
                }
                Ok(Some(Greeting::Refused(differs))) => return Err(refused(dial.rank, ours.rank, differs)),
                Ok(Some(Greeting::Later)) => {
                    dial.state =
                        dial.failed(format!("it has not come to {} yet", Generation(ours.generation)));
                }
                Ok(Some(Greeting::Hello(_))) | Err(NoGreeting::Garbage) => {
                    dial.state = dial.failed("something else answers there".into());
                }
                Err(NoGreeting::Io(error)) => match (tls_error(&error), &self.listener.security) {
                    // Whatever answers there, it is not the member: that may yet come.
                    (None | Some(rustls::Error::InvalidMessage(_)), _) | (_, None) => {
                        dial.state = dial.failed_by(&error, format!("closed before an answer: {error}"));
                    }
                    (Some(cause), Some(Security { tls, .. })) => {
                        let addresses = &self.options.members[dial.rank.index()];
                        let peer = format!("{} at {}", dial.rank, addresses[dial.address % addresses.len()]);
                        return Err(Error::Untrusted {
                            rank: dial.rank,
                            reason: tls.explain(cause, &peer, Role::Worker).to_string(),
                        });
                    }
                },
            },
            other @ (Dialing::Idle(_) | Dialing::Done) => dial.state = other,
        }
        Ok(())
    }

    /// A connected rank closed; its last words, when it had any, are waiting to be read.
    fn lost(&mut self, rank: Rank) -> Error {
        let mut words = MessageReceiver::default();
        let Pair { control, data } = &mut self.pairs[rank.index()];
        let mut silence = None;
        if let Some(control) = control {
            loop {
                match words.receive(control) {
                    Ok(Some(message)) => {
                        if let (Kind::Farewell, Ok(farewell)) =
                            (message.address.kind, serde_json::from_slice::<Farewell>(&message.bytes))
                        {
                            return farewell.told(rank, Rank(self.own.rank));
                        }
                    }
                    Ok(None) => break,
                    Err(Fault::Io(error)) => {
                        silence = Some(error).filter(is_silence);
                        break;
                    }
                    Err(_) => break,
                }
            }
        }
        // Nothing is to come over the other yet, but for its end.
        let mut of_data = || data.as_mut().and_then(|data| data.read(&mut [0]).err());
        if let Some(error) = silence.or_else(|| of_data().filter(is_silence)) {
            let reason = format!("nothing comes back from it ({error})");
            return Error::Unreachable { ranks: Vec::from([rank]), reason };
        }
        Error::Lost { rank, reason: "it closed its connection during the rendezvous".into() }
    }

    /// The ranks of which nothing was heard for half of the time that it takes to give up one.
    fn unanswered(&self, now: Instant) -> BTreeSet<Rank> {
        let time = self.options.silence / 2;
        let dialed = self.dials.iter().filter(|dial| dial.is_unanswered(now, time)).map(|dial| dial.rank);
        let is_cut = |pair: &Pair| {
            let streams = [&pair.control, &pair.data].into_iter().flatten();
            streams.into_iter().any(|stream| is_unheard(stream, time))
        };
        let pairs = (0..).map(Rank).zip(&self.pairs);
        dialed.chain(pairs.filter(|(_, pair)| is_cut(pair)).map(|(rank, _)| rank)).collect()
    }

    /// Who is missing, a few of them by name.
    fn waiting(&self) -> String {
        let missing: Vec<String> = (0..)
            .map(Rank)
            .zip(&self.pairs)
            .filter(|(rank, pair)| rank.0 != self.own.rank && !pair.is_complete())
            .map(|(rank, _)| {
                match self.dials.iter().find(|d| d.rank == rank && !matches!(d.state, Dialing::Done)) {
                    Some(dial) => format!("{rank} ({})", dial.seen),
                    None => format!("{rank} (has not come to us)"),
                }
            })
            .collect();
        let more = if missing.len() > 8 { format!(" and {} more", missing.len() - 8) } else { String::new() };
        let Refusals { stale, early, foreign, garbage, untrusted } = self.listener.refusals;
        let strangers = garbage + untrusted;
        format!(
            "{}{more} missing; refused so far: {stale} of older generations, {early} of newer ones, {foreign} of other jobs, \
             {strangers} strangers",
            missing[..missing.len().min(8)].join(", ")
        )
    }
}

impl Dial {
    /// Nobody has answered since at least `now`, as far as can be told.
    fn unanswered(&mut self, now: Instant, seen: String) -> Dialing {
        let since = *self.unanswered.get_or_insert(now);
        let state = self.failed(seen);
        self.unanswered = Some(since);
        state
    }

    fn failed_by(&mut self, error: &io::Error, seen: String) -> Dialing {
        match is_silence(error) {
            true => self.unanswered(Instant::now(), seen),
            false => self.failed(seen),
        }
    }

    /// Whether there was no answer for so long.
    fn is_unanswered(&self, now: Instant, time: Duration) -> bool {
        let over = |since: Instant| now.saturating_duration_since(since) >= time;
        self.unanswered.is_some_and(over) && !matches!(self.state, Dialing::Done | Dialing::Greeting(..))
    }

    /// Whether there was no answer for too long.
    fn check(&self, now: Instant, silence: Duration) -> Result<()> {
        match self.is_unanswered(now, silence) {
            true => Err(Error::Unreachable { ranks: Vec::from([self.rank]), reason: self.seen.clone() }),
            false => Ok(()),
        }
    }

    /// Somebody answered, if not as is wished.
    fn failed(&mut self, seen: String) -> Dialing {
        self.seen = seen;
        self.unanswered = None;
        self.address += 1;
        Dialing::Idle(Instant::now() + RETRY)
    }
}

fn refused(peer: Rank, own: u32, differs: String) -> Error {
    Error::Refused { peer: peer.to_string(), own: Rank(own).to_string(), differs }
}

/// Sends a greeting; true when all of it went out, as a few KiB on a new connection do. Before the end of a handshake it
/// is kept until then.
fn answer(stream: &mut Stream, greeting: &Greeting) -> bool {
    let bytes = encode(greeting);
    stream.write(&bytes).is_ok_and(|written| written == bytes.len()) && !stream.has_unsent()
}

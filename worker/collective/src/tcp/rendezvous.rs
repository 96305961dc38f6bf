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

mod dialing;
mod listener;
mod strangers;

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::frame::{Fault, Kind, MessageReceiver};
use super::hello::{
    Channel, Greeting, GreetingReader, Hello, NoGreeting, TEXT_BYTES_MAX, encode, lanes_checksum,
};
use super::socket::{Poll, Wake, has_no_way, is_silence, set_buffers, watch};
use super::stream::{Security, Stream, tls_error};
use super::unheard::is_unheard;
use super::{Options, farewell_frame};
use crate::farewell::Farewell;
use crate::{Error, Rank, Result, Ring};

pub use listener::{Listener, Refusals};

use dialing::{Dial, Dialing};
use strangers::Stranger;

#[derive(Clone, Copy)]
enum Mark {
    Wake,
    Listener(usize),
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
    for socket in &listener.sockets {
        set_buffers(socket, options.socket_buffer_bytes).map_err(Error::system("setting socket buffers"))?;
    }
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
    let dials = (0..ring.rank().0)
        .map(Rank)
        .flat_map(|rank| [Channel::Control, Channel::Data].map(|channel| Dial::new(rank, channel, start)));
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
                    Mark::Listener(at) => self.accept(at)?,
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
        self.dial(now)?;
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
        for (at, socket) in self.listener.sockets.iter().enumerate() {
            poll.push(socket, PollFlags::IN, Mark::Listener(at));
        }
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

/// Sends a greeting; true when all of it went out, as a few KiB on a new connection do. Before the end of a handshake it
/// is kept until then.
fn answer(stream: &mut Stream, greeting: &Greeting) -> bool {
    let bytes = encode(greeting);
    stream.write(&bytes).is_ok_and(|written| written == bytes.len()) && !stream.has_unsent()
}

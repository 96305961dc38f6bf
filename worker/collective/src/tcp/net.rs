//! The connections of a ring, and the one loop that moves everything over them.
//!
//! The caller's thread does it: it sleeps in `poll` until a socket can take or give bytes, and then sends from and
//! receives into the caller's buffers. There are no other threads, so nothing outlives a call, and since sending never
//! waits for receiving there is no deadlock however much everybody sends at once. Each owner's window holds back only
//! those who are ahead of the block it adds next, so the block it waits for always has a way in.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::frame::{
    Address, Fault, HEADER_BYTES, Kind, Message, MessageReceiver, Progress, Receiver, Sender, message,
};
use super::socket::{Poll, Wake, is_silence};
use super::stream::Stream;
use super::traffic::Traffic;
use super::unheard::{Unheard, is_unheard};
use crate::farewell::Farewell;
use crate::{AbortHandle, Error, Generation, Rank, Result, Step};

/// After a data connection broke: for the last words on the other connection to arrive, which say whose fault it was.
const LAST_WORDS: Duration = Duration::from_millis(100);
/// Bytes moved over one connection before the others have their turn.
const TURN_BYTES: usize = 1 << 18;
/// Messages of a rank that may wait for us: it cannot be further ahead than the one it sends before it waits for ours.
const AHEAD_MAX: usize = 2;
/// Rounds of [`Net::drive`] when the caller has something else to do.
const ROUNDS: usize = 4;

/// Everything about one other rank.
#[derive(Debug)]
struct Link {
    rank: Rank,
    control: Stream,
    data: Stream,
    /// Bytes for the control connection.
    outbox: Vec<u8>,
    outbox_at: usize,
    messages: MessageReceiver,
    inbox: VecDeque<Message>,
    gone: Option<Gone>,
    broken: Option<Broken>,
    unheard: Unheard,
    sender: Sender,
    receiver: Receiver,
    /// Data frames of this operation.
    sent: usize,
    received: usize,
}

/// How a rank's control connection ended.
#[derive(Debug)]
enum Gone {
    /// With last words, in its operation of this number.
    Said(Farewell, u64),
    Closed(String),
    /// Nothing was heard any more.
    Silent(String),
}

/// How a rank's data connection ended.
#[derive(Debug)]
struct Broken {
    reason: String,
    /// Nothing was heard any more.
    silent: bool,
    since: Instant,
}

impl Broken {
    fn by(error: &std::io::Error) -> Self {
        Self { reason: told(error), silent: is_silence(error), since: Instant::now() }
    }
}

/// All connections of a member.
#[derive(Debug)]
pub(crate) struct Net {
    rank: Rank,
    generation: Generation,
    abort: AbortHandle,
    wake: Wake,
    silence: Duration,
    /// When it was last seen which links go unheard.
    looked: Instant,
    links: Vec<Link>,
    /// Number of operations begun. All members begin the same ones: who failed in a later one is through with ours.
    operation: u64,
    /// Bytes of all data frames that went whole, their heads included, also to those that are gone.
    sent_bytes: u64,
}

#[derive(Clone, Copy)]
enum Mark {
    Wake,
    Control(usize),
    Data(usize),
}

fn told(error: &std::io::Error) -> String {
    match error.kind() {
        ErrorKind::UnexpectedEof => "it closed the connection".into(),
        _ if is_silence(error) => format!("nothing comes back from it ({error})"),
        _ => error.to_string(),
    }
}

impl Net {
    /// For tests: a bit of the next block that goes to the first of the others flips on its way.
    pub fn flip_a_bit(&mut self) {
        if let Some(link) = self.links.first_mut() {
            link.sender.flip_a_bit();
        }
    }

    /// `silence` is how long what is sent may go without an acknowledgement.
    pub fn new(
        rank: Rank,
        generation: Generation,
        abort: AbortHandle,
        wake: Wake,
        silence: Duration,
        streams: Vec<(Rank, Stream, Stream)>,
    ) -> Self {
        let link = |(rank, control, data)| Link {
            rank,
            control,
            data,
            outbox: Vec::new(),
            outbox_at: 0,
            messages: MessageReceiver::default(),
            inbox: VecDeque::new(),
            gone: None,
            broken: None,
            unheard: Unheard::default(),
            sender: Sender::default(),
            receiver: Receiver::default(),
            sent: 0,
            received: 0,
        };
        let links = streams.into_iter().map(link).collect();
        let looked = Instant::now();
        Self { rank, generation, abort, wake, silence, looked, links, operation: 0, sent_bytes: 0 }
    }

    /// Bytes of gradients and state that went to the other members.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    pub fn generation(&self) -> Generation {
        self.generation
    }

    pub fn abort(&self) -> &AbortHandle {
        &self.abort
    }

    /// Begins an operation, with a message to all when it has one.
    pub fn begin(&mut self, step: Step, with: Option<(Kind, &[u8])>) {
        self.operation += 1;
        let address = |kind| Address { kind, generation: self.generation, step, block: 0, part: 0 };
        let frame = with.map(|(kind, bytes)| message(address(kind), bytes));
        for link in &mut self.links {
            (link.sent, link.received) = (0, 0);
            if let Some(frame) = &frame {
                link.outbox.extend_from_slice(frame);
            }
        }
    }

    /// Moves bytes until the operation of `step` is through: all frames of `traffic`, own messages sent, and one of
    /// `wanted` received from everyone. With `patience` only until nothing moved for so long, or after some rounds. True
    /// when it is through.
    pub fn drive(
        &mut self,
        step: Step,
        wanted: Option<Kind>,
        traffic: &mut impl Traffic,
        patience: Option<Duration>,
    ) -> Result<bool> {
        for _ in 0..if patience.is_none() { usize::MAX } else { ROUNDS } {
            self.abort.check()?;
            self.links.iter().try_for_each(|link| link.check_message(self.generation, step, wanted))?;
            if self.links.iter().all(|link| link.owes(wanted, traffic).is_none()) {
                return Ok(true);
            }
            let now = Instant::now();
            self.look(wanted, traffic, now);
            let mut timeout = patience.or(Some(self.pause()));
            for link in &self.links {
                if let Some(left) = link.check(self.rank, self.operation, wanted, traffic, now)? {
                    timeout = Some(timeout.map_or(left, |timeout: Duration| timeout.min(left)));
                }
            }
            let ready = self.poll(traffic).wait(timeout)?;
            if ready.is_empty() && patience.is_some() {
                return Ok(false);
            }
            for (mark, flags) in ready {
                let closing = flags.intersects(PollFlags::HUP | PollFlags::ERR);
                let (readable, writable) =
                    (closing || flags.contains(PollFlags::IN), closing || flags.contains(PollFlags::OUT));
                match mark {
                    Mark::Wake => {}
                    Mark::Control(at) => {
                        if writable {
                            self.links[at].flush();
                        }
                        if readable {
                            self.links[at].hear(self.generation, step)?;
                        }
                    }
                    Mark::Data(at) => {
                        if readable {
                            self.links[at].receive(self.generation, step, traffic)?;
                        }
                        if writable {
                            self.sent_bytes += self.links[at].send(traffic);
                        }
                    }
                }
            }
        }
        Ok(false)
    }

    /// Between two looks at links.
    fn pause(&self) -> Duration {
        (self.silence / 8).clamp(Duration::from_millis(50), Duration::from_secs(1))
    }

    /// Gives up data connections on which nothing is acknowledged any more, of ranks that owe us something or we them.
    fn look(&mut self, wanted: Option<Kind>, traffic: &impl Traffic, now: Instant) {
        let pause = self.pause();
        if now.saturating_duration_since(self.looked) < pause {
            return;
        }
        self.looked = now;
        let owing = |link: &&mut Link| link.broken.is_none() && link.owes(wanted, traffic).is_some();
        for link in self.links.iter_mut().filter(owing) {
            let unheard = link.unheard.look(&link.data, now, 4 * pause);
            if unheard >= self.silence {
                let reason = format!("nothing of what is sent to it has arrived for {} s", unheard.as_secs());
                link.broken = Some(Broken { reason, silent: true, since: now });
            }
        }
    }

    /// The ranks of which nothing was heard for half of the time that it takes to give up one: most of those that another one is
    /// given up with, when a network is cut in two.
    pub fn unheard(&self) -> impl Iterator<Item = Rank> + '_ {
        self.links.iter().filter(|link| link.is_unheard(self.silence / 2)).map(|link| link.rank)
    }

    fn poll(&self, traffic: &impl Traffic) -> Poll<'_, Mark> {
        let mut poll = Poll::new();
        poll.push(self.wake.fd(), PollFlags::IN, Mark::Wake);
        for (at, link) in self.links.iter().enumerate() {
            if link.gone.is_none() {
                let out = if link.outbox.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
                poll.push_stream(&link.control, PollFlags::IN | out, Mark::Control(at));
            }
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::OUT, link.can_send(traffic));
            flags.set(PollFlags::IN, link.can_receive(traffic));
            if link.broken.is_none() && (!flags.is_empty() || link.data.has_unsent()) {
                poll.push_stream(&link.data, flags, Mark::Data(at));
            }
        }
        poll
    }

    /// The messages of other ranks, in order, for which [`drive`](Self::drive) has waited.
    pub fn take_messages(&mut self) -> Vec<Vec<u8>> {
        let take = |link: &mut Link| link.inbox.pop_front().expect("drive waited for it").bytes;
        self.links.iter_mut().map(take).collect()
    }

    /// Says `farewell` to everyone who can hear it, and closes all connections.
    pub fn close(&mut self, farewell: &Farewell) {
        let frame = super::farewell_frame(self.generation, self.operation, farewell);
        for mut link in self.links.drain(..) {
            link.flush();
            if link.outbox.is_empty() {
                let _ = link.control.write(&frame);
            }
            link.control.shutdown();
            // Unread bytes would make the kernel cut the connection, last words included.
            let mut rest = [0; 4096];
            for _ in 0..64 {
                if !matches!(link.control.read(&mut rest), Ok(read) if read > 0) {
                    break;
                }
            }
        }
    }
}

impl Link {
    fn can_send(&self, traffic: &impl Traffic) -> bool {
        self.sent < traffic.outgoing(self.rank) && traffic.is_ready(self.rank, self.sent)
    }

    fn can_receive(&self, traffic: &impl Traffic) -> bool {
        self.received < traffic.incoming(self.rank) && traffic.has_place(self.rank, self.received)
    }

    /// What is still to pass between this rank and us, if anything.
    fn owes(&self, wanted: Option<Kind>, traffic: &impl Traffic) -> Option<&'static str> {
        if self.received < traffic.incoming(self.rank) {
            Some("blocks from it")
        } else if wanted.is_some() && self.inbox.is_empty() {
            Some("a message from it")
        } else if self.sent < traffic.outgoing(self.rank) || self.data.has_unsent() {
            Some("blocks to it")
        } else if !self.outbox.is_empty() || self.control.has_unsent() {
            Some("a message to it")
        } else {
            None
        }
    }

    fn is_unheard(&self, time: Duration) -> bool {
        match (&self.gone, &self.broken) {
            (Some(Gone::Silent(_)), _) | (None, Some(Broken { silent: true, .. })) => true,
            (Some(_), _) => false,
            (None, _) => is_unheard(&self.control, time) || is_unheard(&self.data, time),
        }
    }

    /// Whether the next message is one of this operation.
    fn check_message(&self, generation: Generation, step: Step, wanted: Option<Kind>) -> Result<()> {
        let (Some(wanted), Some(message)) = (wanted, self.inbox.front()) else { return Ok(()) };
        let Address { kind, step: theirs, .. } = message.address;
        if (kind, theirs) == (wanted, step) {
            return Ok(());
        }
        let fact = format!("{kind:?} of {theirs} came where {wanted:?} was due");
        Err(Error::Protocol { rank: self.rank, generation, step, fact })
    }

    /// Whether the operation can still end: an error when not, and how long to wait at most when that is open.
    fn check(
        &self,
        own: Rank,
        operation: u64,
        wanted: Option<Kind>,
        traffic: &impl Traffic,
        now: Instant,
    ) -> Result<Option<Duration>> {
        if let Some(Gone::Said(farewell, theirs)) = &self.gone
            && farewell.is_failure()
            && *theirs <= operation
        {
            return Err(farewell.told(self.rank, own));
        }
        let Some(owed) = self.owes(wanted, traffic) else { return Ok(None) };
        let lost =
            |reason: &str| Error::Lost { rank: self.rank, reason: format!("{reason}, with {owed} due") };
        let unreachable = |reason: &str| Error::Unreachable {
            ranks: Vec::from([self.rank]),
            reason: format!("{reason}, with {owed} due"),
        };
        match (&self.gone, &self.broken) {
            (None, None) => Ok(None),
            (None, Some(Broken { reason, silent, since })) => {
                match LAST_WORDS.checked_sub(now.duration_since(*since)) {
                    Some(patience) if !patience.is_zero() => Ok(Some(patience)),
                    _ if *silent => Err(unreachable(reason)),
                    _ => Err(lost(reason)),
                }
            }
            (Some(Gone::Silent(reason)), _) => Err(unreachable(reason)),
            // It left when it was through: what it sent before is still on its way to us.
            (Some(_), None) if owed == "blocks from it" => Ok(None),
            (Some(Gone::Said(farewell, _)), _) => Err(farewell.told(self.rank, own)),
            (Some(Gone::Closed(reason)), _) => Err(lost(reason)),
        }
    }

    fn flush(&mut self) {
        while self.outbox_at < self.outbox.len() {
            match self.control.write(&self.outbox[self.outbox_at..]) {
                Ok(written) if written > 0 => self.outbox_at += written,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Ok(_) => return self.close_control("it takes no bytes".into()),
                // Reading may still find its last words; that it cannot be written to says the same as an end.
                Err(_) => break,
            }
        }
        self.outbox.clear();
        self.outbox_at = 0;
        // What it does not take now is unsent; what it never takes shows when it is read.
        let _ = self.control.flush();
    }

    fn close_control(&mut self, reason: String) {
        self.gone.get_or_insert(Gone::Closed(reason));
    }

    /// Reads the control connection.
    fn hear(&mut self, generation: Generation, step: Step) -> Result<()> {
        let protocol = |rank, fact| Error::Protocol { rank, generation, step, fact };
        loop {
            let message = match self.messages.receive(&mut self.control) {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(()),
                Err(Fault::Io(error)) if is_silence(&error) => {
                    self.gone.get_or_insert(Gone::Silent(told(&error)));
                    return Ok(());
                }
                Err(Fault::Io(error)) => {
                    self.close_control(told(&error));
                    return Ok(());
                }
                Err(fault) => return Err(self.fault(fault, generation, step, None)),
            };
            let theirs = message.address.generation;
            if theirs != generation {
                return Err(protocol(self.rank, format!("a message of {theirs} came")));
            }
            match message.address.kind {
                Kind::Farewell => {
                    let farewell = serde_json::from_slice(&message.bytes).map_err(|error| {
                        protocol(self.rank, format!("last words that do not parse: {error}"))
                    })?;
                    self.gone = Some(Gone::Said(farewell, message.address.step.0));
                    return Ok(());
                }
                Kind::ReduceMessage | Kind::ExchangeMessage => {
                    if self.inbox.len() == AHEAD_MAX {
                        return Err(protocol(
                            self.rank,
                            format!("more than {AHEAD_MAX} messages ahead of us"),
                        ));
                    }
                    self.inbox.push_back(message);
                }
                kind @ (Kind::Part | Kind::Gathered) => {
                    return Err(protocol(self.rank, format!("{kind:?} came on the connection for messages")));
                }
            }
        }
    }

    fn fault(&self, fault: Fault, generation: Generation, step: Step, block: Option<u32>) -> Error {
        let rank = self.rank;
        match fault {
            Fault::Io(error) => Error::Lost { rank, reason: told(&error) },
            Fault::Header => Error::Corrupt { rank, step, block, place: "header" },
            Fault::Payload => Error::Corrupt { rank, step, block, place: "payload" },
            Fault::Unexpected(fact) => Error::Protocol { rank, generation, step, fact },
        }
    }

    fn receive(&mut self, generation: Generation, step: Step, traffic: &mut impl Traffic) -> Result<()> {
        let mut moved = 0;
        while moved < TURN_BYTES && self.broken.is_none() && self.can_receive(traffic) {
            let (address, place) = traffic.place(self.rank, self.received);
            moved += place.len().max(1);
            match self.receiver.receive(&mut self.data, address, place) {
                Ok(Progress::Done) => {
                    traffic.arrived(self.rank, self.received);
                    self.received += 1;
                }
                Ok(Progress::Blocked) => break,
                Err(Fault::Io(error)) => self.broken = Some(Broken::by(&error)),
                Err(fault) => return Err(self.fault(fault, generation, step, Some(address.block))),
            }
        }
        Ok(())
    }

    /// Sends what it takes; bytes of the frames that went whole.
    fn send(&mut self, traffic: &impl Traffic) -> u64 {
        match self.data.flush() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => self.broken = Some(Broken::by(&error)),
            _ => {}
        }
        let (mut moved, mut sent_bytes) = (0, 0);
        while moved < TURN_BYTES && self.broken.is_none() && self.can_send(traffic) {
            let (address, payload) = traffic.frame(self.rank, self.sent);
            moved += payload.len().max(1);
            let checksum = || traffic.checksum(address, payload);
            match self.sender.send(&mut self.data, address, payload, checksum) {
                Ok(Progress::Done) => {
                    self.sent += 1;
                    sent_bytes += (HEADER_BYTES + payload.len()) as u64;
                }
                Ok(Progress::Blocked) => break,
                Err(error) => self.broken = Some(Broken::by(&error)),
            }
        }
        sent_bytes
    }
}

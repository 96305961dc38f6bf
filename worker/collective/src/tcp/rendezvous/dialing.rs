//! Our way to those of lower ranks: the left half of the picture.

use std::net::TcpStream;

use anello_tls::Role;

use super::super::socket::dial;
use super::*;
use crate::Generation;

/// Between two attempts to reach a worker.
const RETRY: Duration = Duration::from_millis(50);
/// For a connection attempt that gets no answer at most, before the next address is tried.
const CONNECT: Duration = Duration::from_secs(2);

/// For one attempt to reach a worker of so many addresses: each is tried twice before the worker is given up.
fn patience(silence: Duration, addresses: usize) -> Duration {
    CONNECT.min(silence / (2 * addresses as u32))
}

pub(super) enum Dialing {
    Idle(Instant),
    Connecting(TcpStream, Instant),
    Greeting(Stream, GreetingReader),
    Done,
}

/// Our way to one connection of a lower rank.
pub(super) struct Dial {
    pub(super) rank: Rank,
    channel: Channel,
    /// Which of its addresses is next.
    address: usize,
    pub(super) state: Dialing,
    pub(super) seen: String,
    /// Since when no attempt got an answer of any kind; absent: the last one did.
    unanswered: Option<Instant>,
}

impl Rendezvous<'_> {
    /// Tries those to whom it is time to.
    pub(super) fn dial(&mut self, now: Instant) -> Result<()> {
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
                        Ok(stream) => Dialing::Connecting(stream, now + patience(silence, addresses.len())),
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
        Ok(())
    }

    pub(super) fn go_on_dialing(&mut self, at: usize) -> Result<()> {
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
}

impl Dial {
    /// To be tried from `start` on.
    pub(super) fn new(rank: Rank, channel: Channel, start: Instant) -> Self {
        let (state, seen) = (Dialing::Idle(start), "no answer yet".into());
        Self { rank, channel, address: 0, state, seen, unanswered: None }
    }

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
    pub(super) fn is_unanswered(&self, now: Instant, time: Duration) -> bool {
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

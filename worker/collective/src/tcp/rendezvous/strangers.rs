//! Those who come to us: the right half of the picture.

use std::io;

use super::super::hello::GreetingReader;
use super::*;

/// For a stranger to say who it is.
const GREET: Duration = Duration::from_secs(5);

/// A connection that has yet to say who it is.
pub(super) struct Stranger {
    /// Taken when it was dealt with.
    pub(super) stream: Option<Stream>,
    reader: GreetingReader,
    pub(super) until: Instant,
}

impl Rendezvous<'_> {
    /// Takes those who came to one of our addresses.
    pub(super) fn accept(&mut self, at: usize) -> Result<()> {
        // A few at a time; the rest waits in the kernel. Beyond the bound the oldest goes, so that strangers who say
        // nothing keep nobody out.
        let strangers_max = 64 + 2 * self.pairs.len();
        for _ in 0..64 {
            match self.listener.sockets[at].accept() {
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

    pub(super) fn greet(&mut self, at: usize) -> Result<()> {
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
}

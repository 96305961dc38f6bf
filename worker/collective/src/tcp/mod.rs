//! Members as processes: two TCP connections between each pair, moved by the caller's own thread.
//!
//! ```text
//! Listener::bind ──▶ address ──▶ (the coordinator tells all) ──▶ connect(generation g) ──▶ Tcp
//!       ▲                                                                                   │ lost, aborted, left
//!       └────────────────────── connect(generation g+1), the same listener ◀────────────────┘
//! ```
//!
//! Bounds, for n members: 2 (n - 1) sockets and one pipe; at an owner a window of 512 KiB (two blocks at least) for each
//! part of each other rank, so (n - 1) / 2 MiB where each serves one aligned subtree; per rank two messages of up to 16 MiB each
//! way; at the rendezvous 64 + 2n strangers of up to 8 KiB and 5 s each. Nothing is allocated on the word of an
//! unchecked length.
//!
//! One thread a worker moves about 2.4 GB/s out and as much in at once over loopback, checksums and sums included (256 MiB
//! each way in 0.11 s of CPU time): enough for two 10 Gbit/s links, not for 100 Gbit/s.
//!
//! A cut between two members that closes nothing is found by the kernel, which asks on both connections of a pair and counts
//! what is not acknowledged on the one for messages ([`Options::silence`]). Where only the way of the blocks is cut (one of
//! several links that packets are dealt out to), whoever waits for something finds it: it looks whether the kernel asks in vain.
//!
//! [`Listener::with_tls`] puts TLS between the frames and the sockets: members prove to one another that they are workers
//! of one CA, and strangers get no further than a handshake. It adds 96 KiB a socket (to a stranger 160 KiB at most), a
//! copy and the sealing, all in the caller's thread. Without it there is no authentication: the ports then belong on a
//! network where only the job's workers reach them.

mod frame;
mod hello;
mod info;
mod net;
mod rendezvous;
mod socket;
mod stream;
mod traffic;
mod unheard;

use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

pub use rendezvous::{Listener, Refusals};

use crate::collective::check_message;
use crate::farewell::Farewell;
use crate::{
    AbortHandle, Collective, Error, Generation, Partials, Rank, Reduction, Result, Ring, Shape, Step,
};
use frame::{Address, Kind};
use net::Net;
use traffic::{Gather, NoBlocks, Places, Reduce, Reducing};

/// Size of socket buffers that lets a pair run a few blocks apart: over loopback 2 members then take half the time that
/// the kernel's own tuning takes, and 4 MiB hold what 100 Gbit/s carry in 0.3 ms.
pub const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// What a worker brings to a rendezvous.
#[derive(Clone, Debug)]
pub struct Options {
    /// Our place in `members`.
    pub rank: Rank,
    /// The addresses of each rank's listener, best first. Rank i dials those below it.
    pub members: Vec<Vec<SocketAddr>>,
    /// Lanes and blocks.
    pub shape: Shape,
    /// The generation that forms.
    pub generation: Generation,
    /// The job's name, up to 256 bytes. A worker of another job is a stranger: refused and counted.
    pub job: String,
    /// Digest of the config's mathematics, up to 256 bytes.
    pub config_digest: String,
    /// Version of the program, up to 256 bytes.
    pub build: String,
    /// For all members to come.
    pub deadline: Duration,
    /// Size of both buffers of each socket, in bytes; [`SOCKET_BUFFER_BYTES`] is a good one. The kernel cuts it to its
    /// `net.core.rmem_max` and `wmem_max`; `None` leaves it to the kernel's own tuning.
    pub socket_buffer_bytes: Option<usize>,
    /// For the machine of another member to show that it is there, at the rendezvous and later; that its process does
    /// anything is not asked. Whole seconds count above the first.
    pub silence: Duration,
    /// Ends the rendezvous and later every blocked call.
    pub abort: AbortHandle,
}

/// A member of a ring over TCP.
#[derive(Debug)]
pub struct Tcp {
    ring: Ring,
    net: Net,
    places: Places,
    dead: Option<String>,
}

/// Meets the other members and returns when the connections to all of them stand.
///
/// Strangers on the port, whatever they send or do not send, disturb nothing; workers of other jobs and of older
/// generations are refused and counted ([`Listener::refusals`]). A member that comes first waits for the others, one
/// that is still in an older generation is tried again.
///
/// # Errors
/// [`Error::Refused`] on both sides when a worker of this generation differs in config, build, lanes, blocks or
/// rank; [`Error::Untrusted`] when one that we dial and we do not accept one another's certificates;
/// [`Error::Deadline`] with who is missing; [`Error::Unreachable`] when some do not answer;
/// [`Error::Lost`] when a member closes meanwhile; [`Error::Aborted`];
/// [`Error::Shape`] for options that do not fit together; [`Error::System`].
pub fn connect(listener: &mut Listener, options: &Options) -> Result<Tcp> {
    let ring = Ring::new(options.rank, options.shape.clone())?;
    let wake = socket::Wake::by(&options.abort)?;
    let streams = rendezvous::meet(listener, options, &ring, &wake)?;
    if let Some(default) = &listener.paced {
        let of_both = streams.iter().flat_map(|(_, control, data)| [control, data]);
        of_both.for_each(|stream| socket::pace_if_far(stream, default));
    }
    let (abort, silence) = (options.abort.clone(), options.silence);
    let net = Net::new(options.rank, options.generation, abort, wake, silence, streams);
    Ok(Tcp { ring, net, places: Places::default(), dead: None })
}

/// Last words, said in the operation of this number: its place in the frame is that of the step.
fn farewell_frame(generation: Generation, operation: u64, farewell: &Farewell) -> Vec<u8> {
    let address = Address { kind: Kind::Farewell, generation, step: Step(operation), block: 0, part: 0 };
    frame::message(address, &serde_json::to_vec(farewell).expect("strings and numbers have a JSON form"))
}

impl Tcp {
    /// Bytes of blocks, with the heads of their frames, that were sent to the other members so far. What TLS adds is not
    /// counted.
    pub fn sent_bytes(&self) -> u64 {
        self.net.sent_bytes()
    }

    /// For tests: a bit of the next block that is sent flips on its way, after its checksum was taken.
    pub fn flip_a_bit(&mut self) {
        self.net.flip_a_bit();
    }

    fn alive(&mut self) -> Result<()> {
        if let Some(cause) = &self.dead {
            return Err(Error::Dead { cause: cause.clone() });
        }
        let aborted = self.net.abort().check();
        self.ended_by(aborted)
    }

    fn end(&mut self, farewell: &Farewell, cause: String) {
        if self.dead.is_none() {
            self.dead = Some(cause);
            self.net.close(farewell);
        }
    }

    fn ended_by<T>(&mut self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            let error = error.with_unreachable(self.net.unheard());
            self.end(&Farewell::of(&error), error.to_string());
            error
        })
    }

    /// All messages of an operation that is through, in the order of ranks.
    fn messages(&mut self, own: Vec<u8>) -> Vec<Vec<u8>> {
        let mut all = self.net.take_messages();
        all.insert(self.ring.rank().index(), own);
        all
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        self.end(&Farewell::Left, "dropped".into());
    }
}

impl Collective for Tcp {
    fn ring(&self) -> &Ring {
        &self.ring
    }

    fn abort_handle(&self) -> AbortHandle {
        self.net.abort().clone()
    }

    fn reduction<'a>(&'a mut self, step: Step, message: &[u8]) -> Result<Box<dyn Reduction + 'a>> {
        check_message(message)?;
        self.alive()?;
        self.net.begin(step, Some((Kind::ReduceMessage, message)));
        let state = Reducing::new(&self.ring, step, std::mem::take(&mut self.places));
        Ok(Box::new(Under { of: self, state: Some(state), message: message.to_vec() }))
    }

    fn all_gather(&mut self, step: Step, buffer: &mut [f32]) -> Result<()> {
        self.ring.check_gather(buffer)?;
        self.alive()?;
        self.net.begin(step, None);
        let mut traffic = Gather::new(&self.ring, self.net.generation(), step, buffer);
        let gathered = self.net.drive(step, None, &mut traffic, None);
        self.ended_by(gathered).map(drop)
    }

    fn exchange(&mut self, step: Step, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        check_message(message)?;
        self.alive()?;
        self.net.begin(step, Some((Kind::ExchangeMessage, message)));
        let exchanged = self.net.drive(step, Some(Kind::ExchangeMessage), &mut NoBlocks, None);
        self.ended_by(exchanged)?;
        Ok(self.messages(message.to_vec()))
    }
}

/// A reduction under way.
struct Under<'a> {
    of: &'a mut Tcp,
    /// None when it is through.
    state: Option<Reducing>,
    message: Vec<u8>,
}

impl Under<'_> {
    /// Goes on with the blocks that are ready, for as long as something moves, or to the end.
    fn drive(
        &mut self,
        ready: Option<(Range<usize>, Duration)>,
        partials: &dyn Partials,
        out: &mut [f32],
    ) -> Result<()> {
        self.of.ring.check_reduce(partials, out)?;
        let state = self.state.as_mut().expect("finish takes the reduction");
        let patience = ready.as_ref().map(|(_, patience)| *patience);
        match ready {
            Some((blocks, _)) => state.ready.add(blocks)?,
            None => state.ready.add_all(),
        }
        self.of.alive()?;
        let step = state.step;
        let mut traffic = Reduce::new(&self.of.ring, self.of.net.generation(), state, partials, out);
        let driven = self.of.net.drive(step, Some(Kind::ReduceMessage), &mut traffic, patience);
        self.of.ended_by(driven).map(drop)
    }
}

impl Reduction for Under<'_> {
    fn advance(
        &mut self,
        blocks: Range<usize>,
        partials: &dyn Partials,
        out: &mut [f32],
        patience: Duration,
    ) -> Result<()> {
        self.drive(Some((blocks, patience)), partials, out)
    }

    fn finish(mut self: Box<Self>, partials: &dyn Partials, out: &mut [f32]) -> Result<Vec<Vec<u8>>> {
        self.drive(None, partials, out)?;
        let state = self.state.take().expect("only finish takes it");
        self.of.places = state.into_places();
        Ok(self.of.messages(std::mem::take(&mut self.message)))
    }
}

impl Drop for Under<'_> {
    fn drop(&mut self) {
        if let Some(state) = &self.state {
            let reason = format!("the reduction of {} was given up", state.step);
            self.of.end(&Farewell::Failed { reason: reason.clone() }, reason);
        }
    }
}

//! Members in one process, each on its own thread: copies through mailboxes. For tests and small runs.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::collective::check_message;
use crate::farewell::Farewell;
use crate::ring::Ready;
use crate::{
    AbortHandle, Collective, Error, Generation, Partials, Rank, Reduction, Result, Ring, Shape, Step,
};

/// One member of a ring inside a process. Memory: what was sent and not yet received is held as copies, at most the
/// partial sums of one step.
#[derive(Debug)]
pub struct InProcess {
    ring: Ring,
    boxes: Arc<[Mailbox]>,
    abort: AbortHandle,
    dead: Option<String>,
    scratch: Vec<f32>,
    /// Number of operations begun; see [`Farewell::is_failure`].
    operation: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Operation {
    Reduce,
    Gather,
    Exchange,
}

#[derive(Debug)]
struct Mail {
    operation: Operation,
    step: Step,
    body: Body,
}

#[derive(Debug)]
enum Body {
    Message(Vec<u8>),
    Block { block: usize, part: usize, values: Vec<f32> },
}

/// What came for a member, by sender.
#[derive(Debug)]
struct Mailbox {
    inbox: Mutex<Inbox>,
    arrived: Condvar,
}

#[derive(Debug)]
struct Inbox {
    mail: Vec<VecDeque<Mail>>,
    /// Last words, and the number of the operation in which they were said.
    gone: Vec<Option<(Farewell, u64)>>,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InProcess {
    /// All members of a ring of `shape`, in the order of ranks.
    ///
    /// # Errors
    /// [`Error::Shape`] as [`Ring::new`].
    pub fn ring_of(shape: &Shape) -> Result<Vec<Self>> {
        let members = shape.ranges.len();
        let mailbox = |_| Mailbox {
            inbox: Mutex::new(Inbox {
                mail: (0..members).map(|_| VecDeque::new()).collect(),
                gone: vec![None; members],
            }),
            arrived: Condvar::new(),
        };
        let boxes: Arc<[Mailbox]> = (0..members).map(mailbox).collect();
        (0..members as u32)
            .map(Rank)
            .map(|rank| {
                let abort = AbortHandle::new();
                let mine = Arc::downgrade(&boxes);
                abort.on_abort(move || {
                    if let Some(boxes) = mine.upgrade() {
                        let _inbox = boxes[rank.index()].lock();
                        boxes[rank.index()].arrived.notify_all();
                    }
                });
                let ring = Ring::new(rank, shape.clone())?;
                Ok(Self { ring, boxes: boxes.clone(), abort, dead: None, scratch: Vec::new(), operation: 0 })
            })
            .collect()
    }

    fn others(&self) -> impl Iterator<Item = Rank> + use<> {
        let own = self.ring.rank();
        (0..self.ring.members() as u32).map(Rank).filter(move |rank| *rank != own)
    }

    fn post(&self, to: Rank, operation: Operation, step: Step, body: Body) {
        let mailbox = &self.boxes[to.index()];
        mailbox.lock().mail[self.ring.rank().index()].push_back(Mail { operation, step, body });
        mailbox.arrived.notify_all();
    }

    /// Waits for the next mail of `from`, which must be of this operation and step.
    fn take(&self, from: Rank, operation: Operation, step: Step) -> Result<Body> {
        let own = self.ring.rank();
        let mailbox = &self.boxes[own.index()];
        let mut inbox = mailbox.lock();
        loop {
            self.abort.check()?;
            for (rank, gone) in (0..).map(Rank).zip(&inbox.gone) {
                if let Some((farewell, theirs)) = gone
                    && farewell.is_failure()
                    && *theirs <= self.operation
                {
                    return Err(farewell.told(rank, own));
                }
            }
            if let Some(mail) = inbox.mail[from.index()].pop_front() {
                if (mail.operation, mail.step) != (operation, step) {
                    let fact = format!("{:?} of {} came to {operation:?}", mail.operation, mail.step);
                    return Err(self.protocol(from, step, fact));
                }
                return Ok(mail.body);
            }
            if let Some((farewell, _)) = &inbox.gone[from.index()] {
                return Err(farewell.told(from, own));
            }
            inbox = mailbox.arrived.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn take_message(&self, from: Rank, operation: Operation, step: Step) -> Result<Vec<u8>> {
        match self.take(from, operation, step)? {
            Body::Message(bytes) => Ok(bytes),
            Body::Block { block, .. } => {
                Err(self.protocol(from, step, format!("block {block} came where a message was due")))
            }
        }
    }

    fn take_block(
        &self,
        from: Rank,
        operation: Operation,
        step: Step,
        due: (usize, usize),
    ) -> Result<Vec<f32>> {
        match self.take(from, operation, step)? {
            Body::Block { block, part, values } if (block, part) == due => Ok(values),
            Body::Block { block, part, .. } => Err(self.protocol(
                from,
                step,
                format!("block {block} part {part} came where {due:?} was due"),
            )),
            Body::Message(_) => {
                Err(self.protocol(from, step, format!("a message came where block {} was due", due.0)))
            }
        }
    }

    fn protocol(&self, rank: Rank, step: Step, fact: String) -> Error {
        Error::Protocol { rank, generation: Generation(0), step, fact }
    }

    fn messages(&self, operation: Operation, step: Step, own: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let mut all = Vec::with_capacity(self.ring.members());
        for rank in self.others() {
            all.push(self.take_message(rank, operation, step)?);
        }
        all.insert(self.ring.rank().index(), own);
        Ok(all)
    }

    fn alive(&self) -> Result<()> {
        match &self.dead {
            Some(cause) => Err(Error::Dead { cause: cause.clone() }),
            None => self.abort.check(),
        }
    }

    fn begin(&mut self) -> Result<()> {
        let alive = self.alive();
        self.ended_by(alive)?;
        self.operation += 1;
        Ok(())
    }

    fn end(&mut self, farewell: Farewell, cause: String) {
        if self.dead.is_none() {
            self.dead = Some(cause);
            let own = self.ring.rank().index();
            for rank in self.others() {
                self.boxes[rank.index()].lock().gone[own] = Some((farewell.clone(), self.operation));
                self.boxes[rank.index()].arrived.notify_all();
            }
        }
    }

    fn ended_by<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.end(Farewell::of(error), error.to_string());
        }
        result
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.end(Farewell::Left, "dropped".into());
    }
}

impl Collective for InProcess {
    fn ring(&self) -> &Ring {
        &self.ring
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    fn reduction<'a>(&'a mut self, step: Step, message: &[u8]) -> Result<Box<dyn Reduction + 'a>> {
        check_message(message)?;
        self.begin()?;
        for rank in self.others() {
            self.post(rank, Operation::Reduce, step, Body::Message(message.to_vec()));
        }
        let (ready, sent) = (Ready::none(&self.ring), vec![0; self.ring.members()]);
        Ok(Box::new(Under { of: self, step, message: message.to_vec(), ready, sent, ended: false }))
    }

    fn all_gather(&mut self, step: Step, buffer: &mut [f32]) -> Result<()> {
        self.ring.check_gather(buffer)?;
        self.begin()?;
        for rank in self.others() {
            for block in self.ring.blocks(self.ring.rank()) {
                let values = buffer[self.ring.block(block)].to_vec();
                self.post(rank, Operation::Gather, step, Body::Block { block, part: 0, values });
            }
        }
        let gathered = self.others().try_for_each(|rank| {
            self.ring.blocks(rank).try_for_each(|block| {
                let values = self.take_block(rank, Operation::Gather, step, (block, 0))?;
                buffer[self.ring.block(block)].copy_from_slice(&values);
                Ok(())
            })
        });
        self.ended_by(gathered)
    }

    fn exchange(&mut self, step: Step, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        check_message(message)?;
        self.begin()?;
        for rank in self.others() {
            self.post(rank, Operation::Exchange, step, Body::Message(message.to_vec()));
        }
        let all = self.messages(Operation::Exchange, step, message.to_vec());
        self.ended_by(all)
    }
}

/// A reduction under way.
struct Under<'a> {
    of: &'a mut InProcess,
    step: Step,
    message: Vec<u8>,
    ready: Ready,
    /// Blocks sent, by owner, in its order.
    sent: Vec<usize>,
    ended: bool,
}

impl Under<'_> {
    fn send(&mut self, partials: &dyn Partials) {
        let parts = self.of.ring.parts(self.of.ring.rank()).len();
        for owner in self.of.others() {
            let mut blocks = self.of.ring.turns(owner)[self.sent[owner.index()]..].iter();
            while let Some(&block) = blocks.next().filter(|block| self.ready.contains(**block)) {
                for part in 0..parts {
                    let values = partials.elements(part, self.of.ring.block(block)).to_vec();
                    self.of.post(owner, Operation::Reduce, self.step, Body::Block { block, part, values });
                }
                self.sent[owner.index()] += 1;
            }
        }
    }

    fn receive(&mut self, partials: &dyn Partials, out: &mut [f32]) -> Result<Vec<Vec<u8>>> {
        let mut scratch = std::mem::take(&mut self.of.scratch);
        let ring = &self.of.ring;
        let own = ring.rank();
        let messages = self.of.messages(Operation::Reduce, self.step, std::mem::take(&mut self.message))?;
        for &block in ring.turns(own) {
            let mut parts: Vec<Vec<Vec<f32>>> = vec![Vec::new(); ring.members()];
            for rank in self.of.others() {
                for part in 0..ring.parts(rank).len() {
                    let values = self.of.take_block(rank, Operation::Reduce, self.step, (block, part))?;
                    parts[rank.index()].push(values);
                }
            }
            let part = |rank: Rank, part: usize| match rank == own {
                true => partials.elements(part, ring.block(block)),
                false => parts[rank.index()][part].as_slice(),
            };
            ring.add(part, &mut out[ring.in_own(block)], &mut scratch);
        }
        self.of.scratch = scratch;
        Ok(messages)
    }
}

impl Reduction for Under<'_> {
    /// There is nothing to wait for: a mailbox takes all that is sent, and `finish` takes all that came.
    fn advance(
        &mut self,
        blocks: Range<usize>,
        partials: &dyn Partials,
        out: &mut [f32],
        _: Duration,
    ) -> Result<()> {
        self.of.ring.check_reduce(partials, out)?;
        self.ready.add(blocks)?;
        let alive = self.of.alive();
        self.of.ended_by(alive)?;
        self.send(partials);
        Ok(())
    }

    fn finish(mut self: Box<Self>, partials: &dyn Partials, out: &mut [f32]) -> Result<Vec<Vec<u8>>> {
        self.of.ring.check_reduce(partials, out)?;
        self.ready.add_all();
        let alive = self.of.alive();
        self.of.ended_by(alive)?;
        self.send(partials);
        let messages = self.receive(partials, out);
        let messages = self.of.ended_by(messages)?;
        self.ended = true;
        Ok(messages)
    }
}

impl Drop for Under<'_> {
    fn drop(&mut self) {
        if !self.ended {
            let reason = format!("the reduction of {} was given up", self.step);
            self.of.end(Farewell::Failed { reason: reason.clone() }, reason);
        }
    }
}

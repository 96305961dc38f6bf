//! A worker's half of the ring's life: what it does on which order. No I/O, no clock, no randomness.
//!
//! ```text
//!            Order::Form(g)            Ready(g)
//!   Outside ───────────────▶ Forming(g) ───────▶ Running(g)
//!      ▲ start                   │  ▲                │  applied a step, again and again
//!      │                 Left(g) │  │ Order::Form    │  Left(g): agreed to hold, the ring broke, the run ended
//!                                ▼  │ (g' > g)       ▼
//!                              Holding(g)  ◀─────────┘
//!   any ──▶ Gone   Order::Leave, or asked to go (SIGTERM) with no coordinator to ask
//! ```
//!
//! The shell does what the effects say and reports back: every ring that was begun ends in one [`Event::Left`], after
//! which nothing of that generation can be applied any more. A worker that is told nothing does nothing new.

mod rows;

use std::sync::Arc;

use anello_proto::ring::*;

pub use rows::KeptRows;

/// What happens to a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The connection to a coordinator is open.
    Linked,
    /// It is closed.
    Unlinked,
    /// The coordinator of this epoch wants something.
    Ordered {
        /// Whose right.
        epoch: Epoch,
        /// What.
        order: Order,
    },
    /// State is there, verified, or, to a learner, on its way, and all members are connected: the first step begins.
    Ready {
        /// Of this generation.
        generation: Generation,
        /// The step after which the state is; absent: it is on its way.
        holds: Option<Step>,
        /// The moments that it has from now on; absent: all of them.
        shard: Option<Shard>,
    },
    /// A step is applied, so that this many are; or a learner has all of the state after them.
    Applied {
        /// Steps applied.
        holds: Step,
    },
    /// This process is in the ring no more.
    Left {
        /// Which ring.
        generation: Generation,
        /// The step after which it holds state now.
        holds: Option<Step>,
        /// The moments that it has of it; absent: all of them.
        shard: Option<Shard>,
        /// Why.
        cause: Cause,
    },
    /// The worker's parts of a checkpoint are durable.
    Wrote(Written),
    /// Its parts of a checkpoint could not be written, or those of the member after it, and are given up.
    Unwritten(Unwritten),
    /// It has no second copy for this checkpoint, or no longer.
    LetGo {
        /// The checkpoint's step.
        step: Step,
        /// The generation in which the state was copied.
        generation: Generation,
    },
    /// The process was asked to go.
    Terminate,
}

/// What a worker is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Tell the coordinator where the worker stands.
    Say(Stance),
    /// Get state, connect to the members, then train. [`Event::Left`] is owed.
    Form(Arc<Formation>),
    /// Put `hold` (and `save`) into the control word from the next step on.
    Hold {
        /// Take a checkpoint at that boundary.
        save: bool,
    },
    /// Break the ring that was begun last, if it still lives.
    Abort {
        /// For people.
        reason: String,
    },
    /// Write the second copy that is kept for a checkpoint; [`Event::Wrote`] or [`Event::LetGo`] is owed.
    WriteKept {
        /// The checkpoint's step.
        step: Step,
        /// The generation in which the state was copied.
        generation: Generation,
    },
    /// End the process.
    Exit(Leave),
}

/// Checkpoints whose parts are written and not known to be committed: at most so many are told. They pile up only while
/// there is no coordinator, and one that comes back commits them all: the run then keeps those that it would have kept.
const WRITTEN_MAX: usize = 16;
/// Bytes of their lists of parts, all together: below what the coordinator takes in one message.
const WRITTEN_BYTES_MAX: usize = 32 << 20;
/// Checkpoints that could not be written, and of which nothing newer is known to be committed: the newest so many are told.
const UNWRITTEN_MAX: usize = 4;

/// A worker's membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    linked: bool,
    /// The highest epoch that was heard: orders of a lower one are those of a coordinator that was replaced.
    epoch: Epoch,
    /// No generation up to this one is joined: it was aborted, or a later one was.
    floor: Generation,
    stance: Stance,
    /// A formation to take up once the present ring is left.
    next: Option<Arc<Formation>>,
    leave: Option<Leave>,
    gone: bool,
}

impl Default for Member {
    fn default() -> Self {
        Self::new(None)
    }
}

impl Member {
    /// A worker that has just started and holds the state after `holds`, if any.
    pub fn new(holds: Option<Step>) -> Self {
        let stance = Stance::new(holds, Activity::Outside);
        Self {
            linked: false,
            epoch: Epoch(0),
            floor: Generation(0),
            stance,
            next: None,
            leave: None,
            gone: false,
        }
    }

    /// Where it stands: what is said when a connection opens, and with every heartbeat.
    pub fn stance(&self) -> &Stance {
        &self.stance
    }

    /// The highest epoch that was heard.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether the process is to end.
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// Takes in one event and appends what is to be done, in that order.
    pub fn handle(&mut self, event: Event, out: &mut Vec<Effect>) {
        if self.gone {
            return;
        }
        let before = self.stance.clone();
        match event {
            Event::Linked => self.linked = true,
            Event::Unlinked => self.linked = false,
            Event::Ordered { epoch, order } if epoch >= self.epoch => {
                self.epoch = epoch;
                self.ordered(order, out);
            }
            Event::Ordered { .. } => {}
            Event::Ready { generation, holds, shard } => {
                if self.stance.activity == (Activity::Forming { generation }) {
                    self.stance.activity = Activity::Running { generation };
                    (self.stance.holds, self.stance.shard) = (holds, shard);
                }
            }
            Event::Applied { holds } => self.stance.holds = Some(holds),
            Event::Left { generation, holds, shard, cause } if self.in_ring() == Some(generation) => {
                (self.stance.holds, self.stance.shard) = (holds, shard);
                self.left(generation, cause, out);
            }
            Event::Left { .. } => {}
            Event::Wrote(written) => {
                self.stance.written.retain(|other| other.step != written.step);
                self.stance.unwritten.retain(|other| other.step != written.step);
                self.stance.written.push(written);
                let bytes = |written: &[Written]| written.iter().map(|w| w.parts.len()).sum::<usize>();
                while self.stance.written.len() > WRITTEN_MAX
                    || (self.stance.written.len() > 1 && bytes(&self.stance.written) > WRITTEN_BYTES_MAX)
                {
                    self.stance.written.remove(0);
                }
            }
            Event::Unwritten(unwritten) => {
                self.stance.unwritten.retain(|other| other.step != unwritten.step);
                self.stance.unwritten.push(unwritten);
                if self.stance.unwritten.len() > UNWRITTEN_MAX {
                    self.stance.unwritten.remove(0);
                }
            }
            Event::LetGo { step, generation } => {
                let of = |written: &&mut Written| (written.step, written.generation) == (step, generation);
                self.stance.written.iter_mut().filter(of).for_each(|written| written.kept = None);
            }
            Event::Terminate => {
                self.stance.leaving = true;
                if !self.linked {
                    let reason = "asked to go, with no coordinator to ask".to_owned();
                    self.leave(Leave::Dismissed { reason }, out);
                }
            }
        }
        // A step applied is no news that anyone waits for: heartbeats carry it. That a learner holds the state is news.
        let quiet = before.holds.is_some() == self.stance.holds.is_some()
            && Stance { holds: before.holds, ..self.stance.clone() } == before
            && !matches!(self.stance.activity, Activity::Holding { .. });
        if self.linked && !self.gone && !quiet && self.stance != before {
            out.push(Effect::Say(self.stance.clone()));
        }
    }

    fn in_ring(&self) -> Option<Generation> {
        match self.stance.activity {
            Activity::Forming { generation } | Activity::Running { generation } => Some(generation),
            Activity::Outside | Activity::Holding { .. } => None,
        }
    }

    fn ordered(&mut self, order: Order, out: &mut Vec<Effect>) {
        match order {
            Order::Form(formation) => {
                let known = self.stance.activity.generation().max(Some(self.floor));
                let waiting = self.next.as_ref().map(|next| next.generation);
                if Some(formation.generation) <= known.max(waiting) {
                    return;
                }
                if let Some(old) = self.in_ring() {
                    let reason = format!("generation {} follows {old}", formation.generation);
                    self.next = Some(formation);
                    out.push(Effect::Abort { reason });
                } else {
                    self.form(formation, out);
                }
            }
            Order::Hold { generation, save } => {
                if self.in_ring() == Some(generation) {
                    out.push(Effect::Hold { save });
                }
            }
            Order::Abort { generation, reason } => {
                self.floor = self.floor.max(generation);
                if self.next.as_ref().is_some_and(|next| next.generation <= generation) {
                    self.next = None;
                }
                match self.in_ring() {
                    Some(of) if of <= generation => out.push(Effect::Abort { reason }),
                    Some(_) => {}
                    None => {
                        // It never was in that ring and will not be: that is all there is to say.
                        if self.stance.activity.generation() < Some(generation) {
                            let cause = Cause::Broken { lost: None, reason };
                            self.stance.activity = Activity::Holding { generation, cause };
                        }
                    }
                }
            }
            Order::Committed { step } => {
                self.stance.written.retain(|written| written.step != step);
                self.stance.unwritten.retain(|unwritten| unwritten.step > step);
            }
            Order::WriteKept { step, generation } => out.push(Effect::WriteKept { step, generation }),
            Order::Leave { why } => self.leave(why, out),
        }
    }

    fn form(&mut self, formation: Arc<Formation>, out: &mut Vec<Effect>) {
        let generation = formation.generation;
        let of_peers = matches!(formation.source, Source::Peers { .. });
        if let Some(holds) = self.stance.holds.filter(|holds| *holds > formation.start && of_peers) {
            // Applied after this worker was last heard. Steps are not taken back: the ring is formed anew from here.
            let reason =
                format!("this worker holds step {holds}, the generation starts at {}", formation.start);
            let cause = Cause::Broken { lost: None, reason };
            self.stance.activity = Activity::Holding { generation, cause };
            return;
        }
        self.stance.activity = Activity::Forming { generation };
        out.push(Effect::Form(formation));
    }

    fn left(&mut self, generation: Generation, cause: Cause, out: &mut Vec<Effect>) {
        self.stance.activity = Activity::Holding { generation, cause };
        if let Some(why) = self.leave.take() {
            self.gone = true;
            out.push(Effect::Exit(why));
        } else if let Some(next) = self.next.take() {
            self.form(next, out);
        }
    }

    fn leave(&mut self, why: Leave, out: &mut Vec<Effect>) {
        if self.in_ring().is_some() {
            out.push(Effect::Abort { reason: "the worker leaves".to_owned() });
            self.leave = Some(why);
        } else {
            self.gone = true;
            out.push(Effect::Exit(why));
        }
    }
}

#[cfg(test)]
mod arbitrary;
#[cfg(test)]
mod tests;

//! Who trains: the coordinator's half of the ring's life, for one job. No I/O, no clock, no randomness.
//!
//! ```text
//!             enough workers          recorded                 a member is lost, holds, or a change is due
//!   Gathering ──────────────▶ Recording ───────▶ Alive(g) ─────────────────────────────────▶ Breaking(g)
//!       ▲                                     members form,                                      │
//!       │                                     then run                                           │
//!       └────────────────────────────────────────────────────────────────────────────────────────┘
//!                                 every member of g holds, or is gone
//!   Gathering ──▶ Over   all steps applied and committed · paused · cancelled · failed
//! ```
//!
//! A generation is recorded in the job's log before anyone hears of it, so that a coordinator that takes over takes up
//! the last recorded generation as if it had formed it itself: members that never heard of it are told again.
//!
//! What is said to a worker follows from where it stands and what the core wants ([`Membership::owed`]): nothing here
//! remembers a conversation, only what was last said on the present connection.

mod alive;
mod copies;
pub(super) mod coverage;
mod gather;
mod orders;
mod presence;
mod quiet;
mod reach;
mod shares;
mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use anello_proto::ring::*;

use self::quiet::Counted;
use super::checkpoints::Checkpoints;
use super::cut;
use super::paces::{self, Paces, Verdict};
#[cfg(test)]
use super::simulation::Bug;
use super::{Attendant, Effect, Entry, Event, Goal, Millis, Options, Outcome, Status};

/// A worker that the coordinator knows.
#[derive(Clone, Debug, PartialEq)]
struct Worker {
    endpoints: Endpoints,
    /// Where it runs, for people and for quarantine.
    machine: String,
    /// Its connection is open.
    linked: bool,
    /// When it last said something.
    heard: Millis,
    /// Rank among the arrivals.
    arrival: u64,
    stance: Stance,
    /// What it was told last over the present connection.
    told: Option<Order>,
    told_committed: BTreeSet<Step>,
    /// Second copies that it was asked to write, over the same connection.
    asked: BTreeSet<(Step, Generation)>,
}

/// The ring's state.
#[derive(Clone, Debug, PartialEq)]
enum Ring {
    /// There is none; one is formed when enough workers are here. `since` starts the wait for latecomers.
    Gathering { since: Millis, listing: Listing },
    /// A generation is being written to the job's log.
    Recording(Arc<Formation>),
    /// Members get state, connect and train. `changing`: they were asked to hold at a boundary.
    Alive { formation: Arc<Formation>, changing: Option<Change> },
    /// The generation is over; some members have not said yet that they hold. `abort`: why they are told to break it
    /// off; absent while all hold by agreement. `blameless`: a death explains what the others
    /// say.
    Breaking { formation: Arc<Formation>, abort: Option<String>, blameless: bool },
    /// Nothing more will be formed.
    Over(Outcome),
}

/// Whether the list of checkpoints is fresh. It must be before a generation starts from the store: a coordinator before
/// this one may have committed more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listing {
    Old,
    Asked,
    Fresh,
}

/// Why a ring that runs well is asked to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Change {
    save: bool,
    why: String,
}

/// The membership of one job's ring.
#[derive(Clone, Debug, PartialEq)]
pub struct Membership {
    options: Options,
    epoch: Epoch,
    goal: Goal,
    /// The newest generation that was ever recorded.
    generation: Generation,
    ring: Ring,
    workers: BTreeMap<WorkerId, Worker>,
    checkpoints: Checkpoints,
    arrivals: u64,
    /// Members of the newest generation; the next one keeps their order and, as far as it can, their lanes.
    seats: BTreeMap<WorkerId, Seat>,
    /// Rings that failed for reasons of their own at this step, one after the other.
    faults: Faults,
    deadline: Option<Millis>,
    /// When this process last found that it had slept.
    forgave: Option<Millis>,
    /// What was counted of all workers, and is kept up where an event is all that changes it.
    counted: Counted,
    /// Newcomers with no state after whom there are still too few for a ring, if nothing else happens.
    too_few: u32,
    /// A generation has trained, or one was found that may have.
    has_trained: bool,
    /// When the generation that trained last was seen to break or to hold; absent while one trains, and before the first.
    broke: Option<Millis>,
    /// The newest step that anyone was heard to have applied.
    reached: Step,
    /// How fast the members are.
    paces: Paces,
    #[cfg(test)]
    planted: Option<Bug>,
    /// What workers had that are gone since a ring trained last.
    gone: Vec<(WorkerId, Shard)>,
    /// Workers that did not reach one another, and are not tried together again yet.
    rifts: BTreeMap<reach::Pair, reach::Rift>,
    /// Machines on which a worker's state differed from all others': nobody new from there is taken in any more.
    quarantined: BTreeSet<String>,
    /// Those workers: they are never taken in again.
    evicted: BTreeSet<WorkerId>,
    /// Checkpoints of which it is on record that a worker could not write its parts.
    unwritten: BTreeSet<(Step, Generation)>,
    /// A checkpoint of this step or a later one was asked for, and is not committed yet.
    wanted: Option<Step>,
    /// Time of the last event.
    now: Millis,
}

/// Failures that no death explains, since the last step that was applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Faults {
    at: Step,
    count: u32,
    /// State held by workers is not to be used: the checkpoint is.
    distrust: bool,
    /// Their replicas differ, and nobody can tell which is right: with no checkpoint, they begin anew.
    differ: bool,
}

/// What a coordinator finds in the job's prefix when it takes the job up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The newest generation in the log.
    pub formation: Option<Formation>,
    /// Steps of the committed checkpoints, ascending.
    pub checkpoints: Vec<Step>,
    /// Every generation to come is later than this: the number of the coordinator's own first record, so that no other
    /// writer of the run's folder ever stamped its objects with it.
    pub floor: Generation,
    /// Machines whose workers are not taken in.
    pub quarantined: Vec<String>,
    /// Workers that were sent away since their state differed, members of `formation` perhaps.
    pub evicted: Vec<WorkerId>,
}

impl Membership {
    /// Takes up a job at `now`: fresh, or where another coordinator left it.
    pub fn new(options: Options, epoch: Epoch, found: Found, now: Millis) -> Self {
        let generation =
            found.formation.as_ref().map_or(Generation(0), |formation| formation.generation).max(found.floor);
        let seats = found.formation.as_ref().map(seats_of).unwrap_or_default();
        let mut workers = BTreeMap::new();
        let checkpoints = Checkpoints::new(found.checkpoints);
        let has_trained = found.formation.is_some();
        let ring = match found.formation {
            None => Ring::Gathering { since: now, listing: Listing::Fresh },
            Some(formation) => {
                // Nobody has reported in yet: the members have a lease's time to do so.
                let members = formation.members.iter().enumerate();
                for (arrival, member) in members.filter(|(_, member)| !found.evicted.contains(&member.worker))
                {
                    let stance = Stance::new(None, Activity::Outside);
                    let worker = Worker {
                        endpoints: member.endpoints.clone(),
                        machine: String::new(),
                        linked: false,
                        heard: now,
                        arrival: arrival as u64,
                        stance,
                        told: None,
                        told_committed: BTreeSet::new(),
                        asked: BTreeSet::new(),
                    };
                    workers.insert(member.worker, worker);
                }
                Ring::Alive { formation: Arc::new(formation), changing: None }
            }
        };
        let arrivals = workers.len() as u64;
        let paces = Paces::new(options.straggling);
        Self {
            options,
            epoch,
            goal: Goal::Run,
            generation,
            ring,
            workers,
            checkpoints,
            arrivals,
            seats,
            faults: Faults::default(),
            gone: Vec::new(),
            rifts: BTreeMap::new(),
            quarantined: found.quarantined.into_iter().collect(),
            evicted: found.evicted.into_iter().collect(),
            deadline: Some(now),
            forgave: None,
            counted: Counted::default(),
            too_few: 0,
            has_trained,
            broke: None,
            reached: Step(0),
            paces,
            #[cfg(test)]
            planted: None,
            unwritten: BTreeSet::new(),
            wanted: None,
            now,
        }
    }

    /// Puts a mistake in, for the simulator to find.
    #[cfg(test)]
    pub(super) fn plant(&mut self, bug: Option<Bug>) {
        self.planted = bug;
        self.checkpoints.early = bug == Some(Bug::EarlyManifest);
    }

    /// Takes in one event and appends what is to be done, in that order.
    pub fn handle(&mut self, now: Millis, event: Event, out: &mut Vec<Effect>) {
        if !self.take_in(now, event, out) {
            self.follow(out);
        }
    }

    /// Notes an event. Whether that is all, since nothing follows from it for anyone: then it costs one look-up, however many workers
    /// there are.
    fn take_in(&mut self, now: Millis, event: Event, out: &mut Vec<Effect>) -> bool {
        self.pass_time(now);
        // One that is fenced says nothing more.
        if matches!(self.ring, Ring::Over(Outcome::Fenced { .. })) || self.is_quiet(&event, out) {
            return true;
        }
        match event {
            // What they tell is noted already; words about time come here when lanes are to be shared out anew.
            Event::Tick | Event::Reported { .. } | Event::Paced { .. } => {}
            Event::Linked { worker, endpoints, machine, stance } => {
                let is_all = self.is_one_of_too_few(worker, &stance) || self.is_back(worker, &stance);
                self.linked(worker, endpoints, machine, stance, out);
                return is_all;
            }
            Event::Unlinked { worker } => return self.unlinked(worker),
            Event::Stands { worker, stance } => self.stands(worker, stance, out),
            Event::Failed { worker, reason } => self.failed(worker, &reason, out),
            Event::Recorded { generation } => self.recorded(generation),
            Event::Committed { step } => self.checkpoints.committed(step),
            Event::Listed { steps } => {
                steps.into_iter().for_each(|step| self.checkpoints.exists(step));
                if let Ring::Gathering { listing, .. } = &mut self.ring {
                    *listing = Listing::Fresh;
                }
            }
            Event::CommitFailed { step, reason } => {
                self.checkpoints.failed(step, self.now + self.options.lease / 8);
                out.push(Effect::Record(Entry::CheckpointFailed { step, reason }));
            }
            Event::Withdrawn { step } => {
                self.checkpoints.withdraw(step);
                let reason =
                    "whoever knew the figures of the steps before it is gone: they are trained again"
                        .to_owned();
                out.push(Effect::Record(Entry::CheckpointFailed { step, reason }));
            }
            Event::Fenced { .. } if matches!(self.ring, Ring::Over(_)) => {}
            Event::Fenced { by } => {
                (self.ring, self.deadline) = (Ring::Over(Outcome::Fenced { by }), None);
                return true;
            }
            Event::GivenUp { .. } if self.is_trained() => self.over(Outcome::Completed, out),
            Event::GivenUp { reason } => self.over(Outcome::Failed { reason }, out),
            Event::Goal(goal) => self.goal = goal,
            Event::Desired(workers) => self.options.desired = workers.max(1),
            Event::CheckpointWanted => {
                let trained = self.newest_held().unwrap_or_default().max(self.reached);
                self.wanted = self.wanted.max(Some(trained));
            }
        }
        false
    }

    /// All that follows from where everybody stands.
    fn follow(&mut self, out: &mut Vec<Effect>) {
        self.too_few = 0;
        self.look_for_wanted();
        if !matches!(self.ring, Ring::Over(_)) {
            self.checkpoints.try_again(self.now, out);
        }
        self.expire(out);
        self.advance(out);
        self.counted = self.count();
        self.ask_for_copies(out);
        self.tell(out);
        self.deadline = self.next_deadline();
        self.forget_rifts();
        self.note_recovery(out);
    }

    /// All members train: after another generation, that is told.
    fn note_recovery(&mut self, out: &mut Vec<Effect>) {
        let Ring::Alive { formation, .. } = &self.ring else { return };
        if !self.trains() {
            return;
        }
        self.has_trained = true;
        self.gone.clear();
        let Some(broke) = self.broke.take() else { return };
        let checkpoint = match formation.source {
            Source::Checkpoint { step } => Some(step),
            Source::Seed | Source::Peers { .. } => None,
        };
        let (start, workers) = (formation.start, formation.members.len() as u32);
        let again = std::mem::replace(&mut self.reached, start).0.saturating_sub(start.0);
        let (generation, took) = (formation.generation, self.now.since(broke));
        out.push(Effect::Record(Entry::Recovered { generation, workers, took, again, checkpoint }));
    }

    /// The time at which a [`Event::Tick`] is owed; absent: nothing waits for time.
    pub fn deadline(&self) -> Option<Millis> {
        self.deadline
    }

    /// Whether all members of the living generation run.
    fn trains(&self) -> bool {
        matches!(&self.ring, Ring::Alive { formation, .. } if self.counted.running == formation.members.len())
    }

    fn next_deadline(&self) -> Option<Millis> {
        let leases = self.workers.values().map(|worker| worker.heard + self.options.lease);
        if matches!(self.ring, Ring::Over(_)) {
            // They are seen off.
            return leases.min();
        }
        let gathering = match self.ring {
            Ring::Gathering { since, .. } => Some(since + self.options.gather),
            _ => None,
        };
        let others = self.checkpoints.again_at().into_iter().chain(self.rifts_end());
        leases.chain(gathering.filter(|at| *at > self.now)).chain(others).min()
    }

    /// Steps that the checkpoint which was asked for holds at least; absent: none was asked for that is not committed.
    pub fn wanted(&self) -> Option<Step> {
        self.wanted
    }

    /// Whether it is a worker that may be here, or may come back.
    pub fn knows(&self, worker: WorkerId) -> bool {
        self.workers.contains_key(&worker)
    }

    /// Whether there is any.
    pub fn knows_anyone(&self) -> bool {
        !self.workers.is_empty()
    }

    /// The generation that is alive or breaking.
    pub fn formation(&self) -> Option<&Formation> {
        match &self.ring {
            Ring::Alive { formation, .. } | Ring::Breaking { formation, .. } | Ring::Recording(formation) => {
                Some(formation)
            }
            Ring::Gathering { .. } | Ring::Over(_) => None,
        }
    }

    /// Whether the checkpoint that was asked for is there.
    fn look_for_wanted(&mut self) {
        if self.checkpoints.newest() >= self.wanted {
            self.wanted = None;
        }
    }

    fn recorded(&mut self, generation: Generation) {
        if let Ring::Recording(formation) = &self.ring
            && formation.generation == generation
        {
            // What a ring that goes on from a checkpoint has lost is wanted no more: it would be trained again first.
            self.wanted = self.wanted.map(|step| step.min(formation.start));
            self.seats = seats_of(formation);
            self.ring = Ring::Alive { formation: formation.clone(), changing: None };
        }
    }

    /// Goes as far as it goes without news.
    fn advance(&mut self, out: &mut Vec<Effect>) {
        loop {
            let ring = match &self.ring {
                Ring::Gathering { .. } => self.gather(out),
                Ring::Recording(_) | Ring::Over(_) => None,
                Ring::Alive { formation, changing } => self.watch(formation, changing.as_ref()),
                Ring::Breaking { formation, abort, blameless } => {
                    self.settle(formation, abort.as_ref(), *blameless)
                }
            };
            let Some(ring) = ring else { return };
            if let (Ring::Breaking { formation, blameless, .. }, Ring::Gathering { .. }) = (&self.ring, &ring)
            {
                let (formation, blameless) = (formation.clone(), *blameless);
                self.judge(&formation, blameless, out);
                if matches!(self.ring, Ring::Over(_)) {
                    return;
                }
            }
            match (&self.ring, &ring) {
                (Ring::Alive { .. }, Ring::Breaking { .. }) if self.has_trained => {
                    self.broke.get_or_insert(self.now);
                }
                (_, Ring::Recording(formation)) => self.generation = formation.generation,
                _ => {}
            }
            self.ring = ring;
        }
    }

    fn over(&mut self, outcome: Outcome, out: &mut Vec<Effect>) {
        if !matches!(self.ring, Ring::Over(_)) {
            out.push(Effect::Record(Entry::Ended { outcome: outcome.clone() }));
            self.ring = Ring::Over(outcome);
        }
    }

    /// Says to every worker what it is owed and was not told yet.
    fn tell(&mut self, out: &mut Vec<Effect>) {
        let needed = match self.ring {
            Ring::Gathering { .. } => self.needed_leavers(),
            _ => BTreeSet::new(),
        };
        let mut workers = std::mem::take(&mut self.workers);
        for (&id, worker) in workers.iter_mut().filter(|(_, worker)| worker.linked) {
            let (stance, told) = (&worker.stance, &mut worker.told_committed);
            let unwritten = stance.unwritten.iter().map(|unwritten| unwritten.step);
            let speaks_of: BTreeSet<Step> =
                stance.written.iter().map(|written| written.step).chain(unwritten).collect();
            told.retain(|step| speaks_of.contains(step));
            for step in speaks_of {
                if self.checkpoints.has(step) && told.insert(step) {
                    out.push(Effect::Send {
                        worker: id,
                        epoch: self.epoch,
                        order: Order::Committed { step },
                    });
                }
            }
            if let Some(order) = self.owed(id, worker, &needed)
                && worker.told.as_ref() != Some(&order)
            {
                worker.told = Some(order.clone());
                out.push(Effect::Send { worker: id, epoch: self.epoch, order });
            }
        }
        self.workers = workers;
    }
}

fn in_a_ring(stance: &Stance) -> bool {
    matches!(stance.activity, Activity::Forming { .. } | Activity::Running { .. })
}

/// The place of a member.
#[derive(Clone, Debug, PartialEq)]
struct Seat {
    rank: usize,
    lanes: Range<u32>,
}

fn seats_of(formation: &Formation) -> BTreeMap<WorkerId, Seat> {
    let members = formation.members.iter().enumerate();
    members.map(|(rank, member)| (member.worker, Seat { rank, lanes: member.lanes.clone() })).collect()
}

#[cfg(test)]
mod arbitrary;
#[cfg(test)]
mod tests;

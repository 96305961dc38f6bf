//! State: taken where a generation says, offered to those that lack it, and copied for checkpoints.
//!
//! Where moments are shared out (`ring.state_copies`), a worker keeps what it has until the generation has met: only then has
//! everyone else what it needs, and what is no part of its new share can go.

use anello_collective::tree::balanced;
use anello_configs::StateCopies;
use anello_store::Error as StoreError;

use super::*;
use crate::account::position_after;
use crate::checkpoint::{Snapshot, flat};
use crate::cover::Cover;
use crate::init::initial_state;
use crate::optimizer::State;
use crate::ring::circle::{Asked, Circle, Failed, Gathered, Head, moved_of, share_out};
use crate::ring::parts::Copy;
use crate::ring::peers::{From, Job, Offered};

/// Pause between two attempts to read a checkpoint from a store that does not answer.
const RETRY: Duration = Duration::from_secs(2);

/// What a worker has of the state that a generation starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// The weights, and moments.
    Here,
    /// What it takes to bring its moments there; the weights are with others.
    Next,
    Nothing,
}

/// What is to be gathered, of a state of so many layers.
pub(super) struct Gathering {
    pub layout: Layout,
    pub asked: Vec<Asked>,
    /// Updates, where the lanes are, and the window of losses, as those say that are asked.
    pub updates: u64,
    pub cursors: Vec<Cursor>,
    pub losses: Vec<f64>,
    /// Moments to have then.
    pub cover: Cover,
    /// The blocks outside of which all moments are zero.
    pub moved: Range<usize>,
}

impl Held {
    pub(super) fn new(engine: Engine, step: Step, cursors: Vec<Cursor>) -> Self {
        let missing = Cover::none(engine.state().layout.blocks());
        Self { engine, step, cursors, pending: None, before: None, missing }
    }

    /// The blocks whose moments it has, of the state that it holds.
    fn has(&self) -> Cover {
        self.engine.state().cover.without(&self.missing)
    }

    /// Lets go of the room for moments that did not come.
    pub(super) fn drop_missing(&mut self) {
        let has = self.has();
        self.missing = Cover::none(has.of_blocks());
        self.engine.set_cover(has, &[]);
    }

    fn standing(&self, start: Step) -> Standing {
        match &self.pending {
            _ if self.step == start => Standing::Here,
            Some(_) if self.step.0 + 1 == start.0 => Standing::Next,
            _ => Standing::Nothing,
        }
    }

    /// Prepares for the step of `plan`, and keeps what its checkpoint is of where a stack grows: on the host, since a GPU
    /// needs the room for the larger one.
    pub(super) fn approach(&mut self, plan: &StepPlan<'_>) {
        if let Some(before) = self.engine.approach(plan) {
            self.before = Some(before.on(Device::Cpu));
        }
    }

    /// Makes the state that of before the step that is under way, and forgets what was made ready of it.
    pub(super) fn step_back(&mut self) {
        if let Some(before) = self.before.take() {
            let device = self.engine.state().weights.device();
            self.engine.load_state(before.on(device));
            self.pending = None;
        }
    }

    /// Another step is applied: what was held before it is of no use any more.
    pub(super) fn advance(&mut self, step: Step) {
        (self.step, self.before) = (step, None);
    }

    /// The moments that it has, as the ring speaks of them.
    pub(super) fn shard(&self) -> Option<Shard> {
        match &self.pending {
            Some(pending) => pending.prepared.cover.without(&self.missing).shard(true),
            None => self.has().shard(false),
        }
    }
}

impl Serving<'_> {
    /// Whether this member has no lanes before it has the state.
    pub(super) fn learns(&self) -> bool {
        self.rank >= self.trainers
    }

    /// The moments that this member needs, of a state of so many blocks.
    pub(super) fn needs(&self, blocks: usize) -> Cover {
        match self.shared {
            true if self.learns() => Cover::none(blocks),
            true => Cover::of_rank(blocks, self.trainers, self.rank),
            false => Cover::all(blocks),
        }
    }
}

impl Thread {
    /// Makes this worker hold the state after the generation's start, and offers it to members that lack it.
    pub(super) fn take_state(&mut self, serving: &Serving<'_>, abort: &AbortHandle) -> Served<()> {
        let Formation { start, source, .. } = serving.formation;
        if let Some(held) = self.held.as_mut().filter(|held| held.step == *start) {
            held.step_back();
        }
        match source {
            Source::Peers { holders } => self.take_from_peers(serving, holders, abort),
            Source::Seed => {
                let is_there = |held: &Held| {
                    let has = held.has();
                    held.step == *start && serving.needs(has.of_blocks()).without(&has).is_empty()
                };
                if self.held.as_ref().is_some_and(is_there) { Ok(()) } else { self.hold_seed() }
            }
            Source::Checkpoint { step } => {
                match serving.formation.members.len() {
                    1 => self.load(serving, *step, abort)?,
                    _ => self.load_together(serving, *step, abort)?,
                }
                // A checkpoint never stands after steps whose figures are not in the run folder.
                self.took(Rows { durable: step.0, rows: Vec::new() });
                Ok(())
            }
        }
    }

    /// Brings this worker's moments to what its share in the generation is, once all members have theirs, and drops what it
    /// kept for a step that is not to be.
    pub(super) fn take_share(&mut self, serving: &Serving<'_>) {
        let plan = self.schedule.at(serving.formation.start.0);
        let held = self.held.as_mut().expect("state was taken");
        held.pending = None;
        if serving.shared {
            if let Some(plan) = &plan {
                held.approach(plan);
            }
            let cover = serving.needs(held.engine.state().layout.blocks());
            held.missing = Cover::none(cover.of_blocks());
            held.engine.set_cover(cover, &[]);
        }
        let state = held.engine.state();
        let moments_bytes = 4 * (state.exp_avg.numel() + state.exp_avg_sq.numel());
        tracing::info!(generation = %serving.formation.generation, moments_bytes, "has its share of the state");
    }

    fn take_from_peers(
        &mut self,
        serving: &Serving<'_>,
        holders: &[WorkerId],
        abort: &AbortHandle,
    ) -> Served<()> {
        let Formation { generation, start, members, .. } = serving.formation;
        let (schedule, may_share) =
            (self.schedule.clone(), self.config.ring.state_copies == StateCopies::Two);
        let grows = schedule.at(start.0).is_some_and(|plan| plan.upcycle.is_some());
        let standing = self.held.as_ref().map_or(Standing::Nothing, |held| held.standing(*start));
        let all_hold = holders.len() == members.len();
        if all_hold && !may_share {
            return Ok(());
        }
        let learns = |rank: usize| rank >= serving.trainers && serving.meanwhile;
        let takes = |(rank, member): (usize, &Member)| !learns(rank) && !holders.contains(&member.worker);
        let is_taken = members.iter().enumerate().any(takes);
        if standing == Standing::Here || may_share {
            self.offer(serving.formation, standing, may_share || is_taken, !all_hold && is_taken);
        }
        if learns(serving.rank) && standing != Standing::Here {
            return self.ask_what_to_learn(serving, holders, abort);
        }
        // A stack grows where all moments are.
        let needs = |blocks| if grows { Cover::all(blocks) } else { serving.needs(blocks) };
        let is_whole = |held: &Held| {
            let has = held.has();
            needs(has.of_blocks()).without(&has).is_empty()
        };
        if standing == Standing::Here && self.held.as_ref().is_some_and(is_whole) {
            return Ok(());
        }
        let (circle, ids) = self.circle(serving, *start, |worker| may_share || holders.contains(&worker));
        let cause = |failed: Failed| cause_of_failure(failed, &ids);
        let heads = self.runtime.block_on(circle.heads(abort)).map_err(cause)?;
        let gathering = self.gathering(standing, needs, &heads)?;
        let gathered = self.runtime.block_on(circle.gather(gathering.asked.clone(), abort)).map_err(cause)?;
        if standing != Standing::Here {
            // Whoever has the weights of the state has its figures. They are here before the state counts as held.
            let have: Vec<usize> = (0..ids.len()).filter(|at| holders.contains(&ids[*at])).collect();
            let of =
                have.get(serving.rank % have.len().max(1)).ok_or_else(|| fault("nobody holds the state"))?;
            let first = self.rows.lock().expect("no holder panics").known();
            let rows = self.runtime.block_on(circle.figures(*of, first, start.0, abort)).map_err(cause)?;
            self.took(rows);
        }
        tracing::info!(%generation, step = %start, bytes = gathered.bytes(), "took state from peers");
        self.hold(*start, standing, gathering, &gathered);
        Ok(())
    }

    /// The other members that may be asked for the state after `step`.
    pub(super) fn circle(
        &self,
        serving: &Serving<'_>,
        step: Step,
        may: impl Fn(WorkerId) -> bool,
    ) -> (Circle, Vec<WorkerId>) {
        let Formation { generation, members, .. } = serving.formation;
        let own = members[serving.rank].worker;
        let asked = members
            .iter()
            .filter(|member| member.worker != own && may(member.worker))
            .map(|member| (member.worker, member.endpoints.peers.clone()));
        let (ids, addresses): (Vec<WorkerId>, Vec<Vec<String>>) = asked.unzip();
        let job = Job::new(&self.job);
        (Circle::new(job, addresses, self.tls.as_ref(), self.silence, *generation, step), ids)
    }

    /// What to ask of whom, to have the moments that are needed of a state of so many blocks.
    fn gathering(
        &self,
        standing: Standing,
        needs: impl Fn(usize) -> Cover,
        heads: &[Head],
    ) -> Served<Gathering> {
        let held = self.held.as_ref().filter(|_| standing != Standing::Nothing);
        let has_some = |head: &&Head| !(head.weights.is_empty() && head.cover.is_empty());
        let nowhere = || fault("some moments of the state that the generation starts from are nowhere");
        let first = heads.iter().find(has_some).ok_or_else(nowhere)?;
        let layout = Layout::new(&self.config.model, first.layers);
        let blocks = layout.blocks();
        let is_alike = |head: &Head| {
            (head.layers, head.updates) == (first.layers, first.updates) && head.cover.of_blocks() == blocks
        };
        let is_ours = |held: &Held| held.engine.state().layout.layers() as u32 == first.layers;
        if !heads.iter().filter(has_some).all(is_alike) || !held.is_none_or(is_ours) {
            return Err(fault("two peers hold states of different kinds"));
        }
        let have = match held {
            Some(Held { pending: Some(pending), missing, .. }) if standing == Standing::Next => {
                pending.prepared.cover.without(missing)
            }
            Some(held) => held.has(),
            None => Cover::none(blocks),
        };
        let weights = match standing {
            Standing::Here => Cover::none(blocks),
            Standing::Next | Standing::Nothing => Cover::all(blocks),
        };
        let needs = needs(blocks);
        let able: Vec<(usize, &Head)> = heads.iter().enumerate().filter(|(_, head)| has_some(head)).collect();
        let moved = moved_of(able.iter().map(|(_, head)| *head));
        let lacks = needs.without(&have).within(&moved);
        let asked = share_out(&able, &weights, &lacks).ok_or_else(nowhere)?;
        let with_weights = heads.iter().find(|head| !head.weights.is_empty());
        let told = with_weights.map(|head| (head.cursors.clone(), head.losses.clone()));
        let (cursors, losses) = told.unwrap_or_default();
        let (updates, cover) = (first.updates, have.and(&needs));
        Ok(Gathering { layout, asked, updates, cursors, losses, cover, moved })
    }

    /// Puts what was gathered together with what is here.
    pub(super) fn hold(
        &mut self,
        start: Step,
        standing: Standing,
        gathering: Gathering,
        gathered: &Gathered,
    ) {
        let Gathering { layout, asked: _, updates, cursors, losses, cover, moved } = gathering;
        let moments = gathered.moments.iter();
        let others: Vec<(usize, [Tensor; 2])> = moments
            .map(|(first, both)| (*first, both.each_ref().map(|bytes| flat(bytes, self.device))))
            .collect();
        let weights = (!gathered.weights.is_empty()).then(|| {
            let whole = layout.zeros(self.device);
            for (first, bytes) in &gathered.weights {
                let (at, values) = ((first * BLOCK) as i64, flat(bytes, self.device));
                whole.narrow(0, at, values.numel() as i64).copy_(&values);
            }
            whole
        });
        match (self.held.as_mut().filter(|_| standing != Standing::Nothing), weights) {
            (Some(held), None) => {
                held.drop_missing();
                held.engine.narrow(&moved);
                held.engine.set_cover(cover, &others);
            }
            (Some(held), Some(weights)) => {
                let Pending { prepared, cursors } = held.pending.take().expect("who is next has it");
                held.engine.complete(prepared, &weights);
                held.drop_missing();
                held.engine.narrow(&moved);
                held.engine.set_cover(cover, &others);
                held.advance(start);
                held.cursors = cursors;
            }
            (None, weights) => {
                let weights = weights.expect("who has no state asks for weights");
                let mut state = State::without_moments(layout, weights, moved);
                (state.updates, state.losses) = (updates, losses);
                let state = state.with_cover(cover, &others);
                let engine = self.engine(state);
                self.held = Some(Held::new(engine, start, cursors));
            }
        }
    }

    /// Lays what this worker has on the shelf, as it is after the generation's start. It is read where it is, since it does not change
    /// before all have met.
    fn offer(&self, formation: &Formation, standing: Standing, with_moments: bool, with_weights: bool) {
        let held = self.held.as_ref().filter(|_| standing != Standing::Nothing);
        let mut offered = Offered {
            generation: formation.generation,
            step: formation.start,
            updates: 0,
            layers: 0,
            cursors: Vec::new(),
            losses: Vec::new(),
            weights: Cover::none(0),
            moments: Cover::none(0),
            moved: 0..0,
            from: From::Checkpoint(Default::default()),
        };
        if let Some(held) = held {
            let state = held.engine.state();
            let blocks = state.layout.blocks();
            (offered.weights, offered.moments) = (Cover::none(blocks), Cover::none(blocks));
            offered.layers = state.layout.layers() as u32;
            let lend =
                |state: &State| From::State(Live::lacking_moments(formation.start, state, &held.missing));
            match &held.pending {
                Some(pending) if standing == Standing::Next => {
                    // The weights after the step are with others.
                    let [exp_avg, exp_avg_sq] = [&state.exp_avg, &state.exp_avg_sq].map(Tensor::copy);
                    let mut ahead = State { exp_avg, exp_avg_sq, ..state.share() };
                    ahead.complete(&pending.prepared, None);
                    offered.updates = ahead.updates;
                    offered.moved = ahead.moved.clone();
                    offered.moments = ahead.cover.without(&held.missing);
                    offered.from = lend(&ahead);
                }
                _ => {
                    offered.updates = state.updates;
                    offered.moved = state.moved.clone();
                    (offered.cursors, offered.losses) = (held.cursors.clone(), state.losses.clone());
                    if with_weights {
                        offered.weights = Cover::all(blocks);
                    }
                    if with_moments {
                        offered.moments = held.has();
                    }
                    offered.from = lend(state);
                }
            }
        }
        self.shelf.lay(Arc::new(offered));
    }

    /// Makes this worker hold what the run begins with.
    pub(super) fn hold_seed(&mut self) -> Served<()> {
        let state = initial_state(&self.config, self.device).map_err(|error| fault(error.to_string()))?;
        let engine = self.engine(state);
        let cursors = vec![Cursor::default(); self.config.lanes as usize];
        self.held = Some(Held::new(engine, Step(0), cursors));
        Ok(())
    }

    /// Makes the state that is held that which the step of `plan` begins with, and lets go of moments that this member does
    /// not need.
    pub(super) fn begin_at(&mut self, plan: &StepPlan<'_>, serving: &Serving<'_>) {
        let held = self.held.as_mut().expect("state was taken");
        held.engine.enter(plan);
        if serving.shared {
            let cover = serving.needs(held.engine.state().layout.blocks());
            held.engine.set_cover(cover, &[]);
        }
    }

    /// Copies this worker's blocks, and a second time those of the next member, and hands them to the writer.
    pub(super) fn snapshot(&mut self, serving: &Serving<'_>) {
        let _span = tracing::trace_span!("checkpoint").entered();
        self.writer.wait();
        let members = &serving.formation.members[..serving.trainers];
        let held = self.held.as_ref().expect("state was taken");
        let (blocks, next) = (held.engine.state().layout.blocks(), (serving.rank + 1) % members.len());
        let of = |rank| self.copy(balanced(blocks, members.len(), rank));
        let copy = Copy {
            generation: serving.formation.generation,
            all_blocks: blocks as u64,
            own: of(serving.rank),
            next: (members.len() > 1).then(|| (members[next].worker, of(next))),
        };
        self.writer.write(copy);
    }

    /// A copy on the host of some blocks.
    fn copy(&self, blocks: Range<usize>) -> Snapshot {
        let held = self.held.as_ref().expect("state was taken");
        let position = position_after(&self.schedule, held.step.0);
        let facts = self.stamp.facts(held.engine.state(), position, held.cursors.clone());
        Snapshot::take(held.engine.state(), blocks, facts)
    }
}

/// Why a ring is left when something could not be had of the members `ids`.
pub(super) fn cause_of_failure(Failed { unreachable, reason }: Failed, ids: &[WorkerId]) -> Cause {
    let peers: Vec<WorkerId> = unreachable.into_iter().map(|at| ids[at]).collect();
    if peers.is_empty() { broken(None, reason) } else { Cause::Unreachable { peers, reason } }
}

/// Tries until the store answers, or the ring is given up. The error within is that of a checkpoint that is damaged.
pub(super) fn patiently<T>(
    abort: &AbortHandle,
    what: &str,
    attempt: impl Fn() -> Result<T>,
) -> Served<Result<T>> {
    loop {
        let cause = match attempt() {
            Err(damaged @ Error::Store(StoreError::Checkpoint { .. })) => return Ok(Err(damaged)),
            Err(cause) => cause,
            value => return Ok(value),
        };
        tracing::warn!(%cause, "{what}");
        let until = Instant::now() + RETRY;
        while Instant::now() < until {
            if let Some(reason) = abort.reason() {
                return Err(broken(None, reason.to_owned()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

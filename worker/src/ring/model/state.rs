//! State: taken where a generation says, offered to those that lack it, and copied for checkpoints.
//!
//! Where moments are shared out (`ring.state_copies`), a worker keeps what it has until the generation has met: only then has
//! everyone else what it needs, and what is no part of its new share can go.

use anello_collective::tree::balanced;
use anello_configs::StateCopies;
use anello_store::{Error as StoreError, events};

use super::*;
use crate::account::position_after;
use crate::checkpoint::{self, Snapshot, flat, host};
use crate::cover::Cover;
use crate::init::initial_state;
use crate::optimizer::State;
use crate::ring::parts::Copy;
use crate::ring::peers::{Asked, Circle, Failed, Gathered, Head, HostState, share_out};

/// Pause between two attempts to read a checkpoint from a store that does not answer.
const RETRY: Duration = Duration::from_secs(2);

/// What a worker has of the state that a generation starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// The weights, and moments.
    Here,
    /// What it takes to bring its moments there; the weights are with others.
    Next,
    Nothing,
}

/// What is to be gathered, of a state of so many layers.
struct Gathering {
    layout: Layout,
    weights: bool,
    asked: Vec<Asked>,
    /// Updates, where the lanes are, and the window of losses, as those say that are asked.
    updates: u64,
    cursors: Vec<Cursor>,
    losses: Vec<f64>,
    /// Moments to have then.
    cover: Cover,
}

impl Held {
    pub(super) fn new(engine: Engine, step: Step, cursors: Vec<Cursor>) -> Self {
        Self { engine, step, cursors, pending: None, entered: false }
    }

    fn standing(&self, start: Step) -> Standing {
        match &self.pending {
            _ if self.step == start => Standing::Here,
            Some(_) if self.step.0 + 1 == start.0 => Standing::Next,
            _ => Standing::Nothing,
        }
    }

    /// Does to the state what a stage does before its first step.
    fn enter(&mut self, plan: &StepPlan<'_>) {
        self.engine.enter(plan);
        self.entered = plan.upcycle.is_some() || plan.reset_optimizer;
    }

    /// The moments that it has, as the ring speaks of them.
    pub(super) fn shard(&self) -> Option<Shard> {
        match &self.pending {
            Some(pending) => pending.prepared.cover.shard(true),
            None => self.engine.state().cover.shard(false),
        }
    }
}

impl Serving<'_> {
    /// The moments that this member needs, of a state of so many blocks.
    fn needs(&self, blocks: usize) -> Cover {
        match self.shared {
            true => Cover::of_rank(blocks, self.formation.members.len(), self.rank),
            false => Cover::all(blocks),
        }
    }
}

impl Thread {
    /// Makes this worker hold the state after the generation's start, and offers it to members that lack it.
    pub(super) fn take_state(&mut self, serving: &Serving<'_>, abort: &AbortHandle) -> Served<()> {
        let Formation { start, source, .. } = serving.formation;
        match source {
            Source::Peers { holders } => self.take_from_peers(serving, holders, abort),
            Source::Seed => {
                let is_there = |held: &Held| {
                    let State { layout, cover, .. } = held.engine.state();
                    held.step == *start && serving.needs(layout.blocks()).without(cover).is_empty()
                };
                if self.held.as_ref().is_some_and(is_there) { Ok(()) } else { self.hold_seed() }
            }
            Source::Checkpoint { step } => self.load(serving, *step, abort),
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
                held.enter(plan);
            }
            let cover = serving.needs(held.engine.state().layout.blocks());
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
        let plan = schedule.at(start.0);
        let grown = plan.as_ref().and_then(|plan| plan.upcycle).map(|upcycle| upcycle.layers);
        let standing = self.held.as_ref().map_or(Standing::Nothing, |held| held.standing(*start));
        let all_hold = holders.len() == members.len();
        if all_hold && !may_share {
            return Ok(());
        }
        // Some holders may have begun this step in a ring that broke: what a stage does before its first step is then done to
        // the state of all, once more where it was. A stack grows where all moments are.
        if let (Standing::Here, Some(plan), Some(held)) = (standing, &plan, &mut self.held)
            && (grown.is_none() || held.engine.state().cover.is_all())
        {
            held.enter(plan);
        }
        if standing == Standing::Here || may_share {
            self.offer(serving.formation, standing, plan.as_ref(), !all_hold || grown.is_some());
        }
        let is_whole = |held: &Held| {
            let State { layout, cover, .. } = held.engine.state();
            grown.is_none_or(|grown| layout.layers() as u32 == grown)
                && serving.needs(layout.blocks()).without(cover).is_empty()
        };
        if standing == Standing::Here && self.held.as_ref().is_some_and(is_whole) {
            return Ok(());
        }
        let own = members[serving.rank].worker;
        let peers = members.iter().filter(|member| member.worker != own);
        let asked = peers
            .filter(|member| may_share || holders.contains(&member.worker))
            .map(|member| (member.worker, member.endpoints.peers.clone()));
        let (ids, addresses): (Vec<WorkerId>, Vec<String>) = asked.unzip();
        let circle = Circle::new(addresses, self.tls.as_ref(), self.silence, *generation, *start);
        let cause = |Failed { unreachable, reason }: Failed| match unreachable {
            Some(at) => Cause::Unreachable { peer: ids[at], reason },
            None => broken(None, reason),
        };
        let heads = self.runtime.block_on(circle.heads(abort)).map_err(cause)?;
        let gathering = self.gathering(serving, standing, grown, &heads)?;
        let (asked, blocks) = (gathering.asked.clone(), gathering.layout.blocks());
        let gathered = self.runtime.block_on(circle.gather(asked, blocks, abort));
        let gathered = gathered.map_err(cause)?;
        tracing::info!(%generation, step = %start, bytes = gathered.bytes(), "took state from peers");
        self.hold(*start, standing, gathering, &gathered);
        if let (Some(plan), Some(held)) = (&plan, &mut self.held) {
            held.enter(plan);
        }
        Ok(())
    }

    /// What to ask of whom. Where the stack is about to grow, some may have grown it already: who has it all in one size or the
    /// other is asked.
    fn gathering(
        &self,
        serving: &Serving<'_>,
        standing: Standing,
        grown: Option<u32>,
        heads: &[Head],
    ) -> Served<Gathering> {
        let state =
            self.held.as_ref().filter(|_| standing != Standing::Nothing).map(|held| held.engine.state());
        let own_layers = state.map(|state| state.layout.layers() as u32);
        let has_some = |head: &&Head| head.weights || !head.cover.is_empty();
        let mut sizes: Vec<u32> =
            heads.iter().filter(has_some).map(|head| head.layers).chain(own_layers).collect();
        sizes.sort_unstable_by_key(|layers| (Some(*layers) != grown, *layers));
        sizes.dedup();
        for layers in sizes {
            let layout = Layout::new(&self.config.model, layers);
            let blocks = layout.blocks();
            let own = state.filter(|state| state.layout.layers() as u32 == layers);
            let have = match (own, self.held.as_ref().and_then(|held| held.pending.as_ref())) {
                (Some(_), Some(pending)) if standing == Standing::Next => pending.prepared.cover.clone(),
                (Some(state), _) => state.cover.clone(),
                (None, _) => Cover::none(blocks),
            };
            let weights = own.is_none() || standing != Standing::Here;
            let needs = match grown {
                Some(grown) if grown != layers => Cover::all(blocks),
                _ => serving.needs(blocks),
            };
            let fits = |head: &Head| head.layers == layers && head.cover.of_blocks() == blocks;
            let fit: Vec<(usize, &Head)> =
                heads.iter().enumerate().filter(|(_, head)| has_some(head) && fits(head)).collect();
            let Some(asked) = share_out(&fit, blocks, weights, &needs.without(&have)) else { continue };
            let Some((_, first)) = fit.first() else { continue };
            if fit.iter().any(|(_, head)| head.updates != first.updates) {
                return Err(fault("two peers hold states of different kinds"));
            }
            let with_weights = fit.iter().find(|(_, head)| head.weights);
            let told = with_weights.map(|(_, head)| (head.cursors.clone(), head.losses.clone()));
            let (cursors, losses) = told.unwrap_or_default();
            return Ok(Gathering {
                layout,
                weights,
                asked,
                updates: first.updates,
                cursors,
                losses,
                cover: have.and(&needs),
            });
        }
        Err(fault("some moments of the state that the generation starts from are nowhere"))
    }

    /// Puts what was gathered together with what is here.
    fn hold(&mut self, start: Step, standing: Standing, gathering: Gathering, gathered: &Gathered) {
        let Gathering { layout, weights: with_weights, asked: _, updates, cursors, losses, cover } =
            gathering;
        let moments = gathered.moments.iter();
        let others: Vec<(usize, [Tensor; 2])> = moments
            .map(|(first, both)| (*first, both.each_ref().map(|bytes| flat(bytes, self.device))))
            .collect();
        let weights = with_weights.then(|| flat(&gathered.weights, self.device));
        let has_some = |held: &&mut Held| held.engine.state().layout.layers() == layout.layers();
        match (self.held.as_mut().filter(|_| standing != Standing::Nothing).filter(has_some), weights) {
            (Some(held), None) => held.engine.set_cover(cover, &others),
            (Some(held), Some(weights)) => {
                let Pending { prepared, cursors } = held.pending.take().expect("who is next has it");
                held.engine.complete(prepared, &weights);
                held.engine.set_cover(cover, &others);
                (held.step, held.cursors, held.entered) = (start, cursors, false);
            }
            (None, weights) => {
                let weights = weights.expect("who has no state asks for weights");
                let mut state = State::new(layout, weights);
                (state.updates, state.losses) = (updates, losses);
                let none = Cover::none(state.layout.blocks());
                let state = state.with_cover(none, &[]).with_cover(cover, &others);
                let engine = Engine::with_state(&self.config, state);
                self.held = Some(Held::new(engine, start, cursors));
            }
        }
    }

    /// Lays what this worker has on the shelf, as it is after the generation's start: copies, since the step that comes next
    /// changes it.
    fn offer(
        &self,
        formation: &Formation,
        standing: Standing,
        plan: Option<&StepPlan<'_>>,
        with_weights: bool,
    ) {
        let mut offered = HostState {
            generation: formation.generation,
            step: formation.start,
            updates: 0,
            layers: 0,
            cursors: Vec::new(),
            losses: Vec::new(),
            weights: None,
            cover: Cover::none(0),
            moments: [Vec::new(), Vec::new()],
        };
        if let Some(held) = self.held.as_ref().filter(|_| standing != Standing::Nothing) {
            let state = held.engine.state();
            offered.layers = state.layout.layers() as u32;
            offered.cover = state.cover.clone();
            offered.updates = state.updates;
            offered.moments = [&state.exp_avg, &state.exp_avg_sq].map(host);
            match &held.pending {
                Some(pending) if standing == Standing::Next => {
                    let mut ahead = state.copy();
                    ahead.complete(&pending.prepared, None);
                    offered.cover = ahead.cover.clone();
                    if plan.is_some_and(|plan| plan.reset_optimizer) {
                        ahead.reset_moments();
                    }
                    offered.updates = ahead.updates;
                    offered.moments = [&ahead.exp_avg, &ahead.exp_avg_sq].map(host);
                }
                _ => {
                    (offered.cursors, offered.losses) = (held.cursors.clone(), state.losses.clone());
                    offered.weights = with_weights.then(|| host(&state.weights));
                }
            }
        }
        *self.shelf.write().expect("no holder panics") = Some(Arc::new(offered));
    }

    /// Makes this worker hold what the run begins with.
    pub(super) fn hold_seed(&mut self) -> Served<()> {
        let state = initial_state(&self.config, self.device).map_err(|error| fault(error.to_string()))?;
        let engine = Engine::with_state(&self.config, state);
        let cursors = vec![Cursor::default(); self.config.lanes as usize];
        self.held = Some(Held::new(engine, Step(0), cursors));
        Ok(())
    }

    /// Makes this worker hold what it needs of the state of a checkpoint.
    pub(super) fn load(&mut self, serving: &Serving<'_>, step: Step, abort: &AbortHandle) -> Served<()> {
        let grows = self.schedule.at(step.0).is_some_and(|plan| plan.upcycle.is_some());
        let cover = |layout: &Layout| match grows {
            true => Cover::all(layout.blocks()),
            false => serving.needs(layout.blocks()),
        };
        let loaded = patiently(abort, "a checkpoint cannot be read now", || {
            checkpoint::load_shard(&self.store, step.0, &self.config.model, self.device, cover)
        })?;
        let loaded = loaded.map_err(|damaged| Cause::NoState { reason: damaged.to_string() })?;
        let mut engine = Engine::with_state(&self.config, loaded.state);
        if self.changed_at(abort)? == Some(step.0) {
            // As the process did that made the change.
            engine.forget_losses();
        }
        self.held = Some(Held::new(engine, step, loaded.manifest.cursors));
        Ok(())
    }

    /// Steps that were applied when the mathematics of the run last changed.
    pub(super) fn changed_at(&self, abort: &AbortHandle) -> Served<Option<u64>> {
        let records = patiently(abort, "the log cannot be read now", || Ok(events::read(&self.store)?))?;
        Ok(events::changed_at(&records.map_err(|error| fault(error.to_string()))?))
    }

    /// Makes the state that is held that which the step of `plan` begins with, and lets go of moments that this member does
    /// not need.
    pub(super) fn begin_at(&mut self, plan: &StepPlan<'_>, serving: &Serving<'_>) {
        let held = self.held.as_mut().expect("state was taken");
        held.enter(plan);
        if serving.shared {
            let cover = serving.needs(held.engine.state().layout.blocks());
            held.engine.set_cover(cover, &[]);
        }
    }

    /// Copies this worker's blocks, and a second time those of the next member, and hands them to the writer.
    pub(super) fn snapshot(&mut self, serving: &Serving<'_>) {
        let _span = tracing::trace_span!("checkpoint").entered();
        self.writer.wait();
        let members = &serving.formation.members;
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

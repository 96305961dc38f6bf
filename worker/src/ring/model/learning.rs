//! Members that get the state while the others train: what a learner begins with, and what the others lend it.
//!
//! ```text
//!                          has after a step                                              then, at a boundary
//! all moments with all     what was sent between two updates, until that is everything   lanes
//! moments shared out       all weights, of the first step's spread, and the moments of   lanes
//!                          its share to be, as they were sent between two updates
//! ```
//! Where moments are shared out, all shares are cut anew when a learner is given lanes. What the others will need then that they do
//! not have is sent to them meanwhile, too, so that nobody waits for moments at that boundary.

use super::state::cause_of_failure;
use super::*;
use tokio::task::JoinHandle;

use crate::ring::circle::{Circle, Failed, Head, Rows};
use crate::ring::learner::{Learner, Piece};

/// What a learner knows of the state before it has met the others.
pub(super) struct ToLearn {
    head: Head,
    /// Those that have it, and their names.
    circle: Circle,
    ids: Vec<WorkerId>,
}

impl ToLearn {
    /// Layers of the stack.
    pub fn layers(&self) -> u32 {
        self.head.layers
    }
}

/// Moments that come to this worker while it trains, or learns, with others: those of its share once the learners have lanes.
pub(super) struct Share {
    learner: Learner,
    ids: Vec<WorkerId>,
}

/// A state that comes to this worker while the others train, and the figures of its steps after it.
pub(super) struct Learning {
    state: Coming,
    circle: Circle,
    ids: Vec<WorkerId>,
    /// Of steps before the state was here; from there on this worker has its own.
    figures: Option<JoinHandle<std::result::Result<Rows, Failed>>>,
    /// Why they do not come.
    failed: Option<Failed>,
}

/// How it comes.
enum Coming {
    /// Block by block, as it is between two updates.
    Sent(Learner),
    /// With the step after this one, which spreads all weights to all members.
    Spread(Step),
    /// It is here.
    Here,
}

impl Learning {
    fn new(state: Coming, circle: Circle, ids: Vec<WorkerId>) -> Self {
        Self { state, circle, ids, figures: None, failed: None }
    }

    /// The state is here, from elsewhere.
    pub fn has_all(&mut self) {
        self.state = Coming::Here;
    }

    /// Asks one of those that have them for the figures of the steps before `end`, from `first` on.
    fn ask_for_figures(&mut self, runtime: &tokio::runtime::Handle, first: u64, end: u64) {
        let (circle, at) = (self.circle.clone(), end as usize % self.circle.len());
        self.figures = Some(runtime.spawn(async move { circle.rows(at, first, end).await }));
    }

    /// They, once they are here.
    fn figures(&mut self, runtime: &tokio::runtime::Handle) -> Option<Rows> {
        let task = self.figures.take_if(|task| task.is_finished())?;
        match runtime.block_on(task).unwrap_or_else(|cause| Err(Failed::from(cause.to_string()))) {
            Ok(rows) => Some(rows),
            Err(failed) => {
                self.failed = Some(failed);
                None
            }
        }
    }
}

impl Thread {
    /// Whether learners of a generation that begins after `start` can get the state while the others train. In the first step a stack
    /// grows, and moments of what is frozen go; and where the weights are spread by steps, those come that the steps move.
    pub(super) fn can_learn_from(&self, start: Step, shared: bool) -> bool {
        let Some(plan) = self.schedule.at(start.0) else { return true };
        plan.upcycle.is_none() && !lets_go(&plan) && (plan.stage.moves_all() || !shared)
    }

    /// Asks those that hold the state for its form. The buffers are made once all have met, while the others compute: what the
    /// ring waits for does not depend on the size of the model.
    pub(super) fn ask_what_to_learn(
        &mut self,
        serving: &Serving<'_>,
        holders: &[WorkerId],
        abort: &AbortHandle,
    ) -> Served<()> {
        let (circle, ids) = self.circle(serving, serving.formation.start, |worker| holders.contains(&worker));
        let heads = self.runtime.block_on(circle.heads(abort));
        let mut heads = heads.map_err(|failed| cause_of_failure(failed, &ids))?;
        let Some(head) = heads.pop() else {
            return Err(fault("a generation has learners, and nobody who holds the state"));
        };
        let is_alike = |other: &Head| {
            let form = |head: &Head| (head.updates, head.layers, head.cover.of_blocks());
            form(other) == form(&head) && other.cursors == head.cursors && other.losses == head.losses
        };
        if !heads.iter().all(is_alike) {
            return Err(fault("two peers hold states of different kinds"));
        }
        // Nothing of what was held before is needed, and there may not be room for both.
        self.held = None;
        self.to_learn = Some(ToLearn { head, circle, ids });
        Ok(())
    }

    /// Makes this worker hold a state of the right form, of which each block is to come: from the generation's start on it
    /// takes part in all updates.
    fn begin_to_learn(&mut self, start: Step, to_learn: ToLearn, shared: bool) {
        let ToLearn { head: Head { updates, layers, cursors, losses, moved, .. }, circle, ids } = to_learn;
        let layout = Layout::new(&self.config.model, layers);
        let blocks = layout.blocks();
        let weights = layout.zeros(self.device);
        let cover = if shared { Cover::none(blocks) } else { Cover::all(blocks) };
        let mut state = State::at_zero(layout, weights, cover, moved);
        (state.updates, state.losses) = (updates, losses);
        let mut engine = self.engine(state);
        engine.make_room(self.schedule.at(start.0));
        let coming = if shared {
            Coming::Spread(start)
        } else {
            let live = Arc::new(Live::new(start, engine.state(), 0..blocks));
            let all: Vec<usize> = (0..ids.len()).collect();
            let pieces = Piece::all_of(0..blocks, &all);
            let mut learner = Learner::new(Arc::clone(&live), circle.clone(), pieces);
            learner.begin(&self.runtime);
            self.live = Some(live);
            Coming::Sent(learner)
        };
        self.learning = Some(Learning::new(coming, circle, ids));
        self.held = Some(Held::new(engine, start, cursors));
        tracing::info!(step = %start, blocks, "is sent the state while the others train");
    }

    /// The ring has met: who has the state lends it to those that learn, and these begin to ask for its blocks.
    pub(super) fn lend(&mut self, serving: &Serving<'_>) {
        let Formation { generation, start, members, .. } = serving.formation;
        if let Some(to_learn) = self.to_learn.take() {
            self.begin_to_learn(*start, to_learn, serving.shared);
        } else if serving.trainers < members.len()
            && !serving.learns()
            && !serving.shared
            && serving.meanwhile
        {
            let engine = &mut self.held.as_mut().expect("state was taken").engine;
            // What is lent keeps its place in memory while it is lent.
            engine.make_room(self.schedule.at(start.0));
            let live = Arc::new(Live::new(*start, engine.state(), 0..0));
            self.shelf.lend(*generation, Arc::clone(&live), self.config.ring.state_bandwidth);
            self.live = Some(live);
        }
    }

    /// Makes room for the moments that this member will need when the learners are given lanes, asks for them, and lends its own: where
    /// moments are shared out, and learners get the state while the others train.
    pub(super) fn grow_share(&mut self, serving: &Serving<'_>) {
        let Formation { generation, start, members, .. } = serving.formation;
        if !serving.shared || serving.trainers == members.len() || !serving.meanwhile {
            return;
        }
        let (circle, ids) = self.circle(serving, *start, |_| true);
        let held = self.held.as_mut().expect("state was taken");
        held.engine.make_room(self.schedule.at(start.0));
        let State { cover: have, moved, .. } = held.engine.state();
        let (have, moved) = (have.clone(), moved.clone());
        let grows = Cover::of_rank(have.of_blocks(), members.len(), serving.rank).without(&have);
        let room = |range: &Range<usize>| {
            let zeros = || Tensor::zeros([(range.len() * BLOCK) as i64], (Kind::Float, self.device));
            (range.start, [zeros(), zeros()])
        };
        held.engine.set_cover(have.and(&grows), &grows.ranges().iter().map(room).collect::<Vec<_>>());
        let grows = grows.within(&moved);
        let live = Arc::new(Live::lacking_moments(*start, held.engine.state(), &grows));
        self.shelf.lend(*generation, Arc::clone(&live), self.config.ring.state_bandwidth);
        let mut learner = Learner::new(Arc::clone(&live), circle, pieces(&grows, serving, &ids).into_iter());
        learner.begin(&self.runtime);
        (self.live, self.share) = (Some(live), Some(Share { learner, ids }));
    }

    /// Hands out nothing any more, and asks for nothing. What a learner has by now that lacks blocks is no state.
    pub(super) fn lend_no_more(&mut self) {
        self.shelf.clear();
        self.to_learn = None;
        if !self.holds_all() {
            (self.learning, self.held) = (None, None);
        }
        let missing = self.live.take().map(|live| live.close());
        if let (Some(_), Some(missing), Some(held)) = (self.share.take(), missing, &mut self.held) {
            held.missing = missing;
            // What was made ready of a step has room for them too, and is needed as it is.
            if held.pending.is_none() {
                held.drop_missing();
            }
        }
    }

    /// Between two steps: see [`Learner::keep_up`].
    pub(super) fn keep_up(&self, serving: &Serving<'_>) -> Served<()> {
        if let Some(Share { learner, ids }) = &self.share {
            learner.keep_up(serving.abort).map_err(|failed| cause_of_failure(failed, ids))?;
        }
        let Some(learning) = &self.learning else { return Ok(()) };
        let kept = match (&learning.failed, &learning.state) {
            (Some(failed), _) => Err(failed.clone()),
            (None, Coming::Sent(learner)) => learner.keep_up(serving.abort),
            (None, Coming::Spread(_) | Coming::Here) => Ok(()),
        };
        kept.map_err(|failed| cause_of_failure(failed, &learning.ids))
    }

    /// Whether all that this worker is to hold of the state after the steps that it has applied is here: to a learner it comes. From
    /// the step on, after which it is, this worker has its own figures, and it asks for those before.
    pub(super) fn is_whole(&mut self) -> bool {
        let Some(learning) = &mut self.learning else { return true };
        let step = self.held.as_ref().map(|held| held.step);
        let is_through = match &learning.state {
            Coming::Sent(learner) => learner.is_through(),
            Coming::Spread(start) => step > Some(*start),
            Coming::Here => true,
        };
        if !is_through || learning.figures.is_some() || learning.failed.is_some() {
            return is_through;
        }
        if let Coming::Sent(_) = learning.state {
            self.live = None;
        }
        learning.has_all();
        let held = self.held.as_mut().expect("it takes part in updates");
        held.engine.take_up_weights();
        // Room for the first gradient, made while the others compute and nobody waits for this worker.
        let room = held.engine.state().layout.zeros(self.device);
        held.engine.recycle(room);
        let first = self.rows.lock().expect("no holder panics").known();
        learning.ask_for_figures(&self.runtime, first, held.step.0.saturating_sub(1));
        true
    }

    /// Whether others may have the state after the steps that this worker has applied from it: it is here, and with it the figures of
    /// all steps before, and its share of the moments where they are shared out.
    pub(super) fn holds_all(&mut self) -> bool {
        let Some(learning) = &mut self.learning else { return true };
        if self.share.as_ref().is_some_and(|share| !share.learner.is_through()) {
            return false;
        }
        let Some(rows) = learning.figures(&self.runtime) else { return false };
        self.learning = None;
        let held = self.held.as_ref().expect("it takes part in updates");
        tracing::info!(step = %held.step, "holds the state that it was sent");
        self.took(rows);
        true
    }

    /// Figures came with a state. What is in the log with them is not told once more.
    pub(super) fn took(&mut self, rows: Rows) {
        let events = rows.rows.iter().flat_map(|row| &row.events);
        let events = events.filter_map(|text| serde_json::from_str(text).ok()).collect();
        self.told.get_or_insert_default().not_told(events);
        let _ = self.tell.send(Told::Took(rows));
    }
}

/// Of whom in a generation to ask for the moments of some blocks: those that train have the blocks of their shares.
fn pieces(blocks: &Cover, serving: &Serving<'_>, ids: &[WorkerId]) -> Vec<Piece> {
    let Formation { members, .. } = serving.formation;
    let shares = |rank| Cover::of_rank(blocks.of_blocks(), serving.trainers, rank);
    let has: Vec<(usize, Cover)> = (0..serving.trainers)
        .filter_map(|rank| Some((ids.iter().position(|id| *id == members[rank].worker)?, shares(rank))))
        .collect();
    let mut pieces: Vec<Piece> = Vec::new();
    for block in blocks.ranges().iter().cloned().flatten() {
        let able = has.iter().filter(|(_, cover)| cover.place(block..block + 1).is_some());
        let peers: Vec<usize> = able.map(|(at, _)| *at).collect();
        match pieces.last_mut().filter(|last| last.blocks.end == block && last.peers == peers) {
            Some(last) => last.blocks.end += 1,
            None => pieces.push(Piece { blocks: block..block + 1, peers }),
        }
    }
    pieces
        .into_iter()
        .flat_map(|piece| Piece::all_of(piece.blocks, &piece.peers).collect::<Vec<_>>())
        .collect()
}

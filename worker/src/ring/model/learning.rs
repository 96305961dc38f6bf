//! Members that get the state while the others train: what a learner begins with, and what the others lend it.
//!
//! ```text
//!                          has after a step                                              then, at a boundary
//! all moments with all     what was sent between two updates, until that is everything   lanes
//! moments shared out       all weights, of the first step's spread; no moments           lanes, and the moments of its share
//! ```

use super::state::cause_of_failure;
use super::*;
use crate::ring::circle::{Circle, Failed, Head};
use crate::ring::learner::Learner;

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

/// How a state comes to this worker while the others train.
pub(super) enum Learning {
    /// Block by block, as it is between two updates.
    Sent(Learner),
    /// With the step after this one, which spreads all weights to all members.
    Spread(Step),
}

impl Thread {
    /// Whether learners of a generation that begins after `start` can get the state while the others train. A stack grows in the
    /// first step; and where the weights are spread by steps, those come that the steps move.
    pub(super) fn can_learn_from(&self, start: Step, shared: bool) -> bool {
        let Some(plan) = self.schedule.at(start.0) else { return true };
        let layout = Layout::new(&self.config.model, self.config.model.layers);
        let moves_all = layout.moved(plan.stage.trains, plan.stage.loss) == (0..layout.len());
        plan.upcycle.is_none() && (moves_all || !shared)
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
        let ToLearn { head: Head { updates, layers, cursors, losses, .. }, circle, ids } = to_learn;
        let layout = Layout::new(&self.config.model, layers);
        let blocks = layout.blocks();
        let weights = layout.zeros(self.device);
        let make = if shared { State::without_moments } else { State::new };
        let mut state = make(layout, weights);
        (state.updates, state.losses) = (updates, losses);
        self.learning = Some(if shared {
            Learning::Spread(start)
        } else {
            let live = Arc::new(Live::new(start, &state, 0..blocks));
            let mut learner = Learner::new(Arc::clone(&live), circle, ids);
            learner.begin(&self.runtime);
            self.live = Some(live);
            Learning::Sent(learner)
        });
        let engine = Engine::with_state(&self.config, state);
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
            let state = self.held.as_ref().expect("state was taken").engine.state();
            let live = Arc::new(Live::new(*start, state, 0..0));
            self.shelf.lend(*generation, Arc::clone(&live), self.config.ring.state_bandwidth);
            self.live = Some(live);
        }
    }

    /// Hands out nothing any more, and asks for nothing. What a learner has by now that lacks blocks is no state.
    pub(super) fn lend_no_more(&mut self) {
        self.shelf.clear();
        self.to_learn = None;
        if !self.holds_all() {
            (self.learning, self.held) = (None, None);
        }
        self.live = None;
    }

    /// Between two steps: see [`Learner::keep_up`].
    pub(super) fn keep_up(&self, serving: &Serving<'_>) -> Served<()> {
        let Some(Learning::Sent(learner)) = &self.learning else { return Ok(()) };
        let kept = learner.keep_up(serving.abort);
        kept.map_err(|failed: Failed| cause_of_failure(failed, learner.ids()))
    }

    /// Whether this worker holds what it is to hold of the state after the steps that it has applied: a learner does once all of
    /// that has come.
    pub(super) fn holds_all(&mut self) -> bool {
        let is_through = match &self.learning {
            None => true,
            Some(Learning::Sent(learner)) => learner.is_through(),
            Some(Learning::Spread(start)) => self.held.as_ref().is_some_and(|held| held.step > *start),
        };
        if !is_through {
            return false;
        }
        if self.learning.take().is_some() {
            self.live = None;
            let held = self.held.as_mut().expect("it takes part in updates");
            held.engine.take_up_weights();
            // Room for the first gradient, made while the others compute and nobody waits for this worker.
            let room = held.engine.state().layout.zeros(self.device);
            held.engine.recycle(room);
            tracing::info!(step = %held.step, "holds the state that it was sent");
        }
        true
    }
}

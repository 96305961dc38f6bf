//! Going back after a loss spike, all members together (see [`crate::rollback`] for what it comes to).
//!
//! ```text
//! all agree on a checkpoint ▸ each reads some of it ▸ all could? ▸ each has the rest of the others ▸ all have it
//!                         ▲                              │ no
//!                         └────────── an older one ◀─────┘        ▸ the steps from there on, once more, by this very ring
//! ```
//! Nothing is reported of these steps: they are on record. A ring that breaks meanwhile has no state worth holding, so the
//! next one begins from the newest checkpoint and comes to the same spike.

use anello_store::checkpoint::steps;

use super::state::patiently;
use super::*;
use crate::rollback::Rollback;

impl Thread {
    /// Makes this worker hold, after the step of `plan` that came to a spike, the state after `to` steps, with no losses
    /// to measure by. All members call it in the same step.
    pub(super) fn go_back(
        &mut self,
        plan: &StepPlan<'_>,
        to: u64,
        serving: &Serving<'_>,
        ring: &mut tcp::Tcp,
        gpus: Option<&mut Gpus>,
    ) -> Served<()> {
        let _span = tracing::trace_span!("roll back", to).entered();
        // Then there are the newest checkpoints, and nothing else is asked of the store.
        self.writer.wait();
        let cursors = self.held.as_ref().expect("state was taken").cursors.clone();
        // All that comes is of another state. Who learns has this one from the store, as all have.
        (self.live, self.share) = (None, None);
        if let Some(learning) = &mut self.learning {
            learning.has_all();
        }
        self.shelf.clear();
        if let Err(cause) = self.compute_again(plan.step, to, serving, ring, gpus) {
            self.held = None;
            return Err(cause);
        }
        let held = self.held.as_mut().expect("it was computed again");
        held.engine.forget_losses();
        held.advance(Step(plan.step + 1));
        held.cursors = cursors;
        Ok(())
    }

    fn compute_again(
        &mut self,
        spike: u64,
        to: u64,
        serving: &Serving<'_>,
        ring: &mut tcp::Tcp,
        mut gpus: Option<&mut Gpus>,
    ) -> Served<()> {
        let from = self.load_before(spike, to, serving, ring)?;
        tracing::info!(spike, to, from, "the loss is a spike: going back to the state before it");
        let schedule = self.schedule.clone();
        let plan_at = |step| schedule.at(step).expect("a step that was trained has a plan");
        let here = plan_at(spike);
        let fits = |step: u64| {
            let plan = plan_at(step);
            plan.stage.trains == here.stage.trains && (step == from || plan.upcycle.is_none())
        };
        if !(from..=spike).all(fits) {
            return self.compute_alone(&plan_at(to), serving);
        }
        self.begin_at(&plan_at(from), serving);
        let mut loader = match serving.lanes.is_empty() || from == to {
            true => None,
            false => Some(self.loader(&serving.lanes, from)?),
        };
        let on_the_way = AtomicU8::new(0);
        // What is ordered meanwhile is done after the step that came to the spike.
        let serving = Serving { lanes: serving.lanes.clone(), hold: &on_the_way, ..*serving };
        for step in from..to {
            if let Some(reason) = serving.abort.reason() {
                return Err(broken(None, reason.to_owned()));
            }
            self.step(&plan_at(step), &serving, ring, gpus.as_deref_mut(), loader.as_mut())?;
        }
        self.begin_at(&plan_at(to), &serving);
        Ok(())
    }

    /// The same without the others, where the only checkpoint that is old enough is of a stage before: what this ring adds up
    /// is another thing there.
    fn compute_alone(&mut self, plan: &StepPlan<'_>, serving: &Serving<'_>) -> Served<()> {
        tracing::warn!(
            to = plan.step,
            "no checkpoint of this stage is old enough: each worker computes alone"
        );
        let mut engine = self.held.take().expect("state was loaded").engine;
        let Self { store, config, schedule, data, .. } = self;
        let rollback = Rollback { store, config, schedule, data, known: None };
        rollback.undo(&mut engine, plan.step).map_err(|error| broken(None, error.to_string()))?;
        self.held = Some(Held::new(engine, Step(plan.step), Vec::new()));
        self.begin_at(plan, serving);
        Ok(())
    }

    /// Loads the newest state at or before `to` steps that all members can load; returns its steps.
    fn load_before(
        &mut self,
        spike: u64,
        to: u64,
        serving: &Serving<'_>,
        ring: &mut tcp::Tcp,
    ) -> Served<u64> {
        let mut newest = to;
        loop {
            let there =
                patiently(serving.abort, "the checkpoints cannot be listed now", || Ok(steps(&self.store)?))?;
            let known = there.map_or(0, |steps| steps.into_iter().rfind(|step| *step <= newest).unwrap_or(0));
            let all = exchange(ring, spike, &known.to_le_bytes(), serving)?;
            let from = all.iter().map(|known| number(known)).min().unwrap_or(0);
            if self.changed_at(serving)?.is_some_and(|changed| from < changed) {
                return Err(broken(None, Rollback::behind_a_change(from, newest)));
            }
            // Nothing of what was held is needed any more.
            self.held = None;
            let mut read = None;
            let damaged = if from == 0 {
                self.hold_seed()?;
                None
            } else if serving.formation.members.len() == 1 {
                match self.load(serving, Step(from), serving.abort) {
                    Err(Cause::NoState { reason }) => Some(reason),
                    result => result.map(|()| None)?,
                }
            } else {
                match self.read_share(serving, Step(from), serving.abort)? {
                    Ok(share) => {
                        read = Some(share);
                        None
                    }
                    Err(damaged) => Some(damaged.to_string()),
                }
            };
            if let Some(reason) = &damaged {
                tracing::warn!(step = from, reason, "trying the checkpoint before it");
            }
            // Whoever found its part damaged gives the others none: so nobody asks before all have theirs.
            let all = exchange(ring, spike, &[u8::from(damaged.is_none())], serving)?;
            if all.iter().all(|word| word == &[1]) {
                if let Some(share) = read {
                    self.gather_rest(serving, share, serving.abort)?;
                    exchange(ring, spike, &[1], serving)?;
                    self.shelf.clear();
                }
                return Ok(from);
            }
            newest = from.saturating_sub(1);
        }
    }
}

fn exchange(ring: &mut tcp::Tcp, step: u64, message: &[u8], serving: &Serving<'_>) -> Served<Vec<Vec<u8>>> {
    ring.exchange(RingStep(step), message).map_err(|error| cause_of(&error, serving.formation))
}

/// The number that a member said. What is none is the seed's: nobody has less.
fn number(word: &[u8]) -> u64 {
    word.try_into().map_or(0, u64::from_le_bytes)
}

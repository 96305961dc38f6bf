//! Going back after a loss spike: the state of some steps before, made again.
//!
//! ```text
//! state after step s  =  state after s − N steps, with no losses to measure by      when the loss of step s is a spike
//! ```
//! The number of the step goes on rising, and so does every lane's place in its data: the batches of the steps s − N to s
//! are left out of what is trained on from there. What was computed before stays on record as it was, and the state after
//! every step is a function of the steps before it alone, so a run that is killed, moved or audited comes to the same bits.
//! The state is computed again from the newest checkpoint that is old enough; which one that is changes no bit.
//!
//! Where the mathematics changed (`--allow`), losses are measured anew: there is no spike before half a window, which is no
//! less than what a run goes back. So nothing before the change is needed, and nothing before it is computed with a config
//! that is not its own.

use anello_configs::{RunConfig, Schedule};
use anello_dataloader::{Loader, LoaderOptions};
use anello_store::checkpoint::known_steps;
use anello_store::{Cursor, Error as StoreError, Store, events};

use crate::checkpoint::{self, Loaded};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::init::initial_state;
use crate::optimizer::State;

/// A run that one process computes alone, as far as it is needed to go back in it.
pub(crate) struct Rollback<'a> {
    pub store: &'a Store,
    pub config: &'a RunConfig,
    pub schedule: &'a Schedule,
    pub data: &'a LoaderOptions,
    /// A state that may be begun from besides the checkpoints.
    pub known: Option<&'a Known>,
}

/// A state of the run in memory.
pub(crate) struct Known {
    /// Steps applied.
    pub step: u64,
    pub state: State,
    /// Of all lanes.
    pub cursors: Vec<Cursor>,
}

impl Rollback<'_> {
    /// Undoes a spike: makes the state of `engine` that after `to` steps, with no losses to measure by.
    pub fn undo(&self, engine: &mut Engine, to: u64) -> Result<()> {
        let _span = tracing::trace_span!("roll back", to).entered();
        let (from, cursors) = self.begin(engine, to)?;
        tracing::info!(to, from, "the loss is a spike: going back to the state before it");
        let options = LoaderOptions { start_step: from, cursors, ..self.data.clone() };
        let mut loader = if from < to { Some(Loader::open(options)?) } else { None };
        for step in from..to {
            let plan = self.schedule.at(step).expect("a step that was trained has a plan");
            engine.enter(&plan);
            for lane in 0..self.config.lanes {
                let loader = loader.as_mut().expect("there are steps to compute again");
                let lane_step = loader.next().expect("the loader has the same schedule")?;
                assert_eq!((lane_step.step, lane_step.lane), (step, lane), "the loader serves another step");
                engine.lane(plan.stage, lane, &lane_step.micro_batches);
            }
            if let Some(to) = engine.finish(&plan).back_to {
                self.undo(engine, to)?;
            }
        }
        // What a stage does before its first step belongs to what it begins with.
        engine.enter(&self.schedule.at(to).expect("a step that was trained has a plan"));
        engine.forget_losses();
        Ok(())
    }

    /// Why nothing is computed again from the state after `from` steps: the steps up to a change were of another config.
    pub fn behind_a_change(from: u64, to: u64) -> String {
        format!(
            "the state after {to} steps cannot be made again: the newest state before it that can be had is that after \
             {from} steps, and since then the mathematics changed (--allow)"
        )
    }

    /// Gives `engine` the newest state at or before `to` steps that can be had; returns its steps and cursors.
    fn begin(&self, engine: &mut Engine, to: u64) -> Result<(u64, Option<Vec<Cursor>>)> {
        let known = self.known.filter(|known| known.step <= to);
        let device = engine.state().weights.device();
        let changed = events::changed_at(self.store)?.filter(|changed| *changed <= to).unwrap_or(0);
        for step in known_steps(self.store)?.into_iter().rev().filter(|step| *step <= to) {
            if step < changed || known.is_some_and(|known| known.step >= step) {
                break;
            }
            match checkpoint::load(self.store, step, &self.config.model, device) {
                Ok(Loaded { manifest, state }) => {
                    engine.load_state(state);
                    return Ok((step, Some(manifest.cursors)));
                }
                Err(damaged @ Error::Store(StoreError::Checkpoint { .. })) => {
                    tracing::warn!(step, %damaged, "a checkpoint cannot be used; trying the one before it");
                }
                Err(other) => return Err(other),
            }
        }
        if let Some(known) = known.filter(|known| known.step >= changed) {
            engine.load_state(known.state.copy());
            return Ok((known.step, Some(known.cursors.clone())));
        }
        if changed > 0 {
            let remedy =
                "set guard.on_spike=skip with --allow, or resume from what a copy of the checkpoints has";
            return Err(Error::config(Self::behind_a_change(0, to), remedy));
        }
        engine.load_state(initial_state(self.config, device)?);
        Ok((0, None))
    }
}

//! A checkpoint as what a generation begins with, or goes back to after a spike: read by all members together.
//!
//! ```text
//! each reads some parts ▸ lays them on the shelf ▸ gathers what the others read ▸ checks it against the manifest
//! ```
//! So a byte of a checkpoint leaves the store once, however many begin with it.

use anello_store::checkpoint::{BUFFERS, Manifest};
use anello_store::events;

use super::state::{Gathering, Standing, cause_of_failure, patiently};
use super::*;
use crate::checkpoint;
use crate::cover::{Cover, both};
use crate::ring::circle::{Failed, Head, share_out};
use crate::ring::peers::{From, Offered};

/// What this worker has read of a checkpoint: it is on the shelf.
pub(super) struct OnShelf {
    manifest: Manifest,
    layout: Layout,
    blocks: Range<usize>,
    state: Arc<Offered>,
    /// Bytes that the store was asked for.
    read_bytes: u64,
}

impl Thread {
    /// Makes this worker hold what it needs of the state of a checkpoint, all of which it reads.
    pub(super) fn load(&mut self, serving: &Serving<'_>, step: Step, abort: &AbortHandle) -> Served<()> {
        let cover = |layout: &Layout| self.needs_at(serving, step, layout.blocks());
        let loaded = patiently(abort, "a checkpoint cannot be read now", || {
            checkpoint::load_shard(&self.store, step.0, &self.config.model, self.device, cover)
        })?;
        let loaded = loaded.map_err(|damaged| Cause::NoState { reason: damaged.to_string() })?;
        let engine = self.engine(loaded.state);
        self.held = Some(Held::new(engine, step, loaded.manifest.cursors));
        self.measure_anew(step, serving)
    }

    /// [`Thread::load`] of a generation's start: each member reads some parts, and has the other blocks of those that read them.
    pub(super) fn load_together(
        &mut self,
        serving: &Serving<'_>,
        step: Step,
        abort: &AbortHandle,
    ) -> Served<()> {
        let read = self.read_share(serving, step, abort)?;
        let read = read.map_err(|damaged| Cause::NoState { reason: damaged.to_string() })?;
        self.gather_rest(serving, read, abort)
    }

    /// Reads the parts of a checkpoint that fall to this member, and lays them on the shelf. The error within is that of a
    /// checkpoint that is damaged.
    pub(super) fn read_share(
        &self,
        serving: &Serving<'_>,
        step: Step,
        abort: &AbortHandle,
    ) -> Served<Result<OnShelf>> {
        let before = self.store.traffic().read_bytes;
        let share = patiently(abort, "a checkpoint cannot be read now", || {
            let (model, of) = (&self.config.model, serving.formation.members.len());
            checkpoint::load_share(&self.store, step.0, model, serving.rank, of)
        })?;
        let read_bytes = self.store.traffic().read_bytes - before;
        let checkpoint::Share { manifest, layout, blocks, buffers } = match share {
            Ok(share) => share,
            Err(damaged) => return Ok(Err(damaged)),
        };
        let own = Cover::of([blocks.clone()], layout.blocks());
        let state = Arc::new(Offered {
            generation: serving.formation.generation,
            step,
            updates: manifest.updates,
            layers: manifest.layers,
            cursors: manifest.cursors.clone(),
            losses: manifest.losses.clone(),
            weights: own.clone(),
            moments: own,
            moved: manifest.moved(),
            from: From::Checkpoint(buffers),
        });
        self.shelf.lay(Arc::clone(&state));
        Ok(Ok(OnShelf { manifest, layout, blocks, state, read_bytes }))
    }

    /// Makes this worker hold the state of which it has `read` its share, with the rest from the others, who are waited for.
    pub(super) fn gather_rest(
        &mut self,
        serving: &Serving<'_>,
        read: OnShelf,
        abort: &AbortHandle,
    ) -> Served<()> {
        let OnShelf { manifest, layout, blocks, state, read_bytes } = read;
        let (step, own, all) = (state.step, &state.weights, layout.blocks());
        let (circle, ids) = self.circle(serving, step, |_| true);
        let cause = |failed: Failed| cause_of_failure(failed, &ids);
        let heads = self.runtime.block_on(circle.heads(abort)).map_err(cause)?;
        let fits = |head: &Head| head.layers == manifest.layers && head.cover.of_blocks() == all;
        let able: Vec<(usize, &Head)> = heads.iter().enumerate().filter(|(_, head)| fits(head)).collect();
        let needs = self.needs_at(serving, step, all);
        let moved = state.moved.clone();
        let (lacks, lacks_moments) = (Cover::all(all).without(own), needs.without(own).within(&moved));
        let asked = share_out(&able, &lacks, &lacks_moments)
            .ok_or_else(|| fault("some blocks of the checkpoint were read by nobody"))?;
        let mut gathered = self.runtime.block_on(circle.gather(asked.clone(), abort)).map_err(cause)?;
        if let Some((buffer, block)) =
            gathered.wrong(|buffer, block, bytes| manifest.has(buffer, block, bytes))
        {
            let name = BUFFERS[buffer];
            return Err(fault(format!(
                "block {block} of {name} came from a peer and is not that of checkpoint {step}"
            )));
        }
        let (generation, peers_bytes) = (state.generation, gathered.bytes());
        tracing::info!(%generation, %step, read_bytes, peers_bytes, "took state from a checkpoint");
        if let (false, From::Checkpoint([weights, exp_avg, exp_avg_sq])) = (blocks.is_empty(), &state.from) {
            gathered.weights.push((blocks.start, weights.clone()));
            gathered.moments.push((both(&blocks, &moved).start, [exp_avg.clone(), exp_avg_sq.clone()]));
        }
        let (updates, losses, cursors) = (manifest.updates, manifest.losses, manifest.cursors);
        let gathering = Gathering { layout, asked, updates, cursors, losses, cover: own.and(&needs), moved };
        self.hold(step, Standing::Nothing, gathering, &gathered);
        self.measure_anew(step, serving)
    }

    /// The moments that this member needs of the state after `step`: all, where the stack grows.
    fn needs_at(&self, serving: &Serving<'_>, step: Step, blocks: usize) -> Cover {
        let grows = self.schedule.at(step.0).is_some_and(|plan| plan.upcycle.is_some());
        if grows { Cover::all(blocks) } else { serving.needs(blocks) }
    }

    /// Forgets the losses of the state that is held where the mathematics changed with the step after it, as the process did
    /// that made the change.
    fn measure_anew(&mut self, step: Step, serving: &Serving<'_>) -> Served<()> {
        if self.changed_at(serving)? == Some(step.0) {
            self.held.as_mut().expect("state was loaded").engine.forget_losses();
        }
        Ok(())
    }

    /// Steps that were applied when the mathematics of the run last changed. Nothing of that is logged while a generation lives,
    /// so that each reads the log once.
    pub(super) fn changed_at(&mut self, serving: &Serving<'_>) -> Served<Option<u64>> {
        let generation = serving.formation.generation;
        if let Some((of, changed)) = self.changed
            && of == generation
        {
            return Ok(changed);
        }
        let read = || Ok(events::changed_at(&self.store)?);
        let changed = patiently(serving.abort, "the log cannot be read now", read)?;
        let changed = changed.map_err(|error| fault(error.to_string()))?;
        self.changed = Some((generation, changed));
        Ok(changed)
    }
}

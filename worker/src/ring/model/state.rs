//! State: taken where a generation says, offered to those that lack it, and copied for checkpoints.

use anello_store::Error as StoreError;
use anello_store::checkpoint::Facts;

use super::*;
use crate::account::position_after;
use crate::checkpoint::{self, Snapshot, state_of};
use crate::init::initial_state;
use crate::ring::parts::Copy;
use crate::ring::peers::{HostState, gather};

/// Pause between two attempts to read a checkpoint from a store that does not answer.
const RETRY: Duration = Duration::from_secs(2);

impl Thread {
    /// Makes this worker hold the state after the generation's start, and offers it to members that lack it.
    pub(super) fn take_state(&mut self, serving: &Serving<'_>, abort: &AbortHandle) -> Served<()> {
        let Formation { generation, start, source, members, .. } = serving.formation;
        let holds = self.held.as_ref().is_some_and(|held| held.step == *start);
        match source {
            Source::Peers { holders } => {
                if !holds {
                    let addresses = members
                        .iter()
                        .filter(|member| holders.contains(&member.worker))
                        .map(|member| member.endpoints.peers.clone())
                        .collect();
                    let tls = self.tls.as_ref();
                    let gathered = self.runtime.block_on(gather(addresses, tls, *generation, *start, abort));
                    let state = gathered.map_err(|reason| broken(None, reason))?;
                    self.hold_host_state(state);
                } else if holders.len() < members.len() {
                    // Some holders may have begun this step in a ring that broke: what a stage does before its first step
                    // is then done to the state of all, once more where it was.
                    if let (Some(plan), Some(held)) = (self.schedule.at(start.0), &mut self.held) {
                        held.engine.enter(&plan);
                    }
                    self.offer(*generation);
                }
            }
            Source::Seed if !holds => {
                let state =
                    initial_state(&self.config, Device::Cpu).map_err(|error| fault(error.to_string()))?;
                let engine = Engine::with_state(&self.config, state);
                let cursors = vec![Cursor::default(); self.config.lanes as usize];
                self.held = Some(Held { engine, step: Step(0), cursors });
            }
            Source::Seed => {}
            Source::Checkpoint { step } => self.load(*step, abort)?,
        }
        Ok(())
    }

    fn load(&mut self, step: Step, abort: &AbortHandle) -> Served<()> {
        loop {
            match checkpoint::load(&self.store, step.0, &self.config.model, Device::Cpu) {
                Ok(loaded) => {
                    let cursors = loaded.manifest.cursors;
                    let engine = Engine::with_state(&self.config, loaded.state);
                    self.held = Some(Held { engine, step, cursors });
                    return Ok(());
                }
                Err(damaged @ Error::Store(StoreError::Checkpoint { .. })) => {
                    return Err(Cause::NoState { reason: damaged.to_string() });
                }
                Err(cause) => {
                    tracing::warn!(%cause, %step, "a checkpoint cannot be read now");
                    let until = Instant::now() + RETRY;
                    while Instant::now() < until {
                        if let Some(reason) = abort.reason() {
                            return Err(broken(None, reason.to_owned()));
                        }
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
            }
        }
    }

    fn hold_host_state(&mut self, state: HostState) {
        let layout = Layout::new(&self.config.model, state.layers);
        let moments = state_of(layout, &state.buffers, state.updates, state.losses, Device::Cpu);
        let engine = Engine::with_state(&self.config, moments);
        self.held = Some(Held { engine, step: state.step, cursors: state.cursors });
    }

    fn offer(&self, generation: Generation) {
        let held = self.held.as_ref().expect("only a holder offers");
        let Snapshot { facts, buffers, .. } = self.copy(0..held.engine.state().layout.blocks());
        let Facts { updates, layers, cursors, losses, .. } = facts;
        // Nobody else holds them, so nothing is copied.
        let buffers = buffers.map(Vec::from);
        let state = HostState { generation, step: held.step, updates, layers, cursors, losses, buffers };
        *self.shelf.write().expect("no holder panics") = Some(Arc::new(state));
    }

    /// Copies this worker's blocks, and a second time those of the next member, and hands them to the writer.
    pub(super) fn snapshot(&mut self, ring: &tcp::Tcp, formation: &Formation) {
        let _span = tracing::trace_span!("checkpoint").entered();
        self.writer.wait();
        let (ring, count) = (ring.ring(), formation.members.len());
        let next = (ring.rank().index() + 1) % count;
        let second =
            (count > 1).then(|| (formation.members[next].worker, self.copy(ring.blocks(Rank(next as u32)))));
        self.writer.write(Copy {
            generation: formation.generation,
            all_blocks: u64::from(ring.shape().blocks),
            own: self.copy(ring.blocks(ring.rank())),
            next: second,
        });
    }

    /// A copy on the host of some blocks.
    fn copy(&self, blocks: Range<usize>) -> Snapshot {
        let held = self.held.as_ref().expect("state was taken");
        let position = position_after(&self.schedule, held.step.0);
        let facts = self.stamp.facts(held.engine.state(), position, held.cursors.clone());
        Snapshot::take(held.engine.state(), blocks, facts)
    }
}

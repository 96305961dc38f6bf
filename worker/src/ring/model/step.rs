//! One step: own lanes, the sum of all, the checks before it, the update and what is reported of it.

use anello_dataloader::LaneStep;
use anello_store::events::Event as Logged;
use anello_store::metrics::{Evaluated, Seconds, StepRecord};

use super::faults::flip_a_bit;
use super::*;
use crate::account::{outcome_event, weights_digest};
use crate::engine::{Growing, Outcome};
use crate::guard;
use crate::ring::replicas;
use crate::ring::spot::{self, Spot};
use crate::ring::sum::{Total, add_up};
use crate::ring::validation;
use crate::ring::word::{Agreed, Word, agree};

impl Thread {
    /// One step: own lanes, the sum of all, the update.
    pub(super) fn step(
        &mut self,
        plan: &StepPlan<'_>,
        serving: &Serving<'_>,
        ring: &mut tcp::Tcp,
        mut gpus: Option<&mut Gpus>,
        mut loader: Option<&mut Loader>,
    ) -> Served<Stepped> {
        let _step = tracing::trace_span!("step", step = plan.step, rank = serving.rank).entered();
        let began = Instant::now();
        let mut seconds = Seconds::default();
        let every = self.config.ring.spot_check_every_steps;
        let spot = Spot::at(self.config.seed, every, plan.step, serving.formation, serving.trainers);
        let own_spot = spot.as_ref().is_some_and(|spot| spot.owner == serving.rank);
        let faulty = own_spot && self.take_fault_of("gradient", plan.step, serving.rank);
        let mut own_hash = Vec::new();
        let mut check_lane = |lane: u32, gradient: &mut Tensor| {
            if spot.as_ref().is_some_and(|spot| spot.lane == lane) {
                if faulty {
                    flip_a_bit(gradient);
                }
                own_hash = spot::hash(gradient);
            }
        };
        if self.take_fault_of("wire", plan.step, serving.rank) {
            ring.flip_a_bit();
        }
        let held = self.held.as_mut().expect("state was taken");
        held.approach(plan);
        let Held { engine, .. } = held;
        let mut word = Word { control: 0, sums: Vec::new(), cursors: Vec::new(), events: Vec::new() };
        let mut total = match self.total.take() {
            Some(total) if total.values().numel() == engine.state().layout.len() => total,
            _ if self.nccl.is_some() => Total::on_device(engine.state().layout.len(), self.device),
            _ => Total::new(engine.state().layout.len(), self.device),
        };
        if own_spot && let Some(spot) = &spot {
            engine.forget(spot.lane);
        }
        engine.resume(plan.step, &serving.lanes);
        let (mut last, mut kept) = (None, Vec::new());
        for lane in serving.lanes.clone() {
            let waited = Instant::now();
            let loader = loader.as_mut().expect("a worker with lanes has a loader");
            let data = tracing::trace_span!("data", lane).entered();
            let lane_step = next_lane_step(loader, plan.step, lane)?;
            drop(data);
            seconds.data += waited.elapsed().as_secs_f64();
            word.events.extend(self.epochs.data_events(&lane_step));
            word.cursors.push(lane_step.cursor);
            if engine.fold_kept(lane) {
                kept.push(lane);
                continue;
            }
            if lane + 1 == serving.lanes.end {
                last = Some(lane_step.micro_batches);
                break;
            }
            let computed = Instant::now();
            let _lane = tracing::trace_span!("lane", lane).entered();
            let (mut gradient, sums) = engine.lane_gradient(plan.stage, &lane_step.micro_batches);
            check_lane(lane, &mut gradient);
            engine.fold_lane(lane, gradient, sums);
            seconds.compute += computed.elapsed().as_secs_f64();
        }
        if !kept.is_empty() {
            tracing::info!(step = plan.step, ?kept, "need not compute these lanes again");
        }
        let live = self.live.clone();
        let (mut computed, began_last) = (Duration::ZERO, Instant::now());
        let hold = serving.hold;
        let word = |sums| {
            word.sums = sums;
            word.control = hold.load(Ordering::Relaxed);
            word.encode()
        };
        let lane = serving.lanes.end.saturating_sub(1);
        let compute = |tell: &mut dyn FnMut(Growing<'_>)| {
            let tell = &mut |mut growing: Growing<'_>| {
                if let (Some(live), Growing::Whole(_)) = (&live, &growing) {
                    live.begin_sum();
                }
                if let Growing::Lane(gradient) = &mut growing {
                    check_lane(lane, gradient);
                }
                tell(growing);
            };
            if let Some(micro_batches) = last {
                let _lane = tracing::trace_span!("lane", lane).entered();
                engine.last_lane(plan.stage, lane, &micro_batches, tell);
            } else if !serving.lanes.is_empty() {
                engine.tell_whole(plan.stage, tell);
            }
            computed = began_last.elapsed();
        };
        let ((), words) = match &mut gpus {
            Some(gpus) => gpus.add_up(ring, RingStep(plan.step), total.values(), word, compute),
            None => add_up(ring, RingStep(plan.step), &mut total, word, compute),
        };
        seconds.compute += computed.as_secs_f64();
        seconds.reduce = (began_last.elapsed() - computed).as_secs_f64();
        let words = words.map_err(|error| cause_of(&error, serving.formation));
        match &words {
            // Who is lost takes its own lanes along, and no others. After a fault all is computed again.
            Err(Cause::Broken { .. } | Cause::Unreachable { .. }) => engine.set_aside(plan.step),
            _ => engine.abandon(),
        }
        self.total = Some(total);
        let words = words?;
        if let Some(spot) = spot {
            self.spot_check(plan, serving, ring, &spot, own_hash)?;
        }
        let Self { held, total, .. } = self;
        let (Some(held), Some(total)) = (held, total) else {
            unreachable!("both were there at the beginning of the step");
        };
        let lanes: Vec<Range<u32>> =
            serving.formation.members.iter().map(|member| member.lanes.clone()).collect();
        let mut moved = held.cursors.clone();
        let Agreed { control, sums, events } =
            agree(&words, &lanes, &mut moved).map_err(|error| fault(error.to_string()))?;

        let updated = Instant::now();
        let mut spreading = Duration::ZERO;
        let outcome = if serving.shared {
            let own = ring.ring().blocks(ring.ring().rank());
            let (prepared, spike) = held.engine.prepare(plan, total.values(), &sums, own);
            held.pending = Some(Pending { prepared, cursors: moved });
            let began = Instant::now();
            let spread = match &mut gpus {
                Some(gpus) => gpus.spread(ring, RingStep(plan.step), total.values()),
                None => total.spread(ring, RingStep(plan.step)),
            };
            spread.map_err(|error| cause_of(&error, serving.formation))?;
            spreading = began.elapsed();
            let Pending { prepared, cursors } = held.pending.take().expect("just made");
            let complete = || held.engine.complete(prepared, total.values());
            let update = updated_by(live.as_deref(), complete);
            held.cursors = cursors;
            let back_to = guard::back_to(&self.config.guard, spike, plan.step);
            Outcome { sums, update, spike, back_to }
        } else {
            held.cursors = moved;
            updated_by(live.as_deref(), || held.engine.finish_with(plan, total.values(), sums))
        };
        held.advance(Step(plan.step + 1));
        if let Some(to) = outcome.back_to {
            self.go_back(plan, to, serving, ring, gpus)?;
        }
        let spent = self.held.as_mut().expect("state was taken").engine.take_spent();
        let is_whole = self.is_whole();
        let held = self.held.as_ref().expect("state was taken");
        let on_record = is_whole && self.config.record.has_weights(plan.step + 1);
        let weights = on_record.then(|| weights_digest(held.engine.state()));
        let Seconds { compute, forward, reduce, .. } = &mut seconds;
        spent.account(compute, forward, reduce);
        seconds.reduce += spreading.as_secs_f64();
        seconds.update = (updated.elapsed() - spreading).as_secs_f64();
        seconds.step = began.elapsed().as_secs_f64();
        let mut events = self.told.get_or_insert_default().not_told(events);
        events.extend(
            plan.first_of_stage.then(|| Logged::Stage { step: plan.step, stage: plan.stage.name.clone() }),
        );
        events.extend(outcome_event(plan, &outcome));
        let report = report(StepRecord { weights, ..outcome.record(plan, seconds) }, &events);
        Ok(Stepped { control, report, is_whole, undone: outcome.back_to.is_some() })
    }

    /// Has one lane's gradient computed by a second member, and by a third when the two differ, before anything of the step
    /// is applied.
    fn spot_check(
        &mut self,
        plan: &StepPlan<'_>,
        serving: &Serving<'_>,
        ring: &mut tcp::Tcp,
        spot: &Spot,
        own_hash: Vec<u8>,
    ) -> Served<()> {
        let _span = tracing::trace_span!("spot check").entered();
        let ended = |error: RingError| cause_of(&error, serving.formation);
        let rank = serving.rank;
        let said = if rank == spot.witness { self.recompute(plan, spot.lane)? } else { own_hash };
        let first = ring.exchange(RingStep(plan.step), &said).map_err(ended)?;
        if spot.agrees(&first) {
            return Ok(());
        }
        let said = if Some(rank) == spot.judge { self.recompute(plan, spot.lane)? } else { Vec::new() };
        let second = ring.exchange(RingStep(plan.step), &said).map_err(ended)?;
        Err(spot.verdict(plan.step, &first, &second, serving.formation))
    }

    /// Hash of the gradient of a lane that another member serves.
    fn recompute(&mut self, plan: &StepPlan<'_>, lane: u32) -> Served<Vec<u8>> {
        let mut loader = self.loader(&(lane..lane + 1), plan.step)?;
        let lane_step = next_lane_step(&mut loader, plan.step, lane)?;
        let engine = &mut self.held.as_mut().expect("state was taken").engine;
        let (gradient, _) = engine.lane_gradient(plan.stage, &lane_step.micro_batches);
        let hash = spot::hash(&gradient);
        engine.recycle(gradient);
        Ok(hash)
    }

    /// Measures the model on held-out data where that is due after the step of `plan`. Who lacks some of the state has nothing to
    /// measure by, and others tell of it.
    pub(super) fn validate(
        &mut self,
        plan: &StepPlan<'_>,
        serving: &Serving<'_>,
        is_whole: bool,
        ring: &mut tcp::Tcp,
        report: &mut v1::StepReport,
    ) -> Served<()> {
        let Some(held_out) = self.held_out.as_mut().filter(|held_out| held_out.is_due(plan)) else {
            return Ok(());
        };
        let began = Instant::now();
        let members: Vec<Range<u32>> =
            serving.formation.members.iter().map(|member| member.lanes.clone()).collect();
        let engine = &self.held.as_ref().expect("state was taken").engine;
        let measured = validation::measure(held_out, engine, plan, &members, is_whole, ring);
        let (evals, broken) = measured.map_err(|error| fault(error.to_string()))?;
        report.evals = evals.into_iter().map(evaluated).collect();
        add_seconds(report, 6, began.elapsed().as_secs_f64());
        broken.map_or(Ok(()), |broken| Err(cause_of(&broken, serving.formation)))
    }

    /// Ends the ring when the replicas differ after `at` steps.
    pub(super) fn compare_replicas(
        &self,
        ring: &mut tcp::Tcp,
        at: u64,
        due: bool,
        serving: &Serving<'_>,
    ) -> Served<()> {
        let formation = serving.formation;
        let every = self.config.ring.digest_every_steps;
        if every == 0 || serving.trainers < 2 || !(due || at.is_multiple_of(every)) {
            return Ok(());
        }
        let _span = tracing::trace_span!("compare replicas").entered();
        let held = self.held.as_ref().expect("state was taken");
        match replicas::compare(ring, at, held.engine.state(), serving.shared, serving.trainers, formation) {
            Ok(None) => Ok(()),
            Ok(Some(diverged)) => Err(diverged),
            Err(error) => Err(cause_of(&error, formation)),
        }
    }
}

/// Makes an update, while nobody reads or fills in the state that it changes.
fn updated_by<T>(live: Option<&Live>, update: impl FnOnce() -> T) -> T {
    match live {
        Some(live) => live.update(update),
        None => update(),
    }
}

/// What `lane` is to compute at `step`: the loader serves lanes in this very order.
fn next_lane_step(loader: &mut Loader, step: u64, lane: u32) -> Served<LaneStep> {
    let lane_step = loader.next().ok_or_else(|| fault("the loader ends before the run"))?;
    let lane_step = lane_step.map_err(|error| fault(error.to_string()))?;
    // A batch belongs to a step and a lane, never to an iterator's place.
    assert_eq!((lane_step.step, lane_step.lane), (step, lane), "the loader serves another step");
    Ok(lane_step)
}

/// What was done after the step, as a part of it: `of` is its place among the seconds.
pub(super) fn add_seconds(report: &mut v1::StepReport, of: usize, seconds: f64) {
    report.seconds[0] += seconds;
    report.seconds[of] += seconds;
}

fn evaluated(eval: Evaluated) -> v1::Evaluated {
    let Evaluated { set, counted, loop_loss, accuracy, exit } = eval;
    v1::Evaluated { set, counted, loop_loss, accuracy, exit }
}

fn report(record: StepRecord, events: &[Logged]) -> v1::StepReport {
    let Seconds { step, data, compute, forward, reduce, update, checkpoint, eval } = record.seconds;
    v1::StepReport {
        step: record.step,
        stage: record.stage,
        tokens: record.tokens,
        batch_tokens: record.batch_tokens,
        counted: record.counted,
        lr: record.lr,
        loss: record.loss,
        loop_loss: record.loop_loss,
        exit: record.exit,
        entropy: record.entropy,
        grad_norm: record.grad_norm,
        applied: record.applied,
        weights: record.weights,
        evals: record.evals.into_iter().map(evaluated).collect(),
        seconds: vec![step, data, compute, reduce, update, checkpoint, eval, forward],
        events: events
            .iter()
            .map(|event| {
                serde_json::to_string(event).expect("an event has no map with keys that are not strings")
            })
            .collect(),
    }
}

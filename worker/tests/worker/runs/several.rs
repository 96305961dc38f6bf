//! Several engines that share the lanes of one run are the one worker of the undisturbed run, to the last bit: its
//! weights, its metrics and the checkpoints that they write together.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use anello_collective::{InProcess, Shape, Step as RingStep};
use anello_configs::StepPlan;
use anello_dataloader::{LaneStep, Loader, LoaderOptions};
use anello_store::Cursor;
use anello_store::checkpoint::Written;
use anello_store::metrics::Seconds;
use anello_worker::checkpoint::Snapshot;
use anello_worker::ring::{Total, add_up};
use anello_worker::{
    BLOCK, Engine, Epochs, Growing, LossSums, Outcome, Stamp, combine, fold_sums, outcome_event,
    position_after,
};
use tch::{Device, Tensor};

use super::*;

const PART_BYTES: u64 = 1 << 20;

/// Lanes of steps in a ring that needed not be computed again.
static KEPT: AtomicU32 = AtomicU32::new(0);

/// The lanes of each engine; one has none, none but the first has one aligned subtree.
const CUTS: [Range<u32>; 4] = [0..1, 1..1, 1..3, 3..4];

/// One step of all `engines` over `lanes`, the exchange between them in memory.
fn step(engines: &mut [Engine], plan: &StepPlan<'_>, lanes: &[LaneStep]) -> Vec<Outcome> {
    let mut gradients: Vec<(u32, u32, Tensor)> = Vec::new();
    let mut sums: Vec<(u32, u32, LossSums)> = Vec::new();
    for (engine, cut) in engines.iter_mut().zip(CUTS) {
        engine.enter(plan);
        engine.resume(plan.step, &cut);
        for lane in cut {
            if !engine.fold_kept(lane) {
                engine.lane(plan.stage, lane, &lanes[lane as usize].micro_batches);
            }
        }
        for (first, count, gradient, of) in engine.take_partials() {
            gradients.push((first, count, gradient.copy()));
            sums.push((first, count, of));
            engine.recycle(gradient);
        }
    }
    let all = lanes.len() as u32;
    let total = combine(gradients, all, |left, right| *left += right);
    let sums = fold_sums(sums, all);
    engines.iter_mut().map(|engine| engine.finish_with(plan, &total.copy(), sums.clone())).collect()
}

/// The same in a ring, where the sum begins while the last lane of each is computed.
fn ring_step(engines: &mut [Engine], plan: &StepPlan<'_>, lanes: &[LaneStep]) -> Vec<Outcome> {
    engines.iter_mut().for_each(|engine| drop(engine.approach(plan)));
    let layout = engines[0].state().layout.clone();
    let order =
        layout.backward_blocks(plan.stage.trains).into_iter().flatten().map(|block| block as u32).collect();
    let shape =
        Shape { ranges: CUTS.to_vec(), blocks: layout.blocks() as u32, block_len: BLOCK, order, owners: 0 };
    let sums = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let members = InProcess::ring_of(&shape).unwrap().into_iter().zip(engines).zip(CUTS);
        let threads: Vec<_> = members
            .map(|((mut member, engine), cut)| {
                let sums = &sums;
                scope.spawn(move || {
                    engine.resume(plan.step, &cut);
                    let mut last = None;
                    for lane in cut.clone() {
                        if engine.fold_kept(lane) {
                            KEPT.fetch_add(1, Ordering::Relaxed);
                        } else if lane + 1 == cut.end {
                            last = Some(lane);
                        } else {
                            engine.lane(plan.stage, lane, &lanes[lane as usize].micro_batches);
                        }
                    }
                    let mut total = Total::new(engine.state().layout.len(), Device::Cpu);
                    // Everyone's sums are there before anyone's word is.
                    let word = |of: Vec<(u32, u32, LossSums)>| {
                        sums.lock().unwrap().extend(of);
                        Vec::new()
                    };
                    let step = RingStep(plan.step);
                    let ((), words) = add_up(&mut member, step, &mut total, word, |tell| {
                        if let Some(lane) = last {
                            last_lane(engine, plan, &lanes[lane as usize], tell);
                        } else if !cut.is_empty() {
                            engine.tell_whole(plan.stage, tell);
                        }
                    });
                    assert_eq!(words.unwrap().len(), CUTS.len());
                    engine.abandon();
                    let mut all = sums.lock().unwrap().clone();
                    all.sort_by_key(|(first, _, _)| *first);
                    engine.finish_with(plan, total.values(), fold_sums(all, lanes.len() as u32))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// [`Engine::last_lane`], whose blocks must not change once they are told to be whole.
fn last_lane(engine: &mut Engine, plan: &StepPlan<'_>, lane: &LaneStep, tell: &mut dyn FnMut(Growing<'_>)) {
    let (mut partials, mut whole, mut told) = (Vec::new(), Vec::new(), Vec::new());
    engine.last_lane(plan.stage, lane.lane, &lane.micro_batches, &mut |growing| {
        match &growing {
            Growing::Sums(sums, buffers) => {
                assert_eq!(sums.len(), buffers.len());
                partials = buffers.iter().map(Tensor::shallow_clone).collect();
            }
            Growing::Whole(blocks) => {
                let (start, len) = ((blocks.start * BLOCK) as i64, (blocks.len() * BLOCK) as i64);
                let then = partials.iter().map(|buffer| buffer.narrow(0, start, len));
                whole.extend(then.map(|now| (now.copy(), now)));
                told.extend(blocks.clone());
            }
            Growing::Lane(gradient) => assert_eq!(gradient.numel(), partials[0].numel()),
        }
        tell(growing);
    });
    assert!(whole.iter().all(|(then, now)| then.equal(now)), "a block changed after it was told");
    let order: Vec<usize> =
        engine.state().layout.backward_blocks(plan.stage.trains).into_iter().flatten().collect();
    assert_eq!(told, order);
}

/// Tries the step with another split of the lanes first, and gives up, for good or with what it has of `computed` kept: the
/// state is what it was.
fn try_in_vain(
    engines: &mut [Engine],
    plan: &StepPlan<'_>,
    lanes: &[LaneStep],
    computed: Range<usize>,
    keep: bool,
) {
    for engine in engines {
        let was = engine.state().copy();
        let before = engine.approach(plan);
        assert_eq!(before.is_some(), plan.upcycle.is_some());
        for lane in &lanes[computed.clone()] {
            engine.lane(plan.stage, lane.lane, &lane.micro_batches);
        }
        if keep {
            engine.set_aside(plan.step);
        }
        engine.abandon();
        engine.abandon();
        if let Some(before) = before {
            engine.load_state(before);
        }
        let is = engine.state();
        assert_eq!((is.updates, &is.losses), (was.updates, &was.losses), "before step {}", plan.step);
        assert!(is.layout.has_places_of(&was.layout) && is.weights.equal(&was.weights));
        assert!(is.exp_avg.equal(&was.exp_avg) && is.exp_avg_sq.equal(&was.exp_avg_sq));
    }
}

#[test]
fn engines_that_share_the_lanes_are_the_one_worker() {
    let data = Data::new();
    let config = data.config_with_late_stages();
    let (reference, _) = undisturbed(config.clone());
    let options = LoaderOptions::of(&config).unwrap();
    let stamp = Stamp::new(&config, &options, Device::Cpu);
    let mut loader = Loader::open(options).unwrap();
    let schedule = Schedule::new(&config);
    let store = Store::memory().unwrap();
    let mut engines: Vec<Engine> = CUTS.iter().map(|_| Engine::new(&config, Device::Cpu).unwrap()).collect();
    let mut epochs = Epochs::default();
    let mut told = Vec::new();

    for at in 0..schedule.total_steps() {
        let plan = schedule.at(at).unwrap();
        let lanes: Vec<LaneStep> = (0..config.lanes).map(|_| loader.next().unwrap().unwrap()).collect();
        told.extend(lanes.iter().flat_map(|lane| epochs.data_events(lane)));
        if at % 3 == 1 || plan.first_of_stage {
            // The third engine has lanes 1 and 2: it is given both, or either; the first has none of them.
            let computed = [1..3, 1..2, 2..3][at as usize / 2 % 3].clone();
            try_in_vain(&mut engines, &plan, &lanes, computed, at % 5 != 0);
        }
        let step = if at % 2 == 0 { ring_step } else { step };
        let outcomes = step(&mut engines, &plan, &lanes);
        let record = outcomes[0].record(&plan, Seconds::default());
        // The digest of the weights is the shell's to take; the manifests below have them all.
        let logged = StepRecord { weights: None, ..reference.records[at as usize].without_seconds() };
        assert_eq!(record, logged);
        assert!(outcomes.iter().all(|o| *o == outcomes[0] && outcome_event(&plan, o).is_none()));

        // Each writes the blocks that it owns, one of them none; whoever has all parts commits.
        let cursors: Vec<Cursor> = lanes.into_iter().map(|lane| lane.cursor).collect();
        let blocks = engines[0].state().layout.blocks();
        let owned = [2..blocks, 0..1, 1..1, 1..2];
        let mut written: Vec<Written> = Vec::new();
        let mut digests = Vec::new();
        let position = position_after(&schedule, at + 1);
        for (engine, blocks) in engines.iter().zip(owned) {
            let facts = stamp.facts(engine.state(), position.clone(), cursors.clone());
            digests.push(facts.digest());
            let snapshot = Snapshot::take(engine.state(), blocks, facts);
            written.extend(write(&store, &snapshot, PART_BYTES, 1).unwrap());
        }
        assert!(digests.iter().all(|digest| *digest == digests[0]));
        let facts = stamp.facts(engines[0].state(), position, cursors);
        checkpoint::commit(&store, Manifest::new(facts, written)).unwrap();
        let manifest = checkpoint::verify(&store, at + 1).unwrap();
        assert_eq!(bits(&manifest), bits(&reference.manifests[&(at + 1)]), "after step {}", at + 1);

        // One takes its state from the store, as a joiner would.
        if at % 4 == 2 {
            engines[1].load_state(load(&store, at + 1, &config.model, Device::Cpu).unwrap().state);
        }
    }
    assert!(told.iter().any(|event| matches!(event, Event::Epoch { .. })));
    assert!(KEPT.load(Ordering::Relaxed) >= 4, "lanes that were kept: {KEPT:?}");
}

//! What must always be true, and can be seen by whoever looks into all processes at once: one predicate each, by name. What can be
//! seen from outside is in [`crate::core::invariants`], and is checked here too.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use anello_member::{Effect, Event};
use anello_proto::ring::{Formation, Generation, Order, Source, Stance, Step, WorkerId};

pub use crate::core::invariants::*;

/// What a worker was told, by coordinators or by whoever asked it to go.
#[derive(Debug, Default)]
pub struct Told {
    rings: BTreeSet<Generation>,
    formed: BTreeSet<Generation>,
    leave: bool,
    now: bool,
}

impl Told {
    /// It hears of this.
    pub fn hears(&mut self, event: &Event) {
        self.now = matches!(event, Event::Ordered { .. } | Event::Terminate);
        match event {
            Event::Ordered { order: Order::Form(formation), .. } => {
                self.rings.insert(formation.generation);
            }
            Event::Ordered { order: Order::Leave { .. }, .. } | Event::Terminate => self.leave = true,
            _ => {}
        }
    }
}

/// **A worker that is told nothing does nothing new**: it forms each ring once, and none that it was not told to; it holds, breaks a ring
/// or writes what it keeps at a word alone; and it ends only if it was told or asked to. Whatever else happens to it, such as
/// the loss of every coordinator, sets off nothing.
pub fn who_is_told_nothing_does_nothing_new(
    worker: WorkerId,
    told: &mut Told,
    effect: &Effect,
) -> Result<(), String> {
    let may = match effect {
        Effect::Say(_) => true,
        Effect::Form(formation) => {
            told.rings.contains(&formation.generation) && told.formed.insert(formation.generation)
        }
        Effect::Hold { .. } | Effect::Abort { .. } | Effect::WriteKept { .. } => told.now,
        Effect::Exit(_) => told.leave,
    };
    match may {
        true => Ok(()),
        false => Err(format!("worker {worker} does what it was not told to: {effect:?}")),
    }
}

/// **Nobody counts on a learner**: who serves lanes from peers' state can have it from a member that held it, and learners come
/// last, with no lanes and no state. `holds` is what the coordinator was told.
pub fn nobody_counts_on_learners(
    formation: &Formation,
    holds: impl Fn(WorkerId) -> Option<Step>,
) -> Result<(), String> {
    let Source::Peers { holders } = &formation.source else { return Ok(()) };
    let (trainers, learners) = formation.members.split_at(formation.trainers());
    let generation = formation.generation;
    if !trainers.iter().any(|member| holders.contains(&member.worker)) {
        return Err(format!("generation {generation} has nobody to learn from"));
    }
    for member in learners {
        if !member.lanes.is_empty() || holds(member.worker).is_some() {
            return Err(format!("generation {generation}: worker {} holds state and learns", member.worker));
        }
    }
    Ok(())
}

/// **Who was sent away stays away**: a worker whose state differed from all others' is in no generation after that.
pub fn who_was_sent_away_stays_away(
    formation: &Formation,
    evicted: &BTreeSet<WorkerId>,
) -> Result<(), String> {
    match formation.members.iter().find(|member| evicted.contains(&member.worker)) {
        None => Ok(()),
        Some(member) => Err(format!(
            "generation {} has worker {}, whose state differed from all others'",
            formation.generation, member.worker
        )),
    }
}

/// **Members reach one another**: nobody is in a generation of whom it is known that it does not reach another member.
pub fn members_reach_one_another(formation: &Formation, left_out: &BTreeSet<WorkerId>) -> Result<(), String> {
    match formation.members.iter().find(|member| left_out.contains(&member.worker)) {
        None => Ok(()),
        Some(member) => Err(format!(
            "generation {} has worker {}, which does not reach another member",
            formation.generation, member.worker
        )),
    }
}

/// **A cut heals in one generation**: where members of a ring have said whom they do not reach, no two of them that are in the next
/// one are apart, and at least half of them are in it.
pub fn a_cut_heals_in_one_generation(
    before: &Formation,
    now: &Formation,
    apart: impl Fn(WorkerId, WorkerId) -> bool,
) -> Result<(), String> {
    let generation = now.generation;
    let now = now.members.iter().map(|member| member.worker);
    let ids: Vec<WorkerId> = now.filter(|id| before.member(*id).is_some()).collect();
    if let Some((one, other)) = ids
        .iter()
        .flat_map(|one| ids.iter().map(move |other| (one, other)))
        .find(|(one, other)| apart(**one, **other))
    {
        return Err(format!("generation {generation} has workers {one} and {other}, which are still apart"));
    }
    let (stay, members) = (ids.len(), before.members.len());
    match 2 * stay >= members {
        true => Ok(()),
        false => Err(format!("generation {generation} has {stay} of the {members} members before it")),
    }
}

/// **Same bits**: the state after a step is one value, whoever holds it and whatever happened on the way.
pub fn state_is_the_reference(step: Step, state: u64, reference: &[u64]) -> Result<(), String> {
    match reference.get(step.0 as usize) == Some(&state) {
        true => Ok(()),
        false => Err(format!("the state after step {step} is not that of an undisturbed run")),
    }
}

/// **No generation starts with moments that nobody has**: of every block, some member has them, or can bring them there.
pub fn moments_are_somewhere(
    formation: &Formation,
    blocks: u64,
    has: impl Fn(WorkerId, u64) -> bool,
) -> Result<(), String> {
    match (0..blocks).find(|block| !formation.members.iter().any(|member| has(member.worker, *block))) {
        None => Ok(()),
        Some(block) => Err(format!(
            "generation {} starts at {}, and no member has the moments of block {block}",
            formation.generation, formation.start
        )),
    }
}

/// **Who applies a step uses the moments after the one before**: those of its whole share were made ready from there.
pub fn moments_of_the_step_before(
    worker: WorkerId,
    needs: &BTreeSet<u64>,
    used: Option<&BTreeSet<u64>>,
) -> Result<(), String> {
    match used.is_some_and(|used| used.is_superset(needs)) {
        true => Ok(()),
        false => Err(format!("worker {worker} applies a step with moments of {used:?}, and needs {needs:?}")),
    }
}

/// **One death loses nothing**: state is given up only when the moments of some block are with nobody who is here.
pub fn what_is_given_up_is_lost(step: Step, blocks: u64, has: impl Fn(u64) -> bool) -> Result<(), String> {
    match (0..blocks).all(has) {
        true => Err(format!("the state after step {step} is given up, and all of it is there")),
        false => Ok(()),
    }
}

/// **A leaver hands over**: who holds the newest step that anyone here tells of, with moments of it that nobody else here tells of, is
/// not sent away as long as somebody stays.
pub fn who_is_sent_away_is_not_missed<'a, S: Iterator<Item = &'a Stance>>(
    worker: WorkerId,
    leaver: &Stance,
    others: impl Fn() -> S,
    committed: Option<Step>,
) -> Result<(), String> {
    let stays = others().any(|stance| !stance.leaving);
    let newest = others().filter_map(|stance| stance.holds).max();
    let Some(step) = leaver.holds.filter(|_| stays && leaver.holds >= newest && leaver.holds > committed)
    else {
        return Ok(());
    };
    let holds = |stance: &&Stance| stance.holds == Some(step);
    let has = |block: u64| {
        others().any(|stance| match &stance.shard {
            None => holds(&stance),
            Some(shard) => {
                let next = shard.next && stance.holds.is_some_and(|holds| holds.0 + 1 == step.0);
                (holds(&stance) || next) && shard.contains(block)
            }
        })
    };
    let shard = leaver.shard.as_ref();
    let unique =
        || shard.is_some_and(|shard| shard.blocks.iter().flat_map(Clone::clone).any(|block| !has(block)));
    let missed = !others().any(|stance| holds(&stance)) || unique();
    match missed {
        true => Err(format!(
            "worker {worker} is sent away with what nobody else has of the state after step {step}"
        )),
        false => Ok(()),
    }
}

/// **One ring**: a generation is formed only when no worker that its coordinator is connected to, and that was in the
/// generation before, may still take part in a step of that one.
pub fn former_members_hold(
    before: &Formation,
    running: impl Fn(WorkerId) -> bool,
    known: impl Fn(WorkerId) -> bool,
) -> Result<(), String> {
    match before.members.iter().find(|member| known(member.worker) && running(member.worker)) {
        None => Ok(()),
        Some(member) => Err(format!(
            "a generation was formed while worker {} was in the ring of generation {}",
            member.worker, before.generation
        )),
    }
}

/// **A manifest is visible if and only if every part it names is durable** and of one state.
pub fn manifest_is_whole(
    step: Step,
    formation: &Formation,
    parts: &BTreeMap<(Step, Generation, u64), u64>,
    reference: &[u64],
) -> Result<(), String> {
    for (member, block) in formation.members[..formation.trainers()].iter().zip(0..) {
        match parts.get(&(step, formation.generation, block)) {
            None => {
                return Err(format!(
                    "checkpoint {step} is committed and the part of worker {} is not written",
                    member.worker
                ));
            }
            Some(state) => state_is_the_reference(step, *state, reference)?,
        }
    }
    Ok(())
}

/// **A checkpoint never stands after steps that are not in the metrics**, and neither does the end of the run.
pub fn steps_are_logged(end: Step, metrics: &BTreeSet<u64>) -> Result<(), String> {
    match (0..end.0).find(|step| !metrics.contains(step)) {
        None => Ok(()),
        Some(step) => Err(format!("the figures of step {step} of the first {end} are not in the metrics")),
    }
}

/// **No figures are lost**: those that nobody has any more, though somebody holds the state after them, are in the metrics.
pub fn figures_are_somewhere(missed: Range<u64>, metrics: &BTreeSet<u64>) -> Result<(), String> {
    match missed.clone().all(|step| metrics.contains(&step)) {
        true => Ok(()),
        false => Err(format!("the figures of steps {missed:?} are lost with all who knew them")),
    }
}

/// **No checkpoint is abandoned**: a job does not end while a checkpoint that is not committed could be, with what those
/// that are connected have written and keep.
pub fn no_checkpoint_is_abandoned<'a>(
    stances: impl Iterator<Item = &'a Stance>,
    is_committed: impl Fn(Step) -> bool,
) -> Result<(), String> {
    let mut there: BTreeMap<(Step, Generation), (BTreeSet<u64>, u64)> = BTreeMap::new();
    for written in stances.flat_map(|stance| &stance.written).filter(|written| !is_committed(written.step)) {
        let (blocks, all) = there.entry((written.step, written.generation)).or_default();
        let kept = written.kept.iter().map(|kept| &kept.blocks);
        blocks.extend(written.blocks.iter().chain(kept).cloned().flatten());
        *all = written.all_blocks;
    }
    match there.iter().find(|(_, (blocks, all))| (0..*all).all(|block| blocks.contains(&block))) {
        None => Ok(()),
        Some(((step, generation), _)) => Err(format!(
            "the job ends without checkpoint {step}, of which generation {generation} has copies"
        )),
    }
}

//! Whatever workers say, true or not, in any order: no panic, and nothing is done that must not be.

use anello_configs::lanes::balanced;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::super::Straggling;
use super::super::simulation::invariants::*;
use super::*;

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![6 => 0u64..12, 1 => any::<u64>(), 1 => Just(u64::MAX)].prop_map(Step)
}

fn generation() -> impl Strategy<Value = Generation> {
    prop_oneof![6 => 0u64..8, 1 => any::<u64>(), 1 => Just(u64::MAX)].prop_map(Generation)
}

fn worker() -> impl Strategy<Value = WorkerId> {
    prop_oneof![9 => 1u64..6, 1 => any::<u64>()].prop_map(WorkerId)
}

fn cause() -> impl Strategy<Value = Cause> {
    let reason = || "something".to_owned();
    prop_oneof![
        Just(Cause::Ordered),
        Just(Cause::Ended),
        option::of(worker()).prop_map(move |lost| Cause::Broken { lost, reason: reason() }),
        vec(worker(), 1..4).prop_map(move |peers| Cause::Unreachable { peers, reason: reason() }),
        vec(worker(), 0..3).prop_map(move |workers| Cause::Diverged { workers, reason: reason() }),
        Just(Cause::NoState { reason: reason() }),
        Just(Cause::Fault { reason: reason() }),
    ]
}

fn written() -> impl Strategy<Value = Written> {
    let block = prop_oneof![9 => 0u64..4, 1 => any::<u64>()];
    let blocks = vec((block.clone(), block.clone()).prop_map(|(start, end)| Range { start, end }), 0..3);
    let kept = (worker(), block.clone(), block.clone())
        .prop_map(|(owner, start, end)| Kept { owner, blocks: Range { start, end } });
    (step(), generation(), 0..2u8, blocks, block, option::of(kept)).prop_map(
        |(step, generation, facts, blocks, all_blocks, kept)| {
            let (parts, facts) = (String::new(), facts.to_string());
            Written { step, generation, parts, facts, blocks, all_blocks, kept }
        },
    )
}

fn stance() -> impl Strategy<Value = Stance> {
    let activity = prop_oneof![
        Just(Activity::Outside),
        generation().prop_map(|generation| Activity::Forming { generation }),
        generation().prop_map(|generation| Activity::Running { generation }),
        (generation(), cause()).prop_map(|(generation, cause)| Activity::Holding { generation, cause }),
    ];
    let leaving = prop::bool::weighted(0.1);
    (
        option::of(step()),
        option::weighted(0.3, shard()),
        activity,
        leaving,
        vec(written(), 0..3),
        vec(unwritten(), 0..2),
    )
        .prop_map(|(holds, shard, activity, leaving, written, unwritten)| Stance {
            holds,
            shard,
            activity,
            leaving,
            written,
            unwritten,
        })
}

fn unwritten() -> impl Strategy<Value = Unwritten> {
    (step(), generation()).prop_map(|(step, generation)| {
        let reason = "something".to_owned();
        Unwritten { step, generation, reason }
    })
}

fn shard() -> impl Strategy<Value = Shard> {
    let range = (0u64..4, 1u64..4).prop_map(|(start, len)| start..start + len);
    let size = prop_oneof![9 => Just(7u64), 1 => Just(u64::MAX)];
    (vec(range, 0..3), size, any::<bool>()).prop_map(|(blocks, all_blocks, next)| Shard {
        blocks,
        all_blocks,
        next,
    })
}

fn machine() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["one", "two", "three"]).prop_map(str::to_owned)
}

/// What a coordinator before this one has left.
fn found(lanes: u32) -> impl Strategy<Value = Found> {
    let members = (1..=lanes.min(4), any::<bool>());
    let source = prop::sample::select(vec![0u8, 1, 2]);
    let formation = (1u64..6, 0..=TOTAL.0, members, source, any::<bool>()).prop_map(
        move |(generation, start, (members, learner), source, save_first)| {
            let (source, learner) = match source {
                0 => (Source::Seed, false),
                1 => (Source::Checkpoint { step: Step(start) }, false),
                _ => (Source::Peers { holders: vec![WorkerId(1)] }, learner),
            };
            let cut = balanced(lanes, members).into_iter().chain(learner.then_some(lanes..lanes));
            let member =
                |(lanes, id)| Member { worker: WorkerId(id), endpoints: Endpoints::default(), lanes };
            let members = cut.zip(1..).map(member).collect();
            let (generation, start) = (Generation(generation), Step(start));
            Formation { generation, start, source, members, save_first }
        },
    );
    let checkpoints = prop::sample::subsequence((0..=TOTAL.0).map(Step).collect::<Vec<_>>(), 0..3);
    let (quarantined, evicted) = (vec(machine(), 0..2), vec(worker(), 0..2));
    (option::of(formation), checkpoints, 0u64..8, quarantined, evicted).prop_map(
        |(formation, checkpoints, floor, quarantined, evicted)| {
            let floor = Generation(floor);
            Found { formation, checkpoints, floor, quarantined, evicted }
        },
    )
}

/// What comes next. The first four keep a story going that nonsense alone would not get far in.
#[derive(Clone, Debug)]
enum Act {
    /// The log takes the newest record.
    Record,
    /// A worker that just started connects.
    Arrive(WorkerId),
    /// A worker does what it was told last.
    Obey(WorkerId),
    /// The members of the newest ring find that these differ from the others.
    Differ(Vec<WorkerId>),
    /// Anything.
    Any(Box<Event>),
}

fn act() -> impl Strategy<Value = Act> {
    let endpoints = Endpoints::default();
    let reason = || "something".to_owned();
    let goal = prop_oneof![9 => Just(Goal::Run), 1 => Just(Goal::Pause), 1 => Just(Goal::Cancel)];
    let event = prop_oneof![
        2 => Just(Event::Tick),
        3 => (worker(), machine(), stance()).prop_map(move |(worker, machine, stance)| {
            Event::Linked { worker, endpoints: endpoints.clone(), machine, stance }
        }),
        2 => worker().prop_map(|worker| Event::Unlinked { worker }),
        1 => worker().prop_map(|worker| Event::Failed { worker, reason: "something".to_owned() }),
        6 => (worker(), stance()).prop_map(|(worker, stance)| Event::Stands { worker, stance }),
        1 => generation().prop_map(|generation| Event::Recorded { generation }),
        1 => step().prop_map(|step| Event::Reported { step }),
        2 => (worker(), generation(), 1u32..9, 1u32..40, any::<u32>()).prop_map(
            |(worker, generation, lanes, steps, us)| {
                let spent = Spent { compute_us: us.into(), ..Spent::default() };
                Event::Paced { worker, pace: Pace { generation, lanes, steps, spent } }
            }
        ),
        1 => (0u64..=TOTAL.0).prop_map(|step| Event::Committed { step: Step(step) }),
        1 => step().prop_map(|step| Event::Withdrawn { step }),
        1 => step().prop_map(move |step| Event::CommitFailed { step, reason: reason() }),
        1 => vec((0u64..=TOTAL.0).prop_map(Step), 0..3).prop_map(|steps| Event::Listed { steps }),
        1 => goal.prop_map(Event::Goal),
        1 => prop_oneof![0u32..5, any::<u32>()].prop_map(Event::Desired),
        1 => Just(Event::CheckpointWanted),
        1 => prop_oneof![
            6 => Just(Event::Tick),
            1 => Just(Event::Fenced { by: "something".to_owned() }),
            1 => Just(Event::GivenUp { reason: "something".to_owned() }),
        ],
    ];
    prop_oneof![
        3 => Just(Act::Record),
        3 => worker().prop_map(Act::Arrive),
        6 => worker().prop_map(Act::Obey),
        1 => vec(1u64..6, 0..2).prop_map(|ids| Act::Differ(ids.into_iter().map(WorkerId).collect())),
        9 => event.prop_map(|event| Act::Any(Box::new(event))),
    ]
}

const TOTAL: Step = Step(10);

/// A core, and what those around it know.
struct Watched {
    core: Membership,
    lanes: u32,
    now: Millis,
    /// Generations that were put on record, and that the log has taken.
    formed: Option<Arc<Formation>>,
    recorded: Option<Arc<Formation>>,
    /// What workers said last over a connection that is open.
    said: BTreeMap<WorkerId, Stance>,
    told: BTreeMap<WorkerId, Order>,
    /// No generation to come is as early as this.
    floor: Generation,
    evicted: BTreeSet<WorkerId>,
    fenced: bool,
}

impl Watched {
    fn new(lanes: u32, min: u32, desired: u32, by_speed: bool, found: Found) -> Self {
        let (lease, gather) = (Millis(1000), Millis(500));
        let straggling = Straggling { factor_permille: 1500, window_steps: 1 };
        let (total, faults_max) = (TOTAL, 2);
        let options = Options { lanes, total, min, desired, lease, gather, faults_max, straggling, by_speed };
        let formed = found.formation.clone().map(Arc::new);
        let (floor, evicted) = (found.floor, found.evicted.iter().copied().collect());
        let core = Membership::new(options, Epoch(3), found, Millis(0));
        let (said, told, recorded) = (BTreeMap::new(), BTreeMap::new(), formed.clone());
        let (now, fenced) = (Millis(0), false);
        Self { core, lanes, now, formed, recorded, said, told, floor, evicted, fenced }
    }

    /// The newest generation that anyone can have heard of.
    fn newest(&self, of: Option<&Arc<Formation>>) -> Generation {
        of.map_or(self.floor, |formation| formation.generation.max(self.floor))
    }

    fn act(&mut self, act: Act) -> Result<(), String> {
        let event = match act {
            Act::Any(event) => *event,
            Act::Record => match &self.formed {
                Some(formed) => Event::Recorded { generation: formed.generation },
                None => Event::Tick,
            },
            Act::Arrive(worker) => {
                let stance = Stance::new(None, Activity::Outside);
                let machine = ["one", "two", "three"][worker.0 as usize % 3].to_owned();
                Event::Linked { worker, endpoints: Endpoints::default(), machine, stance }
            }
            Act::Differ(workers) => {
                let Some(formation) = self.recorded.clone() else { return Ok(()) };
                for member in &formation.members {
                    let Some(stance) = self.said.get(&member.worker) else { continue };
                    let cause = Cause::Diverged { workers: workers.clone(), reason: String::new() };
                    let activity = Activity::Holding { generation: formation.generation, cause };
                    let stance = Stance { activity, ..stance.clone() };
                    self.event(Event::Stands { worker: member.worker, stance })?;
                }
                return Ok(());
            }
            Act::Obey(worker) => {
                let (Some(stance), Some(order)) = (self.said.get(&worker), self.told.get(&worker)) else {
                    return Ok(());
                };
                let mut stance = stance.clone();
                match order {
                    Order::Form(formation) => {
                        let learns = formation.rank(worker) >= Some(formation.trainers());
                        // It is told again where it stands: then it holds what it learned.
                        let holds = Some(formation.start)
                            .filter(|_| !learns || stance.activity.is_in(formation.generation));
                        stance.holds = holds;
                        stance.activity = Activity::Running { generation: formation.generation };
                    }
                    Order::Hold { generation, .. } => {
                        stance.holds = stance.holds.map(|step| Step(step.0.saturating_add(1).min(TOTAL.0)));
                        stance.activity =
                            Activity::Holding { generation: *generation, cause: Cause::Ordered };
                    }
                    Order::Abort { generation, .. } => {
                        let cause = Cause::Broken { lost: None, reason: String::new() };
                        stance.activity = Activity::Holding { generation: *generation, cause };
                    }
                    Order::Committed { step } => stance.written.retain(|written| written.step != *step),
                    Order::WriteKept { step, .. } => {
                        for written in stance.written.iter_mut().filter(|written| written.step == *step) {
                            written.blocks.extend(written.kept.take().map(|kept| kept.blocks));
                        }
                    }
                    Order::Leave { .. } => return self.event(Event::Unlinked { worker }),
                }
                Event::Stands { worker, stance }
            }
        };
        self.event(event)
    }

    fn event(&mut self, event: Event) -> Result<(), String> {
        match &event {
            Event::Linked { worker, stance, .. } => {
                self.told.remove(worker);
                self.said.insert(*worker, stance.clone());
            }
            Event::Stands { worker, stance } => {
                self.said.entry(*worker).and_modify(|said| *said = stance.clone());
            }
            Event::Unlinked { worker } | Event::Failed { worker, .. } => drop(self.said.remove(worker)),
            Event::Recorded { generation } => {
                let formed = self.formed.as_ref().filter(|formed| formed.generation == *generation);
                self.recorded = formed.or(self.recorded.as_ref()).cloned();
            }
            _ => {}
        }
        self.fenced |= matches!(event, Event::Fenced { .. }) && self.core.outcome().is_none();
        let (mut careful, mut said) = (self.core.clone(), Vec::new());
        careful.take_in(self.now, event.clone(), &mut said);
        if !self.fenced {
            careful.follow(&mut said);
        }
        let mut out = Vec::new();
        self.core.handle(self.now, event, &mut out);
        let never = Millis(u64::MAX);
        let is_late = self.core.deadline.unwrap_or(never) > careful.deadline.unwrap_or(never);
        let Membership { too_few, deadline, .. } = self.core;
        if out != said || is_late || self.core != (Membership { too_few, deadline, ..careful }) {
            return Err(format!("the short way leads elsewhere: {out:?}, not {said:?}"));
        }
        if self.fenced && !out.is_empty() {
            return Err(format!("it is fenced, and says {out:?}"));
        }
        // All that is said for people, too.
        let _ = self.core.status();
        out.into_iter().try_for_each(|effect| self.effect(effect))
    }

    fn effect(&mut self, effect: Effect) -> Result<(), String> {
        match effect {
            Effect::Record(Entry::Formed(formation)) => {
                lanes_are_covered_once(
                    formation.members.iter().map(|member| (member.worker, member.lanes.clone())),
                    self.lanes,
                )?;
                nobody_counts_on_learners(&formation, |id| self.said.get(&id).and_then(|said| said.holds))?;
                who_was_sent_away_stays_away(&formation, &self.evicted)?;
                generations_rise(Some(self.newest(self.formed.as_ref()).0), formation.generation.0)?;
                if let Some(before) = &self.formed {
                    let running = |id| self.said[&id].activity.is_in(before.generation);
                    // Nobody hears what one says that was sent away, and without the others its ring makes no step.
                    let sent_away = |id| matches!(self.told.get(&id), Some(Order::Leave { .. }));
                    let is_heard = |id| self.said.contains_key(&id) && !sent_away(id);
                    former_members_hold(before, running, is_heard)?;
                }
                if formation.start > TOTAL {
                    return Err(format!("generation {} starts at {}", formation.generation, formation.start));
                }
                self.formed = Some(formation);
            }
            Effect::Send { worker, epoch, order } => {
                if epoch != Epoch(3) {
                    return Err("it speaks in another's name".to_owned());
                }
                let newest = self.recorded.as_ref().map(|formation| formation.generation);
                let heard_of = self.newest(self.recorded.as_ref());
                let stale = match &order {
                    Order::Form(formation) => {
                        Some(formation.generation) != newest || formation.rank(worker).is_none()
                    }
                    Order::Hold { generation, .. } => Some(*generation) != newest,
                    Order::Abort { generation, .. } => *generation > heard_of,
                    // Only what it says that it keeps is asked of it.
                    Order::WriteKept { step, generation } => {
                        !self.said[&worker].written.iter().any(|written| {
                            (written.step, written.generation) == (*step, *generation)
                                && written.kept.is_some()
                        })
                    }
                    Order::Committed { .. } | Order::Leave { .. } => false,
                };
                if stale {
                    return Err(format!("{order:?} for worker {worker} while {newest:?} is the newest"));
                }
                self.told.insert(worker, order);
            }
            Effect::Drop { worker, .. } => {
                self.said.remove(&worker);
                self.told.remove(&worker);
            }
            Effect::Commit { step, generation, parts } => {
                let blocks = |written: &Written| (written.facts.clone(), written.all_blocks);
                let same = |part: &Written| {
                    (part.step, part.generation) == (step, generation) && blocks(part) == blocks(&parts[0])
                };
                let known = generation <= self.newest(self.formed.as_ref());
                if step > TOTAL || !parts.iter().all(same) || !(known || generation.0 == 0) {
                    return Err(format!("checkpoint {step} of generation {generation} from {parts:?}"));
                }
            }
            Effect::Record(Entry::Evicted { worker, .. }) => drop(self.evicted.insert(worker)),
            Effect::Record(_) | Effect::List => {}
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn whatever_workers_say(
        (lanes, found) in prop::sample::select(vec![1u32, 2, 8])
            .prop_flat_map(|lanes| (Just(lanes), prop_oneof![Just(Found::default()), found(lanes)])),
        by_speed in any::<bool>(),
        (min, desired) in (1u32..3, prop_oneof![1u32..5, any::<u32>()]),
        acts in vec((prop_oneof![9 => 0u64..300, 1 => 0u64..5000, 1 => any::<u64>()], act()), 0..80),
    ) {
        let mut watched = Watched::new(lanes, min, desired.max(1), by_speed, found);
        for (delay, act) in acts {
            watched.now = watched.now + Millis(delay);
            let shown = format!("{act:?}");
            if let Err(broken) = watched.act(act) {
                return Err(TestCaseError::fail(format!("after {shown}: {broken}")));
            }
        }
    }
}

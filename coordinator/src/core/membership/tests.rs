//! Tables: what is said, and nothing else, for one situation each. Histories are the simulator's business.

mod checkpoints;
mod faults;
mod learners;
mod leavers;
mod reach;
mod silence;
mod speed;

use std::time::Duration;

use super::super::Straggling;
use super::*;

const TOTAL: Step = Step(100);

fn options(desired: u32) -> Options {
    Options {
        lanes: 8,
        total: TOTAL,
        min: 1,
        desired,
        lease: Millis(1000),
        gather: Millis(500),
        faults_max: 3,
        straggling: Straggling { factor_permille: 1500, window_steps: 20 },
        by_speed: false,
    }
}

fn stance(holds: Option<u64>, activity: Activity) -> Stance {
    Stance::new(holds.map(Step), activity)
}

fn blocks(range: Range<u64>) -> Vec<Range<u64>> {
    std::iter::once(range).collect()
}

fn endpoints(id: u64) -> Endpoints {
    Endpoints { ring: vec![format!("w{id}:1")], peers: vec![format!("w{id}:2")] }
}

fn running(generation: u64) -> Activity {
    Activity::Running { generation: Generation(generation) }
}

fn holding(generation: u64, cause: Cause) -> Activity {
    Activity::Holding { generation: Generation(generation), cause }
}

fn lost(worker: u64) -> Cause {
    Cause::Broken { lost: Some(WorkerId(worker)), reason: "connection reset".to_owned() }
}

/// A core and its clock, for tests that tell a story.
struct Story {
    core: Membership,
    now: u64,
}

impl Story {
    fn new(desired: u32) -> Self {
        Self { core: Membership::new(options(desired), Epoch(1), Found::default(), Millis(0)), now: 0 }
    }

    /// With `members` workers that run generation 1 after step 10, of which 10 is committed.
    fn running(members: u64) -> Self {
        let mut story = Self::new(members as u32);
        (1..=members).for_each(|id| drop(story.link(id, stance(None, Activity::Outside))));
        story.event(Event::Recorded { generation: Generation(1) });
        (1..=members).for_each(|id| drop(story.stands(id, stance(Some(10), running(1)))));
        story.event(Event::Committed { step: Step(10) });
        story
    }

    fn event(&mut self, event: Event) -> Vec<Effect> {
        let mut out = Vec::new();
        self.core.handle(Millis(self.now), event, &mut out);
        out
    }

    fn link(&mut self, id: u64, stance: Stance) -> Vec<Effect> {
        let (endpoints, machine) = (endpoints(id), "m".to_owned());
        self.event(Event::Linked { worker: WorkerId(id), endpoints, machine, stance })
    }

    fn stands(&mut self, id: u64, stance: Stance) -> Vec<Effect> {
        self.event(Event::Stands { worker: WorkerId(id), stance })
    }
}

fn joined(id: u64) -> Effect {
    Effect::Record(Entry::Joined { worker: WorkerId(id), machine: "m".to_owned() })
}

fn send(id: u64, order: Order) -> Effect {
    Effect::Send { worker: WorkerId(id), epoch: Epoch(1), order }
}

fn formation(generation: u64, start: u64, source: Source, members: &[(u64, Range<u32>)]) -> Arc<Formation> {
    let member = |(id, lanes): &(u64, Range<u32>)| Member {
        worker: WorkerId(*id),
        endpoints: endpoints(*id),
        lanes: lanes.clone(),
    };
    Arc::new(Formation {
        generation: Generation(generation),
        start: Step(start),
        source,
        members: members.iter().map(member).collect(),
        save_first: start != 0 && start != 10,
    })
}

fn formed(formation: &Arc<Formation>) -> Effect {
    Effect::Record(Entry::Formed(Arc::clone(formation)))
}

fn peers(ids: &[u64]) -> Source {
    Source::Peers { holders: ids.iter().copied().map(WorkerId).collect() }
}

#[test]
fn a_first_ring_waits_for_all_that_are_wanted_and_is_recorded_before_anyone_hears() {
    let mut story = Story::new(2);
    let outside = stance(None, Activity::Outside);
    assert_eq!(story.link(7, outside.clone()), [joined(7)]);
    assert_eq!(
        story.core.status().waits_for.as_deref(),
        Some("workers: 1 of 2 are here; 0.500 s at most, then fewer are enough")
    );
    let first = formation(1, 0, Source::Seed, &[(7, 0..4), (3, 4..8)]);
    assert_eq!(story.link(3, outside), [joined(3), formed(&first)]);
    assert_eq!(story.core.status().waits_for.as_deref(), Some("the job's log to take the new generation"));
    let told = story.event(Event::Recorded { generation: Generation(1) });
    assert_eq!(told, [send(3, Order::Form(Arc::clone(&first))), send(7, Order::Form(first))]);
}

#[test]
fn a_first_ring_starts_with_fewer_once_it_has_waited() {
    let mut story = Story::new(3);
    story.link(1, stance(None, Activity::Outside));
    assert_eq!(story.core.deadline(), Some(Millis(500)));
    story.now = 400;
    assert_eq!(story.stands(1, stance(None, Activity::Outside)), []);
    story.now = 500;
    let out = story.event(Event::Tick);
    assert_eq!(out, [formed(&formation(1, 0, Source::Seed, &[(1, 0..8)]))]);
}

#[test]
fn a_death_is_answered_when_every_survivor_holds_without_waiting_for_the_lease() {
    let mut story = Story::running(3);
    assert_eq!(story.event(Event::Unlinked { worker: WorkerId(2) }), []);
    // Survivor 1 has applied step 41, survivor 3 has not; the dead one is named by a peer and its connection is closed.
    let abort =
        Order::Abort { generation: Generation(1), reason: "worker 0000000000000002 is lost".to_owned() };
    let gone = Effect::Record(Entry::Lost {
        worker: WorkerId(2),
        step: Some(Step(10)),
        reason: "it closed its connections to the coordinator and to its peers".to_owned(),
    });
    assert_eq!(story.stands(1, stance(Some(41), holding(1, lost(2)))), [gone, send(3, abort)]);
    assert_eq!(story.core.status().waits_for.as_deref(), Some("word from 0000000000000003"));
    let next = formation(2, 41, peers(&[1]), &[(1, 0..4), (3, 4..8)]);
    assert_eq!(story.stands(3, stance(Some(40), holding(1, lost(2)))), [formed(&next)]);
}

#[test]
fn a_joiner_a_leaver_and_another_size_are_agreed_at_a_boundary() {
    let hold = |id| send(id, Order::Hold { generation: Generation(1), save: false });
    let mut story = Story::running(2);
    story.event(Event::Desired(3));
    assert_eq!(story.link(3, stance(None, Activity::Outside)), [joined(3), hold(1), hold(2)]);

    let mut story = Story::running(2);
    let leaving = Stance { leaving: true, ..stance(Some(20), running(1)) };
    assert_eq!(story.stands(2, leaving), [hold(1), hold(2)]);
    story.stands(1, stance(Some(21), holding(1, Cause::Ordered)));
    let gone = Stance { leaving: true, ..stance(Some(21), holding(1, Cause::Ordered)) };
    let reason = "the worker asked to go".to_owned();
    let next = formation(2, 21, peers(&[1]), &[(1, 0..8)]);
    let leave = send(2, Order::Leave { why: Leave::Dismissed { reason } });
    assert_eq!(story.stands(2, gone), [formed(&next), leave]);

    let mut story = Story::running(3);
    assert_eq!(story.event(Event::Desired(2)), [hold(1), hold(2), hold(3)]);
}

#[test]
fn a_new_coordinator_takes_up_the_ring_that_runs_and_repeats_what_was_not_heard() {
    let alive = formation(4, 30, peers(&[1, 2]), &[(1, 0..4), (2, 4..8)]);
    let found = Found {
        formation: Some(Formation::clone(&alive)),
        checkpoints: vec![Step(20)],
        floor: Generation(0),
        ..Found::default()
    };
    let core = Membership::new(options(2), Epoch(2), found, Millis(0));
    let mut story = Story { core, now: 0 };
    assert_eq!(story.link(1, stance(Some(33), running(4))), []);
    // Worker 2 never heard of generation 4: the coordinator before this one died between the log and the message.
    let told = story.link(2, stance(Some(30), holding(3, Cause::Ordered)));
    assert_eq!(told, [Effect::Send { worker: WorkerId(2), epoch: Epoch(2), order: Order::Form(alive) }]);
}

#[test]
fn one_that_is_fenced_says_nothing_more() {
    let mut story = Story::running(2);
    assert_eq!(story.event(Event::Fenced { by: "epoch 2".to_owned() }), []);
    assert_eq!(story.stands(1, stance(Some(12), holding(1, lost(2)))), []);
    assert_eq!(story.core.deadline(), None);
}

/// What this thread has computed so far, however many others there are.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux has it");
    Duration::from_nanos(
        stat.split(' ').next().and_then(|ns| ns.parse().ok()).expect("nanoseconds come first"),
    )
}

/// 10 000 workers make a ring in under 100 ms, come back to it in as much, and make another when it breaks; a heartbeat costs one
/// look-up. Measured is the time of this thread from the first word to the order for each; a word before the last, which sets off the
/// cut of the lanes, costs one look-up too.
#[test]
fn ten_thousand_workers_form_a_ring() {
    let count = 10_000u32;
    let link = |id: u32| Event::Linked {
        worker: WorkerId(id.into()),
        endpoints: Endpoints::default(),
        machine: "m".to_owned(),
        stance: stance(None, Activity::Outside),
    };
    // The best of a few: others use this machine too.
    let form = || {
        let big = Options { lanes: 1 << 14, ..options(count) };
        let (began, mut out) = (cpu_time(), Vec::new());
        let mut core = Membership::new(big, Epoch(1), Found::default(), Millis(0));
        (1..=count).for_each(|id| core.handle(Millis(0), link(id), &mut out));
        core.handle(Millis(0), Event::Recorded { generation: Generation(1) }, &mut out);
        (cpu_time() - began, core, out)
    };
    let formed = (0..4).map(|_| form()).min_by_key(|(took, ..)| *took);
    let (took, mut core, mut out) = formed.expect("there are four");
    let told =
        out.iter().filter(|effect| matches!(effect, Effect::Send { order: Order::Form(_), .. })).count();
    assert_eq!(told, count as usize);
    assert!(took.as_millis() < 100, "forming took {took:?}");

    for id in 1..=count {
        let event = Event::Stands { worker: WorkerId(id.into()), stance: stance(Some(0), running(1)) };
        core.handle(Millis(0), event, &mut out);
    }
    out.clear();
    let began = cpu_time();
    for step in 1..=10 {
        for id in 1..=count {
            let event = Event::Stands { worker: WorkerId(id.into()), stance: stance(Some(step), running(1)) };
            core.handle(Millis(step), event, &mut out);
        }
    }
    assert_eq!(out, []);
    let took = cpu_time() - began;
    assert!(took.as_millis() < 500, "100 000 heartbeats took {took:?}");

    // Another coordinator takes the ring up, and all come back to it; then a switch fails, and they come back again.
    let formation = core.formation().cloned();
    let found = Found { formation, floor: Generation(2), ..Found::default() };
    let big = Options { lanes: 1 << 14, ..options(count) };
    let mut core = Membership::new(big, Epoch(2), found, Millis(0));
    let back = |id: u32| Event::Linked {
        worker: WorkerId(id.into()),
        endpoints: Endpoints::default(),
        machine: "m".to_owned(),
        stance: stance(Some(10), running(1)),
    };
    for first in [true, false] {
        let began = cpu_time();
        if !first {
            let cut = |id: u32| Event::Unlinked { worker: WorkerId(id.into()) };
            (1..=count).for_each(|id| core.handle(Millis(1), cut(id), &mut out));
        }
        (1..=count).for_each(|id| core.handle(Millis(1), back(id), &mut out));
        let took = cpu_time() - began;
        assert_eq!(out, []);
        assert!(took.as_millis() < 100, "all coming back took {took:?}, first: {first}");
        assert!(core.trains());
    }

    // One dies, or a switch fails so that all break off and come back: either way the others hold, and a ring is formed anew.
    for switch in [false, true] {
        let (mut core, mut out, first) = (core.clone(), Vec::new(), if switch { 1 } else { 2 });
        let began = cpu_time();
        let gone = if switch { 1..=count } else { 1..=1 };
        gone.for_each(|id| {
            core.handle(Millis(2), Event::Unlinked { worker: WorkerId(id.into()) }, &mut out);
        });
        for id in first..=count {
            let cause = Cause::Broken { lost: (!switch).then_some(WorkerId(1)), reason: "reset".to_owned() };
            let (worker, stance) =
                (WorkerId(id.into()), stance(Some(10 + u64::from(id % 2)), holding(1, cause)));
            let event = match back(id) {
                Event::Linked { endpoints, machine, .. } if switch => {
                    Event::Linked { worker, endpoints, machine, stance }
                }
                _ => Event::Stands { worker, stance },
            };
            core.handle(Millis(2), event, &mut out);
        }
        let formed = |out: &[Effect]| {
            out.iter().find_map(|effect| match effect {
                Effect::Record(Entry::Formed(formation)) => Some(formation.clone()),
                _ => None,
            })
        };
        let formation = formed(&out).expect("all hold");
        core.handle(Millis(2), Event::Recorded { generation: formation.generation }, &mut out);
        let took = cpu_time() - began;
        let lost = usize::from(!switch);
        assert_eq!(formation.members.len(), count as usize - lost);
        let told = out.iter().filter(|effect| matches!(effect, Effect::Send { order: Order::Form(_), .. }));
        assert_eq!(told.count(), formation.members.len());
        assert!(took.as_millis() < 100, "forming anew took {took:?}, a switch failed: {switch}");
    }
}

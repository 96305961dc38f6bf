//! Tables: what is said, and nothing else, for one situation each. Histories are the simulator's business.

mod learners;
mod leavers;
mod reach;

use std::time::Instant;

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
    Endpoints { ring: vec![format!("w{id}:1")], peers: format!("w{id}:2") }
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
    story.now = 500;
    story.stands(1, stance(None, Activity::Outside));
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
fn a_worker_that_lost_only_its_coordinator_is_waited_for() {
    let mut story = Story::running(2);
    assert_eq!(story.event(Event::Unlinked { worker: WorkerId(2) }), []);
    story.now = 900;
    assert_eq!(story.link(2, stance(Some(50), running(1))), []);
    assert_eq!(story.core.status().waits_for, None);
}

#[test]
fn a_silent_worker_is_dropped_after_its_lease_and_may_come_back_as_another_member() {
    let mut story = Story::running(2);
    story.now = 400;
    story.stands(1, stance(Some(11), running(1)));
    assert_eq!(story.core.deadline(), Some(Millis(1000)));
    story.now = 1001;
    let reason = "silent for 1.000 s".to_owned();
    let abort =
        Order::Abort { generation: Generation(1), reason: "worker 0000000000000002 is lost".to_owned() };
    assert_eq!(
        story.event(Event::Tick),
        [
            Effect::Drop { worker: WorkerId(2), reason: reason.clone() },
            Effect::Record(Entry::Lost { worker: WorkerId(2), step: Some(Step(10)), reason }),
            send(1, abort),
        ]
    );
    let aborted = Cause::Broken { lost: None, reason: "aborted".to_owned() };
    story.stands(1, stance(Some(11), holding(1, aborted)));
    story.event(Event::Recorded { generation: Generation(2) });
    story.stands(1, stance(Some(11), running(2)));
    // It thaws, and says that it still runs generation 1: it is told to stop, and becomes a member at a boundary.
    let back = story.link(2, stance(Some(12), running(1)));
    let over = Order::Abort { generation: Generation(1), reason: "generation 1 is over".to_owned() };
    assert_eq!(back, [joined(2), send(2, over)]);
    let hold = story.stands(2, stance(Some(12), holding(1, Cause::Ordered)));
    assert_eq!(hold, [send(1, Order::Hold { generation: Generation(2), save: false })]);
    story.stands(1, stance(Some(14), holding(2, Cause::Ordered)));
    assert_eq!(
        story.core.formation(),
        Some(&*formation(3, 14, peers(&[1]), &[(1, 0..4), (2, 4..8)])),
        "state after step 12 is older than that after 14"
    );
}

#[test]
fn a_coordinator_that_slept_blames_nobody() {
    let mut story = Story::running(2);
    story.now = 60_000;
    assert_eq!(story.event(Event::Tick), []);
    assert_eq!(story.core.status().waits_for, None);
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
fn a_checkpoint_exists_once_every_writer_has_written_the_same_state() {
    let mut story = Story::running(2);
    let written = |half: u64, weights: &str| Written {
        step: Step(20),
        generation: Generation(1),
        parts: "[]".to_owned(),
        facts: weights.to_owned(),
        blocks: blocks(2 * half..2 * half + 2),
        all_blocks: 4,
        kept: None,
    };
    let with = |half, weights: &str| Stance {
        written: vec![written(half, weights)],
        ..stance(Some(20), running(1))
    };
    assert_eq!(story.stands(1, with(0, "a")), []);
    assert_eq!(story.stands(2, with(1, "b")), [], "replicas that differ make no checkpoint");
    let parts = vec![written(0, "a"), written(1, "a")];
    let commit = Effect::Commit { step: Step(20), generation: Generation(1), parts };
    assert_eq!(story.stands(2, with(1, "a")), [commit]);
    let told = |id| send(id, Order::Committed { step: Step(20) });
    assert_eq!(story.event(Event::Committed { step: Step(20) }), [told(1), told(2)]);
    // Said again, by a worker that has not heard of the commit yet.
    assert_eq!(story.stands(1, with(0, "a")), []);
}

#[test]
fn a_new_coordinator_takes_up_the_ring_that_runs_and_repeats_what_was_not_heard() {
    let alive = formation(4, 30, peers(&[1, 2]), &[(1, 0..4), (2, 4..8)]);
    let found = Found {
        formation: Some(Formation::clone(&alive)),
        checkpoints: vec![Step(20)],
        floor: Generation(0),
        quarantined: Vec::new(),
    };
    let core = Membership::new(options(2), Epoch(2), found, Millis(0));
    let mut story = Story { core, now: 0 };
    assert_eq!(story.link(1, stance(Some(33), running(4))), []);
    // Worker 2 never heard of generation 4: the coordinator before this one died between the log and the message.
    let told = story.link(2, stance(Some(30), holding(3, Cause::Ordered)));
    assert_eq!(told, [Effect::Send { worker: WorkerId(2), epoch: Epoch(2), order: Order::Form(alive) }]);
}

#[test]
fn a_step_that_fails_again_goes_back_to_the_checkpoint_and_then_fails_the_job() {
    let mut story = Story::running(1);
    let fault = Cause::Fault { reason: "row group 3 cannot be read".to_owned() };
    let mut sources = Vec::new();
    for generation in 1..=4 {
        story.stands(1, stance(Some(15), holding(generation, fault.clone())));
        if let Some(formation) = story.core.formation() {
            sources.push(formation.source.clone());
        }
        story.event(Event::Listed { steps: vec![Step(10)] });
        if sources.len() < generation as usize
            && let Some(formation) = story.core.formation()
        {
            sources.push(formation.source.clone());
        }
        story.event(Event::Recorded { generation: Generation(generation + 1) });
        story.stands(1, stance(Some(15), running(generation + 1)));
    }
    let checkpoint = Source::Checkpoint { step: Step(10) };
    assert_eq!(sources, [peers(&[1]), checkpoint.clone(), checkpoint]);
    let reason = "step 15 has failed 4 times: row group 3 cannot be read".to_owned();
    assert_eq!(story.core.status().outcome, Some(Outcome::Failed { reason }));
}

#[test]
fn with_no_checkpoint_that_can_be_read_the_job_fails_instead_of_starting_over() {
    let found =
        Found { formation: None, checkpoints: vec![Step(10)], floor: Generation(0), quarantined: Vec::new() };
    let core = Membership::new(options(1), Epoch(1), found, Millis(0));
    let mut story = Story { core, now: 0 };
    story.link(1, stance(None, Activity::Outside));
    story.event(Event::Recorded { generation: Generation(1) });
    let damaged = Cause::NoState { reason: "part 3 of checkpoint 10 has another digest".to_owned() };
    let out = story.stands(1, stance(None, holding(1, damaged)));
    assert!(out.contains(&Effect::List), "{out:?}");
    let out = story.event(Event::Listed { steps: vec![Step(10)] });
    let outcome = Outcome::Failed { reason: "none of the checkpoints can be read".to_owned() };
    assert_eq!(out.first(), Some(&Effect::Record(Entry::Ended { outcome })));
}

#[test]
fn the_end_needs_the_last_checkpoint() {
    let mut story = Story::running(1);
    let ended = stance(Some(100), holding(1, Cause::Ended));
    let save =
        Formation { save_first: true, ..Formation::clone(&formation(2, 100, peers(&[1]), &[(1, 0..8)])) };
    assert_eq!(story.stands(1, ended), [formed(&Arc::new(save))]);
    story.event(Event::Recorded { generation: Generation(2) });
    let parts = Written {
        step: TOTAL,
        generation: Generation(2),
        parts: "[]".to_owned(),
        facts: "a".to_owned(),
        blocks: blocks(0..4),
        all_blocks: 4,
        kept: None,
    };
    let ended = Stance { written: vec![parts], ..stance(Some(100), holding(2, Cause::Ended)) };
    assert!(matches!(story.stands(1, ended)[..], [Effect::Commit { .. }]));
    let out = story.event(Event::Committed { step: TOTAL });
    let done = send(1, Order::Leave { why: Leave::Done });
    assert_eq!(out.first(), Some(&Effect::Record(Entry::Ended { outcome: Outcome::Completed })));
    assert_eq!(out.last(), Some(&done));
}

#[test]
fn a_pause_takes_a_checkpoint_and_a_cancel_does_not() {
    let mut story = Story::running(1);
    assert_eq!(
        story.event(Event::Goal(Goal::Pause)),
        [send(1, Order::Hold { generation: Generation(1), save: true })]
    );
    let mut story = Story::running(1);
    let reason = "the job is cancelled".to_owned();
    assert_eq!(
        story.event(Event::Goal(Goal::Cancel)),
        [send(1, Order::Abort { generation: Generation(1), reason })]
    );
}

#[test]
fn a_checkpoint_that_is_asked_for_is_taken_at_a_boundary_once() {
    let hold = |id, generation| send(id, Order::Hold { generation: Generation(generation), save: true });
    let mut story = Story::running(2);
    // All that is trained is in one: there is nothing to do.
    assert_eq!(story.event(Event::CheckpointWanted), []);
    assert_eq!(story.core.wanted(), None);

    story.event(Event::Reported { step: Step(17) });
    assert_eq!(story.event(Event::CheckpointWanted), [hold(1, 1), hold(2, 1)]);
    assert_eq!(story.core.wanted(), Some(Step(17)));
    assert_eq!(
        story.core.status().waits_for.as_deref(),
        Some("the next step boundary, to take a checkpoint")
    );
    assert_eq!(story.event(Event::CheckpointWanted), [], "asked again, it is still the same");
    // They hold when their parts are written; the ring goes on before the manifest is.
    let wrote = |id: u64, activity| Stance { written: vec![half(18, id == 1)], ..stance(Some(18), activity) };
    story.stands(1, wrote(1, holding(1, Cause::Ordered)));
    let all = Written { blocks: blocks(0..4), kept: None, ..half(18, true) };
    let last = Stance { written: vec![all], ..stance(Some(18), holding(1, Cause::Ordered)) };
    let out = story.stands(2, last);
    assert!(matches!(out[0], Effect::Commit { step: Step(18), .. }), "{out:?}");
    story.event(Event::Recorded { generation: Generation(2) });
    story.stands(1, stance(Some(18), running(2)));
    let out = story.stands(2, stance(Some(18), running(2)));
    assert!(
        matches!(out[..], [Effect::Record(Entry::Recovered { .. })]),
        "it is not asked for twice: {out:?}"
    );
    story.event(Event::Committed { step: Step(18) });
    assert_eq!(story.core.wanted(), None);
}

#[test]
fn a_checkpoint_that_is_asked_for_survives_a_death_and_not_a_return_to_an_older_one() {
    let mut story = Story::running(2);
    story.event(Event::Reported { step: Step(17) });
    story.event(Event::CheckpointWanted);
    story.event(Event::Unlinked { worker: WorkerId(2) });
    story.stands(1, stance(Some(17), holding(1, lost(2))));
    story.event(Event::Recorded { generation: Generation(2) });
    let hold = Order::Hold { generation: Generation(2), save: true };
    assert_eq!(story.stands(1, stance(Some(17), running(2)))[0], send(1, hold));

    // All who held the state are gone: what is left is in a checkpoint.
    story.event(Event::Unlinked { worker: WorkerId(1) });
    story.now = 1000;
    story.link(3, stance(None, Activity::Outside));
    story.now = 1500;
    story.event(Event::Tick);
    story.stands(3, stance(None, Activity::Outside));
    story.now = 2100;
    story.event(Event::Tick);
    story.event(Event::Listed { steps: vec![Step(10)] });
    story.event(Event::Recorded { generation: Generation(3) });
    let out = story.stands(3, stance(Some(10), running(3)));
    assert!(matches!(out[..], [Effect::Record(Entry::Recovered { .. })]), "{out:?}");
    assert_eq!(story.core.wanted(), None);
}

#[test]
fn one_that_is_fenced_says_nothing_more() {
    let mut story = Story::running(2);
    assert_eq!(story.event(Event::Fenced { by: "epoch 2".to_owned() }), []);
    assert_eq!(story.stands(1, stance(Some(12), holding(1, lost(2)))), []);
    assert_eq!(story.core.deadline(), None);
}

/// 10 000 workers make a ring in under 100 ms of this thread's time, and a heartbeat costs one look-up.
#[test]
fn ten_thousand_workers_form_a_ring() {
    let count = 10_000u32;
    let mut big = options(count);
    big.lanes = 1 << 14;
    let mut core = Membership::new(big, Epoch(1), Found::default(), Millis(0));
    let mut out = Vec::new();
    let link = |id: u32| Event::Linked {
        worker: WorkerId(id.into()),
        endpoints: Endpoints::default(),
        machine: "m".to_owned(),
        stance: stance(None, Activity::Outside),
    };
    (1..count).for_each(|id| core.handle(Millis(0), link(id), &mut out));
    out.clear();
    // The best of a few: others use this machine too.
    let form = |mut core: Membership| {
        let (began, mut out) = (Instant::now(), Vec::new());
        core.handle(Millis(0), link(count), &mut out);
        core.handle(Millis(0), Event::Recorded { generation: Generation(1) }, &mut out);
        (began.elapsed(), core, out)
    };
    let formed = (0..8).map(|_| form(core.clone())).min_by_key(|(took, ..)| *took);
    let (took, mut core, mut out) = formed.expect("there are eight");
    let told =
        out.iter().filter(|effect| matches!(effect, Effect::Send { order: Order::Form(_), .. })).count();
    assert_eq!(told, count as usize);
    assert!(took.as_millis() < 100, "forming took {took:?}");

    for id in 1..=count {
        let event = Event::Stands { worker: WorkerId(id.into()), stance: stance(Some(0), running(1)) };
        core.handle(Millis(0), event, &mut out);
    }
    out.clear();
    let began = Instant::now();
    for step in 1..=10 {
        for id in 1..=count {
            let event = Event::Stands { worker: WorkerId(id.into()), stance: stance(Some(step), running(1)) };
            core.handle(Millis(step), event, &mut out);
        }
    }
    assert_eq!(out, []);
    assert!(began.elapsed().as_millis() < 500, "100 000 heartbeats took {:?}", began.elapsed());
}

#[test]
fn a_replica_that_differs_is_sent_away_and_its_machine_with_it() {
    let mut story = Story::running(3);
    let reason = "worker 2 in block 5".to_owned();
    let diverged = || Cause::Diverged { workers: vec![WorkerId(2)], reason: reason.clone() };
    (1..=2).for_each(|id| drop(story.stands(id, stance(Some(40), holding(1, diverged())))));
    let evicted = Entry::Evicted {
        worker: WorkerId(2),
        machine: "m".to_owned(),
        step: Some(Step(40)),
        reason: reason.clone(),
    };
    let leave = Order::Leave { why: Leave::Evicted { reason: reason.clone() } };
    let next = formation(2, 40, peers(&[1, 3]), &[(1, 0..4), (3, 4..8)]);
    let out = story.stands(3, stance(Some(40), holding(1, diverged())));
    assert_eq!(out, [send(2, leave), Effect::Record(evicted), formed(&next)]);
    let told = story.link(9, stance(None, Activity::Outside));
    assert!(matches!(&told[..], [Effect::Send { order: Order::Leave { why: Leave::Evicted { .. } }, .. }]));
}

#[test]
fn with_no_majority_nobody_is_blamed_and_the_checkpoint_is_right() {
    let mut story = Story::running(2);
    let diverged = || Cause::Diverged { workers: Vec::new(), reason: "they differ".to_owned() };
    story.stands(1, stance(Some(40), holding(1, diverged())));
    story.stands(2, stance(Some(40), holding(1, diverged())));
    let out = story.event(Event::Listed { steps: vec![Step(10)] });
    let checkpoint = Source::Checkpoint { step: Step(10) };
    assert_eq!(out, [formed(&formation(2, 10, checkpoint, &[(1, 0..4), (2, 4..8)]))]);
}

#[test]
fn a_worker_that_says_what_cannot_be_is_turned_away() {
    // A step beyond the run's end: no coordinator of this run will ever take it.
    let mut story = Story::running(2);
    let before = story.core.clone();
    let out = story.link(9, stance(Some(TOTAL.0 + 1), Activity::Outside));
    let reason = "it speaks of step 101, and the run has 100; start workers of this run".to_owned();
    let why = Leave::Refused { reason: reason.clone() };
    let refused = Effect::Send { worker: WorkerId(9), epoch: Epoch(1), order: Order::Leave { why } };
    assert_eq!(out, [refused, Effect::Drop { worker: WorkerId(9), reason }]);
    assert_eq!(story.core, before, "nothing is known of it");
    // A generation that was never formed: another coordinator may know it, so the worker may try again.
    let out = story.stands(2, stance(Some(12), running(7)));
    let [Effect::Drop { worker: WorkerId(2), reason }] = &out[..] else { panic!("{out:?}") };
    assert_eq!(reason, "it speaks of generation 7, of which nobody was told; the newest here is 1");
    // It is not taken at its word, and its lease runs.
    assert_eq!(story.core.newest_held(), Some(Step(10)));
    assert_eq!(story.stands(2, stance(Some(11), running(1))), []);
    story.now += 999;
    story.stands(1, stance(Some(20), running(1)));
    story.now += 1;
    let out = story.event(Event::Tick);
    assert!(matches!(&out[0], Effect::Record(Entry::Lost { worker: WorkerId(2), .. })), "{out:?}");
}

/// What worker 1 says of checkpoint `step` of generation 1, of which it wrote the first half; worker 2 owns the second.
fn half(step: u64, kept: bool) -> Written {
    Written {
        step: Step(step),
        generation: Generation(1),
        parts: "[]".to_owned(),
        facts: "a".to_owned(),
        blocks: blocks(0..2),
        all_blocks: 4,
        kept: kept.then_some(Kept { owner: WorkerId(2), blocks: 2..4 }),
    }
}

fn whole(step: u64) -> Written {
    Written { blocks: blocks(0..4), ..half(step, false) }
}

fn write_kept(id: u64, step: u64) -> Effect {
    send(id, Order::WriteKept { step: Step(step), generation: Generation(1) })
}

#[test]
fn who_keeps_blocks_of_one_that_is_gone_is_asked_for_them_and_not_sent_away_before() {
    let mut story = Story::running(2);
    let holds =
        |written| Stance { written: vec![written], leaving: true, ..stance(Some(21), holding(1, lost(2))) };
    story.stands(1, Stance { written: vec![half(20, true)], ..stance(Some(21), running(1)) });
    story.event(Event::Unlinked { worker: WorkerId(2) });
    let out = story.stands(1, holds(half(20, true)));
    assert_eq!(out.last(), Some(&write_kept(1, 20)));
    assert_eq!(story.stands(1, holds(half(20, true))), [], "it is asked once");
    let out = story.stands(1, holds(whole(20)));
    let [Effect::Commit { step: Step(20), .. }, Effect::Send { order: Order::Leave { .. }, .. }] = &out[..]
    else {
        panic!("{out:?}")
    };
}

#[test]
fn the_end_waits_for_a_checkpoint_of_which_there_are_copies_and_a_while_for_those_who_may_have_them() {
    let ended = |written: Vec<Written>| Stance { written, ..stance(Some(100), holding(1, Cause::Ended)) };
    let completed = Effect::Record(Entry::Ended { outcome: Outcome::Completed });
    let with_last_committed = |kept| {
        let mut story = Story::running(2);
        let out = story.stands(1, ended(vec![half(90, kept), whole(100)]));
        assert!(matches!(out[..], [Effect::Commit { step: TOTAL, .. }]), "{out:?}");
        story.stands(2, ended(Vec::new()));
        let out = story.event(Event::Committed { step: TOTAL });
        (story, out)
    };
    // Its owner lives, and will write nothing more.
    let (mut story, out) = with_last_committed(true);
    assert_eq!(out, [write_kept(1, 90), send(1, Order::Committed { step: TOTAL })]);
    assert_eq!(story.core.status().waits_for.as_deref(), Some("the parts of checkpoint 90"));
    story.now = 900;
    assert_eq!(story.stands(2, ended(Vec::new())), []);
    let out = story.stands(1, ended(vec![whole(90)]));
    assert!(matches!(out[..], [Effect::Commit { step: Step(90), .. }]), "{out:?}");
    // A manifest that cannot be written is tried again.
    let reason = "the store answers 500".to_owned();
    let failed = Entry::CheckpointFailed { step: Step(90), reason: reason.clone() };
    assert_eq!(story.event(Event::CommitFailed { step: Step(90), reason }), [Effect::Record(failed)]);
    assert_eq!(story.core.deadline(), Some(Millis(1025)));
    story.now = 1025;
    let out = story.event(Event::Tick);
    assert!(matches!(out[..], [Effect::Commit { step: Step(90), .. }]), "{out:?}");
    assert_eq!(story.event(Event::Committed { step: Step(90) })[0], completed);
    // Nobody who is here has the rest.
    let (mut story, out) = with_last_committed(false);
    assert_eq!(out, [send(1, Order::Committed { step: TOTAL })]);
    assert_eq!(story.core.deadline(), Some(Millis(500)));
    story.now = 500;
    assert_eq!(story.event(Event::Tick)[0], completed);
}

#[test]
fn a_worker_that_ends_by_itself_is_lost_at_once_and_the_log_has_why() {
    let mut story = Story::new(2);
    story.link(1, stance(None, Activity::Outside));
    let failed = |reason: &str| Event::Failed { worker: WorkerId(1), reason: reason.to_owned() };
    let reason = "it failed: data/tales: there is no index".to_owned();
    let lost = Effect::Record(Entry::Lost { worker: WorkerId(1), step: None, reason });
    assert_eq!(story.event(failed("data/tales: there is no index")), [lost]);
    assert_eq!(story.event(failed("again")), [], "it is not here any more");
    assert_eq!(story.event(Event::Unlinked { worker: WorkerId(1) }), []);
    // A member is as one that died.
    let mut story = Story::running(2);
    let out = story.event(failed("out of memory"));
    let [
        Effect::Record(Entry::Lost { step: Some(Step(10)), .. }),
        Effect::Send { worker, order: Order::Abort { .. }, .. },
    ] = &out[..]
    else {
        panic!("{out:?}")
    };
    assert_eq!(*worker, WorkerId(2));
}

#[test]
fn a_worker_that_cannot_write_its_parts_is_told_of_once_a_checkpoint() {
    let mut story = Story::running(2);
    let unwritten = |step, generation| Unwritten {
        step: Step(step),
        generation: Generation(generation),
        reason: "no space left on device".to_owned(),
    };
    let with = |all: &[Unwritten]| Stance { unwritten: all.to_vec(), ..stance(Some(21), running(1)) };
    let reason = format!("worker {} on m could not write its parts: no space left on device", WorkerId(2));
    let failed = |step| Effect::Record(Entry::CheckpointFailed { step: Step(step), reason: reason.clone() });
    assert_eq!(story.stands(2, with(&[unwritten(20, 1)])), [failed(20)]);
    assert_eq!(story.stands(2, with(&[unwritten(20, 1)])), [], "with every heartbeat");
    assert_eq!(story.stands(1, with(&[unwritten(20, 1)])), [], "that it is not whole is known");
    story.event(Event::Unlinked { worker: WorkerId(2) });
    assert_eq!(story.link(2, with(&[unwritten(20, 1), unwritten(21, 1)])), [failed(21)], "the next one");
    // Whoever speaks of what is committed meanwhile is told so, and it is no failure.
    let other = with(&[unwritten(10, 1)]);
    assert_eq!(story.stands(1, other), [send(1, Order::Committed { step: Step(10) })]);
}

#[test]
fn nobody_left_to_train_is_no_failure_when_all_is_trained() {
    let mut story = Story::running(1);
    story.stands(
        1,
        Stance { written: vec![half(90, false), whole(100)], ..stance(Some(100), holding(1, Cause::Ended)) },
    );
    story.event(Event::Committed { step: TOTAL });
    let out = story.event(Event::GivenUp { reason: "no worker is left".to_owned() });
    assert_eq!(out[0], Effect::Record(Entry::Ended { outcome: Outcome::Completed }));
}

#[test]
fn a_ring_that_follows_another_says_how_long_it_took_and_what_it_cost() {
    let recovered = |generation, took, again, checkpoint: Option<u64>| {
        let (generation, took) = (Generation(generation), Millis(took));
        let checkpoint = checkpoint.map(Step);
        Effect::Record(Entry::Recovered { generation, workers: 1, took, again, checkpoint })
    };
    let mut story = Story::running(2);
    story.event(Event::Reported { step: Step(42) });
    (story.now, _) = (300, story.event(Event::Unlinked { worker: WorkerId(2) }));
    // Rank 0, which is gone or not, has told of one step more than the survivor holds.
    story.stands(1, stance(Some(41), holding(1, lost(2))));
    story.now = 450;
    story.event(Event::Recorded { generation: Generation(2) });
    assert_eq!(story.stands(1, stance(Some(41), running(2))), [recovered(2, 150, 1, None)]);
    story.event(Event::Committed { step: Step(40) });
    // Two that differ in turn: what is held is not used, and the time counts from the first.
    let diverged = || Cause::Diverged { workers: Vec::new(), reason: "they differ".to_owned() };
    story.now = 500;
    story.stands(1, stance(Some(52), holding(2, diverged())));
    story.event(Event::Listed { steps: vec![Step(40)] });
    story.event(Event::Recorded { generation: Generation(3) });
    story.now = 700;
    let broken = Cause::Broken { lost: None, reason: "connection reset".to_owned() };
    story.stands(1, stance(Some(40), holding(3, broken)));
    story.event(Event::Listed { steps: vec![Step(40)] });
    story.event(Event::Recorded { generation: Generation(4) });
    story.now = 900;
    let out = story.stands(1, stance(Some(40), running(4)));
    let Effect::Record(Entry::Recovered { took: Millis(400), again: 12, .. }) = &out[0] else {
        panic!("{out:?}")
    };
}

#[test]
fn a_slow_member_is_told_of_and_nothing_else_comes_of_it() {
    let mut story = Story::running(2);
    let paced = |id, lane_us: u64| {
        let spent = Spent { compute_us: lane_us * 4 * 20, ..Spent::default() };
        let pace = Pace { generation: Generation(1), lanes: 4, steps: 20, spent };
        Event::Paced { worker: WorkerId(id), pace }
    };
    let before = story.core.clone();
    assert_eq!(story.event(paced(2, 250)), []);
    let slow = Entry::Slow { worker: WorkerId(2), machine: "m".to_owned(), step: Step(10), percent: 250 };
    assert_eq!(story.event(paced(1, 100)), [Effect::Record(slow)]);
    let shown = |story: &Story| {
        let status = story.core.status();
        status.attendants.iter().map(|a| (a.slow, a.pace.map(|pace| pace.steps))).collect::<Vec<_>>()
    };
    assert_eq!(shown(&story), [(None, Some(20)), (Some(250), Some(20))]);
    assert_eq!(story.event(paced(2, 100)), []);
    let in_step = Entry::InStep { worker: WorkerId(2), step: Step(10) };
    assert_eq!(story.event(paced(1, 100)), [Effect::Record(in_step)]);
    story.core.paces = before.paces.clone();
    assert_eq!(story.core, before);
}

/// Who is found dead when the first look comes at `first`, and the one after it at `second`; the leases end at 1000.
fn found_dead(first: u64, second: u64) -> [usize; 2] {
    let mut story = Story::running(2);
    assert_eq!(story.core.deadline(), Some(Millis(1000)));
    [first, second].map(|at| {
        story.now = at;
        let out = story.event(Event::Tick);
        out.iter().filter(|effect| matches!(effect, Effect::Record(Entry::Lost { .. }))).count()
    })
}

#[test]
fn one_that_slept_through_its_deadline_listens_for_half_a_lease_before_it_finds_anyone_dead() {
    assert_eq!(found_dead(1000, 1001), [2, 0], "in time");
    assert_eq!(found_dead(1125, 1126), [2, 0], "an eighth of a lease late is no sleep");
    assert_eq!(found_dead(1126, 1625), [0, 0], "half a lease from when it woke");
    assert_eq!(found_dead(1126, 1626), [0, 2]);
    assert_eq!(found_dead(60_000, 60_500), [0, 2]);
}

#[test]
fn it_forgives_once_a_lease_or_a_machine_that_is_always_late_would_find_nobody_dead() {
    assert_eq!(found_dead(1126, 2126), [0, 2], "late again, and no more than a lease after it forgave");
    assert_eq!(found_dead(1126, 2127), [0, 0]);
}

#[test]
fn lanes_are_cut_by_speed_when_that_is_worth_a_new_ring_and_not_too_soon() {
    let mut story = Story::running(2);
    story.core.options.by_speed = true;
    let paced = |generation, id, lanes: u64, lane_us: u64| {
        let spent = Spent { compute_us: lane_us * lanes * 20, ..Spent::default() };
        let (generation, lanes) = (Generation(generation), lanes as u32);
        Event::Paced { worker: WorkerId(id), pace: Pace { generation, lanes, steps: 20, spent } }
    };
    let hold = |id| send(id, Order::Hold { generation: Generation(1), save: false });
    // Not slow enough to be told of, but for the lanes: 100 × 6 and 140 × 4.
    story.event(paced(1, 2, 4, 140));
    story.event(Event::Reported { step: Step(99) });
    assert_eq!(story.event(paced(1, 1, 4, 100)), [], "it has not trained for five windows");
    story.event(Event::Reported { step: Step(100) });
    assert_eq!(story.event(paced(1, 1, 4, 100)), [hold(1), hold(2)]);
    assert_eq!(
        story.core.status().waits_for.as_deref(),
        Some("the next step boundary, to share the lanes out by speed")
    );
    assert_eq!(story.event(paced(1, 1, 4, 100)), [], "it is asked once");
    story.stands(1, stance(Some(90), holding(1, Cause::Ordered)));
    let next = formation(2, 90, peers(&[1, 2]), &[(1, 0..5), (2, 5..8)]);
    assert_eq!(story.stands(2, stance(Some(90), holding(1, Cause::Ordered))), [formed(&next)]);
    // The same speeds ask for nothing more, and a newcomer counts as one of the others.
    story.event(Event::Recorded { generation: Generation(2) });
    (1..=2).for_each(|id| drop(story.stands(id, stance(Some(90), running(2)))));
    story.event(Event::Reported { step: Step(300) });
    story.event(paced(2, 2, 3, 140));
    assert_eq!(story.event(paced(2, 1, 5, 100)), []);
    assert_eq!(story.core.cut(&[1, 2, 3].map(WorkerId)), [0..3, 3..5, 5..8]);
}

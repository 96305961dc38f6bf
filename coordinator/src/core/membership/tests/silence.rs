//! Silence, and what is no silence: leases, connections that close, a coordinator that slept, a worker that ends by itself.

use super::*;

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

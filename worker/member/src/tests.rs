//! Tables: what a worker does on one event, and that it does nothing else.

use super::*;

fn formation(generation: u64, start: u64) -> Arc<Formation> {
    let source = Source::Peers { holders: vec![WorkerId(1)] };
    let (generation, start) = (Generation(generation), Step(start));
    Arc::new(Formation { generation, start, source, members: Vec::new(), save_first: false })
}

fn form(epoch: u64, generation: u64, start: u64) -> Event {
    Event::Ordered { epoch: Epoch(epoch), order: Order::Form(formation(generation, start)) }
}

fn abort(generation: u64) -> Event {
    let order = Order::Abort { generation: Generation(generation), reason: "a member is lost".to_owned() };
    Event::Ordered { epoch: Epoch(1), order }
}

fn left(generation: u64, holds: u64) -> Event {
    Event::Left {
        generation: Generation(generation),
        holds: Some(Step(holds)),
        shard: None,
        cause: Cause::Ordered,
    }
}

fn after(member: &mut Member, event: Event) -> Vec<Effect> {
    let mut out = Vec::new();
    member.handle(event, &mut out);
    out
}

/// A worker that runs generation 3, in the reign of coordinator 1.
fn running() -> Member {
    let mut member = Member::new(None);
    let begins = [
        Event::Linked,
        form(1, 3, 10),
        Event::Ready { generation: Generation(3), holds: Some(Step(10)), shard: None },
    ];
    begins.into_iter().for_each(|event| drop(after(&mut member, event)));
    assert_eq!(member.stance().activity, Activity::Running { generation: Generation(3) });
    member
}

#[test]
fn a_ring_is_formed_and_said_to_be() {
    let mut member = Member::new(None);
    assert_eq!(after(&mut member, Event::Linked), []);
    let forming =
        Stance { activity: Activity::Forming { generation: Generation(3) }, ..member.stance().clone() };
    let out = after(&mut member, form(1, 3, 10));
    assert_eq!(out, [Effect::Form(formation(3, 10)), Effect::Say(forming.clone())]);
    let running = Stance {
        activity: Activity::Running { generation: Generation(3) },
        holds: Some(Step(10)),
        ..forming
    };
    let out =
        after(&mut member, Event::Ready { generation: Generation(3), holds: Some(Step(10)), shard: None });
    assert_eq!(out, [Effect::Say(running)]);
    // Steps are told with the heartbeats.
    assert_eq!(after(&mut member, Event::Applied { holds: Step(11) }), []);
    assert_eq!(member.stance().holds, Some(Step(11)));
}

#[test]
fn a_learner_says_at_once_that_it_holds_the_state() {
    let mut member = Member::new(None);
    [Event::Linked, form(1, 3, 10)].into_iter().for_each(|event| drop(after(&mut member, event)));
    let out = after(&mut member, Event::Ready { generation: Generation(3), holds: None, shard: None });
    let learns =
        Stance { activity: Activity::Running { generation: Generation(3) }, ..member.stance().clone() };
    assert_eq!((out, learns.holds), (vec![Effect::Say(learns.clone())], None));
    let holds = Stance { holds: Some(Step(12)), ..learns };
    assert_eq!(after(&mut member, Event::Applied { holds: Step(12) }), [Effect::Say(holds)]);
    assert_eq!(after(&mut member, Event::Applied { holds: Step(13) }), [], "the heartbeats tell of that");
}

#[test]
fn what_is_old_is_not_obeyed() {
    let mut member = running();
    assert_eq!(after(&mut member, form(1, 3, 10)), [], "said twice");
    assert_eq!(after(&mut member, form(1, 2, 5)), [], "an older generation");
    assert_eq!(after(&mut member, abort(2)), [], "the end of an older one");
    let hold = Order::Hold { generation: Generation(2), save: false };
    assert_eq!(after(&mut member, Event::Ordered { epoch: Epoch(1), order: hold.clone() }), []);
    assert_eq!(after(&mut member, left(2, 5)), [], "it left that one before");
    // A coordinator that was replaced has no say.
    let committed = Order::Committed { step: Step(0) };
    after(&mut member, Event::Ordered { epoch: Epoch(2), order: committed });
    assert_eq!(after(&mut member, form(1, 9, 10)), []);
    assert_eq!(after(&mut member, abort(3)), []);
}

#[test]
fn a_later_ring_waits_until_the_present_one_is_left() {
    let mut member = running();
    assert!(matches!(after(&mut member, form(1, 4, 12))[..], [Effect::Abort { .. }]));
    assert!(matches!(after(&mut member, left(3, 12))[..], [Effect::Form(_), Effect::Say(_)]));
    assert_eq!(member.stance().activity, Activity::Forming { generation: Generation(4) });
    assert_eq!(member.stance().holds, Some(Step(12)));
}

#[test]
fn a_ring_that_is_over_is_never_joined() {
    let mut member = Member::new(None);
    after(&mut member, Event::Linked);
    let out = after(&mut member, abort(5));
    assert!(matches!(&out[..], [Effect::Say(Stance { activity: Activity::Holding { .. }, .. })]), "{out:?}");
    assert_eq!(after(&mut member, form(1, 5, 0)), []);
}

#[test]
fn a_step_is_not_taken_back() {
    let mut member = running();
    after(&mut member, left(3, 12));
    let out = after(&mut member, form(1, 4, 11));
    let [Effect::Say(Stance { activity: Activity::Holding { generation, cause }, .. })] = &out[..] else {
        panic!("{out:?}")
    };
    assert_eq!(*generation, Generation(4));
    assert!(matches!(cause, Cause::Broken { lost: None, .. }));
    // From a checkpoint it is: the coordinator has given up what workers hold.
    let stored =
        Formation { source: Source::Checkpoint { step: Step(5) }, ..Formation::clone(&formation(5, 5)) };
    let order = Order::Form(Arc::new(stored.clone()));
    let out = after(&mut member, Event::Ordered { epoch: Epoch(1), order });
    assert_eq!(out[0], Effect::Form(Arc::new(stored)));
}

#[test]
fn a_worker_that_is_asked_to_go_says_so_and_goes_when_it_may() {
    let mut member = running();
    let out = after(&mut member, Event::Terminate);
    assert!(matches!(&out[..], [Effect::Say(Stance { leaving: true, .. })]), "{out:?}");
    after(&mut member, left(3, 20));
    let why = Leave::Dismissed { reason: "the worker asked to go".to_owned() };
    let order = Order::Leave { why: why.clone() };
    assert_eq!(after(&mut member, Event::Ordered { epoch: Epoch(1), order }), [Effect::Exit(why)]);
    assert!(member.is_gone());
    assert_eq!(after(&mut member, form(1, 9, 20)), []);
}

#[test]
fn with_no_coordinator_to_ask_it_leaves_its_ring_and_goes() {
    let mut member = running();
    after(&mut member, Event::Unlinked);
    assert!(matches!(after(&mut member, Event::Terminate)[..], [Effect::Abort { .. }]));
    assert!(matches!(after(&mut member, left(3, 20))[..], [Effect::Exit(Leave::Dismissed { .. })]));
}

#[test]
fn parts_are_told_until_their_checkpoint_is_known_to_be_committed() {
    let mut member = running();
    let written = |step| Written {
        step: Step(step),
        generation: Generation(3),
        parts: "[]".to_owned(),
        facts: "a".to_owned(),
        blocks: std::iter::once(0..1).collect(),
        all_blocks: 1,
        kept: None,
    };
    let kept = |member: &Member| member.stance().written.iter().map(|w| w.step.0).collect::<Vec<_>>();
    for step in 1..=WRITTEN_MAX as u64 + 1 {
        after(&mut member, Event::Wrote(written(10 * step)));
    }
    assert_eq!(kept(&member), (2..=17).map(|step| 10 * step).collect::<Vec<_>>(), "so many are kept");
    let order = Order::Committed { step: Step(50) };
    after(&mut member, Event::Ordered { epoch: Epoch(1), order });
    assert!(!kept(&member).contains(&50) && kept(&member).len() == 15);
    // Long lists of parts are fewer, and the newest is told however long it is.
    for (step, bytes, count) in [(200, WRITTEN_BYTES_MAX / 2, 16), (210, WRITTEN_BYTES_MAX / 2 + 1, 1)] {
        let parts = "x".repeat(bytes);
        after(&mut member, Event::Wrote(Written { parts, ..written(step) }));
        assert_eq!((kept(&member).len(), kept(&member).last()), (count, Some(&step)));
    }
}

#[test]
fn a_second_copy_is_written_when_asked_for_and_told_of_until_it_is_let_go() {
    let mut member = running();
    let (step, generation) = (Step(10), Generation(3));
    let kept = Kept { owner: WorkerId(2), blocks: 1..2 };
    let written = Written {
        step,
        generation,
        parts: "[]".to_owned(),
        facts: "a".to_owned(),
        blocks: std::iter::once(0..1).collect(),
        all_blocks: 2,
        kept: Some(kept.clone()),
    };
    after(&mut member, Event::Wrote(written));
    after(&mut member, left(3, 12));
    let order = Order::WriteKept { step, generation };
    let out = after(&mut member, Event::Ordered { epoch: Epoch(1), order });
    assert_eq!(out, [Effect::WriteKept { step, generation }], "out of a ring, too");
    assert_eq!(after(&mut member, Event::LetGo { step, generation: Generation(2) }), [], "another copy");
    assert_eq!(member.stance().written[0].kept, Some(kept));
    assert!(matches!(after(&mut member, Event::LetGo { step, generation })[..], [Effect::Say(_)]));
    assert_eq!(member.stance().written[0].kept, None);
}

#[test]
fn what_could_not_be_written_is_told_until_it_is_or_something_newer_is_committed() {
    let mut member = running();
    let unwritten = |step| {
        let reason = "no space left on device".to_owned();
        Unwritten { step: Step(step), generation: Generation(3), reason }
    };
    let told = |member: &Member| member.stance().unwritten.iter().map(|u| u.step.0).collect::<Vec<_>>();
    let out = after(&mut member, Event::Unwritten(unwritten(10)));
    let said = Stance {
        unwritten: vec![unwritten(10)],
        ..Stance::new(Some(Step(9)), running().stance().activity.clone())
    };
    assert_eq!(
        out,
        [Effect::Say(Stance { holds: member.stance().holds, ..said })],
        "at once, not with a heartbeat"
    );
    assert_eq!(after(&mut member, Event::Unwritten(unwritten(10))), [], "that is no news");
    (2..=6).for_each(|step| drop(after(&mut member, Event::Unwritten(unwritten(10 * step)))));
    assert_eq!(told(&member), [30, 40, 50, 60], "so many are told");
    after(
        &mut member,
        Event::Wrote(Written {
            step: Step(40),
            generation: Generation(4),
            parts: "[]".to_owned(),
            facts: "a".to_owned(),
            blocks: std::iter::once(0..1).collect(),
            all_blocks: 1,
            kept: None,
        }),
    );
    assert_eq!(told(&member), [30, 50, 60]);
    after(&mut member, Event::Ordered { epoch: Epoch(1), order: Order::Committed { step: Step(50) } });
    assert_eq!(told(&member), [60]);
}

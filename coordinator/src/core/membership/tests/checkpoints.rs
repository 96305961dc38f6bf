//! Checkpoints: when one exists, who is asked for a copy, and what the end of a run waits for.

use super::*;

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
fn who_keeps_blocks_that_their_owner_gave_up_is_asked_for_them() {
    let mut story = Story::running(2);
    let with = |all: &[Written]| Stance { written: all.to_vec(), ..stance(Some(21), running(1)) };
    assert_eq!(story.stands(1, with(&[half(20, true)])), [], "their owner is here, and may write them yet");
    let unwritten =
        |step| Unwritten { step: Step(step), generation: Generation(1), reason: "full".to_owned() };
    let gave_up = |step| Stance { unwritten: vec![unwritten(step)], ..stance(Some(21), running(1)) };
    let out = story.stands(2, gave_up(20));
    assert_eq!(out[1..], [write_kept(1, 20)]);
    let out = story.stands(1, with(&[whole(20)]));
    assert!(matches!(out[..], [Effect::Commit { step: Step(20), .. }]), "{out:?}");
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
fn a_checkpoint_that_is_withdrawn_is_not_waited_for() {
    let mut story = Story::running(1);
    let out = story.stands(1, Stance { written: vec![whole(20)], ..stance(Some(21), running(1)) });
    assert!(matches!(out[..], [Effect::Commit { step: Step(20), .. }]), "{out:?}");
    // The only one that knew the figures of its steps dies before it has told them.
    story.event(Event::Goal(Goal::Pause));
    story.event(Event::Unlinked { worker: WorkerId(1) });
    story.link(2, stance(None, Activity::Outside));
    (1..=20).for_each(|at| {
        story.now = 500 * at;
        story.stands(2, stance(None, Activity::Outside));
        story.event(Event::Tick);
    });
    assert_eq!(story.core.status().waits_for.as_deref(), Some("its last checkpoint"));
    let out = story.event(Event::Withdrawn { step: Step(20) });
    let [Effect::Record(Entry::CheckpointFailed { step: Step(20), .. }), Effect::Record(ended), ..] =
        &out[..]
    else {
        panic!("{out:?}")
    };
    assert_eq!(*ended, Entry::Ended { outcome: Outcome::Paused }, "at checkpoint 10");
}

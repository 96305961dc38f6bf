//! Whoever comes with no state is sent it while the others train, and serves lanes once it says that it holds it.

use super::*;

fn hold(id: u64, generation: u64) -> Effect {
    send(id, Order::Hold { generation: Generation(generation), save: false })
}

fn ordered(generation: u64) -> Activity {
    holding(generation, Cause::Ordered)
}

/// Two members train, and a third is taken in after step 20: the ring of generation 2 trains, and 3 learns.
fn learning() -> Story {
    let mut story = Story::running(2);
    story.event(Event::Desired(4));
    story.link(3, stance(None, Activity::Outside));
    story.stands(1, stance(Some(20), ordered(1)));
    let next = formation(2, 20, peers(&[1, 2]), &[(1, 0..4), (2, 4..8), (3, 8..8)]);
    assert_eq!(next.trainers(), 2);
    assert_eq!(story.stands(2, stance(Some(20), ordered(1))), [formed(&next)]);
    story.event(Event::Recorded { generation: Generation(2) });
    (1..=2).for_each(|id| drop(story.stands(id, stance(Some(20), running(2)))));
    story.stands(3, stance(None, running(2)));
    story
}

#[test]
fn a_learner_is_given_lanes_at_the_boundary_after_it_holds_the_state() {
    let mut story = learning();
    assert_eq!(story.core.status().waits_for, None, "the ring trains");
    assert_eq!(story.stands(1, stance(Some(25), running(2))), [], "it learns");
    assert_eq!(story.stands(3, stance(Some(26), running(2))), [hold(1, 2), hold(2, 2), hold(3, 2)]);
    (1..=2).for_each(|id| drop(story.stands(id, stance(Some(27), ordered(2)))));
    let next = formation(3, 27, peers(&[1, 2, 3]), &[(1, 0..2), (2, 2..5), (3, 5..8)]);
    assert_eq!(next.trainers(), 3);
    assert_eq!(story.stands(3, stance(Some(27), ordered(2))), [formed(&next)]);
}

#[test]
fn while_one_learns_nobody_else_is_taken_in() {
    let mut story = learning();
    assert_eq!(story.link(4, stance(None, Activity::Outside)), [joined(4)]);
    assert_eq!(story.stands(3, stance(Some(26), running(2))), [hold(1, 2), hold(2, 2), hold(3, 2)]);
    (1..=2).for_each(|id| drop(story.stands(id, stance(Some(27), ordered(2)))));
    let lanes = [(1, 0..2), (2, 2..5), (3, 5..8), (4, 8..8)];
    let next = formation(3, 27, peers(&[1, 2, 3]), &lanes);
    assert_eq!(story.stands(3, stance(Some(27), ordered(2))), [formed(&next)]);
}

#[test]
fn a_boundary_that_is_due_meanwhile_has_it_begin_anew() {
    let mut story = learning();
    let leaving = Stance { leaving: true, ..stance(Some(22), running(2)) };
    assert_eq!(story.stands(2, leaving), [hold(1, 2), hold(2, 2), hold(3, 2)]);
    story.stands(1, stance(Some(23), ordered(2)));
    story.stands(3, stance(None, ordered(2)));
    let gone = Stance { leaving: true, ..stance(Some(23), ordered(2)) };
    let next = formation(3, 23, peers(&[1]), &[(1, 0..8), (3, 8..8)]);
    assert_eq!(story.stands(2, gone)[0], formed(&next));
}

#[test]
fn who_learns_is_no_survivor() {
    let mut story = learning();
    // Both members die: what the third was sent is no state, and the last checkpoint is gone on from.
    for id in 1..=2 {
        story.event(Event::Unlinked { worker: WorkerId(id) });
    }
    story.stands(3, stance(None, holding(2, lost(1))));
    story.now += 1001;
    let mut out = story.stands(3, stance(None, holding(2, lost(1))));
    out.extend(story.event(Event::Tick));
    story.now += 501;
    out.extend(story.event(Event::Tick));
    assert!(!out.iter().any(|effect| matches!(effect, Effect::Record(Entry::Formed(_)))), "{out:?}");
    assert!(out.contains(&Effect::List), "{out:?}");
    let next = formation(3, 10, Source::Checkpoint { step: Step(10) }, &[(3, 0..8)]);
    assert_eq!(story.event(Event::Listed { steps: vec![Step(10)] }), [formed(&next)]);
}

#[test]
fn where_moments_are_shared_out_a_joiner_trains_at_once() {
    let mut story = Story::running(2);
    story.core.options.learners = false;
    story.event(Event::Desired(3));
    story.link(3, stance(None, Activity::Outside));
    story.stands(1, stance(Some(20), ordered(1)));
    let next = formation(2, 20, peers(&[1, 2]), &[(1, 0..2), (2, 2..5), (3, 5..8)]);
    assert_eq!(story.stands(2, stance(Some(20), ordered(1))), [formed(&next)]);
}

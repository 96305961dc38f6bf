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

/// Where worker `id` of four stands that share the moments of eight blocks out, or of three with `of`.
fn shared(step: u64, of: usize, rank: usize, activity: Activity) -> Stance {
    let shard = Shard { blocks: shares(8, of, rank), all_blocks: 8, next: false };
    Stance { shard: Some(shard), ..stance(Some(step), activity) }
}

/// Where a learner stands: it has no moments.
fn weights(holds: Option<u64>, activity: Activity) -> Stance {
    Stance {
        shard: Some(Shard { blocks: Vec::new(), all_blocks: 8, next: false }),
        ..stance(holds, activity)
    }
}

/// Three share the moments out, and a fourth is taken in after step 20: the ring of generation 2 trains, and 4 learns.
fn learning_weights() -> Story {
    let mut story = Story::running(3);
    (1..=3).for_each(|id| drop(story.stands(id, shared(19, 3, id as usize - 1, running(1)))));
    story.event(Event::Desired(5));
    story.link(4, stance(None, Activity::Outside));
    (1..=2).for_each(|id| drop(story.stands(id, shared(20, 3, id as usize - 1, ordered(1)))));
    let lanes = [(1, 0..2), (2, 2..5), (3, 5..8), (4, 8..8)];
    let next = formation(2, 20, peers(&[1, 2, 3]), &lanes);
    assert_eq!(next.trainers(), 3);
    assert_eq!(story.stands(3, shared(20, 3, 2, ordered(1))), [formed(&next)]);
    story.event(Event::Recorded { generation: Generation(2) });
    (1..=3).for_each(|id| drop(story.stands(id, shared(20, 3, id as usize - 1, running(2)))));
    story.stands(4, weights(None, running(2)));
    story
}

#[test]
fn where_moments_are_shared_out_a_learner_has_its_share_from_the_boundary_after_it_holds_the_weights() {
    let mut story = learning_weights();
    let hold_on: Vec<Effect> = (1..=4).map(|id| hold(id, 2)).collect();
    assert_eq!(story.stands(4, weights(Some(21), running(2))), hold_on);
    (1..=3).for_each(|id| drop(story.stands(id, shared(22, 3, id as usize - 1, ordered(2)))));
    let next = formation(3, 22, peers(&[1, 2, 3, 4]), &[(1, 0..2), (2, 2..4), (3, 4..6), (4, 6..8)]);
    assert_eq!(story.stands(4, weights(Some(22), ordered(2))), [formed(&next)]);
}

#[test]
fn who_has_the_weights_alone_goes_on_with_those_that_have_the_moments() {
    // The learner alone has applied a step that the others have made ready: from there it goes on, and nothing is lost.
    let mut story = learning_weights();
    for id in [1, 2] {
        let Stance { shard, .. } = shared(20, 3, id as usize - 1, running(2));
        let shard = shard.map(|shard| Shard { next: true, ..shard });
        story.stands(id, Stance { shard, ..stance(Some(20), holding(2, lost(3))) });
    }
    story.event(Event::Unlinked { worker: WorkerId(3) });
    let out = story.stands(4, weights(Some(21), holding(2, lost(3))));
    let next = formation(3, 21, peers(&[4]), &[(1, 0..2), (2, 2..5), (4, 5..8)]);
    assert!(out.contains(&formed(&next)), "{out:?}");
}

#[test]
fn moments_that_nobody_has_are_not_a_learners() {
    // Two neighbours of three die: what the third and the learner have is not whole, and the checkpoint is gone on from.
    let mut story = learning_weights();
    story.stands(4, weights(Some(21), running(2)));
    story.stands(1, shared(21, 3, 0, running(2)));
    (2..=3).for_each(|id| drop(story.event(Event::Unlinked { worker: WorkerId(id) })));
    story.stands(1, shared(21, 3, 0, holding(2, lost(2))));
    story.stands(4, weights(Some(21), holding(2, lost(3))));
    story.now += 501;
    let out = story.event(Event::Tick);
    assert!(!out.iter().any(|effect| matches!(effect, Effect::Record(Entry::Formed(_)))), "{out:?}");
    let out = story.event(Event::Listed { steps: vec![Step(10)] });
    let next = formation(3, 10, Source::Checkpoint { step: Step(10) }, &[(1, 0..4), (4, 4..8)]);
    assert!(out.contains(&formed(&next)), "{out:?}");
}

//! What goes wrong with state: steps that fail again, replicas that differ, words that cannot be.

use super::*;

#[test]
fn a_step_that_fails_again_goes_back_to_the_checkpoint_and_then_fails_the_job() {
    let mut story = Story::running(1);
    let fault = Cause::Fault { reason: "row group 3 cannot be read".to_owned() };
    let mut sources = Vec::new();
    for generation in 1..=4 {
        let out = story.stands(1, stance(Some(15), holding(generation, fault.clone())));
        // Each time but the last it is told why.
        let broke = Entry::Broke {
            worker: WorkerId(1),
            generation: Generation(generation),
            step: Some(Step(15)),
            reason: "row group 3 cannot be read".to_owned(),
        };
        assert_eq!(out.contains(&Effect::Record(broke)), generation < 4, "{out:?}");
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

/// Whoever finds the fault may be the last to say that the ring has broken.
#[test]
fn a_fault_counts_whenever_it_is_told_and_not_when_a_member_has_died() {
    let fault = || Cause::Fault { reason: "a wrong checksum".to_owned() };
    let broken = || Cause::Broken { lost: Some(WorkerId(2)), reason: "it gave up".to_owned() };
    let broke = |out: &[Effect]| {
        out.iter().any(|effect| matches!(effect, Effect::Record(Entry::Broke { reason, .. }) if reason == "a wrong checksum"))
    };
    for (first, last) in [(fault(), broken()), (broken(), fault())] {
        let mut story = Story::running(2);
        let mut out = story.stands(1, stance(Some(15), holding(1, first)));
        out.extend(story.stands(2, stance(Some(15), holding(1, last))));
        assert!(broke(&out), "{out:?}");
    }
    let mut story = Story::running(3);
    let mut out = story.stands(1, stance(Some(15), holding(1, fault())));
    out.extend(story.stands(2, stance(Some(15), holding(1, broken()))));
    out.extend(story.event(Event::Unlinked { worker: WorkerId(3) }));
    assert!(!broke(&out), "{out:?}");
}

/// One of two networks fails, say: it is no fault that is counted, and the log says why there is another ring.
#[test]
fn a_ring_that_broke_though_nobody_died_is_explained_and_not_counted() {
    let mut story = Story::running(2);
    for generation in 1..=5 {
        let broken = |reason: &str| Cause::Broken { lost: None, reason: reason.to_owned() };
        let silent = "nothing of what is sent to it has arrived";
        let mut out = story.stands(1, stance(Some(15), holding(generation, broken(silent))));
        let left = broken("aborted: a member has left the ring");
        out.extend(story.stands(2, stance(Some(15), holding(generation, left))));
        let broke = Entry::Broke {
            worker: WorkerId(1),
            generation: Generation(generation),
            step: Some(Step(15)),
            reason: silent.to_owned(),
        };
        assert!(out.contains(&Effect::Record(broke)), "{out:?}");
        assert_eq!(story.core.formation().map(|next| next.source.clone()), Some(peers(&[1, 2])));
        story.event(Event::Recorded { generation: Generation(generation + 1) });
        (1..=2).for_each(|id| drop(story.stands(id, stance(Some(15), running(generation + 1)))));
    }
    assert_eq!(story.core.status().outcome, None);
}

#[test]
fn with_no_checkpoint_that_can_be_read_the_job_fails_instead_of_starting_over() {
    let found = Found { checkpoints: vec![Step(10)], ..Found::default() };
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

/// Several workers of one machine, or of machines with one name, of which one is at fault: the others' state was found right.
#[test]
fn a_member_on_a_quarantined_machine_keeps_its_place_when_its_link_comes_back() {
    let mut story = Story::running(3);
    let diverged = || Cause::Diverged { workers: vec![WorkerId(2)], reason: "block 5".to_owned() };
    (1..=3).for_each(|id| drop(story.stands(id, stance(Some(40), holding(1, diverged())))));
    story.event(Event::Recorded { generation: Generation(2) });
    [1, 3].into_iter().for_each(|id| drop(story.stands(id, stance(Some(40), running(2)))));
    story.event(Event::Unlinked { worker: WorkerId(3) });
    assert_eq!(story.link(3, stance(Some(41), running(2))), []);
    let status = story.core.status();
    assert!(status.trains && status.attendants.iter().all(|known| known.linked), "{status:?}");
    assert_eq!(status.quarantined, ["m"]);
    for id in [2, 9] {
        let told = story.link(id, stance(Some(40), holding(1, diverged())));
        assert!(
            matches!(&told[..], [Effect::Send { order: Order::Leave { why: Leave::Evicted { .. } }, .. }]),
            "worker {id}: {told:?}"
        );
    }
}

/// The coordinator dies after it has written down who was sent away, and before the ring that has no place for it.
#[test]
fn who_was_sent_away_is_no_member_for_the_next_coordinator() {
    let alive = formation(4, 30, peers(&[1, 2]), &[(1, 0..3), (2, 3..5), (3, 5..8)]);
    let found = Found {
        formation: Some(Formation::clone(&alive)),
        checkpoints: vec![Step(20)],
        floor: Generation(4),
        quarantined: vec!["m".to_owned()],
        evicted: vec![WorkerId(2)],
    };
    let core = Membership::new(options(3), Epoch(1), found, Millis(0));
    let mut story = Story { core, now: 0 };
    let diverged = || Cause::Diverged { workers: vec![WorkerId(2)], reason: "block 5".to_owned() };
    let told = story.link(2, stance(Some(40), holding(4, diverged())));
    assert!(matches!(&told[0], Effect::Send { order: Order::Leave { why: Leave::Evicted { .. } }, .. }));
    story.link(1, stance(Some(40), holding(4, diverged())));
    let out = story.link(3, stance(Some(40), holding(4, diverged())));
    let next = formation(5, 40, peers(&[1, 3]), &[(1, 0..4), (3, 4..8)]);
    assert!(out.contains(&formed(&next)), "{out:?}");
}

/// The others have named it before it came back to a new coordinator: what it is, it is when it comes.
#[test]
fn one_that_was_named_while_it_was_away_is_sent_away_when_it_comes() {
    let alive = formation(4, 30, peers(&[1, 2]), &[(1, 0..3), (2, 3..5), (3, 5..8)]);
    let found = Found {
        formation: Some(Formation::clone(&alive)),
        checkpoints: vec![Step(20)],
        floor: Generation(4),
        ..Found::default()
    };
    let core = Membership::new(options(3), Epoch(1), found, Millis(0));
    let mut story = Story { core, now: 0 };
    let reason = "block 5".to_owned();
    let cause = Cause::Diverged { workers: vec![WorkerId(2)], reason };
    story.link(1, stance(Some(40), holding(4, cause.clone())));
    story.link(3, stance(Some(40), holding(4, cause.clone())));
    story.now += 1000;
    [1, 3].into_iter().for_each(|id| drop(story.stands(id, stance(Some(40), holding(4, cause.clone())))));
    story.event(Event::Tick);
    assert_eq!(story.core.status().quarantined, [""; 0], "nobody knows where it runs");
    let (endpoints, machine) = (endpoints(2), "bad".to_owned());
    let stance = stance(Some(40), holding(4, cause));
    let out = story.event(Event::Linked { worker: WorkerId(2), endpoints, machine, stance });
    let reason = "its state differed from that of most others".to_owned();
    let machine = "bad".to_owned();
    let evicted = Entry::Evicted { worker: WorkerId(2), machine, step: Some(Step(40)), reason };
    assert_eq!(out[0], Effect::Record(evicted));
    assert!(matches!(&out[1], Effect::Send { order: Order::Leave { why: Leave::Evicted { .. } }, .. }));
    assert_eq!(story.core.status().quarantined, ["bad"]);
}

/// All others of its ring are gone, and the ring after that knows nothing of it.
#[test]
fn one_that_says_itself_that_it_differs_is_not_gone_on_with() {
    let mut story = Story::running(2);
    story.event(Event::Unlinked { worker: WorkerId(2) });
    let cause = Cause::Broken { lost: Some(WorkerId(2)), reason: String::new() };
    story.stands(1, stance(Some(20), holding(1, cause)));
    story.event(Event::Recorded { generation: Generation(2) });
    story.stands(1, stance(Some(20), running(2)));
    let reason = "block 5".to_owned();
    let cause = Cause::Diverged { workers: vec![WorkerId(9)], reason: reason.clone() };
    let out = story.link(9, stance(Some(40), holding(1, cause)));
    let leave = Order::Leave { why: Leave::Evicted { reason: reason.clone() } };
    let evicted =
        Entry::Evicted { worker: WorkerId(9), machine: "m".to_owned(), step: Some(Step(40)), reason };
    assert_eq!(out, [joined(9), send(9, leave), Effect::Record(evicted)]);
    assert_eq!(story.core.newest_held(), Some(Step(20)));
}

/// A verdict is about members.
#[test]
fn who_was_no_member_is_not_sent_away_by_those_that_were() {
    let mut story = Story::running(2);
    story.link(9, stance(None, Activity::Outside));
    let diverged = || Cause::Diverged { workers: vec![WorkerId(9)], reason: "block 5".to_owned() };
    (1..=2).for_each(|id| drop(story.stands(id, stance(Some(40), holding(1, diverged())))));
    let status = story.core.status();
    assert_eq!((status.workers, status.quarantined), (3, Vec::new()));
}

/// The log tells the next coordinator whom the one before sent away.
#[test]
fn a_quarantine_outlives_the_coordinator() {
    let found = Found { quarantined: vec!["bad".to_owned()], ..Found::default() };
    let core = Membership::new(options(2), Epoch(2), found, Millis(0));
    let mut story = Story { core, now: 0 };
    let from = |id, machine: &str| Event::Linked {
        worker: WorkerId(id),
        endpoints: endpoints(id),
        machine: machine.to_owned(),
        stance: stance(None, Activity::Outside),
    };
    let out = story.event(from(1, "bad"));
    let reason = "machine bad is quarantined: a worker's state there differed from all others'".to_owned();
    let order = Order::Leave { why: Leave::Evicted { reason } };
    assert_eq!(out, [Effect::Send { worker: WorkerId(1), epoch: Epoch(2), order }]);
    let status = story.core.status();
    assert_eq!((status.workers, status.attendants), (0, Vec::new()), "it is not known");
    assert_eq!(status.quarantined, ["bad"]);
    assert_eq!(story.event(from(2, "m")), [joined(2)], "any other machine is welcome");
}

/// Two that differ before there is a checkpoint: neither is gone on with.
#[test]
fn with_no_majority_and_no_checkpoint_they_begin_anew() {
    let mut story = Story::new(2);
    (1..=2).for_each(|id| drop(story.link(id, stance(None, Activity::Outside))));
    story.event(Event::Recorded { generation: Generation(1) });
    (1..=2).for_each(|id| drop(story.stands(id, stance(Some(40), running(1)))));
    let diverged = || Cause::Diverged { workers: Vec::new(), reason: "they differ".to_owned() };
    (1..=2).for_each(|id| drop(story.stands(id, stance(Some(40), holding(1, diverged())))));
    let out = story.event(Event::Listed { steps: Vec::new() });
    assert_eq!(out, [formed(&formation(2, 0, Source::Seed, &[(1, 0..4), (2, 4..8)]))]);
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

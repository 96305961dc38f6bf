//! Members that die, freeze, are told to stop, or do something else.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use anello_collective::{Collective, Error, Rank, Shape, Step};

use crate::fabric::{AT_ONCE, Fabric, assert_bits, borrowed, output, partials, run, whole};
use crate::sums::step;

#[track_caller]
fn assert_lost(error: &Error, who: u32) {
    assert!(matches!(error, Error::Lost { rank, .. } if *rank == Rank(who)), "{error:?}");
}

fn shape(members: usize) -> Shape {
    // 1 MiB a worker and owner and more: too much for what sockets take without a reader.
    Shape::balanced(8, members, 12 * members as u32, 1 << 16)
}

fn reduce(member: &mut dyn Collective, at: Step) -> Result<Vec<f32>, Error> {
    let partials = partials(member, at);
    let (partials, mut out) = (borrowed(&partials), output(member));
    member.reduce_scatter(at, &partials, &mut out).map(|()| out)
}

pub fn a_member_that_dies_in_a_reduction_is_named_by_all<F: Fabric>() {
    for victim in [0, 2, 3] {
        let shape = Shape { block_len: 1 << 10, ..shape(4) };
        let (died, death) = mpsc::channel();
        let results = run(F::ring(&shape), |mut member| {
            if member.ring().rank().0 == victim {
                let partials = partials(&*member, Step(0));
                let (partials, mut out) = (borrowed(&partials), output(&*member));
                let mut reduction = member.reduction(Step(0), b"").unwrap();
                reduction.advance(0..5, &partials, &mut out, Duration::ZERO).unwrap();
                // In the middle of its blocks, without having received all of the others'.
                died.send(Instant::now()).unwrap();
                return None;
            }
            let result = reduce(&mut *member, Step(0));
            // Those who know first are gone before the others look.
            Some((result.unwrap_err(), Instant::now()))
        });
        let death = death.recv().unwrap();
        for (error, at) in results.into_iter().flatten() {
            assert_lost(&error, victim);
            assert!(at.duration_since(death) < AT_ONCE, "{:?}", at.duration_since(death));
        }
    }
}

pub fn a_member_that_dies_in_a_gather_is_named_by_all<F: Fabric>() {
    let shape = shape(3);
    let results = run(F::ring(&shape), |mut member| {
        member.exchange(Step(0), b"all here").unwrap();
        if member.ring().rank() == Rank(1) {
            return None;
        }
        let mut buffer = vec![1.0; member.ring().len()];
        let error = member.all_gather(Step(0), &mut buffer).unwrap_err();
        assert!(buffer[member.ring().elements(member.ring().rank())].iter().all(|value| *value == 1.0));
        Some(error)
    });
    for error in results.into_iter().flatten() {
        assert_lost(&error, 1);
    }
}

pub fn who_left_after_its_last_word_owes_nothing<F: Fabric>() {
    for _ in 0..20 {
        let shape = Shape { block_len: 1 << 12, ..shape(3) };
        // Each is dropped as soon as its own part is over, while others still receive.
        let results = run(F::ring(&shape), |mut member| {
            let sum = step(&mut *member, Step(1)).0;
            if member.ring().rank() == Rank(2) {
                return (sum, None);
            }
            (sum, member.exchange(Step(2), b"and you?").err())
        });
        for (sum, error) in results {
            assert!(sum.iter().all(|value| value.is_finite()));
            if let Some(error) = error {
                assert_lost(&error, 2);
            }
        }
    }
}

pub fn a_failure_after_an_operation_leaves_it_whole<F: Fabric>() {
    for _ in 0..20 {
        let shape = Shape { block_len: 1 << 12, ..shape(3) };
        let results = run(F::ring(&shape), |mut member| {
            let mut buffer = vec![1.0; member.ring().len()];
            member.all_gather(Step(0), &mut buffer).unwrap();
            if member.ring().rank() == Rank(0) {
                // While others still receive what it gave to the gather.
                drop(member.reduction(Step(1), b"").unwrap());
            }
            reduce(&mut *member, Step(1)).unwrap_err()
        });
        results[1..].iter().for_each(|error| assert_lost(error, 0));
    }
}

pub fn an_abort_ends_a_blocked_call<F: Fabric>() {
    let mut members = F::ring(&shape(3));
    let silent = members.split_off(1);
    let mut blocked = members.pop().unwrap();
    let handle = blocked.abort_handle();
    let (began, beginning) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        began.send(()).unwrap();
        let error = blocked.exchange(Step(4), b"hello").unwrap_err();
        let returned = Instant::now();
        (error, returned, blocked.exchange(Step(5), b"").unwrap_err())
    });
    beginning.recv().unwrap();
    let aborted = Instant::now();
    handle.abort("rank 2 is silent");
    let (error, returned, then) = thread.join().unwrap();
    assert_eq!(error, Error::Aborted { reason: "rank 2 is silent".into() });
    assert_eq!(then, Error::Dead { cause: "aborted: rank 2 is silent".into() });
    assert!(returned.duration_since(aborted) < AT_ONCE);
    // The others learn why, before anybody aborts them. What was sent before counts: the first may succeed.
    let exchange_twice = |mut member: Box<dyn Collective>| {
        member.exchange(Step(4), b"").and_then(|_| member.exchange(Step(5), b"")).unwrap_err()
    };
    for error in run(silent, exchange_twice) {
        assert_eq!(
            error,
            Error::Lost { rank: Rank(0), reason: "it gave up: aborted: rank 2 is silent".into() }
        );
    }
}

pub fn an_abort_ends_a_call_that_waits_for_a_frozen_member<F: Fabric>() {
    let mut members = F::ring(&shape(3));
    // It is there, and neither reads nor writes.
    let frozen = members.pop().unwrap();
    let handles: Vec<_> = members.iter().map(|member| member.abort_handle()).collect();
    let (done, finished) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let results = run(members, |mut member| (reduce(&mut *member, Step(0)).unwrap_err(), Instant::now()));
        done.send(()).unwrap();
        results
    });
    // Not a word in a while that is long for what they have to do: it is no time-out that ends it.
    assert!(finished.recv_timeout(Duration::from_millis(300)).is_err());
    let aborted = Instant::now();
    for handle in &handles {
        handle.abort("the lease of rank 2 is over");
    }
    for (error, at) in thread.join().unwrap() {
        // The second may hear of the first's abort before its own.
        assert!(
            matches!(&error, Error::Aborted { .. })
                || matches!(&error, Error::Lost { reason, .. } if reason.contains("lease")),
            "{error:?}"
        );
        assert!(at.duration_since(aborted) < AT_ONCE);
    }
    drop(frozen);
}

pub fn an_abort_before_a_call_ends_it<F: Fabric>() {
    let mut members = F::ring(&shape(2));
    let handle = members[0].abort_handle();
    handle.abort("first");
    handle.abort("second");
    let error = members[0].exchange(Step(0), b"").unwrap_err();
    assert_eq!(error, Error::Aborted { reason: "first".into() });
    assert_lost(&members[1].exchange(Step(0), b"").unwrap_err(), 0);
}

pub fn another_step_is_refused<F: Fabric>() {
    let steps = |member: &dyn Collective| Step(7 + u64::from(member.ring().rank().0));
    let exchanged = run(F::ring(&shape(2)), |mut member| {
        let at = steps(&*member);
        member.exchange(at, b"").unwrap_err()
    });
    let reduced = run(F::ring(&shape(2)), |mut member| {
        let at = steps(&*member);
        reduce(&mut *member, at).unwrap_err()
    });
    let gathered = run(F::ring(&shape(2)), |mut member| {
        let (at, mut buffer) = (steps(&*member), vec![0.0; member.ring().len()]);
        member.all_gather(at, &mut buffer).unwrap_err()
    });
    for errors in [exchanged, reduced, gathered] {
        for error in &errors {
            // Who looks second may find that the first has left for it.
            assert!(matches!(error, Error::Protocol { .. } | Error::Lost { .. }), "{error:?}");
        }
        let fact = errors.iter().find_map(|error| match error {
            Error::Protocol { fact, .. } => Some(fact.clone()),
            _ => None,
        });
        let fact = fact.expect("one of them saw it");
        assert!(fact.contains("step 7") || fact.contains("step 8"), "{fact}");
    }
}

pub fn another_operation_is_refused<F: Fabric>() {
    let errors = run(F::ring(&shape(2)), |mut member| match member.ring().rank() {
        Rank(0) => member.exchange(Step(0), b"").unwrap_err(),
        _ => reduce(&mut *member, Step(0)).unwrap_err(),
    });
    assert!(errors.iter().any(|error| matches!(error, Error::Protocol { .. })), "{errors:?}");
}

pub fn a_reduction_given_up_ends_the_ring<F: Fabric>() {
    let errors = run(F::ring(&shape(2)), |mut member| {
        if member.ring().rank() == Rank(0) {
            drop(member.reduction(Step(3), b"").unwrap());
        }
        reduce(&mut *member, Step(3)).unwrap_err()
    });
    assert_eq!(errors[0], Error::Dead { cause: "the reduction of step 3 was given up".into() });
    assert_lost(&errors[1], 0);
}

/// One or two members end at some point of a run of steps. Whatever the others had is right to the last bit, and they
/// name one of those who ended.
pub fn any_deaths_leave_right_sums_and_right_names<F: Fabric>() {
    for seed in 0..40u32 {
        let shape = Shape {
            ranges: vec![0..1, 1..4, 4..4, 4..7, 7..8],
            blocks: 13,
            block_len: 1 << (seed % 12),
            order: vec![],
            owners: 0,
        };
        let steps = [0, 1, 2].map(|at| whole(&shape, Step(at)));
        let victims = [seed % 5, if seed % 3 == 0 { seed / 5 % 5 } else { seed % 5 }];
        let dies_at = |rank: u32| victims.contains(&rank).then_some((seed * 7 + rank) % 9);
        let errors = run(F::ring(&shape), |mut member| {
            let rank = member.ring().rank();
            // Three steps of three operations each, or fewer for a victim.
            let mut operations = 0..dies_at(rank.0).unwrap_or(9);
            let mut may_go_on = || operations.next().is_some();
            for (at, expected) in (0..).map(Step).zip(&steps) {
                let partials = partials(&*member, at);
                let (partials, mut out, own) =
                    (borrowed(&partials), output(&*member), member.ring().elements(rank));
                let mut reduction = match member.reduction(at, b"") {
                    Ok(reduction) => reduction,
                    Err(error) => return Some(error),
                };
                if let Err(error) = reduction.advance(0..6, &partials, &mut out, Duration::ZERO) {
                    return Some(error);
                }
                if !may_go_on() {
                    return None;
                }
                if let Err(error) = reduction.finish(&partials, &mut out) {
                    return Some(error);
                }
                assert_bits(&out, &expected[own.clone()], &format!("seed {seed}, {rank}"));
                if !may_go_on() {
                    return None;
                }
                let mut buffer = vec![f32::NAN; member.ring().len()];
                buffer[own].copy_from_slice(&out);
                if let Err(error) = member.all_gather(at, &mut buffer) {
                    return Some(error);
                }
                assert_bits(&buffer, expected, &format!("seed {seed}, {rank}"));
                if !may_go_on() {
                    return None;
                }
            }
            member.exchange(Step(3), b"").err()
        });
        for (rank, error) in (0..).zip(errors) {
            let is_named = |error: &Error| matches!(error, Error::Lost { rank: lost, .. } if victims.contains(&lost.0) && lost.0 != rank);
            match error {
                Some(error) => {
                    assert!(is_named(&error), "seed {seed}, rank {rank}, victims {victims:?}: {error:?}")
                }
                None => {
                    assert!(victims.contains(&rank), "seed {seed}: rank {rank} heard nothing of {victims:?}")
                }
            }
        }
    }
}

//! One listener through many generations.

use std::time::Duration;

use anello_collective::tcp::{Refusals, connect};
use anello_collective::{Collective, Error, Generation, Rank, Shape, Step};

use crate::fabric::{addresses, assert_bits, listeners, localhost, meet, options, run, whole};
use crate::sums::step;

fn all_agree(ring: Vec<Box<dyn Collective>>, shape: &Shape, at: Step) {
    for sum in run(ring, |mut member| step(&mut *member, at).0) {
        assert_bits(&sum, &whole(shape, at), &format!("{} members", shape.ranges.len()));
    }
}

#[test]
fn the_same_listeners_serve_fewer_and_more_members() {
    let mut listeners = listeners(5);
    for (generation, members) in [(1, 4), (2, 3), (3, 1), (4, 5), (9, 2)] {
        let shape = Shape::balanced(8, members, 3, 11);
        let ring = meet(&mut listeners[..members], &shape, Generation(generation));
        let ring = ring.into_iter().map(|member| Box::new(member.unwrap()) as Box<dyn Collective>).collect();
        all_agree(ring, &shape, Step(generation));
    }
}

#[test]
fn survivors_of_a_death_go_on_without_it() {
    let mut listeners = listeners(3);
    let shape = Shape::balanced(4, 3, 2, 5);
    let mut ring: Vec<_> =
        meet(&mut listeners, &shape, Generation(1)).into_iter().map(Result::unwrap).collect();
    drop(ring.pop());
    let survivors = ring.into_iter().map(|member| Box::new(member) as Box<dyn Collective>).collect();
    for error in run(survivors, |mut member| member.exchange(Step(0), b"").unwrap_err()) {
        assert!(matches!(error, Error::Lost { rank: Rank(2), .. }), "{error:?}");
    }
    let shape = Shape::balanced(4, 2, 2, 5);
    let ring = meet(&mut listeners[..2], &shape, Generation(2));
    let ring = ring.into_iter().map(|member| Box::new(member.unwrap()) as Box<dyn Collective>).collect();
    all_agree(ring, &shape, Step(1));
}

#[test]
fn a_late_worker_of_an_old_generation_is_refused_and_counted() {
    let shape = Shape::balanced(2, 2, 1, 4);
    let mut all = listeners(3);
    let addresses = addresses(&all[..2]);
    let (zero, others) = all.split_at_mut(1);
    let (late, one) = others.split_at_mut(1);
    let refusals = std::thread::scope(|scope| {
        let zero = scope.spawn(|| {
            let ring = connect(&mut zero[0], &options(0, &addresses, &shape, Generation(2))).unwrap();
            (ring, zero[0].refusals())
        });
        // The late one is through with its try before the right one comes.
        let error = connect(&mut late[0], &options(1, &addresses, &shape, Generation(1))).unwrap_err();
        assert!(error.to_string().contains("do not fit: generation 2 there, 1 here;"), "{error}");
        let one = connect(&mut one[0], &options(1, &addresses, &shape, Generation(2))).unwrap();
        let (_zero, refusals) = zero.join().unwrap();
        drop(one);
        refusals
    });
    // One or both of its connections.
    assert!((1..=2).contains(&refusals.stale), "{refusals:?}");
    assert_eq!(Refusals { stale: 0, ..refusals }, Refusals::default());
}

#[test]
fn a_worker_that_is_ahead_waits_for_the_one_behind() {
    let shape = Shape::balanced(2, 2, 1, 4);
    let mut listeners = listeners(2);
    let addresses = addresses(&listeners);
    let (zero, one) = listeners.split_at_mut(1);
    let behind = options(0, &addresses, &shape, Generation(1));
    let handle = behind.abort.clone();
    std::thread::scope(|scope| {
        let ahead = scope.spawn(|| connect(&mut one[0], &options(1, &addresses, &shape, Generation(2))));
        let zero = scope.spawn(|| {
            assert!(matches!(connect(&mut zero[0], &behind), Err(Error::Aborted { .. })));
            assert!(zero[0].refusals().early >= 1, "{:?}", zero[0].refusals());
            connect(&mut zero[0], &options(0, &addresses, &shape, Generation(2)))
        });
        // Until it was told to wait once; the listener cannot be asked while it is in use.
        while !ahead.is_finished() && !zero.is_finished() && handle.reason().is_none() {
            std::thread::sleep(Duration::from_millis(200));
            handle.abort("generation 2 forms");
        }
        assert_eq!(ahead.join().unwrap().unwrap().ring().members(), 2);
        zero.join().unwrap().unwrap();
    });
}

#[test]
fn an_address_that_nobody_answers_is_passed_over_for_the_next() {
    let shape = Shape::balanced(2, 2, 1, 4);
    let mut listeners = listeners(2);
    let mut addresses = addresses(&listeners);
    let (zero, one) = listeners.split_at_mut(1);
    let free = anello_collective::tcp::Listener::bind(localhost()).unwrap().addresses().unwrap()[0];
    std::thread::scope(|scope| {
        let first = options(0, &addresses, &shape, Generation(1));
        let zero = scope.spawn(move || connect(&mut zero[0], &first));
        let right = std::mem::replace(&mut addresses[0], free);
        let mut second = options(1, &addresses, &shape, Generation(1));
        second.members[0].push(right);
        connect(&mut one[0], &second).unwrap();
        let _ = zero.join().unwrap();
    });
}

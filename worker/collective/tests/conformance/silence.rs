//! A way that is cut without a word, and what stays known when a ring has ended.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anello_collective::tcp::{Listener, connect};
use anello_collective::{Collective, Error, Generation, Rank, Shape, Step};
use rustix::net::{AddressFamily, SocketType, bind, listen, socket};

use crate::fabric::{listeners, localhost, meet, meet_with, options};

/// An address whose kernel answers nobody any more: room for one connection that nobody takes, and those that fill it.
fn silent() -> (TcpListener, Vec<TcpStream>) {
    let full = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&full, &localhost()).unwrap();
    listen(&full, 0).unwrap();
    let full = TcpListener::from(full);
    let address = full.local_addr().unwrap();
    let mut inside = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(500)) {
        inside.push(stream);
        assert!(inside.len() < 64, "a listener without room takes everyone");
    }
    (full, inside)
}

#[test]
fn a_member_that_does_not_answer_is_named_and_one_that_refuses_is_waited_for() {
    let (full, _inside) = silent();
    let shape = Shape::balanced(2, 2, 1, 4);
    let mut own = listeners(1);
    let mut meet_at = |address: SocketAddr, deadline| {
        let addresses = [address, own[0].addresses().unwrap()[0]];
        let mut options = options(1, &addresses, &shape, Generation(3));
        (options.silence, options.deadline) = (Duration::from_secs(1), deadline);
        connect(&mut own[0], &options).unwrap_err()
    };
    let address = full.local_addr().unwrap();
    let error = meet_at(address, Duration::from_secs(60));
    let Error::Unreachable { ranks, reason } = &error else { panic!("{error:?}") };
    assert_eq!((&ranks[..], reason), (&[Rank(0)][..], &format!("no answer from {address}")));
    // Where nobody listens, the machine is there: who is to come may yet come.
    let nobody = TcpListener::bind(localhost()).unwrap().local_addr().unwrap();
    let error = meet_at(nobody, Duration::from_secs(3));
    assert!(matches!(error, Error::Deadline { .. }), "{error:?}");
}

/// A machine on several networks, of which the best is cut: it is met by another one.
#[test]
fn a_member_is_met_at_the_first_of_its_addresses_that_answers() {
    let (full, _inside) = silent();
    let nobody = TcpListener::bind(localhost()).unwrap().local_addr().unwrap();
    let shape = Shape::balanced(2, 2, 1, 4);
    let two = |listener: Listener| listener.and_at("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut own: Vec<Listener> = listeners(2).into_iter().map(two).collect();
    let all: Vec<Vec<SocketAddr>> = own.iter().map(|listener| listener.addresses().unwrap()).collect();
    assert_eq!(all[0].iter().map(|a| a.ip().to_string()).collect::<Vec<_>>(), ["127.0.0.1", "127.0.0.2"]);
    let away = full.local_addr().unwrap();
    for (generation, first) in
        (1..).zip([vec![all[0][0]], vec![all[0][1]], vec![nobody, all[0][1]], vec![away, all[0][1]]])
    {
        let rings = meet_with(&mut own, |rank| {
            let mut options = options(rank, &[away, all[1][0]], &shape, Generation(generation));
            options.members[0] = first.clone();
            options.silence = Duration::from_secs(2);
            options
        });
        let words: Vec<_> = std::thread::scope(|scope| {
            let said = rings.into_iter().map(|ring| {
                scope.spawn(move || {
                    let mut ring = ring.unwrap();
                    let own = ring.ring().rank().0 as u8;
                    ring.exchange(Step(1), &[own]).unwrap()
                })
            });
            said.collect::<Vec<_>>().into_iter().map(|said| said.join().unwrap()).collect()
        });
        assert_eq!(words, [[[0], [1]], [[0], [1]]]);
    }
}

/// Whoever gives up names all that do not answer, and so does whoever is told to leave before it would.
#[test]
fn all_that_do_not_answer_are_named() {
    let (full, _inside) = silent();
    let (away, shape) = (full.local_addr().unwrap(), Shape::balanced(4, 4, 1, 4));
    let mut own = listeners(2);
    let here = own.iter().map(|listener| listener.addresses().unwrap()[0]);
    let addresses: Vec<SocketAddr> = [away, away].into_iter().chain(here).collect();
    let errors: Vec<Error> = std::thread::scope(|scope| {
        let meeting = own.iter_mut().zip(2..).map(|(listener, rank)| {
            let mut options = options(rank, &addresses, &shape, Generation(3));
            (options.silence, options.deadline) = (Duration::from_secs(4), Duration::from_secs(60));
            scope.spawn(move || connect(listener, &options).unwrap_err())
        });
        let meeting: Vec<_> = meeting.collect();
        meeting.into_iter().map(|met| met.join().unwrap()).collect()
    });
    // The first to give up ends the wait of the other.
    for error in errors {
        let Error::Unreachable { ranks, .. } = &error else { panic!("{error:?}") };
        assert_eq!(ranks[..], [Rank(0), Rank(1)], "{error}");
    }
}

#[test]
fn what_was_sent_is_known_when_the_ring_has_ended() {
    let shape = Shape::balanced(2, 2, 4, 64);
    let mut all = listeners(2);
    let mut ring: Vec<_> = meet(&mut all, &shape, Generation(1)).into_iter().map(Result::unwrap).collect();
    std::thread::scope(|scope| {
        for member in &mut ring {
            scope.spawn(|| member.all_gather(Step(0), &mut [0.0; 256]).unwrap());
        }
    });
    drop(ring.pop());
    let sent_bytes = ring[0].sent_bytes();
    // Two blocks of 64 numbers, and the heads of their frames.
    assert!(sent_bytes > 2 * 64 * 4, "{sent_bytes}");
    ring[0].exchange(Step(1), b"").unwrap_err();
    assert_eq!(ring[0].sent_bytes(), sent_bytes);
}

//! Those who come to the port and do not belong to the ring.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anello_collective::tcp::{Listener, Options, Refusals, connect};
use anello_collective::{Collective, Error, Generation, Shape, Step};

use crate::fabric::{AT_ONCE, addresses, listeners, localhost, meet, meet_with, options};

fn shape() -> Shape {
    Shape::balanced(2, 2, 2, 8)
}

/// Both sides of a rendezvous in which rank 1 is not as rank 0 expects; both must know at once.
fn differ(change: impl Fn(&mut Options) + Sync) -> [String; 2] {
    let mut listeners = listeners(2);
    let addresses = addresses(&listeners);
    let start = Instant::now();
    let results = meet_with(&mut listeners, |rank| {
        let mut options = options(rank, &addresses, &shape(), Generation(3));
        if rank == 1 {
            change(&mut options);
        }
        options
    });
    assert!(start.elapsed() < AT_ONCE, "it took {:?}", start.elapsed());
    let texts: Vec<String> = results.into_iter().map(|result| result.unwrap_err().to_string()).collect();
    texts.try_into().unwrap()
}

#[test]
fn another_config_is_refused_on_both_sides() {
    let remedy = "start all workers of a generation with the same build and config";
    assert_eq!(
        differ(|options| options.config_digest = "decaf".into()),
        [
            format!(r#"rank 1 and rank 0 do not fit: config digest "decaf" there, "c0ffee" here; {remedy}"#),
            format!(r#"rank 0 and rank 1 do not fit: config digest "c0ffee" there, "decaf" here; {remedy}"#),
        ]
    );
}

#[test]
fn another_build_and_shape_are_refused_with_all_that_differs() {
    for text in differ(|options| {
        options.build = "0.2.0".into();
        options.shape = Shape { ranges: vec![0..1, 1..4], blocks: 3, block_len: 9, order: vec![], owners: 0 };
    }) {
        for what in ["build \"0.", "checksum of lane ranges", "blocks ", "block length "] {
            assert!(text.contains(what), "{what} is not in: {text}");
        }
    }
}

#[test]
fn an_address_of_another_rank_is_refused_on_both_sides() {
    // Rank 2 believes that rank 0 is where rank 1 listens.
    let mut listeners = listeners(3);
    let addresses = addresses(&listeners);
    let shape = Shape::balanced(4, 3, 2, 8);
    let results = meet_with(&mut listeners, |rank| {
        let mut options = options(rank, &addresses, &shape, Generation(3));
        if rank == 2 {
            options.members[0] = options.members[1].clone();
        }
        options
    });
    let texts: Vec<String> = results.into_iter().map(|result| result.unwrap_err().to_string()).collect();
    assert!(
        texts[1].starts_with("rank 2 and rank 1 do not fit: rank dialed 0 there, 1 here"),
        "{}",
        texts[1]
    );
    assert!(texts[2].contains("do not fit: ") || texts[2].starts_with("lost rank"), "{}", texts[2]);
}

#[test]
fn another_job_is_refused_and_counted_and_disturbs_nobody() {
    let mut all = listeners(3);
    let addresses = addresses(&all[..2]);
    let (ring, stranger) = all.split_at_mut(2);
    let (results, refused) = std::thread::scope(|scope| {
        let stranger = scope.spawn(|| {
            let mut options = options(1, &addresses, &shape(), Generation(3));
            options.job = "moss".into();
            connect(&mut stranger[0], &options).unwrap_err()
        });
        // Rank 0 is there for it; rank 1 comes when it was refused.
        let first = &mut ring[..1];
        let early = options(0, &addresses, &shape(), Generation(3));
        let zero = scope.spawn(move || connect(&mut first[0], &early).map(|tcp| (tcp, first[0].refusals())));
        let refused = stranger.join().unwrap();
        let one = connect(
            &mut Listener::bind(localhost()).unwrap(),
            &options(1, &addresses, &shape(), Generation(3)),
        );
        (vec![zero.join().unwrap().unwrap().1], (refused, one.map(drop)))
    });
    assert_eq!(results, [Refusals { foreign: results[0].foreign, ..Refusals::default() }]);
    assert!(results[0].foreign >= 1);
    let (refused, one) = refused;
    assert!(refused.to_string().contains(r#"job "ouro" there, "moss" here"#), "{refused}");
    assert_eq!(one, Ok(()));
}

#[test]
fn who_does_not_come_is_named_at_the_deadline() {
    let mut listeners = listeners(2);
    let mut options = options(1, &addresses(&listeners), &Shape::balanced(4, 3, 1, 1), Generation(3));
    options.deadline = Duration::from_millis(200);
    // Rank 0 has a port and does not answer; rank 2 dials nobody.
    options.members.push(vec![]);
    let error = connect(&mut listeners[1], &options).unwrap_err();
    assert!(matches!(error, Error::Deadline { deadline_ms: 200, .. }));
    let text = error.to_string();
    assert!(
        text.contains("rank 0 (it does not answer our hello yet), rank 2 (has not come to us) missing"),
        "{text}"
    );
}

#[test]
fn an_abort_ends_a_rendezvous() {
    let mut listeners = listeners(2);
    let options = options(0, &addresses(&listeners), &shape(), Generation(3));
    let handle = options.abort.clone();
    let thread =
        std::thread::spawn(move || (connect(&mut listeners[0], &options).unwrap_err(), Instant::now()));
    let aborted = Instant::now();
    handle.abort("the job is paused");
    let (error, at) = thread.join().unwrap();
    assert_eq!(error, Error::Aborted { reason: "the job is paused".into() });
    assert!(at.duration_since(aborted) < AT_ONCE);
}

#[test]
fn garbage_on_the_port_disturbs_nobody() {
    let mut all = listeners(2);
    let port = addresses(&all)[0];
    let say = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(port).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    };
    let endless = vec![b'x'; 1 << 20];
    // A greeting that claims 4 GiB, one that is cut, one of the wrong kind of bytes, and many who say nothing.
    let mut huge = b"ANELLOH1".to_vec();
    huge.extend([0xFF; 8]);
    let mut strangers =
        vec![say(b"GET / HTTP/1.1\r\n\r\n"), say(&huge), say(b"ANELLOH1\x10\0"), say(b"ANR1")];
    strangers.extend((0..100).map(|_| TcpStream::connect(port).unwrap()));
    let pusher = std::thread::spawn(move || {
        // Refused in the middle of it.
        let _ = TcpStream::connect(port).unwrap().write_all(&endless);
    });
    let results = meet(&mut all, &shape(), Generation(3));
    let mut ring: Vec<_> = results.into_iter().map(Result::unwrap).collect();
    pusher.join().unwrap();
    let refusals = all[0].refusals();
    assert!(refusals.garbage >= 3, "{refusals:?}");
    let (left, right) = ring.split_at_mut(1);
    std::thread::scope(|scope| {
        scope.spawn(|| left[0].exchange(Step(0), b"still").unwrap());
        assert_eq!(right[0].exchange(Step(0), b"here").unwrap(), [b"still".to_vec(), b"here".to_vec()]);
    });
    // Those who spoke another language were hung up on.
    assert!(matches!(strangers[0].read(&mut [0]), Ok(0) | Err(_)));
}

#[test]
fn options_that_do_not_fit_are_refused_before_anything_is_sent() {
    let mut listeners = listeners(1);
    let mut fact = |change: &dyn Fn(&mut Options)| {
        let mut options = options(1, &[localhost(), localhost()], &shape(), Generation(3));
        change(&mut options);
        match connect(&mut listeners[0], &options).unwrap_err() {
            Error::Shape { fact } => fact,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(fact(&|options| options.job = "x".repeat(257)), "a job of 257 bytes; 256 are allowed");
    assert_eq!(fact(&|options| drop(options.members.pop())), "addresses of 1 members; the shape has 2");
    assert_eq!(fact(&|options| options.members[0].clear()), "rank 0 has no address");
    assert_eq!(fact(&|options| options.shape.block_len = 0), "blocks of 0 elements; allowed are 1..=4194304");
}

//! Bytes that change on the way, and a process that is killed.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Instant;

use anello_collective::tcp::connect;
use anello_collective::{Collective, Error, Generation, Rank, Shape, Step};

use crate::fabric::{AT_ONCE, PATIENCE, addresses, borrowed, listeners, options, output, partials};

const BLOCK_LEN: usize = 100;
const FRAME_BYTES: usize = 40 + 4 * BLOCK_LEN;

/// Passes on what comes for `to`, but flips a bit of byte `at` after the hello of each connection for `channel`.
fn flipping(to: SocketAddr, channel: &'static str, at: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let pass = |mut from: TcpStream, mut to: TcpStream, mut flip: Option<usize>| {
        let mut bytes = [0; 997];
        while let Ok(read @ 1..) = from.read(&mut bytes) {
            if let Some(at) = flip {
                if at < read {
                    bytes[at] ^= 16;
                }
                flip = at.checked_sub(read);
            }
            if to.write_all(&bytes[..read]).is_err() {
                break;
            }
        }
        let _ = (to.shutdown(Shutdown::Both), from.shutdown(Shutdown::Both));
    };
    std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut dialer, _) = listener.accept().unwrap();
            let mut acceptor = TcpStream::connect(to).unwrap();
            let mut hello = vec![0; 16];
            dialer.read_exact(&mut hello).unwrap();
            hello.resize(16 + u32::from_le_bytes(*hello[8..].first_chunk().unwrap()) as usize, 0);
            dialer.read_exact(&mut hello[16..]).unwrap();
            acceptor.write_all(&hello).unwrap();
            let is_it = String::from_utf8_lossy(&hello).contains(channel);
            let (from, back) = (dialer.try_clone().unwrap(), acceptor.try_clone().unwrap());
            std::thread::spawn(move || pass(from, acceptor, is_it.then_some(at)));
            std::thread::spawn(move || pass(back, dialer, None));
        }
    });
    address
}

/// What rank 0 and rank 1 get from a step when a byte from 1 to 0 flips.
fn flipped(channel: &'static str, at: usize) -> [Error; 2] {
    let shape =
        Shape { ranges: vec![0..1, 1..4], blocks: 12, block_len: BLOCK_LEN, order: vec![], owners: 0 };
    let mut listeners = listeners(2);
    let mut addresses = addresses(&listeners);
    addresses[0] = flipping(addresses[0], channel, at);
    let errors: Vec<Error> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(&mut listeners)
            .map(|(rank, listener)| {
                let options = options(rank, &addresses, &shape, Generation(1));
                scope.spawn(move || {
                    let mut member = connect(listener, &options).unwrap();
                    let partials = partials(&member, Step(6));
                    let kept = partials.clone();
                    let (partials, mut out) = (borrowed(&partials), output(&member));
                    let mut buffer = vec![0.0; member.ring().len()];
                    let error = member
                        .reduce_scatter(Step(6), &partials, &mut out)
                        .and_then(|()| member.all_gather(Step(6), &mut buffer))
                        // Who gave bad blocks in a gather may have all of its own: it hears of it in the next operation.
                        .and_then(|()| member.exchange(Step(7), b""))
                        .unwrap_err();
                    assert_eq!(borrowed(&kept), partials);
                    error
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    errors.try_into().unwrap()
}

#[test]
fn a_flipped_byte_names_the_sender_and_the_block() {
    // Rank 1 has two parts (1, 2..4): frames are block 0 part 0, block 0 part 1, block 1 part 0, …
    let corrupt = |block, place| Error::Corrupt { rank: Rank(1), step: Step(6), block: Some(block), place };
    for (frame, byte, expected) in [
        (0, 40, corrupt(0, "payload")),
        (3, 40 + 399, corrupt(1, "payload")),
        (10, 40 + 200, corrupt(5, "payload")),
        (4, 3, corrupt(2, "header")),
        (5, 28, corrupt(2, "header")),
        (11, 33, corrupt(5, "header")),
        // The gather follows: blocks 6..12 of rank 1, one frame each.
        (12 + 2, 99, corrupt(8, "payload")),
    ] {
        let [zero, one] = flipped(r#""channel":"Data""#, frame * FRAME_BYTES + byte);
        assert_eq!(zero, expected);
        // And the sender learns what became of it.
        assert!(
            matches!(&one, Error::Lost { rank: Rank(0), reason } if reason.contains("wrong checksum")),
            "{one:?}"
        );
    }
}

#[test]
fn a_flipped_byte_of_a_message_names_the_sender() {
    let [zero, _] = flipped(r#""channel":"Control""#, 20);
    assert_eq!(zero, Error::Corrupt { rank: Rank(1), step: Step(6), block: None, place: "header" });
    assert!(
        zero.to_string().starts_with("rank 1 sent a message of step 6 with a wrong checksum in its header")
    );
}

/// Not a test: the process that dies in the next one.
#[test]
fn child() {
    let Ok(plan) = std::env::var("ANELLO_TEST_CHILD") else { return };
    let addresses: Vec<SocketAddr> = plan.split(' ').map(|address| address.parse().unwrap()).collect();
    let listener = &mut listeners(1)[0];
    let mut member = connect(listener, &options(2, &addresses, &killed_shape(), Generation(1))).unwrap();
    let partials = partials(&member, Step(0));
    let (partials, mut out) = (borrowed(&partials), output(&member));
    let mut reduction = member.reduction(Step(0), b"").unwrap();
    reduction.advance(0..9, &partials, &mut out, std::time::Duration::ZERO).unwrap();
    println!("\nin the middle");
    std::io::stdout().flush().unwrap();
    loop {
        std::thread::park();
    }
}

fn killed_shape() -> Shape {
    Shape { ranges: vec![0..2, 2..4, 4..8], blocks: 64, block_len: 1 << 12, order: vec![], owners: 0 }
}

#[test]
fn a_killed_process_is_named_by_all_at_once() {
    let mut listeners = listeners(2);
    let mut addresses = addresses(&listeners);
    addresses.push("127.0.0.1:1".parse().unwrap());
    let plan: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["wire::child", "--exact", "--nocapture"])
        .env("ANELLO_TEST_CHILD", plan.join(" "))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let killed = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(&mut listeners)
            .map(|(rank, listener)| {
                let options = options(rank, &addresses, &killed_shape(), Generation(1));
                scope.spawn(move || {
                    let mut member = connect(listener, &options).unwrap();
                    let partials = partials(&member, Step(0));
                    let (partials, mut out) = (borrowed(&partials), output(&member));
                    let error = member.reduce_scatter(Step(0), &partials, &mut out).unwrap_err();
                    (error, Instant::now())
                })
            })
            .collect();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.map(Result::unwrap).any(|line| line == "in the middle"));
        let killed = Instant::now();
        child.kill().unwrap();
        for thread in threads {
            let (error, at) = thread.join().unwrap();
            assert!(matches!(error, Error::Lost { rank: Rank(2), .. }), "{error:?}");
            assert!(at.duration_since(killed) < AT_ONCE);
        }
        killed
    });
    child.wait().unwrap();
    assert!(killed.elapsed() < PATIENCE);
}

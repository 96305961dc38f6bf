//! What a ring leaves behind in its process: nothing. Alone in its program, since it counts what the process holds.

use std::time::Duration;

use anello_collective::tcp::{Listener, Options, connect};
use anello_collective::{AbortHandle, Collective, Generation, InProcess, Rank, Shape, Step};
use anello_tls::{Files, Role, Tls, authority};

/// Open descriptors and threads of this process.
fn held() -> (usize, usize) {
    let count = |folder: &str| std::fs::read_dir(folder).unwrap().count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}

#[test]
fn a_ring_leaves_no_descriptor_and_no_thread() {
    let listener = || Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    leaves_nothing((0..3).map(|_| listener()).collect());
    let dir = tempfile::tempdir().unwrap();
    authority::init(dir.path(), 30, false).unwrap();
    let tls = Tls::load(Files::in_dir(dir.path(), Role::Worker), Role::Worker).unwrap();
    leaves_nothing((0..3).map(|_| listener().with_tls(tls.clone())).collect());
}

fn leaves_nothing(mut listeners: Vec<Listener>) {
    let shape = Shape::balanced(4, 3, 4, 1000);
    let members: Vec<_> = listeners.iter().map(|listener| vec![listener.addresses().unwrap()[0]]).collect();
    let before = held();
    // The handles outlive their rings, as the coordinator's side may.
    let mut handles = Vec::new();
    for generation in 1..=10 {
        let options = |rank| Options {
            rank: Rank(rank),
            members: members.clone(),
            shape: shape.clone(),
            generation: Generation(generation),
            job: "ouro".into(),
            config_digest: String::new(),
            build: String::new(),
            deadline: Duration::from_secs(20),
            socket_buffer_bytes: None,
            silence: Duration::from_secs(10),
            abort: AbortHandle::new(),
        };
        let given_up: Vec<AbortHandle> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..)
                .zip(&mut listeners)
                .map(|(rank, listener)| {
                    let options = options(rank);
                    scope.spawn(move || {
                        let mut ring = connect(listener, &options).unwrap();
                        let mut buffer = vec![0.0; ring.ring().len()];
                        ring.all_gather(Step(0), &mut buffer).unwrap();
                        // One leaves in order, one in the middle, one waits for both.
                        match rank {
                            0 => drop(ring.reduction(Step(1), b"").unwrap()),
                            1 => assert!(ring.exchange(Step(1), b"").is_err()),
                            _ => {}
                        }
                        options.abort
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        handles.extend(given_up);
        drop(InProcess::ring_of(&shape).unwrap());
    }
    handles.iter().for_each(|handle| handle.abort("late"));
    // A joined thread may be listed until the kernel has put it away.
    let until = std::time::Instant::now() + Duration::from_secs(5);
    while held().1 != before.1 && std::time::Instant::now() < until {
        std::thread::yield_now();
    }
    assert_eq!(held(), before);
}

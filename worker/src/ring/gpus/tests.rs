//! Against an NCCL whose GPUs are memory of the host: what is sent arrives late, in order, and nowhere else.
#![allow(clippy::single_range_in_vec_init, reason = "a list of one range is meant")]
#![allow(unsafe_code, reason = "the fake reads and writes where it is told to, as NCCL does")]

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use anello_collective::{InProcess, Shape};
use nccl_rs::symbols::{Comm, Symbols, code, kind};

use super::*;
use crate::ring::sum::{self, Total};

const PATIENCE: Duration = Duration::from_secs(60);

/// `ncclInvalidArgument`
const INVALID: i32 = 4;

#[derive(Default)]
struct Fake(Mutex<Wires>);

#[derive(Default)]
struct Wires {
    members: Vec<Member>,
    /// By sender and receiver.
    sent: BTreeMap<(usize, usize), VecDeque<Vec<u8>>>,
    /// `ncclAllReduce`: what was given to each sum so far, and by how many.
    sums: Vec<(Vec<f32>, i32)>,
    ranks: i32,
    /// Looks at communicators so far.
    looks: usize,
    /// A rank whose messages arrive nowhere.
    silent: Option<usize>,
    /// What communicators say of themselves.
    broken: i32,
    /// `ncclAllReduce` adds up wrongly.
    spoilt: bool,
}

/// One communicator.
struct Member {
    rank: usize,
    due: VecDeque<Due>,
    aborted: bool,
    /// Sums that it has a part in.
    sums: usize,
}

/// What is still to be received.
enum Due {
    Message { from: usize, address: usize, bytes: usize },
    Sum { number: usize, address: usize },
}

impl Fake {
    fn wires(&self) -> std::sync::MutexGuard<'_, Wires> {
        self.0.lock().unwrap()
    }
}

impl Symbols for Fake {
    fn version(&self) -> (i32, i32) {
        (0, 22_809)
    }

    fn text(&self, code: i32, _: Option<Comm>) -> String {
        format!("words for {code}")
    }

    fn unique_id(&self) -> (i32, UniqueId) {
        (0, UniqueId([9; 128]))
    }

    fn init_rank(&self, ranks: i32, id: &UniqueId, rank: i32) -> (i32, Comm) {
        assert_eq!(id.0, [9; 128], "the first member's id is everyone's");
        let mut wires = self.wires();
        wires.ranks = ranks;
        wires.members.push(Member { rank: rank as usize, due: VecDeque::new(), aborted: false, sums: 0 });
        (code::IN_PROGRESS, Comm(wires.members.len() - 1))
    }

    unsafe fn async_error(&self, comm: Comm) -> (i32, i32) {
        let mut wires = self.wires();
        wires.looks += 1;
        if wires.broken != 0 {
            return (0, wires.broken);
        }
        // Something is always late.
        if wires.looks.is_multiple_of(3) {
            return (0, code::IN_PROGRESS);
        }
        let Wires { members, sent, sums, ranks, .. } = &mut *wires;
        let Member { rank, due, .. } = &mut members[comm.0];
        while let Some(first) = due.front() {
            // SAFETY: the memory is the receiver's until its stream is past the call, which is when nothing is due.
            match *first {
                Due::Message { from, address, bytes } => {
                    let Some(values) = sent.get_mut(&(from, *rank)).and_then(VecDeque::pop_front) else {
                        return (0, code::IN_PROGRESS);
                    };
                    assert_eq!(values.len(), bytes, "what {from} sends to {rank} is not what that receives");
                    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), address as *mut u8, bytes) };
                }
                Due::Sum { number, .. } if sums[number].1 < *ranks => return (0, code::IN_PROGRESS),
                Due::Sum { number, address } => {
                    let sum = &sums[number].0;
                    unsafe { std::ptr::copy_nonoverlapping(sum.as_ptr(), address as *mut f32, sum.len()) };
                }
            }
            due.pop_front();
        }
        (0, code::SUCCESS)
    }

    unsafe fn abort(&self, comm: Comm) -> i32 {
        let member = &mut self.wires().members[comm.0];
        member.due.clear();
        member.aborted = true;
        0
    }

    fn group_start(&self) -> i32 {
        0
    }

    fn group_end(&self) -> i32 {
        code::IN_PROGRESS
    }

    unsafe fn send(&self, from: usize, count: usize, kind: i32, peer: i32, comm: Comm, _: usize) -> i32 {
        let mut wires = self.wires();
        let rank = wires.members[comm.0].rank;
        if kind != kind::FLOAT32 || peer as usize == rank {
            return INVALID;
        }
        if wires.silent != Some(rank) {
            // SAFETY: so many bytes lie there, as the sender says.
            let values = unsafe { std::slice::from_raw_parts(from as *const u8, 4 * count) }.to_vec();
            wires.sent.entry((rank, peer as usize)).or_default().push_back(values);
        }
        0
    }

    unsafe fn recv(&self, to: usize, count: usize, _: i32, peer: i32, comm: Comm, _: usize) -> i32 {
        let due = Due::Message { from: peer as usize, address: to, bytes: 4 * count };
        self.wires().members[comm.0].due.push_back(due);
        0
    }

    unsafe fn all_reduce(&self, from: usize, to: usize, count: usize, _: i32, comm: Comm, _: usize) -> i32 {
        // SAFETY: so many values lie there, as the caller says.
        let values = unsafe { std::slice::from_raw_parts(from as *const f32, count) };
        let Wires { members, sums, spoilt, .. } = &mut *self.wires();
        let Member { due, sums: number, .. } = &mut members[comm.0];
        due.push_back(Due::Sum { number: *number, address: to });
        if *number == sums.len() {
            sums.push((vec![if *spoilt { 1.0 } else { 0.0 }; count], 0));
        }
        let (sum, given) = &mut sums[*number];
        sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        (*given, *number) = (*given + 1, *number + 1);
        0
    }
}

/// What a member computes: the same value nowhere twice, and sums that depend on the order of addition.
fn partial(rank: usize, part: usize, blocks: usize) -> Tensor {
    let stream = anello_configs::random::Stream::new(5, "partial", &[rank as u64, part as u64]);
    let value = |at: usize| ((stream.unit_at(at as u64) - 0.5) * 10f64.powi((at % 9) as i32)) as f32;
    Tensor::from_slice(&(0..blocks * BLOCK).map(value).collect::<Vec<f32>>())
}

fn watchdog() -> Watchdog {
    Watchdog::start(PATIENCE, |what| panic!("{what}")).unwrap()
}

/// Runs `member` for each of a ring of `shape`, on threads, over one fake.
fn together<T: Send>(
    fake: &Arc<Fake>,
    shape: &Shape,
    order: &[Range<usize>],
    member: impl Fn(usize, &mut InProcess, Result<Gpus, RingError>) -> T + Sync,
) -> Vec<T> {
    let member = &member;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(InProcess::ring_of(shape).unwrap())
            .map(|(rank, mut ring)| {
                scope.spawn(move || {
                    let nccl = Nccl::of(Library::of(fake.clone()).unwrap(), watchdog());
                    let gpus = nccl.meet(&mut ring, Step(7), order.to_vec(), Device::Cpu);
                    member(rank, &mut ring, gpus)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A step of `rank`: each block of the partial sums is right only once it was told to be whole.
fn compute(
    ring: &Ring,
    order: &[Range<usize>],
    spoilt: bool,
) -> impl FnOnce(&mut dyn FnMut(Growing<'_>)) + use<> {
    let (rank, blocks) = (ring.rank(), ring.shape().blocks as usize);
    let (parts, order) = (ring.parts(rank).to_vec(), order.to_vec());
    move |tell| {
        if parts.is_empty() {
            return;
        }
        let values: Vec<Tensor> = (0..parts.len()).map(|part| partial(rank.index(), part, blocks)).collect();
        let buffers: Vec<Tensor> = values.iter().map(|values| values.full_like(f64::NAN)).collect();
        let sums = parts.iter().map(|part| (part.first, part.lanes, LossSums::zero(1))).collect();
        tell(Growing::Sums(sums, buffers.iter().map(Tensor::shallow_clone).collect()));
        for (at, whole) in order.iter().filter(|blocks| !blocks.is_empty()).enumerate() {
            for (buffer, values) in buffers.iter().zip(&values) {
                cut(buffer, whole, 0).copy_(&cut(values, whole, 0));
            }
            tell(Growing::Whole(if spoilt && at == 1 { whole.start..whole.end + 1 } else { whole.clone() }));
        }
        tell(Growing::Lane(&mut values[0].shallow_clone()));
    }
}

fn bits(flat: &Tensor, order: &[Range<usize>]) -> Vec<u32> {
    let of = |blocks: &Range<usize>| Vec::<f32>::try_from(cut(flat, blocks, 0)).unwrap();
    order.iter().flat_map(of).map(f32::to_bits).collect()
}

fn word(rank: usize) -> impl FnOnce(Vec<(u32, u32, LossSums)>) -> Vec<u8> {
    move |sums| vec![rank as u8, sums.len() as u8]
}

#[test]
fn sums_and_words_are_those_of_the_ring_on_the_host() {
    let shapes = [
        (Vec::from([0..4]), vec![3..5, 0..3]),
        (vec![0..2, 2..4], vec![4..7, 7..9, 2..4, 0..2]),
        (vec![0..3, 3..8], vec![6..9, 9..9, 0..6]),
        (vec![5..8, 0..1, 1..5], vec![8..11, 3..8, 0..3]),
        // Without lanes; and not all blocks are summed.
        (vec![0..1, 1..1, 1..2], vec![2..5, 7..8]),
        // More members than blocks.
        (vec![0..1, 1..2, 2..3, 3..4], vec![1..2, 0..1]),
    ];
    for (ranges, order) in shapes {
        let blocks = order.iter().map(|blocks| blocks.end).max().unwrap() + usize::from(ranges.len() == 3);
        let listed = order.iter().cloned().flatten().map(|block| block as u32).collect();
        let shape = Shape { ranges, blocks: blocks as u32, block_len: BLOCK, order: listed, owners: 0 };
        let summed = |by_nccl: bool| {
            let fake = Arc::new(Fake::default());
            together(&fake, &shape, &order, |rank, ring, gpus| {
                let compute = compute(ring.ring(), &order, false);
                let mut total = Total::on_device(blocks * BLOCK, Device::Cpu);
                let ((), words) = match by_nccl {
                    true => gpus.unwrap().add_up(ring, Step(8), total.values(), word(rank), compute),
                    false => sum::add_up(ring, Step(8), &mut total, word(rank), compute),
                };
                (bits(total.values(), &order), words.unwrap())
            })
        };
        let (by_nccl, on_the_host) = (summed(true), summed(false));
        assert!(
            by_nccl == on_the_host,
            "{shape:?}: {:?}",
            by_nccl.iter().map(|(_, words)| words).collect::<Vec<_>>()
        );
        assert!(by_nccl.iter().all(|(sum, _)| sum == &by_nccl[0].0 && !sum.is_empty()), "{shape:?}");
    }
}

#[test]
fn new_weights_are_given_to_all() {
    let order = vec![3..6, 0..3];
    let shape = Shape::balanced(4, 3, 6, BLOCK);
    let all = together(&Arc::new(Fake::default()), &shape, &order, |rank, ring, gpus| {
        let mut gpus = gpus.unwrap();
        let total = Tensor::zeros([6 * BLOCK as i64], (Kind::Float, Device::Cpu));
        let own = ring.ring().blocks(Rank(rank as u32));
        let _ = cut(&total, &own, 0).fill_(1.0 + rank as f64);
        gpus.spread(ring, Step(8), &total).unwrap();
        (bits(&total, &order), gpus.sent_bytes())
    });
    let expected: Vec<u32> = [2, 3, 3, 1, 1, 2]
        .iter()
        .flat_map(|rank| std::iter::repeat_n((*rank as f32).to_bits(), BLOCK))
        .collect();
    for (weights, sent_bytes) in all {
        assert!(weights == expected);
        assert_eq!(sent_bytes, 2 * 2 * BLOCK as u64 * 4, "two blocks to two members");
    }
}

#[test]
fn who_waits_for_a_member_that_sends_nothing_is_aborted_and_leaves_nothing_behind() {
    let (fake, order, shape) = (Arc::new(Fake::default()), vec![2..4, 0..2], Shape::balanced(2, 2, 4, BLOCK));
    fake.wires().silent = Some(1);
    let errors = together(&fake, &shape, &order, |rank, ring, gpus| {
        let (mut gpus, abort) = (gpus.unwrap(), ring.abort_handle());
        let compute = compute(ring.ring(), &order, false);
        let total = Tensor::zeros([4 * BLOCK as i64], (Kind::Float, Device::Cpu));
        std::thread::scope(|scope| {
            // As the coordinator's order does, which the ring's other end is told of too.
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                abort.abort("a member is gone");
            });
            gpus.add_up(ring, Step(8), &total, word(rank), compute).1.unwrap_err()
        })
    });
    assert!(
        matches!(&errors[0], RingError::Aborted { reason } if reason == "a member is gone"),
        "{errors:?}"
    );
    let wires = fake.wires();
    let left = |member: &Member| !member.aborted || !member.due.is_empty();
    assert!(!wires.members.iter().any(left), "nothing is written to memory of ours any more");
}

#[test]
fn an_error_of_nccl_ends_the_generation_in_its_words() {
    let (fake, order, shape) =
        (Arc::new(Fake::default()), Vec::from([0..2]), Shape::balanced(2, 2, 2, BLOCK));
    let errors = together(&fake, &shape, &order, |rank, ring, gpus| {
        let mut gpus = gpus.unwrap();
        // Both have met.
        ring.exchange(Step(8), &[]).unwrap();
        fake.wires().broken = 6;
        let compute = compute(ring.ring(), &order, false);
        let total = Tensor::zeros([2 * BLOCK as i64], (Kind::Float, Device::Cpu));
        gpus.add_up(ring, Step(8), &total, word(rank), compute).1.unwrap_err().to_string()
    });
    let text = "this collective ended before (the communicator broke: words for 6 (6)); make a new one for the next generation";
    assert_eq!(errors, [text, text]);
    assert!(fake.wires().members.iter().all(|member| member.aborted));
}

#[test]
#[should_panic(expected = "in the order of the layout")]
fn blocks_in_another_order_are_a_bug_and_no_hang() {
    let (order, shape) = (vec![2..4, 0..2], Shape::balanced(1, 1, 4, BLOCK));
    let mut ring = InProcess::ring_of(&shape).unwrap().remove(0);
    let nccl = Nccl::of(Library::of(Arc::new(Fake::default())).unwrap(), watchdog());
    let mut gpus = nccl.meet(&mut ring, Step(7), order.clone(), Device::Cpu).unwrap();
    let compute = compute(ring.ring(), &order, true);
    let total = Tensor::zeros([4 * BLOCK as i64], (Kind::Float, Device::Cpu));
    let _ = gpus.add_up(&mut ring, Step(8), &total, word(0), compute);
}

#[test]
fn the_speed_of_a_sum_is_measured_beside_that_of_nccl() {
    for (ranks, spoilt) in [(2, false), (3, false), (5, false), (2, true)] {
        let fake = Arc::new(Fake::default());
        fake.wires().spoilt = spoilt;
        let library = Library::of(fake.clone()).unwrap();
        let found = speed::among(&library, &vec![Device::Cpu; ranks], 20, (3, 1)).unwrap();
        assert_eq!(found.right, !spoilt, "{ranks} ranks: {found:?}");
        let wires = fake.wires();
        assert_eq!((wires.sums.len(), wires.members.len()), (4, ranks));
        assert!(wires.members.iter().all(|member| member.aborted), "no communicator is left");
    }
}

#[test]
fn a_rank_that_fails_ends_the_measurement_of_all() {
    let fake = Arc::new(Fake::default());
    fake.wires().broken = 6;
    let library = Library::of(fake).unwrap();
    let failed = speed::among(&library, &[Device::Cpu, Device::Cpu], 4, (1, 0)).unwrap_err().to_string();
    assert!(failed.contains("words for 6"), "{failed}");
}

#[test]
fn bus_bandwidth_is_that_of_nccl_tests() {
    let speed = |ranks| speed::Speed {
        nccl: String::new(),
        gpus: ranks,
        ranks,
        bytes: 1 << 30,
        seconds: 0.02,
        all_reduce_seconds: 0.016,
        right: true,
    };
    assert!(
        (speed(2).bus_gb_per_s(0.02) - 53.687).abs() < 1e-3,
        "each byte once, over the slower of two ways"
    );
    assert!((speed(8).bus_gb_per_s(0.02) - 93.952).abs() < 1e-3);
    assert!((speed(8).share() - 0.8).abs() < 1e-12);
}

//! Rings to test, and the definition of what they must compute.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use anello_collective::tcp::{Listener, Options, Tcp, connect};
use anello_collective::tree::Subtree;
use anello_collective::{AbortHandle, Collective, Generation, InProcess, Rank, Result, Shape, Step};
use anello_tls::{Files, Role, Tls, authority};

/// Long enough for a loaded machine; a test that waits for it fails.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Time in which what is no time-out has come, on a machine that does much else: a fraction of [`PATIENCE`].
pub const AT_ONCE: Duration = Duration::from_secs(5);

/// An implementation.
pub trait Fabric {
    /// All members of a ring of `shape`, in the order of ranks.
    fn ring(shape: &Shape) -> Vec<Box<dyn Collective>>;
}

pub struct InProcesses;

impl Fabric for InProcesses {
    fn ring(shape: &Shape) -> Vec<Box<dyn Collective>> {
        InProcess::ring_of(shape).unwrap().into_iter().map(|member| Box::new(member) as _).collect()
    }
}

pub struct OverTcp;

impl Fabric for OverTcp {
    fn ring(shape: &Shape) -> Vec<Box<dyn Collective>> {
        let mut listeners = listeners(shape.ranges.len());
        let ring = meet(&mut listeners, shape, Generation(1));
        ring.into_iter().map(|member| Box::new(member.unwrap()) as _).collect()
    }
}

/// The same under TLS.
pub struct OverTls;

impl Fabric for OverTls {
    fn ring(shape: &Shape) -> Vec<Box<dyn Collective>> {
        let mut listeners = secured(shape.ranges.len());
        let ring = meet(&mut listeners, shape, Generation(1));
        ring.into_iter().map(|member| Box::new(member.unwrap()) as _).collect()
    }
}

/// A folder with a CA and certificates of all roles, made once.
pub fn certificates() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("conformance-certs");
        authority::init(&dir, 30, true).unwrap();
        dir
    })
}

/// What a worker has of the folder.
pub fn worker(dir: &Path) -> Tls {
    Tls::load(Files::in_dir(dir, Role::Worker), Role::Worker).unwrap()
}

pub fn secured(members: usize) -> Vec<Listener> {
    listeners(members).into_iter().map(|listener| listener.with_tls(worker(certificates()))).collect()
}

pub fn localhost() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

pub fn listeners(members: usize) -> Vec<Listener> {
    (0..members).map(|_| Listener::bind(localhost()).unwrap()).collect()
}

/// Options of `rank` in the ring of these listeners.
pub fn options(rank: usize, addresses: &[SocketAddr], shape: &Shape, generation: Generation) -> Options {
    Options {
        rank: Rank(rank as u32),
        members: addresses.iter().map(|address| vec![*address]).collect(),
        shape: shape.clone(),
        generation,
        job: "ouro".into(),
        config_digest: "c0ffee".into(),
        build: "0.1.0".into(),
        deadline: PATIENCE,
        socket_buffer_bytes: None,
        silence: Duration::from_secs(10),
        abort: AbortHandle::new(),
    }
}

pub fn addresses(listeners: &[Listener]) -> Vec<SocketAddr> {
    listeners.iter().map(|listener| listener.addresses().unwrap()[0]).collect()
}

/// The rendezvous of all listeners at once.
pub fn meet(listeners: &mut [Listener], shape: &Shape, generation: Generation) -> Vec<Result<Tcp>> {
    let addresses = addresses(listeners);
    meet_with(listeners, |rank| options(rank, &addresses, shape, generation))
}

/// The same with options of one's own.
pub fn meet_with(listeners: &mut [Listener], options: impl Fn(usize) -> Options + Sync) -> Vec<Result<Tcp>> {
    let options = &options;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(listeners)
            .map(|(rank, listener)| scope.spawn(move || connect(listener, &options(rank))))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Runs `work` on all members at once; the results in the order of ranks. Each member is dropped when its work is done.
pub fn run<T: Send>(
    members: Vec<Box<dyn Collective>>,
    work: impl Fn(Box<dyn Collective>) -> T + Sync,
) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = members.into_iter().map(|member| scope.spawn(move || work(member))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The gradient of a lane at a step: values whose sum depends on the order of addition.
pub fn lane(step: Step, lane: u32, len: usize) -> Vec<f32> {
    let mut state = (step.0 << 32 | u64::from(lane)).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let bits = (state >> 32) as u32;
            let magnitude = [1e-5f32, 1.0, 2e3, 7e6][(bits >> 30) as usize];
            ((bits & 0xF_FFFF) as f32 / 524_288.0 - 1.0) * magnitude
        })
        .collect()
}

/// The sum over a node, written plainly: the definition.
pub fn tree(step: Step, node: Subtree, len: usize) -> Vec<f32> {
    if node.lanes == 1 {
        return lane(step, node.first, len);
    }
    let lanes = node.lanes / 2;
    let left = tree(step, Subtree { first: node.first, lanes }, len);
    let right = tree(step, Subtree { first: node.first + lanes, lanes }, len);
    left.into_iter().zip(right).map(|(left, right)| left + right).collect()
}

/// The partial sums of a member, as its worker would hand them in.
pub fn partials(member: &dyn Collective, step: Step) -> Vec<Vec<f32>> {
    let ring = member.ring();
    ring.parts(ring.rank()).iter().map(|part| tree(step, *part, ring.len())).collect()
}

pub fn lanes(shape: &Shape) -> u32 {
    shape.ranges.iter().map(|range| range.end).max().unwrap()
}

/// What one worker that serves all lanes has.
pub fn whole(shape: &Shape, step: Step) -> Vec<f32> {
    let len = shape.blocks as usize * shape.block_len;
    tree(step, Subtree { first: 0, lanes: lanes(shape) }, len)
}

pub fn borrowed(partials: &[Vec<f32>]) -> Vec<&[f32]> {
    partials.iter().map(Vec::as_slice).collect()
}

/// An output for the member's own blocks, full of what must not be left over.
pub fn output(member: &dyn Collective) -> Vec<f32> {
    let ring = member.ring();
    vec![f32::NAN; ring.elements(ring.rank()).len()]
}

#[track_caller]
pub fn assert_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    if let Some(at) = (0..found.len()).find(|at| found[*at].to_bits() != expected[*at].to_bits()) {
        panic!("{what}: element {at} is {} and not {}", found[at], expected[at]);
    }
}

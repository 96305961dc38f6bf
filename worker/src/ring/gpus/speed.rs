//! How fast the GPUs of a machine add up: the ring's sum by NCCL beside NCCL's own.
//!
//! A thread is a rank, as in NVIDIA's `nccl-tests` with `-g`. What is timed is a step's sum as a worker makes it, without a step:
//! all stretches of blocks are whole at once, so that nothing hides it.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Instant;

use anello_collective::{InProcess, Shape};
use anello_configs::ComputeDevice;
use serde::Serialize;

use super::*;
use crate::device;
use crate::error::{Error, Result};
use crate::ffi::torch;
use crate::ring::model::load_nccl;

/// Sums that are timed, and those before them.
const ROUNDS: (usize, usize) = (20, 3);
/// Stretches of blocks that become whole one after the other, as layers do.
const STRETCHES: usize = 16;
/// Time for all of it.
const DEADLINE: Duration = Duration::from_secs(120);
/// With it NCCL lets several ranks share a GPU.
const SHARE: (&str, &str) = ("NCCL_MULTI_RANK_GPU_ENABLE", "1");

/// What a sum over the GPUs of this machine takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Speed {
    /// Which NCCL.
    pub nccl: String,
    /// GPUs.
    pub gpus: usize,
    /// Ranks that add up: one a GPU, or several.
    pub ranks: usize,
    /// Bytes that each rank has, fp32.
    pub bytes: u64,
    /// Seconds of a sum as rings make it, until every rank has all of it: the slowest rank's, the median over sums.
    pub seconds: f64,
    /// The same of `ncclAllReduce`.
    pub all_reduce_seconds: f64,
    /// Whether both made the same sum, of numbers whose order of addition does not matter.
    pub right: bool,
}

impl Speed {
    /// The bus bandwidth of a sum that takes so many seconds, GB/s: 2 (n − 1) / n of the bytes, as `nccl-tests` counts it.
    pub fn bus_gb_per_s(&self, seconds: f64) -> f64 {
        2.0 * (self.ranks as f64 - 1.0) / self.ranks as f64 * self.bytes as f64 / seconds / 1e9
    }

    /// What share of `ncclAllReduce`'s bus bandwidth a ring's sum reaches.
    pub fn share(&self) -> f64 {
        self.all_reduce_seconds / self.seconds
    }
}

/// Times the sum of `bytes` (rounded up to whole blocks) over `ranks` ranks, as many as there are GPUs unless said, by the NCCL that
/// a ring would use.
///
/// # Errors
/// [`Error::Device`]: no GPU, or no NCCL; [`Error::Config`]: fewer than two ranks, or more than the GPUs take; [`Error::Ring`]: what
/// NCCL says.
pub fn measure(ranks: Option<usize>, bytes: u64) -> Result<Speed> {
    let nccl = load_nccl(device::open(ComputeDevice::Cuda(Some(0)))?)?;
    let gpus = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
    let ranks = ranks.unwrap_or(gpus);
    if ranks < 2 {
        return Err(Error::config(
            format!("this process sees {gpus} GPU, and a sum wants two ranks"),
            format!(
                "say how many are to share it, 2 or more (with NCCL 2.30 or newer, and {}={})",
                SHARE.0, SHARE.1
            ),
        ));
    }
    let shares = nccl.library.version().shares_gpus() && std::env::var(SHARE.0).as_deref() == Ok(SHARE.1);
    if ranks > gpus && !shares {
        let fact = format!("{ranks} ranks do not share {gpus} GPUs by {}", nccl.version());
        let remedy = format!("take at most {gpus}, or NCCL 2.30 or newer and {}={}", SHARE.0, SHARE.1);
        return Err(Error::config(fact, remedy));
    }
    let devices: Vec<Device> = (0..ranks).map(|rank| Device::Cuda(rank % gpus)).collect();
    let blocks = bytes.div_ceil((BLOCK * size_of::<f32>()) as u64) as usize;
    let found = among(&nccl.library, &devices, blocks, ROUNDS);
    let Found { seconds, all_reduce_seconds, right } =
        found.map_err(|cause| Error::Ring { fact: cause.to_string() })?;
    let bytes = super::bytes(&(0..blocks));
    Ok(Speed { nccl: nccl.version(), gpus, ranks, bytes, seconds, all_reduce_seconds, right })
}

#[derive(Debug)]
pub(super) struct Found {
    seconds: f64,
    all_reduce_seconds: f64,
    pub right: bool,
}

/// The same over ranks on these devices: so many `rounds`, and so many before them.
pub(super) fn among(
    library: &Library,
    devices: &[Device],
    blocks: usize,
    rounds: (usize, usize),
) -> std::result::Result<Found, RingError> {
    let lanes = devices.len().next_power_of_two() as u32;
    let members = InProcess::ring_of(&Shape::balanced(lanes, devices.len(), blocks as u32, BLOCK))?;
    let handles: Vec<AbortHandle> = members.iter().map(Collective::abort_handle).collect();
    let until = Instant::now() + DEADLINE;
    let found = std::thread::scope(|scope| {
        let (tell, told) = channel();
        for (ring, &device) in members.into_iter().zip(devices) {
            let tell = tell.clone();
            scope.spawn(move || tell.send(of_rank(library, ring, device, rounds)));
        }
        drop(tell);
        let next = || match told.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(found) => found,
            Err(RecvTimeoutError::Timeout) => {
                Err(RingError::Aborted { reason: format!("{DEADLINE:?} were not enough") })
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(RingError::Dead { cause: "a rank is gone".to_owned() })
            }
        };
        let found: std::result::Result<Vec<Rounds>, RingError> = devices.iter().map(|_| next()).collect();
        if let Err(cause) = &found {
            // The others wait for it.
            handles.iter().for_each(|handle| handle.abort(cause.to_string()));
        }
        found
    })?;
    let median = |of: fn(&Rounds) -> &[f64]| {
        let slowest = |round: usize| found.iter().map(|rank| of(rank)[round]).fold(0.0, f64::max);
        let mut seconds: Vec<f64> = (0..rounds.0).map(slowest).collect();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    };
    Ok(Found {
        seconds: median(|rank| &rank.seconds),
        all_reduce_seconds: median(|rank| &rank.all_reduce_seconds),
        right: found.iter().all(|rank| rank.right),
    })
}

/// What one rank saw.
struct Rounds {
    seconds: Vec<f64>,
    all_reduce_seconds: Vec<f64>,
    right: bool,
}

fn of_rank(
    library: &Library,
    mut ring: InProcess,
    device: Device,
    (timed, before): (usize, usize),
) -> std::result::Result<Rounds, RingError> {
    if device != Device::Cpu {
        torch::use_device(device).map_err(thrown)?;
    }
    // One each: a watchdog aborts all communicators that it knows, and the others' are theirs.
    let watchdog = Watchdog::that_ends_the_process(GRACE).map_err(dead)?;
    let blocks = ring.ring().shape().blocks as usize;
    let cut = |stretch: usize| blocks * stretch / STRETCHES;
    let order: Vec<Range<usize>> = (0..STRETCHES).rev().map(|at| cut(at)..cut(at + 1)).collect();
    let mut gpus = Nccl::of(library.clone(), watchdog).meet(&mut ring, Step(0), order.clone(), device)?;

    let elements = (blocks * BLOCK) as i64;
    let zeros = || Tensor::zeros([elements], (Kind::Float, device));
    let parts = ring.ring().parts(ring.ring().rank()).to_vec();
    // Small whole numbers: their sums are exact in whatever order.
    let numbers =
        |first: u32| (Tensor::arange(elements, (Kind::Float, device)).remainder(7)) + f64::from(first);
    let partials: Vec<Tensor> = parts.iter().map(|part| numbers(part.first)).collect();
    let alone = match &partials[..] {
        [one] => one.shallow_clone(),
        some => some.iter().fold(zeros(), |sum, partial| sum + partial),
    };
    let (total, all_reduced) = (zeros(), zeros());

    let mut found = Rounds { seconds: Vec::new(), all_reduce_seconds: Vec::new(), right: false };
    let mut steps = (1..).map(Step);
    let mut step = || steps.next().expect("steps do not end");
    for round in 0..before + timed {
        ring.exchange(step(), &[])?;
        let began = Instant::now();
        let sums = parts.iter().map(|part| (part.first, part.lanes, LossSums::zero(1))).collect();
        let whole = |tell: &mut dyn FnMut(Growing<'_>)| {
            tell(Growing::Sums(sums, partials.iter().map(Tensor::shallow_clone).collect()));
            let some = order.iter().filter(|blocks| !blocks.is_empty());
            some.for_each(|blocks| tell(Growing::Whole(blocks.clone())));
        };
        gpus.add_up(&mut ring, step(), &total, |_| Vec::new(), whole).1?;
        let seconds = began.elapsed().as_secs_f64();

        ring.exchange(step(), &[])?;
        let began = Instant::now();
        gpus.all_reduce(&alone, &all_reduced)?;
        let all_reduce_seconds = began.elapsed().as_secs_f64();
        if round >= before {
            found.seconds.push(seconds);
            found.all_reduce_seconds.push(all_reduce_seconds);
        }
    }
    found.right = total.equal(&all_reduced);
    // No communicator goes before all are through.
    ring.exchange(step(), &[])?;
    Ok(found)
}

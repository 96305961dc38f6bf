//! What LibTorch is told by variables of the environment, which it reads once.
//!
//! Its threads sleep while they wait for one another; MKL's bits do not follow their number; and cuBLAS keeps its workspace in
//! one fixed way, without which its bits may change from call to call.
//!
//! A GPU's memory is taken in segments that grow, so that less of it lies idle between tensors, and the host's is pinned by
//! several threads: seven times as fast (measured: docs/gpu.md).
//!
//! By default threads spin. Alone on a machine that is a little faster; beside any other busy process a step takes ten
//! times as long (measured: docs/measured.md), since a thread that spins keeps the one it waits for off the core.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anello_worker::device::{MKL, WORKSPACE};

const POLICY: &str = "OMP_WAIT_POLICY";
/// No bit follows from it.
const MEMORY: (&str, &str) = (
    "PYTORCH_CUDA_ALLOC_CONF",
    "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8",
);

/// Sets the wait policy, MKL's kernels, the workspace and how a GPU's memory is taken, unless the user has, and starts this program
/// anew: the OpenMP runtime reads the first before `main`.
///
/// The process id stays. Where it cannot be done (a program that was replaced meanwhile), whoever opens a device says what is not set.
pub fn sleep_while_waiting() {
    let wanted = [(POLICY, "PASSIVE"), MKL, WORKSPACE, MEMORY];
    let missing: Vec<_> = wanted.into_iter().filter(|(name, _)| std::env::var_os(name).is_none()).collect();
    if missing.is_empty() {
        return;
    }
    let mut arguments = std::env::args_os();
    let (Some(name), Ok(program)) = (arguments.next(), std::env::current_exe()) else { return };
    let cause = Command::new(program).arg0(name).args(arguments).envs(missing).exec();
    tracing::warn!(%cause, "this program cannot be started anew, with the environment that LibTorch needs");
}

//! LibTorch's threads sleep while they wait for one another.
//!
//! By default they spin. Alone on a machine that is a little faster; beside any other busy process a step takes ten
//! times as long (measured: docs/measured.md), since a thread that spins keeps the one it waits for off the core.

use std::os::unix::process::CommandExt;
use std::process::Command;

const POLICY: &str = "OMP_WAIT_POLICY";

/// Sets the wait policy, unless the user has, and starts this program anew: the OpenMP runtime reads it before `main`.
///
/// The process id stays. Where it cannot be done (a program that was replaced meanwhile), the run is slower beside
/// others and nothing else.
pub fn sleep_while_waiting() {
    if std::env::var_os(POLICY).is_some() {
        return;
    }
    let mut arguments = std::env::args_os();
    let (Some(name), Ok(program)) = (arguments.next(), std::env::current_exe()) else { return };
    let cause = Command::new(program).arg0(name).args(arguments).env(POLICY, "PASSIVE").exec();
    tracing::debug!(%cause, "threads spin while they wait");
}

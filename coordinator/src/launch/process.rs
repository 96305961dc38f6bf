//! Workers as processes of this machine.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::{Exit, Launcher, Process};
use crate::error::{Error, Result};

/// Exit codes of a worker that starting it again does not change: a config that is wrong, a worker that was refused, a
/// machine that computes wrongly.
const HOPELESS: [i32; 3] = [2, 3, 5];

/// Starts workers with one command line. Each finds its slot in `ANELLO_SLOT`: which GPU it takes of several.
#[derive(Clone, Debug)]
pub struct Local {
    /// The program.
    pub program: PathBuf,
    /// Name of this machine. Workers say `NAME/SLOT`, so that one that is quarantined does not take all with it.
    pub machine: String,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Variables of its environment, over ours.
    pub environment: Vec<(OsString, OsString)>,
}

impl Launcher for Local {
    type Process = LocalProcess;

    fn start(&mut self, slot: u32) -> Result<LocalProcess> {
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .args([OsString::from("--machine"), format!("{}/{slot}", self.machine).into()])
            .env("ANELLO_SLOT", slot.to_string())
            .envs(self.environment.iter().cloned())
            // Open for as long as we live: a worker that is told to ends with it.
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|source| Error::Launch { program: self.program.display().to_string(), source })?;
        Ok(LocalProcess { child })
    }
}

/// A process of this machine.
#[derive(Debug)]
pub struct LocalProcess {
    child: Child,
}

impl Process for LocalProcess {
    fn poll(&mut self) -> Option<Exit> {
        let status = self.child.try_wait().ok()??;
        Some(match status.code() {
            Some(0) => Exit::Done,
            Some(code) if HOPELESS.contains(&code) => Exit::Hopeless(code),
            code => Exit::Died(code),
        })
    }

    fn terminate(&mut self) {
        signal(self.child.id(), rustix::process::Signal::TERM);
    }

    fn kill(&mut self) {
        // A zombie keeps its number until it is waited for, so this never meets another process.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn name(&self) -> String {
        format!("process {}", self.child.id())
    }
}

fn signal(process: u32, signal: rustix::process::Signal) {
    if let Some(pid) = i32::try_from(process).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

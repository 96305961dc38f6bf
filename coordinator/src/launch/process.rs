//! Workers as processes of this machine.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Exit, Launcher, Process};
use crate::error::{Error, Result};

/// Exit codes of a worker that starting it again does not change: a config that is wrong, a worker that was refused, a
/// machine that computes wrongly.
const HOPELESS: [i32; 3] = [2, 3, 5];
/// Exit code of a worker whose run has no data, or no device, on its machine.
const UNFIT: i32 = 6;
/// Lines of what a worker said last that are kept, and bytes of each that are told.
const TAIL: (usize, usize) = (16, 1000);
/// Longest wait for the last words of a process that has ended.
const LISTEN: Duration = Duration::from_millis(200);

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
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .args([OsString::from("--machine"), format!("{}/{slot}", self.machine).into()])
            .env("ANELLO_SLOT", slot.to_string())
            .envs(self.environment.iter().cloned())
            // Open for as long as we live: a worker that is told to ends with it.
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // Passed on to ours; its end is what it said of an error.
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| Error::Launch { program: self.program.display().to_string(), source })?;
        let tail = Tail::default();
        let listener = child.stderr.take().map(|stderr| tail.listen(stderr)).transpose();
        let listener = listener.map_err(|source| {
            let _ = child.kill();
            let _ = child.wait();
            Error::Launch { program: self.program.display().to_string(), source }
        })?;
        Ok(LocalProcess { child, tail, listener })
    }
}

/// The last lines that a process wrote to its standard error.
#[derive(Clone, Debug, Default)]
struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    /// Passes lines on to our standard error, and keeps the last.
    fn listen(&self, lines: impl Read + Send + 'static) -> std::io::Result<JoinHandle<()>> {
        let tail = self.clone();
        std::thread::Builder::new().name("stderr".to_owned()).spawn(move || {
            let (mut lines, mut line) = (BufReader::new(lines), Vec::new());
            while lines.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
                let _ = std::io::stderr().write_all(&line);
                let text = String::from_utf8_lossy(&line);
                let text = text.trim_end();
                if !text.is_empty() {
                    let mut kept = tail.0.lock().unwrap_or_else(PoisonError::into_inner);
                    kept.push_back(text[..text.floor_char_boundary(TAIL.1)].to_owned());
                    while kept.len() > TAIL.0 {
                        kept.pop_front();
                    }
                }
                line.clear();
            }
        })
    }

    /// What it said of an error: how commands end that failed; or whatever it said last.
    fn error(&self) -> Option<String> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let error = kept.iter().rev().find_map(|line| line.strip_prefix("error: "));
        error.or(kept.back().map(String::as_str)).map(str::to_owned)
    }
}

/// A process of this machine.
#[derive(Debug)]
pub struct LocalProcess {
    child: Child,
    tail: Tail,
    listener: Option<JoinHandle<()>>,
}

impl Process for LocalProcess {
    fn poll(&mut self) -> Option<Exit> {
        let status = self.child.try_wait().ok()??;
        Some(match status.code() {
            Some(0) => Exit::Done,
            Some(code) if HOPELESS.contains(&code) => Exit::Hopeless(code),
            Some(UNFIT) => Exit::Unfit(UNFIT),
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

    fn last_words(&mut self) -> Option<String> {
        let until = Instant::now() + LISTEN;
        // Until all is read, unless a process of its own keeps the pipe open.
        while self.listener.as_ref().is_some_and(|listener| !listener.is_finished()) && Instant::now() < until
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.tail.error()
    }
}

fn signal(process: u32, signal: rustix::process::Signal) {
    if let Some(pid) = i32::try_from(process).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(script: &str) -> Local {
        let arguments = ["-c", script].into_iter().map(OsString::from).collect();
        Local { program: "/bin/sh".into(), machine: "m".to_owned(), arguments, environment: Vec::new() }
    }

    fn end(script: &str) -> (Exit, Option<String>) {
        let mut process = local(script).start(0).unwrap();
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            match process.poll() {
                Some(exit) => return (exit, process.last_words()),
                None => assert!(Instant::now() < until, "it does not end"),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn how_a_process_ends_and_what_it_said_of_it() {
        let said = |text: &str| Some(text.to_owned());
        assert_eq!(
            end("echo 'error: no data' >&2; echo later >&2; exit 6"),
            (Exit::Unfit(6), said("no data"))
        );
        assert_eq!(
            end("for i in $(seq 99); do echo line $i >&2; done; exit 1"),
            (Exit::Died(Some(1)), said("line 99"))
        );
        assert_eq!(end("exit 3"), (Exit::Hopeless(3), None));
        assert_eq!(end("kill -9 $$"), (Exit::Died(None), None));
        assert_eq!(end("echo fine >&2").0, Exit::Done);
    }
}

//! Servers of others, as processes that outlive nobody.

use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// How one ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With SIGTERM, and is waited for.
    Politely,
    /// With SIGKILL: nothing is to be kept, and it would take its time.
    AtOnce,
}

/// A process that ends with this one, whatever becomes of it, and when it is dropped.
#[derive(Debug)]
pub struct Server(Child);

impl Server {
    /// Starts `program ARGUMENTS`; what it says on standard error goes to the file `log`.
    ///
    /// # Panics
    /// When there is no shell, or `log` cannot be written.
    pub fn start<A: AsRef<OsStr>>(program: &Path, arguments: &[A], log: &Path, end: End) -> Self {
        // Standard input ends with this process.
        let kill = if end == End::AtOnce { "kill -9" } else { "kill" };
        let until_eof = format!(
            r#""$0" "$@" < /dev/null & server=$!; read -r _; {kill} "$server"; wait "$server" 2> /dev/null"#
        );
        let log = File::create(log).expect("the test's folder can be written");
        let child = Command::new("sh")
            .args(["-c", &until_eof])
            .arg(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        Self(child.expect("there is a shell"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

//! The `anello` command as a process.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Longest that anything here may take, on a machine that others use too.
const DEADLINE: Duration = Duration::from_secs(120);

/// The `anello` of this build.
///
/// Cargo builds a binary only for the tests of its own package, so it is built here, once, in the profile and target
/// folder of this test: at once when it is fresh, as after `cargo test --workspace`.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let test = std::env::current_exe().expect("a test knows its own file");
        let profile_folder = test.ancestors().nth(2).expect("a test is in target/PROFILE/deps").to_owned();
        let target = profile_folder.parent().expect("target/PROFILE is in target");
        let profile = match profile_folder.file_name().and_then(OsStr::to_str) {
            Some("debug") | None => "dev",
            Some(name) => name,
        };
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        // What cargo tells a test of its package is none of the build's business: ring's build script asks for it, and would
        // have half of the crates built anew each time that a test comes after a build of a person's.
        let ours = |name: &OsString| {
            ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|of| name.to_string_lossy().starts_with(of))
        };
        for (name, _) in std::env::vars_os().filter(|(name, _)| ours(name)) {
            build.env_remove(name);
        }
        let built = build
            .args(["build", "--quiet", "--package", "anello", "--bin", "anello", "--profile", profile])
            .arg("--target-dir")
            .arg(target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .expect("cargo runs");
        assert!(built.status.success(), "anello does not build:\n{}", String::from_utf8_lossy(&built.stderr));
        profile_folder.join("anello")
    })
}

/// Sends `signal` (a name, as `STOP`) to a process, if it is there still.
pub fn signal(process: u32, signal: &str) {
    let sent =
        Command::new("sh").args(["-c", "kill -$1 $0 2>/dev/null", &process.to_string(), signal]).status();
    let _ = sent.expect("there is a shell");
}

/// A port of loopback that nobody has now, and that the system gives nobody who asks for any: whoever was promised it may
/// be killed and come back to it.
pub fn free_port() -> u16 {
    // Below those of Linux's net.ipv4.ip_local_port_range, from a place of the process's own.
    const FIRST: u32 = 15_000;
    const COUNT: u32 = 17_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let start = std::process::id().wrapping_mul(101);
    let any =
        std::iter::repeat_with(|| NEXT.fetch_add(1, Ordering::Relaxed).wrapping_add(start) % COUNT + FIRST);
    any.take(COUNT as usize)
        .map(|port| port as u16)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("a free port")
}

/// Waits until `condition` holds.
///
/// # Panics
/// When it does not within the deadline.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < DEADLINE, "waited {DEADLINE:?} in vain until {what}");
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Runs `anello ARGUMENTS` in `folder` to its end.
pub fn anello(folder: &Path, arguments: &[&str]) -> Done {
    Process::start(folder, arguments).wait()
}

/// `anello` under way. It is killed when it is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    shown: String,
    out: PathBuf,
    log: PathBuf,
}

/// `anello` that has ended.
#[derive(Debug)]
pub struct Done {
    /// The command line.
    pub shown: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub out: String,
    /// What it wrote to standard error: its log.
    pub log: String,
}

impl Process {
    /// Starts `anello ARGUMENTS` in `folder`.
    pub fn start(folder: &Path, arguments: &[&str]) -> Self {
        Self::start_with(folder, arguments, &[])
    }

    /// Starts `anello ARGUMENTS` in `folder` with these variables besides those of the test.
    pub fn start_with(folder: &Path, arguments: &[&str], variables: &[(&str, String)]) -> Self {
        Self::start_by(&[], folder, arguments, variables)
    }

    /// Starts `BEFORE anello ARGUMENTS` in `folder`, where `before` is a command that becomes the one after it.
    pub fn start_by(
        before: &[String],
        folder: &Path,
        arguments: &[&str],
        variables: &[(&str, String)],
    ) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let logs = folder.join("logs");
        std::fs::create_dir_all(&logs).expect("the test's folder can be written");
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let file = |kind: &str| logs.join(format!("{number:03}.{kind}"));
        let (out, log) = (file("out"), file("log"));
        let create = |path: &Path| File::create(path).expect("the test's folder can be written");
        let words = before.iter().map(OsStr::new).chain([binary().as_os_str()]);
        let words: Vec<&OsStr> = words.chain(arguments.iter().map(OsStr::new)).collect();
        let log_of: &[&str] = if arguments.contains(&"--log") { &[] } else { &["--log", "info"] };
        let child = Command::new(words[0])
            .args(&words[1..])
            .args(log_of)
            .envs(variables.iter().map(|(name, value)| (*name, value)))
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(create(&out))
            .stderr(create(&log))
            .spawn()
            .expect("anello starts");
        Self { child, shown: format!("anello {}", arguments.join(" ")), out, log }
    }

    /// What it has written to standard output so far.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.out).unwrap_or_default()).into_owned()
    }

    /// What it has written to standard error so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_some()
    }

    /// SIGKILL. Returns whether it was still under way.
    pub fn kill(mut self) -> bool {
        let running = !self.ended();
        let _ = self.child.kill();
        self.wait();
        running
    }

    /// Sends `signal` (a name, as `INT`).
    pub fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Process ids of what it has started and that lives, whichever of its threads did.
    pub fn children(&self) -> Vec<u32> {
        let threads =
            std::fs::read_dir(format!("/proc/{}/task", self.child.id())).into_iter().flatten().flatten();
        let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
        lists
            .flat_map(|list| list.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>())
            .collect()
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Done {
        let began = Instant::now();
        while !self.ended() {
            let late = began.elapsed() >= DEADLINE;
            assert!(!late, "{} hangs\nout: {}\nlog: {}", self.shown, self.out(), self.log());
            std::thread::sleep(Duration::from_millis(3));
        }
        let status = self.child.wait().expect("it is our child");
        Done { shown: self.shown.clone(), status, out: self.out(), log: self.log() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Done {
    /// Asserts its exit code, and returns what it wrote to standard output.
    pub fn expect(self, code: i32) -> String {
        let Self { shown, status, out, log } = self;
        assert!(status.code() == Some(code), "{shown}: {status}, not {code}\nout: {out}\nlog: {log}");
        out
    }
}

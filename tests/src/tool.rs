//! Programs that tests start and that Debian has: Prometheus, Chromium; and HTTP, as a scraper speaks it.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::{free_port, wait_until};

/// Where a program is; `None`, after saying so, where there is none and it need not be.
///
/// # Panics
/// In CI, when there is none.
pub(crate) fn find(name: &str, how: &str) -> Option<PathBuf> {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.test-tools/bin").join(name);
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = std::iter::once(ours)
        .chain(std::env::split_paths(&folders).map(|folder| folder.join(name)))
        .find(|path| path.is_file());
    if found.is_none() {
        assert!(std::env::var_os("CI").is_none(), "{name} must be there in CI: {how}");
        eprintln!("SKIPPED: there is no {name}; {how}");
    }
    found
}

/// The answer to a request to `127.0.0.1:port`: status and body. Status 0: nobody answers.
pub fn http(port: u16, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, String) {
    http_at(("127.0.0.1", port), method, path, headers, body)
}

/// The same of another address.
pub fn http_at(
    address: (&str, u16),
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> (u16, String) {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let Ok(answer) = ask() else { return (0, String::new()) };
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status, body.to_owned())
}

/// Prometheus under way, that scrapes one address four times a second. It ends when it is dropped.
#[derive(Debug)]
pub struct Prometheus {
    child: Child,
    port: u16,
}

impl Prometheus {
    /// Starts it in `folder`, which it may fill, with these rules; `None` where there is none.
    ///
    /// # Panics
    /// In CI, when there is none.
    pub fn start(folder: &Path, target: u16, rules: &str) -> Option<Self> {
        let program = find("prometheus", "scripts/test-tools fetches it from Debian")?;
        let _ = std::fs::remove_dir_all(folder);
        std::fs::create_dir_all(folder).expect("the test's folder can be written");
        let config = format!(
            "global: {{scrape_interval: 250ms, evaluation_interval: 250ms}}\nrule_files: [rules.yaml]\nscrape_configs:\n- \
             job_name: anello-coordinator\n  honor_labels: true\n  static_configs: [{{targets: ['127.0.0.1:{target}']}}]\n"
        );
        for (name, text) in [("prometheus.yml", config.as_str()), ("rules.yaml", rules)] {
            std::fs::write(folder.join(name), text).expect("the test's folder can be written");
        }
        let port = free_port();
        let child = Command::new(program)
            .args(["--config.file=prometheus.yml", "--storage.tsdb.path=data"])
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(folder.join("log")).expect("the test's folder can be written"))
            .spawn()
            .expect("Prometheus starts");
        let prometheus = Self { child, port };
        wait_until("Prometheus is ready", || http(port, "GET", "/-/ready", &[], "").0 == 200);
        Some(prometheus)
    }

    /// The answer to a query, JSON.
    pub fn query(&self, expression: &str) -> serde_json::Value {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let (_, body) = http(self.port, "GET", &format!("/api/v1/query?query={encoded}"), &[], "");
        serde_json::from_str(&body).unwrap_or_default()
    }

    /// The first value of a query; `None`: there is no series.
    pub fn value(&self, expression: &str) -> Option<f64> {
        self.query(expression)["data"]["result"][0]["value"][1].as_str()?.parse().ok()
    }

    /// Whether an alert fires.
    pub fn fires(&self, alert: &str) -> bool {
        self.value(&format!("ALERTS{{alertname=\"{alert}\", alertstate=\"firing\"}}")).is_some()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How Chromium is started so that it shows nothing on a screen and speaks with nobody else.
pub(crate) const CHROMIUM: [&str; 8] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
];

/// What a page is after its script has run, as Chromium writes it out; `None` where there is no Chromium.
///
/// # Panics
/// In CI, when there is none.
pub fn page(folder: &Path, url: &str) -> Option<String> {
    let program = find("chromium", "install Debian's chromium")?;
    let profile = folder.join(format!("chromium-{}", std::process::id()));
    let output = Command::new(program)
        .args(CHROMIUM)
        .arg(format!("--user-data-dir={}", profile.display()))
        .args(["--window-size=1280,2000", "--virtual-time-budget=20000", "--dump-dom", url])
        .stdin(Stdio::null())
        .output()
        .expect("Chromium starts");
    let _ = std::fs::remove_dir_all(profile);
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

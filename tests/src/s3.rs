//! A real S3 server on loopback, for the tests that want a bucket.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use crate::server::{End, Server};
use crate::{free_port, wait_until};

/// The bucket that there is from the start.
const BUCKET: &str = "anello";

/// moto's server under way, with an empty bucket. It ends when it is dropped or this process ends, and keeps nothing.
#[derive(Debug)]
pub struct S3 {
    _server: Server,
    port: u16,
}

impl S3 {
    /// Starts it; what it logs goes to `logs`.
    ///
    /// # Panics
    /// When it is not installed: `scripts/s3-venv` does that.
    pub fn start(logs: &Path) -> Self {
        let server = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv-s3/bin/moto_server");
        assert!(server.exists(), "{} is missing; run scripts/s3-venv", server.display());
        std::fs::create_dir_all(logs).expect("the test's folder can be written");
        let port = free_port();
        let arguments = ["-H", "127.0.0.1", "-p", &port.to_string()];
        let log = logs.join(format!("s3-{port}.log"));
        let _server = Server::start(&server, &arguments, &log, End::Politely);
        let s3 = Self { _server, port };
        wait_until("the S3 server listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        let made = s3.request("PUT", &format!("/{BUCKET}"));
        assert!(made.starts_with("HTTP/1.1 200"), "the bucket cannot be made: {made}");
        s3
    }

    /// The URL of `path` in the bucket.
    pub fn url(&self, path: &str) -> String {
        format!("s3://{BUCKET}/{path}")
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What a process needs to reach it.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        self.variables_by(self.port)
    }

    /// The same by way of another port.
    pub fn variables_by(&self, port: u16) -> Vec<(&'static str, String)> {
        let text = |text: &str| text.to_owned();
        vec![
            ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
            ("AWS_ACCESS_KEY_ID", text("tests")),
            ("AWS_SECRET_ACCESS_KEY", text("tests")),
            ("AWS_REGION", text("us-east-1")),
        ]
    }

    /// Keys of the objects below `prefix`, at most a thousand.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let listed = self.request("GET", &format!("/{BUCKET}?list-type=2&prefix={prefix}"));
        let keys = listed.split("<Key>").skip(1).filter_map(|rest| rest.split_once("</Key>"));
        keys.map(|(key, _)| key.to_owned()).collect()
    }

    /// The step of the newest checkpoint of the run at `path`, 0 when there is none.
    pub fn newest_checkpoint(&self, path: &str) -> u64 {
        let prefix = format!("{path}/checkpoints/");
        let step =
            |key: &String| key.strip_prefix(&prefix)?.strip_suffix("/manifest.json")?.parse::<u64>().ok();
        self.keys(&prefix).iter().filter_map(step).max().unwrap_or(0)
    }

    /// What the object at `key` holds, after the head of the answer; what is no text in it is replaced.
    pub fn object(&self, key: &str) -> String {
        self.request("GET", &format!("/{BUCKET}/{key}"))
    }

    /// The bytes of the object at `key`.
    ///
    /// # Panics
    /// When there is none.
    pub fn bytes(&self, key: &str) -> Vec<u8> {
        let answer = self.answer("GET", &format!("/{BUCKET}/{key}"));
        assert!(answer.starts_with(b"HTTP/1.1 200"), "there is no {key}");
        let body = answer.windows(4).position(|four| four == b"\r\n\r\n").map_or(0, |at| at + 4);
        answer[body..].to_vec()
    }

    /// The answer to a request without a body, head included.
    fn request(&self, method: &str, path: &str) -> String {
        String::from_utf8_lossy(&self.answer(method, path)).into_owned()
    }

    fn answer(&self, method: &str, path: &str) -> Vec<u8> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("the S3 server listens");
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).expect("the S3 server reads");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("the S3 server answers");
        answer
    }
}

//! A bad network and an overloaded server, between a process and an S3 server on loopback.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::Dice;

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is passed on, and so is the answer.
    Done,
    /// Nothing is done; the answer is this status.
    Status(u16),
    /// Half of its body comes to the server, and the connections are closed.
    Cut,
    /// It is done, and the connection is closed without an answer.
    AnswerLost,
    /// It is done, and the answer ends in the middle of its body.
    Short,
    /// It is done, and the answer comes bit by bit.
    Slow,
    /// It is done, and the answer never comes, nor is the connection closed.
    Silence,
}

/// A request that was passed on and answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Its method; `DELETE` also for one that has what is to be deleted in its body.
    pub method: String,
    /// The objects that it is about, each with the bucket's name first.
    pub paths: Vec<String>,
    /// Whether it asks for an object that is not there yet.
    pub if_absent: bool,
    /// Its body, when it is text.
    pub body: String,
    /// When it came and when it was answered, in ticks of one counter.
    pub ticks: [u64; 2],
}

/// Longest body of a request: an upload's piece.
const BODY_MAX: usize = 64 << 20;

/// The server under way, until it is dropped.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    upstream: u16,
    stopped: AtomicBool,
    /// Of a hundred requests so many come to harm.
    percent: AtomicU64,
    /// Those alone that have this in their first line.
    only: Mutex<String>,
    dice: Mutex<Dice>,
    fates: Vec<Fate>,
    /// Requests that came to each kind of harm, in the order of `fates`.
    harmed: Vec<AtomicU64>,
    /// Heads of the requests that write an object.
    writes: Mutex<Vec<String>>,
    /// Requests, in the order of their answers.
    asked: Mutex<Vec<Asked>>,
    ticks: AtomicU64,
    /// Held while the server is asked to create an object: moto looks first and writes afterwards.
    creating: Mutex<()>,
}

impl Proxy {
    /// In front of the server at `upstream`: of a hundred requests `percent` come to one of `fates`, by the dice of `seed`.
    pub fn start(upstream: u16, percent: u64, fates: &[Fate], seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("a bound port").port();
        let shared = Arc::new(Shared {
            upstream,
            stopped: AtomicBool::new(false),
            percent: AtomicU64::new(percent),
            only: Mutex::default(),
            dice: Mutex::new(Dice(seed)),
            fates: fates.to_vec(),
            harmed: fates.iter().map(|_| AtomicU64::new(0)).collect(),
            writes: Mutex::default(),
            asked: Mutex::default(),
            ticks: AtomicU64::new(0),
            creating: Mutex::default(),
        });
        let of_thread = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if of_thread.stopped.load(Ordering::Relaxed) {
                    return;
                }
                let shared = of_thread.clone();
                std::thread::spawn(move || {
                    // A client that has gone away is no concern of the proxy's.
                    let _ = shared.serve(client);
                });
            }
        });
        Self { port, shared }
    }

    /// From now on so many of a hundred requests come to harm.
    pub fn harm(&self, percent: u64) {
        self.shared.percent.store(percent, Ordering::Relaxed);
    }

    /// From now on no requests come to harm but those that have `words` in their first line.
    pub fn harm_only(&self, words: &str) {
        words.clone_into(&mut self.shared.only.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
    }

    /// Heads of the requests so far that write an object or a piece of one.
    pub fn writes(&self) -> Vec<String> {
        self.shared.writes.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// The requests so far that the server has answered, in the order of their answers.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How many requests came to each fate that it has.
    pub fn harmed(&self) -> Vec<(Fate, u64)> {
        let counts = self.shared.harmed.iter().map(|count| count.load(Ordering::Relaxed));
        self.shared.fates.iter().copied().zip(counts).collect()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        // Wakes the thread that listens.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Shared {
    fn fate(&self, request: &[u8]) -> Fate {
        let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
        let only = self.only.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if !String::from_utf8_lossy(line).contains(only.as_str()) {
            return Fate::Done;
        }
        let mut dice = self.dice.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if dice.below(100) >= self.percent.load(Ordering::Relaxed) {
            return Fate::Done;
        }
        let kind = dice.below(self.fates.len() as u64) as usize;
        self.harmed[kind].fetch_add(1, Ordering::Relaxed);
        self.fates[kind]
    }

    /// One request of a connection, which is closed after it.
    fn serve(&self, mut client: TcpStream) -> std::io::Result<()> {
        let Some(request) = read_request(&mut client)? else { return Ok(()) };
        if request.starts_with(b"PUT ") {
            let end = request.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or(request.len());
            let head = String::from_utf8_lossy(&request[..end]).into_owned();
            self.writes.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(head);
        }
        let fate = self.fate(&request);
        if let Fate::Status(status) = fate {
            let body = "<Error><Code>SlowDown</Code></Error>";
            let head = format!(
                "HTTP/1.1 {status} Harm\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            client.write_all(format!("{head}{body}").as_bytes())?;
            return client.shutdown(Shutdown::Write);
        }
        if fate == Fate::Cut {
            let head = request.windows(4).position(|four| four == b"\r\n\r\n").map_or(0, |at| at + 4);
            let mut server = TcpStream::connect(("127.0.0.1", self.upstream))?;
            return server.write_all(&request[..head + (request.len() - head) / 2]);
        }
        let came = self.ticks.fetch_add(1, Ordering::Relaxed);
        let about = about(&request);
        let creates = about.as_ref().is_some_and(|about| about.if_absent);
        let one_at_a_time =
            creates.then(|| self.creating.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        let answer = self.ask(&request)?;
        drop(one_at_a_time);
        if let Some(mut about) = about {
            let mut asked = self.asked.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            about.ticks = [came, self.ticks.fetch_add(1, Ordering::Relaxed)];
            asked.push(about);
        }
        let body = answer.windows(4).position(|four| four == b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
        match fate {
            Fate::Done => client.write_all(&answer)?,
            Fate::AnswerLost | Fate::Status(_) | Fate::Cut => {}
            Fate::Short => client.write_all(&answer[..body + (answer.len() - body) / 2])?,
            Fate::Slow => {
                for some in answer.chunks(answer.len().div_ceil(8).max(1)) {
                    client.write_all(some)?;
                    client.flush()?;
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            Fate::Silence => {
                // Until the client has had enough and closes its side.
                let mut rest = [0; 64];
                while client.read(&mut rest)? > 0 {
                    // What it still says is not heard.
                }
            }
        }
        client.shutdown(Shutdown::Write)
    }

    /// The server's answer to a request, all of it.
    fn ask(&self, request: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut server = TcpStream::connect(("127.0.0.1", self.upstream))?;
        server.write_all(request)?;
        let mut answer = Vec::new();
        server.read_to_end(&mut answer)?;
        Ok(answer)
    }
}

/// What a request is about; `None` for one that asks for a listing.
fn about(request: &[u8]) -> Option<Asked> {
    let end = request.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&request[..end]);
    let body = std::str::from_utf8(&request[end + 4..]).unwrap_or_default().to_owned();
    let mut words = head.split(' ');
    let (method, target) = (words.next()?, words.next()?);
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let path = path.trim_matches('/');
    let (method, paths) = if method == "POST" && query.starts_with("delete") {
        let keys = body.split("<Key>").skip(1).filter_map(|rest| rest.split_once("</Key>"));
        ("DELETE", keys.map(|(key, _)| format!("{path}/{key}")).collect())
    } else if path.contains('/') {
        (method, vec![path.to_owned()])
    } else {
        return None;
    };
    let if_absent = head.to_ascii_lowercase().contains("\r\nif-none-match: *");
    Some(Asked { method: method.to_owned(), paths, if_absent, body, ticks: [0, 0] })
}

/// A request with its body, made to ask for one answer on its connection; `None` when the client sent none.
fn read_request(client: &mut TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    let mut some = [0; 16 << 10];
    let head_end = loop {
        if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break at;
        }
        match client.read(&mut some)? {
            0 => return Ok(None),
            read => bytes.extend_from_slice(&some[..read]),
        }
    };
    let head = String::from_utf8_lossy(&bytes[..head_end]).into_owned();
    let value_of = |line: &str, name: &str| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
    };
    let length = head.lines().find_map(|line| value_of(line, "content-length"));
    let length: usize = length.and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = bytes.split_off(head_end + 4);
    let rest = length.min(BODY_MAX).saturating_sub(body.len());
    let had = body.len();
    body.resize(had + rest, 0);
    client.read_exact(&mut body[had..])?;
    let kept: Vec<&str> = head.lines().filter(|line| value_of(line, "connection").is_none()).collect();
    let mut request = format!("{}\r\nConnection: close\r\n\r\n", kept.join("\r\n")).into_bytes();
    request.extend(body);
    Ok(Some(request))
}

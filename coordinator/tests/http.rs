//! The HTTP face over real sockets: what it answers, whom, and what it bears.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anello_configs::RunConfig;
use anello_coordinator::Rates;
use anello_coordinator::http::{Bound, Keeper, Limits, Server, Site, Tokens, description};
use anello_coordinator::telemetry::Board;
use anello_proto::jobs::Phase;
use anello_store::events::{Event, EventLog};
use anello_store::metrics::{self, Seconds, StepRecord};
use anello_store::{CONFIG, Notice, Store};
use anello_tls::{Files, Protection, Protocol, Role as TlsRole, Tls, authority};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const VIEWER: &str = "viewer-secret-0123456789";
const OPERATOR: &str = "operator-secret-0123456789";

/// A server over one run in a folder.
struct Here {
    _runtime: tokio::runtime::Runtime,
    _server: Server,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

fn config() -> RunConfig {
    let text = "name = \"small\"\nseed = 1\nlanes = 4\nstages = [\"stable\"]\ndata.sources.docs.url = \"docs\"\n\
                [model]\nlayers = 2\nhidden = 128\nheads = 4\nffn = 352\nvocab = 2048\n\
                [stage.stable]\ntokens = \"3Mi\"\nsequence = 128\nbatch = \"8Ki\"\nmicro_batch = 16\nlr_curve = \"constant\"\n\
                lr = 3e-3\nloops = 4\nbeta = 0.1\nrope_base = 10_000\nmixture = { docs = 1.0 }\n";
    RunConfig::parse("small.toml", text).unwrap()
}

fn row(step: u64) -> StepRecord {
    StepRecord {
        step,
        stage: "stable".into(),
        tokens: 8192 * (step + 1),
        batch_tokens: 8192,
        counted: 8192,
        lr: 3e-3,
        loss: if step == 7 { f64::NAN } else { 5.0 - step as f64 / 100.0 },
        loop_loss: vec![5.0, 4.9, 4.8, 4.7],
        exit: vec![0.25; 4],
        entropy: 1.38,
        grad_norm: 0.5,
        applied: step != 7,
        weights: None,
        evals: Vec::new(),
        seconds: Seconds {
            step: 0.5,
            data: 0.1,
            compute: 0.3,
            forward: 0.1,
            reduce: 0.05,
            update: 0.05,
            checkpoint: 0.0,
            eval: 0.0,
        },
    }
}

impl Here {
    fn start(tokens: bool, limits: Limits) -> Self {
        Self::serve(tokens, limits, Protection::Loopback)
    }

    fn serve(tokens: bool, limits: Limits, protection: Protection) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::durable(folder.path().join("run").to_str().unwrap()).unwrap();
        let (config, board) = (config(), Board::new(Some(1e12)));
        assert!(store.create(CONFIG, config.to_toml()).unwrap());
        metrics::write(&store, &(0..20).map(row).collect::<Vec<_>>()).unwrap();
        let mut log = EventLog::open(&store).unwrap();
        let taken = log.append(Event::TakenUp { step: None }).unwrap();
        let stage = log.append(Event::Stage { step: 0, stage: "<b>stable</b>".into() }).unwrap();
        board.take_up("small", &config, &store, &[taken, stage]).unwrap();
        board.set_phase("small", Phase::Running, 2);
        // What was not written yet is shown too.
        (20..30).for_each(|step| board.observe("small", &Notice::Step(row(step))));
        let tokens = tokens.then(|| {
            let file = folder.path().join("tokens");
            std::fs::write(&file, format!("viewer prometheus {VIEWER}\noperator ann {OPERATOR}\n")).unwrap();
            std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
            Tokens::read(&file).unwrap()
        });
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let site = Site::whole(board, Keeper::Board, tokens).unwrap();
        let server = runtime.block_on(async {
            Bound::bind(([127, 0, 0, 1], 0).into(), protection, limits).await.unwrap().serve(site)
        });
        Self { address: server.address, _server: server, _runtime: runtime, _folder: folder }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Status and everything after the head.
    fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String) {
        let mut stream = self.connect();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        let _ = stream.write_all(body.as_bytes());
        answer(&mut stream)
    }

    fn get(&self, path: &str) -> (u16, String) {
        self.ask("GET", path, "", "")
    }

    fn json(&self, path: &str) -> Value {
        let (status, body) = self.get(path);
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap_or_else(|cause| panic!("{path}: {cause}: {body}"))
    }
}

fn answer(stream: &mut TcpStream) -> (u16, String) {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    // Answers of a known length come as they are; those of an unknown one are not asked for here.
    assert!(!head.to_ascii_lowercase().contains("transfer-encoding"), "{head}");
    (status, body.to_owned())
}

fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}\r\n")
}

#[test]
fn what_is_known_of_a_job_is_told_as_it_is_described() {
    let here = Here::start(false, Limits::default());
    let jobs = here.json("/api/v1/jobs");
    assert_eq!((&jobs["jobs"][0]["name"], &jobs["role"]), (&"small".into(), &"viewer".into()));
    assert_eq!((&jobs["jobs"][0]["step"], &jobs["jobs"][0]["phase"]), (&30.into(), &"running".into()));
    let figures = here.json("/api/v1/jobs/small/metrics?points=100");
    assert_eq!((&figures["rows"], &figures["stride"]), (&30.into(), &1.into()));
    assert_eq!(figures["step"], Value::from((0..30).collect::<Vec<u64>>()));
    assert_eq!(
        (&figures["figures"]["loss"]["mean"][7], &figures["skipped"]),
        (&Value::Null, &serde_json::json!([[7, 65536]]))
    );
    let part = here.json("/api/v1/jobs/small/metrics?from=10&to=20&points=2");
    assert_eq!((&part["rows"], &part["step"]), (&10.into(), &serde_json::json!([14, 19])));
    let events = here.json("/api/v1/jobs/small/events");
    assert_eq!((&events["next"], &events["events"][1]["kind"]), (&2.into(), &"stage".into()));
    assert_eq!(here.json("/api/v1/jobs/small/events?after=1")["events"].as_array().unwrap().len(), 1);
    let config = here.json("/api/v1/jobs/small/config");
    assert!(config["toml"].as_str().unwrap().contains("[optimizer]") && config["stages"][0]["loops"] == 4);
    assert_eq!(here.json("/healthz")["status"], "ok");
    assert_eq!(here.json("/readyz")["status"], "ok");
    for (path, status, says) in [
        ("/api/v1/jobs/none", 404, "there is no job none; there are: small"),
        ("/api/v1/jobs/none/metrics", 404, "there is no job none"),
        ("/api/v1/jobs/..%2f..%2fetc/config", 400, "no name of a job"),
        ("/api/v1/jobs/small/metrics?points=0", 400, "1 to 4000 points"),
        ("/api/v1/jobs/small/metrics?points=many", 400, "invalid digit"),
        ("/api/v1/jobs/small/metrics?form=3", 400, "form"),
        ("/api/v1/jobs/small/events?limit=100000", 400, "1 to 1000 records"),
        ("/nothing", 404, "there is nothing here"),
    ] {
        let (got, body) = here.get(path);
        assert!(got == status && body.contains(says), "{path}: {got} {body}");
    }

    // The description has every field that is answered with, and no other.
    let described = serde_json::to_value(description()).unwrap();
    assert_eq!(here.json("/api/v1/openapi.json"), described);
    for (path, like) in [
        ("/api/v1/jobs", "/api/v1/jobs"),
        ("/api/v1/jobs/{name}", "/api/v1/jobs/small"),
        ("/api/v1/jobs/{name}/metrics", "/api/v1/jobs/small/metrics"),
        ("/api/v1/jobs/{name}/events", "/api/v1/jobs/small/events"),
        ("/api/v1/jobs/{name}/config", "/api/v1/jobs/small/config"),
        ("/healthz", "/healthz"),
    ] {
        let schema =
            &described["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"];
        let name =
            schema["$ref"].as_str().unwrap_or_else(|| panic!("{path}: {schema}")).rsplit('/').next().unwrap();
        let properties = described["components"]["schemas"][name]["properties"].as_object().unwrap();
        let told = here.json(like);
        let keys = |object: &serde_json::Map<String, Value>| object.keys().cloned().collect::<Vec<_>>();
        let sorted = |mut keys: Vec<String>| {
            keys.sort();
            keys
        };
        assert_eq!(sorted(keys(told.as_object().unwrap())), sorted(keys(properties)), "{path}");
    }
    assert!(described["paths"].get("/api/v1/jobs/{name}/{action}").is_some());
}

#[test]
fn the_page_needs_nothing_from_elsewhere_and_its_texts_are_texts() {
    let here = Here::start(false, Limits::default());
    for path in ["/", "/app.css", "/app.js", "/charts.js"] {
        let (status, text) = here.get(path);
        assert!(status == 200 && !text.is_empty(), "{path}");
        for outside in ["http://", "https://", "@import", "url(", "innerHTML", "eval("] {
            let text = text.replace("http://www.w3.org/2000/svg", "").replace("url(#clip", "");
            assert!(!text.contains(outside), "{path}: {outside}");
        }
    }
    let mut stream = here.connect();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut head = String::new();
    stream.read_to_string(&mut head).unwrap();
    for policy in
        ["content-security-policy: default-src 'none'; script-src 'self'", "x-content-type-options: nosniff"]
    {
        assert!(head.contains(policy), "{head}");
    }
}

#[test]
fn without_tokens_it_only_reads_and_with_them_a_role_may_what_it_may() {
    let here = Here::start(false, Limits::default());
    let (status, body) = here.ask("POST", "/api/v1/jobs/small/pause", "", "");
    assert!(status == 403 && body.contains("--token FILE"), "{status} {body}");
    // A page of another site that found a name for this address.
    let mut stream = here.connect();
    stream
        .write_all(b"GET /api/v1/jobs HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        .unwrap();
    assert_eq!(answer(&mut stream).0, 403);

    let here = Here::start(true, Limits::default());
    for path in ["/metrics", "/api/v1/jobs", "/api/v1/jobs/small", "/api/v1/jobs/small/stream"] {
        assert_eq!(here.get(path).0, 401, "{path}");
        assert_eq!(here.ask("GET", path, &bearer("viewer-secret-012345678"), "").0, 401, "{path}");
    }
    for path in ["/", "/app.js", "/healthz"] {
        assert_eq!(here.get(path).0, 200, "{path}");
    }
    assert_eq!(here.ask("GET", "/metrics", &bearer(VIEWER), "").0, 200);
    let act = |token: &str, path: &str, body: &str| here.ask("POST", path, &bearer(token), body);
    assert_eq!(act(VIEWER, "/api/v1/jobs/small/pause", "").0, 403);
    let (status, body) = act(OPERATOR, "/api/v1/jobs/small/pause", "");
    assert!(status == 400 && body.contains("no coordinator's job"), "{status} {body}");
    let (status, body) = act(OPERATOR, "/api/v1/jobs/small/scale", "{\"workers\": 0}");
    assert!(status == 400 && body.contains("1 to 4096 workers"), "{status} {body}");
    let (status, body) = act(OPERATOR, "/api/v1/jobs/small/scale", "workers=3");
    assert!(status == 400 && body.contains("give {"), "{status} {body}");
    assert_eq!(act(OPERATOR, "/api/v1/jobs/small/explode", "").0, 404);
    // No token is in anything that is told.
    for path in
        ["/", "/app.js", "/metrics", "/api/v1/jobs", "/api/v1/jobs/small/config", "/api/v1/jobs/small/events"]
    {
        let (status, text) = here.ask("GET", path, &bearer(OPERATOR), "");
        assert!(status == 200 && !text.contains("secret"), "{path}");
    }
}

#[test]
fn changes_are_streamed() {
    let here = Here::start(false, Limits { streams: 1, ..Limits::default() });
    let mut stream = here.connect();
    stream.write_all(b"GET /api/v1/jobs/small/stream HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut text = String::new();
    let mut piece = [0; 4096];
    while !text.contains("event: job\n") {
        let length = stream.read(&mut piece).unwrap();
        assert!(length > 0, "{text}");
        text += &String::from_utf8_lossy(&piece[..length]);
    }
    assert!(
        text.contains("content-type: text/event-stream") && text.contains("\"name\":\"small\""),
        "{text}"
    );
    // There is one place, and it is free again when its reader goes.
    assert_eq!(here.get("/api/v1/jobs/small/stream").0, 503);
    drop(stream);
    let began = Instant::now();
    loop {
        let mut stream = here.connect();
        stream.write_all(b"GET /api/v1/jobs/small/stream HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let length = stream.read(&mut piece).unwrap();
        if piece[..length].starts_with(b"HTTP/1.1 200") {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "the place is never free");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Whether the other end closes the connection, in a minute at most.
fn is_closed(stream: &mut TcpStream) -> bool {
    let mut piece = [0; 4096];
    loop {
        match stream.read(&mut piece) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(cause) => return cause.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

#[test]
fn who_is_slow_or_asks_for_too_much_is_shown_the_door() {
    let limits = Limits {
        head: Duration::from_millis(500),
        body: Duration::from_millis(500),
        body_bytes: 1000,
        ..Limits::default()
    };
    let here = Here::start(true, limits);
    // Nothing; a part of a head; one that grows letter by letter.
    let mut silent = here.connect();
    let mut half = here.connect();
    half.write_all(b"GET / HTTP/1.1\r\nHost: local").unwrap();
    let mut trickle = here.connect();
    trickle.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let began = Instant::now();
    loop {
        let sent = trickle.write_all(b"X");
        let mut piece = [0; 512];
        let closed = matches!(trickle.read(&mut piece), Ok(0));
        if sent.is_err() || closed {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "a head may trickle for ever");
    }
    assert!(is_closed(&mut silent) && is_closed(&mut half));
    // A head, and a body, that are too large; a body that does not come.
    let (status, _) = here.ask("GET", "/", &format!("X-Large: {}\r\n", "x".repeat(64 << 10)), "");
    assert!(matches!(status, 0 | 431), "{status}");
    let (status, body) = here.ask("POST", "/api/v1/jobs/small/scale", &bearer(OPERATOR), &"x".repeat(5000));
    assert!(status == 413 && body.contains("1000 bytes"), "{status} {body}");
    let mut late = here.connect();
    let head = format!(
        "POST /api/v1/jobs/small/scale HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nConnection: close\r\n{}\r\n",
        bearer(OPERATOR)
    );
    late.write_all(head.as_bytes()).unwrap();
    assert_eq!(answer(&mut late).0, 408);
    // What is no HTTP at all.
    let mut stream = here.connect();
    stream.write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n").unwrap();
    assert!(is_closed(&mut stream));
    assert_eq!(here.get("/healthz").0, 200, "all others are served as before");
}

#[test]
fn who_asks_too_often_is_told_when_to_come_again() {
    let number = |n| std::num::NonZeroU32::new(n).unwrap();
    let ask = |here: &Here, method: &str, headers: &str| {
        let mut stream = here.connect();
        let head = format!(
            "{method} /api/v1/jobs/small HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n{headers}\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    };
    let refused = |here: &Here, method: &str, headers: &str| {
        // As many as may come at once are answered; then one comes too soon.
        (0..10_000)
            .map(|at| (at, ask(here, method, headers)))
            .find(|(_, text)| text.starts_with("HTTP/1.1 429"))
            .expect("one is refused")
    };
    let rates = Rates { requests: number(2), changes: number(1) };
    let here = Here::start(false, Limits { rates, ..Limits::default() });
    let (answered, text) = refused(&here, "GET", "");
    assert!(answered >= 10, "{answered}");
    assert!(text.to_ascii_lowercase().contains("retry-after: 1\r\n"), "{text}");
    assert!(text.contains("127.0.0.1 asks too often: this server answers 2 requests a second"), "{text}");
    // Who looks whether the process lives is answered all the same.
    assert!((0..30).all(|_| here.get("/healthz").0 == 200));

    // Guesses of a token are counted, whatever comes of them; and who may act is counted apart from who reads.
    let rates = Rates { requests: number(1000), changes: number(1) };
    let here = Here::start(true, Limits { rates, ..Limits::default() });
    let (answered, text) = refused(&here, "POST", &bearer("nobodys-0123456789abcdef"));
    assert!(answered >= 5 && text.contains("1 requests that change something a second"), "{text}");
    assert_eq!(here.ask("GET", "/api/v1/jobs", &bearer(VIEWER), "").0, 200);
}

#[test]
fn more_connections_than_there_are_places_are_told_so() {
    let here =
        Here::start(false, Limits { connections: 4, head: Duration::from_secs(60), ..Limits::default() });
    let held: Vec<TcpStream> = (0..4)
        .map(|_| {
            let mut stream = here.connect();
            stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
            // It has its place when it is answered, and keeps it.
            let mut piece = [0; 64];
            assert!(stream.read(&mut piece).unwrap() > 0);
            stream
        })
        .collect();
    assert_eq!(answer(&mut here.connect()).0, 503);
    drop(held);
    let began = Instant::now();
    while here.get("/healthz").0 != 200 {
        assert!(began.elapsed() < Duration::from_secs(60), "places are never free again");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn who_reads_nothing_does_not_stay() {
    let limits = Limits {
        connections: 1,
        stall: Duration::from_millis(500),
        head: Duration::from_secs(60),
        ..Limits::default()
    };
    let here = Here::start(false, limits);
    let mut greedy = here.connect();
    // Answers far beyond what the kernel's buffers hold, none of which is read.
    let ask = "GET /charts.js HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(1000);
    greedy.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let _ = greedy.write_all(ask.as_bytes());
    let began = Instant::now();
    while here.get("/healthz").0 != 200 {
        assert!(began.elapsed() < Duration::from_secs(60), "it holds the only place");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn where_others_reach_it_there_is_tls_or_nothing() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let anywhere = ([0, 0, 0, 0], 0).into();
    let bound = runtime.block_on(Bound::bind(anywhere, Protection::Loopback, Limits::default()));
    let told = bound.map(|_| ()).unwrap_err().to_string();
    assert!(told.contains("is not a loopback address") && told.contains("--tls"), "{told}");
    assert!(runtime.block_on(Bound::bind(anywhere, Protection::Insecure, Limits::default())).is_ok());
}

/// The status over TLS, as one with these certificates is answered; 0: it is not let in.
fn over_tls(here: &Here, client: &Tls, headers: &str) -> u16 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let ask = async {
            let stream = tokio::net::TcpStream::connect(here.address).await?;
            let connector = tokio_rustls::TlsConnector::from(client.client(Protocol::Http));
            let mut stream = connector.connect(TlsRole::Coordinator.server_name(), stream).await?;
            let head =
                format!("GET /api/v1/jobs HTTP/1.1\r\nHost: any.where\r\nConnection: close\r\n{headers}\r\n");
            stream.write_all(head.as_bytes()).await?;
            let mut first = [0; 12];
            stream.read_exact(&mut first).await?;
            Ok::<u16, std::io::Error>(String::from_utf8_lossy(&first[9..]).parse().unwrap_or(0))
        };
        ask.await.unwrap_or(0)
    })
}

#[test]
fn over_tls_a_certificate_or_a_token_says_who_it_is() {
    let (ours, others) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    authority::init(ours.path(), 30, false).unwrap();
    authority::init(others.path(), 30, false).unwrap();
    let load = |dir: &Path, role| Tls::load(Files::in_dir(dir, role), role).unwrap();
    let protection = || Protection::Tls(load(ours.path(), TlsRole::Coordinator));
    let user = load(ours.path(), TlsRole::User);
    let here = Here::serve(false, Limits::default(), protection());
    assert_eq!(over_tls(&here, &user, ""), 200);
    assert_eq!(over_tls(&here, &load(ours.path(), TlsRole::Worker), ""), 200);
    assert_eq!(over_tls(&here, &load(ours.path(), TlsRole::Coordinator), ""), 0, "it is no user's");
    assert_eq!(over_tls(&here, &load(others.path(), TlsRole::User), ""), 0, "it is of another CA");
    // Without TLS nothing is said.
    assert_eq!(here.get("/healthz").0, 0);

    let here = Here::serve(true, Limits::default(), protection());
    assert_eq!(over_tls(&here, &user, ""), 401);
    assert_eq!(over_tls(&here, &user, &bearer(VIEWER)), 200);
}

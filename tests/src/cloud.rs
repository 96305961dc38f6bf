//! Servers on loopback that speak as other clouds' object stores do: Google's and Azure's.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::server::{End, Server};
use crate::{Process, free_port, wait_until};

/// The bucket, or container, that there is from the start.
const BUCKET: &str = "anello";
/// The account that Azurite knows, and its key, which its manual names.
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// Makes the container: a request that is signed with the key (arguments: port, account, key, container).
const MAKE_CONTAINER: &str = r#"
const [port, account, key, container] = process.argv.slice(1);
const date = new Date().toUTCString(), version = "2021-08-06";
const path = `/${account}/${container}`;
const signed = `PUT${"\n".repeat(12)}x-ms-date:${date}\nx-ms-version:${version}\n/${account}${path}\nrestype:container`;
const hmac = require("crypto").createHmac("sha256", Buffer.from(key, "base64")).update(signed, "utf8").digest("base64");
const headers = { "x-ms-date": date, "x-ms-version": version, "content-length": 0, authorization: `SharedKey ${account}:${hmac}` };
const options = { host: "127.0.0.1", port, path: `${path}?restype=container`, method: "PUT", headers };
const request = require("http").request(options, (answer) => {
  answer.pipe(process.stderr);
  process.exitCode = answer.statusCode === 201 ? 0 : 1;
});
request.end();
"#;

/// Which server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `gs://`: fsouza/fake-gcs-server, with the writes of the XML API (tests/gcs).
    Google,
    /// The same, made careless: a put-if-absent is a look, and then a write.
    GoogleLookingFirst,
    /// `az://`: Azurite.
    Azure,
}

/// A server under way, with an empty bucket. It ends when it is dropped or this process ends, and keeps nothing.
#[derive(Debug)]
pub struct Cloud {
    _server: Server,
    kind: Kind,
    port: u16,
}

impl Cloud {
    /// Starts it; what it logs goes to `logs`.
    ///
    /// # Panics
    /// When it is not installed: `scripts/bucket-servers` does that, with Node and Go.
    pub fn start(kind: Kind, logs: &Path) -> Self {
        std::fs::create_dir_all(logs).expect("the test's folder can be written");
        let port = free_port();
        let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.test-tools");
        let installed = |program: PathBuf, needs: &str| {
            let there = program.exists();
            assert!(
                there,
                "{} is missing; install {needs} and run scripts/bucket-servers",
                program.display()
            );
            program
        };
        let (program, arguments) = match kind {
            Kind::Google | Kind::GoogleLookingFirst => {
                let careless = (kind == Kind::GoogleLookingFirst).then(|| "-look-first".to_owned());
                let arguments =
                    ["-address".to_owned(), format!("127.0.0.1:{port}")].into_iter().chain(careless);
                (installed(tools.join("gcs"), "Go"), arguments.collect::<Vec<_>>())
            }
            Kind::Azure => {
                let port = port.to_string();
                let arguments =
                    ["--blobHost", "127.0.0.1", "--blobPort", &port, "--inMemoryPersistence", "--silent"];
                let arguments = [&arguments[..], &["--disableTelemetry", "--skipApiVersionCheck"]].concat();
                let program = tools.join("azurite/node_modules/.bin/azurite-blob");
                (installed(program, "Node with npm"), arguments.into_iter().map(str::to_owned).collect())
            }
        };
        let log = logs.join(format!("cloud-{port}.log"));
        let _server = Server::start(&program, &arguments, &log, End::Politely);
        let cloud = Self { _server, kind, port };
        wait_until("the server listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        if kind == Kind::Azure {
            let made = Command::new("node")
                .args(["-e", MAKE_CONTAINER, &port.to_string(), ACCOUNT, KEY, BUCKET])
                .output();
            let made = made.expect("there is Node");
            assert!(made.status.success(), "no container: {}", String::from_utf8_lossy(&made.stderr));
        }
        cloud
    }

    /// The URL of `path` in the bucket.
    pub fn url(&self, path: &str) -> String {
        let scheme = if self.kind == Kind::Azure { "az" } else { "gs" };
        format!("{scheme}://{BUCKET}/{path}")
    }

    /// What a process needs to reach it.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let server = format!("http://127.0.0.1:{}", self.port);
        match self.kind {
            Kind::Azure => vec![
                ("AZURE_STORAGE_USE_EMULATOR", "true".to_owned()),
                ("AZURITE_BLOB_STORAGE_URL", server),
                ("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT.to_owned()),
                ("AZURE_STORAGE_ACCOUNT_KEY", KEY.to_owned()),
            ],
            Kind::Google | Kind::GoogleLookingFirst => {
                vec![("GOOGLE_BASE_URL", server), ("GOOGLE_BEARER_TOKEN", "tests".to_owned())]
            }
        }
    }

    /// The step of the newest checkpoint of the run at `path`, 0 when there is none.
    pub fn newest_checkpoint(&self, folder: &Path, path: &str) -> u64 {
        let list = ["checkpoint", "list", &self.url(path)];
        let listed = Process::start_with(folder, &list, &self.variables()).wait();
        let step = |line: &str| line.split("  ").find(|word| !word.is_empty())?.trim().parse::<u64>().ok();
        listed.out.lines().filter_map(step).max().unwrap_or(0)
    }
}

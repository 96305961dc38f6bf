//! `anello certs`: a private CA and its certificates; and how other commands are given them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anello_tls::authority::{self, CA_DAYS, Validity};
use anello_tls::{Error, Files, Protection, Role, Shown, Tls};

use crate::failure::{Exit, Failure, Outcome};
use crate::screen::Screen;
use crate::text::Table;

/// The variable that names the folder of certificates.
const DIR: &str = "ANELLO_TLS_DIR";

/// Subcommands of `anello certs`.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make a private CA, and a certificate of each role.
    Init {
        #[command(flatten)]
        place: Place,
    },
    /// Make a key and a certificate of one role, with the CA that is there.
    Issue {
        /// coordinator, worker or user.
        role: Role,
        #[command(flatten)]
        place: Place,
    },
    /// Say what a certificate is for, and until when.
    Show {
        /// The certificate, or a folder of them.
        #[arg(default_value = "certs")]
        path: PathBuf,
    },
}

/// Where, and for how long.
#[derive(Debug, clap::Args)]
pub struct Place {
    /// The folder.
    #[arg(long, value_name = "DIR", default_value = "certs")]
    dir: PathBuf,
    /// Days that certificates of roles are valid. The CA is for ten years.
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=i64::from(CA_DAYS)))]
    days: u32,
    /// Replace files that are there.
    #[arg(long)]
    force: bool,
}

/// `anello certs`
pub fn run(command: &Command, screen: &Screen) -> Outcome {
    match command {
        Command::Init { place: Place { dir, days, force } } => {
            authority::init(dir, *days, *force)?;
            let [ca, _] = authority::ca_files(dir);
            let mut text = format!("a private CA in {}, until {}\n", dir.display(), Shown::read(&ca)?.until);
            let mut table = Table::new(2);
            table.row(["  ca.pem", "for all: who shows a certificate of this CA is believed"]);
            table.row(["  ca.key", "for you alone: makes certificates; keep it off the machines that train"]);
            for role in Role::ALL {
                table.row([format!("  {role}.pem, {role}.key"), for_whom(role).to_owned()]);
            }
            text += &table.render();
            let files = Files::in_dir(dir, Role::User);
            text += &format!(
                "certificates of roles are valid until {}; `anello certs issue ROLE --force` makes one anew\n\
                 give a machine only what it needs, in a folder that --tls or {DIR} names\n",
                Shown::read(&files.cert)?.until
            );
            screen.print(&text)?;
        }
        Command::Issue { role, place: Place { dir, days, force } } => {
            let files = authority::issue(dir, *role, Validity::days(*days), *force)?;
            screen.print(&format!(
                "{} and {}, until {}: {}; {} goes with them\n",
                files.cert.display(),
                files.key.display(),
                Shown::read(&files.cert)?.until,
                for_whom(*role),
                files.ca.display(),
            ))?;
        }
        Command::Show { path } => screen.print(&show(path)?)?,
    }
    Ok(Exit::Done)
}

fn for_whom(role: Role) -> &'static str {
    match role {
        Role::Coordinator => "for the coordinator",
        Role::Worker => "for workers, and for a coordinator that starts some itself",
        Role::User => "for who submits jobs, and watches and stops them",
    }
}

fn show(path: &Path) -> Result<String, Failure> {
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        let entries = std::fs::read_dir(path).and_then(|entries| entries.collect::<Result<Vec<_>, _>>());
        let entries =
            entries.map_err(|source| Failure::File { action: "reading", path: path.to_owned(), source })?;
        files = entries.into_iter().map(|entry| entry.path()).collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "pem"));
        files.sort();
    }
    let mut table = Table::new(6);
    table.row(["file", "role", "from", "until", "now", "name"]);
    for file in files {
        let Shown { subject, roles, is_ca, from, until, is_valid_now, .. } = Shown::read(&file)?;
        let words: Vec<&str> = roles.iter().map(|role| role.word()).collect();
        table.row([
            file.display().to_string(),
            if is_ca { "CA".to_owned() } else { words.join(", ") },
            from,
            until,
            if is_valid_now { "valid" } else { "not valid" }.to_owned(),
            subject,
        ]);
    }
    Ok(table.render())
}

/// The certificates of a command.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "TLS")]
pub struct TlsArgs {
    /// The folder of certificates that `anello certs init` makes: what connects proves who it is, on both sides.
    #[arg(long, value_name = "DIR", env = DIR)]
    tls: Option<OsString>,
    /// The CA's certificate (default: ca.pem in the folder).
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// Our certificate (default: ROLE.pem in the folder).
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// Its private key (default: ROLE.key in the folder).
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
}

impl TlsArgs {
    /// The folder; an empty name is none, so that a variable can be taken back.
    fn dir(&self) -> Option<&Path> {
        self.tls.as_deref().filter(|dir| !dir.is_empty()).map(Path::new)
    }

    /// The certificates of a `role`; absent when none are given.
    pub fn load(&self, role: Role) -> Result<Option<Tls>, Error> {
        let in_dir = self.dir().map(|dir| Files::in_dir(dir, role));
        let pick = |given: &Option<PathBuf>, file: fn(&Files) -> &PathBuf| {
            given.clone().or_else(|| in_dir.as_ref().map(|files| file(files).clone()))
        };
        let ca = pick(&self.tls_ca, |files| &files.ca);
        let cert = pick(&self.tls_cert, |files| &files.cert);
        let key = pick(&self.tls_key, |files| &files.key);
        let missing = |missing| Error::Incomplete { missing };
        if ca.is_none() && cert.is_none() && key.is_none() {
            return Ok(None);
        }
        let files = Files {
            ca: ca.ok_or(missing("the CA's certificate"))?,
            cert: cert.ok_or(missing("a certificate"))?,
            key: key.ok_or(missing("a private key"))?,
        };
        Tls::load(files, role).map(Some)
    }

    /// Whether something was given on the command line, and not by the environment alone.
    fn are_given(&self) -> bool {
        let folder = self.tls.is_some() && self.tls != std::env::var_os(DIR);
        folder || self.tls_ca.is_some() || self.tls_cert.is_some() || self.tls_key.is_some()
    }
}

/// The certificates of a command that listens.
#[derive(Clone, Debug, clap::Args)]
pub struct ListenArgs {
    #[command(flatten)]
    tls: TlsArgs,
    /// Listen without TLS where others reach it: whoever does can read and change what is trained.
    #[arg(long, help_heading = "TLS")]
    insecure: bool,
}

impl ListenArgs {
    /// Whether something was given on the command line.
    pub fn are_given(&self) -> bool {
        self.insecure || self.tls.are_given()
    }

    /// How a `role` is protected.
    pub fn protection(&self, role: Role) -> Result<Protection, Failure> {
        match (self.tls.load(role)?, self.insecure) {
            (Some(_), true) => Err(Failure::Usage(format!(
                "--insecure and certificates (--tls, {DIR}) are both given; leave one of them out"
            ))),
            (Some(tls), false) => Ok(Protection::Tls(tls)),
            (None, true) => {
                tracing::warn!(
                    "--insecure: whoever reaches this process can read and change what is trained"
                );
                Ok(Protection::Insecure)
            }
            (None, false) => Ok(Protection::Loopback),
        }
    }

    /// What workers that this process starts are given, when it is protected so.
    pub fn for_local_workers(&self, protection: &Protection) -> Result<Handed, Failure> {
        let dir = match (protection, self.tls.dir()) {
            (Protection::Tls(_), Some(dir)) => {
                // Here, where a person reads it, and not in each worker.
                Tls::load(Files::in_dir(dir, Role::Worker), Role::Worker)?;
                dir.as_os_str().to_owned()
            }
            (Protection::Tls(_), None) => {
                return Err(Failure::Usage(
                    "workers that are started here need certificates of their own; give --tls DIR with worker.pem and \
                     worker.key in it, or start none here"
                        .to_owned(),
                ));
            }
            // What is in our environment may not be theirs.
            (Protection::Loopback | Protection::Insecure, _) => OsString::new(),
        };
        let insecure = matches!(protection, Protection::Insecure);
        Ok(Handed { dir, insecure })
    }
}

/// What local workers are given of the protection.
#[derive(Clone, Debug, Default)]
pub struct Handed {
    /// The folder of their certificates; an empty name for none.
    dir: OsString,
    /// Whether they may do without TLS where others reach them.
    pub insecure: bool,
}

impl Handed {
    /// The variable of their environment that says so, whatever ours says.
    pub fn environment(&self) -> (OsString, OsString) {
        (DIR.into(), self.dir.clone())
    }
}

//! What is believed and what is not, over real certificates and handshakes in memory.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};

use super::authority::{Validity, ca_files, init, issue};
use super::*;

const DAY: u64 = 24 * 3600;

fn ca() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    init(dir.path(), 30, false).unwrap();
    dir
}

fn load(dir: &Path, role: Role) -> Tls {
    Tls::load(Files::in_dir(dir, role), role).unwrap()
}

/// A validity of `days` that began so many days ago, or will.
fn valid(from: i64, days: u64) -> Validity {
    let now = rustls::pki_types::UnixTime::now().as_secs();
    let from = now.checked_add_signed(from * DAY as i64).unwrap();
    Validity { from, until: from + days * DAY }
}

/// What `Tls::load` says; `DIR` stands for the folder.
fn complaint(dir: &Path, files: Files, role: Role) -> String {
    let text = Tls::load(files, role).unwrap_err().to_string();
    text.replace(&format!("{}/", dir.display()), "DIR/")
}

/// A handshake: what the client and what the server say of it.
fn shake(client: &Tls, to: Role, server: &Tls, of: &[Role]) -> [std::result::Result<(), rustls::Error>; 2] {
    shake_with(&client.client(Protocol::Grpc), to, &server.server(Protocol::Grpc, of))
}

fn shake_with(
    client: &Arc<ClientConfig>,
    to: Role,
    server: &Arc<ServerConfig>,
) -> [std::result::Result<(), rustls::Error>; 2] {
    let mut client = ClientConnection::new(client.clone(), to.server_name()).unwrap();
    let mut server = ServerConnection::new(server.clone()).unwrap();
    let mut results = [Ok(()), Ok(())];
    // Words go to and fro until there are none; the last may say why one side leaves.
    for _ in 0..10 {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() && results[1].is_ok() {
            server.read_tls(&mut rest).unwrap();
            results[1] = server.process_new_packets().map(drop);
        }
        let mut bytes = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() && results[0].is_ok() {
            client.read_tls(&mut rest).unwrap();
            results[0] = client.process_new_packets().map(drop);
        }
    }
    results
}

#[test]
fn each_role_reaches_what_is_for_it_and_nothing_else() {
    let dir = ca();
    let [coordinator, worker, user] = Role::ALL.map(|role| load(dir.path(), role));
    let through = |client: &Tls, to, server: &Tls, of: &[Role]| {
        shake(client, to, server, of).iter().all(|side| side.is_ok())
    };
    let (w, u) = (Role::Worker, Role::User);
    assert!(through(&worker, Role::Coordinator, &coordinator, &[w, u]));
    assert!(through(&user, Role::Coordinator, &coordinator, &[w, u]));
    assert!(through(&worker, w, &worker, &[w]));
    // A user among workers, a worker that takes itself for a coordinator, a coordinator that dials.
    assert!(!through(&user, w, &worker, &[w]));
    assert!(!through(&worker, Role::Coordinator, &worker, &[w]));
    assert!(!through(&user, Role::Coordinator, &user, &[u]));
    assert!(!through(&coordinator, w, &worker, &[w, Role::Coordinator]));
}

#[test]
fn who_is_refused_is_told_why_on_both_sides() {
    let (dir, other) = (ca(), ca());
    let [coordinator, worker, user] = Role::ALL.map(|role| load(dir.path(), role));
    let foreign = load(other.path(), Role::Worker);
    let say = |tls: &Tls, error: &rustls::Error, expected| {
        let text = tls.explain(error, "the peer", expected).to_string();
        let text = text.replace(&format!("{}/", dir.path().display()), "DIR/");
        text.replace(&format!("{}/", other.path().display()), "OTHER/")
    };

    // The client looks first, and at the wrong name.
    let [client, server] = shake(&user, Role::Worker, &coordinator, &[Role::User]);
    assert_eq!(
        say(&user, &client.unwrap_err(), Role::Worker),
        "the peer shows a certificate that is not that of a worker; look whether the address is right, and give it a \
         certificate of `anello certs issue worker`"
    );
    assert!(matches!(server, Err(rustls::Error::AlertReceived(_))), "{server:?}");

    let one_ca = "both need certificates, and the ca.pem, of one `anello certs init`";
    let [client, _] = shake(&foreign, Role::Coordinator, &coordinator, &[Role::Worker]);
    assert_eq!(
        say(&foreign, &client.unwrap_err(), Role::Coordinator),
        format!("the peer shows a certificate that is not of the CA in OTHER/ca.pem; {one_ca}")
    );

    // The server looks second: one with the right CA in its hands and a certificate of another.
    let files = Files { ca: dir.path().join("ca.pem"), ..Files::in_dir(other.path(), Role::Worker) };
    let mixed = Tls::read(files, Role::Worker).unwrap();
    let [client, server] = shake(&mixed, Role::Coordinator, &coordinator, &[Role::Worker]);
    assert_eq!(
        say(&mixed, &client.unwrap_err(), Role::Coordinator),
        format!("the peer does not know the CA of OTHER/worker.pem; {one_ca}")
    );
    assert_eq!(server, Err(rustls::CertificateError::UnknownIssuer.into()));

    let [client, _] = shake(&user, Role::Worker, &worker, &[Role::Worker]);
    assert_eq!(
        say(&user, &client.unwrap_err(), Role::Worker),
        "the peer does not serve who shows DIR/user.pem; look with `anello certs show` whether it is that of a user"
    );

    // A year late, on either side.
    let late = tempfile::tempdir().unwrap();
    init(late.path(), 30, false).unwrap();
    for role in Role::ALL {
        issue(late.path(), role, valid(-400, 30), true).unwrap();
    }
    // Those of processes whose files nobody has renewed.
    let left = tempfile::tempdir().unwrap();
    renew(late.path(), left.path(), &RING);
    let [late_coordinator, late_worker] = [Role::Coordinator, Role::Worker]
        .map(|role| Tls::read(Files::in_dir(left.path(), role), role).unwrap());
    issue(late.path(), Role::Worker, valid(0, 30), true).unwrap();
    let fresh_worker = load(late.path(), Role::Worker);
    let [client, _] = shake(&fresh_worker, Role::Coordinator, &late_coordinator, &[Role::Worker]);
    let text = say(&fresh_worker, &client.unwrap_err(), Role::Coordinator);
    assert!(text.starts_with("the peer shows a certificate that expired on 20"), "{text}");
    assert!(
        text.contains(" UTC; make another with `anello certs issue coordinator --force`, or set the clock"),
        "{text}"
    );
    issue(late.path(), Role::Coordinator, valid(0, 30), true).unwrap();
    let coordinator = load(late.path(), Role::Coordinator);
    let [client, _] = shake(&late_worker, Role::Coordinator, &coordinator, &[Role::Worker]);
    let text = say(&late_worker, &client.unwrap_err(), Role::Coordinator);
    assert!(text.contains("worker.pem is not valid now; compare the clocks"), "{text}");
}

#[test]
fn what_nobody_would_believe_is_found_before_anything_is_dialed() {
    let (dir, other) = (ca(), ca());
    let files = |role| Files::in_dir(dir.path(), role);
    let mine = files(Role::Worker);
    let say = |files, role| complaint(dir.path(), files, role);
    assert_eq!(
        say(Files { key: dir.path().join("no.key"), ..mine.clone() }, Role::Worker),
        "DIR/no.key is missing; `anello certs init` makes all files, and `anello certs issue` those of one role"
    );
    assert_eq!(
        say(Files { key: files(Role::User).key, ..mine.clone() }, Role::Worker),
        "DIR/user.key is not the key of DIR/worker.pem; give the two files that were made together"
    );
    assert_eq!(
        say(Files { cert: mine.key.clone(), ..mine.clone() }, Role::Worker),
        "DIR/worker.key has no certificate in PEM in it; give a file that `anello certs` made"
    );
    assert_eq!(
        say(Files { key: mine.cert.clone(), ..mine.clone() }, Role::Worker),
        "DIR/worker.pem has no private key in PEM in it; give a file that `anello certs` made"
    );
    assert_eq!(
        say(mine.clone(), Role::User),
        "DIR/worker.pem is the certificate of worker, not of a user; make one with `anello certs issue user`"
    );
    assert_eq!(
        say(files(Role::User), Role::Coordinator),
        "DIR/user.pem is the certificate of user, not of a coordinator; make one with `anello certs issue coordinator`"
    );
    let foreign = Files::in_dir(other.path(), Role::Worker);
    assert_eq!(
        say(Files { cert: foreign.cert, key: foreign.key, ..mine.clone() }, Role::Worker)
            .replace(&other.path().display().to_string(), "OTHER"),
        "OTHER/worker.pem is not of the CA in DIR/ca.pem; give the ca.pem of the `anello certs init` that it comes from"
    );
    std::fs::write(
        dir.path().join("no.pem"),
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    let text = say(Files { ca: dir.path().join("no.pem"), ..mine }, Role::Worker);
    assert!(text.starts_with("DIR/no.pem is no certificate of a CA ("), "{text}");

    for role in Role::ALL {
        issue(dir.path(), role, valid(-40, 30), true).unwrap();
        let text = say(files(role), role);
        assert!(text.starts_with(&format!("DIR/{role}.pem expired on 20")), "{text}");
        assert!(text.contains(&format!("`anello certs issue {role} --force`")), "{text}");
        issue(dir.path(), role, valid(3, 30), true).unwrap();
        let text = say(files(role), role);
        assert!(text.starts_with(&format!("DIR/{role}.pem is not valid before 20")), "{text}");
        assert!(text.contains("; set the clock of this machine, which says 20"), "{text}");
    }
}

#[test]
fn keys_are_for_their_owner_and_nothing_is_replaced_unasked() {
    let dir = ca();
    let mode = |name: &str| dir.path().join(name).metadata().unwrap().permissions().mode() & 0o777;
    for name in ["ca.key", "coordinator.key", "worker.key", "user.key"] {
        assert_eq!(mode(name), 0o600, "{name}");
    }
    let before = std::fs::read(dir.path().join("worker.pem")).unwrap();
    for refused in
        [init(dir.path(), 30, false), issue(dir.path(), Role::Worker, Validity::days(30), false).map(drop)]
    {
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("is there already") && text.contains("--force"), "{text}");
    }
    assert_eq!(std::fs::read(dir.path().join("worker.pem")).unwrap(), before);

    // Anew with the same CA: both are believed. Anew with another CA: the old one no more.
    let left = tempfile::tempdir().unwrap();
    renew(dir.path(), left.path(), &RING);
    let old = load(left.path(), Role::Worker);
    issue(dir.path(), Role::Worker, Validity::days(30), true).unwrap();
    let new = load(dir.path(), Role::Worker);
    assert_ne!(std::fs::read(dir.path().join("worker.pem")).unwrap(), before);
    assert!(shake(&old, Role::Worker, &new, &[Role::Worker]).iter().all(|side| side.is_ok()));
    assert_eq!(mode("worker.key"), 0o600);
    init(dir.path(), 30, true).unwrap();
    let newest = load(dir.path(), Role::Worker);
    assert!(shake(&old, Role::Worker, &newest, &[Role::Worker]).iter().all(|side| side.is_err()));
}

#[test]
fn a_folder_without_a_whole_ca_issues_nothing() {
    let (dir, other) = (ca(), ca());
    let again = || issue(dir.path(), Role::User, Validity::days(1), true).unwrap_err().to_string();
    let [cert, key] = ca_files(dir.path());
    std::fs::copy(other.path().join("ca.key"), &key).unwrap();
    let text = again();
    assert!(text.contains("ca.key is not the key of ") && text.contains("one `anello certs init`"), "{text}");
    std::fs::remove_file(&key).unwrap();
    assert!(again().contains("ca.key is missing; `anello certs init`"), "{}", again());
    std::fs::remove_file(&cert).unwrap();
    assert!(again().contains("ca.pem is missing; `anello certs init`"), "{}", again());
    // What was there is as it was.
    assert!(Files::in_dir(dir.path(), Role::User).key.exists());
}

#[test]
fn a_certificate_tells_what_it_is() {
    let dir = ca();
    let shown = Shown::read(&dir.path().join("user.pem")).unwrap();
    let ca = Shown::read(&dir.path().join("ca.pem")).unwrap();
    assert_eq!(
        (shown.subject.as_str(), shown.roles.as_slice(), shown.is_ca),
        ("CN=anello user", &[Role::User][..], false)
    );
    assert_eq!((shown.issuer == ca.subject, ca.roles.len(), ca.is_ca), (true, 0, true));
    assert!(shown.is_valid_now && ca.is_valid_now);
    assert!(ca.subject.starts_with("CN=anello private CA "), "{}", ca.subject);
    issue(dir.path(), Role::User, valid(-2, 1), true).unwrap();
    assert!(!Shown::read(&dir.path().join("user.pem")).unwrap().is_valid_now);
}

#[test]
fn addresses_that_others_reach_need_tls_or_a_persons_word() {
    let dir = ca();
    let tls = Protection::Tls(load(dir.path(), Role::Worker));
    for (address, reached) in [
        ("127.0.0.1", false),
        ("127.8.8.8", false),
        ("::1", false),
        ("0.0.0.0", true),
        ("::", true),
        ("10.0.0.7", true),
        ("fe80::1", true),
    ] {
        let address = address.parse().unwrap();
        assert_eq!(Protection::Loopback.check(address).is_err(), reached, "{address}");
        assert_eq!((tls.check(address), Protection::Insecure.check(address)), (Ok(()), Ok(())));
    }
    let text = Protection::default().check("10.0.0.7".parse().unwrap()).unwrap_err().to_string();
    assert!(text.contains("10.0.0.7") && text.contains("--tls DIR") && text.contains("--insecure"), "{text}");
}

#[test]
fn roles_have_their_words() {
    for role in Role::ALL {
        assert_eq!(role.word().parse(), Ok(role));
        assert_eq!(role.name(), format!("{role}.anello"));
    }
    assert_eq!(
        "Worker".parse::<Role>(),
        Err("`Worker` is no role; give coordinator, worker or user".to_owned())
    );
}

/// What coordinators and workers need.
const RING: [&str; 5] = ["ca.pem", "coordinator.pem", "coordinator.key", "worker.pem", "worker.key"];

/// Copies files of one folder over those of another, as whoever renews certificates does.
fn renew(from: &Path, to: &Path, names: &[&str]) {
    for name in names {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

#[test]
fn certificates_are_read_again_when_their_files_change() {
    let (here, old, new) = (ca(), tempfile::tempdir().unwrap(), ca());
    renew(here.path(), old.path(), &RING);
    let [coordinator, worker] = [Role::Coordinator, Role::Worker].map(|role| load(here.path(), role));
    // Those that a process makes when it starts.
    let server = coordinator.server(Protocol::Grpc, &[Role::Worker]);
    let client = worker.client(Protocol::Grpc);
    let through = |client: &Arc<ClientConfig>, server: &Arc<ServerConfig>| {
        shake_with(client, Role::Coordinator, server).iter().all(|side| side.is_ok())
    };
    let of_old = load(old.path(), Role::Worker).client(Protocol::Grpc);
    let of_new = load(new.path(), Role::Worker).client(Protocol::Grpc);
    assert!(through(&client, &server) && through(&of_old, &server) && !through(&of_new, &server));

    // The key alone, or the CA alone, is no certificate: what was known is used.
    renew(new.path(), here.path(), &["coordinator.key", "worker.key"]);
    let until = Instant::now() + Duration::from_millis(2500);
    while Instant::now() < until {
        assert!(through(&client, &server) && through(&of_old, &server));
        std::thread::sleep(Duration::from_millis(50));
    }
    renew(new.path(), here.path(), &RING);
    let until = Instant::now() + Duration::from_secs(60);
    while !(through(&of_new, &server)
        && through(&client, &load(new.path(), Role::Coordinator).server(Protocol::Grpc, &[Role::Worker])))
    {
        assert!(Instant::now() < until, "they are not read again");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(through(&client, &server) && !through(&of_old, &server));
}

/// A run that is longer than a certificate's life goes on when somebody renews it in time.
#[test]
fn a_certificate_that_is_renewed_before_it_ends_outlives_itself() {
    let dir = ca();
    let now = rustls::pki_types::UnixTime::now().as_secs();
    let short = Validity { from: now - 60, until: now + 8 };
    issue(dir.path(), Role::Coordinator, short, true).unwrap();
    let [coordinator, worker] = [Role::Coordinator, Role::Worker].map(|role| load(dir.path(), role));
    let server = coordinator.server(Protocol::Grpc, &[Role::Worker]);
    let client = worker.client(Protocol::Grpc);
    issue(dir.path(), Role::Coordinator, valid(-1, 30), true).unwrap();
    while rustls::pki_types::UnixTime::now().as_secs() <= short.until {
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(shake_with(&client, Role::Coordinator, &server).iter().all(|side| side.is_ok()));
}

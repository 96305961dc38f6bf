//! Those who come to a port with TLS and cannot prove that they are workers.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anello_collective::tcp::{Refusals, connect};
use anello_collective::{Collective, Error, Generation, Rank, Shape, Step};
use anello_tls::authority::{self, Validity};
use anello_tls::{Files, Role};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::fabric::{addresses, certificates, listeners, meet, options, secured, worker};

fn shape() -> Shape {
    Shape::balanced(2, 2, 2, 8)
}

/// Dials `port` as somebody who trusts our CA and shows the certificate of `files`, or none; returns what ended the
/// connection.
fn stranger(port: SocketAddr, files: Option<&Files>) -> std::io::Error {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(certificates().join("ca.pem")).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match files {
        None => config.with_no_client_auth(),
        Some(Files { cert, key, .. }) => {
            let chain = vec![CertificateDer::from_pem_file(cert).unwrap()];
            config.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key).unwrap()).unwrap()
        }
    };
    config.alpn_protocols = vec![b"anello-ring".to_vec()];
    let session = ClientConnection::new(Arc::new(config), Role::Worker.server_name()).unwrap();
    let socket = TcpStream::connect(port).unwrap();
    // Not a word after the handshake: one that comes too late would make the kernel drop the alert.
    StreamOwned::new(session, socket).read_exact(&mut [0]).expect_err("it was let in")
}

fn alert(error: &std::io::Error) -> String {
    match error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::AlertReceived(alert)) => format!("{alert:?}"),
        other => panic!("{other:?}: {error}"),
    }
}

/// A folder beside that of the ring, with a certificate of the same CA that expired long ago.
fn expired() -> Files {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("conformance-expired");
    std::fs::create_dir_all(&dir).unwrap();
    for name in ["ca.pem", "ca.key"] {
        std::fs::copy(certificates().join(name), dir.join(name)).unwrap();
    }
    authority::issue(&dir, Role::Worker, Validity { from: 1_000_000, until: 2_000_000 }, true).unwrap()
}

fn foreign() -> std::path::PathBuf {
    static ONCE: std::sync::OnceLock<std::path::PathBuf> = std::sync::OnceLock::new();
    let make = || {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("conformance-foreign");
        authority::init(&dir, 30, true).unwrap();
        dir
    };
    ONCE.get_or_init(make).clone()
}

#[test]
fn strangers_are_refused_and_counted_and_disturb_nobody() {
    let mut all = secured(2);
    let addresses = addresses(&all);
    let (zero, one) = all.split_at_mut(1);
    let refusals = std::thread::scope(|scope| {
        let first = options(0, &addresses, &shape(), Generation(3));
        let zero = scope.spawn(move || {
            let mut ring = connect(&mut zero[0], &first).unwrap();
            let said = ring.exchange(Step(0), b"still").unwrap();
            assert_eq!(said, [b"still".to_vec(), b"here".to_vec()]);
            zero[0].refusals()
        });
        let port = addresses[0];
        assert_eq!(alert(&stranger(port, None)), "CertificateRequired");
        assert_eq!(alert(&stranger(port, Some(&Files::in_dir(&foreign(), Role::Worker)))), "UnknownCA");
        assert_eq!(alert(&stranger(port, Some(&Files::in_dir(certificates(), Role::User)))), "AccessDenied");
        assert_eq!(alert(&stranger(port, Some(&expired()))), "CertificateExpired");
        // Without TLS; and the greeting of one that never ends, after as much as a handshake may have.
        let mut plain = TcpStream::connect(port).unwrap();
        plain.write_all(b"ANELLOH1 and no TLS").unwrap();
        assert!(!matches!(plain.read(&mut [0; 64]), Ok(64)));
        let mut endless = TcpStream::connect(port).unwrap();
        endless.write_all(b"\x16\x03\x01\x40\x00\x01\xff\xff\xff").unwrap();
        let written = (0..1 << 16).take_while(|_| endless.write_all(&[0; 1 << 12]).is_ok()).count();
        assert!(written < 1 << 16, "256 MiB were taken");
        // One that says nothing stays until its time is over, and is in nobody's way.
        let _silent = TcpStream::connect(port).unwrap();
        let mut ring = connect(&mut one[0], &options(1, &addresses, &shape(), Generation(3))).unwrap();
        assert_eq!(ring.exchange(Step(0), b"here").unwrap(), [b"still".to_vec(), b"here".to_vec()]);
        zero.join().unwrap()
    });
    assert_eq!(refusals, Refusals { untrusted: 6, ..Refusals::default() });
}

#[test]
fn a_member_whose_ca_is_another_is_told_and_who_waits_goes_on_waiting() {
    let mut all = secured(2);
    let mut stray = listeners(1).remove(0).with_tls(worker(&foreign()));
    let mut addresses = addresses(&all);
    let right = addresses[0];
    let shape = shape();
    // The address of rank 0 is that of the stray.
    addresses[0] = stray.addresses().unwrap()[0];
    let waiting = options(0, &addresses, &shape, Generation(1));
    let handle = waiting.abort.clone();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| (connect(&mut stray, &waiting).unwrap_err(), stray.refusals()));
        let error = connect(&mut all[1], &options(1, &addresses, &shape, Generation(1))).unwrap_err();
        let Error::Untrusted { rank: Rank(0), reason } = &error else { panic!("{error:?}") };
        assert!(
            reason.starts_with(&format!(
                "rank 0 at {} shows a certificate that is not of the CA in ",
                addresses[0]
            )),
            "{reason}"
        );
        while !waits.is_finished() {
            // Until it was seen: the listener cannot be asked while it is in use.
            std::thread::sleep(Duration::from_millis(200));
            handle.abort("seen");
        }
        let (error, refusals) = waits.join().unwrap();
        assert_eq!(error, Error::Aborted { reason: "seen".into() });
        assert_eq!(refusals, Refusals { untrusted: 1, ..Refusals::default() });
    });
    // With the right one it goes on, over the same listeners.
    addresses[0] = right;
    meet(&mut all, &shape, Generation(2)).into_iter().for_each(|member| drop(member.unwrap()));
}

#[test]
fn a_member_without_tls_and_one_with_it_do_not_meet_and_say_so() {
    for (zero, one) in [(true, false), (false, true)] {
        let mut all = listeners(2);
        let listener = |at: usize, tls: bool, all: &mut Vec<_>| {
            let listener: anello_collective::tcp::Listener = all.remove(at);
            all.insert(at, if tls { listener.with_tls(worker(certificates())) } else { listener });
        };
        listener(0, zero, &mut all);
        listener(1, one, &mut all);
        let addresses = addresses(&all);
        let late = |rank| {
            let mut options = options(rank, &addresses, &shape(), Generation(1));
            options.deadline = Duration::from_millis(500);
            options
        };
        let results = crate::fabric::meet_with(&mut all, late);
        let texts: Vec<String> = results.into_iter().map(|result| result.unwrap_err().to_string()).collect();
        assert!(texts[0].contains("rank 1 (has not come to us) missing"), "{}", texts[0]);
        assert!(texts[0].contains("0 of other jobs") && !texts[0].contains(" 0 strangers"), "{}", texts[0]);
        assert!(texts[1].contains("rank 0 ("), "{}", texts[1]);
    }
}

//! What can go wrong between two sides that must prove who they are, by what a person can do about it.

use std::net::IpAddr;
use std::path::PathBuf;

use rustls::pki_types::UnixTime;
use rustls::{AlertDescription, CertificateError};
use time::OffsetDateTime;

use crate::{Files, Role};

/// An error of certificates and of who may speak with whom.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A file of a certificate or key cannot be used, or not be made: look at the file.
    #[error("{} {fact}; {remedy}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        fact: String,
        /// What to do.
        remedy: String,
    },
    /// Files are missing among the arguments.
    #[error("TLS needs {missing} too; give --tls DIR, or all of --tls-ca, --tls-cert and --tls-key")]
    Incomplete {
        /// What is not given.
        missing: &'static str,
    },
    /// An address that others reach, without TLS.
    #[error(
        "{address} is not a loopback address, and without TLS whoever reaches it can read and change what is trained; \
         give --tls DIR (`anello certs init` makes one), or --insecure on a network that you trust"
    )]
    Address {
        /// The address.
        address: IpAddr,
    },
    /// One of two sides does not accept the other: connecting again changes nothing.
    #[error("{peer} {fact}; {remedy}")]
    Refused {
        /// The other side, and where it is.
        peer: String,
        /// What one does not accept of the other.
        fact: String,
        /// What to do.
        remedy: String,
    },
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What to do when the CA of the other side is another.
const ONE_CA: &str = "both need certificates, and the ca.pem, of one `anello certs init`";

impl Error {
    /// Why a handshake failed, for a person on this side: `peer` is the other side in words, which was to be an
    /// `expected`; `files` are ours, those of an `own`.
    pub fn of_handshake(error: &rustls::Error, peer: &str, expected: Role, own: Role, files: &Files) -> Self {
        let cert = files.cert.display();
        let (fact, remedy) = match error {
            rustls::Error::InvalidCertificate(cause) => theirs(cause, expected, files),
            rustls::Error::AlertReceived(alert) => match alert {
                AlertDescription::UnknownCA
                | AlertDescription::DecryptError
                | AlertDescription::BadCertificate => {
                    (format!("does not know the CA of {cert}"), ONE_CA.to_owned())
                }
                AlertDescription::CertificateExpired => (
                    format!("says that {cert} is not valid now"),
                    "compare the clocks of both machines with what `anello certs show` says of it, and make \
                     another with `anello certs issue`"
                        .to_owned(),
                ),
                AlertDescription::AccessDenied | AlertDescription::UnsupportedCertificate => (
                    format!("does not serve who shows {cert}"),
                    format!("look with `anello certs show` whether it is that of a {own}"),
                ),
                AlertDescription::CertificateRequired => {
                    (format!("got no certificate, though {cert} is one"), "report this as a bug".to_owned())
                }
                other => {
                    (format!("refuses the connection ({other:?})"), "its own log may say more".to_owned())
                }
            },
            rustls::Error::InvalidMessage(_) => {
                ("does not speak TLS".to_owned(), "start it with --tls too, or leave TLS out here".to_owned())
            }
            other => (
                format!("and we do not agree on TLS ({other})"),
                "are both of this build, and is the address right?".to_owned(),
            ),
        };
        Self::Refused { peer: peer.to_owned(), fact, remedy }
    }
}

/// What is wrong with the certificate of the other side, and what to do.
fn theirs(cause: &CertificateError, expected: Role, files: &Files) -> (String, String) {
    let own = "shows a certificate";
    match cause {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            (format!("{own} that is not of the CA in {}", files.ca.display()), ONE_CA.to_owned())
        }
        CertificateError::NotValidForNameContext { .. }
        | CertificateError::NotValidForName
        | CertificateError::ApplicationVerificationFailure
        | CertificateError::InvalidPurposeContext { .. }
        | CertificateError::InvalidPurpose => (
            format!("{own} that is not that of a {expected}"),
            format!(
                "look whether the address is right, and give it a certificate of `anello certs issue {expected}`"
            ),
        ),
        other => {
            let (fact, remedy) = validity(other, expected)
                .unwrap_or_else(|| (format!("that cannot be used ({other})"), "issue it another".to_owned()));
            (format!("{own} {fact}"), remedy)
        }
    }
}

/// For a certificate that is not valid now: since when, and what to do. None for all else.
pub(crate) fn validity(cause: &CertificateError, role: Role) -> Option<(String, String)> {
    let anew = format!("make another with `anello certs issue {role} --force`");
    match cause {
        CertificateError::ExpiredContext { time, not_after } => Some((
            format!("that expired on {}", date(*not_after)),
            format!("{anew}, or set the clock of this machine, which says {}", date(*time)),
        )),
        CertificateError::NotValidYetContext { time, not_before } => Some((
            format!("that is not valid before {}", date(*not_before)),
            format!("set the clock of this machine, which says {}", date(*time)),
        )),
        CertificateError::Expired => Some(("that has expired".to_owned(), anew)),
        CertificateError::NotValidYet => {
            Some(("that is not valid yet".to_owned(), "set the clock of this machine".to_owned()))
        }
        _ => None,
    }
}

/// A moment for people.
pub(crate) fn date(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    match OffsetDateTime::from_unix_timestamp(seconds) {
        Ok(at) => format!(
            "{}-{:02}-{:02} {:02}:{:02} UTC",
            at.year(),
            u8::from(at.month()),
            at.day(),
            at.hour(),
            at.minute()
        ),
        Err(_) => format!("second {seconds} of Unix time"),
    }
}

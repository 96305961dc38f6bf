//! From files to rustls: who we are, and whom we believe.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
};

use crate::error::validity;
use crate::{Error, Result, Role};

/// The files of one side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The CA's certificate: whom we believe.
    pub ca: PathBuf,
    /// Our certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Files {
    /// Those of a role as `anello certs` names them.
    pub fn in_dir(dir: &Path, role: Role) -> Self {
        let file = |kind: &str| dir.join(format!("{role}.{kind}"));
        Self { ca: dir.join("ca.pem"), cert: file("pem"), key: file("key") }
    }
}

/// What is spoken inside; the two sides must mean the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// gRPC.
    Grpc,
    /// The collective.
    Ring,
    /// HTTP/1.1: pages and metrics.
    Http,
}

impl Protocol {
    fn alpn(self) -> Vec<Vec<u8>> {
        match self {
            Self::Grpc => vec![b"h2".to_vec()],
            Self::Ring => vec![b"anello-ring".to_vec()],
            Self::Http => vec![b"http/1.1".to_vec()],
        }
    }
}

/// Who we are and whom we believe: checked when it is loaded.
#[derive(Clone, Debug)]
pub struct Tls {
    role: Role,
    files: Arc<Files>,
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    own: Arc<CertifiedKey>,
}

impl Tls {
    /// Reads `files`, whose certificate is to be that of a `role`.
    ///
    /// # Errors
    /// [`Error::File`]: one cannot be read, the key is another's, or nobody would accept the certificate: of another CA
    /// or role, expired, not valid yet.
    pub fn load(files: Files, role: Role) -> Result<Self> {
        let tls = Self::read(files, role)?;
        tls.check_own()?;
        Ok(tls)
    }

    /// The same, whether others would accept the certificate or not.
    pub(crate) fn read(files: Files, role: Role) -> Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        for ca in certificates(&files.ca)? {
            roots.add(ca).map_err(|cause| {
                file(
                    &files.ca,
                    format!("is no certificate of a CA ({cause})"),
                    "give the ca.pem of `anello certs init`",
                )
            })?;
        }
        let chain = certificates(&files.cert)?;
        let key = read(&files.key, "private key", PrivateKeyDer::from_pem_slice)?;
        let own = CertifiedKey::from_der(chain, key, &provider).map_err(|cause| match cause {
            rustls::Error::InconsistentKeys(_) => file(
                &files.key,
                format!("is not the key of {}", files.cert.display()),
                "give the two files that were made together",
            ),
            cause => file(
                &files.key,
                format!("cannot be used ({cause})"),
                "make both anew with `anello certs issue`",
            ),
        })?;
        let (files, roots, own) = (Arc::new(files), Arc::new(roots), Arc::new(own));
        Ok(Self { role, files, provider, roots, own })
    }

    /// What we are.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Where it was read.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// For connections that we make. The name to check is that of the role that is to answer
    /// ([`Role::server_name`]).
    pub fn client(&self, protocol: Protocol) -> Arc<ClientConfig> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("ring has TLS 1.3")
            .with_root_certificates(self.roots.clone())
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(self.own.clone())));
        config.alpn_protocols = protocol.alpn();
        config.resumption = rustls::client::Resumption::disabled();
        Arc::new(config)
    }

    /// For connections that come to us from those who have one of `roles`.
    pub fn server(&self, protocol: Protocol, roles: &[Role]) -> Arc<ServerConfig> {
        self.server_with(protocol, Arc::new(OnlyRoles { any: self.client_verifier(), roles: roles.to_vec() }))
    }

    /// For connections that come to us from anyone, who proves by other means what he may.
    pub fn server_for_anyone(&self, protocol: Protocol) -> Arc<ServerConfig> {
        self.server_with(protocol, WebPkiClientVerifier::no_client_auth())
    }

    fn server_with(&self, protocol: Protocol, clients: Arc<dyn ClientCertVerifier>) -> Arc<ServerConfig> {
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("ring has TLS 1.3")
            .with_client_cert_verifier(clients)
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(self.own.clone())));
        config.alpn_protocols = protocol.alpn();
        // A connection that is resumed is not asked for its certificate again.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Arc::new(config)
    }

    /// Why a handshake with `peer` (in words), which was to be an `expected`, failed.
    pub fn explain(&self, error: &rustls::Error, peer: &str, expected: Role) -> Error {
        Error::of_handshake(error, peer, expected, self.role, &self.files)
    }

    fn client_verifier(&self) -> Arc<dyn ClientCertVerifier> {
        WebPkiClientVerifier::builder_with_provider(self.roots.clone(), self.provider.clone())
            .build()
            .expect("there is a root: the file of the CA has a certificate")
    }

    /// Whether others will accept our certificate, by their own rules.
    fn check_own(&self) -> Result<()> {
        let (end, chain) = self.own.cert.split_first().expect("a file without a certificate is refused");
        let now = UnixTime::now();
        let accepted = match self.role {
            Role::User => self.client_verifier().verify_client_cert(end, chain, now).map(drop),
            Role::Coordinator | Role::Worker => {
                WebPkiServerVerifier::builder_with_provider(self.roots.clone(), self.provider.clone())
                    .build()
                    .expect("there is a root: the file of the CA has a certificate")
                    .verify_server_cert(end, chain, &self.role.server_name(), &[], now)
                    .map(drop)
            }
        };
        let roles = Role::of(end);
        let refused = match accepted {
            Ok(()) if roles.contains(&self.role) => return Ok(()),
            Ok(()) => CertificateError::NotValidForName,
            Err(rustls::Error::InvalidCertificate(cause)) => cause,
            Err(other) => {
                return Err(file(&self.files.cert, format!("cannot be used ({other})"), "issue another"));
            }
        };
        let role = self.role;
        let (fact, remedy) = match &refused {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => (
                format!("is not of the CA in {}", self.files.ca.display()),
                "give the ca.pem of the `anello certs init` that it comes from".to_owned(),
            ),
            other => match validity(other, role) {
                Some((fact, remedy)) => (fact.replacen("that ", "", 1), remedy),
                None if roles.contains(&role) => {
                    (format!("cannot be used ({other})"), "issue another".to_owned())
                }
                None => (
                    format!("is the certificate of {}, not of a {role}", Role::words(&roles)),
                    format!("make one with `anello certs issue {role}`"),
                ),
            },
        };
        Err(Error::File { path: self.files.cert.clone(), fact, remedy })
    }
}

pub(crate) fn file(path: &Path, fact: impl Into<String>, remedy: impl Into<String>) -> Error {
    Error::File { path: path.to_owned(), fact: fact.into(), remedy: remedy.into() }
}

/// All certificates in a PEM file; one at least.
pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let all =
        |bytes: &[u8]| CertificateDer::pem_slice_iter(bytes).collect::<std::result::Result<Vec<_>, _>>();
    let found = read(path, "certificate", all)?;
    if found.is_empty() {
        return Err(no_pem(path, "certificate", &pem::Error::NoItemsFound));
    }
    Ok(found)
}

/// What `parse` finds in a PEM file of one `what`.
fn read<T>(
    path: &Path,
    what: &str,
    parse: impl FnOnce(&[u8]) -> std::result::Result<T, pem::Error>,
) -> Result<T> {
    parse(&contents(path)?).map_err(|cause| no_pem(path, what, &cause))
}

pub(crate) fn contents(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|cause| match cause.kind() {
        std::io::ErrorKind::NotFound => file(
            path,
            "is missing",
            "`anello certs init` makes all files, and `anello certs issue` those of one role",
        ),
        _ => file(path, format!("cannot be read ({cause})"), "let the user that runs this read it"),
    })
}

fn no_pem(path: &Path, what: &str, cause: &pem::Error) -> Error {
    let fact = match cause {
        pem::Error::NoItemsFound => format!("has no {what} in PEM in it"),
        cause => format!("is no {what} in PEM ({cause:?})"),
    };
    file(path, fact, "give a file that `anello certs` made")
}

/// Accepts certificates of the CA that have one of some roles.
#[derive(Debug)]
struct OnlyRoles {
    any: Arc<dyn ClientCertVerifier>,
    roles: Vec<Role>,
}

impl ClientCertVerifier for OnlyRoles {
    fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
        self.any.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> std::result::Result<ClientCertVerified, rustls::Error> {
        let verified = self.any.verify_client_cert(end, chain, now)?;
        if Role::of(end).iter().any(|role| self.roles.contains(role)) {
            return Ok(verified);
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.any.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.any.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.any.supported_verify_schemes()
    }
}

//! From files to rustls: who we are, and whom we believe.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
};

use crate::error::validity;
use crate::live::{Known, Live};
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

/// Who we are and whom we believe: checked when it is loaded, and again whenever the files change.
#[derive(Clone, Debug)]
pub struct Tls {
    role: Role,
    provider: Arc<CryptoProvider>,
    live: Arc<Live>,
}

impl Tls {
    /// Reads `files`, whose certificate is to be that of a `role`. Configs that come of it look at the files again, before
    /// handshakes: new certificates, or those of another CA, are used without a restart, and what cannot be used is not.
    ///
    /// # Errors
    /// [`Error::File`]: one cannot be read, the key is another's, or nobody would accept the certificate: of another CA
    /// or role, expired, not valid yet.
    pub fn load(files: Files, role: Role) -> Result<Self> {
        let tls = Self::read(files, role)?;
        tls.check(&tls.now())?;
        Ok(tls)
    }

    /// The same, whether others would accept the certificate or not.
    pub(crate) fn read(files: Files, role: Role) -> Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let live = Live::new(files, |files| parse(files, &provider))?;
        Ok(Self { role, provider, live: Arc::new(live) })
    }

    /// What the files say now, as far as it can be used.
    fn now(&self) -> Known {
        self.live.now(|files| {
            let known = parse(files, &self.provider)?;
            self.check(&known)?;
            Ok(known)
        })
    }

    /// What we are.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Where it was read.
    pub fn files(&self) -> &Files {
        self.live.files()
    }

    /// For connections that we make. The name to check is that of the role that is to answer
    /// ([`Role::server_name`]).
    pub fn client(&self, protocol: Protocol) -> Arc<ClientConfig> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("ring has TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Servers(self.clone())))
            .with_client_cert_resolver(Arc::new(Own(self.clone())));
        config.alpn_protocols = protocol.alpn();
        config.resumption = rustls::client::Resumption::disabled();
        Arc::new(config)
    }

    /// For connections that come to us from those who have one of `roles`.
    pub fn server(&self, protocol: Protocol, roles: &[Role]) -> Arc<ServerConfig> {
        self.server_with(protocol, Arc::new(OnlyRoles { tls: self.clone(), roles: roles.to_vec() }))
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
            .with_cert_resolver(Arc::new(Own(self.clone())));
        config.alpn_protocols = protocol.alpn();
        // A connection that is resumed is not asked for its certificate again.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Arc::new(config)
    }

    /// Why a handshake with `peer` (in words), which was to be an `expected`, failed.
    pub fn explain(&self, error: &rustls::Error, peer: &str, expected: Role) -> Error {
        Error::of_handshake(error, peer, expected, self.role, self.files())
    }

    fn clients(&self, known: &Known) -> Arc<dyn ClientCertVerifier> {
        WebPkiClientVerifier::builder_with_provider(known.roots.clone(), self.provider.clone())
            .build()
            .expect("there is a root: the file of the CA has a certificate")
    }

    fn servers(&self, known: &Known) -> Arc<WebPkiServerVerifier> {
        WebPkiServerVerifier::builder_with_provider(known.roots.clone(), self.provider.clone())
            .build()
            .expect("there is a root: the file of the CA has a certificate")
    }

    /// Whether others will accept our certificate, by their own rules.
    fn check(&self, known: &Known) -> Result<()> {
        let (end, chain) = known.own.cert.split_first().expect("a file without a certificate is refused");
        let now = UnixTime::now();
        let accepted = match self.role {
            Role::User => self.clients(known).verify_client_cert(end, chain, now).map(drop),
            Role::Coordinator | Role::Worker => {
                let name = self.role.server_name();
                self.servers(known).verify_server_cert(end, chain, &name, &[], now).map(drop)
            }
        };
        let roles = Role::of(end);
        let refused = match accepted {
            Ok(()) if roles.contains(&self.role) => return Ok(()),
            Ok(()) => CertificateError::NotValidForName,
            Err(rustls::Error::InvalidCertificate(cause)) => cause,
            Err(other) => {
                return Err(file(&self.files().cert, format!("cannot be used ({other})"), "issue another"));
            }
        };
        let role = self.role;
        let (fact, remedy) = match &refused {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => (
                format!("is not of the CA in {}", self.files().ca.display()),
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
        Err(Error::File { path: self.files().cert.clone(), fact, remedy })
    }
}

fn parse(files: &Files, provider: &CryptoProvider) -> Result<Known> {
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
    let own = CertifiedKey::from_der(chain, key, provider).map_err(|cause| match cause {
        rustls::Error::InconsistentKeys(_) => file(
            &files.key,
            format!("is not the key of {}", files.cert.display()),
            "give the two files that were made together",
        ),
        cause => {
            file(&files.key, format!("cannot be used ({cause})"), "make both anew with `anello certs issue`")
        }
    })?;
    Ok(Known { roots: Arc::new(roots), own: Arc::new(own) })
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

/// Shows our certificate, as it is now.
#[derive(Debug)]
struct Own(Tls);

impl ResolvesServerCert for Own {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.now().own)
    }
}

impl ResolvesClientCert for Own {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.now().own)
    }

    fn has_certs(&self) -> bool {
        true
    }
}

type Verified<T> = std::result::Result<T, rustls::Error>;

/// Accepts servers of the CA that has the file now.
#[derive(Debug)]
struct Servers(Tls);

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Verified<ServerCertVerified> {
        self.0.servers(&self.0.now()).verify_server_cert(end, chain, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        verify_tls12_signature(message, cert, dss, &self.0.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        verify_tls13_signature(message, cert, dss, &self.0.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Accepts certificates of the CA that have one of some roles.
#[derive(Debug)]
struct OnlyRoles {
    tls: Tls,
    roles: Vec<Role>,
}

impl ClientCertVerifier for OnlyRoles {
    /// None: a client has one certificate, and shows it.
    fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Verified<ClientCertVerified> {
        let verified = self.tls.clients(&self.tls.now()).verify_client_cert(end, chain, now)?;
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
    ) -> Verified<HandshakeSignatureValid> {
        verify_tls12_signature(message, cert, dss, &self.tls.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        verify_tls13_signature(message, cert, dss, &self.tls.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.tls.provider.signature_verification_algorithms.supported_schemes()
    }
}

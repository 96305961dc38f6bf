//! What a certificate is for.

use std::fmt;
use std::str::FromStr;

use rustls::client::verify_server_name;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::ParsedCertificate;

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Keeps jobs and forms rings.
    Coordinator,
    /// Trains.
    Worker,
    /// Submits jobs and asks about them.
    User,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Coordinator, Self::Worker, Self::User];

    /// Its word, which begins the names of its files.
    pub fn word(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Worker => "worker",
            Self::User => "user",
        }
    }

    /// The DNS name in its certificates.
    pub fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator.anello",
            Self::Worker => "worker.anello",
            Self::User => "user.anello",
        }
    }

    /// The same for rustls.
    pub fn server_name(self) -> ServerName<'static> {
        ServerName::try_from(self.name()).expect("these are DNS names")
    }

    /// The roles that a certificate has. Whether it is to be trusted is another question.
    pub fn of(certificate: &CertificateDer<'_>) -> Vec<Self> {
        let Ok(parsed) = ParsedCertificate::try_from(certificate) else { return Vec::new() };
        Self::ALL
            .into_iter()
            .filter(|role| verify_server_name(&parsed, &role.server_name()).is_ok())
            .collect()
    }

    /// Roles in a sentence.
    pub(crate) fn words(roles: &[Self]) -> String {
        let words: Vec<&str> = roles.iter().map(|role| role.word()).collect();
        if words.is_empty() { "nobody of Anello".to_owned() } else { words.join(" and ") }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|role| role.word() == text);
        known.ok_or_else(|| format!("`{text}` is no role; give coordinator, worker or user"))
    }
}

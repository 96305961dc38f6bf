//! What a certificate says, for people.

use std::path::Path;

use rustls::pki_types::UnixTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::error::date;
use crate::identity::{certificates, file};
use crate::{Result, Role};

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Whose it is.
    pub subject: String,
    /// Who made it.
    pub issuer: String,
    /// What it is for; empty for a CA.
    pub roles: Vec<Role>,
    /// Whether it makes others.
    pub is_ca: bool,
    /// From when on it is valid.
    pub from: String,
    /// Until when.
    pub until: String,
    /// Whether now is within.
    pub is_valid_now: bool,
    pub(crate) public_key: Vec<u8>,
}

impl Shown {
    /// The first certificate in a PEM file.
    ///
    /// # Errors
    /// [`crate::Error::File`].
    pub fn read(path: &Path) -> Result<Self> {
        let der = certificates(path)?.swap_remove(0);
        let (_, parsed) = X509Certificate::from_der(&der).map_err(|cause| {
            file(path, format!("is no certificate ({cause})"), "give a file that `anello certs` made")
        })?;
        let [from, until] = [parsed.validity().not_before, parsed.validity().not_after]
            .map(|time| u64::try_from(time.timestamp()).unwrap_or(0));
        let now = UnixTime::now().as_secs();
        let day = |seconds| date(UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds)));
        Ok(Self {
            subject: parsed.subject().to_string(),
            issuer: parsed.issuer().to_string(),
            roles: Role::of(&der),
            is_ca: parsed.is_ca(),
            from: day(from),
            until: day(until),
            is_valid_now: (from..=until).contains(&now),
            public_key: parsed.public_key().subject_public_key.data.to_vec(),
        })
    }
}

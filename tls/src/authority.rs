//! A private CA in a folder, and certificates of it.
//!
//! ```text
//! ca.pem       everyone                                ca.key       whoever makes certificates, and nobody else
//! ROLE.pem     who has the role, and whom it tells     ROLE.key     who has the role, and nobody else
//! ```

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::UnixTime;
use time::OffsetDateTime;

use crate::identity::{certificates, contents, file};
use crate::{Error, Files, Result, Role, Shown};

/// Validity of a CA, in days: ten years. A certificate of a role is made anew more often, and its CA stays.
pub const CA_DAYS: u32 = 3653;

/// Before now, where a validity begins: clocks of other machines may be behind.
const BEHIND_SECONDS: u64 = 3600;

/// When a certificate is valid, in seconds of Unix time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// From.
    pub from: u64,
    /// Until.
    pub until: u64,
}

impl Validity {
    /// From now on, for so many days.
    pub fn days(days: u32) -> Self {
        let now = UnixTime::now().as_secs();
        Self { from: now.saturating_sub(BEHIND_SECONDS), until: now + u64::from(days) * 24 * 3600 }
    }

    fn stamp(self, params: &mut CertificateParams) {
        let time = |seconds: u64| {
            let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
            // X.509 has no years beyond 9999.
            OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
        };
        (params.not_before, params.not_after) = (time(self.from), time(self.until));
    }
}

/// Makes a CA in `dir`, and a certificate of each role, valid for `days`.
///
/// # Errors
/// [`Error::File`]: one of the files is there already and not to be replaced (`force`), or cannot be written.
pub fn init(dir: &Path, days: u32, force: bool) -> Result<()> {
    std::fs::create_dir_all(dir)
        .map_err(|cause| file(dir, format!("cannot be made ({cause})"), "give another folder with --dir"))?;
    let [cert, key] = ca_files(dir);
    let roles = Role::ALL.map(|role| Files::in_dir(dir, role));
    let all = [&cert, &key].into_iter().chain(roles.iter().flat_map(|files| [&files.cert, &files.key]));
    if !force && let Some(there) = all.into_iter().find(|path| path.exists()) {
        return Err(file(
            there,
            "is there already",
            "give another folder with --dir, or --force to replace the CA: then all its certificates are worth nothing",
        ));
    }
    let pair = generate(&key)?;
    let mut params = CertificateParams::default();
    // A name of its own, so that two CAs are not taken for one another.
    let id: String = params.key_identifier(&pair).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    params.distinguished_name.push(DnType::CommonName, format!("anello private CA {id}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Validity::days(CA_DAYS.max(days)).stamp(&mut params);
    let ca = params.self_signed(&pair).map_err(|cause| unmade(&cert, &cause))?;
    write(&key, &pair.serialize_pem(), 0o600, force)?;
    write(&cert, &ca.pem(), 0o644, force)?;
    Role::ALL.into_iter().try_for_each(|role| issue(dir, role, Validity::days(days), force).map(drop))
}

/// Makes a key, and a certificate of `role` for it, with the CA in `dir`.
///
/// # Errors
/// [`Error::File`]: there is no CA, its files do not fit one another, the new files are there already and not to be
/// replaced (`force`), or cannot be written.
pub fn issue(dir: &Path, role: Role, validity: Validity, force: bool) -> Result<Files> {
    let [ca, ca_key] = ca_files(dir);
    let files = Files::in_dir(dir, role);
    if !force && let Some(there) = [&files.cert, &files.key].into_iter().find(|path| path.exists()) {
        return Err(file(there, "is there already", "give --force to replace it and its pair"));
    }
    let shown = Shown::read(&ca)?;
    let pair = String::from_utf8_lossy(&contents(&ca_key)?).into_owned();
    let pair = KeyPair::from_pem(&pair).map_err(|cause| {
        file(&ca_key, format!("is no private key ({cause})"), "give the ca.key of `anello certs init`")
    })?;
    if pair.public_key_raw() != shown.public_key {
        return Err(file(
            &ca_key,
            format!("is not the key of {}", ca.display()),
            "take both from one `anello certs init`",
        ));
    }
    let certificate = certificates(&ca)?.swap_remove(0);
    let issuer = Issuer::from_ca_cert_der(&certificate, pair).map_err(|cause| {
        file(&ca, format!("is no CA ({cause})"), "give the folder of an `anello certs init`")
    })?;

    let mut params =
        CertificateParams::new([role.name().to_owned()]).map_err(|cause| unmade(&files.cert, &cause))?;
    params.distinguished_name.push(DnType::CommonName, format!("anello {role}"));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let (accepts, dials) = (ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth);
    params.extended_key_usages = match role {
        Role::Coordinator => vec![accepts],
        Role::Worker => vec![accepts, dials],
        Role::User => vec![dials],
    };
    params.use_authority_key_identifier_extension = true;
    validity.stamp(&mut params);
    let pair = generate(&files.key)?;
    let made = params.signed_by(&pair, &issuer).map_err(|cause| unmade(&files.cert, &cause))?;
    write(&files.key, &pair.serialize_pem(), 0o600, force)?;
    write(&files.cert, &made.pem(), 0o644, force)?;
    Ok(files)
}

/// Certificate and key of the CA in `dir`.
pub fn ca_files(dir: &Path) -> [PathBuf; 2] {
    ["ca.pem", "ca.key"].map(|name| dir.join(name))
}

fn generate(path: &Path) -> Result<KeyPair> {
    KeyPair::generate().map_err(|cause| unmade(path, &cause))
}

fn unmade(path: &Path, cause: &rcgen::Error) -> Error {
    file(path, format!("cannot be made ({cause})"), "report this as a bug")
}

/// A new file, never one that others could read before it had its mode.
fn write(path: &Path, text: &str, mode: u32, replace: bool) -> Result<()> {
    let written = || {
        if replace && path.exists() {
            std::fs::remove_file(path)?;
        }
        OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?.write_all(text.as_bytes())
    };
    written()
        .map_err(|cause| file(path, format!("cannot be written ({cause})"), "give another folder with --dir"))
}

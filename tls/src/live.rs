//! What the files say now: certificates are read again when the files change, so that a run outlives them.
//!
//! ```text
//! a handshake ──▶ files changed? ──▶ no: what is known
//!                      │ yes
//!                      └─▶ read ──▶ usable: that from now on │ not: what is known, and a line in the log
//! ```
//! Three calls of the system a look, some microseconds. Whoever issues certificates replaces three files, one after the other: in between they do not fit together, and the
//! next look finds them whole.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::RootCertStore;
use rustls::sign::CertifiedKey;

use crate::{Files, Result};

/// Whom we believe, and who we are.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub roots: Arc<RootCertStore>,
    pub own: Arc<CertifiedKey>,
}

/// By what a file is known to be another: its inode, size and last change.
type Stamp = Option<(u64, u64, i64, i64)>;

#[derive(Debug)]
struct State {
    known: Known,
    /// Of the files as they were read last, whether they could be used or not.
    stamps: [Stamp; 3],
}

/// What is known of files, kept fresh.
#[derive(Debug)]
pub(crate) struct Live {
    files: Files,
    state: Mutex<State>,
}

impl Live {
    /// With what `read` finds in `files`.
    pub fn new(files: Files, read: impl FnOnce(&Files) -> Result<Known>) -> Result<Self> {
        // Before reading: what changes meanwhile is read again.
        let stamps = stamps(&files);
        let known = read(&files)?;
        let state = State { known, stamps };
        Ok(Self { files, state: Mutex::new(state) })
    }

    pub fn files(&self) -> &Files {
        &self.files
    }

    /// What is known, read again by `read` when the files have changed.
    pub fn now(&self, read: impl FnOnce(&Files) -> Result<Known>) -> Known {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = stamps(&self.files);
        if stamps != state.stamps {
            state.stamps = stamps;
            let cert = self.files.cert.display();
            match read(&self.files) {
                Ok(known) => {
                    state.known = known;
                    tracing::info!(%cert, "read the certificates again, since their files have changed");
                }
                Err(error) => {
                    tracing::warn!(%error, "certificates have changed and cannot be used; those before are");
                }
            }
        }
        state.known.clone()
    }
}

fn stamps(files: &Files) -> [Stamp; 3] {
    let stamp = |path: &PathBuf| {
        let known = std::fs::metadata(path).ok()?;
        Some((known.ino(), known.size(), known.mtime(), known.mtime_nsec()))
    };
    [&files.ca, &files.cert, &files.key].map(stamp)
}

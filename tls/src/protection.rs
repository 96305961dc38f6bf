//! Which addresses need TLS.

use std::net::IpAddr;

use crate::{Error, Result, Tls};

/// How connections of a process are protected.
#[derive(Clone, Debug, Default)]
pub enum Protection {
    /// TLS, with certificates of both sides.
    Tls(Tls),
    /// None: for addresses that only this machine reaches.
    #[default]
    Loopback,
    /// None, on any address, because a person said so.
    Insecure,
}

impl Protection {
    /// Whether `address` may be listened on, or given to others as ours.
    ///
    /// # Errors
    /// [`Error::Address`]: others reach it, and there is no TLS.
    pub fn check(&self, address: IpAddr) -> Result<()> {
        match self {
            Self::Loopback if !address.is_loopback() => Err(Error::Address { address }),
            Self::Tls(_) | Self::Loopback | Self::Insecure => Ok(()),
        }
    }

    /// The certificates, when there is TLS.
    pub fn tls(&self) -> Option<&Tls> {
        match self {
            Self::Tls(tls) => Some(tls),
            Self::Loopback | Self::Insecure => None,
        }
    }
}

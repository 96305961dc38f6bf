//! Kubernetes: the cluster, and the certificates by which its controller reaches the jobs' coordinators.

use anello_k8s::Checkup;
use anello_tls::{Error, Role, Shown};

use crate::certs::TlsArgs;
use crate::failure::Failure;

/// What was found of the cluster of the current kubeconfig, of the controller in `namespace`, and of certificates where some
/// are given.
pub fn checkup(namespace: Option<&str>, tls: &TlsArgs) -> Result<Checkup, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut checkup =
        runtime.block_on(anello_k8s::checkup(namespace)).map_err(|error| Failure::Kube(Box::new(error)))?;
    let shown = tls.load(Role::User).and_then(|tls| match tls {
        Some(tls) => Shown::read(&tls.files().cert).map(Some),
        None => Ok(None),
    });
    if let Some((fits, line)) = certificates(shown) {
        checkup.fit &= fits;
        checkup.found.push(line);
    }
    Ok(checkup)
}

/// Whether they will do, and what is said of them; absent where none are given.
fn certificates(shown: Result<Option<Shown>, Error>) -> Option<(bool, String)> {
    let of =
        |Shown { subject, from, until, .. }: &Shown| format!("{subject}, valid from {from} until {until}");
    match shown.transpose()? {
        Ok(shown) if shown.is_valid_now => Some((true, format!("certificates: {}", of(&shown)))),
        Ok(shown) => {
            let remedy = "`anello certs issue user --force` makes another; put it in the Secret in its place";
            Some((false, format!("certificates: {}, and not now; {remedy}", of(&shown))))
        }
        Err(error) => Some((false, format!("certificates: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use anello_tls::authority::{self, Validity};

    use super::*;

    /// A folder of certificates, the user's with another validity than the rest.
    fn shown(folder: &std::path::Path, validity: Validity) -> Shown {
        authority::init(folder, 1, true).expect("a folder can be written");
        let files = authority::issue(folder, Role::User, validity, true).expect("a folder can be written");
        Shown::read(&files.cert).expect("it was just made")
    }

    #[test]
    fn certificates_that_will_not_do_are_told_with_a_remedy() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let (fits, told) =
            certificates(Ok(Some(shown(folder.path(), Validity::days(9))))).expect("it is told");
        assert!(fits && told.starts_with("certificates: CN=anello user, valid from "), "{told}");
        let past = Validity { from: 1_000_000_000, until: 1_100_000_000 };
        let (fits, told) = certificates(Ok(Some(shown(folder.path(), past)))).expect("it is told");
        assert!(!fits && told.contains(", and not now; `anello certs issue user --force`"), "{told}");
        assert_eq!(certificates(Ok(None)), None);
        let missing = Error::Incomplete { missing: "a private key" };
        let (fits, told) = certificates(Err(missing)).expect("it is told");
        assert!(!fits && told.contains("a private key"), "{told}");
    }
}

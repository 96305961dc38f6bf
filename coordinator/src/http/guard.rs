//! Who may what. Without tokens whoever reaches the server may read, and nobody may change anything.

use std::fmt;
use std::path::{Path, PathBuf};

use axum::http::header::{AUTHORIZATION, HOST};
use axum::http::{HeaderMap, Method};

/// What somebody may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Read.
    Viewer,
    /// Also pause, resume, scale and cancel jobs.
    Operator,
}

impl Role {
    /// Its name in the file of tokens.
    pub fn name(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
        }
    }
}

/// A file of tokens that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {fact}; give lines of `ROLE NAME TOKEN`, where ROLE is viewer or operator and TOKEN has 16 letters or more", path.display())]
pub struct TokenError {
    path: PathBuf,
    fact: String,
}

/// Who is known. It is never shown.
#[derive(Clone, Default)]
pub struct Tokens {
    all: Vec<(Role, String, Vec<u8>)>,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tokens", self.all.len())
    }
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// What it may do.
    pub role: Role,
    /// Whose token it has; absent: there are no tokens.
    pub name: Option<String>,
}

/// Letters of a token at least: one that cannot be guessed.
const LETTERS_MIN: usize = 16;

impl Tokens {
    /// Reads a file: a line `ROLE NAME TOKEN` each; empty ones, and those that begin with `#`, are passed over.
    ///
    /// # Errors
    /// [`TokenError`]: it cannot be read, others may read it, or a line is none. No token is told.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let wrong = |fact: String| TokenError { path: path.to_owned(), fact };
        let text =
            std::fs::read_to_string(path).map_err(|cause| wrong(format!("it cannot be read ({cause})")))?;
        let mode =
            std::fs::metadata(path).map(|meta| std::os::unix::fs::PermissionsExt::mode(&meta.permissions()));
        // A group may: that is how a pod that is not root is given a Secret.
        if mode.is_ok_and(|mode| mode & 0o007 != 0) {
            return Err(wrong("others may read it (`chmod 600` it)".to_owned()));
        }
        Self::parse(&text).map_err(wrong)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut all: Vec<(Role, String, Vec<u8>)> = Vec::new();
        let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.trim()));
        for (number, line) in lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [role, name, token] = words[..] else {
                return Err(format!("line {number} has {} words", words.len()));
            };
            let role = [Role::Viewer, Role::Operator].into_iter().find(|of| of.name() == role);
            let Some(role) = role else { return Err(format!("line {number} begins with no role")) };
            if token.len() < LETTERS_MIN {
                return Err(format!("the token of line {number} has {} letters", token.len()));
            }
            if all.iter().any(|(_, of, known)| of == name || known == token.as_bytes()) {
                return Err(format!("line {number} has a name or a token that another line has"));
            }
            all.push((role, name.to_owned(), token.as_bytes().to_vec()));
        }
        if all.is_empty() { Err("it has no token".to_owned()) } else { Ok(Self { all }) }
    }

    /// Whose token this is. It takes as long for any of its length.
    fn find(&self, token: &[u8]) -> Option<Caller> {
        let mut found = None;
        for (role, name, known) in &self.all {
            let differ = known.iter().zip(token).fold(0, |differ, (a, b)| differ | (a ^ b));
            if known.len() == token.len() && differ == 0 {
                found = Some(Caller { role: *role, name: Some(name.clone()) });
            }
        }
        found
    }
}

/// Why somebody is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No token, or one that nobody has.
    Unknown,
    /// Its role may not do this.
    Forbidden,
    /// There are no tokens, so that nobody may change anything.
    ReadOnly,
    /// A page of another site may be asking.
    Host,
}

/// Lets a request through. `here_only`: the server listens on loopback without TLS, so that a request by any other name than
/// this machine's comes from a page that plays tricks with its own.
pub fn check(
    tokens: Option<&Tokens>,
    here_only: bool,
    method: &Method,
    headers: &HeaderMap,
) -> Result<Caller, Refused> {
    if here_only && !headers.get(HOST).and_then(|host| host.to_str().ok()).is_some_and(is_here) {
        return Err(Refused::Host);
    }
    let changes = !matches!(*method, Method::GET | Method::HEAD);
    let Some(tokens) = tokens else {
        return if changes { Err(Refused::ReadOnly) } else { Ok(Caller { role: Role::Viewer, name: None }) };
    };
    let given = headers.get(AUTHORIZATION).map(|value| value.as_bytes());
    let token = given.and_then(|given| given.strip_prefix(b"Bearer "));
    let caller = token.and_then(|token| tokens.find(token)).ok_or(Refused::Unknown)?;
    if changes && caller.role < Role::Operator { Err(Refused::Forbidden) } else { Ok(caller) }
}

/// Whether a `Host` names this machine: `localhost` or an address, with a port or without.
fn is_here(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || bare.parse::<std::net::IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# who\n\nviewer prometheus aaaaaaaaaaaaaaaaaaaa\noperator ann bbbbbbbbbbbbbbbbbbbb\n";

    fn headers(host: &str, token: Option<&str>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(HOST, host.parse().unwrap());
        if let Some(token) = token {
            headers.insert(AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
        }
        headers
    }

    #[test]
    fn a_role_may_what_it_may() {
        let tokens = Tokens::parse(FILE).unwrap();
        let (viewer, operator) = ("aaaaaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbbbbbb");
        let ask = |tokens, method, token| {
            check(tokens, false, &method, &headers("any.where", token)).map(|caller| caller.role)
        };
        let known = Some(&tokens);
        for (tokens, method, token, expected) in [
            (None, Method::GET, None, Ok(Role::Viewer)),
            (None, Method::POST, Some(operator), Err(Refused::ReadOnly)),
            (known, Method::GET, None, Err(Refused::Unknown)),
            (known, Method::GET, Some("aaaaaaaaaaaaaaaaaaab"), Err(Refused::Unknown)),
            (known, Method::GET, Some("aaaaaaaaaaaaaaaaaaa"), Err(Refused::Unknown)),
            (known, Method::GET, Some(""), Err(Refused::Unknown)),
            (known, Method::GET, Some(viewer), Ok(Role::Viewer)),
            (known, Method::POST, Some(viewer), Err(Refused::Forbidden)),
            (known, Method::POST, Some(operator), Ok(Role::Operator)),
            (known, Method::DELETE, None, Err(Refused::Unknown)),
        ] {
            assert_eq!(ask(tokens, method.clone(), token), expected, "{method} {token:?}");
        }
        assert_eq!(format!("{tokens:?}"), "2 tokens");
    }

    #[test]
    fn on_loopback_a_page_of_another_site_is_refused() {
        let ask = |host| check(None, true, &Method::GET, &headers(host, None)).is_ok();
        for here in ["127.0.0.1:9100", "localhost:9100", "localhost", "[::1]:9100", "127.0.0.1"] {
            assert!(ask(here), "{here}");
        }
        for there in ["evil.example:9100", "localhost.evil.example", "evil.example", "", ":9100"] {
            assert!(!ask(there), "{there}");
        }
        assert_eq!(check(None, true, &Method::GET, &HeaderMap::new()), Err(Refused::Host));
    }

    #[test]
    fn a_file_that_is_wrong_is_told_of_without_its_tokens() {
        for (text, fact) in [
            ("", "it has no token"),
            ("viewer x", "line 1 has 2 words"),
            ("\nadmin x secretsecretsecret", "line 2 begins with no role"),
            ("viewer x secret", "the token of line 1 has 6 letters"),
            ("viewer x secretsecretsecret\noperator x othersecretsecret", "line 2 has a name or a token"),
            ("viewer x secretsecretsecret\noperator y secretsecretsecret", "line 2 has a name or a token"),
        ] {
            let told = Tokens::parse(text).unwrap_err();
            assert!(told.starts_with(fact) && !told.contains("secret"), "{text}: {told}");
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        std::fs::write(&path, FILE).unwrap();
        let mode = |mode| {
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap()
        };
        mode(0o644);
        let told = Tokens::read(&path).unwrap_err().to_string();
        assert!(told.contains("others may read it") && told.contains("ROLE NAME TOKEN"), "{told}");
        mode(0o600);
        assert!(Tokens::read(&path).is_ok());
        assert!(Tokens::read(&folder.path().join("none")).is_err());
    }
}

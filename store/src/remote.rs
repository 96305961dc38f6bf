//! Stores behind a network: which server a URL means, whose credentials are used, and how long anything may take.
//!
//! | scheme | credentials and endpoint |
//! |---|---|
//! | `s3://BUCKET/PREFIX` | `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`, …; else those of the machine |
//! | `gs://BUCKET/PREFIX` | `GOOGLE_APPLICATION_CREDENTIALS`, `GOOGLE_BASE_URL`, …; else those of the machine |
//! | `az://CONTAINER/PREFIX` | `AZURE_STORAGE_ACCOUNT_NAME`, `AZURE_STORAGE_ACCOUNT_KEY`, `AZURE_ENDPOINT`, …; else those of the machine |
//! | `memory://` | none: it is empty each time that it is opened, and gone with whoever opened it |
//!
//! Only variables that begin with the cloud's own prefix count: others (`TIMEOUT`, `TOKEN`) belong to somebody else. With it
//! they set what is not set here, as `AWS_READ_TIMEOUT=10s` or `AWS_CHECKSUM_ALGORITHM=sha256`.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, Checksum};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, Error, ObjectStore, ObjectStoreScheme, RetryConfig};
use url::Url;

/// Time to connect.
const CONNECT: Duration = Duration::from_secs(5);
/// Time without a byte of an answer.
const STALL: Duration = Duration::from_secs(30);
/// Time of one request with its body: at least 70 KB/s, since no request carries more than 8 MiB but a `put` of up to 16.
const REQUEST: Duration = Duration::from_secs(120);
/// Attempts after the first, and the time after which there is no further one: about half a minute of pauses.
const RETRIES: (usize, Duration) = (15, Duration::from_secs(60));
/// Pauses between attempts, from the first to the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// A store behind a network.
pub(crate) struct Remote {
    /// Tries again by itself what may be tried again.
    pub patient: Arc<dyn ObjectStore>,
    /// Tries once: a put-if-absent whose answer was lost must not be taken for somebody else's object.
    pub once: Arc<dyn ObjectStore>,
    pub prefix: Path,
}

/// The store that `url` means, with the process's environment; the error is in words.
pub(crate) fn open(url: &str) -> Result<Remote, String> {
    let parsed = Url::parse(url).map_err(|cause| cause.to_string())?;
    let known = "give s3://, gs://, az://, file:// or memory://, or the path of a folder";
    let (scheme, path) = ObjectStoreScheme::parse(&parsed)
        .map_err(|_| format!("{}:// is no store that is known here; {known}", parsed.scheme()))?;
    let prefix = Path::parse(path).map_err(|cause| cause.to_string())?;
    // Several parts of the process may ask for it; the first one's stays, and all ask for the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (retries, within) = RETRIES;
    let patient = build(&scheme, url, retries, within);
    let once = build(&scheme, url, 0, Duration::ZERO);
    match (patient, once) {
        (Ok(Some(patient)), Ok(Some(once))) => Ok(Remote { patient, once, prefix }),
        (Err(cause), _) | (_, Err(cause)) => Err(cause.to_string()),
        _ if scheme == ObjectStoreScheme::Memory => {
            let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            Ok(Remote { patient: memory.clone(), once: memory, prefix })
        }
        _ => Err(format!("{}:// can only be read elsewhere; {known}", parsed.scheme())),
    }
}

/// `None`: no cloud's scheme.
fn build(
    scheme: &ObjectStoreScheme,
    url: &str,
    max_retries: usize,
    retry_timeout: Duration,
) -> Result<Option<Arc<dyn ObjectStore>>, Error> {
    let (init_backoff, max_backoff) = BACKOFF;
    let backoff = BackoffConfig { init_backoff, max_backoff, base: 2.0 };
    let retry = RetryConfig { backoff, max_retries, retry_timeout };
    let client =
        ClientOptions::new().with_connect_timeout(CONNECT).with_read_timeout(STALL).with_timeout(REQUEST);
    Ok(Some(match scheme {
        ObjectStoreScheme::AmazonS3 => {
            let variables = variables("AWS_");
            let client = client.with_allow_http(is_plain(&variables));
            let builder = AmazonS3Builder::new().with_client_options(client).with_retry(retry);
            // S3 itself checks what arrives against it and keeps it with the object. Other servers may not know it, but check
            // the SHA-256 of each body that is signed with the request.
            let elsewhere = variables.iter().any(|(name, _)| name.starts_with("aws_endpoint"));
            let builder = if elsewhere { builder } else { builder.with_checksum_algorithm(Checksum::SHA256) };
            let builder = variables.into_iter().fold(builder, |builder, (name, value)| match name.parse() {
                Ok(key) => builder.with_config(key, value),
                Err(_) => builder,
            });
            Arc::new(builder.with_url(url).build()?)
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            let variables = variables("GOOGLE_");
            let client = client.with_allow_http(is_plain(&variables));
            let builder = GoogleCloudStorageBuilder::new().with_client_options(client).with_retry(retry);
            let builder = variables.into_iter().fold(builder, |builder, (name, value)| match name.parse() {
                Ok(key) => builder.with_config(key, value),
                Err(_) => builder,
            });
            Arc::new(builder.with_url(url).build()?)
        }
        ObjectStoreScheme::MicrosoftAzure => {
            let variables = variables("AZURE_");
            let client = client.with_allow_http(is_plain(&variables));
            let builder = MicrosoftAzureBuilder::new().with_client_options(client).with_retry(retry);
            // Where a machine of Azure tells its services who they are: the one name without the prefix.
            let builder = match std::env::var("IDENTITY_ENDPOINT") {
                Ok(endpoint) => builder.with_msi_endpoint(endpoint),
                Err(_) => builder,
            };
            let builder = variables.into_iter().fold(builder, |builder, (name, value)| match name.parse() {
                Ok(key) => builder.with_config(key, value),
                Err(_) => builder,
            });
            Arc::new(builder.with_url(url).build()?)
        }
        _ => return Ok(None),
    }))
}

/// The variables of the process that begin with `prefix`, their names in lower case.
fn variables(prefix: &str) -> Vec<(String, String)> {
    let all = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let ours = all.filter(|(name, _)| name.starts_with(prefix));
    ours.map(|(name, value)| (name.to_ascii_lowercase(), value)).collect()
}

/// Whether a variable that names the server's address does so with `http://`: whoever writes that means it.
fn is_plain(variables: &[(String, String)]) -> bool {
    let names = ["endpoint", "base_url"];
    let of_address = |name: &str| names.iter().any(|part| name.contains(part));
    variables.iter().any(|(name, value)| of_address(name) && value.starts_with("http://"))
}

/// What to do about an error of the store at `place`, when more can be said than to try again.
pub(crate) fn remedy(place: &str, error: &Error) -> Option<String> {
    let scheme = place.split_once("://")?.0;
    let (credentials, endpoint): (&[&str], &str) = match scheme {
        "s3" | "s3a" => (&["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"], "AWS_ENDPOINT_URL and AWS_REGION"),
        "gs" => (&["GOOGLE_APPLICATION_CREDENTIALS"], "GOOGLE_BASE_URL"),
        "az" | "azure" | "adl" | "abfs" | "abfss" => {
            (&["AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"], "AZURE_ENDPOINT")
        }
        _ => return None,
    };
    let missing: Vec<&str> =
        credentials.iter().copied().filter(|name| std::env::var_os(name).is_none()).collect();
    match error {
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } if missing.is_empty() => {
            Some(format!("{} are set; check that they may read and write there", credentials.join(" and ")))
        }
        Error::NotFound { .. } if error.to_string().contains("NoSuchBucket") => {
            Some("make the bucket first, or give another".to_owned())
        }
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } | Error::Generic { .. }
            if !missing.is_empty() =>
        {
            Some(format!("set {}, unless the machine has credentials of its own", missing.join(" and ")))
        }
        Error::Generic { .. } => Some(format!("check that the server can be reached, and {endpoint}")),
        _ => None,
    }
}

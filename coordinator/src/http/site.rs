//! A server's whole: what it shows, whom it lets in, and how it says no.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anello_proto::jobs::JobName;
use anello_store::{Store, metrics};
use axum::body::Body;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE,
};
use axum::http::{Method, Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use tokio::sync::Semaphore;
use tower::ServiceExt;

use super::door::Limits;
use super::guard::{self, Caller, Refused, Tokens};
use super::history::History;
use super::keeper::Keeper;
use super::{actions, openapi, page, routes, stream, words};
use crate::rate::{Kind, Limiter, TooOften, seconds};
use crate::registry::Refusal;
use crate::telemetry::{Board, Scrape};

/// What a server shows.
#[derive(Clone, Debug)]
pub struct Site {
    shared: Arc<Shared>,
    router: Router,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub board: Board,
    pub keeper: Option<Keeper>,
    pub tokens: Option<Tokens>,
    pub scrape: Scrape,
    pub limits: Limits,
    limiter: Limiter,
    pub streams: Arc<Semaphore>,
    here_only: bool,
    histories: Mutex<BTreeMap<String, Kept>>,
}

pub(super) type App = Arc<Shared>;

/// A run's figures in memory, while somebody looks at them.
#[derive(Clone, Debug)]
struct Kept {
    history: Arc<Mutex<History>>,
    used: Instant,
}

/// Runs whose figures are in memory at one moment.
const HISTORIES: usize = 4;
/// How long they stay when nobody asks.
const HISTORY_STAYS: Duration = Duration::from_secs(600);

impl Site {
    /// Metrics alone: for a worker.
    ///
    /// # Errors
    /// None with a board of ours.
    pub fn metrics(board: Board, tokens: Option<Tokens>) -> prometheus::Result<Self> {
        Self::new(board, None, tokens)
    }

    /// Metrics, the interface and the page.
    ///
    /// # Errors
    /// None with a board of ours.
    pub fn whole(board: Board, keeper: Keeper, tokens: Option<Tokens>) -> prometheus::Result<Self> {
        Self::new(board, Some(keeper), tokens)
    }

    fn new(board: Board, keeper: Option<Keeper>, tokens: Option<Tokens>) -> prometheus::Result<Self> {
        let scrape = Scrape::of(&board)?;
        let limits = Limits::default();
        let streams = Arc::new(Semaphore::new(limits.streams));
        let histories = Mutex::default();
        let limiter = Limiter::new(limits.rates);
        let shared =
            Shared { board, keeper, tokens, scrape, limits, limiter, streams, here_only: false, histories };
        Ok(Self::with(shared))
    }

    fn with(shared: Shared) -> Self {
        let shared = Arc::new(shared);
        let mut router = Router::new()
            .route("/metrics", get(routes::scrape))
            .route("/healthz", get(routes::health))
            .route("/readyz", get(routes::ready));
        if shared.keeper.is_some() {
            router = router
                .route("/", get(page::index))
                .route("/app.css", get(page::style))
                .route("/app.js", get(page::script))
                .route("/charts.js", get(page::charts))
                .route("/api/v1/openapi.json", get(openapi::answer))
                .route("/api/v1/jobs", get(routes::jobs))
                .route("/api/v1/jobs/{name}", get(routes::job))
                .route("/api/v1/jobs/{name}/metrics", get(routes::figures))
                .route("/api/v1/jobs/{name}/events", get(routes::log))
                .route("/api/v1/jobs/{name}/config", get(routes::config))
                .route("/api/v1/jobs/{name}/stream", get(stream::follow))
                .route("/api/v1/jobs/{name}/{action}", post(actions::act));
        }
        let router = router.fallback(|| async { problem(StatusCode::NOT_FOUND, "there is nothing here") });
        Self { router: router.with_state(shared.clone()), shared }
    }

    /// With these limits; `here_only`: it listens on loopback without TLS.
    pub(super) fn bounded(self, limits: Limits, here_only: bool) -> Self {
        let Shared { board, keeper, tokens, scrape, .. } = &*self.shared;
        Self::with(Shared {
            board: board.clone(),
            keeper: keeper.clone(),
            tokens: tokens.clone(),
            scrape: scrape.clone(),
            limits,
            limiter: Limiter::new(limits.rates),
            streams: Arc::new(Semaphore::new(limits.streams)),
            here_only,
            histories: Mutex::default(),
        })
    }

    pub(super) fn has_tokens(&self) -> bool {
        self.shared.tokens.is_some()
    }

    /// Who asks, unless it is to be refused.
    fn admit(&self, request: &Request<Body>, from: SocketAddr) -> Result<Caller, No> {
        let (method, path) = (request.method(), request.uri().path());
        // A probe that is refused would end the process that it is to look after.
        let probe = matches!(path, "/healthz" | "/readyz");
        let kind = if matches!(*method, Method::GET | Method::HEAD) { Kind::Read } else { Kind::Change };
        if !probe {
            // First of all: a token cannot be guessed any faster than that.
            self.shared.limiter.admit(from.ip(), kind).map_err(|refused| too_often(&refused))?;
        }
        let open = probe || matches!(path, "/" | "/app.css" | "/app.js" | "/charts.js");
        let tokens = if open { None } else { self.shared.tokens.as_ref() };
        guard::check(tokens, self.shared.here_only, method, request.headers()).map_err(refusal_of)
    }

    /// The answer to a request that came from `from`.
    pub(super) async fn answer(&self, request: Request<hyper::body::Incoming>, from: SocketAddr) -> Response {
        let mut request = request.map(Body::new);
        let mut response = match self.admit(&request, from) {
            Ok(caller) => {
                request.extensions_mut().insert(caller);
                request.extensions_mut().insert(from);
                match self.router.clone().oneshot(request).await {
                    Ok(response) => response,
                    Err(never) => match never {},
                }
            }
            Err(refused) => refused.into_response(),
        };
        let headers = response.headers_mut();
        let fixed = HeaderValue::from_static;
        headers.insert(CONTENT_SECURITY_POLICY, fixed(page::POLICY));
        headers.insert(HeaderName::from_static("x-content-type-options"), fixed("nosniff"));
        headers.insert(HeaderName::from_static("referrer-policy"), fixed("no-referrer"));
        headers.entry(CACHE_CONTROL).or_insert(fixed("no-store"));
        response
    }
}

fn too_often(refused: &TooOften) -> No {
    let mut response = problem(StatusCode::TOO_MANY_REQUESTS, refused.to_string());
    response.0.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds(refused.again)));
    response
}

fn refusal_of(refused: Refused) -> No {
    match refused {
        Refused::Unknown => {
            let mut response =
                problem(StatusCode::UNAUTHORIZED, "give a token of the coordinator's --token file");
            response.0.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            response
        }
        Refused::Forbidden => {
            problem(StatusCode::FORBIDDEN, "this is for operators, and the token is a viewer's")
        }
        Refused::ReadOnly => problem(
            StatusCode::FORBIDDEN,
            "without tokens this server only reads; start it with --token FILE, or use the anello command",
        ),
        Refused::Host => problem(
            StatusCode::FORBIDDEN,
            "ask for this server as localhost or by its address, not by another name",
        ),
    }
}

/// An answer that says what is wrong, on its way out.
#[derive(Debug)]
pub(super) struct No(Box<Response>);

impl IntoResponse for No {
    fn into_response(self) -> Response {
        *self.0
    }
}

/// An answer that says what is wrong.
pub(super) fn problem(status: StatusCode, error: impl Into<String>) -> No {
    No(Box::new((status, Json(words::Problem { error: error.into() })).into_response()))
}

pub(super) fn refusal(refusal: &Refusal) -> No {
    let status = match refusal {
        Refusal::NoSuchJob { .. } => StatusCode::NOT_FOUND,
        Refusal::Taken { .. } | Refusal::Over { .. } => StatusCode::CONFLICT,
        Refusal::Invalid(_) => StatusCode::BAD_REQUEST,
        Refusal::Store(_) | Refusal::Ending(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    problem(status, refusal.to_string())
}

pub(super) fn name_of(text: &str) -> Result<JobName, No> {
    JobName::new(text).ok_or_else(|| problem(StatusCode::BAD_REQUEST, "this is no name of a job"))
}

impl Shared {
    /// Who keeps the jobs: there are no routes to any without one.
    pub fn keeper(&self) -> &Keeper {
        self.keeper.as_ref().expect("these routes are there with a keeper alone")
    }

    /// The run folder of a job.
    pub fn run_of(&self, name: &JobName) -> Result<String, No> {
        self.board.with(name.as_str(), |figures| figures.run.clone()).ok_or_else(|| {
            problem(
                StatusCode::NOT_FOUND,
                format!("there is no job {name}; /api/v1/jobs lists those that there are"),
            )
        })
    }

    /// Reads from the run folder, on a thread that may block.
    pub async fn read<T: Send + 'static>(
        &self,
        name: &JobName,
        read: impl FnOnce(&Store) -> anello_store::Result<T> + Send + 'static,
    ) -> Result<T, No> {
        let run = self.run_of(name)?;
        let done =
            tokio::task::spawn_blocking(move || Store::open(&run).and_then(|store| read(&store))).await;
        match done {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(refusal(&Refusal::Store(error))),
            Err(_) => {
                Err(problem(StatusCode::INTERNAL_SERVER_ERROR, "reading broke off; report this as a bug"))
            }
        }
    }

    /// All rows of a job: read once, then followed by what the board hears.
    pub async fn history(&self, name: &JobName) -> Result<Arc<Mutex<History>>, No> {
        let kept = {
            let mut histories = self.histories.lock().unwrap_or_else(PoisonError::into_inner);
            histories.retain(|_, kept| kept.used.elapsed() < HISTORY_STAYS);
            let known = histories.contains_key(name.as_str());
            if !known && histories.len() >= HISTORIES {
                let oldest = histories.iter().min_by_key(|(_, kept)| kept.used).map(|(name, _)| name.clone());
                oldest.into_iter().for_each(|name| drop(histories.remove(&name)));
            }
            let kept = histories
                .entry(name.to_string())
                .or_insert_with(|| Kept { history: Arc::default(), used: Instant::now() });
            kept.used = Instant::now();
            kept.history.clone()
        };
        let recent =
            self.board.with(name.as_str(), |figures| figures.recent.iter().cloned().collect::<Vec<_>>());
        let filling = kept.clone();
        self.read(name, move |store| {
            // One reads; whoever asks meanwhile waits for it.
            let mut history = filling.lock().unwrap_or_else(PoisonError::into_inner);
            let recent = recent.unwrap_or_default();
            let known = history.last();
            let follows =
                recent.first().is_some_and(|first| known.is_some_and(|known| first.step <= known + 1));
            if !follows {
                metrics::read_after(store, known, |row| history.push(&row))?;
            }
            let known = history.last();
            recent
                .iter()
                .filter(|row| known.is_none_or(|known| row.step > known))
                .for_each(|row| history.push(row));
            Ok(())
        })
        .await?;
        Ok(kept)
    }
}

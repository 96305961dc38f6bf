//! Which path is answered with what.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anello_configs::{RunConfig, Schedule};
use anello_proto::jobs::JobName;
use anello_store::words::where_it_runs;
use anello_store::{ENVIRONMENT, Environment, Store, checkpoint, events, metrics, read_config};
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, WWW_AUTHENTICATE,
};
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use tokio::sync::Semaphore;
use tower::ServiceExt;

use super::door::Limits;
use super::guard::{self, Caller, Refused, Role, Tokens};
use super::history::History;
use super::keeper::Keeper;
use super::{actions, openapi, page, stream, words};
use crate::registry::Refusal;
use crate::telemetry::{Board, Scrape, unix_ms};

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
/// Points that are asked for at most, and unless something is said.
const POINTS: (usize, usize) = (4000, 800);
/// Records of the log in one answer, at most and unless something is said.
const RECORDS: (usize, usize) = (1000, 200);

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
        let shared = Shared { board, keeper, tokens, scrape, limits, streams, here_only: false, histories };
        Ok(Self::with(shared))
    }

    fn with(shared: Shared) -> Self {
        let shared = Arc::new(shared);
        let mut router = Router::new()
            .route("/metrics", get(scrape))
            .route("/healthz", get(health))
            .route("/readyz", get(ready));
        if shared.keeper.is_some() {
            router = router
                .route("/", get(page::index))
                .route("/app.css", get(page::style))
                .route("/app.js", get(page::script))
                .route("/charts.js", get(page::charts))
                .route("/api/v1/openapi.json", get(openapi::answer))
                .route("/api/v1/jobs", get(jobs))
                .route("/api/v1/jobs/{name}", get(job))
                .route("/api/v1/jobs/{name}/metrics", get(figures))
                .route("/api/v1/jobs/{name}/events", get(log))
                .route("/api/v1/jobs/{name}/config", get(config))
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
            streams: Arc::new(Semaphore::new(limits.streams)),
            here_only,
            histories: Mutex::default(),
        })
    }

    pub(super) fn has_tokens(&self) -> bool {
        self.shared.tokens.is_some()
    }

    /// The answer to a request that came from `from`.
    pub(super) async fn answer(&self, request: Request<hyper::body::Incoming>, from: SocketAddr) -> Response {
        let mut request = request.map(Body::new);
        let open = matches!(
            request.uri().path(),
            "/" | "/app.css" | "/app.js" | "/charts.js" | "/healthz" | "/readyz"
        );
        let tokens = if open { None } else { self.shared.tokens.as_ref() };
        let mut response =
            match guard::check(tokens, self.shared.here_only, request.method(), request.headers()) {
                Ok(caller) => {
                    request.extensions_mut().insert(caller);
                    request.extensions_mut().insert(from);
                    match self.router.clone().oneshot(request).await {
                        Ok(response) => response,
                        Err(never) => match never {},
                    }
                }
                Err(refused) => refusal_of(refused),
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

fn refusal_of(refused: Refused) -> Response {
    let response = match refused {
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
    };
    response.into_response()
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
    fn run_of(&self, name: &JobName) -> Result<String, No> {
        self.board.with(name.as_str(), |figures| figures.run.clone()).ok_or_else(|| {
            problem(
                StatusCode::NOT_FOUND,
                format!("there is no job {name}; /api/v1/jobs lists those that there are"),
            )
        })
    }

    /// Reads from the run folder, on a thread that may block.
    async fn read<T: Send + 'static>(
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
    async fn history(&self, name: &JobName) -> Result<Arc<Mutex<History>>, No> {
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

async fn scrape(State(app): State<App>) -> Response {
    match app.scrape.text() {
        Ok(text) => ([(CONTENT_TYPE, Scrape::CONTENT_TYPE)], text).into_response(),
        Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

fn well() -> Json<words::Health> {
    Json(words::Health { status: "ok".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() })
}

/// The process answers.
#[utoipa::path(get, path = "/healthz", responses((status = 200, description = "It is well", body = words::Health)))]
pub(super) async fn health() -> Json<words::Health> {
    well()
}

/// Whoever keeps the jobs answers too.
#[utoipa::path(
    get,
    path = "/readyz",
    responses(
        (status = 200, description = "It is ready", body = words::Health),
        (status = 503, description = "It is not, and why", body = words::Problem)
    )
)]
pub(super) async fn ready(State(app): State<App>) -> Response {
    const PATIENCE: Duration = Duration::from_secs(5);
    let Some(keeper) = &app.keeper else { return well().into_response() };
    match tokio::time::timeout(PATIENCE, keeper.list(&app.board)).await {
        Ok(Ok(_)) => well().into_response(),
        Ok(Err(why)) => refusal(&why).into_response(),
        Err(_) => problem(StatusCode::SERVICE_UNAVAILABLE, "the jobs' keeper does not answer now; ask again")
            .into_response(),
    }
}

/// All jobs, the oldest first.
#[utoipa::path(get, path = "/api/v1/jobs", responses((status = 200, description = "The jobs", body = words::Jobs)))]
pub(super) async fn jobs(State(app): State<App>, caller: axum::Extension<Caller>) -> Response {
    let role = match app.tokens.is_some() && app.keeper().takes_wishes() {
        true => caller.role,
        false => Role::Viewer,
    };
    match app.keeper().list(&app.board).await {
        Ok(jobs) => {
            let jobs = jobs.into_iter().map(words::Job::from).collect();
            Json(words::Jobs { jobs, role: role.name().to_owned() }).into_response()
        }
        Err(why) => refusal(&why).into_response(),
    }
}

/// What is known without the run folder; its checkpoints as the log tells of them.
pub(super) async fn detail(app: &App, name: &JobName) -> Result<words::JobDetail, Refusal> {
    let detail = app.keeper().describe(&app.board, name).await?;
    let known = app.board.with(name.as_str(), |figures| {
        let time = figures.goodput.as_ref().map(|goodput| goodput.at(unix_ms()).into());
        let checkpoints = figures.checkpoints.iter().map(|(step, logged)| words::Checkpoint {
            step: *step,
            unix_ms: Some(logged.unix_ms),
            weights: Some(logged.weights.clone()),
            kept: false,
        });
        (time, checkpoints.collect::<Vec<_>>(), figures.generation)
    });
    let (time, checkpoints, generation) = known.unwrap_or_default();
    Ok(words::JobDetail {
        job: detail.job.unwrap_or_default().into(),
        generation: detail.generation.or(generation),
        lanes: detail.lanes,
        workers: detail.workers.into_iter().map(words::Worker::from).collect(),
        checkpoints,
        time,
    })
}

/// All that there is to see of a job now.
#[utoipa::path(
    get,
    path = "/api/v1/jobs/{name}",
    params(("name" = String, Path, description = "The job's name")),
    responses(
        (status = 200, description = "The job", body = words::JobDetail),
        (status = 400, description = "What is asked for cannot be", body = words::Problem),
        (status = 404, description = "No job has this name", body = words::Problem)
    )
)]
pub(super) async fn job(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<words::JobDetail>, No> {
    let name = name_of(&name)?;
    let mut detail = detail(&app, &name).await.map_err(|why| refusal(&why))?;
    let kept = app.read(&name, checkpoint::steps).await?;
    let logged: BTreeMap<u64, words::Checkpoint> =
        detail.checkpoints.drain(..).map(|checkpoint| (checkpoint.step, checkpoint)).collect();
    let mut all: BTreeMap<u64, words::Checkpoint> = kept
        .iter()
        .map(|step| (*step, words::Checkpoint { step: *step, unix_ms: None, weights: None, kept: true }))
        .collect();
    for (step, checkpoint) in logged {
        let there = kept.binary_search(&step).is_ok();
        all.insert(step, words::Checkpoint { kept: there, ..checkpoint });
    }
    detail.checkpoints = all.into_values().collect();
    Ok(Json(detail))
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Range {
    /// The first step; absent: that of the run.
    from: Option<u64>,
    /// The step after the last; absent: all that there are.
    to: Option<u64>,
    /// Points at most, and one a stage: 1 to 4000; absent: 800.
    points: Option<usize>,
}

/// The figures of some steps, in few points that keep the extremes.
#[utoipa::path(
    get,
    path = "/api/v1/jobs/{name}/metrics",
    params(("name" = String, Path, description = "The job's name"), Range),
    responses(
        (status = 200, description = "The figures", body = words::Metrics),
        (status = 400, description = "What is asked for cannot be", body = words::Problem),
        (status = 404, description = "No job has this name", body = words::Problem)
    )
)]
pub(super) async fn figures(
    State(app): State<App>,
    Path(name): Path<String>,
    range: Result<Query<Range>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<words::Metrics>, No> {
    let Query(Range { from, to, points }) =
        range.map_err(|wrong| problem(StatusCode::BAD_REQUEST, wrong.body_text()))?;
    let (name, points) = (name_of(&name)?, points.unwrap_or(POINTS.1));
    if !(1..=POINTS.0).contains(&points) {
        return Err(problem(StatusCode::BAD_REQUEST, format!("ask for 1 to {} points", POINTS.0)));
    }
    let history = app.history(&name).await?;
    let thin = move || {
        let history = history.lock().unwrap_or_else(PoisonError::into_inner);
        history.thin(from.unwrap_or(0), to.unwrap_or(u64::MAX), points)
    };
    let thinned = tokio::task::spawn_blocking(thin).await;
    let broken = |_| problem(StatusCode::INTERNAL_SERVER_ERROR, "thinning broke off; report this as a bug");
    Ok(Json(thinned.map_err(broken)?.into()))
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct After {
    /// Number of the last record that is known; absent: so many as `limit` says are told, up to the last.
    after: Option<u64>,
    /// Records at most: 1 to 1000; absent: 200.
    limit: Option<usize>,
}

/// Records of the event log, in order.
#[utoipa::path(
    get,
    path = "/api/v1/jobs/{name}/events",
    params(("name" = String, Path, description = "The job's name"), After),
    responses(
        (status = 200, description = "The records", body = words::Events),
        (status = 400, description = "What is asked for cannot be", body = words::Problem),
        (status = 404, description = "No job has this name", body = words::Problem)
    )
)]
pub(super) async fn log(
    State(app): State<App>,
    Path(name): Path<String>,
    after: Result<Query<After>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<words::Events>, No> {
    let Query(After { after, limit }) =
        after.map_err(|wrong| problem(StatusCode::BAD_REQUEST, wrong.body_text()))?;
    let (name, limit) = (name_of(&name)?, limit.unwrap_or(RECORDS.1));
    if !(1..=RECORDS.0).contains(&limit) {
        return Err(problem(StatusCode::BAD_REQUEST, format!("ask for 1 to {} records", RECORDS.0)));
    }
    let read = move |store: &Store| {
        let after = match after {
            Some(after) => after,
            None => events::last_number(store)?.saturating_sub(limit as u64),
        };
        Ok((after, events::read_after(store, after, limit)?))
    };
    let (after, records) = app.read(&name, read).await?;
    let next = records.last().map_or(after, |record| record.number);
    Ok(Json(words::Events { events: records.iter().map(words::Event::from).collect(), next }))
}

/// What the job was submitted with, and where it began.
#[utoipa::path(
    get,
    path = "/api/v1/jobs/{name}/config",
    params(("name" = String, Path, description = "The job's name")),
    responses(
        (status = 200, description = "The config", body = words::Config),
        (status = 400, description = "What is asked for cannot be", body = words::Problem),
        (status = 404, description = "No job has this name", body = words::Problem)
    )
)]
pub(super) async fn config(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<words::Config>, No> {
    let name = name_of(&name)?;
    let read = |store: &Store| {
        let environment = store.get(ENVIRONMENT)?.and_then(|text| serde_json::from_slice(&text).ok());
        Ok((read_config(store)?, environment))
    };
    let (config, environment): (RunConfig, Option<Environment>) = app.read(&name, read).await?;
    let stages = Schedule::new(&config)
        .stages()
        .map(|(stage, span)| words::Stage {
            name: stage.name.as_str().to_owned(),
            first_step: span.first_step,
            steps: span.steps,
            tokens: span.tokens,
            tokens_before: span.tokens_before,
            loops: stage.loops,
            layers: span.layers,
            sequence: stage.sequence,
        })
        .collect();
    Ok(Json(words::Config {
        toml: config.to_toml(),
        digest: config.digest(),
        environment: environment.as_ref().map(where_it_runs),
        vocab: config.model.vocab,
        clip: config.optimizer.clip,
        stages,
    }))
}

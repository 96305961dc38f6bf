//! What is answered to whom reads.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Duration;

use anello_configs::{RunConfig, Schedule};
use anello_proto::jobs::JobName;
use anello_store::words::where_it_runs;
use anello_store::{ENVIRONMENT, Environment, Store, checkpoint, events, read_config};
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::guard::{Caller, Role};
use super::site::{App, No, name_of, problem, refusal};
use super::words;
use crate::registry::Refusal;
use crate::telemetry::{Scrape, unix_ms};

/// Points that are asked for at most, and unless something is said.
const POINTS: (usize, usize) = (4000, 800);
/// Records of the log in one answer, at most and unless something is said.
const RECORDS: (usize, usize) = (1000, 200);

pub(super) async fn scrape(State(app): State<App>) -> Response {
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
        let time = figures.shares(unix_ms()).map(Into::into);
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

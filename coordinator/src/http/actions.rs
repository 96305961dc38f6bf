//! What an operator may ask for. Each call leaves a line in the log, whatever comes of it.

use std::net::SocketAddr;

use anello_proto::jobs::WORKERS_MAX;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};

use super::guard::Caller;
use super::site::{App, No, name_of, problem, refusal};
use super::words;
use crate::registry::Wish;

/// Pauses, resumes, scales or cancels a job, or takes a checkpoint of it.
#[utoipa::path(
    post,
    path = "/api/v1/jobs/{name}/{action}",
    params(
        ("name" = String, Path, description = "The job's name"),
        ("action" = String, Path, description = "pause, resume, scale, cancel or checkpoint")
    ),
    request_body(content = Option<words::Scale>, description = "For scale alone"),
    responses(
        (status = 200, description = "The job, when its log holds the wish; a checkpoint is taken at its next step", body = words::Job),
        (status = 400, description = "What is asked for cannot be", body = words::Problem),
        (status = 401, description = "No token that is known", body = words::Problem),
        (status = 403, description = "The token is no operator's, or there are no tokens", body = words::Problem),
        (status = 404, description = "No job has this name", body = words::Problem),
        (status = 409, description = "The job is over", body = words::Problem)
    )
)]
pub(super) async fn act(
    State(app): State<App>,
    Path((name, action)): Path<(String, String)>,
    Extension(caller): Extension<Caller>,
    Extension(from): Extension<SocketAddr>,
    body: Body,
) -> Response {
    let response = obey(&app, &name, &action, body).await.unwrap_or_else(IntoResponse::into_response);
    let (who, outcome) = (caller.name.unwrap_or_default(), response.status().as_u16());
    tracing::info!(target: crate::AUDIT, who, role = caller.role.name(), %from, action, job = name, outcome, "asked over HTTP");
    response
}

async fn obey(app: &App, name: &str, action: &str, body: Body) -> Result<Response, No> {
    let name = name_of(name)?;
    let read = axum::body::to_bytes(body, app.limits.body_bytes);
    let body = match tokio::time::timeout(app.limits.body, read).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => {
            let most = app.limits.body_bytes;
            return Err(problem(StatusCode::PAYLOAD_TOO_LARGE, format!("a body has at most {most} bytes")));
        }
        Err(_) => return Err(problem(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")),
    };
    let keeper = app.keeper();
    let wish = match action {
        "checkpoint" => {
            let job = keeper.checkpoint(&name).await.map_err(|why| refusal(&why))?;
            return Ok(Json(words::Job::from(job)).into_response());
        }
        "pause" => Wish::Pause,
        "resume" => Wish::Resume,
        "cancel" => Wish::Cancel,
        "scale" => {
            let asked: words::Scale = serde_json::from_slice(&body).map_err(|wrong| {
                problem(StatusCode::BAD_REQUEST, format!("{wrong}; give {{\"workers\": N}}"))
            })?;
            if !(1..=WORKERS_MAX).contains(&asked.workers) {
                return Err(problem(StatusCode::BAD_REQUEST, format!("ask for 1 to {WORKERS_MAX} workers")));
            }
            Wish::Scale(asked.workers)
        }
        _ => {
            return Err(problem(
                StatusCode::NOT_FOUND,
                "there are pause, resume, scale, cancel and checkpoint",
            ));
        }
    };
    let job = keeper.want(&name, wish).await.map_err(|why| refusal(&why))?;
    Ok(Json(words::Job::from(job)).into_response())
}

//! What changes in a job, as server-sent events:
//!
//! ```text
//! job      the job's detail, when it is another (its checkpoints: those that the log tells of)
//! rows     figures of the steps since the last such event, in at most 60 points
//! record   a record of the log
//! ```

use std::convert::Infallible;
use std::time::Duration;

use anello_proto::jobs::JobName;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::history::History;
use super::routes::detail;
use super::site::{App, No, name_of, problem, refusal};
use super::words;

/// How often it is looked for what changed.
const EVERY: Duration = Duration::from_millis(500);
/// A word at least so often, so that whoever is between does not hang up.
const ALIVE: Duration = Duration::from_secs(10);
/// Events that may wait for a reader; a slower one is waited for.
const WAITING: usize = 8;
/// Points of one event.
const POINTS: usize = 60;

/// What changes in a job, as server-sent events: `job` (its detail), `rows` (figures of new steps) and `record` (of the log).
#[utoipa::path(
    get,
    path = "/api/v1/jobs/{name}/stream",
    params(("name" = String, Path, description = "The job's name")),
    responses(
        (status = 200, description = "Events, until the job is over", content_type = "text/event-stream", body = String),
        (status = 404, description = "No job has this name", body = words::Problem),
        (status = 503, description = "Too many read streams", body = words::Problem)
    )
)]
pub(super) async fn follow(State(app): State<App>, Path(name): Path<String>) -> Result<Response, No> {
    let name = name_of(&name)?;
    detail(&app, &name).await.map_err(|why| refusal(&why))?;
    let place = app.streams.clone().try_acquire_owned().map_err(|_| {
        problem(StatusCode::SERVICE_UNAVAILABLE, "too many read streams now; ask again later")
    })?;
    let (sender, stream) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        tell(app, name, sender).await;
        drop(place);
    });
    let body = Body::from_stream(ReceiverStream::new(stream));
    Ok(([(CONTENT_TYPE, "text/event-stream")], body).into_response())
}

type Sender = mpsc::Sender<Result<Bytes, Infallible>>;

async fn send(sender: &Sender, name: &str, value: &impl Serialize) -> bool {
    let Ok(json) = serde_json::to_string(value) else { return false };
    sender.send(Ok(Bytes::from(format!("event: {name}\ndata: {json}\n\n")))).await.is_ok()
}

async fn tell(app: App, name: JobName, sender: Sender) {
    let (mut shown, mut step, mut record) = (None, None, None);
    let mut said = tokio::time::Instant::now();
    loop {
        let Ok(now) = detail(&app, &name).await else { return };
        let over = now.job.over;
        // Time passes without anything else: that alone is no news.
        let compared = words::JobDetail { time: None, ..now.clone() };
        let is_news = shown.as_ref() != Some(&compared);
        if is_news {
            if !send(&sender, "job", &now).await {
                return;
            }
            shown = Some(compared);
        }
        let fresh = app.board.with(name.as_str(), |figures| {
            let mut history = History::default();
            // The first time there is nothing to go on from: the reader asks for what was before.
            let from = step.unwrap_or_else(|| figures.steps_done().unwrap_or(0));
            figures.recent.iter().filter(|row| row.step >= from).for_each(|row| history.push(row));
            let known = record.unwrap_or_else(|| figures.events.back().map_or(0, |last| last.number));
            let records: Vec<words::Event> =
                figures.events.iter().filter(|of| of.number > known).map(words::Event::from).collect();
            (history, figures.steps_done(), records, figures.events.back().map_or(known, |last| last.number))
        });
        if let Some((history, done, records, last)) = fresh {
            if !history.is_empty() {
                let rows = words::Metrics::from(history.thin(0, u64::MAX, POINTS));
                if !send(&sender, "rows", &rows).await {
                    return;
                }
            }
            step = Some(done.unwrap_or(0));
            for one in &records {
                if !send(&sender, "record", one).await {
                    return;
                }
            }
            record = Some(last);
            if is_news || !records.is_empty() || !history.is_empty() {
                said = tokio::time::Instant::now();
            }
        }
        if over {
            return;
        }
        if said.elapsed() >= ALIVE {
            said = tokio::time::Instant::now();
            if sender.send(Ok(Bytes::from_static(b": still here\n\n"))).await.is_err() {
                return;
            }
        }
        tokio::select! {
            () = sender.closed() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

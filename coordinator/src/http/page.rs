//! The page: four files that need nothing else.

use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};

/// What a browser may load: what comes from here, and nothing else.
pub(super) const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                                 base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What draws the charts of the page and of `anello report`: defines `anelloCharts`.
pub const CHARTS: &str = include_str!("page/charts.js");
/// How both look.
pub const STYLE: &str = include_str!("page/charts.css");

const INDEX: &str = include_str!("page/index.html");
const SCRIPT: &str = include_str!("page/app.js");
const APP_STYLE: &str = include_str!("page/app.css");

fn file(kind: &'static str, text: impl Into<String>) -> Response {
    // Asked for anew each time: another version must not be mixed with this one.
    ([(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-cache")], text.into()).into_response()
}

pub(super) async fn index() -> Response {
    file("text/html; charset=utf-8", INDEX)
}

pub(super) async fn style() -> Response {
    file("text/css; charset=utf-8", format!("{STYLE}{APP_STYLE}"))
}

pub(super) async fn script() -> Response {
    file("text/javascript; charset=utf-8", SCRIPT)
}

pub(super) async fn charts() -> Response {
    file("text/javascript; charset=utf-8", CHARTS)
}

//! The description of the interface, from the types that it answers with.

use axum::Json;
use utoipa::OpenApi;

use super::{actions, routes, stream};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Anello",
        description = "Jobs of a coordinator, and what is known of them. Everything reads, but the actions: those need an \
                       operator's token. A figure that is no number is null."
    ),
    paths(
        routes::jobs,
        routes::job,
        routes::figures,
        routes::log,
        routes::config,
        stream::follow,
        actions::act,
        routes::health,
        routes::ready
    )
)]
struct Description;

/// The description, OpenAPI.
pub fn description() -> utoipa::openapi::OpenApi {
    Description::openapi()
}

pub(super) async fn answer() -> Json<utoipa::openapi::OpenApi> {
    Json(description())
}

//! Answers requests.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tracing::error;

use super::{Inspect, tcp};
use crate::view::{DropsView, FlowFilter};

type Source = Arc<dyn Inspect>;

/// How long requests under way may take once the end has come.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// Serves the API until `shutdown` is done; requests under way are answered still, unless that takes
/// more than two seconds. The socket's file is the caller's to remove.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: UnixListener,
    inspect: Source,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<()> {
    let (end, mut ended) = watch::channel(false);
    let server = axum::serve(listener, router(inspect)).with_graceful_shutdown(async move {
        shutdown.await;
        end.send_replace(true);
    });
    let too_late = async {
        // An error says that the server is over, and then this is not polled any more.
        let _ = ended.wait_for(|ended| *ended).await;
        tokio::time::sleep(LAST_ANSWERS).await;
    };
    tokio::select! {
        served = server => served.context("serving the API"),
        () = too_late => Ok(()),
    }
}

fn router(inspect: Source) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/flows", get(flows))
        .route("/v1/drops", get(drops))
        .route("/healthz", get(alive))
        .route("/readyz", get(ready))
        .with_state(inspect)
}

/// Serves metrics and probes on a TCP port for as long as this is polled.
pub async fn serve_port(listener: TcpListener, inspect: Source) {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(alive))
        .route("/readyz", get(ready))
        .with_state(inspect);
    tcp::serve(listener, router).await;
}

/// What is answered in place of a view.
struct Failure(StatusCode, String);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, self.1).into_response()
    }
}

type Answer<T> = Result<Json<T>, Failure>;

/// Runs a question that may block, and answers with its result.
async fn ask<T: Serialize + Send + 'static>(
    inspect: Source,
    question: impl FnOnce(&dyn Inspect) -> Result<T> + Send + 'static,
) -> Result<T, Failure> {
    let failed = |error: anyhow::Error| {
        error!("a request to the API failed: {error:#}");
        Failure(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}"))
    };
    match tokio::task::spawn_blocking(move || question(inspect.as_ref())).await {
        Ok(answer) => answer.map_err(failed),
        Err(panic) => Err(failed(anyhow::Error::from(panic).context("reading the state"))),
    }
}

async fn status(State(inspect): State<Source>) -> Answer<crate::view::StatusView> {
    ask(inspect, |inspect| inspect.status()).await.map(Json)
}

async fn flows(
    State(inspect): State<Source>,
    filter: Result<Query<FlowFilter>, QueryRejection>,
) -> Answer<crate::view::FlowsView> {
    let bad = |message: String| Failure(StatusCode::BAD_REQUEST, message);
    let Query(filter) = filter.map_err(|rejection| bad(rejection.body_text()))?;
    // Before all the tables are read for nothing.
    filter.validate().map_err(bad)?;
    ask(inspect, move |inspect| filter.apply(inspect.flows()?).map_err(anyhow::Error::msg)).await.map(Json)
}

async fn drops(State(inspect): State<Source>) -> Answer<DropsView> {
    ask(inspect, |inspect| Ok(DropsView { drops: inspect.drops()? })).await.map(Json)
}

async fn metrics(State(inspect): State<Source>) -> Result<impl IntoResponse, Failure> {
    let (content_type, text) = ask(inspect, |inspect| inspect.metrics()).await?;
    Ok(([(header::CONTENT_TYPE, content_type)], text))
}

async fn alive(State(inspect): State<Source>) -> Result<&'static str, Failure> {
    match inspect.alive() {
        true => Ok("ok\n"),
        false => Err(Failure(StatusCode::SERVICE_UNAVAILABLE, "the agent is stuck\n".into())),
    }
}

async fn ready(State(inspect): State<Source>) -> Result<&'static str, Failure> {
    match ask(inspect, |inspect| Ok(inspect.ready())).await? {
        true => Ok("ready\n"),
        false => {
            Err(Failure(StatusCode::SERVICE_UNAVAILABLE, "not ready: the datapath is not in place\n".into()))
        }
    }
}

//! Asks a running agent.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::view::{DropsView, FlowFilter, FlowsView, StatusView};

/// An agent that reads all its maps takes less; one that is stuck is not waited for.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Bounds what a broken server can make us hold: a million flows take less.
const MAXIMUM_ANSWER: usize = 512 << 20;

/// An agent by its socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

impl Client {
    /// Names the agent; nothing is asked yet.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), timeout: TIMEOUT }
    }

    /// The agent's status; `None` when no agent listens.
    ///
    /// # Errors
    /// When somebody listens, but gives no good answer in time, or may not be asked.
    pub async fn status(&self) -> Result<Option<StatusView>> {
        self.get("/v1/status").await
    }

    /// The flows that match; `None` when no agent listens.
    ///
    /// # Errors
    /// As for [`Self::status`]; also when the filter cannot be understood.
    pub async fn flows(&self, filter: &FlowFilter) -> Result<Option<FlowsView>> {
        self.get(&with_query("/v1/flows", filter)?).await
    }

    /// The drops; `None` when no agent listens.
    ///
    /// # Errors
    /// As for [`Self::status`].
    pub async fn drops(&self) -> Result<Option<DropsView>> {
        self.get("/v1/drops").await
    }

    /// Waits no longer than this for an answer, in place of 15 seconds.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Asks for JSON.
    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>> {
        let asked = tokio::time::timeout(self.timeout, self.exchange(path)).await;
        let answer = asked
            .map_err(|_| anyhow!("no answer within {} s", self.timeout.as_secs_f32()))
            .and_then(|answer| answer)
            .with_context(|| format!("asking the agent on {} for {path}", self.socket.display()))?;
        let Some((status, body)) = answer else { return Ok(None) };
        if status != StatusCode::OK {
            bail!("the agent answers {status}: {}", String::from_utf8_lossy(&body).trim());
        }
        let view = serde_json::from_slice(&body).with_context(|| {
            format!("understanding the agent's answer to {path}; is the agent of another version?")
        })?;
        Ok(Some(view))
    }

    async fn exchange(&self, path: &str) -> Result<Option<(StatusCode, Bytes)>> {
        let stream = match UnixStream::connect(&self.socket).await {
            Ok(stream) => stream,
            Err(error) => {
                return match error.kind() {
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused => Ok(None),
                    ErrorKind::PermissionDenied => {
                        Err(error).context("its socket is for its user only (root)")
                    }
                    _ => Err(error.into()),
                };
            }
        };
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // Ends with this function, also when that is dropped because the time is up.
        let mut driver = tokio::task::JoinSet::new();
        driver.spawn(connection);
        let request = Request::get(path).header(header::HOST, "pointsman").body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAXIMUM_ANSWER).collect().await;
        Ok(Some((status, body.map_err(|error| anyhow!(error))?.to_bytes())))
    }
}

/// Appends fields that are set as a query.
fn with_query(path: &str, filter: &impl Serialize) -> Result<String> {
    let query = serde_urlencoded::to_string(filter)?;
    Ok(if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") })
}

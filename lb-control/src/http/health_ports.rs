//! Answers `healthCheckNodePort`s as kube-proxy does (pkg/proxy/healthcheck/service_health.go):
//! other load balancers ask there whether this node has endpoints of a Service.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::info;

use super::{Inspect, tcp};
use crate::model::{ObjectRef, Problem};

/// How often a port that is taken is tried again.
const RETRY: Duration = Duration::from_secs(60);
/// How long whoever has a port may take to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(1);
/// No more of an introduction is read; ours has about 150 bytes beside its head.
const INTRODUCTION_BYTES: u64 = 4_096;
/// Number of ready endpoints here, for load balancers that spread by it (as kube-proxy since 1.26).
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// What is asked at which port, and how many endpoints are ready here.
pub type Check = (u16, usize);

/// What is wrong with the ports.
pub struct HealthProblems(watch::Receiver<Vec<Problem>>);

impl HealthProblems {
    /// Waits until something else is wrong than before, and tells all that is.
    pub async fn next(&mut self) -> Vec<Problem> {
        match self.0.changed().await {
            Ok(()) => self.0.borrow_and_update().clone(),
            Err(_) => std::future::pending().await,
        }
    }
}

/// The ports, and who answers them. All are closed when this is dropped.
pub struct HealthPorts {
    changes: mpsc::UnboundedSender<(ObjectRef, Option<Check>)>,
    problems: watch::Receiver<Vec<Problem>>,
    task: JoinHandle<()>,
}

impl HealthPorts {
    /// No ports yet. `inspect` tells whether the agent is alive. Must be called within a tokio
    /// runtime.
    #[must_use]
    pub fn start(inspect: Arc<dyn Inspect>) -> Self {
        Self::with_retry(inspect, RETRY)
    }

    fn with_retry(inspect: Arc<dyn Inspect>, retry: Duration) -> Self {
        let (changes, incoming) = mpsc::unbounded_channel();
        let (outgoing, problems) = watch::channel(Vec::new());
        let ports = Ports { inspect, retry, services: BTreeMap::new(), retry_at: None };
        let task = tokio::spawn(ports.run(incoming, outgoing));
        Self { changes, problems, task }
    }

    /// What is answered for a Service from now on; `None` closes its port.
    pub fn answer(&self, service: &ObjectRef, check: Option<Check>) {
        // The other end goes with this one.
        let _ = self.changes.send((service.clone(), check));
    }

    /// What is wrong.
    #[must_use]
    pub fn problems(&self) -> HealthProblems {
        HealthProblems(self.problems.clone())
    }
}

impl Drop for HealthPorts {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One Service.
struct Entry {
    port: u16,
    /// Shared with the one who answers, who is not disturbed by a change.
    endpoints: watch::Sender<usize>,
    listening: Listening,
}

enum Listening {
    /// Until this is dropped.
    Here(Open),
    /// kube-proxy on this node answers the same.
    Elsewhere,
    /// Not at all; why.
    Not(String),
}

/// An open port; closed soon after it is dropped.
struct Open(JoinHandle<()>);

impl Open {
    /// Closes the port, and returns when it is free.
    async fn close(mut self) {
        self.0.abort();
        let _ = (&mut self.0).await;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Ports {
    inspect: Arc<dyn Inspect>,
    retry: Duration,
    services: BTreeMap<ObjectRef, Entry>,
    retry_at: Option<Instant>,
}

impl Ports {
    async fn run(
        mut self,
        mut changes: mpsc::UnboundedReceiver<(ObjectRef, Option<Check>)>,
        problems: watch::Sender<Vec<Problem>>,
    ) {
        loop {
            let retry = self.retry_at.unwrap_or_else(Instant::now);
            tokio::select! {
                change = changes.recv() => {
                    let Some((service, check)) = change else { return };
                    self.change(service, check).await;
                }
                () = sleep_until(retry), if self.retry_at.is_some() => self.try_again().await,
            }
            let now = self.problems();
            problems.send_if_modified(|before| {
                let differs = *before != now;
                *before = now;
                differs
            });
        }
    }

    async fn change(&mut self, service: ObjectRef, check: Option<Check>) {
        let same = |entry: &&Entry| check.is_some_and(|(port, _)| port == entry.port);
        if let (Some(entry), Some((_, endpoints))) = (self.services.get(&service).filter(same), check) {
            entry.endpoints.send_replace(endpoints);
            return;
        }
        let before = self.services.remove(&service);
        if let Some((port, endpoints)) = check {
            let endpoints = watch::Sender::new(endpoints);
            let listening = self.listen(&service, port, &endpoints).await;
            self.services.insert(service, Entry { port, endpoints, listening });
        }
        if let Some(Entry { listening: Listening::Here(open), .. }) = before {
            open.close().await;
            // Another Service may have waited for the port.
            return self.try_again().await;
        }
        self.plan_retry();
    }

    async fn try_again(&mut self) {
        let waiting =
            self.services.iter().filter(|(_, entry)| !matches!(entry.listening, Listening::Here(_)));
        let waiting: Vec<_> = waiting.map(|(service, _)| service.clone()).collect();
        for service in waiting {
            let Some(entry) = self.services.get(&service) else { continue };
            let listening = self.listen(&service, entry.port, &entry.endpoints).await;
            if let Some(entry) = self.services.get_mut(&service) {
                entry.listening = listening;
            }
        }
        self.retry_at = None;
        self.plan_retry();
    }

    fn plan_retry(&mut self) {
        let complete = self.services.values().all(|entry| matches!(entry.listening, Listening::Here(_)));
        self.retry_at = match (complete, self.retry_at) {
            (true, _) => None,
            (false, None) => Some(Instant::now() + self.retry),
            (false, at) => at,
        };
    }

    async fn listen(&self, service: &ObjectRef, port: u16, endpoints: &watch::Sender<usize>) -> Listening {
        let every = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let error = match tcp::listen(every) {
            Ok(listener) => {
                let answers = Answers {
                    service: service.clone(),
                    endpoints: endpoints.subscribe(),
                    inspect: Arc::clone(&self.inspect),
                };
                // As kube-proxy: whatever the path and method.
                let router = Router::new().fallback(answer).with_state(answers);
                return Listening::Here(Open(tokio::spawn(tcp::serve(listener, router))));
            }
            Err(error) => error,
        };
        if error.kind() != ErrorKind::AddrInUse {
            return Listening::Not(error.to_string());
        }
        let ours = self.services.iter().find(|(other, entry)| {
            *other != service && entry.port == port && matches!(entry.listening, Listening::Here(_))
        });
        if let Some((other, _)) = ours {
            return Listening::Not(format!("the Service {other} has the same one"));
        }
        if answers_for(port, service).await {
            let known = self.services.get(service).map(|entry| &entry.listening);
            if !matches!(known, Some(Listening::Elsewhere)) {
                info!("healthCheckNodePort {port} of {service} is answered by kube-proxy already");
            }
            return Listening::Elsewhere;
        }
        Listening::Not("another process on this node listens there".to_owned())
    }

    fn problems(&self) -> Vec<Problem> {
        let problem = |(service, entry): (&ObjectRef, &Entry)| {
            let Listening::Not(why) = &entry.listening else { return None };
            let text = format!(
                "health checks at port {} are not answered: {why}; it is tried again every {} s",
                entry.port,
                self.retry.as_secs()
            );
            Some(Problem::error(text).about("Service", service).field("spec.healthCheckNodePort"))
        };
        self.services.iter().filter_map(problem).collect()
    }
}

/// What the one who answers needs.
#[derive(Clone)]
struct Answers {
    service: ObjectRef,
    endpoints: watch::Receiver<usize>,
    inspect: Arc<dyn Inspect>,
}

async fn answer(State(answers): State<Answers>) -> Response {
    let endpoints = *answers.endpoints.borrow();
    let healthy = answers.inspect.alive();
    let status = match endpoints > 0 && healthy {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    let headers = [
        (header::CONTENT_TYPE, "application/json".to_owned()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (WEIGHT, endpoints.to_string()),
    ];
    let body = json!({
        "service": { "namespace": answers.service.namespace, "name": answers.service.name },
        "localEndpoints": endpoints,
        "serviceProxyHealthy": healthy,
    });
    (status, headers, format!("{body}\n")).into_response()
}

/// Whether somebody on this node answers a port as kube-proxy would for this Service.
async fn answers_for(port: u16, service: &ObjectRef) -> bool {
    let Ok(Ok(text)) = timeout(INTRODUCTION, introduction(port)).await else { return false };
    let Some((_, body)) = text.split_once("\r\n\r\n") else { return false };
    let Ok(body) = serde_json::from_str::<Value>(body) else { return false };
    let told = &body["service"];
    told["namespace"] == service.namespace.as_str()
        && told["name"] == service.name.as_str()
        && body["localEndpoints"].is_u64()
}

async fn introduction(port: u16) -> std::io::Result<String> {
    let mut stream = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(stream) => stream,
        Err(_) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await?,
    };
    // HTTP/1.0: the answer ends with the connection, and is in one piece.
    stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").await?;
    let mut text = String::new();
    stream.take(INTRODUCTION_BYTES).read_to_string(&mut text).await?;
    Ok(text)
}

#[cfg(test)]
mod tests;

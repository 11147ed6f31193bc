//! Client and server over a socket.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use lb_common::abi::{DropReason, DropStats};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::client::Client;
use super::{Inspect, bind, listen, serve, serve_port};
use crate::view::{DropView, FlowFilter, FlowView, ProblemView, StatusView, flow_for_tests as flow};

/// An agent with three flows.
#[derive(Default)]
struct Agent {
    ready: AtomicBool,
    broken: bool,
    stuck: bool,
}

impl Inspect for Agent {
    fn status(&self) -> Result<StatusView> {
        if self.broken {
            bail!("the map services cannot be read");
        }
        let problem = ProblemView { subject: "a.yaml".into(), message: "unknown field `x`".into() };
        Ok(StatusView { problems: vec![problem], ..StatusView::default() })
    }

    fn flows(&self) -> Result<Vec<FlowView>> {
        Ok(vec![
            flow("198.51.100.1:1000", "10.0.0.2:8080", "default/web", "established"),
            flow("[2001:db8::1]:1000", "[2001:db8:1::2]:80", "default/web", "time-wait"),
            flow("198.51.100.2:1000", "10.0.0.3:8080", "default/api", "established"),
        ])
    }

    fn drops(&self) -> Result<Vec<DropView>> {
        assert!(!self.broken, "a bug");
        Ok(vec![DropView::new(DropReason::NoFlow, DropStats { packets: 7, bytes: 420 })])
    }

    fn ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    fn alive(&self) -> bool {
        !self.stuck
    }

    fn metrics(&self) -> Result<(&'static str, String)> {
        if self.broken {
            bail!("the map drops cannot be read");
        }
        Ok(("text/example", "pointsman_ready 1\n".to_owned()))
    }
}

/// What the TCP port answers.
async fn at_port(agent: &Arc<Agent>, path: &str) -> String {
    let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(serve_port(listener, Arc::clone(agent) as Arc<dyn Inspect>));
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    server.abort();
    text
}

#[tokio::test]
async fn the_tcp_port_has_metrics_and_probes_and_nothing_else() {
    let agent = Arc::new(Agent::default());
    let text = at_port(&agent, "/metrics").await;
    assert!(text.starts_with("HTTP/1.0 200") && text.ends_with("\r\n\r\npointsman_ready 1\n"), "{text}");
    assert!(text.contains("content-type: text/example\r\n"), "{text}");
    assert!(at_port(&agent, "/healthz").await.starts_with("HTTP/1.0 200"));
    assert!(at_port(&agent, "/readyz").await.starts_with("HTTP/1.0 503"));
    agent.ready.store(true, Ordering::Relaxed);
    assert!(at_port(&agent, "/readyz").await.starts_with("HTTP/1.0 200"));
    // Whom clients talk to is not for everybody who reaches the port.
    for path in ["/v1/status", "/v1/flows", "/v1/drops"] {
        assert!(at_port(&agent, path).await.starts_with("HTTP/1.0 404"), "{path}");
    }
    let broken = Arc::new(Agent { broken: true, ..Agent::default() });
    let stuck = Arc::new(Agent { stuck: true, ..Agent::default() });
    assert!(at_port(&stuck, "/healthz").await.starts_with("HTTP/1.0 503"));
    let text = at_port(&broken, "/metrics").await;
    assert!(text.starts_with("HTTP/1.0 500") && text.contains("the map drops"), "{text}");
}

/// A server until it is dropped.
struct Running {
    agent: Arc<Agent>,
    path: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    server: JoinHandle<Result<()>>,
    _directory: tempfile::TempDir,
}

fn start(agent: Agent) -> Running {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    let (stop, stopped) = oneshot::channel();
    let agent = Arc::new(agent);
    let shutdown = async { drop(stopped.await) };
    let server = tokio::spawn(serve(bind(&path).unwrap(), agent.clone(), shutdown));
    Running { agent, path, stop: Some(stop), server, _directory: directory }
}

/// Status code and text of an answer to a plain request.
async fn raw(running: &Running, path: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(&running.path).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[tokio::test]
async fn views_come_back_as_they_were() {
    let running = start(Agent::default());
    let client = Client::new(&running.path);
    assert_eq!(client.status().await.unwrap(), Some(running.agent.status().unwrap()));
    assert_eq!(client.drops().await.unwrap().unwrap().drops, running.agent.drops().unwrap());
    let flows = client.flows(&FlowFilter::default()).await.unwrap().unwrap();
    assert_eq!(flows.flows, running.agent.flows().unwrap());
}

#[tokio::test]
async fn filters_reach_the_server() {
    let running = start(Agent::default());
    let client = Client::new(&running.path);
    let filter = FlowFilter {
        service: Some("default/web".into()),
        client: Some("[2001:db8::1]:1000".into()),
        limit: Some(5),
        ..FlowFilter::default()
    };
    let flows = client.flows(&filter).await.unwrap().unwrap();
    assert_eq!((flows.matching, flows.total), (1, 3));
    assert_eq!(flows.flows[0].state, "time-wait");
}

#[tokio::test]
async fn bad_filters_are_explained() {
    let running = start(Agent::default());
    let client = Client::new(&running.path);
    let filter = FlowFilter { state: Some("open".into()), ..FlowFilter::default() };
    let error = format!("{:#}", client.flows(&filter).await.unwrap_err());
    assert!(error.contains("400") && error.contains("state `open` is not one of syn-sent"), "{error}");
    for (query, named) in [("servise=default/web", "servise"), ("limit=many", "limit")] {
        let (status, text) = raw(&running, &format!("/v1/flows?{query}")).await;
        assert_eq!(status, 400, "{query}: {text}");
        assert!(text.contains(named), "{query}: {text}");
    }
}

#[tokio::test]
async fn probes() {
    let running = start(Agent::default());
    assert_eq!(raw(&running, "/healthz").await, (200, "ok\n".into()));
    assert_eq!(raw(&running, "/readyz").await.0, 503);
    running.agent.ready.store(true, Ordering::Relaxed);
    assert_eq!(raw(&running, "/readyz").await, (200, "ready\n".into()));
    assert_eq!(raw(&running, "/v2/status").await.0, 404);
}

#[tokio::test]
async fn what_fails_is_named_and_the_server_goes_on() {
    let running = start(Agent { broken: true, ..Agent::default() });
    let client = Client::new(&running.path);
    let error = format!("{:#}", client.status().await.unwrap_err());
    assert!(error.contains("500") && error.contains("the map services cannot be read"), "{error}");
    // A panic in a question is an answer as well.
    let error = format!("{:#}", client.drops().await.unwrap_err());
    assert!(error.contains("reading the state"), "{error}");
    assert_eq!(raw(&running, "/healthz").await.0, 200);
}

#[tokio::test]
async fn nobody_is_no_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    assert_eq!(Client::new(&path).status().await.unwrap(), None);
    drop(bind(&path).unwrap());
    assert_eq!(Client::new(&path).status().await.unwrap(), None);
}

#[tokio::test]
async fn an_agent_that_is_stuck_is_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    let _silent = UnixListener::bind(&path).unwrap();
    let client = Client::new(&path).with_timeout(Duration::from_millis(50));
    let error = format!("{:#}", client.status().await.unwrap_err());
    assert!(error.contains("agent.sock") && error.contains("no answer within 0.05 s"), "{error}");
}

#[tokio::test]
async fn shutdown_ends_the_server() {
    let mut running = start(Agent::default());
    assert!(Client::new(&running.path).status().await.unwrap().is_some());
    running.stop.take().unwrap().send(()).unwrap();
    running.server.await.unwrap().unwrap();
    assert_eq!(Client::new(&running.path).status().await.unwrap(), None);
}

use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;

use super::*;
use crate::view::{DropView, FlowView, StatusView};

/// An agent that is alive or not.
struct Agent(AtomicBool);

impl Inspect for Agent {
    fn status(&self) -> Result<StatusView> {
        Ok(StatusView::default())
    }

    fn flows(&self) -> Result<Vec<FlowView>> {
        Ok(Vec::new())
    }

    fn drops(&self) -> Result<Vec<DropView>> {
        Ok(Vec::new())
    }

    fn ready(&self) -> bool {
        true
    }

    fn alive(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

fn agent() -> Arc<Agent> {
    Arc::new(Agent(true.into()))
}

/// A port that nobody has, and that nobody is given: the listener keeps the number until a test
/// lets go of it.
fn reserved() -> (TcpListener, u16) {
    let listener = TcpListener::bind("[::]:0").or_else(|_| TcpListener::bind("0.0.0.0:0")).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

fn free() -> u16 {
    reserved().1
}

fn web() -> ObjectRef {
    ObjectRef::new("default", "web")
}

/// Asks until the answer is as wanted, and gives it; `None` is nobody who answers.
async fn asked(port: u16, wanted: impl Fn(Option<&str>) -> bool) -> Option<String> {
    let asking = async {
        loop {
            let answer = introduction(port).await.ok();
            if wanted(answer.as_deref()) {
                return answer;
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), asking).await.expect("the answer never was as wanted")
}

fn is(status: u16) -> impl Fn(Option<&str>) -> bool {
    move |answer| answer.is_some_and(|text| text.starts_with(&format!("HTTP/1.0 {status} ")))
}

#[tokio::test]
async fn the_answer_is_that_of_kube_proxy() {
    let agent = agent();
    let ports = HealthPorts::start(Arc::clone(&agent) as Arc<dyn Inspect>);
    let port = free();
    ports.answer(&web(), Some((port, 2)));
    let text = asked(port, is(200)).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    for line in [
        "content-type: application/json",
        "x-content-type-options: nosniff",
        "x-load-balancing-endpoint-weight: 2",
    ] {
        assert!(head.to_ascii_lowercase().lines().any(|found| found == line), "{line}: {head}");
    }
    let service = json!({ "namespace": "default", "name": "web" });
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!(body, json!({ "service": service, "localEndpoints": 2, "serviceProxyHealthy": true }));

    agent.0.store(false, Ordering::Relaxed);
    let text = asked(port, is(503)).await.unwrap();
    assert!(text.contains("\"serviceProxyHealthy\":false"), "{text}");
}

#[tokio::test]
async fn endpoints_change_without_the_port_being_closed() {
    let ports = HealthPorts::start(agent());
    let port = free();
    ports.answer(&web(), Some((port, 1)));
    asked(port, is(200)).await;
    let mut open = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    ports.answer(&web(), Some((port, 0)));
    asked(port, is(503)).await;
    // A connection from before the change is answered by what is so now.
    open.write_all(b"POST /any HTTP/1.0\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    let mut text = String::new();
    open.read_to_string(&mut text).await.unwrap();
    assert!(is(503)(Some(&text)) && text.contains("\"localEndpoints\":0"), "{text}");
    ports.answer(&web(), Some((port, 3)));
    asked(port, is(200)).await;
}

#[tokio::test]
async fn ports_go_with_their_service_and_may_be_others() {
    let ports = HealthPorts::start(agent());
    let (first, second) = (free(), free());
    ports.answer(&web(), Some((first, 1)));
    asked(first, is(200)).await;
    ports.answer(&web(), Some((second, 1)));
    asked(second, is(200)).await;
    asked(first, |answer| answer.is_none()).await;
    ports.answer(&web(), None);
    asked(second, |answer| answer.is_none()).await;
    ports.answer(&web(), Some((first, 1)));
    asked(first, is(200)).await;
    drop(ports);
    asked(first, |answer| answer.is_none()).await;
}

#[tokio::test]
async fn a_port_of_somebody_else_is_a_problem_until_it_is_free() {
    let (silent, port) = reserved();
    let ports = HealthPorts::with_retry(agent(), Duration::from_millis(20));
    let mut problems = ports.problems();
    ports.answer(&web(), Some((port, 1)));
    // Whoever has it accepts no connection, and so says nothing within a second.
    let told = problems.next().await;
    let text = told[0].to_string();
    assert!(told.len() == 1 && text.contains(&format!("port {port}")), "{text}");
    assert!(text.contains("Service default/web: spec.healthCheckNodePort"), "{text}");
    drop(silent);
    assert!(problems.next().await.is_empty());
    asked(port, is(200)).await;
}

#[tokio::test]
async fn what_kube_proxy_answers_is_left_to_it() {
    // Another node's agent stands for kube-proxy: the answers are the same.
    let port = free();
    let other = HealthPorts::start(agent());
    other.answer(&web(), Some((port, 7)));
    asked(port, is(200)).await;
    let ports = HealthPorts::with_retry(agent(), Duration::from_millis(20));
    let mut problems = ports.problems();
    ports.answer(&web(), Some((port, 1)));
    // What comes later is done later: by the problem of this one, the other was decided.
    let (_silent, taken) = reserved();
    let api = ObjectRef::new("default", "api");
    ports.answer(&api, Some((taken, 1)));
    let told = problems.next().await;
    assert!(told.len() == 1 && told[0].object == Some(api), "{told:?}");
    let text = asked(port, is(200)).await.unwrap();
    assert!(text.contains("\"localEndpoints\":7"), "{text}");
    drop(other);
    let text = asked(port, |answer| answer.is_some_and(|text| text.contains("\"localEndpoints\":1"))).await;
    assert!(text.is_some());
}

#[tokio::test]
async fn two_services_with_the_same_port() {
    let ports = HealthPorts::start(agent());
    let mut problems = ports.problems();
    let port = free();
    ports.answer(&web(), Some((port, 1)));
    ports.answer(&ObjectRef::new("default", "api"), Some((port, 1)));
    let told = problems.next().await;
    assert!(told[0].to_string().contains("the Service default/web has the same one"), "{told:?}");
    // When the first goes, the other has it at once.
    ports.answer(&web(), None);
    let text = asked(port, |answer| answer.is_some_and(|text| text.contains("\"name\":\"api\""))).await;
    assert!(text.is_some());
    assert!(problems.next().await.is_empty());
}

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    sync::atomic::{AtomicUsize, Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::*;
use crate::model::ClientAddress;

fn target(address: SocketAddr, check: &str) -> CheckTarget {
    CheckTarget { address, check: Arc::new(check.parse().unwrap()), header: ClientAddress::Path }
}

fn web() -> ObjectRef {
    ObjectRef::new("default", "web")
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// The head of a request.
async fn head(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    while !text.ends_with("\r\n\r\n") {
        text.push(char::from(stream.read_u8().await.unwrap()));
    }
    text
}

/// What is made of an answer, which may come in pieces; `None` keeps the connection open without one.
async fn asked(check: &str, pieces: Option<&'static [&'static str]>) -> (Outcome, String) {
    let (listener, address) = listener().await;
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let head = head(&mut stream).await;
        match pieces {
            Some(pieces) => {
                for piece in pieces {
                    stream.write_all(piece.as_bytes()).await.unwrap();
                    tokio::task::yield_now().await;
                }
            }
            None => drop(stream.read_u8().await),
        }
        head
    });
    let outcome = question::ask(&target(address, check)).await;
    (outcome, server.await.unwrap().replace(&address.to_string(), "ADDRESS"))
}

#[tokio::test]
async fn http_is_asked_and_its_status_counts() {
    let (outcome, head) = asked("http /healthz?a=b", Some(&["HTTP/1.1 200 OK\r\n\r\n"])).await;
    assert_eq!(outcome, Outcome::Healthy);
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        head,
        format!(
            "GET /healthz?a=b HTTP/1.1\r\nHost: ADDRESS\r\nUser-Agent: pointsman-health-check/{version}\r\n\
             Accept: */*\r\nConnection: close\r\n\r\n"
        )
    );
    let (outcome, head) = asked("http host=web.example", Some(&["HTTP/1", ".0 302 F", "ound\n"])).await;
    assert_eq!(outcome, Outcome::Healthy, "it is not followed");
    assert!(head.starts_with("GET / HTTP/1.1\r\nHost: web.example\r\n"), "{head}");
    for (pieces, expected) in [
        (&["HTTP/1.1 503 no\r\n\r\n"][..], Outcome::Status(503)),
        (&["HTTP/1.1 404 ", "no\r\n\r\n"], Outcome::Status(404)),
        (&["SSH-2.0\r\n"], Outcome::NotHttp),
        (&[], Outcome::Closed),
        (&["HTTP/1.1"], Outcome::Closed),
    ] {
        assert_eq!(asked("http", Some(pieces)).await.0, expected, "{pieces:?}");
    }
}

#[tokio::test]
async fn who_does_not_answer_in_time_fails() {
    let limit = Duration::from_millis(50);
    assert_eq!(asked("http timeout=50ms", None).await.0, Outcome::NoAnswer(limit));
}

/// A server that keeps its connections open, whatever the request says.
#[tokio::test]
async fn an_answer_in_time_counts_although_the_connection_stays() {
    let (listener, address) = listener().await;
    let server = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            head(&mut stream).await;
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n").await.unwrap();
            let error = stream.read_u8().await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
    });
    // Less time than what is spent on the rest of the answer.
    let target = target(address, "http timeout=90ms");
    assert!(target.check.timeout < question::COURTESY);
    // A machine that is busy may take longer for it now and then.
    let mut outcome = Outcome::Closed;
    for _ in 0..20 {
        outcome = question::ask(&target).await;
        if outcome == Outcome::Healthy {
            break;
        }
    }
    assert_eq!(outcome, Outcome::Healthy);
    assert!(!server.is_finished());
    server.abort();
}

/// A server that sends interim answers for ever.
#[tokio::test]
async fn no_more_than_so_much_is_read() {
    let (listener, address) = listener().await;
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        head(&mut stream).await;
        let mut sent = 0;
        while stream.write_all(b"HTTP/1.1 102 Processing\r\n\r\n").await.is_ok() {
            sent += 1;
        }
        sent
    });
    assert_eq!(question::ask(&target(address, "http")).await, Outcome::NotHttp);
    // The reset ends it, whatever fits in between.
    assert!(server.await.unwrap() > 0);
}

#[tokio::test]
async fn tcp_connections_end_with_a_reset() {
    let (listener, address) = listener().await;
    let target = target(address, "tcp");
    assert_eq!(question::ask(&target).await, Outcome::Healthy);
    let (mut stream, _) = listener.accept().await.unwrap();
    let error = stream.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    drop(listener);
    assert_eq!(question::ask(&target).await, Outcome::Refused);
}

/// Servers that await a header of the PROXY protocol do so of everybody.
#[tokio::test]
async fn the_header_that_clients_have_is_there_too() {
    for (header, expected) in [
        (ClientAddress::ProxyV1, &b"PROXY UNKNOWN\r\n"[..]),
        (ClientAddress::ProxyV2, b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"),
    ] {
        let (listener, address) = listener().await;
        let server = tokio::spawn(async move {
            let mut heard = Vec::new();
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut header = vec![0; expected.len()];
                stream.read_exact(&mut header).await.unwrap();
                heard.push(header);
                if heard.len() == 2 {
                    let head = head(&mut stream).await;
                    assert!(head.starts_with("GET / HTTP/1.1\r\n"), "{head}");
                    stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                }
            }
            heard
        });
        for check in ["tcp", "http"] {
            let target = CheckTarget { header, ..target(address, check) };
            assert_eq!(question::ask(&target).await, Outcome::Healthy);
        }
        assert_eq!(server.await.unwrap(), [expected, expected]);
    }
}

#[tokio::test]
async fn a_backend_falls_ill_and_recovers() {
    let (listener, address) = listener().await;
    let mut probes = Probes::start();
    let mut verdicts = probes.verdicts().unwrap();
    assert!(probes.verdicts().is_none());
    let target = target(address, "tcp interval=1s unhealthy=1 healthy=1");
    probes.ask(target.clone(), Some(web()));
    let _ = listener.accept().await.unwrap();
    drop(listener);
    assert_eq!(verdicts.next().await, [(target.clone(), Some("connect: refused".into()))]);
    let listener = TcpListener::bind(address).await.unwrap();
    assert_eq!(verdicts.next().await, [(target.clone(), None)]);
    drop(listener);
    assert_eq!(verdicts.next().await, [(target.clone(), Some("connect: refused".into()))]);
    probes.ask(target.clone(), None);
    assert_eq!(verdicts.next().await, [(target, None)], "what was said is taken back");
    let counts: Vec<_> = probes.counts().read().filter(|(_, count)| *count > 0).collect();
    assert!(matches!(counts[..], [("healthy", 2..), ("refused", 2..)]), "{counts:?}");
}

/// However many there are, so many connections are open at once, and everybody has his turn.
#[tokio::test]
async fn a_bounded_number_at_once() {
    let (listener, address) = listener().await;
    let (open, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::new(std::sync::Mutex::new(BTreeSet::new()));
    let server = tokio::spawn({
        let (open, most, seen) = (Arc::clone(&open), Arc::clone(&most), Arc::clone(&seen));
        async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                most.fetch_max(open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                let (open, seen) = (Arc::clone(&open), Arc::clone(&seen));
                tokio::spawn(async move {
                    let head = head(&mut stream).await;
                    seen.lock().unwrap().insert(head.lines().next().unwrap().to_owned());
                    // Until it is given up.
                    let _ = stream.read_u8().await;
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        }
    });
    let probes = Probes::start();
    let service = |number: u32| Some(ObjectRef::new("default", format!("web{}", number % 100)));
    for number in 0..600 {
        probes.ask(target(address, &format!("http /{number} interval=1s timeout=1s")), service(number));
    }
    while seen.lock().unwrap().len() < 600 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let most = most.load(Ordering::SeqCst);
    // The other side may hear late of one that was given up.
    assert!((AT_ONCE / 2..=AT_ONCE + 16).contains(&most), "{most}");
    server.abort();
}

/// Somebody else may want the place.
#[tokio::test]
async fn a_question_ends_when_nobody_wants_the_answer() {
    let (listener, address) = listener().await;
    let probes = Probes::start();
    let target = target(address, "http interval=1s timeout=1s");
    probes.ask(target.clone(), Some(web()));
    let (mut stream, _) = listener.accept().await.unwrap();
    head(&mut stream).await;
    probes.ask(target, None);
    let error = stream.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(probes.counts().read().all(|(_, count)| count == 0), "not for want of an answer");
}

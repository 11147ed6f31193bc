//! Serving HTTP on TCP ports that anybody may connect to: who is slow or does not go is sent away.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

/// Connections of one port at a time; who comes later waits.
const CONNECTIONS: usize = 64;
/// What a client is given.
const PATIENCE: Patience = Patience { head: Duration::from_secs(5), lifetime: Duration::from_secs(60) };
/// How long to wait when the process has no descriptor left for a connection.
const EXHAUSTED: Duration = Duration::from_millis(100);
/// Connections that the kernel holds for us.
const BACKLOG: i32 = 128;

/// How long clients are waited for.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// For the head of a request.
    head: Duration,
    /// For the end of a connection, requests and idle times together.
    lifetime: Duration,
}

/// Listens on a TCP port. `[::]` means every address of both families; on nodes without IPv6 it
/// means every IPv4 address.
///
/// Must be called within a tokio runtime.
///
/// # Errors
/// What the kernel answers.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    match listen_on(address) {
        Err(error)
            if error.raw_os_error() == Some(libc::EAFNOSUPPORT)
                && address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) =>
        {
            listen_on(SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())))
        }
        listener => listener,
    }
}

fn listen_on(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Connections of an earlier process in TIME_WAIT are no reason to wait.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Answers connections for as long as this is polled. Connections end with it.
pub async fn serve(listener: TcpListener, router: Router) {
    serve_patiently(listener, router, PATIENCE).await;
}

async fn serve_patiently(listener: TcpListener, router: Router, patience: Patience) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        // Never closed.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                connections.spawn(async move {
                    let _place = place;
                    let _ = timeout(patience.lifetime, answer(stream, router, patience)).await;
                });
            }
            // Others than these are errors of the one connection (accept(2)).
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                sleep(EXHAUSTED).await;
            }
            Err(_) => {}
        }
    }
}

async fn answer(stream: TcpStream, router: Router, patience: Patience) -> hyper::Result<()> {
    // Answers are one write each: there is nothing to wait for.
    let _ = stream.set_nodelay(true);
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience.head)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn every_address_of_both_families_is_served() {
        let listener = listen("[::]:0".parse().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(serve(listener, Router::new().route("/", get(async || "well"))));
        for address in ["127.0.0.1", "::1"] {
            let address: IpAddr = address.parse().unwrap();
            let mut stream = match TcpStream::connect((address, port)).await {
                Ok(stream) => stream,
                // A machine without IPv6 serves IPv4 all the same.
                Err(_) if address.is_ipv6() => continue,
                Err(error) => panic!("{error}"),
            };
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.0 200") && answer.ends_with("well"), "{answer}");
        }
        server.abort();
    }

    #[tokio::test]
    async fn a_port_is_not_taken_twice() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let error = listen(listener.local_addr().unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }

    /// What a client reads that has sent `text` and says no more, until it is sent away.
    async fn sent_away(text: &str, patience: Patience) -> String {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(async || "well"));
        let server = tokio::spawn(serve_patiently(listener, router, patience));
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(text.as_bytes()).await.unwrap();
        let mut all = Vec::new();
        client.read_to_end(&mut all).await.unwrap();
        server.abort();
        String::from_utf8(all).unwrap()
    }

    #[tokio::test]
    async fn who_is_slow_or_stays_is_sent_away() {
        let (short, long) = (Duration::from_millis(50), Duration::from_secs(600));
        let text = sent_away("GET / HT", Patience { head: short, lifetime: long }).await;
        assert!(!text.contains("well"), "{text}");
        let request = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
        let text = sent_away(request, Patience { head: long, lifetime: short }).await;
        assert!(text.ends_with("well"), "{text}");
    }
}

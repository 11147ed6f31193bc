//! One question to one backend.

use std::{
    io::{Error, ErrorKind},
    net::SocketAddr,
    time::Duration,
};

use nix::errno::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout, timeout_at},
};

use super::{
    Outcome,
    answer::{self, Reading},
};
use crate::{
    model::{CheckKind, CheckTarget},
    plan::proxy_header,
};

/// No more of an answer is read.
const MOST: usize = 4_096;
/// For so long the rest of an answer is taken although nobody needs it: servers tell of clients that go
/// in the middle of it.
pub(super) const COURTESY: Duration = Duration::from_millis(100);

/// Asks, and waits for the answer for as long as the check says.
pub(super) async fn ask(target: &CheckTarget) -> Outcome {
    let limit = target.check.timeout;
    let deadline = Instant::now() + limit;
    let mut stream = match timeout_at(deadline, connect(target.address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return not_connected(&error, limit),
        Err(_) => return Outcome::NotConnected(limit),
    };
    let header = proxy_header::of_nobody(target.header);
    let CheckKind::Http { path, host } = &target.check.kind else {
        // Whether it is taken does not matter; servers complain of connections without it.
        let _ = stream.try_write(header);
        return Outcome::Healthy;
    };
    let request = [header, request(path, host.as_deref(), target.address).as_bytes()].concat();
    let answered = match timeout_at(deadline, get(&mut stream, &request)).await {
        Ok(Ok(answered)) => answered,
        Ok(Err(outcome)) => return outcome,
        Err(_) => return Outcome::NoAnswer(limit),
    };
    if answered.takes_more {
        // The answer is known: what this takes does not count.
        let _ = timeout(COURTESY, take_rest(&mut stream, MOST - answered.read)).await;
    }
    match answered.status {
        200..=399 => Outcome::Healthy,
        status => Outcome::Status(status),
    }
}

/// What is known of an answer once its status is.
struct Answered {
    status: u16,
    /// So many bytes have been read.
    read: usize,
    /// Whether the request was taken, so that the backend may still be writing.
    takes_more: bool,
}

/// A connection that is reset when it is dropped: else each question would leave a port of this node in
/// TIME_WAIT for a minute.
async fn connect(address: SocketAddr) -> Result<TcpStream, Error> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_tcp_nodelay(true)?;
    TcpSocket::from_std_stream(socket.into()).connect(address).await
}

fn not_connected(error: &Error, limit: Duration) -> Outcome {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ECONNREFUSED) => Outcome::Refused,
        Some(Errno::ECONNRESET | Errno::ECONNABORTED) => Outcome::Closed,
        // The kernel gave up before we did.
        Some(Errno::ETIMEDOUT) => Outcome::NotConnected(limit),
        Some(
            Errno::EMFILE
            | Errno::ENFILE
            | Errno::ENOBUFS
            | Errno::ENOMEM
            | Errno::EADDRNOTAVAIL
            | Errno::EADDRINUSE
            | Errno::EAGAIN,
        ) => {
            tracing::debug!("a health check could not be made: {error}");
            Outcome::NotAsked
        }
        Some(errno) => Outcome::Unreachable(errno.desc().to_lowercase()),
        None => Outcome::Unreachable(error.to_string()),
    }
}

fn request(path: &str, host: Option<&str>, address: SocketAddr) -> String {
    let own = address.to_string();
    let host = host.unwrap_or(&own);
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: pointsman-health-check/{version}\r\n\
         Accept: */*\r\nConnection: close\r\n\r\n"
    )
}

/// The status of the answer to a request.
async fn get(stream: &mut TcpStream, request: &[u8]) -> Result<Answered, Outcome> {
    // Whoever answers without reading the request may have closed already: its answer counts.
    let written = stream.write_all(request).await;
    let mut answer = Vec::with_capacity(512);
    let mut piece = [0; 512];
    loop {
        let room = piece.len().min(MOST - answer.len());
        match stream.read(&mut piece[..room]).await {
            Ok(0) if answer.len() == MOST => return Err(Outcome::NotHttp),
            Ok(0) => return Err(Outcome::Closed),
            Ok(count) => answer.extend_from_slice(&piece[..count]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Err(Outcome::Closed),
            Err(error) => return Err(Outcome::Unreachable(error.to_string())),
        }
        match answer::read(&answer) {
            Reading::More => {}
            Reading::Bad => return Err(Outcome::NotHttp),
            Reading::Status(status) => {
                return Ok(Answered { status, read: answer.len(), takes_more: written.is_ok() });
            }
        }
    }
}

async fn take_rest(stream: &mut TcpStream, mut room: usize) {
    let mut piece = [0; 512];
    while room > 0 {
        let wanted = room.min(piece.len());
        match stream.read(&mut piece[..wanted]).await {
            Ok(0) | Err(_) => return,
            Ok(count) => room -= count,
        }
    }
}

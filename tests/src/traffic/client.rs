//! Single requests, and who answered them.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::lab::Namespace;

/// Longest time that a healthy exchange may take, with retransmissions on a busy machine.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// How often each backend answered.
pub type Tally = BTreeMap<String, usize>;

/// Connects from a namespace; the stream can be used anywhere, and gives up after [`TIMEOUT`].
///
/// # Errors
/// When there is no connection.
pub fn connect(from: &Namespace, to: SocketAddr) -> Result<TcpStream> {
    from.enter(|| open(to))?.with_context(|| format!("cannot connect from {} to {to}", from.role()))
}

/// Connects from the namespace of this thread.
///
/// # Errors
/// When there is no connection.
pub fn open(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

/// One HTTP request on a connection of its own, in the namespace of this thread; gives the body.
///
/// # Errors
/// When anything is not as it should be, up to the FIN.
pub fn http_get(to: SocketAddr, path: &str) -> io::Result<Vec<u8>> {
    let mut stream = open(to)?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let head = answer
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .filter(|_| answer.starts_with(b"HTTP/1.1 200"));
    let Some(head) = head else {
        return Err(io::Error::other(format!("{} bytes that are no answer", answer.len())));
    };
    let text = String::from_utf8_lossy(&answer[..head]).into_owned();
    let body = answer.split_off(head + 4);
    let length = text.lines().find_map(|line| line.strip_prefix("Content-Length: ")?.parse::<usize>().ok());
    if length == Some(body.len()) {
        Ok(body)
    } else {
        Err(io::Error::other(format!("{} bytes of {length:?}", body.len())))
    }
}

/// Name of the backend that answers an HTTP request.
///
/// # Errors
/// When there is no good answer.
pub fn http_name(to: SocketAddr) -> io::Result<String> {
    let body = http_get(to, "/")?;
    Ok(String::from_utf8_lossy(&body).trim().to_owned())
}

/// Who answers `count` HTTP requests, one after the other, in order.
///
/// # Errors
/// When one fails.
pub fn who_answers(from: &Namespace, to: SocketAddr, count: usize) -> Result<Vec<String>> {
    let names = from.enter(|| (0..count).map(|_| http_name(to)).collect::<io::Result<_>>())?;
    names.with_context(|| format!("HTTP from {} to {to}", from.role()))
}

/// Who answers `count` UDP datagrams, each from a socket of its own, in order.
///
/// # Errors
/// When an answer does not come, or is not what was sent.
pub fn who_answers_udp(from: &Namespace, to: SocketAddr, count: usize) -> Result<Vec<String>> {
    // All stay open to the end: a port that is taken again belongs to a flow that has a backend.
    let sockets = from.enter(|| (0..count).map(|_| udp_socket(to)).collect::<io::Result<Vec<_>>>())??;
    let ask = |(n, socket)| udp_exchange(socket, format!("datagram {n}").as_bytes());
    let names = sockets.iter().enumerate().map(ask).collect::<Result<_>>();
    names.with_context(|| format!("UDP from {} to {to}", from.role()))
}

/// A socket in the namespace of this thread that talks to this address alone.
///
/// # Errors
/// When it cannot be made.
pub fn udp_socket(to: SocketAddr) -> io::Result<UdpSocket> {
    let any =
        if to.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind::<SocketAddr>(any)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    Ok(socket)
}

/// Repeats what a signal has interrupted: on sockets with a timeout the kernel leaves that to us, even
/// for a stop and continue without any handler (signal(7)).
///
/// # Errors
/// With any other error.
pub fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// Sends a datagram and waits for its echo; gives the name of who sent it.
///
/// # Errors
/// When none comes, or another.
pub fn udp_exchange(socket: &UdpSocket, payload: &[u8]) -> Result<String> {
    socket.send(payload).context("cannot send")?;
    let mut buffer = vec![0; payload.len() + 100];
    let count = uninterrupted(|| socket.recv(&mut buffer)).context("no answer")?;
    let answer = &buffer[..count];
    let space = answer.iter().position(|byte| *byte == b' ').context("an answer without a name")?;
    ensure!(answer[space + 1..] == *payload, "{count} bytes that are not the echo of {}", payload.len());
    Ok(String::from_utf8_lossy(&answer[..space]).into_owned())
}

/// Sends a few bytes and a FIN on an echo connection, and only then reads: the connection is half
/// closed while the answer comes. Gives the name of the backend.
///
/// # Errors
/// When the echo, its trailer or the FIN is missing.
pub fn half_close(mut stream: &TcpStream, payload: &[u8]) -> Result<String> {
    stream.write_all(payload).context("cannot write")?;
    stream.shutdown(Shutdown::Write).context("cannot close one half")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("cannot read the other half")?;
    ensure!(answer.starts_with(payload), "the echo differs");
    let trailer = String::from_utf8_lossy(&answer[payload.len()..]).into_owned();
    let words: Vec<&str> = trailer.split(' ').collect();
    match words[..] {
        ["bye", name, total] if total == payload.len().to_string() => Ok(name.to_owned()),
        _ => anyhow::bail!("`{trailer}` is not the trailer of {} bytes", payload.len()),
    }
}

/// Counts names.
#[must_use]
pub fn tally(names: &[String]) -> Tally {
    let mut tally = Tally::new();
    for name in names {
        *tally.entry(name.clone()).or_default() += 1;
    }
    tally
}

/// Checks exact round-robin: whoever starts, every run of `backends` answers names each once, and
/// always in the same order.
///
/// # Errors
/// With the first place that differs.
pub fn check_round_robin(names: &[String], backends: usize) -> Result<()> {
    ensure!(names.len() >= backends, "{} answers cannot show {backends} backends", names.len());
    let first = tally(&names[..backends]);
    ensure!(first.len() == backends, "the first {backends} answers are not of all backends: {names:?}");
    let wrong = (backends..names.len()).find(|&n| names[n] != names[n - backends]);
    ensure!(wrong.is_none(), "answer {} breaks the order: {names:?}", wrong.unwrap_or_default() + 1);
    Ok(())
}

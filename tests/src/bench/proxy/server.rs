//! The backends: one thread that answers, floods or swallows, whatever a client's first byte asks for.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};

/// Bytes of a request. The first says what is wanted.
pub const REQUEST: usize = 64;
/// Bytes of an answer.
pub const ANSWER: usize = 128;
/// Bytes of one read or write in bulk.
pub const BUFFER: usize = 1 << 18;
/// Bytes for one stream before the others have their turn.
const TURN: usize = 1 << 20;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Wish {
    /// An answer for each request.
    Answers = b'r',
    /// One answer, after which the server closes.
    OneAnswer = b'c',
    /// Bytes until the client closes.
    Download = b'd',
    /// The client sends until it closes.
    Upload = b'u',
}

impl Wish {
    fn read(byte: u8) -> Option<Self> {
        [Self::Answers, Self::OneAnswer, Self::Download, Self::Upload]
            .into_iter()
            .find(|wish| *wish as u8 == byte)
    }

    /// The request that expresses it.
    #[must_use]
    pub fn request(self) -> [u8; REQUEST] {
        [self as u8; REQUEST]
    }
}

/// Shared with those who started it.
#[derive(Debug, Default)]
pub struct Counts {
    /// Set to end it.
    pub stop: AtomicBool,
    /// Bytes that were uploaded.
    pub swallowed: AtomicU64,
    /// Connections that are open.
    pub open: AtomicU64,
}

struct Connection {
    stream: TcpStream,
    wish: Option<Wish>,
    /// Bytes of the request that is not yet whole.
    pending: usize,
}

/// What becomes of a connection.
#[derive(PartialEq, Eq)]
enum Next {
    Keep,
    Close,
}

/// Listens on all addresses of the thread's namespace.
///
/// # Errors
/// When the port is taken.
pub fn listen(port: u16) -> Result<TcpListener> {
    // The standard library's backlog is short for thousands of connections at once, but the kernel's own
    // bound is what counts: see the lab's settings.
    let listener = TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], port))).context("the server's port")?;
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4_096)?)?;
    // Accepted sockets inherit it.
    setsockopt(&listener, sockopt::TcpNoDelay, &true)?;
    Ok(listener)
}

/// Serves until it is told to stop.
///
/// # Errors
/// When epoll fails.
pub fn serve(listener: &TcpListener, counts: &Counts) -> Result<()> {
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let listening = listener.as_raw_fd() as u64;
    epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, listening))?;
    let mut connections: Vec<Option<Connection>> = Vec::new();
    let mut events = [EpollEvent::empty(); 256];
    let mut buffer = vec![0; BUFFER];
    while !counts.stop.load(Ordering::Relaxed) {
        let count = match epoll.wait(&mut events, EpollTimeout::from(100_u8)) {
            Err(Errno::EINTR) => 0,
            other => other?,
        };
        for event in &events[..count] {
            if event.data() == listening {
                accept(listener, &epoll, &mut connections, counts)?;
                continue;
            }
            let place = event.data() as usize;
            let Some(connection) = connections.get_mut(place).and_then(Option::as_mut) else { continue };
            if connection.turn(&epoll, &mut buffer, counts)? == Next::Close {
                connections[place] = None;
                counts.open.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
    Ok(())
}

fn accept(
    listener: &TcpListener,
    epoll: &Epoll,
    connections: &mut Vec<Option<Connection>>,
    counts: &Counts,
) -> Result<()> {
    // Others wait for their answers.
    for _ in 0..64 {
        let Ok((stream, _)) = listener.accept() else { return Ok(()) };
        let place = stream.as_raw_fd() as usize;
        epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, place as u64))?;
        if connections.len() <= place {
            connections.resize_with(place + 1, || None);
        }
        connections[place] = Some(Connection { stream, wish: None, pending: 0 });
        counts.open.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

impl Connection {
    fn turn(&mut self, epoll: &Epoll, buffer: &mut [u8], counts: &Counts) -> Result<Next> {
        match self.wish {
            Some(Wish::Download) => return Ok(self.flood(buffer)),
            Some(Wish::Upload) => return Ok(self.swallow(buffer, counts)),
            Some(Wish::Answers | Wish::OneAnswer) | None => {}
        }
        let read = recv(self.stream.as_raw_fd(), &mut buffer[..4_096], MsgFlags::MSG_DONTWAIT);
        let count = match read {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Next::Keep),
            Ok(0) | Err(_) => return Ok(Next::Close),
            Ok(count) => count,
        };
        if self.wish.is_none() {
            self.wish = Wish::read(buffer[0]);
        }
        match self.wish {
            Some(Wish::Download) => {
                epoll.modify(
                    &self.stream,
                    &mut EpollEvent::new(EpollFlags::EPOLLOUT, self.stream.as_raw_fd() as u64),
                )?;
                Ok(Next::Keep)
            }
            Some(Wish::Upload) => {
                counts.swallowed.fetch_add(count as u64, Ordering::Relaxed);
                Ok(Next::Keep)
            }
            Some(wish) => Ok(self.answer(wish, count)),
            None => Ok(Next::Close),
        }
    }

    fn answer(&mut self, wish: Wish, count: usize) -> Next {
        self.pending += count;
        while self.pending >= REQUEST {
            self.pending -= REQUEST;
            // So few bytes always fit into the socket's buffer.
            let sent = send(self.stream.as_raw_fd(), &[wish as u8; ANSWER], flags());
            if sent != Ok(ANSWER) || wish == Wish::OneAnswer {
                return Next::Close;
            }
        }
        Next::Keep
    }

    fn flood(&mut self, buffer: &[u8]) -> Next {
        let mut left = TURN;
        while left > 0 {
            match send(self.stream.as_raw_fd(), buffer, flags()) {
                Ok(count) => left = left.saturating_sub(count),
                Err(Errno::EAGAIN | Errno::EINTR) => return Next::Keep,
                Err(_) => return Next::Close,
            }
        }
        Next::Keep
    }

    fn swallow(&mut self, buffer: &mut [u8], counts: &Counts) -> Next {
        let mut left = TURN;
        while left > 0 {
            // MSG_TRUNC: TCP throws the bytes away in place of copying them (tcp(7)).
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
            match recv(self.stream.as_raw_fd(), buffer, flags) {
                Err(Errno::EAGAIN | Errno::EINTR) => return Next::Keep,
                Ok(0) | Err(_) => return Next::Close,
                Ok(count) => {
                    counts.swallowed.fetch_add(count as u64, Ordering::Relaxed);
                    left = left.saturating_sub(count);
                }
            }
        }
        Next::Keep
    }
}

fn flags() -> MsgFlags {
    MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn serves_every_wish() {
        let listener = listen(0).unwrap();
        let port = listener.local_addr().unwrap().port();
        let connect = || TcpStream::connect(("127.0.0.1", port)).unwrap();
        let counts = Counts::default();
        std::thread::scope(|scope| {
            let server = scope.spawn(|| serve(&listener, &counts));
            let mut kept = connect();
            for _ in 0..3 {
                // In two pieces: a request is whole when its last byte is there.
                kept.write_all(&[Wish::Answers as u8; 10]).unwrap();
                kept.write_all(&[Wish::Answers as u8; REQUEST - 10]).unwrap();
                let mut answer = [0; ANSWER];
                kept.read_exact(&mut answer).unwrap();
                assert_eq!(answer, [Wish::Answers as u8; ANSWER]);
            }
            let mut once = connect();
            once.write_all(&Wish::OneAnswer.request()).unwrap();
            let mut all = Vec::new();
            once.read_to_end(&mut all).unwrap();
            assert_eq!(all, [Wish::OneAnswer as u8; ANSWER]);
            let mut down = connect();
            down.write_all(&Wish::Download.request()).unwrap();
            let mut bytes = vec![1; 10 * BUFFER];
            down.read_exact(&mut bytes).unwrap();
            let mut up = connect();
            up.write_all(&vec![Wish::Upload as u8; 10 * BUFFER]).unwrap();
            up.shutdown(std::net::Shutdown::Write).unwrap();
            up.read_to_end(&mut all).unwrap();
            assert_eq!(counts.swallowed.load(Ordering::Relaxed), 10 * BUFFER as u64);
            counts.stop.store(true, Ordering::Relaxed);
            server.join().unwrap().unwrap();
        });
    }
}

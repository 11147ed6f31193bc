//! Streams that carry as much as goes through.

use std::io::Write;
use std::net::SocketAddrV4;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv, send};

use super::process::{Meter, this_thread};
use super::server::{BUFFER, Counts, Wish};
use super::window::{Length, Measured, Window};

/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Downloads or uploads over `streams` connections at once; in a thread that is in the client's namespace.
/// Gives bytes that have arrived.
///
/// # Errors
/// When nothing gets through, or a connection breaks.
pub fn run(
    wish: Wish,
    to: SocketAddrV4,
    streams: usize,
    counts: &Counts,
    mut meter: Meter,
    length: Length,
) -> Result<Measured> {
    meter.ends.push(this_thread()?);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let interest = if wish == Wish::Download { EpollFlags::EPOLLIN } else { EpollFlags::EPOLLOUT };
    let mut sockets = Vec::new();
    for place in 0..streams {
        let mut socket = TcpStream::connect_timeout(&to.into(), PATIENCE).context("connecting")?;
        socket.write_all(&wish.request())?;
        epoll.add(&socket, EpollEvent::new(interest, place as u64))?;
        sockets.push(socket);
    }
    let mut buffer = vec![wish as u8; BUFFER];
    let mut downloaded = 0;
    let before = counts.swallowed.load(Ordering::Relaxed);
    let mut window = Window::start(meter, length);
    let mut events = [EpollEvent::empty(); 16];
    loop {
        let ready = match epoll.wait(&mut events, EpollTimeout::from(20_u8)) {
            Err(Errno::EINTR) => 0,
            other => other?,
        };
        for event in &events[..ready] {
            let socket = sockets[event.data() as usize].as_raw_fd();
            downloaded += piece(wish, socket, &mut buffer)?;
        }
        let arrived = match wish {
            Wish::Download => downloaded,
            _ => counts.swallowed.load(Ordering::Relaxed) - before,
        };
        if let Some(measured) = window.tick(Instant::now(), arrived)? {
            return Ok(measured);
        }
    }
}

/// One read or write.
fn piece(wish: Wish, socket: i32, buffer: &mut [u8]) -> Result<u64> {
    let moved = match wish {
        // MSG_TRUNC: TCP throws the bytes away in place of copying them (tcp(7)).
        Wish::Download => recv(socket, buffer, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC),
        _ => send(socket, buffer, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL),
    };
    match moved {
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(0),
        Err(error) => Err(error).context("a stream broke"),
        Ok(0) => bail!("a stream was closed"),
        Ok(count) => Ok(count as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::super::server::{listen, serve};
    use super::*;

    #[test]
    fn bytes_are_counted_where_they_arrive() {
        let listener = listen(0).unwrap();
        let to = SocketAddrV4::new([127, 0, 0, 1].into(), listener.local_addr().unwrap().port());
        let counts = Counts::default();
        let length = Length { warm_up: Duration::from_millis(5), measured: Duration::from_millis(50) };
        std::thread::scope(|scope| {
            let server = scope.spawn(|| serve(&listener, &counts));
            for wish in [Wish::Download, Wish::Upload] {
                let measured = run(wish, to, 2, &counts, Meter::default(), length).unwrap();
                assert!(measured.count > 0.0, "{wish:?}");
            }
            assert!(counts.swallowed.load(Ordering::Relaxed) > 0);
            counts.stop.store(true, Ordering::Relaxed);
            server.join().unwrap().unwrap();
        });
    }
}

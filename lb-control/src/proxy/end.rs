//! One of the two sockets of a connection.

use std::{
    io::{self, ErrorKind},
    mem,
    net::Shutdown,
    os::fd::AsRawFd,
    task::{Context, Poll, ready},
    time::Duration,
};

use socket2::{Socket, TcpKeepalive};
use tokio::io::unix::AsyncFd;

use super::watch::{both, watch};

/// A socket that does not block. What is wanted of it is tried first; the runtime learns of it only
/// when it has to wait.
#[derive(Debug)]
pub struct End {
    fd: Fd,
    /// The last attempt to read found less than it asked for.
    is_dry: bool,
    /// The last attempt to write found no room.
    is_full: bool,
    /// Small segments may wait for others to be acknowledged (Nagle), which the second one to be sent
    /// must not.
    nagle: Nagle,
    /// The other side has ended: what is there to be read is the last.
    is_ending: bool,
    /// Acknowledgements wait for something to be sent with, which must end with the first bytes.
    acks_wait: bool,
}

#[derive(Debug)]
enum Fd {
    Plain(Socket),
    Watched(AsyncFd<Socket>),
    Lost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nagle {
    Off,
    /// Nothing was sent: nothing can wait.
    Unsent,
    On,
}

impl End {
    /// A socket that was accepted: it has the options of the listening one.
    #[must_use]
    pub fn accepted(socket: Socket) -> Self {
        Self {
            fd: Fd::Plain(socket),
            is_dry: false,
            is_full: false,
            nagle: Nagle::Off,
            is_ending: false,
            acks_wait: false,
        }
    }

    /// A socket that connects. It is watched from the start. `acks_wait`: TCP_QUICKACK was taken from it.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub fn connecting(socket: Socket, acks_wait: bool) -> io::Result<Self> {
        let fd = Fd::Watched(watch(socket, both())?);
        Ok(Self { fd, is_dry: true, is_full: true, nagle: Nagle::Unsent, is_ending: false, acks_wait })
    }

    /// Waits until it is connected.
    ///
    /// # Errors
    /// Why it will not be.
    pub fn poll_connected(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let fd = self.watched()?;
        let mut guard = ready!(fd.poll_write_ready(cx))?;
        guard.retain_ready();
        if guard.ready().is_write_closed() {
            let error = fd.get_ref().take_error()?;
            return Poll::Ready(Err(error.unwrap_or_else(|| ErrorKind::ConnectionReset.into())));
        }
        self.is_full = false;
        Poll::Ready(Ok(()))
    }

    /// Takes bytes out by `read`, which gives their number, 0 for the end. When there are less than
    /// `wanted`, there are no more for now.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn poll_input(
        &mut self,
        cx: &mut Context<'_>,
        wanted: usize,
        mut read: impl FnMut(&Socket) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        if let Fd::Plain(socket) = &self.fd
            && !self.is_dry
        {
            match uninterrupted(|| read(socket)) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.is_dry = true,
                result => {
                    self.is_dry = result.as_ref().is_ok_and(|count| (1..wanted).contains(count));
                    return Poll::Ready(result);
                }
            }
        }
        self.watched()?;
        let Fd::Watched(fd) = &self.fd else { return Poll::Ready(Err(ErrorKind::NotConnected.into())) };
        loop {
            let mut guard = ready!(fd.poll_read_ready(cx))?;
            self.is_ending = guard.ready().is_read_closed();
            match uninterrupted(|| read(fd.get_ref())) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => guard.clear_ready(),
                result => {
                    // One more attempt would only find out that there is nothing. That the other side
                    // has ended is not forgotten by this.
                    if result.as_ref().is_ok_and(|count| (1..wanted).contains(count)) {
                        guard.clear_ready();
                    }
                    return Poll::Ready(result);
                }
            }
        }
    }

    /// Whether nothing more comes than what is there to be read, as far as the kernel has told.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        self.is_ending
    }

    /// Takes what there is, without waiting for anything.
    ///
    /// # Errors
    /// Those of the socket, also that there is nothing.
    pub fn try_input(
        &mut self,
        wanted: usize,
        mut read: impl FnMut(&Socket) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let count = uninterrupted(|| read(self.socket()?)).inspect_err(|_| self.is_dry = true)?;
        self.is_dry = (1..wanted).contains(&count);
        Ok(count)
    }

    /// Puts bytes in by `write`, which gives their number. When there is room for less than `wanted`,
    /// there is none for now.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn poll_output(
        &mut self,
        cx: &mut Context<'_>,
        wanted: usize,
        mut write: impl FnMut(&Socket) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            if self.is_full {
                ready!(self.watched()?.poll_write_ready(cx))?.retain_ready();
                self.is_full = false;
            }
            self.avoid_nagle()?;
            match uninterrupted(|| write(self.socket()?)) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.fills(cx),
                result => {
                    if result.as_ref().is_ok_and(|count| *count < wanted) {
                        self.fills(cx);
                    }
                    if self.acks_wait && result.is_ok() {
                        self.acknowledge();
                    }
                    return Poll::Ready(result);
                }
            }
        }
    }

    /// From now on what comes is acknowledged at once, as on any new connection. A peer that answers in
    /// several small writes, with Nagle's algorithm, would wait for a delayed acknowledgement otherwise.
    fn acknowledge(&mut self) {
        self.acks_wait = false;
        // Without it the answer is late, and no less right.
        let _ = self.socket().and_then(|socket| socket.set_tcp_quickack(true));
    }

    /// There will be no more output.
    pub fn finish(&self) {
        // Whoever has gone need not be told.
        let _ = self.socket().and_then(|socket| socket.shutdown(Shutdown::Write));
    }

    /// Nothing more will be sent: from now on there is room only when the other side has taken what was,
    /// but for what it may not have acknowledged yet of the last segment.
    ///
    /// # Errors
    /// When that cannot be known.
    pub fn says_no_more(&mut self) -> io::Result<()> {
        let socket = match mem::replace(&mut self.fd, Fd::Lost) {
            Fd::Plain(socket) => socket,
            Fd::Watched(fd) => fd.into_inner(),
            Fd::Lost => return Err(ErrorKind::NotConnected.into()),
        };
        // There is room when nothing is left to be sent for the first time, and what waits to be
        // acknowledged takes no more than the smallest buffer (sk_stream_is_writeable in net/sock.h).
        let is_set = socket.set_tcp_notsent_lowat(1).and_then(|()| socket.set_send_buffer_size(0));
        // What is watched anew is looked at anew. Where that fails, it can still be reset.
        self.fd = Fd::Plain(socket);
        is_set?;
        self.watched().map(drop)
    }

    /// Ready when there is room, or never will be.
    pub fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.watched() {
            Ok(fd) => fd.poll_write_ready(cx).map(drop),
            Err(_) => Poll::Ready(()),
        }
    }

    /// Bytes that were sent and that the other side has not acknowledged.
    #[must_use]
    pub fn unacknowledged(&self) -> usize {
        let Ok(socket) = self.socket() else { return 0 };
        let mut count: libc::c_int = 0;
        #[expect(unsafe_code, reason = "a request that no library wraps safely")]
        // SAFETY: the kernel writes an `int`, which lives through the call (tcp(7), SIOCOUTQ).
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
        if result == 0 { usize::try_from(count).unwrap_or(0) } else { 0 }
    }

    /// Tells the other side that the connection failed, rather than ended.
    pub fn reset(self) {
        if let Ok(socket) = self.socket() {
            // Without the option it is an end; nothing else can be done.
            let _ = socket.set_linger(Some(Duration::ZERO));
        }
    }

    /// Finds out when the other side is gone.
    pub fn keep_alive(&self, keepalive: &TcpKeepalive) {
        // A connection without is as good as any until its other side disappears.
        let _ = self.socket().and_then(|socket| socket.set_tcp_keepalive(keepalive));
    }

    fn avoid_nagle(&mut self) -> io::Result<()> {
        match self.nagle {
            Nagle::Off => {}
            Nagle::Unsent => self.nagle = Nagle::On,
            Nagle::On => {
                self.socket()?.set_tcp_nodelay(true)?;
                self.nagle = Nagle::Off;
            }
        }
        Ok(())
    }

    /// What the runtime knows of room is out of date.
    fn fills(&mut self, cx: &mut Context<'_>) {
        self.is_full = true;
        if let Fd::Watched(fd) = &self.fd
            && let Poll::Ready(Ok(mut guard)) = fd.poll_write_ready(cx)
        {
            guard.clear_ready();
        }
    }

    fn socket(&self) -> io::Result<&Socket> {
        match &self.fd {
            Fd::Plain(socket) => Ok(socket),
            Fd::Watched(fd) => Ok(fd.get_ref()),
            Fd::Lost => Err(ErrorKind::NotConnected.into()),
        }
    }

    fn watched(&mut self) -> io::Result<&AsyncFd<Socket>> {
        if matches!(self.fd, Fd::Plain(_))
            && let Fd::Plain(socket) = mem::replace(&mut self.fd, Fd::Lost)
        {
            self.fd = Fd::Watched(watch(socket, both())?);
        }
        match &self.fd {
            Fd::Watched(fd) => Ok(fd),
            _ => Err(ErrorKind::NotConnected.into()),
        }
    }
}

fn uninterrupted(mut what: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match what() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, net::TcpListener};

    use socket2::{Domain, Type};

    use super::*;

    /// Whether a socket that connected with or without TCP_QUICKACK acknowledges at once when bytes were sent.
    async fn acknowledges_at_once(listener: &TcpListener, end: impl Fn(Socket) -> io::Result<End>) -> bool {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking().cloexec(), None).unwrap();
        socket.set_tcp_quickack(false).unwrap();
        let _ = socket.connect(&listener.local_addr().unwrap().into());
        let mut end = end(socket).unwrap();
        poll_fn(|cx| end.poll_connected(cx)).await.unwrap();
        let sent = poll_fn(|cx| end.poll_output(cx, 1, |socket| socket.send(b"a"))).await;
        assert_eq!(sent.unwrap(), 1);
        end.socket().unwrap().tcp_quickack().unwrap()
    }

    #[tokio::test]
    async fn acknowledgements_wait_for_the_first_bytes_only() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // net.ipv4.tcp_pingpong_thresh, and before there was that, the kernel's version, tell when it delays.
        if acknowledges_at_once(&listener, |socket| End::connecting(socket, false)).await {
            println!("this kernel does not delay yet");
        }
        assert!(acknowledges_at_once(&listener, |socket| End::connecting(socket, true)).await);
    }
}

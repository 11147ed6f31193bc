//! One direction of a connection.

use std::{
    cell::RefCell,
    future::Future,
    io::{self, ErrorKind, Read},
    mem,
    os::fd::AsRawFd,
    pin::pin,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    task::{Context, Poll, ready},
};

use nix::{
    libc::{MSG_MORE, MSG_NOSIGNAL, c_int},
    sys::socket::{MsgFlags, recv},
};
use tokio::task::yield_now;

use super::{
    end::End,
    memory::{self, BUFFER, SMALL_BUFFER},
    splice::Pipe,
};

/// After so many bytes others get their turn.
const TURN: usize = 1024 * 1024;
/// A read of so many bytes is bulk...
const BULK_READ: usize = 16 * 1024;
/// ... and after so many of them in a row, a pipe pays.
const BULK_READS: u8 = 3;
/// So many times in a row that little came by the pipe, and it does not any more.
const SMALL_SPLICES: u8 = 4;

thread_local! {
    /// All connections of a worker read into this one.
    static BUFFER_OF_ALL: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// One direction of a connection: from a source to a sink.
#[derive(Debug, Default)]
pub struct Way {
    /// What the sink has not taken yet. Nothing is read meanwhile.
    held: Held,
    pipe: Option<Pipe>,
    bulk_reads: u8,
    small_splices: u8,
    has_ended: bool,
    /// The source failed after what was read last.
    has_failed: bool,
    /// Something that was read earlier has been sent.
    has_sent: bool,
    is_done: bool,
}

/// Why a way ended early.
#[derive(Debug)]
pub enum Failure {
    /// The source was reset, or is not reachable any more.
    Source,
    /// The sink was.
    Sink,
}

#[derive(Debug, Default)]
struct Held {
    bytes: Vec<u8>,
    sent: usize,
}

impl Way {
    /// One that has something to say first, and perhaps nothing after it.
    fn beginning_with(bytes: Vec<u8>, has_ended: bool) -> Self {
        let mut way = Self::default();
        (way.held, way.has_ended) = (Held::new(bytes), has_ended);
        way
    }

    /// Whether something waits to be sent.
    #[must_use]
    pub fn has_bytes(&self) -> bool {
        !self.held.is_empty()
    }

    /// Whether everything has come through.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.is_done
    }

    /// Whether, since this was asked last, something has been sent that was read earlier.
    #[must_use]
    pub fn has_sent(&mut self) -> bool {
        mem::take(&mut self.has_sent)
    }

    /// There will be no more.
    pub fn give_up(&mut self) {
        (self.is_done, self.held) = (true, Held::default());
    }

    /// Moves what can be moved: `count` takes the bytes. Ready when everything has come through. If the
    /// sink then `hears_of_it`, by its end or by being closed, the last bytes may wait for that.
    ///
    /// # Errors
    /// Which side failed.
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut End,
        sink: &mut End,
        count: &AtomicU64,
        hears_of_it: bool,
    ) -> Poll<Result<(), Failure>> {
        let before = count.load(Relaxed);
        while count.load(Relaxed).wrapping_sub(before) < TURN as u64 {
            if self.is_done {
                return Poll::Ready(Ok(()));
            }
            if !self.held.is_empty() {
                ready!(self.held.poll_flush(cx, sink, &mut self.has_sent)).map_err(|_| Failure::Sink)?;
            } else if self.has_failed {
                return Poll::Ready(Err(Failure::Source));
            } else if self.has_ended && self.pipe.is_none() {
                self.is_done = true;
            } else if self.is_bulk() {
                ready!(self.poll_splice(cx, source, sink, count))?;
            } else {
                ready!(self.poll_copy(cx, source, sink, count, hears_of_it))?;
            }
        }
        // Woken at once it would come before what waits in the kernel; so it comes after.
        let _ = pin!(yield_now()).poll(cx);
        Poll::Pending
    }

    fn is_bulk(&mut self) -> bool {
        if self.pipe.is_none() && self.bulk_reads >= BULK_READS {
            self.pipe = Pipe::take();
            self.bulk_reads = if self.pipe.is_some() { BULK_READS } else { 0 };
        }
        self.pipe.is_some()
    }

    fn poll_copy(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut End,
        sink: &mut End,
        counter: &AtomicU64,
        hears_of_it: bool,
    ) -> Poll<Result<(), Failure>> {
        let wanted = memory::allows();
        if wanted == 0 {
            return self.poll_pass(cx, source, sink, counter);
        }
        with_buffer(wanted, |buffer| {
            let read = source.poll_input(cx, wanted, |mut socket| socket.read(buffer));
            let mut count = ready!(read).map_err(|_| Failure::Source)?;
            self.has_ended = count == 0;
            if (1..wanted).contains(&count) && source.is_ending() {
                count += self.read_on(source, &mut buffer[count..]);
            }
            add(counter, count);
            self.bulk_reads = if count >= BULK_READ { self.bulk_reads.saturating_add(1) } else { 0 };
            let bytes = &buffer[..count];
            // The end goes with the last bytes then, rather than after them in a segment of its own.
            let flags = if self.has_ended && hears_of_it { MSG_MORE } else { 0 };
            let mut sent = 0;
            while sent < count {
                match poll_send(cx, sink, &bytes[sent..], flags) {
                    Poll::Ready(Ok(more)) => sent += more,
                    Poll::Ready(Err(_)) => return Poll::Ready(Err(Failure::Sink)),
                    Poll::Pending => break,
                }
            }
            Poll::Ready(Ok(bytes[sent..].to_vec()))
        })
        .map_ok(|rest| self.held = Held::new(rest))
    }

    /// Takes no more from the source than the sink does, so that nothing is held. It costs a call more than
    /// [`Self::poll_copy`].
    fn poll_pass(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut End,
        sink: &mut End,
        counter: &AtomicU64,
    ) -> Poll<Result<(), Failure>> {
        self.bulk_reads = 0;
        with_buffer(SMALL_BUFFER, |buffer| {
            // What was seen is there still: it does not count as read.
            let seen =
                source.poll_input(cx, 0, |socket| Ok(recv(socket.as_raw_fd(), buffer, MsgFlags::MSG_PEEK)?));
            let count = ready!(seen).map_err(|_| Failure::Source)?;
            self.has_ended = count == 0;
            if self.has_ended {
                return Poll::Ready(Ok(()));
            }
            let sent = ready!(poll_send(cx, sink, &buffer[..count], 0)).map_err(|_| Failure::Sink)?;
            let mut taken = 0;
            while taken < sent {
                let rest = &mut buffer[taken..sent];
                let more = source.try_input(0, |mut socket| socket.read(rest));
                taken += more.map_err(|_| Failure::Source)?;
            }
            add(counter, sent);
            Poll::Ready(Ok(()))
        })
    }

    /// After something was read: finds out whether it was the last, before it is sent. Gives how much more
    /// there was.
    fn read_on(&mut self, source: &mut End, buffer: &mut [u8]) -> usize {
        let result = source.try_input(buffer.len(), |mut socket| socket.read(buffer));
        self.has_ended = matches!(result, Ok(0));
        // The socket tells it once. What came before still gets through.
        self.has_failed = result.as_ref().is_err_and(|error| error.kind() != ErrorKind::WouldBlock);
        result.unwrap_or(0)
    }

    /// Empties the pipe, then fills it: so that a source that would block is dry, and the pipe not full.
    fn poll_splice(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut End,
        sink: &mut End,
        counter: &AtomicU64,
    ) -> Poll<Result<(), Failure>> {
        let Some(pipe) = &mut self.pipe else { return Poll::Ready(Ok(())) };
        while pipe.filled() > 0 {
            let emptied = sink.poll_output(cx, 0, |socket| pipe.empty(socket));
            ready!(emptied).map_err(|_| Failure::Sink)?;
            self.has_sent = true;
        }
        if !self.has_ended {
            match source.poll_input(cx, 0, |socket| pipe.fill(socket)) {
                Poll::Ready(Ok(count)) => {
                    add(counter, count);
                    self.has_ended = count == 0;
                    self.small_splices =
                        if count < BULK_READ { self.small_splices.saturating_add(1) } else { 0 };
                    if !self.has_ended {
                        return Poll::Ready(Ok(()));
                    }
                }
                Poll::Ready(Err(_)) => return Poll::Ready(Err(Failure::Source)),
                Poll::Pending => {
                    self.release_pipe();
                    return Poll::Pending;
                }
            }
        }
        self.release_pipe();
        Poll::Ready(Ok(()))
    }

    /// A way that waits has no pipe; it takes one again if there is more bulk to come.
    fn release_pipe(&mut self) {
        if let Some(pipe) = self.pipe.take() {
            pipe.give_back();
        }
        if self.small_splices >= SMALL_SPLICES {
            (self.small_splices, self.bulk_reads) = (0, 0);
        }
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        if let Some(pipe) = self.pipe.take() {
            pipe.give_back();
        }
    }
}

impl Held {
    fn new(bytes: Vec<u8>) -> Self {
        memory::hold(bytes.len());
        Self { bytes, sent: 0 }
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn poll_flush(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut End,
        has_sent: &mut bool,
    ) -> Poll<io::Result<()>> {
        while self.sent < self.bytes.len() {
            self.sent += ready!(poll_send(cx, sink, &self.bytes[self.sent..], 0))?;
            *has_sent = true;
        }
        *self = Self::default();
        Poll::Ready(Ok(()))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        memory::release(self.bytes.len());
    }
}

/// The way of a client that has just come: it begins with `bytes`, and what the client has said already,
/// up to a small buffer.
///
/// # Errors
/// When the client has gone: the kernel tells it once, and only an end from then on.
pub fn first_words(source: &mut End, mut bytes: Vec<u8>, counter: &AtomicU64) -> io::Result<Way> {
    if memory::allows() == 0 {
        return Ok(Way::beginning_with(bytes, false));
    }
    with_buffer(SMALL_BUFFER, |buffer| {
        let mut has_ended = false;
        match source.try_input(SMALL_BUFFER, |mut socket| socket.read(buffer)) {
            Ok(count) => {
                has_ended = count == 0;
                add(counter, count);
                bytes.extend_from_slice(&buffer[..count]);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        Ok((bytes, has_ended))
    })
    .map(|(bytes, has_ended)| Way::beginning_with(bytes, has_ended))
}

fn poll_send(cx: &mut Context<'_>, sink: &mut End, bytes: &[u8], flags: c_int) -> Poll<io::Result<usize>> {
    sink.poll_output(cx, bytes.len(), |socket| socket.send_with_flags(bytes, MSG_NOSIGNAL | flags))
}

fn with_buffer<T>(length: usize, what: impl FnOnce(&mut [u8]) -> T) -> T {
    BUFFER_OF_ALL.with_borrow_mut(|buffer| {
        buffer.resize(BUFFER, 0);
        what(&mut buffer[..length])
    })
}

/// Each counter is written by one thread.
fn add(counter: &AtomicU64, count: usize) {
    counter.store(counter.load(Relaxed).wrapping_add(count as u64), Relaxed);
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        io::Write,
        net::{Shutdown, TcpListener, TcpStream},
    };

    use socket2::Socket;

    use super::*;

    fn pair() -> (End, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        accepted.set_nonblocking(true).unwrap();
        accepted.set_nodelay(true).unwrap();
        (End::accepted(Socket::from(accepted)), peer)
    }

    /// Moves a word and the end after it. Gives the sink, its peer, and what that could read before it was
    /// told of the end.
    async fn last_word(hears_of_it: bool) -> (End, TcpStream, io::Result<usize>) {
        let ((mut source, mut client), (mut sink, mut server)) = (pair(), pair());
        // There is nothing yet: so it waits for an event, which tells of the end.
        assert!(first_words(&mut source, Vec::new(), &AtomicU64::new(0)).unwrap().held.is_empty());
        client.write_all(b"end").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let (mut way, count) = (Way::default(), AtomicU64::new(0));
        poll_fn(|cx| way.poll(cx, &mut source, &mut sink, &count, hears_of_it)).await.unwrap();
        assert_eq!(count.load(Relaxed), 3);
        server.set_nonblocking(true).unwrap();
        let read = server.read(&mut [0; 8]);
        server.set_nonblocking(false).unwrap();
        (sink, server, read)
    }

    #[tokio::test]
    async fn last_bytes_wait_for_an_end_that_is_known() {
        // The kernel sends them nonetheless after a fifth of a second, which may have passed on a busy machine.
        let mut has_waited = false;
        for _ in 0..10 {
            let (sink, mut server, read) = last_word(true).await;
            sink.finish();
            let mut text = String::new();
            server.read_to_string(&mut text).unwrap();
            if matches!(&read, Err(error) if error.kind() == ErrorKind::WouldBlock) {
                assert_eq!(text, "end");
                has_waited = true;
            }
        }
        assert!(has_waited);
    }

    #[tokio::test]
    async fn last_bytes_do_not_wait_for_nothing() {
        let (_sink, _server, read) = last_word(false).await;
        assert_eq!(read.unwrap(), 3);
    }
}

//! The load generator: one thread that makes connections and requests, as cheaply as the kernel lets it.

use std::collections::VecDeque;
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrIn, connect, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::process::{Meter, this_thread};
use super::server::{ANSWER, Wish};
use super::window::{Length, Measured, Window};

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Load {
    /// Connect, one request, one answer, the server closes; and again.
    Connections,
    /// One request after another on each connection.
    Requests,
    /// Requests at a fixed rate (per second), whatever becomes of those before.
    Paced(f64),
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Connections, or requests.
    pub measured: Measured,
    /// Seconds of each; from when it was due, of [`Load::Paced`]. Sorted.
    pub latencies: Vec<f64>,
    /// Connections that failed. Only [`Load::Connections`] goes on then.
    pub errors: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Connecting,
    Idle,
    Waiting,
}

struct Slot {
    socket: OwnedFd,
    state: State,
    received: usize,
    /// When the connection, or the request, was begun or due.
    since: Instant,
}

struct Herd {
    load: Load,
    to: SockaddrIn,
    epoll: Epoll,
    slots: Vec<Slot>,
    idle: Vec<usize>,
    due: VecDeque<Instant>,
    done: u64,
    errors: u64,
    latencies: Vec<f64>,
}

/// `data` of the timer's events.
const TIMER: u64 = u64::MAX;

/// Runs a load over `connections` connections; in a thread that is in the client's namespace.
///
/// # Errors
/// When nothing gets through, or a connection breaks that is to be kept.
pub fn run(
    load: Load,
    to: SocketAddrV4,
    connections: usize,
    mut meter: Meter,
    length: Length,
) -> Result<Outcome> {
    meter.ends.push(this_thread()?);
    let mut herd = Herd::new(load, to)?;
    for place in 0..connections {
        let slot = herd.open(place)?;
        herd.slots.push(slot);
    }
    let mut pace = match load {
        Load::Paced(rate) => Some(Pace::start(&herd.epoll, rate)?),
        Load::Connections | Load::Requests => None,
    };
    let mut window = Window::start(meter, length);
    let mut events = [EpollEvent::empty(); 64];
    loop {
        let count = match herd.epoll.wait(&mut events, EpollTimeout::from(20_u8)) {
            Err(Errno::EINTR) => 0,
            other => other?,
        };
        let now = Instant::now();
        for event in &events[..count] {
            if event.data() != TIMER {
                herd.turn(event.data() as usize, event.events(), now, window.is_measured())?;
            }
        }
        if let Some(pace) = &mut pace {
            pace.advance(now, &mut herd.due)?;
            herd.send_due()?;
        }
        if let Some(measured) = window.tick(now, herd.done)? {
            herd.latencies.sort_by(f64::total_cmp);
            return Ok(Outcome { measured, latencies: herd.latencies, errors: herd.errors });
        }
    }
}

impl Herd {
    fn new(load: Load, to: SocketAddrV4) -> Result<Self> {
        Ok(Self {
            load,
            to: SockaddrIn::from(to),
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            slots: Vec::new(),
            idle: Vec::new(),
            due: VecDeque::new(),
            done: 0,
            errors: 0,
            latencies: Vec::new(),
        })
    }

    fn open(&self, place: usize) -> Result<Slot> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
        if self.load != Load::Connections {
            setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
        }
        let since = Instant::now();
        match connect(socket.as_raw_fd(), &self.to) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(error) => return Err(error).context("connecting"),
        }
        let all = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        self.epoll.add(&socket, EpollEvent::new(all, place as u64))?;
        Ok(Slot { socket, state: State::Connecting, received: 0, since })
    }

    fn turn(&mut self, place: usize, events: EpollFlags, now: Instant, counts: bool) -> Result<()> {
        if events.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP)
            && !events.contains(EpollFlags::EPOLLIN)
        {
            return self.failed(place, "reset or refused");
        }
        if self.slots[place].state == State::Connecting && events.contains(EpollFlags::EPOLLOUT) {
            if matches!(self.load, Load::Paced(_)) {
                self.slots[place].state = State::Idle;
                self.idle.push(place);
                return Ok(());
            }
            return self.ask(place);
        }
        if events.contains(EpollFlags::EPOLLIN) {
            return self.read(place, events.contains(EpollFlags::EPOLLRDHUP), now, counts);
        }
        Ok(())
    }

    fn ask(&mut self, place: usize) -> Result<()> {
        let wish = if self.load == Load::Connections { Wish::OneAnswer } else { Wish::Answers };
        let slot = &mut self.slots[place];
        slot.state = State::Waiting;
        slot.received = 0;
        let request = wish.request();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        // So few bytes always fit into the socket's buffer.
        match send(slot.socket.as_raw_fd(), &request, flags) {
            Ok(count) if count == request.len() => Ok(()),
            _ => self.failed(place, "a request could not be sent"),
        }
    }

    /// Reads what is there: events come once.
    fn read(&mut self, place: usize, has_ended: bool, now: Instant, counts: bool) -> Result<()> {
        let mut buffer = [0; 2 * ANSWER];
        let slot = &mut self.slots[place];
        loop {
            match recv(slot.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
                Err(_) => return self.failed(place, "reset"),
                Ok(0) if self.load == Load::Connections && slot.received == ANSWER => break,
                Ok(0) => return self.failed(place, "the connection was closed"),
                Ok(count) => slot.received += count,
            }
            // Nothing can follow: one more read would only tell that.
            if slot.received >= ANSWER && (has_ended || self.load != Load::Connections) {
                break;
            }
        }
        self.done += 1;
        let since = slot.since;
        if counts {
            self.latencies.push((now - since).as_secs_f64());
        }
        match self.load {
            Load::Connections => self.slots[place] = self.open(place)?,
            Load::Requests => {
                self.slots[place].since = now;
                return self.ask(place);
            }
            Load::Paced(_) => {
                self.slots[place].state = State::Idle;
                self.idle.push(place);
            }
        }
        Ok(())
    }

    fn send_due(&mut self) -> Result<()> {
        while let (Some(place), Some(due)) = (self.idle.last().copied(), self.due.front().copied()) {
            self.idle.pop();
            self.due.pop_front();
            self.slots[place].since = due;
            self.ask(place)?;
        }
        Ok(())
    }

    fn failed(&mut self, place: usize, why: &str) -> Result<()> {
        self.errors += 1;
        ensure!(self.load == Load::Connections, "a connection broke after {} requests: {why}", self.done);
        ensure!(self.errors < 1_000, "1000 connections failed, {} did not; the last: {why}", self.done);
        self.slots[place] = self.open(place)?;
        Ok(())
    }
}

/// Says when requests are due.
struct Pace {
    timer: TimerFd,
    interval: Duration,
    next: Instant,
}

impl Pace {
    fn start(epoll: &Epoll, rate: f64) -> Result<Self> {
        let interval = Duration::from_secs_f64(1.0 / rate);
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        timer.set(Expiration::Interval(TimeSpec::from_duration(interval)), TimerSetTimeFlags::empty())?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        Ok(Self { timer, interval, next: Instant::now() + interval })
    }

    fn advance(&mut self, now: Instant, due: &mut VecDeque<Instant>) -> Result<()> {
        match self.timer.wait() {
            Ok(()) | Err(Errno::EAGAIN) => {}
            Err(error) => return Err(error.into()),
        }
        while self.next <= now {
            due.push_back(self.next);
            self.next += self.interval;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::super::server::{Counts, listen, serve};
    use super::*;

    #[test]
    fn every_load_counts_what_the_server_answered() {
        let listener = listen(0).unwrap();
        let to = SocketAddrV4::new([127, 0, 0, 1].into(), listener.local_addr().unwrap().port());
        let counts = Counts::default();
        let length = Length { warm_up: Duration::from_millis(5), measured: Duration::from_millis(50) };
        std::thread::scope(|scope| {
            let server = scope.spawn(|| serve(&listener, &counts));
            for load in [Load::Connections, Load::Requests, Load::Paced(1_000.0)] {
                let outcome = run(load, to, 4, Meter::default(), length).unwrap();
                assert!(outcome.measured.count >= 1.0 && outcome.errors == 0, "{load:?}: {outcome:?}");
                assert_eq!(outcome.latencies.len() as f64, outcome.measured.count, "{load:?}");
                assert!(outcome.measured.usage.ends > 0.0, "{load:?}");
            }
            counts.stop.store(true, Ordering::Relaxed);
            server.join().unwrap().unwrap();
        });
    }
}

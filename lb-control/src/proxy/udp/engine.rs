//! What one worker does for UDP: everything that is ready, in turn, by the batch.
//!
//! Sockets tell by edge-triggered epoll that something came, and are then read until nothing is left: a
//! batch that is not full says so. Who has more waits for the others in a queue.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    sync::{Arc, RwLock, atomic::Ordering::Relaxed},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};

use super::{
    batch::{self, BATCH, Buffers, Outgoing, Received, SIZE},
    begin::{FEW, MANY, Waiting},
    session::{self, Session},
    table::{Sessions, Timeouts, Token},
    teller::Teller,
};
use crate::{
    plan::{
        Recent,
        unreachable::{Undelivered, Unreachable},
    },
    proxy::{
        entry::{Entry, Table},
        shared,
    },
};

/// So many sockets are read before others get their turn.
const ROUND: usize = 64;
/// Of a backend that has sent little so far, this many datagrams are read at first.
const AT_FIRST: usize = 4;
/// A backend that sends so many at once sends bulk.
const BULK: usize = 8;
/// Clients of which it is remembered that a backend has refused them.
const REFUSED_CLIENTS: usize = 4_096;
/// How often what changes with time is looked at.
pub const TICK: Duration = Duration::from_millis(500);
/// In the number that epoll gives back: it is about a VIP's socket.
const WAY: u64 = 1 << 63;

/// VIPs and their ports that the proxy has sockets for.
pub type OwnAddresses = Arc<RwLock<HashSet<(IpAddr, u16)>>>;

/// A socket at a VIP. A client's datagrams always come by the same one.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) entry: Arc<Entry>,
    pub(super) table: Arc<Table>,
    socket: Arc<OwnedFd>,
    /// The longest datagrams that go to a client several at once.
    widest: usize,
    is_queued: bool,
}

/// What a backend has sent, in a buffer.
#[derive(Clone, Copy, Debug)]
struct Reply {
    way: u32,
    buffer: usize,
    /// To the client.
    what: Received,
}

/// What all workers share.
#[derive(Clone, Debug)]
pub struct Shared {
    /// A datagram from one of these would go round for ever.
    pub own: OwnAddresses,
    /// Tells clients of errors.
    pub teller: Arc<Teller>,
    /// What TCP uses of the file descriptors, and may use.
    pub proxy: Arc<shared::Shared>,
    /// Sessions of one worker.
    pub bound: usize,
    /// How long they may be idle.
    pub timeouts: Timeouts,
}

/// One worker's sessions.
#[derive(Debug)]
pub struct Engine {
    pub(super) worker: usize,
    pub(super) shared: Shared,
    pub(super) epoll: Arc<Epoll>,
    pub(super) ways: HashMap<u32, Way>,
    pub(super) sessions: Sessions<(u32, SocketAddr), Session>,
    /// Who may have something to read, as epoll's numbers.
    ready: VecDeque<u64>,
    pub(super) waiting: VecDeque<Waiting>,
    pub(super) waiting_bytes: usize,
    pub(super) refused: Recent<SocketAddr, SocketAddr>,
    buffers: Buffers,
    received: Vec<Received>,
    replies: Vec<Reply>,
    /// Datagrams of sessions that are there, and sessions that may begin, in this round.
    pub(super) served: usize,
    room: usize,
    ticked: Duration,
    is_draining: bool,
}

impl Engine {
    /// One without sockets.
    ///
    /// # Errors
    /// No file descriptor for epoll.
    pub fn new(worker: usize, shared: Shared) -> Result<Self, Errno> {
        Ok(Self {
            worker,
            epoll: Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?),
            ways: HashMap::new(),
            sessions: Sessions::new(shared.bound, shared.timeouts),
            ready: VecDeque::new(),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            refused: Recent::new(REFUSED_CLIENTS),
            buffers: Buffers::new(),
            received: Vec::new(),
            replies: Vec::new(),
            served: 0,
            room: MANY,
            ticked: Duration::ZERO,
            is_draining: false,
            shared,
        })
    }

    /// Readable when there is something to do.
    #[must_use]
    pub fn epoll(&self) -> Arc<Epoll> {
        Arc::clone(&self.epoll)
    }

    /// Whether time matters.
    #[must_use]
    pub fn has_sessions(&self) -> bool {
        self.sessions.len() > 0
    }

    /// Serves another socket of an entry.
    ///
    /// # Errors
    /// The kernel watches no more.
    pub fn add(&mut self, way: u32, entry: Arc<Entry>, socket: Arc<OwnedFd>) -> Result<(), Errno> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, WAY | u64::from(way));
        self.epoll.add(&socket, event)?;
        let table = entry.table();
        self.ways.insert(way, Way { entry, table, socket, widest: SIZE, is_queued: false });
        Ok(())
    }

    /// Serves it no more: its sessions end.
    pub fn remove(&mut self, way: u32) {
        let Some(gone) = self.ways.remove(&way) else { return };
        // Whoever has a duplicate of it keeps it in epoll otherwise (epoll(7)).
        let _ = self.epoll.delete(&gone.socket);
        self.end_all(|of, _| of == way);
    }

    /// Something else is wanted of an entry: sessions of backends that are gone end.
    pub fn follow(&mut self, id: u32) {
        let Some(way) = self.ways.get_mut(&id) else { return };
        way.table = way.entry.table();
        let shard = way.entry.counters.shard(self.worker);
        // Most entries of a large cluster have none at any time.
        if shard.begun.load(Relaxed) != shard.ended.load(Relaxed) {
            self.end_all(|of, session| of == id && session.backend.is_gone());
        }
    }

    /// Reads nothing of clients any more, and keeps sessions as long as they wait for an answer.
    pub fn drain(&mut self) {
        self.is_draining = true;
        for way in self.ways.values() {
            let _ = self.epoll.delete(&way.socket);
        }
        self.end_all(|_, session| !session.is_waiting);
    }

    /// One round, at least each [`TICK`] while there are sessions. Says whether another one has something to do already.
    pub fn round(&mut self, now: Duration) -> bool {
        if now.saturating_sub(self.ticked) >= TICK {
            self.ticked = now;
            self.tick();
        }
        self.room = if self.served > 0 { FEW } else { MANY };
        self.served = 0;
        let has_more = self.watch();
        if !self.ready.is_empty() && self.buffers.is_empty() {
            self.buffers = (0..BATCH).map(|_| vec![0; SIZE].into()).collect();
        }
        for _ in 0..self.ready.len().min(ROUND) {
            let Some(number) = self.ready.pop_front() else { break };
            let is_empty = if number & WAY == 0 {
                self.read_backend(Token::from(number), now)
            } else {
                self.read_clients((number & !WAY) as u32, now)
            };
            if !is_empty {
                self.queue(number);
            }
        }
        self.answer();
        self.begin_waiting(now);
        while let Some(token) = self.sessions.expired(now) {
            self.end(token);
        }
        has_more || !self.ready.is_empty() || !self.waiting.is_empty()
    }

    /// Asks which sockets have got something.
    fn watch(&mut self) -> bool {
        let mut events = [EpollEvent::empty(); 128];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        for event in &events[..count] {
            let number = event.data();
            if event.events().contains(EpollFlags::EPOLLERR)
                && number & WAY == 0
                && let Some(session) = self.sessions.get_mut(Token::from(number))
            {
                session.has_trouble = true;
            }
            self.queue(number);
        }
        count == events.len()
    }

    /// Puts a socket into the queue, once.
    fn queue(&mut self, number: u64) {
        let is_queued = if number & WAY == 0 {
            self.sessions.get_mut(Token::from(number)).map(|session| &mut session.is_queued)
        } else {
            self.ways.get_mut(&((number & !WAY) as u32)).map(|way| &mut way.is_queued)
        };
        if let Some(is_queued) = is_queued
            && !std::mem::replace(is_queued, true)
        {
            self.ready.push_back(number);
        }
    }

    /// Reads a batch of what clients have sent. Says whether that was all.
    fn read_clients(&mut self, id: u32, now: Duration) -> bool {
        let Some(way) = self.ways.get_mut(&id) else { return true };
        way.is_queued = false;
        if self.is_draining {
            return true;
        }
        // The buffers may hold replies.
        let socket = Arc::clone(&way.socket);
        self.answer();
        let mut buffers = std::mem::take(&mut self.buffers);
        let mut received = std::mem::take(&mut self.received);
        let result = batch::receive(&socket, &mut buffers, &mut received);
        let mut of_one = Vec::with_capacity(received.len());
        let mut first = 0;
        while first < received.len() {
            let client = received[first].from;
            let count = received[first..].iter().take_while(|other| other.from == client).count();
            of_one.clear();
            of_one.extend(received[first..first + count].iter().zip(&buffers[first..]).map(
                |(what, buffer)| Outgoing { to: None, bytes: &buffer[..what.length], segment: what.segment },
            ));
            self.pass(id, client, &of_one, now);
            first += count;
        }
        let is_empty = match result {
            Ok(()) => received.len() < buffers.len(),
            Err(error) => error == Errno::EAGAIN,
        };
        drop(of_one);
        (self.buffers, self.received) = (buffers, received);
        is_empty
    }

    /// Passes on what a client has sent.
    fn pass(&mut self, way: u32, client: SocketAddr, all: &[Outgoing<'_>], now: Duration) {
        if let Some(token) = self.sessions.find(&(way, client))
            && self.forward(token, all, now)
        {
            self.served += all.len();
        } else if self.waiting.is_empty() && self.room > 0 {
            self.room -= 1;
            self.begin(way, client, all, now);
        } else {
            all.iter().for_each(|one| self.wait(way, client, one));
        }
    }

    /// Sends to a session's backend. False if the session has ended instead, and nothing was sent.
    pub(super) fn forward(&mut self, token: Token, all: &[Outgoing<'_>], now: Duration) -> bool {
        let Some(session) = self.sessions.get_mut(token) else { return false };
        let sent = batch::send(&session.socket, all, &mut session.widest);
        session.last_length = all.last().map_or(0, Outgoing::last_length);
        session.is_waiting = true;
        session.entry.counters.shard(self.worker).bytes_in.fetch_add(sent.bytes, Relaxed);
        if let Some(why) = sent.error.and_then(session::means) {
            self.fail(token, why, now);
            return sent.datagrams > 0;
        }
        session.untroubled_since = session.backend.met_no_trouble(session.untroubled_since, now);
        self.lost(0, sent.lost);
        self.sessions.client_sent(token, now);
        true
    }

    /// Reads what a backend has sent, and what ICMP has told. Says whether that was all.
    fn read_backend(&mut self, token: Token, now: Duration) -> bool {
        let wanted = match self.sessions.get_mut(token) {
            None => return true,
            Some(session) if session.is_bulk => BATCH,
            Some(_) => AT_FIRST,
        };
        let mut used = self.replies.len();
        if used + wanted > BATCH {
            self.answer();
            used = 0;
        }
        let Some((&(way, client), _)) = self.sessions.get(token).map(|(key, session)| (key, session)) else {
            return true;
        };
        let Some(session) = self.sessions.get_mut(token) else { return true };
        session.is_queued = false;
        let room = &mut self.buffers[used..used + wanted];
        let result = batch::receive(&session.socket, room, &mut self.received);
        let count = self.received.len();
        let is_empty = result == Err(Errno::EAGAIN) || (result.is_ok() && count < wanted);
        if let Err(error) = result
            && session::means(error).is_some()
        {
            session.has_trouble = true;
        }
        if count > 0 {
            session.is_waiting = false;
            session.backend.answers();
            // So that a full batch is asked for next, and at some time put together.
            if count == wanted && !session.is_bulk {
                session.is_bulk = true;
            }
            if count >= BULK {
                session::put_together(&session.socket);
            }
        }
        let has_trouble = std::mem::take(&mut session.has_trouble);
        let trouble = if has_trouble { session::trouble(&session.socket) } else { None };
        let whats = self.received.drain(..).enumerate();
        let replies = whats.map(|(at, what)| {
            let what = Received { from: client, ..what };
            Reply { way, buffer: used + at, what }
        });
        self.replies.extend(replies);
        if count > 0 {
            self.served += count;
            self.sessions.backend_sent(token, now);
        }
        if let Some(trouble) = trouble {
            self.fail_with(token, &trouble, now);
        }
        if self.is_draining && count > 0 {
            self.end(token);
        }
        is_empty
    }

    /// Sends clients what backends have sent.
    fn answer(&mut self) {
        let mut replies = std::mem::take(&mut self.replies);
        let mut lost = 0;
        // Keeps the order of each client's.
        replies.sort_by_key(|reply| reply.way);
        for replies in replies.chunk_by(|a, b| a.way == b.way) {
            let Some(way) = self.ways.get_mut(&replies[0].way) else { continue };
            let all: Vec<_> = replies
                .iter()
                .map(|Reply { buffer, what, .. }| Outgoing {
                    to: Some(what.from),
                    bytes: &self.buffers[*buffer][..what.length],
                    segment: what.segment,
                })
                .collect();
            let sent = batch::send(&way.socket, &all, &mut way.widest);
            way.entry.counters.shard(self.worker).bytes_out.fetch_add(sent.bytes, Relaxed);
            lost += sent.lost;
        }
        replies.clear();
        self.replies = replies;
        self.lost(1, lost);
    }

    /// Counts datagrams that were not passed on: from clients 0, to clients 1.
    fn lost(&self, direction: usize, count: u64) {
        // All workers share it.
        if count > 0 {
            self.shared.proxy.lost[direction].fetch_add(count, Relaxed);
        }
    }

    /// From time to time, however much there is to do: ways' MTUs may have changed, and TCP may need more than
    /// before.
    fn tick(&mut self) {
        self.ways.values_mut().for_each(|way| way.widest = SIZE);
        while self.sessions.len() > self.bound() {
            self.displace();
        }
    }

    fn fail(&mut self, token: Token, why: Unreachable, now: Duration) {
        let Some((_, session)) = self.sessions.get(token) else { return };
        let told = session::trouble(&session.socket).filter(session::Trouble::ends_session);
        let trouble = told.unwrap_or(session::Trouble { why, payload: Vec::new() });
        self.fail_with(token, &trouble, now);
    }

    /// Tells a client that its backend did not get what was sent to it. If it takes nothing, the session ends.
    fn fail_with(&mut self, token: Token, trouble: &session::Trouble, now: Duration) {
        let Some(((_, client), session)) = self.sessions.get(token) else { return };
        let vip = SocketAddr::new(session.entry.key.vip, session.entry.key.port);
        let (client, backend, length) = (*client, session.backend.address, session.last_length);
        if trouble.ends_session() {
            session.backend.failed(now);
            self.refused.insert(client, backend, now);
            self.end(token);
        }
        let of = Undelivered { client, vip, length, payload: &trouble.payload };
        self.shared.teller.tell(trouble.why, &of, now);
    }

    pub(super) fn end(&mut self, token: Token) {
        if let Some((_, session)) = self.sessions.remove(token) {
            session.backend.closes();
            session.entry.counters.shard(self.worker).ended.fetch_add(1, Relaxed);
            self.shared.proxy.sessions.fetch_sub(1, Relaxed);
        }
    }

    fn end_all(&mut self, which: impl Fn(u32, &Session) -> bool) {
        let all = self.sessions.iter().filter(|(_, (way, _), session)| which(*way, session));
        let tokens: Vec<_> = all.map(|(token, ..)| token).collect();
        tokens.into_iter().for_each(|token| self.end(token));
    }
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, os::fd::AsRawFd};

    use super::*;
    use crate::{
        model::{ClientAddress, ObjectRef, Protocol, Scheduler, ServiceKey},
        plan::Frontend,
        proxy::{Limits, Settings, backend::Backend},
    };

    /// An engine with one entry, which has no backends, and the number of its way.
    fn engine(socket: UdpSocket) -> (Engine, u32) {
        let settings = Settings { workers: 1, ..Settings::default() };
        let limits = Limits::of(1_024, &settings);
        let seconds = Duration::from_secs;
        let shared = Shared {
            own: OwnAddresses::default(),
            teller: Arc::new(Teller::new()),
            proxy: Arc::new(shared::Shared::new(settings, limits)),
            bound: 100,
            timeouts: Timeouts { unreplied: seconds(30), replied: seconds(60) },
        };
        let address = socket.local_addr().unwrap();
        let service = ObjectRef { namespace: "test".into(), name: "dns".into() };
        let frontend = Frontend {
            key: ServiceKey { service, protocol: Protocol::Udp, vip: address.ip(), port: address.port() },
            backends: Vec::new(),
            slots: Vec::new(),
            scheduler: Scheduler::RoundRobin,
            source_ranges: Arc::default(),
            affinity: None,
            connection_limit: None,
            client_address: ClientAddress::Path,
        };
        let mut engine = Engine::new(0, shared).unwrap();
        let entry = Arc::new(Entry::new(Arc::new(frontend), 1, &Arc::default()));
        engine.add(7, entry, Arc::new(socket.into())).unwrap();
        (engine, 7)
    }

    #[test]
    fn it_ticks_while_there_is_no_end_of_work() {
        let (mut engine, way) = engine(UdpSocket::bind("127.0.0.1:0").unwrap());
        let at = |milliseconds: u64| Duration::from_millis(1_000_000 + milliseconds);
        engine.round(at(0));
        engine.ways.get_mut(&way).unwrap().widest = 1;
        for (now, widest) in [(1, 1), (499, 1), (500, SIZE)] {
            engine.round(at(now));
            assert_eq!(engine.ways[&way].widest, widest, "{now}");
        }
    }

    /// What sockets do not take is counted, in either direction.
    #[test]
    fn what_is_lost_is_counted() {
        let (mut engine, way) = engine(UdpSocket::bind("127.0.0.1:0").unwrap());
        let lost = |engine: &Engine| engine.shared.proxy.lost.each_ref().map(|count| count.load(Relaxed));
        let (client, now) = (SocketAddr::from(([127, 0, 0, 1], 9)), Duration::from_secs(1_000));
        let target = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = target.local_addr().unwrap();
        let socket = session::open(address, None).unwrap();
        // It takes nothing from now on (EPIPE), which says nothing of the backend.
        nix::sys::socket::shutdown(socket.as_raw_fd(), nix::sys::socket::Shutdown::Write).unwrap();
        let entry = Arc::clone(&engine.ways[&way].entry);
        let session = Session::new(entry, Arc::new(Backend::new(address)), socket, now);
        let token = engine.sessions.insert((way, client), session, now);
        let one = Outgoing { to: None, bytes: b"hello", segment: 5 };
        assert!(engine.forward(token, &[one, one], now));
        assert_eq!(lost(&engine), [2, 0]);

        engine.buffers = vec![vec![0; SIZE].into()];
        // Not an address that a socket of IPv4 sends to.
        let from = "[2001:db8::1]:9".parse().unwrap();
        engine.replies.push(Reply { way, buffer: 0, what: Received { from, length: 5, segment: 5 } });
        engine.answer();
        assert_eq!(lost(&engine), [2, 1]);
    }
}

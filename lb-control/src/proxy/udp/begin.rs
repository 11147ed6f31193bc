//! How sessions begin, or do not.

use std::{
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{Arc, PoisonError, atomic::Ordering::Relaxed},
    time::Duration,
};

use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::{
    batch::Outgoing,
    engine::{Engine, Shared, Way},
    session::{self, NotOpen, Session},
};
use crate::{
    plan::unreachable::{Undelivered, Unreachable},
    proxy::counts::Refusal,
};

/// Sessions that begin in a round while others have traffic, ...
pub(super) const FEW: usize = 16;
/// ... and while nobody has.
pub(super) const MANY: usize = 256;
/// What may wait for sessions to begin: datagrams, and bytes.
const WAITING: usize = 8_192;
const WAITING_BYTES: usize = 4 << 20;
/// Backends that may be tried for a new session.
const TRIES: usize = 3;
/// Sessions that there may be however many connections there are.
const LEAST: usize = 16;

/// A datagram that waits for its session to begin.
#[derive(Debug)]
pub(super) struct Waiting {
    way: u32,
    client: SocketAddr,
    bytes: Box<[u8]>,
    segment: usize,
}

impl Engine {
    /// Lets a datagram wait for its session to begin.
    pub(super) fn wait(&mut self, way: u32, client: SocketAddr, one: &Outgoing<'_>) {
        if self.waiting.len() >= WAITING || self.waiting_bytes + one.bytes.len() > WAITING_BYTES {
            self.refuse(way, Refusal::TooMany);
            return;
        }
        self.waiting_bytes += one.bytes.len();
        self.waiting.push_back(Waiting { way, client, bytes: one.bytes.into(), segment: one.segment });
    }

    pub(super) fn begin_waiting(&mut self, now: Duration) {
        for _ in 0..if self.served > 0 { FEW } else { MANY } {
            let Some(Waiting { way, client, bytes, segment }) = self.waiting.pop_front() else { break };
            self.waiting_bytes -= bytes.len();
            let all = [Outgoing { to: None, bytes: &bytes, segment }];
            let is_passed =
                self.sessions.find(&(way, client)).is_some_and(|token| self.forward(token, &all, now));
            if !is_passed {
                self.begin(way, client, &all, now);
            }
        }
    }

    /// Begins a session with what the client has sent, or refuses to.
    pub(super) fn begin(&mut self, way: u32, client: SocketAddr, all: &[Outgoing<'_>], now: Duration) {
        let Some(Way { entry, table, .. }) = self.ways.get(&way) else { return };
        let (entry, table) = (Arc::clone(entry), Arc::clone(table));
        if self.is_own(client) {
            return entry.counters.refuse(Refusal::OwnAddress);
        }
        // Those who may not connect get no answer at all, as in the kernel.
        if !session::may_be_answered(client) || entry.admit(&table, client.ip(), now).is_err() {
            return;
        }
        if self.sessions.len() >= self.bound() {
            self.displace();
        }
        let failed = self.refused.get(&client);
        let mut tried: Vec<usize> = Vec::new();
        tried.extend(failed.and_then(|failed| table.backends.iter().position(|one| one.address == failed)));
        let mut why = None;
        for _ in 0..TRIES {
            let choice = entry.choose(&table, client, &tried, now);
            // Rather the one that has failed than none.
            let again = || entry.choose(&table, client, &[], now).filter(|_| why.is_none());
            let Some(index) = choice.or_else(again) else { break };
            match self.open(table.backends[index].address, client) {
                Ok(socket) => {
                    let backend = Arc::clone(&table.backends[index]);
                    backend.opens();
                    backend.took();
                    entry.counters.shard(self.worker).begun.fetch_add(1, Relaxed);
                    entry.counters.shard(self.worker).accepted.fetch_add(1, Relaxed);
                    self.shared.proxy.sessions.fetch_add(1, Relaxed);
                    let session = Session::new(Arc::clone(&entry), backend, socket, now);
                    return self.start(way, client, session, all, now);
                }
                Err(NotOpen::Descriptors) => return entry.counters.refuse(Refusal::Descriptors),
                Err(NotOpen::LocalPorts) => return entry.counters.refuse(Refusal::LocalPorts),
                Err(NotOpen::SourceMissing) => return entry.counters.refuse(Refusal::SourceMissing),
                Err(NotOpen::NoWay) => {
                    table.backends[index].failed(now);
                    tried.push(index);
                    why = Some(Refusal::ConnectFailed);
                }
            }
        }
        let refusal = why.unwrap_or(Refusal::NoBackend);
        entry.counters.refuse(refusal);
        let told = if refusal == Refusal::NoBackend { Unreachable::Port } else { Unreachable::Host };
        if let Some(first) = all.first() {
            let (length, payload) = (first.last_length(), &first.bytes[..first.segment]);
            let vip = SocketAddr::new(entry.key.vip, entry.key.port);
            self.shared.teller.tell(told, &Undelivered { client, vip, length, payload }, now);
        }
    }

    fn start(&mut self, way: u32, client: SocketAddr, session: Session, all: &[Outgoing<'_>], now: Duration) {
        let token = self.sessions.insert((way, client), session, now);
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, token.into());
        let is_watched = self
            .sessions
            .get(token)
            .is_some_and(|(_, session)| self.epoll.add(&session.socket, event).is_ok());
        if is_watched {
            self.forward(token, all, now);
        } else {
            self.end(token);
            self.refuse(way, Refusal::Descriptors);
        }
    }

    /// A socket to a backend; one that was idle for long makes room for it.
    fn open(&mut self, backend: SocketAddr, client: SocketAddr) -> Result<OwnedFd, NotOpen> {
        let from = self.shared.proxy.settings.source(backend, client);
        match session::open(backend, from) {
            Err(NotOpen::Descriptors | NotOpen::LocalPorts) if self.sessions.len() > 0 => {
                self.displace();
                session::open(backend, from)
            }
            result => result,
        }
    }

    /// How many sessions there may be: as many as TCP leaves file descriptors for, and always some.
    pub(super) fn bound(&self) -> usize {
        let Shared { proxy, bound, .. } = &self.shared;
        let left = proxy.left_for_sessions() / proxy.settings.threads();
        (*bound).min((self.sessions.len() + left).max(LEAST))
    }

    /// Ends the session that can best be done without.
    pub(super) fn displace(&mut self) {
        let Some(token) = self.sessions.oldest() else { return };
        if let Some((_, session)) = self.sessions.get(token) {
            session.entry.counters.refuse(Refusal::Displaced);
        }
        self.end(token);
    }

    fn refuse(&self, way: u32, why: Refusal) {
        if let Some(way) = self.ways.get(&way) {
            way.entry.counters.refuse(why);
        }
    }

    fn is_own(&self, client: SocketAddr) -> bool {
        let own = self.shared.own.read().unwrap_or_else(PoisonError::into_inner);
        own.contains(&(client.ip(), client.port()))
    }
}

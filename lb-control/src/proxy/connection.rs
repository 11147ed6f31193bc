//! A connection from a client, from its acceptance to its end.

use std::{
    future::poll_fn,
    mem,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
    time::Duration,
};

use socket2::Socket;
use tokio::time::sleep;

use super::{
    Settings,
    backend::Backend,
    clock,
    connect::{Failed, Wish, connect},
    counts::Refusal,
    end::End,
    entry::{Entry, Table},
    listener::PAUSES,
    registry::Registration,
    shared::Shared,
    way::{Failure, Way, first_words},
};
use crate::{
    model::ClientAddress,
    plan::proxy_header::{version_1, version_2},
};

/// So many backends are tried.
const TRIES: usize = 3;
/// A connection that is there for so long is asked to find out when its backend is gone: most are not.
const SETTLED: Duration = Duration::from_secs(10);

/// How long a side may take for what was sent before it is told that the other one has failed.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A connection that counts.
#[derive(Debug)]
pub struct Connection {
    shared: Arc<Shared>,
    entry: Arc<Entry>,
    worker: usize,
}

/// A backend's share in a connection.
struct Share(Arc<Backend>);

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Both sides ended it.
    Normal,
    /// One of the two failed.
    Failed,
    /// It is not wanted any more, or was idle for too long.
    Cut,
}

/// Both sockets, and what goes on between them.
struct Relay {
    client: End,
    server: End,
    up: Way,
    down: Way,
    /// One of the two does not take any more: what the other way still has is the last.
    is_broken: bool,
    /// When it has been idle for too long; 0 before it is known.
    idle_at: u64,
    /// Bytes that the two had not acknowledged when it seemed idle; `usize::MAX` before that.
    unacknowledged: usize,
    /// When it is too old to be without keepalive.
    settled_at: u64,
}

impl Connection {
    /// Counts it, unless there are too many.
    #[must_use]
    pub fn begin(shared: &Arc<Shared>, entry: &Arc<Entry>, worker: usize) -> Option<Self> {
        if shared.open.fetch_add(1, Relaxed) >= shared.most_connections() {
            shared.closes();
            entry.counters.refuse(Refusal::TooMany);
            return None;
        }
        shared.loads[worker].fetch_add(1, Relaxed);
        entry.counters.shard(worker).begun.fetch_add(1, Relaxed);
        Some(Self { shared: Arc::clone(shared), entry: Arc::clone(entry), worker })
    }

    /// Serves a client.
    pub async fn serve(self, client: Socket, peer: SocketAddr) {
        let table = self.entry.table();
        let mut client = End::accepted(client);
        if self.entry.admit(&table, peer.ip(), clock::now()).is_err() {
            return client.reset();
        }
        let counts = self.entry.counters.shard(self.worker);
        let Ok(up) = first_words(&mut client, self.header(&table, peer), &counts.bytes_in) else {
            // It has gone. No backend needs to hear of it.
            return client.reset();
        };
        let mut registration = Registration::default();
        let server = self.server(&table, peer, up.has_bytes(), &mut registration).await;
        let (server, share) = match server {
            Ok(found) => found,
            Err(refusal) => {
                refusal.into_iter().for_each(|why| self.entry.counters.refuse(why));
                return client.reset();
            }
        };
        drop(table);
        counts.accepted.fetch_add(1, Relaxed);
        let mut relay = Relay {
            client,
            server,
            up,
            down: Way::default(),
            is_broken: false,
            idle_at: 0,
            unacknowledged: usize::MAX,
            settled_at: clock::milliseconds() + clock::in_milliseconds(SETTLED),
        };
        let outcome = poll_fn(|cx| relay.poll(cx, &self, &share.0, &mut registration)).await;
        match outcome {
            Outcome::Normal => {}
            Outcome::Cut => {
                relay.client.reset();
                relay.server.reset();
            }
            Outcome::Failed => self.reset_late([relay.client, relay.server], &share.0, registration).await,
        }
    }

    /// A backend that closes with something unread resets the connection after its answer: a client that
    /// is slow gets the answer first. So does a backend what its client has sent.
    async fn reset_late(&self, mut ends: [End; 2], backend: &Backend, mut registration: Registration) {
        let deadline = clock::milliseconds() + clock::in_milliseconds(LAST_WORDS);
        for end in &mut ends {
            if end.says_no_more().is_err() {
                continue;
            }
            poll_fn(|cx| {
                let is_cut = backend.is_gone() || self.shared.is_over.load(Relaxed);
                if is_cut || clock::milliseconds() >= deadline {
                    return Poll::Ready(());
                }
                registration.wake_at(cx, deadline);
                end.poll_room(cx)
            })
            .await;
        }
        ends.into_iter().for_each(End::reset);
    }

    /// Goes from backend to backend until one accepts. The reason for a failure is `None` if the
    /// connection is not wanted any more.
    async fn server(
        &self,
        table: &Table,
        peer: SocketAddr,
        has_bytes: bool,
        registration: &mut Registration,
    ) -> Result<(End, Share), Option<Refusal>> {
        let mut tried = [usize::MAX; TRIES];
        let mut why = Refusal::NoBackend;
        let is_transparent = table.frontend.client_address == ClientAddress::Transparent;
        for number in 0..TRIES {
            let Some(index) = self.entry.choose(table, peer, &tried[..number], clock::now()) else { break };
            tried[number] = index;
            let share = Share::of(&table.backends[index]);
            let backend = &share.0;
            let settings = &self.shared.settings;
            let from = if is_transparent { Some(peer.ip()) } else { settings.source(backend.address, peer) };
            // From when on it may take that long is for `connect` to say.
            let wish = Wish { from, is_transparent, has_bytes, deadline: 0 };
            match self.connect(backend, wish, registration).await {
                Ok(end) => {
                    backend.succeeded();
                    return Ok((end, share));
                }
                Err(Failed::Backend) => {
                    backend.failed(clock::now());
                    why = Refusal::ConnectFailed;
                }
                Err(Failed::Here(Refusal::Descriptors)) => return Err(Some(Refusal::Descriptors)),
                Err(Failed::Here(refusal)) => why = refusal,
                Err(Failed::Unwanted) if self.shared.is_over.load(Relaxed) => return Err(None),
                Err(Failed::Unwanted) => why = Refusal::ConnectFailed,
            }
        }
        Err(Some(why))
    }

    /// Connects to a backend. If there is no file descriptor for it, the client waits: as long as a backend
    /// may take to accept.
    async fn connect(
        &self,
        backend: &Backend,
        wish: Wish,
        registration: &mut Registration,
    ) -> Result<End, Failed> {
        let timeout = clock::in_milliseconds(self.shared.settings.connect_timeout);
        let is_wanted = || !backend.is_gone() && !self.shared.is_over.load(Relaxed);
        let (begin, mut pause) = (clock::milliseconds(), PAUSES[0]);
        loop {
            let now = clock::milliseconds();
            let wish = Wish { deadline: now + timeout, ..wish };
            match connect(backend.address, wish, registration, is_wanted).await {
                Err(Failed::Here(Refusal::Descriptors)) if !is_wanted() => return Err(Failed::Unwanted),
                Err(Failed::Here(Refusal::Descriptors)) if now < begin + timeout => {
                    self.shared.shortages.fetch_add(1, Relaxed);
                    sleep(pause).await;
                    pause = (pause * 2).min(PAUSES[1]);
                }
                result => return result,
            }
        }
    }

    fn header(&self, table: &Table, peer: SocketAddr) -> Vec<u8> {
        let vip = SocketAddr::new(self.entry.key.vip, self.entry.key.port);
        match table.frontend.client_address {
            ClientAddress::ProxyV1 => version_1(peer, vip),
            ClientAddress::ProxyV2 => version_2(peer, vip),
            ClientAddress::Path | ClientAddress::Transparent => Vec::new(),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.entry.counters.shard(self.worker).ended.fetch_add(1, Relaxed);
        self.shared.loads[self.worker].fetch_sub(1, Relaxed);
        self.shared.closes();
    }
}

impl Share {
    fn of(backend: &Arc<Backend>) -> Self {
        backend.opens();
        Self(Arc::clone(backend))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.0.closes();
    }
}

impl Relay {
    /// Ready when it has ended.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        connection: &Connection,
        backend: &Backend,
        registration: &mut Registration,
    ) -> Poll<Outcome> {
        let shared = &connection.shared;
        if backend.is_gone() || shared.is_over.load(Relaxed) {
            return Poll::Ready(Outcome::Cut);
        }
        let counts = connection.entry.counters.shard(connection.worker);
        let moved = || counts.bytes_in.load(Relaxed).wrapping_add(counts.bytes_out.load(Relaxed));
        let before = moved();
        if !self.up.is_done() {
            let ends_well = !self.is_broken;
            let result = self.up.poll(cx, &mut self.client, &mut self.server, &counts.bytes_in, ends_well);
            let is_last = self.down.is_done();
            if !Self::follow(result, &mut self.up, &self.server, is_last, &mut self.is_broken) {
                return Poll::Ready(Outcome::Failed);
            }
        }
        if !self.down.is_done() {
            let ends_well = !self.is_broken;
            let result = self.down.poll(cx, &mut self.server, &mut self.client, &counts.bytes_out, ends_well);
            let is_last = self.up.is_done();
            if !Self::follow(result, &mut self.down, &self.client, is_last, &mut self.is_broken) {
                return Poll::Ready(Outcome::Failed);
            }
        }
        if self.up.is_done() && self.down.is_done() {
            return Poll::Ready(if self.is_broken { Outcome::Failed } else { Outcome::Normal });
        }
        // Of both, each time.
        let has_sent = self.up.has_sent() | self.down.has_sent();
        self.poll_deadline(cx, &shared.settings, registration, has_sent || before != moved())
    }

    /// What comes of how a way went. Says whether the other one goes on.
    fn follow(
        result: Poll<Result<(), Failure>>,
        way: &mut Way,
        sink: &End,
        is_last: bool,
        is_broken: &mut bool,
    ) -> bool {
        match result {
            Poll::Pending => {}
            // After the last, both sockets are closed: that says it too.
            Poll::Ready(Ok(())) if is_last => {}
            Poll::Ready(Ok(())) => sink.finish(),
            Poll::Ready(Err(Failure::Source)) => return false,
            // Whoever does not listen any more may have said why: that comes through first.
            Poll::Ready(Err(Failure::Sink)) => {
                way.give_up();
                *is_broken = true;
            }
        }
        true
    }

    fn poll_deadline(
        &mut self,
        cx: &mut Context<'_>,
        settings: &Settings,
        registration: &mut Registration,
        has_moved: bool,
    ) -> Poll<Outcome> {
        let now = clock::milliseconds();
        if has_moved || self.idle_at == 0 {
            self.idle_at = now + clock::in_milliseconds(settings.idle_timeout_tcp);
            self.unacknowledged = usize::MAX;
        }
        if now >= self.idle_at {
            if !self.is_taken() {
                return Poll::Ready(Outcome::Cut);
            }
            self.idle_at = now + clock::in_milliseconds(settings.idle_timeout_tcp);
        }
        if now >= self.settled_at {
            self.settled_at = u64::MAX;
            self.server.keep_alive(&settings.tcp_keepalive());
        }
        registration.wake_at(cx, self.idle_at.min(self.settled_at));
        Poll::Pending
    }

    /// Whether one of the two still takes what the kernel has for it, of which nobody tells: megabytes may
    /// wait there. When it is asked for the first time it may be so; from then on less must be left.
    fn is_taken(&mut self) -> bool {
        let left = self.client.unacknowledged() + self.server.unacknowledged();
        let before = mem::replace(&mut self.unacknowledged, left);
        left > 0 && left < before
    }
}

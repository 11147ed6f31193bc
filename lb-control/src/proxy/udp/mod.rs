//! UDP: a session for each client of an entry.
//!
//! Each worker has sockets of its own at the VIPs and gets the clients that the kernel's hash gives them,
//! always the same ones. A session has a socket that is connected to its backend; what comes by that goes
//! to the client from the VIP's socket. Both ways go by the batch.

mod batch;
mod begin;
mod engine;
mod run;
mod session;
mod socket;
mod table;
mod teller;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{
        Arc, PoisonError,
        atomic::Ordering::Relaxed,
        mpsc::{self, Receiver},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail};
use lb_common::abi::FlowState;
use tokio::{
    runtime::Handle,
    sync::mpsc::{UnboundedSender, unbounded_channel},
    time::{Instant, sleep},
};

use super::{Inherited, Lent, entry::Entry, shared};
use crate::{
    model::{Protocol, ServiceKey},
    plan::{Frontend, Wanted},
};
use engine::{Engine, OwnAddresses};
use run::{Order, Orders};
use table::Timeouts;
pub use teller::{IcmpErrors, Teller};

/// One of so many file descriptors may be a session's.
const SHARE_OF_SESSIONS: usize = 4;
/// One of so many may be a VIP's socket that is there so that each worker has its own.
const SHARE_OF_WAYS: usize = 64;
/// How long a worker may take to do what it is told: it never waits for anything.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often to look whether sessions have ended.
const LOOK: Duration = Duration::from_millis(20);

/// All UDP entries.
#[derive(Debug)]
pub struct Udp {
    workers: Vec<UnboundedSender<Orders>>,
    entries: BTreeMap<ServiceKey, Served>,
    own: OwnAddresses,
    teller: Arc<Teller>,
    shared: Arc<shared::Shared>,
    /// As long as there are no more sockets at VIPs than these, each worker gets its own.
    own_ways: usize,
    last_way: u32,
    /// Entries whose sockets are there only for sessions of backends that take no new ones.
    lingering: BTreeSet<ServiceKey>,
}

#[derive(Debug)]
struct Served {
    entry: Arc<Entry>,
    ways: Vec<Way>,
}

/// A socket at the VIP.
#[derive(Debug)]
struct Way {
    number: u32,
    worker: usize,
    socket: Arc<OwnedFd>,
}

impl Udp {
    /// One engine on each of the workers' runtimes.
    ///
    /// # Errors
    /// When there are no file descriptors.
    pub fn start(workers: &[Handle], proxy: &Arc<shared::Shared>) -> Result<Self> {
        let own = OwnAddresses::default();
        let teller = Arc::new(Teller::new());
        let seconds = |state: FlowState| Duration::from_secs(state.default_timeout_seconds().into());
        let timeouts = Timeouts {
            unreplied: seconds(FlowState::UdpUnreplied).min(proxy.settings.idle_timeout_udp),
            replied: proxy.settings.idle_timeout_udp,
        };
        let bound = (proxy.limits.descriptors / SHARE_OF_SESSIONS / workers.len().max(1)).max(1);
        let shared = engine::Shared {
            own: Arc::clone(&own),
            teller: Arc::clone(&teller),
            proxy: Arc::clone(proxy),
            bound,
            timeouts,
        };
        let start = |(number, worker): (usize, &Handle)| {
            let engine = Engine::new(number, shared.clone()).context("starting the UDP engine")?;
            let (orders, receiver) = unbounded_channel();
            worker.spawn(run::run(engine, receiver));
            Ok(orders)
        };
        let engines = workers.iter().enumerate().map(start).collect::<Result<_>>()?;
        Ok(Self {
            workers: engines,
            entries: BTreeMap::new(),
            own,
            teller,
            shared: Arc::clone(proxy),
            own_ways: proxy.limits.descriptors / SHARE_OF_WAYS,
            last_way: 0,
            lingering: BTreeSet::new(),
        })
    }

    /// Serves an entry, or no more. `inherited` are sockets of an agent before this one. When it returns,
    /// the sockets are open, or closed.
    ///
    /// # Errors
    /// When the address cannot be had: then it is not served.
    pub fn apply(&mut self, key: &ServiceKey, wanted: Wanted, inherited: Vec<Inherited>) -> Result<()> {
        self.close_idle();
        match wanted {
            Wanted::Serve(frontend) => {
                self.update(key, &frontend);
                let takes = !frontend.slots.is_empty();
                let Some(served) = self.entries.get(key) else { return Ok(()) };
                if takes {
                    self.lingering.remove(key);
                    return if served.ways.is_empty() { self.open(key, inherited) } else { Ok(()) };
                }
                if served.entry.counters.open() == 0 {
                    self.close(key);
                } else if !served.ways.is_empty() {
                    self.lingering.insert(key.clone());
                }
                Ok(())
            }
            // Without its socket a session can neither hear its client nor answer it.
            Wanted::Finish(frontend) => {
                self.update(key, &frontend);
                self.close(key);
                Ok(())
            }
            Wanted::Gone => {
                self.close(key);
                self.entries.remove(key);
                Ok(())
            }
        }
    }

    /// Sessions of an entry.
    #[must_use]
    pub fn connections(&self, key: &ServiceKey) -> u64 {
        self.entries.get(key).map_or(0, |served| served.entry.counters.open())
    }

    /// Sessions of all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.entries.values().map(|served| served.entry.counters.open()).sum()
    }

    /// What is served of an entry.
    #[must_use]
    pub fn entry(&self, key: &ServiceKey) -> Option<&Arc<Entry>> {
        self.entries.get(key).map(|served| &served.entry)
    }

    /// Who tells clients of errors.
    #[must_use]
    pub fn teller(&self) -> Arc<Teller> {
        Arc::clone(&self.teller)
    }

    /// The sockets, to hand over.
    pub fn sockets(&self) -> impl Iterator<Item = Lent> {
        self.entries.iter().flat_map(|(key, served)| {
            let (address, protocol) = (address(key), Protocol::Udp);
            served.ways.iter().map(move |way| Lent {
                address,
                protocol,
                socket: Arc::clone(&way.socket) as _,
            })
        })
    }

    /// Reads nothing of clients any more; whoever waits for an answer may get it until the deadline.
    pub async fn drain(&self, deadline: Duration) {
        let end = Instant::now() + deadline;
        // Not waited for: this may be the only thread there is.
        drop(self.order_all(|| Order::Drain));
        while self.total() > 0 && Instant::now() < end {
            sleep(LOOK).await;
        }
    }

    fn update(&mut self, key: &ServiceKey, frontend: &Arc<Frontend>) {
        let Some(served) = self.entries.get(key) else {
            let entry = Arc::new(Entry::new(Arc::clone(frontend), self.workers.len(), &self.shared.clients));
            self.entries.insert(key.clone(), Served { entry, ways: Vec::new() });
            return;
        };
        let ranges = Arc::clone(&served.entry.table().frontend.source_ranges);
        served.entry.update(Arc::clone(frontend));
        if ranges != frontend.source_ranges {
            served.ways.iter().for_each(|way| socket::filter(&way.socket, &served.entry));
        }
        let follow = |way: &Way| self.order(way.worker, Order::Follow(way.number));
        wait(served.ways.iter().filter_map(follow).collect());
    }

    fn open(&mut self, key: &ServiceKey, inherited: Vec<Inherited>) -> Result<()> {
        let Some(served) = self.entries.get(key) else { return Ok(()) };
        let entry = Arc::clone(&served.entry);
        let address = address(key);
        let all = self.workers.len();
        let wanted = if self.shared.ways.load(Relaxed) + all <= self.own_ways { all } else { 1 };
        if !self.shared.has_room_at_vips(wanted) {
            bail!("{key}: no file descriptor is left for its socket: raise the limit of open files");
        }
        let mut sockets = Vec::new();
        for socket in inherited {
            let socket = socket.take().and_then(|socket| socket::inherited(socket, &entry));
            sockets.push(socket.with_context(|| format!("{key}: taking over its socket"))?);
        }
        // All before any is read: each changes whom the others get.
        while sockets.len() < wanted {
            let socket = socket::open(address, &entry);
            sockets.push(socket.with_context(|| format!("{key}: listening on {address}"))?);
        }
        let mut ways = Vec::new();
        for (count, socket) in sockets.into_iter().enumerate() {
            self.last_way = self.last_way.wrapping_add(1) & (u32::MAX >> 1);
            let (number, socket) = (self.last_way, Arc::new(socket));
            // With one socket for each entry, entries are spread over the workers.
            let worker = if wanted == 1 { number as usize % all } else { count % all };
            ways.push(Way { number, worker, socket });
        }
        self.own.write().unwrap_or_else(PoisonError::into_inner).insert((key.vip, key.port));
        let mut answers = Vec::new();
        for way in &ways {
            let add = Order::Add(way.number, Arc::clone(&entry), Arc::clone(&way.socket));
            answers.extend(self.order(way.worker, add));
        }
        self.shared.ways.fetch_add(ways.len(), Relaxed);
        if let Some(served) = self.entries.get_mut(key) {
            served.ways = ways;
        }
        if let Some(error) = wait(answers) {
            self.close(key);
            bail!("{key}: watching its socket: {error}");
        }
        Ok(())
    }

    fn close(&mut self, key: &ServiceKey) {
        let Some(served) = self.entries.get_mut(key) else { return };
        let ways = std::mem::take(&mut served.ways);
        self.lingering.remove(key);
        if ways.is_empty() {
            return;
        }
        self.shared.ways.fetch_sub(ways.len(), Relaxed);
        self.own.write().unwrap_or_else(PoisonError::into_inner).remove(&(key.vip, key.port));
        let answers =
            ways.iter().filter_map(|way| self.order(way.worker, Order::Remove(way.number))).collect();
        wait(answers);
    }

    /// Closes sockets that were left open for sessions of backends that take no new ones.
    fn close_idle(&mut self) {
        let idle = self.lingering.iter().filter(|key| self.connections(key) == 0);
        let keys: Vec<_> = idle.cloned().collect();
        keys.iter().for_each(|key| self.close(key));
    }

    fn order(&self, worker: usize, order: Order) -> Option<Receiver<Vec<nix::Error>>> {
        let (done, answer) = mpsc::channel();
        self.workers[worker].send(Orders { all: vec![order], done }).ok().map(|()| answer)
    }

    fn order_all(&self, order: impl Fn() -> Order) -> Vec<Receiver<Vec<nix::Error>>> {
        (0..self.workers.len()).filter_map(|worker| self.order(worker, order())).collect()
    }
}

/// Waits until orders have been carried out; gives the first error.
fn wait(answers: Vec<Receiver<Vec<nix::Error>>>) -> Option<nix::Error> {
    answers.into_iter().filter_map(|answer| answer.recv_timeout(PATIENCE).ok()).flatten().next()
}

fn address(key: &ServiceKey) -> SocketAddr {
    SocketAddr::new(key.vip, key.port)
}

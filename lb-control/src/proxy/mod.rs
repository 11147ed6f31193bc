//! The userspace proxy: the same Services where the kernel cannot forward.
//!
//! Each worker is a thread with a runtime of its own. A connection is one task on the worker that
//! accepted it, from the first segment to the last.

mod backend;
mod choose;
mod clients;
mod clock;
mod connect;
mod connection;
mod counts;
mod end;
mod entry;
mod limits;
mod listener;
mod memory;
mod reader;
mod registry;
mod settings;
mod shared;
mod source_filter;
mod splice;
mod udp;
mod vip;
mod watch;
mod way;
mod worker;

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::Ordering::{Relaxed, SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use tokio::time::{MissedTickBehavior, interval};
use tracing::warn;

pub use counts::{BackendCounts, FrontendCounts, Refusal};
pub use limits::{Limits, raise_descriptors};
pub use reader::{Avoided, Reader, Totals};
pub use settings::{Inherited, Lent, Settings};
pub use udp::IcmpErrors;

use crate::{
    model::{Protocol, ServiceKey},
    plan::{Frontend, Wanted},
};
#[cfg(test)]
mod tests;

use entry::Entry;
use listener::Listener;
use shared::Shared;
use udp::Udp;
use worker::Worker;

/// The proxy. Dropping it resets all connections and ends its threads, which may take a second.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    udp: Udp,
    workers: Vec<Worker>,
    services: BTreeMap<ServiceKey, Served>,
    reader: Reader,
    inherited: HashMap<(SocketAddr, Protocol), Vec<Inherited>>,
    /// How long it may still wait for file descriptors, so that what waits at a socket that is closed can be
    /// accepted.
    patience: Duration,
}

#[derive(Debug)]
struct Served {
    entry: Arc<Entry>,
    listeners: Vec<Arc<Listener>>,
}

impl Proxy {
    /// Starts the workers, and raises the limit of open files. `inherited` are listening sockets of an
    /// agent before this one.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(settings: Settings, inherited: Vec<Inherited>) -> Result<Self> {
        let mut proxy = Self::start_counting(settings, Reader::default())?;
        proxy.inherit(inherited);
        Ok(proxy)
    }

    /// As [`Self::start`], with the reader of a proxy that was dropped: the counts go on. It has inherited
    /// nothing yet.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start_counting(settings: Settings, reader: Reader) -> Result<Self> {
        let limits = Limits::of(limits::raise_descriptors(), &settings);
        let threads = settings.threads();
        let shared = Arc::new(Shared::new(settings, limits));
        let workers: Vec<_> =
            (0..threads).map(|number| Worker::start(number, &shared)).collect::<Result<_>>()?;
        let handles =
            shared.handles.get_or_init(|| workers.iter().map(|worker| worker.handle.clone()).collect());
        let udp = Udp::start(handles, &shared)?;
        reader.follow(&shared, udp.teller());
        if let Some(worker) = workers.first() {
            worker.handle.spawn(forget_clients(reader.clone()));
        }
        let (services, inherited, patience) = (BTreeMap::new(), HashMap::new(), Duration::ZERO);
        Ok(Self { shared, udp, workers, services, reader, inherited, patience })
    }

    /// Takes listening sockets of an agent before this one, for what [`Self::apply`] is going to open.
    pub fn inherit(&mut self, inherited: Vec<Inherited>) {
        for one in inherited {
            self.inherited.entry((one.address, one.protocol)).or_default().push(one);
        }
    }

    /// How much it may have open.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.shared.limits
    }

    /// Opens, changes, closes. When it returns, what it does not name as failed listens, or no longer
    /// does.
    pub fn apply(&mut self, changes: Vec<(ServiceKey, Wanted)>) -> Vec<(ServiceKey, anyhow::Error)> {
        let mut failed = Vec::new();
        let mut are_reset = false;
        self.patience = LAST_ACCEPTS;
        for (key, wanted) in changes {
            let result = match key.protocol {
                Protocol::Tcp => self.apply_one(&key, wanted, &mut are_reset),
                Protocol::Udp => self.apply_udp(&key, wanted),
                Protocol::Sctp => Err(anyhow!("{key}: the proxy does not serve SCTP")),
            };
            if let Err(error) = result {
                failed.push((key, error));
            }
        }
        if are_reset {
            self.workers.iter().for_each(Worker::wake_all);
        }
        failed
    }

    /// Closes the listening sockets of the agent before that nothing has taken: to be called when all
    /// that is wanted is known.
    pub fn forget_inherited(&mut self) {
        self.inherited.clear();
    }

    /// Connections (TCP) or sessions (UDP) that there are of an entry.
    #[must_use]
    pub fn connections(&self, key: &ServiceKey) -> u64 {
        match key.protocol {
            Protocol::Udp => self.udp.connections(key),
            _ => self.services.get(key).map_or(0, |served| served.entry.counters.open()),
        }
    }

    /// Those of all.
    #[must_use]
    pub fn total_connections(&self) -> u64 {
        self.shared.open() as u64 + self.udp.total()
    }

    /// Connections (TCP) of all.
    #[must_use]
    pub fn open_connections(&self) -> usize {
        self.shared.open()
    }

    /// What was counted.
    #[must_use]
    pub fn counts(&self) -> Vec<FrontendCounts> {
        self.reader.counts()
    }

    /// Tells the same to other threads.
    #[must_use]
    pub fn reader(&self) -> Reader {
        self.reader.clone()
    }

    /// The sockets at VIPs, to hand over: as they are, since there may be more than a process may duplicate.
    /// Those of the agent before this one that nothing has taken yet are among them: clients may wait there.
    #[must_use]
    pub fn sockets(&self) -> Vec<Lent> {
        let tcp = self.services.iter().flat_map(|(key, served)| {
            let (address, protocol) = (address(key), key.protocol);
            let lend = move |one: &Arc<Listener>| Lent { address, protocol, socket: Arc::clone(one) as _ };
            served.listeners.iter().map(lend)
        });
        let unused = self.inherited.values().flatten().map(Inherited::lend);
        tcp.chain(self.udp.sockets()).chain(unused).collect()
    }

    /// Another process has them, too: from now on what waits to be accepted when one is closed is left to
    /// that.
    pub fn has_heir(&self) {
        self.services.values().flat_map(|served| &served.listeners).for_each(|one| one.has_heir());
    }

    /// Accepts no more, waits until all connections have ended or for so long, then resets the rest.
    /// Gives how many were reset. Whoever does not wait for it resets them at once.
    pub async fn drain(mut self, deadline: Duration) -> u64 {
        self.shared.is_draining.store(true, SeqCst);
        self.patience = LAST_ACCEPTS;
        let keys: Vec<_> = self.services.keys().cloned().collect();
        keys.iter().for_each(|key| self.close(key));
        for worker in &self.workers {
            // It may have accepted one just now that it has not counted yet.
            let _ = worker.handle.spawn(async {}).await;
        }
        let ended = async {
            while self.shared.open() > 0 {
                self.shared.has_ended.notified().await;
            }
        };
        // Nobody says that a session has ended: an answer that is under way gets its time.
        let answers = self.udp.drain(deadline.min(ANSWERS));
        tokio::join!(async { drop(tokio::time::timeout(deadline, ended).await) }, answers);
        let rest = self.shared.open() as u64;
        self.shared.is_over.store(true, SeqCst);
        self.workers.iter().for_each(Worker::wake_all);
        // They need a moment to be reset rather than closed.
        let ended = async {
            while self.shared.open() > 0 {
                self.shared.has_ended.notified().await;
            }
        };
        let _ = tokio::time::timeout(RESETS, ended).await;
        rest
    }

    fn apply_udp(&mut self, key: &ServiceKey, wanted: Wanted) -> Result<()> {
        let takes = matches!(&wanted, Wanted::Serve(frontend) if !frontend.slots.is_empty());
        let inherited = takes.then(|| self.inherited.remove(&(address(key), key.protocol)));
        let applied = self.udp.apply(key, wanted, inherited.flatten().unwrap_or_default());
        self.reader.has(key, self.udp.entry(key));
        applied
    }

    fn apply_one(&mut self, key: &ServiceKey, wanted: Wanted, are_reset: &mut bool) -> Result<()> {
        let (frontend, serves) = match wanted {
            Wanted::Serve(frontend) => {
                let serves = !frontend.slots.is_empty();
                (frontend, serves)
            }
            Wanted::Finish(frontend) => {
                // Its listeners stay for those who have begun to connect: what comes anew, the kernel takes.
                *are_reset |= self.update(key, &frontend);
                return Ok(());
            }
            Wanted::Gone => {
                self.close(key);
                if let Some(served) = self.services.remove(key) {
                    self.reader.has(key, None);
                    served.entry.ends();
                    *are_reset = true;
                }
                return Ok(());
            }
        };
        *are_reset |= self.update(key, &frontend);
        if serves {
            return self.open(key);
        }
        self.close(key);
        Ok(())
    }

    /// Says whether connections are to be reset.
    fn update(&mut self, key: &ServiceKey, frontend: &Arc<Frontend>) -> bool {
        let workers = self.workers.len();
        let served = self.services.entry(key.clone()).or_insert_with(|| {
            let entry = Arc::new(Entry::new(Arc::clone(frontend), workers, &self.shared.clients));
            self.reader.has(key, Some(&entry));
            Served { entry, listeners: Vec::new() }
        });
        let ranges = Arc::clone(&served.entry.table().frontend.source_ranges);
        let are_reset = served.entry.update(Arc::clone(frontend));
        if ranges != frontend.source_ranges {
            served.listeners.iter().for_each(|listener| listener.filter(&served.entry));
        }
        are_reset
    }

    fn open(&mut self, key: &ServiceKey) -> Result<()> {
        let Some(served) = self.services.get_mut(key) else { return Ok(()) };
        if !served.listeners.is_empty() {
            return Ok(());
        }
        let (entry, settings) = (&served.entry, &self.shared.settings);
        let address = address(key);
        let workers = self.workers.len();
        let has_room = self.shared.listeners.load(Relaxed) + workers <= self.shared.limits.own_listeners;
        let wanted = if settings.own_listeners && has_room { workers } else { 1 };
        if !self.shared.has_room_at_vips(wanted) {
            bail!("{key}: no file descriptor is left for its socket: raise the limit of open files");
        }
        let mut listeners = Vec::new();
        for socket in self.inherited.remove(&(address, key.protocol)).unwrap_or_default() {
            let listener = socket.take().and_then(|socket| Listener::inherited(socket, entry, settings));
            match listener.with_context(|| format!("{key}: taking over its socket"))? {
                Some(listener) => listeners.push(listener),
                None => {
                    warn!("{key}: a socket of the agent before this one no longer listens; it gets another")
                }
            }
        }
        while listeners.len() < wanted {
            let listener = Listener::open(address, entry, settings);
            listeners.push(listener.with_context(|| format!("{key}: listening on {address}"))?);
        }
        self.shared.listeners.fetch_add(listeners.len(), Relaxed);
        let is_shared = listeners.len() < workers;
        for (number, listener) in listeners.into_iter().map(Arc::new).enumerate() {
            for (index, worker) in self.workers.iter().enumerate() {
                if is_shared || number % workers == index {
                    let (entry, shared) = (Arc::clone(entry), Arc::clone(&self.shared));
                    worker.handle.spawn(Arc::clone(&listener).run(entry, shared, index));
                }
            }
            served.listeners.push(listener);
        }
        Ok(())
    }

    fn close(&mut self, key: &ServiceKey) {
        let Some(served) = self.services.get_mut(key) else { return };
        for (number, listener) in std::mem::take(&mut served.listeners).into_iter().enumerate() {
            let index = number % self.workers.len();
            let worker = (&self.workers[index].handle, index);
            listener.close(&served.entry, &self.shared, worker, &mut self.patience);
            self.shared.listeners.fetch_sub(1, Relaxed);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Sockets that are just closed say that everything was sent: half an answer would look like all of it.
        self.services.values().flat_map(|served| &served.listeners).for_each(|listener| listener.stop());
        self.shared.is_over.store(true, SeqCst);
        self.workers.iter().for_each(Worker::wake_all);
        let begin = Instant::now();
        while self.shared.open() > 0 && begin.elapsed() < RESETS {
            thread::sleep(Duration::from_millis(1));
        }
        self.reader.end();
    }
}

/// Lets entries forget clients that were not seen for long.
async fn forget_clients(reader: Reader) {
    let mut turns = interval(FORGET_CLIENTS);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        let now = clock::now();
        reader.entries().iter().for_each(|entry| entry.forget_clients(now));
    }
}

/// How often clients are looked at.
const FORGET_CLIENTS: Duration = Duration::from_secs(30);
/// How long all sockets that are closed together may wait for file descriptors.
const LAST_ACCEPTS: Duration = Duration::from_secs(1);
/// How long connections may take to be reset rather than closed.
const RESETS: Duration = Duration::from_secs(1);
/// How long answers of backends may take that are under way when the proxy ends.
const ANSWERS: Duration = Duration::from_secs(2);

fn address(key: &ServiceKey) -> SocketAddr {
    SocketAddr::new(key.vip, key.port)
}

//! What the proxy counts, for those who ask beside it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic::Ordering::Relaxed},
    time::Duration,
};

use super::{
    clock,
    counts::{FrontendCounts, Refusal},
    entry::Entry,
    shared::Shared,
    udp::{IcmpErrors, Teller},
};
use crate::model::{ObjectRef, ServiceKey};

/// Of so many entries that are served no more the counts are kept.
const KEPT: usize = 16_384;

/// Tells what the proxy counts, from other threads. What it tells of an entry goes on where it was when
/// the entry is served again, also by another proxy that is given the same reader, until it is forgotten:
/// counters must not fall.
#[derive(Clone, Debug, Default)]
pub struct Reader(Arc<RwLock<State>>);

/// What belongs to no entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Refusals of entries that were forgotten, by reason: all of [`Refusal::ALL`]. They are to be added to
    /// those of the entries.
    pub refused: Vec<(Refusal, u64)>,
    /// Bytes that connections hold in buffers and pipes at this time.
    pub held_bytes: u64,
    /// How often a connection read no more than its receiver took, since no more memory may be used.
    pub full_buffers: u64,
    /// TCP connections that there may be, beside the sockets that there are for other things.
    pub most_connections: u64,
    /// How often a connection had to wait, to be accepted or to get a socket to its backend, because there was
    /// no file descriptor, or no memory.
    pub shortages: u64,
    /// ICMP errors for clients of UDP.
    pub icmp_errors: IcmpErrors,
    /// Datagrams that were not passed on, from clients and to clients.
    pub lost: [u64; 2],
}

/// Backends of a Service that new connections avoid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Avoided {
    /// How many are.
    pub count: usize,
    /// Of so many that take connections.
    pub all: usize,
    /// One of them, and how many connects in a row have failed.
    pub example: (SocketAddr, u32),
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<ServiceKey, Arc<Entry>>,
    /// Counts of entries, up to when they were no longer served.
    gone: BTreeMap<ServiceKey, FrontendCounts>,
    /// Refusals of those that were forgotten.
    refused: [u64; Refusal::ALL.len()],
    now: Option<(Arc<Shared>, Arc<Teller>)>,
    /// Of proxies before this one.
    before: Sums,
}

/// What belongs to no entry and only grows.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    shortages: u64,
    full_buffers: u64,
    icmp_errors: IcmpErrors,
    lost: [u64; 2],
}

impl Reader {
    /// What was counted of each entry.
    #[must_use]
    pub fn counts(&self) -> Vec<FrontendCounts> {
        // Not under the lock: an entry's turn would wait for all.
        let (entries, gone) = {
            let state = self.read();
            (state.entries.clone(), state.gone.clone())
        };
        let now = clock::now();
        let mut all = gone;
        for (key, entry) in entries {
            let counts = entry.counts(now);
            match all.remove(&key) {
                Some(earlier) => drop(all.insert(key, counts.after(earlier))),
                None => drop(all.insert(key, counts)),
            }
        }
        all.into_values().collect()
    }

    /// Services with backends that new connections have avoided for at least so long. Of those entries alone
    /// that count, and of those backends alone that take connections.
    #[must_use]
    pub fn avoided(
        &self,
        least: Duration,
        counts: impl Fn(&ServiceKey) -> bool,
    ) -> BTreeMap<ObjectRef, Avoided> {
        let entries: Vec<_> = self.read().entries.values().cloned().collect();
        let now = clock::now();
        // An address may be a backend of several entries of a Service.
        let mut found: BTreeMap<ObjectRef, BTreeMap<SocketAddr, u32>> = BTreeMap::new();
        for entry in &entries {
            let failing = entry.takers().into_iter().filter_map(|backend| {
                backend.failures_of_long(least, now).map(|failures| (backend.address, failures))
            });
            let failing: Vec<_> = failing.collect();
            if !failing.is_empty() && counts(&entry.key) {
                found.entry(entry.key.service.clone()).or_default().extend(failing);
            }
        }
        let of = |(service, avoided): (ObjectRef, BTreeMap<SocketAddr, u32>)| {
            let own = entries.iter().filter(|entry| entry.key.service == service);
            let all: BTreeSet<_> = own.flat_map(|entry| entry.takers()).map(|one| one.address).collect();
            let example = avoided.first_key_value().map(|(address, failures)| (*address, *failures))?;
            Some((service, Avoided { count: avoided.len(), all: all.len(), example }))
        };
        found.into_iter().filter_map(of).collect()
    }

    /// What belongs to no entry.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let state = self.read();
        let Sums { shortages, full_buffers, icmp_errors, lost } = state.sums();
        let shared = state.now.as_ref().map(|(shared, _)| shared);
        let held = shared.map_or(0, |shared| shared.memory.held());
        let most = shared.map_or(0, |shared| shared.most_connections());
        Totals {
            refused: Refusal::ALL.map(|why| (why, state.refused[why as usize])).into(),
            held_bytes: held as u64,
            full_buffers,
            most_connections: most as u64,
            shortages,
            icmp_errors,
            lost,
        }
    }

    /// Forgets what was counted of entries that are served no more, and will not be again: those of a
    /// Service that was deleted. Of entries that are served nothing is forgotten.
    pub fn forget(&self, is_gone: impl Fn(&ServiceKey) -> bool) {
        let mut state = self.write();
        let keys: Vec<_> = state.gone.keys().filter(|key| is_gone(key)).cloned().collect();
        for key in keys.iter().filter(|key| !state.entries.contains_key(*key)).collect::<Vec<_>>() {
            state.forget(key);
        }
    }

    /// What is served.
    pub(super) fn entries(&self) -> Vec<Arc<Entry>> {
        self.read().entries.values().cloned().collect()
    }

    /// From now on it tells of this proxy.
    pub(super) fn follow(&self, shared: &Arc<Shared>, teller: Arc<Teller>) {
        self.end();
        self.write().now = Some((Arc::clone(shared), teller));
    }

    /// The proxy has ended.
    pub(super) fn end(&self) {
        let mut state = self.write();
        for (key, entry) in std::mem::take(&mut state.entries) {
            state.retire(key, &entry);
        }
        state.before = state.sums();
        state.now = None;
    }

    /// Takes an entry in, or out.
    pub(super) fn has(&self, key: &ServiceKey, entry: Option<&Arc<Entry>>) {
        let mut state = self.write();
        let before = match entry {
            Some(entry) => state.entries.insert(key.clone(), Arc::clone(entry)),
            None => state.entries.remove(key),
        };
        if let Some(before) = before
            && !entry.is_some_and(|entry| Arc::ptr_eq(entry, &before))
        {
            state.retire(key.clone(), &before);
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Those of all proxies.
    fn sums(&self) -> Sums {
        let Sums { mut shortages, mut full_buffers, mut icmp_errors, mut lost } = self.before;
        if let Some((shared, teller)) = &self.now {
            shortages += shared.shortages.load(Relaxed);
            full_buffers += shared.memory.refused();
            let IcmpErrors { told, untold } = teller.counts();
            icmp_errors.told += told;
            icmp_errors.untold += untold;
            lost.iter_mut().zip(&shared.lost).for_each(|(sum, count)| *sum += count.load(Relaxed));
        }
        Sums { shortages, full_buffers, icmp_errors, lost }
    }

    fn retire(&mut self, key: ServiceKey, entry: &Entry) {
        if self.gone.len() >= KEPT && !self.gone.contains_key(&key) {
            let first = self.gone.keys().find(|key| !self.entries.contains_key(*key)).cloned();
            first.iter().for_each(|first| self.forget(first));
        }
        let mut counts = entry.counts(clock::now());
        counts.open = 0;
        for backend in &mut counts.backends {
            (backend.open, backend.ejected) = (0, false);
        }
        let counts = match self.gone.remove(&key) {
            Some(earlier) => counts.after(earlier),
            None => counts,
        };
        self.gone.insert(key, counts);
    }

    fn forget(&mut self, key: &ServiceKey) {
        for (why, count) in self.gone.remove(key).into_iter().flat_map(|counts| counts.refused) {
            self.refused[why as usize] += count;
        }
    }
}

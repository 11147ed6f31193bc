//! One port of one VIP, as all workers share it.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError, RwLock, atomic::AtomicU64},
    time::Duration,
};

use super::{
    backend::Backend,
    clients::{Clients, Room},
    clock,
    counts::{EntryCounters, FrontendCounts, Refusal},
};
use crate::{
    model::{Role, ServiceKey},
    plan::Frontend,
};

/// One port of one VIP.
#[derive(Debug)]
pub struct Entry {
    /// Which.
    pub key: ServiceKey,
    /// What is counted.
    pub counters: EntryCounters,
    /// New connections take turns over all workers.
    pub(super) turn: AtomicU64,
    pub(super) affinity: Mutex<Clients<Remembered>>,
    /// When the bucket of a client is full again.
    pub(super) rates: Mutex<Clients<u64>>,
    table: RwLock<Arc<Table>>,
}

/// What is wanted of an entry, with the backends that go with it.
#[derive(Debug)]
pub struct Table {
    /// What is wanted.
    pub frontend: Arc<Frontend>,
    /// As `frontend.backends`.
    pub backends: Vec<Arc<Backend>>,
}

/// The backend that a client had.
#[derive(Clone, Copy, Debug)]
pub struct Remembered {
    /// Which.
    pub backend: SocketAddr,
    /// When its last connection came.
    pub last: Duration,
}

impl Entry {
    /// An entry that has no connections. It remembers clients as far as there is `room`.
    #[must_use]
    pub fn new(frontend: Arc<Frontend>, workers: usize, room: &Arc<Room>) -> Self {
        Self {
            key: frontend.key.clone(),
            counters: EntryCounters::new(workers),
            turn: AtomicU64::new(0),
            affinity: Mutex::new(Clients::new(room)),
            rates: Mutex::new(Clients::new(room)),
            table: RwLock::new(Arc::new(Table::new(frontend, &HashMap::new()))),
        }
    }

    /// What is wanted of it.
    #[must_use]
    pub fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Wants something else. Says whether connections are to be reset, since their backends are gone.
    pub fn update(&self, frontend: Arc<Frontend>) -> bool {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let known = table.backends.iter().map(|backend| (backend.address, Arc::clone(backend))).collect();
        let next = Table::new(frontend, &known);
        let kept = |backend: &Arc<Backend>| next.backends.iter().any(|other| Arc::ptr_eq(backend, other));
        let gone: Vec<_> = table.backends.iter().filter(|backend| !kept(backend)).cloned().collect();
        *table = Arc::new(next);
        drop(table);
        self.forget_clients(clock::now());
        gone.iter().for_each(|backend| backend.goes());
        gone.iter().any(|backend| backend.open() > 0)
    }

    /// Forgets clients that nothing is remembered for any more: whose affinity is over, or whose limit is not
    /// used up.
    pub fn forget_clients(&self, now: Duration) {
        let frontend = Arc::clone(&self.table().frontend);
        let refilled = frontend.connection_limit.map(|limit| {
            let seconds = u64::from(limit.burst).div_ceil(u64::from(limit.rate.max(1)));
            Duration::from_secs(seconds + 1)
        });
        self.affinity.lock().unwrap_or_else(PoisonError::into_inner).age(frontend.affinity, now);
        self.rates.lock().unwrap_or_else(PoisonError::into_inner).age(refilled, now);
    }

    /// Backends that take connections.
    #[must_use]
    pub fn takers(&self) -> Vec<Arc<Backend>> {
        let table = self.table();
        let all = table.frontend.backends.iter().zip(&table.backends);
        let takers = all.filter(|(wanted, _)| wanted.role == Role::Active);
        takers.map(|(_, backend)| Arc::clone(backend)).collect()
    }

    /// All its connections are to be reset.
    pub fn ends(&self) {
        self.table().backends.iter().for_each(|backend| backend.goes());
    }

    /// Whether a client may connect, and if so, counts that it does. A refusal is counted too.
    ///
    /// # Errors
    /// Why it may not.
    pub fn admit(&self, table: &Table, client: IpAddr, now: Duration) -> Result<(), Refusal> {
        let ranges = &table.frontend.source_ranges;
        let result = if !ranges.is_empty() && !ranges.iter().any(|range| range.contains(&client)) {
            Err(Refusal::SourceRange)
        } else if !self.is_below_limit(table, client, now) {
            Err(Refusal::ConnectionRate)
        } else {
            Ok(())
        };
        result.inspect_err(|why| self.counters.refuse(*why))
    }

    /// What was counted.
    #[must_use]
    pub fn counts(&self, now: Duration) -> FrontendCounts {
        let backends = self.table().backends.iter().map(|backend| backend.counts(now)).collect();
        FrontendCounts { backends, ..self.counters.read(&self.key) }
    }
}

impl Table {
    fn new(frontend: Arc<Frontend>, known: &HashMap<SocketAddr, Arc<Backend>>) -> Self {
        let backend =
            |address| known.get(&address).cloned().unwrap_or_else(|| Arc::new(Backend::new(address)));
        let backends = frontend.backends.iter().map(|one| backend(one.address)).collect();
        Self { frontend, backends }
    }
}

//! Desired state to map operations.
//!
//! The compiler knows what the maps contain (`actual`) and which index and region belongs to whom
//! (the layout). Planning compares what an entry should contain with what it does contain, so the
//! same code fills empty maps, follows a change, goes on after a failed write, adopts the maps of
//! an agent that died, and repairs what somebody wrote by hand.
//!
//! A packet never sees half of an update. For an entry: source addresses, backends, slots in a
//! fresh region, source ranges that are new, the affinity timeout, name, the flip of the Service
//! entry, the VIP, and last the source ranges and backends that leave. For an entry that goes: VIP,
//! Service, source ranges, backends, name. Regions and indices rest before they are
//! used again, since packets on their way may still hold them.

mod actual;
mod adopt;
mod alloc;
mod clients;
mod entry;
pub mod name;
mod removal;
mod snat;
mod spread;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use actual::Actual;
use alloc::{Indices, Region, Regions, Rest};
use ipnet::IpNet;
use lb_common::abi::{BackendState, Config, NextHop, Service, ServiceFlags};
use snat::Snat;
use spread::Taker;

use super::{ipam::Holdings, slow_start::Ramps};
use crate::{
    model::{ClientAddress, Desired, DesiredEntry, ObjectRef, Problem, ServiceKey},
    ports::{Limits, MapOp, MapStore, Vip},
};

/// How packets get to a backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// Device and link-layer addresses; `None` while they are not known.
    pub next_hop: Option<NextHop>,
    /// Source addresses towards it, of its family.
    pub snat: Vec<IpAddr>,
    /// Whether the backend is on this node: then it needs neither.
    pub is_local: bool,
    /// The largest IP packet that it takes, in bytes.
    pub mtu: u32,
    /// Whether only TC can send by the device.
    pub is_for_tc: bool,
}

/// Paths by the address of the backend. One that is missing is not known yet. There are as many as
/// backends, and few that differ.
pub type Paths = HashMap<IpAddr, Arc<Path>>;

/// How patient the compiler is.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How long slots and Service entries rest before they are used again. A packet is on its way
    /// through the program for microseconds.
    pub grace: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { grace: Duration::from_secs(2) }
    }
}

/// What to look at.
#[derive(Clone, Copy, Debug)]
pub enum Scope<'a> {
    /// Everything, including what no Service accounts for.
    All,
    /// The entries of these Services. Costs as much as they have entries and backends.
    Services(&'a BTreeSet<ObjectRef>),
}

/// Operations that belong together: if one fails, those after it must not be carried out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The Service entry, if it is about one.
    pub owner: Option<ServiceKey>,
    /// Batches (by their number in the list) that must have succeeded.
    pub requires: Vec<usize>,
    /// In this order.
    pub ops: Vec<MapOp>,
}

/// What to do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// In this order.
    pub batches: Vec<Batch>,
    /// What cannot be done, by Service: limits of the maps.
    pub problems: Vec<Problem>,
    /// When to try again, because something that is short now has rested by then. `None` if nothing is
    /// short, and what makes do with something else is not.
    pub retry_at: Option<Duration>,
}

impl Delta {
    /// All operations in their order.
    pub fn ops(&self) -> impl Iterator<Item = &MapOp> {
        self.batches.iter().flat_map(|batch| &batch.ops)
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }
}

/// What belongs to a Service entry.
#[derive(Clone, Debug, Default)]
struct Entry {
    /// In `services` and its companions.
    index: u32,
    backends: BTreeMap<SocketAddr, Seat>,
    /// Backends on their way out: not free yet in the maps.
    leaving: Vec<u32>,
    /// Its slots, as planned.
    region: Option<Region>,
    /// The content of the region.
    slots: Vec<u32>,
    /// Which of the [`ServiceFlags`](lb_common::abi::ServiceFlags) say how the slots are read.
    scheduling: u8,
    /// Whom the slots, if they are a lookup table, were computed for: that takes long.
    table_of: Option<Vec<Taker>>,
    /// Backends whose share still grows.
    ramps: Ramps,
    /// Regions that it leaves with the next flip.
    retiring: Vec<Region>,
    /// Source ranges that the maps are known to contain, and nothing else: a list of thousands is
    /// compared with them once, and not with every change of a backend.
    settled_ranges: Option<Arc<[IpNet]>>,
    /// It is to go.
    removed: bool,
}

/// A backend's place.
#[derive(Clone, Copy, Debug)]
struct Seat {
    index: u32,
    generation: u32,
}

/// Turns desired state into map operations. See the module's documentation.
pub struct Compiler {
    limits: Limits,
    settings: Settings,
    actual: Actual,
    entries: BTreeMap<ServiceKey, Entry>,
    /// Service indices to their owners.
    owners: HashMap<u32, ServiceKey>,
    /// Who a VIP leads to, as planned.
    claims: HashMap<Vip, ServiceKey>,
    service_indices: Indices,
    backend_indices: Indices,
    slot_regions: Regions,
    snat: Snat,
    /// When the next share of a backend grows, by entry.
    steps: BTreeMap<ServiceKey, Duration>,
    /// Entries that make do without a lookup table, and how many slots it would have.
    waiting: BTreeMap<ServiceKey, u32>,
    proxied: Proxied,
}

/// What is left to the proxy, beside the entries that ask for it themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxied {
    /// Every entry.
    pub all: bool,
    /// Entries of which the proxy still has connections, and begins no more.
    pub finishing: BTreeSet<ServiceKey>,
}

impl Proxied {
    /// Whether the proxy serves an entry.
    #[must_use]
    pub fn serves(&self, entry: &DesiredEntry) -> bool {
        self.all || entry.client_address != ClientAddress::Path
    }

    /// The flags of an entry.
    fn flags(&self, key: &ServiceKey, entry: &DesiredEntry) -> u8 {
        if self.serves(entry) {
            ServiceFlags::PROXIED
        } else if self.finishing.contains(key) {
            ServiceFlags::PROXY_FINISHES
        } else {
            0
        }
    }
}

/// State of one round of planning.
struct Round<'a> {
    desired: &'a Desired,
    paths: &'a Paths,
    now: Duration,
    delta: Delta,
    /// Batch that writes an element of `snat_addresses`.
    snat_batch: HashMap<u32, usize>,
    /// Batch that leads a VIP elsewhere.
    vip_batch: HashMap<Vip, usize>,
    /// Source ranges that this round adds: IPv4, IPv6.
    planned_ranges: [usize; 2],
    /// Something is short.
    short: bool,
}

impl Compiler {
    /// For maps that are empty. For maps that may not be, see [`adopt`](Self::adopt).
    #[must_use]
    pub fn new(limits: Limits, settings: Settings) -> Self {
        Self {
            limits,
            settings,
            actual: Actual::default(),
            entries: BTreeMap::new(),
            owners: HashMap::new(),
            claims: HashMap::new(),
            service_indices: Indices::new(0, limits.services),
            // 0 is what a slot that was never written contains.
            backend_indices: Indices::new(1, limits.backends),
            slot_regions: Regions::new(limits.slots),
            snat: Snat::new(limits.snat_addresses),
            steps: BTreeMap::new(),
            waiting: BTreeMap::new(),
            proxied: Proxied::default(),
        }
    }

    /// What the proxy serves or finishes from now on. Entries that this changes are to be reconciled.
    pub fn leave_to_proxy(&mut self, proxied: Proxied) {
        self.proxied = proxied;
    }

    /// What has to be done so that the maps contain what is desired. `now` is the time since any
    /// fixed moment.
    pub fn reconcile(
        &mut self,
        desired: &Desired,
        paths: &Paths,
        config: &Config,
        scope: Scope<'_>,
        now: Duration,
    ) -> Delta {
        let mut round = Round {
            desired,
            paths,
            now,
            delta: Delta::default(),
            snat_batch: HashMap::new(),
            vip_batch: HashMap::new(),
            planned_ranges: [0; 2],
            short: false,
        };
        if self.actual.config.as_ref() != Some(config) {
            let ops = vec![MapOp::SetConfig { value: *config }];
            round.delta.batches.push(Batch { ops, ..Batch::default() });
        }
        match scope {
            Scope::All => {
                self.retire_snat(&round);
                for (key, entry) in &desired.entries {
                    self.plan_entry(key, entry, &mut round);
                }
                let gone = self.entries.keys().filter(|key| !desired.entries.contains_key(key));
                for key in gone.cloned().collect::<Vec<_>>() {
                    self.plan_removal(&key, &mut round);
                }
                self.plan_strays(&mut round);
            }
            Scope::Services(services) => {
                for (key, entry) in services.iter().flat_map(|service| desired.entries_of(service)) {
                    self.plan_entry(key, entry, &mut round);
                }
                for key in services.iter().flat_map(|service| self.gone(service, desired)).collect::<Vec<_>>()
                {
                    self.plan_removal(&key, &mut round);
                }
            }
        }
        if round.short {
            round.delta.retry_at = self.next_rested(now);
        }
        round.delta
    }

    /// Entries of a Service that are not desired any more.
    fn gone(&self, service: &ObjectRef, desired: &Desired) -> Vec<ServiceKey> {
        let first = ServiceKey {
            service: service.clone(),
            protocol: crate::model::Protocol::Tcp,
            vip: IpAddr::from([0, 0, 0, 0]),
            port: 0,
        };
        let mine = self.entries.range(first..).map(|(key, _)| key).take_while(|key| key.service == *service);
        mine.filter(|key| !desired.entries.contains_key(key)).cloned().collect()
    }

    /// When something that rests now can be used again. What this round itself gives back rests
    /// for a grace time from now on.
    fn next_rested(&self, now: Duration) -> Option<Duration> {
        let all =
            [self.service_indices.next_rested(), self.slot_regions.next_rested(), self.snat.next_rested()];
        all.into_iter().flatten().filter(|until| *until > now).chain([now + self.settings.grace]).min()
    }

    /// Takes note that an operation was carried out.
    pub fn applied(&mut self, op: &MapOp, now: Duration) {
        let until = now + self.settings.grace;
        match op {
            MapOp::SetService { index, value } => {
                let entry = self.owners.get(index).and_then(|key| self.entries.get_mut(key));
                if let Some(entry) = entry {
                    let current = Region { first: value.first_slot, count: value.slot_count() };
                    for region in entry.retiring.extract_if(.., |region| *region != current) {
                        self.slot_regions.retire(region, until);
                    }
                }
            }
            MapOp::SetServiceName { index, value } if value.name[0] == 0 => {
                if let Some(key) = self.owners.remove(index) {
                    self.entries.remove(&key);
                }
                self.service_indices.retire(*index, Rest::Until(until));
            }
            MapOp::SetBackend { index, value } => {
                let is_free = BackendState::from_raw(value.state) == BackendState::Free;
                if is_free && !self.actual.is_free(*index) {
                    self.backend_indices.retire(*index, Rest::UntilTold);
                }
            }
            _ => {}
        }
        self.actual.apply(op);
    }

    /// Backends that were freed and are not used again before
    /// [`flows_purged`](Self::flows_purged) says that no flow names them any more.
    #[must_use]
    pub fn freed_backends(&self) -> Vec<u32> {
        self.backend_indices.resting().collect()
    }

    /// No flow names these backends any more.
    pub fn flows_purged(&mut self, backends: &[u32]) {
        self.backend_indices.release(backends);
    }

    /// Who has which address, by the entries that there are: what a restarted agent adopts.
    #[must_use]
    pub fn holdings(&self) -> Holdings {
        let mut holdings = Holdings::new();
        for key in self.entries.iter().filter(|(_, entry)| !entry.removed).map(|(key, _)| key) {
            let addresses = holdings.entry(key.service.clone()).or_default();
            if !addresses.contains(&key.vip) {
                addresses.push(key.vip);
            }
        }
        holdings
    }

    /// When the share of a backend that starts slowly grows next, or slots have rested that an entry may
    /// have its lookup table in.
    #[must_use]
    pub fn next_step(&self) -> Option<Duration> {
        let rested = self.slot_regions.next_rested().filter(|_| !self.waiting.is_empty());
        self.steps.values().copied().chain(rested).min()
    }

    /// The Services of which a share grows now, or for whose table there is room now: they have to be
    /// reconciled, and are not named again before.
    pub fn take_due(&mut self, now: Duration) -> BTreeSet<ObjectRef> {
        let regions = &mut self.slot_regions;
        let roomy = self.waiting.iter().filter(|(_, slots)| regions.has_room(**slots, now));
        let mut due: BTreeSet<_> = roomy.map(|(key, _)| key.service.clone()).collect();
        due.extend(self.steps.extract_if(.., |_, at| *at <= now).map(|(key, _)| key.service));
        due
    }

    /// The index in `services` of an entry, for counters.
    #[must_use]
    pub fn service_index(&self, key: &ServiceKey) -> Option<u32> {
        self.entries.get(key).map(|entry| entry.index)
    }

    /// The index in `backends` of a backend, for counters.
    #[must_use]
    pub fn backend_index(&self, key: &ServiceKey, backend: &SocketAddr) -> Option<u32> {
        self.entries.get(key)?.backends.get(backend).map(|seat| seat.index)
    }
}

/// A batch that failed.
#[derive(Debug)]
pub struct Failure {
    /// The Service entry, if it was about one.
    pub owner: Option<ServiceKey>,
    /// The operation; `None` if a batch that it requires failed.
    pub op: Option<MapOp>,
    /// Why.
    pub error: anyhow::Error,
}

/// Carries out what was planned. A batch that fails is left where it is, the others go on; to
/// [`reconcile`](Compiler::reconcile) again plans the rest.
pub fn apply(
    delta: &Delta,
    store: &mut dyn MapStore,
    compiler: &mut Compiler,
    now: Duration,
) -> Vec<Failure> {
    let mut failed = BTreeSet::new();
    let mut failures = Vec::new();
    for (number, batch) in delta.batches.iter().enumerate() {
        let fail = |op: Option<&MapOp>, error| Failure { owner: batch.owner.clone(), op: op.cloned(), error };
        if let Some(required) = batch.requires.iter().find(|required| failed.contains(*required)) {
            let owner = delta.batches[*required].owner.as_ref();
            let owner = owner.map_or_else(String::new, |owner| format!(" ({owner})"));
            failures.push(fail(None, anyhow::anyhow!("waits for an earlier change{owner} that failed")));
            failed.insert(number);
            continue;
        }
        for op in &batch.ops {
            if let Err(error) = store.apply(op) {
                failures.push(fail(Some(op), error));
                failed.insert(number);
                break;
            }
            compiler.applied(op, now);
        }
    }
    failures
}

/// An empty Service entry: refuses.
const REFUSING: Service = Service::new(0, 0, 0);

#[cfg(test)]
mod properties;
#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;

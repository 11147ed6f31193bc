//! What the maps contain, as far as the agent knows.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, Result};
use ipnet::IpNet;
use lb_common::abi::{Backend, BackendState, Config, ConnectionLimit, Service, ServiceName, Tick};

use crate::ports::{Limits, MapOp, MapStore, Vip};

/// What the maps contain. Elements that are all zero are left out.
#[derive(Clone, Debug, Default)]
pub(super) struct Actual {
    pub vips: HashMap<Vip, u32>,
    pub vips_v4: usize,
    pub services: BTreeMap<u32, Service>,
    pub names: BTreeMap<u32, ServiceName>,
    pub backends: BTreeMap<u32, Backend>,
    slots: Vec<u32>,
    pub snat_addresses: Vec<[u8; 16]>,
    pub config: Option<Config>,
    pub sources: Sources,
    pub affinity_timeouts: BTreeMap<u32, Tick>,
    pub connection_limits: BTreeMap<u32, ConnectionLimit>,
}

/// Source ranges by the index of their Service entry, so that a change of one looks at no other.
#[derive(Clone, Debug, Default)]
pub(super) struct Sources {
    by_service: BTreeMap<u32, BTreeSet<IpNet>>,
    v4: usize,
    v6: usize,
}

impl Sources {
    /// The ranges of a Service entry.
    pub fn of(&self, service: u32) -> impl Iterator<Item = &IpNet> {
        self.by_service.get(&service).into_iter().flatten()
    }

    pub fn contains(&self, service: u32, range: &IpNet) -> bool {
        self.by_service.get(&service).is_some_and(|ranges| ranges.contains(range))
    }

    /// Service entries that have ranges.
    pub fn services(&self) -> impl Iterator<Item = u32> {
        self.by_service.keys().copied()
    }

    /// How many there are in the map of a range's family.
    pub fn used(&self, range: &IpNet) -> usize {
        if matches!(range, IpNet::V4(_)) { self.v4 } else { self.v6 }
    }

    fn used_mut(&mut self, range: &IpNet) -> &mut usize {
        if matches!(range, IpNet::V4(_)) { &mut self.v4 } else { &mut self.v6 }
    }

    fn insert(&mut self, service: u32, range: IpNet) {
        if self.by_service.entry(service).or_default().insert(range) {
            *self.used_mut(&range) += 1;
        }
    }

    fn remove(&mut self, service: u32, range: &IpNet) {
        let Some(ranges) = self.by_service.get_mut(&service) else { return };
        let was_there = ranges.remove(range);
        if ranges.is_empty() {
            self.by_service.remove(&service);
        }
        if was_there {
            *self.used_mut(range) -= 1;
        }
    }
}

impl Actual {
    /// Reads the maps; of the slots those up to the last that `regions` and Service entries name.
    pub fn read(store: &dyn MapStore, limits: Limits, regions: &[(u32, u32)]) -> Result<Self> {
        let vips: HashMap<_, _> = store.vips().context("reading the VIP maps")?.into_iter().collect();
        let mut actual = Self {
            vips_v4: vips.keys().filter(|vip| matches!(vip, Vip::V4(_))).count(),
            vips,
            services: store.services().context("reading the map services")?.into_iter().collect(),
            names: store.service_names().context("reading the map service_names")?.into_iter().collect(),
            backends: store.backends().context("reading the map backends")?.into_iter().collect(),
            slots: Vec::new(),
            snat_addresses: store.snat_addresses().context("reading the map snat_addresses")?,
            config: store.config().context("reading the map config")?,
            sources: Sources::default(),
            affinity_timeouts: store
                .affinity_timeouts()
                .context("reading the map affinity_ticks")?
                .into_iter()
                .collect(),
            connection_limits: store
                .connection_limits()
                .context("reading the map conn_limits")?
                .into_iter()
                .collect(),
        };
        for (service, range) in store.source_ranges().context("reading the source range maps")? {
            actual.sources.insert(service, range);
        }
        let named = actual.services.values().map(|service| (service.first_slot, service.slot_count()));
        let ends = named.chain(regions.iter().copied()).filter_map(|(first, count)| first.checked_add(count));
        let end = ends.filter(|end| *end <= limits.slots).max().unwrap_or(0);
        actual.slots = store.slots(0, end).context("reading the map slots")?;
        Ok(actual)
    }

    pub fn service(&self, index: u32) -> Service {
        self.services.get(&index).copied().unwrap_or_default()
    }

    pub fn name(&self, index: u32) -> ServiceName {
        self.names.get(&index).copied().unwrap_or_default()
    }

    pub fn backend(&self, index: u32) -> Backend {
        self.backends.get(&index).copied().unwrap_or_default()
    }

    pub fn is_free(&self, index: u32) -> bool {
        BackendState::from_raw(self.backend(index).state) == BackendState::Free
    }

    pub fn slots(&self, first: u32, count: u32) -> Option<&[u32]> {
        self.slots.get(first as usize..first.checked_add(count)? as usize)
    }

    pub fn snat_address(&self, index: u32) -> [u8; 16] {
        self.snat_addresses.get(index as usize).copied().unwrap_or_default()
    }

    pub fn affinity_timeout(&self, service: u32) -> Tick {
        self.affinity_timeouts.get(&service).copied().unwrap_or_default()
    }

    pub fn connection_limit(&self, service: u32) -> ConnectionLimit {
        self.connection_limits.get(&service).copied().unwrap_or_default()
    }

    fn write_slots(&mut self, first: u32, backends: &[u32]) {
        let (first, end) = (first as usize, first as usize + backends.len());
        if self.slots.len() < end {
            self.slots.resize(end, 0);
        }
        self.slots[first..end].copy_from_slice(backends);
    }

    /// Takes note of a change that was carried out.
    pub fn apply(&mut self, op: &MapOp) {
        match op {
            MapOp::SetVip { vip, service } => {
                if self.vips.insert(*vip, *service).is_none() && matches!(vip, Vip::V4(_)) {
                    self.vips_v4 += 1;
                }
            }
            MapOp::DeleteVip { vip } => {
                if self.vips.remove(vip).is_some() && matches!(vip, Vip::V4(_)) {
                    self.vips_v4 -= 1;
                }
            }
            MapOp::AllowSource { service, range } => self.sources.insert(*service, *range),
            MapOp::ForbidSource { service, range } => self.sources.remove(*service, range),
            MapOp::SetAffinityTimeout { service, ticks: 0 } => {
                let _ = self.affinity_timeouts.remove(service);
            }
            MapOp::SetAffinityTimeout { service, ticks } => {
                let _ = self.affinity_timeouts.insert(*service, *ticks);
            }
            MapOp::SetConnectionLimit { service, limit } if *limit == ConnectionLimit::default() => {
                let _ = self.connection_limits.remove(service);
            }
            MapOp::SetConnectionLimit { service, limit } => {
                let _ = self.connection_limits.insert(*service, *limit);
            }
            MapOp::SetService { index, value } => drop(self.services.insert(*index, *value)),
            MapOp::SetServiceName { index, value } => drop(self.names.insert(*index, **value)),
            MapOp::SetSlots { first, backends } => self.write_slots(*first, backends),
            MapOp::SetBackend { index, value } => drop(self.backends.insert(*index, *value)),
            MapOp::SetSnatAddress { index, address } => {
                if self.snat_addresses.len() <= *index as usize {
                    self.snat_addresses.resize(*index as usize + 1, [0; 16]);
                }
                self.snat_addresses[*index as usize] = *address;
            }
            MapOp::SetConfig { value } => self.config = Some(*value),
            MapOp::ClearServiceCounters { .. } | MapOp::ClearBackendCounters { .. } => {}
        }
    }
}

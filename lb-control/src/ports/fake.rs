//! Maps without a kernel, for tests and dry runs; and maps that fail.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use anyhow::{Result, bail, ensure};
use ipnet::IpNet;
use lb_common::abi::{Backend, Config, ConnectionLimit, Service, ServiceFlags, ServiceName, Tick};

use super::{Limits, MapOp, MapStore, Vip};

/// Maps in memory. They hold to the kernel's sizes.
#[derive(Clone, Debug, Default)]
pub struct FakeMaps {
    limits: Limits,
    vips: HashMap<Vip, u32>,
    services: HashMap<u32, Service>,
    names: HashMap<u32, ServiceName>,
    backends: HashMap<u32, Backend>,
    slots: HashMap<u32, u32>,
    snat_addresses: HashMap<u32, [u8; 16]>,
    source_ranges: BTreeMap<u32, BTreeSet<IpNet>>,
    affinity_timeouts: HashMap<u32, Tick>,
    connection_limits: HashMap<u32, ConnectionLimit>,
    config: Option<Config>,
    /// Backends whose counters were zeroed, in order.
    pub cleared_backends: Vec<u32>,
    /// Service entries whose counters were zeroed, in order.
    pub cleared_services: Vec<u32>,
}

impl FakeMaps {
    /// Empty maps of these sizes.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// One backend; zeroes if it was never written.
    #[must_use]
    pub fn backend(&self, index: u32) -> Backend {
        self.backends.get(&index).copied().unwrap_or_default()
    }

    /// One Service entry; zeroes if it was never written.
    #[must_use]
    pub fn service(&self, index: u32) -> Service {
        self.services.get(&index).copied().unwrap_or_default()
    }

    /// Whether a client may open connections to a Service entry.
    #[must_use]
    pub fn is_allowed(&self, service: u32, client: IpAddr) -> bool {
        !self.service(service).has(ServiceFlags::SOURCE_RANGES)
            || self
                .source_ranges
                .get(&service)
                .is_some_and(|all| all.iter().any(|range| range.contains(&client)))
    }

    fn allow(&mut self, service: u32, range: IpNet) -> Result<()> {
        let is_v4 = matches!(range, IpNet::V4(_));
        let (map, limit) = if is_v4 {
            ("src_ranges_v4", self.limits.source_ranges_v4)
        } else {
            ("src_ranges_v6", self.limits.source_ranges_v6)
        };
        ensure!(range == range.trunc(), "map {map}: {range} has host bits");
        let is_there = self.source_ranges.get(&service).is_some_and(|ranges| ranges.contains(&range));
        let used: usize = match limit {
            0..1_000 => {
                let all = self.source_ranges.values().flatten();
                all.filter(|range| matches!(range, IpNet::V4(_)) == is_v4).count()
            }
            // Counting is dear; tests of limits have small ones.
            _ => 0,
        };
        ensure!(is_there || used < limit as usize, "map {map}: full (ENOSPC)");
        self.source_ranges.entry(service).or_default().insert(range);
        Ok(())
    }

    fn check(map: &str, index: u32, limit: u32) -> Result<()> {
        ensure!(index < limit, "map {map}: index {index} is beyond its {limit} entries (E2BIG)");
        Ok(())
    }

    fn set_vip(&mut self, vip: Vip, service: u32) -> Result<()> {
        let is_v4 = matches!(vip, Vip::V4(_));
        let (map, limit) =
            if is_v4 { ("vips_v4", self.limits.vips_v4) } else { ("vips_v6", self.limits.vips_v6) };
        let used = || match self.vips.len() {
            few if few < limit as usize => few,
            _ => self.vips.keys().filter(|vip| matches!(vip, Vip::V4(_)) == is_v4).count(),
        };
        ensure!(self.vips.contains_key(&vip) || used() < limit as usize, "map {map}: full (E2BIG)");
        self.vips.insert(vip, service);
        Ok(())
    }
}

/// All entries of an array that are not zero, in order.
fn sorted<T: Copy + PartialEq>(map: &HashMap<u32, T>, zero: &T) -> Vec<(u32, T)> {
    let mut all: Vec<_> =
        map.iter().filter(|(_, value)| *value != zero).map(|(i, value)| (*i, *value)).collect();
    all.sort_by_key(|(index, _)| *index);
    all
}

impl MapStore for FakeMaps {
    fn apply(&mut self, op: &MapOp) -> Result<()> {
        match op {
            MapOp::SetVip { vip, service } => self.set_vip(*vip, *service)?,
            MapOp::DeleteVip { vip } => drop(self.vips.remove(vip)),
            MapOp::SetService { index, value } => {
                Self::check("services", *index, self.limits.services)?;
                self.services.insert(*index, *value);
            }
            MapOp::SetServiceName { index, value } => {
                Self::check("service_names", *index, self.limits.services)?;
                self.names.insert(*index, **value);
            }
            MapOp::AllowSource { service, range } => self.allow(*service, *range)?,
            MapOp::ForbidSource { service, range } => {
                if let Some(ranges) = self.source_ranges.get_mut(service) {
                    ranges.remove(range);
                }
            }
            MapOp::SetAffinityTimeout { service, ticks } => {
                Self::check("affinity_ticks", *service, self.limits.services)?;
                self.affinity_timeouts.insert(*service, *ticks);
            }
            MapOp::SetConnectionLimit { service, limit } => {
                Self::check("conn_limits", *service, self.limits.services)?;
                self.connection_limits.insert(*service, *limit);
            }
            MapOp::SetSlots { first, backends } => {
                for (index, backend) in (*first..).zip(backends) {
                    Self::check("slots", index, self.limits.slots)?;
                    self.slots.insert(index, *backend);
                }
            }
            MapOp::SetBackend { index, value } => {
                Self::check("backends", *index, self.limits.backends)?;
                self.backends.insert(*index, *value);
            }
            MapOp::SetSnatAddress { index, address } => {
                Self::check("snat_addresses", *index, self.limits.snat_addresses)?;
                self.snat_addresses.insert(*index, *address);
            }
            MapOp::SetConfig { value } => self.config = Some(*value),
            MapOp::ClearServiceCounters { index } => {
                Self::check("service_stats", *index, self.limits.services)?;
                self.cleared_services.push(*index);
            }
            MapOp::ClearBackendCounters { index } => {
                Self::check("backend_stats", *index, self.limits.backends)?;
                self.cleared_backends.push(*index);
            }
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn vips(&self) -> Result<Vec<(Vip, u32)>> {
        Ok(self.vips.iter().map(|(vip, service)| (*vip, *service)).collect())
    }

    fn services(&self) -> Result<Vec<(u32, Service)>> {
        Ok(sorted(&self.services, &Service::default()))
    }

    fn service_names(&self) -> Result<Vec<(u32, ServiceName)>> {
        Ok(sorted(&self.names, &ServiceName::default()))
    }

    fn backends(&self) -> Result<Vec<(u32, Backend)>> {
        Ok(sorted(&self.backends, &Backend::default()))
    }

    fn slots(&self, first: u32, count: u32) -> Result<Vec<u32>> {
        ensure!(first + count <= self.limits.slots, "map slots: {first}+{count} is beyond its end");
        Ok((first..first + count).map(|index| self.slots.get(&index).copied().unwrap_or_default()).collect())
    }

    fn source_ranges(&self) -> Result<Vec<(u32, IpNet)>> {
        let all = self.source_ranges.iter();
        Ok(all.flat_map(|(service, ranges)| ranges.iter().map(|range| (*service, *range))).collect())
    }

    fn affinity_timeouts(&self) -> Result<Vec<(u32, Tick)>> {
        Ok(sorted(&self.affinity_timeouts, &0))
    }

    fn connection_limits(&self) -> Result<Vec<(u32, ConnectionLimit)>> {
        Ok(sorted(&self.connection_limits, &ConnectionLimit::default()))
    }

    fn snat_addresses(&self) -> Result<Vec<[u8; 16]>> {
        let all = 0..self.limits.snat_addresses;
        Ok(all.map(|index| self.snat_addresses.get(&index).copied().unwrap_or_default()).collect())
    }

    fn config(&self) -> Result<Option<Config>> {
        Ok(self.config)
    }
}

/// Maps whose writes fail by a script.
#[derive(Clone, Debug)]
pub struct FaultyMaps<M> {
    /// The maps that get the writes that do not fail.
    pub inner: M,
    /// Which writes fail, counted from 0 over all.
    pub failing: BTreeSet<u64>,
    writes: u64,
}

impl<M> FaultyMaps<M> {
    /// Lets the writes with these numbers fail.
    pub fn new(inner: M, failing: impl IntoIterator<Item = u64>) -> Self {
        Self { inner, failing: failing.into_iter().collect(), writes: 0 }
    }

    /// Number of writes so far, including those that failed.
    pub fn writes(&self) -> u64 {
        self.writes
    }
}

impl<M: MapStore> MapStore for FaultyMaps<M> {
    fn apply(&mut self, op: &MapOp) -> Result<()> {
        let number = self.writes;
        self.writes += 1;
        if self.failing.contains(&number) {
            bail!("write {number} fails by script (ENOMEM)");
        }
        self.inner.apply(op)
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn vips(&self) -> Result<Vec<(Vip, u32)>> {
        self.inner.vips()
    }

    fn services(&self) -> Result<Vec<(u32, Service)>> {
        self.inner.services()
    }

    fn service_names(&self) -> Result<Vec<(u32, ServiceName)>> {
        self.inner.service_names()
    }

    fn backends(&self) -> Result<Vec<(u32, Backend)>> {
        self.inner.backends()
    }

    fn slots(&self, first: u32, count: u32) -> Result<Vec<u32>> {
        self.inner.slots(first, count)
    }

    fn source_ranges(&self) -> Result<Vec<(u32, IpNet)>> {
        self.inner.source_ranges()
    }

    fn affinity_timeouts(&self) -> Result<Vec<(u32, Tick)>> {
        self.inner.affinity_timeouts()
    }

    fn connection_limits(&self) -> Result<Vec<(u32, ConnectionLimit)>> {
        self.inner.connection_limits()
    }

    fn snat_addresses(&self) -> Result<Vec<[u8; 16]>> {
        self.inner.snat_addresses()
    }

    fn config(&self) -> Result<Option<Config>> {
        self.inner.config()
    }
}

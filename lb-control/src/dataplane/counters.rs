//! Arrays and counters read as a whole, in a few system calls: for metrics, which want all of them.

use std::collections::HashMap;
use std::os::fd::AsFd;

use anyhow::{Context, Result, anyhow};
use aya::maps::MapData;
use lb_common::abi::{
    Backend, BackendStats, DropReason, DropStats, Plain, Service, ServiceName, ServiceStats, VipKey, maps,
};

use super::{PinDirectory, batch};

/// The pinned maps, each opened when it is read.
#[derive(Clone, Debug)]
pub struct Counters {
    pins: PinDirectory,
}

impl Counters {
    /// Names the pins; nothing is opened.
    #[must_use]
    pub fn new(pins: PinDirectory) -> Self {
        Self { pins }
    }

    /// Entries of `service_names` that are in use.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn service_names(&self) -> Result<Vec<(u32, ServiceName)>> {
        self.array(maps::SERVICE_NAMES)
    }

    /// Entries of `services` that are in use.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn services(&self) -> Result<Vec<(u32, Service)>> {
        self.array(maps::SERVICES)
    }

    /// Entries of `backends` that are in use.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn backends(&self) -> Result<Vec<(u32, Backend)>> {
        self.array(maps::BACKENDS)
    }

    /// How many VIPs there are, IPv4 and IPv6.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn vips(&self) -> Result<[usize; 2]> {
        let (mut v4, mut v6) = (0, 0);
        self.each(maps::VIPS_V4, |_: VipKey<[u8; 4]>, _: u32| v4 += 1)?;
        self.each(maps::VIPS_V6, |_: VipKey<[u8; 16]>, _: u32| v6 += 1)?;
        Ok([v4, v6])
    }

    /// Traffic of Service entries, summed over the CPUs; nothing of those that had none.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn service_stats(&self) -> Result<HashMap<u32, ServiceStats>> {
        self.per_cpu(maps::SERVICE_STATS, |sum: &mut ServiceStats, cpu| {
            sum.packets_in += cpu.packets_in;
            sum.bytes_in += cpu.bytes_in;
            sum.packets_out += cpu.packets_out;
            sum.bytes_out += cpu.bytes_out;
            sum.new_flows += cpu.new_flows;
            sum.refused += cpu.refused;
        })
    }

    /// Flows that each CPU has begun, of all Service entries.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn new_flows_by_cpu(&self) -> Result<Vec<u64>> {
        let cpus = possible_cpus()?;
        let mut began = vec![0; cpus];
        batch::for_each_per_cpu(
            self.open(maps::SERVICE_STATS)?.fd().as_fd(),
            cpus,
            |_, of: &[ServiceStats]| {
                began.iter_mut().zip(of).for_each(|(sum, cpu)| *sum += cpu.new_flows);
            },
        )
        .with_context(|| format!("reading the map {}", maps::SERVICE_STATS.name))?;
        Ok(began)
    }

    /// Traffic of backends, summed over the CPUs; nothing of those that had none.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn backend_stats(&self) -> Result<HashMap<u32, BackendStats>> {
        self.per_cpu(maps::BACKEND_STATS, |sum: &mut BackendStats, cpu| {
            sum.packets_in += cpu.packets_in;
            sum.bytes_in += cpu.bytes_in;
            sum.packets_out += cpu.packets_out;
            sum.bytes_out += cpu.bytes_out;
            sum.new_flows += cpu.new_flows;
        })
    }

    /// Drops by reason, summed over the CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn drops(&self) -> Result<Vec<(DropReason, DropStats)>> {
        let all = self.per_cpu(maps::DROPS, |sum: &mut DropStats, cpu| {
            sum.packets += cpu.packets;
            sum.bytes += cpu.bytes;
        })?;
        let of = |reason: &DropReason| (*reason, all.get(&(*reason as u32)).copied().unwrap_or_default());
        Ok(DropReason::ALL.iter().map(of).collect())
    }

    /// How many entries a map has room for.
    ///
    /// # Errors
    /// When the map cannot be opened.
    pub fn room(&self, map: maps::Map) -> Result<u32> {
        let info = self.open(map)?.info();
        Ok(info.with_context(|| format!("asking about the map {}", map.name))?.max_entries())
    }

    fn open(&self, map: maps::Map) -> Result<MapData> {
        let path = self.pins.map(map);
        MapData::from_pin(&path).with_context(|| format!("opening the pinned map {}", path.display()))
    }

    fn each<K: Plain, V: Plain>(&self, map: maps::Map, each: impl FnMut(K, V)) -> Result<()> {
        let data = self.open(map)?;
        batch::for_each(data.fd().as_fd(), each).with_context(|| format!("reading the map {}", map.name))
    }

    /// Elements that are not all zero, which is what unused ones are.
    fn array<V: Plain + Default + PartialEq>(&self, map: maps::Map) -> Result<Vec<(u32, V)>> {
        let mut all = Vec::new();
        let unused = V::default();
        self.each(map, |index: u32, value: V| {
            if value != unused {
                all.push((index, value));
            }
        })?;
        Ok(all)
    }

    fn per_cpu<V: Plain + Default + PartialEq>(
        &self,
        map: maps::Map,
        mut add: impl FnMut(&mut V, &V),
    ) -> Result<HashMap<u32, V>> {
        let cpus = possible_cpus()?;
        let data = self.open(map)?;
        let mut all = HashMap::new();
        let nothing = V::default();
        let reading = batch::for_each_per_cpu(data.fd().as_fd(), cpus, |index, values: &[V]| {
            let mut sum = V::default();
            values.iter().for_each(|value| add(&mut sum, value));
            if sum != nothing {
                all.insert(index, sum);
            }
        });
        reading.with_context(|| format!("reading the map {}", map.name))?;
        Ok(all)
    }
}

fn possible_cpus() -> Result<usize> {
    aya::util::nr_cpus().map_err(|(file, error)| anyhow!("{file}: {error}"))
}

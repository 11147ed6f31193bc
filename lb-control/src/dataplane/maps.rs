//! The maps, opened for the agent or for the command line.

use std::collections::HashMap as StdHashMap;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, DevMapHash, HashMap, Map, MapData, PerCpuArray};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lb_common::abi::{
    Backend, BackendStats, Config, ConnectionLimit, DropReason, DropStats, Plain, Service, ServiceName,
    ServiceStats, SourceRange, Tick, VipKey, maps,
};

use tracing::warn;

use super::{PinDirectory, batch};
use crate::ports::{Limits, MapOp, MapStore, Vip};

/// The maps that the agent writes, and the counters.
pub struct KernelMaps {
    limits: Limits,
    vips_v4: HashMap<MapData, VipKey<[u8; 4]>, u32>,
    vips_v6: HashMap<MapData, VipKey<[u8; 16]>, u32>,
    source_ranges_v4: LpmTrie<MapData, SourceRange<[u8; 4]>, u32>,
    source_ranges_v6: LpmTrie<MapData, SourceRange<[u8; 16]>, u32>,
    affinity_ticks: Array<MapData, Tick>,
    connection_limits: Array<MapData, ConnectionLimit>,
    services: Array<MapData, Service>,
    service_names: Array<MapData, ServiceName>,
    round_robin: Array<MapData, u64>,
    slots: Array<MapData, u32>,
    backends: Array<MapData, Backend>,
    snat_addresses: Array<MapData, [u8; 16]>,
    config: Array<MapData, Config>,
    service_stats: PerCpuArray<MapData, ServiceStats>,
    backend_stats: PerCpuArray<MapData, BackendStats>,
    drops: PerCpuArray<MapData, DropStats>,
    open_flows: Array<MapData, u32>,
    devices: DevMapHash<MapData>,
    whole: Whole,
}

/// The maps that are read as a whole, once more: aya reads one element at a time.
struct Whole {
    vips_v4: OwnedFd,
    vips_v6: OwnedFd,
    services: OwnedFd,
    service_names: OwnedFd,
    backends: OwnedFd,
    slots: OwnedFd,
    affinity_ticks: OwnedFd,
    connection_limits: OwnedFd,
    open_flows: OwnedFd,
    snat_addresses: OwnedFd,
}

impl KernelMaps {
    /// Takes the maps from wherever `open` finds them.
    ///
    /// # Errors
    /// When one is missing or of another type.
    pub fn new(mut open: impl FnMut(maps::Map) -> Result<Map>) -> Result<Self> {
        macro_rules! typed {
            ($map:expr) => {
                open($map)?.try_into().with_context(|| format!("opening the map {}", $map.name))?
            };
        }
        let (mut sizes, mut files) = (StdHashMap::new(), StdHashMap::new());
        let mut sized = |map: maps::Map| -> Result<Map> {
            let found = open(map)?;
            let data = Self::data(&found)?;
            sizes.insert(map.name, data.info()?.max_entries());
            files.insert(map.name, data.fd().as_fd().try_clone_to_owned()?);
            Ok(found)
        };
        let vips_v4 = sized(maps::VIPS_V4)?.try_into()?;
        let vips_v6 = sized(maps::VIPS_V6)?.try_into()?;
        let source_ranges_v4 = sized(maps::SOURCE_RANGES_V4)?.try_into()?;
        let source_ranges_v6 = sized(maps::SOURCE_RANGES_V6)?.try_into()?;
        let services = sized(maps::SERVICES)?.try_into()?;
        let slots = sized(maps::SLOTS)?.try_into()?;
        let backends = sized(maps::BACKENDS)?.try_into()?;
        let snat_addresses = sized(maps::SNAT_ADDRESSES)?.try_into()?;
        let service_names = sized(maps::SERVICE_NAMES)?.try_into()?;
        let affinity_ticks = sized(maps::AFFINITY_TICKS)?.try_into()?;
        let connection_limits = sized(maps::CONNECTION_LIMITS)?.try_into()?;
        let open_flows = sized(maps::OPEN_FLOWS)?.try_into()?;
        let mut file = |map: maps::Map| files.remove(map.name).context("a map was not opened");
        let whole = Whole {
            vips_v4: file(maps::VIPS_V4)?,
            vips_v6: file(maps::VIPS_V6)?,
            services: file(maps::SERVICES)?,
            service_names: file(maps::SERVICE_NAMES)?,
            backends: file(maps::BACKENDS)?,
            slots: file(maps::SLOTS)?,
            affinity_ticks: file(maps::AFFINITY_TICKS)?,
            connection_limits: file(maps::CONNECTION_LIMITS)?,
            open_flows: file(maps::OPEN_FLOWS)?,
            snat_addresses: file(maps::SNAT_ADDRESSES)?,
        };
        let size = |map: maps::Map| sizes.get(map.name).copied().unwrap_or_default();
        Ok(Self {
            limits: Limits {
                vips_v4: size(maps::VIPS_V4),
                vips_v6: size(maps::VIPS_V6),
                services: size(maps::SERVICES),
                slots: size(maps::SLOTS),
                backends: size(maps::BACKENDS),
                snat_addresses: size(maps::SNAT_ADDRESSES),
                source_ranges_v4: size(maps::SOURCE_RANGES_V4),
                source_ranges_v6: size(maps::SOURCE_RANGES_V6),
            },
            source_ranges_v4,
            source_ranges_v6,
            affinity_ticks,
            connection_limits,
            vips_v4,
            vips_v6,
            services,
            slots,
            backends,
            snat_addresses,
            service_names,
            round_robin: typed!(maps::ROUND_ROBIN),
            config: typed!(maps::CONFIG),
            service_stats: typed!(maps::SERVICE_STATS),
            backend_stats: typed!(maps::BACKEND_STATS),
            drops: typed!(maps::DROPS),
            open_flows,
            devices: typed!(maps::DEVICES),
            whole,
        })
    }

    /// Opens the pinned maps.
    ///
    /// # Errors
    /// When there are none, or they may not be opened (needs root).
    pub fn from_pins(pins: &PinDirectory) -> Result<Self> {
        Self::new(|map| {
            let path = pins.map(map);
            let data = MapData::from_pin(&path)
                .with_context(|| format!("opening the pinned map {}", path.display()))?;
            Ok(Map::from_map_data(data)?)
        })
    }

    /// What lies below a map of one of the types in use.
    pub(super) fn data(map: &Map) -> Result<&MapData> {
        match map {
            Map::Array(data)
            | Map::HashMap(data)
            | Map::LruHashMap(data)
            | Map::LpmTrie(data)
            | Map::PerCpuArray(data)
            | Map::DevMapHash(data)
            | Map::ProgramArray(data) => Ok(data),
            other => anyhow::bail!("a map of an unexpected type: {other:?}"),
        }
    }

    /// Traffic of a Service entry, summed over the CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn service_stats(&self, index: u32) -> Result<ServiceStats> {
        let values = self.service_stats.get(&index, 0).context("reading the map service_stats")?;
        Ok(values.iter().fold(ServiceStats::default(), |sum, cpu| ServiceStats {
            packets_in: sum.packets_in + cpu.packets_in,
            bytes_in: sum.bytes_in + cpu.bytes_in,
            packets_out: sum.packets_out + cpu.packets_out,
            bytes_out: sum.bytes_out + cpu.bytes_out,
            new_flows: sum.new_flows + cpu.new_flows,
            refused: sum.refused + cpu.refused,
        }))
    }

    /// Traffic of a backend, summed over the CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn backend_stats(&self, index: u32) -> Result<BackendStats> {
        let values = self.backend_stats.get(&index, 0).context("reading the map backend_stats")?;
        Ok(values.iter().fold(BackendStats::default(), |sum, cpu| BackendStats {
            packets_in: sum.packets_in + cpu.packets_in,
            bytes_in: sum.bytes_in + cpu.bytes_in,
            packets_out: sum.packets_out + cpu.packets_out,
            bytes_out: sum.bytes_out + cpu.bytes_out,
            new_flows: sum.new_flows + cpu.new_flows,
        }))
    }

    /// The open flows of backends, as the kernel has counted them; those that are not 0.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn open_flows(&self) -> Result<StdHashMap<u32, u32>> {
        Ok(nonzero(&self.whole.open_flows, "open_flows")?.into_iter().collect())
    }

    /// Puts the open flows of a backend right.
    ///
    /// # Errors
    /// When the map cannot be written.
    pub fn set_open_flows(&mut self, backend: u32, flows: u32) -> Result<()> {
        self.open_flows.set(backend, flows, 0).context("writing the map open_flows")
    }

    /// Drops by reason, summed over the CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn drops(&self) -> Result<Vec<(DropReason, DropStats)>> {
        let mut all = Vec::with_capacity(DropReason::COUNT);
        for reason in DropReason::ALL {
            let values = self.drops.get(&(*reason as u32), 0).context("reading the map drops")?;
            let sum = values.iter().fold(DropStats::default(), |sum, cpu| DropStats {
                packets: sum.packets + cpu.packets,
                bytes: sum.bytes + cpu.bytes,
            });
            all.push((*reason, sum));
        }
        Ok(all)
    }

    /// Lets packets be redirected to a device.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn allow_device(&mut self, ifindex: u32) -> Result<()> {
        self.devices
            .insert(ifindex, ifindex, None, 0)
            .with_context(|| format!("adding device {ifindex} to the map devices"))
    }

    /// No longer lets packets be redirected to a device. It is no error if it was not there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn forbid_device(&mut self, ifindex: u32) -> Result<()> {
        ignore_absent(self.devices.remove(ifindex), "devices")
    }

    /// One element of `backends`.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn backend(&self, index: u32) -> Result<Backend> {
        self.backends.get(&index, 0).context("reading the map backends")
    }
}

fn source_key<A: Copy>(service: u32, address: A, length: u8) -> Key<SourceRange<A>>
where
    SourceRange<A>: aya::Pod,
{
    Key::new(SourceRange::<A>::INDEX_BITS + u32::from(length), SourceRange::new(service, address))
}

fn read_ranges<A: Copy>(
    map: &LpmTrie<MapData, SourceRange<A>, u32>,
    name: &str,
    all: &mut Vec<(u32, IpNet)>,
    net: impl Fn(A, u8) -> Option<IpNet>,
) -> Result<()>
where
    SourceRange<A>: aya::Pod,
{
    for key in map.keys() {
        let key = key.with_context(|| format!("reading the map {name}"))?;
        let (range, bits) = (key.data(), key.prefix_len());
        let length = bits.checked_sub(SourceRange::<A>::INDEX_BITS).and_then(|bits| u8::try_from(bits).ok());
        match length.and_then(|length| net(range.address, length)) {
            Some(net) => all.push((u32::from_be_bytes(range.service), net)),
            // Only somebody's hand can have written it; it names no Service, so nobody can say what of
            // it is to stay.
            None => warn!(map = name, bits, "a prefix that is not of one Service: remove it with bpftool"),
        }
    }
    Ok(())
}

fn ignore_absent(result: Result<(), aya::maps::MapError>, map: &str) -> Result<()> {
    use aya::maps::MapError;
    match result {
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        Err(MapError::KeyNotFound) => Ok(()),
        other => other.with_context(|| format!("removing from the map {map}")),
    }
}

/// All elements of an array that are not zero, which is what unused ones are.
fn nonzero<V: Plain + Default + PartialEq>(array: &OwnedFd, name: &str) -> Result<Vec<(u32, V)>> {
    let mut all = Vec::new();
    let unused = V::default();
    let each = |index: u32, value: V| {
        if value != unused {
            all.push((index, value));
        }
    };
    batch::for_each(array.as_fd(), each).with_context(|| format!("reading the map {name}"))?;
    Ok(all)
}

/// `count` elements of an array from `first` on.
fn elements<V: Plain>(array: &OwnedFd, name: &str, first: u32, count: u32) -> Result<Vec<V>> {
    let all =
        batch::elements(array.as_fd(), first, count).with_context(|| format!("reading the map {name}"))?;
    ensure!(all.len() == count as usize, "reading the map {name}: {first}+{count} is beyond its end");
    Ok(all)
}

impl MapStore for KernelMaps {
    fn apply(&mut self, op: &MapOp) -> Result<()> {
        match op {
            MapOp::SetVip { vip: Vip::V4(key), service } => {
                self.vips_v4.insert(key, service, 0).context("writing the map vips_v4")
            }
            MapOp::SetVip { vip: Vip::V6(key), service } => {
                self.vips_v6.insert(key, service, 0).context("writing the map vips_v6")
            }
            MapOp::DeleteVip { vip: Vip::V4(key) } => ignore_absent(self.vips_v4.remove(key), "vips_v4"),
            MapOp::DeleteVip { vip: Vip::V6(key) } => ignore_absent(self.vips_v6.remove(key), "vips_v6"),
            MapOp::AllowSource { service, range: IpNet::V4(range) } => {
                let key = source_key(*service, range.addr().octets(), range.prefix_len());
                self.source_ranges_v4.insert(&key, 1, 0).context("writing the map src_ranges_v4")
            }
            MapOp::AllowSource { service, range: IpNet::V6(range) } => {
                let key = source_key(*service, range.addr().octets(), range.prefix_len());
                self.source_ranges_v6.insert(&key, 1, 0).context("writing the map src_ranges_v6")
            }
            MapOp::ForbidSource { service, range: IpNet::V4(range) } => {
                let key = source_key(*service, range.addr().octets(), range.prefix_len());
                ignore_absent(self.source_ranges_v4.remove(&key), "src_ranges_v4")
            }
            MapOp::ForbidSource { service, range: IpNet::V6(range) } => {
                let key = source_key(*service, range.addr().octets(), range.prefix_len());
                ignore_absent(self.source_ranges_v6.remove(&key), "src_ranges_v6")
            }
            MapOp::SetAffinityTimeout { service, ticks } => {
                self.affinity_ticks.set(*service, ticks, 0).context("writing the map affinity_ticks")
            }
            MapOp::SetConnectionLimit { service, limit } => {
                self.connection_limits.set(*service, limit, 0).context("writing the map conn_limits")
            }
            MapOp::SetService { index, value } => {
                self.services.set(*index, value, 0).context("writing the map services")
            }
            MapOp::SetServiceName { index, value } => {
                self.service_names.set(*index, **value, 0).context("writing the map service_names")
            }
            MapOp::SetSlots { first, backends } => {
                for (index, backend) in (*first..).zip(backends) {
                    self.slots.set(index, backend, 0).context("writing the map slots")?;
                }
                Ok(())
            }
            MapOp::SetBackend { index, value } => {
                self.backends.set(*index, value, 0).context("writing the map backends")
            }
            MapOp::SetSnatAddress { index, address } => {
                self.snat_addresses.set(*index, address, 0).context("writing the map snat_addresses")
            }
            MapOp::SetConfig { value } => self.config.set(0, value, 0).context("writing the map config"),
            MapOp::ClearServiceCounters { index } => {
                clear(&mut self.service_stats, *index, "service_stats")?;
                self.round_robin.set(*index, 0, 0).context("writing the map round_robin")
            }
            MapOp::ClearBackendCounters { index } => {
                clear(&mut self.backend_stats, *index, "backend_stats")?;
                self.set_open_flows(*index, 0)
            }
        }
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn vips(&self) -> Result<Vec<(Vip, u32)>> {
        let mut all = Vec::new();
        batch::for_each(self.whole.vips_v4.as_fd(), |key, service| all.push((Vip::V4(key), service)))
            .context("reading the map vips_v4")?;
        batch::for_each(self.whole.vips_v6.as_fd(), |key, service| all.push((Vip::V6(key), service)))
            .context("reading the map vips_v6")?;
        Ok(all)
    }

    fn services(&self) -> Result<Vec<(u32, Service)>> {
        nonzero(&self.whole.services, "services")
    }

    fn service_names(&self) -> Result<Vec<(u32, ServiceName)>> {
        nonzero(&self.whole.service_names, "service_names")
    }

    fn backends(&self) -> Result<Vec<(u32, Backend)>> {
        nonzero(&self.whole.backends, "backends")
    }

    fn slots(&self, first: u32, count: u32) -> Result<Vec<u32>> {
        elements(&self.whole.slots, "slots", first, count)
    }

    fn source_ranges(&self) -> Result<Vec<(u32, IpNet)>> {
        let mut all = Vec::new();
        read_ranges(&self.source_ranges_v4, "src_ranges_v4", &mut all, |address, length| {
            Some(Ipv4Net::new(address.into(), length).ok()?.into())
        })?;
        read_ranges(&self.source_ranges_v6, "src_ranges_v6", &mut all, |address, length| {
            Some(Ipv6Net::new(address.into(), length).ok()?.into())
        })?;
        Ok(all)
    }

    fn affinity_timeouts(&self) -> Result<Vec<(u32, Tick)>> {
        nonzero(&self.whole.affinity_ticks, "affinity_ticks")
    }

    fn connection_limits(&self) -> Result<Vec<(u32, ConnectionLimit)>> {
        nonzero(&self.whole.connection_limits, "conn_limits")
    }

    fn snat_addresses(&self) -> Result<Vec<[u8; 16]>> {
        elements(&self.whole.snat_addresses, "snat_addresses", 0, self.limits.snat_addresses)
    }

    fn config(&self) -> Result<Option<Config>> {
        let config = self.config.get(&0, 0).context("reading the map config")?;
        Ok((config.route_generation != 0).then_some(config))
    }
}

/// Zeroes a per-CPU element.
fn clear<V: aya::Pod + Default>(array: &mut PerCpuArray<MapData, V>, index: u32, name: &str) -> Result<()> {
    let zeroes =
        vec![V::default(); aya::util::nr_cpus().map_err(|(file, error)| anyhow::anyhow!("{file}: {error}"))?];
    let values = aya::maps::PerCpuValues::try_from(zeroes)?;
    array.set(index, values, 0).with_context(|| format!("writing the map {name}"))
}

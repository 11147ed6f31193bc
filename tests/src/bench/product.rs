//! The product's programs, with maps filled as the agent fills them.

use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result, anyhow};
use aya::maps::{Array, DevMapHash, HashMap, Map, MapData, PerCpuArray, ProgramArray};
use aya::programs::{ProgramFd, Xdp};
use aya::util::nr_cpus;
use aya::{Ebpf, EbpfLoader};
use lb_common::abi::{
    Backend, BackendState, Config, DropReason, DropStats, Flow, FlowKey, NextHop, Service, ServiceStats,
    VipKey, maps,
};

use super::baselines::{handle, load_by, object, program};
use super::packets::{Kind, Tuple, address, low};

/// The VIP, as the last four bytes of an address.
pub const VIP: [u8; 4] = [192, 0, 2, 10];
/// Ports of the VIP: with backends, and without.
pub const PORT: u16 = 80;
pub const EMPTY_PORT: u16 = 81;

/// Where the backends of all Services are.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Last four bytes of the address.
    pub address: [u8; 4],
    /// Port.
    pub port: u16,
    /// The way there.
    pub next_hop: NextHop,
}

/// The loaded object.
pub struct Product {
    ebpf: Ebpf,
    _programs: ProgramArray<MapData>,
}

/// Service entries: one for each kind, and one without backends.
fn service_index(kind: Kind) -> u32 {
    1 + u32::from(kind.is_ipv6) * 2 + u32::from(kind.is_udp)
}

const EMPTY_SERVICE: u32 = 5;

fn kinds() -> [Kind; 4] {
    [(false, false), (false, true), (true, false), (true, true)]
        .map(|(is_ipv6, is_udp)| Kind { is_ipv6, is_udp })
}

impl Product {
    /// Loads it with `sizes` in place of the default numbers of entries.
    ///
    /// # Errors
    /// When the object is missing or rejected.
    pub fn load(sizes: &[(&str, u32)], endpoints: &[Endpoint], snat: &[[u8; 4]]) -> Result<Self> {
        Self::load_with_cache(sizes, endpoints, snat, maps::DEFAULT_FLOW_CACHE)
    }

    /// The same with a flow cache of as many copies on each CPU, or none.
    ///
    /// # Errors
    /// When the object is missing or rejected.
    pub fn load_with_cache(
        sizes: &[(&str, u32)],
        endpoints: &[Endpoint],
        snat: &[[u8; 4]],
        slots: u32,
    ) -> Result<Self> {
        let path = object("pointsman-ebpf", "POINTSMAN_EBPF_OBJECT")?;
        let cpus = nr_cpus().map_err(|(path, error)| anyhow!("counting the CPUs by {path}: {error}"))? as u32;
        let mut loader = EbpfLoader::new();
        for (map, entries) in sizes {
            loader.map_max_entries(map, *entries);
        }
        for cache in [maps::FLOW_CACHE_V4, maps::FLOW_CACHE_V6] {
            loader.map_max_entries(cache.name, (slots * cpus).max(1));
        }
        loader.override_global(maps::FLOW_CACHE_SLOTS, &slots, true);
        let mut ebpf = load_by(&mut loader, &path)?;
        let map = ebpf.take_map(maps::PROGRAMS.name).context("the object lacks the map programs")?;
        let mut programs: ProgramArray<_> = map.try_into()?;
        for (index, name) in (0..).zip(maps::CALLED_PROGRAMS.into_iter().chain(maps::COOKIE_PROGRAMS)) {
            programs.set(index, &handle(&mut ebpf, name)?, 0)?;
        }
        let mut product = Self { ebpf, _programs: programs };
        product.fill(endpoints, snat)?;
        Ok(product)
    }

    fn map(&mut self, map: maps::Map) -> Result<&mut Map> {
        self.ebpf.map_mut(map.name).with_context(|| format!("the object lacks the map {}", map.name))
    }

    fn fill(&mut self, endpoints: &[Endpoint], snat: &[[u8; 4]]) -> Result<()> {
        let mut config: Array<_, Config> = self.map(maps::CONFIG)?.try_into()?;
        config.set(0, Config::default(), 0)?;
        let mut addresses: Array<_, [u8; 16]> = self.map(maps::SNAT_ADDRESSES)?.try_into()?;
        let count = snat.len() as u32;
        for (index, snat) in (0..).zip(snat) {
            let [a, b, c, d] = *snat;
            addresses.set(index, [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0)?;
            addresses.set(count + index, address(*snat), 0)?;
        }
        for kind in kinds() {
            self.fill_service(kind, endpoints, count)?;
        }
        let mut vips: HashMap<_, VipKey<[u8; 4]>, u32> = self.map(maps::VIPS_V4)?.try_into()?;
        vips.insert(VipKey::new(VIP, EMPTY_PORT.to_be_bytes(), 6), EMPTY_SERVICE, 0)?;
        Ok(())
    }

    fn fill_service(&mut self, kind: Kind, endpoints: &[Endpoint], snat_count: u32) -> Result<()> {
        let service = service_index(kind);
        let first = (service - 1) * endpoints.len() as u32;
        for (place, endpoint) in (0..).zip(endpoints) {
            let index = 1 + first + place;
            let [a, b, c, d] = endpoint.address;
            let narrow = [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            let backend = Backend {
                address: if kind.is_ipv6 { address(endpoint.address) } else { narrow },
                port: endpoint.port.to_be_bytes(),
                state: BackendState::Active as u8,
                family: if kind.is_ipv6 { 6 } else { 4 },
                generation: 1,
                service,
                snat_first: if kind.is_ipv6 { snat_count as u16 } else { 0 },
                snat_count: snat_count as u16,
                next_hop: endpoint.next_hop,
                weight: 1,
                flags: 0,
                reserved: 0,
                mtu: 0,
                reserved_end: [0; 4],
            };
            Array::<_, Backend>::try_from(self.map(maps::BACKENDS)?)?.set(index, backend, 0)?;
            Array::<_, u32>::try_from(self.map(maps::SLOTS)?)?.set(first + place, index, 0)?;
        }
        let entry = Service::new(first, endpoints.len() as u32, 0);
        Array::<_, Service>::try_from(self.map(maps::SERVICES)?)?.set(service, entry, 0)?;
        let port = PORT.to_be_bytes();
        if kind.is_ipv6 {
            let mut vips: HashMap<_, VipKey<[u8; 16]>, u32> = self.map(maps::VIPS_V6)?.try_into()?;
            vips.insert(VipKey::new(address(VIP), port, kind.protocol()), service, 0)?;
        } else {
            let mut vips: HashMap<_, VipKey<[u8; 4]>, u32> = self.map(maps::VIPS_V4)?.try_into()?;
            vips.insert(VipKey::new(VIP, port, kind.protocol()), service, 0)?;
        }
        Ok(())
    }

    /// Says whether SYNs are answered with cookies: one of [`SynCookies`](lb_common::abi::SynCookies).
    ///
    /// # Errors
    /// When the map cannot be written.
    pub fn set_syn_cookies(&mut self, syn_cookies: u8) -> Result<()> {
        let mut config: Array<_, Config> = self.map(maps::CONFIG)?.try_into()?;
        Ok(config.set(0, Config { syn_cookies, ..Config::default() }, 0)?)
    }

    /// Allows a device to be redirected to.
    ///
    /// # Errors
    /// When there is no such device in the thread's namespace.
    pub fn allow_device(&mut self, ifindex: u32) -> Result<()> {
        let mut devices: DevMapHash<_> = self.map(maps::DEVICES)?.try_into()?;
        Ok(devices.insert(ifindex, ifindex, None, 0)?)
    }

    /// The program that is attached to devices.
    ///
    /// # Errors
    /// When the object lacks it.
    pub fn entry(&mut self) -> Result<&mut Xdp> {
        program(&mut self.ebpf, maps::ENTRY_PROGRAM)
    }

    /// A handle to it.
    ///
    /// # Errors
    /// When the object lacks it.
    pub fn handle(&mut self) -> Result<ProgramFd> {
        handle(&mut self.ebpf, maps::ENTRY_PROGRAM)
    }

    /// The tuples that the backends answer with, from the entries that the program has made.
    ///
    /// # Errors
    /// When a flow has no entry in the table.
    pub fn replies(&mut self, kind: Kind, clients: &[Tuple]) -> Result<Vec<Tuple>> {
        if kind.is_ipv6 {
            let table: HashMap<_, FlowKey<[u8; 16]>, Flow<[u8; 16]>> =
                self.map(maps::TRANSIENT_V6)?.try_into()?;
            let find = |client: &Tuple| {
                let flow =
                    table.get(&client.key_v6(kind), 0).with_context(|| format!("no flow for {client:?}"))?;
                Ok(turned(
                    flow.new_source,
                    flow.new_destination,
                    flow.new_source_port,
                    flow.new_destination_port,
                ))
            };
            return clients.iter().map(find).collect();
        }
        let table: HashMap<_, FlowKey<[u8; 4]>, Flow<[u8; 4]>> = self.map(maps::TRANSIENT_V4)?.try_into()?;
        let find = |client: &Tuple| {
            let flow =
                table.get(&client.key_v4(kind), 0).with_context(|| format!("no flow for {client:?}"))?;
            let (source, destination) = (address(flow.new_source), address(flow.new_destination));
            Ok(turned(source, destination, flow.new_source_port, flow.new_destination_port))
        };
        clients.iter().map(find).collect()
    }

    /// Whether a flow is in the table of established flows.
    ///
    /// # Errors
    /// When the map is of another type.
    pub fn is_established(&mut self, kind: Kind, client: &Tuple) -> Result<bool> {
        if kind.is_ipv6 {
            let table: HashMap<_, FlowKey<[u8; 16]>, Flow<[u8; 16]>> =
                self.map(maps::FLOWS_V6)?.try_into()?;
            return Ok(table.get(&client.key_v6(kind), 0).is_ok());
        }
        let table: HashMap<_, FlowKey<[u8; 4]>, Flow<[u8; 4]>> = self.map(maps::FLOWS_V4)?.try_into()?;
        Ok(table.get(&client.key_v4(kind), 0).is_ok())
    }

    /// Packets forwarded for the Service of a kind: to backends, and to clients.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn forwarded(&mut self, kind: Kind) -> Result<(u64, u64)> {
        let stats: PerCpuArray<_, ServiceStats> = self.map(maps::SERVICE_STATS)?.try_into()?;
        let all = stats.get(&service_index(kind), 0)?;
        Ok((all.iter().map(|cpu| cpu.packets_in).sum(), all.iter().map(|cpu| cpu.packets_out).sum()))
    }

    /// Drop reasons that were counted, for messages.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn drops(&mut self) -> Result<Vec<(DropReason, u64)>> {
        let drops: PerCpuArray<_, DropStats> = self.map(maps::DROPS)?.try_into()?;
        let mut counted = Vec::new();
        for reason in DropReason::ALL {
            let packets = drops.get(&(*reason as u32), 0)?.iter().map(|cpu| cpu.packets).sum();
            if packets > 0 {
                counted.push((*reason, packets));
            }
        }
        Ok(counted)
    }

    /// Bytes that the kernel has reserved for a map, and its number of entries.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn memory(&mut self, map: maps::Map) -> Result<(u64, u64)> {
        let data = match self.map(map)? {
            Map::HashMap(data) | Map::LruHashMap(data) => data,
            other => anyhow::bail!("{} is {other:?}", map.name),
        };
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", data.fd().as_fd().as_raw_fd()))?;
        let field = |name: &str| -> Result<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            Ok(line.with_context(|| format!("fdinfo has no {name}"))?.trim().parse()?)
        };
        Ok((field("memlock:")?, field("max_entries:")?))
    }
}

fn turned(source: [u8; 16], destination: [u8; 16], source_port: [u8; 2], destination_port: [u8; 2]) -> Tuple {
    Tuple {
        source: destination,
        destination: source,
        source_port: u16::from_be_bytes(destination_port),
        destination_port: u16::from_be_bytes(source_port),
    }
}

/// Three endpoints that are reached by one device.
#[must_use]
pub fn endpoints(next_hop: NextHop) -> Vec<Endpoint> {
    (1..=3).map(|place| Endpoint { address: [10, 0, 1, place], port: 8080, next_hop }).collect()
}

/// Last four bytes of the addresses towards backends.
#[must_use]
pub fn snat_addresses(count: u8) -> Vec<[u8; 4]> {
    (0..count).map(|place| [10, 0, 0, 10 + place]).collect()
}

/// The address as text, for commands.
#[must_use]
pub fn dotted(whole: &[u8; 16]) -> String {
    low(whole).map(|byte| byte.to_string()).join(".")
}

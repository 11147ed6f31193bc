//! The flow tables, read.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use aya::maps::MapData;
use lb_common::abi::{AddressFamily, Flow, FlowKey, FlowState, Plain, Tick, V4, V6, maps};
use lb_common::forward::ip::IpFamily;

use super::{PinDirectory, batch};

/// A connection, both directions together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowRecord {
    /// IANA protocol number.
    pub protocol: u8,
    /// Who opened it.
    pub client: SocketAddr,
    /// What it was opened to.
    pub vip: SocketAddr,
    /// The source that the backend sees.
    pub snat: SocketAddr,
    /// Who serves it.
    pub backend: SocketAddr,
    /// Index of the Service entry.
    pub service: u32,
    /// Index of the backend.
    pub backend_index: u32,
    /// The backend's generation when the flow began.
    pub backend_generation: u32,
    /// Where it stands.
    pub state: FlowState,
    /// Whether it lies in the table of established flows.
    pub established: bool,
    /// The time of its last packet in either direction.
    pub last_seen: Tick,
    /// The time of the client's last packet.
    pub client_last_seen: Tick,
}

/// An address family whose addresses can be shown.
pub(super) trait Shown: IpFamily<Address: Into<IpAddr> + Hash> {
    /// The tables: established, and those that begin or end.
    const TABLES: [maps::Map; 2];
}

impl Shown for V4 {
    const TABLES: [maps::Map; 2] = [maps::FLOWS_V4, maps::TRANSIENT_V4];
}

impl Shown for V6 {
    const TABLES: [maps::Map; 2] = [maps::FLOWS_V6, maps::TRANSIENT_V6];
}

/// The four flow tables, by their pins, and what tells of copies that they are none any more.
pub struct FlowTables {
    v4: [MapData; 2],
    v6: [MapData; 2],
    versions: MapData,
}

impl FlowTables {
    /// Opens the pinned tables.
    ///
    /// # Errors
    /// When there are none, or they may not be opened (needs root).
    pub fn open(pins: &PinDirectory) -> Result<Self> {
        let open = |map: maps::Map| {
            let path = pins.map(map);
            MapData::from_pin(&path).with_context(|| format!("opening the pinned map {}", path.display()))
        };
        let [flows_v4, transient_v4] = V4::TABLES;
        let [flows_v6, transient_v6] = V6::TABLES;
        Ok(Self {
            v4: [open(flows_v4)?, open(transient_v4)?],
            v6: [open(flows_v6)?, open(transient_v6)?],
            versions: open(maps::FLOW_VERSIONS)?,
        })
    }

    /// All flows that the kernel knows of, also those that are over.
    ///
    /// # Errors
    /// When a table cannot be read.
    pub fn all(&self) -> Result<Vec<FlowRecord>> {
        let mut all = Vec::new();
        for established in [true, false] {
            let table = usize::from(!established);
            all.extend(records::<V4>(&entries(&self.v4[table], V4::TABLES[table])?, established));
            all.extend(records::<V6>(&entries(&self.v6[table], V6::TABLES[table])?, established));
        }
        Ok(all)
    }

    pub(super) fn tables_v4(&self) -> &[MapData; 2] {
        &self.v4
    }

    /// The map `flow_versions`.
    pub(super) fn versions(&self) -> &MapData {
        &self.versions
    }

    pub(super) fn tables_v6(&self) -> &[MapData; 2] {
        &self.v6
    }
}

/// Entries of a table of a family.
pub(super) type Entries<F> =
    HashMap<FlowKey<<F as AddressFamily>::Address>, Flow<<F as AddressFamily>::Address>>;

/// Reads a table.
pub(super) fn entries<A: Copy + Eq + Hash>(
    table: &MapData,
    map: maps::Map,
) -> Result<HashMap<FlowKey<A>, Flow<A>>>
where
    FlowKey<A>: Plain,
    Flow<A>: Plain,
{
    let mut all = HashMap::new();
    batch::for_each(table.fd().as_fd(), |key, flow| {
        all.insert(key, flow);
    })
    .with_context(|| format!("reading the map {}", map.name))?;
    Ok(all)
}

/// Pairs the entries of a table up.
fn records<F: Shown>(entries: &Entries<F>, established: bool) -> impl Iterator<Item = FlowRecord> {
    let of_client = entries.iter().filter(|(_, flow)| !flow.is_reply() && flow.state() != FlowState::Free);
    of_client.map(move |(key, flow)| {
        let reply = entries.get(&FlowKey::reverse_of(flow, key.protocol));
        FlowRecord {
            protocol: key.protocol as u8,
            client: socket(key.source, key.source_port),
            vip: socket(key.destination, key.destination_port),
            snat: socket(flow.new_source, flow.new_source_port),
            backend: socket(flow.new_destination, flow.new_destination_port),
            service: flow.service,
            backend_index: flow.backend,
            backend_generation: flow.generation,
            state: flow.state(),
            established,
            last_seen: reply.map_or(flow.last_seen, |reply| later(flow.last_seen, reply.last_seen)),
            client_last_seen: flow.last_seen,
        }
    })
}

fn socket(address: impl Into<IpAddr>, port: [u8; 2]) -> SocketAddr {
    SocketAddr::new(address.into(), u16::from_be_bytes(port))
}

/// The later of two times.
pub(super) fn later(a: Tick, b: Tick) -> Tick {
    if (b.wrapping_sub(a) as i32) > 0 { b } else { a }
}

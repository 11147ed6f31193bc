//! What the data plane has to do.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use lb_common::abi::ConnectionLimit;
use serde::{Deserialize, Serialize};

use super::{ClientAddress, Few, ObjectRef, Protocol, Scheduler, SlowStart};

/// Identity of a Service entry in the data plane: one port of one VIP of a Service.
///
/// The name of the port is not part of it: (Service, protocol, VIP, port) is unique without, and
/// renaming a port must not cut its connections.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// The Service.
    pub service: ObjectRef,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The VIP.
    pub vip: IpAddr,
    /// The VIP's port.
    pub port: u16,
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.service, self.protocol, SocketAddr::new(self.vip, self.port))
    }
}

/// How a backend takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    /// Takes new connections.
    Active,
    /// Keeps the connections that it has.
    Terminating,
}

/// A backend of a Service entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DesiredBackend {
    /// Share of new connections relative to the others; 0 takes none.
    pub weight: u32,
    /// How it takes part.
    pub role: Role,
    /// Whether it runs on this node: packets are handed to the node's own network stack.
    pub local: bool,
}

impl DesiredBackend {
    /// Whether it takes new connections.
    #[must_use]
    pub fn takes_connections(&self) -> bool {
        self.role == Role::Active && self.weight > 0
    }
}

/// Backends by their address and port.
pub type Backends = BTreeMap<SocketAddr, DesiredBackend>;

/// A Service entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredEntry {
    /// Name of the Service's port; may be empty.
    pub port_name: String,
    /// Its backends; none means that connections are refused.
    pub backends: Backends,
    /// Who may open connections: empty for everybody. If it is not empty, a client that no range
    /// covers is dropped, also when all ranges are of the other family. Host bits count for nothing.
    pub source_ranges: Arc<[IpNet]>,
    /// For how many seconds after its last new connection a client gets the same backend; `None` for
    /// connections in turn.
    pub affinity: Option<u32>,
    /// How many connections a client may open; `None` for as many as it likes.
    pub connection_limit: Option<ConnectionLimit>,
    /// How connections are spread over the backends.
    pub scheduler: Scheduler,
    /// How long a backend that comes to others takes to get its full share.
    pub slow_start: Option<SlowStart>,
    /// How backends learn who the client is.
    pub client_address: ClientAddress,
}

/// Everything that the data plane has to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Service entries. No two have the same VIP, port and protocol.
    pub entries: BTreeMap<ServiceKey, DesiredEntry>,
    /// Addresses that must be on the link device, each with the Services that need it there: an
    /// address goes when its set is empty, and then is not in this map.
    pub vips: BTreeMap<IpAddr, Few<ObjectRef>>,
}

impl Desired {
    /// The entries of one Service.
    pub fn entries_of<'a>(
        &'a self,
        service: &'a ObjectRef,
    ) -> impl Iterator<Item = (&'a ServiceKey, &'a DesiredEntry)> {
        let first = ServiceKey {
            service: service.clone(),
            protocol: Protocol::Tcp,
            vip: IpAddr::from([0, 0, 0, 0]),
            port: 0,
        };
        self.entries.range(first..).take_while(move |(key, _)| key.service == *service)
    }

    /// The addresses of backends that are known to be on this node.
    #[must_use]
    pub fn local_addresses(&self) -> BTreeSet<IpAddr> {
        let all = self.entries.values().flat_map(|entry| &entry.backends);
        all.filter(|(_, backend)| backend.local).map(|(address, _)| address.ip()).collect()
    }

    /// Every address that packets have to reach behind the data plane.
    #[must_use]
    pub fn backend_addresses(&self) -> BTreeSet<IpAddr> {
        self.entries.values().flat_map(|entry| entry.backends.keys().map(SocketAddr::ip)).collect()
    }
}

//! The maps that kernel and agent share, as the agent sees them.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use anyhow::Result;
use ipnet::IpNet;
use lb_common::abi::{Backend, Config, ConnectionLimit, Service, ServiceName, Tick, VipKey, maps};

/// Key of one of the two VIP maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vip {
    /// Of `vips_v4`.
    V4(VipKey<[u8; 4]>),
    /// Of `vips_v6`.
    V6(VipKey<[u8; 16]>),
}

impl Vip {
    /// From address, port and IANA protocol number.
    #[must_use]
    pub fn new(address: IpAddr, port: u16, protocol: u8) -> Self {
        match address {
            IpAddr::V4(address) => Self::V4(VipKey::new(address.octets(), port.to_be_bytes(), protocol)),
            IpAddr::V6(address) => Self::V6(VipKey::new(address.octets(), port.to_be_bytes(), protocol)),
        }
    }

    /// Address and port.
    #[must_use]
    pub fn socket(&self) -> SocketAddr {
        match self {
            Self::V4(key) => SocketAddr::new(key.address.into(), u16::from_be_bytes(key.port)),
            Self::V6(key) => SocketAddr::new(key.address.into(), u16::from_be_bytes(key.port)),
        }
    }

    /// IANA protocol number.
    #[must_use]
    pub fn protocol(&self) -> u8 {
        match self {
            Self::V4(key) => key.protocol,
            Self::V6(key) => key.protocol,
        }
    }
}

impl fmt::Display for Vip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} protocol {}", self.socket(), self.protocol())
    }
}

/// Sizes of the maps, in entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// `vips_v4`.
    pub vips_v4: u32,
    /// `vips_v6`.
    pub vips_v6: u32,
    /// `services`, `service_names`, `round_robin`, `service_stats`, `affinity_ticks`, `conn_limits`.
    pub services: u32,
    /// `slots`.
    pub slots: u32,
    /// `backends`, `backend_stats`, `open_flows`.
    pub backends: u32,
    /// `snat_addresses`.
    pub snat_addresses: u32,
    /// `src_ranges_v4`.
    pub source_ranges_v4: u32,
    /// `src_ranges_v6`.
    pub source_ranges_v6: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            vips_v4: maps::VIPS_V4.default_entries,
            vips_v6: maps::VIPS_V6.default_entries,
            services: maps::SERVICES.default_entries,
            slots: maps::SLOTS.default_entries,
            backends: maps::BACKENDS.default_entries,
            snat_addresses: maps::SNAT_ADDRESSES.default_entries,
            source_ranges_v4: maps::SOURCE_RANGES_V4.default_entries,
            source_ranges_v6: maps::SOURCE_RANGES_V6.default_entries,
        }
    }
}

/// One change of the maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapOp {
    /// Leads a VIP to a Service entry.
    SetVip {
        /// Key.
        vip: Vip,
        /// Index in `services`.
        service: u32,
    },
    /// Removes a VIP; it is no error if it is not there.
    DeleteVip {
        /// Key.
        vip: Vip,
    },
    /// Adds a source range to a Service entry.
    AllowSource {
        /// Index of the Service entry.
        service: u32,
        /// The range, without host bits.
        range: IpNet,
    },
    /// Removes a source range from a Service entry; it is no error if it is not there.
    ForbidSource {
        /// Index of the Service entry.
        service: u32,
        /// The range, without host bits.
        range: IpNet,
    },
    /// Says how long the clients of a Service entry keep their backend.
    SetAffinityTimeout {
        /// Index of the Service entry.
        service: u32,
        /// The time; 0 while the entry has no affinity.
        ticks: Tick,
    },
    /// Says how many connections a client may open to a Service entry.
    SetConnectionLimit {
        /// Index of the Service entry.
        service: u32,
        /// The limit; zeroes while the entry has none.
        limit: ConnectionLimit,
    },
    /// Flips a Service entry to its slots and flags.
    SetService {
        /// Index.
        index: u32,
        /// Value.
        value: Service,
    },
    /// Names a Service entry.
    SetServiceName {
        /// Index.
        index: u32,
        /// Value; the default is "free".
        value: Box<ServiceName>,
    },
    /// Writes consecutive slots.
    SetSlots {
        /// Index of the first.
        first: u32,
        /// Indices in `backends`.
        backends: Vec<u32>,
    },
    /// Writes a backend.
    SetBackend {
        /// Index.
        index: u32,
        /// Value.
        value: Backend,
    },
    /// Writes a source address towards backends.
    SetSnatAddress {
        /// Index.
        index: u32,
        /// An IPv4 address is in the first four bytes.
        address: [u8; 16],
    },
    /// Writes the settings.
    SetConfig {
        /// Value.
        value: Config,
    },
    /// Zeroes `service_stats` and `round_robin` of an entry that was freed.
    ClearServiceCounters {
        /// Index.
        index: u32,
    },
    /// Zeroes `backend_stats` and `open_flows` of an entry that was freed.
    ClearBackendCounters {
        /// Index.
        index: u32,
    },
}

/// The maps. Every write is complete and visible to packets when it returns, and none is visible
/// before the writes that came before it.
///
/// # Errors
/// Every function: when the kernel refuses; the error names the map and the cause. A write that
/// failed may be repeated.
pub trait MapStore {
    /// Carries out one change.
    fn apply(&mut self, op: &MapOp) -> Result<()>;

    /// Sizes of the maps.
    fn limits(&self) -> Limits;
    /// All of both VIP maps.
    fn vips(&self) -> Result<Vec<(Vip, u32)>>;
    /// Entries of `services` that are not all zero.
    fn services(&self) -> Result<Vec<(u32, Service)>>;
    /// Entries of `service_names` that are not all zero.
    fn service_names(&self) -> Result<Vec<(u32, ServiceName)>>;
    /// Entries of `backends` that are not all zero.
    fn backends(&self) -> Result<Vec<(u32, Backend)>>;
    /// `count` slots from `first` on; both within the map's size.
    fn slots(&self, first: u32, count: u32) -> Result<Vec<u32>>;
    /// All source ranges, with the index of their Service entry.
    fn source_ranges(&self) -> Result<Vec<(u32, IpNet)>>;
    /// Entries of `affinity_ticks` that are not zero.
    fn affinity_timeouts(&self) -> Result<Vec<(u32, Tick)>>;
    /// Entries of `conn_limits` that are not zero.
    fn connection_limits(&self) -> Result<Vec<(u32, ConnectionLimit)>>;
    /// All of `snat_addresses`.
    fn snat_addresses(&self) -> Result<Vec<[u8; 16]>>;
    /// The settings; `None` while they were never written (`route_generation` 0).
    fn config(&self) -> Result<Option<Config>>;
}

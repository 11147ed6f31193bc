//! The state of the agent, its devices and its Services.

use std::fmt;
use std::net::IpAddr;

use lb_common::abi::{BackendStats, ServiceStats};
use serde::{Deserialize, Serialize};

/// Everything that `pointsman status` shows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct StatusView {
    /// The agent that answered; absent when the pinned maps were read because none runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentView>,
    /// Devices with a program of ours.
    pub devices: Vec<DeviceView>,
    /// The tables of flows, when an agent runs and has looked at them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub flow_tables: Vec<FlowTableView>,
    /// `answer` while SYNs are answered with cookies, `accept` while those that were given out are only
    /// accepted; empty otherwise.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub syn_cookies: String,
    /// Services, by namespace and name.
    pub services: Vec<ServiceView>,
    /// What is wrong and belongs to no Service.
    pub problems: Vec<ProblemView>,
}

/// The running agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentView {
    /// Process id.
    pub pid: u32,
    /// Version of the binary.
    pub version: String,
    /// Seconds since it started.
    pub uptime_seconds: u64,
    /// Counts the configurations that were taken into use, from 1.
    pub config_generation: u64,
    /// Seconds since the configuration was last taken into use; absent before the first time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_reload_seconds_ago: Option<u64>,
}

/// A device and the program on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceView {
    /// Name of the device.
    pub device: String,
    /// How the program is attached.
    pub mode: AttachMode,
    /// Why so, as far as the agent is asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Kernel's id of the program, as `bpftool prog show id` takes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub program_id: Option<u32>,
}

/// How full a table of flows was when the agent last looked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowTableView {
    /// Name of the map.
    pub table: String,
    /// Entries in use; a flow has two.
    pub entries: u64,
    /// Entries that there is room for.
    pub room: u64,
}

/// How a program is attached to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachMode {
    /// In the driver.
    XdpNative,
    /// In the network stack, by TC.
    Tc,
    /// In the network stack, for drivers without XDP.
    XdpGeneric,
    /// Not at all: the userspace proxy serves.
    Proxy,
    /// Attached, and the kernel did not say how.
    Unknown,
}

/// Where a Service stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServiceState {
    /// It has no VIP, or is not in the datapath yet.
    Pending,
    /// It is served.
    Active,
    /// Its VIP is held, and connections are refused because there is no backend.
    NoBackends,
    /// It goes away; established connections may still finish.
    Draining,
    /// It cannot be served; its problems say why.
    Failed,
    /// Only its map entries are known: no agent runs.
    Unknown,
}

/// One Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceView {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Where it stands.
    pub state: ServiceState,
    /// Its addresses, in the order in which they are published.
    pub vips: Vec<IpAddr>,
    /// Pool that the addresses came from, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Its health check, and what it tells; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthView>,
    /// One element for each port of each VIP.
    pub ports: Vec<PortView>,
    /// What is wrong with it, in sentences.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// The health check of a Service, as this node makes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthView {
    /// As the annotation has it, with all that it may leave out.
    pub check: String,
    /// How many of those that are asked are healthy.
    pub healthy: u64,
    /// How many are not.
    pub unhealthy: u64,
}

/// One port of one VIP: one entry in the map `services`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortView {
    /// Name of the port; may be empty.
    pub name: String,
    /// `TCP` or `UDP`.
    pub protocol: String,
    /// The VIP.
    pub vip: IpAddr,
    /// Port that clients connect to.
    pub port: u16,
    /// Who gives new connections a backend.
    #[serde(default)]
    pub served_by: ServedBy,
    /// Index in the maps `services`, `service_names`, `round_robin` and `service_stats`; absent
    /// while it is not in the datapath.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_index: Option<u32>,
    /// Who may open connections, as CIDRs; absent for everybody, empty for nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_ranges: Option<Vec<String>>,
    /// For how long after its last new connection a client keeps its backend; absent without
    /// session affinity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity_seconds: Option<u64>,
    /// How many connections a client may open; absent for as many as it likes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection_limit: Option<ConnectionLimitView>,
    /// How connections are spread over the backends: `round-robin`, `maglev` or `least-connections`.
    /// Empty while it is not in the datapath.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub scheduler: String,
    /// Its backends.
    pub backends: Vec<BackendView>,
    /// What was forwarded.
    pub counters: TrafficView,
}

/// Who serves a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServedBy {
    /// The programs in the kernel.
    #[default]
    Kernel,
    /// The userspace proxy.
    Proxy,
}

impl ServedBy {
    /// The name shown to people; the same as in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Proxy => "proxy",
        }
    }
}

/// How many connections a client may open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionLimitView {
    /// New connections in a second.
    pub per_second: u32,
    /// New connections at once, after a pause.
    pub burst: u32,
}

/// One endpoint of one port of one VIP: one entry in the map `backends`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendView {
    /// Address of the endpoint.
    pub address: IpAddr,
    /// Port of the endpoint.
    pub port: u16,
    /// `active`, `terminating` or `unhealthy`.
    pub state: String,
    /// Why it is unhealthy, as its health check last found: `HTTP 503`, `connect: refused`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Share of new connections relative to the other backends.
    pub weight: u32,
    /// Index in the maps `backends` and `backend_stats`; absent while not in the datapath.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend_index: Option<u32>,
    /// Whether packets can be sent to it: its route and link-layer address are known.
    pub next_hop_resolved: bool,
    /// The way to it, or why there is none: `02:00:00:00:00:01 on eth1`, `no route to …`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub next_hop: String,
    /// What was forwarded.
    pub counters: TrafficView,
}

/// Traffic since the map entry was set up. *In* is from clients, *out* is from backends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrafficView {
    /// Packets from clients.
    pub packets_in: u64,
    /// Their bytes, Ethernet header included.
    pub bytes_in: u64,
    /// Packets from backends.
    pub packets_out: u64,
    /// Their bytes, Ethernet header included.
    pub bytes_out: u64,
    /// Connections (UDP: sessions) that were given a backend.
    pub new_flows: u64,
    /// Connections and packets that were refused; counted for Services only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<u64>,
}

/// Something that deserves a look, and what it is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProblemView {
    /// What it is about: `services.yaml`, `device eth0`, `AddressPool edge`.
    pub subject: String,
    /// What is wrong, and the way out.
    pub message: String,
}

impl AttachMode {
    /// The name shown to people; the same as in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::XdpNative => "xdp-native",
            Self::Tc => "tc",
            Self::XdpGeneric => "xdp-generic",
            Self::Proxy => "proxy",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for AttachMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl ServiceState {
    /// The name shown to people; the same as in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Active => "active",
            Self::NoBackends => "no-backends",
            Self::Draining => "draining",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for ServiceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl From<ServiceStats> for TrafficView {
    fn from(stats: ServiceStats) -> Self {
        Self {
            packets_in: stats.packets_in,
            bytes_in: stats.bytes_in,
            packets_out: stats.packets_out,
            bytes_out: stats.bytes_out,
            new_flows: stats.new_flows,
            refused: Some(stats.refused),
        }
    }
}

impl From<BackendStats> for TrafficView {
    fn from(stats: BackendStats) -> Self {
        Self {
            packets_in: stats.packets_in,
            bytes_in: stats.bytes_in,
            packets_out: stats.packets_out,
            bytes_out: stats.bytes_out,
            new_flows: stats.new_flows,
            refused: None,
        }
    }
}

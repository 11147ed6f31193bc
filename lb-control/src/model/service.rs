//! Services and their endpoints.

use std::{fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use lb_common::abi::{ConnectionLimit, IPPROTO_TCP, IPPROTO_UDP};
use serde::{Deserialize, Serialize};

use super::{ApiState, BackendCheck, ClientAddress, Labels, ObjectRef, Place, Scheduler, SlowStart, Weights};

/// The `loadBalancerClass` of Services that are ours.
pub const LOAD_BALANCER_CLASS: &str = "pointsman.dev/pointsman";

/// Requests addresses for a Service: comma-separated, all or nothing.
pub const ANNOTATION_ADDRESSES: &str = "pointsman.dev/load-balancer-ips";
/// Requests a pool for a Service.
pub const ANNOTATION_POOL: &str = "pointsman.dev/address-pool";
/// Services with the same value may share an address.
pub const ANNOTATION_SHARING: &str = "pointsman.dev/allow-shared-ip";
/// Shares of backends: see [`Weights`].
pub const ANNOTATION_WEIGHTS: &str = "pointsman.dev/weights";
/// How many connections a client may open to the Service in a second, and at once:
/// see [`parse_connection_limit`](super::parse_connection_limit).
pub const ANNOTATION_CONNECTION_RATE: &str = "pointsman.dev/connection-rate-limit";
/// How backends learn who the client is: see [`ClientAddress`].
pub const ANNOTATION_CLIENT_ADDRESS: &str = "pointsman.dev/client-address";
/// How it is found out whether backends work: see [`BackendCheck`].
pub const ANNOTATION_HEALTH_CHECK: &str = "pointsman.dev/health-check";
/// How connections are spread: see [`Scheduler`].
pub const ANNOTATION_SCHEDULER: &str = "pointsman.dev/scheduler";
/// How long a new backend takes to get its full share: see [`SlowStart`].
pub const ANNOTATION_SLOW_START: &str = "pointsman.dev/slow-start";
/// Share of each endpoint of an EndpointSlice.
pub const ANNOTATION_SLICE_WEIGHT: &str = "pointsman.dev/weight";
/// The entries of `spec.externalIPs` that we wrote.
pub const ANNOTATION_EXTERNAL_IPS: &str = "pointsman.dev/external-ips";
/// Prefixes of the annotations of MetalLB, which mean the same as ours.
pub const METALLB_PREFIXES: [&str; 2] = ["metallb.io/", "metallb.universe.tf/"];

/// IANA protocol number of SCTP.
const IPPROTO_SCTP: u8 = 132;

/// Transport protocol of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// What Kubernetes takes when none is given.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// Known, so that it can be refused.
    Sctp,
}

impl Protocol {
    /// IANA protocol number.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => IPPROTO_TCP,
            Self::Udp => IPPROTO_UDP,
            Self::Sctp => IPPROTO_SCTP,
        }
    }

    /// From the IANA protocol number, for those that the data plane knows.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            IPPROTO_TCP => Some(Self::Tcp),
            IPPROTO_UDP => Some(Self::Udp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    #[serde(rename = "IPv4")]
    V4,
    /// IPv6.
    #[serde(rename = "IPv6")]
    V6,
}

impl Family {
    /// The family of an address.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::V4 => Self::V6,
            Self::V6 => Self::V4,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// How many families a Service has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FamilyPolicy {
    /// One.
    #[default]
    SingleStack,
    /// Two if they can be had.
    PreferDualStack,
    /// Two or nothing.
    RequireDualStack,
}

/// Port of the endpoints that a Service's port leads to. The endpoints' own ports come from the
/// EndpointSlices; this is what the Service says about them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    /// By number.
    Number(u16),
    /// By the name of a container's port, which may differ per pod.
    Name(String),
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Name; may be empty if it is the only one.
    pub name: String,
    /// Protocol.
    pub protocol: Protocol,
    /// Port of the VIP.
    pub port: u16,
    /// Port of the endpoints.
    pub target_port: TargetPort,
}

/// A Kubernetes Service, with Kubernetes' defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub object: ObjectRef,
    /// Where it was written down; `None` if it came from an API server.
    pub place: Option<Place>,
    /// Whether `spec.type` is LoadBalancer.
    pub is_load_balancer: bool,
    /// `spec.loadBalancerClass`.
    pub load_balancer_class: Option<String>,
    /// Ports; names and (port, protocol) are unique.
    pub ports: Vec<ServicePort>,
    /// `spec.ipFamilies`; empty means that it is left to us.
    pub ip_families: Vec<Family>,
    /// `spec.ipFamilyPolicy`.
    pub ip_family_policy: FamilyPolicy,
    /// Requested addresses, all or nothing; empty if none are.
    pub requested_addresses: Vec<IpAddr>,
    /// The field that requests them, for messages.
    pub requested_by: String,
    /// Requested pool.
    pub pool: Option<String>,
    /// Services with the same key may share an address.
    pub sharing_key: Option<String>,
    /// Whether `externalTrafficPolicy` is Local.
    pub local_traffic_only: bool,
    /// `sessionAffinity: ClientIP`: for how many seconds a client stays with its backend.
    pub affinity_seconds: Option<u32>,
    /// How many connections a client may open, by annotation.
    pub connection_limit: Option<ConnectionLimit>,
    /// Clients that may connect; empty means everybody.
    pub source_ranges: Arc<[IpNet]>,
    /// `healthCheckNodePort`, if any.
    pub health_check_node_port: Option<u16>,
    /// How connections are spread, by annotation.
    pub scheduler: Scheduler,
    /// How long a new backend takes to get its full share, by annotation.
    pub slow_start: Option<SlowStart>,
    /// How backends learn who the client is, by annotation.
    pub client_address: ClientAddress,
    /// How it is found out whether backends work, by annotation.
    pub backend_check: Option<Arc<BackendCheck>>,
    /// Shares of backends, by annotation.
    pub weights: Weights,
    /// Labels.
    pub labels: Labels,
    /// `spec.selector`; empty if somebody else writes its EndpointSlices.
    pub selector: Labels,
    /// What the API server has about it; default if it came from a file.
    pub api: ApiState,
    /// Whether endpoints take part although they are not ready.
    pub publish_not_ready_addresses: bool,
}

impl Service {
    /// Whether it is for us to serve. `default_class`: Services without a class are ours too.
    #[must_use]
    pub fn is_ours(&self, default_class: bool) -> bool {
        self.is_load_balancer
            && match &self.load_balancer_class {
                Some(class) => class == LOAD_BALANCER_CLASS,
                None => default_class,
            }
    }
}

/// An endpoint. Conditions have Kubernetes' meaning for `null` applied: ready, and serving as
/// ready, and not terminating.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The one address that consumers may use (the API reserves the others).
    pub address: IpAddr,
    /// Takes new connections.
    pub ready: bool,
    /// Could take connections, whether or not it is terminating.
    pub serving: bool,
    /// Is being shut down.
    pub terminating: bool,
    /// The node that it runs on.
    pub node: Option<Arc<str>>,
    /// The zone that it runs in.
    pub zone: Option<Arc<str>>,
    /// Zones whose traffic it is meant for; empty means that nobody said.
    pub for_zones: Box<[Arc<str>]>,
    /// Nodes whose traffic it is meant for; empty means that nobody said.
    pub for_nodes: Box<[Arc<str>]>,
}

/// A port that all endpoints of a slice have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPort {
    /// Name of the Service's port.
    pub name: String,
    /// Protocol.
    pub protocol: Protocol,
    /// Number.
    pub port: u16,
}

/// A part of a Service's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Namespace and name.
    pub object: ObjectRef,
    /// Where it was written down; `None` if it came from an API server.
    pub place: Option<Place>,
    /// Name of the Service, in the same namespace; `None` if no label says so.
    pub service: Option<String>,
    /// Family of all its addresses; `None` for FQDN slices, which have none.
    pub family: Option<Family>,
    /// Ports.
    pub ports: Vec<EndpointPort>,
    /// Endpoints. There are many in a cluster: what several have in common they share.
    pub endpoints: Vec<Endpoint>,
    /// Share of each of its endpoints, by annotation.
    pub weight: Option<u32>,
}

impl Endpoint {
    /// An endpoint that is ready, of which nothing more is known.
    #[must_use]
    pub fn ready(address: IpAddr) -> Self {
        Self {
            address,
            ready: true,
            serving: true,
            terminating: false,
            node: None,
            zone: None,
            for_zones: Box::default(),
            for_nodes: Box::default(),
        }
    }
}

//! Objects of the cluster around the Services: namespaces, nodes, agents, addresses.

use std::{net::IpAddr, time::Duration};

use super::{Few, Labels, ObjectRef, Selector};

/// A namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Name.
    pub name: String,
    /// Labels, which pools may select it by.
    pub labels: Labels,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Name.
    pub name: String,
    /// Labels.
    pub labels: Labels,
    /// Whether it is labelled to take no part in external load balancing.
    pub excluded: bool,
}

/// Takes a node out of external load balancing, by being there.
pub const LABEL_EXCLUDE: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// A node's zone.
pub const LABEL_ZONE: &str = "topology.kubernetes.io/zone";

impl Node {
    /// Its zone.
    #[must_use]
    pub fn zone(&self) -> Option<&str> {
        self.labels.get(LABEL_ZONE).map(String::as_str)
    }
}

/// A VirtualIP: one address, and who it is given to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtualIp {
    /// The address, which is also the object's name.
    pub address: IpAddr,
    /// The pool that it was taken from.
    pub pool: Option<String>,
    /// Services that it is given to.
    pub services: Few<ObjectRef>,
    /// The node that announces it.
    pub node: Option<String>,
    /// The node that serves it right now, by its own account.
    pub live_node: Option<String>,
    /// Services that this node serves right now.
    pub live: Few<ObjectRef>,
    /// The object's identity.
    pub uid: String,
    /// Version that a change builds on.
    pub resource_version: String,
    /// It is being deleted.
    pub deleting: bool,
}

/// The sign of life of an agent: a Lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentLease {
    /// The node.
    pub node: String,
    /// Who renews it; empty once it was given up.
    pub holder: String,
    /// The time that was written last; only that it changes means something, since clocks differ.
    pub renewed: String,
    /// For how long after a renewal the agent counts as alive.
    pub duration: Duration,
    /// The device that it puts addresses on.
    pub link_device: Option<String>,
    /// Why it cannot serve any address, by its own account; `None` if it can.
    pub unfit: Option<String>,
}

/// Which nodes announce the addresses of which pools: MetalLB's L2Advertisement.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Advertisement {
    /// Namespace and name.
    pub object: ObjectRef,
    /// Names of pools.
    pub pools: Vec<String>,
    /// Labels of pools; any one selector suffices. With neither names nor selectors: all pools.
    pub pool_selectors: Vec<Selector>,
    /// Labels of nodes; any one selector suffices, none means every node.
    pub node_selectors: Vec<Selector>,
    /// Devices; none means every one.
    pub interfaces: Vec<String>,
}

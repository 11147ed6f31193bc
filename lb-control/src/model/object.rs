//! Names of objects, where they were written down, and all of them together.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    Advertisement, AgentLease, EndpointSlice, KindAndName, Namespace, Node, Pool, Service, Unreadable,
    VirtualIp,
};

/// Namespace and name of an object. Orders by namespace, then name.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectRef {
    /// Namespace; empty for objects that belong to the whole cluster.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl ObjectRef {
    /// From namespace and name.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// Where an object was written down. Numbers count from 1, as editors do.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// The file.
    pub file: String,
    /// Number of the document in it.
    pub document: usize,
    /// Line that the document starts at.
    pub line: usize,
    /// Number of the item, if the document is a List.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub item: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if self.document > 0 {
            write!(f, ": document {} (line {})", self.document, self.line)?;
        }
        if let Some(item) = self.item {
            write!(f, ", item {item}")?;
        }
        Ok(())
    }
}

/// Everything that a source knows. Unchanged objects keep their `Arc` from one snapshot to the
/// next.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Objects {
    /// Services of every type.
    pub services: BTreeMap<ObjectRef, Arc<Service>>,
    /// EndpointSlices.
    pub slices: BTreeMap<ObjectRef, Arc<EndpointSlice>>,
    /// Address pools by [`Pool::key`].
    pub pools: BTreeMap<String, Arc<Pool>>,
    /// MetalLB's advertisements.
    pub advertisements: BTreeMap<ObjectRef, Arc<Advertisement>>,
    /// Namespaces by name. None at all means that the source knows of none (files).
    pub namespaces: BTreeMap<String, Arc<Namespace>>,
    /// Nodes by name.
    pub nodes: BTreeMap<String, Arc<Node>>,
    /// VirtualIPs by address.
    pub virtual_ips: BTreeMap<IpAddr, Arc<VirtualIp>>,
    /// Agents by the name of their node.
    pub agents: BTreeMap<String, Arc<AgentLease>>,
    /// Objects that cannot be taken as they are now. What they were before is among the others.
    pub unreadable: BTreeMap<KindAndName, Arc<Unreadable>>,
}

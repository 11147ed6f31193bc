//! Which node announces which address.
//!
//! Sticky: who announces an address goes on doing so for as long as it can. Otherwise the node with
//! the fewest addresses takes it, so that a node that comes back gets new ones only, and nothing
//! is moved for balance.
//!
//! What breaks on all nodes, in whatever order they notice, moves nothing: patience with an agent
//! that cannot serve is for the addresses that it has. Others do not come to it as soon as it says so,
//! nor for a while after it has recovered, which is when all the others are about to.

mod liveness;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

pub use liveness::Liveness;

use crate::model::{Advertisement, EndpointSlice, Node, ObjectRef, Pool, PoolOrigin};

/// What is known of the nodes.
#[derive(Clone, Copy)]
pub struct Nodes<'a> {
    /// Those that exist.
    pub nodes: &'a BTreeMap<String, Arc<Node>>,
    /// Whose agents are alive.
    pub liveness: &'a Liveness,
    /// Which nodes announce MetalLB's pools.
    pub advertisements: &'a BTreeMap<ObjectRef, Arc<Advertisement>>,
}

/// What an address asks of the node that announces it.
pub struct Claim<'a> {
    /// The address.
    pub address: IpAddr,
    /// The pool that it was taken from, if that exists.
    pub pool: Option<&'a Pool>,
    /// Nodes with endpoints of each of the Services that take local traffic only.
    pub local: Vec<BTreeSet<String>>,
}

/// Who announces an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The node.
    pub node: Option<String>,
    /// Why there is no fit one. There may be a node all the same: the one that had the address
    /// keeps it where nobody can do better.
    pub unfit: Option<String>,
    /// Why it moves, if that is because the node that had it says that it cannot serve.
    pub moved_because: Option<String>,
}

/// Why a node does not announce an address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Unfit {
    NoNode,
    Excluded,
    NotAdvertised,
    Dead,
    Troubled,
    Recovering,
    NoEndpoint,
}

impl Unfit {
    /// Whether the node has to let go of the address even if nobody else takes it. Neither an agent
    /// that is away or cannot serve nor a lack of endpoints is such a reason: the kernel goes on
    /// forwarding without the agent, what is broken on all nodes is mended somewhere, and connections
    /// to an address without endpoints are to be refused.
    fn is_final(self) -> bool {
        matches!(self, Self::NoNode | Self::Excluded | Self::NotAdvertised)
    }

    fn text(self) -> &'static str {
        match self {
            Self::NoNode => "does not exist",
            Self::Excluded => "excluded from external load balancers by label",
            Self::NotAdvertised => "not selected by any advertisement of the pool",
            Self::Dead => "without a live agent",
            Self::Troubled => "whose agent cannot serve, as its Lease says",
            Self::Recovering => "whose agent could not serve until a moment ago",
            Self::NoEndpoint => "without a ready endpoint, which externalTrafficPolicy Local asks for",
        }
    }
}

impl Nodes<'_> {
    /// Chooses. `present` has the address now; `load` says how many addresses a node has.
    pub fn choose(&self, claim: &Claim<'_>, present: Option<&str>, load: impl Fn(&str) -> usize) -> Choice {
        let local = local_nodes(&claim.local);
        let verdict = present.map(|node| self.judge(node, claim, local.as_ref()));
        if verdict == Some(Ok(())) {
            return Choice { node: present.map(str::to_owned), unfit: None, moved_because: None };
        }
        let mut reasons: BTreeMap<Unfit, usize> = BTreeMap::new();
        let is_troubled = verdict == Some(Err(Unfit::Troubled));
        let mut best: Option<(bool, usize, u64, &str)> = None;
        for node in self.nodes.keys() {
            match self.judge_other(node, claim, local.as_ref(), is_troubled) {
                Ok(()) => {
                    let recovers = self.liveness.is_recovering(node);
                    let rank = (recovers, load(node), u64::MAX - weight(claim.address, node), node.as_str());
                    best = Some(best.map_or(rank, |best| best.min(rank)));
                }
                Err(reason) => *reasons.entry(reason).or_default() += 1,
            }
        }
        if let Some((.., node)) = best {
            let troubled = present.filter(|_| is_troubled);
            let why = troubled.and_then(|from| {
                let why = self.liveness.unfit(from)?;
                Some(format!(
                    "{} moves from node {from}, which cannot serve ({why}), to {node}",
                    claim.address
                ))
            });
            return Choice { node: Some(node.to_owned()), unfit: None, moved_because: why };
        }
        let kept = present.filter(|_| matches!(verdict, Some(Err(reason)) if !reason.is_final()));
        Choice { node: kept.map(str::to_owned), unfit: Some(explain(&reasons)), moved_because: None }
    }

    /// Whether a node may get an address that it does not have.
    fn judge_other(
        &self,
        name: &str,
        claim: &Claim<'_>,
        local: Option<&BTreeSet<String>>,
        is_troubled: bool,
    ) -> Result<(), Unfit> {
        self.judge(name, claim, local)?;
        if self.liveness.is_doubted(name) {
            return Err(Unfit::Troubled);
        }
        // The one that has it may recover just as well. Where it is away, any node is better.
        if is_troubled && self.liveness.is_recovering(name) {
            return Err(Unfit::Recovering);
        }
        Ok(())
    }

    /// Whether a node may keep an address.
    fn judge(&self, name: &str, claim: &Claim<'_>, local: Option<&BTreeSet<String>>) -> Result<(), Unfit> {
        let node = self.nodes.get(name).ok_or(Unfit::NoNode)?;
        if node.excluded {
            return Err(Unfit::Excluded);
        }
        if !self.is_advertised(node, claim.pool) {
            return Err(Unfit::NotAdvertised);
        }
        if !self.liveness.is_alive(name) {
            return Err(Unfit::Dead);
        }
        if self.liveness.unfit(name).is_some() {
            return Err(Unfit::Troubled);
        }
        if local.is_some_and(|local| !local.contains(name)) {
            return Err(Unfit::NoEndpoint);
        }
        Ok(())
    }

    /// MetalLB announces no address of a pool that no advertisement selects; ours have none.
    fn is_advertised(&self, node: &Node, pool: Option<&Pool>) -> bool {
        let Some((pool, namespace)) = pool.and_then(|pool| match &pool.origin {
            PoolOrigin::Pointsman => None,
            PoolOrigin::MetalLb(namespace) => Some((pool, namespace)),
        }) else {
            return true;
        };
        let device = self.liveness.device(&node.name);
        let mine = self.advertisements.values().filter(|it| it.object.namespace == *namespace);
        mine.filter(|it| selects_pool(it, pool)).any(|it| {
            let on_node = it.node_selectors.is_empty()
                || it.node_selectors.iter().any(|selector| selector.matches(&node.labels));
            let on_device = it.interfaces.is_empty()
                || device.is_some_and(|device| it.interfaces.iter().any(|name| name == device));
            on_node && on_device
        })
    }
}

fn selects_pool(advertisement: &Advertisement, pool: &Pool) -> bool {
    let (names, selectors) = (&advertisement.pools, &advertisement.pool_selectors);
    names.is_empty() && selectors.is_empty()
        || names.contains(&pool.name)
        || selectors.iter().any(|selector| selector.matches(&pool.labels))
}

/// The nodes that may announce an address for the sake of local traffic: those with endpoints of
/// all its Services if there are such, else those with any. `None`: every node may.
fn local_nodes(of_services: &[BTreeSet<String>]) -> Option<BTreeSet<String>> {
    let (first, others) = of_services.split_first()?;
    let common = others.iter().fold(first.clone(), |common, nodes| &common & nodes);
    if common.is_empty() { Some(of_services.iter().flatten().cloned().collect()) } else { Some(common) }
}

/// Nodes with an endpoint of a Service that takes connections: a ready one, or where there is none
/// at all, one that is shut down but still serves. `all_ready` is the Service's
/// `publishNotReadyAddresses`.
pub fn endpoint_nodes<'a>(
    slices: impl Iterator<Item = &'a EndpointSlice> + Clone,
    all_ready: bool,
) -> BTreeSet<String> {
    let endpoints = slices.flat_map(|slice| &slice.endpoints);
    let nodes = |last_resort: bool| {
        let fit = endpoints.clone().filter(move |endpoint| match last_resort {
            false => endpoint.ready || all_ready,
            true => endpoint.serving && endpoint.terminating,
        });
        fit.filter_map(|endpoint| endpoint.node.as_deref().map(str::to_owned)).collect::<BTreeSet<_>>()
    };
    let ready = nodes(false);
    if ready.is_empty() { nodes(true) } else { ready }
}

fn explain(reasons: &BTreeMap<Unfit, usize>) -> String {
    if reasons.is_empty() {
        return "there are no nodes".into();
    }
    let total: usize = reasons.values().sum();
    let parts: Vec<_> = reasons.iter().map(|(reason, count)| format!("{count} {}", reason.text())).collect();
    let nodes = if total == 1 { "node" } else { "nodes" };
    format!("none of {total} {nodes} can announce it: {}", parts.join("; "))
}

/// Rendezvous hash of an address and a node, by which ties are broken: FNV-1a over the address's
/// bytes, then the node's, then the finalizer of `MurmurHash3`. Part of what is decided: changing
/// it changes who takes which address.
fn weight(address: IpAddr, node: &str) -> u64 {
    let (v4, v6);
    let bytes: &[u8] = match address {
        IpAddr::V4(address) => {
            v4 = address.octets();
            &v4
        }
        IpAddr::V6(address) => {
            v6 = address.octets();
            &v6
        }
    };
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in bytes.iter().chain(node.as_bytes()) {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests;

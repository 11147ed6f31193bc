//! What a datapath remembers, in an order that can be compared.

use std::collections::BTreeMap;

use lb_common::abi::{Affinity, AffinityKey, ConnectionRate, Flow, FlowKey, Fragment};

/// Tables of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot<A: Ord> {
    /// Flows that live long.
    pub established: BTreeMap<FlowKey<A>, Flow<A>>,
    /// Flows that begin or end.
    pub transient: BTreeMap<FlowKey<A>, Flow<A>>,
    /// Fragments under way, by source, destination, identification and protocol.
    pub fragments: BTreeMap<(A, A, [u8; 4], u32), Fragment<A>>,
    /// Which backends clients had.
    pub affinities: BTreeMap<AffinityKey<A>, Affinity>,
    /// What clients have used of connection limits.
    pub rates: BTreeMap<AffinityKey<A>, ConnectionRate>,
}

impl<A: Ord + Copy> Snapshot<A> {
    /// The entry of a key, and whether it is an established one.
    #[must_use]
    pub fn find(&self, key: &FlowKey<A>) -> Option<(Flow<A>, bool)> {
        self.established
            .get(key)
            .map(|flow| (*flow, true))
            .or_else(|| self.transient.get(key).map(|flow| (*flow, false)))
    }

    /// All entries of both tables.
    pub fn flows(&self) -> impl Iterator<Item = (&FlowKey<A>, &Flow<A>)> {
        self.established.iter().chain(&self.transient)
    }
}

/// The tables of both families.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshots {
    /// IPv4.
    pub v4: Snapshot<[u8; 4]>,
    /// IPv6.
    pub v6: Snapshot<[u8; 16]>,
}

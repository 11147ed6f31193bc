//! Who is concerned by what, so that a change costs as much as it concerns.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::model::{EndpointSlice, Few, ObjectRef, Service, VirtualIp};

/// Sets by key; empty ones are not there.
#[derive(Debug)]
pub(super) struct Sets<K, V>(BTreeMap<K, Few<V>>);

impl<K, V> Default for Sets<K, V> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord + Clone, V: Ord + Clone> Sets<K, V> {
    pub fn get(&self, key: &K) -> impl Iterator<Item = &V> + Clone {
        self.0.get(key).into_iter().flat_map(Few::iter)
    }

    pub fn contains(&self, key: &K, value: &V) -> bool {
        self.0.get(key).is_some_and(|set| set.contains(value))
    }

    pub fn count(&self, key: &K) -> usize {
        self.0.get(key).map_or(0, Few::len)
    }

    pub fn insert(&mut self, key: &K, value: V) {
        self.0.entry(key.clone()).or_default().insert(value);
    }

    pub fn remove(&mut self, key: &K, value: &V) {
        if let Some(set) = self.0.get_mut(key) {
            set.remove(value);
            if set.is_empty() {
                self.0.remove(key);
            }
        }
    }
}

/// See the fields.
#[derive(Default)]
pub(super) struct Index {
    /// Addresses whose VirtualIP names a Service, as given to it or as served.
    pub named: Sets<ObjectRef, IpAddr>,
    /// Addresses that a Service has by the last decision, the first one first.
    pub wanted: BTreeMap<ObjectRef, Vec<IpAddr>>,
    /// Services that have an address by the last decision.
    pub wanted_by: Sets<IpAddr, ObjectRef>,
    /// Services in whose status an address stands by our doing.
    pub published_by: Sets<IpAddr, ObjectRef>,
    /// Addresses that a node serves by its own account.
    pub live_on: Sets<String, IpAddr>,
    /// The node that an address is given to, or is about to be.
    pub owner: BTreeMap<IpAddr, String>,
    /// The other way round.
    pub owned: Sets<String, IpAddr>,
    /// Addresses that no node is fit to announce, and why.
    pub unplaced: BTreeMap<IpAddr, String>,
    /// EndpointSlices of a Service.
    pub slices: Sets<ObjectRef, ObjectRef>,
    /// Addresses that have been taken from a pool.
    pub from_pool: Sets<String, IpAddr>,
}

impl Index {
    /// Says who has an address from now on.
    pub fn own(&mut self, address: IpAddr, node: Option<&str>) {
        if let Some(old) = self.owner.remove(&address) {
            self.owned.remove(&old, &address);
        }
        if let Some(node) = node {
            self.owner.insert(address, node.to_owned());
            self.owned.insert(&node.to_owned(), address);
        }
    }

    /// A VirtualIP came, changed or went.
    pub fn virtual_ip(&mut self, old: Option<&VirtualIp>, new: Option<&VirtualIp>) {
        if let Some(old) = old {
            for service in old.services.iter().chain(&old.live) {
                self.named.remove(service, &old.address);
            }
            if let Some(node) = &old.live_node {
                self.live_on.remove(node, &old.address);
            }
            if let Some(pool) = &old.pool {
                self.from_pool.remove(pool, &old.address);
            }
            self.own(old.address, None);
        }
        if let Some(new) = new {
            for service in new.services.iter().chain(&new.live) {
                self.named.insert(service, new.address);
            }
            if let Some(node) = &new.live_node {
                self.live_on.insert(node, new.address);
            }
            if let Some(pool) = &new.pool {
                self.from_pool.insert(pool, new.address);
            }
            self.own(new.address, new.node.as_deref());
        }
    }

    /// A Service came, changed or went.
    pub fn service(&mut self, old: Option<&Service>, new: Option<&Service>) {
        for service in old.into_iter() {
            for address in published(service) {
                self.published_by.remove(&address, &service.object);
            }
        }
        for service in new.into_iter() {
            for address in published(service) {
                self.published_by.insert(&address, service.object.clone());
            }
        }
    }

    /// An EndpointSlice came, changed or went. Returns the Services that it is of and was of.
    pub fn slice(
        &mut self,
        slice: &ObjectRef,
        old: Option<&EndpointSlice>,
        new: Option<&EndpointSlice>,
    ) -> BTreeSet<ObjectRef> {
        let of = |it: Option<&EndpointSlice>| {
            let name = it?.service.as_ref()?;
            Some(ObjectRef::new(slice.namespace.clone(), name.clone()))
        };
        let (old, new) = (of(old), of(new));
        if let Some(service) = &old {
            self.slices.remove(service, slice);
        }
        if let Some(service) = &new {
            self.slices.insert(service, slice.clone());
        }
        old.into_iter().chain(new).collect()
    }

    /// What a Service has by the decision that was just made. Returns the addresses that it came
    /// to or left.
    pub fn want(&mut self, service: &ObjectRef, addresses: Vec<IpAddr>) -> BTreeSet<IpAddr> {
        let old = self.wanted.remove(service).unwrap_or_default();
        for address in &old {
            self.wanted_by.remove(address, service);
        }
        for address in &addresses {
            self.wanted_by.insert(address, service.clone());
        }
        let (before, after): (BTreeSet<_>, BTreeSet<_>) =
            (old.into_iter().collect(), addresses.iter().copied().collect());
        if !addresses.is_empty() {
            self.wanted.insert(service.clone(), addresses);
        }
        &before ^ &after
    }

    /// Forgets decisions; what follows from objects stays.
    pub fn forget_decisions(&mut self) {
        self.wanted.clear();
        self.wanted_by = Sets::default();
        self.unplaced.clear();
    }

    /// Every address that a Service has to do with.
    pub fn addresses_of(&self, service: &ObjectRef) -> BTreeSet<IpAddr> {
        let wanted = self.wanted.get(service).into_iter().flatten();
        wanted.chain(self.named.get(service)).copied().collect()
    }
}

/// Addresses that stand in a Service's status by our doing.
pub(super) fn published(service: &Service) -> impl Iterator<Item = IpAddr> + use<'_> {
    let ingress = service.api.ingress.iter().filter(|_| service.api.ingress_is_ours);
    ingress.filter_map(|ingress| ingress.ip)
}

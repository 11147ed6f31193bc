//! What is to be done about an address: who it is given to, who announces it.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use super::{Command, Controller, EventTarget, flights::Key, services::Step};
use crate::{
    model::{Few, ObjectRef, Pool, Service, VirtualIp},
    plan::ownership::{Choice, Claim, Nodes, endpoint_nodes},
};

/// What a VirtualIP has to say.
struct Wanted {
    pool: Option<String>,
    services: Few<ObjectRef>,
    node: Option<String>,
}

impl Controller {
    /// The next command for an address, if one is due.
    pub(super) fn address_step(&mut self, address: IpAddr, now: Duration) -> Option<Step> {
        if self.flights.is_busy(&Key::Address(address), now) {
            return None;
        }
        self.counters.steps += 1;
        let present = self.objects.virtual_ips.get(&address).cloned();
        let services = self.may_have(address, present.as_deref());
        let (node, moved_because) = self.place(address, &services, present.as_deref());
        let events = moved_because.map_or_else(Vec::new, |why| self.moved(&services, &why));
        let pool = self.pool_key(address, &services);
        let command = match present {
            None if services.is_empty() => None,
            None => Some(Command::CreateVirtualIp { address, pool, services, node }),
            // Somebody's finalizer holds it; it is created again once it is gone.
            Some(present) if present.deleting => None,
            Some(present) => {
                let pool = pool.or_else(|| present.pool.clone());
                self.correct(&present, Wanted { pool, services, node })
            }
        };
        let node = match &command {
            Some(Command::CreateVirtualIp { node, .. } | Command::UpdateVirtualIp { node, .. }) => {
                node.clone()
            }
            _ => return Some((command?, Vec::new())),
        };
        self.index.own(address, node.as_deref());
        Some((command?, events))
    }

    /// Says at the Services why their address moves.
    fn moved(&self, services: &Few<ObjectRef>, why: &str) -> Vec<Command> {
        let services = services.iter().filter_map(|service| self.objects.services.get(service));
        let event = |service: &Arc<Service>| Command::Event {
            about: EventTarget::service(&service.object, &service.api.uid),
            warning: true,
            reason: "Moved".into(),
            note: why.to_owned(),
        };
        services.map(event).collect()
    }

    /// Services that an address may be given to now. Those who have it by the last decision come to
    /// it once everybody else has let go of it, so that no two groups have it at a time.
    fn may_have(&self, address: IpAddr, present: Option<&VirtualIp>) -> Few<ObjectRef> {
        let has_now = |service: &ObjectRef| present.is_some_and(|it| it.services.contains(service));
        let wanted = self.index.wanted_by.get(&address);
        let mut wanted: BTreeSet<ObjectRef> =
            wanted.filter(|service| has_now(service) || self.is_protected(service)).cloned().collect();
        let mut leaving: BTreeSet<&ObjectRef> = self.index.published_by.get(&address).collect();
        if let Some(present) = present {
            leaving.extend(&present.services);
            leaving.extend(self.still_live(present));
        }
        leaving.retain(|service| !wanted.contains(*service));
        if leaving.is_empty() {
            return wanted.into_iter().collect();
        }
        if !wanted.iter().any(|service| !has_now(service)) {
            // Nobody waits: who gets another address keeps this one until that one is published.
            let kept = leaving.into_iter().filter(|service| has_now(service));
            let kept: Vec<_> = kept.filter(|service| self.moves_away(service, address)).cloned().collect();
            wanted.extend(kept);
            return wanted.into_iter().collect();
        }
        wanted.into_iter().filter(has_now).collect()
    }

    /// Services that the node which had an address last serves still, for all we know.
    pub(super) fn still_live<'a>(&self, virtual_ip: &'a VirtualIp) -> impl Iterator<Item = &'a ObjectRef> {
        let node = virtual_ip.live_node.as_deref();
        let there =
            node.is_some_and(|node| self.liveness.is_alive(node) && self.objects.nodes.contains_key(node));
        virtual_ip.live.iter().filter(move |_| there)
    }

    /// Whether a Service that is ours has this address in its status and others by decision.
    fn moves_away(&self, service: &ObjectRef, address: IpAddr) -> bool {
        self.index.published_by.contains(&address, service) && self.index.wanted.contains_key(service)
    }

    /// Whether our finalizers are on a Service, without which it gets no address.
    fn is_protected(&self, service: &ObjectRef) -> bool {
        self.objects.services.get(service).is_some_and(|service| super::services::missing(service).is_empty())
    }

    /// Who announces an address, and why it moves if that is to be told. Remembers where nobody can.
    fn place(
        &mut self,
        address: IpAddr,
        services: &Few<ObjectRef>,
        present: Option<&VirtualIp>,
    ) -> (Option<String>, Option<String>) {
        let owner = present.and_then(|present| present.node.as_deref());
        if services.is_empty() {
            self.index.unplaced.remove(&address);
            // It has to let go; whose it is does not matter any more.
            return (owner.map(str::to_owned), None);
        }
        let nodes = Nodes {
            nodes: &self.objects.nodes,
            liveness: &self.liveness,
            advertisements: &self.objects.advertisements,
        };
        let claim = Claim { address, pool: self.pool_of(address, services), local: self.local(services) };
        let load = |node: &str| {
            let own = self.index.owner.get(&address).is_some_and(|owner| owner == node);
            self.index.owned.count(&node.to_owned()) - usize::from(own)
        };
        let Choice { node, unfit, moved_because } = nodes.choose(&claim, owner, load);
        let before = match &unfit {
            Some(why) => self.index.unplaced.insert(address, why.clone()),
            None => self.index.unplaced.remove(&address),
        };
        if before != unfit {
            self.dirty.services.extend(services.iter().cloned());
        }
        (node, moved_because)
    }

    /// Nodes with endpoints, for each Service that takes local traffic only.
    fn local(&self, services: &Few<ObjectRef>) -> Vec<BTreeSet<String>> {
        let services = services.iter().filter_map(|service| self.objects.services.get(service));
        let local = services.filter(|service| service.local_traffic_only);
        let nodes = |service: &Arc<Service>| {
            let slices = self.index.slices.get(&service.object);
            let slices = slices.filter_map(|slice| self.objects.slices.get(slice)).map(Arc::as_ref);
            endpoint_nodes(slices, service.publish_not_ready_addresses)
        };
        local.map(nodes).collect()
    }

    /// The pool that an address was taken from, by its key.
    fn pool_key(&self, address: IpAddr, services: &Few<ObjectRef>) -> Option<String> {
        let assigned = services.iter().filter_map(|service| self.ipam.as_ref()?.assigned(service));
        let mut pools = assigned.flat_map(|assigned| &assigned.addresses).filter(|(it, _)| *it == address);
        pools.find_map(|(_, pool)| pool.clone())
    }

    fn pool_of(&self, address: IpAddr, services: &Few<ObjectRef>) -> Option<&Pool> {
        self.objects.pools.get(&self.pool_key(address, services)?).map(Arc::as_ref)
    }

    /// Puts a VirtualIP right.
    fn correct(&self, present: &VirtualIp, wanted: Wanted) -> Option<Command> {
        let address = present.address;
        let resource_version = present.resource_version.clone();
        if wanted.services.is_empty() && present.services.is_empty() {
            let is_free = self.still_live(present).next().is_none()
                && self.index.published_by.get(&address).next().is_none();
            let uid = present.uid.clone();
            return is_free.then_some(Command::DeleteVirtualIp { address, uid, resource_version });
        }
        let Wanted { pool, services, node } = wanted;
        let is_right = present.pool == pool && present.services == services && present.node == node;
        (!is_right).then_some(Command::UpdateVirtualIp { address, resource_version, pool, services, node })
    }
}

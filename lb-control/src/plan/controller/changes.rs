//! What a change of an object concerns.

use std::{net::IpAddr, sync::Arc, time::Duration};

use super::{Command, Controller, EventTarget, conditions, flights::Key, services};
use crate::model::{ObjectChange, ObjectRef, PoolOrigin, Service, VirtualIp};

impl Controller {
    /// An object came, changed or went.
    pub fn change(&mut self, change: ObjectChange, now: Duration) {
        if let Some(ipam) = &mut self.ipam {
            ipam.change(&change);
        }
        match change {
            ObjectChange::Service(key, new) => self.service_changed(key, new, now),
            ObjectChange::VirtualIp(address, new) => self.virtual_ip_changed(address, new, now),
            ObjectChange::Slice(key, new) => {
                let old = self.objects.slices.get(&key);
                let services = self.index.slice(&key, old.map(Arc::as_ref), new.as_deref());
                self.objects.apply(ObjectChange::Slice(key, new));
                for service in services {
                    if self.objects.services.get(&service).is_some_and(|it| it.local_traffic_only) {
                        self.dirty.addresses.extend(self.index.addresses_of(&service));
                    }
                }
            }
            ObjectChange::Agent(node, new) => {
                if self.liveness.change(&node, new.as_ref(), now) {
                    self.touch_node(&node);
                }
                self.objects.apply(ObjectChange::Agent(node, new));
            }
            ObjectChange::Node(node, new) => {
                if self.objects.apply(ObjectChange::Node(node.clone(), new)) {
                    self.touch_node(&node);
                }
            }
            ObjectChange::Pool(..) => {
                self.objects.apply(change);
                self.pools.is_dirty = true;
                self.touch_metallb();
            }
            ObjectChange::Advertisement(..) => {
                self.objects.apply(change);
                self.touch_metallb();
            }
            ObjectChange::Namespace(..) => {
                self.objects.apply(change);
            }
            ObjectChange::Unreadable(key, new) => {
                if self.objects.apply(ObjectChange::Unreadable(key.clone(), new)) {
                    self.dirty.unreadable.insert(key);
                }
            }
        }
    }

    fn service_changed(&mut self, key: ObjectRef, new: Option<Arc<Service>>, now: Duration) {
        let old = self.objects.services.get(&key).cloned();
        if !self.objects.apply(ObjectChange::Service(key.clone(), new.clone())) {
            return;
        }
        self.index.service(old.as_deref(), new.as_deref());
        match (old.as_deref(), new.as_deref()) {
            (Some(old), Some(new)) if self.is_served(old) && self.is_served(new) => {
                if !self.is_our_doing(new) && self.rivals.observe(old, new, now) {
                    self.tell_of_rival(new, "somebody else keeps on changing the status");
                }
            }
            _ => self.rivals.forget(&key),
        }
        self.observe(&Key::Service(key.clone()), now);
        self.dirty.addresses.extend(self.index.addresses_of(&key));
        // Addresses that it published last, if nothing else links it to them any more.
        self.dirty.addresses.extend(old.iter().flat_map(|old| super::published(old)));
        self.dirty.services.insert(key);
    }

    /// Whether the status of a Service is what we applied last.
    fn is_our_doing(&self, service: &Service) -> bool {
        let command = self.flights.command(&Key::Service(service.object.clone()));
        service.api.ingress_is_ours && !service.api.ingress.is_empty()
            || matches!(command, Some(Command::ApplyServiceStatus { ingress, .. }) if services::shows(service, ingress))
    }

    fn virtual_ip_changed(&mut self, address: IpAddr, new: Option<Arc<VirtualIp>>, now: Duration) {
        let old = self.objects.virtual_ips.get(&address).cloned();
        if !self.objects.apply(ObjectChange::VirtualIp(address, new.clone())) {
            return;
        }
        if let Some(old) = &old {
            self.dirty.services.extend(old.services.iter().chain(&old.live).cloned());
        }
        self.index.virtual_ip(old.as_deref(), new.as_deref());
        self.touch_address(address);
        self.observe(&Key::Address(address), now);
        if let (None, Some(new)) = (&old, &new)
            && new.services.iter().any(|service| self.was_given_by_another(address, service))
        {
            // Another leader was faster. It stays with whom that gave it to.
            self.ipam = None;
        }
    }

    /// Whether a Service that is ours was given an address without our having decided so.
    fn was_given_by_another(&self, address: IpAddr, service: &ObjectRef) -> bool {
        self.objects.services.get(service).is_some_and(|service| self.is_served(service))
            && !self.index.wanted_by.contains(&address, service)
    }

    /// An object changed: whatever was on its way for it may have arrived.
    fn observe(&mut self, key: &Key, now: Duration) {
        let shown = self.flights.command(key).is_some_and(|command| self.is_shown(command));
        let events = self.flights.observe(key, |_| shown, now);
        self.events.extend(events);
    }

    /// Whether the objects are as a command wants them.
    pub(super) fn is_shown(&self, command: &Command) -> bool {
        let service = |object: &ObjectRef| self.objects.services.get(object);
        match command {
            Command::CreateVirtualIp { address, services, node, .. }
            | Command::UpdateVirtualIp { address, services, node, .. } => {
                let present = self.objects.virtual_ips.get(address);
                present.is_some_and(|it| it.services == *services && it.node == *node)
            }
            Command::DeleteVirtualIp { address, uid, .. } => {
                self.objects.virtual_ips.get(address).is_none_or(|it| it.uid != *uid || it.deleting)
            }
            Command::AddFinalizers { service: object, uid, finalizers, .. } => {
                service(object).is_none_or(|it| {
                    it.api.uid != *uid || finalizers.iter().all(|it_| it.api.finalizers.contains(it_))
                })
            }
            Command::RemoveFinalizers { service: object, uid, finalizers, .. } => {
                service(object).is_none_or(|it| {
                    it.api.uid != *uid || !finalizers.iter().any(|it_| it.api.finalizers.contains(it_))
                })
            }
            Command::ApplyServiceStatus { service: object, uid, ingress, conditions } => service(object)
                .is_none_or(|it| {
                    it.api.uid != *uid
                        || services::shows(it, ingress) && conditions::present(it) == *conditions
                }),
            Command::SetExternalIps { service: object, all, ours, .. } => service(object)
                .is_none_or(|it| it.api.external_ips == *all && it.api.our_external_ips == *ours),
            Command::SetVirtualIpStatus { .. } | Command::SetPoolStatus { .. } | Command::Event { .. } => {
                true
            }
        }
    }

    /// Whether what is known of an object is newer than what a command builds on.
    pub(super) fn is_outdated(&self, command: &Command) -> bool {
        match command {
            Command::CreateVirtualIp { address, .. } => self.objects.virtual_ips.contains_key(address),
            Command::UpdateVirtualIp { address, resource_version, .. }
            | Command::DeleteVirtualIp { address, resource_version, .. } => self
                .objects
                .virtual_ips
                .get(address)
                .is_none_or(|it| it.resource_version != *resource_version),
            Command::AddFinalizers { service, resource_version, .. }
            | Command::RemoveFinalizers { service, resource_version, .. }
            | Command::SetExternalIps { service, resource_version, .. } => {
                let service = self.objects.services.get(service);
                service.is_none_or(|it| it.api.resource_version != *resource_version)
            }
            Command::ApplyServiceStatus { service, uid, .. } => {
                self.objects.services.get(service).is_none_or(|it| it.api.uid != *uid)
            }
            Command::SetVirtualIpStatus { .. } | Command::SetPoolStatus { .. } | Command::Event { .. } => {
                false
            }
        }
    }

    /// The status of a Service belongs to somebody else.
    pub(super) fn refused(&mut self, service: &ObjectRef, why: &str, now: Duration) {
        self.counters.status_conflicts += 1;
        if self.rivals.refused(service, now)
            && let Some(service) = self.objects.services.get(service).cloned()
        {
            self.tell_of_rival(&service, why);
        }
    }

    fn tell_of_rival(&mut self, service: &Service, why: &str) {
        self.events.push(Command::Event {
            about: EventTarget::service(&service.object, &service.api.uid),
            warning: true,
            reason: "StatusConflict".into(),
            note: format!(
                "cannot publish the addresses: {why}; find out who else serves this Service, and \
                 give it a loadBalancerClass so that only one does"
            ),
        });
    }

    /// Looks at an address and at all Services that have to do with it.
    fn touch_address(&mut self, address: IpAddr) {
        self.dirty.addresses.insert(address);
        self.dirty.services.extend(self.index.wanted_by.get(&address).cloned());
        if let Some(virtual_ip) = self.objects.virtual_ips.get(&address) {
            self.dirty.services.extend(virtual_ip.services.iter().chain(&virtual_ip.live).cloned());
        }
    }

    pub(super) fn touch(&mut self, key: Key) {
        match key {
            Key::Service(service) => drop(self.dirty.services.insert(service)),
            Key::Address(address) => drop(self.dirty.addresses.insert(address)),
            Key::Pool(_) => self.pools.is_dirty = true,
        }
    }

    /// A node or its agent came, went, or is other than before.
    pub(super) fn touch_node(&mut self, node: &str) {
        let node = node.to_owned();
        let there = self.index.owned.get(&node).chain(self.index.live_on.get(&node));
        let addresses: Vec<_> = there.chain(self.index.unplaced.keys()).copied().collect();
        for address in addresses {
            self.touch_address(address);
        }
    }

    /// Who may announce the addresses of MetalLB's pools has changed.
    fn touch_metallb(&mut self) {
        let pools = self.objects.pools.iter();
        let pools = pools.filter(|(_, pool)| matches!(pool.origin, PoolOrigin::MetalLb(_)));
        let addresses = pools.flat_map(|(key, _)| self.index.from_pool.get(key));
        self.dirty.addresses.extend(addresses.copied().collect::<Vec<_>>());
    }
}

//! What an API server does with commands, as far as the controller can tell.

use std::sync::Arc;

use crate::{
    model::{Condition, Ingress, ObjectChange, ObjectRef, Objects, Service, VirtualIp},
    plan::controller::{Command, FINALIZER, Outcome, conditions::PREFIX},
};

/// Objects, and the log that watches read.
#[derive(Default)]
pub struct Server {
    pub objects: Objects,
    pub log: Vec<ObjectChange>,
    versions: u64,
    /// Commands that changed nothing.
    pub idle_writes: Vec<Command>,
}

impl Server {
    fn version(&mut self) -> String {
        self.versions += 1;
        self.versions.to_string()
    }

    pub fn put(&mut self, change: ObjectChange) {
        self.objects.apply(change.clone());
        self.log.push(change);
    }

    pub fn service(&self, object: &ObjectRef) -> Option<&Arc<Service>> {
        self.objects.services.get(object)
    }

    /// Creates a Service, or changes what people write of it.
    pub fn put_service(&mut self, mut service: Service) {
        let old = self.service(&service.object).cloned();
        service.api = match old {
            Some(old) => old.api.clone(),
            None => crate::model::ApiState { uid: format!("uid-{}", self.versions), ..Default::default() },
        };
        if !service.is_load_balancer {
            // As the API server does when the type changes.
            service.api.ingress.clear();
            service.api.ingress_is_ours = false;
        }
        self.write_service(service);
    }

    pub fn write_service(&mut self, mut service: Service) {
        service.api.resource_version = self.version();
        let object = service.object.clone();
        if service.api.deleting && service.api.finalizers.is_empty() {
            self.put(ObjectChange::Service(object, None));
        } else {
            self.put(ObjectChange::Service(object, Some(Arc::new(service))));
        }
    }

    pub fn delete_service(&mut self, object: &ObjectRef) {
        if let Some(service) = self.service(object) {
            let mut service = (**service).clone();
            service.api.deleting = true;
            self.write_service(service);
        }
    }

    pub fn write_virtual_ip(&mut self, mut virtual_ip: VirtualIp) {
        virtual_ip.resource_version = self.version();
        self.put(ObjectChange::VirtualIp(virtual_ip.address, Some(Arc::new(virtual_ip))));
    }

    fn edit(&mut self, command: &Command, object: &ObjectRef, edit: impl FnOnce(&mut Service)) -> Outcome {
        let Some(old) = self.service(object).cloned() else { return Outcome::Gone };
        let mut new = (*old).clone();
        edit(&mut new);
        if new == *old {
            self.idle_writes.push(command.clone());
        } else {
            self.write_service(new);
        }
        Outcome::Done
    }

    /// Whether a Service is still the one that a command is about.
    fn is_stale(&self, object: &ObjectRef, uid: Option<&str>, version: Option<&str>) -> Option<Outcome> {
        let Some(service) = self.service(object) else { return Some(Outcome::Gone) };
        let is_same = uid.is_none_or(|uid| uid == service.api.uid)
            && version.is_none_or(|version| version == service.api.resource_version);
        (!is_same).then(|| Outcome::Conflict("it has changed".into()))
    }

    /// Carries out a command.
    pub fn run(&mut self, command: &Command) -> Outcome {
        match command.clone() {
            Command::CreateVirtualIp { address, pool, services, node } => {
                if self.objects.virtual_ips.contains_key(&address) {
                    return Outcome::Conflict("already exists".into());
                }
                let (uid, (live_node, live)) = (format!("uid-{}", self.versions), Default::default());
                let (resource_version, deleting) = (String::new(), false);
                self.write_virtual_ip(VirtualIp {
                    address,
                    pool,
                    services,
                    node,
                    live_node,
                    live,
                    uid,
                    resource_version,
                    deleting,
                });
                Outcome::Done
            }
            Command::UpdateVirtualIp { address, resource_version, pool, services, node } => {
                let Some(old) = self.objects.virtual_ips.get(&address) else { return Outcome::Gone };
                if old.resource_version != resource_version {
                    return Outcome::Conflict("it has changed".into());
                }
                let new = VirtualIp { pool, services, node, ..(**old).clone() };
                if new == **old {
                    self.idle_writes.push(command.clone());
                }
                self.write_virtual_ip(new);
                Outcome::Done
            }
            Command::DeleteVirtualIp { address, uid, resource_version } => {
                let Some(old) = self.objects.virtual_ips.get(&address) else { return Outcome::Gone };
                if old.resource_version != resource_version || old.uid != uid {
                    return Outcome::Conflict("it has changed".into());
                }
                self.put(ObjectChange::VirtualIp(address, None));
                Outcome::Done
            }
            Command::SetVirtualIpStatus { address, uid, resource_version, node, services } => {
                let Some(old) = self.objects.virtual_ips.get(&address) else { return Outcome::Gone };
                if old.resource_version != resource_version || old.uid != uid {
                    return Outcome::Conflict("it has changed".into());
                }
                let new = VirtualIp { live_node: node, live: services, ..(**old).clone() };
                self.write_virtual_ip(new);
                Outcome::Done
            }
            Command::SetPoolStatus { .. } | Command::Event { .. } => Outcome::Done,
            other => self.run_for_service(&other),
        }
    }

    fn run_for_service(&mut self, command: &Command) -> Outcome {
        match command {
            Command::AddFinalizers { service, uid, resource_version, finalizers } => {
                self.is_stale(service, Some(uid), Some(resource_version)).unwrap_or_else(|| {
                    self.edit(command, service, |it| it.api.finalizers.extend(finalizers.clone()))
                })
            }
            Command::RemoveFinalizers { service, uid, resource_version, finalizers } => {
                self.is_stale(service, Some(uid), Some(resource_version)).unwrap_or_else(|| {
                    self.edit(command, service, |it| it.api.finalizers.retain(|it| !finalizers.contains(it)))
                })
            }
            Command::SetExternalIps { service, resource_version, all, ours } => {
                self.is_stale(service, None, Some(resource_version)).unwrap_or_else(|| {
                    self.edit(command, service, |it| {
                        it.api.external_ips.clone_from(all);
                        it.api.our_external_ips.clone_from(ours);
                    })
                })
            }
            Command::ApplyServiceStatus { service, uid, ingress, conditions } => self
                .is_stale(service, Some(uid), None)
                .unwrap_or_else(|| self.apply_status(command, service, ingress, conditions)),
            _ => unreachable!("{command:?}"),
        }
    }

    /// Server-side apply without force: `ingress` is atomic, conditions are by kind.
    fn apply_status(
        &mut self,
        command: &Command,
        object: &ObjectRef,
        addresses: &[std::net::IpAddr],
        conditions: &[Condition],
    ) -> Outcome {
        let ingress = |address: &std::net::IpAddr| Ingress {
            ip: Some(*address),
            hostname: None,
            ip_mode: Some("VIP".into()),
        };
        let wanted: Vec<_> = addresses.iter().map(ingress).collect();
        let present = &self.objects.services[object].api;
        if !wanted.is_empty()
            && !present.ingress_is_ours
            && !present.ingress.is_empty()
            && present.ingress != wanted
        {
            return Outcome::Conflict("conflict with \"rival\": .status.loadBalancer.ingress".into());
        }
        self.edit(command, object, |it| {
            if it.api.ingress_is_ours || !wanted.is_empty() {
                let keeps = it.is_load_balancer;
                it.api.ingress = if keeps { wanted } else { Vec::new() };
                it.api.ingress_is_ours = !it.api.ingress.is_empty();
            }
            it.api.conditions.retain(|it| !it.kind.starts_with(PREFIX));
            it.api.conditions.extend(conditions.iter().cloned());
        })
    }

    /// What must hold after every write of the controller.
    pub fn check(&self, command: &Command, is_alive: impl Fn(&str) -> bool) {
        for virtual_ip in self.objects.virtual_ips.values() {
            let live =
                virtual_ip.live.iter().filter(|_| virtual_ip.live_node.as_deref().is_some_and(&is_alive));
            let group: Vec<_> = virtual_ip.services.iter().chain(live).collect();
            for (index, one) in group.iter().enumerate() {
                for other in &group[index + 1..] {
                    assert!(one == other || self.may_share(one, other), "{command:?}: {virtual_ip:?}");
                }
            }
        }
    }

    fn may_share(&self, one: &ObjectRef, other: &ObjectRef) -> bool {
        // Who is gone was checked when it was there.
        let (Some(one), Some(other)) = (self.service(one), self.service(other)) else { return true };
        one.sharing_key.is_some() && one.sharing_key == other.sharing_key
    }

    /// Whether a command is safe by what the server knows before it is carried out.
    pub fn check_before(&self, command: &Command, is_alive: impl Fn(&str) -> bool) {
        match command {
            Command::ApplyServiceStatus { service, ingress, .. } => {
                let Some(present) = self.service(service) else { return };
                for address in ingress {
                    let is_new = !present.api.ingress.iter().any(|it| it.ip == Some(*address));
                    let virtual_ip = self.objects.virtual_ips.get(address);
                    let is_live = virtual_ip.is_some_and(|it| it.live.contains(service));
                    assert!(!is_new || is_live, "published before it is served: {command:?} {virtual_ip:?}");
                }
            }
            Command::RemoveFinalizers { service, uid, .. } => {
                if self.service(service).is_none_or(|it| it.api.uid != *uid) {
                    return;
                }
                for virtual_ip in self.objects.virtual_ips.values() {
                    let alive = virtual_ip.live_node.as_deref().is_some_and(&is_alive);
                    let is_held =
                        virtual_ip.services.contains(service) || alive && virtual_ip.live.contains(service);
                    assert!(!is_held, "finalizers go before the address: {command:?} {virtual_ip:?}");
                }
            }
            _ => {}
        }
    }

    /// What must hold at rest.
    pub fn check_at_rest(&self, default_class: bool) {
        for service in self.objects.services.values() {
            let object = &service.object;
            let is_ours = service.is_ours(default_class);
            assert!(!service.api.deleting, "{object} was never let go: {service:?}");
            if !is_ours {
                assert!(!service.api.finalizers.iter().any(|it| it == FINALIZER), "{service:?}");
                assert!(!service.api.ingress_is_ours, "{service:?}");
            }
            let given = self.objects.virtual_ips.values().filter(|it| it.services.contains(object));
            let given: std::collections::BTreeSet<_> = given.map(|it| it.address).collect();
            let published: std::collections::BTreeSet<_> =
                service.api.ingress.iter().filter_map(|it| it.ip).collect();
            if service.api.ingress_is_ours {
                assert_eq!(given, published, "{service:?}");
            }
            assert!(is_ours || given.is_empty(), "{service:?} {given:?}");
        }
        for virtual_ip in self.objects.virtual_ips.values() {
            assert!(!virtual_ip.services.is_empty(), "left over: {virtual_ip:?}");
        }
    }
}

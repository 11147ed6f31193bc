//! Objects to desired state, at the cost of what changed.

mod index;
mod targets;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use index::Index;
use targets::Targets;

use super::{
    HealthCheck,
    ipam::{Assigned, Holdings, Ipam},
    resolve::{Here, Resolved, resolve},
};
use crate::model::{
    CheckTarget, Desired, DesiredEntry, EndpointSlice, Family, ObjectChange, ObjectRef, Objects, Problem,
    Service, ServiceKey, ServiceReport, VirtualIp,
};

/// Where the addresses of Services come from.
pub enum Addressing {
    /// Decided here: there is nobody else.
    Decides(Box<Ipam>),
    /// Decided by the cluster's elected writer, in VirtualIPs.
    Follows,
}

/// What is to be done, and what people are told.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// For the data plane.
    pub desired: Desired,
    /// For people: every Service that is ours.
    pub reports: BTreeMap<ObjectRef, Arc<ServiceReport>>,
    /// What is wrong with objects that no Service answers for.
    pub problems: Vec<Problem>,
    /// For other load balancers: every Service that they may ask about.
    pub health_checks: BTreeMap<ObjectRef, HealthCheck>,
}

/// What is other than before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Services that the data plane has to do something else for.
    pub services: BTreeSet<ObjectRef>,
    /// Services of which people are told something else.
    pub reports: BTreeSet<ObjectRef>,
    /// Addresses that come onto the link device or go from it.
    pub vips: BTreeSet<IpAddr>,
    /// Addresses on the link device that are there for other Services than before.
    pub holders: BTreeSet<IpAddr>,
    /// Addresses of backends that come or go, or turn out to be on this node, or not.
    pub backends: BTreeSet<IpAddr>,
    /// Services about which health checks are told something else.
    pub health_checks: BTreeSet<ObjectRef>,
    /// Those who are to be asked from now on whether they work, or no more: see [`Planner::is_asked`].
    pub targets: BTreeSet<CheckTarget>,
}

impl Effects {
    /// Whether all is as before.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Whether addresses were there before a batch of changes: one may pass from a Service to another
/// within it.
#[derive(Default)]
struct Before {
    backends: HashMap<IpAddr, Place>,
    vips: HashMap<IpAddr, bool>,
    targets: BTreeMap<CheckTarget, bool>,
}

/// All that is decided about a Service; nothing if it is not ours.
#[derive(Default)]
struct Decided {
    entries: Vec<(ServiceKey, DesiredEntry)>,
    report: Option<ServiceReport>,
    health_check: Option<HealthCheck>,
    targets: BTreeSet<CheckTarget>,
}

/// What is known of an address of backends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    /// How many entries have a backend there.
    count: usize,
    /// How many of them say that it is on this node.
    local: usize,
}

impl Place {
    /// Whether there is a backend, and on this node.
    fn state(self) -> (bool, bool) {
        (self.count > 0, self.local > 0)
    }
}

/// Keeps the objects and the last decision, and renews it.
pub struct Planner {
    default_class: bool,
    /// The name of this node; empty if it is not part of a cluster.
    node: String,
    addressing: Addressing,
    objects: Objects,
    index: Index,
    plan: Plan,
    backends: HashMap<IpAddr, Place>,
    targets: Targets,
    resolved: u64,
}

impl Planner {
    /// Knows no objects yet. `default_class`: Services without a class are ours too.
    #[must_use]
    pub fn new(default_class: bool, node: impl Into<String>, addressing: Addressing) -> Self {
        Self {
            default_class,
            node: node.into(),
            addressing,
            objects: Objects::default(),
            index: Index::default(),
            plan: Plan::default(),
            backends: HashMap::new(),
            targets: Targets::default(),
            resolved: 0,
        }
    }

    /// The last decision.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The objects as they are now.
    #[must_use]
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Addresses of all backends.
    pub fn backends(&self) -> impl Iterator<Item = IpAddr> {
        self.backends.keys().copied()
    }

    /// Whether the backends at an address are known to be on this node; `None` if there are none.
    #[must_use]
    pub fn is_local(&self, address: &IpAddr) -> Option<bool> {
        self.backends.get(address).map(|place| place.local > 0)
    }

    /// Services that have a backend at one of these addresses. Looks at all entries.
    #[must_use]
    pub fn services_behind(&self, addresses: &BTreeSet<IpAddr>) -> BTreeSet<ObjectRef> {
        if addresses.is_empty() {
            return BTreeSet::new();
        }
        let entries = self.plan.desired.entries.iter();
        let behind = entries
            .filter(|(_, entry)| entry.backends.keys().any(|backend| addresses.contains(&backend.ip())));
        behind.map(|(key, _)| key.service.clone()).collect()
    }

    /// Who has which address.
    #[must_use]
    pub fn holdings(&self) -> Holdings {
        match &self.addressing {
            Addressing::Decides(ipam) => ipam.holdings(),
            Addressing::Follows => {
                let vips = self.plan.reports.iter().filter(|(_, report)| !report.vips.is_empty());
                let addresses = |report: &ServiceReport| report.vips.iter().map(|vip| vip.address).collect();
                vips.map(|(object, report)| (object.clone(), addresses(report))).collect()
            }
        }
    }

    /// How many Services were looked at, ever: a measure of what an event costs.
    #[must_use]
    pub fn resolved(&self) -> u64 {
        self.resolved
    }

    /// Takes changes over and decides what they touch.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = ObjectChange>) -> Effects {
        let mut dirty = BTreeSet::new();
        let zone = self.zone();
        for change in changes {
            self.touch(&change, &mut dirty);
            if let Addressing::Decides(ipam) = &mut self.addressing {
                ipam.change(&change);
            }
            self.index.change(&change, &self.objects);
            self.objects.apply(change);
        }
        if let Addressing::Decides(ipam) = &mut self.addressing {
            dirty.extend(ipam.settle());
        }
        if self.zone() != zone {
            dirty.extend(self.plan.reports.keys().cloned());
        }
        let effects = self.renew_all(&dirty);
        self.plan.problems = self.problems();
        effects
    }

    /// Takes over what health checks tell: why who is asked does not work, or that it does.
    pub fn health(&mut self, verdicts: impl IntoIterator<Item = (CheckTarget, Option<Arc<str>>)>) -> Effects {
        let dirty = self.targets.learn(verdicts);
        self.renew_all(&dirty)
    }

    /// Whether somebody is to be asked whether he works. This node asks for the addresses that it
    /// has: the others' traffic does not come by it.
    #[must_use]
    pub fn is_asked(&self, target: &CheckTarget) -> bool {
        self.targets.is_asked(target)
    }

    /// One of the Services that it is asked for; `None` if it is not asked.
    #[must_use]
    pub fn asked_for(&self, target: &CheckTarget) -> Option<&ObjectRef> {
        self.targets.asked_for(target)
    }

    fn renew_all(&mut self, dirty: &BTreeSet<ObjectRef>) -> Effects {
        let mut effects = Effects::default();
        let mut before = Before::default();
        for service in dirty {
            self.renew(service, &mut effects, &mut before);
        }
        for (address, was) in before.backends {
            let is = self.backends.get(&address).copied().unwrap_or_default();
            if is.count == 0 {
                self.backends.remove(&address);
            }
            if was.state() != is.state() {
                effects.backends.insert(address);
            }
        }
        let vips = &self.plan.desired.vips;
        let other =
            before.vips.into_iter().filter(|(address, was_there)| *was_there != vips.contains_key(address));
        effects.vips.extend(other.map(|(address, _)| address));
        effects.targets = self.targets.settle(before.targets);
        effects
    }

    fn zone(&self) -> Option<String> {
        self.objects.nodes.get(&self.node)?.zone().map(str::to_owned)
    }

    /// Notes the Services that a change is about: by how things are before it.
    fn touch(&self, change: &ObjectChange, dirty: &mut BTreeSet<ObjectRef>) {
        match change {
            ObjectChange::Service(object, _) => {
                dirty.insert(object.clone());
            }
            ObjectChange::Slice(object, new) => {
                let slices = self.objects.slices.get(object).into_iter().chain(new);
                dirty.extend(slices.filter_map(|slice| service_of(slice)));
            }
            ObjectChange::VirtualIp(address, new) => {
                let old = self.objects.virtual_ips.get(address);
                // Its status is what we say ourselves.
                let decided =
                    |vip: &Arc<VirtualIp>| (vip.pool.clone(), vip.services.clone(), vip.node.clone());
                if old.map(decided) != new.as_ref().map(decided) {
                    let both = old.into_iter().chain(new);
                    dirty.extend(both.flat_map(|vip| vip.services.iter().cloned()));
                }
            }
            ObjectChange::Pool(..)
            | ObjectChange::Advertisement(..)
            | ObjectChange::Namespace(..)
            | ObjectChange::Node(..)
            | ObjectChange::Agent(..)
            | ObjectChange::Unreadable(..) => {}
        }
    }

    /// Decides about one Service.
    fn renew(&mut self, object: &ObjectRef, effects: &mut Effects, before: &mut Before) {
        self.resolved += 1;
        let decided = self.decide(object).unwrap_or_default();
        let report = decided.report.map(Arc::new);
        let entries: BTreeMap<_, _> = decided.entries.into_iter().collect();
        let old: BTreeMap<_, _> =
            self.plan.desired.entries_of(object).map(|(key, entry)| (key.clone(), entry.clone())).collect();
        if old != entries {
            effects.services.insert(object.clone());
            for (address, backend) in old.values().flat_map(|entry| &entry.backends) {
                self.count(address.ip(), backend.local, false, before);
            }
            for (address, backend) in entries.values().flat_map(|entry| &entry.backends) {
                self.count(address.ip(), backend.local, true, before);
            }
        }
        self.place(object, &old, &entries, effects, before);
        for key in old.keys().filter(|key| !entries.contains_key(key)) {
            self.plan.desired.entries.remove(key);
        }
        self.plan.desired.entries.extend(entries);
        let differs = match report {
            Some(report) => {
                let old = self.plan.reports.insert(object.clone(), Arc::clone(&report));
                old.as_ref() != Some(&report)
            }
            None => self.plan.reports.remove(object).is_some(),
        };
        if differs {
            effects.reports.insert(object.clone());
        }
        self.targets.replace(object, decided.targets, &mut before.targets);
        let before = match decided.health_check {
            Some(check) => self.plan.health_checks.insert(object.clone(), check),
            None => self.plan.health_checks.remove(object),
        };
        if before != decided.health_check {
            effects.health_checks.insert(object.clone());
        }
    }

    fn count(&mut self, address: IpAddr, local: bool, comes: bool, before: &mut Before) {
        let place = self.backends.entry(address).or_default();
        before.backends.entry(address).or_insert(*place);
        let step = |count: usize| if comes { count + 1 } else { count.saturating_sub(1) };
        place.count = step(place.count);
        if local {
            place.local = step(place.local);
        }
    }

    /// Which addresses have to be on the link device for a Service.
    fn place(
        &mut self,
        object: &ObjectRef,
        old: &BTreeMap<ServiceKey, DesiredEntry>,
        new: &BTreeMap<ServiceKey, DesiredEntry>,
        effects: &mut Effects,
        before: &mut Before,
    ) {
        let wanted: BTreeSet<IpAddr> =
            new.keys().map(|key| key.vip).filter(|address| self.announces(address)).collect();
        let all: BTreeSet<IpAddr> = old.keys().chain(new.keys()).map(|key| key.vip).collect();
        for address in all {
            let vips = &mut self.plan.desired.vips;
            before.vips.entry(address).or_insert(vips.contains_key(&address));
            let mut other = false;
            if wanted.contains(&address) {
                other = vips.entry(address).or_default().insert(object.clone());
            } else if let Some(holders) = vips.get_mut(&address) {
                other = holders.remove(object);
                if holders.is_empty() {
                    vips.remove(&address);
                }
            }
            if other {
                effects.holders.insert(address);
            }
        }
    }

    /// Whether this node has an address on its link device.
    fn announces(&self, address: &IpAddr) -> bool {
        match &self.addressing {
            Addressing::Decides(_) => true,
            Addressing::Follows => {
                let vip = self.objects.virtual_ips.get(address);
                vip.is_some_and(|vip| vip.node.as_ref() == Some(&self.node))
            }
        }
    }

    fn decide(&self, object: &ObjectRef) -> Option<Decided> {
        let service = self.objects.services.get(object)?;
        let followed;
        let assigned = match &self.addressing {
            Addressing::Decides(ipam) => ipam.assigned(object)?,
            Addressing::Follows => {
                followed = self.follow(service)?;
                &followed
            }
        };
        let slices: Vec<&EndpointSlice> = self.index.slices(object, &self.objects).collect();
        let zone = self.zone();
        let here =
            Here { node: Some(self.node.as_str()).filter(|node| !node.is_empty()), zone: zone.as_deref() };
        let unhealthy = |vip: &IpAddr| Some(self.targets.unhealthy()).filter(|_| self.announces(vip));
        let Resolved { entries, report, targets } = resolve(service, &slices, assigned, &here, unhealthy);
        let health_check = HealthCheck::of(service, &slices, &here);
        Some(Decided { entries, report: Some(report), health_check, targets })
    }

    /// The addresses that VirtualIPs give to a Service. One that is being deleted is served no more.
    fn follow(&self, service: &Service) -> Option<Assigned> {
        if !service.is_ours(self.default_class) || service.api.deleting {
            return None;
        }
        let mut addresses: Vec<_> = self.index.virtual_ips(&service.object).collect();
        let first = service.ip_families.first().copied().unwrap_or(Family::V4);
        addresses.sort_by_key(|address| (Family::of(*address) != first, *address));
        let pool = |address: &IpAddr| self.objects.virtual_ips.get(address).and_then(|vip| vip.pool.clone());
        let addresses = addresses.into_iter().map(|address| (address, pool(&address))).collect();
        Some(Assigned { addresses, can_wait: true, ..Assigned::default() })
    }

    fn problems(&self) -> Vec<Problem> {
        let Addressing::Decides(ipam) = &self.addressing else { return Vec::new() };
        let unclaimed = self.index.unclaimed().filter_map(|object| self.objects.slices.get(object));
        ipam.problems().iter().cloned().chain(unclaimed.map(|slice| unclaimed_problem(slice))).collect()
    }
}

/// The Service that a slice says it belongs to.
fn service_of(slice: &EndpointSlice) -> Option<ObjectRef> {
    Some(ObjectRef::new(slice.object.namespace.clone(), slice.service.clone()?))
}

/// Slices of files that say of no Service that they are its.
fn unclaimed_problem(slice: &EndpointSlice) -> Problem {
    let text = "has no label kubernetes.io/service-name, and so belongs to no Service";
    let mut problem = Problem::warning(text).about("EndpointSlice", &slice.object).field("metadata.labels");
    problem.place.clone_from(&slice.place);
    problem
}

#[cfg(test)]
mod tests;

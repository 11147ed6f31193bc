//! Decides again when objects change, at the cost of what changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    Assigned, Holdings, Options, PoolReport, Refusal,
    holders::{Consent, Holders},
    pools::Pools,
    reason,
    waiting::Waiting,
};
use crate::model::{Family, Namespace, ObjectChange, ObjectRef, Pool, Problem, Service};

/// Who has which address, kept up to date.
///
/// Tell it of objects ([`change`](Self::change)) and of who had what ([`adopt`](Self::adopt)), then
/// have it decide ([`settle`](Self::settle)). An address that a Service exchanges for another may go
/// to somebody else in the same step. Whoever is no longer ours keeps its addresses until
/// [`released`](Self::released) if that is [asked for](Options::deferred_release).
pub struct Ipam {
    pub(super) options: Options,
    pub(super) pools: Pools,
    pub(super) holders: Holders,
    pub(super) namespaces: BTreeMap<String, Arc<Namespace>>,
    /// Services that we serve.
    pub(super) ours: BTreeMap<ObjectRef, Arc<Service>>,
    /// Also of those that are no longer ours and have not let go.
    pub(super) held: Holdings,
    /// How much was looked at, ever.
    pub(super) steps: u64,
    assigned: BTreeMap<ObjectRef, Assigned>,
    waiting: Waiting,
    /// Keys of pools of which a Service has addresses that it would not get today.
    draining: BTreeMap<ObjectRef, Vec<String>>,
    drained: BTreeMap<String, usize>,
    inbox: Inbox,
    open: Open,
}

/// What came since the last decision.
#[derive(Default)]
struct Inbox {
    adopted: Holdings,
    services: BTreeMap<ObjectRef, Option<Arc<Service>>>,
    released: BTreeSet<ObjectRef>,
    namespaces: BTreeSet<String>,
    pools: BTreeMap<String, Arc<Pool>>,
    pools_differ: bool,
}

/// What is left to decide.
#[derive(Default)]
struct Open {
    services: BTreeSet<(Turn, ObjectRef)>,
    /// Addresses that others hold than before, or with other ports.
    addresses: BTreeSet<IpAddr>,
    /// Pools in which an address became free.
    queues: BTreeSet<(String, Family)>,
    /// Addresses where there may be room for one more.
    rooms: BTreeSet<IpAddr>,
    /// What was assigned before, of those where it may differ now.
    before: BTreeMap<ObjectRef, Option<Assigned>>,
}

/// Whose turn it is. Those of the same turn go by namespace and name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Turn {
    /// It cannot stay where it is, by its own change: those who were there with it can.
    Clashing,
    /// Clients know its address already.
    Published,
    /// Only this address will do.
    Explicit,
    Any,
}

impl Ipam {
    /// Nobody has anything.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self {
            options,
            pools: Pools::default(),
            holders: Holders::default(),
            namespaces: BTreeMap::new(),
            ours: BTreeMap::new(),
            held: Holdings::new(),
            steps: 0,
            assigned: BTreeMap::new(),
            waiting: Waiting::default(),
            draining: BTreeMap::new(),
            drained: BTreeMap::new(),
            inbox: Inbox::default(),
            open: Open::default(),
        }
    }

    /// Who has which address before the first decision: by VirtualIPs, or by the maps of an agent
    /// that died. To be called before that decision, with everything.
    pub fn adopt(&mut self, holdings: Holdings) {
        self.inbox.adopted.extend(holdings);
    }

    /// Takes over a change of a Service, Pool or Namespace; others do not matter here. What comes
    /// of it is decided by [`settle`](Self::settle).
    pub fn change(&mut self, change: &ObjectChange) {
        match change {
            ObjectChange::Service(object, service) => {
                self.inbox.services.insert(object.clone(), service.clone());
            }
            ObjectChange::Pool(key, pool) => {
                self.inbox.pools_differ |= match pool {
                    Some(pool) => {
                        let old = self.inbox.pools.insert(key.clone(), Arc::clone(pool));
                        old.is_none_or(|old| old != *pool)
                    }
                    None => self.inbox.pools.remove(key).is_some(),
                };
            }
            ObjectChange::Namespace(name, namespace) => {
                match namespace {
                    Some(namespace) => self.namespaces.insert(name.clone(), Arc::clone(namespace)),
                    None => self.namespaces.remove(name),
                };
                self.inbox.namespaces.insert(name.clone());
            }
            _ => {}
        }
    }

    /// Decides what is open; the Services whose [`Assigned`] is other than before, or gone.
    pub fn settle(&mut self) -> BTreeSet<ObjectRef> {
        self.take_pools();
        self.take_services();
        self.take_namespaces();
        self.take_adopted();
        self.work();
        let before = std::mem::take(&mut self.open.before).into_iter();
        before.filter(|(object, old)| self.assigned.get(object) != old.as_ref()).map(|(o, _)| o).collect()
    }

    /// Nobody serves the addresses of this Service any more, which is no longer ours: with the next
    /// decision they may go to others. Without effect on a Service that is ours by then.
    pub fn released(&mut self, object: &ObjectRef) {
        self.inbox.released.insert(object.clone());
    }

    /// What became of a Service's wish; `None` if it is not ours.
    #[must_use]
    pub fn assigned(&self, service: &ObjectRef) -> Option<&Assigned> {
        self.assigned.get(service)
    }

    /// What became of the wishes of all Services that are ours.
    pub fn all(&self) -> impl Iterator<Item = (&ObjectRef, &Assigned)> {
        self.assigned.iter()
    }

    /// Who has which address, with those who are no longer ours and have not let go.
    #[must_use]
    pub fn holdings(&self) -> Holdings {
        self.held.clone()
    }

    /// What is wrong with pools.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        self.pools.problems()
    }

    /// The state of every pool, by [`Pool::key`].
    #[must_use]
    pub fn pool_reports(&self) -> Vec<PoolReport> {
        self.pools.reports(&self.holders, |key| self.drained.contains_key(key))
    }

    /// How many decisions and looks at candidates there were, ever. What an event costs.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    fn take_pools(&mut self) {
        if !std::mem::take(&mut self.inbox.pools_differ) {
            return;
        }
        let affected = self.pools.replace(&self.inbox.pools, &self.holders);
        let held = affected.into_iter().flat_map(|interval| self.holders.within(interval));
        let mut look: BTreeSet<ObjectRef> = held.flat_map(|(_, objects)| objects.cloned()).collect();
        look.extend(self.waiting.all().cloned());
        look.iter().for_each(|object| self.look_at(object));
    }

    fn take_services(&mut self) {
        let services = std::mem::take(&mut self.inbox.services);
        let changed: Vec<ObjectRef> = services.keys().cloned().collect();
        for (object, service) in services {
            let ours =
                |service: &Arc<Service>| service.is_ours(self.options.default_class) && !service.api.deleting;
            match service.filter(ours) {
                Some(service) => self.take_service(object, service),
                None if self.ours.remove(&object).is_some() => {
                    self.remember(&object);
                    self.assigned.remove(&object);
                    self.waiting.set(&object, None);
                    self.note_draining(&object, Vec::new());
                    if !self.options.deferred_release {
                        self.let_go(&object);
                    }
                }
                None => {}
            }
        }
        for object in std::mem::take(&mut self.inbox.released) {
            if !self.ours.contains_key(&object) {
                self.let_go(&object);
            }
        }
        for object in changed {
            let Some(service) = self.ours.get(&object) else { continue };
            let mut held = self.held.get(&object).into_iter().flatten();
            if held.any(|address| self.holders.conflict(*address, service).is_some()) {
                self.open.services.insert((Turn::Clashing, object));
            }
        }
    }

    fn take_service(&mut self, object: ObjectRef, service: Arc<Service>) {
        let old = self.ours.insert(object.clone(), Arc::clone(&service));
        let alike =
            old.is_some_and(|old| old.ports == service.ports && Consent::of(&old) == Consent::of(&service));
        if !alike {
            for address in self.held.get(&object).into_iter().flatten() {
                self.holders.release(*address, &object);
                self.holders.hold(*address, &object, Some(Arc::clone(&service)));
                self.open.addresses.insert(*address);
            }
        }
        // Its turn may be another than it was.
        for turn in [Turn::Published, Turn::Explicit, Turn::Any] {
            self.open.services.remove(&(turn, object.clone()));
        }
        self.look_at(&object);
    }

    fn take_namespaces(&mut self) {
        let names = std::mem::take(&mut self.inbox.namespaces);
        if !self.pools.select_namespaces() {
            return;
        }
        for name in names {
            let services = self.ours.range(ObjectRef::new(&*name, "")..);
            let inside = services.map(|(object, _)| object).take_while(|object| object.namespace == name);
            let inside: Vec<ObjectRef> = inside.cloned().collect();
            inside.iter().for_each(|object| self.look_at(object));
        }
    }

    /// Groups that share come first: of Services that exclude each other by now, those that agree
    /// keep the address.
    fn take_adopted(&mut self) {
        let adopted = std::mem::take(&mut self.inbox.adopted);
        let (known, gone): (Vec<_>, Vec<_>) =
            adopted.into_iter().partition(|(object, _)| self.ours.contains_key(object));
        let known = known.into_iter().filter_map(|(object, addresses)| {
            let service = Arc::clone(self.ours.get(&object)?);
            Some((Consent::of(&service).is_none(), object, service, addresses))
        });
        let mut known: Vec<_> = known.collect();
        known.sort_by(|one, other| (one.0, &one.1).cmp(&(other.0, &other.1)));
        for (_, object, service, addresses) in known {
            for address in addresses {
                let held = self.held.get(&object).map(Vec::as_slice).unwrap_or_default();
                let second = held.iter().any(|other| Family::of(*other) == Family::of(address));
                if !second && self.holders.conflict(address, &service).is_none() {
                    self.hold(address, &object, Some(&service));
                }
            }
        }
        if self.options.deferred_release {
            for (object, addresses) in gone {
                for address in addresses {
                    if !self.held.get(&object).is_some_and(|held| held.contains(&address)) {
                        self.hold(address, &object, None);
                    }
                }
            }
        }
    }

    /// The next decision of those that are open, until none is. Whoever waits for what became free
    /// comes before those who have just arrived, unless these want something in particular.
    fn work(&mut self) {
        loop {
            let next = self.open.services.first().map(|(turn, _)| *turn);
            if next.is_none_or(|turn| turn == Turn::Any) {
                if let Some(address) = self.open.addresses.pop_first() {
                    self.wake(address);
                    continue;
                }
                if let Some(queue) = self.open.queues.pop_first() {
                    self.serve(&queue);
                    continue;
                }
                if let Some(address) = self.open.rooms.pop_first() {
                    self.fill(address);
                    continue;
                }
            }
            let Some((turn, object)) = self.open.services.pop_first() else { break };
            if turn == Turn::Published && !self.finds_published(&object) {
                self.open.services.insert((Turn::Any, object));
            } else {
                self.settle_one(&object);
            }
        }
    }

    /// Whether a Service gets an address again that stands in its status, or requests it.
    fn finds_published(&self, object: &ObjectRef) -> bool {
        let Some(service) = self.ours.get(object) else { return false };
        !service.requested_addresses.is_empty()
            || [Family::V4, Family::V6].iter().any(|family| self.published(service, *family).is_some())
    }

    /// Others hold an address than before: whom may that help?
    fn wake(&mut self, address: IpAddr) {
        let look: Vec<ObjectRef> = self.waiting.for_address(address).cloned().collect();
        if !self.holders.is_held(address) {
            if let Some((key, _)) = self.pools.of(address) {
                self.open.queues.insert((key.to_owned(), Family::of(address)));
            }
        } else if self.holders.consent(address).is_some() {
            self.open.rooms.insert(address);
        }
        look.iter().for_each(|object| self.look_at(object));
    }

    /// Gives what is free in a pool to those who wait for it, one after the other.
    fn serve(&mut self, queue: &(String, Family)) {
        let mut last: Option<ObjectRef> = None;
        while self.pools.lowest_free(&queue.0, queue.1).is_some() {
            let Some(next) = self.waiting.next_for(queue, last.as_ref()).cloned() else { break };
            self.settle_one(&next);
            last = Some(next);
        }
    }

    /// Lets those onto an address who wait for room beside others, one after the other.
    fn fill(&mut self, address: IpAddr) {
        let Some(consent) = self.holders.consent(address).cloned() else { return };
        let mut last: Option<ObjectRef> = None;
        loop {
            let next = self.waiting.for_room(&consent, last.as_ref()).find(|object| {
                let service = self.ours.get(*object);
                service.is_some_and(|service| self.holders.conflict(address, service).is_none())
            });
            let Some(next) = next.cloned() else { break };
            self.settle_one(&next);
            last = Some(next);
        }
    }

    fn settle_one(&mut self, object: &ObjectRef) {
        self.steps += 1;
        let Some(service) = self.ours.get(object).cloned() else { return };
        let before = self.held.get(object).cloned().unwrap_or_default();
        match self.decide(&service, &before) {
            Ok((after, refusal)) => self.conclude(&service, &before, after, refusal),
            Err(refusal) => {
                let in_use = [reason::ADDRESS_IN_USE, reason::SHARING_REFUSED].contains(&refusal.reason);
                if in_use && let Some(movers) = self.rotation(object) {
                    for (service, after) in movers {
                        let before = self.held.get(&service.object).cloned().unwrap_or_default();
                        self.conclude(&service, &before, after, None);
                    }
                    return;
                }
                let kept = before.iter().copied();
                let kept = kept.filter(|address| self.holders.conflict(*address, &service).is_none());
                self.conclude(&service, &before, kept.collect(), Some(refusal));
            }
        }
    }

    /// Carries a decision out.
    fn conclude(
        &mut self,
        service: &Arc<Service>,
        before: &[IpAddr],
        after: Vec<IpAddr>,
        refusal: Option<Refusal>,
    ) {
        let object = &service.object;
        for address in before.iter().filter(|address| !after.contains(address)) {
            self.free(*address, object);
        }
        for address in after.iter().filter(|address| !before.contains(address)) {
            self.hold(*address, object, Some(service));
        }
        if after.is_empty() {
            self.held.remove(object);
        } else {
            self.held.insert(object.clone(), after.clone());
        }
        let waits = refusal.as_ref().map(|refusal| refusal.waits.clone());
        self.waiting.set(object, waits);
        self.remember(object);
        let assigned = self.describe(service, &after, refusal);
        self.assigned.insert(object.clone(), assigned);
    }

    fn describe(&mut self, service: &Service, addresses: &[IpAddr], refusal: Option<Refusal>) -> Assigned {
        let can_wait = refusal.as_ref().is_none_or(|refusal| refusal.can_wait);
        let mut reason = refusal.as_ref().map_or("", |refusal| refusal.reason);
        let about = |problem: Problem| {
            let mut problem = problem.about("Service", &service.object);
            problem.place.clone_from(&service.place);
            problem
        };
        let mut problems = Vec::new();
        if let Some(refusal) = refusal {
            let list: Vec<_> = addresses.iter().map(ToString::to_string).collect();
            let keeps = match addresses {
                [] => String::new(),
                _ => format!("; the Service keeps {}", list.join(" and ")),
            };
            let mut problem = about(Problem::error(refusal.message + &keeps));
            problem.field = refusal.field;
            problems.push(problem);
        }
        let mut draining = Vec::new();
        let with_pools = addresses.iter().map(|address| {
            let pool = self.pools.of(*address).map(|(key, _)| key.to_owned());
            if let Some(why) = self.drains(service, *address) {
                problems.push(about(Problem::warning(why)));
                draining.extend(pool.clone());
            }
            (*address, pool)
        });
        let addresses = with_pools.collect();
        if reason.is_empty() && !problems.is_empty() {
            reason = reason::DRAINING;
        }
        self.note_draining(&service.object, draining);
        Assigned { addresses, problems, can_wait, reason }
    }

    fn note_draining(&mut self, object: &ObjectRef, pools: Vec<String>) {
        for key in &pools {
            *self.drained.entry(key.clone()).or_default() += 1;
        }
        let old = if pools.is_empty() {
            self.draining.remove(object)
        } else {
            self.draining.insert(object.clone(), pools)
        };
        for key in old.into_iter().flatten() {
            if let Some(count) = self.drained.get_mut(&key) {
                *count -= 1;
                if *count == 0 {
                    self.drained.remove(&key);
                }
            }
        }
    }

    fn remember(&mut self, object: &ObjectRef) {
        let before = self.open.before.entry(object.clone());
        before.or_insert_with(|| self.assigned.get(object).cloned());
    }

    fn look_at(&mut self, object: &ObjectRef) {
        let Some(service) = self.ours.get(object) else { return };
        let published = |address| service.api.ingress.iter().any(|ingress| ingress.ip == Some(address));
        let requested = &service.requested_addresses;
        let turn = if !service.api.ingress.is_empty()
            && !self.held.contains_key(object)
            && requested.iter().all(|address| published(*address))
        {
            Turn::Published
        } else if requested.is_empty() {
            Turn::Any
        } else {
            Turn::Explicit
        };
        self.open.services.insert((turn, object.clone()));
    }

    fn hold(&mut self, address: IpAddr, object: &ObjectRef, service: Option<&Arc<Service>>) {
        if !self.holders.is_held(address) {
            self.pools.take(address);
        }
        self.holders.hold(address, object, service.cloned());
        self.held.entry(object.clone()).or_default().push(address);
        self.open.addresses.insert(address);
    }

    fn free(&mut self, address: IpAddr, object: &ObjectRef) {
        if self.holders.release(address, object) {
            self.pools.give(address);
        }
        self.open.addresses.insert(address);
    }

    fn let_go(&mut self, object: &ObjectRef) {
        for address in self.held.remove(object).into_iter().flatten() {
            self.free(address, object);
        }
    }
}

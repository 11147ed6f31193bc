//! The controller's decisions: what the leader wants of the API server.
//!
//! A state machine. It is told of every change of an object and of what became of its commands,
//! and says which commands are due. The order is what keeps addresses safe:
//!
//! - to give: finalizers on the Service; the VirtualIP names the Service and a node; the node's
//!   agent says that it serves it; the Service's status shows the address;
//! - to take: the VirtualIP names the Service no more; the agent says that it has let go; the
//!   status is cleared; the VirtualIP goes, and the finalizers last.
//!
//! An address comes to another group of Services only once everybody of the old one has let go.
//! What is decided follows from the objects alone: a new leader goes on where the last one stopped.

mod addresses;
mod announce;
mod changes;
mod command;
mod conditions;
mod flights;
mod index;
mod pools;
mod rivals;
mod services;
mod unreadable;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

pub use announce::{agent_status, agent_status_of};
pub use command::{Command, EventTarget, Outcome, Topic};
pub use conditions::{ALLOCATED, ANNOUNCED};
pub use services::{FINALIZER, FINALIZER_KUBERNETES};

use flights::{Flights, Key};
use index::{Index, published};
use pools::PoolStatuses;
use rivals::Rivals;

use super::{
    ipam::{self, Holdings, Ipam},
    ownership::Liveness,
};
use crate::model::{KindAndName, ObjectChange, ObjectRef, Objects};

/// What is decided for the whole cluster.
#[derive(Clone, Copy, Debug)]
pub struct ControllerOptions {
    /// Whether Services without a `loadBalancerClass` are ours.
    pub default_class: bool,
    /// Whether addresses are written to `spec.externalIPs` too.
    pub publish_external_ips: bool,
    /// For how long after its Lease has run out an agent still counts as alive.
    pub node_lease_grace: Duration,
}

/// What the controller did, for metrics and tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Objects that were looked at in order to decide.
    pub steps: u64,
    /// Writes of a Service's status that were refused because somebody else writes it.
    pub status_conflicts: u64,
    /// Times that everything was derived from the objects anew.
    pub restarts: u64,
}

/// Objects to look at.
#[derive(Default)]
struct Dirty {
    services: BTreeSet<ObjectRef>,
    addresses: BTreeSet<IpAddr>,
    unreadable: BTreeSet<KindAndName>,
}

/// See the module.
pub struct Controller {
    options: ControllerOptions,
    objects: Objects,
    index: Index,
    /// `None` until decisions have been derived from the objects.
    ipam: Option<Ipam>,
    /// Whether nobody looked at the agents' Leases for a while.
    is_paused: bool,
    liveness: Liveness,
    flights: Flights,
    rivals: Rivals,
    pools: PoolStatuses,
    dirty: Dirty,
    /// Events to tell.
    events: Vec<Command>,
    /// Since when Services wait for their addresses to be served.
    waiting: BTreeMap<ObjectRef, services::Wait>,
    counters: Counters,
}

impl Controller {
    /// Knows of no objects yet.
    #[must_use]
    pub fn new(options: ControllerOptions) -> Self {
        Self {
            options,
            objects: Objects::default(),
            index: Index::default(),
            ipam: None,
            is_paused: false,
            liveness: Liveness::new(options.node_lease_grace),
            flights: Flights::default(),
            rivals: Rivals::default(),
            pools: PoolStatuses::default(),
            dirty: Dirty::default(),
            events: Vec::new(),
            waiting: BTreeMap::new(),
            counters: Counters::default(),
        }
    }

    /// Commands that are due, at the cost of what changed. Whoever carries them out reports every
    /// one but Events to [`done`](Self::done). The first call is to come after all objects that
    /// there are have been told of.
    #[must_use]
    pub fn decide(&mut self, now: Duration) -> Vec<Command> {
        if std::mem::take(&mut self.is_paused) {
            self.liveness.restart(now);
        }
        for node in self.liveness.expire(now) {
            self.touch_node(&node);
        }
        for key in self.flights.due(now) {
            self.touch(key);
        }
        if self.ipam.is_none() {
            self.derive();
        }
        self.settle();
        self.dirty.services.extend(self.flights.concerned());
        let mut commands = Vec::new();
        while let Some(address) = self.dirty.addresses.pop_first() {
            if let Some((command, events)) = self.address_step(address, now) {
                self.flights.start(&command, events);
                commands.push(command);
            }
        }
        while let Some(service) = self.dirty.services.pop_first() {
            if let Some((command, events)) = self.service_step(&service, now) {
                self.flights.start(&command, events);
                commands.push(command);
            }
        }
        commands.extend(self.pool_steps(now));
        commands.extend(self.unreadable_steps());
        commands.append(&mut self.events);
        commands
    }

    /// What became of a command.
    pub fn done(&mut self, command: &Command, outcome: &Outcome, now: Duration) {
        let Some(key) = Key::of(command) else { return };
        // Else the watch was faster, or leadership was lost in between.
        if !self.flights.has(&key, command) {
            return;
        }
        let is_shown = self.is_shown(command);
        match outcome {
            Outcome::Done => {
                let events = self.flights.arrived(&key, is_shown, now);
                self.events.extend(events);
            }
            Outcome::Conflict(why) => {
                if let Command::ApplyServiceStatus { service, ingress, .. } = command
                    && !ingress.is_empty()
                    && !self.is_outdated(command)
                {
                    self.refused(service, why, now);
                }
                self.flights.failed(&key, outcome, self.is_outdated(command), now);
            }
            Outcome::Gone | Outcome::Forbidden(_) | Outcome::Failed(_) => {
                // The watch shows Services and VirtualIPs, and so whether it is done all the same.
                let is_done = is_shown && !matches!(key, Key::Pool(_));
                self.flights.failed(&key, outcome, is_done, now);
            }
        }
        if let Key::Address(address) = &key
            && *outcome != Outcome::Done
        {
            let node = self.objects.virtual_ips.get(address).and_then(|it| it.node.clone());
            self.index.own(*address, node.as_deref());
        }
        if let Key::Pool(pool) = &key
            && *outcome != Outcome::Done
        {
            self.pool_failed(pool);
        }
        self.touch(key);
    }

    /// When to decide again even if nothing changes.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        [self.liveness.next_due(), self.flights.next_due(), self.pools.next_due()].into_iter().flatten().min()
    }

    /// Leadership is lost: forgets what was intended. The next decision derives everything from the
    /// objects, and takes agents to be alive from then on.
    pub fn reset(&mut self) {
        self.flights = Flights::default();
        self.rivals = Rivals::default();
        self.pools = PoolStatuses::default();
        self.events.clear();
        self.waiting.clear();
        self.ipam = None;
        self.is_paused = true;
        for virtual_ip in self.objects.virtual_ips.values() {
            self.index.own(virtual_ip.address, virtual_ip.node.as_deref());
        }
        let unborn = self.index.owner.keys().filter(|it| !self.objects.virtual_ips.contains_key(it));
        for address in unborn.copied().collect::<Vec<_>>() {
            self.index.own(address, None);
        }
    }

    /// What was counted so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The objects as they were told.
    #[must_use]
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Derives decisions from the objects: who has an address by its VirtualIP keeps it.
    fn derive(&mut self) {
        self.counters.restarts += 1;
        self.index.forget_decisions();
        let mut ipam = Ipam::new(ipam::Options {
            default_class: self.options.default_class,
            outside_pools: false,
            // Here an address waits for those who leave it: see `may_have`.
            deferred_release: false,
        });
        ipam.adopt(self.holdings());
        let namespaces = self.objects.namespaces.iter();
        let pools = self.objects.pools.iter();
        let services = self.objects.services.iter();
        let changes = namespaces
            .map(|(key, it)| ObjectChange::Namespace(key.clone(), Some(it.clone())))
            .chain(pools.map(|(key, it)| ObjectChange::Pool(key.clone(), Some(it.clone()))))
            .chain(services.map(|(key, it)| ObjectChange::Service(key.clone(), Some(it.clone()))));
        for change in changes {
            ipam.change(&change);
        }
        self.ipam = Some(ipam);
        self.dirty.services.extend(self.objects.services.keys().cloned());
        self.dirty.addresses.extend(self.objects.virtual_ips.keys());
        self.dirty.unreadable.extend(self.objects.unreadable.keys().cloned());
    }

    /// Who has which address by the VirtualIPs. What is published comes first: of two addresses of
    /// a family only one can stay, and that is the one that clients know.
    fn holdings(&self) -> Holdings {
        let mut holdings = Holdings::new();
        for virtual_ip in self.objects.virtual_ips.values() {
            for object in &virtual_ip.services {
                let service = self.objects.services.get(object);
                if service.is_some_and(|service| self.is_served(service)) {
                    holdings.entry(object.clone()).or_default().push(virtual_ip.address);
                }
            }
        }
        for (object, addresses) in &mut holdings {
            let published: BTreeSet<_> = published(&self.objects.services[object]).collect();
            addresses.sort_by_key(|address| !published.contains(address));
        }
        holdings
    }

    /// Lets addresses be decided, and notes whom that concerns.
    fn settle(&mut self) {
        let Some(ipam) = &mut self.ipam else { return };
        let changed = ipam.settle();
        self.pools.is_dirty |= !changed.is_empty();
        for service in changed {
            let assigned = ipam.assigned(&service);
            let addresses = assigned.map(|assigned| assigned.addresses.iter().map(|(address, _)| *address));
            let moved = self.index.want(&service, addresses.into_iter().flatten().collect());
            self.dirty.addresses.extend(moved);
            self.dirty.services.insert(service);
        }
    }
}

#[cfg(test)]
mod tests;

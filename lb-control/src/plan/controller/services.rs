//! What is to be done about a Service: finalizers, status, external IPs.

use std::{net::IpAddr, time::Duration};

use super::{
    Command, Controller, EventTarget,
    conditions::{self, Announced},
    flights::Key,
    index::published,
};
use crate::{
    model::{ObjectRef, Service},
    plan::ipam::Assigned,
};

/// Ours; on every Service that has an address.
pub const FINALIZER: &str = "pointsman.dev/cleanup";
/// What Kubernetes expects of whoever serves Services without a class.
pub const FINALIZER_KUBERNETES: &str = "service.kubernetes.io/load-balancer-cleanup";

/// For how long a node may take to serve an address before the Service says that it waits.
const PATIENCE: Duration = Duration::from_secs(5);
/// With more commands than this on their way, an address that is not served yet waits for the API
/// server and for us, not for its node: to say otherwise would be one more write for each Service.
const BACKLOG: usize = 64;
/// How much longer for each Service that waits: a node takes up one after the other.
const PATIENCE_EACH: Duration = Duration::from_millis(20);
/// And at most, however large the backlog.
const LONGEST_PATIENCE: Duration = Duration::from_secs(60);

/// Since when a Service waits for its addresses to be served.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    first: Duration,
    /// For as long as its node has been what it waits for.
    since: Duration,
}

/// A command and the Events to tell when it is done.
pub(super) type Step = (Command, Vec<Command>);

/// Finalizers that a Service needs and does not have.
pub(super) fn missing(service: &Service) -> Vec<String> {
    let needed = match service.load_balancer_class {
        Some(_) => &[FINALIZER][..],
        None => &[FINALIZER, FINALIZER_KUBERNETES],
    };
    let has = |name: &str| service.api.finalizers.iter().any(|finalizer| finalizer == name);
    needed.iter().filter(|name| !has(name)).map(|name| (*name).to_owned()).collect()
}

/// Finalizers of ours on a Service. Kubernetes' own is ours where our private one is: without, it
/// was another controller that wrote it.
pub(super) fn our_finalizers(service: &Service) -> Vec<String> {
    let finalizers = &service.api.finalizers;
    if !finalizers.iter().any(|finalizer| finalizer == FINALIZER) {
        return Vec::new();
    }
    finalizers.iter().filter(|it| *it == FINALIZER || *it == FINALIZER_KUBERNETES).cloned().collect()
}

/// Whether its ingress is these addresses. Servers before `ipMode` drop that field.
pub(super) fn shows(service: &Service, addresses: &[IpAddr]) -> bool {
    let ingress = &service.api.ingress;
    if addresses.is_empty() {
        return ingress.is_empty() || !service.api.ingress_is_ours;
    }
    ingress.len() == addresses.len()
        && ingress.iter().zip(addresses).all(|(ingress, address)| {
            ingress.ip == Some(*address)
                && ingress.hostname.is_none()
                && ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP")
        })
}

impl Controller {
    /// The next command for a Service, if one is due.
    pub(super) fn service_step(&mut self, object: &ObjectRef, now: Duration) -> Option<Step> {
        let key = Key::Service(object.clone());
        if self.flights.is_busy(&key, now) {
            return None;
        }
        self.counters.steps += 1;
        let Some(service) = self.objects.services.get(object).cloned() else {
            self.waiting.remove(object);
            return None;
        };
        if !self.is_served(&service) {
            self.waiting.remove(object);
            return self.release_step(&service);
        }
        let assigned = self.ipam.as_ref()?.assigned(object)?.clone();
        let missing = missing(&service);
        if !assigned.addresses.is_empty() && !missing.is_empty() {
            let (uid, resource_version) = (service.api.uid.clone(), service.api.resource_version.clone());
            let service = object.clone();
            let add = Command::AddFinalizers { service, uid, resource_version, finalizers: missing };
            return Some((add, Vec::new()));
        }
        self.status_step(&service, &assigned, now)
            .or_else(|| self.external_ips(&service, &self.to_publish(&service, &assigned)))
    }

    /// Whether a Service is to have addresses.
    pub(super) fn is_served(&self, service: &Service) -> bool {
        service.is_ours(self.options.default_class) && !service.api.deleting
    }

    fn status_step(&mut self, service: &Service, assigned: &Assigned, now: Duration) -> Option<Step> {
        let object = &service.object;
        let key = Key::Service(object.clone());
        let ingress = self.to_publish(service, assigned);
        let state = self.announced(service, assigned);
        let old = conditions::present(service);
        let mut new = vec![conditions::allocated(service, assigned)];
        if !matches!(state, Announced::Waiting(_)) {
            self.waiting.remove(object);
        }
        if let Announced::Waiting(_) = &state {
            let (shortest, until) = self.patience(object, now);
            if now < until {
                self.flights.wake(key.clone(), if now < shortest { shortest } else { until });
                let is_told = old.iter().any(|it| it.kind == conditions::ALLOCATED);
                if shows(service, &ingress) && (now < shortest || !is_told) {
                    // A moment later there is more to say. What is wrong is not left standing for long.
                    return None;
                }
                new.extend(old.iter().filter(|it| it.kind == conditions::ANNOUNCED).cloned());
            } else {
                new.push(conditions::announced(service, &state));
            }
        } else if !assigned.addresses.is_empty() {
            new.push(conditions::announced(service, &state));
        }
        new.extend(conditions::unserved_ports(service));
        if shows(service, &ingress) && old == new {
            return None;
        }
        if !ingress.is_empty()
            && let Some(until) = self.rivals.blocked(object, now)
        {
            self.flights.wake(key, until);
            return None;
        }
        let events = conditions::events(service, &old, &new);
        Some((apply(service, ingress, new), events))
    }

    /// Until when it is not said of a Service that it waits for its node: at least, and if nothing more
    /// comes between.
    fn patience(&mut self, service: &ObjectRef, now: Duration) -> (Duration, Duration) {
        let wait = self.waiting.entry(service.clone()).or_insert(Wait { first: now, since: now });
        if self.flights.count() > BACKLOG {
            wait.since = now;
        }
        let Wait { first, since } = *wait;
        let crowd = u32::try_from(self.waiting.len() - 1).unwrap_or(u32::MAX);
        // A backlog may last for as long as the cluster changes.
        let until = since + PATIENCE + PATIENCE_EACH.saturating_mul(crowd);
        (first + PATIENCE, until.min(first + LONGEST_PATIENCE))
    }

    /// What is to stand in the status: all addresses once all are served. Until then what stands
    /// there stays, as far as the Service still has it.
    fn to_publish(&self, service: &Service, assigned: &Assigned) -> Vec<IpAddr> {
        let object = &service.object;
        let all: Vec<IpAddr> = assigned.addresses.iter().map(|(address, _)| *address).collect();
        if all.iter().all(|address| self.is_live(*address, object)) {
            return all;
        }
        published(service)
            .filter(|address| all.contains(address) || self.is_given(*address, object))
            .collect()
    }

    fn announced(&self, service: &Service, assigned: &Assigned) -> Announced {
        let mut nodes = Vec::new();
        let mut waiting = None;
        for (address, _) in &assigned.addresses {
            let node = self.objects.virtual_ips.get(address).and_then(|it| it.node.clone());
            match node {
                Some(node) if self.is_live(*address, &service.object) => nodes.push((*address, node)),
                node => {
                    if let Some(why) = self.index.unplaced.get(address) {
                        return Announced::NoNode(format!("{address}: {why}"));
                    }
                    let node = node.map_or("a node".into(), |node| format!("node {node}"));
                    waiting.get_or_insert(format!(
                        "{address} is to be served by {node}, which has not done so yet"
                    ));
                }
            }
        }
        waiting.map_or(Announced::By(nodes), Announced::Waiting)
    }

    /// Whether the node that an address is given to serves it to a Service.
    fn is_live(&self, address: IpAddr, service: &ObjectRef) -> bool {
        self.objects.virtual_ips.get(&address).is_some_and(|it| {
            let node = it.node.as_deref();
            it.services.contains(service)
                && it.live.contains(service)
                && it.live_node.as_deref() == node
                && node.is_some_and(|node| self.liveness.is_alive(node))
        })
    }

    fn is_given(&self, address: IpAddr, service: &ObjectRef) -> bool {
        self.objects.virtual_ips.get(&address).is_some_and(|it| it.services.contains(service))
    }

    /// A Service that is not, or no longer, to be served: undoes what we did, in reverse.
    fn release_step(&self, service: &Service) -> Option<Step> {
        let object = &service.object;
        let is_held = self.index.named.get(object).any(|address| {
            self.objects.virtual_ips.get(address).is_some_and(|virtual_ip| {
                virtual_ip.services.contains(object) || self.still_live(virtual_ip).any(|it| it == object)
            })
        });
        if is_held || self.flights.is_promised(object) {
            return None;
        }
        if !shows(service, &[]) || !conditions::present(service).is_empty() {
            return Some((apply(service, Vec::new(), Vec::new()), Vec::new()));
        }
        if let Some(step) = self.external_ips(service, &[]) {
            return Some(step);
        }
        let finalizers = our_finalizers(service);
        if finalizers.is_empty() {
            return None;
        }
        let released = Command::Event {
            about: EventTarget::service(object, &service.api.uid),
            warning: false,
            reason: "Released".into(),
            note: "no node serves its addresses any more".into(),
        };
        let remove = Command::RemoveFinalizers {
            service: object.clone(),
            uid: service.api.uid.clone(),
            resource_version: service.api.resource_version.clone(),
            finalizers,
        };
        Some((remove, vec![released]))
    }

    /// Keeps `spec.externalIPs` at what others wrote and, if that is switched on, what is published.
    fn external_ips(&self, service: &Service, addresses: &[IpAddr]) -> Option<Step> {
        let api = &service.api;
        let theirs = api.external_ips.iter().filter(|it| !api.our_external_ips.contains(it));
        let mut all: Vec<String> = theirs.cloned().collect();
        let mut ours = Vec::new();
        if self.options.publish_external_ips {
            let addresses = addresses.iter().map(ToString::to_string);
            ours.extend(addresses.filter(|address| !all.contains(address)));
        }
        all.extend(ours.iter().cloned());
        let is_right = all == api.external_ips && ours == api.our_external_ips;
        let set = Command::SetExternalIps {
            service: service.object.clone(),
            resource_version: api.resource_version.clone(),
            all,
            ours,
        };
        (!is_right).then_some((set, Vec::new()))
    }
}

fn apply(service: &Service, ingress: Vec<IpAddr>, conditions: Vec<crate::model::Condition>) -> Command {
    Command::ApplyServiceStatus {
        service: service.object.clone(),
        uid: service.api.uid.clone(),
        ingress,
        conditions,
    }
}

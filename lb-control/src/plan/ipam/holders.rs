//! Who holds which address, and who may hold it beside them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use super::{Refusal, reason};
use crate::model::{ANNOTATION_SHARING, Few, Labels, ObjectRef, Protocol, Service};

/// What Services must have in common to share an address: the sharing key, which thereby is the
/// consent of both, also across namespaces; and under `externalTrafficPolicy: Local` the endpoints,
/// because only nodes that have endpoints of all of them could announce the address. Endpoints are
/// the same if namespace and selector are; without a selector nobody knows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Consent {
    key: String,
    endpoints: Option<(String, Labels)>,
}

impl Consent {
    /// `None`: the Service shares with nobody.
    pub fn of(service: &Service) -> Option<Self> {
        let key = service.sharing_key.clone().filter(|key| !key.is_empty())?;
        if !service.local_traffic_only {
            return Some(Self { key, endpoints: None });
        }
        let endpoints = (service.object.namespace.clone(), service.selector.clone());
        (!service.selector.is_empty()).then_some(Self { key, endpoints: Some(endpoints) })
    }
}

type Port = (u16, Protocol);

fn ports(service: &Service) -> impl Iterator<Item = Port> {
    service.ports.iter().map(|port| (port.port, port.protocol))
}

/// Whether two Services can hold an address together.
pub(super) fn compatible(one: &Service, other: &Service) -> bool {
    let consent = Consent::of(one);
    consent.is_some()
        && consent == Consent::of(other)
        && !ports(one).any(|port| ports(other).any(|theirs| theirs == port))
}

/// Those who hold one address.
#[derive(Default)]
struct Group {
    /// `None`: nothing is known of it but that it has not let go.
    members: BTreeMap<ObjectRef, Option<Arc<Service>>>,
    ports: BTreeMap<Port, Few<ObjectRef>>,
    /// How many members share with each other, by what they have in common.
    consents: BTreeMap<Consent, usize>,
    /// How many members share with nobody.
    unwilling: usize,
}

impl Group {
    /// The number of members that have this consent.
    fn count(&mut self, consent: Option<Consent>) -> &mut usize {
        match consent {
            Some(consent) => self.consents.entry(consent).or_default(),
            None => &mut self.unwilling,
        }
    }
}

/// Who holds which address.
#[derive(Default)]
pub(super) struct Holders {
    by_address: BTreeMap<IpAddr, Group>,
    by_consent: HashMap<Consent, Shared>,
}

/// Addresses of Services that may share.
#[derive(Default)]
struct Shared {
    addresses: BTreeSet<IpAddr>,
    /// On how many of them a port is taken.
    taken: BTreeMap<Port, usize>,
}

impl Holders {
    /// Adds a holder. It must not hold the address yet.
    pub fn hold(&mut self, address: IpAddr, object: &ObjectRef, service: Option<Arc<Service>>) {
        let group = self.by_address.entry(address).or_default();
        let consent = service.as_deref().and_then(Consent::of);
        for port in service.as_deref().into_iter().flat_map(ports) {
            group.ports.entry(port).or_default().insert(object.clone());
        }
        if let Some(consent) = &consent {
            let shared = self.by_consent.entry(consent.clone()).or_default();
            shared.addresses.insert(address);
            for port in service.as_deref().into_iter().flat_map(ports) {
                *shared.taken.entry(port).or_default() += 1;
            }
        }
        *group.count(consent) += 1;
        group.members.insert(object.clone(), service);
    }

    /// Removes a holder; says whether nobody is left.
    pub fn release(&mut self, address: IpAddr, object: &ObjectRef) -> bool {
        let Some(group) = self.by_address.get_mut(&address) else { return false };
        let Some(service) = group.members.remove(object) else { return false };
        for port in service.as_deref().into_iter().flat_map(ports) {
            if let Some(having) = group.ports.get_mut(&port) {
                having.remove(object);
                if having.is_empty() {
                    group.ports.remove(&port);
                }
            }
        }
        let consent = service.as_deref().and_then(Consent::of);
        let count = group.count(consent.clone());
        *count -= 1;
        let left = *count;
        if let Some(consent) = consent.as_ref().filter(|_| left == 0) {
            group.consents.remove(consent);
        }
        let empty = group.members.is_empty();
        if empty {
            self.by_address.remove(&address);
        }
        if let (Some(consent), Some(service)) = (consent, service) {
            self.leave(&consent, address, &service, left == 0);
        }
        empty
    }

    fn leave(&mut self, consent: &Consent, address: IpAddr, service: &Service, last: bool) {
        let Some(shared) = self.by_consent.get_mut(consent) else { return };
        for port in ports(service) {
            if let Some(count) = shared.taken.get_mut(&port) {
                *count -= 1;
                if *count == 0 {
                    shared.taken.remove(&port);
                }
            }
        }
        if last {
            shared.addresses.remove(&address);
            if shared.addresses.is_empty() {
                self.by_consent.remove(consent);
            }
        }
    }

    /// Whether anybody holds the address.
    pub fn is_held(&self, address: IpAddr) -> bool {
        self.by_address.contains_key(&address)
    }

    /// Addresses from the first to the last that somebody holds, and who.
    pub fn within(
        &self,
        (first, last): (IpAddr, IpAddr),
    ) -> impl Iterator<Item = (IpAddr, impl Iterator<Item = &ObjectRef>)> {
        let held = self.by_address.range(first..=last);
        held.map(|(address, group)| (*address, group.members.keys()))
    }

    /// What one has to have to be let in beside the holders of an address.
    pub fn consent(&self, address: IpAddr) -> Option<&Consent> {
        let group = self.by_address.get(&address)?;
        (group.unwilling == 0 && group.consents.len() == 1).then(|| group.consents.keys().next())?
    }

    /// Addresses of the Services that share with those that have this consent and these ports, as
    /// far as there may be room. None is the answer at once if one of the ports is taken on all.
    pub fn shared_by(&self, consent: &Consent, service: &Service) -> impl Iterator<Item = IpAddr> {
        let shared = self.by_consent.get(consent).filter(|shared| {
            let full = |port| shared.taken.get(&port).is_some_and(|taken| *taken >= shared.addresses.len());
            !ports(service).any(full)
        });
        shared.into_iter().flat_map(|shared| shared.addresses.iter().copied())
    }

    /// Those who hold an address and exclude a Service from it.
    pub fn rivals<'a>(
        &'a self,
        address: IpAddr,
        service: &'a Service,
    ) -> impl Iterator<Item = &'a ObjectRef> {
        let members = self.by_address.get(&address).into_iter().flat_map(|group| &group.members);
        let rivals = members.filter(|(object, other)| {
            **object != service.object && other.as_ref().is_none_or(|other| !compatible(service, other))
        });
        rivals.map(|(object, _)| object)
    }

    /// Why a Service cannot hold an address beside those who do.
    pub fn conflict(&self, address: IpAddr, service: &Service) -> Option<Refusal> {
        let group = self.by_address.get(&address)?;
        let own = group.members.contains_key(&service.object);
        if group.members.len() == usize::from(own) {
            return None;
        }
        let consent = Consent::of(service);
        let same =
            consent.as_ref().and_then(|consent| group.consents.get(consent)).copied().unwrap_or_default();
        if consent.is_none() || same < group.members.len() {
            let others = group.members.iter().filter(|(object, _)| **object != service.object);
            for (object, other) in others {
                match other {
                    // It has not let go; whoever shared with it until now may stay.
                    None if own => {}
                    None => return Some(withdrawing(address, object)),
                    Some(other) if consent.is_none() || Consent::of(other) != consent => {
                        return Some(unwilling(address, service, other));
                    }
                    Some(_) => {}
                }
            }
        }
        ports(service).find_map(|port| {
            let having = group.ports.get(&port)?;
            let other = having.iter().find(|object| **object != service.object)?;
            let (number, protocol) = port;
            Some(Refusal::waiting(
                reason::SHARING_REFUSED,
                format!(
                    "{address} is shared with Service {other}, which has port {number}/{protocol} too; only different ports can share"
                ),
            ))
        })
    }
}

fn withdrawing(address: IpAddr, other: &ObjectRef) -> Refusal {
    Refusal::waiting(
        reason::ADDRESS_IN_USE,
        format!("{address} is being withdrawn from Service {other}; it can be had after that"),
    )
}

fn unwilling(address: IpAddr, service: &Service, other: &Service) -> Refusal {
    let held = format!("{address} is held by Service {}", other.object);
    if service.sharing_key.is_none() || service.sharing_key != other.sharing_key {
        let reason =
            if service.sharing_key.is_some() { reason::SHARING_REFUSED } else { reason::ADDRESS_IN_USE };
        let need = format!("both need the same value of the annotation {ANNOTATION_SHARING} to share it");
        return Refusal::waiting(reason, format!("{held}; {need}"));
    }
    Refusal::waiting(
        reason::SHARING_REFUSED,
        format!(
            "{held}; with externalTrafficPolicy Local, only Services of one namespace that are all Local and have the same selector can share it"
        ),
    )
}

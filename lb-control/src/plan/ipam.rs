//! Which Service has which addresses.
//!
//! Adopts what is in use first, then serves explicit requests, then chooses: pools by priority,
//! then name, the lowest free address. Nothing is ever renumbered unless its own Service asks for
//! something else, and even then it keeps what it has until it can have that.

mod batch;
mod holders;
mod pools;
mod wishes;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

pub use batch::Ipam;
use holders::Holders;
use pools::Pools;
use wishes::{Wish, wish};

use crate::model::{Family, FamilyPolicy, ObjectRef, Pool, Problem, Service};

/// Addresses by Service. Also what an agent finds in the maps after its restart.
pub type Holdings = BTreeMap<ObjectRef, Vec<IpAddr>>;

/// What is decided for all Services alike.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whether Services without a `loadBalancerClass` are ours.
    pub default_class: bool,
    /// Whether a Service may request an address that no pool has. Right where whoever writes
    /// Services also owns the node's addresses, as with files.
    pub outside_pools: bool,
}

/// What became of a Service's wish.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assigned {
    /// Its addresses, IPv4 first unless `ipFamilies` says otherwise, each with its pool if any.
    pub addresses: Vec<(IpAddr, Option<String>)>,
    /// Why there are not more of them, or none.
    pub problems: Vec<Problem>,
    /// Whether waiting may help: an address may become free. Otherwise somebody must act.
    pub can_wait: bool,
}

/// The decision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allocation {
    /// For every Service that is ours.
    pub services: BTreeMap<ObjectRef, Assigned>,
    /// What is wrong with pools.
    pub problems: Vec<Problem>,
}

impl Allocation {
    /// The addresses, as input for the next decision.
    #[must_use]
    pub fn holdings(&self) -> Holdings {
        let some = self.services.iter().filter(|(_, assigned)| !assigned.addresses.is_empty());
        some.map(|(object, assigned)| {
            (object.clone(), assigned.addresses.iter().map(|(address, _)| *address).collect())
        })
        .collect()
    }
}

/// Why a Service does not get what it wishes.
#[derive(Clone, Debug)]
struct Refusal {
    field: Option<String>,
    message: String,
    can_wait: bool,
}

impl Refusal {
    fn fixed(field: &str, message: impl Into<String>) -> Self {
        let field = (!field.is_empty()).then(|| field.to_owned());
        Self { field, message: message.into(), can_wait: false }
    }

    fn waiting(field: &str, message: impl Into<String>) -> Self {
        Self { can_wait: true, ..Self::fixed(field, message) }
    }
}

/// Decides anew.
#[must_use]
pub fn allocate(
    services: &BTreeMap<ObjectRef, Arc<Service>>,
    pools: &BTreeMap<String, Arc<Pool>>,
    current: &Holdings,
    options: Options,
) -> Allocation {
    let (pools, problems) = Pools::new(pools);
    let mut allocator = Allocator { pools, holders: Holders::default(), options };
    let ours: Vec<&Service> =
        services.values().map(Arc::as_ref).filter(|service| service.is_ours(options.default_class)).collect();

    let mut held: BTreeMap<&ObjectRef, Vec<IpAddr>> = BTreeMap::new();
    for service in &ours {
        if let Some(addresses) = current.get(&service.object) {
            let kept = allocator.adopt(service, addresses);
            held.insert(&service.object, kept);
        }
    }
    let mut refusals = BTreeMap::new();
    let (explicit, chosen): (Vec<&Service>, Vec<&Service>) =
        ours.iter().copied().partition(|service| !service.requested_addresses.is_empty());
    // Whoever lets go of an address may thereby make way for somebody who was refused before.
    let mut pending: Vec<&Service> = explicit.into_iter().chain(chosen).collect();
    loop {
        let mut released = false;
        let mut refused = Vec::new();
        for service in pending {
            let before = held.remove(&service.object).unwrap_or_default();
            let (after, refusal) = allocator.settle(service, &before);
            released |= before.iter().any(|address| !after.contains(address));
            held.insert(&service.object, after);
            refusals.remove(&service.object);
            if let Some(refusal) = refusal {
                refusals.insert(&service.object, refusal);
                refused.push(service);
            }
        }
        if !released || refused.is_empty() {
            break;
        }
        allocator.pools.rewind();
        pending = refused;
    }
    let services = ours.into_iter().map(|service| {
        let addresses = held.remove(&service.object).unwrap_or_default();
        (service.object.clone(), allocator.assigned(service, &addresses, refusals.remove(&service.object)))
    });
    Allocation { services: services.collect(), problems }
}

struct Allocator<'a> {
    pools: Pools<'a>,
    holders: Holders<'a>,
    options: Options,
}

impl<'a> Allocator<'a> {
    /// Takes over the addresses that a Service has, as far as nobody before it excludes it.
    fn adopt(&mut self, service: &'a Service, addresses: &[IpAddr]) -> Vec<IpAddr> {
        let mut kept: Vec<IpAddr> = Vec::new();
        for address in addresses {
            let is_second = kept.iter().any(|other| Family::of(*other) == Family::of(*address));
            if !is_second && self.holders.conflict(*address, service).is_none() {
                self.holders.hold(*address, service);
                kept.push(*address);
            }
        }
        kept
    }

    /// Gives a Service what it wishes, or else leaves it what it has.
    fn settle(&mut self, service: &'a Service, before: &[IpAddr]) -> (Vec<IpAddr>, Option<Refusal>) {
        for address in before {
            self.holders.release(*address, service);
        }
        let (after, refusal) = match self.decide(service, before) {
            Ok((addresses, note)) => (addresses, note),
            Err(refusal) => (before.to_vec(), Some(refusal)),
        };
        for address in &after {
            self.holders.hold(*address, service);
        }
        (after, refusal)
    }

    fn decide(
        &mut self,
        service: &Service,
        before: &[IpAddr],
    ) -> Result<(Vec<IpAddr>, Option<Refusal>), Refusal> {
        match wish(service)? {
            Wish::Addresses(addresses) => self.grant(service, &addresses).map(|()| (addresses, None)),
            Wish::Families(families) => self.choose(service, &families, before),
        }
    }

    /// Whether a Service may have the addresses that it requests: all or nothing.
    fn grant(&self, service: &Service, addresses: &[IpAddr]) -> Result<(), Refusal> {
        let field = &service.requested_by;
        for address in addresses {
            if let Some(conflict) = self.holders.conflict(*address, service) {
                return Err(Refusal::waiting(field, conflict));
            }
            let pool = self.pools.of(*address);
            if let Some(wanted) = &service.pool
                && pool.is_none_or(|pool| pool.name != *wanted)
            {
                return Err(Refusal::fixed(
                    field,
                    format!("{address} is not in the pool {wanted} that the Service names"),
                ));
            }
            if pool.is_none() && !self.options.outside_pools {
                return Err(Refusal::fixed(field, format!("{address} is in no AddressPool")));
            }
        }
        Ok(())
    }

    fn choose(
        &mut self,
        service: &Service,
        families: &[Family],
        before: &[IpAddr],
    ) -> Result<(Vec<IpAddr>, Option<Refusal>), Refusal> {
        let eligible = self.pools.eligible(service)?;
        let needed = match service.ip_family_policy {
            FamilyPolicy::SingleStack | FamilyPolicy::PreferDualStack => 1,
            FamilyPolicy::RequireDualStack => 2,
        };
        let at_most = if service.ip_family_policy == FamilyPolicy::SingleStack { 1 } else { 2 };
        // A Service that leaves the family to us keeps the one that it has.
        let mut families = families.to_vec();
        if service.ip_families.is_empty() && at_most == 1 {
            families.sort_by_key(|family| !before.iter().any(|address| Family::of(*address) == *family));
        }
        let mut addresses = Vec::new();
        let mut refusal = None;
        for family in families {
            if addresses.len() == at_most {
                break;
            }
            let kept = before.iter().copied().find(|address| {
                Family::of(*address) == family
                    && self.pools.may_keep(service, *address)
                    && self.holders.conflict(*address, service).is_none()
            });
            match kept.map_or_else(|| self.choose_one(service, family, &eligible), Ok) {
                Ok(address) => addresses.push(address),
                Err(error) => refusal = refusal.or(Some(error)),
            }
        }
        if addresses.len() < needed {
            return Err(
                refusal.unwrap_or_else(|| Refusal::fixed("spec.ipFamilies", "names too few families"))
            );
        }
        if addresses.len() == at_most { Ok((addresses, None)) } else { Ok((addresses, refusal)) }
    }

    fn choose_one(
        &mut self,
        service: &Service,
        family: Family,
        eligible: &[usize],
    ) -> Result<IpAddr, Refusal> {
        if let Some(address) = self.join(service, family, eligible) {
            return Ok(address);
        }
        let mut names = BTreeSet::new();
        for pool in eligible.iter().copied() {
            if !self.pools.get(pool).has_family(family) {
                continue;
            }
            if let Some(address) = self.pools.lowest_free(pool, family, &self.holders) {
                return Ok(address);
            }
            names.insert(self.pools.get(pool).name.as_str());
        }
        let names: Vec<_> = names.into_iter().collect();
        if names.is_empty() {
            let which = match &service.pool {
                Some(pool) => format!("the pool {pool}"),
                None => "no pool that assigns automatically".into(),
            };
            let has = if service.pool.is_some() { "has no" } else { "has" };
            return Err(Refusal::waiting(
                "",
                format!("{which} {has} {family} addresses: add some to an AddressPool"),
            ));
        }
        let names = names.join(", ");
        Err(Refusal::waiting(
            "",
            format!("no free {family} address is left in {names}: enlarge it, or free some"),
        ))
    }

    /// The lowest address, by order of pools, that the Services with the same sharing key have and
    /// that has room for one more.
    fn join(&self, service: &Service, family: Family, eligible: &[usize]) -> Option<IpAddr> {
        let candidates = self.holders.shared_by(service.sharing_key.as_deref()?);
        let candidates = candidates.filter(|address| Family::of(*address) == family);
        let ranked = candidates.filter_map(|address| {
            let rank = eligible.iter().position(|pool| self.pools.get(*pool).contains(address))?;
            self.holders.conflict(address, service).is_none().then_some((rank, address))
        });
        ranked.min().map(|(_, address)| address)
    }

    fn assigned(&self, service: &Service, addresses: &[IpAddr], refusal: Option<Refusal>) -> Assigned {
        let can_wait = refusal.as_ref().is_none_or(|refusal| refusal.can_wait);
        let mut problems = Vec::new();
        if let Some(refusal) = refusal {
            let keeps = match addresses {
                [] => String::new(),
                _ => {
                    let list: Vec<_> = addresses.iter().map(ToString::to_string).collect();
                    format!("; the Service keeps {}", list.join(" and "))
                }
            };
            let mut problem = Problem::error(refusal.message + &keeps).about("Service", &service.object);
            problem.place.clone_from(&service.place);
            problem.field = refusal.field;
            problems.push(problem);
        }
        let addresses = addresses.iter().map(|address| {
            let pool = self.pools.of(*address).map(|pool| pool.name.clone());
            if pool.is_none() && service.requested_addresses.is_empty() {
                let text = format!(
                    "{address} is in no AddressPool any more; it is kept for as long as the Service is there"
                );
                let mut problem = Problem::warning(text).about("Service", &service.object);
                problem.place.clone_from(&service.place);
                problems.push(problem);
            }
            (*address, pool)
        });
        Assigned { addresses: addresses.collect(), problems, can_wait }
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

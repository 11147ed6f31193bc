//! The decision about one Service, given all others.

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    Refusal,
    engine::Ipam,
    holders::Consent,
    pools::Pools,
    reason,
    waiting::Wait,
    wishes::{Wish, wish},
};
use crate::model::{Family, FamilyPolicy, Namespace, Service};

/// Addresses, and why there are not more.
type Decision = Result<(Vec<IpAddr>, Option<Refusal>), Refusal>;

impl Ipam {
    /// What a Service gets that has some addresses now. Changes nothing.
    pub(super) fn decide(&mut self, service: &Service, before: &[IpAddr]) -> Decision {
        match wish(service)? {
            Wish::Addresses(addresses) => {
                self.permit(service, &addresses, before)?;
                for address in &addresses {
                    if let Some(conflict) = self.holders.conflict(*address, service) {
                        let waits = vec![Wait::Address(*address)];
                        return Err(conflict.field(&service.requested_by).until(waits));
                    }
                }
                Ok((addresses, None))
            }
            Wish::Families(families) => self.choose(service, families, before),
        }
    }

    pub(super) fn namespace(&self, service: &Service) -> Option<&Namespace> {
        self.namespaces.get(&service.object.namespace).map(AsRef::as_ref)
    }

    /// Whether pools let a Service have the addresses that it requests, all of them. What it has,
    /// it may keep.
    pub(super) fn permit(
        &self,
        service: &Service,
        addresses: &[IpAddr],
        before: &[IpAddr],
    ) -> Result<(), Refusal> {
        let refuse = |refusal: Refusal| Err(refusal.field(&service.requested_by));
        for address in addresses {
            let pool = self.pools.of(*address).map(|(_, pool)| pool);
            if let Some(wanted) = &service.pool
                && pool.is_none_or(|pool| pool.name != *wanted)
            {
                let text = format!("{address} is not in the pool {wanted} that the Service names");
                return refuse(Refusal::fixed(reason::NOT_IN_POOL, text));
            }
            if before.contains(address) {
                continue;
            }
            let Some(pool) = pool else {
                if self.options.outside_pools {
                    continue;
                }
                let text = match self.pools.set_aside(*address) {
                    Some(pool) => format!("{address} is in {pool}, which is set aside"),
                    None => format!("{address} is in no AddressPool"),
                };
                return refuse(Refusal::fixed(reason::NOT_IN_POOL, text));
            };
            if let Some(why) = Pools::refuses(pool, service, self.namespace(service)) {
                let text = format!("{address} cannot be had: {why}");
                return refuse(Refusal::waiting(reason::POOL_NOT_ALLOWED, text));
            }
        }
        Ok(())
    }

    fn choose(&mut self, service: &Service, mut families: Vec<Family>, before: &[IpAddr]) -> Decision {
        let eligible = self.pools.eligible(service, self.namespace(service))?;
        let (needed, at_most) = match service.ip_family_policy {
            FamilyPolicy::SingleStack => (1, 1),
            FamilyPolicy::PreferDualStack => (1, families.len()),
            FamilyPolicy::RequireDualStack => (2, 2),
        };
        // A Service that leaves the family to us keeps the one that it has.
        if service.ip_families.is_empty() && at_most == 1 {
            families.sort_by_key(|family| !before.iter().any(|address| Family::of(*address) == *family));
        }
        let mut addresses = Vec::new();
        let mut refusal: Option<Refusal> = None;
        for family in families {
            if addresses.len() == at_most {
                break;
            }
            let kept = before.iter().copied().find(|address| {
                Family::of(*address) == family
                    && self.may_keep(service, *address)
                    && self.holders.conflict(*address, service).is_none()
            });
            let published = if before.is_empty() { self.published(service, family) } else { None };
            let one = kept.or(published).map_or_else(|| self.choose_one(service, family, &eligible), Ok);
            match (one, &mut refusal) {
                (Ok(address), _) => addresses.push(address),
                // Whoever needs both waits for one at a time: freeing another wakes it in vain.
                (Err(error), None) if needed == 2 => return Err(error),
                (Err(error), None) => refusal = Some(error),
                (Err(error), Some(first)) => first.waits.extend(error.waits),
            }
        }
        match refusal {
            Some(refusal) if addresses.len() < needed => Err(refusal),
            Some(refusal) if addresses.len() < at_most => Ok((addresses, Some(refusal))),
            _ if addresses.len() < needed => {
                Err(Refusal::fixed(reason::FAMILY_UNAVAILABLE, "names too few families")
                    .field("spec.ipFamilies"))
            }
            _ => Ok((addresses, None)),
        }
    }

    /// Whether a Service may keep an address that it has. One that is in no pool any more is kept,
    /// or in a pool that would not give it today: pools change, Services are not renumbered. One in
    /// another pool than the Service names is not: somebody asked for that pool.
    fn may_keep(&self, service: &Service, address: IpAddr) -> bool {
        match (&service.pool, self.pools.of(address)) {
            (Some(wanted), Some((_, pool))) => pool.name == *wanted,
            _ => true,
        }
    }

    /// An address that stands in the Service's status although nobody remembers why: the Service
    /// gets it again if it could have it today, so that clients find it where it was.
    pub(super) fn published(&self, service: &Service, family: Family) -> Option<IpAddr> {
        let published = service.api.ingress.iter().filter_map(|ingress| ingress.ip);
        let mut published = published.filter(|address| Family::of(*address) == family);
        published.find(|address| {
            self.pools.of(*address).is_some_and(|(_, pool)| {
                self.may_keep(service, *address)
                    && Pools::refuses(pool, service, self.namespace(service)).is_none()
            }) && self.holders.conflict(*address, service).is_none()
        })
    }

    fn choose_one(&mut self, service: &Service, family: Family, keys: &[String]) -> Result<IpAddr, Refusal> {
        let has_family = |key: &&String| self.pools.get(key).is_some_and(|pool| pool.has_family(family));
        let pools: Vec<&String> = keys.iter().filter(has_family).collect();
        let consent = Consent::of(service);
        if let Some(consent) = &consent
            && let Some(address) = self.join(service, consent, family, &pools)
        {
            return Ok(address);
        }
        self.steps += pools.len() as u64;
        if let Some(address) = pools.iter().find_map(|key| self.pools.lowest_free(key, family)) {
            return Ok(address);
        }
        if pools.is_empty() {
            let text = match &service.pool {
                Some(pool) => format!("the pool {pool} has no {family} addresses: add some"),
                None => format!(
                    "no pool that assigns automatically has {family} addresses for this Service: {}",
                    match &self.pools.shut(service, self.namespace(service), family)[..] {
                        [] => "add some to an AddressPool".into(),
                        shut => format!("{}; change that, or add some to another", shut.join(", ")),
                    }
                ),
            };
            return Err(Refusal::waiting(reason::FAMILY_UNAVAILABLE, text));
        }
        let names: BTreeSet<&str> =
            pools.iter().filter_map(|key| Some(self.pools.get(key)?.name.as_str())).collect();
        let names = names.into_iter().collect::<Vec<_>>().join(", ");
        let text = format!("no free {family} address is left in {names}: enlarge it, or free some");
        let waits = pools.into_iter().map(|key| Wait::Free(key.clone(), family));
        let waits = waits.chain(consent.map(Wait::Room)).collect();
        Err(Refusal::waiting(reason::NO_FREE_ADDRESS, text).until(waits))
    }

    /// The lowest address, by order of pools, that Services have who share with this one, and that
    /// has room for one more.
    fn join(
        &mut self,
        service: &Service,
        consent: &Consent,
        family: Family,
        pools: &[&String],
    ) -> Option<IpAddr> {
        let candidates: Vec<IpAddr> = self.holders.shared_by(consent, service).collect();
        self.steps += candidates.len() as u64;
        let ranked = candidates.into_iter().filter(|address| Family::of(*address) == family);
        let ranked = ranked.filter_map(|address| {
            let (owner, _) = self.pools.of(address)?;
            let rank = pools.iter().position(|key| *key == owner)?;
            self.holders.conflict(address, service).is_none().then_some((rank, address))
        });
        ranked.min().map(|(_, address)| address)
    }

    /// Why a Service would not get an address today that it has.
    pub(super) fn drains(&self, service: &Service, address: IpAddr) -> Option<String> {
        let why = match self.pools.of(address) {
            Some((_, pool)) => Pools::refuses(pool, service, self.namespace(service))?,
            None if self.options.outside_pools && service.requested_addresses.contains(&address) => {
                return None;
            }
            None => match self.pools.set_aside(address) {
                Some(pool) => format!("{pool} is set aside"),
                None => format!("{address} is in no AddressPool any more"),
            },
        };
        let what = if why.contains(&address.to_string()) { "it".into() } else { address.to_string() };
        Some(format!("{why}; {what} is kept for as long as the Service is there"))
    }
}

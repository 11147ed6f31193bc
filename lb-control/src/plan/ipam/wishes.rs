//! What a Service asks for.

use std::net::IpAddr;

use super::{Refusal, reason};
use crate::model::{Family, FamilyPolicy, Service};

/// What a Service asks for.
pub(super) enum Wish {
    /// Just these.
    Addresses(Vec<IpAddr>),
    /// An address of each family, the more important one first; the policy says how many.
    Families(Vec<Family>),
}

/// What a Service asks for, if it makes sense.
pub(super) fn wish(service: &Service) -> Result<Wish, Refusal> {
    let requested = &service.requested_addresses;
    let families = families(service);
    if requested.is_empty() {
        return Ok(Wish::Families(families));
    }
    let refuse =
        |text: String| Err(Refusal::fixed(reason::FAMILY_UNAVAILABLE, text).field(&service.requested_by));
    if let Some(address) = requested.iter().find(|address| !families.contains(&Family::of(**address))) {
        let family = families[0];
        return refuse(format!("{address} is not {family}, which spec.ipFamilies asks for"));
    }
    let twice = requested.iter().enumerate().find(|(index, address)| {
        requested[..*index].iter().any(|other| Family::of(*other) == Family::of(**address))
    });
    if let Some((_, address)) = twice {
        return refuse(format!("{address} is the second {} address; one can be had", Family::of(*address)));
    }
    match (service.ip_family_policy, requested.len()) {
        (FamilyPolicy::RequireDualStack, 1) => {
            refuse("needs an IPv4 and an IPv6 address for ipFamilyPolicy RequireDualStack".into())
        }
        (FamilyPolicy::SingleStack, 2) if !service.ip_families.is_empty() => {
            refuse("asks for two families; set ipFamilyPolicy to PreferDualStack".into())
        }
        _ => {
            let mut addresses = requested.clone();
            if !service.ip_families.is_empty() {
                addresses.sort_by_key(|address| families.iter().position(|it| *it == Family::of(*address)));
            }
            Ok(Wish::Addresses(addresses))
        }
    }
}

/// In a cluster the API server fills in `ipFamilies`, and leaves a second family out where the
/// cluster has none. Nobody did so for files: there, any family will do, IPv4 first.
fn families(service: &Service) -> Vec<Family> {
    let first = service.ip_families.first().copied().unwrap_or(Family::V4);
    let filled_in = service.place.is_none() && !service.ip_families.is_empty();
    match service.ip_family_policy {
        FamilyPolicy::SingleStack if !service.ip_families.is_empty() => vec![first],
        FamilyPolicy::PreferDualStack if filled_in => service.ip_families.clone(),
        _ => vec![first, first.other()],
    }
}

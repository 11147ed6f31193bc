//! What a Service asks for.

use std::net::IpAddr;

use super::Refusal;
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
    if requested.is_empty() {
        return Ok(Wish::Families(families(service)));
    }
    let field = &service.requested_by;
    if let Some(address) = requested.iter().find(|address| {
        !service.ip_families.is_empty()
            && service.ip_family_policy == FamilyPolicy::SingleStack
            && !service.ip_families.contains(&Family::of(**address))
    }) {
        let family = service.ip_families[0];
        return Err(Refusal::fixed(
            field,
            format!("{address} is not {family}, which spec.ipFamilies asks for"),
        ));
    }
    match (service.ip_family_policy, requested.len()) {
        (FamilyPolicy::RequireDualStack, 1) => Err(Refusal::fixed(
            field,
            "needs an IPv4 and an IPv6 address for ipFamilyPolicy RequireDualStack",
        )),
        (FamilyPolicy::SingleStack, 2) if !service.ip_families.is_empty() => {
            Err(Refusal::fixed(field, "asks for two families; set ipFamilyPolicy to PreferDualStack"))
        }
        _ => Ok(Wish::Addresses(requested.clone())),
    }
}

/// In a cluster the API server fills in `ipFamilies`. Where it did not, any family will do, IPv4
/// first.
fn families(service: &Service) -> Vec<Family> {
    let first = service.ip_families.first().copied().unwrap_or(Family::V4);
    match service.ip_family_policy {
        FamilyPolicy::SingleStack if !service.ip_families.is_empty() => vec![first],
        _ => vec![first, first.other()],
    }
}

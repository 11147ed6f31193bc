//! Pools, advertisements and VirtualIPs, from the API's types to ours.

use std::{net::IpAddr, str::FromStr};

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement, ObjectMeta};

use super::convert::{Errors, FieldError, object_ref};
use crate::{
    crd::{
        self, AddressPool, ServiceName,
        metallb::{BgpAdvertisement, IpAddressPool, L2Advertisement},
    },
    model::{
        AddressRange, Advertisement, Few, ObjectRef, Operator, Place, Pool, PoolOrigin, Requirement,
        Selector, VirtualIp,
    },
};

/// An address pool.
///
/// # Errors
/// Every field that cannot be taken as it is.
pub fn address_pool(from: &AddressPool, place: Option<Place>) -> Result<Pool, Vec<FieldError>> {
    let mut errors = Errors::default();
    let spec = &from.spec;
    let pool = Pool {
        name: name(&from.metadata, &mut errors),
        place,
        uid: from.metadata.uid.clone().unwrap_or_default(),
        ranges: ranges(&spec.addresses, AddressRange::from_str, &mut errors),
        auto_assign: spec.auto_assign,
        avoid_buggy_ips: spec.avoid_buggy_ips,
        priority: spec.priority,
        origin: PoolOrigin::Pointsman,
        labels: from.metadata.labels.clone().unwrap_or_default(),
        namespaces: spec.namespaces.clone(),
        namespace_selectors: selectors("spec.namespaceSelectors", &spec.namespace_selectors, &mut errors),
        service_selectors: selectors("spec.serviceSelectors", &spec.service_selectors, &mut errors),
        disabled: spec.disabled,
    };
    errors.finish(pool)
}

/// A pool of MetalLB.
///
/// # Errors
/// Every field that cannot be taken as it is.
pub fn metallb_pool(from: &IpAddressPool) -> Result<Pool, Vec<FieldError>> {
    let mut errors = Errors::default();
    let spec = &from.spec;
    let allocation = spec.service_allocation.clone().unwrap_or_default();
    let at = |field: &str| format!("spec.serviceAllocation.{field}");
    let pool = Pool {
        name: name(&from.metadata, &mut errors),
        place: None,
        uid: from.metadata.uid.clone().unwrap_or_default(),
        ranges: ranges(&spec.addresses, metallb_range, &mut errors),
        auto_assign: spec.auto_assign.unwrap_or(true),
        avoid_buggy_ips: spec.avoid_buggy_ips,
        priority: metallb_priority(spec.service_allocation.as_ref().map(|allocation| allocation.priority)),
        origin: PoolOrigin::MetalLb(from.metadata.namespace.clone().unwrap_or_default()),
        labels: from.metadata.labels.clone().unwrap_or_default(),
        namespaces: allocation.namespaces,
        namespace_selectors: selectors(
            &at("namespaceSelectors"),
            &allocation.namespace_selectors,
            &mut errors,
        ),
        service_selectors: selectors(&at("serviceSelectors"), &allocation.service_selectors, &mut errors),
        disabled: false,
    };
    errors.finish(pool)
}

/// MetalLB's order as one number (its `sortPools` and `Allocate`): pools with a `serviceAllocation`
/// come before those without; among them lower priorities first, and 0, which is none, last.
fn metallb_priority(priority: Option<i64>) -> i32 {
    match priority {
        None => i32::MAX,
        Some(0) => i32::MAX - 1,
        Some(priority) => i32::try_from(priority.min(i64::from(i32::MAX - 2))).unwrap_or(i32::MIN),
    }
}

/// A range as MetalLB's `ParseCIDR` takes it, which drops host bits.
fn metallb_range(text: &str) -> Result<AddressRange, crate::model::BadRange> {
    let is_strict = text.split('/').next().is_some_and(|address| address.trim().parse::<IpAddr>().is_ok());
    match text.trim().parse::<IpNet>() {
        Ok(net) if is_strict => net.trunc().to_string().parse(),
        _ => text.parse(),
    }
}

/// An advertisement of MetalLB by ARP and NDP.
///
/// # Errors
/// Every field that cannot be taken as it is.
pub fn l2_advertisement(from: &L2Advertisement) -> Result<Advertisement, Vec<FieldError>> {
    let mut errors = Errors::default();
    let spec = &from.spec;
    if !spec.service_selectors.is_empty() {
        // Announcing more than was asked for would be worse than announcing nothing.
        errors.add(
            "spec.serviceSelectors",
            "is not supported: select pools, and say in the pools whom they serve",
        );
    }
    let advertisement = Advertisement {
        object: object_ref(&from.metadata),
        pools: spec.ip_address_pools.clone(),
        pool_selectors: selectors(
            "spec.ipAddressPoolSelectors",
            &spec.ip_address_pool_selectors,
            &mut errors,
        ),
        node_selectors: selectors("spec.nodeSelectors", &spec.node_selectors, &mut errors),
        interfaces: spec.interfaces.clone(),
    };
    errors.finish(advertisement)
}

/// An advertisement of MetalLB by BGP: which pools and nodes it is about.
///
/// # Errors
/// Every field that cannot be taken as it is.
pub fn bgp_advertisement(from: &BgpAdvertisement) -> Result<Advertisement, Vec<FieldError>> {
    let mut errors = Errors::default();
    let spec = &from.spec;
    let advertisement = Advertisement {
        object: object_ref(&from.metadata),
        pools: spec.ip_address_pools.clone(),
        pool_selectors: selectors(
            "spec.ipAddressPoolSelectors",
            &spec.ip_address_pool_selectors,
            &mut errors,
        ),
        node_selectors: selectors("spec.nodeSelectors", &spec.node_selectors, &mut errors),
        interfaces: Vec::new(),
    };
    errors.finish(advertisement)
}

/// A VirtualIP.
///
/// # Errors
/// When its name and its address do not agree.
pub fn virtual_ip(from: &crd::VirtualIp) -> Result<VirtualIp, Vec<FieldError>> {
    let mut errors = Errors::default();
    let address = match from.address() {
        Ok(address) => address,
        Err(message) => {
            errors.add("metadata.name", message);
            return Err(errors.0);
        }
    };
    let names = |services: &[ServiceName]| services.iter().map(ObjectRef::from).collect::<Few<_>>();
    let status = from.status.clone().unwrap_or_default();
    errors.finish(VirtualIp {
        address,
        pool: from.spec.pool.clone(),
        services: names(&from.spec.services),
        node: from.spec.node.clone(),
        live_node: status.node,
        live: names(&status.services),
        uid: from.metadata.uid.clone().unwrap_or_default(),
        resource_version: from.metadata.resource_version.clone().unwrap_or_default(),
        deleting: from.metadata.deletion_timestamp.is_some(),
    })
}

fn name(metadata: &ObjectMeta, errors: &mut Errors) -> String {
    let name = metadata.name.clone().unwrap_or_default();
    if name.is_empty() {
        errors.add("metadata.name", "is missing");
    }
    name
}

fn ranges<E: ToString>(
    texts: &[String],
    parse: impl Fn(&str) -> Result<AddressRange, E>,
    errors: &mut Errors,
) -> Vec<AddressRange> {
    if texts.is_empty() {
        errors.add("spec.addresses", "is empty: a pool needs at least one address");
    }
    let mut ranges: Vec<AddressRange> = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        let field = format!("spec.addresses[{index}]");
        match parse(text) {
            Err(error) => errors.add(field, error.to_string()),
            Ok(range) => {
                if let Some(other) = ranges.iter().find(|other| other.overlaps(&range)) {
                    errors.add(field, format!("`{text}` overlaps {other} of the same pool"));
                }
                ranges.push(range);
            }
        }
    }
    ranges
}

/// Label selectors, with the checks of apimachinery's `LabelSelectorAsSelector`.
fn selectors(field: &str, from: &[LabelSelector], errors: &mut Errors) -> Vec<Selector> {
    let selectors = from.iter().enumerate().map(|(index, selector)| Selector {
        labels: selector.match_labels.clone().unwrap_or_default(),
        requirements: (selector.match_expressions.iter().flatten().enumerate())
            .filter_map(|(number, requirement)| {
                requirement_of(&format!("{field}[{index}].matchExpressions[{number}]"), requirement, errors)
            })
            .collect(),
    });
    selectors.collect()
}

fn requirement_of(field: &str, from: &LabelSelectorRequirement, errors: &mut Errors) -> Option<Requirement> {
    let values = from.values.clone().unwrap_or_default();
    let operator = match (from.operator.as_str(), values.is_empty()) {
        ("In", false) => Operator::In(values),
        ("NotIn", false) => Operator::NotIn(values),
        ("Exists", true) => Operator::Exists,
        ("DoesNotExist", true) => Operator::DoesNotExist,
        ("In" | "NotIn", true) => {
            errors.add(format!("{field}.values"), format!("must not be empty for {}", from.operator));
            return None;
        }
        ("Exists" | "DoesNotExist", false) => {
            errors.add(format!("{field}.values"), format!("must be empty for {}", from.operator));
            return None;
        }
        (other, _) => {
            errors.add(
                format!("{field}.operator"),
                format!("`{other}` is none of In, NotIn, Exists, DoesNotExist"),
            );
            return None;
        }
    };
    Some(Requirement { key: from.key.clone(), operator })
}

#[cfg(test)]
mod tests;

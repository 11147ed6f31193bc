//! A Service, its EndpointSlices and its addresses to entries of the data plane.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use super::ipam::Assigned;
use crate::model::{
    BackendReport, Backends, DesiredBackend, DesiredEntry, EndpointSlice, Family, PortReport, Problem,
    Protocol, Role, Service, ServiceKey, ServicePort, ServiceReport, ServiceState, VipReport,
};

/// What the data plane has to do for a Service, and what people are told about it. `slices` are
/// all of the Service's.
#[must_use]
pub fn resolve(
    service: &Service,
    slices: &[&EndpointSlice],
    assigned: &Assigned,
) -> (Vec<(ServiceKey, DesiredEntry)>, ServiceReport) {
    let mut problems = assigned.problems.clone();
    let refused = refuse(service, &mut problems);
    let mut entries = Vec::new();
    let mut ports = Vec::new();
    for port in &service.ports {
        let mut report = PortReport {
            name: port.name.clone(),
            protocol: port.protocol,
            port: port.port,
            backends: Vec::new(),
        };
        if port.protocol != Protocol::Sctp && !refused {
            for (vip, _) in &assigned.addresses {
                let backends = backends(service, port, slices, Family::of(*vip));
                report.backends.extend(backends.iter().map(|(address, backend)| BackendReport {
                    address: *address,
                    role: backend.role,
                    weight: backend.weight,
                }));
                entries.push((
                    key(service, port, *vip),
                    DesiredEntry { port_name: port.name.clone(), backends },
                ));
            }
            warn_of_missing_port(service, port, slices, &mut problems);
        }
        ports.push(report);
    }
    let served = service.ports.iter().any(|port| port.protocol != Protocol::Sctp) && !refused;
    let state = if !served {
        ServiceState::Failed
    } else if assigned.addresses.is_empty() {
        if assigned.can_wait { ServiceState::Pending } else { ServiceState::Failed }
    } else if entries.iter().all(|(_, entry)| takes_nothing(&entry.backends)) {
        ServiceState::NoBackends
    } else {
        ServiceState::Active
    };
    let vips = assigned.addresses.iter();
    let vips = vips.map(|(address, pool)| VipReport { address: *address, pool: pool.clone() }).collect();
    (entries, ServiceReport { object: service.object.clone(), state, vips, ports, problems })
}

fn takes_nothing(backends: &Backends) -> bool {
    !backends.values().any(|backend| backend.role == Role::Active)
}

fn key(service: &Service, port: &ServicePort, vip: IpAddr) -> ServiceKey {
    ServiceKey { service: service.object.clone(), protocol: port.protocol, vip, port: port.port }
}

/// Says what of the Service is not done. True if it must not be served at all.
fn refuse(service: &Service, problems: &mut Vec<Problem>) -> bool {
    let mut say = |problem: Problem, field: &str| {
        let mut problem = problem.about("Service", &service.object).field(field);
        problem.place.clone_from(&service.place);
        problems.push(problem);
    };
    for (index, port) in service.ports.iter().enumerate() {
        if port.protocol == Protocol::Sctp {
            let text = format!("SCTP is not supported: port {} is not served; use TCP or UDP", port.port);
            say(Problem::error(text), &format!("spec.ports[{index}].protocol"));
        }
    }
    if service.ports.is_empty() {
        say(Problem::error("is empty: there is nothing to serve"), "spec.ports");
    }
    if service.local_traffic_only {
        let text =
            "Local is not supported yet: served as Cluster, and backends do not see the client's address";
        say(Problem::warning(text), "spec.externalTrafficPolicy");
    }
    if service.client_ip_affinity {
        let text = "ClientIP is not supported yet: connections go to all backends in turn";
        say(Problem::warning(text), "spec.sessionAffinity");
    }
    if !service.source_ranges.is_empty() {
        // To serve it all the same would open to everybody what somebody wanted closed.
        let text =
            "is not supported yet: the Service is not served rather than open to all; remove it to open it";
        say(Problem::error(text), "spec.loadBalancerSourceRanges");
    }
    !service.source_ranges.is_empty() || service.ports.is_empty()
}

/// What all slices together say about an endpoint.
#[derive(Default)]
struct Merged {
    ready: bool,
    serving_while_terminating: bool,
}

/// The backends of a port in one family.
///
/// Ready endpoints take new connections; only if there is none, those that terminate but still
/// serve (KEP-1669). All others that are listed keep what they have: an endpoint that is not ready
/// for more is no reason to cut what runs.
fn backends(service: &Service, port: &ServicePort, slices: &[&EndpointSlice], family: Family) -> Backends {
    let mut merged: BTreeMap<SocketAddr, Merged> = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.family == Some(family)) {
        for number in numbers(slice, port) {
            for endpoint in &slice.endpoints {
                let merged = merged.entry(SocketAddr::new(endpoint.address, number)).or_default();
                merged.ready |= endpoint.ready || service.publish_not_ready_addresses;
                merged.serving_while_terminating |= endpoint.serving && endpoint.terminating;
            }
        }
    }
    let any_ready = merged.values().any(|endpoint| endpoint.ready);
    let role = |endpoint: &Merged| {
        let is_active = if any_ready { endpoint.ready } else { endpoint.serving_while_terminating };
        if is_active { Role::Active } else { Role::Terminating }
    };
    merged
        .iter()
        .map(|(address, endpoint)| {
            (*address, DesiredBackend { weight: 1, role: role(endpoint), local: false })
        })
        .collect()
}

/// The numbers that a Service's port has in a slice. Named target ports are resolved by whoever
/// wrote the slice: it has the Service port's name, and the number may differ from slice to slice.
fn numbers(slice: &EndpointSlice, port: &ServicePort) -> impl Iterator<Item = u16> {
    let matches =
        |other: &&crate::model::EndpointPort| other.name == port.name && other.protocol == port.protocol;
    slice.ports.iter().filter(matches).map(|port| port.port)
}

fn warn_of_missing_port(
    service: &Service,
    port: &ServicePort,
    slices: &[&EndpointSlice],
    problems: &mut Vec<Problem>,
) {
    let has_endpoints = slices.iter().any(|slice| !slice.endpoints.is_empty());
    if !has_endpoints || slices.iter().any(|slice| numbers(slice, port).next().is_some()) {
        return;
    }
    let name = if port.name.is_empty() { "without a name".into() } else { format!("named {}", port.name) };
    let text = format!(
        "no EndpointSlice of the Service has a {} port {name}: port {} has no backends",
        port.protocol, port.port
    );
    let mut problem = Problem::warning(text).about("Service", &service.object);
    problem.place.clone_from(&service.place);
    problems.push(problem);
}

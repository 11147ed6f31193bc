//! A Service, its EndpointSlices and its addresses to entries of the data plane.

mod backends;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::ipam::Assigned;
use crate::model::{
    ANNOTATION_CLIENT_ADDRESS, ANNOTATION_HEALTH_CHECK, BackendHealth, BackendReport, Backends, CheckTarget,
    ClientAddress, DesiredEntry, EndpointSlice, Family, HealthReport, PortReport, Problem, Protocol, Role,
    Service, ServiceKey, ServicePort, ServiceReport, ServiceState, VipReport,
};

use backends::Found;
pub use backends::{Here, Unhealthy};

/// What is decided about a Service.
#[derive(Debug)]
pub struct Resolved {
    /// For the data plane.
    pub entries: Vec<(ServiceKey, DesiredEntry)>,
    /// For people.
    pub report: ServiceReport,
    /// Who is to be asked whether he works.
    pub targets: BTreeSet<CheckTarget>,
}

/// What the data plane has to do for a Service, and what people are told about it. `slices` are
/// all of the Service's. `unhealthy` gives, for an address that this node asks its backends for, which
/// targets fail: another node's are not asked here.
#[must_use]
pub fn resolve<'a>(
    service: &Service,
    slices: &[&EndpointSlice],
    assigned: &Assigned,
    here: &Here<'_>,
    unhealthy: impl Fn(&IpAddr) -> Option<&'a Unhealthy>,
) -> Resolved {
    let mut problems = assigned.problems.clone();
    report_limits(service, &mut problems);
    let mut entries = Vec::new();
    let mut ports = Vec::new();
    let mut health = Health::default();
    for port in &service.ports {
        let mut report = PortReport {
            name: port.name.clone(),
            protocol: port.protocol,
            port: port.port,
            backends: Vec::new(),
        };
        if port.protocol != Protocol::Sctp {
            let mut asked = Health::default();
            for (vip, _) in &assigned.addresses {
                let unhealthy = unhealthy(vip);
                let Found { backends, targets } =
                    backends::backends(service, port, slices, Family::of(*vip), here, unhealthy);
                report.backends.extend(reports(&backends, &targets, unhealthy));
                asked.add(targets.into_values(), unhealthy);
                let entry = DesiredEntry {
                    port_name: port.name.clone(),
                    backends,
                    source_ranges: Arc::clone(&service.source_ranges),
                    affinity: service.affinity_seconds,
                    connection_limit: service.connection_limit,
                    scheduler: service.scheduler,
                    slow_start: service.slow_start,
                    client_address: client_address(service, port),
                };
                entries.push((key(service, port, *vip), entry));
            }
            warn_of_missing_port(service, port, slices, &mut problems);
            asked.warn_if_all_fail(service, port, &mut problems);
            health.targets.append(&mut asked.targets);
        }
        ports.push(report);
    }
    let served = service.ports.iter().any(|port| port.protocol != Protocol::Sctp);
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
    let (targets, health) = health.finish(service);
    let report = ServiceReport { object: service.object.clone(), state, vips, ports, health, problems };
    Resolved { entries, report, targets }
}

fn reports(
    backends: &Backends,
    targets: &BTreeMap<SocketAddr, CheckTarget>,
    unhealthy: Option<&Unhealthy>,
) -> impl Iterator<Item = BackendReport> {
    backends.iter().map(move |(address, backend)| BackendReport {
        address: *address,
        role: backend.role,
        weight: backend.weight,
        health: targets.get(address).map(|target| {
            let why = unhealthy.and_then(|unhealthy| unhealthy.get(target));
            why.map_or(BackendHealth::Healthy, |why| BackendHealth::Unhealthy(why.to_string()))
        }),
    })
}

/// What is known of those who are asked.
#[derive(Default)]
struct Health {
    targets: BTreeMap<CheckTarget, Option<Arc<str>>>,
}

impl Health {
    fn add(&mut self, targets: impl Iterator<Item = CheckTarget>, unhealthy: Option<&Unhealthy>) {
        self.targets.extend(targets.map(|target| {
            let why = unhealthy.and_then(|unhealthy| unhealthy.get(&target)).cloned();
            (target, why)
        }));
    }

    fn warn_if_all_fail(&self, service: &Service, port: &ServicePort, problems: &mut Vec<Problem>) {
        let Some(Some(why)) = self.targets.values().next() else { return };
        if self.targets.values().any(Option::is_none) {
            return;
        }
        let text = format!(
            "fails for all backends of port {}, which take connections all the same: {why}",
            port.port
        );
        problems.push(about(service, Problem::warning(text), &health_check_field()));
    }

    fn finish(self, service: &Service) -> (BTreeSet<CheckTarget>, Option<HealthReport>) {
        let Some(check) = &service.backend_check else { return (BTreeSet::new(), None) };
        let unhealthy = self.targets.values().flatten().count();
        let healthy = self.targets.len() - unhealthy;
        let report = HealthReport { check: check.to_string(), healthy, unhealthy };
        (self.targets.into_keys().collect(), Some(report))
    }
}

fn health_check_field() -> String {
    format!("metadata.annotations[{ANNOTATION_HEALTH_CHECK}]")
}

fn about(service: &Service, problem: Problem, field: &str) -> Problem {
    let mut problem = problem.about("Service", &service.object).field(field);
    problem.place.clone_from(&service.place);
    problem
}

/// The headers of the PROXY protocol go ahead of a stream; datagrams have none.
fn client_address(service: &Service, port: &ServicePort) -> ClientAddress {
    match (service.client_address, port.protocol) {
        (ClientAddress::ProxyV1 | ClientAddress::ProxyV2, Protocol::Udp) => ClientAddress::Path,
        (asked, _) => asked,
    }
}

fn takes_nothing(backends: &Backends) -> bool {
    !backends.values().any(|backend| backend.role == Role::Active)
}

fn key(service: &Service, port: &ServicePort, vip: IpAddr) -> ServiceKey {
    ServiceKey { service: service.object.clone(), protocol: port.protocol, vip, port: port.port }
}

/// Says what of the Service is not done.
fn report_limits(service: &Service, problems: &mut Vec<Problem>) {
    let mut say = |problem: Problem, field: &str| problems.push(about(service, problem, field));
    for (index, port) in service.ports.iter().enumerate() {
        if port.protocol == Protocol::Sctp {
            let text = format!("SCTP is not supported: port {} is not served; use TCP or UDP", port.port);
            say(Problem::error(text), &format!("spec.ports[{index}].protocol"));
        }
    }
    let is_told = matches!(service.client_address, ClientAddress::ProxyV1 | ClientAddress::ProxyV2);
    if is_told && service.ports.iter().any(|port| port.protocol == Protocol::Udp) {
        let text = format!(
            "{} is for TCP: backends of UDP ports are not told who the client is",
            service.client_address
        );
        say(Problem::warning(text), &format!("metadata.annotations[{ANNOTATION_CLIENT_ADDRESS}]"));
    }
    let unasked = service.backend_check.as_ref().filter(|check| check.port.is_none());
    if let Some(port) = unasked.and_then(|_| service.ports.iter().find(|it| it.protocol == Protocol::Udp)) {
        let text = format!(
            "whether a UDP port works cannot be asked there: backends of port {} are not checked; name a TCP \
             port of theirs with port=",
            port.port
        );
        say(Problem::warning(text), &health_check_field());
    }
    if service.ports.is_empty() {
        say(Problem::error("is empty: there is nothing to serve"), "spec.ports");
    }
}

fn warn_of_missing_port(
    service: &Service,
    port: &ServicePort,
    slices: &[&EndpointSlice],
    problems: &mut Vec<Problem>,
) {
    let has_endpoints = slices.iter().any(|slice| !slice.endpoints.is_empty());
    if !has_endpoints || slices.iter().any(|slice| backends::numbers(slice, port).next().is_some()) {
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

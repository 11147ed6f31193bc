//! What the agent knows, laid over what the maps tell.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::model::{
    BackendHealth, BackendReport, HealthReport, PortReport, Problem, Role, ServiceReport,
    ServiceState as Reported,
};
use crate::view::{BackendView, HealthView, PortView, ServedBy, ServiceState, ServiceView, TrafficView};

/// Services by namespace and name: state, addresses, pool and problems as the agent reports them;
/// indices, next hops and counters as the maps have them (`entries`, from
/// [`service_views`](super::service_views)). What only the maps have is about to go; what only the
/// agent has is not in the datapath yet.
#[must_use]
pub fn overlay(reports: &[ServiceReport], entries: Vec<ServiceView>) -> Vec<ServiceView> {
    let mut all: BTreeMap<(String, String), ServiceView> = entries
        .into_iter()
        .map(|view| {
            (
                (view.namespace.clone(), view.name.clone()),
                ServiceView { state: ServiceState::Draining, ..view },
            )
        })
        .collect();
    for report in reports {
        let key = (report.object.namespace.clone(), report.object.name.clone());
        let entries = all.remove(&key).map(|view| view.ports).unwrap_or_default();
        all.insert(key, service(report, entries));
    }
    all.into_values().collect()
}

fn service(report: &ServiceReport, mut entries: Vec<PortView>) -> ServiceView {
    let mut ports = Vec::new();
    for vip in &report.vips {
        for port in &report.ports {
            ports.push(self::port(port, vip.address, &mut entries));
        }
    }
    // Ports and addresses that the Service had.
    ports.append(&mut entries);
    let mut pools: Vec<&str> = report.vips.iter().filter_map(|vip| vip.pool.as_deref()).collect();
    pools.sort_unstable();
    pools.dedup();
    ServiceView {
        namespace: report.object.namespace.clone(),
        name: report.object.name.clone(),
        state: match report.state {
            Reported::Pending => ServiceState::Pending,
            Reported::Active => ServiceState::Active,
            Reported::NoBackends => ServiceState::NoBackends,
            Reported::Failed => ServiceState::Failed,
        },
        vips: report.vips.iter().map(|vip| vip.address).collect(),
        pool: (!pools.is_empty()).then(|| pools.join(",")),
        health: report.health.as_ref().map(health),
        ports,
        problems: report.problems.iter().map(sentence).collect(),
    }
}

fn health(report: &HealthReport) -> HealthView {
    HealthView {
        check: report.check.clone(),
        healthy: report.healthy as u64,
        unhealthy: report.unhealthy as u64,
    }
}

/// A problem without the name of the Service that it is shown with.
fn sentence(problem: &Problem) -> String {
    Problem { object: None, ..problem.clone() }.to_string()
}

/// A port of a VIP; takes its entry out of `entries`.
fn port(report: &PortReport, vip: IpAddr, entries: &mut Vec<PortView>) -> PortView {
    let protocol = report.protocol.to_string();
    let found = entries
        .iter()
        .position(|entry| entry.vip == vip && entry.port == report.port && entry.protocol == protocol);
    let mut view = found.map(|at| entries.remove(at)).unwrap_or_else(|| PortView {
        name: String::new(),
        protocol,
        vip,
        port: report.port,
        served_by: ServedBy::default(),
        service_index: None,
        source_ranges: None,
        affinity_seconds: None,
        connection_limit: None,
        scheduler: String::new(),
        backends: Vec::new(),
        counters: TrafficView::default(),
    });
    report.name.clone_into(&mut view.name);
    // A backend of the other family cannot serve this VIP.
    for backend in report.backends.iter().filter(|backend| backend.address.is_ipv4() == vip.is_ipv4()) {
        let socket = (backend.address.ip(), backend.address.port());
        let known = view.backends.iter().position(|known| (known.address, known.port) == socket);
        let at = known.unwrap_or_else(|| {
            view.backends.push(backend_view(backend));
            view.backends.len() - 1
        });
        if let Some(why) = backend.health.as_ref().and_then(BackendHealth::failure) {
            let view = &mut view.backends[at];
            UNHEALTHY.clone_into(&mut view.state);
            view.reason = Some(why.to_owned());
        }
    }
    view.backends.sort_by_key(|backend| (backend.address, backend.port));
    view
}

/// The state of a backend whose health check fails, whatever the maps have it do: if all fail, all take
/// connections.
const UNHEALTHY: &str = "unhealthy";

/// A backend that is not in the datapath yet.
fn backend_view(report: &BackendReport) -> BackendView {
    BackendView {
        address: report.address.ip(),
        port: report.address.port(),
        state: match report.role {
            Role::Active => "active",
            Role::Terminating => "terminating",
        }
        .to_owned(),
        reason: None,
        weight: report.weight,
        backend_index: None,
        next_hop_resolved: false,
        next_hop: String::new(),
        counters: TrafficView::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::testing::{backend, maps_with, service as entry};
    use crate::inspect::{Traffic, service_views};
    use crate::model::{ObjectRef, Protocol, VipReport};

    fn report(name: &str, vips: &[&str], backends: &[&str]) -> ServiceReport {
        let vip = |address: &&str| VipReport { address: address.parse().unwrap(), pool: Some("edge".into()) };
        let backend = |socket: &&str| BackendReport {
            address: socket.parse().unwrap(),
            role: Role::Active,
            weight: 1,
            health: None,
        };
        ServiceReport {
            object: ObjectRef::new("default", name),
            state: Reported::Active,
            vips: vips.iter().map(vip).collect(),
            ports: vec![PortReport {
                name: "web".into(),
                protocol: Protocol::Tcp,
                port: 80,
                backends: backends.iter().map(backend).collect(),
            }],
            health: None,
            problems: vec![
                Problem::warning("too many names").about("Service", &ObjectRef::new("default", name)),
            ],
        }
    }

    fn entries() -> Vec<ServiceView> {
        let mut ops = entry(1, "default/web", "192.0.2.10:80", Some(1));
        ops.extend(entry(2, "default/web", "192.0.2.10:443", None));
        ops.extend(entry(3, "default/gone", "192.0.2.11:80", Some(1)));
        ops.extend(backend(4, 1, "10.0.0.2:8080", |_| ()));
        service_views(&maps_with(&ops), &Traffic::default(), &|_| None).unwrap()
    }

    #[test]
    fn the_agent_tells_what_maps_do_not() {
        let both = ["10.0.0.2:8080", "10.0.0.1:8080", "[2001:db8::2]:8080"];
        let views = overlay(&[report("web", &["192.0.2.10"], &both)], entries());
        let [gone, web] = &views[..] else { panic!("{views:#?}") };
        assert_eq!((gone.name.as_str(), gone.state), ("gone", ServiceState::Draining));
        assert_eq!((web.state, web.pool.as_deref()), (ServiceState::Active, Some("edge")));
        assert_eq!(web.problems, ["too many names"]);
        let indices: Vec<_> = web.ports.iter().map(|port| (port.port, port.service_index)).collect();
        assert_eq!(indices, [(80, Some(1)), (443, Some(2))]);
        let backends: Vec<_> =
            web.ports[0].backends.iter().map(|b| (b.address.to_string(), b.backend_index)).collect();
        assert_eq!(backends, [("10.0.0.1".into(), None), ("10.0.0.2".into(), Some(4))]);
        assert_eq!(web.ports[0].name, "web");
    }

    #[test]
    fn who_fails_is_unhealthy_whatever_the_maps_have() {
        let mut report = report("web", &["192.0.2.10"], &["10.0.0.1:8080", "10.0.0.2:8080"]);
        report.ports[0].backends[0].health = Some(BackendHealth::Healthy);
        report.ports[0].backends[1].health = Some(BackendHealth::Unhealthy("HTTP 503".into()));
        report.health = Some(HealthReport { check: "tcp".into(), healthy: 1, unhealthy: 1 });
        let views = overlay(&[report], entries());
        let web = views.iter().find(|view| view.name == "web").unwrap();
        assert_eq!(web.health, Some(HealthView { check: "tcp".into(), healthy: 1, unhealthy: 1 }));
        let states: Vec<_> =
            web.ports[0].backends.iter().map(|one| (one.state.as_str(), one.reason.as_deref())).collect();
        assert_eq!(states, [("active", None), ("unhealthy", Some("HTTP 503"))]);
    }

    #[test]
    fn a_service_that_is_not_in_the_maps_yet_is_shown() {
        let views = overlay(&[report("new", &["192.0.2.12"], &["10.0.0.2:1"])], Vec::new());
        assert_eq!(views[0].ports[0].service_index, None);
        assert!(!views[0].ports[0].backends[0].next_hop_resolved);
        let pending = overlay(&[report("new", &[], &[])], Vec::new());
        assert!(pending[0].ports.is_empty() && pending[0].vips.is_empty() && pending[0].pool.is_none());
    }
}

//! What the userspace proxy tells, added to what the maps do: a Service may have passed from one to the
//! other, and what is counted of it is the sum.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::metrics::entry;
use crate::model::{ObjectRef, Role, ServiceKey};
use crate::plan::Wanted;
use crate::proxy::{BackendCounts, FrontendCounts, IcmpErrors, Totals};
use crate::telemetry::metrics::{Labels, Samples, labels, table};
use crate::view::{BackendView, ConnectionLimitView, PortView, ServedBy, ServiceView};

/// What the proxy was told, by entry.
pub type Frontends = BTreeMap<ServiceKey, Wanted>;

/// Adds what the proxy serves and has counted to the ports and backends of Services.
pub fn add_proxied(services: &mut [ServiceView], frontends: &Frontends, counts: &[FrontendCounts]) {
    let mut ports: HashMap<(ObjectRef, String, IpAddr, u16), &mut PortView> = HashMap::new();
    for service in services {
        let object = ObjectRef::new(&service.namespace, &service.name);
        for port in &mut service.ports {
            ports.insert((object.clone(), port.protocol.clone(), port.vip, port.port), port);
        }
    }
    // A Service that was deleted may have had the same address.
    let place = |key: &ServiceKey| (key.service.clone(), key.protocol.to_string(), key.vip, key.port);
    for (key, wanted) in frontends {
        if let (Some(port), Wanted::Serve(_)) = (ports.get_mut(&place(key)), wanted) {
            serve(port, wanted);
        }
    }
    // Also of those that it has served earlier.
    for one in counts {
        if let Some(port) = ports.get_mut(&place(&one.key)) {
            add(port, one);
        }
    }
}

/// What is asked of clients, as the proxy does it.
fn serve(port: &mut PortView, wanted: &Wanted) {
    let Some(frontend) = wanted.frontend() else { return };
    port.served_by = ServedBy::Proxy;
    let ranges = &frontend.source_ranges;
    let ours = ranges.iter().filter(|range| range.addr().is_ipv4() == port.vip.is_ipv4());
    port.source_ranges = (!ranges.is_empty()).then(|| ours.map(ToString::to_string).collect());
    port.affinity_seconds = frontend.affinity.map(|time| time.as_secs());
    let limit = frontend.connection_limit;
    port.connection_limit =
        limit.map(|limit| ConnectionLimitView { per_second: limit.rate, burst: limit.burst });
    port.scheduler = frontend.scheduler.to_string();
    for backend in &mut port.backends {
        backend.next_hop_resolved = true;
        "by the proxy".clone_into(&mut backend.next_hop);
    }
}

fn add(port: &mut PortView, counts: &FrontendCounts) {
    let refused: u64 = counts.refused.iter().map(|(_, count)| count).sum();
    port.counters.new_flows += counts.accepted;
    port.counters.bytes_in += counts.bytes_in;
    port.counters.bytes_out += counts.bytes_out;
    port.counters.refused = Some(port.counters.refused.unwrap_or_default() + refused);
    let backends: HashMap<SocketAddr, &BackendCounts> =
        counts.backends.iter().map(|backend| (backend.address, backend)).collect();
    for view in &mut port.backends {
        if let Some(counts) = backends.get(&SocketAddr::new(view.address, view.port)) {
            add_backend(view, counts);
        }
    }
}

fn add_backend(view: &mut BackendView, counts: &BackendCounts) {
    view.counters.new_flows += counts.connections;
    if counts.ejected {
        let failures = counts.connect_failures;
        view.next_hop = format!("by the proxy; avoided for now: {failures} connects failed");
    }
}

/// Adds how many backends the proxy has, where no maps tell of all backends.
pub fn collect_backends(frontends: &Frontends, samples: &mut Samples) {
    let (mut active, mut terminating) = (0, 0);
    for wanted in frontends.values() {
        let Wanted::Serve(frontend) = wanted else { continue };
        let takes = frontend.backends.iter().filter(|backend| backend.role == Role::Active).count();
        active += takes;
        terminating += frontend.backends.len() - takes;
    }
    for (state, count) in [("active", active), ("terminating", terminating)] {
        samples.level(&table::BACKENDS, &labels([state]), count as f64);
    }
}

/// Adds what the proxy has counted to metrics.
pub fn collect_proxied(counts: &[FrontendCounts], totals: &Totals, per_backend: bool, samples: &mut Samples) {
    let mut open = 0;
    let mut ejected = 0;
    for one in counts {
        let of_entry: Labels = Arc::new(entry(&one.key));
        samples.count_directions(&table::SERVICE_BYTES, &of_entry, [one.bytes_in, one.bytes_out]);
        samples.count(&table::SERVICE_NEW_FLOWS, &of_entry, one.accepted);
        let refused = one.refused.iter().map(|(_, count)| count).sum();
        samples.count(&table::SERVICE_REFUSED, &of_entry, refused);
        for (reason, count) in &one.refused {
            samples.count(&table::PROXY_REFUSED, &labels([reason.name()]), *count);
        }
        open += one.open;
        ejected += one.backends.iter().filter(|backend| backend.ejected).count();
        for backend in one.backends.iter().filter(|_| per_backend) {
            let labels: Labels = entry(&one.key).into_iter().chain([backend.address.to_string()]).collect();
            samples.count(&table::BACKEND_NEW_FLOWS, &labels, backend.connections);
        }
    }
    for (reason, count) in &totals.refused {
        samples.count(&table::PROXY_REFUSED, &labels([reason.name()]), *count);
    }
    samples.plain(&table::PROXY_MAX_CONNECTIONS, totals.most_connections as f64);
    samples.plain(&table::PROXY_HELD_BYTES, totals.held_bytes as f64);
    samples.count(&table::PROXY_FULL_BUFFERS, &labels([]), totals.full_buffers);
    samples.count(&table::PROXY_SHORTAGES, &labels([]), totals.shortages);
    let IcmpErrors { told, untold } = totals.icmp_errors;
    for (result, count) in [("sent", told), ("not_sent", untold)] {
        samples.count(&table::PROXY_ICMP_ERRORS, &labels([result]), count);
    }
    for (direction, count) in ["in", "out"].into_iter().zip(totals.lost) {
        samples.count(&table::PROXY_LOST_DATAGRAMS, &labels([direction]), count);
    }
    samples.plain(&table::PROXY_CONNECTIONS, open as f64);
    samples.plain(&table::PROXY_EJECTED, ejected as f64);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::overlay;
    use crate::model::{
        BackendReport, ClientAddress, PortReport, Protocol, Scheduler, ServiceReport, ServiceState, VipReport,
    };
    use crate::plan::{Frontend, FrontendBackend};
    use crate::proxy::Refusal;

    fn key() -> ServiceKey {
        ServiceKey {
            service: ObjectRef::new("default", "web"),
            protocol: Protocol::Tcp,
            vip: "192.0.2.10".parse().unwrap(),
            port: 80,
        }
    }

    fn frontend() -> Arc<Frontend> {
        Arc::new(Frontend {
            key: key(),
            backends: Vec::new(),
            slots: Vec::new(),
            scheduler: Scheduler::Maglev,
            source_ranges: ["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()].into(),
            affinity: Some(std::time::Duration::from_secs(30)),
            connection_limit: None,
            client_address: ClientAddress::Path,
        })
    }

    fn counts() -> FrontendCounts {
        FrontendCounts {
            key: key(),
            accepted: 7,
            open: 2,
            refused: vec![(Refusal::SourceRange, 3), (Refusal::ConnectFailed, 1)],
            bytes_in: 10,
            bytes_out: 20,
            backends: vec![BackendCounts {
                address: "10.0.0.1:8080".parse().unwrap(),
                connections: 6,
                open: 2,
                connect_failures: 4,
                ejected: true,
            }],
        }
    }

    fn services() -> Vec<ServiceView> {
        let address = "10.0.0.1:8080".parse().unwrap();
        overlay(
            &[ServiceReport {
                object: ObjectRef::new("default", "web"),
                state: ServiceState::Active,
                vips: vec![VipReport { address: key().vip, pool: None }],
                ports: vec![PortReport {
                    name: "http".into(),
                    protocol: Protocol::Tcp,
                    port: 80,
                    backends: vec![BackendReport { address, role: Role::Active, weight: 1, health: None }],
                }],
                health: None,
                problems: Vec::new(),
            }],
            Vec::new(),
        )
    }

    #[test]
    fn what_it_has_served_earlier_is_counted() {
        let mut views = services();
        let mut deleted = counts();
        deleted.key.service.name = "before".to_owned();
        add_proxied(&mut views, &BTreeMap::new(), &[counts(), deleted]);
        let port = &views[0].ports[0];
        assert_eq!((port.served_by, port.counters.new_flows), (ServedBy::Kernel, 7));
    }

    #[test]
    fn what_the_proxy_serves_is_told_as_such() {
        let mut views = services();
        add_proxied(&mut views, &[(key(), Wanted::Serve(frontend()))].into(), &[counts()]);
        let port = &views[0].ports[0];
        assert_eq!((port.served_by, port.scheduler.as_str()), (ServedBy::Proxy, "maglev"));
        assert_eq!(port.source_ranges.as_deref(), Some(&["10.0.0.0/8".to_owned()][..]));
        assert_eq!(
            (port.affinity_seconds, port.counters.new_flows, port.counters.refused),
            (Some(30), 7, Some(4))
        );
        let backend = &port.backends[0];
        assert!(backend.next_hop_resolved && backend.next_hop.ends_with("4 connects failed"), "{backend:?}");
        assert_eq!(backend.counters.new_flows, 6);
    }

    #[test]
    fn what_it_finishes_is_the_kernels_and_counts_all_the_same() {
        let mut views = services();
        add_proxied(&mut views, &[(key(), Wanted::Finish(frontend()))].into(), &[counts()]);
        let port = &views[0].ports[0];
        assert_eq!((port.served_by, port.counters.bytes_out), (ServedBy::Kernel, 20));
    }

    #[test]
    fn backends_are_told_by_their_state() {
        let backend = |address: &str, role| FrontendBackend {
            address: address.parse().unwrap(),
            weight: 1,
            role,
            local: false,
        };
        let backends = vec![
            backend("10.0.0.1:8080", Role::Active),
            backend("10.0.0.2:8080", Role::Active),
            backend("10.0.0.3:8080", Role::Terminating),
        ];
        let frontend = Arc::new(Frontend { backends, ..(*frontend()).clone() });
        let other = ServiceKey { port: 81, ..key() };
        let mut samples = Samples::default();
        let frontends =
            [(key(), Wanted::Serve(Arc::clone(&frontend))), (other, Wanted::Finish(frontend))].into();
        collect_backends(&frontends, &mut samples);
        let text = samples.text().unwrap();
        for line in
            ["pointsman_backends{state=\"active\"} 2.0", "pointsman_backends{state=\"terminating\"} 1.0"]
        {
            assert!(text.lines().any(|found| found == line), "{line}:\n{text}");
        }
    }

    #[test]
    fn metrics_add_up() {
        let mut samples = Samples::default();
        let icmp_errors = IcmpErrors { told: 5, untold: 4 };
        let counted = Totals { full_buffers: 5, most_connections: 9_000, ..Totals::default() };
        let totals = Totals { icmp_errors, lost: [7, 8], ..counted };
        collect_proxied(&[counts()], &totals, true, &mut samples);
        let text = samples.text().unwrap();
        for line in [
            "pointsman_proxy_connections 2.0",
            "pointsman_proxy_max_connections 9000.0",
            "pointsman_proxy_full_buffers_total 5",
            "pointsman_proxy_ejected_backends 1.0",
            "pointsman_proxy_refused_total{reason=\"source_range\"} 3",
            "pointsman_proxy_icmp_errors_total{result=\"sent\"} 5",
            "pointsman_proxy_icmp_errors_total{result=\"not_sent\"} 4",
            "pointsman_proxy_lost_datagrams_total{direction=\"in\"} 7",
            "pointsman_proxy_lost_datagrams_total{direction=\"out\"} 8",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}:\n{text}");
        }
        assert!(text.contains("backend=\"10.0.0.1:8080\"} 6"), "{text}");
    }
}

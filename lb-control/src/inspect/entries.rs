//! Services as the maps have them.

use std::collections::{BTreeMap, HashMap};

use anyhow::Result;
use lb_common::abi::{Backend, BackendState, ConnectionLimit, Service, ServiceFlags, TICK_SHIFT, Tick};

use super::Traffic;
use crate::model::{ObjectRef, Scheduler, ServiceKey};
use crate::plan::name;
use crate::ports::{MapStore, Vip};
use crate::view::{BackendView, ConnectionLimitView, PortView, ServedBy, ServiceState, ServiceView};

/// Names devices by their index; `None` for those that are not there.
pub type NextHops<'a> = &'a dyn Fn(u32) -> Option<String>;

/// The Services in the maps, by namespace and name; ports by VIP, port and protocol; backends by
/// address and port.
///
/// # Errors
/// When a map cannot be read.
pub fn service_views(
    store: &dyn MapStore,
    traffic: &Traffic,
    device_name: NextHops<'_>,
) -> Result<Vec<ServiceView>> {
    let vips: HashMap<Vip, u32> = store.vips()?.into_iter().collect();
    let services: HashMap<u32, Service> = store.services()?.into_iter().collect();
    let mut clients = Clients::read(store, &services)?;
    let mut backends = backends_by_service(store, traffic, device_name)?;
    let mut ports: BTreeMap<ObjectRef, Vec<(ServiceKey, Entry)>> = BTreeMap::new();
    for (index, stored) in store.service_names()? {
        // A damaged name is the agent's to repair; nobody can be told whose it is.
        let Some(key) = name::parse(&stored) else { continue };
        let vip = Vip::new(key.vip, key.port, key.protocol.number());
        let service = services.get(&index).copied().unwrap_or_default();
        let entry = Entry {
            led_to: vips.get(&vip) == Some(&index),
            slots: service.slot_count(),
            view: PortView {
                name: name::port_name(&stored),
                protocol: key.protocol.to_string(),
                vip: key.vip,
                port: key.port,
                served_by: served_by(service),
                service_index: Some(index),
                source_ranges: clients.sources(index, service),
                affinity_seconds: clients.affinity(index, service),
                connection_limit: clients.limit(index, service),
                scheduler: scheduler(service).to_string(),
                backends: backends.remove(&index).unwrap_or_default(),
                counters: traffic.services.get(&index).copied().unwrap_or_default(),
            },
        };
        ports.entry(key.service.clone()).or_default().push((key, entry));
    }
    Ok(ports.into_iter().map(|(service, entries)| service_view(service, entries)).collect())
}

/// Who the maps say serves an entry.
fn served_by(service: Service) -> ServedBy {
    if service.has(ServiceFlags::PROXIED) { ServedBy::Proxy } else { ServedBy::Kernel }
}

/// How the maps say that connections are spread.
fn scheduler(service: Service) -> Scheduler {
    if service.has(ServiceFlags::MAGLEV) {
        Scheduler::Maglev
    } else if service.has(ServiceFlags::LEAST_CONNECTIONS) {
        Scheduler::LeastConnections
    } else {
        Scheduler::RoundRobin
    }
}

/// What Service entries ask of their clients.
#[derive(Default)]
struct Clients {
    sources: HashMap<u32, Vec<String>>,
    timeouts: HashMap<u32, Tick>,
    limits: HashMap<u32, ConnectionLimit>,
}

impl Clients {
    /// Reads only what some Service uses: there may be tens of thousands of ranges.
    fn read(store: &dyn MapStore, services: &HashMap<u32, Service>) -> Result<Self> {
        let is_used = |flag| services.values().any(|service| service.has(flag));
        let mut clients = Self::default();
        if is_used(ServiceFlags::SOURCE_RANGES) {
            let mut all = store.source_ranges()?;
            all.sort_unstable();
            for (service, range) in all {
                clients.sources.entry(service).or_default().push(range.to_string());
            }
        }
        if is_used(ServiceFlags::AFFINITY) {
            clients.timeouts = store.affinity_timeouts()?.into_iter().collect();
        }
        if is_used(ServiceFlags::CONNECTION_RATE) {
            clients.limits = store.connection_limits()?.into_iter().collect();
        }
        Ok(clients)
    }

    fn sources(&mut self, index: u32, service: Service) -> Option<Vec<String>> {
        let is_on = service.has(ServiceFlags::SOURCE_RANGES);
        is_on.then(|| self.sources.remove(&index).unwrap_or_default())
    }

    fn affinity(&self, index: u32, service: Service) -> Option<u64> {
        let ticks = u64::from(self.timeouts.get(&index).copied().unwrap_or_default());
        service.has(ServiceFlags::AFFINITY).then_some((ticks << TICK_SHIFT) / 1_000_000_000)
    }

    fn limit(&self, index: u32, service: Service) -> Option<ConnectionLimitView> {
        let limit = self.limits.get(&index).filter(|_| service.has(ServiceFlags::CONNECTION_RATE))?;
        Some(ConnectionLimitView { per_second: limit.rate, burst: limit.burst })
    }
}

/// One port of one VIP.
struct Entry {
    /// Whether the VIP maps lead to it: else it takes no new connections.
    led_to: bool,
    slots: u32,
    view: PortView,
}

fn service_view(service: ObjectRef, mut entries: Vec<(ServiceKey, Entry)>) -> ServiceView {
    entries.sort_by_key(|(key, _)| (key.vip, key.port, key.protocol));
    let state = match entries.iter().filter(|(_, entry)| entry.led_to).map(|(_, entry)| entry.slots).max() {
        None => ServiceState::Draining,
        Some(0) => ServiceState::NoBackends,
        Some(_) => ServiceState::Active,
    };
    let mut vips: Vec<_> = entries.iter().map(|(key, _)| key.vip).collect();
    vips.dedup();
    ServiceView {
        namespace: service.namespace,
        name: service.name,
        state,
        vips,
        pool: None,
        health: None,
        ports: entries.into_iter().map(|(_, entry)| entry.view).collect(),
        problems: Vec::new(),
    }
}

fn backends_by_service(
    store: &dyn MapStore,
    traffic: &Traffic,
    device_name: NextHops<'_>,
) -> Result<HashMap<u32, Vec<BackendView>>> {
    let mut all: HashMap<u32, Vec<BackendView>> = HashMap::new();
    for (index, backend) in store.backends()? {
        let state = match BackendState::from_raw(backend.state) {
            BackendState::Free => continue,
            BackendState::Active => "active",
            BackendState::Terminating => "terminating",
        };
        let Some(address) = name::narrow(backend.address, backend.family) else { continue };
        let (next_hop_resolved, next_hop) = next_hop(&backend, device_name);
        all.entry(backend.service).or_default().push(BackendView {
            address,
            port: u16::from_be_bytes(backend.port),
            state: state.to_owned(),
            reason: None,
            weight: backend.weight,
            backend_index: Some(index),
            next_hop_resolved,
            next_hop,
            counters: traffic.backends.get(&index).copied().unwrap_or_default(),
        });
    }
    for backends in all.values_mut() {
        backends.sort_by_key(|backend| (backend.address, backend.port));
    }
    Ok(all)
}

/// Whether packets can be sent to a backend; and the way, or why not as far as the maps tell.
fn next_hop(backend: &Backend, device_name: NextHops<'_>) -> (bool, String) {
    if backend.is_local() {
        return (true, "on this node".to_owned());
    }
    let hop = &backend.next_hop;
    if hop.ifindex == 0 {
        return (false, String::new());
    }
    if backend.snat_count == 0 {
        return (false, "no source address towards it".to_owned());
    }
    let mac = hop.destination_mac.map(|byte| format!("{byte:02x}")).join(":");
    let device = device_name(hop.ifindex).unwrap_or_else(|| format!("device {}", hop.ifindex));
    let [a, b, c, d] = hop.vlan;
    let mut text = format!("{mac} on {device}");
    for tag in [[a, b], [c, d]].map(u16::from_be_bytes).into_iter().filter(|tag| *tag != 0) {
        // The lower 12 bits are the VLAN's number (IEEE 802.1Q).
        text += &format!(" vlan {}", tag & 0x0fff);
    }
    (true, text)
}

#[cfg(test)]
mod tests {
    use lb_common::abi::NextHop;

    use super::*;
    use crate::inspect::testing::{backend, maps_with, service};
    use crate::ports::MapOp;
    use crate::view::TrafficView;

    fn eth1(ifindex: u32) -> Option<String> {
        (ifindex == 3).then(|| "eth1".to_owned())
    }

    fn views(ops: &[MapOp], traffic: &Traffic) -> Vec<ServiceView> {
        service_views(&maps_with(ops), traffic, &eth1).unwrap()
    }

    #[test]
    fn a_service_with_two_vips_and_their_backends() {
        let mut ops = service(2, "default/web", "[2001:db8::10]:80", Some(1));
        ops.extend(service(1, "default/web", "192.0.2.10:80", Some(1)));
        ops.extend(service(3, "api/x", "192.0.2.11:80", Some(0)));
        ops.extend(backend(5, 1, "10.0.0.3:8080", |_| ()));
        ops.extend(backend(4, 1, "10.0.0.2:8080", |_| ()));
        ops.extend(backend(6, 2, "[2001:db8:1::2]:8080", |b| b.state = BackendState::Terminating as u8));
        ops.extend(backend(7, 3, "10.0.0.9:1", |b| b.state = BackendState::Free as u8));
        let counted = |new_flows| TrafficView { new_flows, ..TrafficView::default() };
        let traffic = Traffic {
            services: [(1, counted(11)), (2, counted(12))].into(),
            backends: [(4, counted(4)), (5, counted(5))].into(),
        };
        let views = views(&ops, &traffic);
        let [api, web] = &views[..] else { panic!("{views:#?}") };
        assert_eq!(
            (api.name.as_str(), api.state, api.ports[0].backends.len()),
            ("x", ServiceState::NoBackends, 0)
        );
        assert_eq!((web.namespace.as_str(), web.state), ("default", ServiceState::Active));
        assert_eq!(
            web.vips.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["192.0.2.10", "2001:db8::10"]
        );
        let v4 = &web.ports[0];
        assert_eq!((v4.name.as_str(), v4.protocol.as_str(), v4.service_index), ("http", "TCP", Some(1)));
        assert_eq!(v4.counters.new_flows, 11);
        let found: Vec<_> = v4.backends.iter().map(|b| (b.backend_index, b.counters.new_flows)).collect();
        assert_eq!(found, [(Some(4), 4), (Some(5), 5)]);
        assert_eq!(web.ports[1].backends[0].state, "terminating");
    }

    #[test]
    fn who_may_connect_and_who_stays() {
        let mut ops = service(1, "default/web", "192.0.2.10:80", Some(1));
        for (index, flags) in [(2, 1 | 2 | ServiceFlags::CONNECTION_RATE), (3, 1)] {
            ops.extend(service(index, "default/web", &format!("192.0.2.10:8{index}"), Some(1)));
            ops.push(MapOp::SetService { index, value: Service::new(0, 1, flags) });
        }
        ops.extend(
            ["10.0.0.0/8", "192.0.2.0/24"]
                .map(|range| MapOp::AllowSource { service: 2, range: range.parse().unwrap() }),
        );
        // Of no entry that counts them.
        ops.push(MapOp::AllowSource { service: 1, range: "10.0.0.0/8".parse().unwrap() });
        let ticks = lb_common::abi::ticks_from_seconds(10_800);
        ops.push(MapOp::SetAffinityTimeout { service: 2, ticks });
        let limit = ConnectionLimit { rate: 7, burst: 9 };
        ops.extend([2, 3].map(|service| MapOp::SetConnectionLimit { service, limit }));
        let views = views(&ops, &Traffic::default());
        let told: Vec<_> =
            views[0].ports.iter().map(|port| (port.source_ranges.clone(), port.affinity_seconds)).collect();
        let ranges = vec!["10.0.0.0/8".to_owned(), "192.0.2.0/24".to_owned()];
        assert_eq!(told, [(None, None), (Some(ranges), Some(10_800)), (Some(vec![]), None)]);
        let limits: Vec<_> = views[0].ports.iter().map(|port| port.connection_limit).collect();
        assert_eq!(limits, [None, Some(ConnectionLimitView { per_second: 7, burst: 9 }), None]);
    }

    #[test]
    fn an_entry_without_vip_drains() {
        let views = views(&service(1, "default/web", "192.0.2.10:80", None), &Traffic::default());
        assert_eq!(views[0].state, ServiceState::Draining);
    }

    #[test]
    fn next_hops_are_told_in_words() {
        let told = |edit: fn(&mut Backend)| {
            let mut ops = service(1, "default/web", "192.0.2.10:80", Some(1));
            ops.extend(backend(4, 1, "10.0.0.2:8080", edit));
            let views = views(&ops, &Traffic::default());
            let backend = &views[0].ports[0].backends[0];
            (backend.next_hop_resolved, backend.next_hop.clone())
        };
        assert_eq!(told(|_| ()), (true, "02:00:00:00:00:0a on eth1".into()));
        assert_eq!(told(|b| b.next_hop.ifindex = 9), (true, "02:00:00:00:00:0a on device 9".into()));
        assert_eq!(told(|b| b.next_hop.vlan = [0x20, 7, 0, 9]).1, "02:00:00:00:00:0a on eth1 vlan 7 vlan 9");
        assert_eq!(told(|b| b.next_hop = NextHop::default()), (false, String::new()));
        assert_eq!(told(|b| b.flags = lb_common::abi::BackendFlags::LOCAL), (true, "on this node".into()));
        assert_eq!(told(|b| b.snat_count = 0), (false, "no source address towards it".into()));
    }
}

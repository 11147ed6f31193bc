//! The maps as people can read them: the same maps give the same text.

use std::{
    collections::BTreeMap,
    fmt::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use lb_common::abi::{Backend, BackendState, ServiceFlags, ServiceName, TICK_SHIFT};
use lb_control::ports::MapStore;

/// All that packets depend on, with indices.
///
/// # Errors
/// When the maps cannot be read.
pub fn dump(maps: &dyn MapStore) -> anyhow::Result<String> {
    let mut out = String::new();
    let snat = maps.snat_addresses()?;
    let mut vips = maps.vips()?;
    vips.sort_by_key(|(vip, _)| (vip.socket(), vip.protocol()));
    for (vip, service) in vips {
        writeln!(out, "vip {}/{} -> service {service}", vip.socket(), protocol(vip.protocol()))?;
    }
    let services: BTreeMap<u32, _> = maps.services()?.into_iter().collect();
    let mut ranges: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    let mut all = maps.source_ranges()?;
    all.sort();
    for (service, range) in all {
        ranges.entry(service).or_default().push(range.to_string());
    }
    let mut timeouts: BTreeMap<u32, _> = maps.affinity_timeouts()?.into_iter().collect();
    let mut limits: BTreeMap<u32, _> = maps.connection_limits()?.into_iter().collect();
    for (index, name) in maps.service_names()? {
        let service = services.get(&index).copied().unwrap_or_default();
        write!(out, "service {index} {}", self::name(&name))?;
        if service.has(ServiceFlags::AFFINITY) {
            let ticks = timeouts.remove(&index).unwrap_or_default();
            write!(out, " affinity {} s", (u64::from(ticks) << TICK_SHIFT) / 1_000_000_000)?;
        }
        if service.has(ServiceFlags::CONNECTION_RATE) {
            let limit = limits.remove(&index).unwrap_or_default();
            write!(out, " limit {}/s, {} at once", limit.rate, limit.burst)?;
        }
        if service.has(ServiceFlags::MAGLEV) {
            write!(out, " maglev")?;
        }
        if service.has(ServiceFlags::LEAST_CONNECTIONS) {
            write!(out, " least-connections")?;
        }
        if service.has(ServiceFlags::SOURCE_RANGES) {
            let ranges = ranges.remove(&index).unwrap_or_default();
            write!(out, " from {}", if ranges.is_empty() { "nobody".into() } else { ranges.join(",") })?;
        }
        let slots = maps.slots(service.first_slot, service.slot_count())?;
        let is_table = service.has(ServiceFlags::MAGLEV) && slots.len() > 1;
        let slots = if is_table { table(&slots) } else { format!("{slots:?}") };
        writeln!(out, " slots {}+{} {slots}", service.first_slot, service.slot_count())?;
    }
    for (index, backend) in maps.backends()? {
        writeln!(out, "backend {index} {}", self::backend(&backend, &snat))?;
    }
    // What nobody accounts for is shown, too: it must not be there.
    for (index, ranges) in ranges {
        writeln!(out, "remains of service {index}: from {}", ranges.join(","))?;
    }
    for (index, ticks) in timeouts {
        writeln!(out, "remains of service {index}: affinity {ticks} ticks")?;
    }
    for (index, limit) in limits {
        writeln!(out, "remains of service {index}: limit {}/s, {} at once", limit.rate, limit.burst)?;
    }
    Ok(out)
}

/// How many slots of a lookup table each backend has, and whose the first ones are.
fn table(slots: &[u32]) -> String {
    let mut shares: BTreeMap<u32, usize> = BTreeMap::new();
    slots.iter().for_each(|backend| *shares.entry(*backend).or_default() += 1);
    format!("{shares:?} {:?}...", &slots[..slots.len().min(12)])
}

fn protocol(number: u8) -> String {
    match number {
        6 => "TCP".into(),
        17 => "UDP".into(),
        other => other.to_string(),
    }
}

fn address(wide: [u8; 16], family: u8) -> IpAddr {
    match family {
        4 => Ipv4Addr::new(wide[0], wide[1], wide[2], wide[3]).into(),
        _ => Ipv6Addr::from(wide).into(),
    }
}

fn text(padded: &[u8; 64]) -> String {
    String::from_utf8_lossy(padded.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

fn name(name: &ServiceName) -> String {
    let port = std::net::SocketAddr::new(address(name.address, name.family), u16::from_be_bytes(name.port));
    let (namespace, service, port_name) = (text(&name.namespace), text(&name.name), text(&name.port_name));
    format!("{namespace}/{service} {port_name:?} {port}/{}", protocol(name.protocol))
}

fn backend(backend: &Backend, snat: &[[u8; 16]]) -> String {
    let state = BackendState::from_raw(backend.state);
    if state == BackendState::Free {
        return format!("Free generation {}", backend.generation);
    }
    let socket =
        std::net::SocketAddr::new(address(backend.address, backend.family), u16::from_be_bytes(backend.port));
    let first = usize::from(backend.snat_first);
    let sources = snat.get(first..first + usize::from(backend.snat_count)).unwrap_or_default();
    let sources: Vec<_> = sources.iter().map(|source| address(*source, backend.family).to_string()).collect();
    format!(
        "{socket} {state:?} generation {} service {} weight {} device {} from {}",
        backend.generation,
        backend.service,
        backend.weight,
        backend.next_hop.ifindex,
        if sources.is_empty() { "-".into() } else { sources.join(",") },
    )
}

#[cfg(test)]
mod tests {
    use lb_common::abi::{ConnectionLimit, Service};
    use lb_control::{
        model::{ObjectRef, Protocol, ServiceKey},
        plan::name::service_name,
        ports::{FakeMaps, Limits, MapOp},
    };

    use super::*;

    #[test]
    fn what_is_asked_of_clients_is_shown() {
        let mut maps = FakeMaps::new(Limits::default());
        let key = ServiceKey {
            service: ObjectRef::new("default", "web"),
            protocol: Protocol::Tcp,
            vip: IpAddr::from([192, 0, 2, 1]),
            port: 80,
        };
        let all = ServiceFlags::SOURCE_RANGES | ServiceFlags::AFFINITY | ServiceFlags::CONNECTION_RATE;
        let limit = ConnectionLimit { rate: 5, burst: 9 };
        for op in [
            MapOp::SetServiceName { index: 1, value: Box::new(service_name(&key, "http")) },
            MapOp::SetService { index: 1, value: Service::new(0, 0, all) },
            MapOp::AllowSource { service: 1, range: "198.51.100.0/24".parse().unwrap() },
            MapOp::AllowSource { service: 1, range: "10.0.0.0/8".parse().unwrap() },
            MapOp::SetAffinityTimeout { service: 1, ticks: lb_common::abi::ticks_from_seconds(10_800) },
            MapOp::SetConnectionLimit { service: 1, limit },
            MapOp::SetConnectionLimit { service: 2, limit },
            MapOp::AllowSource { service: 2, range: "10.0.0.0/8".parse().unwrap() },
        ] {
            maps.apply(&op).unwrap();
        }
        assert_eq!(
            dump(&maps).unwrap(),
            "service 1 default/web \"http\" 192.0.2.1:80/TCP affinity 10800 s limit 5/s, 9 at once \
             from 10.0.0.0/8,198.51.100.0/24 slots 0+0 []\nremains of service 2: from 10.0.0.0/8\nremains of \
             service 2: limit 5/s, 9 at once\n"
        );
    }
}

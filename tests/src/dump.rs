//! The maps as people can read them: the same maps give the same text.

use std::{
    collections::BTreeMap,
    fmt::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use lb_common::abi::{Backend, BackendState, ServiceName};
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
    for (index, name) in maps.service_names()? {
        let service = services.get(&index).copied().unwrap_or_default();
        write!(out, "service {index} {}", self::name(&name))?;
        let slots = maps.slots(service.first_slot, service.slot_count())?;
        writeln!(out, " slots {}+{} {slots:?}", service.first_slot, service.slot_count())?;
    }
    for (index, backend) in maps.backends()? {
        writeln!(out, "backend {index} {}", self::backend(&backend, &snat))?;
    }
    Ok(out)
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

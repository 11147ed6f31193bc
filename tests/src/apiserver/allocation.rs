//! Addresses and ports that the API server gives to Services: `pkg/registry/core/service/storage/alloc.go`.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use serde_json::Value;

use super::{
    failure::Cause,
    service::{has_node_ports, is_headless, needs_health_port, ports, ports_mut, set_default},
    store::{Store, key_of},
};

/// Node ports are given out of this range.
const NODE_PORTS: std::ops::RangeInclusive<u64> = 30000..=32767;

/// Gives a Service what it needs.
pub fn allocate(store: &mut Store, service: &mut Value) -> Vec<Cause> {
    if service["spec"]["type"] != "ExternalName" {
        allocate_addresses(store, &mut service["spec"]);
    }
    let stored = store.get("services", &key_of(service));
    let same =
        |field: &str| stored.as_ref().is_some_and(|stored| stored["spec"][field] == service["spec"][field]);
    let wants = has_node_ports(&service["spec"]) || needs_health_port(&service["spec"]);
    if !wants
        || (same("ports") && same("healthCheckNodePort") && same("type") && same("externalTrafficPolicy"))
    {
        return Vec::new();
    }
    allocate_ports(store, service)
}

fn allocate_ports(store: &Store, service: &mut Value) -> Vec<Cause> {
    let own = service["metadata"]["uid"].clone();
    let mut used: BTreeSet<(u64, String)> = BTreeSet::new();
    for other in store.list("services", None).iter().filter(|other| other["metadata"]["uid"] != own) {
        let health = other["spec"]["healthCheckNodePort"].as_u64();
        used.extend(health.map(|port| (port, "TCP".to_owned())));
        let given = |port: &Value| Some((port["nodePort"].as_u64()?, text(&port["protocol"])));
        used.extend(ports(&other["spec"]).filter_map(given));
    }
    let spec = &mut service["spec"];
    let mut causes = Vec::new();
    let full = "failed to allocate a nodePort: range is full";
    if has_node_ports(spec) {
        for (at, port) in ports_mut(spec).enumerate() {
            let (field, protocol) = (format!("spec.ports[{at}].nodePort"), text(&port["protocol"]));
            let wanted = port["nodePort"].as_u64().unwrap_or_default();
            if wanted > 0 {
                if !used.insert((wanted, protocol)) {
                    causes.push(Cause::invalid(field, &wanted.into(), "provided port is already allocated"));
                }
            } else if let Some(free) = free_port(&used) {
                port["nodePort"] = free.into();
                used.insert((free, protocol));
            } else {
                causes.push(Cause::invalid(field, &0.into(), full));
            }
        }
    }
    if needs_health_port(spec) && spec["healthCheckNodePort"].as_u64().unwrap_or_default() == 0 {
        match free_port(&used) {
            Some(free) => spec["healthCheckNodePort"] = free.into(),
            None => causes.push(Cause::invalid("spec.healthCheckNodePort", &0.into(), full)),
        }
    }
    causes
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn free_port(used: &BTreeSet<(u64, String)>) -> Option<u64> {
    let taken: BTreeSet<u64> = used.iter().map(|(port, _)| *port).collect();
    NODE_PORTS.into_iter().find(|port| !taken.contains(port))
}

fn family(address: &str) -> &'static str {
    if address.contains(':') { "IPv6" } else { "IPv4" }
}

/// Families and cluster addresses. The cluster is dual stack, IPv4 first.
fn allocate_addresses(store: &mut Store, spec: &mut Value) {
    let headless = is_headless(spec);
    let list = |spec: &Value, field: &str| -> Vec<String> {
        let items = spec[field].as_array().into_iter().flatten();
        items.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let mut addresses = list(spec, "clusterIPs");
    let first = text(&spec["clusterIP"]);
    if addresses.is_empty() && !first.is_empty() {
        addresses.push(first);
    }
    let mut families = list(spec, "ipFamilies");
    for address in addresses.iter().filter(|_| !headless).skip(families.len()) {
        families.push(family(address).to_owned());
    }
    let without_selector = spec["selector"].as_object().is_none_or(serde_json::Map::is_empty);
    let policy = if families.len() > 1 || (headless && without_selector && families.is_empty()) {
        "RequireDualStack"
    } else {
        "SingleStack"
    };
    set_default(spec, "ipFamilyPolicy", policy);
    if families.is_empty() {
        families.push("IPv4".into());
    }
    let dual = spec["ipFamilyPolicy"] != "SingleStack";
    if dual && families.len() == 1 {
        families.push(if families[0] == "IPv4" { "IPv6" } else { "IPv4" }.into());
    }
    if !dual {
        families.truncate(1);
        addresses.truncate(1);
    }
    for family in families.iter().skip(addresses.len()).filter(|_| !headless) {
        addresses.push(free_address(store, family));
    }
    spec["clusterIP"] = addresses.first().cloned().unwrap_or_default().into();
    spec["clusterIPs"] = addresses.into();
    spec["ipFamilies"] = families.into();
}

/// The next one of 10.96.0.0/12 or fd00:10:96::/108; none is given twice.
fn free_address(store: &mut Store, family: &str) -> String {
    let number = store.next_address();
    let address: IpAddr = if family == "IPv6" {
        let [high, low] = [(number >> 16) as u16, (number & 0xffff) as u16];
        Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, high, low).into()
    } else {
        Ipv4Addr::from(0x0a60_0000 + number).into()
    };
    address.to_string()
}

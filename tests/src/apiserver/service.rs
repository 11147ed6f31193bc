//! Services: defaults, addresses and ports that the API server gives, and what may not be.
//! After `pkg/apis/core/v1/defaults.go`, `pkg/registry/core/service/strategy.go` and `alloc.go`.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use serde_json::{Value, json};

use super::{
    failure::Cause,
    store::Store,
    strategy::{Part, copy, ensure_object, remove},
};

/// Node ports are given out of this range.
const NODE_PORTS: std::ops::RangeInclusive<u64> = 30000..=32767;

fn is_balanced(spec: &Value) -> bool {
    spec["type"] == "LoadBalancer"
}

fn has_node_ports(spec: &Value) -> bool {
    spec["type"] == "NodePort" || (is_balanced(spec) && spec["allocateLoadBalancerNodePorts"] != false)
}

fn is_external(spec: &Value) -> bool {
    matches!(spec["type"].as_str(), Some("NodePort" | "LoadBalancer"))
}

fn is_headless(spec: &Value) -> bool {
    spec["clusterIP"] == "None"
}

fn needs_health_port(spec: &Value) -> bool {
    is_balanced(spec) && spec["externalTrafficPolicy"] == "Local"
}

fn ports_mut(spec: &mut Value) -> impl Iterator<Item = &mut Value> {
    spec["ports"].as_array_mut().into_iter().flatten()
}

fn ports(spec: &Value) -> impl Iterator<Item = &Value> {
    spec["ports"].as_array().into_iter().flatten()
}

fn set_default(object: &mut Value, field: &str, value: impl Into<Value>) {
    if object.get(field).is_none_or(Value::is_null) {
        object[field] = value.into();
    }
}

/// Makes a Service what is stored of it, but for what has to be given out.
pub fn prepare(before: Option<(Part, &Value)>, service: &mut Value) {
    ensure_object(service, "spec");
    set_defaults(&mut service["spec"]);
    if let Some((Part::Main, old)) = before {
        let spec = &mut service["spec"];
        keep_allocated(&old["spec"], spec);
        drop_what_the_type_has_not(&old["spec"], spec);
    }
    ensure_object(service, "status");
    ensure_object(&mut service["status"], "loadBalancer");
    if before.is_some_and(|(part, _)| part == Part::Main) && !is_balanced(&service["spec"]) {
        service["status"]["loadBalancer"] = json!({});
    }
    if let Some(ingress) = service["status"]["loadBalancer"]["ingress"].as_array_mut() {
        for entry in ingress.iter_mut().filter(|entry| entry.get("ip").is_some()) {
            set_default(entry, "ipMode", "VIP");
        }
    }
    if service["status"]["loadBalancer"]["ingress"].as_array().is_none_or(Vec::is_empty) {
        remove(&mut service["status"]["loadBalancer"], "ingress");
    }
}

fn set_defaults(spec: &mut Value) {
    set_default(spec, "type", "ClusterIP");
    set_default(spec, "sessionAffinity", "None");
    if spec["sessionAffinity"] == "ClientIP" {
        ensure_object(spec, "sessionAffinityConfig");
        ensure_object(&mut spec["sessionAffinityConfig"], "clientIP");
        set_default(&mut spec["sessionAffinityConfig"]["clientIP"], "timeoutSeconds", 10800);
    } else {
        remove(spec, "sessionAffinityConfig");
    }
    for port in ports_mut(spec) {
        set_default(port, "protocol", "TCP");
        let number = port["port"].clone();
        if port["targetPort"] == 0 || port["targetPort"] == "" {
            remove(port, "targetPort");
        }
        set_default(port, "targetPort", number);
    }
    if spec["type"] != "ExternalName" {
        set_default(spec, "internalTrafficPolicy", "Cluster");
    }
    if is_external(spec) || spec["externalIPs"].as_array().is_some_and(|list| !list.is_empty()) {
        set_default(spec, "externalTrafficPolicy", "Cluster");
    }
    if is_balanced(spec) {
        set_default(spec, "allocateLoadBalancerNodePorts", true);
    }
}

/// An update that does not name what was given out keeps it.
fn keep_allocated(old: &Value, new: &mut Value) {
    if new["type"] != "ExternalName" && old["type"] != "ExternalName" {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            if new.get(field).is_none_or(|value| value.is_null() || value == "") {
                copy(old, new, field);
            }
        }
    }
    if has_node_ports(old) && has_node_ports(new) {
        let mut used: BTreeSet<u64> =
            ports(new).filter_map(|port| port["nodePort"].as_u64()).filter(|port| *port > 0).collect();
        for port in ports_mut(new).filter(|port| port["nodePort"].as_u64().unwrap_or_default() == 0) {
            let same = |old: &&Value| old["port"] == port["port"] && old["protocol"] == port["protocol"];
            let kept = ports(old).find(same).and_then(|old| old["nodePort"].as_u64());
            if let Some(number) = kept.filter(|number| used.insert(*number)) {
                port["nodePort"] = number.into();
            }
        }
    }
    if needs_health_port(old) && needs_health_port(new) {
        let given = new["healthCheckNodePort"].as_u64().unwrap_or_default();
        if given == 0 {
            copy(old, new, "healthCheckNodePort");
        }
    }
}

/// Fields that go with a type, when that type goes: `dropTypeDependentFields`. What the request
/// changed is left for validation to refuse.
fn drop_what_the_type_has_not(old: &Value, new: &mut Value) {
    let drop_same = |new: &mut Value, field: &str| {
        if old.get(field) == new.get(field) {
            remove(new, field);
        }
    };
    if old["type"] != "ExternalName" && new["type"] == "ExternalName" {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"] {
            drop_same(new, field);
        }
    }
    if has_node_ports(old) && !has_node_ports(new) {
        let had: Vec<Value> = ports(old).map(|port| port["nodePort"].clone()).collect();
        for port in ports_mut(new).filter(|port| had.contains(&port["nodePort"])) {
            remove(port, "nodePort");
        }
    }
    if needs_health_port(old) && !needs_health_port(new) {
        drop_same(new, "healthCheckNodePort");
    }
    if is_balanced(old) && !is_balanced(new) {
        drop_same(new, "allocateLoadBalancerNodePorts");
        drop_same(new, "loadBalancerClass");
    }
    if is_external(old) && !is_external(new) {
        drop_same(new, "externalTrafficPolicy");
    }
}

/// Gives out addresses and ports.
pub fn allocate(store: &Store, service: &mut Value) -> Vec<Cause> {
    let own = service["metadata"]["uid"].clone();
    let all = store.list("services", None);
    let others: Vec<&Value> =
        all.iter().filter(|other| other["metadata"]["uid"] != own).map(|other| &other["spec"]).collect();
    let spec = &mut service["spec"];
    let mut causes = Vec::new();
    if spec["type"] != "ExternalName" {
        allocate_addresses(&others, spec);
    }
    let mut used: BTreeSet<(u64, String)> = BTreeSet::new();
    for other in &others {
        let health = other["healthCheckNodePort"].as_u64();
        used.extend(health.map(|port| (port, "TCP".to_owned())));
        used.extend(
            ports(other).filter_map(|port| Some((port["nodePort"].as_u64()?, text(&port["protocol"])))),
        );
    }
    if has_node_ports(spec) {
        for (at, port) in ports_mut(spec).enumerate() {
            let protocol = text(&port["protocol"]);
            let wanted = port["nodePort"].as_u64().unwrap_or_default();
            if wanted == 0 {
                let free = free_port(&used);
                port["nodePort"] = free.into();
                used.insert((free, protocol));
            } else if !used.insert((wanted, protocol)) {
                let field = format!("spec.ports[{at}].nodePort");
                causes.push(Cause::invalid(field, &wanted.into(), "provided port is already allocated"));
            }
        }
    }
    if needs_health_port(spec) && spec["healthCheckNodePort"].as_u64().unwrap_or_default() == 0 {
        spec["healthCheckNodePort"] = free_port(&used).into();
    }
    causes
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn free_port(used: &BTreeSet<(u64, String)>) -> u64 {
    let taken: BTreeSet<u64> = used.iter().map(|(port, _)| *port).collect();
    NODE_PORTS.into_iter().find(|port| !taken.contains(port)).unwrap_or_default()
}

fn family(address: &str) -> &'static str {
    if address.contains(':') { "IPv6" } else { "IPv4" }
}

/// Families and cluster addresses. The cluster is dual stack, IPv4 first.
fn allocate_addresses(others: &[&Value], spec: &mut Value) {
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
    let mut used: BTreeSet<String> = BTreeSet::new();
    for other in others {
        used.extend(list(other, "clusterIPs"));
    }
    for family in families.iter().skip(addresses.len()).filter(|_| !headless) {
        addresses.push(free_address(&used, family));
    }
    spec["clusterIP"] = addresses.first().cloned().unwrap_or_default().into();
    spec["clusterIPs"] = addresses.into();
    spec["ipFamilies"] = families.into();
}

/// The lowest free one of 10.96.0.0/12 or fd00:10:96::/112.
fn free_address(used: &BTreeSet<String>, family: &str) -> String {
    let address = |number: u32| -> String {
        let address: IpAddr = if family == "IPv6" {
            let low = u16::try_from(number & 0xffff).unwrap_or_default();
            Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, low).into()
        } else {
            Ipv4Addr::from(0x0a60_0000 + number).into()
        };
        address.to_string()
    };
    (1..).map(address).find(|address| !used.contains(address)).unwrap_or_default()
}

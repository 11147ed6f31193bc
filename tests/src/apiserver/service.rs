//! Services: defaults, and what goes with a type.
//! After `pkg/apis/core/v1/defaults.go` and `pkg/registry/core/service/strategy.go`.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::strategy::{Part, copy, ensure_object, remove};

fn is_balanced(spec: &Value) -> bool {
    spec["type"] == "LoadBalancer"
}

/// Whether its ports are given node ports.
#[must_use]
pub fn has_node_ports(spec: &Value) -> bool {
    spec["type"] == "NodePort" || (is_balanced(spec) && spec["allocateLoadBalancerNodePorts"] != false)
}

fn is_external(spec: &Value) -> bool {
    matches!(spec["type"].as_str(), Some("NodePort" | "LoadBalancer"))
}

/// Whether it has no address in the cluster.
#[must_use]
pub fn is_headless(spec: &Value) -> bool {
    spec["clusterIP"] == "None"
}

/// Whether it is given a port for health checks.
#[must_use]
pub fn needs_health_port(spec: &Value) -> bool {
    is_balanced(spec) && spec["externalTrafficPolicy"] == "Local"
}

/// The ports.
pub fn ports_mut(spec: &mut Value) -> impl Iterator<Item = &mut Value> {
    spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten()
}

/// The ports.
pub fn ports(spec: &Value) -> impl Iterator<Item = &Value> {
    spec["ports"].as_array().into_iter().flatten()
}

/// Sets a field that has no value.
pub fn set_default(object: &mut Value, field: &str, value: impl Into<Value>) {
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

//! What a Service may not be: `ValidateService`, as far as tests meet it.

use std::{collections::BTreeSet, net::IpAddr};

use serde_json::Value;

use super::{failure::Cause, names, strategy::Part};

/// What is wrong with a Service.
#[must_use]
pub fn check(before: Option<(Part, &Value)>, service: &Value) -> Vec<Cause> {
    let spec = &service["spec"];
    let mut causes = Vec::new();
    check_choices(spec, &mut causes);
    check_ports(spec, &mut causes);
    check_balancer(spec, &mut causes);
    if let Some((_, old)) = before {
        check_changes(&old["spec"], spec, &mut causes);
    }
    check_status(service, &mut causes);
    causes
}

fn check_choices(spec: &Value, causes: &mut Vec<Cause>) {
    let choices: [(&str, &[&str]); 5] = [
        ("type", &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]),
        ("sessionAffinity", &["ClientIP", "None"]),
        ("externalTrafficPolicy", &["Cluster", "Local"]),
        ("internalTrafficPolicy", &["Cluster", "Local"]),
        ("ipFamilyPolicy", &["PreferDualStack", "RequireDualStack", "SingleStack"]),
    ];
    for (field, supported) in choices {
        if let Some(value) = spec.get(field).filter(|value| !value.is_null())
            && !value.as_str().is_some_and(|value| supported.contains(&value))
        {
            causes.push(Cause::unsupported(format!("spec.{field}"), value, supported));
        }
    }
    let timeout = &spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"];
    if timeout.as_i64().is_some_and(|seconds| !(1..=86400).contains(&seconds)) {
        let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
        causes.push(Cause::invalid(field, timeout, "must be greater than 0 and less than 86400"));
    }
}

fn check_ports(spec: &Value, causes: &mut Vec<Cause>) {
    let ports: Vec<&Value> = spec["ports"].as_array().into_iter().flatten().collect();
    if ports.is_empty() && spec["type"] != "ExternalName" && spec["clusterIP"] != "None" {
        causes.push(Cause::required("spec.ports", ""));
    }
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (at, port) in ports.iter().enumerate() {
        let field = |name: &str| format!("spec.ports[{at}].{name}");
        let in_range = |value: &Value| value.as_i64().is_some_and(|number| (1..=65535).contains(&number));
        let why = "must be between 1 and 65535, inclusive";
        if !in_range(&port["port"]) {
            causes.push(Cause::invalid(field("port"), &port["port"], why));
        }
        let target = &port["targetPort"];
        if target.is_number() && !in_range(target) {
            causes.push(Cause::invalid(field("targetPort"), target, why));
        }
        let protocols = ["SCTP", "TCP", "UDP"];
        if !port["protocol"].as_str().is_some_and(|protocol| protocols.contains(&protocol)) {
            causes.push(Cause::unsupported(field("protocol"), &port["protocol"], &protocols));
        }
        let name = port["name"].as_str().unwrap_or_default();
        if name.is_empty() && ports.len() > 1 {
            causes.push(Cause::required(field("name"), ""));
        } else if !name.is_empty() && !names::is_label(name) {
            let why = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-'";
            causes.push(Cause::invalid(field("name"), &port["name"], why));
        } else if !name.is_empty() && !names.insert(name) {
            causes.push(duplicate(field("name"), &port["name"]));
        }
        if !numbers.insert((port["port"].to_string(), port["protocol"].to_string())) {
            causes.push(duplicate(format!("spec.ports[{at}]"), port));
        }
    }
}

fn duplicate(field: String, value: &Value) -> Cause {
    Cause { reason: "FieldValueDuplicate", field, message: format!("Duplicate value: {value}") }
}

fn is_cidr(text: &str) -> bool {
    let Some((address, length)) = text.trim().split_once('/') else { return false };
    let most = match address.parse() {
        Ok(IpAddr::V4(_)) => 32,
        Ok(IpAddr::V6(_)) => 128,
        Err(_) => return false,
    };
    length.parse::<u8>().is_ok_and(|length| length <= most)
}

/// Fields that only load balancers have.
fn check_balancer(spec: &Value, causes: &mut Vec<Cause>) {
    if spec["type"] == "LoadBalancer" {
        let class = spec["loadBalancerClass"].as_str();
        if class.is_some_and(|class| class.is_empty() || class.contains(' ')) {
            let why = "name part must consist of alphanumeric characters, '-', '_' or '.'";
            causes.push(Cause::invalid("spec.loadBalancerClass", &spec["loadBalancerClass"], why));
        }
    } else {
        let why = "may only be used when `type` is 'LoadBalancer'";
        for field in ["loadBalancerClass", "allocateLoadBalancerNodePorts"] {
            if spec.get(field).is_some_and(|value| !value.is_null()) {
                causes.push(Cause::forbidden(format!("spec.{field}"), why));
            }
        }
    }
    let ranges: Vec<&Value> = spec["loadBalancerSourceRanges"].as_array().into_iter().flatten().collect();
    if !ranges.is_empty() && spec["type"] != "LoadBalancer" {
        causes.push(Cause::forbidden(
            "spec.LoadBalancerSourceRanges",
            "may only be used when `type` is 'LoadBalancer'",
        ));
    }
    for (at, range) in ranges.into_iter().enumerate() {
        if !range.as_str().is_some_and(is_cidr) {
            let why = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
            causes.push(Cause::invalid(format!("spec.LoadBalancerSourceRanges[{at}]"), range, why));
        }
    }
}

fn check_changes(old: &Value, new: &Value, causes: &mut Vec<Cause>) {
    let why = "may not change once set";
    let class = |spec: &Value| spec.get("loadBalancerClass").filter(|value| !value.is_null()).cloned();
    // It may be set only together with the type.
    if old["type"] == "LoadBalancer" && new["type"] == "LoadBalancer" && class(old) != class(new) {
        causes.push(Cause::invalid("spec.loadBalancerClass", &new["loadBalancerClass"], why));
    }
    let first = |spec: &Value| spec["clusterIP"].as_str().unwrap_or_default().to_owned();
    let (was, is) = (first(old), first(new));
    let fixed = old["type"] != "ExternalName" && new["type"] != "ExternalName";
    if fixed && !was.is_empty() && was != is {
        causes.push(Cause::invalid("spec.clusterIPs[0]", &new["clusterIPs"], why));
    }
}

fn check_status(service: &Value, causes: &mut Vec<Cause>) {
    let field = "status.loadBalancer.ingress";
    let ingress = service["status"]["loadBalancer"]["ingress"].as_array();
    let ingress: Vec<&Value> = ingress.into_iter().flatten().collect();
    if !ingress.is_empty() && service["spec"]["type"] != "LoadBalancer" {
        let why = "may only be used when `spec.type` is \"LoadBalancer\"";
        causes.push(Cause::forbidden(field, why));
    }
    for (at, entry) in ingress.into_iter().enumerate() {
        if let Some(ip) = entry["ip"].as_str()
            && ip.parse::<IpAddr>().is_err()
        {
            let why = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
            causes.push(Cause::invalid(format!("{field}[{at}].ip"), &entry["ip"], why));
        }
        let mode = &entry["ipMode"];
        if mode.is_string() && mode != "VIP" && mode != "Proxy" {
            causes.push(Cause::unsupported(format!("{field}[{at}].ipMode"), mode, &["Proxy", "VIP"]));
        }
    }
}

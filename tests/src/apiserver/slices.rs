//! EndpointSlices: defaults and what may not be, after `pkg/apis/discovery`.

use std::net::IpAddr;

use serde_json::Value;

use super::{failure::Cause, service::set_default};

/// Fills in what a slice leaves out.
pub fn prepare(slice: &mut Value) {
    for port in slice.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        set_default(port, "name", "");
        set_default(port, "protocol", "TCP");
    }
}

/// What is wrong with a slice.
#[must_use]
pub fn check(old: Option<&Value>, slice: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let types = ["FQDN", "IPv4", "IPv6"];
    let kind = slice["addressType"].as_str().unwrap_or_default();
    if kind.is_empty() {
        causes.push(Cause::required("addressType", ""));
    } else if !types.contains(&kind) {
        causes.push(Cause::unsupported("addressType", &slice["addressType"], &types));
    }
    if old.is_some_and(|old| old["addressType"] != slice["addressType"]) {
        causes.push(Cause::invalid("addressType", &slice["addressType"], "field is immutable"));
    }
    for (at, endpoint) in slice["endpoints"].as_array().into_iter().flatten().enumerate() {
        let addresses: Vec<&Value> = endpoint["addresses"].as_array().into_iter().flatten().collect();
        let field = format!("endpoints[{at}].addresses");
        if addresses.is_empty() {
            causes.push(Cause::required(field.clone(), "must contain at least 1 address"));
        }
        for (number, address) in addresses.into_iter().enumerate() {
            let parsed = address.as_str().and_then(|text| text.parse::<IpAddr>().ok());
            let good = match kind {
                "IPv4" => parsed.is_some_and(|address| address.is_ipv4() && !address.is_loopback()),
                "IPv6" => parsed.is_some_and(|address| address.is_ipv6() && !address.is_loopback()),
                _ => true,
            };
            if !good {
                let why = format!("must be a valid {kind} address, and not of the loopback range");
                causes.push(Cause::invalid(format!("{field}[{number}]"), address, &why));
            }
        }
    }
    for (at, port) in slice["ports"].as_array().into_iter().flatten().enumerate() {
        let protocols = ["SCTP", "TCP", "UDP"];
        if !port["protocol"].as_str().is_some_and(|protocol| protocols.contains(&protocol)) {
            causes.push(Cause::unsupported(format!("ports[{at}].protocol"), &port["protocol"], &protocols));
        }
    }
    causes
}

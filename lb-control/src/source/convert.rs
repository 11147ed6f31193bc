//! From the Kubernetes API's types to ours, with the API server's defaults and its checks as far
//! as what follows relies on them: files have not been through an API server.

use std::{collections::BTreeSet, net::IpAddr};

use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};

use crate::crd::AddressPool;
use crate::model::{
    ANNOTATION_ADDRESSES, ANNOTATION_POOL, ANNOTATION_SHARING, Endpoint, EndpointPort, EndpointSlice, Family,
    FamilyPolicy, ObjectRef, Place, Pool, Protocol, Service, ServicePort, TargetPort,
};

/// Names the Service of an EndpointSlice.
pub const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";

/// A field that cannot be taken as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// Its path.
    pub field: String,
    /// What is wrong.
    pub message: String,
}

/// Collects what is wrong, so that all of it can be mended at once.
#[derive(Default)]
struct Errors(Vec<FieldError>);

impl Errors {
    fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(FieldError { field: field.into(), message: message.into() });
    }

    fn finish<T>(self, value: T) -> Result<T, Vec<FieldError>> {
        if self.0.is_empty() { Ok(value) } else { Err(self.0) }
    }

    fn port(&mut self, field: impl Into<String>, port: i32) -> u16 {
        match u16::try_from(port) {
            Ok(port) if port > 0 => port,
            _ => {
                self.add(field, format!("{port} is no port number (1 to 65535)"));
                0
            }
        }
    }

    fn address(&mut self, field: impl Into<String>, text: &str) -> Option<IpAddr> {
        let parsed = text.trim().parse();
        if parsed.is_err() {
            self.add(field, format!("`{text}` is no IP address"));
        }
        parsed.ok()
    }

    fn protocol(&mut self, field: impl Into<String>, text: Option<&str>) -> Protocol {
        match text {
            None | Some("TCP") => Protocol::Tcp,
            Some("UDP") => Protocol::Udp,
            Some("SCTP") => Protocol::Sctp,
            Some(other) => {
                self.add(field, format!("`{other}` is no protocol (TCP, UDP or SCTP)"));
                Protocol::Tcp
            }
        }
    }
}

/// Whether a text is a DNS label (RFC 1123), which Kubernetes asks of the names that end up in
/// map entries of 64 bytes.
fn is_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Namespace and name of an object; without a namespace it is in `default`, as with kubectl.
#[must_use]
pub fn object_ref(metadata: &ObjectMeta) -> ObjectRef {
    ObjectRef::new(
        metadata.namespace.clone().unwrap_or_else(|| "default".into()),
        metadata.name.clone().unwrap_or_default(),
    )
}

/// A Service.
///
/// # Errors
/// Every field that cannot be taken as it is.
pub fn service(from: &core::Service, place: Option<Place>) -> Result<Service, Vec<FieldError>> {
    let mut errors = Errors::default();
    let object = object_ref(&from.metadata);
    check_names(&object, &mut errors);
    let Some(spec) = &from.spec else {
        errors.add("spec", "is missing");
        return Err(errors.0);
    };
    let annotation = |name: &str| {
        let value = from.metadata.annotations.as_ref()?.get(name)?.trim();
        (!value.is_empty()).then(|| value.to_owned())
    };
    let (requested_addresses, requested_by) =
        requested(annotation(ANNOTATION_ADDRESSES), spec.load_balancer_ip.as_deref(), &mut errors);
    let service = Service {
        object,
        place,
        is_load_balancer: spec.type_.as_deref() == Some("LoadBalancer"),
        load_balancer_class: spec.load_balancer_class.clone(),
        ports: service_ports(spec, &mut errors),
        ip_families: families(spec, &mut errors),
        ip_family_policy: family_policy(spec, &mut errors),
        requested_addresses,
        requested_by,
        pool: annotation(ANNOTATION_POOL),
        sharing_key: annotation(ANNOTATION_SHARING),
        local_traffic_only: spec.external_traffic_policy.as_deref() == Some("Local"),
        client_ip_affinity: spec.session_affinity.as_deref() == Some("ClientIP"),
        source_ranges: spec.load_balancer_source_ranges.clone().unwrap_or_default(),
        publish_not_ready_addresses: spec.publish_not_ready_addresses.unwrap_or(false),
    };
    if let Some(policy) = spec.external_traffic_policy.as_deref()
        && !matches!(policy, "" | "Local" | "Cluster")
    {
        errors.add("spec.externalTrafficPolicy", format!("`{policy}` is neither Cluster nor Local"));
    }
    if let Some(affinity) = spec.session_affinity.as_deref()
        && !matches!(affinity, "" | "None" | "ClientIP")
    {
        errors.add("spec.sessionAffinity", format!("`{affinity}` is neither None nor ClientIP"));
    }
    errors.finish(service)
}

fn check_names(object: &ObjectRef, errors: &mut Errors) {
    for (field, name) in [("metadata.name", &object.name), ("metadata.namespace", &object.namespace)] {
        if name.is_empty() {
            errors.add(field, "is missing");
        } else if !is_label(name) {
            errors.add(field, format!("`{name}` is no DNS label (a-z, 0-9 and -, at most 63 characters)"));
        }
    }
}

fn requested(annotation: Option<String>, field: Option<&str>, errors: &mut Errors) -> (Vec<IpAddr>, String) {
    let by_annotation = format!("metadata.annotations[{ANNOTATION_ADDRESSES}]");
    let mut addresses: Vec<IpAddr> = Vec::new();
    let (texts, requested_by) = match (&annotation, field.filter(|text| !text.is_empty())) {
        (Some(annotation), _) => (annotation.as_str(), by_annotation),
        (None, Some(text)) => (text, "spec.loadBalancerIP".to_owned()),
        (None, None) => return (addresses, String::new()),
    };
    for text in texts.split(',') {
        if let Some(address) = errors.address(&requested_by, text) {
            if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
                errors.add(&requested_by, format!("{address} cannot be the address of a Service"));
            } else if addresses.iter().any(|other| Family::of(*other) == Family::of(address)) {
                errors.add(&requested_by, format!("more than one {} address", Family::of(address)));
            } else {
                addresses.push(address);
            }
        }
    }
    (addresses, requested_by)
}

fn families(spec: &core::ServiceSpec, errors: &mut Errors) -> Vec<Family> {
    let mut families = Vec::new();
    for (index, text) in spec.ip_families.iter().flatten().enumerate() {
        let field = format!("spec.ipFamilies[{index}]");
        let family = match text.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            other => {
                errors.add(field, format!("`{other}` is neither IPv4 nor IPv6"));
                continue;
            }
        };
        if families.contains(&family) {
            errors.add(field, format!("{family} is listed twice"));
        } else {
            families.push(family);
        }
    }
    families
}

fn family_policy(spec: &core::ServiceSpec, errors: &mut Errors) -> FamilyPolicy {
    match spec.ip_family_policy.as_deref() {
        None | Some("SingleStack") => {
            // The API server refuses it likewise.
            if spec.ip_families.as_ref().is_some_and(|families| families.len() > 1) {
                errors.add(
                    "spec.ipFamilyPolicy",
                    "must be PreferDualStack or RequireDualStack for two families",
                );
            }
            FamilyPolicy::SingleStack
        }
        Some("PreferDualStack") => FamilyPolicy::PreferDualStack,
        Some("RequireDualStack") => FamilyPolicy::RequireDualStack,
        Some(other) => {
            errors.add(
                "spec.ipFamilyPolicy",
                format!("`{other}` is none of SingleStack, PreferDualStack, RequireDualStack"),
            );
            FamilyPolicy::SingleStack
        }
    }
}

fn service_ports(spec: &core::ServiceSpec, errors: &mut Errors) -> Vec<ServicePort> {
    let from = spec.ports.as_deref().unwrap_or_default();
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    let mut ports = Vec::with_capacity(from.len());
    for (index, port) in from.iter().enumerate() {
        let path = |field: &str| format!("spec.ports[{index}].{field}");
        let name = port.name.clone().unwrap_or_default();
        let protocol = errors.protocol(path("protocol"), port.protocol.as_deref());
        let number = errors.port(path("port"), port.port);
        if name.is_empty() && from.len() > 1 {
            errors.add(path("name"), "is needed when there is more than one port");
        } else if !name.is_empty() && !is_label(&name) {
            errors.add(path("name"), format!("`{name}` is no DNS label"));
        } else if !names.insert(name.clone()) {
            errors.add(path("name"), format!("`{name}` is taken by an earlier port"));
        }
        if number != 0 && !numbers.insert((number, protocol)) {
            errors.add(path("port"), format!("{number}/{protocol} is taken by an earlier port"));
        }
        let target_port = match &port.target_port {
            None => TargetPort::Number(number),
            Some(IntOrString::Int(0)) => TargetPort::Number(number),
            Some(IntOrString::Int(target)) => TargetPort::Number(errors.port(path("targetPort"), *target)),
            Some(IntOrString::String(name)) => TargetPort::Name(name.clone()),
        };
        ports.push(ServicePort { name, protocol, port: number, target_port });
    }
    ports
}

/// An EndpointSlice.
///
/// # Errors
/// Every field that cannot be taken as it is.
pub fn endpoint_slice(
    from: &discovery::EndpointSlice,
    place: Option<Place>,
) -> Result<EndpointSlice, Vec<FieldError>> {
    let mut errors = Errors::default();
    let object = object_ref(&from.metadata);
    if object.name.is_empty() {
        errors.add("metadata.name", "is missing");
    }
    let family = match from.address_type.as_str() {
        "IPv4" => Some(Family::V4),
        "IPv6" => Some(Family::V6),
        "FQDN" => None,
        other => {
            errors.add("addressType", format!("`{other}` is none of IPv4, IPv6, FQDN"));
            None
        }
    };
    let mut ports = Vec::new();
    for (index, port) in from.ports.iter().flatten().enumerate() {
        // Without a number, a port means "all ports" (discovery/v1), which leads nowhere here.
        if let Some(number) = port.port {
            ports.push(EndpointPort {
                name: port.name.clone().unwrap_or_default(),
                protocol: errors.protocol(format!("ports[{index}].protocol"), port.protocol.as_deref()),
                port: errors.port(format!("ports[{index}].port"), number),
            });
        }
    }
    let endpoints = match family {
        Some(family) => endpoints(from.endpoints.as_deref().unwrap_or_default(), family, &mut errors),
        None => Vec::new(),
    };
    let service = from.metadata.labels.as_ref().and_then(|labels| labels.get(LABEL_SERVICE_NAME)).cloned();
    errors.finish(EndpointSlice { object, place, service, family, ports, endpoints })
}

fn endpoints(from: &[discovery::Endpoint], family: Family, errors: &mut Errors) -> Vec<Endpoint> {
    let mut endpoints = Vec::with_capacity(from.len());
    for (index, endpoint) in from.iter().enumerate() {
        let field = || format!("endpoints[{index}].addresses[0]");
        let Some(text) = endpoint.addresses.first() else {
            errors.add(format!("endpoints[{index}].addresses"), "is empty");
            continue;
        };
        let Some(address) = errors.address(field(), text) else { continue };
        if Family::of(address) != family {
            errors.add(field(), format!("{address} is not {family}, which addressType promises"));
            continue;
        }
        // The API server refuses these too (ValidateEndpointIP): packets must not be led to the
        // node itself, to the link, or to many.
        if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
            errors.add(field(), format!("{address} cannot be the address of an endpoint"));
            continue;
        }
        let conditions = endpoint.conditions.as_ref();
        let ready = conditions.and_then(|conditions| conditions.ready).unwrap_or(true);
        endpoints.push(Endpoint {
            address,
            ready,
            serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(ready),
            terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
        });
    }
    endpoints
}

/// An address pool.
///
/// # Errors
/// Every field that cannot be taken as it is.
pub fn address_pool(from: &AddressPool, place: Option<Place>) -> Result<Pool, Vec<FieldError>> {
    let mut errors = Errors::default();
    let name = from.metadata.name.clone().unwrap_or_default();
    if name.is_empty() {
        errors.add("metadata.name", "is missing");
    }
    if from.spec.addresses.is_empty() {
        errors.add("spec.addresses", "is empty: a pool needs at least one address");
    }
    let mut ranges: Vec<crate::model::AddressRange> = Vec::new();
    for (index, text) in from.spec.addresses.iter().enumerate() {
        let field = format!("spec.addresses[{index}]");
        match text.parse::<crate::model::AddressRange>() {
            Err(error) => errors.add(field, error.to_string()),
            Ok(range) => {
                if let Some(other) = ranges.iter().find(|other| other.overlaps(&range)) {
                    errors.add(field, format!("`{text}` overlaps {other} of the same pool"));
                }
                ranges.push(range);
            }
        }
    }
    errors.finish(Pool {
        name,
        place,
        ranges,
        auto_assign: from.spec.auto_assign,
        avoid_buggy_ips: from.spec.avoid_buggy_ips,
        priority: from.spec.priority,
    })
}

//! From the Kubernetes API's types to ours, with the API server's defaults and its checks as far
//! as what follows relies on them: files have not been through an API server.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::{
        apis::meta::v1::{self as meta, ObjectMeta},
        util::intstr::IntOrString,
    },
};
use lb_common::abi::ConnectionLimit;

use crate::model::{
    ANNOTATION_ADDRESSES, ANNOTATION_CLIENT_ADDRESS, ANNOTATION_CONNECTION_RATE, ANNOTATION_EXTERNAL_IPS,
    ANNOTATION_HEALTH_CHECK, ANNOTATION_POOL, ANNOTATION_SCHEDULER, ANNOTATION_SHARING,
    ANNOTATION_SLICE_WEIGHT, ANNOTATION_SLOW_START, ANNOTATION_WEIGHTS, ApiState, BackendCheck, BadCheck,
    BadSlowStart, BadWeights, ClientAddress, Condition, Endpoint, EndpointPort, EndpointSlice, FIELD_MANAGER,
    Family, FamilyPolicy, Ingress, METALLB_PREFIXES, ObjectRef, Place, Protocol, Scheduler, Service,
    ServicePort, SlowStart, TargetPort, UnknownClientAddress, UnknownScheduler, Weights,
    parse_connection_limit,
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
pub(super) struct Errors(pub(super) Vec<FieldError>);

impl Errors {
    pub(super) fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(FieldError { field: field.into(), message: message.into() });
    }

    pub(super) fn finish<T>(self, value: T) -> Result<T, Vec<FieldError>> {
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
    // Ours first, then MetalLB's in either spelling.
    let either = |ours: &str, metallb: &str| {
        let foreign = METALLB_PREFIXES.iter().map(|prefix| format!("{prefix}{metallb}"));
        [ours.to_owned()].into_iter().chain(foreign).find_map(|name| Some((annotation(&name)?, name)))
    };
    let (requested_addresses, requested_by) = requested(
        either(ANNOTATION_ADDRESSES, "loadBalancerIPs"),
        spec.load_balancer_ip.as_deref(),
        &mut errors,
    );
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
        pool: either(ANNOTATION_POOL, "address-pool").map(|(value, _)| value),
        sharing_key: either(ANNOTATION_SHARING, "allow-shared-ip").map(|(value, _)| value),
        local_traffic_only: spec.external_traffic_policy.as_deref() == Some("Local"),
        affinity_seconds: affinity(spec, &mut errors),
        connection_limit: connection_limit(annotation(ANNOTATION_CONNECTION_RATE), &mut errors),
        source_ranges: source_ranges(spec, annotation(ANNOTATION_SOURCE_RANGES), &mut errors),
        publish_not_ready_addresses: spec.publish_not_ready_addresses.unwrap_or(false),
        health_check_node_port: spec
            .health_check_node_port
            .filter(|port| *port != 0)
            .map(|port| errors.port("spec.healthCheckNodePort", port)),
        scheduler: scheduler(annotation(ANNOTATION_SCHEDULER), &mut errors),
        slow_start: slow_start(annotation(ANNOTATION_SLOW_START), &mut errors),
        client_address: client_address(annotation(ANNOTATION_CLIENT_ADDRESS), &mut errors),
        backend_check: backend_check(annotation(ANNOTATION_HEALTH_CHECK), &mut errors),
        weights: weights(annotation(ANNOTATION_WEIGHTS), &mut errors),
        labels: from.metadata.labels.clone().unwrap_or_default(),
        selector: spec.selector.clone().unwrap_or_default(),
        api: api_state(from),
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
    // What is to be let go of is let go of, whatever is wrong with how it would be served: else it
    // would stay as it last was, held by our finalizers. Files have nothing that holds them.
    let is_file = service.place.is_some();
    if !is_file && (service.api.deleting || !service.is_load_balancer) {
        return Ok(service);
    }
    errors.finish(service)
}

/// What the API server has about a Service beside its specification.
pub(super) fn api_state(from: &core::Service) -> ApiState {
    let metadata = &from.metadata;
    let status = from.status.as_ref();
    let ingress = status.and_then(|status| status.load_balancer.as_ref()?.ingress.as_deref());
    let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let ours = metadata.annotations.as_ref().and_then(|all| all.get(ANNOTATION_EXTERNAL_IPS));
    ApiState {
        uid: metadata.uid.clone().unwrap_or_default(),
        resource_version: metadata.resource_version.clone().unwrap_or_default(),
        generation: metadata.generation.unwrap_or_default(),
        deleting: metadata.deletion_timestamp.is_some(),
        finalizers: metadata.finalizers.clone().unwrap_or_default(),
        ingress: ingress.unwrap_or_default().iter().map(self::ingress).collect(),
        ingress_is_ours: owns_ingress(metadata),
        conditions: conditions.iter().map(condition).collect(),
        external_ips: from.spec.as_ref().and_then(|spec| spec.external_ips.clone()).unwrap_or_default(),
        our_external_ips: ours.map_or_else(Vec::new, |text| text.split(',').map(str::to_owned).collect()),
    }
}

fn ingress(from: &core::LoadBalancerIngress) -> Ingress {
    Ingress {
        ip: from.ip.as_deref().and_then(|ip| ip.parse().ok()),
        hostname: from.hostname.clone(),
        ip_mode: from.ip_mode.clone(),
    }
}

fn condition(from: &meta::Condition) -> Condition {
    Condition {
        kind: from.type_.clone(),
        status: from.status.clone(),
        reason: from.reason.clone(),
        message: from.message.clone(),
        observed_generation: from.observed_generation.unwrap_or_default(),
    }
}

/// Whether server-side apply has recorded the ingress as ours.
fn owns_ingress(metadata: &ObjectMeta) -> bool {
    let entries = metadata.managed_fields.as_deref().unwrap_or_default();
    entries.iter().any(|entry| {
        entry.manager.as_deref() == Some(FIELD_MANAGER)
            && entry.operation.as_deref() == Some("Apply")
            && entry
                .fields_v1
                .as_ref()
                .is_some_and(|fields| fields.0.pointer("/f:status/f:loadBalancer/f:ingress").is_some())
    })
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

fn requested(
    annotation: Option<(String, String)>,
    field: Option<&str>,
    errors: &mut Errors,
) -> (Vec<IpAddr>, String) {
    let mut addresses: Vec<IpAddr> = Vec::new();
    let (texts, requested_by) = match (&annotation, field.filter(|text| !text.is_empty())) {
        (Some((value, name)), _) => (value.as_str(), format!("metadata.annotations[{name}]")),
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

/// The default of `sessionAffinityConfig.clientIP.timeoutSeconds` (core/v1).
const DEFAULT_AFFINITY_SECONDS: i32 = 10_800;
/// Its maximum.
const MAXIMUM_AFFINITY_SECONDS: i32 = 86_400;

fn affinity(spec: &core::ServiceSpec, errors: &mut Errors) -> Option<u32> {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return None;
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let seconds = config.and_then(|config| config.timeout_seconds).unwrap_or(DEFAULT_AFFINITY_SECONDS);
    if !(1..=MAXIMUM_AFFINITY_SECONDS).contains(&seconds) {
        errors.add(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            format!("{seconds} is not within 1 to {MAXIMUM_AFFINITY_SECONDS}"),
        );
    }
    u32::try_from(seconds).ok()
}

/// Kubernetes' older way to say `spec.loadBalancerSourceRanges` (core/v1 annotation_key_constants).
const ANNOTATION_SOURCE_RANGES: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";

fn source_ranges(spec: &core::ServiceSpec, annotation: Option<String>, errors: &mut Errors) -> Arc<[IpNet]> {
    let listed = spec.load_balancer_source_ranges.as_deref().unwrap_or_default();
    let by_field = listed.iter().enumerate();
    let mut texts: Vec<(String, String)> = by_field
        .map(|(index, text)| (format!("spec.loadBalancerSourceRanges[{index}]"), text.clone()))
        .collect();
    if let Some(annotation) = annotation.filter(|_| texts.is_empty()) {
        let field = format!("metadata.annotations[{ANNOTATION_SOURCE_RANGES}]");
        texts.extend(annotation.split(',').map(|text| (field.clone(), text.to_owned())));
    }
    let mut ranges = Vec::with_capacity(texts.len());
    for (field, text) in texts {
        // Kubernetes lets host bits and blanks pass.
        match text.trim().parse::<IpNet>() {
            Ok(range) => ranges.push(range.trunc()),
            Err(_) => errors.add(field, format!("`{text}` is no CIDR (192.0.2.0/24)")),
        }
    }
    ranges.sort_unstable();
    ranges.dedup();
    ranges.into()
}

fn scheduler(annotation: Option<String>, errors: &mut Errors) -> Scheduler {
    let Some(text) = annotation else { return Scheduler::default() };
    text.parse().unwrap_or_else(|error: UnknownScheduler| {
        errors.add(format!("metadata.annotations[{ANNOTATION_SCHEDULER}]"), error.to_string());
        Scheduler::default()
    })
}

fn client_address(annotation: Option<String>, errors: &mut Errors) -> ClientAddress {
    let Some(text) = annotation else { return ClientAddress::default() };
    text.parse().unwrap_or_else(|error: UnknownClientAddress| {
        errors.add(format!("metadata.annotations[{ANNOTATION_CLIENT_ADDRESS}]"), error.to_string());
        ClientAddress::default()
    })
}

fn backend_check(annotation: Option<String>, errors: &mut Errors) -> Option<Arc<BackendCheck>> {
    let parsed: Result<BackendCheck, BadCheck> = annotation?.parse();
    let field = format!("metadata.annotations[{ANNOTATION_HEALTH_CHECK}]");
    parsed.map_err(|error| errors.add(field, error.to_string())).ok().map(Arc::new)
}

fn slow_start(annotation: Option<String>, errors: &mut Errors) -> Option<SlowStart> {
    let parsed: Result<SlowStart, BadSlowStart> = annotation?.parse();
    parsed
        .map_err(|error| {
            errors.add(format!("metadata.annotations[{ANNOTATION_SLOW_START}]"), error.to_string());
        })
        .ok()
}

fn weights(annotation: Option<String>, errors: &mut Errors) -> Weights {
    let Some(text) = annotation else { return Weights::default() };
    text.parse().unwrap_or_else(|error: BadWeights| {
        errors.add(format!("metadata.annotations[{ANNOTATION_WEIGHTS}]"), error.to_string());
        Weights::default()
    })
}

fn connection_limit(annotation: Option<String>, errors: &mut Errors) -> Option<ConnectionLimit> {
    parse_connection_limit(&annotation?)
        .map_err(|why| errors.add(format!("metadata.annotations[{ANNOTATION_CONNECTION_RATE}]"), why))
        .ok()
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
    let weight = from.metadata.annotations.as_ref().and_then(|all| all.get(ANNOTATION_SLICE_WEIGHT));
    let weight = weight.and_then(|text| {
        let field = format!("metadata.annotations[{ANNOTATION_SLICE_WEIGHT}]");
        let weight = text.trim().parse().ok().filter(|weight| *weight <= Weights::MAXIMUM);
        if weight.is_none() {
            errors.add(field, format!("`{text}` is no weight (0 to {})", Weights::MAXIMUM));
        }
        weight
    });
    errors.finish(EndpointSlice { object, place, service, family, ports, endpoints, weight })
}

fn hints<T>(
    endpoint: &discovery::Endpoint,
    list: impl Fn(&discovery::EndpointHints) -> Option<&[T]>,
    name: impl Fn(&T) -> &String,
) -> Box<[Arc<str>]> {
    let hints = endpoint.hints.as_ref().and_then(list).unwrap_or_default();
    hints.iter().map(|hint| name(hint).as_str().into()).collect()
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
            node: endpoint.node_name.as_deref().map(Into::into),
            zone: endpoint.zone.as_deref().map(Into::into),
            for_zones: hints(endpoint, |hints| hints.for_zones.as_deref(), |zone| &zone.name),
            for_nodes: hints(endpoint, |hints| hints.for_nodes.as_deref(), |node| &node.name),
        });
    }
    endpoints
}

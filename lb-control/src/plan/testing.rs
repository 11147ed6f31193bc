//! Services and pools in a line, for tests.

use std::sync::Arc;

use crate::model::{
    ApiState, ClientAddress, Family, FamilyPolicy, Ingress, Labels, ObjectRef, Pool, PoolOrigin, Protocol,
    Scheduler, Selector, Service, ServicePort, TargetPort, Weights,
};

/// `[namespace/]name [ip=A,B] [pool=P] [share=K] [ports=80/TCP,…]
/// [families=IPv4|IPv6|prefer|dual] [order=IPv6,IPv4] [class=C] [type=T] [local=app:web]
/// [labels=a:b,…] [check=tcp_port=81] [published=A,B] [deleting=1]`: `local` is a selector under
/// `externalTrafficPolicy: Local`, `order` is `ipFamilies`;
/// in `check`, `_` stands for a blank.
pub fn service(text: &str) -> Service {
    let mut words = text.split_whitespace();
    let mut service = Service {
        object: object(words.next().unwrap()),
        place: None,
        is_load_balancer: true,
        load_balancer_class: None,
        ports: ports("80/TCP"),
        ip_families: Vec::new(),
        ip_family_policy: FamilyPolicy::SingleStack,
        requested_addresses: Vec::new(),
        requested_by: String::new(),
        pool: None,
        sharing_key: None,
        local_traffic_only: false,
        affinity_seconds: None,
        connection_limit: None,
        source_ranges: [].into(),
        publish_not_ready_addresses: false,
        health_check_node_port: None,
        scheduler: Scheduler::default(),
        slow_start: None,
        client_address: ClientAddress::default(),
        backend_check: None,
        weights: Weights::default(),
        labels: Labels::new(),
        selector: Labels::new(),
        api: ApiState::default(),
    };
    for (key, value) in words.map(|word| word.split_once('=').unwrap()) {
        match (key, value) {
            ("ip", _) => {
                service.requested_addresses = value.split(',').map(|text| text.parse().unwrap()).collect()
            }
            ("check", _) => {
                service.backend_check = Some(Arc::new(value.replace('_', " ").parse().unwrap()));
            }
            ("pool", _) => service.pool = Some(value.into()),
            ("share", _) => service.sharing_key = Some(value.into()),
            ("ports", _) => service.ports = ports(value),
            ("families", "IPv4") => service.ip_families = vec![Family::V4],
            ("families", "IPv6") => service.ip_families = vec![Family::V6],
            ("families", "prefer") => service.ip_family_policy = FamilyPolicy::PreferDualStack,
            ("families", "dual") => service.ip_family_policy = FamilyPolicy::RequireDualStack,
            ("order", _) => {
                let family = |text| if text == "IPv6" { Family::V6 } else { Family::V4 };
                service.ip_families = value.split(',').map(family).collect();
            }
            ("local", _) => {
                service.local_traffic_only = true;
                service.selector = labels(value);
            }
            ("labels", _) => service.labels = labels(value),
            ("published", _) => {
                let ip = |text: &str| Ingress { ip: Some(text.parse().unwrap()), ..Ingress::default() };
                service.api.ingress = value.split(',').map(ip).collect();
            }
            ("deleting", _) => service.api.deleting = true,
            ("class", _) => service.load_balancer_class = Some(value.into()),
            ("type", _) => service.is_load_balancer = value == "LoadBalancer",
            _ => panic!("{key}={value}"),
        }
    }
    service
}

/// `[namespace/]name`
pub fn object(text: &str) -> ObjectRef {
    let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
    ObjectRef::new(namespace, name)
}

/// `a:b,c:d`; without a colon there are none.
pub fn labels(text: &str) -> Labels {
    let pairs = text.split(',').filter_map(|pair| pair.split_once(':'));
    pairs.map(|(key, value)| (key.into(), value.into())).collect()
}

fn ports(text: &str) -> Vec<ServicePort> {
    let port = |text: &str| {
        let (number, protocol) = text.split_once('/').unwrap();
        let protocol = match protocol {
            "TCP" => Protocol::Tcp,
            "UDP" => Protocol::Udp,
            _ => Protocol::Sctp,
        };
        let port = number.parse().unwrap();
        ServicePort { name: text.replace('/', "-"), protocol, port, target_port: TargetPort::Number(port) }
    };
    text.split(',').map(port).collect()
}

/// `name range… [buggy] [manual] [disabled] [priority=N] [metallb=NAMESPACE] [namespaces=A,B]
/// [in=a:b] [for=a:b]`: `in` selects namespaces and `for` Services by their labels.
pub fn pool(text: &str) -> Pool {
    let mut words = text.split_whitespace();
    let name = words.next().unwrap().into();
    let mut pool = Pool {
        name,
        place: None,
        uid: String::new(),
        ranges: Vec::new(),
        auto_assign: true,
        avoid_buggy_ips: false,
        priority: 0,
        origin: PoolOrigin::Pointsman,
        labels: Labels::new(),
        namespaces: Vec::new(),
        namespace_selectors: Vec::new(),
        service_selectors: Vec::new(),
        disabled: false,
    };
    for word in words {
        match (word, word.split_once('=')) {
            ("buggy", _) => pool.avoid_buggy_ips = true,
            ("manual", _) => pool.auto_assign = false,
            ("disabled", _) => pool.disabled = true,
            (_, Some(("metallb", namespace))) => pool.origin = PoolOrigin::MetalLb(namespace.into()),
            (_, Some(("namespaces", names))) => pool.namespaces = names.split(',').map(Into::into).collect(),
            (_, Some(("in", text))) => pool.namespace_selectors.push(selector(text)),
            (_, Some(("for", text))) => pool.service_selectors.push(selector(text)),
            (_, Some(("priority", number))) => pool.priority = number.parse().unwrap(),
            (range, _) => pool.ranges.push(range.parse().unwrap()),
        }
    }
    pool
}

fn selector(text: &str) -> Selector {
    Selector { labels: labels(text), ..Selector::default() }
}

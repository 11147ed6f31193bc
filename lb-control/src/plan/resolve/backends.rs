//! Which endpoints of a Service are backends here, and how they take part.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use crate::model::{
    Backends, DesiredBackend, Endpoint, EndpointPort, EndpointSlice, Family, Role, Service, ServicePort,
};

/// Where this data plane is: endpoints may be meant for some places only.
#[derive(Clone, Copy, Debug, Default)]
pub struct Here<'a> {
    /// The node's name; `None` if it is not part of a cluster.
    pub node: Option<&'a str>,
    /// The node's zone.
    pub zone: Option<&'a str>,
}

/// What all slices together say about an endpoint: while one is moved from a slice to another it
/// may stand in both (discovery/v1).
struct Merged<'a> {
    ready: bool,
    serving_while_terminating: bool,
    weight: u32,
    endpoint: &'a Endpoint,
}

/// The backends of a port in one family.
///
/// Ready endpoints take new connections; only if there is none, those that terminate but still
/// serve (KEP-1669). All others that are listed keep what they have: an endpoint that is not ready
/// for more is no reason to cut what runs.
pub(super) fn backends(
    service: &Service,
    port: &ServicePort,
    slices: &[&EndpointSlice],
    family: Family,
    here: &Here<'_>,
) -> Backends {
    let mut merged: BTreeMap<SocketAddr, Merged<'_>> = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.family == Some(family)) {
        for number in numbers(slice, port) {
            for endpoint in slice.endpoints.iter().filter(|one| is_reachable(service, one, here)) {
                let merged = merged.entry(SocketAddr::new(endpoint.address, number)).or_insert(Merged {
                    ready: false,
                    serving_while_terminating: false,
                    weight: service.weights.of(endpoint).or(slice.weight).unwrap_or(1),
                    endpoint,
                });
                merged.ready |= endpoint.ready || service.publish_not_ready_addresses;
                merged.serving_while_terminating |= endpoint.serving && endpoint.terminating;
            }
        }
    }
    let any_ready = merged.values().any(|one| one.ready);
    let can_take = |one: &Merged<'_>| if any_ready { one.ready } else { one.serving_while_terminating };
    let takers: Vec<&Endpoint> =
        merged.values().filter(|one| can_take(one)).map(|one| one.endpoint).collect();
    let preference = Preference::of(service, &takers, here);
    let backend = |one: &Merged<'_>| DesiredBackend {
        weight: one.weight,
        role: if can_take(one) && preference.prefers(one.endpoint, here) {
            Role::Active
        } else {
            Role::Terminating
        },
        local: here.node.is_some() && one.endpoint.node.as_deref() == here.node,
    };
    merged.iter().map(|(address, one)| (*address, backend(one))).collect()
}

/// `externalTrafficPolicy: Local` knows only the endpoints of this node.
fn is_reachable(service: &Service, endpoint: &Endpoint, here: &Here<'_>) -> bool {
    !service.local_traffic_only || (here.node.is_some() && endpoint.node.as_deref() == here.node)
}

/// Which of the endpoints that could take connections do so here. The hints are those of the
/// EndpointSlice controller (`trafficDistribution`, topology-aware routing), and count as with
/// kube-proxy (pkg/proxy/topology.go): only if every such endpoint has them, and some is meant for
/// this place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Preference {
    Nobody,
    Node,
    Zone,
}

impl Preference {
    fn of(service: &Service, takers: &[&Endpoint], here: &Here<'_>) -> Self {
        // Local has chosen already.
        if takers.is_empty() || service.local_traffic_only {
            return Self::Nobody;
        }
        let all_have = |hints: fn(&Endpoint) -> &[Arc<str>], place: Option<&str>| {
            place.is_some_and(|place| {
                takers.iter().all(|one| !hints(one).is_empty())
                    && takers.iter().any(|one| hints(one).iter().any(|hint| &**hint == place))
            })
        };
        if all_have(|one| &one.for_nodes, here.node) {
            Self::Node
        } else if all_have(|one| &one.for_zones, here.zone) {
            Self::Zone
        } else {
            Self::Nobody
        }
    }

    fn prefers(self, endpoint: &Endpoint, here: &Here<'_>) -> bool {
        let (hints, place) = match self {
            Self::Nobody => return true,
            Self::Node => (&endpoint.for_nodes, here.node),
            Self::Zone => (&endpoint.for_zones, here.zone),
        };
        hints.iter().any(|hint| Some(&**hint) == place)
    }
}

/// The numbers that a Service's port has in a slice. Named target ports are resolved by whoever
/// wrote the slice: it has the Service port's name, and the number may differ from slice to slice.
pub(super) fn numbers(slice: &EndpointSlice, port: &ServicePort) -> impl Iterator<Item = u16> {
    let matches = |other: &&EndpointPort| other.name == port.name && other.protocol == port.protocol;
    slice.ports.iter().filter(matches).map(|port| port.port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{ObjectRef, Protocol},
        plan::testing::service,
    };

    /// `address[@node[@zone]] [flag…]`, with the flags notready, terminating, and the hints zone=Z, node=N.
    fn endpoint(text: &str) -> Endpoint {
        let mut words = text.split_whitespace();
        let mut place = words.next().unwrap().split('@');
        let mut endpoint = Endpoint::ready(place.next().unwrap().parse().unwrap());
        endpoint.node = place.next().map(Into::into);
        endpoint.zone = place.next().map(Into::into);
        for word in words {
            match word.split_once('=') {
                None if word == "notready" => (endpoint.ready, endpoint.serving) = (false, false),
                None if word == "terminating" => (endpoint.ready, endpoint.terminating) = (false, true),
                Some(("zone", zone)) => endpoint.for_zones = [zone.into()].into(),
                Some(("node", node)) => endpoint.for_nodes = [node.into()].into(),
                _ => panic!("{word}"),
            }
        }
        endpoint
    }

    /// Backends as `address[*weight][!]`, with `!` for those that only keep what they have and `@`
    /// for those on this node.
    fn resolved(change: impl FnOnce(&mut Service), here: Here<'_>, endpoints: &[&str]) -> String {
        let mut service = service("web");
        change(&mut service);
        let slice = EndpointSlice {
            object: ObjectRef::new("default", "web-1"),
            place: None,
            service: Some("web".into()),
            family: Some(Family::V4),
            ports: vec![EndpointPort { name: "80-TCP".into(), protocol: Protocol::Tcp, port: 8080 }],
            endpoints: endpoints.iter().map(|text| endpoint(text)).collect(),
            weight: None,
        };
        let found = backends(&service, &service.ports[0], &[&slice], Family::V4, &here);
        let one = |(address, backend): (&SocketAddr, &DesiredBackend)| {
            let last = address.ip().to_string().rsplit('.').next().unwrap().to_owned();
            let weight = if backend.weight == 1 { String::new() } else { format!("*{}", backend.weight) };
            let keeps = if backend.role == Role::Terminating { "!" } else { "" };
            let local = if backend.local { "@" } else { "" };
            last + &weight + keeps + local
        };
        found.iter().map(one).collect::<Vec<_>>().join(" ")
    }

    const HERE: Here<'_> = Here { node: Some("n1"), zone: Some("a") };

    #[test]
    fn ready_before_terminating_before_nobody() {
        let plain = |endpoints: &[&str]| resolved(|_| {}, HERE, endpoints);
        assert_eq!(plain(&["10.0.0.1", "10.0.0.2 notready", "10.0.0.3 terminating"]), "1 2! 3!");
        assert_eq!(plain(&["10.0.0.2 notready", "10.0.0.3 terminating"]), "2! 3");
        assert_eq!(plain(&["10.0.0.2 notready"]), "2!");
        let publish = |service: &mut Service| service.publish_not_ready_addresses = true;
        assert_eq!(resolved(publish, HERE, &["10.0.0.1", "10.0.0.2 notready"]), "1 2");
    }

    #[test]
    fn local_policy_takes_this_node_only() {
        let local = |service: &mut Service| service.local_traffic_only = true;
        let endpoints = ["10.0.0.1@n1", "10.0.0.2@n2", "10.0.0.3"];
        assert_eq!(resolved(local, HERE, &endpoints), "1@");
        assert_eq!(resolved(|_| {}, HERE, &endpoints), "1@ 2 3");
        assert_eq!(
            resolved(local, Here::default(), &endpoints),
            "",
            "a node without a name has no endpoints"
        );
        // What is ready elsewhere is none of our business.
        assert_eq!(resolved(local, HERE, &["10.0.0.1@n1 terminating", "10.0.0.2@n2"]), "1@");
    }

    #[test]
    fn hints_count_if_all_have_them_and_some_are_for_here() {
        let plain = |endpoints: &[&str]| resolved(|_| {}, HERE, endpoints);
        assert_eq!(plain(&["10.0.0.1 zone=a", "10.0.0.2 zone=b", "10.0.0.3 zone=a"]), "1 2! 3");
        assert_eq!(plain(&["10.0.0.1 zone=a", "10.0.0.2"]), "1 2", "one without a hint");
        assert_eq!(plain(&["10.0.0.1 zone=b", "10.0.0.2 zone=b"]), "1 2", "nobody for here");
        assert_eq!(plain(&["10.0.0.1 zone=a", "10.0.0.2 zone=b notready"]), "1 2!");
        assert_eq!(plain(&["10.0.0.1 zone=a notready", "10.0.0.2 zone=b"]), "1! 2");
        assert_eq!(plain(&["10.0.0.1 zone=a node=n2", "10.0.0.2 zone=a node=n1"]), "1! 2");
        let elsewhere = Here { zone: None, ..HERE };
        assert_eq!(resolved(|_| {}, elsewhere, &["10.0.0.1 zone=a", "10.0.0.2 zone=b"]), "1 2");
    }

    #[test]
    fn weights_are_the_services_word_first() {
        let weighted = |service: &mut Service| {
            service.weights = "10.0.0.1=5, node/n2=3, zone/b=2".parse().unwrap();
        };
        let endpoints = ["10.0.0.1@n2@b", "10.0.0.2@n2@b", "10.0.0.3@n3@b", "10.0.0.4@n4@c"];
        assert_eq!(resolved(weighted, HERE, &endpoints), "1*5 2*3 3*2 4");
    }
}

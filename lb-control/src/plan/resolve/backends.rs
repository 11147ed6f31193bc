//! Which endpoints of a Service are backends here, and how they take part.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use crate::model::{
    Backends, CheckTarget, DesiredBackend, Endpoint, EndpointPort, EndpointSlice, Family, Role, Service,
    ServicePort,
};

/// Where this data plane is: endpoints may be meant for some places only.
#[derive(Clone, Copy, Debug, Default)]
pub struct Here<'a> {
    /// The node's name; `None` if it is not part of a cluster.
    pub node: Option<&'a str>,
    /// The node's zone.
    pub zone: Option<&'a str>,
}

/// Who does not work, and why, of those that health checks ask.
pub type Unhealthy = BTreeMap<CheckTarget, Arc<str>>;

/// The backends of a port.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// All of them.
    pub(super) backends: Backends,
    /// Where those are asked whether they work that could take connections.
    pub(super) targets: BTreeMap<SocketAddr, CheckTarget>,
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
///
/// Of those that could take connections, the ones whose health check fails do not, unless it fails for
/// all: then it is more likely the check that is wrong, and nothing is lost by trying. `unhealthy` is
/// `None` where nobody asks. Hints count among those that work: a zone in which nobody does has none.
pub(super) fn backends(
    service: &Service,
    port: &ServicePort,
    slices: &[&EndpointSlice],
    family: Family,
    here: &Here<'_>,
    unhealthy: Option<&Unhealthy>,
) -> Found {
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
    let check = service.backend_check.as_ref().filter(|_| unhealthy.is_some());
    let asked = |(address, one): (&SocketAddr, &Merged<'_>)| {
        let clients = service.client_address;
        let target = check.filter(|_| can_take(one))?.target(*address, port.protocol, clients)?;
        Some((*address, target))
    };
    let targets: BTreeMap<SocketAddr, CheckTarget> = merged.iter().filter_map(asked).collect();
    let works = |address: &SocketAddr| {
        let fails = |target| unhealthy.is_some_and(|unhealthy| unhealthy.contains_key(target));
        !targets.get(address).is_some_and(fails)
    };
    let any_works = merged.iter().any(|(address, one)| can_take(one) && one.weight > 0 && works(address));
    let takes = |address: &SocketAddr, one: &Merged<'_>| can_take(one) && (!any_works || works(address));
    let takers: Vec<&Endpoint> =
        merged.iter().filter(|(address, one)| takes(address, one)).map(|(_, one)| one.endpoint).collect();
    let preference = Preference::of(service, &takers, here);
    let backend = |address: &SocketAddr, one: &Merged<'_>| DesiredBackend {
        weight: one.weight,
        role: if takes(address, one) && preference.prefers(one.endpoint, here) {
            Role::Active
        } else {
            Role::Terminating
        },
        local: here.node.is_some() && one.endpoint.node.as_deref() == here.node,
    };
    let backends = merged.iter().map(|(address, one)| (*address, backend(address, one))).collect();
    Found { backends, targets }
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
        checked(change, here, endpoints, &[])
    }

    /// As [`resolved`], where health checks of some addresses fail.
    fn checked(
        change: impl FnOnce(&mut Service),
        here: Here<'_>,
        endpoints: &[&str],
        fail: &[&str],
    ) -> String {
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
        let fails = |address: &&str| {
            let address = SocketAddr::new(address.parse().unwrap(), 8080);
            let check = service.backend_check.as_ref()?;
            Some((check.target(address, Protocol::Tcp, service.client_address)?, "connect: refused".into()))
        };
        let unhealthy: Unhealthy = fail.iter().filter_map(fails).collect();
        let found = backends(&service, &service.ports[0], &[&slice], Family::V4, &here, Some(&unhealthy));
        let found = found.backends;
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
    fn who_fails_takes_nothing_unless_all_do() {
        let check = |service: &mut Service| {
            service.backend_check = Some(Arc::new("tcp".parse().unwrap()));
            service.weights = "10.0.0.9=0".parse().unwrap();
        };
        let plain = |endpoints: &[&str], fail: &[&str]| checked(check, HERE, endpoints, fail);
        let three = ["10.0.0.1", "10.0.0.2", "10.0.0.3 notready"];
        assert_eq!(plain(&three, &[]), "1 2 3!");
        assert_eq!(plain(&three, &["10.0.0.1"]), "1! 2 3!");
        assert_eq!(plain(&three, &["10.0.0.1", "10.0.0.2"]), "1 2 3!", "all fail");
        let nobody_else = ["10.0.0.1", "10.0.0.9"];
        assert_eq!(plain(&nobody_else, &["10.0.0.1"]), "1 9*0", "nobody else takes anything");
        // Those that terminate are asked if they are all that there is.
        assert_eq!(plain(&["10.0.0.1 terminating", "10.0.0.2 terminating"], &["10.0.0.2"]), "1 2!");
        // Hints are for those that work: with nobody of the zone left, the others take over.
        let zones = ["10.0.0.1 zone=a", "10.0.0.2 zone=a", "10.0.0.3 zone=b"];
        assert_eq!(plain(&zones, &["10.0.0.1"]), "1! 2 3!");
        assert_eq!(plain(&zones, &["10.0.0.1", "10.0.0.2"]), "1! 2! 3");
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

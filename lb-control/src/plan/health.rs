//! What health checks of other load balancers are answered: whether traffic for a Service with
//! `externalTrafficPolicy: Local` may be sent to this node.

use std::{collections::BTreeSet, net::IpAddr};

use super::Here;
use crate::model::{EndpointSlice, Family, Service};

/// The answer for one Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The port that is asked: the Service's `healthCheckNodePort`.
    pub port: u16,
    /// Endpoints of the Service that are ready and run on this node.
    pub endpoints: usize,
}

impl HealthCheck {
    /// The answer for a Service; `None` if nobody asks about it. `slices` are all of the Service's.
    ///
    /// Counts as kube-proxy does (`LocalReadyEndpoints` in pkg/proxy/endpointschangetracker.go):
    /// each address once, whatever its ports, and none that terminates. kube-proxy has one count
    /// for each family; a pod with an address of either is one endpoint here, so the larger one
    /// counts.
    #[must_use]
    pub fn of(service: &Service, slices: &[&EndpointSlice], here: &Here<'_>) -> Option<Self> {
        let port = service.health_check_node_port.filter(|_| service.local_traffic_only)?;
        let local = |family| {
            let slices = slices.iter().filter(move |slice| slice.family == Some(family));
            let endpoints = slices.flat_map(|slice| &slice.endpoints);
            let ready = endpoints.filter(|one| {
                here.node.is_some()
                    && one.node.as_deref() == here.node
                    && (one.ready || service.publish_not_ready_addresses)
            });
            ready.map(|one| one.address).collect::<BTreeSet<IpAddr>>().len()
        };
        Some(Self { port, endpoints: local(Family::V4).max(local(Family::V6)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Endpoint, ObjectRef},
        plan::testing::service,
    };

    /// Of endpoints written as `address[@node][!]`, with `!` for those that are not ready.
    fn slice(endpoints: &[&str]) -> EndpointSlice {
        let endpoint = |text: &str| {
            let (text, ready) = text.strip_suffix('!').map_or((text, true), |text| (text, false));
            let (address, node) = text.split_once('@').unwrap_or((text, ""));
            let node = Some(node).filter(|node| !node.is_empty()).map(Into::into);
            Endpoint { ready, node, ..Endpoint::ready(address.parse().unwrap()) }
        };
        let endpoints: Vec<_> = endpoints.iter().map(|text| endpoint(text)).collect();
        EndpointSlice {
            object: ObjectRef::new("default", "web-1"),
            place: None,
            service: Some("web".into()),
            family: endpoints.first().map(|one| Family::of(one.address)),
            ports: Vec::new(),
            endpoints,
            weight: None,
        }
    }

    fn count(slices: &[EndpointSlice], change: impl FnOnce(&mut Service)) -> Option<usize> {
        let mut service = service("web");
        service.local_traffic_only = true;
        service.health_check_node_port = Some(32_000);
        change(&mut service);
        let slices: Vec<_> = slices.iter().collect();
        let here = Here { node: Some("n1"), zone: None };
        let check = HealthCheck::of(&service, &slices, &here)?;
        assert_eq!(check.port, 32_000);
        Some(check.endpoints)
    }

    #[test]
    fn ready_endpoints_of_this_node_are_counted_once() {
        let first = slice(&["10.0.0.1@n1", "10.0.0.2@n1!", "10.0.0.3@n2", "10.0.0.4"]);
        let second = slice(&["10.0.0.1@n1", "10.0.0.5@n1"]);
        let v6 = slice(&["2001:db8::1@n1"]);
        assert_eq!(count(&[], |_| ()), Some(0));
        assert_eq!(count(std::slice::from_ref(&first), |_| ()), Some(1));
        assert_eq!(count(std::slice::from_ref(&v6), |_| ()), Some(1));
        let all = [first, second, v6];
        assert_eq!(count(&all, |_| ()), Some(2), "both families are the same pods");
        assert_eq!(count(&all, |service| service.publish_not_ready_addresses = true), Some(3));
    }

    #[test]
    fn nobody_asks_about_others() {
        assert_eq!(count(&[], |service| service.local_traffic_only = false), None);
        assert_eq!(count(&[], |service| service.health_check_node_port = None), None);
    }
}

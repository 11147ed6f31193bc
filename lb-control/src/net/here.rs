//! Backends on this node: how they are told from others.

use netlink_packet_route::route::RouteType;

use super::kernel::Links;
use super::way::{Link, LinkKind, Resolution, Route};

/// Whether a route leads to a container of this node: on the link of a bridge that joins nothing but
/// veth devices, and is none of the devices `uplinks`.
#[must_use]
pub fn leads_to_container(route: &Route, links: &Links, uplinks: &[String]) -> bool {
    let is_between = |link: &Link| link.kind == LinkKind::Bridge && !uplinks.contains(&link.name);
    let mut ports = links.values().filter(|link| link.master == Some(route.ifindex)).peekable();
    route.kind == RouteType::Unicast
        && route.gateway.is_none()
        && links.get(&route.ifindex).is_some_and(is_between)
        && ports.peek().is_some()
        && ports.all(|port| port.kind == LinkKind::Veth)
}

/// The way to a backend that is in a pod of this node.
#[must_use]
pub fn on_this_node(route: Option<&Route>, links: &Links) -> Resolution {
    let link = route.and_then(|route| links.get(&route.ifindex));
    Resolution {
        is_local: true,
        source: route.and_then(|route| route.source),
        device_behind: route
            .filter(|_| link.is_some_and(|link| !link.is_loopback))
            .map(|route| route.ifindex),
        mtu: link.map_or(0, |link| link.mtu),
        ..Resolution::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    const UPLINK: u32 = 2;

    fn route(ifindex: u32, gateway: Option<&str>) -> Route {
        let gateway = gateway.map(|gateway| gateway.parse().expect("an address"));
        Route { kind: RouteType::Unicast, ifindex, gateway, ..Route::default() }
    }

    #[test]
    fn containers_are_behind_a_bridge_of_veths() {
        let nic = Link { name: "eth0".into(), mac: Some([2; 6]), mtu: 1_500, is_up: true, ..Link::default() };
        let mut links = Links::from([(UPLINK, nic)]);
        let bridge = Link { name: "cni0".into(), kind: LinkKind::Bridge, ..links[&UPLINK].clone() };
        let port = |kind, master| Link { kind, master, ..links[&UPLINK].clone() };
        let (pod, nic) = (port(LinkKind::Veth, Some(10)), port(LinkKind::Other, Some(10)));
        links.insert(10, bridge);
        let leads = |links: &Links, route: &Route, uplink: &str| {
            leads_to_container(route, links, &["eth9".to_owned(), uplink.to_owned()])
        };
        assert!(!leads(&links, &route(10, None), "eth0"), "nothing is behind it");
        links.insert(11, pod.clone());
        links.insert(12, pod);
        assert!(leads(&links, &route(10, None), "eth0"));
        assert!(!leads(&links, &route(10, None), "cni0"), "the way to clients");
        assert!(!leads(&links, &route(10, Some("10.0.0.254")), "eth0"), "behind a router");
        assert!(!leads(&links, &route(UPLINK, None), "eth1"), "no bridge");
        links.insert(13, nic);
        assert!(!leads(&links, &route(10, None), "eth0"), "it joins the node to a network");
        let found = on_this_node(Some(&route(10, None)), &links);
        assert_eq!((found.is_local, found.device_behind, found.device), (true, Some(10), None));
    }
}

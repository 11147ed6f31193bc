//! The way to a backend: what it is put together from, and how.

use std::net::IpAddr;

use lb_common::abi::{NextHop, VlanTags};
use netlink_packet_route::route::RouteType;

use super::kernel::{Links, Neighbours};

/// A device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Name.
    pub name: String,
    /// Ethernet address; devices without one cannot be used.
    pub mac: Option<[u8; 6]>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it can send: up, with carrier.
    pub is_up: bool,
    /// Whether it is the loopback device.
    pub is_loopback: bool,
    /// The kernel's number of the XDP program on it.
    pub xdp_program: Option<u32>,
    /// The device below, of a VLAN device; none if that is in another network namespace.
    pub parent: Option<u32>,
    /// The tag, of a VLAN device.
    pub vlan: Option<Vlan>,
    /// Of which of the kinds that matter here it is.
    pub kind: LinkKind,
    /// The device that it is a port of.
    pub master: Option<u32>,
}

/// Kinds of devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinkKind {
    /// A bridge.
    Bridge,
    /// One end of a pair: the other end may be in a pod.
    Veth,
    /// A routing domain, whose ports keep what they receive.
    Vrf,
    /// Any other.
    #[default]
    Other,
}

/// The tag that a VLAN device adds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vlan {
    /// Identifier.
    pub id: u16,
    /// Whether it is one of 802.1ad instead of 802.1Q.
    pub is_service_tag: bool,
}

/// A neighbour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Neighbour {
    /// Its Ethernet address, if it is resolved.
    pub mac: Option<[u8; 6]>,
    /// Whether the kernel keeps it resolved.
    pub managed: bool,
    /// Whether somebody has set it by hand: not ours to change.
    pub is_fixed: bool,
}

/// A route, as the kernel answers for one destination.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// Whether it leads out, or where else.
    pub kind: RouteType,
    /// Device.
    pub ifindex: u32,
    /// Gateway, if the destination is not on the link.
    pub gateway: Option<IpAddr>,
    /// Source address that the kernel would use.
    pub source: Option<IpAddr>,
    /// MTU in bytes that is set on the route, or was learned on it.
    pub mtu: Option<u32>,
}

/// The way to a backend, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolution {
    /// All that a frame needs; `None` while something is missing.
    pub next_hop: Option<NextHop>,
    /// The node's address towards it.
    pub source: Option<IpAddr>,
    /// The device that frames leave by, below any VLAN: index and name.
    pub device: Option<(u32, String)>,
    /// The neighbour that has to be resolved: device and address.
    pub neighbour: Option<(u32, IpAddr)>,
    /// MTU of the device and the route, in bytes.
    pub mtu: u32,
    /// What is missing, and the way out.
    pub problem: Option<String>,
    /// Whether the backend is on this node: then nothing is missing.
    pub is_local: bool,
    /// The device that it is behind on this node; none if it is the node itself.
    pub device_behind: Option<u32>,
}

/// Puts the way to a backend together.
#[must_use]
pub fn resolve(backend: IpAddr, route: Option<&Route>, links: &Links, neighbours: &Neighbours) -> Resolution {
    let problem = |text: String| Resolution { problem: Some(text), ..Resolution::default() };
    let Some(route) = route else {
        return problem(format!("no route to the backend {backend}; see `ip route get {backend}`"));
    };
    match route.kind {
        RouteType::Unicast => {}
        RouteType::Local | RouteType::Anycast => {
            return Resolution { is_local: true, source: route.source, ..Resolution::default() };
        }
        kind => {
            let text = format!("no route to the backend {backend}: the one that matches is of type {kind:?}");
            return problem(text + &format!("; see `ip route get {backend}`"));
        }
    }
    let Some(link) = links.get(&route.ifindex) else {
        return problem(format!("the route to the backend {backend} has no device"));
    };
    let (ifindex, vlan) = match below_vlans(route.ifindex, link, links) {
        Ok(below) => below,
        Err(text) => return problem(format!("the backend {backend} is behind {}: {text}", link.name)),
    };
    let below = &links[&ifindex];
    let mut resolution = Resolution {
        source: route.source,
        device: Some((ifindex, below.name.clone())),
        mtu: route.mtu.map_or(link.mtu, |mtu| mtu.min(link.mtu)),
        ..Resolution::default()
    };
    let Some(source_mac) = link.mac.filter(|_| !link.is_loopback) else {
        resolution.problem = Some(format!(
            "the backend {backend} is behind {}, which is no Ethernet device: XDP cannot send by it",
            link.name
        ));
        return resolution;
    };
    let neighbour = (route.ifindex, route.gateway.unwrap_or(backend));
    resolution.neighbour = Some(neighbour);
    if let Some(down) = [link, below].into_iter().find(|link| !link.is_up) {
        resolution.problem = Some(format!("the backend {backend} is behind {}, which is down", down.name));
    } else if let Some(mac) = neighbours.get(&neighbour).and_then(|found| found.mac) {
        resolution.next_hop = Some(NextHop { ifindex, destination_mac: mac, source_mac, vlan });
    } else {
        resolution.problem = Some(format!(
            "the neighbour {} on {} does not answer: is it up, and on that link?",
            neighbour.1, link.name
        ));
    }
    resolution
}

/// A VLAN device sends by the one below, with a tag: the device below them all, and the tags, outer
/// one first.
pub(super) fn below_vlans(ifindex: u32, link: &Link, links: &Links) -> Result<(u32, VlanTags), String> {
    let (mut index, mut device) = (ifindex, link);
    let mut ids = Vec::new();
    while let Some(vlan) = device.vlan {
        if vlan.is_service_tag {
            return Err(format!("{} adds an 802.1ad tag, and only 802.1Q is supported", device.name));
        }
        if ids.len() == 2 {
            return Err("it adds more than two VLAN tags".to_owned());
        }
        ids.insert(0, vlan.id);
        let below = device.parent.and_then(|index| Some((index, links.get(&index)?)));
        (index, device) = below.ok_or_else(|| {
            format!("the device below the VLAN device {} is not in this network namespace", device.name)
        })?;
    }
    let mut tags = VlanTags::default();
    for (tag, id) in tags.chunks_exact_mut(2).zip(ids) {
        tag.copy_from_slice(&id.to_be_bytes());
    }
    Ok((index, tags))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UPLINK: u32 = 2;
    const VLAN: u32 = 3;

    fn links() -> Links {
        let uplink =
            Link { name: "eth0".into(), mac: Some([2; 6]), mtu: 1_500, is_up: true, ..Link::default() };
        let vlan = Link {
            name: "eth0.10".into(),
            parent: Some(UPLINK),
            vlan: Some(Vlan { id: 10, is_service_tag: false }),
            ..uplink.clone()
        };
        let tunnel = Link { name: "tun0".into(), mac: None, ..uplink.clone() };
        Links::from([(UPLINK, uplink), (VLAN, vlan), (4, tunnel)])
    }

    fn route(ifindex: u32, gateway: Option<&str>) -> Route {
        Route {
            kind: RouteType::Unicast,
            ifindex,
            gateway: gateway.map(|gateway| gateway.parse().expect("an address")),
            source: "10.0.0.1".parse().ok(),
            mtu: None,
        }
    }

    fn neighbours(ifindex: u32, address: &str) -> Neighbours {
        let key = (ifindex, address.parse().expect("an address"));
        Neighbours::from([(key, Neighbour { mac: Some([4; 6]), managed: true, is_fixed: false })])
    }

    fn backend() -> IpAddr {
        "10.0.0.9".parse().expect("an address")
    }

    #[test]
    fn on_the_link_the_backend_itself_is_the_neighbour() {
        let found = resolve(backend(), Some(&route(UPLINK, None)), &links(), &neighbours(UPLINK, "10.0.0.9"));
        let hop = NextHop { ifindex: UPLINK, destination_mac: [4; 6], source_mac: [2; 6], vlan: [0; 4] };
        assert_eq!(found.next_hop, Some(hop));
        assert_eq!((found.source, found.problem), ("10.0.0.1".parse().ok(), None));
    }

    #[test]
    fn behind_a_router_the_gateway_is_the_neighbour() {
        let route = route(UPLINK, Some("10.0.0.254"));
        let found = resolve(backend(), Some(&route), &links(), &neighbours(UPLINK, "10.0.0.254"));
        assert!(found.next_hop.is_some());
        assert_eq!(found.neighbour, Some((UPLINK, "10.0.0.254".parse().expect("an address"))));
    }

    #[test]
    fn a_vlan_device_sends_by_the_one_below_with_a_tag() {
        let found = resolve(backend(), Some(&route(VLAN, None)), &links(), &neighbours(VLAN, "10.0.0.9"));
        let hop = found.next_hop.expect("a next hop");
        assert_eq!((hop.ifindex, hop.vlan), (UPLINK, [0, 10, 0, 0]));
        assert_eq!(found.device, Some((UPLINK, "eth0".into())));
    }

    #[test]
    fn tags_are_stacked_outer_one_first_and_what_cannot_be_is_said() {
        let mut links = links();
        let tag = |id, is_service_tag| Some(Vlan { id, is_service_tag });
        let inner =
            Link { name: "inner".into(), parent: Some(VLAN), vlan: tag(20, false), ..links[&VLAN].clone() };
        links.insert(5, inner.clone());
        links.insert(6, Link { name: "third".into(), parent: Some(5), ..inner.clone() });
        links.insert(7, Link { name: "service".into(), vlan: tag(30, true), ..inner.clone() });
        links.insert(8, Link { name: "moved".into(), parent: None, ..inner });
        let way =
            |device| resolve(backend(), Some(&route(device, None)), &links, &neighbours(device, "10.0.0.9"));
        let hop = way(5).next_hop.expect("a next hop");
        assert_eq!((hop.ifindex, hop.vlan), (UPLINK, [0, 10, 0, 20]));
        for (device, text) in [(6, "more than two"), (7, "802.1ad"), (8, "not in this network namespace")] {
            assert!(way(device).problem.expect("a problem").contains(text), "{device}");
        }
    }

    #[test]
    fn the_smaller_mtu_counts() {
        for (on_route, expected) in [(None, 1_500), (Some(1_400), 1_400), (Some(9_000), 1_500)] {
            let route = Route { mtu: on_route, ..route(UPLINK, None) };
            assert_eq!(resolve(backend(), Some(&route), &links(), &Neighbours::new()).mtu, expected);
        }
    }

    #[test]
    fn an_address_of_the_node_is_local_and_needs_nothing() {
        let route = Route { kind: RouteType::Local, ..Route::default() };
        let found = resolve(backend(), Some(&route), &links(), &Neighbours::new());
        assert!(found.is_local);
        assert_eq!(
            (found.problem, found.next_hop, found.device, found.device_behind),
            (None, None, None, None)
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let nobody = Neighbours::new();
        let problem = |route: Option<&Route>| {
            let found = resolve(backend(), route, &links(), &nobody);
            assert_eq!(found.next_hop, None);
            found.problem.expect("a problem")
        };
        assert!(problem(None).contains("no route"));
        assert!(problem(Some(&route(UPLINK, None))).contains("does not answer"));
        assert!(problem(Some(&route(4, None))).contains("no Ethernet device"));
    }
}

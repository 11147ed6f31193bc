//! The ways out: by which devices and gateways the node reaches addresses that are far away, as clients
//! are.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::Result;
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteType, RouteVia};

use super::{Kernel, route_address};

/// Far away, in different parts of the address space: a default route may be two, and one of these may
/// have a route of its own.
const FAR: [&str; 8] =
    ["1.0.0.1", "65.0.0.1", "129.0.0.1", "193.0.0.1", "2001:200::1", "2400::1", "2600::1", "2a00::1"];

/// A way out: device, and gateway if there is one.
pub type WayOut = (u32, Option<IpAddr>);

impl Kernel {
    /// The ways out, all of a route that has several.
    ///
    /// # Errors
    /// When the kernel refuses to tell.
    pub async fn ways_out(&self) -> Result<BTreeSet<WayOut>> {
        let mut all = BTreeSet::new();
        for far in FAR.iter().filter_map(|far| far.parse::<IpAddr>().ok()) {
            // The route itself, not what it means for this address: that would be one way of several.
            let found = self.ask_route(far, RouteFlags::FibMatch).await?;
            all.extend(found.iter().flat_map(ways));
        }
        Ok(all)
    }
}

fn ways(route: &RouteMessage) -> Vec<WayOut> {
    if route.header.kind != RouteType::Unicast {
        return Vec::new();
    }
    let several = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::MultiPath(hops) => Some(hops),
        _ => None,
    });
    if let Some(hops) = several {
        return hops.iter().map(|hop| (hop.interface_index, gateway(&hop.attributes))).collect();
    }
    let device = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    device.into_iter().map(|index| (index, gateway(&route.attributes))).collect()
}

/// The gateway among the attributes of a route, or of one of its ways.
pub(super) fn gateway(attributes: &[RouteAttribute]) -> Option<IpAddr> {
    attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(gateway) => route_address(gateway),
        RouteAttribute::Via(RouteVia::Inet6(gateway)) => Some((*gateway).into()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::route::{RouteAddress, RouteNextHop};

    use super::*;

    #[test]
    fn all_ways_of_a_route() {
        let by = |last| RouteAttribute::Gateway(RouteAddress::Inet([10, 0, 0, last].into()));
        let address = |last| Some(IpAddr::from([10, 0, 0, last]));
        let mut route = RouteMessage::default();
        route.header.kind = RouteType::Unicast;
        route.attributes = vec![RouteAttribute::Oif(2), by(1)];
        assert_eq!(ways(&route), [(2, address(1))]);
        route.attributes = vec![RouteAttribute::Oif(3)];
        assert_eq!(ways(&route), [(3, None)]);
        let hop = |index, last| {
            let mut hop = RouteNextHop::default();
            (hop.interface_index, hop.attributes) = (index, vec![by(last)]);
            hop
        };
        route.attributes = vec![RouteAttribute::MultiPath(vec![hop(2, 1), hop(4, 2)])];
        assert_eq!(ways(&route), [(2, address(1)), (4, address(2))]);
        route.header.kind = RouteType::BlackHole;
        assert_eq!(ways(&route), []);
    }
}

//! The node's network: VIPs on devices, the ways to backends. Everything goes by netlink, in
//! whichever network namespace the agent runs.

pub mod addresses;
mod announce;
mod filters;
pub mod forwarding;
mod generic;
mod here;
mod kernel;
mod news;
pub mod next_hops;
mod outward;
pub mod survey;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod way;

pub use filters::Filter;
pub use kernel::{Change, Kernel, Links, Monitor};

use std::net::IpAddr;

use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::neighbour::NeighbourAddress;
use netlink_packet_route::route::RouteAddress;

/// An address of a route.
pub(crate) fn route_address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

/// An address of a neighbour.
pub(crate) fn neighbour_address(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(address) => Some((*address).into()),
        NeighbourAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

/// The address itself: the local one where both are given.
pub(crate) fn local_address(attributes: &[AddressAttribute]) -> Option<IpAddr> {
    let mut found = None;
    for attribute in attributes {
        match attribute {
            AddressAttribute::Local(address) => return Some(*address),
            AddressAttribute::Address(address) => found = Some(*address),
            _ => {}
        }
    }
    found
}

//! The ways to backends, kept current.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use anyhow::Result;
use lb_common::abi::NextHop;
use netlink_packet_route::route::RouteType;
use tracing::{info, warn};

use super::kernel::{Kernel, Links, Neighbours};

/// A device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Name.
    pub name: String,
    /// Ethernet address; devices without one cannot be used.
    pub mac: Option<[u8; 6]>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub is_up: bool,
    /// Whether it is the loopback device.
    pub is_loopback: bool,
    /// The device below, of a VLAN device.
    pub parent: Option<u32>,
    /// VLAN identifier, of a VLAN device.
    pub vlan: Option<u16>,
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
    /// MTU of the device.
    pub mtu: u32,
    /// What is missing, and the way out.
    pub problem: Option<String>,
}

/// Puts the way to a backend together.
#[must_use]
pub fn resolve(backend: IpAddr, route: Option<&Route>, links: &Links, neighbours: &Neighbours) -> Resolution {
    let problem = |text: String| Resolution { problem: Some(text), ..Resolution::default() };
    let Some(route) = route else {
        return problem(format!("no route to the backend {backend}; see `ip route get {backend}`"));
    };
    if route.kind == RouteType::Local {
        return problem(format!(
            "the backend {backend} is on this node: it is not served, since full NAT in XDP sends every packet out by a device"
        ));
    }
    let Some(link) = links.get(&route.ifindex) else {
        return problem(format!("the route to the backend {backend} has no device"));
    };
    // A VLAN device sends by the one below, with a tag.
    let (ifindex, below, vlan) =
        match (link.vlan, link.parent.and_then(|index| Some((index, links.get(&index)?)))) {
            (Some(id), Some((index, parent))) => {
                let [high, low] = id.to_be_bytes();
                (index, parent, [high, low, 0, 0])
            }
            _ => (route.ifindex, link, [0; 4]),
        };
    let neighbour = (route.ifindex, route.gateway.unwrap_or(backend));
    let mut resolution = Resolution {
        source: route.source,
        device: Some((ifindex, below.name.clone())),
        neighbour: Some(neighbour),
        mtu: link.mtu,
        ..Resolution::default()
    };
    let Some(source_mac) = link.mac else {
        resolution.problem = Some(format!(
            "the backend {backend} is behind {}, which is no Ethernet device: XDP cannot send by it",
            link.name
        ));
        return resolution;
    };
    if !link.is_up {
        resolution.problem = Some(format!("the backend {backend} is behind {}, which is down", link.name));
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

/// Keeps the ways to a set of backends.
pub struct NextHops {
    kernel: Kernel,
    managed: BTreeSet<(u32, IpAddr)>,
    resolutions: BTreeMap<IpAddr, Resolution>,
    links: Links,
    macs: HashMap<(u32, IpAddr), [u8; 6]>,
}

/// What a refresh has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refreshed {
    /// The way to some backend is another than before.
    pub backends: bool,
    /// Some neighbour, of a backend or of a client, has another address than before, or went.
    pub neighbours: bool,
}

impl NextHops {
    /// Knows no backend yet.
    #[must_use]
    pub fn new(kernel: Kernel) -> Self {
        Self {
            kernel,
            managed: BTreeSet::new(),
            resolutions: BTreeMap::new(),
            links: Links::new(),
            macs: HashMap::new(),
        }
    }

    /// The ways.
    #[must_use]
    pub fn resolutions(&self) -> &BTreeMap<IpAddr, Resolution> {
        &self.resolutions
    }

    /// The node's devices, as of the last refresh.
    #[must_use]
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// Reads the kernel's tables anew for these backends.
    ///
    /// # Errors
    /// When netlink fails.
    pub async fn refresh(&mut self, backends: &BTreeSet<IpAddr>) -> Result<Refreshed> {
        self.links = self.kernel.links().await?;
        let neighbours = self.kernel.neighbours().await?;
        let mut resolutions = BTreeMap::new();
        for backend in backends {
            let route = self.kernel.route(*backend).await?;
            resolutions.insert(*backend, resolve(*backend, route.as_ref(), &self.links, &neighbours));
        }
        self.manage(&resolutions, &neighbours).await;
        let macs = neighbours.iter().filter_map(|(key, found)| Some((*key, found.mac?))).collect();
        let refreshed = Refreshed {
            backends: self.resolutions != resolutions,
            // One that is new harms nobody: nothing points to it yet.
            neighbours: self.macs.iter().any(|(key, mac)| {
                let now: &HashMap<_, _> = &macs;
                now.get(key) != Some(mac)
            }),
        };
        self.report(&resolutions);
        self.macs = macs;
        self.resolutions = resolutions;
        Ok(refreshed)
    }

    /// Has the kernel keep the neighbours of backends resolved, and no others.
    async fn manage(&mut self, resolutions: &BTreeMap<IpAddr, Resolution>, neighbours: &Neighbours) {
        let is_fixed = |key: &(u32, IpAddr)| neighbours.get(key).is_some_and(|found| found.is_fixed);
        let wanted = resolutions.values().filter_map(|found| found.neighbour);
        let wanted: BTreeSet<_> = wanted.filter(|key| !is_fixed(key)).collect();
        for (ifindex, address) in self.managed.difference(&wanted) {
            self.kernel.forget_neighbour(*ifindex, *address).await;
        }
        for key in &wanted {
            let known = neighbours.get(key).is_some_and(|found| found.managed || found.mac.is_some());
            if (!self.managed.contains(key) || !known)
                && let Err(error) = self.kernel.manage_neighbour(key.0, key.1).await
            {
                warn!("{error:#}");
            }
        }
        self.managed = wanted;
    }

    fn report(&self, resolutions: &BTreeMap<IpAddr, Resolution>) {
        for (backend, found) in resolutions {
            let before = self.resolutions.get(backend);
            match (&found.problem, before.map(|before| &before.problem)) {
                (Some(problem), before) if before != Some(&found.problem) => warn!("{problem}"),
                (None, Some(Some(_)) | None) => info!(%backend, "the way to the backend is known"),
                _ => {}
            }
        }
    }

    /// Lets go of all neighbours.
    pub async fn release(&mut self) {
        for (ifindex, address) in std::mem::take(&mut self.managed) {
            self.kernel.forget_neighbour(ifindex, address).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UPLINK: u32 = 2;
    const VLAN: u32 = 3;

    fn links() -> Links {
        let uplink =
            Link { name: "eth0".into(), mac: Some([2; 6]), mtu: 1_500, is_up: true, ..Link::default() };
        let vlan = Link { name: "eth0.10".into(), parent: Some(UPLINK), vlan: Some(10), ..uplink.clone() };
        let tunnel = Link { name: "tun0".into(), mac: None, ..uplink.clone() };
        Links::from([(UPLINK, uplink), (VLAN, vlan), (4, tunnel)])
    }

    fn route(ifindex: u32, gateway: Option<&str>) -> Route {
        Route {
            kind: RouteType::Unicast,
            ifindex,
            gateway: gateway.map(|gateway| gateway.parse().expect("an address")),
            source: "10.0.0.1".parse().ok(),
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
    fn what_is_missing_is_named() {
        let nobody = Neighbours::new();
        let problem = |route: Option<&Route>| {
            let found = resolve(backend(), route, &links(), &nobody);
            assert_eq!(found.next_hop, None);
            found.problem.expect("a problem")
        };
        assert!(problem(None).contains("no route"));
        let local = Route { kind: RouteType::Local, ..Route::default() };
        assert!(problem(Some(&local)).contains("on this node"));
        assert!(problem(Some(&route(UPLINK, None))).contains("does not answer"));
        assert!(problem(Some(&route(4, None))).contains("no Ethernet device"));
    }
}

//! The ways to backends, kept current.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use anyhow::Result;
use futures_util::{StreamExt, stream};
use lb_common::abi::{NextHop, VlanTags};
use netlink_packet_route::route::RouteType;
use tracing::warn;

use super::here::{leads_to_container, on_this_node};
use super::kernel::{Kernel, Links, Neighbours};
use super::news::{News, note};

/// Neighbours that the kernel forgot and that are remembered at most.
const MAX_FORGOTTEN: usize = 16_384;

/// Routes asked for at a time; the answers fit into the socket's buffer.
const QUESTIONS: usize = 64;
/// How long neighbours that are new may take after a start, in steps.
const GREETING: Duration = Duration::from_millis(5);
const GREETINGS: u32 = 20;

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
fn below_vlans(ifindex: u32, link: &Link, links: &Links) -> Result<(u32, VlanTags), String> {
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

/// Keeps the ways to a set of backends.
pub struct NextHops {
    kernel: Kernel,
    /// The device towards clients.
    uplink: String,
    /// Backends that are known to be on this node, whatever the routes show.
    here: BTreeSet<IpAddr>,
    managed: BTreeSet<(u32, IpAddr)>,
    resolutions: BTreeMap<IpAddr, Resolution>,
    /// Backends to which no way is known, and why.
    troubled: BTreeMap<IpAddr, String>,
    /// What the kernel answered last for each backend.
    routes: HashMap<IpAddr, Answer>,
    links: Links,
    neighbours: Neighbours,
    macs: HashMap<(u32, IpAddr), [u8; 6]>,
}

/// A route, or why the kernel did not say.
type Answer = Result<Option<Route>, String>;

/// What a refresh asks the kernel for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Routes too: for when they may be others than before. Costs a question for each backend.
    Routes,
    /// Devices and neighbours only.
    Neighbours,
}

/// What a refresh has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refreshed {
    /// Backends to which the way is another than before.
    pub backends: BTreeSet<IpAddr>,
    /// Some neighbour, of a backend or of a client, has another address than it had last.
    pub neighbours: bool,
}

impl NextHops {
    /// Knows no backend yet. `uplink` is the device towards clients.
    #[must_use]
    pub fn new(kernel: Kernel, uplink: &str) -> Self {
        Self {
            kernel,
            uplink: uplink.to_owned(),
            here: BTreeSet::new(),
            managed: BTreeSet::new(),
            resolutions: BTreeMap::new(),
            troubled: BTreeMap::new(),
            routes: HashMap::new(),
            links: Links::new(),
            neighbours: Neighbours::new(),
            macs: HashMap::new(),
        }
    }

    /// The ways.
    #[must_use]
    pub fn resolutions(&self) -> &BTreeMap<IpAddr, Resolution> {
        &self.resolutions
    }

    /// Backends to which no way is known, and why.
    #[must_use]
    pub fn troubled(&self) -> &BTreeMap<IpAddr, String> {
        &self.troubled
    }

    /// Whether some backend is on this node.
    #[must_use]
    pub fn has_local(&self) -> bool {
        self.resolutions.values().any(|found| found.is_local)
    }

    /// For which families the node forwards packets to backends of its own: IPv4 as false, IPv6 as
    /// true.
    #[must_use]
    pub fn families_behind_devices(&self) -> BTreeSet<bool> {
        let behind = self.resolutions.iter().filter(|(_, found)| found.device_behind.is_some());
        behind.map(|(address, _)| address.is_ipv6()).collect()
    }

    /// The node's devices, as of the last refresh.
    #[must_use]
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// Reads the kernel's tables anew for these backends, which are all; with each goes whether it is
    /// known to be on this node.
    ///
    /// # Errors
    /// When netlink fails; everything is as before then.
    pub async fn refresh(
        &mut self,
        backends: impl IntoIterator<Item = (IpAddr, bool)>,
        ask: Ask,
    ) -> Result<Refreshed> {
        let links = self.kernel.links().await?;
        let neighbours = self.kernel.neighbours().await?;
        let as_before = links == self.links && neighbours == self.neighbours;
        (self.links, self.neighbours) = (links, neighbours);
        let mut resolutions = BTreeMap::new();
        let (mut asked, mut unresolved) = (Vec::new(), Vec::new());
        for (backend, is_here) in backends {
            let as_before = self.put(backend, is_here) && as_before;
            // A question that failed once is asked again.
            let has_failed = matches!(self.routes.get(&backend), Some(Err(_)));
            match self.resolutions.get(&backend).filter(|_| ask == Ask::Neighbours && !has_failed) {
                Some(known) if as_before => drop(resolutions.insert(backend, known.clone())),
                Some(_) => unresolved.push(backend),
                None => asked.push(backend),
            }
        }
        self.ask(&asked).await;
        if self.resolutions.is_empty() {
            self.meet(&asked).await?;
        }
        resolutions.extend(unresolved.iter().chain(&asked).map(|backend| (*backend, self.resolve(*backend))));
        self.manage(&resolutions).await;
        let old = &self.resolutions;
        let gone = old.keys().filter(|backend| !resolutions.contains_key(backend));
        let other = resolutions.iter().filter(|(backend, found)| old.get(backend) != Some(found));
        let changed: BTreeSet<_> = gone.chain(other.map(|(backend, _)| backend)).copied().collect();
        let mut news = News::default();
        for backend in &changed {
            let now = resolutions.get(backend);
            news.tell(*backend, old.get(backend), now);
            note(&mut self.troubled, *backend, now);
        }
        drop(news);
        self.routes.retain(|backend, _| resolutions.contains_key(backend));
        self.here.retain(|backend| resolutions.contains_key(backend));
        self.resolutions = resolutions;
        Ok(Refreshed { backends: changed, neighbours: self.take_macs() })
    }

    /// Finds the ways to backends that are new, by what is known of devices and neighbours, and
    /// forgets others: of each, `place` says whether it is known to be on this node, or nothing if it is
    /// no backend. A neighbour that is not known is asked for, and a later refresh finds it.
    pub async fn follow(&mut self, changed: &BTreeSet<IpAddr>, place: impl Fn(&IpAddr) -> Option<bool>) {
        let new: Vec<_> = changed.iter().filter(|backend| place(backend).is_some()).copied().collect();
        self.ask(&new).await;
        let mut news = News::default();
        for backend in changed {
            let Some(is_here) = place(backend) else {
                self.here.remove(backend);
                self.resolutions.remove(backend);
                note(&mut self.troubled, *backend, None);
                self.routes.remove(backend);
                continue;
            };
            self.put(*backend, is_here);
            let found = self.resolve(*backend);
            if let Some(neighbour) = found.neighbour.filter(|key| !self.is_fixed(key))
                && self.managed.insert(neighbour)
            {
                self.manage_one(&neighbour).await;
            }
            news.tell(*backend, None, Some(&found));
            note(&mut self.troubled, *backend, Some(&found));
            self.resolutions.insert(*backend, found);
        }
    }

    /// Takes note of whether a backend is known to be on this node; says whether that is as before.
    fn put(&mut self, backend: IpAddr, is_here: bool) -> bool {
        !(if is_here { self.here.insert(backend) } else { self.here.remove(&backend) })
    }

    /// Asks the kernel for routes, many at a time: each answer wakes a task, which costs more than
    /// the answer.
    async fn ask(&mut self, backends: &[IpAddr]) {
        let kernel = &self.kernel;
        let mut answers = stream::iter(backends)
            .map(async |backend| (*backend, kernel.route(*backend).await))
            .buffer_unordered(QUESTIONS);
        while let Some((backend, answer)) = answers.next().await {
            // An error is of this backend alone: the others go on.
            self.routes.insert(backend, answer.map_err(|error| format!("{error:#}")));
        }
    }

    /// Gives neighbours that nobody has asked for yet a moment to answer: after a start all backends
    /// would be without a way first, and everything would be done twice.
    async fn meet(&mut self, backends: &[IpAddr]) -> Result<()> {
        let waiting = |this: &Self| -> BTreeSet<(u32, IpAddr)> {
            let neighbours = backends.iter().filter_map(|backend| this.resolve(*backend).neighbour);
            let silent = |key: &(u32, IpAddr)| this.neighbours.get(key).is_none_or(|one| one.mac.is_none());
            neighbours.filter(silent).collect()
        };
        let asked = waiting(self);
        for key in &asked {
            self.manage_one(key).await;
        }
        let mut patience = if asked.is_empty() { 0 } else { GREETINGS };
        while patience > 0 {
            tokio::time::sleep(GREETING).await;
            self.neighbours = self.kernel.neighbours().await?;
            let is_met = |key| self.neighbours.get(key).is_some_and(|one| one.mac.is_some());
            patience = if asked.iter().all(is_met) { 0 } else { patience - 1 };
        }
        Ok(())
    }

    fn resolve(&self, backend: IpAddr) -> Resolution {
        match self.routes.get(&backend) {
            Some(Ok(route)) if self.is_container(backend, route.as_ref()) => {
                on_this_node(route.as_ref(), &self.links)
            }
            Some(Ok(route)) => resolve(backend, route.as_ref(), &self.links, &self.neighbours),
            Some(Err(error)) => Resolution { problem: Some(error.clone()), ..Resolution::default() },
            None => resolve(backend, None, &self.links, &self.neighbours),
        }
    }

    fn is_container(&self, backend: IpAddr, route: Option<&Route>) -> bool {
        let Some(route) = route.filter(|route| route.kind == RouteType::Unicast) else { return false };
        self.here.contains(&backend) || leads_to_container(route, &self.links, &self.uplink)
    }

    /// Takes note of all neighbours' addresses; says whether one differs from the last that was
    /// known.
    ///
    /// Neighbours that the kernel forgot are remembered: it forgets those that it does not talk to
    /// itself, and packets that pass by XDP it does not see. What points to them is still right.
    /// One that is new harms nobody: nothing points to it yet.
    fn take_macs(&mut self) -> bool {
        let mut differs = false;
        for (key, found) in &self.neighbours {
            let Some(mac) = found.mac else { continue };
            differs |= self.macs.insert(*key, mac).is_some_and(|before| before != mac);
        }
        if self.macs.len() > self.neighbours.len() + MAX_FORGOTTEN {
            self.macs.retain(|key, _| self.neighbours.contains_key(key));
            // A later difference from one of them would go unnoticed.
            differs = true;
        }
        differs
    }

    /// Has the kernel keep the neighbours of backends resolved, and no others.
    async fn manage(&mut self, resolutions: &BTreeMap<IpAddr, Resolution>) {
        let wanted = resolutions.values().filter_map(|found| found.neighbour);
        let wanted: BTreeSet<_> = wanted.filter(|key| !self.is_fixed(key)).collect();
        for key in self.managed.difference(&wanted) {
            self.kernel.forget_neighbour(key.0, key.1, self.neighbours.get(key)).await;
        }
        for key in &wanted {
            let found = self.neighbours.get(key);
            let known = found.is_some_and(|found| found.managed || found.mac.is_some());
            if !self.managed.contains(key) || !known {
                self.manage_one(key).await;
            }
        }
        self.managed = wanted;
    }

    fn is_fixed(&self, key: &(u32, IpAddr)) -> bool {
        self.neighbours.get(key).is_some_and(|found| found.is_fixed)
    }

    async fn manage_one(&self, key: &(u32, IpAddr)) {
        if !self.links.get(&key.0).is_some_and(|link| link.is_up) {
            return;
        }
        if let Err(error) = self.kernel.manage_neighbour(key.0, key.1).await {
            warn!("{error:#}");
        }
    }

    /// Lets go of all neighbours.
    pub async fn release(&mut self) {
        let neighbours = match self.kernel.neighbours().await {
            Ok(neighbours) => neighbours,
            Err(error) => {
                warn!("neighbours stay managed: {error:#}");
                return;
            }
        };
        for key in std::mem::take(&mut self.managed) {
            self.kernel.forget_neighbour(key.0, key.1, neighbours.get(&key)).await;
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

//! The ways to backends, kept current.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use futures_util::{StreamExt, stream};
use netlink_packet_route::route::RouteType;
use tracing::warn;

use super::here::{leads_to_container, on_this_node};
use super::kernel::{Kernel, Links, Neighbours};
use super::news::{News, note};
use super::outward::WayOut;
use super::way::{Resolution, Route, below_vlans, resolve};

/// Neighbours that the kernel forgot and that are remembered at most.
const MAX_FORGOTTEN: usize = 16_384;

/// Routes asked for at a time; the answers fit into the socket's buffer.
const QUESTIONS: usize = 64;
/// Backends in a sample at least, and into how many samples many backends are cut.
const SAMPLE: usize = 1_024;
const SAMPLES: usize = 32;
/// How long neighbours that are new may take after a start, in steps.
const GREETING: Duration = Duration::from_millis(5);
const GREETINGS: u32 = 20;

/// A neighbour: device and address.
type NeighbourKey = (u32, IpAddr);

/// What the kernel said about the route to a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Answer {
    Unasked,
    /// There may be no route. Backends behind the same gateway share it.
    Route(Option<Arc<Route>>),
    /// Why it did not say.
    Failed(String),
}

/// A backend.
#[derive(Debug)]
struct Backend {
    /// Known to be on this node, whatever the routes show.
    is_here: bool,
    answer: Answer,
    /// `None` until it was looked for. Backends behind the same gateway share it.
    way: Option<Arc<Resolution>>,
}

/// Keeps the ways to a set of backends.
pub struct NextHops {
    kernel: Kernel,
    /// The devices towards clients.
    uplinks: Vec<String>,
    backends: BTreeMap<IpAddr, Backend>,
    /// Backends whose routes have to be asked for: they are new, or the last question failed.
    pending: BTreeSet<IpAddr>,
    /// The last backend of the last sample.
    sampled: Option<IpAddr>,
    /// How many backends need a neighbour.
    needed: HashMap<NeighbourKey, usize>,
    /// Neighbours that the kernel keeps resolved because we asked for it.
    managed: BTreeSet<NeighbourKey>,
    /// How packets to clients far away leave the node; `None` until that was asked.
    ways_out: Option<BTreeSet<WayOut>>,
    /// How many backends are on this node.
    local: usize,
    /// Backends to which no way is known, and why.
    troubled: BTreeMap<IpAddr, String>,
    /// The last route by each device and gateway, and the last way by it: to share them.
    routes: HashMap<(u32, Option<IpAddr>), Arc<Route>>,
    ways: HashMap<NeighbourKey, Arc<Resolution>>,
    links: Links,
    neighbours: Neighbours,
    macs: HashMap<NeighbourKey, [u8; 6]>,
}

/// What a refresh asks the kernel for, beside devices, neighbours, and the routes to backends that
/// are new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// All routes: for when they may be others than before. Costs a question for each backend.
    Routes,
    /// Some routes, others the next time; all of them if one is not as it was, because then the kernel's
    /// word of a change was missed. A part of the backends each time, so that all have their turn.
    Sample,
    /// No routes.
    Neighbours,
}

/// What a refresh has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refreshed {
    /// Backends to which the way is another than before.
    pub backends: BTreeSet<IpAddr>,
    /// Some neighbour, of a backend or of a client, has another address than it had last, or a gateway
    /// to clients has one now.
    pub neighbours: bool,
    /// Some device is not as it was.
    pub links: bool,
}

impl NextHops {
    /// Knows no backend yet. `uplinks` are the devices towards clients.
    #[must_use]
    pub fn new(kernel: Kernel, uplinks: Vec<String>) -> Self {
        Self {
            kernel,
            uplinks,
            backends: BTreeMap::new(),
            pending: BTreeSet::new(),
            sampled: None,
            needed: HashMap::new(),
            managed: BTreeSet::new(),
            ways_out: None,
            local: 0,
            troubled: BTreeMap::new(),
            routes: HashMap::new(),
            ways: HashMap::new(),
            links: Links::new(),
            neighbours: Neighbours::new(),
            macs: HashMap::new(),
        }
    }

    /// The way to a backend; `None` if it is no backend, or was not looked for yet.
    #[must_use]
    pub fn way(&self, backend: &IpAddr) -> Option<&Arc<Resolution>> {
        self.backends.get(backend)?.way.as_ref()
    }

    /// All ways.
    pub fn ways(&self) -> impl Iterator<Item = (&IpAddr, &Resolution)> {
        self.backends.iter().filter_map(|(address, backend)| Some((address, backend.way.as_deref()?)))
    }

    /// Backends to which no way is known, and why.
    #[must_use]
    pub fn troubled(&self) -> &BTreeMap<IpAddr, String> {
        &self.troubled
    }

    /// Whether some backend is on this node.
    #[must_use]
    pub fn has_local(&self) -> bool {
        self.local > 0
    }

    /// For which families the node forwards packets to backends of its own: IPv4 as false, IPv6 as
    /// true.
    #[must_use]
    pub fn families_behind_devices(&self) -> BTreeSet<bool> {
        let behind = self.ways().filter(|(_, found)| found.device_behind.is_some());
        behind.map(|(address, _)| address.is_ipv6()).collect()
    }

    /// The node's devices, as of the last refresh.
    #[must_use]
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// Takes note of backends that come, go, or turn out to be on this node or not: of each, `place`
    /// says whether it is known to be on this node, or nothing if it is no backend. The next refresh
    /// looks for the ways to them. Gives those that are no backends any more.
    pub fn know(
        &mut self,
        changed: &BTreeSet<IpAddr>,
        place: impl Fn(&IpAddr) -> Option<bool>,
    ) -> Vec<IpAddr> {
        if self.backends.is_empty() {
            // In one go they are packed densely, which one by one they would not be.
            let new = |is_here| Backend { is_here, answer: Answer::Unasked, way: None };
            self.backends =
                changed.iter().filter_map(|address| Some((*address, new(place(address)?)))).collect();
        }
        let mut gone = Vec::new();
        for address in changed {
            let Some(is_here) = place(address) else {
                self.forget(*address);
                gone.push(*address);
                continue;
            };
            let new = || Backend { is_here, answer: Answer::Unasked, way: None };
            self.backends.entry(*address).or_insert_with(new).is_here = is_here;
            self.pending.insert(*address);
        }
        gone
    }

    fn forget(&mut self, address: IpAddr) {
        if let Some(Backend { way: Some(way), .. }) = self.backends.remove(&address) {
            self.release_way(&way);
        }
        self.pending.remove(&address);
        note(&mut self.troubled, address, None);
    }

    /// Reads the kernel's tables anew. What is as before costs nothing but the reading.
    ///
    /// # Errors
    /// When devices or neighbours cannot be listed, or the ways out not be asked for; everything is as before then. A question about a
    /// route that fails is a problem of its backend.
    pub async fn refresh(&mut self, ask: Ask) -> Result<Refreshed> {
        let links = self.kernel.links().await?;
        let neighbours = self.kernel.neighbours().await?;
        let knew_gateways = self.ways_out.is_some();
        if ask != Ask::Neighbours || !knew_gateways {
            self.ways_out = Some(self.kernel.ways_out().await?);
        }
        let other_links = links != self.links;
        let mut moved = differing(&self.neighbours, &neighbours);
        (self.links, self.neighbours) = (links, neighbours);
        let is_first = self.ways().next().is_none();
        let mut stale = self.ask_again(ask).await;
        // Also those whose routes were asked for by a refresh that was not finished.
        let unseen = self.backends.iter().filter(|(_, backend)| backend.way.is_none());
        stale.extend(unseen.map(|(address, _)| *address));
        if is_first {
            let before = self.neighbours.clone();
            self.meet(&stale).await;
            moved.extend(differing(&before, &self.neighbours));
        }
        if other_links {
            stale = self.backends.keys().copied().collect();
        } else if moved.iter().any(|key| self.needed.contains_key(key)) {
            let needs = |way: &Resolution| way.neighbour.is_some_and(|key| moved.contains(&key));
            let behind = self.ways().filter(|(_, way)| needs(way)).map(|(address, _)| *address);
            stale = behind.chain(stale).collect();
        }
        let mut news = News::default();
        let backends = stale.into_iter().filter(|backend| self.renew(*backend, &mut news)).collect();
        drop(news);
        let gateways = self.gateways();
        let has_mac = |key| self.neighbours.get(key).is_some_and(|found| found.mac.is_some());
        // Until now, the way to clients behind it could not be found: flows may still go by another.
        let has_come = knew_gateways && moved.iter().any(|key| gateways.contains(key) && has_mac(key));
        self.manage(&gateways).await;
        let neighbours = self.take_macs() || has_come;
        Ok(Refreshed { backends, neighbours, links: other_links })
    }

    /// Finds the ways to backends that are new, by what is known of devices and neighbours, and
    /// forgets others: see [`Self::know`]. A neighbour that is not known is asked for, and a later
    /// refresh finds it.
    pub async fn follow(&mut self, changed: &BTreeSet<IpAddr>, place: impl Fn(&IpAddr) -> Option<bool>) {
        self.know(changed, place);
        let there: Vec<_> =
            changed.iter().filter(|address| self.backends.contains_key(address)).copied().collect();
        self.ask(&there).await;
        let mut news = News::default();
        for address in there {
            if !self.renew(address, &mut news) {
                continue;
            }
            let neighbour = self.way(&address).and_then(|way| way.neighbour);
            if let Some(neighbour) = neighbour.filter(|key| !self.is_fixed(key))
                && self.managed.insert(neighbour)
            {
                self.manage_one(&neighbour).await;
            }
        }
    }

    /// Asks for routes. Gives the backends whose answers are not as they were, or that are new.
    async fn ask_again(&mut self, ask: Ask) -> BTreeSet<IpAddr> {
        let mut stale = self.pending.clone();
        let pending: Vec<_> = stale.iter().copied().collect();
        let asked = match ask {
            Ask::Neighbours => Vec::new(),
            Ask::Routes => self.backends.keys().filter(|address| !stale.contains(address)).copied().collect(),
            Ask::Sample => self.sample(),
        };
        self.ask(&pending).await;
        let differing = self.ask(&asked).await;
        if ask == Ask::Sample && !differing.is_empty() {
            let asked: HashSet<_> = asked.into_iter().chain(pending).collect();
            let rest: Vec<_> =
                self.backends.keys().filter(|address| !asked.contains(address)).copied().collect();
            stale.extend(self.ask(&rest).await);
        }
        stale.extend(differing);
        stale
    }

    /// The backends that have their turn, without those that are pending.
    fn sample(&mut self) -> Vec<IpAddr> {
        let count = SAMPLE.max(self.backends.len().div_ceil(SAMPLES)).min(self.backends.len());
        let (after, until) = match self.sampled {
            Some(last) => (Bound::Excluded(last), Bound::Included(last)),
            // The second part is empty then.
            None => (Bound::Unbounded, Bound::Excluded(IpAddr::from([0, 0, 0, 0]))),
        };
        let later = self.backends.range((after, Bound::Unbounded));
        let turn = later.chain(self.backends.range((Bound::Unbounded, until))).map(|(address, _)| *address);
        let mut turn: Vec<_> = turn.take(count).collect();
        self.sampled = turn.last().copied();
        turn.retain(|address| !self.pending.contains(address));
        turn
    }

    /// Asks the kernel for routes, many at a time: each answer wakes a task, which costs more than
    /// the answer. Gives the backends to which the route is another than before.
    async fn ask(&mut self, backends: &[IpAddr]) -> Vec<IpAddr> {
        let kernel = self.kernel.clone();
        let mut answers = stream::iter(backends)
            .map(async |backend| (*backend, kernel.route(*backend).await))
            .buffer_unordered(QUESTIONS);
        let mut differing = Vec::new();
        while let Some((address, answer)) = answers.next().await {
            let answer = match answer {
                Ok(route) => Answer::Route(route.map(|route| self.share_route(route))),
                // An error is of this backend alone: the others go on.
                Err(error) => Answer::Failed(format!("{error:#}")),
            };
            match answer {
                Answer::Failed(_) => self.pending.insert(address),
                _ => self.pending.remove(&address),
            };
            let Some(backend) = self.backends.get_mut(&address) else { continue };
            if backend.answer != answer {
                backend.answer = answer;
                differing.push(address);
            }
        }
        differing
    }

    fn share_route(&mut self, route: Route) -> Arc<Route> {
        let key = (route.ifindex, route.gateway);
        match self.routes.get(&key) {
            Some(known) if **known == route => Arc::clone(known),
            _ => {
                let route = Arc::new(route);
                self.routes.insert(key, Arc::clone(&route));
                route
            }
        }
    }

    /// Puts the way to a backend together; says whether it is another than before.
    fn renew(&mut self, address: IpAddr, news: &mut News) -> bool {
        let Some(backend) = self.backends.get(&address) else { return false };
        let found = self.resolve(address, backend);
        let before = backend.way.clone();
        if before.as_deref() == Some(&found) {
            return false;
        }
        news.tell(address, before.as_deref(), Some(&found));
        note(&mut self.troubled, address, Some(&found));
        let found = self.hold_way(found);
        if let Some(backend) = self.backends.get_mut(&address) {
            backend.way = Some(found);
        }
        if let Some(before) = before {
            self.release_way(&before);
        }
        true
    }

    /// Counts a way as in use, and shares it.
    fn hold_way(&mut self, way: Resolution) -> Arc<Resolution> {
        self.local += usize::from(way.is_local);
        let Some(neighbour) = way.neighbour else { return Arc::new(way) };
        *self.needed.entry(neighbour).or_default() += 1;
        match self.ways.get(&neighbour) {
            Some(known) if **known == way => Arc::clone(known),
            _ => {
                let way = Arc::new(way);
                self.ways.insert(neighbour, Arc::clone(&way));
                way
            }
        }
    }

    fn release_way(&mut self, way: &Resolution) {
        self.local -= usize::from(way.is_local);
        let Some(neighbour) = way.neighbour else { return };
        let Some(count) = self.needed.get_mut(&neighbour) else { return };
        *count -= 1;
        if *count == 0 {
            self.needed.remove(&neighbour);
            self.ways.remove(&neighbour);
            self.routes.remove(&(neighbour.0, Some(neighbour.1)));
        }
    }

    /// Gives neighbours that nobody has asked for yet a moment to answer: after a start all backends
    /// would be without a way first, and everything would be done twice. That is all that it is for: an
    /// error ends it, and who is silent until then is found by a later refresh.
    async fn meet(&mut self, backends: &BTreeSet<IpAddr>) {
        let neighbour = |address: &IpAddr| self.resolve(*address, self.backends.get(address)?).neighbour;
        let is_silent = |key: &NeighbourKey| self.neighbours.get(key).is_none_or(|one| one.mac.is_none());
        let asked: BTreeSet<_> = backends.iter().filter_map(neighbour).filter(is_silent).collect();
        for key in &asked {
            self.manage_one(key).await;
        }
        let mut patience = if asked.is_empty() { 0 } else { GREETINGS };
        while patience > 0 {
            tokio::time::sleep(GREETING).await;
            match self.kernel.neighbours().await {
                Ok(neighbours) => self.neighbours = neighbours,
                Err(error) => {
                    warn!("neighbours that are new are not waited for: {error:#}");
                    return;
                }
            }
            let is_met = |key| self.neighbours.get(key).is_some_and(|one| one.mac.is_some());
            patience = if asked.iter().all(is_met) { 0 } else { patience - 1 };
        }
    }

    fn resolve(&self, address: IpAddr, backend: &Backend) -> Resolution {
        let route = match &backend.answer {
            Answer::Route(route) => route.as_deref(),
            Answer::Failed(error) => {
                return Resolution { problem: Some(error.clone()), ..Resolution::default() };
            }
            Answer::Unasked => None,
        };
        if self.is_container(backend, route) {
            return on_this_node(route, &self.links);
        }
        resolve(address, route, &self.links, &self.neighbours)
    }

    fn is_container(&self, backend: &Backend, route: Option<&Route>) -> bool {
        let Some(route) = route.filter(|route| route.kind == RouteType::Unicast) else { return false };
        backend.is_here || leads_to_container(route, &self.links, &self.uplinks)
    }

    /// Takes note of all neighbours' addresses; says whether one differs from the last that was
    /// known.
    ///
    /// Neighbours that the kernel forgot are remembered: it forgets those that it does not talk to
    /// itself, and packets that pass by XDP it does not see. What points to them is still right.
    /// One that is new harms nobody: nothing points to it yet. Gateways are seen to elsewhere.
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

    /// The devices by which packets to clients far away leave the node, below any VLANs: by index. Those
    /// that are no Ethernet devices are left out.
    #[must_use]
    pub fn devices_out(&self) -> BTreeMap<u32, String> {
        let devices = self.ways_out.iter().flatten().filter_map(|(index, _)| {
            let link = self.links.get(index).filter(|link| link.mac.is_some())?;
            let (index, _) = below_vlans(*index, link, &self.links).ok()?;
            Some((index, self.links.get(&index)?.name.clone()))
        });
        devices.collect()
    }

    /// The neighbours that packets to clients far away go to. The datapath sends them itself, which
    /// resolves nobody (`bpf_fib_lookup`).
    fn gateways(&self) -> BTreeSet<NeighbourKey> {
        let is_ethernet = |index| self.links.get(index).is_some_and(|link| link.mac.is_some());
        let ways = self.ways_out.iter().flatten().filter(|(index, _)| is_ethernet(index));
        ways.filter_map(|(index, gateway)| Some((*index, (*gateway)?))).collect()
    }

    /// Has the kernel keep the neighbours of backends and these gateways resolved, and no others.
    async fn manage(&mut self, gateways: &BTreeSet<NeighbourKey>) {
        let is_needed = |key: &NeighbourKey| self.needed.contains_key(key) || gateways.contains(key);
        let is_wanted = |key: &NeighbourKey| is_needed(key) && !self.is_fixed(key);
        let gone: Vec<_> = self.managed.iter().filter(|key| !is_wanted(key)).copied().collect();
        let is_kept = |key: &NeighbourKey| {
            let found = self.neighbours.get(key);
            self.managed.contains(key) && found.is_some_and(|found| found.managed || found.mac.is_some())
        };
        let missing = self.needed.keys().chain(gateways).filter(|key| is_wanted(key) && !is_kept(key));
        let missing: BTreeSet<_> = missing.copied().collect();
        for key in gone {
            self.kernel.forget_neighbour(key.0, key.1, self.neighbours.get(&key)).await;
            self.managed.remove(&key);
        }
        for key in missing {
            self.manage_one(&key).await;
            self.managed.insert(key);
        }
    }

    fn is_fixed(&self, key: &NeighbourKey) -> bool {
        self.neighbours.get(key).is_some_and(|found| found.is_fixed)
    }

    async fn manage_one(&self, key: &NeighbourKey) {
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

/// Neighbours whose addresses differ, those that only one side knows included.
fn differing(before: &Neighbours, now: &Neighbours) -> HashSet<NeighbourKey> {
    let mac = |all: &Neighbours, key| all.get(key).and_then(|found| found.mac);
    let keys = before.keys().chain(now.keys());
    keys.filter(|key| mac(before, key) != mac(now, key)).copied().collect()
}

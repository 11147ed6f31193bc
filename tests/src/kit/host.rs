//! The forwarding core on the host: maps are hash maps, the packet lies in a buffer, the time is
//! what a test says.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hash;
use std::rc::Rc;

use lb_common::abi::{
    Affinity, AffinityKey, Backend, BackendStats, CACHE_JIFFIES, CachedFlow, Config, ConnectionLimit,
    ConnectionRate, DropStats, FLOW_VERSION_BITS, Flow, FlowKey, FlowState, FlowStatus, Fragment,
    FragmentKey, NextHop, Service, ServiceStats, SourceRangeKey, Tick, V4, V6, VipKey, VlanTags, idle_ticks,
};
use lb_common::forward;
use lb_common::forward::ip::{IpFamily, IpHeader};
use lb_common::forward::parse::Link;
use lb_common::forward::platform::{
    ChecksumChange, Datapath, EditFailed, InsertFailed, ResizeFailed, Tables,
};
use lb_common::forward::scratch::Scratch;
use lb_common::forward::wire::Tcp;

use super::random::Source;
use super::skb::Skb;
use super::sockets::SocketTable;
use super::view::View;

mod family;
mod run;

pub use family::{Family, Shared};

/// Number of elements that the arrays have here and, for tests, in the kernel.
pub const SERVICES: u32 = 64;
/// Elements of `slots`.
pub const SLOTS: u32 = 4096;
/// Elements of `backends`.
pub const BACKENDS: u32 = 256;
/// Elements of `snat_addresses`.
pub const SNAT_ADDRESSES: u32 = 64;

/// Which half of the maps a family uses.
pub trait Side: IpFamily {
    /// Its maps.
    fn of(host: &Host) -> &Family<Self::Address, Self::Pad>;
}

impl Side for V4 {
    fn of(host: &Host) -> &Family<[u8; 4], [u8; 0]> {
        &host.v4
    }
}

impl Side for V6 {
    fn of(host: &Host) -> &Family<[u8; 16], [u8; 16]> {
        &host.v6
    }
}

/// The places where packets come in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hook {
    /// XDP.
    #[default]
    Xdp,
    /// TC, on ingress.
    Tc,
}

/// The datapath on the host.
pub struct Host {
    packet: Skb,
    /// The place that it stands for.
    pub hook: Hook,
    /// The time.
    pub now: Tick,
    /// Chooses what lies beside the packets that it is sent as a device; nothing does without it.
    pub(super) offloads: Option<Source>,
    /// Index of the device that packets come in by.
    pub ingress: u32,
    /// Devices that packets may be redirected to.
    pub devices: BTreeSet<u32>,
    /// The settings.
    pub config: Config,
    /// Service entries.
    pub services: Vec<Service>,
    /// Slots.
    pub slots: Vec<u32>,
    /// Backends.
    pub backends: Vec<Backend>,
    /// Source addresses.
    pub snat_addresses: Vec<[u8; 16]>,
    /// Counters.
    pub stats: RefCell<Stats>,
    /// How long affinities last, by Service entry.
    pub affinity_ticks: Vec<Tick>,
    /// How many connections clients may open, by Service entry.
    pub connection_limits: Vec<ConnectionLimit>,
    round_robin: Vec<Cell<u64>>,
    pub(super) sockets: SocketTable,
    versions: Vec<Cell<u64>>,
    /// For how many jiffies copies of flows are good.
    pub cache_lifetime: u32,
    /// The cookie that is made next, if it is not for the host to choose, as it is in the packet: beside a
    /// kernel, which has secrets.
    pub next_cookie: Cell<Option<u32>>,
    cookies: RefCell<BTreeMap<Vec<u8>, Cookie>>,
    /// What another CPU does, once, right before a new entry is put into the table of beginning flows, or
    /// right after one found the other table full.
    pub meanwhile: Cell<Option<fn(&Host)>>,
    /// How often the kernel was asked for a route.
    pub routes_asked: Cell<u32>,
    /// IPv4.
    pub v4: Family<[u8; 4], [u8; 0]>,
    /// IPv6.
    pub v6: Family<[u8; 16], [u8; 16]>,
}

/// A SYN cookie that was made: the client's initial sequence number, the cookie, the time.
#[derive(Clone, Copy, Debug)]
struct Cookie {
    first: u32,
    cookie: u32,
    made: Tick,
}

impl Cookie {
    /// What the kernel takes for too old (MAX_SYNCOOKIE_AGE in net/ipv4/syncookies.c).
    const LIFETIME: Tick = lb_common::abi::ticks_from_seconds(120);
}

/// The tuple that a cookie is for.
fn tuple_of<F: IpFamily>(ip: &F::Header, tcp: &Tcp) -> Vec<u8>
where
    F::Address: Hash + Ord,
{
    let (source, destination) = (F::to_wide(&ip.source()), F::to_wide(&ip.destination()));
    [&source[..], &destination, &tcp.source_port, &tcp.destination_port].concat()
}

/// Counters that are not zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// By Service.
    pub services: BTreeMap<u32, ServiceStats>,
    /// By backend.
    pub backends: BTreeMap<u32, BackendStats>,
    /// Open flows by backend, of Services that count them.
    pub open: BTreeMap<u32, u32>,
    /// By number of the reason.
    pub drops: BTreeMap<u32, DropStats>,
}

impl Default for Host {
    fn default() -> Self {
        Self {
            packet: Skb::default(),
            hook: Hook::Xdp,
            offloads: None,
            now: 1_000_000,
            ingress: 1,
            devices: BTreeSet::new(),
            config: Config::default(),
            services: vec![Service::default(); SERVICES as usize],
            slots: vec![0; SLOTS as usize],
            backends: vec![Backend::default(); BACKENDS as usize],
            snat_addresses: vec![[0; 16]; SNAT_ADDRESSES as usize],
            stats: RefCell::default(),
            affinity_ticks: vec![0; SERVICES as usize],
            connection_limits: vec![ConnectionLimit::default(); SERVICES as usize],
            round_robin: vec![Cell::new(0); SERVICES as usize],
            sockets: SocketTable::default(),
            versions: vec![Cell::new(0); 1 << FLOW_VERSION_BITS],
            cache_lifetime: CACHE_JIFFIES,
            next_cookie: Cell::new(None),
            cookies: RefCell::default(),
            meanwhile: Cell::new(None),
            routes_asked: Cell::new(0),
            v4: Family::new([0; 4]),
            v6: Family::new([0; 16]),
        }
    }
}

impl Host {
    /// Makes room for as many copies of flows of each family, and forgets those that there are; 0 is no
    /// flow cache.
    pub fn set_cache(&mut self, slots: u32) {
        self.v4.set_cache(slots, CachedFlow::nobodys([0; 4], []));
        self.v6.set_cache(slots, CachedFlow::nobodys([0; 16], [0; 16]));
    }

    /// Forgets all copies of flows.
    pub fn clear_cache(&mut self) {
        self.set_cache(self.v4.cache.len() as u32);
    }

    /// Forgets all flows.
    pub fn clear_flows(&mut self) {
        self.v4.clear_flows();
        self.v6.clear_flows();
    }

    fn let_others_run(&self) {
        if let Some(run) = self.meanwhile.take() {
            run(self);
        }
    }

    fn add_open(&self, backend: u32, amount: u32) {
        if backend < BACKENDS {
            let open = &mut self.stats.borrow_mut().open;
            let flows = open.get(&backend).copied().unwrap_or(0).wrapping_add(amount);
            if flows == 0 {
                open.remove(&backend)
            } else {
                open.insert(backend, flows)
            };
        }
    }

    fn can_send_by(&self, ifindex: u32) -> bool {
        self.hook == Hook::Tc || ifindex == self.ingress || self.devices.contains(&ifindex)
    }

    fn packet_length(&self) -> u64 {
        use lb_common::forward::platform::Packet;
        self.packet.view().length() as u64
    }
}

impl Datapath for Host {
    type Packet = View;

    fn packet(&self) -> View {
        self.packet.view()
    }

    fn is_on_wire(&self) -> bool {
        self.hook == Hook::Xdp
    }

    fn sends_by_any_device(&self) -> bool {
        self.hook == Hook::Tc
    }

    fn link(&self) -> Option<Link> {
        self.packet.link()
    }

    fn set_tags(&self, link: &Link, tags: VlanTags) -> Result<(), EditFailed> {
        match self.hook {
            Hook::Xdp => forward::emit::set_tags_in_packet(self, link, tags),
            Hook::Tc => self.packet.set_tags(link, tags),
        }
    }

    fn pull(&self, bytes: u32) {
        self.packet.pull(bytes);
    }

    fn add_to_checksum(&self, change: ChecksumChange) -> Result<(), EditFailed> {
        self.packet.add_to_checksum(change)
    }

    fn largest_on_wire(&self, l3: usize, headers: usize) -> usize {
        self.packet.largest_on_wire(l3, headers)
    }

    fn is_unfinished(&self, _offset: usize) -> bool {
        self.packet.is_unfinished()
    }

    fn add_to_sum(&self, change: u32) {
        self.packet.add_to_sum(change);
    }

    fn take_out_options(&self, bytes: u32) -> Result<(), ResizeFailed> {
        self.packet.take_out_options(bytes)
    }

    fn move_head(&self, bytes: i32) -> Result<(), ResizeFailed> {
        self.packet.move_head(bytes)
    }

    fn move_tail(&self, bytes: i32) -> Result<(), ResizeFailed> {
        self.packet.move_tail(bytes)
    }

    fn forget(&self, slot: &mut usize, value: usize) -> usize {
        *slot = value;
        value
    }

    fn ingress_device(&self) -> u32 {
        self.ingress
    }

    fn now(&self) -> Tick {
        self.now
    }

    fn config(&self) -> Option<&Config> {
        Some(&self.config)
    }

    fn timeout(&self, state: FlowState) -> Tick {
        self.config.timeouts[state as usize]
    }

    fn service(&self, index: u32) -> Option<Service> {
        self.services.get(index as usize).copied()
    }

    fn slot(&self, index: u32) -> Option<u32> {
        self.slots.get(index as usize).copied()
    }

    fn backend(&self, index: u32) -> Option<&Backend> {
        self.backends.get(index as usize)
    }

    fn snat_address(&self, index: u32) -> Option<[u8; 16]> {
        self.snat_addresses.get(index as usize).copied()
    }

    fn next_turn(&self, service: u32) -> u64 {
        self.round_robin.get(service as usize).map_or(0, |turn| turn.replace(turn.get() + 1))
    }

    fn open_flows(&self, backend: u32) -> u32 {
        self.stats.borrow().open.get(&backend).copied().unwrap_or(0)
    }

    fn flow_opened(&self, backend: u32) {
        self.add_open(backend, 1);
    }

    fn flow_ended(&self, backend: u32) {
        self.add_open(backend, u32::MAX);
    }

    fn affinity_timeout(&self, service: u32) -> Tick {
        self.affinity_ticks.get(service as usize).copied().unwrap_or(0)
    }

    fn connection_limit(&self, service: u32) -> ConnectionLimit {
        self.connection_limits.get(service as usize).copied().unwrap_or_default()
    }

    fn count_forwarded(&self, service: u32, backend: u32, reply: bool, bytes: u64) {
        let Stats { services, backends, .. } = &mut *self.stats.borrow_mut();
        if service < SERVICES {
            services.entry(service).or_default().count_forwarded(reply, bytes);
        }
        if backend < BACKENDS {
            backends.entry(backend).or_default().count_forwarded(reply, bytes);
        }
    }

    fn count_new_flow(&self, service: u32, backend: u32) {
        let Stats { services, backends, .. } = &mut *self.stats.borrow_mut();
        if service < SERVICES {
            services.entry(service).or_default().new_flows += 1;
        }
        if backend < BACKENDS {
            backends.entry(backend).or_default().new_flows += 1;
        }
    }

    fn count_refused(&self, service: u32) {
        if service < SERVICES {
            self.stats.borrow_mut().services.entry(service).or_default().refused += 1;
        }
    }

    fn count_drop_number(&self, reason: u32, bytes: u64) {
        let stats = &mut *self.stats.borrow_mut();
        let drops = stats.drops.entry(reason).or_default();
        drops.packets += 1;
        drops.bytes += bytes;
    }

    fn caches_flows(&self) -> bool {
        self.hook == Hook::Xdp && !self.v4.cache.is_empty()
    }

    fn jiffies(&self) -> u32 {
        // As with CONFIG_HZ=250: a tick is 16.8 ms.
        self.now.wrapping_mul(4)
    }

    fn cache_lifetime(&self) -> u32 {
        self.cache_lifetime
    }

    fn flow_version(&self, hash: u32) -> u16 {
        self.versions[(hash >> (32 - FLOW_VERSION_BITS)) as usize].get() as u16
    }

    fn renew_version(&self, hash: u32) {
        let version = &self.versions[(hash >> (32 - FLOW_VERSION_BITS)) as usize];
        version.set(version.get() + 1);
    }

    fn replace_status(&self, status: &mut FlowStatus, expected: FlowStatus, new: FlowStatus) -> bool {
        let as_expected = *status == expected;
        if as_expected {
            *status = new;
        }
        as_expected
    }

    fn replace_rate(&self, rate: &mut ConnectionRate, expected: u64, new: u64) -> bool {
        let as_expected = rate.full_at == expected;
        if as_expected {
            rate.full_at = new;
        }
        as_expected
    }
}

impl<F: Side> Tables<F> for Host
where
    F::Address: Hash + Ord,
{
    type FlowRef = Shared<Flow<F::Address>>;
    type AffinityRef = Shared<Affinity>;
    type RateRef = Shared<ConnectionRate>;
    type FragmentRef<'m> = Rc<Fragment<F::Address>>;

    #[expect(unsafe_code, reason = "the trait hands the scratch out once for each run of a step")]
    fn scratch<'s>(&self) -> Option<&'s mut Scratch<F::Address>> {
        // SAFETY: `slow` and `unknown` take it once each, and do not overlap.
        Some(unsafe { &mut *F::of(self).scratch.get() })
    }

    #[expect(unsafe_code, reason = "the trait hands out the cache's memory, as in the kernel")]
    fn cached_flow<'s>(&self, hash: u32) -> Option<&'s mut CachedFlow<F::Address, F::Pad>> {
        let cache = &F::of(self).cache;
        let place = forward::cache::place(hash, cache.len() as u32) as usize;
        // SAFETY: one thread; the core has done with one copy before it asks for another, and packets
        // do not run while the cache is made anew.
        cache.get(place).map(|copy| unsafe { &mut *copy.get() })
    }

    fn established(&self, key: &FlowKey<F::Address>) -> Option<Self::FlowRef> {
        F::of(self).established.borrow().get(key).cloned()
    }

    fn transient(&self, key: &FlowKey<F::Address>) -> Option<Self::FlowRef> {
        F::of(self).transient.borrow().get(key).cloned()
    }

    fn insert_established(
        &self,
        key: &FlowKey<F::Address>,
        flow: &Flow<F::Address>,
    ) -> Result<(), InsertFailed> {
        let family = F::of(self);
        let mut table = family.established.borrow_mut();
        if table.len() >= family.capacity && !table.contains_key(key) {
            drop(table);
            self.let_others_run();
            return Err(InsertFailed::Full);
        }
        table.insert(*key, Shared::new(*flow));
        Ok(())
    }

    fn insert_new_transient(
        &self,
        key: &FlowKey<F::Address>,
        flow: &Flow<F::Address>,
    ) -> Result<(), InsertFailed> {
        self.let_others_run();
        let mut table = F::of(self).transient.borrow_mut();
        if table.contains_key(key) {
            return Err(InsertFailed::Exists);
        }
        table.insert(*key, Shared::new(*flow));
        Ok(())
    }

    fn insert_transient(
        &self,
        key: &FlowKey<F::Address>,
        flow: &Flow<F::Address>,
    ) -> Result<(), InsertFailed> {
        F::of(self).transient.borrow_mut().insert(*key, Shared::new(*flow));
        Ok(())
    }

    fn remove_established(&self, key: &FlowKey<F::Address>) {
        F::of(self).established.borrow_mut().remove(key);
    }

    fn remove_transient(&self, key: &FlowKey<F::Address>) {
        F::of(self).transient.borrow_mut().remove(key);
    }

    fn cookie(&self, l3: usize, tcp: &mut Tcp) -> Option<u32> {
        use lb_common::forward::platform::Packet;
        let tuple = tuple_of::<F>(self.packet.view().at::<F::Header>(l3)?, tcp);
        let first = u32::from_be_bytes(tcp.sequence);
        let cookie = self.next_cookie.take().unwrap_or_else(|| {
            // Nobody guesses here: any numbers that differ will do.
            tuple.iter().fold(first, |sum, byte| sum.wrapping_mul(0x0100_0193) ^ u32::from(*byte))
        });
        self.cookies.borrow_mut().insert(tuple, Cookie { first, cookie, made: self.now });
        Some(cookie)
    }

    fn is_cookie(&self, l3: usize, tcp: &mut Tcp) -> bool {
        use lb_common::forward::platform::Packet;
        let Some(ip) = self.packet.view().at::<F::Header>(l3) else { return false };
        let cookies = self.cookies.borrow();
        let Some(made) = cookies.get(&tuple_of::<F>(ip, tcp)) else { return false };
        // A sum, as the kernel's is: what is added to the cookie, and what the client's number lacks.
        let added = u32::from_be_bytes(tcp.acknowledgment).wrapping_sub(1).wrapping_sub(made.cookie);
        let lacks = made.first.wrapping_add(1).wrapping_sub(u32::from_be_bytes(tcp.sequence));
        added.wrapping_add(lacks) < 4 && idle_ticks(self.now, made.made) < Cookie::LIFETIME
    }

    fn vip(&self, key: &VipKey<F::Address>) -> Option<u32> {
        F::of(self).vips.get(key).copied()
    }

    fn is_in_source_range(&self, client: &SourceRangeKey<F::Address>) -> bool {
        F::of(self).sources.cover(&F::to_wide(&client.range.address), client)
    }

    fn affinity(&self, key: &AffinityKey<F::Address>) -> Option<Shared<Affinity>> {
        F::of(self).affinity.borrow().get(key).cloned()
    }

    fn insert_affinity(&self, key: &AffinityKey<F::Address>, affinity: &Affinity) {
        F::of(self).affinity.borrow_mut().insert(*key, Shared::new(*affinity));
    }

    fn connection_rate(&self, key: &AffinityKey<F::Address>) -> Option<Shared<ConnectionRate>> {
        F::of(self).rates.borrow().get(key).cloned()
    }

    fn insert_new_connection_rate(
        &self,
        key: &AffinityKey<F::Address>,
        rate: &ConnectionRate,
    ) -> Result<(), InsertFailed> {
        let mut rates = F::of(self).rates.borrow_mut();
        if rates.contains_key(key) {
            return Err(InsertFailed::Exists);
        }
        rates.insert(*key, Shared::new(*rate));
        Ok(())
    }

    fn fragment(&self, key: &FragmentKey<F::Address>) -> Option<Rc<Fragment<F::Address>>> {
        F::of(self).fragments.borrow().get(key).cloned()
    }

    fn insert_fragment(&self, key: &FragmentKey<F::Address>, fragment: &Fragment<F::Address>) {
        F::of(self).fragments.borrow_mut().insert(*key, Rc::new(*fragment));
    }

    fn route(&self, _source: &F::Address, destination: &F::Address) -> Option<NextHop> {
        self.routes_asked.set(self.routes_asked.get() + 1);
        let hop = F::of(self).routes.get(destination).copied()?;
        self.can_send_by(hop.ifindex).then_some(hop)
    }
}

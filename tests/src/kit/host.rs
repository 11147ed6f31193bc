//! The forwarding core on the host: maps are hash maps, the packet lies in a buffer, the time is
//! what a test says.

use std::cell::{Cell, RefCell, UnsafeCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use lb_common::abi::{
    Affinity, AffinityKey, Backend, BackendStats, Config, DropReason, DropStats, Flow, FlowKey, FlowState,
    FlowStatus, Fragment, FragmentKey, NextHop, Service, ServiceStats, SourceRangeKey, Tick, V4, V6, VipKey,
    VlanTags,
};
use lb_common::forward::ip::IpFamily;
use lb_common::forward::parse::Link;
use lb_common::forward::parse::Parse;
use lb_common::forward::platform::{
    ChecksumChange, Datapath, EditFailed, InsertFailed, ResizeFailed, Tables,
};
use lb_common::forward::scratch::Scratch;
use lb_common::forward::{self, Fast, Slow, Verdict};

use super::random::Source;
use super::ranges::Ranges;
use super::skb::{Frame, Skb};
use super::sockets::SocketTable;
use super::tables::Snapshot;
use super::view::View;

/// Number of elements that the arrays have here and, for tests, in the kernel.
pub const SERVICES: u32 = 64;
/// Elements of `slots`.
pub const SLOTS: u32 = 4096;
/// Elements of `backends`.
pub const BACKENDS: u32 = 256;
/// Bytes of headers that the first program of TC wants in reach.
const HEADERS: u32 = 14 + 40 + 20;
/// Elements of `snat_addresses`.
pub const SNAT_ADDRESSES: u32 = 64;

type FlowTable<A> = RefCell<HashMap<FlowKey<A>, Shared<Flow<A>>>>;

/// The maps of one family.
pub struct Family<A> {
    established: FlowTable<A>,
    transient: FlowTable<A>,
    /// How many established flow entries there is room for.
    pub capacity: usize,
    /// VIPs.
    pub vips: HashMap<VipKey<A>, u32>,
    fragments: RefCell<HashMap<FragmentKey<A>, Rc<Fragment<A>>>>,
    /// Who may connect.
    pub sources: Ranges<A>,
    affinity: RefCell<HashMap<AffinityKey<A>, Shared<Affinity>>>,
    /// Next hops by destination: what `bpf_fib_lookup` would say.
    pub routes: BTreeMap<A, NextHop>,
    scratch: Box<UnsafeCell<Scratch<A>>>,
}

impl<A: Copy + Ord + Hash> Family<A> {
    fn new(address: A) -> Self {
        Self {
            established: RefCell::default(),
            transient: RefCell::default(),
            capacity: usize::MAX,
            vips: HashMap::new(),
            fragments: RefCell::default(),
            sources: Ranges::default(),
            affinity: RefCell::default(),
            routes: BTreeMap::new(),
            scratch: Box::new(UnsafeCell::new(Scratch::new(address))),
        }
    }

    /// All that is remembered.
    pub fn snapshot(&self) -> Snapshot<A> {
        let copy = |table: &FlowTable<A>| table.borrow().iter().map(|(key, flow)| (*key, **flow)).collect();
        Snapshot {
            established: copy(&self.established),
            transient: copy(&self.transient),
            fragments: self
                .fragments
                .borrow()
                .iter()
                .map(|(key, note)| ((key.source, key.destination, key.identification, key.protocol), **note))
                .collect(),
            affinities: self.affinity.borrow().iter().map(|(key, entry)| (*key, **entry)).collect(),
        }
    }

    /// Changes all flows, fragments and affinities in place.
    pub fn edit(
        &mut self,
        mut flow: impl FnMut(&FlowKey<A>, &mut Flow<A>),
        mut note: impl FnMut(&mut Fragment<A>),
        mut affinity: impl FnMut(&mut Affinity),
    ) {
        for table in [&mut self.established, &mut self.transient] {
            for (key, entry) in table.get_mut() {
                flow(key, entry);
            }
        }
        for fragment in self.fragments.get_mut().values_mut() {
            let mut changed = **fragment;
            note(&mut changed);
            *fragment = Rc::new(changed);
        }
        self.affinity.get_mut().values_mut().for_each(|entry| affinity(entry));
    }

    /// What the kernel's LRU does when it needs room; says whether there was such an entry.
    pub fn evict(&mut self, key: &FlowKey<A>) -> bool {
        self.transient.get_mut().remove(key).is_some()
    }
}

/// A map's value in place. As in the kernel it stays valid, but unreachable, when its entry is
/// removed.
pub struct Shared<T>(Rc<UnsafeCell<T>>);

impl<T> Shared<T> {
    pub(super) fn new(value: T) -> Self {
        Self(Rc::new(UnsafeCell::new(value)))
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

#[expect(unsafe_code, reason = "map values are shared, as in the kernel")]
impl<T> Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: one thread; the core writes through one handle at a time.
        unsafe { &*self.0.get() }
    }
}

#[expect(unsafe_code, reason = "map values are shared, as in the kernel")]
impl<T> DerefMut for Shared<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above.
        unsafe { &mut *self.0.get() }
    }
}

/// Which half of the maps a family uses.
pub trait Side: IpFamily {
    /// Its maps.
    fn of(host: &Host) -> &Family<Self::Address>;
}

impl Side for V4 {
    fn of(host: &Host) -> &Family<[u8; 4]> {
        &host.v4
    }
}

impl Side for V6 {
    fn of(host: &Host) -> &Family<[u8; 16]> {
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
    round_robin: Vec<Cell<u64>>,
    pub(super) sockets: SocketTable,
    /// IPv4.
    pub v4: Family<[u8; 4]>,
    /// IPv6.
    pub v6: Family<[u8; 16]>,
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
            round_robin: vec![Cell::new(0); SERVICES as usize],
            sockets: SocketTable::default(),
            v4: Family::new([0; 4]),
            v6: Family::new([0; 16]),
        }
    }
}

impl Host {
    /// TC, with packets as devices and the kernel's stack hand them over.
    #[must_use]
    pub fn with_offloads(choices: Source) -> Self {
        Self { hook: Hook::Tc, offloads: Some(choices), ..Self::default() }
    }

    /// Runs a packet through what the kernel programs do: fast, slow, unknown. Gives the verdict
    /// and the packet afterwards.
    pub fn run(&mut self, packet: &[u8]) -> (Verdict, Vec<u8>) {
        let (verdict, frame) = self.run_frame(&Frame::plain(packet));
        (verdict, frame.bytes)
    }

    /// The same with what lies beside the packet, which is in its bytes afterwards as far as it can be.
    pub fn run_frame(&mut self, frame: &Frame) -> (Verdict, Frame) {
        self.packet.fill(frame);
        let verdict = match self.enter() {
            Fast::Done(verdict) => verdict,
            Fast::SlowV4 => self.slow::<V4>(),
            Fast::SlowV6 => self.slow::<V6>(),
        };
        let verdict = match verdict {
            Verdict::Redirect(ifindex) if !self.can_send_by(ifindex) => {
                self.count_drop(DropReason::NoDevice, self.packet_length());
                Verdict::Drop
            }
            other => other,
        };
        (verdict, self.packet.content().sent())
    }

    /// The first of the programs.
    fn enter(&self) -> Fast {
        if self.hook == Hook::Xdp {
            return forward::fast(self);
        }
        self.pull(HEADERS);
        match self.link() {
            Some(Link { vlan: [0, 0, 0, 0], .. }) if !self.packet.has_tag_beside() => forward::fast(self),
            Some(Link { ether_type: [8, 0], .. }) => Fast::SlowV4,
            Some(Link { ether_type: [0x86, 0xdd], .. }) => Fast::SlowV6,
            _ => Fast::Done(Verdict::Pass),
        }
    }

    /// Runs a packet that leaves the node through what the kernel program does.
    pub fn run_egress(&mut self, packet: &[u8]) -> (Verdict, Vec<u8>) {
        self.packet.fill(&Frame::plain(packet));
        let verdict = match forward::parse::link(self.packet.view()).map(|link| link.ether_type) {
            Some([8, 0]) => forward::egress::<_, V4>(self),
            Some([0x86, 0xdd]) => forward::egress::<_, V6>(self),
            _ => Verdict::Pass,
        };
        (verdict, self.packet.content().bytes)
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

    fn slow<F: Side + Parse>(&self) -> Verdict
    where
        F::Address: Hash + Ord,
    {
        match forward::slow::<_, F>(self) {
            Slow::Done(verdict) => verdict,
            Slow::Unknown => forward::unknown::<_, F>(self),
        }
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

    fn replace_status(&self, status: &mut FlowStatus, expected: FlowStatus, new: FlowStatus) -> bool {
        let as_expected = *status == expected;
        if as_expected {
            *status = new;
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
    type FragmentRef<'m> = Rc<Fragment<F::Address>>;

    #[expect(unsafe_code, reason = "the trait hands the scratch out once for each run of a step")]
    fn scratch<'s>(&self) -> Option<&'s mut Scratch<F::Address>> {
        // SAFETY: `slow` and `unknown` take it once each, and do not overlap.
        Some(unsafe { &mut *F::of(self).scratch.get() })
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

    fn fragment(&self, key: &FragmentKey<F::Address>) -> Option<Rc<Fragment<F::Address>>> {
        F::of(self).fragments.borrow().get(key).cloned()
    }

    fn insert_fragment(&self, key: &FragmentKey<F::Address>, fragment: &Fragment<F::Address>) {
        F::of(self).fragments.borrow_mut().insert(*key, Rc::new(*fragment));
    }

    fn route(&self, _source: &F::Address, destination: &F::Address) -> Option<NextHop> {
        let hop = F::of(self).routes.get(destination).copied()?;
        self.can_send_by(hop.ifindex).then_some(hop)
    }
}

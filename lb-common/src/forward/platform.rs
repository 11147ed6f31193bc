//! What the forwarding core asks of the world that it runs in: the kernel, or a test on the host.

use core::ops::{Deref, DerefMut};

use super::checksum::replaced;
use super::ip::IpFamily;
use super::parse::Link;
use super::scratch::Scratch;
use super::wire::{Tcp, Wire};
use crate::abi::{
    Affinity, AffinityKey, Backend, CachedFlow, Config, ConnectionLimit, ConnectionRate, DropReason, Flow,
    FlowKey, FlowState, FlowStatus, Fragment, FragmentKey, IPPROTO_UDP, NextHop, Service, SourceRangeKey,
    Tick, VipKey, VlanTags,
};

/// A handle to the bytes of the packet at hand.
///
/// Views are bounds-checked. A view must not be used after the packet was resized, nor two
/// overlapping ones at a time; the kernel's verifier enforces the former.
pub trait Packet: Copy {
    /// Length in bytes from the Ethernet header on.
    fn length(self) -> usize;

    /// A view of the first bytes.
    fn head<'p, T: Wire>(self) -> Option<&'p mut T>;

    /// A view of the bytes at an offset; offsets from 512 on are out of reach.
    fn at<'p, T: Wire>(self, offset: usize) -> Option<&'p mut T>;
}

/// The maps and helpers that do not depend on the address family.
pub trait Datapath {
    /// Handle to the packet.
    type Packet: Packet;

    /// The packet as it is now.
    fn packet(&self) -> Self::Packet;
    /// Whether packets are as they are on the wire: then checksums are edited in place. If not, a
    /// checksum may be unfinished, with only the pseudo header's sum in its field, and a packet may
    /// be cut into segments later: then [`Self::add_to_checksum`] edits.
    fn is_on_wire(&self) -> bool;
    /// Whether packets can be sent by any device. Where they cannot, packets of flows that need it
    /// ([`FlowFlags::TC`](crate::abi::FlowFlags::TC)) pass untouched to where they can.
    fn sends_by_any_device(&self) -> bool;
    /// The Ethernet header and up to two tags, wherever the latter are kept; `None` if the packet is
    /// too short.
    fn link(&self) -> Option<Link>;
    /// Replaces the packet's tags, which `link` has found.
    /// # Errors
    /// When there is no room.
    fn set_tags(&self, link: &Link, tags: VlanTags) -> Result<(), EditFailed>;
    /// Sees to it that the first bytes of the packet, as far as it has them, can be looked at and
    /// edited.
    fn pull(&self, bytes: u32);
    /// Carries a change over to a TCP or UDP checksum, where packets are not as on the wire.
    /// # Errors
    /// When the packet cannot be edited.
    fn add_to_checksum(&self, change: ChecksumChange) -> Result<(), EditFailed>;
    /// Carries a change that no checksum in the packet balances over to the sum that a device may have
    /// taken of the whole of it (`CHECKSUM_COMPLETE`); nothing where packets are as on the wire.
    fn add_to_sum(&self, change: u32);
    /// Whether the checksum whose field is at `offset` is unfinished.
    fn is_unfinished(&self, offset: usize) -> bool;
    /// Bytes of the largest IP packet that the packet is on the wire, where `l3` is the offset of its IP
    /// header and `headers` the length of it and what follows up to the payload: a super-packet is many.
    fn largest_on_wire(&self, l3: usize, headers: usize) -> usize;
    /// Moves the start of the packet: positive cuts off, negative adds bytes in front.
    /// # Errors
    /// When there is no room.
    fn move_head(&self, bytes: i32) -> Result<(), ResizeFailed>;
    /// Moves the end of the packet: negative cuts off.
    /// # Errors
    /// When there is no room.
    fn move_tail(&self, bytes: i32) -> Result<(), ResizeFailed>;
    /// Takes the first bytes behind the IP header's fixed part out, where packets are not as on the wire:
    /// what follows them stays where the kernel knows it to be.
    /// # Errors
    /// When the packet cannot be edited so.
    fn take_out_options(&self, bytes: u32) -> Result<(), ResizeFailed>;
    /// Gives back `value`, by way of `slot`. For the kernel's verifier: what a map's memory returns is
    /// a number that it knows nothing of, so it need not follow each value that it could be. `slot`
    /// lies in [`Scratch`].
    fn forget(&self, slot: &mut usize, value: usize) -> usize;
    /// Index of the device that the packet came in by.
    fn ingress_device(&self) -> u32;
    /// The time.
    fn now(&self) -> Tick;

    /// The settings.
    fn config(&self) -> Option<&Config>;
    /// Idle time after which a flow in a state may be forgotten.
    fn timeout(&self, state: FlowState) -> Tick;
    /// A Service entry.
    fn service(&self, index: u32) -> Option<Service>;
    /// A slot: the index of a backend.
    fn slot(&self, index: u32) -> Option<u32>;
    /// A backend's entry.
    fn backend(&self, index: u32) -> Option<&Backend>;
    /// A source address towards backends.
    fn snat_address(&self, index: u32) -> Option<[u8; 16]>;
    /// Takes the next number of a Service's round-robin counter; exact over all CPUs.
    fn next_turn(&self, service: u32) -> u64;

    /// The number of flows that a backend has open, if its Service counts them; what is off by lost
    /// flows may look negative.
    fn open_flows(&self, backend: u32) -> u32;
    /// Counts a flow that a backend has open from now on.
    fn flow_opened(&self, backend: u32);
    /// Counts a flow that a backend has open no longer.
    fn flow_ended(&self, backend: u32);

    /// How long after its last connection began a client keeps its backend, by Service entry.
    fn affinity_timeout(&self, service: u32) -> Tick;

    /// How many connections a client may open, by Service entry.
    fn connection_limit(&self, service: u32) -> ConnectionLimit;

    /// Counts a forwarded packet for its Service and its backend.
    fn count_forwarded(&self, service: u32, backend: u32, reply: bool, bytes: u64);
    /// Counts a new flow for its Service and its backend.
    fn count_new_flow(&self, service: u32, backend: u32);
    /// Counts a refused connection or packet for its Service.
    fn count_refused(&self, service: u32);
    /// Counts a packet that is not forwarded, by the number of the reason.
    fn count_drop_number(&self, reason: u32, bytes: u64);
    /// Counts a packet that is not forwarded.
    #[inline(always)]
    fn count_drop(&self, reason: DropReason, bytes: u64) {
        self.count_drop_number(reason as u32, bytes);
    }

    /// Whether flows are copied to the flow cache, and packets looked up there first.
    fn caches_flows(&self) -> bool;
    /// The time in jiffies, for the flow cache.
    fn jiffies(&self) -> u32;
    /// For how many jiffies a copy is good.
    fn cache_lifetime(&self) -> u32;
    /// The version that flows of a hash have; copies of another version are not used.
    fn flow_version(&self, hash: u32) -> u16;
    /// Gives the flows of a hash another version, for all CPUs.
    fn renew_version(&self, hash: u32);

    /// Replaces the status word of an entry if it is still as expected, atomically.
    fn replace_status(&self, status: &mut FlowStatus, expected: FlowStatus, new: FlowStatus) -> bool;
    /// Replaces what a client has used of a limit if it is still as expected, atomically.
    fn replace_rate(&self, rate: &mut ConnectionRate, expected: u64, new: u64) -> bool;
}

/// A change of what a TCP or UDP checksum covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChecksumChange {
    /// Offset of the checksum's field.
    pub offset: usize,
    /// Whether it is UDP's, where 0 stands for "none".
    pub is_udp: bool,
    /// Whether it is over IPv6, whose header has no checksum that balances new addresses.
    pub is_v6: bool,
    /// What was added to the sum of the pseudo header.
    pub pseudo: u32,
    /// What was added to the sum of all else.
    pub covered: u32,
    /// What was added to the sum of the whole packet, beside what the checksum covers.
    pub beside: u32,
}

impl ChecksumChange {
    /// New addresses and ports in the packet of a family, whose TCP or UDP header is at `l4`.
    #[inline(always)]
    pub fn of_tuple<F: IpFamily>(l4: usize, old: &FlowKey<F::Address>, flow: &Flow<F::Address>) -> Self {
        let is_udp = old.protocol == u32::from(IPPROTO_UDP);
        Self {
            offset: l4 + if is_udp { 6 } else { 16 },
            is_udp,
            is_v6: F::VERSION == 6,
            pseudo: F::replaced(&old.source, &flow.new_source)
                + F::replaced(&old.destination, &flow.new_destination),
            covered: replaced(&old.source_port, &flow.new_source_port)
                + replaced(&old.destination_port, &flow.new_destination_port),
            beside: if flow.is_local() { 0 } else { F::hop_in_sum() },
        }
    }
}

/// The packet could not be edited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EditFailed;

/// The packet could not be made longer or shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResizeFailed;

/// Why an entry was not inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InsertFailed {
    /// There is one already.
    Exists,
    /// There is no room.
    Full,
}

/// The maps that exist once for each address family.
pub trait Tables<F: IpFamily>: Datapath {
    /// A flow entry in place.
    type FlowRef: DerefMut<Target = Flow<F::Address>>;
    /// What is remembered of a client, in place.
    type AffinityRef: DerefMut<Target = Affinity>;
    /// What a client has used of a limit, in place.
    type RateRef: DerefMut<Target = ConnectionRate>;
    /// A fragment's note in place.
    type FragmentRef<'m>: Deref<Target = Fragment<F::Address>>
    where
        Self: 'm;

    /// Room for what is under construction: a kernel program's stack is 512 bytes. There is one for
    /// each CPU; its content does not outlive the packet.
    fn scratch<'s>(&self) -> Option<&'s mut Scratch<F::Address>>;

    /// The place of this CPU's flow cache where the copy of a flow of some hash is kept.
    fn cached_flow<'s>(&self, hash: u32) -> Option<&'s mut CachedFlow<F::Address, F::Pad>>;

    /// Looks up an established flow.
    fn established(&self, key: &FlowKey<F::Address>) -> Option<Self::FlowRef>;
    /// Looks up a flow that begins or ends.
    fn transient(&self, key: &FlowKey<F::Address>) -> Option<Self::FlowRef>;
    /// Inserts or replaces an established flow.
    /// # Errors
    /// When the table is full.
    fn insert_established(
        &self,
        key: &FlowKey<F::Address>,
        flow: &Flow<F::Address>,
    ) -> Result<(), InsertFailed>;
    /// Inserts a flow that begins, unless there is one.
    /// # Errors
    /// When there is one, or no room.
    fn insert_new_transient(
        &self,
        key: &FlowKey<F::Address>,
        flow: &Flow<F::Address>,
    ) -> Result<(), InsertFailed>;
    /// Inserts or replaces a flow that begins or ends.
    /// # Errors
    /// When there is no room.
    fn insert_transient(
        &self,
        key: &FlowKey<F::Address>,
        flow: &Flow<F::Address>,
    ) -> Result<(), InsertFailed>;
    /// Removes an established flow, if it is there.
    fn remove_established(&self, key: &FlowKey<F::Address>);
    /// Removes a flow that begins or ends, if it is there.
    fn remove_transient(&self, key: &FlowKey<F::Address>);

    /// The SYN cookie for a SYN (RFC 4987, section 3.6): `l3` is the offset of its IP header in the packet,
    /// `tcp` its TCP header, said to be without options. `None` if the kernel makes none.
    fn cookie(&self, l3: usize, tcp: &mut Tcp) -> Option<u32>;
    /// Whether a segment acknowledges a cookie for the SYN before it, or that cookie plus 1, 2 or 3: what
    /// the kernel keeps an index of segment sizes in is ours to use (`check_tcp_syn_cookie` in
    /// net/ipv4/syncookies.c).
    fn is_cookie(&self, l3: usize, tcp: &mut Tcp) -> bool;

    /// The index of the Service entry of a VIP.
    fn vip(&self, key: &VipKey<F::Address>) -> Option<u32>;
    /// Whether a source range covers a client.
    fn is_in_source_range(&self, client: &SourceRangeKey<F::Address>) -> bool;
    /// Looks up which backend a client had.
    fn affinity(&self, key: &AffinityKey<F::Address>) -> Option<Self::AffinityRef>;
    /// Remembers a client's backend; best effort.
    fn insert_affinity(&self, key: &AffinityKey<F::Address>, affinity: &Affinity);
    /// Looks up what a client has used of its limit.
    fn connection_rate(&self, key: &AffinityKey<F::Address>) -> Option<Self::RateRef>;
    /// Begins to count a client's connections, unless they are counted already.
    /// # Errors
    /// When they are, or there is no room.
    fn insert_new_connection_rate(
        &self,
        key: &AffinityKey<F::Address>,
        rate: &ConnectionRate,
    ) -> Result<(), InsertFailed>;
    /// What the first fragment left, in place.
    fn fragment<'m>(&'m self, key: &FragmentKey<F::Address>) -> Option<Self::FragmentRef<'m>>;
    /// Leaves a note for the other fragments; best effort.
    fn insert_fragment(&self, key: &FragmentKey<F::Address>, fragment: &Fragment<F::Address>);
    /// The next hop to an address by the node's routes, if its neighbour is known and frames can be
    /// sent by its device.
    fn route(&self, source: &F::Address, destination: &F::Address) -> Option<NextHop>;
}

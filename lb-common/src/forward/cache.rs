//! The flow cache in front of the table of established flows: each CPU keeps copies of flows, in an
//! array at the place that the hash of the tuple names, so that a packet in the middle of a flow
//! needs no search. A flow that comes to a place that is taken pushes the other one out once that was of no
//! use for three such packets: flows that take turns would push each other out with each packet.
//!
//! A packet is treated as it would be without the cache, because a copy is used only
//!
//! - while the flow is in the table: whoever takes it out gives its hash another version
//!   afterwards ([`forget`]), and a copy is marked with the version from before it was looked up
//! - while its backend, or the routes, have the generation that the flow has; the way and the MTU are
//!   asked for each time, where they are without the cache
//! - for a moment. Then the packet goes by the table, which notes the time and the sequence number:
//!   an idle time is too long by that moment at most. A sequence number that has moved on far goes
//!   by the table, too, so that an RST is judged by one that is near
//! - for packets without SYN, FIN or RST, of flows that need no more than a plain edit.

use super::checksum;
use super::emit;
use super::ip::{IpFamily, IpHeader};
use super::platform::{Packet, Tables};
use super::wire::{Ethernet, Frame, TcpFrame, copy_mac};
use crate::abi::{CachedFlow, Flow, FlowKey, IPPROTO_TCP, IPPROTO_UDP};

/// Odd and without a pattern: the fraction of the golden ratio, and of the square root of 2.
const FIRST: u64 = 0x9e37_79b9_7f4a_7c15;
const SECOND: u64 = 0x6a09_e667_f3bc_c909;

/// The hash of a tuple. Its high bits are the good ones.
#[inline(always)]
#[must_use]
pub fn hash<F: IpFamily>(key: &FlowKey<F::Address>) -> u32 {
    let [a, b] = key.source_port;
    let [c, d] = key.destination_port;
    let ports = u64::from(u32::from_ne_bytes([a, b, c, d]));
    let mixed = (F::word(&key.source).rotate_left(32) ^ ports)
        .wrapping_add(F::word(&key.destination).wrapping_mul(SECOND));
    (mixed.wrapping_mul(FIRST) >> 32) as u32
}

/// The place of a hash among as many.
#[inline(always)]
#[must_use]
pub fn place(hash: u32, slots: u32) -> u32 {
    ((u64::from(hash) * u64::from(slots)) >> 32) as u32
}

/// Sees to it that no CPU uses a copy of a flow any more. To be called after the flow was taken out
/// of the table. Also where this program has no cache: another that is still attached may have one.
#[inline(always)]
pub fn forget<D: Tables<F>, F: IpFamily>(datapath: &D, key: &FlowKey<F::Address>) {
    datapath.renew_version(hash::<F>(key));
}

/// Where the copy of a packet's flow is, or would be.
#[derive(Clone, Copy)]
pub struct Place {
    hash: u32,
    /// From before the flow was looked up.
    version: u16,
}

impl Place {
    /// None, where flows are not copied.
    pub const NOWHERE: Self = Self { hash: 0, version: 0 };

    /// That of a tuple.
    #[inline(always)]
    pub fn of<D: Tables<F>, F: IpFamily>(datapath: &D, key: &FlowKey<F::Address>) -> Self {
        let hash = hash::<F>(key);
        Self { hash, version: datapath.flow_version(hash) }
    }
}

/// The highest byte of a TCP segment's sequence number: units of 16 MiB.
#[inline(always)]
fn sequence<D: Tables<F>, F: IpFamily>(datapath: &D) -> u8 {
    datapath.packet().head::<TcpFrame<F::Header>>().map_or(0, |tcp| tcp.tcp.sequence[0])
}

/// Edits a packet by the copy of its flow, if there is a good one. Gives the index of the device to send
/// by; 0 if the packet is untouched, and the table has to tell.
// A number, which is known on all ways: of an `Option` LLVM would save the unset half, too, and the
// verifier allows that for nothing that was not set.
#[inline(always)]
pub fn hit<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    frame: &mut Frame<F::Header>,
    key: &FlowKey<F::Address>,
    place: Place,
) -> u32 {
    edit::<D, F>(datapath, frame, key, place).unwrap_or(0)
}

#[inline(always)]
fn edit<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    frame: &mut Frame<F::Header>,
    key: &FlowKey<F::Address>,
    place: Place,
) -> Option<u32> {
    let flow = datapath.cached_flow(place.hash)?;
    let is_of_tuple = flow.source == key.source
        && flow.destination == key.destination
        && flow.source_port == key.source_port
        && flow.destination_port == key.destination_port;
    let reply = flow.kind & CachedFlow::<(), ()>::REPLY != 0;
    let protocol = flow.kind & CachedFlow::<(), ()>::PROTOCOL;
    if !is_of_tuple || u32::from(protocol) != key.protocol || flow.version != place.version {
        return None;
    }
    if datapath.jiffies().wrapping_sub(flow.copied) >= datapath.cache_lifetime() {
        return None;
    }
    let (ifindex, destination, source, mtu) = if reply {
        let config = datapath.config()?;
        if flow.generation != config.route_generation {
            return None;
        }
        (flow.ifindex, &flow.destination_mac, &flow.source_mac, config.client_mtu)
    } else {
        let backend = datapath.backend(flow.backend)?;
        if backend.generation != flow.generation || !backend.takes_packets(datapath.sends_by_any_device()) {
            return None;
        }
        let hop = &backend.next_hop;
        if hop.ifindex == 0 || u32::from_ne_bytes(hop.vlan) != 0 {
            return None;
        }
        if protocol == IPPROTO_TCP && sequence::<D, F>(datapath).wrapping_sub(flow.sequence) > 1 {
            return None;
        }
        (hop.ifindex, &hop.destination_mac, &hop.source_mac, backend.mtu)
    };
    let length = datapath.packet().length();
    if emit::is_too_big(mtu, length - size_of::<Ethernet>()) {
        return None;
    }
    copy_mac(&mut frame.ethernet.destination, destination);
    copy_mac(&mut frame.ethernet.source, source);
    frame.ip.forward(&flow.new_source, &flow.new_destination, flow.l3_checksum_delta);
    frame.udp.source_port = flow.new_source_port;
    frame.udp.destination_port = flow.new_destination_port;
    if protocol == IPPROTO_UDP {
        checksum::apply_udp(&mut frame.udp.checksum, flow.l4_checksum_delta);
    } else {
        // It is there, or the fast path would not have come here.
        let tcp = datapath.packet().head::<TcpFrame<F::Header>>()?;
        checksum::apply(&mut tcp.tcp.checksum, flow.l4_checksum_delta);
    }
    if flow.kind & HELD != HELD {
        flow.kind |= HELD;
    }
    datapath.count_forwarded(flow.service, flow.backend, reply, length as u64);
    Some(ifindex)
}

const HELD: u8 = CachedFlow::<(), ()>::HELD;

/// Where flows are copied, keeps a copy of a flow whose packet was just treated by the table, and to which
/// the table has nothing to add; unless the place is held.
#[inline(always)]
pub fn keep<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    key: &FlowKey<F::Address>,
    flow: &Flow<F::Address>,
    place: Place,
) {
    if !datapath.caches_flows() {
        return;
    }
    let Some(copy) = datapath.cached_flow(place.hash) else { return };
    let now = datapath.jiffies();
    // A flow's own copy that is out of date is in nobody's way.
    let is_of_another = copy.source_port != key.source_port
        || copy.destination_port != key.destination_port
        || copy.source != key.source
        || copy.destination != key.destination;
    if copy.kind & HELD != 0
        && is_of_another
        && copy.version == place.version
        && now.wrapping_sub(copy.copied) < datapath.cache_lifetime()
    {
        copy.kind -= CachedFlow::<(), ()>::HELD_ONCE;
        return;
    }
    let reply = flow.is_reply();
    copy.source = key.source;
    copy.destination = key.destination;
    copy.source_port = key.source_port;
    copy.destination_port = key.destination_port;
    copy.new_source = flow.new_source;
    copy.new_destination = flow.new_destination;
    copy.new_source_port = flow.new_source_port;
    copy.new_destination_port = flow.new_destination_port;
    copy.l3_checksum_delta = flow.l3_checksum_delta;
    copy.l4_checksum_delta = flow.l4_checksum_delta;
    copy.generation = flow.generation;
    copy_mac(&mut copy.destination_mac, &flow.next_hop.destination_mac);
    copy_mac(&mut copy.source_mac, &flow.next_hop.source_mac);
    copy.ifindex = flow.next_hop.ifindex;
    copy.backend = flow.backend;
    copy.service = flow.service;
    copy.copied = now;
    copy.version = place.version;
    copy.sequence = (flow.mark >> 24) as u8;
    // Held from the start, or of flows that take turns none would ever be served by its copy.
    copy.kind = key.protocol as u8 | HELD | if reply { CachedFlow::<(), ()>::REPLY } else { 0 };
}

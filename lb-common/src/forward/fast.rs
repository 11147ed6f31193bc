//! The path of a packet of an established flow: one look into the flow table, all edits from that
//! one entry, out. Whatever is not that takes the slow path.

use super::Verdict;
use super::cache::{self, Place};
use super::checksum;
use super::emit;
use super::ip::{IpFamily, IpHeader};
use super::pair::ask_again;
use super::parse::Link;
use super::platform::{ChecksumChange, Packet, Tables};
use super::wire::{
    ETHER_TYPE_IPV4, ETHER_TYPE_IPV6, ETHER_TYPE_SERVICE_VLAN, ETHER_TYPE_VLAN, Ethernet, Frame, TCP_FIN,
    TCP_RST, TCP_SYN, TcpFrame, Udp, copy_mac,
};
use crate::abi::{DropReason, Flow, FlowFlags, FlowKey, IPPROTO_TCP, IPPROTO_UDP, NextHop, V4, V6};

/// What the fast path says of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fast {
    /// The verdict.
    Done(Verdict),
    /// It needs the slow path for IPv4.
    SlowV4,
    /// It needs the slow path for IPv6.
    SlowV6,
}

/// Decides about a packet of an established flow, or names the slow path that it needs.
#[inline(always)]
pub fn fast<D: Tables<V4> + Tables<V6>>(datapath: &D) -> Fast {
    let Some(ethernet) = datapath.packet().head::<Ethernet>() else {
        return Fast::Done(Verdict::Pass);
    };
    match ethernet.ether_type {
        ETHER_TYPE_IPV4 => done(ip::<D, V4>(datapath), Fast::SlowV4),
        ETHER_TYPE_IPV6 => done(ip::<D, V6>(datapath), Fast::SlowV6),
        ETHER_TYPE_VLAN | ETHER_TYPE_SERVICE_VLAN => match datapath.link() {
            Some(Link { ether_type: ETHER_TYPE_IPV4, .. }) => Fast::SlowV4,
            Some(Link { ether_type: ETHER_TYPE_IPV6, .. }) => Fast::SlowV6,
            _ => Fast::Done(Verdict::Pass),
        },
        _ => Fast::Done(Verdict::Pass),
    }
}

/// A packed verdict, or else what the packet needs.
#[inline(always)]
fn done(packed: Option<usize>, or: Fast) -> Fast {
    packed.map_or(or, |packed| Fast::Done(Verdict::unpack(packed)))
}

/// Flows whose segments are edited beyond addresses and ports.
const EDITS: u8 = FlowFlags::EDIT_TIMESTAMPS | FlowFlags::EDIT_SEQUENCE;

/// Gives a packed verdict.
#[inline(always)]
fn ip<D: Tables<F>, F: IpFamily>(datapath: &D) -> Option<usize> {
    let packet = datapath.packet();
    let frame = packet.head::<Frame<F::Header>>()?;
    let protocol = frame.ip.protocol();
    let payload = match protocol {
        IPPROTO_TCP => 20,
        IPPROTO_UDP => 8,
        _ => return None,
    };
    if !frame.ip.is_plain(packet.length() - size_of::<Ethernet>(), payload) || frame.ip.hops_left() <= 1 {
        return None;
    }
    if protocol == IPPROTO_TCP {
        let tcp = packet.head::<TcpFrame<F::Header>>()?;
        if tcp.tcp.flags[0] & (TCP_SYN | TCP_FIN | TCP_RST) != 0 {
            return None;
        }
    }
    let key = FlowKey {
        source: frame.ip.source(),
        destination: frame.ip.destination(),
        source_port: frame.udp.source_port,
        destination_port: frame.udp.destination_port,
        protocol: u32::from(protocol),
    };
    let mut place = Place::NOWHERE;
    if datapath.caches_flows() {
        place = Place::of::<D, F>(datapath, &key);
        let ifindex = cache::hit::<D, F>(datapath, frame, &key, place);
        if ifindex != 0 {
            return Some(Verdict::send(datapath, ifindex).pack());
        }
    }
    let mut flow = datapath.established(&key)?;
    let for_tc = if datapath.sends_by_any_device() { 0 } else { FlowFlags::TC };
    if flow.status.flags & (EDITS | FlowFlags::LOCAL | for_tc) != 0 {
        // One test for all: what is rare costs the others nothing.
        return if flow.is_local() { local::<D, F>(datapath, &key, frame, &mut flow) } else { None };
    }
    let reply = flow.is_reply();
    let (hop, mtu): (&NextHop, u16) = if reply {
        let config = datapath.config()?;
        if flow.generation != config.route_generation {
            return None;
        }
        (&flow.next_hop, config.client_mtu)
    } else {
        let backend = datapath.backend(flow.backend)?;
        if backend.generation != flow.generation || !backend.takes_packets(datapath.sends_by_any_device()) {
            return None;
        }
        (&backend.next_hop, backend.mtu)
    };
    let headers = if datapath.is_on_wire() { 0 } else { headers_length::<D, F>(datapath, protocol)? };
    if emit::is_too_big(mtu, datapath.largest_on_wire(size_of::<Ethernet>(), headers)) {
        return None;
    }
    if hop.ifindex == 0 || u32::from_ne_bytes(hop.vlan) != 0 {
        return None;
    }
    let ifindex = hop.ifindex;
    copy_mac(&mut frame.ethernet.destination, &hop.destination_mac);
    copy_mac(&mut frame.ethernet.source, &hop.source_mac);

    frame.ip.forward(&flow.new_source, &flow.new_destination, flow.l3_checksum_delta);
    if edit_transport::<D, F>(datapath, &key, frame, &flow).is_none() {
        return Some(Verdict::drop(datapath, DropReason::EditFailed).pack());
    }
    touch::<D, F>(datapath, &mut flow, protocol, reply);
    cache::keep::<D, F>(datapath, &key, &flow, place);
    datapath.count_forwarded(flow.service, flow.backend, reply, packet.length() as u64);
    Some(Verdict::send(datapath, ifindex).pack())
}

/// Bytes of a plain packet's headers from IP on.
#[inline(always)]
fn headers_length<D: Tables<F>, F: IpFamily>(datapath: &D, protocol: u8) -> Option<usize> {
    let transport = if protocol == IPPROTO_TCP {
        let tcp = datapath.packet().head::<TcpFrame<F::Header>>()?;
        usize::from(tcp.tcp.data_offset[0] >> 4) * 4
    } else {
        size_of::<Udp>()
    };
    Some(F::HEADER_LENGTH + transport)
}

/// A packet of a flow whose backend is on this node. The way to the backend, and the hop, are the
/// stack's.
#[inline(always)]
fn local<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    key: &FlowKey<F::Address>,
    frame: &mut Frame<F::Header>,
    flow: &mut Flow<F::Address>,
) -> Option<usize> {
    if flow.is_reply() {
        // Translated where it leaves the node.
        return Some(Verdict::Pass.pack());
    }
    let backend = datapath.backend(flow.backend)?;
    if backend.generation != flow.generation || backend.state == 0 {
        return None;
    }
    frame.ip.deliver(&flow.new_source, &flow.new_destination, flow.l3_checksum_delta);
    if edit_transport::<D, F>(datapath, key, frame, flow).is_none() {
        return Some(Verdict::drop(datapath, DropReason::EditFailed).pack());
    }
    touch::<D, F>(datapath, flow, key.protocol as u8, false);
    datapath.count_forwarded(flow.service, flow.backend, false, datapath.packet().length() as u64);
    Some(Verdict::Deliver.pack())
}

/// Replaces ports, and the checksum of TCP or UDP. Where the kernel edits the latter, `frame` is not
/// to be looked at again.
#[inline(always)]
fn edit_transport<D: Tables<F>, F: IpFamily>(
    datapath: &D,
    key: &FlowKey<F::Address>,
    frame: &mut Frame<F::Header>,
    flow: &Flow<F::Address>,
) -> Option<()> {
    frame.udp.source_port = flow.new_source_port;
    frame.udp.destination_port = flow.new_destination_port;
    let is_udp = key.protocol == u32::from(IPPROTO_UDP);
    if !datapath.is_on_wire() {
        let l4 = size_of::<Ethernet>() + F::HEADER_LENGTH;
        return datapath.add_to_checksum(ChecksumChange::of_tuple::<F>(l4, key, flow)).ok();
    }
    if is_udp {
        checksum::apply_udp(&mut frame.udp.checksum, flow.l4_checksum_delta);
    } else {
        let tcp = datapath.packet().head::<TcpFrame<F::Header>>()?;
        checksum::apply(&mut tcp.tcp.checksum, flow.l4_checksum_delta);
    }
    Some(())
}

/// Takes note of the moment.
#[inline(always)]
fn touch<D: Tables<F>, F: IpFamily>(datapath: &D, flow: &mut Flow<F::Address>, protocol: u8, reply: bool) {
    let now = datapath.now();
    if flow.last_seen != now {
        // Only when it changes: a line that is only read can be shared by CPUs.
        if reply {
            ask_again(flow, now);
        }
        flow.last_seen = now;
        if !reply
            && protocol == IPPROTO_TCP
            && let Some(tcp) = datapath.packet().head::<TcpFrame<F::Header>>()
        {
            flow.mark = u32::from_be_bytes(tcp.tcp.sequence);
        }
    }
}

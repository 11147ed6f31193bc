//! The edit of a packet, and its way out.

use super::Verdict;
use super::checksum;
use super::fragment;
use super::ip::{IpFamily, IpHeader};
use super::parse::{Ip, Link, Part, Transport};
use super::platform::{ChecksumChange, Datapath, EditFailed, Packet};
use super::tcp_options;
use super::wire::{ETHER_TYPE_SERVICE_VLAN, ETHER_TYPE_VLAN, Ethernet, Tcp, Udp, VlanTag, copy_mac};
use crate::abi::{DropReason, Flow, FlowFlags, FlowKey, IPPROTO_TCP, IPPROTO_UDP, NextHop, VlanTags};

/// A parsed packet of a family.
#[derive(Clone, Copy)]
pub struct Parsed<A> {
    /// Ethernet and tags.
    pub link: Link,
    /// IP.
    pub ip: Ip<A>,
    /// TCP or UDP.
    pub transport: Transport,
}

impl<A: Copy> Parsed<A> {
    /// The tuple as it came in.
    #[inline(always)]
    pub fn key(&self) -> FlowKey<A> {
        FlowKey {
            source: self.ip.source,
            destination: self.ip.destination,
            source_port: self.transport.source_port,
            destination_port: self.transport.destination_port,
            protocol: u32::from(self.ip.protocol),
        }
    }
}

/// Edits addresses, ports, checksums, timestamps and TTL as the flow says, and sends the packet to
/// the next hop; if the backend is on this node, all but the TTL, for the stack to go on with.
#[inline(always)]
pub fn forward<D: Datapath, F: IpFamily>(
    datapath: &D,
    parsed: &Parsed<F::Address>,
    flow: &Flow<F::Address>,
    hop: &NextHop,
    cursor: &mut usize,
) -> Verdict {
    let is_local = flow.is_local();
    if hop.ifindex == 0 && !is_local {
        return Verdict::drop(datapath, DropReason::NoNeighbour);
    }
    let has_options = parsed.ip.protocol == IPPROTO_TCP && !matches!(parsed.ip.part, Part::Later(_));
    if flow.status.flags & FlowFlags::EDIT_TIMESTAMPS != 0 && has_options {
        let shift = (flow.timestamp_delta, flow.is_reply());
        tcp_options::shift(datapath, cursor, parsed.ip.l4, &parsed.transport, shift);
    }
    if flow.status.flags & FlowFlags::EDIT_SEQUENCE != 0 && has_options {
        tcp_options::shift_sequence(datapath, parsed.ip.l4, (flow.timestamp_delta, flow.is_reply()));
    }
    let packet = datapath.packet();
    let Some(header) = packet.at::<F::Header>(parsed.ip.l3) else {
        return Verdict::drop(datapath, DropReason::EditFailed);
    };
    if is_local {
        header.deliver(&flow.new_source, &flow.new_destination, flow.l3_checksum_delta);
    } else {
        header.forward(&flow.new_source, &flow.new_destination, flow.l3_checksum_delta);
    }
    if edit_ports::<D, F>(datapath, parsed, flow).is_none() {
        return Verdict::drop(datapath, DropReason::EditFailed);
    }
    let packet = datapath.packet();
    // The client's own address needs no other identification than the client's own.
    if parsed.ip.part != Part::Whole && !is_local {
        let change = fragment::edit_identification::<_, F>(packet, &parsed.ip);
        datapath.add_to_sum(change);
    }
    let bytes = packet.length() as u64;
    let verdict = if is_local { Verdict::Deliver } else { send(datapath, &parsed.link, hop) };
    if !matches!(verdict, Verdict::Drop) {
        datapath.count_forwarded(flow.service, flow.backend, flow.is_reply(), bytes);
    }
    verdict
}

#[inline(always)]
fn edit_ports<D: Datapath, F: IpFamily>(
    datapath: &D,
    parsed: &Parsed<F::Address>,
    flow: &Flow<F::Address>,
) -> Option<()> {
    let Parsed { ip, .. } = parsed;
    if let Part::Later(_) = ip.part {
        if F::VERSION == 6 {
            // The checksum that balances the addresses is in the first fragment.
            let change = ChecksumChange::of_tuple::<F>(ip.l4, &parsed.key(), flow);
            datapath.add_to_sum(change.pseudo + change.beside);
        }
        return Some(());
    }
    let packet = datapath.packet();
    let is_udp = ip.protocol == IPPROTO_UDP;
    if !datapath.is_on_wire() {
        let ports = packet.at::<Udp>(ip.l4)?;
        ports.source_port = flow.new_source_port;
        ports.destination_port = flow.new_destination_port;
        return datapath.add_to_checksum(ChecksumChange::of_tuple::<F>(ip.l4, &parsed.key(), flow)).ok();
    }
    if is_udp {
        let udp = packet.at::<Udp>(ip.l4)?;
        udp.source_port = flow.new_source_port;
        udp.destination_port = flow.new_destination_port;
        checksum::apply_udp(&mut udp.checksum, flow.l4_checksum_delta);
    } else {
        let tcp = packet.at::<Tcp>(ip.l4)?;
        tcp.source_port = flow.new_source_port;
        tcp.destination_port = flow.new_destination_port;
        checksum::apply(&mut tcp.checksum, flow.l4_checksum_delta);
    }
    Some(())
}

/// Sends the packet to a next hop: tags and Ethernet addresses are replaced.
#[inline(always)]
pub fn send<D: Datapath>(datapath: &D, link: &Link, hop: &NextHop) -> Verdict {
    if datapath.set_tags(link, hop.vlan).is_err() {
        return Verdict::drop(datapath, DropReason::EditFailed);
    }
    let Some(ethernet) = datapath.packet().head::<Ethernet>() else {
        return Verdict::drop(datapath, DropReason::EditFailed);
    };
    copy_mac(&mut ethernet.destination, &hop.destination_mac);
    copy_mac(&mut ethernet.source, &hop.source_mac);
    Verdict::send(datapath, hop.ifindex)
}

/// Whether an IP packet of some bytes does not fit; an MTU of 0 takes any.
#[inline(always)]
#[must_use]
pub fn is_too_big(mtu: u16, bytes: usize) -> bool {
    // One comparison for both.
    usize::from(mtu.wrapping_sub(1)) < bytes.wrapping_sub(1)
}

/// Bytes of the largest IP packet that a parsed packet is on the wire.
#[inline(always)]
pub fn largest_on_wire<D: Datapath, A>(datapath: &D, parsed: &Parsed<A>) -> usize {
    let Parsed { ip, transport, .. } = parsed;
    let transport = if ip.protocol == IPPROTO_TCP { transport.header_length } else { size_of::<Udp>() };
    datapath.largest_on_wire(ip.l3, ip.l4 - ip.l3 + transport)
}

/// Replaces the tags of a packet that has them all in its bytes.
/// # Errors
/// When there is no room.
#[inline(always)]
pub fn set_tags_in_packet<D: Datapath>(
    datapath: &D,
    link: &Link,
    wanted: VlanTags,
) -> Result<(), EditFailed> {
    let differs = u32::from_ne_bytes(wanted) != u32::from_ne_bytes(link.vlan);
    // A priority tag is there and says nothing.
    if !differs && tags(link) == depth(wanted) {
        return Ok(());
    }
    retag(datapath, link, wanted).ok_or(EditFailed)
}

/// Number of tags that a packet has in its bytes, those of zero included.
#[inline(always)]
#[must_use]
pub fn tags(link: &Link) -> i32 {
    (link.l3 as i32 - size_of::<Ethernet>() as i32) / 4
}

/// Number of tags that are wanted.
#[inline(always)]
#[must_use]
pub fn depth(vlan: VlanTags) -> i32 {
    i32::from(vlan[0] | vlan[1] != 0) + i32::from(vlan[2] | vlan[3] != 0)
}

/// Replaces the packet's tags by those of the next hop.
#[inline(always)]
fn retag<D: Datapath>(datapath: &D, link: &Link, wanted: VlanTags) -> Option<()> {
    let have = tags(link);
    let want = depth(wanted);
    if have != want {
        datapath.move_head((have - want) * 4).ok()?;
    }
    let packet = datapath.packet();
    let ethernet = packet.head::<Ethernet>()?;
    let [outer_high, outer_low, inner_high, inner_low] = wanted;
    match want {
        0 => ethernet.ether_type = link.ether_type,
        1 => {
            ethernet.ether_type = ETHER_TYPE_VLAN;
            *packet.at::<VlanTag>(14)? =
                VlanTag { control: [outer_high, outer_low], ether_type: link.ether_type };
        }
        _ => {
            ethernet.ether_type = ETHER_TYPE_SERVICE_VLAN;
            *packet.at::<VlanTag>(14)? =
                VlanTag { control: [outer_high, outer_low], ether_type: ETHER_TYPE_VLAN };
            *packet.at::<VlanTag>(18)? =
                VlanTag { control: [inner_high, inner_low], ether_type: link.ether_type };
        }
    }
    Some(())
}

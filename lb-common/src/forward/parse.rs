//! The full parser: VLAN tags, IPv4 options, IPv6 extension headers, fragments.
//!
//! `None` means "malformed, or nothing that we handle": such a packet is passed untouched.

use super::platform::Packet;
use super::wire::{
    ETHER_TYPE_SERVICE_VLAN, ETHER_TYPE_VLAN, Ethernet, Ipv4, Ipv6, Ipv6Extension, Tcp, Udp, VlanTag,
};
use crate::abi::{IPPROTO_TCP, IPPROTO_UDP, V4, V6, VlanTags};

/// What lies before the IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// EtherType after the tags.
    pub ether_type: [u8; 2],
    /// Offset of the IP header.
    pub l3: usize,
    /// The tags.
    pub vlan: VlanTags,
}

/// Parses the Ethernet header and up to two VLAN tags. A third is left as the EtherType.
#[inline(always)]
pub fn link<P: Packet>(packet: P) -> Option<Link> {
    let ethernet = packet.head::<Ethernet>()?;
    let mut link = Link { ether_type: ethernet.ether_type, l3: size_of::<Ethernet>(), vlan: [0; 4] };
    if is_vlan(link.ether_type) {
        let outer = packet.at::<VlanTag>(link.l3)?;
        let control = outer.control;
        link = Link { ether_type: outer.ether_type, l3: 18, vlan: [control[0], control[1], 0, 0] };
        if is_vlan(link.ether_type) {
            let inner = packet.at::<VlanTag>(link.l3)?;
            link.ether_type = inner.ether_type;
            link.l3 = 22;
            let [high, low] = inner.control;
            // An outer tag of zero is a priority, not a VLAN (IEEE 802.1Q).
            link.vlan =
                if control == [0; 2] { [high, low, 0, 0] } else { [control[0], control[1], high, low] };
        }
    }
    Some(link)
}

#[inline(always)]
fn is_vlan(ether_type: [u8; 2]) -> bool {
    ether_type == ETHER_TYPE_VLAN || ether_type == ETHER_TYPE_SERVICE_VLAN
}

/// Bytes of a packet that are looked at: headers with options, and what an ICMP error quotes.
pub const REACH: u32 = 256;

/// Which part of a fragmented datagram a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The whole datagram.
    Whole,
    /// The first fragment, which has the ports; with the datagram's identification.
    First([u8; 4]),
    /// A later fragment.
    Later([u8; 4]),
}

/// An IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip<A> {
    /// Offset of the IP header.
    pub l3: usize,
    /// Offset of what follows the IP header and its options or extension headers.
    pub l4: usize,
    /// Offset of the end of the IP packet; Ethernet padding may follow.
    pub end: usize,
    /// Offset of the IPv6 fragment header; 0 if there is none.
    pub fragment_header: usize,
    /// Source address.
    pub source: A,
    /// Destination address.
    pub destination: A,
    /// Protocol, after extension headers.
    pub protocol: u8,
    /// TTL or hop limit.
    pub hops_left: u8,
    /// Which part of a datagram it is.
    pub part: Part,
}

/// An address family that the parser can read.
pub trait Parse: super::ip::IpFamily {
    /// Parses the header at `found.l3`; false if it is malformed. `whole` says that the packet has to
    /// contain all that the header promises: a quote in an ICMP error does not.
    fn parse<P: Packet>(packet: P, whole: bool, found: &mut Ip<Self::Address>) -> bool;
}

/// Whether a packet is longer than its header can say: one of BIG TCP, which the kernel segments
/// after we have seen it (`iph_totlen`, `ipv6_hopopt_jumbo_remove` in Linux). XDP sees none.
#[inline(always)]
fn is_super_packet<P: Packet>(packet: P) -> bool {
    packet.length() > 0xffff
}

// Functions of their own, not inlined: the verifier forgets their many paths when they return.

impl Parse for V4 {
    #[inline(never)]
    fn parse<P: Packet>(packet: P, whole: bool, found: &mut Ip<[u8; 4]>) -> bool {
        let Some(ip) = packet.at::<Ipv4>(found.l3) else { return false };
        let header_length = usize::from(ip.version_ihl[0] & 0x0f) * 4;
        let total_length = usize::from(u16::from_be_bytes(ip.total_length));
        found.l4 = found.l3 + header_length;
        found.end = found.l3 + total_length;
        if total_length == 0 && is_super_packet(packet) {
            found.end = packet.length();
        }
        found.fragment_header = 0;
        if ip.version_ihl[0] >> 4 != 4 || header_length < 20 || found.end < found.l4 {
            return false;
        }
        if whole && found.end > packet.length() {
            return false;
        }
        let fragment = u16::from_be_bytes(ip.fragment);
        let [high, low] = ip.identification;
        let identification = [0, 0, high, low];
        found.part = match (fragment & 0x1fff, fragment & 0x2000) {
            (0, 0) => Part::Whole,
            (0, _) => Part::First(identification),
            _ => Part::Later(identification),
        };
        found.source = ip.source;
        found.destination = ip.destination;
        found.protocol = ip.protocol[0];
        found.hops_left = ip.ttl[0];
        true
    }
}

/// Extension headers that are walked before the parser gives up: one of each kind (RFC 8200,
/// section 4.1), destination options twice.
const MAXIMUM_EXTENSIONS: usize = 5;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

impl Parse for V6 {
    #[inline(never)]
    fn parse<P: Packet>(packet: P, whole: bool, found: &mut Ip<[u8; 16]>) -> bool {
        let Some(ip) = packet.at::<Ipv6>(found.l3) else { return false };
        found.end = found.l3 + 40 + usize::from(u16::from_be_bytes(ip.payload_length));
        if ip.payload_length == [0; 2] && is_super_packet(packet) {
            found.end = packet.length();
        }
        if ip.version_class_label[0] >> 4 != 6 || (whole && found.end > packet.length()) {
            return false;
        }
        found.fragment_header = 0;
        found.source = ip.source;
        found.destination = ip.destination;
        found.hops_left = ip.hop_limit[0];
        found.part = Part::Whole;
        let mut next_header = ip.next_header[0];
        let mut l4 = found.l3 + 40;
        // One more turn, for the header that they lead to.
        for _ in 0..=MAXIMUM_EXTENSIONS {
            if !matches!(next_header, HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | FRAGMENT) {
                found.protocol = next_header;
                found.l4 = l4;
                return l4 <= found.end;
            }
            let Some(extension) = packet.at::<Ipv6Extension>(l4) else { return false };
            if next_header == FRAGMENT {
                let fragment = u16::from_be_bytes(extension.fragment);
                found.fragment_header = l4;
                found.part = match (fragment >> 3, fragment & 1) {
                    // An atomic fragment (RFC 6946) is a whole datagram.
                    (0, 0) => Part::Whole,
                    (0, _) => Part::First(extension.identification),
                    _ => Part::Later(extension.identification),
                };
                if let Part::Later(_) = found.part {
                    found.protocol = extension.next_header[0];
                    found.l4 = l4 + 8;
                    return found.l4 <= found.end;
                }
                l4 += 8;
            } else {
                l4 += (usize::from(extension.length[0]) + 1) * 8;
            }
            next_header = extension.next_header[0];
        }
        false
    }
}

/// What the forwarding core needs to know of a TCP or UDP header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transport {
    /// Source port.
    pub source_port: [u8; 2],
    /// Destination port.
    pub destination_port: [u8; 2],
    /// TCP control bits; 0 for UDP.
    pub flags: u8,
    /// TCP sequence number.
    pub sequence: u32,
    /// TCP acknowledgment number.
    pub acknowledgment: u32,
    /// Length of the TCP header in bytes; 8 for UDP.
    pub header_length: usize,
}

/// Parses the TCP or UDP header of a packet that has one; false if it has not.
#[inline(never)]
pub fn transport<P: Packet, A>(packet: P, ip: &Ip<A>, found: &mut Transport) -> bool {
    if ip.protocol == IPPROTO_UDP {
        let Some(udp) = packet.at::<Udp>(ip.l4) else { return false };
        // The length must cover the header (RFC 768), and lie inside the packet.
        let length = usize::from(u16::from_be_bytes(udp.length));
        *found = Transport {
            source_port: udp.source_port,
            destination_port: udp.destination_port,
            header_length: 8,
            ..Transport::default()
        };
        return ip.l4 + 8 <= ip.end && length >= 8 && (ip.part != Part::Whole || ip.l4 + length <= ip.end);
    }
    if ip.protocol != IPPROTO_TCP {
        return false;
    }
    let Some(tcp) = packet.at::<Tcp>(ip.l4) else { return false };
    found.header_length = usize::from(tcp.data_offset[0] >> 4) * 4;
    found.source_port = tcp.source_port;
    found.destination_port = tcp.destination_port;
    found.flags = tcp.flags[0];
    found.sequence = u32::from_be_bytes(tcp.sequence);
    found.acknowledgment = u32::from_be_bytes(tcp.acknowledgment);
    found.header_length >= 20 && ip.l4 + found.header_length <= ip.end
}

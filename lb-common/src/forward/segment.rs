//! TCP segments of our own, written over the packet at hand.

use super::checksum::{fold, sum};
use super::emit::Parsed;
use super::ip::IpFamily;
use super::parse::{Ip, Part};
use super::platform::{Datapath, Packet};
use super::wire::{Ethernet, Tcp, copy_mac};
use crate::abi::IPPROTO_TCP;

/// A segment without IP options, and without TCP options but one. Words of 8
/// bytes: LLVM would store smaller fields together, across the alignment of the stack, which the verifier
/// forbids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    /// Sequence number.
    pub sequence: u64,
    /// Acknowledgment number.
    pub acknowledgment: u64,
    /// Window, in native order.
    pub window: u64,
    /// The option "maximum segment size" (RFC 9293, section 3.2); 0 for none.
    pub mss: u64,
    /// Control bits.
    pub flags: u64,
    /// Bytes of payload, all zero: at most one.
    pub payload: u64,
    /// Not zero if it goes back to where the packet came from.
    pub turned: u64,
}

/// Kind and length of the option "maximum segment size".
const MSS: [u8; 2] = [2, 4];

/// Length of the TCP header of a SYN that has at most that option.
pub const PLAIN_SYN: usize = 24;

impl Segment {
    /// Length of its TCP header in bytes.
    #[inline(always)]
    #[must_use]
    pub fn header_length(&self) -> usize {
        size_of::<Tcp>() + if self.mss == 0 { 0 } else { 4 }
    }
}

/// Exchanges the addresses of a frame.
#[inline(always)]
pub fn turn_around(ethernet: &mut Ethernet) {
    let (mut from, mut to) = ([0; 6], [0; 6]);
    copy_mac(&mut from, &ethernet.source);
    copy_mac(&mut to, &ethernet.destination);
    copy_mac(&mut ethernet.source, &to);
    copy_mac(&mut ethernet.destination, &from);
}

/// Sum of a pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1).
#[inline(always)]
pub fn pseudo_header<F: IpFamily>(ip: &Ip<F::Address>, protocol: u8, length: u16) -> u32 {
    F::sum(&ip.source) + F::sum(&ip.destination) + sum(&[0, protocol]) + sum(&length.to_be_bytes())
}

/// Whether the TCP or UDP checksum of a packet is unfinished.
#[inline(always)]
pub fn is_unfinished<D: Datapath, A>(datapath: &D, ip: &Ip<A>) -> bool {
    !datapath.is_on_wire()
        && !matches!(ip.part, Part::Later(_))
        && datapath.is_unfinished(ip.l4 + if ip.protocol == IPPROTO_TCP { 16 } else { 6 })
}

/// Writes a segment over the packet, a TCP one, between the same two ends. `None` if there is no room.
#[inline(never)]
pub fn write<D: Datapath, F: IpFamily>(
    datapath: &D,
    parsed: &Parsed<F::Address>,
    segment: &Segment,
) -> Option<()> {
    let Parsed { link, ip, transport } = parsed;
    let l4 = link.l3 + F::HEADER_LENGTH;
    let length = segment.header_length() + (segment.payload & 1) as usize;
    let is_unfinished = is_unfinished(datapath, ip);
    if !datapath.is_on_wire() && ip.l4 > l4 {
        // The kernel would finish the checksum where it was, and cuts nothing off in front of it.
        datapath.take_out_options((ip.l4 - l4) as u32).ok()?;
    }
    datapath.move_tail((l4 + length) as i32 - datapath.packet().length() as i32).ok()?;
    let packet = datapath.packet();
    let (mut source, mut destination) = (&ip.source, &ip.destination);
    let (mut source_port, mut destination_port) = (transport.source_port, transport.destination_port);
    if segment.turned != 0 {
        turn_around(packet.head::<Ethernet>()?);
        (source, destination) = (destination, source);
        (source_port, destination_port) = (destination_port, source_port);
    }
    F::write_header(packet.at(link.l3)?, source, destination, IPPROTO_TCP, length as u16);
    *packet.at::<Tcp>(l4)? = Tcp {
        source_port,
        destination_port,
        sequence: (segment.sequence as u32).to_be_bytes(),
        acknowledgment: (segment.acknowledgment as u32).to_be_bytes(),
        data_offset: [(segment.header_length() << 2) as u8],
        flags: [segment.flags as u8],
        window: (segment.window as u16).to_be_bytes(),
        checksum: [0; 2],
        urgent: [0; 2],
    };
    let pseudo = pseudo_header::<F>(ip, IPPROTO_TCP, length as u16);
    let mut total = pseudo + sum(packet.at::<[u8; 20]>(l4)?);
    if segment.mss != 0 {
        let [high, low] = (segment.mss as u16).to_be_bytes();
        *packet.at::<[u8; 4]>(l4 + size_of::<Tcp>())? = [MSS[0], MSS[1], high, low];
        total += sum(&MSS) + sum(&[high, low]);
    } else if segment.payload != 0 {
        *packet.at::<[u8; 1]>(l4 + size_of::<Tcp>())? = [0];
    }
    let checksum = if is_unfinished { fold(pseudo) } else { !fold(total) };
    packet.at::<Tcp>(l4)?.checksum = checksum.to_ne_bytes();
    Some(())
}

/// Writes a segment over the packet that goes on in its direction, and takes note of where it is now. What
/// the packet was before, its control bits and numbers, stays to be looked at.
#[inline(always)]
pub fn replace<D: Datapath, F: IpFamily>(
    datapath: &D,
    parsed: &mut Parsed<F::Address>,
    segment: &Segment,
) -> Option<()> {
    write::<D, F>(datapath, parsed, segment)?;
    parsed.ip.l4 = parsed.link.l3 + F::HEADER_LENGTH;
    parsed.ip.end = parsed.ip.l4 + segment.header_length() + (segment.payload & 1) as usize;
    parsed.ip.part = Part::Whole;
    parsed.ip.fragment_header = 0;
    parsed.transport.header_length = segment.header_length();
    Some(())
}

//! Makes of a finished frame what a virtual NIC could hand over in its place.

use etherparse::{Ipv6ExtensionSlice, NetSlice, SlicedPacket, TransportSlice};
use lb_common::abi::{IPPROTO_TCP, IPPROTO_UDP};
use lb_common::forward::checksum::{apply, fold, replaced};

use super::random::Source;
use super::seen;
use super::skb::{Beside, Frame, fold_bytes};

/// Payload of a super-packet that does not fit one page, where the kernel puts it into several pieces.
const LARGE: usize = 6_000;

/// Where the headers of a sound, whole TCP or UDP packet without padding are.
struct Headers {
    l3: usize,
    l4: usize,
    payload: usize,
    protocol: u8,
    /// Whether it can be segments of a super-packet. The kernel makes none with a fragment header.
    may_be_super: bool,
}

impl Headers {
    fn of(bytes: &[u8]) -> Option<Self> {
        if seen::read(bytes).ok()?.fragmented {
            return None;
        }
        let sliced = SlicedPacket::from_ethernet(bytes).ok()?;
        let offset = |part: &[u8]| part.as_ptr() as usize - bytes.as_ptr() as usize;
        let (l3, has_fragment_header) = match sliced.net? {
            NetSlice::Ipv4(ip) => (offset(ip.header().slice()), false),
            NetSlice::Ipv6(ip) => {
                let mut extensions = ip.extensions().clone().into_iter();
                let found = extensions.any(|header| matches!(header, Ipv6ExtensionSlice::Fragment(_)));
                (offset(ip.header().slice()), found)
            }
            NetSlice::Arp(_) => return None,
        };
        let (whole, payload, protocol, field) = match sliced.transport? {
            TransportSlice::Tcp(tcp) => (tcp.slice(), offset(tcp.payload()), IPPROTO_TCP, tcp.checksum()),
            TransportSlice::Udp(udp) => (udp.slice(), offset(udp.payload()), IPPROTO_UDP, udp.checksum()),
            _ => return None,
        };
        let l4 = offset(whole);
        let is_unpadded = l4 + whole.len() == bytes.len();
        let has_checksum = protocol == IPPROTO_TCP || field != 0;
        (is_unpadded && has_checksum).then_some(Self {
            l3,
            l4,
            payload,
            protocol,
            may_be_super: protocol == IPPROTO_TCP && !has_fragment_header,
        })
    }

    /// Offset of the checksum in the TCP or UDP header.
    fn field(&self) -> usize {
        self.l4 + if self.protocol == IPPROTO_TCP { 16 } else { 6 }
    }
}

/// Makes the payload longer, and the lengths in the IP header with it.
fn lengthen(bytes: &mut Vec<u8>, l3: usize, by: usize) {
    bytes.extend((0..by).map(|index| index as u8));
    let is_v4 = bytes[l3] >> 4 == 4;
    let at = l3 + if is_v4 { 2 } else { 4 };
    let old = [bytes[at], bytes[at + 1]];
    let new = (u16::from_be_bytes(old) + by as u16).to_be_bytes();
    bytes[at..at + 2].copy_from_slice(&new);
    if is_v4 {
        let mut checksum = [bytes[l3 + 10], bytes[l3 + 11]];
        apply(&mut checksum, fold(replaced(&old, &new)));
        bytes[l3 + 10..l3 + 12].copy_from_slice(&checksum);
    }
}

/// The pseudo header's sum (RFC 9293 section 3.1, RFC 8200 section 8.1).
fn pseudo_header(bytes: &[u8], headers: &Headers) -> u16 {
    // Routing headers are not used: the destination is the header's.
    let addresses = if bytes[headers.l3] >> 4 == 4 { 12..20 } else { 8..40 };
    let length = ((bytes.len() - headers.l4) as u16).to_be_bytes();
    let rest = [0, headers.protocol, length[0], length[1]];
    let addresses = &bytes[headers.l3 + addresses.start..headers.l3 + addresses.end];
    fold_bytes(&[addresses, &rest[..]].concat())
}

/// The frame as it is, or with its checksum unfinished, or as a super-packet, if it can be one.
#[must_use]
pub fn choose(bytes: &[u8], source: &mut Source) -> Frame {
    let mut frame = Frame::plain(bytes);
    let choice = source.below(4);
    if choice == 0 {
        return frame;
    }
    let Some(headers) = Headers::of(bytes) else { return frame };
    if choice == 3 && headers.may_be_super {
        let by = source.of(&[0, 200, LARGE]);
        lengthen(&mut frame.bytes, headers.l3, by);
        let segment = source.of(&[64, 540, 1_300]);
        if frame.bytes.len() - headers.payload > usize::from(segment) {
            frame.beside.segment = Some(segment);
        }
    }
    let field = headers.field();
    let sum = pseudo_header(&frame.bytes, &headers);
    frame.bytes[field..field + 2].copy_from_slice(&sum.to_ne_bytes());
    frame.beside.unfinished = Some((headers.l4, field));
    frame
}

/// Offset of the IP header of a sound packet whose edits balance in the sum of the whole of it. Those of a
/// UDP datagram without checksum do not, and nobody looks at its sum.
fn l3_of_balanced(bytes: &[u8]) -> Option<usize> {
    let seen = seen::read(bytes).ok()?;
    let sliced = SlicedPacket::from_ethernet(bytes).ok()?;
    let (l3, protocol) = match &sliced.net? {
        NetSlice::Ipv4(ip) => (ip.header().slice().as_ptr(), ip.payload().ip_number.0),
        NetSlice::Ipv6(ip) => (ip.header().slice().as_ptr(), ip.payload().ip_number.0),
        NetSlice::Arp(_) => return None,
    };
    let is_balanced = match seen.body {
        seen::SeenBody::Udp { checksum, .. } => checksum != 0,
        _ => !seen.fragmented || protocol == IPPROTO_TCP,
    };
    is_balanced.then_some(l3 as usize - bytes.as_ptr() as usize)
}

/// The same for the host alone: only some of the bytes may be in the first piece, and a device may have
/// taken the sum of the whole packet.
#[must_use]
pub fn choose_in_pieces(bytes: &[u8], source: &mut Source) -> Frame {
    let mut frame = choose(bytes, source);
    if frame.beside.unfinished.is_none() {
        frame.beside.sum = l3_of_balanced(bytes).map(|l3| fold_bytes(&bytes[l3..]));
    }
    if source.once_in(2) {
        frame.beside.in_reach = 14 + source.below(120) as usize;
    }
    frame
}

/// `struct virtio_net_hdr`, as a tap device reads and writes it.
pub const VIRTIO_HEADER: usize = 10;
const NEEDS_CHECKSUM: u8 = 1;
const TCP_V4: u8 = 1;
const TCP_V6: u8 = 4;

/// The frame as it is written to a tap device.
#[must_use]
pub fn to_tap(frame: &Frame) -> Vec<u8> {
    let Frame { bytes, beside } = frame;
    let mut header = [0; VIRTIO_HEADER];
    if let Some((start, field)) = beside.unfinished {
        header[0] = NEEDS_CHECKSUM;
        header[6..8].copy_from_slice(&(start as u16).to_ne_bytes());
        header[8..10].copy_from_slice(&((field - start) as u16).to_ne_bytes());
        if let Some(segment) = beside.segment {
            let net = SlicedPacket::from_ethernet(bytes).ok().and_then(|sliced| sliced.net);
            let is_v4 = matches!(net, Some(NetSlice::Ipv4(_)));
            header[1] = if is_v4 { TCP_V4 } else { TCP_V6 };
            let length = start + usize::from(bytes[start + 12] >> 4) * 4;
            header[2..4].copy_from_slice(&(length as u16).to_ne_bytes());
            header[4..6].copy_from_slice(&segment.to_ne_bytes());
        }
    }
    [&header[..], bytes].concat()
}

/// A frame as it is read from a tap device.
///
/// # Panics
/// When there is no header.
#[must_use]
pub fn from_tap(read: &[u8]) -> Frame {
    let (header, bytes) = read.split_at(VIRTIO_HEADER);
    let word = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
    let start = usize::from(word(6));
    let beside = Beside {
        unfinished: (header[0] & NEEDS_CHECKSUM != 0).then(|| (start, start + usize::from(word(8)))),
        segment: (header[1] != 0).then(|| word(4)),
        ..Beside::NOTHING
    };
    Frame { bytes: bytes.to_vec(), beside }
}

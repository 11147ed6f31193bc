//! The packet that tells a client of UDP that its datagram did not arrive.
//!
//! The kernel of a client finds the socket that an error is for by the datagram that it quotes (RFC 1122,
//! section 4.1.3.3), so a proxy has to write one: its own kernel knows of no error at the VIP.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

/// What is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    /// Nobody listens there.
    Port,
    /// There is no way there.
    Host,
    /// The way takes no packets longer than this, in bytes with the IP header, unless they are fragments.
    TooBig(u32),
}

/// A datagram that cannot be delivered.
#[derive(Clone, Copy, Debug)]
pub struct Undelivered<'a> {
    /// Who sent it.
    pub client: SocketAddr,
    /// Where it was sent to. Of the same family.
    pub vip: SocketAddr,
    /// Bytes of its payload.
    pub length: u16,
    /// As much of the payload as is at hand.
    pub payload: &'a [u8],
}

/// RFC 1812, section 4.3.2.3: as much of the datagram as fits.
const MAXIMUM_V4: usize = 576;
/// RFC 4443, section 2.4 (c).
const MAXIMUM_V6: usize = 1_280;
/// Nobody is told to send smaller packets than every host takes (RFC 791, section 3.1; RFC 8200, section 5),
/// whatever somebody claims on the way.
const LEAST_MTU_V4: u16 = 576;
const LEAST_MTU_V6: u32 = 1_280;
const UDP_HEADER: usize = 8;
const ICMP_HEADER: usize = 8;
const IPPROTO_ICMP: u8 = 1;
const IPPROTO_UDP: u8 = 17;
const IPPROTO_ICMPV6: u8 = 58;
/// Linux's default.
const HOPS: u8 = 64;

/// The whole IP packet from the VIP to the client. Empty if the two are of different families.
#[must_use]
pub fn packet(why: Unreachable, of: &Undelivered<'_>) -> Vec<u8> {
    match (of.client, of.vip) {
        (SocketAddr::V4(client), SocketAddr::V4(vip)) => packet_v4(why, client, vip, of),
        (SocketAddr::V6(client), SocketAddr::V6(vip)) => packet_v6(why, client, vip, of),
        _ => Vec::new(),
    }
}

fn packet_v4(why: Unreachable, client: SocketAddrV4, vip: SocketAddrV4, of: &Undelivered<'_>) -> Vec<u8> {
    const HEADER: usize = 20;
    let room = MAXIMUM_V4 - HEADER - ICMP_HEADER - HEADER - UDP_HEADER;
    let payload = &of.payload[..of.payload.len().min(room).min(of.length.into())];
    let pseudo = [client.ip().octets(), vip.ip().octets()].concat();
    let quoted_length = HEADER + UDP_HEADER + usize::from(of.length);
    // RFC 792, page 4: host 1, port 3, fragmentation needed 4, with the MTU of RFC 1191, section 4.
    let (code, mtu) = match why {
        Unreachable::Host => (1, 0),
        Unreachable::Port => (3, 0),
        Unreachable::TooBig(mtu) => (4, u16::try_from(mtu).unwrap_or(u16::MAX).max(LEAST_MTU_V4)),
    };
    let mut icmp = vec![3, code, 0, 0, 0, 0];
    icmp.extend(mtu.to_be_bytes());
    icmp.extend(header_v4(*client.ip(), *vip.ip(), IPPROTO_UDP, quoted_length));
    icmp.extend(datagram(of, &pseudo, payload));
    let sum = checksum(&[&icmp]);
    icmp[2..4].copy_from_slice(&sum);
    let mut packet = header_v4(*vip.ip(), *client.ip(), IPPROTO_ICMP, HEADER + icmp.len()).to_vec();
    packet.extend(icmp);
    packet
}

fn packet_v6(why: Unreachable, client: SocketAddrV6, vip: SocketAddrV6, of: &Undelivered<'_>) -> Vec<u8> {
    const HEADER: usize = 40;
    let room = MAXIMUM_V6 - HEADER - ICMP_HEADER - HEADER - UDP_HEADER;
    let payload = &of.payload[..of.payload.len().min(room).min(of.length.into())];
    let pseudo = [client.ip().octets(), vip.ip().octets()].concat();
    // RFC 4443, section 3.1: address 3, port 4; section 3.2: packet too big.
    let (kind, code, mtu) = match why {
        Unreachable::Host => (1, 3, 0),
        Unreachable::Port => (1, 4, 0),
        Unreachable::TooBig(mtu) => (2, 0, mtu.max(LEAST_MTU_V6)),
    };
    let mut icmp = vec![kind, code, 0, 0];
    icmp.extend(mtu.to_be_bytes());
    let quoted_length = UDP_HEADER + usize::from(of.length);
    icmp.extend(header_v6(*client.ip(), *vip.ip(), IPPROTO_UDP, quoted_length));
    icmp.extend(datagram(of, &pseudo, payload));
    let length = (icmp.len() as u32).to_be_bytes();
    // Both sums are over the addresses, in whichever order (RFC 8200, section 8.1).
    let sum = checksum(&[&pseudo, &length, &[0, 0, 0, IPPROTO_ICMPV6], &icmp]);
    icmp[2..4].copy_from_slice(&sum);
    let mut packet = header_v6(*vip.ip(), *client.ip(), IPPROTO_ICMPV6, icmp.len()).to_vec();
    packet.extend(icmp);
    packet
}

/// The UDP header as the client sent it, and the payload. The sum is that of the datagram if all of it is
/// at hand, else none: who quotes need not have it right.
fn datagram(of: &Undelivered<'_>, pseudo: &[u8], payload: &[u8]) -> Vec<u8> {
    let length = UDP_HEADER as u16 + of.length.min(u16::MAX - UDP_HEADER as u16);
    let mut datagram = Vec::with_capacity(UDP_HEADER + payload.len());
    datagram.extend(of.client.port().to_be_bytes());
    datagram.extend(of.vip.port().to_be_bytes());
    datagram.extend(length.to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    if of.payload.len() >= of.length.into() {
        let whole = &of.payload[..of.length.into()];
        let rest = &datagram[..UDP_HEADER].to_vec();
        let [a, b] = length.to_be_bytes();
        let sum = match checksum(&[pseudo, &[0, IPPROTO_UDP, a, b], rest, whole]) {
            // RFC 768: 0 would say that there is none.
            [0, 0] => [0xff, 0xff],
            sum => sum,
        };
        datagram[6..8].copy_from_slice(&sum);
    }
    datagram
}

fn header_v4(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, length: usize) -> [u8; 20] {
    let mut header = [0; 20];
    header[0] = 0x45;
    header[2..4].copy_from_slice(&(length.min(u16::MAX.into()) as u16).to_be_bytes());
    // Do not fragment: so an identification of 0 is allowed (RFC 6864).
    header[6] = 0x40;
    header[8] = HOPS;
    header[9] = protocol;
    header[12..16].copy_from_slice(&source.octets());
    header[16..20].copy_from_slice(&destination.octets());
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&sum);
    header
}

fn header_v6(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, payload: usize) -> [u8; 40] {
    let mut header = [0; 40];
    header[0] = 0x60;
    header[4..6].copy_from_slice(&(payload.min(u16::MAX.into()) as u16).to_be_bytes());
    header[6] = protocol;
    header[7] = HOPS;
    header[8..24].copy_from_slice(&source.octets());
    header[24..40].copy_from_slice(&destination.octets());
    header
}

/// The Internet checksum (RFC 1071) of parts, of which all but the last have an even length.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let word = |bytes: &[u8]| u32::from(u16::from_be_bytes([bytes[0], *bytes.get(1).unwrap_or(&0)]));
    let mut sum: u32 = words.map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of<'a>(client: &str, vip: &str, length: u16, payload: &'a [u8]) -> Undelivered<'a> {
        Undelivered { client: client.parse().unwrap(), vip: vip.parse().unwrap(), length, payload }
    }

    /// A receiver's check: the sum of all with the checksum in it.
    fn is_right(parts: &[&[u8]]) -> bool {
        checksum(parts) == [0, 0]
    }

    #[test]
    fn v4() {
        let packet = packet(Unreachable::Port, &of("198.51.100.7:4000", "192.0.2.1:53", 5, b"hello"));
        assert_eq!(packet.len(), 20 + 8 + 20 + 8 + 5);
        assert!(is_right(&[&packet[..20]]) && is_right(&[&packet[20..]]) && is_right(&[&packet[28..48]]));
        assert_eq!((packet[9], &packet[20..22]), (1, &[3, 3][..]));
        assert_eq!((&packet[12..16], &packet[16..20]), (&[192, 0, 2, 1][..], &[198, 51, 100, 7][..]));
        // The quote goes the other way.
        assert_eq!((&packet[40..44], &packet[44..48]), (&[198, 51, 100, 7][..], &[192, 0, 2, 1][..]));
        assert_eq!(packet[48..54], [0x0f, 0xa0, 0, 53, 0, 13]);
        assert!(is_right(&[&packet[40..48], &[0, 17, 0, 13], &packet[48..]]));
        assert_eq!(packet[2..4], (packet.len() as u16).to_be_bytes());
        assert_eq!(packet[30..32], (20u16 + 13).to_be_bytes());
    }

    #[test]
    fn v6() {
        let packet = packet(Unreachable::Host, &of("[2001:db8::7]:4000", "[2001:db8::1]:53", 4, b"ping"));
        assert_eq!(packet.len(), 40 + 8 + 40 + 8 + 4);
        let length = packet.len() as u16 - 40;
        assert_eq!((packet[4..6].to_vec(), packet[6]), (length.to_be_bytes().to_vec(), 58));
        assert_eq!(packet[40..42], [1, 3]);
        let length = u32::from(length).to_be_bytes();
        assert!(is_right(&[&packet[8..40], &length, &[0, 0, 0, 58], &packet[40..]]));
        assert!(is_right(&[&packet[56..88], &[0, 17, 0, 12], &packet[88..]]));
        assert_eq!((packet[23], packet[39], packet[71], packet[87]), (1, 7, 7, 1));
    }

    #[test]
    fn codes() {
        let codes = |client, vip| {
            let small = Unreachable::TooBig(7);
            [Unreachable::Port, Unreachable::Host, Unreachable::TooBig(1_400), small].map(|why| {
                let packet = packet(why, &of(client, vip, 0, b""));
                let at = if packet[0] >> 4 == 4 { 20 } else { 40 };
                let mtu = u32::from_be_bytes(packet[at + 4..at + 8].try_into().unwrap());
                (packet[at], packet[at + 1], mtu)
            })
        };
        let v4 = [(3, 3, 0), (3, 1, 0), (3, 4, 1_400), (3, 4, 576)];
        assert_eq!(codes("198.51.100.7:1", "192.0.2.1:2"), v4);
        assert_eq!(codes("[::1]:1", "[::2]:2"), [(1, 4, 0), (1, 3, 0), (2, 0, 1_400), (2, 0, 1_280)]);
        let huge = packet(Unreachable::TooBig(70_000), &of("198.51.100.7:1", "192.0.2.1:2", 0, b""));
        assert_eq!(huge[24..28], [0, 0, 255, 255]);
        assert!(is_right(&[&huge[20..]]));
    }

    #[test]
    fn what_does_not_fit_is_cut_off_and_what_is_not_known_is_left_out() {
        let payload = [7; 65_507];
        let long = packet(Unreachable::Port, &of("198.51.100.7:1", "192.0.2.1:2", 65_507, &payload));
        assert_eq!(long.len(), 576);
        assert!(is_right(&[&long[20..]]));
        assert_eq!(long[52..54], (65_507u16 + 8).to_be_bytes());
        assert_ne!(long[54..56], [0, 0], "the sum of the whole datagram");
        let long = packet(Unreachable::Port, &of("[::1]:1", "[::2]:2", 65_507, &payload));
        assert_eq!(long.len(), 1_280);
        let unknown = packet(Unreachable::Port, &of("198.51.100.7:1", "192.0.2.1:2", 100, b""));
        assert_eq!((unknown.len(), &unknown[54..56]), (56, &[0, 0][..]));
        assert!(is_right(&[&unknown[20..]]));
    }

    #[test]
    fn families_are_not_mixed() {
        assert!(packet(Unreachable::Port, &of("198.51.100.7:1", "[::2]:2", 0, b"")).is_empty());
    }
}

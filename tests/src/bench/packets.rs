//! The packets of the benchmark: a template of 96 bytes, and what differs between flows.

use lb_common::abi::FlowKey;
use lb_common::forward::checksum::{fold, sum};

/// Length of every packet; behind the IP packet is padding.
pub const LENGTH: usize = 96;
/// Flows at most.
pub const FLOWS: usize = 65_536;

/// Backends' initial sequence number, and the client's.
const BACKEND_ISN: u32 = 5_000;
const CLIENT_ISN: u32 = 1_000;

/// What is measured as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// IPv6.
    pub is_ipv6: bool,
    /// UDP.
    pub is_udp: bool,
}

/// Segment of a connection's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// SYN with the options of Linux.
    Syn,
    /// SYN-ACK.
    SynAck,
    /// The client's answer to it, or any later segment without data, with a timestamp.
    Ack,
    /// Any segment of the backend's.
    Reply,
    /// A UDP datagram.
    Datagram,
}

/// A tuple; an IPv4 address is in the last four bytes, those of IPv6 differ only there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    pub source: [u8; 16],
    pub destination: [u8; 16],
    pub source_port: u16,
    pub destination_port: u16,
}

/// First twelve bytes of every IPv6 address.
pub const PREFIX: [u8; 12] = [0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0];

/// An address of the benchmark from its last four bytes.
#[must_use]
pub fn address(low: [u8; 4]) -> [u8; 16] {
    let mut whole = [0; 16];
    whole[..12].copy_from_slice(&PREFIX);
    whole[12..].copy_from_slice(&low);
    whole
}

/// Last four bytes of an address.
#[must_use]
pub fn low(address: &[u8; 16]) -> [u8; 4] {
    [address[12], address[13], address[14], address[15]]
}

/// The client side of flow `index` to a VIP: 256 clients with 256 ports each.
#[must_use]
pub fn client(index: usize, vip: [u8; 4], port: u16, generation: u8) -> Tuple {
    Tuple {
        source: address([10, 100 + generation, (index >> 8) as u8, 7]),
        destination: address(vip),
        source_port: 33_000 + (index & 0xff) as u16,
        destination_port: port,
    }
}

impl Tuple {
    /// Key of the flow tables for IPv4.
    #[must_use]
    pub fn key_v4(&self, kind: Kind) -> FlowKey<[u8; 4]> {
        FlowKey {
            source: low(&self.source),
            destination: low(&self.destination),
            source_port: self.source_port.to_be_bytes(),
            destination_port: self.destination_port.to_be_bytes(),
            protocol: kind.protocol().into(),
        }
    }

    /// Key of the flow tables for IPv6.
    #[must_use]
    pub fn key_v6(&self, kind: Kind) -> FlowKey<[u8; 16]> {
        FlowKey {
            source: self.source,
            destination: self.destination,
            source_port: self.source_port.to_be_bytes(),
            destination_port: self.destination_port.to_be_bytes(),
            protocol: kind.protocol().into(),
        }
    }
}

impl Kind {
    /// IANA protocol number.
    #[must_use]
    pub fn protocol(self) -> u8 {
        if self.is_udp { 17 } else { 6 }
    }

    /// Offset of TCP or UDP.
    #[must_use]
    pub fn l4(self) -> usize {
        if self.is_ipv6 { 54 } else { 34 }
    }

    /// Offset of its checksum.
    #[must_use]
    pub fn checksum(self) -> usize {
        self.l4() + if self.is_udp { 6 } else { 16 }
    }
}

const SYN_OPTIONS: [u8; 20] = [2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 1, 0, 0, 0, 0, 0, 1, 3, 3, 7];
const TIMESTAMPS: [u8; 12] = [1, 1, 8, 10, 0, 0, 1, 0, 0, 0, 1, 0];

fn transport(kind: Kind, segment: Segment) -> Vec<u8> {
    if kind.is_udp {
        let mut bytes = vec![0; 8 + 18];
        bytes[5] = 26;
        return bytes;
    }
    let (flags, sequence, acknowledgment, options): (u8, u32, u32, &[u8]) = match segment {
        Segment::Syn => (0x02, CLIENT_ISN, 0, &SYN_OPTIONS),
        Segment::SynAck => (0x12, BACKEND_ISN, CLIENT_ISN + 1, &SYN_OPTIONS),
        Segment::Ack | Segment::Datagram => (0x10, CLIENT_ISN + 1, BACKEND_ISN + 1, &TIMESTAMPS),
        Segment::Reply => (0x10, BACKEND_ISN + 1, CLIENT_ISN + 1, &TIMESTAMPS),
    };
    let mut bytes = vec![0; 20];
    bytes[4..8].copy_from_slice(&sequence.to_be_bytes());
    bytes[8..12].copy_from_slice(&acknowledgment.to_be_bytes());
    bytes[12] = (((20 + options.len()) / 4) << 4) as u8;
    bytes[13] = flags;
    bytes[14..16].copy_from_slice(&[0xff, 0xff]);
    bytes.extend_from_slice(options);
    bytes
}

/// A packet with addresses, ports and checksums of a tuple.
#[must_use]
pub fn packet(kind: Kind, segment: Segment, tuple: &Tuple, macs: ([u8; 6], [u8; 6])) -> [u8; LENGTH] {
    let mut packet = [0; LENGTH];
    packet[..6].copy_from_slice(&macs.0);
    packet[6..12].copy_from_slice(&macs.1);
    let mut payload = transport(kind, segment);
    payload[..2].copy_from_slice(&tuple.source_port.to_be_bytes());
    payload[2..4].copy_from_slice(&tuple.destination_port.to_be_bytes());
    let l4 = kind.l4();
    if kind.is_ipv6 {
        packet[12..14].copy_from_slice(&[0x86, 0xdd]);
        packet[14] = 0x60;
        packet[18..20].copy_from_slice(&(payload.len() as u16).to_be_bytes());
        packet[20] = kind.protocol();
        packet[21] = 64;
        packet[22..38].copy_from_slice(&tuple.source);
        packet[38..54].copy_from_slice(&tuple.destination);
    } else {
        packet[12..14].copy_from_slice(&[0x08, 0x00]);
        packet[14] = 0x45;
        packet[16..18].copy_from_slice(&(payload.len() as u16 + 20).to_be_bytes());
        packet[20] = 0x40;
        packet[22] = 64;
        packet[23] = kind.protocol();
        packet[26..30].copy_from_slice(&low(&tuple.source));
        packet[30..34].copy_from_slice(&low(&tuple.destination));
        let header = !fold(words(&packet[14..34]));
        packet[24..26].copy_from_slice(&header.to_ne_bytes());
    }
    packet[l4..l4 + payload.len()].copy_from_slice(&payload);
    let addresses = if kind.is_ipv6 { words(&packet[22..54]) } else { words(&packet[26..34]) };
    let pseudo = addresses + sum(&[0, kind.protocol()]) + sum(&(payload.len() as u16).to_be_bytes());
    let checksum = !fold(pseudo + words(&packet[l4..l4 + payload.len()]));
    packet[kind.checksum()..kind.checksum() + 2].copy_from_slice(&checksum.to_ne_bytes());
    packet
}

fn words(bytes: &[u8]) -> u32 {
    bytes.chunks_exact(2).map(|pair| u32::from(u16::from_ne_bytes([pair[0], pair[1]]))).sum()
}

/// The part of a packet that the harness writes for each flow.
#[must_use]
pub fn record(kind: Kind, segment: Segment, tuple: &Tuple) -> [u64; 2] {
    let packet = packet(kind, segment, tuple, ([0; 6], [0; 6]));
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&low(&tuple.source));
    bytes[4..8].copy_from_slice(&low(&tuple.destination));
    bytes[8..10].copy_from_slice(&tuple.source_port.to_be_bytes());
    bytes[10..12].copy_from_slice(&tuple.destination_port.to_be_bytes());
    if !kind.is_ipv6 {
        bytes[12..14].copy_from_slice(&packet[24..26]);
    }
    bytes[14..].copy_from_slice(&packet[kind.checksum()..kind.checksum() + 2]);
    let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| bytes[at + byte]));
    [word(0), word(8)]
}

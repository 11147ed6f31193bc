//! Reads packets with a library that shares nothing with the code under test, and verifies every
//! checksum in them.

use std::net::IpAddr;

use etherparse::checksum::Sum16BitWords;
use etherparse::{LinkExtSlice, LinkSlice, NetSlice, SlicedPacket, TcpOptionElement, TransportSlice};

/// A packet as its receiver sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Ethernet source.
    pub from: [u8; 6],
    /// Ethernet destination.
    pub to: [u8; 6],
    /// VLAN tag control informations, outer one first.
    pub vlan: Vec<u16>,
    /// IP source.
    pub source: IpAddr,
    /// IP destination.
    pub destination: IpAddr,
    /// TTL or hop limit.
    pub hops: u8,
    /// Identification of a fragment (IPv4: of any packet).
    pub identification: u32,
    /// Whether it is a fragment.
    pub fragmented: bool,
    /// What IP carries.
    pub body: SeenBody,
}

/// What IP carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SeenBody {
    /// TCP.
    Tcp {
        /// Source and destination port.
        ports: (u16, u16),
        /// Sequence number.
        sequence: u32,
        /// Acknowledgment number.
        acknowledgment: u32,
        /// Control bits.
        flags: u8,
        /// Timestamp value and echo.
        timestamp: Option<(u32, u32)>,
        /// Payload.
        payload: Vec<u8>,
    },
    /// UDP.
    Udp {
        /// Source and destination port.
        ports: (u16, u16),
        /// The checksum field.
        checksum: u16,
        /// Payload.
        payload: Vec<u8>,
    },
    /// ICMP of the packet's family.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// The word after the checksum.
        rest: [u8; 4],
        /// What follows.
        payload: Vec<u8>,
    },
    /// A fragment, or another protocol: the bytes after the IP headers.
    Other(Vec<u8>),
}

impl Seen {
    /// Source and destination port of TCP or UDP.
    #[must_use]
    pub fn ports(&self) -> (u16, u16) {
        match self.body {
            SeenBody::Tcp { ports, .. } | SeenBody::Udp { ports, .. } => ports,
            _ => (0, 0),
        }
    }

    /// TCP control bits.
    #[must_use]
    pub fn flags(&self) -> u8 {
        if let SeenBody::Tcp { flags, .. } = self.body { flags } else { 0 }
    }

    /// TCP timestamp value and echo.
    #[must_use]
    pub fn timestamp(&self) -> Option<(u32, u32)> {
        if let SeenBody::Tcp { timestamp, .. } = self.body { timestamp } else { None }
    }

    /// Payload of TCP or UDP.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        match &self.body {
            SeenBody::Tcp { payload, .. }
            | SeenBody::Udp { payload, .. }
            | SeenBody::Icmp { payload, .. } => payload,
            SeenBody::Other(bytes) => bytes,
        }
    }
}

/// Reads a packet from its Ethernet header on.
///
/// # Errors
/// What is malformed, or which checksum is wrong.
pub fn read(frame: &[u8]) -> Result<Seen, String> {
    let packet = SlicedPacket::from_ethernet(frame).map_err(|error| error.to_string())?;
    let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link else { return Err("no Ethernet".into()) };
    let vlan = packet
        .link_exts
        .iter()
        .map(|tag| match tag {
            LinkExtSlice::Vlan(tag) => Ok(u16::from_be_bytes([tag.slice()[0], tag.slice()[1]])),
            LinkExtSlice::Macsec(_) => Err("MACsec".to_owned()),
        })
        .collect::<Result<_, _>>()?;
    let mut seen = Seen {
        from: ethernet.source(),
        to: ethernet.destination(),
        vlan,
        source: IpAddr::from([0; 4]),
        destination: IpAddr::from([0; 4]),
        hops: 0,
        identification: 0,
        fragmented: false,
        body: SeenBody::Other(Vec::new()),
    };
    let payload = match packet.net.as_ref().ok_or("no IP")? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            let expected = header.to_header().calc_header_checksum();
            if expected != header.header_checksum() {
                return Err(format!("IPv4 checksum {:#06x}, not {expected:#06x}", header.header_checksum()));
            }
            seen.source = header.source_addr().into();
            seen.destination = header.destination_addr().into();
            seen.hops = header.ttl();
            seen.identification = header.identification().into();
            ip.payload()
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            seen.source = header.source_addr().into();
            seen.destination = header.destination_addr().into();
            seen.hops = header.hop_limit();
            for extension in ip.extensions().clone() {
                if let etherparse::Ipv6ExtensionSlice::Fragment(fragment) = extension {
                    seen.identification = fragment.identification();
                }
            }
            ip.payload()
        }
        NetSlice::Arp(_) => return Err("ARP".into()),
    };
    seen.fragmented = payload.fragmented;
    seen.body = match &packet.transport {
        None => SeenBody::Other(payload.payload.to_vec()),
        Some(transport) => body(&seen, transport, payload.payload)?,
    };
    Ok(seen)
}

fn body(seen: &Seen, transport: &TransportSlice<'_>, bytes: &[u8]) -> Result<SeenBody, String> {
    match transport {
        TransportSlice::Tcp(tcp) => {
            verify("TCP", seen, 6, bytes)?;
            let timestamp = tcp.options_iterator().find_map(|option| match option {
                Ok(TcpOptionElement::Timestamp(value, echo)) => Some((value, echo)),
                _ => None,
            });
            Ok(SeenBody::Tcp {
                ports: (tcp.source_port(), tcp.destination_port()),
                sequence: tcp.sequence_number(),
                acknowledgment: tcp.acknowledgment_number(),
                flags: tcp.slice()[13],
                timestamp,
                payload: tcp.payload().to_vec(),
            })
        }
        TransportSlice::Udp(udp) => {
            if udp.checksum() != 0 {
                verify("UDP", seen, 17, &bytes[..usize::from(udp.length())])?;
            }
            Ok(SeenBody::Udp {
                ports: (udp.source_port(), udp.destination_port()),
                checksum: udp.checksum(),
                payload: udp.payload().to_vec(),
            })
        }
        TransportSlice::Icmpv4(icmp) => {
            let sum = Sum16BitWords::new().add_slice(bytes).ones_complement();
            if sum != 0 {
                return Err(format!("ICMP checksum is off by {sum:#06x}"));
            }
            Ok(SeenBody::Icmp {
                kind: icmp.type_u8(),
                code: icmp.code_u8(),
                rest: icmp.bytes5to8(),
                payload: bytes[8..].to_vec(),
            })
        }
        TransportSlice::Icmpv6(icmp) => {
            verify("ICMPv6", seen, 58, bytes)?;
            Ok(SeenBody::Icmp {
                kind: icmp.type_u8(),
                code: icmp.code_u8(),
                rest: icmp.bytes5to8(),
                payload: bytes[8..].to_vec(),
            })
        }
        TransportSlice::Igmp(_) => Ok(SeenBody::Other(bytes.to_vec())),
    }
}

/// Verifies a checksum that covers a pseudo header.
fn verify(name: &str, seen: &Seen, protocol: u8, bytes: &[u8]) -> Result<(), String> {
    let mut sum = Sum16BitWords::new();
    sum = match (seen.source, seen.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            sum.add_4bytes(source.octets()).add_4bytes(destination.octets())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            sum.add_16bytes(source.octets()).add_16bytes(destination.octets())
        }
        _ => return Err("mixed families".into()),
    };
    sum = sum.add_2bytes([0, protocol]).add_4bytes((bytes.len() as u32).to_be_bytes()).add_slice(bytes);
    let off = sum.ones_complement();
    if off == 0 { Ok(()) } else { Err(format!("{name} checksum is off by {off:#06x}")) }
}

/// Reads the packet that an ICMP error quotes, as far as it is there. Gives source, destination,
/// protocol, both ports, and what of the IPv4 header checksum is wrong (0 if it is right).
///
/// # Errors
/// When not even the ports are there.
pub fn quote(bytes: &[u8]) -> Result<(IpAddr, IpAddr, u8, (u16, u16)), String> {
    let packet = etherparse::LaxSlicedPacket::from_ip(bytes).map_err(|error| error.to_string())?;
    let (source, destination, payload) = match packet.net.as_ref().ok_or("no IP")? {
        etherparse::LaxNetSlice::Ipv4(ip) => {
            let header = ip.header();
            if header.to_header().calc_header_checksum() != header.header_checksum() {
                return Err("the quoted IPv4 checksum is wrong".into());
            }
            (header.source_addr().into(), header.destination_addr().into(), ip.payload())
        }
        etherparse::LaxNetSlice::Ipv6(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into(), ip.payload())
        }
        etherparse::LaxNetSlice::Arp(_) => return Err("ARP".into()),
    };
    let bytes = payload.payload;
    if bytes.len() < 8 {
        return Err(format!("{} bytes of payload are quoted", bytes.len()));
    }
    let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    Ok((source, destination, payload.ip_number.0, (port(0), port(2))))
}

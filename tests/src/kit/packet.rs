//! Builds packets, header by header, with checksums from the definition.

use std::net::IpAddr;

/// TCP control bits.
pub mod flags {
    #![allow(missing_docs, reason = "the names of RFC 9293")]
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const PSH: u8 = 8;
    pub const ACK: u8 = 16;
}

/// A packet to be built.
#[derive(Clone, Debug)]
pub struct Spec {
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
    /// IPv4 identification, or that of the IPv6 fragment header.
    pub identification: u32,
    /// IPv4 options; padded to whole words.
    pub options: Vec<u8>,
    /// IPv6 extension headers: kind, and what follows next header and length; padded to 8 bytes.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// Offset in 8-byte units, and whether more follow.
    pub fragment: Option<(u16, bool)>,
    /// What IP carries.
    pub body: Body,
    /// Bytes after the IP packet.
    pub padding: usize,
}

/// What IP carries.
#[derive(Clone, Debug)]
pub enum Body {
    /// TCP.
    Tcp(Tcp),
    /// UDP.
    Udp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// Payload.
        payload: Vec<u8>,
        /// Whether there is a checksum.
        checksum: bool,
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
    /// Anything: the bytes after the IP header.
    Raw {
        /// Protocol.
        protocol: u8,
        /// The bytes.
        bytes: Vec<u8>,
    },
}

/// A TCP segment.
#[derive(Clone, Debug, Default)]
pub struct Tcp {
    /// Source port.
    pub source: u16,
    /// Destination port.
    pub destination: u16,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgment number.
    pub acknowledgment: u32,
    /// Control bits.
    pub flags: u8,
    /// Options; padded to whole words with END.
    pub options: Vec<u8>,
    /// Payload.
    pub payload: Vec<u8>,
}

/// The usual options of a SYN (or, without `syn`, of another segment) with a timestamp.
#[must_use]
pub fn tcp_options(syn: bool, value: u32, echo: u32) -> Vec<u8> {
    let mut options = if syn { vec![2, 4, 5, 0xb4, 4, 2] } else { vec![1, 1] };
    options.extend([8, 10]);
    options.extend(value.to_be_bytes());
    options.extend(echo.to_be_bytes());
    if syn {
        options.extend([1, 3, 3, 7]);
    }
    options
}

/// The Internet checksum of some bytes (RFC 1071, from its definition).
#[must_use]
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

impl Spec {
    /// A packet with this in it, from and to these addresses.
    #[must_use]
    pub fn new(source: IpAddr, destination: IpAddr, body: Body) -> Self {
        Self {
            from: [2, 0, 0, 0, 0, 1],
            to: [2, 0, 0, 0, 0, 2],
            vlan: Vec::new(),
            source,
            destination,
            hops: 64,
            identification: 0x1234,
            options: Vec::new(),
            extensions: Vec::new(),
            fragment: None,
            body,
            padding: 0,
        }
    }

    fn protocol(&self) -> u8 {
        match &self.body {
            Body::Tcp(_) => 6,
            Body::Udp { .. } => 17,
            Body::Icmp { .. } if self.source.is_ipv4() => 1,
            Body::Icmp { .. } => 58,
            Body::Raw { protocol, .. } => *protocol,
        }
    }

    /// What IP carries, as bytes.
    #[must_use]
    pub fn transport(&self) -> Vec<u8> {
        let (mut bytes, place) = match &self.body {
            Body::Tcp(tcp) => (tcp_bytes(tcp), Some(16)),
            Body::Udp { source, destination, payload, checksum } => {
                let mut bytes = Vec::new();
                for field in [*source, *destination, 8 + payload.len() as u16, 0] {
                    bytes.extend(field.to_be_bytes());
                }
                bytes.extend(payload);
                (bytes, checksum.then_some(6))
            }
            Body::Icmp { kind, code, rest, payload } => {
                let mut bytes = vec![*kind, *code, 0, 0];
                bytes.extend(rest);
                bytes.extend(payload);
                (bytes, Some(2))
            }
            Body::Raw { bytes, .. } => (bytes.clone(), None),
        };
        if let Some(place) = place {
            let mut pseudo = Vec::new();
            if self.protocol() != 1 {
                pseudo.extend(octets(self.source));
                pseudo.extend(octets(self.destination));
                pseudo.extend([0, self.protocol()]);
                pseudo.extend((bytes.len() as u16).to_be_bytes());
            }
            let sum = match checksum(&[&pseudo, &bytes]) {
                0 if self.protocol() == 17 => 0xffff,
                sum => sum,
            };
            bytes[place..place + 2].copy_from_slice(&sum.to_be_bytes());
        }
        bytes
    }

    /// The packet from the Ethernet header on.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        let mut frame = self.link();
        frame.extend(self.ip(&self.transport()));
        frame.extend(std::iter::repeat_n(0xee, self.padding));
        frame
    }

    /// The packet from the IP header on.
    #[must_use]
    pub fn build_ip(&self) -> Vec<u8> {
        self.ip(&self.transport())
    }

    /// The fragments of the packet, with `size` bytes of payload each (a multiple of 8).
    #[must_use]
    pub fn fragments(&self, size: usize) -> Vec<Vec<u8>> {
        let whole = self.transport();
        let protocol = self.protocol();
        let count = whole.len().div_ceil(size);
        whole
            .chunks(size)
            .enumerate()
            .map(|(index, bytes)| {
                let body = Body::Raw { protocol, bytes: bytes.to_vec() };
                let fragment = Some(((index * size / 8) as u16, index + 1 < count));
                Self { body, fragment, ..self.clone() }.build()
            })
            .collect()
    }

    fn link(&self) -> Vec<u8> {
        let mut frame = [self.to, self.from].concat();
        for (index, tag) in self.vlan.iter().enumerate() {
            let kind = if index + 1 < self.vlan.len() { 0x88a8u16 } else { 0x8100 };
            frame.extend(kind.to_be_bytes());
            frame.extend(tag.to_be_bytes());
        }
        frame.extend(if self.source.is_ipv4() { [8, 0] } else { [0x86, 0xdd] });
        frame
    }

    fn ip(&self, payload: &[u8]) -> Vec<u8> {
        if self.source.is_ipv4() { self.ipv4(payload) } else { self.ipv6(payload) }
    }

    fn ipv4(&self, payload: &[u8]) -> Vec<u8> {
        let mut options = self.options.clone();
        options.resize(options.len().next_multiple_of(4), 0);
        let length = 20 + options.len();
        let (offset, more) = self.fragment.unwrap_or((0, false));
        let mut header = vec![0x40 | (length / 4) as u8, 0];
        header.extend(((length + payload.len()) as u16).to_be_bytes());
        header.extend((self.identification as u16).to_be_bytes());
        header.extend((offset | u16::from(more) << 13).to_be_bytes());
        header.extend([self.hops, self.protocol(), 0, 0]);
        header.extend(octets(self.source));
        header.extend(octets(self.destination));
        header.extend(options);
        let sum = checksum(&[&header]).to_be_bytes();
        header[10..12].copy_from_slice(&sum);
        header.extend(payload);
        header
    }

    fn ipv6(&self, payload: &[u8]) -> Vec<u8> {
        let mut kinds: Vec<u8> = self.extensions.iter().map(|(kind, _)| *kind).collect();
        if self.fragment.is_some() {
            kinds.push(44);
        }
        kinds.push(self.protocol());
        let mut rest = Vec::new();
        for (index, (_, body)) in self.extensions.iter().enumerate() {
            let length = (2 + body.len()).next_multiple_of(8);
            let start = rest.len();
            rest.extend([kinds[index + 1], (length / 8 - 1) as u8]);
            rest.extend(body);
            // PadN over what is left, or Pad1: valid options in options headers.
            rest.resize(start + length, 0);
        }
        if let Some((offset, more)) = self.fragment {
            rest.extend([self.protocol(), 0]);
            rest.extend((offset << 3 | u16::from(more)).to_be_bytes());
            rest.extend(self.identification.to_be_bytes());
        }
        rest.extend(payload);
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend((rest.len() as u16).to_be_bytes());
        packet.extend([kinds[0], self.hops]);
        packet.extend(octets(self.source));
        packet.extend(octets(self.destination));
        packet.extend(rest);
        packet
    }
}

fn tcp_bytes(tcp: &Tcp) -> Vec<u8> {
    let mut options = tcp.options.clone();
    options.resize(options.len().next_multiple_of(4), 0);
    let mut bytes = Vec::new();
    bytes.extend(tcp.source.to_be_bytes());
    bytes.extend(tcp.destination.to_be_bytes());
    bytes.extend(tcp.sequence.to_be_bytes());
    bytes.extend(tcp.acknowledgment.to_be_bytes());
    bytes.extend([(((20 + options.len()) / 4) << 4) as u8, tcp.flags, 0x72, 0x10, 0, 0, 0, 0]);
    bytes.extend(options);
    bytes.extend(&tcp.payload);
    bytes
}
